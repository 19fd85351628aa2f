"""Every fault of the upstream, over real sockets, in every API, streaming and not.

A case's id names the fault, the API and the form.  Behind each case a good request goes through
the same pool, and every call that was made must have carried exactly its caller's key.
"""
from __future__ import annotations

import gzip
import http.client
import itertools
import json
import os
import re
import socket
import ssl
import struct
import threading
import time
import zlib
from typing import NamedTuple

import ccproxy
import pytest
from fake_upstream import (CHUNKED_HEAD, FakeUpstream, chunked, endless, in_pieces, ndjson, raw,
                           stall, status, stream, text_answer)
from harness import (FAST, Answer, Proxy, fold_chat, fold_messages, post_bytes, read_until,
                     wait_until)
from pure import fold_items, read_comments, read_frames

PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages", "responses": "/v1/responses"}
QUICK = FAST._replace(backoff=(0.0, 0.0), sweep=0.02)
CERTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "certs")
OK = b"HTTP/1.1 200 OK\r\n"
GOOD = text_answer("Hello", " there")
START = ndjson({"type": "start"})
HALF = START + ndjson({"type": "text-delta", "id": "0", "text": "Half"})
CALL = START + ndjson({"type": "tool-input-start", "id": "c", "toolName": "f"},
                      {"type": "tool-input-delta", "id": "c", "delta": '{"a":'})
FINISH = ndjson({"type": "finish", "finishReason": "stop",
                 "totalUsage": {"inputTokens": 7, "outputTokens": 3}})


class Way(NamedTuple):
    """How a client asks."""

    api: str
    streamed: bool


WAYS = [Way(api, streamed) for api in PATHS for streamed in (True, False)]
WAY_NAMES = ["%s-%s" % (way.api, "streaming" if way.streamed else "plain") for way in WAYS]
each_way = pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
each_api = pytest.mark.parametrize("api", PATHS)


def each(names, rows):
    """A test per row, whose first member is its name."""
    wanted = [row[1:] if names.count(",") else row[1] for row in rows]
    assert len({row[0] for row in rows}) == len(rows)
    return pytest.mark.parametrize(names, wanted, ids=[row[0] for row in rows])


# The stage: an upstream that does what it is told, a proxy, and clients with keys of their own.


KEYS = ("user_caller%06d" % number for number in itertools.count())


class Client:
    """A client that keeps its connection, as SDKs do, until an answer broke or says so."""

    def __init__(self, proxy):
        self.connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)

    def request(self, method, path, body, fields, key):
        """The API of Proxy.request."""
        self.connection.request(method, path, json.dumps(body).encode(), fields)
        got = self.connection.getresponse()
        answer = Answer(got.status, {name.lower(): value for name, value in got.getheaders()},
                        got.read())
        if b'"error":{' in answer.body and got.status == 200:
            self.connection.close()
        return answer


def ask(proxy, way, key, **members):
    """One request; Anthropic's clients send their key as x-api-key."""
    body = {"model": "vendor/model", "stream": way.streamed, **members}
    body.setdefault("input" if way.api == "responses" else "messages",
                    [{"role": "user", "content": "hi"}])
    if way.api == "messages":
        body.setdefault("max_tokens", 1000)
    fields = {"x-api-key" if way.api == "messages" else "authorization":
              key if way.api == "messages" else "Bearer " + key}
    return proxy.request("POST", PATHS[way.api], body, fields, None)


def soon(condition):
    """As wait_until, for what takes less than a millisecond."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.0003)


def check_keys(requests, key):
    """Each call carried this key, once, and no other."""
    for request in requests:
        assert request.field("authorization") == "Bearer " + key
        told = json.dumps(request.fields) + request.body.decode()
        assert re.findall(r"user_\w+", told) == [key]


class Stage:
    """A fake upstream with a proxy in front of it."""

    def __init__(self, upstream=None, limits=QUICK, **options):
        self.upstream = upstream or FakeUpstream()
        self.good = self.upstream.default
        options.setdefault("apiBase", self.upstream.base)
        self.proxy = Proxy(limits, useProviderModels=False, **options)
        self.client = Client(self.proxy)

    def ask(self, way, *scripts, always=None, tries=1, fresh=True, **members):
        """The answer to a request whose calls meet these scripts, and from then on `always` (a
        good answer); checked: how many calls there were, their keys, and in two ways of six, for
        time, that all goes on.  Unless `fresh` is false the pool is empty before."""
        fake, key = self.upstream, next(KEYS)
        del fake.requests[:]
        fake.scripts, fake.default = list(scripts), always or self.good
        self.forget_log()
        if fresh:
            self.proxy.loop.call_soon_threadsafe(self.proxy.app.home.pool.prune, float("inf"))
        answer = ask(self.client, way, key, **members)
        self.calls, fake.default = list(fake.requests), self.good
        assert len(self.calls) == tries and not fake.scripts
        check_keys(self.calls, key)
        assert len({call.body for call in self.calls}) <= 1
        if way in (WAYS[0], WAYS[3]):
            self.check_good(way)
        return answer

    def check_good(self, way):
        """The pool is in order: a good request needs one call, and is not disturbed."""
        key = next(KEYS)
        del self.upstream.requests[:]
        assert said(way, ask(self.client, way, key)) == "Hello there"
        assert len(self.upstream.requests) == 1
        check_keys(self.upstream.requests, key)

    def forget_log(self):
        """Behind all that still runs, which would write to it or come back to the pool."""
        soon(lambda: not self.proxy.app.relays and not self.proxy.app.exchanges)
        self.proxy.log.seek(0)
        self.proxy.log.truncate()

    def logged(self, mark):
        """The line of the log with this mark, once it is there."""
        found = []

        def look():
            found[:] = [line for line in self.proxy.log.getvalue().split("\n") if mark in line]
            return found
        soon(look)
        return found[0]

    def close(self):
        self.client.connection.close()
        self.proxy.close()
        self.upstream.close()
        log = self.proxy.log.getvalue()
        assert "Traceback" not in log and "never retrieved" not in log, log


@pytest.fixture(scope="module")
def stage():
    one = Stage()
    yield one
    one.close()


# What a client understands.


def plain_message(api, body):
    """(text, thinking) of a whole answer."""
    if api == "chat":
        choice, = body["choices"]
        assert choice["finish_reason"] == "stop" and "error" not in body
        return choice["message"]["content"], choice["message"].get("reasoning_content", "")
    if api == "messages":
        assert (body["type"], body["stop_reason"]) == ("message", "end_turn")
        return join(body["content"], "text"), join(body["content"], "thinking")
    assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
    parts = [part for item in body["output"] for part in item.get("content", item.get("summary"))]
    return (join([part for part in parts if part["type"] == "output_text"], "text"),
            join([part for part in parts if part["type"] == "summary_text"], "text"))


def join(parts, member):
    return "".join(part.get(member, "") for part in parts)


def fold(api, frames):
    """(text, thinking) of a stream's frames before its last ones; it begins once."""
    if api == "chat":
        assert [number for number, frame in enumerate(frames) for choice in frame["choices"]
                if "role" in choice["delta"]] == [0][:len(frames)]
        message, _, _ = fold_chat(frames)
        return message["content"], message.get("reasoning_content", "")
    kinds = [frame["type"] for frame in frames]
    if api == "messages":
        assert kinds.count("message_start") == len(kinds[:1]) == kinds[:1].count("message_start")
        blocks = fold_messages(frames).get("content", [])
        return join(blocks, "text"), join(blocks, "thinking")
    if not frames:
        return "", ""
    assert kinds[:2] == ["response.created", "response.in_progress"]
    items = fold_items(frames[2:])
    return ("".join(item.text for item in items if item.kind == "message"),
            "".join(item.text for item in items if item.kind == "reasoning"))


LAST_FRAMES = {"messages": ["message_delta", "message_stop"], "responses": ["response.completed"]}
ENDS = ("message_delta", "message_stop", "error", "response.completed", "response.incomplete",
        "response.failed")


def told(way, answer):
    """(text, thinking) of an answer that went well: whole, in order, with its proper end."""
    assert answer.status == 200, answer.body[:2000]
    if not way.streamed:
        return plain_message(way.api, answer.json)
    frames = read_frames(answer.body)
    if way.api == "chat":
        assert frames.pop() == "[DONE]" and fold_chat(frames)[1] == "stop"
        return fold("chat", frames)
    kinds = [frame["type"] for frame in frames]
    last = LAST_FRAMES[way.api]
    assert kinds[-len(last):] == last == [kind for kind in kinds if kind in ENDS]
    check_numbers(way.api, frames)
    return fold(way.api, frames if way.api == "messages" else frames[:-1])


def said(way, answer):
    text, thinking = told(way, answer)
    assert not thinking
    return text


def check_numbers(api, frames):
    if api == "responses":
        assert [frame["sequence_number"] for frame in frames] == list(range(len(frames)))


class Told(NamedTuple):
    """How a client is told of a kind of failure."""

    status: int
    openai: str                     # error.type of Chat Completions and Responses
    code: object                    # error.code there
    anthropic: str                  # error.type of Messages
    failed: str                     # error.code of response.failed
    final: bool                     # x-should-retry: false


KINDS = {
    "upstream": Told(502, "server_error", "upstream_error", "api_error", "server_error", False),
    "final": Told(502, "server_error", "upstream_error", "api_error", "server_error", True),
    "late": Told(504, "timeout_error", "timeout", "timeout_error", "server_error", False),
    "invalid": Told(400, "invalid_request_error", None, "invalid_request_error",
                    "invalid_prompt", True),
    "too long": Told(400, "invalid_request_error", "context_length_exceeded",
                     "invalid_request_error", "context_length_exceeded", True),
    "key": Told(401, "authentication_error", "invalid_api_key", "authentication_error",
                "invalid_prompt", True),
    "billing": Told(402, "insufficient_quota", "insufficient_quota", "billing_error",
                    "insufficient_quota", True),
    "plan": Told(403, "permission_error", "model_not_in_plan", "permission_error",
                 "invalid_prompt", True),
    "permission": Told(403, "permission_error", "permission_denied", "permission_error",
                       "invalid_prompt", True),
    "not found": Told(404, "invalid_request_error", "not_found", "not_found_error",
                      "invalid_prompt", True),
    "too large": Told(413, "invalid_request_error", "request_too_large", "request_too_large",
                      "invalid_prompt", True),
    "unprocessable": Told(422, "invalid_request_error", "unprocessable",
                          "invalid_request_error", "invalid_prompt", True),
    "rate": Told(429, "rate_limit_exceeded", "rate_limit_exceeded", "rate_limit_error",
                 "rate_limit_exceeded", False),
    "unavailable": Told(503, "server_error", "service_unavailable", "overloaded_error",
                        "server_error", False),
    "overloaded": Told(529, "server_error", "overloaded", "overloaded_error", "server_error",
                       False)}


def check_error(api, body, kind):
    """An error object in the API's own shape; gives its message."""
    row, error = KINDS[kind], body["error"]
    if api == "messages":
        assert set(body) == {"type", "error"} and body["type"] == "error"
        assert error["type"] == row.anthropic and "code" not in error
    else:
        assert set(body) == {"error"} and error["param"] is None
        assert (error["type"], error["code"]) == (row.openai, row.code)
    assert isinstance(error["message"], str) and error["message"]
    return error["message"]


def check_refusal(way, answer, kind, final=None):
    """A real status with the API's error as its body; gives the message."""
    row = KINDS[kind]
    assert answer.status == row.status, answer.body[:2000]
    assert answer.fields["content-type"] == "application/json"
    final = row.final if final is None else final
    assert answer.fields.get("x-should-retry") == ("false" if final else None)
    return check_error(way.api, answer.json, kind)


def check_broken(api, answer, kind):
    """A stream that began and ends with the API's error and nothing else of an end; gives
    (text, thinking, message)."""
    assert answer.status == 200 and answer.fields["content-type"].startswith("text/event-stream")
    *frames, last = read_frames(answer.body)
    if api == "responses":
        check_numbers(api, frames + [last])
        assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
        error = last["response"]["error"]
        assert set(error) == {"code", "message"} and error["code"] == KINDS[kind].failed
        message = error["message"]
    else:
        message = check_error(api, last, kind)
    if api == "chat":
        assert "[DONE]" not in frames and not any("error" in frame for frame in frames)
        assert fold_chat(frames)[1] is None
    else:
        assert not [frame for frame in frames if frame["type"] in ENDS]
    return (*fold(api, frames), message)


# Faults before any text: a true status, after so many calls.


def hang_up(data, rude):
    """These bytes, and when they were taken a FIN or a RST."""
    def run(sock, request):
        sock.sendall(data)
        if rude:
            time.sleep(0.002)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    return run


BAD_CHUNKS = [
    ("a word", b"xyz\r\n"), ("negative", b"-5\r\nabcde\r\n"), ("a plus", b"+5\r\nabcde\r\n"),
    ("0x", b"0x5\r\nabcde\r\n"), ("an underscore", b"1_0\r\n0123456789abcdef\r\n"),
    ("a space before", b" 5\r\nabcde\r\n"), ("no digits", b"\r\nabcde\r\n"),
    ("only an extension", b";a=b\r\nabcde\r\n"),
    ("seventeen digits", b"0" * 16 + b"5\r\nabcde\r\n"),
    ("a bare line feed", b"5\nabcde\r\n"), ("a bare carriage return", b"5\rabcde\r\n"),
    ("too small", b"3\r\nabcde\r\n"), ("too large", b"7\r\nabcde\r\nx"),
    ("no end of the chunk", b"5\r\nabcde5\r\n"), ("a line feed behind it", b"5\r\nabcde\n5\r\n"),
    ("a NUL", b"5;\0\r\nabcde\r\n"), ("an endless extension", b"5;" + b"x" * 5000),
    ("decimal points", b"5.0\r\nabcde\r\n"), ("other digits", "\u0665\r\nabcde\r\n".encode()),
    ("a bad trailer", b"0\r\nno colon\r\n\r\n"), ("endless trailers", b"0\r\n" + b"x: y\r\n" * 200),
    ("nothing but framing", b"1;%b\r\n{\r\n" % (b"x" * 2000) * 40)]

FAULTS = [      # what each call meets, the kind of failure, how many calls
    ("accepted and closed", raw(b"", close=True), "upstream", 3),
    ("accepted and reset", hang_up(b"", True), "upstream", 3),
    ("reset in the head", hang_up(OK + b"x:", True), "upstream", 3),
    ("closed in the head", raw(OK + b"x: y\r\n", close=True), "upstream", 3),
    ("closed after 100", raw(b"HTTP/1.1 100 Continue\r\n\r\n", close=True), "upstream", 3),
    ("1xx without end", endless(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"), "upstream", 3),
    ("101", raw(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"), "upstream", 3),
    ("another protocol", raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", close=True), "upstream", 3),
    ("HTTP/2", raw(b"HTTP/2 200\r\n\r\n", close=True), "upstream", 3),
    ("a status of two digits", raw(b"HTTP/1.1 20 OK\r\n\r\n" + GOOD, close=True), "upstream", 3),
    ("a status of words", raw(b"HTTP/1.1 OK\r\n\r\n" + GOOD, close=True), "upstream", 3),
    ("binary", raw(bytes(range(128, 256)) + b"\r\n\r\n", close=True), "upstream", 3),
    ("only line feeds", raw(b"HTTP/1.1 200 OK\nx: y\n\n" + GOOD, close=True), "upstream", 3),
    ("a huge head", raw(OK + b"x: %b\r\n\r\n" % (b"y" * 70_000)), "upstream", 3),
    ("too many fields", raw(OK + b"x: y\r\n" * 200 + b"\r\n"), "upstream", 3),
    ("an endless head", endless(OK, b"x: " + b"y" * 5000 + b"\r\n"), "upstream", 3),
    ("an endless line in the head", endless(OK + b"x: ", b"y" * 5000), "upstream", 3),
    ("a folded field", raw(OK + b"x: y\r\n z\r\n\r\n"), "upstream", 3),
    ("two lengths", raw(OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\n12"), "upstream", 3),
    ("a negative length", raw(OK + b"content-length: -1\r\n\r\n"), "upstream", 3),
    ("another transfer coding", raw(OK + b"transfer-encoding: br\r\n\r\n1"), "upstream", 3),
    ("another content coding", raw(OK + b"content-encoding: br\r\ncontent-length: 1\r\n\r\n1"),
     "upstream", 3),
    ("not the gzip it says", raw(OK + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\n1234"),
     "upstream", 3),
    ("cut gzip", raw(OK + b"content-encoding: gzip\r\n\r\n" + gzip.compress(HALF)[:-12],
                     close=True), "upstream", 3),
    ("no bytes", raw(OK + b"content-length: 0\r\n\r\n"), "upstream", 3),
    ("no chunks", raw(CHUNKED_HEAD + b"0\r\n\r\n"), "upstream", 3),
    ("204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), "final", 1),
    ("a cut chunk", raw(CHUNKED_HEAD + b"fff\r\n" + START, close=True), "upstream", 3),
    ("a cut length", raw(OK + b"content-length: 99\r\n\r\n" + START, close=True), "upstream", 3),
    ("FIN after the head", raw(CHUNKED_HEAD, close=True), "upstream", 3),
    ("FIN without finish", raw(OK + b"\r\n" + START, close=True), "upstream", 3),
    ("no finish", stream(START), "upstream", 3),
    ("abort", stream(START + ndjson({"type": "abort"}) + GOOD), "upstream", 3),
    ("finish for an error", stream(ndjson({"type": "finish", "finishReason": "error"})),
     "upstream", 3),
    ("only bad lines", stream(b"hello\n{\n[1]\nnull\n: x\n\n"), "upstream", 3),
] + [("chunk size: " + name, raw(CHUNKED_HEAD + data, close=name == "too large"), "upstream", 3)
     for name, data in BAD_CHUNKS]


@each_way
@each("script, kind, tries", FAULTS)
def test_before_any_text(stage, way, script, kind, tries):
    answer = stage.ask(way, always=script, tries=tries)
    message = check_refusal(way, answer, kind)
    assert "Traceback" not in message and "xyz" not in message


@each_way
@each("script", [(name, script) for name, script, _, tries in FAULTS if tries == 3][::5])
def test_a_second_call_mends_it(stage, way, script):
    """Once broken, then good: the whole text, and the log counts the repetition."""
    assert said(way, stage.ask(way, script, tries=2)) == "Hello there"
    line = stage.logged("retries=")
    assert " 200 " in line and "retries=1" in line and "api=" + way.api in line


@each_way
def test_refused(way):
    """Nobody listens; and when somebody does, the next request goes well."""
    with socket.socket() as unheard:
        unheard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        proxy = Proxy(QUICK, apiBase="http://127.0.0.1:%d" % port, useProviderModels=False)
        answer = ask(proxy, way, next(KEYS))
    assert "127.0.0.1:%d" % port in check_refusal(way, answer, "upstream")
    wait_until(lambda: "retries=2" in proxy.log.getvalue())
    fake = FakeUpstream(port=port)
    assert said(way, ask(proxy, way, next(KEYS))) == "Hello there"
    assert len(fake.requests) == 1
    proxy.close()
    fake.close()


REDIRECTS = [301, 302, 303, 307, 308]


@pytest.fixture(scope="module")
def elsewhere():
    fake = FakeUpstream()
    yield fake
    fake.close()


@each_way
@pytest.mark.parametrize("code", REDIRECTS)
def test_redirects(stage, elsewhere, way, code):
    """Not followed, neither there nor anywhere else, with a key or without."""
    for place in (elsewhere.base + "/alpha/generate", "/alpha/other"):
        script = status(code, b"", "location: %s\r\n" % place)
        assert "redirect" in check_refusal(way, stage.ask(way, script), "final")
        assert [call.line for call in stage.calls] == ["POST /alpha/generate HTTP/1.1"]
    assert not elsewhere.connections and not stage.upstream.side_requests


# Ways to frame a good answer, and what may stand between its lines.


LENGTH = OK + b"content-length: %d\r\n\r\n"
SSE = b": hello\n\n" + b"".join(b"event: x\nid: 1\ndata: %b\n\n: waiting\n\n" % line
                                for line in GOOD.splitlines()) + b"data: [DONE]\n\n"
BAD_LINES = [b"hello", b"{", b"{]", b"[1,2]", b"null", b'"text"', b"5", b"data:", b"data: {",
             b": x", b"\xff\xfe", b"", b"{" * 3000, b'{"type":"text-delta","id":"0","text":"x"',
             b'{"type":"text-delta","text":5}', b'{"type":"text-delta"}',
             b'{"type":["text-delta"]}']
UNKNOWN = [{"type": "new", "text": "x"}, {"type": ""}, {"type": None}, {"type": 5}, {},
           {"type": "raw", "rawValue": {"text": "x"}}, {"type": "source", "url": "http://a"},
           {"type": "file", "data": "x"}, {"type": "response-metadata", "id": "1"}]


def between(lines):
    """The good answer with all these lines before each of its own."""
    return b"".join(b"".join(lines) + line + b"\n" for line in GOOD.splitlines())


def packed(pack, name):
    data = pack(GOOD)
    return [(name, raw(OK + b"content-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (
                name.encode(), len(data)) + data)),
            ("%s in chunks" % name, stream(data, cut=7, fields="content-encoding: %s\r\n" % name)),
            ("%s until the end" % name, raw(OK + b"content-encoding: %b\r\n\r\n" % name.encode()
                                            + data, close=True))]


FRAMINGS = [
    ("chunks", stream(GOOD)), ("chunks of one byte", stream(GOOD, cut=1)),
    ("chunk extensions and trailers", raw(CHUNKED_HEAD + b"%x;a=b;c\r\n%b\r\n0\r\nx: y\r\n\r\n" % (
        len(GOOD), GOOD))),
    ("a size with zeros in capitals", raw(CHUNKED_HEAD + b"0000%X\r\n%b\r\n000\r\n\r\n" % (
        len(GOOD), GOOD))),
    ("a length", raw(LENGTH % len(GOOD) + GOOD)),
    ("until the end", raw(OK + b"\r\n" + GOOD, close=True)),
    ("connection: close", raw(OK + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(GOOD)
                              + GOOD, close=True)),
    ("HTTP/1.0", raw(b"HTTP/1.0 200 OK\r\n\r\n" + GOOD, close=True)),
    ("HTTP/1.0 with a length", raw(b"HTTP/1.0 200 OK\r\ncontent-length: %d\r\n\r\n" % len(GOOD)
                                   + GOOD, close=True)),
    ("no reason", raw(b"HTTP/1.1 200\r\ncontent-length: %d\r\n\r\n" % len(GOOD) + GOOD)),
    ("100 first", raw(b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH % len(GOOD) + GOOD)),
    ("many 1xx first", raw(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 8
                           + LENGTH % len(GOOD) + GOOD)),
    ("a large head", raw(OK + b"x: %b\r\n" % (b"y" * 60_000) + b"content-length: %d\r\n\r\n" % len(
        GOOD) + GOOD)),
    ("a head in pieces", in_pieces([OK[:9], OK[9:] + b"content-len", b"gth: %d\r\n\r" % len(GOOD),
                                    b"\n" + GOOD])),
    ("no last newline", stream(GOOD[:-1])),
    ("no last newline, until the end", raw(OK + b"\r\n" + GOOD[:-1], close=True)),
    ("CR LF", stream(GOOD.replace(b"\n", b"\r\n"), cut=5)),
    ("empty lines", stream(GOOD.replace(b"\n", b"\n\n\r\n"))),
    ("spaces around lines", stream(b"".join(b" \t%b \n" % line for line in GOOD.splitlines()))),
    ("SSE", stream(SSE)), ("SSE with CR LF", stream(SSE.replace(b"\n", b"\r\n"), cut=11)),
    ("SSE without spaces", stream(b"".join(b"data:%b\n\n" % line for line in GOOD.splitlines()))),
    ("a [DONE] line", stream(GOOD + b"[DONE]\n")),
    ("bad lines among good ones", stream(between([line + b"\n" for line in BAD_LINES]))),
    ("unknown events", stream(between([ndjson(*UNKNOWN)]))),
    ("events without ids", stream(GOOD.replace(b'"id":"0",', b""))),
    ("spaces in JSON", stream(b"".join(json.dumps(json.loads(line)).encode() + b"\n"
                                       for line in GOOD.splitlines()))),
    ("events behind the end", stream(GOOD + HALF + ndjson({"type": "abort"}))),
    ("a reset behind the end", hang_up(CHUNKED_HEAD + chunked(GOOD), True)),
    ("no end of the chunks", raw(CHUNKED_HEAD + chunked(GOOD), close=True)),
] + packed(gzip.compress, "gzip") + packed(zlib.compress, "deflate") + packed(
    gzip.compress, "x-gzip")


@each_way
@each("script", FRAMINGS)
def test_framings(stage, way, script):
    assert said(way, stage.ask(way, script)) == "Hello there"


# Cut after every byte: of a whole answer with its head, and of its text.


SHORT = b'{"type":"text-delta","text":"Hi"}\n{"type":"finish"}\n'
WIRE = CHUNKED_HEAD + chunked(SHORT) + b"0\r\n\r\n"
TEXT_END = WIRE.index(b'"Hi"}\n') + len(b'"Hi"}\n')      # from here on the text was shown
ANSWER_END = WIRE.index(SHORT) + len(SHORT)             # from here on all is told


@each_way
def test_segments_split_at_every_byte(stage, way):
    for cut in range(1, len(WIRE)):
        stage.upstream.scripts.append(in_pieces([WIRE[:cut], WIRE[cut:]], 0.0004))
    del stage.upstream.requests[:]
    key = next(KEYS)
    for cut in range(1, len(WIRE)):
        assert said(way, ask(stage.client, way, key)) == "Hi", cut
    assert len(stage.upstream.requests) == len(WIRE) - 1
    check_keys(stage.upstream.requests, key)
    if not way.streamed:        # a stream is over for its client before its last chunk came
        assert len({request.connection for request in stage.upstream.requests}) == 1


@each_way
@pytest.mark.parametrize("rude", [False, True], ids=["FIN", "RST"])
def test_the_connection_dies_at_every_byte(stage, way, rude):
    """Before any text another call mends it, after text it is told, after the end it is well."""
    fake, key = stage.upstream, next(KEYS)
    for cut in range(0, len(WIRE), 9 if rude else 1):
        del fake.requests[:]
        fake.scripts = [hang_up(WIRE[:cut], rude)]
        answer = ask(stage.client, way, key)
        if cut >= ANSWER_END:
            assert said(way, answer) == "Hi" and len(fake.requests) == 1, cut
        elif cut >= TEXT_END and way.streamed:
            text, _, _ = check_broken(way.api, answer, "upstream")
            assert text == "Hi" and len(fake.requests) == 1, cut
        else:
            assert said(way, answer) == "Hello there" and len(fake.requests) == 2, cut
        check_keys(fake.requests, key)
    stage.check_good(way)


ODD = "\u00e9\u20ac\U0001f600\u2028"
UTF8 = ndjson({"type": "text-delta", "id": "0", "text": ODD})
ESCAPED = json.dumps({"type": "text-delta", "id": "0", "text": ODD + "\n\"\\/"}).encode() + b"\n"
BOTH = UTF8[:-3] + ESCAPED[ESCAPED.index(b"\\"):]
BOTH_TEXT = ODD + ODD + "\n\"\\/"


@each_way
def test_text_cut_at_every_byte(stage, way):
    """UTF-8 and escapes; each half is a chunk in a segment of its own."""
    stage.upstream.scripts = [
        in_pieces([CHUNKED_HEAD + chunked(START + BOTH[:cut]),
                   chunked(BOTH[cut:] + FINISH) + b"0\r\n\r\n"], 0.0004)
        for cut in range(BOTH.index(b'"text":'), len(BOTH))]
    assert len(stage.upstream.scripts) > 50
    while stage.upstream.scripts:
        assert said(way, ask(stage.client, way, next(KEYS))) == BOTH_TEXT
    stage.check_good(way)


HALVES = [      # a surrogate pair cut between two deltas, and halves that nobody completes
    ("a pair in halves", [r"a\ud83d", r"\ude00b"], "a\U0001f600b"),
    ("pairs one after another", [r"\ud83d", r"\ude00\ud83d", r"\ude00"], "\U0001f600" * 2),
    ("a first half at the end", [r"a\ud83d"], "a\ufffd"),
    ("a first half before text", [r"a\ud83d", "b"], "a\ufffdb"),
    ("a second half alone", ["a", r"\ude00b"], "a\ufffdb"),
    ("halves in the wrong order", [r"\ude00\ud83d", "b"], "\ufffd\ufffdb")]


@each_way
@each("pieces, text", HALVES)
def test_surrogates(stage, way, pieces, text):
    lines = b"".join(b'{"type":"text-delta","id":"0","text":"%b"}\n' % piece.encode()
                     for piece in pieces)
    answer = stage.ask(way, stream(START + lines + FINISH, cut=9))
    assert said(way, answer) == text


# Long lines.


MIB = 1024 * 1024
LONG = 20 * MIB
LONG_LINES = [
    ("a start-step", b'{"type":"start-step","request":{"body":"%b"}}\n' % (b"x" * LONG), ""),
    ("a start-step beyond the limit", b'{"type":"start-step","x":"%b"}\n' % (b"x" * 33 * MIB), ""),
    ("an unknown event", b'{"type":"new","x":"%b"}\n' % (b"x" * LONG), ""),
    ("no JSON", b"x" * LONG + b"\n", ""),
    ("text", b'{"type":"text-delta","id":"0","text":"%b"}\n' % (b"x" * MIB), "x" * MIB)]


def send_long(head, data, tail):
    """In one chunk, sent as fast as it goes."""
    def run(sock, request):
        sock.sendall(CHUNKED_HEAD + chunked(head) + b"%x\r\n" % len(data))
        sock.sendall(data)
        sock.sendall(b"\r\n" + chunked(tail) + b"0\r\n\r\n")
    return run


@each_way
@each("line, text", LONG_LINES)
def test_long_lines(stage, way, line, text):
    answer = stage.ask(way, send_long(START, line, GOOD))
    assert said(way, answer) == text + "Hello there"


@pytest.mark.parametrize("way", WAYS[:1], ids=WAY_NAMES[:1])
def test_the_longest_text(stage, way):
    """20 MiB of text in one event, copied."""
    line = b'{"type":"text-delta","id":"0","text":"%b"}\n' % (b"x" * LONG)
    assert len(said(way, stage.ask(way, send_long(START, line, FINISH)))) == LONG


BEYOND = b'{"type":"text-delta","id":"0","text":"' + b"x" * (33 * MIB)


@each_way
def test_a_line_beyond_the_limit(stage, way):
    """Before text it is repeated, behind text it is told."""
    assert said(way, stage.ask(way, send_long(START, BEYOND, b"\n"), tries=2)) == "Hello there"
    if way.streamed:
        answer = stage.ask(way, send_long(HALF, BEYOND, b"\n"))
        text, _, message = check_broken(way.api, answer, "upstream")
        assert text == "Half" and str(32 * MIB) in message


@each_way
def test_only_lines_beyond_the_limit(stage, way, monkeypatch):
    """All three calls fail alike (with a lower limit, for time)."""
    monkeypatch.setattr(ccproxy, "MAX_LINE_BYTES", MIB)
    answer = stage.ask(way, always=send_long(START, BEYOND[:2 * MIB], b"\n"), tries=3)
    assert str(MIB) in check_refusal(way, answer, "upstream")


# Streams without end.


TEXT_LINE = chunked(ndjson({"type": "text-delta", "id": "0", "text": "word " * 200}))
ENDLESS = [     # what comes again and again, and whether a client of a stream sees any of it
    ("text", TEXT_LINE, True),
    ("unknown events", chunked(ndjson({"type": "new", "x": "y" * 4000})), False),
    ("start-steps", chunked(ndjson({"type": "start-step", "x": "y" * 4000})), False),
    ("bad lines", chunked(b"{" + b"y" * 4000 + b"\n"), False),
    ("comments", chunked(b": %b\n\n" % (b"y" * 4000)), False)]


def counting(piece, count):
    """An endless answer that counts in `count` the bytes that were taken."""
    block = piece * 16

    def run(sock, request):
        sock.sendall(CHUNKED_HEAD)
        while True:
            sock.sendall(block)
            count[0] += len(block)
    return run


def send(proxy, way, key):
    """A connection on which a request was sent."""
    sock = proxy.connect()
    user = [{"role": "user", "content": "hi"}]
    sock.sendall(post_bytes(PATHS[way.api], {
        "stream": way.streamed, "input" if way.api == "responses" else "messages": user,
        **({} if way.api == "responses" else {"max_tokens": 1000})}, key=key))
    return sock


@each_way
@each("piece, shown", ENDLESS)
def test_endless(stage, way, piece, shown):
    """The client leaves in the middle: the call ends; of what nobody sees nothing is kept."""
    count, key = [0], next(KEYS)
    stage.upstream.scripts = [counting(piece, count)]
    del stage.upstream.requests[:]
    stage.forget_log()
    with send(stage.proxy, way, key) as sock:
        if shown and way.streamed:
            read_until(sock, b"word word")
        wait_until(lambda: count[0] > 4 * MIB or (shown and way.streamed))
        relay = next(iter(stage.proxy.app.relays))
        assert len(relay.call.wire.buffer) < MIB
        assert relay.client.transport.get_write_buffer_size() < MIB
        assert shown or relay.answer.lines.size < MIB and not relay.answer.reply.blocks
        assert len(relay.answer.reply.notes) < 5000
    wait_until(lambda: not stage.proxy.app.relays, 1.0)
    stage.logged("the client left")
    assert len(stage.upstream.requests) == 1
    check_keys(stage.upstream.requests, key)
    stage.check_good(way)


def test_endless_memory(stage):
    """Whatever the form, 80 MiB of events that say nothing leave nothing behind."""
    before = resident_bytes()
    for way, (_, piece, _) in itertools.product(WAYS[:2], ENDLESS[1:]):
        count = [0]
        stage.upstream.scripts = [counting(piece, count)]
        with send(stage.proxy, way, next(KEYS)):
            wait_until(lambda: count[0] > 14 * MIB, 20)
    wait_until(lambda: not stage.proxy.app.relays)
    assert resident_bytes() - before < 20 * MIB


def resident_bytes():
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pytest.skip("no /proc here")


# Silence: all cases run at once, and each test looks at its own.


STALLS = [      # what comes before the silence, and the text that was shown of it
    ("before the head", stall(), ""), ("in the head", stall(OK + b"x: "), ""),
    ("after 100", stall(b"HTTP/1.1 100 Continue\r\n\r\n"), ""),
    ("before the first event", stall(CHUNKED_HEAD), ""),
    ("in the first line", stall(CHUNKED_HEAD + b"fff\r\n" + START[:9]), ""),
    ("after start", stall(CHUNKED_HEAD + chunked(START)), ""),
    ("after the first token", stall(CHUNKED_HEAD + chunked(HALF)), "Half"),
    ("in the second token", stall(CHUNKED_HEAD + chunked(HALF + HALF[:-9])), "Half"),
    ("a trickle in the head", endless(OK + b"x: ", b"y", 0.02), ""),
    ("a trickle in the first line", endless(CHUNKED_HEAD, chunked(b"{"), 0.02), ""),
    ("a trickle in a chunk", endless(CHUNKED_HEAD + b"ffff\r\n", b" ", 0.02), ""),
    ("a trickle after start", endless(CHUNKED_HEAD + chunked(START), chunked(b" "), 0.02), ""),
    ("a trickle after a token", endless(CHUNKED_HEAD + chunked(HALF), chunked(b"x"), 0.02),
     "Half")]


class Outcome(NamedTuple):
    """An answer and the calls that were made for it."""

    answer: Answer
    calls: list


def run_all(scripts, **options):
    """{(name, way): Outcome} of these scripts in every way, all at the same time."""
    stage, outcomes = Stage(**options), {}

    def script_of(sock, request):
        scripts[json.loads(word_of(request))[0]](sock, request)

    def word_of(request):
        return request.json["params"]["messages"][0]["content"][0]["text"]

    def one(name, way):
        word, key = json.dumps([name, *way]), next(KEYS)
        user = [{"role": "user", "content": word}]
        member = "input" if way.api == "responses" else "messages"
        answer = ask(stage.proxy, way, key, **{member: user})
        calls = [call for call in list(stage.upstream.requests) if word_of(call) == word]
        check_keys(calls, key)
        outcomes[name, way] = Outcome(answer, calls)

    stage.upstream.default = script_of
    threads = [threading.Thread(target=one, args=pair) for pair in itertools.product(scripts, WAYS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    wait_until(lambda: not stage.proxy.app.relays)
    stage.upstream.default = stage.good
    for way in WAYS:
        stage.check_good(way)
    stage.close()
    return outcomes


@each_way
@each("name, text", [(row[0], row[0], row[2]) for row in STALLS])
def test_silence(silences, way, name, text):
    """The idle limit, told as a timeout and never tried again."""
    answer, calls = silences[name, way]
    assert len(calls) == 1
    if text and way.streamed:
        shown, _, message = check_broken(way.api, answer, "late")
        assert shown == text
    else:
        message = check_refusal(way, answer, "late")
    assert "0.5 seconds (upstreamIdleSeconds)" in message


def later(script, seconds=0.7):
    def run(sock, request):
        time.sleep(seconds)
        script(sock, request)
    return run


WAITING = {"never": stall(), "never, after a token": stall(CHUNKED_HEAD + chunked(HALF)),
           "good": later(stream(GOOD)), "402": later(status(402, b"")),
           "error event": later(stream(ndjson({"type": "error", "error": "402 {}"})))}


@pytest.fixture(scope="module")
def silences():
    """Both tables at the same time: most of it is waiting."""
    found = {}
    tables = [({row[0]: row[1] for row in STALLS}, 0.5, QUICK),
              (WAITING, 1.2, QUICK._replace(silence=0.1))]
    threads = [threading.Thread(target=lambda scripts, idle, limits: found.update(run_all(
        scripts, upstreamIdleSeconds=idle, limits=limits)), args=row) for row in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == len(WAYS) * (len(STALLS) + len(WAITING))
    return found


@each_way
@pytest.mark.parametrize("name", WAITING)
def test_comments_while_waiting(silences, way, name):
    """A stream is kept alive by comments and nothing else; what comes then is told in it."""
    answer, calls = silences[name, way]
    assert len(calls) == 1
    if way.streamed:
        comments = read_comments(answer.body)
        assert len(comments) >= 2 and b"ping" not in answer.body
        assert all(re.fullmatch("waiting [0-9]+s", comment) for comment in comments)
    if name == "good":
        assert said(way, answer) == "Hello there"
        return
    kind = "late" if name.startswith("never") else "billing"
    if way.streamed:
        text, _, _ = check_broken(way.api, answer, kind)
        assert text == ("Half" if name == "never, after a token" else "")
    else:
        check_refusal(way, answer, kind)


# Error events.


def enveloped(code, message, number=400):
    return {"success": False, "error": {"code": code, "status": number, "message": message}}


def said_as(number, code, message):
    return "%d %s" % (number, json.dumps(enveloped(code, message, number)))


ERROR_EVENTS = [    # the `error` member; the kind; whether another call may mend it
    ("a string", "Network connection lost.", "upstream", True),
    ("nothing", None, "upstream", True),
    ("a number", 5, "upstream", True),
    ("an empty object", {}, "upstream", True),
    ("an object", {"message": "terminated"}, "upstream", True),
    ("a gateway's", {"name": "AI_APICallError", "message": "Gateway request failed"}, "upstream",
     True),
    ("a marker in a string", "premium_credits_exhausted: buy more", "billing", False),
    ("an envelope in a string, 403", said_as(403, "MODEL_NOT_IN_PLAN", "Upgrade"), "plan", False),
    ("an envelope in a string, 429", said_as(429, "RATE_LIMITED", "slow"), "rate", True),
    ("an envelope in a message", {"message": said_as(403, "MODEL_NOT_IN_PLAN", "Upgrade")},
     "plan", False),
    ("half an envelope", '500 {"error":', "upstream", True),
    ("400", {"message": "bad", "statusCode": 400}, "invalid", False),
    ("400, too long", {"message": "prompt is too long: 9 > 5", "statusCode": 400}, "too long",
     False),
    ("401", {"message": "bad key", "statusCode": 401}, "key", False),
    ("402", {"type": "server_error", "message": "Insufficient Balance", "statusCode": 402},
     "billing", False),
    ("402, said to be retryable", {"message": "Insufficient credits", "statusCode": 402,
                                   "isRetryable": True}, "billing", False),
    ("403", {"message": "no", "statusCode": 403}, "permission", False),
    ("404", {"message": "no", "statusCode": 404}, "not found", False),
    ("408", {"message": "slow", "statusCode": 408}, "late", True),
    ("413", {"message": "big", "statusCode": 413}, "too large", False),
    ("422", {"message": "no", "statusCode": 422}, "unprocessable", False),
    ("429", {"message": "at capacity", "statusCode": 429}, "rate", True),
    ("429, retryable", {"message": "at capacity", "statusCode": 429, "isRetryable": True}, "rate",
     True),
    ("429, not retryable", {"message": "at capacity", "statusCode": 429, "isRetryable": False},
     "rate", False),
    ("500", {"message": "oops", "statusCode": 500}, "upstream", True),
    ("500, not retryable", {"message": "oops", "statusCode": 500, "isRetryable": False},
     "upstream", False),
    ("502", {"message": "oops", "statusCode": 502}, "upstream", True),
    ("503", {"message": "oops", "statusCode": 503, "isRetryable": True}, "unavailable", True),
    ("503, not retryable", {"message": "oops", "statusCode": 503, "isRetryable": False},
     "unavailable", False),
    ("504", {"message": "oops", "statusCode": 504}, "late", True),
    ("529", {"message": "oops", "statusCode": 529}, "overloaded", True),
    ("not retryable, no status", {"message": "oops", "isRetryable": False}, "upstream", False)]


def failing(begin, error):
    """An answer that fails; the end that follows must not hide it."""
    return stream(begin + ndjson({"type": "error", "error": error}) + GOOD)


@each_way
@each("error, kind, again", ERROR_EVENTS)
def test_an_error_event_at_the_start(stage, way, error, kind, again):
    answer = stage.ask(way, always=failing(START, error), tries=3 if again else 1)
    message = check_refusal(way, answer, kind, final=not again)
    if isinstance(error, dict) and "statusCode" in error:
        assert message == error["message"]


@each_way
@each("error, kind, again", ERROR_EVENTS)
def test_an_error_event_after_text(stage, way, error, kind, again):
    """In a stream it is the last event, at once; a plain answer showed nothing yet."""
    if way.streamed:
        answer = stage.ask(way, failing(HALF, error))
        text, _, message = check_broken(way.api, answer, kind)
        assert text == "Half"
        if isinstance(error, dict) and "statusCode" in error:
            assert message == error["message"]
    elif again:
        assert said(way, stage.ask(way, failing(HALF, error), tries=2)) == "Hello there"
    else:
        check_refusal(way, stage.ask(way, failing(HALF, error)), kind, final=True)


def broken_gzip(data):
    """This much can be unpacked; then come bytes that cannot."""
    packer = zlib.compressobj(wbits=31)
    whole = packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)
    return in_pieces([OK + b"content-encoding: gzip\r\n\r\n" + whole, b"\xff" * 20], 0.005)


AFTER = [("no finish", stream(HALF), stream(CALL)),
         ("FIN", raw(CHUNKED_HEAD + chunked(HALF), close=True),
          raw(CHUNKED_HEAD + chunked(CALL), close=True)),
         ("FIN, until the end", raw(OK + b"\r\n" + HALF, close=True),
          raw(OK + b"\r\n" + CALL, close=True)),
         ("RST", hang_up(CHUNKED_HEAD + chunked(HALF), True),
          hang_up(CHUNKED_HEAD + chunked(CALL), True)),
         ("abort", stream(HALF + ndjson({"type": "abort"}) + GOOD),
          stream(CALL + ndjson({"type": "abort"}) + GOOD)),
         ("finish for an error", stream(HALF + ndjson({"type": "finish", "finishReason": "error"})),
          stream(CALL + ndjson({"type": "finish", "finishReason": "error"}))),
         ("a bad chunk", in_pieces([CHUNKED_HEAD + chunked(HALF), b"xyz\r\n"], 0.005),
          in_pieces([CHUNKED_HEAD + chunked(CALL), b"xyz\r\n"], 0.005)),
         ("bad gzip", broken_gzip(HALF), broken_gzip(CALL))]


@each_way
@each("after_text, after_call", AFTER)
def test_after_text_or_a_call(stage, way, after_text, after_call):
    """What was shown cannot be taken back: one legal error, and no second call."""
    for script, text in ((after_text, "Half"), (after_call, "")):
        if way.streamed:
            answer = stage.ask(way, script)
            assert check_broken(way.api, answer, "upstream")[0] == text
            assert (b'{\\"a\\":' in answer.body) is (not text)
        else:
            assert said(way, stage.ask(way, script, tries=2)) == "Hello there"


# Every status, with every kind of body, with and without Retry-After.


STATUSES = [(400, "invalid"), (401, "key"), (402, "billing"), (403, "permission"),
            (404, "not found"), (408, "late"), (409, "invalid"), (413, "too large"),
            (418, "invalid"), (422, "unprocessable"), (429, "rate"), (500, "upstream"),
            (502, "upstream"), (503, "unavailable"), (504, "late"), (529, "overloaded")]
HTML = b"<html><head><title>Sorry</title></head><body>nginx</body></html>"


def bodies(code):
    return [("JSON", json.dumps(enveloped("SOME_CODE", "Words of the upstream.", code)).encode()),
            ("HTML", HTML), ("empty", b"")]


@each_way
@each("code, kind, body", [("%d %s" % (code, name), code, kind, body)
                           for code, kind in STATUSES for name, body in bodies(code)])
def test_statuses(stage, way, code, kind, body):
    """A longer Retry-After is the client's to wait for: passed on, and one call only."""
    again = not KINDS[kind].final
    for seconds in (None, 7) if again else (7,):
        fields = "" if seconds is None else "retry-after: %d\r\n" % seconds
        tries = 3 if again and seconds is None else 1
        answer = stage.ask(way, always=status(code, body, fields), tries=tries,
                           fresh=False)
        message = check_refusal(way, answer, kind)
        assert message == ("Words of the upstream." if body.startswith(b"{") else
                           "The upstream answered %d without saying why." % code)
        error = answer.json["error"]
        assert error.get("upstream_code") == ("SOME_CODE" if body.startswith(b"{") else None)
        assert answer.fields.get("retry-after") == (None if seconds is None else str(seconds))
        assert error.get("retry_after") == seconds
        assert ("www-authenticate" in answer.fields) is (code == 401)


# Pooled connections that died.


POOLED = 5
WHOLE = CHUNKED_HEAD + chunked(GOOD) + b"0\r\n\r\n"


def fill_pool(stage, way, after):
    """Idle connections, all good; `after` is done with each once its answer is complete."""
    together = threading.Barrier(POOLED)

    def run(sock, request):
        together.wait(10)
        sock.sendall(WHOLE)
        after(sock)
    stage.forget_log()
    stage.proxy.loop.call_soon_threadsafe(stage.proxy.app.home.pool.prune, float("inf"))
    stage.upstream.scripts = [run] * POOLED
    threads = [threading.Thread(target=ask, args=(stage.proxy, way, next(KEYS)))
               for _ in range(POOLED)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    wait_until(lambda: not stage.proxy.app.relays)
    assert not stage.upstream.scripts


def rst(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


DEATHS = [("FIN under the request", raw(b"", close=True)),
          ("RST under the request", lambda sock, request: rst(sock))]


@each_way
@each("death", DEATHS)
def test_pooled_connections_die_under_a_request(stage, way, death):
    """They are replaced silently, all of them: no attempt is counted, nobody is told."""
    fill_pool(stage, way, lambda sock: None)
    assert len(stage.proxy.app.home.pool.idle) == POOLED
    answer = stage.ask(way, *[death] * POOLED, tries=POOLED + 1, fresh=False)
    assert said(way, answer) == "Hello there"
    assert "retried" not in answer.fields.get("x-ccproxy-notes", "")
    assert "retries=" not in stage.logged("api=" + way.api)


@each_way
@each("death", DEATHS)
def test_only_a_fresh_connection_counts(stage, way, death):
    """Behind the dead pooled ones come three calls that are counted."""
    fill_pool(stage, way, lambda sock: None)
    answer = stage.ask(way, always=death, tries=POOLED + 3, fresh=False)
    check_refusal(way, answer, "upstream")
    assert "retries=2" in stage.logged("retries=")


UNASKED = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n"


@each_way
@each("after", [("FIN", lambda sock: sock.close()), ("RST", lambda sock: (time.sleep(0.01),
                                                                         rst(sock))),
                ("unasked bytes", lambda sock: (time.sleep(0.01), sock.sendall(UNASKED)))])
def test_pooled_connections_die_while_idle(stage, way, after):
    """They are not used at all: one call, on a connection of its own."""
    fill_pool(stage, way, after)
    pool = stage.proxy.app.home.pool
    wait_until(lambda: not any(wire.is_quiet() for wire in list(pool.idle)))
    before = stage.upstream.connections
    assert said(way, stage.ask(way, fresh=False)) == "Hello there"
    assert stage.calls[0].connection > before
    assert "retries=" not in stage.logged("api=" + way.api)


# Certificates.


def tls_stage(patch, name, trusted):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(CERTS, name))
    one = Stage(FakeUpstream(tls=context))
    if trusted:
        patch.setenv("SSL_CERT_FILE", os.path.join(CERTS, "ca.pem"))
    ccproxy.tls_context(one.proxy.app)      # now, while the environment is this
    patch.undo()
    return one


CERTIFICATES = [("unknown authority", ("server.pem", False), "unable to get local issuer"),
                ("wrong name", ("other.pem", True), "127.0.0.1"),
                ("both wrong", ("other.pem", False), "certificate"),
                ("good", ("server.pem", True), "")]


@pytest.fixture(scope="module")
def tls_stages():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        stages = {row[1]: tls_stage(patch, *row[1]) for row in CERTIFICATES}
    yield stages
    for one in stages.values():
        one.close()


@each_way
@each("which, words", CERTIFICATES)
def test_certificates(tls_stages, way, which, words):
    """A bad one is told once, in words that help, and nothing was sent."""
    stage = tls_stages[which]
    before = stage.upstream.connections
    answer = ask(stage.client, way, next(KEYS))
    if not words:
        assert said(way, answer) == "Hello there"
        return
    message = check_refusal(way, answer, "final")
    assert words in message and "SSL_CERT_FILE" in message
    assert stage.upstream.connections == before + 1 and not stage.upstream.requests


# The splice: a repeated call after thinking was shown.


def thinking(text, signature=""):
    lines = ndjson({"type": "reasoning-delta", "id": "r", "text": text})
    if signature:
        lines += ndjson({"type": "reasoning-end", "id": "r", "providerMetadata": {
            "anthropic": {"signature": signature}}})
    return START + lines


LOST = ndjson({"type": "error", "error": {"message": "Network connection lost."}})
AGAIN = thinking("Other", "sig-2") + GOOD[len(START):]
CUT_THINKING = [("error event", stream(thinking("Hmm") + LOST)),
                ("no finish", stream(thinking("Hmm"))), ("abort", stream(
                    thinking("Hmm") + ndjson({"type": "abort"}))),
                ("RST", hang_up(CHUNKED_HEAD + chunked(thinking("Hmm")), True)),
                ("FIN", raw(CHUNKED_HEAD + chunked(thinking("Hmm")), close=True))]
THINK = {"chat": {"reasoning_effort": "high"}, "messages": {"thinking": {"type": "adaptive"}},
         "responses": {"reasoning": {"effort": "high", "summary": "auto"}}}


def check_repeated(stage, count):
    """All calls of one conversation: the same thread, the same session, the same body."""
    assert len(stage.calls) == count
    assert len({call.json["threadId"] for call in stage.calls}) == 1
    assert len({call.field("x-session-id") for call in stage.calls}) == 1


@each_way
@each("cut", CUT_THINKING)
@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_splice(stage, way, cut, times):
    """Shown thinking stays, the repeated call's is left out, and it is counted and noted."""
    answer = stage.ask(way, *[cut] * times, stream(AGAIN), tries=times + 1, **THINK[way.api])
    text, thought = told(way, answer)
    assert (text, thought) == ("Hello there", "Hmm" if way.streamed else "Other")
    check_repeated(stage, times + 1)
    notes = [comment for comment in read_comments(answer.body)] if way.streamed else \
        ["note " + answer.fields["x-ccproxy-notes"]]
    assert notes == ["note retried=upstream"]
    line = stage.logged("api=" + way.api)
    assert " 200 " in line and "retries=%d" % times in line and "retried=upstream" in line
    if way.api == "messages" and way.streamed:
        kinds = [frame["delta"]["type"] for frame in answer.frames
                 if frame["type"] == "content_block_delta"]
        assert kinds.count("signature_delta") == 1


@each_way
@each("cut", CUT_THINKING)
def test_a_splice_that_fails(stage, way, cut):
    """Three calls, then the last failure: in a stream behind the thinking that was shown."""
    answer = stage.ask(way, always=cut, tries=3, **THINK[way.api])
    check_repeated(stage, 3)
    if way.streamed:
        assert check_broken(way.api, answer, "upstream")[:2] == ("", "Hmm")
    else:
        check_refusal(way, answer, "upstream")
    assert "retries=2" in stage.logged("retries=")


@each_way
@each("after_text, after_call", AFTER[::2])
def test_no_second_splice_after_text(stage, way, after_text, after_call):
    """The repeated call shows text or a call and breaks: an error event, no third call."""
    for script, text in ((after_text, "Half"), (after_call, "")):
        cut = CUT_THINKING[0][1]
        if way.streamed:
            answer = stage.ask(way, cut, script, tries=2, **THINK[way.api])
            assert check_broken(way.api, answer, "upstream")[:2] == (text, "Hmm")
            check_repeated(stage, 2)
        else:
            answer = stage.ask(way, cut, script, tries=3, **THINK[way.api])
            assert said(way, answer) == "Hello there"
            check_repeated(stage, 3)


@each_api
def test_a_splice_after_comments(api):
    """Both calls are slow: one head, comments between, and the answer is whole."""
    stage = Stage(limits=QUICK._replace(silence=0.03), upstreamIdleSeconds=5)
    answer = stage.ask(Way(api, True), later(CUT_THINKING[0][1], 0.07), later(stream(AGAIN), 0.07),
                       tries=2, **THINK[api])
    assert told(Way(api, True), answer) == ("Hello there", "Hmm")
    comments = read_comments(answer.body)
    assert comments.count("note retried=upstream") == 1
    assert len([one for one in comments if one.startswith("waiting ")]) >= 2
    stage.close()
