"""The server as a whole: many connections, bounds, what a fault does, and the orderly stop."""
from __future__ import annotations

import gc
import http.client
import json
import signal
import socket
import ssl
import threading
import time

import ccproxy
import pytest
from fake_upstream import CHUNKED_HEAD, chunked, ndjson, stall, status, stream, text_answer
from harness import (CHAT, FAST, KEY, MESSAGES, parse_answers, post_bytes, read_all, read_until,
                     wait_until)

HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
LAST_HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
TEXT = ndjson({"type": "text-delta", "id": "0", "text": "Half"})


def refused(port):
    """Whether nothing listens there any more."""
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionError:         # reset: it was closing just now
        return True
    return False


# Bounds.


def test_too_many_connections(make_proxy):
    """One more than allowed gets a 503 that says when to come again; then there is room again."""
    proxy = make_proxy(maxConnections=2)
    first, second = proxy.connect(), proxy.connect()
    wait_until(lambda: proxy.app.clients == 2)
    with proxy.connect() as third:
        answer = parse_answers(read_all(third))[0]
    assert answer.status == 503 and answer.fields["connection"] == "close"
    assert int(answer.fields["retry-after"]) >= 1
    assert answer.json["error"]["type"] == "server_error"
    first.close()
    wait_until(lambda: proxy.app.clients == 1)
    assert proxy.request("GET", "/health").status == 200
    second.close()


def test_too_many_bodies(make_proxy, upstream):
    """All bodies together are bounded; what is refused is told when to come again."""
    proxy = make_proxy(limits=FAST._replace(bodies=100_000), useProviderModels=False)
    with proxy.connect() as large:
        large.sendall(post_bytes(CHAT, b"x" * 90_000)[:-10_000])
        wait_until(lambda: proxy.app.bodies >= 70_000)
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 40_000}]}).encode()
        answers = parse_answers(proxy.raw(post_bytes(MESSAGES, body) + LAST_HEALTH, 1.0))
        assert answers[0].status == 503 and int(answers[0].fields["retry-after"]) >= 1
        assert answers[0].json["error"]["type"] == "overloaded_error"
        if answers[0].fields.get("connection") != "close":
            assert [answer.status for answer in answers[1:]] == [200]
        assert proxy.post(CHAT).status == 200       # a small one still fits
    wait_until(lambda: not proxy.app.bodies)
    assert proxy.request("POST", CHAT, body).status == 200
    assert not proxy.app.bodies


def test_a_tls_greeting_on_the_plain_port_is_one_log_line(start_program):
    """https:// where http:// is meant: answered at once, not after the head's time limit."""
    program = start_program()
    context = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", program.port), 10) as sock, \
            pytest.raises(ssl.SSLError):
        context.wrap_socket(sock, server_hostname="localhost")
    assert program.request("GET", "/health").status == 200
    _, log = program.stop()
    (line,) = [line for line in log.splitlines() if " 400 " in line]
    assert "TLS handshake" in line and "http://" in line and "Traceback" not in log


def test_every_status_that_is_answered_has_a_reason_phrase():
    """RFC 9110 15."""
    ours = {row.status for row in ccproxy.FAILURES} | {200, 201, 202, 204, 409}
    assert ours <= set(ccproxy.REASONS)
    assert (ccproxy.REASONS[201], ccproxy.REASONS[202], ccproxy.REASONS[409]) == (
        "Created", "Accepted", "Conflict")


def test_many_connections_at_once(make_proxy, upstream):
    """Each gets its own answer."""
    def echo(sock, request):
        word = request.json["params"]["messages"][0]["content"][0]["text"]
        stream(text_answer(word, "!"), cut=25)(sock, request)
    upstream.default = echo
    proxy = make_proxy(useProviderModels=False)
    socks = [proxy.send_post(CHAT, stream=number % 2 == 0, messages=[
        {"role": "user", "content": "word-%d" % number}]) for number in range(60)]
    for number, sock in enumerate(socks):
        data = b""
        while b"[DONE]" not in data and b'"usage":{' not in data:
            data += sock.recv(65536)
        assert b"word-%d" % number in data
        sock.close()
    wait_until(lambda: not proxy.app.clients)
    assert not proxy.app.relays and not proxy.app.exchanges and not proxy.app.bodies


def test_a_fault_of_ours_is_a_500_and_disturbs_nobody(make_proxy, monkeypatch):
    """It is logged with its traceback; the client learns that it was not its fault."""
    async def broken(app, exchange):
        raise KeyError("oops")
    monkeypatch.setitem(ccproxy.ROUTES, "/broken", ccproxy.Route({"GET": broken}))
    proxy = make_proxy()
    answer = proxy.request("GET", "/broken")
    assert answer.status == 500 and answer.json["error"]["type"] == "server_error"
    assert "oops" not in answer.body.decode()
    assert proxy.request("GET", "/health").status == 200
    proxy.wait_quiet()
    assert "Traceback" in proxy.log.getvalue() and "KeyError" in proxy.log.getvalue()
    proxy.log.truncate(0)       # it was meant


@pytest.mark.parametrize("streamed", [True, False])
def test_a_fault_while_an_answer_is_read(make_proxy, upstream, monkeypatch, streamed):
    """A bug in a reader ends this answer alone, and its upstream call."""
    def broken(reading, raw):
        raise KeyError("oops")
    monkeypatch.setitem(ccproxy.ALPHA_READERS, "finish-step", broken)
    go_on = threading.Event()

    def run(sock, request):
        sock.sendall(CHUNKED_HEAD + chunked(TEXT))
        go_on.wait(5)
        stall(chunked(ndjson({"type": "finish-step"})))(sock, request)
    upstream.scripts = [run]
    proxy = make_proxy(useProviderModels=False)
    with proxy.send_post(CHAT, stream=streamed) as sock:
        data = read_until(sock, b"Half") if streamed else b""
        go_on.set()
        wait_until(lambda: not upstream.open)
        sock.settimeout(0.2)
        data += read_all(sock)
    assert proxy.post(CHAT).status == 200
    assert "KeyError" in proxy.log.getvalue()
    proxy.log.truncate(0)       # it was meant
    if streamed:
        assert b'"error"' in data and b"[DONE]" not in data
    else:
        assert parse_answers(data)[0].status == 500


# The log.


def test_log_levels_and_lines(start_program, upstream):
    """A line a request; what only watches is not worth one; nothing that forges another."""
    program = start_program("--log-level", "info")
    program.post(CHAT, model="a\nINFO forged")
    program.request("GET", "/health")
    program.request("GET", "/no%0Athing%1b[31m")
    program.post(MESSAGES, key=None)
    _, log = program.stop()
    lines = [line for line in log.splitlines() if "total=" in line]
    assert len(lines) == 3 and all(line.isascii() and line.isprintable() for line in lines)
    assert all(line[:4].isdigit() and line[10] == "T" for line in lines)
    assert " 400 " in lines[0] and " 404 " in lines[1] and " 401 " in lines[2]
    assert "path=/health" not in log and "\nINFO forged" not in log


def test_a_quiet_log(start_program):
    program = start_program("--log-level", "error")
    assert program.post(CHAT).status == 200
    assert program.request("GET", "/nothing").status == 404
    assert program.stop() == (0, "")


def test_log_file(start_program, tmp_path):
    path = tmp_path / "proxy.log"
    program = start_program("--log-file", str(path))
    program.post(CHAT)
    assert program.stop() == (0, "")
    assert " 200 " in path.read_text() and "api=chat" in path.read_text()


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_when_nothing_runs(start_program, number):
    """At once, though clients keep idle connections open."""
    program = start_program("--drain-seconds", "20")
    idle = [program.connect() for _ in range(3)]
    idle[0].sendall(HEALTH)
    read_until(idle[0], b"}")
    code, log = program.stop(number)
    assert code == 0 and "Traceback" not in log and "never retrieved" not in log
    for sock in idle:
        assert read_all(sock) == b""
        sock.close()


@pytest.mark.parametrize("streamed", [True, False])
def test_stop_finishes_what_runs(start_program, upstream, streamed):
    """New connections are refused meanwhile; the running answer comes to its right end."""
    go_on = threading.Event()

    def slow(sock, request):
        sock.sendall(CHUNKED_HEAD + chunked(TEXT))
        go_on.wait(10)
        sock.sendall(chunked(text_answer(" and half")) + b"0\r\n\r\n")
    upstream.default = slow
    program = start_program()
    sock = program.send_post(CHAT, stream=streamed)
    wait_until(lambda: upstream.requests)
    program.process.send_signal(signal.SIGTERM)
    wait_until(lambda: refused(program.port))
    go_on.set()
    answer = parse_answers(read_all(sock))[0]
    assert answer.status == 200 and b" and half" in answer.body
    assert answer.body.endswith(b"data: [DONE]\n\n") is streamed
    code, log = program.wait()
    assert code == 0 and "Traceback" not in log and " 200 " in log
    sock.close()


def test_a_connection_ends_with_its_last_answer(start_program, upstream):
    """A keep-alive client is told to close, and its next request is not taken."""
    go_on = threading.Event()

    def slow(sock, request):
        go_on.wait(10)
        stream(text_answer("one"))(sock, request)
    upstream.default = slow
    program = start_program()
    with program.send_post(CHAT) as sock:
        wait_until(lambda: upstream.requests)
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refused(program.port))
        sock.sendall(HEALTH)
        go_on.set()
        assert len(parse_answers(read_all(sock))) == 1
    assert program.wait()[0] == 0


def test_a_second_signal_ends_at_once(start_program, upstream):
    upstream.default = stall(CHUNKED_HEAD + chunked(TEXT))
    program = start_program("--drain-seconds", "600")
    with program.send_post(CHAT, stream=True) as sock:
        read_until(sock, b"Half")
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refused(program.port))
        assert program.process.poll() is None
        code, log = program.stop(signal.SIGINT)
    assert code == 0 and "Traceback" not in log and "never retrieved" not in log
    wait_until(lambda: not upstream.open)


DRAINED = [("in the middle", CHUNKED_HEAD + chunked(TEXT), 15.0, True),
           ("before the first event", CHUNKED_HEAD, 15.0, True),
           ("before the first event, plain", CHUNKED_HEAD, 15.0, False),
           ("before the head", b"", 15.0, True), ("before the head, plain", b"", 15.0, False),
           ("before the head, after a comment", b"", 0.05, True),
           ("before the first event, after a comment", CHUNKED_HEAD, 0.05, True)]


@pytest.mark.parametrize("path, sent, silence, streamed", [
    ((CHAT, MESSAGES)[number % 2],) + row[1:] for number, row in enumerate(DRAINED)],
    ids=[row[0] for row in DRAINED])
def test_the_drain_deadline(make_proxy, upstream, path, sent, silence, streamed):
    """Whoever is still waiting gets an error: as a status, or as the last event of its stream."""
    upstream.default = stall(sent)
    proxy = make_proxy(drainSeconds=0.05, useProviderModels=False,
                       limits=FAST._replace(silence=silence, sweep=0.02))
    with proxy.send_post(path, stream=streamed) as sock:
        wait_until(lambda: upstream.requests)
        data = b""
        if silence < 1:
            data = read_until(sock, b"waiting")
        elif b"Half" in sent:
            data = read_until(sock, b"Half")
        proxy.close(hurry=False)
        data += read_all(sock)
    assert data, "the connection was closed without a word"
    answer = parse_answers(data)[0]
    if b"Half" in sent or silence < 1:
        assert answer.status == 200
        error = answer.frames[-1]["error"]
        assert b"[DONE]" not in answer.body and b"message_stop" not in answer.body
    else:
        assert answer.status == 503 and int(answer.fields["retry-after"]) >= 1
        error = answer.json["error"]
    assert error["type"] == ("server_error" if path == CHAT else "overloaded_error")
    assert "shutting down" in error["message"]
    assert len(upstream.requests) == 1


def test_the_drain_deadline_between_attempts(make_proxy, upstream):
    """Nothing new is tried once the proxy is stopping; the last failure is told."""
    upstream.default = status(503, {"error": {"message": "try later"}})
    proxy = make_proxy(drainSeconds=0.1, useProviderModels=False,
                       limits=FAST._replace(backoff=(30.0,), sweep=0.02))
    with proxy.send_post(CHAT) as sock:
        wait_until(lambda: "retried: " in proxy.log.getvalue())
        proxy.close(hurry=False)
        data = read_all(sock)
    assert data, "the connection was closed without a word"
    assert parse_answers(data)[0].status == 503
    assert len(upstream.requests) == 1


def test_draining_is_told(make_proxy, upstream):
    """A failure while draining is not tried again."""
    begun = threading.Event()

    def fail_late(sock, request):
        begun.set()
        time.sleep(0.15)
        status(503, b"")(sock, request)
    upstream.default = fail_late
    proxy = make_proxy(drainSeconds=5, useProviderModels=False)
    with proxy.send_post(CHAT) as sock:
        begun.wait(5)
        proxy.close(hurry=False)
        assert parse_answers(read_all(sock))[0].status == 503
    assert len(upstream.requests) == 1


# Versions of the vendor's client.

FAKE_NPM = "#!/bin/sh\necho \"$@\" >>\"%s\"\n%s\n"


def with_npm(tmp_path, script):
    """A PATH on which npm is this."""
    npm, log = tmp_path / "npm", tmp_path / "npm-arguments"
    npm.write_text(FAKE_NPM % (log, script))
    npm.chmod(0o755)
    return {"PATH": "%s:/usr/bin:/bin" % tmp_path}, log


def version_sent(proxy, upstream):
    assert proxy.post(CHAT).status == 200
    return upstream.requests[-1].field("x-command-code-version")


def test_cli_version_auto(start_program, upstream, tmp_path):
    environment, log = with_npm(tmp_path, "echo 1.99.7")
    program = start_program("--cli-version", "auto", environment=environment)
    wait_until(lambda: version_sent(program, upstream) == "1.99.7")
    assert log.read_text().split() == ["view", "command-code", "version"]
    assert program.stop()[0] == 0


@pytest.mark.parametrize("script", ["exit 1", "echo nonsense", "echo '1.9.9\r\nx-evil: 1'",
                                    "echo 1.2.3; echo x", "kill -9 $$", None])
def test_cli_version_auto_falls_back(make_proxy, upstream, tmp_path, monkeypatch, script):
    """Also where there is no npm at all."""
    monkeypatch.setenv("PATH", with_npm(tmp_path, script)[0]["PATH"] if script else str(tmp_path))
    proxy = make_proxy(cliVersion="auto")
    assert version_sent(proxy, upstream) == ccproxy.DEFAULT_CLI_VERSION
    wait_until(lambda: "npm could not tell" in proxy.log.getvalue())
    assert version_sent(proxy, upstream) == ccproxy.DEFAULT_CLI_VERSION


def test_a_hanging_npm_holds_nothing_up(start_program, upstream, tmp_path):
    """Neither requests nor the end of the program."""
    environment, log = with_npm(tmp_path, "exec sleep 30")
    program = start_program("--cli-version", "auto", environment=environment)
    wait_until(log.exists)
    assert version_sent(program, upstream) == ccproxy.DEFAULT_CLI_VERSION
    code, words = program.stop()
    assert code == 0
    assert "Traceback" not in words and "never retrieved" not in words and "Exception" not in words


def test_a_pinned_version_asks_nobody(make_proxy, upstream, tmp_path, monkeypatch):
    environment, log = with_npm(tmp_path, "echo 1.99.7")
    monkeypatch.setenv("PATH", environment["PATH"])
    proxy = make_proxy(cliVersion="1.65.0")
    assert version_sent(proxy, upstream) == "1.65.0"
    time.sleep(0.05)
    assert not log.exists()


# Idle and hostile connections.


def test_connections_that_come_and_go(make_proxy):
    """Port scanners, half requests, resets: nothing stays and nothing is said above debug."""
    proxy = make_proxy()
    for data in (b"", b"\r\n", b"GET", b"GET / HTTP/1.1\r\nhost: a\r\n", HEALTH * 3):
        for rude in (False, True):
            sock = proxy.connect()
            sock.sendall(data)
            if rude:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
    wait_until(lambda: not proxy.app.clients and not proxy.app.wires)
    assert proxy.request("GET", "/health").status == 200
    assert "ERROR" not in proxy.log.getvalue() and "WARNING" not in proxy.log.getvalue()


def test_keep_alive_of_http_client(proxy):
    """The standard library's own client on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    for path, expected in ((CHAT, 200), (MESSAGES, 200), ("/nothing", 404), (CHAT, 200)):
        connection.request("POST", path, json.dumps({
            "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}).encode(),
            {"authorization": "Bearer " + KEY})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == expected
    connection.close()


# What a request leaves behind.

@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/responses"])
@pytest.mark.parametrize("streaming", [True, False])
def test_nothing_of_a_request_waits_for_the_garbage_collector(proxy, upstream, path, streaming):
    # Memory that comes back at once is used again while it is warm.
    upstream.default = stream(text_answer("Hi"))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            proxy.post(path, stream=streaming)
        proxy.wait_quiet()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = {type(one).__name__ for one in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left & {"Exchange", "Relay", "Answer", "Prompt", "Job", "Wire", "Channel"}
