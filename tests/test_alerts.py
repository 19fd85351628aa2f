"""ALERTS: from figures and what stood before to what must be told."""
from __future__ import annotations

import json

import pytest
from harness import ccproxy, make_config

NOW, DAY = 1_790_000_000.0, 86_400.0
HOME, WORK = ccproxy.parse_ring("home=user_5ecretA,user_5ecretB", "x")
REPEAT = 3600.0


def account(monthly=None, free=None, purchased=None, days=10.0, age=0.0):
    end = None if days is None else NOW + days * DAY
    return ccproxy.Figures(NOW - age, monthly, free, purchased, period_end=end)


def judge(figures, standing=(), now=NOW, key=HOME, repeat=REPEAT, **limits):
    return ccproxy.judge_alerts(dict(standing), [(key, figures)], limits, repeat, now)


BALANCE, EXPIRING, BURN = "minCurrentBalance", "minExpiringBalance", "maxRequiredDailyBurn"


@pytest.mark.parametrize("figures, kind, limit, value", [
    # what an account has, which limit: the alert's value, None for no alert
    (account(4, 0, 0), BALANCE, 5, 4.0), (account(5, 0, 0), BALANCE, 5, None),
    (account(4, 1, 0), BALANCE, 5, None), (account(4, 0, 1), BALANCE, 5, None),
    (account(0, 0, 0), BALANCE, 0.01, 0.0), (account(-3, None, 1), BALANCE, 2, 1.0),
    (account(4, 0, 100), EXPIRING, 5, 4.0), (account(4, 1, 0), EXPIRING, 5, None),
    (account(None, 1, 0), EXPIRING, 5, 1.0),
    (account(60, 0, 0), BURN, 5, 6.0), (account(50, 0, 0), BURN, 5, None),
    (account(49, 3, 999), BURN, 5, 5.2), (account(0, 0, 9999), BURN, 5, None),
    (account(10, 0, 0, days=0.01), BURN, 5, 40.0),
    # not known: no alert
    (None, BALANCE, 5, None), (account(), BALANCE, 5, None), (account(), EXPIRING, 5, None),
    (account(None, None, 1), EXPIRING, 5, None), (account(None, None, 1), BALANCE, 5, 1.0),
    (account(), BURN, 5, None), (account(600, days=None), BURN, 5, None),
    (account(600, days=-1), BURN, 5, None),
    (account(4, 0, 0, age=3500), BALANCE, 5, 4.0), (account(4, 0, 0, age=3700), BALANCE, 5, None),
])
def test_when_an_alert_begins(figures, kind, limit, value):
    standing, news = judge(figures, **{kind: limit})
    if value is None:
        assert (standing, news) == ({}, [])
        return
    (one,) = standing.values()
    assert one.alert == (HOME.shown, "home", kind, pytest.approx(value), limit, NOW)
    assert [(told.event, told.alert) for told in news] == [("alert", one.alert)]


def test_limits_that_are_not_set_watch_nothing():
    assert ccproxy.alert_limits(make_config()) == {}
    config = make_config(minCurrentBalance="2.5", maxRequiredDailyBurn=3)
    assert ccproxy.alert_limits(config) == {BALANCE: 2.5, BURN: 3.0}


def test_a_life():
    """It begins, stands in silence, is told again, changes its value, and ends."""
    standing, news = judge(account(4), **{BALANCE: 5})
    assert [one.event for one in news] == ["alert"]
    steps = [  # seconds later, USD left: what is told
        (300, 4, []), (3599, 3, []), (3600, 3, ["alert"]), (3900, 2, []), (7199, 2, []),
        (7200, 2, ["alert"]), (7300, 6, ["resolved"]), (7600, 6, []), (7900, 1, ["alert"])]
    for later, left, events in steps:
        standing, news = judge(account(left)._replace(at=NOW + later), standing, NOW + later,
                               **{BALANCE: 5})
        assert [one.event for one in news] == events, later
        for one in standing.values():
            assert one.alert.value == left
            assert one.alert.since == (NOW if later < 7900 else NOW + 7900)


def test_zero_means_never_again():
    standing, _ = judge(account(4), **{BALANCE: 5})
    later = NOW + 90 * DAY
    assert judge(account(4)._replace(at=later), standing, later, repeat=0, **{BALANCE: 5})[1] == []


def test_a_clock_that_was_set_back_mutes_nothing():
    standing, _ = judge(account(4), now=NOW, **{BALANCE: 5})
    before = NOW - 90 * DAY
    told = judge(account(4)._replace(at=before), standing, before, **{BALANCE: 5})[1]
    assert [one.event for one in told] == ["alert"]


@pytest.mark.parametrize("figures", [None, account(), account(9, age=4000)])
def test_what_is_not_known_ends_nothing(figures):
    standing, _ = judge(account(4), **{BALANCE: 5})
    later, news = judge(figures, standing, NOW + 2 * REPEAT, **{BALANCE: 5})
    assert (later, news) == (standing, [])


@pytest.mark.parametrize("key, limits", [(WORK, {BALANCE: 1}), (HOME, {EXPIRING: 1}), (HOME, {})])
def test_without_its_key_or_limit_it_is_over(key, limits):
    standing, _ = judge(account(4), **{BALANCE: 5})
    standing, news = judge(account(4), standing, key=key, **limits)
    assert standing == {}
    assert [(one.event, one.alert.key, one.alert.kind) for one in news] == [
        ("resolved", HOME.shown, BALANCE)]


def test_a_limit_that_moves_keeps_its_alert():
    standing, _ = judge(account(4), **{BALANCE: 5})
    standing, news = judge(account(4), standing, NOW + 9, **{BALANCE: 4.5})
    (one,) = standing.values()
    assert (one.alert.limit, one.alert.since, news) == (4.5, NOW, [])


def test_each_account_and_limit_is_judged_for_itself():
    standing, news = ccproxy.judge_alerts(
        {}, [(HOME, account(4)), (WORK, account(90)), (HOME, None)],
        {BALANCE: 5, EXPIRING: 5, BURN: 5}, REPEAT, NOW)
    assert sorted((one.alert.name, one.alert.kind) for one in news) == [
        ("", BURN), ("home", BALANCE), ("home", EXPIRING)]
    assert len(standing) == 3


@pytest.mark.parametrize("key, kind, limit, left, text", [
    (HOME, BALANCE, 5, 4, "home (%s): balance of 4.00 USD is below minCurrentBalance 5.00"),
    (WORK, EXPIRING, 5, 4, "%s: expiring balance of 4.00 USD is below minExpiringBalance 5.00"),
    (HOME, BURN, 2.5, 90,
     "home (%s): required burn of 9.00 USD a day is above maxRequiredDailyBurn 2.50"),
])
def test_the_words(key, kind, limit, left, text):
    standing, (news,) = judge(account(left), key=key, **{kind: limit})
    assert news.text == text % key.shown
    ended = judge(account(5), standing, key=key, **{kind: limit})[1][0].text
    assert " no more " in ended and "5.00" in ended or "0.50" in ended
    assert "not watched any more" in judge(None, standing, key=key)[1][0].text


def test_what_is_posted():
    _, (news,) = judge(account(4), **{BALANCE: 5})
    body = ccproxy.webhook_body(news, NOW + 1)
    assert json.loads(ccproxy.to_json(body)) == body == {
        "source": "ccproxy", "event": "alert", "at": "2026-09-21T14:13:21Z",
        "text": "ccproxy: " + news.text, "alert": {
            "key": HOME.shown, "name": "home", "kind": BALANCE, "value": 4.0, "limit": 5,
            "since": NOW}}
    assert ccproxy.alert_entry(news.alert._replace(name=""))["name"] is None
    assert "5ecret" not in repr((news, body))
