"""Whole requests over real sockets: framing, limits, keep-alive, a connection's goodbye."""
from __future__ import annotations

import gzip
import json
import socket
import struct
import time
import zlib

import pytest
from fake_upstream import stall, stream, text_answer
from harness import (CHAT, FAST, KEY, MESSAGES, parse_answers, post_bytes, read_all, read_until,
                     wait_until)

BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
LAST_HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
KEY_FIELD = b"authorization: Bearer %b\r\n" % KEY.encode()
CHAT_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n" + KEY_FIELD


def chunks(*pieces, trailer=b""):
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (
        b"0\r\n" + trailer + b"\r\n")


# Requests that end their connection: one answer, and nothing behind it is looked at.

FATAL = [
    ("bare line feeds", b"GET /health HTTP/1.1\nhost: a\n\n", 400),
    ("a bare carriage return", b"GET /health HTTP/1.1\r\nhost: a\rx: y\r\n\r\n", 400),
    ("a space before the colon", b"GET /health HTTP/1.1\r\nhost : a\r\n\r\n", 400),
    ("an empty name", b"GET /health HTTP/1.1\r\nhost: a\r\n: x\r\n\r\n", 400),
    ("no colon", b"GET /health HTTP/1.1\r\nhost: a\r\nnothing\r\n\r\n", 400),
    ("a folded line", b"GET /health HTTP/1.1\r\nhost: a\r\nx: y\r\n z\r\n\r\n", 400),
    ("a NUL", b"GET /health HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n", 400),
    ("no host", b"GET /health HTTP/1.1\r\n\r\n", 400),
    ("two hosts", b"GET /health HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", 400),
    ("a host that is none", b"GET /health HTTP/1.1\r\nhost: a/b\r\n\r\n", 400),
    ("a signed length", CHAT_HEAD + b"content-length: +2\r\n\r\n{}", 400),
    ("an empty length", CHAT_HEAD + b"content-length: \r\n\r\n{}", 400),
    ("two lengths", CHAT_HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", 400),
    ("an endless length", CHAT_HEAD + b"content-length: %b\r\n\r\n{}" % (b"9" * 5000), 400),
    ("length and chunks", CHAT_HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
     + chunks(BODY), 400),
    ("chunked twice", CHAT_HEAD + b"transfer-encoding: chunked, chunked\r\n\r\n", 400),
    ("an unknown coding", CHAT_HEAD + b"transfer-encoding: gzip\r\n\r\n", 501),
    ("a bad chunk size", CHAT_HEAD + b"transfer-encoding: chunked\r\n\r\nx\r\n", 400),
    ("a signed chunk size", CHAT_HEAD + b"transfer-encoding: chunked\r\n\r\n+2\r\n{}\r\n", 400),
    ("a chunk without its end", CHAT_HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}xx", 400),
    ("a chunk line with a line feed",
     CHAT_HEAD + b"transfer-encoding: chunked\r\n\r\n2\n{}\n", 400),
    ("bad trailers", CHAT_HEAD + b"transfer-encoding: chunked\r\n\r\n"
     + chunks(BODY, trailer=b"bad\r\n"), 400),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    ("HTTP/5.6", b"GET / HTTP/5.6\r\nhost: a\r\n\r\n", 505),
    ("no version", b"GET /\r\n\r\n", 400),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ("a long target", b"GET /%b HTTP/1.1\r\nhost: a\r\n\r\n" % (b"a" * 17000), 414),
    ("an endless request line", b"GET /" + b"a" * 17000, 414),
    ("a long head", b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: %b\r\n" % (b"y" * 1000) * 70, 431),
    ("many fields", b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 200 + b"\r\n", 431),
    ("another expectation", CHAT_HEAD + b"expect: more\r\ncontent-length: 2\r\n\r\n{}", 417),
]


@pytest.mark.parametrize("request_bytes, status", [row[1:] for row in FATAL],
                         ids=[row[0] for row in FATAL])
def test_a_framing_error_is_one_answer_and_the_end(proxy, upstream, request_bytes, status):
    answers = parse_answers(proxy.raw(request_bytes + HEALTH))
    assert [answer.status for answer in answers] == [status]
    assert answers[0].fields["connection"] == "close"
    assert answers[0].json["error"]["message"]
    assert not upstream.requests


def test_both_error_shapes_on_the_wire(proxy):
    """What fails after its head was read knows its API; a broken head gets OpenAI's shape."""
    bad = b"transfer-encoding: chunked\r\n\r\nx\r\n"
    chat = parse_answers(proxy.raw(CHAT_HEAD + bad))[0].json
    messages = parse_answers(proxy.raw(
        b"POST /v1/messages HTTP/1.1\r\nhost: a\r\n" + KEY_FIELD + bad))[0].json
    assert chat["error"]["type"] == "invalid_request_error" and "type" not in chat
    assert messages["type"] == "error"
    assert messages["error"]["type"] == "invalid_request_error"


# Requests that are answered, and after which the connection goes on.

GOING_ON = [
    ("health", HEALTH, 200),
    ("an empty line first", b"\r\n" + HEALTH, 200),
    ("a full address as target", b"GET http://other.example:1/health HTTP/1.1\r\nhost: a\r\n\r\n",
     200),
    ("HTTP/1.9", b"GET /health HTTP/1.9\r\nhost: a\r\n\r\n", 200),
    ("not found", b"GET /nothing HTTP/1.1\r\nhost: a\r\n\r\n", 404),
    ("wrong method", b"PUT /health HTTP/1.1\r\nhost: a\r\n\r\n", 405),
    ("no length", CHAT_HEAD + b"\r\n", 411),
    ("not found, with a body", b"POST /nothing HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b"
     % (len(HEALTH), HEALTH), 404),
    ("wrong method, with a body", b"PUT /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n"
     b"\r\nGET /", 405),
    ("no key, with a body", b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b"
     % (len(BODY), BODY), 401),
    ("a GET with a body",
     b"GET /health HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nGET /", 200),
    ("telemetry", b"POST /api/event_logging/batch HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n"
     b"{}", 200),
    ("not JSON", CHAT_HEAD + b"content-length: 2\r\n\r\n{]", 400),
    ("an unknown content coding", CHAT_HEAD + b"content-encoding: snappy\r\ncontent-length: 2\r\n"
     b"\r\n{}", 415),
    ("chunks", CHAT_HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks(BODY[:5], BODY[5:]), 200),
    ("chunks with extensions and trailers", CHAT_HEAD + b"transfer-encoding: Chunked\r\n\r\n%x;a=b"
     b"\r\n%b\r\n" % (len(BODY), BODY) + b"0\r\nauthorization: Bearer user_other\r\n\r\n", 200),
    ("a length twice the same", CHAT_HEAD + b"content-length: %d\r\ncontent-length: %d\r\n\r\n%b"
     % (len(BODY), len(BODY), BODY), 200),
]


@pytest.mark.parametrize("request_bytes, status", [row[1:] for row in GOING_ON],
                         ids=[row[0] for row in GOING_ON])
def test_a_good_request_behind_it_is_answered_too(proxy, request_bytes, status):
    """Or the connection is closed; an unwanted body is never taken for a request."""
    answers = parse_answers(proxy.raw(request_bytes + LAST_HEALTH))
    assert answers[0].status == status
    if answers[0].fields.get("connection") == "close":
        assert len(answers) == 1
    else:
        assert [answer.status for answer in answers[1:]] == [200]
        assert answers[1].json["status"] == "ok"


def test_one_byte_at_a_time(proxy):
    with proxy.connect() as sock:
        for byte in CHAT_HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunks(
                BODY):
            sock.sendall(bytes([byte]))
        answers = parse_answers(read_all(sock))
    assert answers[0].json["choices"][0]["message"]["content"] == "Hello there"


def test_pipelined_requests_are_answered_in_order(make_proxy, upstream):
    proxy = make_proxy(useProviderModels=False)
    upstream.scripts = [stream(text_answer("slow"), cut=20, pause=0.01),
                        stream(text_answer("fast"))]
    sent = post_bytes(CHAT, {"messages": [{"role": "user", "content": "1"}], "stream": True})
    sent += post_bytes(MESSAGES, {"messages": [{"role": "user", "content": "2"}], "max_tokens": 9})
    answers = parse_answers(proxy.raw(sent + HEALTH + LAST_HEALTH))
    assert [answer.status for answer in answers] == [200] * 4
    assert answers[0].frames[1]["choices"][0]["delta"]["content"] == "slow"
    assert answers[1].json["content"] == [{"type": "text", "text": "fast"}]
    assert answers[3].fields["connection"] == "close"


def test_a_connection_serves_many_requests(proxy):
    """Streams, plain answers and errors alike leave it usable."""
    with proxy.connect() as sock:
        for round_number in range(3):
            sock.sendall(post_bytes(CHAT, {**json.loads(BODY), "stream": True}))
            assert b"[DONE]" in read_until(sock, b"0\r\n\r\n")
            sock.sendall(post_bytes(CHAT, b"{}"))
            assert b" 400 " in read_until(sock, b"}}")
            sock.sendall(post_bytes(CHAT, BODY))
            assert b" 200 " in read_until(sock, b'"usage":{')
            sock.settimeout(0.05)
            read_all(sock)              # the rest of that body
            sock.settimeout(10)


@pytest.mark.parametrize("version, field, goes_on", [
    (b"1.1", b"", True), (b"1.1", b"connection: close\r\n", False),
    (b"1.1", b"connection: Upgrade, Close\r\n", False), (b"1.0", b"", False),
    (b"1.0", b"connection: keep-alive\r\n", True)])
def test_who_closes(proxy, version, field, goes_on):
    data = proxy.raw(b"GET /health HTTP/" + version + b"\r\nhost: a\r\n" + field + b"\r\n"
                     + LAST_HEALTH)
    assert len(parse_answers(data)) == (2 if goes_on else 1)
    first = parse_answers(data)[0].fields.get("connection")
    assert first == ("close" if not goes_on else "keep-alive" if version == b"1.0" else None)


@pytest.mark.parametrize("streamed", [True, False])
def test_http_1_0(proxy, streamed):
    """No host needed, no chunks sent: the end of a stream is the end of the connection."""
    body = json.dumps({**json.loads(BODY), "stream": streamed}).encode()
    data = proxy.raw(b"POST /v1/chat/completions HTTP/1.0\r\nauthorization: bearer " + KEY.encode()
                     + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    answer = parse_answers(data)[0]
    assert answer.status == 200 and "transfer-encoding" not in answer.fields
    if streamed:
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert answer.fields["connection"] == "close"
    else:
        assert answer.json["choices"][0]["message"]["content"] == "Hello there"


def test_http_1_0_ignores_expectations(proxy):
    data = proxy.raw(b"POST /v1/chat/completions HTTP/1.0\r\n" + KEY_FIELD
                     + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY)
    assert [answer.status for answer in parse_answers(data)] == [200]


# Bodies.

CODINGS = [
    ("gzip", "gzip", gzip.compress(BODY), 200),
    ("x-gzip", "x-gzip", gzip.compress(BODY), 200),
    ("any case", "GZip", gzip.compress(BODY), 200),
    ("deflate", "deflate", zlib.compress(BODY), 200),
    ("two gzip members", "gzip", gzip.compress(BODY[:9]) + gzip.compress(BODY[9:]), 200),
    ("identity", "identity", BODY, 200),
    ("cut off", "gzip", gzip.compress(BODY)[:-9], 400),
    ("not gzip at all", "gzip", BODY, 400),
    ("a bomb", "gzip", gzip.compress(b" " * 3_000_000), 413),
    ("unknown", "br", BODY, 415),
    ("two codings", "gzip, gzip", gzip.compress(gzip.compress(BODY)), 415),
]


@pytest.mark.parametrize("coding, body, status", [row[1:] for row in CODINGS],
                         ids=[row[0] for row in CODINGS])
def test_content_codings(make_proxy, upstream, coding, body, status):
    proxy = make_proxy(maxBodyBytes=1_000_000)
    answer = proxy.request("POST", CHAT, body, {"content-encoding": coding})
    assert answer.status == status
    assert len(upstream.requests) == (status == 200)
    if status != 200:
        assert answer.json["error"]["type"] == "invalid_request_error"


def test_a_gzipped_chunked_body(proxy, upstream):
    packed = gzip.compress(BODY)
    data = proxy.raw(CHAT_HEAD + b"content-encoding: gzip\r\nconnection: close\r\n"
                     b"transfer-encoding: chunked\r\n\r\n" + chunks(packed[:7], packed[7:]))
    assert parse_answers(data)[0].status == 200
    assert upstream.requests[0].json["params"]["messages"][0]["content"][0]["text"] == "hi"


@pytest.mark.parametrize("fields, body", [
    (b"content-length: 2000", b"x" * 2000), (b"content-length: 999999999999999999", b""),
    (b"transfer-encoding: chunked", chunks(b"x" * 600, b"y" * 600))],
    ids=["length", "endless", "chunks"])
def test_too_large(make_proxy, upstream, fields, body):
    """A length that is declared is refused before anything is read."""
    proxy = make_proxy(maxBodyBytes=1024)
    answer = parse_answers(proxy.raw(CHAT_HEAD + fields + b"\r\n\r\n" + body, 1.0))[0]
    assert answer.status == 413 and "1024" in answer.json["error"]["message"]
    assert answer.fields["connection"] == "close"
    assert answer.fields["x-should-retry"] == "false"
    assert not upstream.requests


def test_lingering_close(make_proxy):
    """A client that goes on sending its refused body still reads the answer: no RST eats it."""
    proxy = make_proxy(maxBodyBytes=1024)
    size = 8_000_000
    with proxy.connect() as sock:
        sock.sendall(CHAT_HEAD + b"content-length: %d\r\n\r\n" % size)
        for _ in range(size // 100_000):
            sock.sendall(b"x" * 100_000)
        assert parse_answers(read_all(sock))[0].status == 413


def test_lingering_has_an_end(make_proxy):
    """A client that never stops sending is hung up on."""
    proxy = make_proxy(maxBodyBytes=1024, limits=FAST._replace(linger=0.1))
    with proxy.connect() as sock:
        sock.sendall(CHAT_HEAD + b"content-length: 100000000\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(1000):
                sock.sendall(b"x" * 1000)
                time.sleep(0.01)


# Expect: 100-continue.


def test_continue_is_sent_before_the_body_is_read(proxy):
    with proxy.connect() as sock:
        sock.sendall(CHAT_HEAD + b"connection: close\r\nexpect: 100-Continue\r\n"
                     b"content-length: %d\r\n\r\n" % len(BODY))
        assert read_until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert parse_answers(read_all(sock))[0].status == 200


EXPECTING = [
    ("no key", b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n", 401),
    ("another's key", b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\nx-api-key: "
     b"sk-1\r\n", 401),
    ("no such path", b"POST /v1/other HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n", 404),
    ("wrong method", b"PUT /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n", 405),
    ("too large", CHAT_HEAD + b"content-length: 99999999999\r\n", 413),
]


@pytest.mark.parametrize("head, status", [row[1:] for row in EXPECTING],
                         ids=[row[0] for row in EXPECTING])
def test_the_final_status_instead_of_continue(proxy, head, status):
    """The body, which never comes, is not waited for; what comes instead is no request."""
    with proxy.connect() as sock:
        sock.sendall(head + b"expect: 100-continue\r\n\r\n")
        first = read_until(sock, b"}}")
        assert [answer.status for answer in parse_answers(first)] == [status]
        sock.sendall(HEALTH)
        assert read_all(sock) == b""


def test_no_key_is_told_before_the_body_comes(proxy):
    with proxy.connect() as sock:
        sock.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: a\r\ncontent-length: 9000\r\n\r\n{")
        answer = parse_answers(read_until(sock, b"}}"))[0]
    assert answer.status == 401 and answer.fields["www-authenticate"].startswith("Bearer")
    assert answer.json["error"]["type"] == "authentication_error"


# Slow clients.


@pytest.mark.parametrize("sent", [b"GET / HT", CHAT_HEAD, b"POST /v1/mess"])
def test_a_head_that_does_not_come(make_proxy, sent):
    proxy = make_proxy(limits=FAST._replace(head=0.1))
    assert parse_answers(proxy.raw(sent))[0].status == 408


def test_a_head_that_trickles(make_proxy):
    proxy = make_proxy(limits=FAST._replace(head=0.2))
    with proxy.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n")
        sock.settimeout(0.01)
        data = b""
        for _ in range(500):
            try:
                sock.sendall(b"x: y\r\n"[:3])
                data += sock.recv(1000)
                break
            except OSError:
                continue
    assert b" 408 " in data


def test_a_body_that_does_not_come(make_proxy, upstream):
    proxy = make_proxy(limits=FAST._replace(body_idle=0.1))
    answer = parse_answers(proxy.raw(CHAT_HEAD + b"content-length: 9\r\n\r\n{"))[0]
    assert answer.status == 408 and answer.fields["connection"] == "close"
    assert not upstream.requests


def test_a_body_that_trickles(make_proxy):
    proxy = make_proxy(limits=FAST._replace(body_grace=0.1, body_rate=100_000))
    with proxy.connect() as sock:
        sock.sendall(CHAT_HEAD + b"content-length: 100000\r\n\r\n")
        sock.settimeout(0.01)
        data = b""
        for _ in range(500):
            try:
                sock.sendall(b"x")
                data += sock.recv(1000)
                break
            except OSError:
                continue
    assert b" 408 " in data


@pytest.mark.parametrize("limit, sent", [("first_request", b""), ("keep_alive", HEALTH)])
def test_silent_connections_are_closed(make_proxy, limit, sent):
    proxy = make_proxy(limits=FAST._replace(**{limit: 0.1}))
    data = proxy.raw(sent)
    assert len(parse_answers(data)) == (1 if sent else 0)
    wait_until(lambda: not proxy.app.clients)


def test_a_next_request_is_read_ahead_only_so_far(make_proxy, upstream):
    """More than 64 KiB behind a running answer ends the connection, and its upstream call."""
    upstream.default = stall()
    proxy = make_proxy(useProviderModels=False)
    with proxy.connect() as sock:
        sock.sendall(post_bytes(CHAT, BODY))
        wait_until(lambda: upstream.requests)
        with pytest.raises(OSError):
            for _ in range(1000):
                sock.sendall(b"x" * 10_000)
                time.sleep(0.001)
    wait_until(lambda: not upstream.open)


def test_a_next_request_may_wait(make_proxy, upstream):
    """Up to 64 KiB of the next request wait for the end of the running one."""
    upstream.scripts = [stream(text_answer("one"), cut=10, pause=0.01)]
    proxy = make_proxy(useProviderModels=False)
    large = json.dumps({"messages": [{"role": "user", "content": "x" * 50_000}]}).encode()
    with proxy.connect() as sock:
        sock.sendall(post_bytes(CHAT, BODY))
        wait_until(lambda: upstream.requests)
        sock.sendall(post_bytes(CHAT, large, {"connection": "close"}))
        answers = parse_answers(read_all(sock))
    assert [answer.json["choices"][0]["message"]["content"] for answer in answers] == [
        "one", "Hello there"]


def test_clients_that_reset_while_their_refusal_goes_out(proxy):
    """The goodbye to a connection that has just gone is no fault of anybody's."""
    bad = b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"
    for _ in range(120):
        sock = proxy.connect()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(bad)
        sock.close()
    wait_until(lambda: not proxy.app.clients)
    assert proxy.request("GET", "/health").status == 200
