"""WORKER BOARD: memory in which each worker shows the others what it has."""
from __future__ import annotations

import asyncio
import os
import sys
import threading

import pytest
from harness import ccproxy

HALF = ccproxy.BOARD_HALF_BYTES


@pytest.fixture
def board():
    return ccproxy.Board(3)


@pytest.mark.parametrize("contents", [
    [], [b"one"], [b"one", b"two"], [b"a" * 100, b"", b"three"], [b"%d" % one for one in range(9)],
    [b"x" * (HALF - 16)]])
def test_the_newest_is_read(board, contents):
    for content in contents:
        assert board.write(1, content)
    assert board.read(1) == (contents or [b""])[-1]
    assert board.read(0) == board.read(2) == b""


def test_slots_are_apart(board):
    for slot in range(3):
        assert board.write(slot, b"%d" % slot * (HALF - 100))
    assert [board.read(slot)[:1] for slot in range(3)] == [b"0", b"1", b"2"]


def test_what_is_too_long_changes_nothing(board):
    board.write(0, b"short")
    assert not board.write(0, b"x" * (HALF - 15))
    assert board.read(0) == b"short"


@pytest.mark.parametrize("writes", [1, 2, 3, 4])
@pytest.mark.parametrize("damage", [b"\0" * 4, b"\xff" * 40])
@pytest.mark.parametrize("where", [0, 8, 12, 16])
def test_a_worker_killed_in_mid_write_spoils_nothing(board, writes, damage, where):
    """Whatever stands in the half that is being written, the other one is read."""
    for number in range(writes):
        board.write(1, b"content %d" % number)
    older = min(((number, start) for number, start, _ in board.halves(1)),
                default=(0, 2 * HALF)) if writes > 1 else (0, 3 * HALF)
    board.memory[older[1] + where:older[1] + where + len(damage)] = damage
    assert board.read(1) == b"content %d" % (writes - 1)
    assert board.write(1, b"next") and board.read(1) == b"next"


def test_whatever_clients_send_has_room(make_proxy):
    """All that a worker shows, each part of it as long as it can be: what did not fit would stand
    still, for the others and for a worker that takes its place."""
    long, app = "\\" * 200, make_proxy().app
    record = ccproxy.Record(
        1e9, "responses", "claude-code", long, long, "key:abcdef", 500, True, *[10 ** 18] * 4, *[1.0] * 3, 9,
        "\\" * ccproxy.MAX_NOTE_BYTES, '"' * 500, "\\" * 64)
    models = ccproxy.index_models([ccproxy.Model("%s%d" % (long[:99], number), "") for number in range(10)] + [
        ccproxy.Model("%s%03d" % (long[:97], number), "") for number in range(300)], [])
    app.recent.extend([record] * ccproxy.MAX_RECORDS)
    for number in range(ccproxy.HISTORY_MINUTES):
        app.minutes[number] = ccproxy.Minute(*[10 ** 15] * 5, {step: 10 ** 6 for step in range(-142, 183)})
    for model in models.known.values():
        for status in (200, 400, 499, 500):
            ccproxy.measure_record(app.metrics, record._replace(model=model.id, status=status), models)
    live = {"id": 10 ** 9, "at": 1e9, "api": "responses", "client": "claude-code", "asked": long, "model": long,
            "key": "key:abcdef", "stream": True, "seconds": 1e4, "phase": "answering", "output_chars": 10 ** 9}

    async def own_state():
        return ccproxy.own_state(app)

    state = {**asyncio.run(own_state()), "live": [live] * ccproxy.SHARED_LIVE}
    shown = {"state": state, "metrics": {"counts": ccproxy.count_rows(app.metrics.counts), "gauges": []}}
    assert len(app.metrics.models) == ccproxy.MAX_MODEL_LABELS
    assert ccproxy.Board(1).write(0, ccproxy.to_json(shown))


@pytest.mark.filterwarnings("ignore:.*multi-threaded")      # what other tests left running
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_readers_never_see_half_a_content():
    """A child writes as fast as it can; what is read is whole, and older by one at most (where both
    halves were written to during one reading)."""
    board, done = ccproxy.Board(1), os.pipe()
    child = os.fork()
    if not child:
        try:
            for number in range(1, 20001):
                board.write(0, b"%d " % number * (number % 50 + 1))
            os.write(done[1], b"1")
        finally:
            os._exit(0)
    seen = [0]
    reader = threading.Thread(target=lambda: os.read(done[0], 1))
    reader.start()
    while reader.is_alive():
        words = board.read(0).split()
        if words:
            assert len(set(words)) == 1 and len(words) == int(words[0]) % 50 + 1
            assert int(words[0]) >= seen[-1] - 1
            seen.append(int(words[0]))
    os.waitpid(child, 0)
    assert board.read(0).split()[0] == b"20000"
    assert len(set(seen)) > 2 or sys.platform != "linux"
