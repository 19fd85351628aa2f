"""Calls to the upstream over real sockets: what is sent, how answers may be framed, what fails."""
from __future__ import annotations

import gzip
import json
import os
import re
import socket
import ssl
import threading
import time
import uuid

import ccproxy
import pytest
from fake_upstream import (CHUNKED_HEAD, FakeProxy, FakeUpstream, chunked, ndjson, raw, reset,
                           stall, status, stream, text_answer)
from harness import CHAT, FAST, KEY, MESSAGES, wait_until

CERTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "certs")
AUTHORITY = os.path.join(CERTS, "ca.pem")
TEXT = text_answer("Hello", " there")
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def proxy(make_proxy):
    """Without the side call for the model list, so that connections can be counted."""
    return make_proxy(useProviderModels=False)


@pytest.fixture
def tls_upstream():
    started = []

    def start(name="server.pem"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(os.path.join(CERTS, name))
        started.append(FakeUpstream(tls=context))
        return started[-1]
    yield start
    for fake in started:
        fake.close()


@pytest.fixture
def http_proxy():
    fake = FakeProxy()
    yield fake
    fake.close()


def said(answer):
    """The text of a plain chat completion that went well."""
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["message"]["content"]


# What is sent.

CALL_FIELDS = {
    "host", "authorization", "content-type", "accept", "accept-encoding", "user-agent",
    "x-command-code-version", "x-cli-environment", "x-project-slug", "x-taste-learning",
    "x-session-id", "traceparent", "content-length"}


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_headers_are_exactly_these(make_proxy, upstream, path):
    proxy = make_proxy(projectSlug="my-project", cliVersion="1.65.0", useProviderModels=False)
    proxy.post(path, {
        "user-agent": "client/1", "cookie": "a=b", "x-stainless-lang": "python", "accept": "x/y",
        "anthropic-version": "2023-06-01", "anthropic-beta": "a-b", "x-forwarded-for": "1.2.3.4",
        "accept-encoding": "br", "x-api-key": KEY, "te": "trailers", "origin": "http://a",
        "x-cmd-zdr": "1", "x-project-slug": "theirs", "x-command-code-version": "9"})
    request = upstream.requests[0]
    assert request.line == "POST /alpha/generate HTTP/1.1"
    assert sorted(name.lower() for name, _ in request.fields) == sorted(CALL_FIELDS)
    expected = {"host": "127.0.0.1:%d" % upstream.port, "authorization": "Bearer " + KEY,
                "content-type": "application/json", "accept-encoding": "identity",
                "user-agent": "ccproxy/" + ccproxy.__version__,
                "x-command-code-version": "1.65.0", "x-cli-environment": "production",
                "x-project-slug": "my-project", "x-taste-learning": "false",
                "content-length": str(len(request.body))}
    assert {name: request.field(name) for name in expected} == expected


def test_a_base_url_with_a_path(make_proxy, upstream):
    proxy = make_proxy(apiBase=upstream.base + "/some/where/")
    assert said(proxy.post(CHAT)) == "Hello there"
    assert upstream.requests[0].line == "POST /some/where/alpha/generate HTTP/1.1"
    proxy.request("GET", "/v1/models")
    assert upstream.side_requests[0].line == "GET /some/where/provider/v1/models HTTP/1.1"


def test_the_side_call_carries_no_key(make_proxy, upstream):
    proxy = make_proxy()
    proxy.request("GET", "/v1/models")
    names = {name.lower() for name, _ in upstream.side_requests[0].fields}
    assert names <= {"host", "user-agent", "accept-encoding", "accept", "connection"}
    assert upstream.side_requests[0].field("accept-encoding") == "identity"


GOOD_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("given, kept", [
    (GOOD_TRACE, True), (GOOD_TRACE.upper(), False), ("00-" + "0" * 32 + GOOD_TRACE[35:], False),
    (GOOD_TRACE[:-1], False), ("nonsense", False), (None, False)])
def test_traceparent(proxy, upstream, given, kept):
    for _ in range(2):
        proxy.post(CHAT, {"traceparent": given} if given else {})
    sent = [request.field("traceparent") for request in upstream.requests]
    assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", value) for value in sent)
    assert (sent == [given, given]) if kept else (sent[0] != sent[1] and given not in sent)


# Sessions: derived from the key and the client's own word, else the first user message.


def session_of(proxy, upstream, fields=None, key=KEY, path=CHAT, **body):
    assert proxy.post(path, fields, key, **body).status == 200
    request = upstream.requests[-1]
    session = request.field("x-session-id")
    assert session == request.json["threadId"]
    parsed = uuid.UUID(session)
    assert str(parsed) == session and parsed.version == 4 and parsed.variant == uuid.RFC_4122
    return session


def user(*texts):
    turns = []
    for text in texts:
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
    return turns[:-1]


def test_a_conversation_keeps_its_id(proxy, make_proxy, upstream):
    """Over turns, over both APIs, and in another process or host."""
    first = session_of(proxy, upstream, messages=user("one"))
    assert session_of(proxy, upstream, messages=user("one", "two")) == first
    assert session_of(proxy, upstream, path=MESSAGES, messages=user("one", "two")) == first
    assert session_of(make_proxy(), upstream, messages=user("one", "three")) == first


def test_others_have_other_ids(proxy, upstream):
    ids = [session_of(proxy, upstream, messages=user("one")),
           session_of(proxy, upstream, messages=user("two")),
           session_of(proxy, upstream, key="user_another", messages=user("one"))]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("name", ["x-claude-code-session-id", "X-Session-Id", "session-id",
                                  "session_id"])
def test_session_headers(proxy, upstream, name):
    by_text = session_of(proxy, upstream, messages=user("one"))
    named = session_of(proxy, upstream, {name: "s-1"}, messages=user("one"))
    assert session_of(proxy, upstream, {name: "s-1"}, messages=user("two")) == named
    ids = {by_text, named, session_of(proxy, upstream, {name: "s-2"}, messages=user("one")),
           session_of(proxy, upstream, {name: "s-1"}, "user_another", messages=user("one"))}
    assert len(ids) == 4
    assert "s-1" not in named


@pytest.mark.parametrize("first, second, same", [
    ("u-1", "u-1", True), ("u-1", "u-2", False),
    (json.dumps({"device_id": "a", "session_id": "s"}),
     json.dumps({"session_id": "s", "device_id": "b"}), True),
    (json.dumps({"session_id": "s"}), json.dumps({"session_id": "t"}), False)])
def test_metadata_user_id(proxy, upstream, first, second, same):
    ids = [session_of(proxy, upstream, path=MESSAGES, metadata={"user_id": given},
                      messages=user(text)) for given, text in ((first, "one"), (second, "two"))]
    assert (ids[0] == ids[1]) is same


# Ways to frame a good answer: every one of them gives the exact text.

SSE = b"".join(b"data: " + line + b"\n\n" for line in TEXT.splitlines())
BYTEWISE = b"".join(chunked(bytes([byte])) for byte in TEXT)

FRAMINGS = [
    ("chunked", raw(CHUNKED_HEAD + chunked(TEXT) + b"0\r\n\r\n"), True),
    ("chunks of one byte", raw(CHUNKED_HEAD + BYTEWISE + b"0\r\n\r\n"), True),
    ("chunk extensions and trailers", raw(CHUNKED_HEAD + b"%x;a=b\r\n%b\r\n0\r\nx: y\r\n\r\n" % (
        len(TEXT), TEXT)), True),
    ("a length", raw(OK + b"content-length: %d\r\n\r\n" % len(TEXT) + TEXT), True),
    ("until the connection closes", raw(OK + b"\r\n" + TEXT, close=True), False),
    ("connection: close", raw(OK + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(TEXT)
                              + TEXT, close=True), False),
    ("HTTP/1.0", raw(b"HTTP/1.0 200 OK\r\n\r\n" + TEXT, close=True), False),
    ("no reason phrase", raw(b"HTTP/1.1 200\r\ncontent-length: %d\r\n\r\n" % len(TEXT) + TEXT),
     True),
    ("1xx first", raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
                      + CHUNKED_HEAD + chunked(TEXT) + b"0\r\n\r\n"), True),
    ("gzip", raw(OK + b"content-encoding: gzip\r\nconnection: close\r\n\r\n" + gzip.compress(TEXT),
                 close=True), False),
    ("chunked gzip", stream(gzip.compress(TEXT), cut=7, fields="content-encoding: gzip\r\n"), True),
    ("CR LF", stream(TEXT.replace(b"\n", b"\r\n"), cut=3), True),
    ("server-sent events", stream(SSE + b"data: [DONE]\n\n"), True),
    ("no last newline", stream(TEXT[:-1]), True),
    ("lines that are not JSON", stream(b"hello\n: x\n{]\n" + TEXT + b"[DONE]\n"), True),
    ("events nobody knows", stream(ndjson({"type": "new", "x": 1}, {"no": "type"}) + TEXT), True),
    ("a byte at a time", stream(TEXT, cut=1), True),
]


@pytest.mark.parametrize("script, reusable", [row[1:] for row in FRAMINGS],
                         ids=[row[0] for row in FRAMINGS])
@pytest.mark.parametrize("streamed", [True, False])
def test_framings(proxy, upstream, script, reusable, streamed):
    upstream.scripts = [script]
    answer = proxy.post(CHAT, stream=streamed)
    assert answer.status == 200
    if streamed:
        text = "".join(choice["delta"].get("content") or "" for frame in answer.frames
                       for choice in frame["choices"])
        assert text == "Hello there" and answer.body.endswith(b"data: [DONE]\n\n")
    else:
        assert said(answer) == "Hello there"
    proxy.wait_quiet()
    assert said(proxy.post(CHAT)) == "Hello there"
    assert upstream.connections == (1 if reusable else 2)
    assert len(upstream.requests) == 2


def test_a_connection_with_more_than_its_answer_is_not_used_again(proxy, upstream):
    for rest in (b"HTTP/1.1 200 OK\r\n\r\n", b"x"):
        upstream.scripts = [raw(CHUNKED_HEAD + chunked(TEXT) + b"0\r\n\r\n" + rest)]
        assert said(proxy.post(CHAT)) == "Hello there"
    assert said(proxy.post(CHAT)) == "Hello there"
    assert upstream.connections == 3


def close_later(data, seconds):
    """A whole answer, and a little later the end of its connection."""
    def run(sock, request):
        sock.sendall(data)
        time.sleep(seconds)
        sock.close()
    return run


WHOLE = CHUNKED_HEAD + chunked(TEXT) + b"0\r\n\r\n"


def test_a_stale_connection_is_replaced_silently(proxy, upstream):
    upstream.scripts = [close_later(WHOLE, 0.05)]
    proxy.post(CHAT)
    wait_until(lambda: not upstream.open)
    assert said(proxy.post(CHAT)) == "Hello there"
    proxy.wait_quiet()
    assert "retries" not in proxy.log.getvalue()


@pytest.mark.parametrize("end", [raw(b"", close=True), reset()], ids=["FIN", "RST"])
def test_a_connection_that_dies_under_the_next_request(proxy, upstream, end):
    """It was idle too long for the upstream: not counted as an attempt, and not told."""
    upstream.scripts = [stream(TEXT), end]
    answers = [proxy.post(CHAT), proxy.post(CHAT)]
    assert [said(answer) for answer in answers] == ["Hello there"] * 2
    proxy.wait_quiet()
    assert upstream.connections == 2 and "retries" not in proxy.log.getvalue()
    assert "x-ccproxy-notes" not in answers[1].fields or "retried" not in \
        answers[1].fields["x-ccproxy-notes"]


def test_unsolicited_bytes_on_an_idle_connection(proxy, upstream):
    def run(sock, request):
        sock.sendall(WHOLE)
        time.sleep(0.05)
        sock.sendall(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
    upstream.scripts = [run]
    proxy.post(CHAT)
    time.sleep(0.1)
    assert said(proxy.post(CHAT)) == "Hello there"
    assert upstream.connections == 2


def test_idle_connections_are_closed(make_proxy, upstream):
    proxy = make_proxy(useProviderModels=False, limits=FAST._replace(pool_idle=0.05))
    proxy.post(CHAT)
    wait_until(lambda: not upstream.open)


# What fails before any output: the status, and how often the call was tried.

FAULTS = [
    ("closed at once", raw(b"", close=True), 502, 3),
    ("reset at once", reset(), 502, 3),
    ("reset in the head", reset(b"HTTP/1.1 200 OK\r\nx:"), 502, 3),
    ("closed in the head", raw(b"HTTP/1.1 200 OK\r\nx:", close=True), 502, 3),
    ("closed after 100", raw(b"HTTP/1.1 100 Continue\r\n\r\n", close=True), 502, 3),
    ("garbage", raw(b"SSH-2.0-OpenSSH\r\n\r\n", close=True), 502, 3),
    ("a bare line feed", raw(b"HTTP/1.1 200 OK\nx: y\n\n", close=True), 502, 3),
    ("HTTP/2", raw(b"HTTP/2 200\r\n\r\n", close=True), 502, 3),
    ("two lengths", raw(OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\n12"), 502, 3),
    ("an unknown transfer coding", raw(OK + b"transfer-encoding: br\r\n\r\n1"), 502, 3),
    ("an unknown content coding", raw(OK + b"content-encoding: br\r\ncontent-length: 1\r\n\r\n1"),
     502, 3),
    ("not the gzip it says to be", raw(OK + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\n"
                                       b"1234"), 502, 3),
    ("a bad chunk", raw(CHUNKED_HEAD + b"xyz\r\n"), 502, 3),
    ("a chunk cut off", raw(CHUNKED_HEAD + b"fff\r\n{}", close=True), 502, 3),
    ("an empty chunked body", raw(CHUNKED_HEAD + b"0\r\n\r\n"), 502, 3),
    ("an empty body", raw(OK + b"content-length: 0\r\n\r\n"), 502, 3),
    ("a body cut off", raw(OK + b"content-length: 99\r\n\r\n" + ndjson({"type": "start"}),
                           close=True), 502, 3),
    ("no finish", stream(ndjson({"type": "start"})), 502, 3),
    ("abort", stream(ndjson({"type": "start"}, {"type": "abort"})), 502, 3),
    ("an endless head", raw(OK + b"x: %b\r\n" % (b"y" * 1000) * 100), 502, 3),
    ("101", raw(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"), 502, 3),
    ("204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), 502, None),
    ("301", raw(b"HTTP/1.1 301 Moved\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n"
                ), 502, 1),
    ("302", raw(b"HTTP/1.1 302 Found\r\nlocation: /alpha/other\r\ncontent-length: 0\r\n\r\n"),
     502, 1),
    ("308", raw(b"HTTP/1.1 308 Moved\r\nlocation: /alpha/other\r\ncontent-length: 0\r\n\r\n"),
     502, 1),
]


@pytest.mark.parametrize("script, expected, tries", [row[1:] for row in FAULTS],
                         ids=[row[0] for row in FAULTS])
def test_faults_before_any_output(proxy, upstream, script, expected, tries):
    upstream.default = script
    for path, streamed in ((CHAT, True), (MESSAGES, False)):
        del upstream.requests[:]
        answer = proxy.post(path, stream=streamed)
        assert answer.status == expected
        error = answer.json["error"]
        assert error["type"] == ("api_error" if path == MESSAGES else "server_error")
        assert error["message"]
        assert tries is None or len(upstream.requests) == tries
        assert len({request.json["threadId"] for request in upstream.requests}) == 1
    if tries == 3:
        wait_until(lambda: not upstream.open)


def test_a_fault_is_followed_by_a_good_attempt(proxy, upstream):
    upstream.scripts = [reset(), raw(b"nonsense\r\n\r\n", close=True)]
    answer = proxy.post(CHAT)
    assert said(answer) == "Hello there"
    assert len(upstream.requests) == 3
    wait_until(lambda: "retries=2" in proxy.log.getvalue())


def test_redirects_take_no_key_anywhere(make_proxy, upstream):
    other = FakeUpstream()
    upstream.default = raw(("HTTP/1.1 302 Found\r\nlocation: %s/alpha/generate\r\n"
                            "content-length: 0\r\n\r\n" % other.base).encode())
    proxy = make_proxy()
    answer = proxy.post(CHAT)
    assert answer.status == 502 and "redirect" in answer.json["error"]["message"]
    assert answer.fields["x-should-retry"] == "false"
    assert not other.requests and not other.side_requests
    other.close()


def test_connection_refused(make_proxy):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    proxy = make_proxy(apiBase="http://127.0.0.1:%d" % port)
    answer = proxy.post(MESSAGES, stream=True)
    assert answer.status == 502 and answer.json["error"]["type"] == "api_error"
    assert "127.0.0.1:%d" % port in answer.json["error"]["message"]
    wait_until(lambda: "retries=2" in proxy.log.getvalue())


def test_connecting_takes_too_long(make_proxy):
    """A server that never shakes hands; a timeout is not repeated."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        proxy = make_proxy(apiBase="https://127.0.0.1:%d" % silent.getsockname()[1],
                           upstreamConnectSeconds=0.1, useProviderModels=False)
        answer = proxy.post(CHAT)
    assert answer.status == 504 and answer.json["error"]["code"] == "timeout"
    assert "0.1 seconds" in answer.json["error"]["message"]
    proxy.wait_quiet()
    assert "retries" not in proxy.log.getvalue()


# Error answers in whatever framing.

BROKE = {"success": False, "error": {"code": "PAYMENT_REQUIRED", "status": 402,
                                     "message": "Insufficient Balance"}}
PACKED = gzip.compress(json.dumps(BROKE).encode())


@pytest.mark.parametrize("script, words", [
    (status(402, BROKE), "Insufficient Balance"),
    (raw(b"HTTP/1.1 402 X\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(json.dumps(
        BROKE).encode()) + b"0\r\n\r\n"), "Insufficient Balance"),
    (raw(b"HTTP/1.1 402 X\r\n\r\n" + json.dumps(BROKE).encode(), close=True),
     "Insufficient Balance"),
    (raw(b"HTTP/1.1 402 X\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(PACKED)
         + PACKED), "Insufficient Balance"),
    (raw(b"HTTP/1.1 402 X\r\ncontent-encoding: br\r\ncontent-length: 3\r\n\r\nabc"), ""),
    (raw(b"HTTP/1.1 402 X\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc"), ""),
    (raw(b"HTTP/1.1 402 X\r\ncontent-length: 99\r\n\r\n{", close=True), ""),
    (stall(b"HTTP/1.1 402 X\r\ncontent-length: 99\r\n\r\n{"), ""),
    (status(402, b"<html>no</html>"), ""), (status(402, b""), ""),
    (status(402, b"[1,2]"), ""), (status(402, b"{\xff"), ""),
    (status(402, b"{" * 50_000), ""), (status(402, b"x" * 200_000), "")],
    ids=["length", "chunked", "until close", "gzip", "br", "bad gzip", "cut off", "stalled",
         "HTML", "nothing", "a list", "not UTF-8", "deep", "long"])
def test_a_status_stays_what_it_is(make_proxy, upstream, script, words):
    """402 stays 402, however its body comes or does not come."""
    upstream.default = script
    proxy = make_proxy(useProviderModels=False, limits=FAST._replace(error_body=0.1))
    answer = proxy.post(CHAT)
    assert answer.status == 402 and len(upstream.requests) == 1
    assert answer.json["error"]["type"] == "insufficient_quota"
    assert answer.json["error"]["message"] and words in answer.json["error"]["message"]
    assert len(answer.body) < 10_000


def test_an_error_leaves_the_connection_usable(proxy, upstream):
    upstream.scripts = [status(402, BROKE)]
    proxy.post(CHAT)
    assert said(proxy.post(CHAT)) == "Hello there"
    assert upstream.connections == 1


# TLS.


def test_tls_is_verified(make_proxy, tls_upstream):
    """An unknown authority: told in words that help, once, and nothing was sent."""
    fake = tls_upstream()
    answer = make_proxy(apiBase=fake.base, useProviderModels=False).post(CHAT)
    assert answer.status == 502 and answer.fields["x-should-retry"] == "false"
    assert "certificate" in answer.json["error"]["message"].lower()
    assert "SSL_CERT_FILE" in answer.json["error"]["message"]
    assert not fake.requests and fake.connections == 1


def test_tls_checks_the_name(make_proxy, tls_upstream, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", AUTHORITY)
    fake = tls_upstream("other.pem")
    answer = make_proxy(apiBase=fake.base, useProviderModels=False).post(CHAT)
    assert answer.status == 502 and not fake.requests


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tls_with_an_authority_of_ones_own(start_program, tls_upstream, host):
    """The whole program, for calls and for the model list; the connection is used again."""
    fake = tls_upstream()
    program = start_program("--api-base", "https://%s:%d" % (host, fake.port),
                            environment={"SSL_CERT_FILE": AUTHORITY})
    for _ in range(2):
        assert said(program.post(CHAT)) == "Hello there"
    assert "vendor/New-Model" in program.request("GET", "/v1/models").body.decode()
    assert len({request.connection for request in fake.requests}) == 1
    status_code, log = program.stop()
    assert status_code == 0 and "Traceback" not in log


def test_plain_http_where_tls_is_expected(make_proxy):
    heard = []

    def refuse(listener):
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                heard.append(sock.recv(65536))
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        threading.Thread(target=refuse, args=(listener,), daemon=True).start()
        proxy = make_proxy(apiBase="https://127.0.0.1:%d" % listener.getsockname()[1])
        assert proxy.post(CHAT).status == 502
        listener.shutdown(socket.SHUT_RDWR)
    assert heard and not any(KEY.encode() in data for data in heard)


# HTTP proxies on the way.


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_connect_through_a_proxy(make_proxy, tls_upstream, http_proxy, monkeypatch, name):
    fake = tls_upstream()
    monkeypatch.setenv(name, http_proxy.url.replace("//", "//me:p%40ss@"))
    monkeypatch.setenv("SSL_CERT_FILE", AUTHORITY)
    proxy = make_proxy(apiBase=fake.base, useProviderModels=False)
    for _ in range(2):
        assert said(proxy.post(CHAT)) == "Hello there"
    assert len(http_proxy.heads) == 1       # the tunnel is used again
    line, *fields = http_proxy.heads[0].decode().lower().split("\r\n")
    assert line == "connect 127.0.0.1:%d http/1.1" % fake.port
    assert "proxy-authorization: basic bwu6cebzcw==" in fields
    assert not any("user_" in field or field.startswith("authorization") for field in fields)
    assert fake.requests[0].field("proxy-authorization") is None


def test_a_tunnel_is_verified_too(make_proxy, tls_upstream, http_proxy, monkeypatch):
    fake = tls_upstream()
    monkeypatch.setenv("HTTPS_PROXY", http_proxy.url)
    answer = make_proxy(apiBase=fake.base, useProviderModels=False).post(CHAT)
    assert answer.status == 502 and "certificate" in answer.json["error"]["message"]
    assert not fake.requests


def test_the_model_list_goes_through_the_proxy(make_proxy, tls_upstream, http_proxy, monkeypatch):
    fake = tls_upstream()
    monkeypatch.setenv("HTTPS_PROXY", http_proxy.url)
    monkeypatch.setenv("SSL_CERT_FILE", AUTHORITY)
    listed = make_proxy(apiBase=fake.base).request("GET", "/v1/models").body
    assert b"vendor/New-Model" in listed and len(http_proxy.heads) == 1


@pytest.mark.parametrize("refusal", [b"HTTP/1.1 407 Auth\r\ncontent-length: 0\r\n\r\n",
                                     b"HTTP/1.1 502 Bad\r\n\r\n", b"nonsense\r\n\r\n", b""])
def test_a_proxy_that_refuses(make_proxy, tls_upstream, monkeypatch, refusal):
    fake, refusing = tls_upstream(), FakeProxy(refusal)
    monkeypatch.setenv("HTTPS_PROXY", refusing.url)
    answer = make_proxy(apiBase=fake.base, useProviderModels=False).post(CHAT)
    assert answer.status == 502 and not fake.connections
    if b"407" in refusal:
        assert "407" in answer.json["error"]["message"]
    refusing.close()


def test_plain_http_through_a_proxy(make_proxy, upstream, http_proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", http_proxy.url)
    proxy = make_proxy()
    assert said(proxy.post(CHAT)) == "Hello there"
    assert "vendor/New-Model" in proxy.request("GET", "/v1/models").body.decode()
    assert upstream.requests[0].line == "POST %s/alpha/generate HTTP/1.1" % upstream.base
    assert upstream.requests[0].field("host") == "127.0.0.1:%d" % upstream.port
    assert len(http_proxy.heads) == 2


@pytest.mark.parametrize("value, direct", [
    ("127.0.0.1", True), ("*", True), ("other.example,127.0.0.1", True), ("other.example", False),
    ("", False), ("127.0.0.1:PORT", True), ("127.0.0.1:1", False)])
def test_no_proxy(make_proxy, upstream, http_proxy, monkeypatch, value, direct):
    """urllib's own rules decide, for calls and for the model list alike."""
    monkeypatch.setenv("HTTP_PROXY", http_proxy.url)
    monkeypatch.setenv("NO_PROXY", value.replace("PORT", str(upstream.port)))
    proxy = make_proxy()
    proxy.request("GET", "/v1/models")
    assert len(http_proxy.heads) == (0 if direct else 1)
    assert said(proxy.post(CHAT)) == "Hello there"
    assert len(http_proxy.heads) == (0 if direct else 2)


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "socks5://127.0.0.1:1",
                                 "http://127.0.0.1:port", "http://"])
def test_a_proxy_that_cannot_be_used(make_proxy, upstream, monkeypatch, url):
    """It is an error, each time: nothing goes out past a proxy that somebody asked for."""
    monkeypatch.setenv("HTTP_PROXY", url)
    proxy = make_proxy(useProviderModels=False)
    for _ in range(3):
        assert proxy.post(CHAT).status == 502
    assert not upstream.connections


def test_a_silent_proxy(make_proxy, tls_upstream, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:%d" % silent.getsockname()[1])
        proxy = make_proxy(apiBase=tls_upstream().base, upstreamConnectSeconds=0.1,
                           useProviderModels=False)
        assert proxy.post(CHAT).status == 504
