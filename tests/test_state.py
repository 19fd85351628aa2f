"""STATE: /admin/state, what the proxy does and did, of all its workers."""
from __future__ import annotations

import asyncio
import os
import signal

import pytest
from fake_upstream import stream, text_answer
from harness import CHAT, FAST, KEY, ccproxy, wait_until
from test_live_events import CHANGING, LIVE, MINUTE, Reader, STATE


def test_the_state_of_a_new_proxy(make_proxy, upstream):
    proxy = make_proxy(upstream="alpha")
    answer = proxy.request("GET", STATE, key=None)
    state = answer.json
    assert answer.status == 200 and answer.fields["cache-control"] == "no-store"
    assert set(state) == CHANGING | {"recent", "minutes"}
    assert state["upstream"] == {"kind": "alpha", "address": upstream.base + "/alpha/generate"}
    assert (state["status"], state["version"], state["clients"]) == ("ok", ccproxy.__version__, 1)
    assert (state["worker"], state["workers"], state["admin_key"]) == (1, 1, False)
    assert state["live"] == state["recent"] == state["minutes"] == state["alerts"] == []


def test_what_was_asked_stands_in_it(proxy):
    for model in ("kimi", "glm"):
        proxy.post(CHAT, {"user-agent": "curl/8"}, model=model)
        proxy.wait_quiet()
    wait_until(lambda: len(proxy.app.recent) == 2)
    state = proxy.request("GET", "/v1" + STATE, key=None).json
    assert [one["asked"] for one in state["recent"]] == ["glm", "kimi"]
    assert set(state["recent"][0]) == set(ccproxy.Record._fields)
    assert state["recent"][0]["key"] == ccproxy.key_name(KEY)
    assert sum(one["requests"] for one in state["minutes"]) == 2
    assert all(set(one) == MINUTE for one in state["minutes"])


@pytest.fixture
def workers(start_program):
    """Two workers, of which a connection reaches either."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    return start_program("--workers", "2", "--use-provider-models", "false")


def state_of(program, worker):
    """The state as that worker tells it."""
    while True:
        state = program.request("GET", STATE, key=None).json
        if state["worker"] == worker:
            return state


def test_any_worker_tells_of_all(workers, upstream):
    for number in range(12):
        assert workers.post(CHAT, model="vendor/model-%d" % number).status == 200
    asked = {"vendor/model-%d" % number for number in range(12)}
    for worker in (1, 2):
        wait_until(lambda: len(state_of(workers, worker)["recent"]) == 12, 10)
        state = state_of(workers, worker)
        assert {one["asked"] for one in state["recent"]} == asked
        ends = [one["at"] + one["total"] for one in state["recent"]]
        assert ends == sorted(ends, reverse=True)
        assert sum(one["requests"] for one in state["minutes"]) == 12
        assert state["workers"] == 2


def test_any_worker_tells_what_runs_in_all(workers, upstream):
    upstream.default = stream(text_answer(*["word "] * 1000), cut=400, pause=0.05)
    socks = [workers.send_post(CHAT, stream=True) for _ in range(8)]
    try:
        for worker in (1, 2):
            wait_until(lambda: len(state_of(workers, worker)["live"]) == 8, 10)
            state = state_of(workers, worker)
            assert state["open_streams"] == state["in_flight"] == 8
            assert len({one["id"] for one in state["live"]}) == 8
            assert all(set(one) == LIVE for one in state["live"])
    finally:
        for sock in socks:
            sock.close()


def test_events_of_any_worker_tell_of_all(workers, upstream):
    reader = Reader(workers)
    with reader.sock:
        reader.state()
        for number in range(12):
            workers.post(CHAT, model="vendor/model-%d" % number)
        seen = [reader.record()["asked"] for _ in range(12)]
    assert sorted(seen) == sorted("vendor/model-%d" % number for number in range(12))


def test_what_another_worker_lost_is_told(make_proxy):
    proxy = make_proxy(limits=FAST._replace(news=60.0))
    record = ccproxy.Record(*[0] * len(ccproxy.Record._fields))
    shown = {"worker": 2, "recorded": 500, "recent": [record] * ccproxy.SHARED_RECORDS}
    told = {}
    follower = ccproxy.Follower(type("Wire", (), {"wake": lambda self: None})(), True)
    proxy.app.followers.add(follower)
    try:
        ccproxy.tell_others_records(proxy.app, [(shown, True)], told)
        assert (told, len(follower.frames), follower.lost) == ({2: 500}, 0, 0)
        shown["recorded"] = 503
        ccproxy.tell_others_records(proxy.app, [(shown, False)], told)
        assert (len(follower.frames), follower.lost) == (3, 0)
        follower.frames.clear()
        shown["recorded"] += ccproxy.SHARED_RECORDS + 40
        ccproxy.tell_others_records(proxy.app, [(shown, True)], told)
        assert (len(follower.frames), follower.lost) == (ccproxy.SHARED_RECORDS, 40)
    finally:
        proxy.app.followers.clear()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_worker_started_anew_goes_on_where_the_one_before_it_ended(workers, upstream):
    for _ in range(10):
        workers.post(CHAT)
    for worker in (1, 2):
        wait_until(lambda: len(state_of(workers, worker)["recent"]) == 10, 10)
    with open("/proc/%d/task/%d/children" % ((workers.process.pid,) * 2)) as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    wait_until(lambda: "another is started" in workers.log, 10)
    for worker in (1, 2):
        wait_until(lambda: len(state_of(workers, worker)["recent"]) == 10, 10)
        assert sum(one["requests"] for one in state_of(workers, worker)["minutes"]) == 10


def test_what_is_shared_fits_the_board(proxy):
    """With all of it as long as it can be; the board has other things to hold too."""
    longest = ccproxy.Record(1.7e9, "responses", "claude-code", "m" * 200, "m" * 200, "key:123456",
                             200, True, *[10 ** 7] * 4, 0.123456, 1.23456, 12.3456, 3, "n" * 1024,
                             "e" * 500, "t" * 64)
    proxy.app.recent.extend([longest] * ccproxy.MAX_RECORDS)
    for number in range(60):
        for step in range(100):
            ccproxy.count_record(proxy.app.minutes, longest._replace(
                at=60.0 * number, first=1.05 ** step / 50))

    async def tell():
        return ccproxy.own_state(proxy.app)
    assert len(ccproxy.to_json(asyncio.run(tell()))) < ccproxy.BOARD_HALF_BYTES * 0.7
