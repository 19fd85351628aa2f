"""LIVE EVENTS: /admin/state and /admin/events."""
from __future__ import annotations

import contextlib
import json
import socket

import pytest
from fake_upstream import ndjson, stream, text_answer
from harness import (CHAT, FAST, KEY, UPSTREAM_API, ccproxy, post_bytes, read_all, read_until,
                     wait_until)

STATE, EVENTS = "/admin/state", "/admin/events"
QUICK = FAST._replace(news=0.03)
LIVE = {"id", "at", "api", "client", "asked", "model", "key", "stream", "seconds", "phase",
        "output_chars"}
MINUTE = {"at", "requests", "errors", "input", "output", "cached", "first_p50", "first_p95"}
CHANGING = {"version", "status", "upstream", "uptime_seconds", "open_streams", "in_flight",
            "clients", "admin_key", "operator_keys", "live", "alerts"}


def head_of(path, method="GET", minor=1, **fields):
    rows = {"host": "127.0.0.1", **{name.replace("_", "-"): value
                                    for name, value in fields.items()}}
    return ("%s %s HTTP/1.%d\r\n%s\r\n\r\n" % (method, path, minor, "\r\n".join(
        "%s: %s" % pair for pair in rows.items() if pair[1] is not None))).encode()


class Reader:
    """Reads the events of one stream as they come."""

    def __init__(self, proxy, **fields):
        self.sock = proxy.connect()
        self.sock.sendall(head_of(EVENTS, **fields))
        self.head = b""
        while not self.head.endswith(b"\r\n\r\n"):
            self.head += self.sock.recv(1)
        self.data, self.events, self.comments, self.over = b"", [], 0, False

    def fill(self):
        """Read one chunk more."""
        while b"\r\n" not in self.data:
            self.more()
        number, _, self.data = self.data.partition(b"\r\n")
        size = int(number, 16)
        while len(self.data) < size + 2:
            self.more()
        content, self.data = self.data[:size], self.data[size + 2:]
        self.over = not size
        for frame in content.decode().split("\n\n")[:-1]:
            if frame.startswith(":"):
                self.comments += 1
                continue
            name, data = frame.split("\n")
            self.events.append((name[len("event: "):], json.loads(data[len("data: "):])))

    def more(self):
        piece = self.sock.recv(65536)
        assert piece, "closed"
        self.data += piece

    def until(self, condition):
        """The first event from here on for which the condition holds: (name, data)."""
        while True:
            while self.events:
                event = self.events.pop(0)
                if condition(*event):
                    return event
            assert not self.over, "the stream ended"
            self.fill()

    def state(self, condition=lambda state: True):
        return self.until(lambda name, data: name == "state" and condition(data))[1]

    def record(self):
        return self.until(lambda name, data: name == "request")[1]


@pytest.fixture
def follow():
    with contextlib.ExitStack() as stack:
        def make(proxy, **fields):
            reader = Reader(proxy, **fields)
            stack.callback(reader.sock.close)
            return reader
        yield make


@pytest.fixture
def quick(make_proxy):
    return make_proxy(limits=QUICK)


# What is told.

def test_events_begin_with_the_state_and_tell_each_request(quick, follow):
    reader = follow(quick)
    assert b"content-type: text/event-stream" in reader.head
    assert set(reader.state()) == CHANGING | {"minute"}
    quick.post(CHAT, model="kimi")
    record = reader.record()
    assert (record["asked"], record["status"]) == ("kimi", 200)
    state = reader.state(lambda state: state["minute"]["requests"])
    assert set(state["minute"]) == MINUTE



THINK = ndjson({"type": "start"}, {"type": "reasoning-start", "id": "r"},
               {"type": "reasoning-delta", "id": "r", "text": "hm"})
SAY = ndjson({"type": "reasoning-end", "id": "r"}, {"type": "text-start", "id": "0"},
             {"type": "text-delta", "id": "0", "text": "Hello"})
END = ndjson({"type": "text-end", "id": "0"}, {"type": "finish", "finishReason": "stop",
                                               "totalUsage": {"inputTokens": 7, "outputTokens": 3}})


class Stepped:
    """An upstream's answer that goes on step by step."""

    def __init__(self):
        self.sock = None

    def __call__(self, sock, request):
        self.sock = sock
        self.gate = socket.socketpair()
        self.gate[0].recv(1)        # until `finish`

    def begin(self):
        wait_until(lambda: self.sock is not None)
        self.sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                          b"transfer-encoding: chunked\r\n\r\n")

    def say(self, data):
        self.sock.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def finish(self):
        self.sock.sendall(b"0\r\n\r\n")
        self.gate[1].send(b"x")


@pytest.mark.skipif(bool(UPSTREAM_API), reason="says it in the words of alpha")
@pytest.mark.parametrize("streaming", [True, False])
def test_a_running_request_is_seen_in_each_phase(quick, upstream, follow, streaming):
    step = upstream.default = Stepped()
    reader = follow(quick)
    data = post_bytes(CHAT, {"model": "kimi", "stream": streaming, "messages": [
        {"role": "user", "content": "hi"}]}, {"user-agent": "curl/8"})

    def live(phase, chars):
        return reader.state(lambda state: state["live"] and (
            state["live"][0]["phase"], state["live"][0]["output_chars"]) == (phase, chars))

    with quick.connect() as sock:
        sock.sendall(data[:-5])
        number = live("reading", 0)["live"][0]["id"]
        sock.sendall(data[-5:])
        state = live("waiting", 0)
        entry = state["live"][0]
        assert set(entry) == LIVE and state["in_flight"] == state["open_streams"] == 1
        assert (entry["id"], entry["api"], entry["client"], entry["asked"], entry["model"]) == (
            number, "chat", "curl", "kimi", "moonshotai/Kimi-K3")
        assert (entry["key"], entry["stream"]) == (ccproxy.key_name(KEY), streaming)
        step.begin()
        step.say(THINK)
        live("thinking", 2)
        step.say(SAY)
        live("answering", 7)
        step.say(END)
        step.finish()
        assert reader.record()["output"] == 3
        assert reader.state(lambda state: not state["live"])["in_flight"] == 0


def test_silence_is_filled_with_comments(make_proxy, follow):
    reader = follow(make_proxy(limits=QUICK._replace(silence=0.1)))
    while reader.comments < 2:
        reader.fill()
    assert [name for name, _ in reader.events][:1] == ["state"]


# Bounds.

def test_one_task_looks_only_while_there_are_followers(quick, follow):
    before = len(quick.app.tasks)
    first, second = follow(quick), follow(quick)
    first.state(), second.state()
    assert len(quick.app.followers) == 2 and not quick.app.watching.done()
    first.sock.close()
    wait_until(lambda: len(quick.app.followers) == 1)
    assert not quick.app.watching.done()
    second.sock.close()
    wait_until(lambda: not quick.app.followers and len(quick.app.tasks) == before)
    third = follow(quick)
    assert third.state() and not quick.app.watching.done()


def test_followers_are_bounded_and_one_who_leaves_makes_room(make_proxy, follow):
    proxy = make_proxy(limits=QUICK._replace(followers=2))
    readers = [follow(proxy), follow(proxy)]
    refused = proxy.request("GET", EVENTS, key=None)
    assert refused.status == 503 and refused.fields["retry-after"]
    readers[0].sock.close()
    wait_until(lambda: len(proxy.app.followers) == 1)
    assert follow(proxy).state()


def test_followers_count_as_no_requests(make_proxy, follow):
    proxy = make_proxy(limits=QUICK, maxTotalInFlight=1)
    readers = [follow(proxy) for _ in range(3)]
    assert proxy.request("GET", "/health", key=None).json["open_streams"] == 0
    assert proxy.post(CHAT).status == 200
    assert all(reader.record()["status"] == 200 for reader in readers)
    assert readers[0].state()["in_flight"] == 0


def test_a_slow_reader_loses_the_oldest_and_is_told():
    follower = ccproxy.Follower(None, True)
    app = ccproxy.new_app(ccproxy.read_config({}, {}, {}, "")[0], FAST, None)

    class Wire:
        def wake(self):
            pass

    follower.wire = Wire()
    app.followers.add(follower)
    record = ccproxy.Record(*[0] * len(ccproxy.Record._fields))
    for number in range(ccproxy.MAX_UNREAD_EVENTS + 7):
        ccproxy.tell_record(app, record._replace(retries=number))
    frames = ccproxy.take_frames(follower).split(b"\n\n")[:-1]
    assert frames[0] == b'event: lost\ndata: {"count":7}'
    assert len(frames) == 1 + ccproxy.MAX_UNREAD_EVENTS and b'"retries":7,' in frames[1]
    assert ccproxy.take_frames(follower) == b""


def test_one_who_reads_nothing_is_dropped_and_slows_nobody(make_proxy, follow):
    proxy = make_proxy(limits=QUICK._replace(write_stalled=1.5))
    with proxy.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(head_of(EVENTS))
        wait_until(lambda: proxy.app.followers)
        reader = follow(proxy)
        record = ccproxy.Record(*[0] * len(ccproxy.Record._fields))._replace(notes="x" * 200_000)

        def flood():
            for _ in range(30):
                ccproxy.tell_record(proxy.app, record)

        for _ in range(2):
            proxy.loop.call_soon_threadsafe(flood)
            assert all(reader.record()["notes"] for _ in range(30))     # else it is stalled too
        wait_until(lambda: len(proxy.app.followers) == 1, 10)
        assert proxy.post(CHAT, model="kimi").status == 200
        assert reader.until(lambda name, data: data.get("asked") == "kimi")


@pytest.mark.parametrize("minor", [0, 1])
def test_head_ends_at_once(quick, minor):
    data = quick.raw(head_of(EVENTS, "HEAD", minor, connection="close"))
    assert data.startswith(b"HTTP/1.1 200") and data.endswith(b"\r\n\r\n")
    assert b"text/event-stream" in data and not quick.app.followers


def test_http_1_0_gets_events_without_chunks(quick):
    with quick.connect() as sock:
        sock.sendall(head_of(EVENTS, minor=0))
        data = read_until(sock, b"event: state")
    assert b"chunked" not in data and b"connection: close" in data


# The end.

def test_a_stop_does_not_wait_for_followers(make_proxy):
    proxy = make_proxy(limits=QUICK, drainSeconds=600)
    reader = Reader(proxy)
    reader.state()
    proxy.close(hurry=False)
    assert reader.state(lambda state: state["status"] == "draining")
    while not reader.over:
        reader.fill()
    assert read_all(reader.sock) == b"" and not proxy.app.followers
    reader.sock.close()


def test_a_stop_does_not_wait_for_one_who_reads_nothing(make_proxy):
    proxy = make_proxy(limits=QUICK, drainSeconds=600)
    record = ccproxy.Record(*[0] * len(ccproxy.Record._fields))._replace(notes="x" * 200_000)
    with proxy.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(head_of(EVENTS))
        wait_until(lambda: proxy.app.followers)
        for _ in range(100):
            proxy.loop.call_soon_threadsafe(ccproxy.tell_record, proxy.app, record)
        wait_until(lambda: [one for one in proxy.app.followers if one.wire.blocked_since])
        proxy.close(hurry=False)


def test_running_answers_still_end_in_order_beside_followers(make_proxy, upstream, follow):
    proxy = make_proxy(limits=QUICK, drainSeconds=30)
    upstream.default = stream(text_answer("a", "b"), cut=20, pause=0.02)
    reader = follow(proxy)
    with proxy.send_post(CHAT, stream=True) as sock:
        reader.state(lambda state: state["live"])
        proxy.close(hurry=False)
        assert b"[DONE]" in read_all(sock)


# Who may read.

ADMIN, CLIENT = "an-admins-own-key", "a-clients-own-key"
ROWS = [        # (adminKey, clientKey, fields, peer, status)
    ("", "", {}, "", 200),
    ("", "", {"host": "localhost:3000"}, "", 200), ("", "", {"host": "[::1]:80"}, "", 200),
    ("", "", {"host": "evil.example"}, "", 403),
    ("", "", {"origin": "http://127.0.0.1"}, "", 200),
    ("", "", {"origin": "https://evil.example"}, "", 403),
    ("", "", {"origin": "http://127.0.0.1:8080"}, "", 403),
    ("", "", {"origin": "null"}, "", 403),
    ("", "", {"sec_fetch_site": "same-origin"}, "", 200),
    ("", "", {"sec_fetch_site": "none"}, "", 200),
    ("", "", {"sec_fetch_site": "cross-site"}, "", 403),
    ("", "", {"sec_fetch_site": "same-site"}, "", 403),
    ("", "", {"x_forwarded_for": "10.0.0.1"}, "", 403),
    ("", "", {"forwarded": "for=10.0.0.1"}, "", 403),
    ("", "", {}, "10.0.0.1", 403),
    ("", "", {"authorization": "Bearer " + KEY}, "10.0.0.1", 403),
    (ADMIN, "", {}, "", 200),
    (ADMIN, "", {"host": "evil.example"}, "", 401),
    (ADMIN, "", {}, "10.0.0.1", 401),
    (ADMIN, "", {"authorization": "Bearer wrong"}, "10.0.0.1", 401),
    (ADMIN, "", {"authorization": "Bearer " + ADMIN}, "10.0.0.1", 200),
    (ADMIN, "", {"x_api_key": ADMIN}, "10.0.0.1", 200),
    (ADMIN, "", {"authorization": "Bearer " + ADMIN, "origin": "https://evil.example"}, "", 200),
    (ADMIN, CLIENT, {"authorization": "Bearer " + CLIENT}, "10.0.0.1", 401),
    ("", CLIENT, {"authorization": "Bearer " + CLIENT}, "10.0.0.1", 200),
    ("", CLIENT, {}, "10.0.0.1", 401)]


@pytest.mark.parametrize("path", [STATE, EVENTS])
@pytest.mark.parametrize("admin_key,client_key,fields,peer,status", ROWS)
def test_who_may_read(make_proxy, monkeypatch, path, admin_key, client_key, fields, peer, status):
    if peer:
        monkeypatch.setattr(ccproxy.Wire, "peer_address", lambda wire: peer)
    proxy = make_proxy(adminKey=admin_key, clientKey=client_key)
    data = proxy.raw(head_of(path, "HEAD" if path == EVENTS else "GET", connection="close",
                             **fields))
    assert int(data.split(b" ")[1]) == status
    assert ADMIN.encode() not in data and CLIENT.encode() not in data
