"""Outside judges of our HTTP: h11 as the strict reader of all that we send in both directions, h11
as the upstream's own server, httpx as a client, and two public lists of malformed requests
(hostile/http_requests.jsonl names their sources and licences).  h11 and httpx are skipped where
they are not installed; the lists need nothing."""
from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from typing import Any, Dict, List, Tuple

import pytest
from fake_upstream import (CHUNKED_HEAD, MODELS, FakeUpstream, Request, chunked, ndjson, pieces_of,
                           raw, reset, stall, status, stream, text_answer)
from harness import (CHAT, FAST, KEY, MESSAGES, Proxy, parse_answers, read_all, wait_until)

try:
    import h11
except ImportError:
    h11 = None
try:
    import httpx
except ImportError:
    httpx = None

needs_h11 = pytest.mark.skipif(h11 is None, reason="h11 is not installed")
needs_httpx = pytest.mark.skipif(httpx is None, reason="httpx is not installed")

RESPONSES = "/v1/responses"
KEY_FIELD = ("authorization", "Bearer " + KEY)
HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
LAST_HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
HALF = CHUNKED_HEAD + chunked(ndjson({"type": "text-delta", "id": "0", "text": "Half"}))


def body_for(path: str, **members: Any) -> bytes:
    """A small good request of the API at this path."""
    body: Dict[str, Any] = {"max_tokens": 100} if path.startswith(MESSAGES) else {}
    body["input" if path.startswith(RESPONSES) else "messages"] = [
        {"role": "user", "content": "hi"}]
    return json.dumps({**body, **members}).encode()


# h11 reads what we send to clients.


class Judged:
    """A connection to the proxy whose every byte h11 reads, one at a time."""

    def __init__(self, proxy: Proxy) -> None:
        self.sock = proxy.connect()
        self.h11 = h11.Connection(h11.CLIENT)

    def send(self, method: str, target: str, fields: Any = (), body: bytes = b"",
             wire: Any = None) -> None:
        """Send a request as h11 writes it, or the bytes `wire` in its place."""
        given = [("host", "a"), *fields]
        if body and "transfer-encoding" not in dict(given):
            given.append(("content-length", str(len(body))))
        data = self.h11.send(h11.Request(method=method, target=target, headers=given))
        if body:
            data += self.h11.send(h11.Data(data=body))
        data += self.h11.send(h11.EndOfMessage())
        self.sock.sendall(data if wire is None else wire)

    def receive(self) -> Tuple[Any, bytes, List[int]]:
        """(response, its body, statuses of what came before it): exactly one, and complete."""
        response, body, interim = None, b"", []
        while True:
            event = self.h11.next_event()
            if event is h11.NEED_DATA:
                self.h11.receive_data(self.sock.recv(1))
            elif isinstance(event, h11.InformationalResponse):
                assert response is None
                interim.append(event.status_code)
            elif isinstance(event, h11.Response):
                assert response is None
                response = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                assert isinstance(event, h11.EndOfMessage) and not event.headers, event
                return response, body, interim

    def goes_on(self, ends: bool = False) -> bool:
        """Whether the connection goes on, which h11 and the socket must say alike.  Behind an
        answer whose head could not foresee its end (`ends`) the socket may close unsaid."""
        assert self.h11.trailing_data[0] == b""
        if self.h11.their_state is h11.DONE and self.h11.our_state is h11.DONE and not ends:
            self.h11.start_next_cycle()
            self.send("GET", "/health")
            assert self.receive()[0].status_code == 200
            return True
        assert ends or self.h11.their_state in (h11.MUST_CLOSE, h11.CLOSED), self.h11.states
        self.sock.settimeout(3)
        assert self.sock.recv(1) == b"", "more than one answer, or no close"
        self.h11.receive_data(b"")
        assert isinstance(self.h11.next_event(), h11.ConnectionClosed)
        return False

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def judge(make_proxy):
    """judge(proxy, method, target, ...) gives (status, fields, body, interim, goes on)."""
    opened = []

    def run(proxy, *request, ends=False, **options):
        judged = Judged(proxy)
        opened.append(judged)
        judged.send(*request, **options)
        response, body, interim = judged.receive()
        fields = {name.decode(): value.decode() for name, value in response.headers}
        assert len(fields) == len(response.headers), "a field came twice"
        return response.status_code, fields, body, interim, judged.goes_on(ends)
    yield run
    for judged in opened:
        judged.close()


ENDPOINTS = [
    # (method, target, fields, body, status, whether the connection goes on)
    ("GET", "/", (), b"", 200, True),
    ("GET", "/health", (), b"", 200, True),
    ("GET", "http://elsewhere.example:1/health", (), b"", 200, True),
    ("GET", "/health", [("connection", "close")], b"", 200, False),
    ("GET", "/health", (), b"unasked", 200, True),
    ("HEAD", "/", (), b"", 200, True),
    ("HEAD", "/health", (), b"", 200, True),
    ("HEAD", "/v1/models", (), b"", 200, True),
    ("HEAD", "/nothing", (), b"", 404, True),
    ("HEAD", CHAT, (), b"", 405, True),
    ("GET", "/v1/models", (), b"", 200, True),
    ("GET", "/v1/models", [("anthropic-version", "2023-06-01")], b"", 200, True),
    ("GET", "/v1/models/deepseek%2Fdeepseek-v4-flash", (), b"", 200, True),
    ("GET", "/v1/models/none", (), b"", 404, True),
    ("OPTIONS", CHAT, (), b"", 204, True),
    ("OPTIONS", "*", (), b"", 204, True),
    ("OPTIONS", MESSAGES, [("connection", "close")], b"", 204, False),
    ("POST", "/v1/messages/count_tokens", (), body_for(MESSAGES), 200, True),
    ("POST", "/v1/responses/input_tokens", (), body_for(RESPONSES), 200, True),
    ("POST", "/api/event_logging/batch", (), b"{}", 200, True),
    ("POST", "/explain" + CHAT, [KEY_FIELD], body_for(CHAT), 200, True),
    ("GET", RESPONSES, [("connection", "upgrade"), ("upgrade", "websocket")], b"", 426, True),
    ("GET", RESPONSES + "/resp_1", (), b"", 404, True),
    ("DELETE", RESPONSES + "/resp_1", (), b"", 404, True),
    ("GET", "/nothing", (), b"", 404, True),
    ("POST", "/nothing", (), b"x" * 100, 404, True),
    ("POST", "/nothing", (), b"x" * 100_000, 404, False),
    ("POST", "/nothing", [("transfer-encoding", "chunked")], b"x", 404, False),
    ("PUT", CHAT, [KEY_FIELD], b"{}", 405, True),
    ("TRACE", "/health", (), b"", 405, True),
    ("CONNECT", "elsewhere.example:443", (), b"", 501, True),
    ("POST", CHAT, (), body_for(CHAT), 401, True),
    ("POST", MESSAGES, (), body_for(MESSAGES), 401, True),
    ("POST", RESPONSES, (), b"x" * 100_000, 401, False),
    ("POST", CHAT, [KEY_FIELD], b"{]", 400, True),
    ("POST", MESSAGES, [KEY_FIELD], b"[]", 400, True),
    ("POST", RESPONSES, [KEY_FIELD], b"{}", 400, True),
    ("POST", RESPONSES, [KEY_FIELD, ("user-agent", "codex/1")], b"{}", 200, True),
    ("POST", CHAT, [KEY_FIELD], b"", 411, False),
    ("POST", CHAT, [KEY_FIELD, ("content-encoding", "br")], b"{}", 415, True),
    ("POST", CHAT, [KEY_FIELD, ("content-encoding", "gzip")], b"{}", 400, True),
    ("POST", CHAT, [KEY_FIELD], b" " * 300_000, 413, False),
    ("POST", CHAT, [KEY_FIELD, ("transfer-encoding", "chunked")], b" " * 300_000, 413, False),
]


@needs_h11
def test_h11_reads_every_endpoint(make_proxy, judge):
    proxy = make_proxy(maxBodyBytes=200_000)
    for method, target, fields, body, expected, goes_on in ENDPOINTS:
        code, answered, content, interim, on = judge(proxy, method, target, fields, body)
        assert (code, on, interim) == (expected, goes_on, []), (method, target)
        assert ("close" in answered.get("connection", "")) is not goes_on
        assert bool(content) is (method != "HEAD" and code != 204), (method, target)
        assert ("content-length" in answered) is (code != 204)


FRAMING_ERRORS = [
    (b"GET / HTTP/1.1\n\n", 400), (b"GET /\r\n\r\n", 400), (b"\x16\x03\x01\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nhost: a\r\nx : y\r\n\r\n", 400),
    (b"GET /" + b"a" * 17000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 414),
    (b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nexpect: more\r\n\r\n", 417),
    (b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 200 + b"\r\n", 431),
    (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n", 501),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nx-api-key: user_a\r\n"
     b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400)]


@needs_h11
def test_h11_reads_the_answer_to_a_malformed_request(proxy, judge):
    for wire, expected in FRAMING_ERRORS:
        code, fields, content, _, on = judge(proxy, "GET", "/", wire=wire + HEALTH)
        assert (code, on) == (expected, False)
        assert json.loads(content)["error"]["message"]


@needs_h11
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_h11_reads_answers(make_proxy, upstream, judge, path, streamed):
    """Of every API: chunked and closed with an empty chunk, or of the length that is told."""
    proxy = make_proxy(useProviderModels=False)
    for name in ("01", "04", "10_", "07"):
        upstream.default = stream(name, cut=37)
        code, fields, body, _, on = judge(proxy, "POST", path, [KEY_FIELD],
                                          body_for(path, stream=streamed),
                                          ends=streamed and name == "07")
        if streamed and name == "07":       # it breaks off behind some text
            assert (code, on) == (200, False)
        elif name == "07":
            assert (code, on) == (503, True)
        else:
            assert (code, on) == (200, True)
        chunks = fields.get("transfer-encoding") == "chunked"
        assert chunks is (streamed and code == 200) and chunks is ("content-length" not in fields)
        assert body.startswith((b"data: ", b"event: ") if chunks else b"{")


UPSTREAM_FAILURES = [
    (status(401, {"error": {"message": "no"}}), 401), (status(402, b""), 402),
    (status(403, b""), 403), (status(404, b""), 404), (status(413, b""), 413),
    (status(422, b""), 422), (status(429, b"", "retry-after: 7\r\n"), 429),
    (status(302, b"", "location: http://127.0.0.1:1/\r\n"), 502),
    (raw(b"nonsense\r\n\r\n", close=True), 502), (reset(), 502),
    (status(503, b"", "retry-after: 9\r\n"), 503), (status(529, b""), 529),
    (stream(ndjson({"type": "error", "error": {"message": "no", "statusCode": 402}})), 402),
    (stall(seconds=3), 504)]


@needs_h11
def test_h11_reads_failures_of_the_upstream(make_proxy, upstream, judge):
    proxy = make_proxy(useProviderModels=False, upstreamIdleSeconds=0.2)
    for number, (script, expected) in enumerate(UPSTREAM_FAILURES):
        path = (CHAT, MESSAGES, RESPONSES)[number % 3]
        for streamed in (True, False):
            upstream.default = script
            code, fields, body, _, _ = judge(proxy, "POST", path, [KEY_FIELD],
                                             body_for(path, stream=streamed))
            assert code == expected, (number, body)
            assert json.loads(body)["error"]["message"]
            assert ("retry-after" in fields) is (code in (429,) or number == 10)


@needs_h11
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_h11_reads_a_stream_that_breaks_off(make_proxy, upstream, judge, path):
    """The error is the last event; the chunks end as they should."""
    upstream.default = raw(HALF, close=True)
    code, fields, body, _, _ = judge(make_proxy(useProviderModels=False), "POST", path,
                                     [KEY_FIELD], body_for(path, stream=True), ends=True)
    assert code == 200 and fields["transfer-encoding"] == "chunked"
    assert b"Half" in body and b"error" in body.rpartition(b"data: ")[2]


@needs_h11
@pytest.mark.parametrize("path, streamed", [(CHAT, True), (MESSAGES, False), (RESPONSES, True)])
def test_h11_waits_for_continue(proxy, judge, path, streamed):
    body = body_for(path, stream=streamed)
    code, _, _, interim, on = judge(proxy, "POST", path, [KEY_FIELD, ("expect", "100-continue")],
                                    body)
    assert (code, interim, on) == (200, [100], True)


@needs_h11
@pytest.mark.parametrize("method, path, fields, expected", [
    ("POST", MESSAGES, [], 401), ("PUT", MESSAGES, [KEY_FIELD], 405), ("POST", "/none", [], 404)])
def test_h11_gets_the_final_status_instead_of_continue(proxy, judge, method, path, fields,
                                                       expected):
    head = "%s %s HTTP/1.1\r\nhost: a\r\n%sexpect: 100-continue\r\ncontent-length: 9\r\n\r\n" % (
        method, path, "".join("%s: %s\r\n" % pair for pair in fields))
    code, _, _, interim, on = judge(proxy, method, path, wire=head.encode())
    assert (code, interim, on) == (expected, [], False)


@needs_h11
def test_h11_reads_what_limits_say(make_proxy, judge):
    """408 for slow heads and bodies, 503 for too many bodies and too many connections."""
    proxy = make_proxy(limits=FAST._replace(head=0.05, body_idle=0.05, bodies=1000, sweep=0.02))
    assert judge(proxy, "GET", "/", wire=b"GET / HT")[0] == 408
    head = (b"POST /v1/messages HTTP/1.1\r\nhost: a\r\nx-api-key: user_a\r\n"
            b"content-length: 9\r\n\r\n")
    assert judge(proxy, "POST", MESSAGES, wire=head)[0] == 408
    code, fields, _, _, _ = judge(proxy, "POST", CHAT, [KEY_FIELD], b" " * 2000)
    assert code == 503 and int(fields["retry-after"]) >= 1


@needs_h11
def test_h11_reads_that_there_are_too_many_connections(make_proxy, judge):
    proxy = make_proxy(maxConnections=1)
    with proxy.connect():
        wait_until(lambda: proxy.app.clients == 1)
        code, fields, _, _, on = judge(proxy, "GET", "/health")
    assert (code, on) == (503, False) and int(fields["retry-after"]) >= 1


@needs_h11
@pytest.mark.parametrize("version, streamed, keep", [
    ("1.0", True, False), ("1.0", False, False), ("1.0", False, True), ("1.0", True, True)])
def test_h11_reads_answers_to_http_1_0(proxy, judge, version, streamed, keep):
    """No chunks; a stream ends with the connection, whatever the client wished."""
    body = body_for(CHAT, stream=streamed)
    wire = ("POST %s HTTP/%s\r\nauthorization: Bearer %s\r\n%scontent-length: %d\r\n\r\n" % (
        CHAT, version, KEY, "connection: keep-alive\r\n" if keep else "", len(body))).encode()
    code, fields, content, _, on = judge(proxy, "POST", CHAT, wire=wire + body)
    assert code == 200 and "transfer-encoding" not in fields
    assert on is (keep and not streamed) and content.endswith(b"[DONE]\n\n") is streamed


@needs_h11
def test_h11_reads_pipelined_answers(proxy):
    """Three requests in one packet, three answers, told apart by their framing alone."""
    body = body_for(CHAT, stream=True)
    post = b"POST %b HTTP/1.1\r\nhost: a\r\nauthorization: Bearer %b\r\n" % (
        CHAT.encode(), KEY.encode())
    wire = post + b"content-length: %d\r\n\r\n" % len(body) + body + HEALTH + LAST_HEALTH
    answers = []
    data = proxy.raw(wire)
    for _ in range(3):
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(data)
        connection.receive_data(b"")
        answers.append(connection.next_event().status_code)
        while not isinstance(connection.next_event(), h11.EndOfMessage):
            pass
        data = connection.trailing_data[0]
    assert answers == [200, 200, 200] and data == b""


# h11 reads what we send to the upstream, and answers as its server.


class H11Upstream(FakeUpstream):
    """An upstream whose HTTP is all h11's; `answers` are how it frames its next ones.

    What a caller sent on a connection must be requests to the last byte, each with its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers: List[str] = []
        self.faults: List[str] = []
        self.content = text_answer("Hello", " there")

    def serve_one(self, sock: socket.socket, number: int) -> bool:
        connection = h11.Connection(h11.SERVER)
        try:
            while self.read_request(sock, connection, number):
                connection.start_next_cycle()
        except h11.RemoteProtocolError as error:
            self.faults.append(str(error))
        return False

    def read_request(self, sock: socket.socket, connection: Any, number: int) -> bool:
        """One request, fed byte by byte, and its answer; False when the connection is done."""
        request, body = None, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = sock.recv(65536)
                for at in range(max(1, len(data) - 1)):
                    connection.receive_data(data[at:at + 1] if at < len(data) - 2 else data[at:])
                    if at >= len(data) - 2:
                        break
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                assert not event.headers
                break
            else:
                return False
        line = "%s %s HTTP/%s" % (request.method.decode(), request.target.decode(),
                                  request.http_version.decode())
        told = Request(line, [(name.decode(), value.decode()) for name, value in request.headers],
                       body, number)
        if request.method == b"GET":
            self.side_requests.append(told)
            self.answer(sock, connection, "length", json.dumps(MODELS).encode())
        else:
            self.requests.append(told)
            self.answer(sock, connection, self.answers.pop(0) if self.answers else "chunked",
                        self.content)
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    def answer(self, sock: socket.socket, connection: Any, form: str, content: bytes) -> None:
        fields = [("content-type", "text/event-stream")]
        if "length" in form:
            fields.append(("content-length", str(len(content))))
        if "close" in form:
            fields.append(("connection", "close"))
        for code in (100, 103, 103) if "interim" in form else ():
            sock.sendall(connection.send(h11.InformationalResponse(
                status_code=code, headers=[("x-hint", "1")])))
        sock.sendall(connection.send(h11.Response(status_code=200, headers=fields)))
        for piece in pieces_of(content, 11 if "small" in form else None):
            sock.sendall(connection.send(h11.Data(data=piece)))
        trailers = [("x-checksum", "1")] if "trailers" in form else []
        sock.sendall(connection.send(h11.EndOfMessage(headers=trailers)))


@pytest.fixture
def h11_upstream():
    fake = H11Upstream()
    yield fake
    fake.close()
    assert fake.faults == []


FORMS = ["length", "chunked", "chunked small", "chunked trailers", "interim length",
         "interim chunked small trailers", "length close", "chunked close"]


@needs_h11
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streamed", [True, False])
def test_h11_as_the_upstream(make_proxy, h11_upstream, form, streamed):
    """Its answers in every framing it has; a connection is used again unless it says close."""
    proxy = make_proxy(apiBase=h11_upstream.base, useProviderModels=False)
    h11_upstream.answers = [form] * 3
    for path in (CHAT, MESSAGES, RESPONSES):
        answer = proxy.request("POST", path, body_for(path, stream=streamed))
        assert answer.status == 200 and b"Hello" in answer.body and b" there" in answer.body
        proxy.wait_quiet()
    assert len({request.connection for request in h11_upstream.requests}) == (
        3 if "close" in form else 1)


@needs_h11
def test_h11_reads_what_the_upstream_gets(make_proxy, h11_upstream):
    """Exactly one request a call, whatever the caller sent; with these fields, each once."""
    proxy = make_proxy(apiBase=h11_upstream.base)
    large = json.dumps({"messages": [{"role": "user", "content": "Grüße " * 20_000}]}).encode()
    odd = {"x-session-id": "\u00e9" * 300, "traceparent": "x y", "cookie": "a=b",
           "te": "trailers", "connection": "keep-alive, x-drop", "x-drop": "1"}
    for path, body, fields in ((CHAT, body_for(CHAT), {}), (MESSAGES, body_for(MESSAGES), odd),
                               (RESPONSES, body_for(RESPONSES, stream=True), odd),
                               (CHAT, large, {"x-ccproxy-strict": "no"})):
        assert proxy.request("POST", path, body, fields).status == 200
    proxy.wait_quiet()
    assert len(h11_upstream.requests) == 4
    for request in h11_upstream.requests:
        assert request.line == "POST /alpha/generate HTTP/1.1"
        names = [name for name, _ in request.fields]
        assert len(set(names)) == len(names) == 13
        assert request.field("host") == "127.0.0.1:%d" % h11_upstream.port
        assert request.field("authorization") == "Bearer " + KEY
        assert int(request.field("content-length")) == len(request.body)
        assert request.json["params"]["messages"]
    side = h11_upstream.side_requests[0]
    assert side.line == "GET /provider/v1/models HTTP/1.1" and not side.body


@needs_h11
def test_h11_sees_repetitions_as_whole_requests(make_proxy, h11_upstream):
    """A repair turn is a request of its own, on the same connection, with its own length."""
    proxy = make_proxy(apiBase=h11_upstream.base, useProviderModels=False)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    answer = proxy.post(CHAT, response_format={"type": "json_schema", "json_schema": {
        "name": "x", "schema": schema}})
    assert answer.status == 200
    assert len(h11_upstream.requests) == 2
    assert len({request.body for request in h11_upstream.requests}) == 2


# httpx as a client.


@needs_httpx
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_httpx(make_proxy, upstream, path):
    """Plain, streaming and refused requests on one connection."""
    proxy = make_proxy(useProviderModels=False)
    with httpx.Client(base_url=proxy.base, http2=False, trust_env=False, timeout=10,
                      headers={"authorization": "Bearer " + KEY}) as client:
        for _ in range(2):
            answer = client.post(path, content=body_for(path))
            assert answer.status_code == 200 and "Hello there" in answer.text
            assert answer.http_version == "HTTP/1.1"
            upstream.scripts = [stream("10_", cut=7)]
            with client.stream("POST", path, content=body_for(path, stream=True)) as streamed:
                assert streamed.headers["content-type"].startswith("text/event-stream")
                # Not iter_lines(), which takes U+2028 for the end of a line.
                lines = [json.loads(line[6:]) for line in streamed.read().split(b"\n")
                         if line.startswith(b"data: {")]
            assert len(lines) > 3
            refused = client.post(path, content=b"{}", headers={"authorization": "Bearer x"})
            assert refused.status_code == 401 and refused.headers["www-authenticate"]
            assert client.post(path, content=b"{]").status_code == 400
            assert client.get("/health").json()["status"] == "ok"
            assert client.head("/health").content == b""
            assert client.options(path).status_code == 204
            assert client.get(path + "/none").status_code in (404, 405)
            assert proxy.app.clients == 1


@needs_httpx
def test_httpx_sends_chunks(proxy, upstream):
    def pieces():
        body = body_for(CHAT)
        yield from (body[:3], body[3:9], body[9:])
    with httpx.Client(base_url=proxy.base, trust_env=False, timeout=10,
                      headers={"authorization": "Bearer " + KEY}) as client:
        answer = client.post(CHAT, content=pieces())
        assert answer.status_code == 200 and "Hello there" in answer.text
        too_large = client.post("/nothing", content=b"x" * 3_000_000)
        assert too_large.status_code == 404     # a lingering close: no RST eats the answer
        assert client.post(CHAT, content=body_for(CHAT)).status_code == 200


@needs_httpx
def test_httpx_leaves_in_the_middle(make_proxy, upstream):
    """Closing a stream closes its upstream call."""
    upstream.default = stall(HALF)
    proxy = make_proxy(useProviderModels=False)
    with httpx.Client(base_url=proxy.base, trust_env=False, timeout=10) as client:
        with client.stream("POST", CHAT, content=body_for(CHAT, stream=True),
                           headers={"authorization": "Bearer " + KEY}) as streamed:
            assert "data: " in next(streamed.iter_text())
        wait_until(lambda: not upstream.open)


@needs_httpx
def test_httpx_async(make_proxy, upstream):
    """Many at once; each gets its own answer."""
    def echo(sock, request):
        word = request.json["params"]["messages"][0]["content"][0]["text"]
        stream(text_answer(word, "!"), cut=25)(sock, request)
    upstream.default = echo
    proxy = make_proxy(useProviderModels=False)

    async def one(client: Any, number: int) -> bool:
        path = (CHAT, MESSAGES)[number % 2]
        words = [{"role": "user", "content": "word-%d" % number}]
        content = body_for(path, messages=words, stream=number % 3 == 0)
        if number % 3:
            return "word-%d!" % number in (await client.post(path, content=content)).text
        async with client.stream("POST", path, content=content) as streamed:
            text = "".join([part async for part in streamed.aiter_text()])
        return '"word-%d"' % number in text

    async def run() -> List[bool]:
        limits = httpx.Limits(max_connections=6)
        async with httpx.AsyncClient(base_url=proxy.base, trust_env=False, timeout=10,
                                     limits=limits,
                                     headers={"authorization": "Bearer " + KEY}) as client:
            return await asyncio.gather(*[one(client, number) for number in range(24)])
    assert asyncio.run(run()) == [True] * 24
    assert len(upstream.requests) == 24


# The public lists.

LISTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hostile", "http_requests.jsonl")
with open(LISTS, encoding="ascii") as file:
    ABOUT, *ROWS = map(json.loads, file)
AIMED = b"POST " + CHAT.encode() + b" "


def smuggled() -> bytes:
    """A request that would succeed if it ever were taken for one."""
    body = b'{"messages":[{"role":"user","content":"evil"}]}'
    return (b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer "
            b"user_smuggled\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))


def framed_request(line: str, short: bool) -> bytes:
    """A mutated header line where length and chunks would differ: read by the length the body
    holds the smuggled request; `short`, read by the chunks it does."""
    if short:
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled()), smuggled())
        length = body.index(b"\r\n") + 2
    else:
        body = b"0\r\n\r\n" + smuggled()
        length = len(body)
    lines = [b"content-length: %d" % length, line.encode("latin-1")]
    return b"\r\n".join([AIMED + b"HTTP/1.1", *(lines if short else lines[::-1]), b"host: a",
                         b"authorization: Bearer " + KEY.encode(), b"", b""]) + body


def aim(data: bytes) -> bytes:
    """The request sent to an endpoint that reads its body, with the Host that lists leave out."""
    line, _, rest = data.partition(b"\r\n")
    host = b"" if re.search(rb"(?im)^host *:", rest) else b"host: a\r\n"
    return (AIMED + line.rpartition(b" ")[2] + b"\r\n" + host + b"authorization: Bearer "
            + KEY.encode() + b"\r\n" + rest)


def verdict_of(proxy: Proxy, data: bytes, verdict: str) -> str:
    """What is wrong about the way these bytes are taken; "" when all is as it should be."""
    if verdict == "wait":
        with proxy.connect(0.05) as sock:
            sock.sendall(data)
            return "answered too early" if read_all(sock) else ""
    accepted = verdict == "accept"
    behind = LAST_HEALTH if accepted else HEALTH + smuggled()
    answers = parse_answers(proxy.raw(data + behind, 3.0))
    found = [answer.status for answer in answers]
    if accepted:
        good = len(found) == 2 and found[1] == 200 and found[0] in (200, 400, 404, 415)
        return "" if good and answers[1].json["status"] == "ok" else "got %r" % found
    allowed = [int(code) for code in verdict.split()[1:]]
    if len(found) != 1 or found[0] not in allowed:
        return "got %r" % found
    return "" if answers[0].fields.get("connection") == "close" else "not closed"


def judge_rows(proxy: Proxy, rows: List[Tuple[str, bytes, str]]) -> Dict[str, str]:
    """{name: what is wrong} of rows (name, bytes, verdict)."""
    found = ((name, verdict_of(proxy, data, verdict)) for name, data, verdict in rows)
    return {name: wrong for name, wrong in found if wrong}


def rows_of(source: str) -> List[Dict[str, str]]:
    return [row for row in ROWS if row["source"] == source]


def test_the_lists_are_whole():
    """Where a verdict is not the list's own, the row says why."""
    assert len(rows_of("smuggler")) == 746 and len(rows_of("llhttp")) == 61
    assert set(ABOUT["sources"]) == {"smuggler", "llhttp"} and "Permission" in ABOUT["licence"]
    for row in rows_of("llhttp"):
        theirs = row["theirs"]
        differs = row["verdict"].split()[0] != theirs or row.get("aimed", theirs).split()[
            0] != theirs
        assert not differs or row["why"], row


@pytest.mark.parametrize("short", [False, True], ids=["by length", "by chunks"])
@pytest.mark.parametrize("part", range(4))
def test_mutations_of_smuggler(make_proxy, upstream, part, short):
    """746 ways to write Transfer-Encoding beside a Content-Length, read in either way."""
    proxy = make_proxy(useProviderModels=False)
    rows = [(row["name"], framed_request(row["line"], short), row["verdict"])
            for row in rows_of("smuggler")[part::4]
            if not (short and row["verdict"] == "accept")]      # there, what follows is a request
    assert judge_rows(proxy, rows) == {}
    assert upstream.requests == []
    assert proxy.post(CHAT).status == 200


@pytest.mark.parametrize("aimed", [False, True], ids=["as listed", "aimed"])
def test_requests_of_llhttp(make_proxy, upstream, aimed):
    """As they stand in the list, and at an endpoint that reads its body, with a Host."""
    proxy = make_proxy(useProviderModels=False)
    data = [(row["name"], row["bytes"].encode("latin-1"), row) for row in rows_of("llhttp")]
    rows = [(name, aim(given), row["aimed"]) for name, given, row in data
            if "aimed" in row] if aimed else [(name, given, row["verdict"])
                                              for name, given, row in data]
    assert len(rows) >= 50
    assert judge_rows(proxy, rows) == {}
    assert upstream.requests == []
    assert proxy.post(CHAT).status == 200


@pytest.mark.parametrize("data, verdict, wrong", [
    (LAST_HEALTH, "reject 400", True), (HEALTH, "wait", True), (HEALTH, "accept", False),
    (b"GET / HTTP/1.1\n\n", "accept", True), (b"GET / HTTP/1.1\n\n", "reject 501", True),
    (b"GET / HTTP/1.1\n\n", "reject 400", False), (b"GET / HTT", "wait", False)])
def test_the_judging_itself(proxy, data, verdict, wrong):
    assert bool(verdict_of(proxy, data, verdict)) is wrong


def test_the_smuggled_request_would_succeed(proxy, upstream):
    proxy.raw(smuggled(), 0.3)
    assert [request.field("authorization") for request in upstream.requests] == [
        "Bearer user_smuggled"]
