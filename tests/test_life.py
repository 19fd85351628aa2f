"""A life without leaks: who leaves or does not read, what signals, clocks, full disks and scarce
descriptors do, and a small soak.  tests/soak.py is the large one."""
from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import re
import signal
import socket
import struct
import threading
import time

import ccproxy
import pytest
import soak
from fake_upstream import CHUNKED_HEAD, api_of, chunked, ndjson, say_in, stall, status, text_answer
from harness import (CHAT, FAST, MESSAGES, UPSTREAM_API, FakeClock, full_listener, parse_answers,
                     post_bytes, read_all, read_until, wait_until)

APIS = {"chat": CHAT, "messages": MESSAGES, "responses": "/v1/responses"}
WORD = ndjson({"type": "text-delta", "id": "0", "text": "word "})
LINE = ndjson({"type": "text-delta", "id": "0", "text": "x" * 4000})
RST = struct.pack("ii", 1, 0)
OWN_TASKS = 2           # of a proxy that does nothing: the sweep, and the watch for alerts

pytest.importorskip("resource", reason="descriptor limits are those of Unix")
for_each_api = pytest.mark.parametrize("api", APIS)
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")


def body_for(api, streamed, words="hi"):
    if api == "responses":
        return {"input": words, "stream": streamed}
    return {"messages": [{"role": "user", "content": words}], "max_tokens": 1000,
            "stream": streamed}


def send_to(proxy, api, streamed=True, receive=0):
    """A connection on which a request was sent; `receive` bytes of buffer, if it is to be slow."""
    sock = socket.socket()
    if receive:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", proxy.port))
    sock.sendall(post_bytes(APIS[api], body_for(api, streamed)))
    return sock


def leave(sock, rude):
    if rude:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
    sock.close()


# What an upstream does for ever.


def flow(sock, request):
    sock.sendall(CHUNKED_HEAD)
    while True:
        sock.sendall(chunked(WORD))
        time.sleep(0.01)


class Flood:
    """Sends as fast as it can and counts the bytes that went."""

    def __init__(self):
        self.sent = 0

    def __call__(self, sock, request):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sock.sendall(CHUNKED_HEAD)
        block = chunked(LINE) * 16
        while True:
            sock.sendall(block)
            self.sent += len(block)

    def wait_stuck(self):
        """Wait until nothing can be sent any more."""
        seen, since, deadline = -1, time.monotonic(), time.monotonic() + 20
        while time.monotonic() - since < 0.2 or not self.sent:
            assert time.monotonic() < deadline, "the upstream is never held up"
            if self.sent != seen:
                seen, since = self.sent, time.monotonic()
            time.sleep(0.01)


# A client that leaves.


@for_each_api
@pytest.mark.parametrize("streamed", [True, False], ids=["streaming", "plain"])
def test_a_client_that_leaves_before_the_upstream_is_connected(make_proxy, api, streamed):
    """The upstream's backlog is full: no SYN is answered."""
    with full_listener() as address:
        proxy = make_proxy(apiBase="http://%s:%d" % address, useProviderModels=False)
        sock = send_to(proxy, api, streamed)
        wait_until(lambda: proxy.app.relays)
        time.sleep(0.01)
        leave(sock, streamed)
        proxy.wait_quiet(1.0)
        wait_until(lambda: not proxy.app.wires and len(proxy.app.tasks) == OWN_TASKS, 1.0)
        assert "WARNING" not in proxy.log.getvalue() and "ERROR" not in proxy.log.getvalue()
        assert "the client left" in proxy.log.getvalue()


def test_a_client_that_leaves_just_when_the_upstream_is_connected(make_proxy, upstream,
                                                                  monkeypatch):
    """Its FIN and the new connection come in the same turn of the loop: before Python 3.12
    asyncio.wait_for takes that for a success, and forgets that it was cancelled."""
    connect = ccproxy.connect_wire

    async def connect_and_lose(app, backend, wire):
        await connect(app, backend, wire)
        next(iter(app.exchanges)).wire.end()
    monkeypatch.setattr(ccproxy, "connect_wire", connect_and_lose)
    upstream.default = stall()
    proxy = make_proxy(useProviderModels=False)
    sock = send_to(proxy, "chat")
    try:
        wait_until(lambda: "the client left" in proxy.log.getvalue(), 2.0)
        wait_until(lambda: not upstream.open and not proxy.app.relays, 2.0)
    finally:
        sock.close()


STAGES = {"before the head": stall(), "before the first event": stall(CHUNKED_HEAD),
          "in mid-stream": flow, "while blocked": None}


@for_each_api
@pytest.mark.parametrize("stage, streamed", [
    (stage, streamed) for stage in STAGES for streamed in (True, False)
    if streamed or stage != "while blocked"])
def test_a_client_that_leaves(make_proxy, upstream, api, stage, streamed):
    """Its upstream call is closed within a second, and that is no news to anybody."""
    upstream.default = STAGES[stage] or Flood()
    proxy = make_proxy(useProviderModels=False)
    for rude in (False, True):
        sock = send_to(proxy, api, streamed, 0 if STAGES[stage] else 16384)
        wait_until(lambda: upstream.open == 1 and any(one.call or "head" in stage
                                                      for one in proxy.app.relays))
        if stage == "while blocked":
            wait_until(lambda: all(one.client.blocked_since for one in proxy.app.relays))
        elif stage == "in mid-stream" and streamed:
            read_until(sock, b"word")
        leave(sock, rude)
        wait_until(lambda: not upstream.open, 1.0)      # that is promised, on any machine
        proxy.wait_quiet()
    wait_until(lambda: not proxy.app.wires and len(proxy.app.tasks) == OWN_TASKS)
    assert proxy.log.getvalue().count("the client left") >= 2
    assert "WARNING" not in proxy.log.getvalue() and "ERROR" not in proxy.log.getvalue()


# A client that does not read.


def held_bytes(app):
    """What stands in memory for all connections."""
    return sum(len(wire.buffer) + wire.transport.get_write_buffer_size()
               for wire in list(app.wires))


def test_clients_that_do_not_read(make_proxy, upstream):
    """Upstreams wait, memory is bounded, others go on; and they are dropped in the end."""
    floods = [Flood() for _ in range(6)]
    upstream.scripts = list(floods)
    proxy = make_proxy(useProviderModels=False, upstreamIdleSeconds=0.2,
                       limits=FAST._replace(write_stalled=1.0))
    socks = []
    for api in list(APIS) * 2:
        socks.append(send_to(proxy, api, receive=16384))
        wait_until(lambda: len(upstream.requests) == len(socks))
    wait_until(lambda: all(relay.client.blocked_since and relay.call.wire.transport.paused
                           for relay in list(proxy.app.relays)))
    assert len(proxy.app.relays) == 6 and held_bytes(proxy.app) < 6 * 512 * 1024
    for api, path in APIS.items():
        assert proxy.request("POST", path, body_for(api, True)).status == 200
    wait_until(lambda: not upstream.open - len(proxy.app.home.pool.idle), 10)
    proxy.wait_quiet()
    assert not proxy.app.clients
    assert "WARNING" not in proxy.log.getvalue() and "ERROR" not in proxy.log.getvalue()
    for sock in socks:
        sock.close()


# A small soak, at every log level.

soaks = pytest.mark.skipif(bool(UPSTREAM_API), reason="its own upstream speaks one API only")

SMALL = soak.Plan(streams=60, requests=300, rounds=1, keys=40, warm=40)
TINY = soak.Plan(streams=0, requests=30, rounds=1, keys=20, warm=0)


@functools.lru_cache(maxsize=None)
def soaked():
    """{name: a soak}, all at once: the programs have processes of their own."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = {"small": pool.submit(soak.soak, SMALL)}
        found.update({level: pool.submit(soak.soak, TINY, level, True)
                      for level in ccproxy.LOG_LEVELS})
        return {name: one.result() for name, one in found.items()}


@soaks
@needs_proc
def test_a_small_soak():
    """Every answer right, every key its caller's, nothing left behind."""
    found = soaked()["small"]
    assert found.faults() == []
    assert found.full["relays"] == 60 and found.full["descriptors"] >= 120
    assert found.seen["keys"] == 40 and found.seen["requests"] > 200
    assert set(found.acts) == {act.__name__ for act in soak.ACTS}


@soaks
@needs_proc
@pytest.mark.parametrize("level", ccproxy.LOG_LEVELS)
def test_nothing_is_left_unretrieved(level):
    """With asyncio's own debug mode on, which complains of more."""
    found = soaked()[level]
    assert found.faults() == []
    log = found.log()
    assert ("DEBUG" in log) is (level == "debug")
    assert (" INFO " in log) is (level in ("debug", "info"))
    assert "exception was never" not in log and "Exception in callback" not in log


def test_the_soak_notices():
    """Answers that are mixed up, of a wrong status, cut, or without their end."""
    call = soak.Call("chat", True, "m1k1", "user_soak1", "plain")
    good = (b'data: {"choices":[{"delta":{"content":"echo m1k1 end"}}]}\n\n'
            b"data: [DONE]\n\n")
    soak.check(call, 200, good)
    for state, body in ((200, good.replace(b"m1k1", b"m2k1")), (502, good),
                        (200, good.replace(b"[DONE]", b""))):
        with pytest.raises(soak.Wrong):
            soak.check(call, state, body)
    up = soak.Upstream.__new__(soak.Upstream)
    up.requests, up.keys, up.tries, up.wrong = 0, {}, {}, []
    up.keys, up.tries = soak.collections.Counter(), soak.collections.Counter()
    up.note("POST / HTTP/1.1\r\nauthorization: Bearer user_soak1\r\n", b"MARK-m1k1-plain-")
    assert up.wrong == []
    up.note("POST / HTTP/1.1\r\nauthorization: Bearer user_soak2\r\n", b"MARK-m1k1-plain-")
    assert len(up.wrong) == 1


# Descriptors.

def few_descriptors(count):
    return "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (%d, %d))" % (count, count)


def connect_many(program, count):
    socks = [program.connect() for _ in range(count)]
    for sock in socks:
        sock.settimeout(3)
    return socks


def refusals(socks):
    """The answers of those that are refused; the others wait for a request."""
    answers, patience = [], 3.0
    for sock in socks:
        sock.settimeout(patience)
        data = read_all(sock)
        answers += parse_answers(data) if data else []
        patience = 3.0 if data else 0.01
    return answers


@pytest.mark.parametrize("limit, served", [(96, 16), (40, 1)])
def test_few_descriptors(start_program, limit, served):
    """More connections than descriptors: those beyond are told so, the others are served."""
    program = start_program("--log-level", "debug", before=few_descriptors(limit))
    socks = []
    for _ in range(served + 10):
        socks.append(program.connect())
        time.sleep(0.002)
    answers = refusals(socks[served:])
    assert len(answers) == 10
    assert {answer.status for answer in answers} == {503}
    assert all(int(answer.fields["retry-after"]) >= 1 for answer in answers)
    socks[0].sendall(post_bytes(CHAT, body_for("chat", True)))
    assert b"[DONE]" in read_until(socks[0], b"\r\n0\r\n\r\n")
    for sock in socks:
        sock.close()
    wait_until(lambda: program.post(CHAT).status == 200)
    code, log = program.stop()
    assert code == 0 and "Traceback" not in log and "ERROR" not in log


def test_a_crowd_at_once(start_program):
    """All stand at the door before the first is let in: asyncio accepts them in one go."""
    program = start_program(before=few_descriptors(96))
    program.process.send_signal(signal.SIGSTOP)
    socks = connect_many(program, 200)
    program.process.send_signal(signal.SIGCONT)
    answers = refusals(socks[16:])
    for sock in socks:
        sock.close()
    wait_until(lambda: program.post(CHAT).status == 200)
    code, log = program.stop()
    assert code == 0 and "Traceback" not in log[:5000] and "ERROR" not in log[:5000]
    assert [answer.status for answer in answers] == [503] * 184


# The log.


def test_a_log_file_that_becomes_full(start_program, tmp_path):
    """What does not fit is lost, which is said once; requests are served."""
    path = tmp_path / "proxy.log"
    program = start_program("--log-file", str(path), before=(
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"))
    assert [program.post(CHAT).status for _ in range(12)] == [200] * 12
    code, words = program.stop()
    assert code == 0 and 0 < path.stat().st_size <= 1000
    assert "api=chat" in path.read_text()
    assert len(words.splitlines()) == 1 and "lines are lost" in words


CLOSED_PIPE = "import os; r, w = os.pipe(); os.dup2(w, 2); os.close(r)"


def test_a_log_that_nobody_reads(start_program):
    """Standard error is a pipe whose reader is gone."""
    program = start_program("--log-level", "debug", before=CLOSED_PIPE)
    assert [program.post(CHAT).status for _ in range(3)] == [200] * 3
    assert program.stop()[0] == 0


# A clock that jumps.

CLOCKS = [0.0, -1e9, 1.0, 2e9, 4e9, 1e11]


@for_each_api
def test_a_clock_that_jumps(make_proxy, upstream, monkeypatch, api):
    """While a stream runs: no timer goes off, nothing is asked anew, the stream ends well."""
    clock = FakeClock(monkeypatch)
    events = text_answer(*["part%d " % number for number in range(len(CLOCKS) + 1)])
    go = threading.Semaphore(0)

    def one_part_each(sock, request):
        spoken = api_of(request.line)
        sock.sendall(CHUNKED_HEAD)
        for piece in re.split(rb"(?<=\n)(?=[^\n]*part[1-9])",
                              say_in(spoken, events) if spoken else events):
            sock.sendall(chunked(piece))
            go.acquire(timeout=10)
        sock.sendall(b"0\r\n\r\n")
    upstream.default = one_part_each
    proxy = make_proxy(upstreamIdleSeconds=5, limits=FAST._replace(sweep=0.01))
    idle = proxy.connect()
    sock = send_to(proxy, api)
    for number, now in enumerate(CLOCKS):
        read_until(sock, b"part%d" % number)
        clock.now = now
        time.sleep(0.03)        # a sweep at least
        go.release()
    go.release()
    data = read_until(sock, b"\r\n0\r\n\r\n")
    assert soak.ENDS[api] in data and b"waiting" not in data
    idle.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
    read_until(idle, b"HTTP/1.1 200")
    assert len(upstream.side_requests) == 1
    for one in (idle, sock):
        one.close()


CREATED = {"chat": "created", "responses": "created_at"}


@pytest.mark.parametrize("now", CLOCKS)
def test_answers_at_any_time(make_proxy, upstream, monkeypatch, now):
    """Whatever the clock says is told, and no more; an upstream's date that cannot be is too."""
    FakeClock(monkeypatch).now = now
    proxy = make_proxy()
    for api, path in APIS.items():
        answer = proxy.request("POST", path, body_for(api, False))
        assert answer.status == 200
        if api in CREATED:
            assert answer.json[CREATED[api]] == int(now)
        assert soak.ENDS[api] in proxy.request("POST", path, body_for(api, True)).body
    for date in ("Fri, 20 Nov 2026 10:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 GMT",
                 "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 99 Foo 99999 99:99:99 GMT"):
        upstream.default = status(503, b"", "retry-after: %s\r\n" % date)
        answer = proxy.post(CHAT)
        assert answer.status == 503
        assert 0 <= int(answer.fields.get("retry-after", "0")) <= 86400
    assert proxy.request("GET", "/health").json["uptime_seconds"] >= 0


# Signals.


def is_error_of(api, frame):
    """Whether a frame is the API's own form of the news that the proxy is stopping."""
    if api == "responses":
        error = frame.get("response", {}).get("error") or frame.get("error") or frame
        return frame["type"] in ("response.failed", "error") and \
            "shutting down" in error["message"]
    kind = "server_error" if api == "chat" else "overloaded_error"
    return (api == "chat" or frame["type"] == "error") and frame["error"]["type"] == kind \
        and "shutting down" in frame["error"]["message"]


STOPPED = {"connecting": None, "before the head": stall(), "streaming": flow, "blocked": Flood()}


@contextlib.contextmanager
def running(start_program, upstream, stage, *arguments):
    """(program, {api: connection}), each API's stream at that stage."""
    with full_listener() as address:
        upstream.default = STOPPED[stage]
        if stage == "connecting":
            arguments += ("--api-base", "http://%s:%d" % address)
        program = start_program("--use-provider-models", "false", *arguments)
        socks = {api: send_to(program, api, receive=16384 if stage == "blocked" else 0)
                 for api in APIS}
        wait_until(lambda: program.request("GET", "/health").json["open_streams"] == 3)
        if stage != "connecting":
            wait_until(lambda: len(upstream.requests) == 3)
        if stage == "streaming":
            for sock in socks.values():
                read_until(sock, b"word")
        if stage == "blocked":
            STOPPED[stage].wait_stuck()
        yield program, socks
        for sock in socks.values():
            sock.close()


@pytest.mark.parametrize("stage", STOPPED)
def test_a_signal(start_program, upstream, stage):
    """After the drain every client is told in its own API, and the program is gone with 0."""
    with running(start_program, upstream, stage, "--drain-seconds", "0.1") as (program, socks):
        program.process.send_signal(signal.SIGTERM)
        if stage != "blocked":
            heard = {api: read_all(sock) for api, sock in socks.items()}
        code, log = program.wait()
    assert code == 0 and "Traceback" not in log and "never retrieved" not in log
    wait_until(lambda: not upstream.open)
    for api in APIS if stage != "blocked" else ():
        if stage == "streaming":
            data = CHUNKED_HEAD + heard[api]        # what stood before was read already
            assert is_error_of(api, parse_answers(data)[0].frames[-1])
            assert soak.ENDS[api] not in data
        else:
            answer = parse_answers(heard[api])[0]
            assert answer.status == 503 and int(answer.fields["retry-after"]) >= 1
            assert "shutting down" in answer.json["error"]["message"]


def is_refused(port):
    """Whether nothing listens there any more."""
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionError:         # reset: it was closing just now
        return True
    return False


@pytest.mark.parametrize("stage", ["connecting", "before the head", "blocked"])
def test_a_second_signal(start_program, upstream, stage):
    """The end at once, however long the drain might take."""
    with running(start_program, upstream, stage, "--drain-seconds", "600") as (program, socks):
        program.process.send_signal(signal.SIGINT)
        wait_until(lambda: is_refused(program.port))
        assert program.process.poll() is None
        program.process.send_signal(signal.SIGTERM)
        code, log = program.wait()
    assert code == 0 and "Traceback" not in log and "never retrieved" not in log
    wait_until(lambda: not upstream.open)
