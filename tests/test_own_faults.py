"""Faults of our own in callbacks and periodic tasks: each ends what it befell, at once, with a
traceback in the log, and nothing else."""
from __future__ import annotations

import asyncio
import logging

import pytest
from fake_upstream import (CHUNKED_HEAD, chunked, in_pieces, ndjson, raw, stall, stream,
                           text_answer)
from harness import (CHAT, FAST, KEY, MESSAGES, UPSTREAM_API, Proxy, ccproxy, make_config,
                     parse_answers, read_all, read_until, wait_until)

pytestmark = pytest.mark.skipif(bool(UPSTREAM_API), reason="says it in the words of alpha")
RESPONSES = "/v1/responses"
SECRET = "user_5ecretOf0urs12345678"
BEGUN = ndjson({"type": "start"}, {"type": "text-delta", "id": "0", "text": "Hello"})
BOOM = ndjson({"type": "boom"})


def boom(*given):
    """A fault whose words hold a key."""
    raise KeyError(SECRET)


class Place:
    """A proxy that may log tracebacks, in front of an upstream."""

    def __init__(self, upstream, limits=FAST, **options):
        self.upstream = upstream
        self.proxy = Proxy(limits, apiBase=upstream.base, useProviderModels=False, **options)

    @property
    def log(self):
        return self.proxy.log.getvalue()

    def ask(self, path, streamed, key=KEY):
        """The answer, which comes long before the proxy's own limits (minutes)."""
        members = {"input": "hi", "messages": None} if path == RESPONSES else {}
        return self.proxy.post(path, key=key, stream=streamed, **members)

    def check_good(self):
        """The proxy serves on."""
        self.upstream.default = stream(text_answer("fine"))
        answer = self.ask(CHAT, False)
        assert answer.status == 200 and b"fine" in answer.body

    def check_log(self, count=1):
        """Each fault's traceback, once, without the key in it."""
        wait_until(lambda: self.log.count("internal error: Traceback") >= count)
        assert self.log.count("internal error: Traceback") == count
        assert "in boom" in self.log and "KeyError: 'key:" in self.log


@pytest.fixture
def make_place(upstream):
    made = []

    def make(**options):
        made.append(Place(upstream, **options))
        return made[-1]
    yield make
    for one in made:
        one.proxy.close()
        assert SECRET not in one.log and KEY not in one.log
        assert "never retrieved" not in one.log and "Exception in" not in one.log, one.log


@pytest.fixture
def place(make_place):
    return make_place()


def check_refused(answer):
    assert answer.status == 500 and SECRET not in answer.body.decode()
    assert "Internal error of the proxy (KeyError)" in answer.json["error"]["message"]


def check_broken(path, answer):
    """A stream that ends with an error event and nothing else of an end."""
    assert answer.status == 200 and SECRET not in answer.body.decode()
    *frames, last = answer.frames
    assert b"[DONE]" not in answer.body
    if path == RESPONSES:
        assert last["type"] == "response.failed"
        last = last["response"]
    elif path == MESSAGES:
        assert last["type"] == "error" and frames[-1]["type"] != "message_stop"
    assert "Internal error of the proxy" in last["error"]["message"]


WAYS = [(path, streamed) for path in (CHAT, MESSAGES, RESPONSES) for streamed in (True, False)]
each_way = pytest.mark.parametrize("path,streamed", WAYS)


def check_ended(path, streamed, begun, answer):
    if streamed and begun:
        check_broken(path, answer)
    else:
        check_refused(answer)


# The callbacks of an answer.

OK = b"HTTP/1.1 200 OK\r\n\r\n"
READ = [    # (what the upstream sends, whether text went out before the fault)
    (stream(BOOM), False), (stream(BEGUN + BOOM), False),
    (stall(CHUNKED_HEAD + chunked(BOOM)), False),
    (in_pieces([CHUNKED_HEAD + chunked(BEGUN), chunked(BOOM)], 0.1), True),
    # The last line of a connection that closes, without its end.
    (raw(OK + BOOM[:-1], close=True), False), (raw(OK + BEGUN + BOOM[:-1], close=True), True),
    (in_pieces([OK, BEGUN, BOOM[:-1]], 0.1, close=True), True)]


@each_way
@pytest.mark.parametrize("script,begun", READ, ids=range(len(READ)))
def test_a_reader_that_raises(place, monkeypatch, script, begun, path, streamed):
    monkeypatch.setitem(ccproxy.ALPHA_READERS, "boom", boom)
    place.upstream.default = script
    check_ended(path, streamed, begun, place.ask(path, streamed))
    place.check_log()
    place.check_good()
    place.check_log()


@each_way
@pytest.mark.parametrize("name", ["receive", "end"])
def test_a_callback_that_raises(place, monkeypatch, name, path, streamed):
    """The whole of it, also what came with the head."""
    with monkeypatch.context() as patch:
        patch.setattr(ccproxy.Relay, name, boom)
        place.upstream.default = raw(b"HTTP/1.1 200 OK\r\n\r\n" + BEGUN, close=True, pause=0.1)
        check_ended(path, streamed, name == "end", place.ask(path, streamed))
    place.check_log()
    place.check_good()


def test_a_stuck_client_that_cannot_be_told_of(place, monkeypatch):
    """What the client has not taken yet it still gets, and then the error."""
    with monkeypatch.context() as patch:
        patch.setattr(ccproxy.Relay, "block", boom)
        line = ndjson({"type": "text-delta", "id": "0", "text": "x" * 1000})
        place.upstream.default = stall(CHUNKED_HEAD + chunked(BEGUN) + chunked(line) * 20_000)
        with place.proxy.send_post(CHAT, stream=True) as sock:
            wait_until(lambda: "Traceback" in place.log)
            data = read_until(sock, b"0\r\n\r\n")
    answer, = parse_answers(data)
    check_broken(CHAT, answer)
    place.proxy.wait_quiet()
    assert place.log.count("Traceback") <= 2        # it may come free in between
    place.check_good()


TICK = [    # (what the upstream sends and keeps silent then, whether text was shown)
    (stall(b""), False), (stall(CHUNKED_HEAD), False),
    (stall(CHUNKED_HEAD + chunked(BEGUN)), True)]


@each_way
@pytest.mark.parametrize("script,begun", TICK, ids=["no head", "head", "text"])
def test_a_look_at_the_clock_that_raises(place, monkeypatch, script, begun, path, streamed):
    """Also while no call is there to be ended."""
    with monkeypatch.context() as patch:
        patch.setattr(ccproxy.Relay, "tick", boom)
        place.upstream.default = script
        check_ended(path, streamed, begun, place.ask(path, streamed))
    place.check_log()
    place.check_good()


def test_a_comment_that_cannot_be_made(make_place, monkeypatch):
    """The stream has a head by then, and no call."""
    place, faults = make_place(limits=FAST._replace(silence=0.2)), []

    def comment(text, end):
        if faults.append(text) or len(faults) > 1:
            boom()
        return b": waiting\n\n"
    with monkeypatch.context() as patch:
        patch.setattr(ccproxy, "comment_frame", comment)
        place.upstream.default = stall(b"")
        check_broken(CHAT, place.ask(CHAT, True))
    place.check_log()
    place.check_good()


def test_a_pool_of_keys_is_not_gone_through_for_a_fault_of_ours(place, monkeypatch):
    monkeypatch.setitem(ccproxy.ALPHA_READERS, "boom", boom)
    place.upstream.default = stream(BOOM)
    check_refused(place.ask(CHAT, True, "user_keyOne12345,user_keyTwo12345"))
    assert len(place.upstream.requests) == 1
    place.check_log()


def test_one_answers_fault_leaves_the_others_alone(make_place, monkeypatch):
    """One of two at once, and the sweep goes on: it gives up a silent upstream."""
    place, tick = make_place(upstreamIdleSeconds=1), ccproxy.Relay.tick
    monkeypatch.setattr(ccproxy.Relay, "tick", lambda relay, now: (
        boom if relay.answer.face is ccproxy.MESSAGES else tick)(relay, now))
    place.upstream.default = stall(CHUNKED_HEAD + chunked(BEGUN))
    with place.proxy.send_post(CHAT, stream=True) as chat, \
            place.proxy.send_post(MESSAGES, stream=True) as messages:
        assert b"Internal error of the proxy" in read_until(messages, b"0\r\n\r\n")
        data = read_until(chat, b"0\r\n\r\n")
    assert b"silent for 1 second" in data and b"Internal" not in data
    place.check_log()


# Connections, the sweep, and the stop.

def test_a_wire_whose_deadlines_cannot_be_looked_at(make_place, monkeypatch):
    """It is closed; the others' deadlines hold."""
    place = make_place(limits=FAST._replace(first_request=0.3))
    expire = ccproxy.Wire.expire
    with place.proxy.connect() as bad, place.proxy.connect() as good:
        wait_until(lambda: place.proxy.app.clients == 2)
        address = bad.getsockname()

        def fail_one(wire, now):
            if wire.transport.get_extra_info("peername") == address:
                boom()
            expire(wire, now)
        monkeypatch.setattr(ccproxy.Wire, "expire", fail_one)
        assert read_all(bad) == b"" and read_all(good) == b""
    place.check_log()
    place.check_good()


def test_a_connection_that_cannot_be_accepted(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ccproxy, "accept", boom)
        with place.proxy.connect() as sock:
            assert read_all(sock) == b""
    place.check_log()
    wait_until(lambda: not place.proxy.app.wires)
    place.check_good()


@each_way
def test_a_request_that_raises(place, monkeypatch, path, streamed):
    """In a coroutine, before and behind the first text."""
    monkeypatch.setattr(ccproxy, "repair_prompt", boom)
    check_refused(place.ask(path, streamed))
    place.check_log()


@each_way
def test_a_retry_that_raises(place, monkeypatch, path, streamed):
    monkeypatch.setattr(ccproxy, "may_repeat", boom)
    place.upstream.default = stream(BEGUN + ndjson({"type": "error", "error": "x"}))
    check_ended(path, streamed, True, place.ask(path, streamed))
    place.check_log()


def test_a_stop_ends_all_answers(make_place, monkeypatch):
    """Also where one of them cannot be given up."""
    place, give_up = make_place(drainSeconds=0), ccproxy.Relay.give_up
    monkeypatch.setattr(ccproxy.Relay, "give_up", lambda relay, error: (
        boom if relay.answer.face is ccproxy.MESSAGES else give_up)(relay, error))
    place.upstream.default = stall(CHUNKED_HEAD + chunked(BEGUN))
    with place.proxy.send_post(CHAT, stream=True) as chat, \
            place.proxy.send_post(MESSAGES, stream=True) as messages:
        for sock in (chat, messages):
            read_until(sock, b"Hello")
        place.proxy.loop.call_soon_threadsafe(place.proxy.signal)
        for sock in (chat, messages):
            assert b"shutting down" in read_until(sock, b"0\r\n\r\n")
    place.check_log()


def test_a_listener_that_raises(place, monkeypatch):
    """The request is answered, and the other listeners are told of it."""
    told = []
    place.proxy.app.listeners[:0] = [boom]
    place.proxy.app.listeners.append(told.append)
    place.check_good()
    wait_until(lambda: told)
    place.check_log()


def test_tracebacks_that_asyncio_logs_hold_no_key(tmp_path):
    """Of a task that nobody awaited, say."""
    path, asyncios = tmp_path / "log", logging.getLogger("asyncio")
    before = [(one, one.handlers, one.propagate, one.level)
              for one in (asyncios, logging.getLogger("ccproxy"))]
    try:
        ccproxy.open_log(make_config(logFile=str(path)))
        try:
            boom()
        except KeyError as fault:
            asyncios.error("Task exception was never retrieved", exc_info=fault)
        asyncios.handlers[0].close()
    finally:
        for one, handlers, propagate, level in before:
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
    text = path.read_text()
    assert "in boom" in text and "KeyError: 'key:" in text and SECRET not in text


# `guarded` and periodic tasks.

def test_what_is_guarded(place):
    ended = []

    async def run():
        with ccproxy.guarded(place.proxy.app, ended.append, ValueError):
            await asyncio.sleep(0)
            boom()
        with pytest.raises(ValueError), ccproxy.guarded(place.proxy.app, ended.append, ValueError):
            raise ValueError("passed on")
        with pytest.raises(asyncio.CancelledError), ccproxy.guarded(place.proxy.app, ended.append):
            raise asyncio.CancelledError
        with ccproxy.guarded(place.proxy.app, ended.append):
            return "given"
    assert asyncio.run(run()) == "given"
    fault, = ended
    assert isinstance(fault, KeyError)
    place.check_log()


@pytest.mark.parametrize("lasts, pauses", [(0.0, [1, 2, 4, 8, 8, 8]), (9.0, [1, 1, 1, 1, 1, 1])])
def test_a_periodic_task_runs_again(place, monkeypatch, lasts, pauses):
    """Ever later, up to a bound; soon again where it ran well for long."""
    app, waited, runs = place.proxy.app, [], []
    clock, real, loops = [0.0], asyncio.sleep, []

    async def sleep(seconds):
        if asyncio.get_running_loop() not in loops:
            return await real(seconds)      # the proxy's own loop, in its thread
        waited.append(seconds)

    async def work(given):
        assert given is app
        runs.append(1)
        clock[0] += lasts
        if len(runs) <= len(pauses):
            boom()

    async def run():
        loop = asyncio.get_running_loop()
        loops.append(loop)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "time", lambda: clock[0])
            patch.setattr(asyncio, "sleep", sleep)
            await ccproxy.keep_running(app, work)
    app.limits = app.limits._replace(restart=(1.0, 8.0))
    asyncio.run(run())
    assert waited == pauses and len(runs) == len(pauses) + 1
    place.check_log(len(pauses))


def test_a_second_and_a_minute():
    assert ccproxy.Limits().restart == (1.0, 60.0)


@pytest.mark.parametrize("name, options", [
    ("sweep", {}), ("watch_alerts", {}), ("keep_version_fresh", {"cliVersion": "auto"})])
def test_every_periodic_task_of_a_start_runs_again(upstream, monkeypatch, name, options):
    runs = []

    async def work(app):
        runs.append(1)
        if len(runs) < 3:
            boom()
        await asyncio.sleep(3600)
    monkeypatch.setattr(ccproxy, name, work)
    proxy = Proxy(FAST._replace(restart=(0.01, 0.02)), apiBase=upstream.base, **options)
    wait_until(lambda: len(runs) == 3)
    assert proxy.request("GET", "/health").status == 200
    proxy.close()
    assert proxy.log.getvalue().count("Traceback") == 2 and SECRET not in proxy.log.getvalue()


def test_the_records_of_a_writer_that_raised_are_written(tmp_path, make_place, monkeypatch):
    insert, faults = ccproxy.UsageLog.insert, []

    def fail_once(log, batch):
        if batch and not faults:
            faults.append(1)
            boom()
        insert(log, batch)
    monkeypatch.setattr(ccproxy.UsageLog, "insert", fail_once)
    place = make_place(limits=FAST._replace(usage_batch=0.05, usage_retry=0.1),
                       usageDb=str(tmp_path / "usage.db"))
    place.check_good()
    wait_until(lambda: "works again" in place.log)
    place.check_log()
