"""HISTORY: the last hour, minute by minute."""
from __future__ import annotations

import random

import pytest
from harness import ccproxy

START = 28_000_000 * 60.0       # a minute's beginning


def record(at=START, **fields):
    given = {"api": "chat", "client": "curl", "asked": "a", "model": "a", "key": "", "status": 200,
             "stream": True, "input": None, "output": None, "cached": None, "reasoning": None,
             "cost": None, "first": None, "total": 0.0, "retries": 0, "notes": "", "error": "",
             "trace": ""}
    return ccproxy.Record(at=at, **{**given, **fields})


def counted(*records):
    minutes = {}
    for one in records:
        ccproxy.count_record(minutes, one)
    return minutes


def entries(*records, now=START):
    return ccproxy.minute_entries(counted(*records), now)


def test_a_minute_adds_up():
    found = entries(record(input=100, output=7, cached=60, first=1.0), record(at=START + 59),
                    record(input=1, output=2))
    assert found == [{"at": START, "requests": 3, "errors": 0, "input": 101, "output": 9,
                      "cached": 60, "first_p50": pytest.approx(1.0, rel=0.03),
                      "first_p95": pytest.approx(1.0, rel=0.03)}]


def test_a_request_counts_in_the_minute_of_its_end():
    found = entries(record(at=START - 90, total=100.0))
    assert [one["at"] for one in found] == [START]


@pytest.mark.parametrize("status,error,errors", [
    (200, "", 0), (499, "the client left", 0), (200, "upstream: broke off", 1), (402, "x: y", 1),
    (400, "", 1), (503, "busy: x", 1)])
def test_what_counts_as_an_error(status, error, errors):
    assert entries(record(status=status, error=error))[0]["errors"] == errors


@pytest.mark.parametrize("records, least, percentage", [
    # (status, error, seconds ago at which it ended) of requests: how many of the last 300 s failed
    ([(503, "busy: x", 1)] * 10 + [(200, "", 1)] * 10, 20, 50.0),
    ([(503, "busy: x", 1)] * 19, 20, None), ([(503, "busy: x", 1)] * 19, 1, 100.0),
    ([(200, "upstream: broke off", 1)] * 20, 20, 100.0), ([(499, "left", 1)] * 20, 20, 0.0),
    ([(503, "x: y", 301)] * 20, 1, None), ([(503, "x: y", 299)] + [(200, "", 1)] * 19, 20, 5.0),
    ([], 1, None), ([(200, "", 1)] * 3, 2.5, 0.0)])
def test_the_error_rate(records, least, percentage):
    ended = [record(at=START - ago - 7, total=7.0, status=status, error=error)
             for status, error, ago in records]
    assert ccproxy.error_percentage(ended, START - 300, least) == percentage


@pytest.mark.parametrize("firsts", [
    [1.0], [0.2, 0.4], [n / 100 for n in range(1, 1001)], [0.5] * 94 + [30.0] * 6,
    [random.Random(5).lognormvariate(0, 2) for _ in range(500)]])
def test_shares_of_times_are_right_within_a_step(firsts):
    found = entries(*[record(first=first) for first in firsts])[0]
    for name, share in (("first_p50", 0.5), ("first_p95", 0.95)):
        true = sorted(firsts)[max(-(-len(firsts) * int(share * 100) // 100) - 1, 0)]
        assert found[name] == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("first", [0.0, -1.0, 1e-9, 1e9])
def test_a_time_out_of_all_bounds_is_counted_at_the_bound(first):
    minutes = counted(*[record(first=first)] * 3)
    assert list(minutes[START // 60].firsts.values()) == [3]
    assert 0.0009 < entries(record(first=first))[0]["first_p50"] < 7500


def test_any_number_of_times_takes_bounded_room():
    rng = random.Random(1)
    minutes = counted(*[record(first=rng.uniform(0, 1) ** 8 * 1e5) for _ in range(20_000)])
    assert len(minutes[START // 60].firsts) < 330


def test_an_hour_is_kept_and_only_minutes_that_had_requests():
    minutes = counted(*[record(at=START + 60 * number) for number in range(0, 300, 2)])
    assert len(minutes) <= ccproxy.HISTORY_MINUTES
    found = ccproxy.minute_entries(minutes, START + 299 * 60)
    assert [one["at"] for one in found] == [START + 60 * number for number in range(240, 300, 2)]
    assert ccproxy.minute_entries(minutes, START + 1000 * 60) == []


def test_a_clock_that_was_wrong_leaves_nothing_behind():
    minutes = counted(record(at=START + 1e9), record(at=START + 60), record(at=START))
    assert sorted(minutes) == [START // 60, START // 60 + 1]
    assert len(ccproxy.minute_entries(minutes, START)) == 1
