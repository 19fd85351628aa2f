"""ALERTS: from figures and what stood before to what must be told."""
from __future__ import annotations

import json

import pytest
from harness import ccproxy, make_config

NOW, DAY = 1_790_000_000.0, 86_400.0
HOME, WORK = ccproxy.parse_ring("home=user_5ecretA,user_5ecretB", "x")
REPEAT, CALM = 3600.0, 300.0
USABLE = ccproxy.AccountState("usable")
OFF = {"accountAlerts": False, "windowAlert": 0, "errorRateAlert": 0}


def account(monthly=None, free=None, purchased=None, days=10.0, age=0.0):
    end = None if days is None else NOW + days * DAY
    return ccproxy.Figures(NOW - age, monthly, free, purchased, period_end=end)


def limits_of(limits):
    """As alert_limits gives them for these options."""
    given = ccproxy.alert_limits(make_config(**{**OFF, **limits}))
    return {kind: given[kind] for kind in limits}


def judge(figures, standing=(), now=NOW, key=HOME, repeat=REPEAT, state=USABLE, **limits):
    watched = ccproxy.watch_account(key, state, figures, now)
    return ccproxy.judge_alerts(dict(standing), watched, limits_of(limits), (repeat, CALM), now)


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
    assert ccproxy.alert_limits(make_config(**OFF)) == {}
    assert ccproxy.alert_limits(make_config()) == {
        "windowAlert": (90, 80), "errorRateAlert": (50, 25), "accountRefused": (1, 1),
        "accountsUnusable": (100, 100)}
    config = make_config(**OFF, minCurrentBalance="2.5", minExpiringBalance=2,
                         maxRequiredDailyBurn=3)
    assert ccproxy.alert_limits(config) == {
        BALANCE: (2.5, 2.75), EXPIRING: (2, 2.2), BURN: (3, pytest.approx(2.7))}
    config = make_config(windowAlert=60, errorRateAlert=20, errorRateAlertEnd=5)
    assert ccproxy.alert_limits(config)["windowAlert"] == (60, 60)      # not over while it begins
    assert ccproxy.alert_limits(config)["errorRateAlert"] == (20, 5)


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
    watched = [one for key, figures in ((HOME, account(4)), (WORK, account(90)))
               for one in ccproxy.watch_account(key, USABLE, figures, NOW)]
    standing, news = ccproxy.judge_alerts({}, watched, limits_of(
        {BALANCE: 5, EXPIRING: 5, BURN: 5}), (REPEAT, CALM), NOW)
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
    ended = judge(account(5.5), standing, key=key, **{kind: limit})[1][0].text
    assert " is no more " in ended and ("5.50" in ended or "0.55" in ended)
    assert judge(None, standing, key=key)[1][0].text == news.text + "; not watched any more"


# Around a limit.

WINDOW, REFUSED, UNUSABLE, ERRORS = (
    "windowAlert", "accountRefused", "accountsUnusable", "errorRateAlert")


def events(steps, **limits):
    """What is told as an account's figures go through these steps, a look each."""
    standing, told = {}, []
    for number, figures in enumerate(steps):
        now = NOW + 300 * number
        standing, news = judge(figures._replace(at=now), standing, now, **limits)
        told += [one.event for one in news]
    return told


@pytest.mark.parametrize("kind, limit, steps", [
    # 12 looks around one limit: one notice each way
    (BALANCE, 5, [account(left) for left in (5.1, 4.9) * 6] + [account(5.5)]),
    (EXPIRING, 5, [account(left) for left in (5.1, 4.9, 5.4, 4.6) * 3] + [account(6)]),
    (BURN, 5, [account(left) for left in (49, 51) * 6] + [account(44)])])
def test_a_value_around_a_limit_is_told_once(kind, limit, steps):
    assert events(steps, **{kind: limit}) == ["alert", "resolved"]


def state_of(reason, word="skipped"):
    return ccproxy.AccountState(word, reason, "x", NOW + 60)


def used(percentage, cap=6.0, resets=NOW + 9 * DAY, exceeded=False):
    return ccproxy.Window(cap * percentage / 100, cap, exceeded, resets)


@pytest.mark.parametrize("steps, expected", [
    # percentages of a window that are used: what is told
    ([89.9, 90], ["alert"]), ([89.9, 88, 10], []), ([90, 80, 90, 80.1], ["alert"]),
    ([95, 85, 79.9], ["alert", "resolved"]), ([120, 0], ["alert", "resolved"]),
    ([95, 75, 89, 91], ["alert", "resolved", "alert"])])
@pytest.mark.parametrize("member", ["five_hour", "weekly"])
def test_a_window(steps, expected, member):
    given = [account(9)._replace(**{member: used(one)}) for one in steps]
    assert events(given, windowAlert=90) == expected


@pytest.mark.parametrize("figures, state, value", [
    (account(9)._replace(five_hour=used(91), weekly=used(95)), USABLE, 95.0),
    (account(9), USABLE, None), (None, USABLE, None),
    (account(9)._replace(weekly=used(95, resets=0.0)), USABLE, 95.0),
    (account(9)._replace(weekly=ccproxy.Window(1e14, 5e-324, False)), USABLE, 1000.0),
    (account(9)._replace(weekly=ccproxy.Window(0, 0, True, 0)), USABLE, None),
    (account(9, age=4000)._replace(weekly=used(95)), USABLE, None),
    # by the upstream's word, without figures
    (None, ccproxy.AccountState("skipped", "window", "usage_window", NOW + 60), 100.0)])
def test_how_much_of_a_window_is_used(figures, state, value):
    standing, news = judge(figures, state=state, windowAlert=90)
    assert [one.alert.value for one in news] == ([] if value is None else [value])


@pytest.mark.parametrize("figures, state, over", [
    (account(9), USABLE, True), (None, USABLE, True), (None, ccproxy.AccountState("unknown"), False),
    (account(9)._replace(weekly=used(95, resets=NOW + 100)), USABLE, True),    # it was reset since
    (account(9, age=4000)._replace(weekly=used(10)), USABLE, False),           # figures are stale
    (account(9), state_of("cooldown"), False)])
def test_when_a_window_that_is_no_more_told_is_over(figures, state, over):
    """The alert began with the upstream's word that a window is used up."""
    standing, _ = judge(None, state=state_of("window"), windowAlert=90)
    standing, news = judge(figures, standing, NOW + 200, state=state, windowAlert=90)
    assert ([one.event for one in news], len(standing)) == ((["resolved"], 0) if over else ([], 1))


def test_a_refused_key():
    refused = ccproxy.AccountState("refused", "refused", "authentication", ccproxy.NEVER_ENDS)
    limits = {REFUSED: (1, 1)}
    standing, told = {}, []
    # (seconds later, its state); figures that come clear it, and a request marks it again
    steps = [(0, USABLE), (10, refused), (20, refused), (300, USABLE), (310, refused),
             (600, USABLE), (605, ccproxy.AccountState("unknown")), (610, USABLE), (900, USABLE)]
    for later, state in steps:
        now = NOW + later
        watched = ccproxy.watch_account(HOME, state, None, now)
        standing, news = ccproxy.judge_alerts(standing, watched, limits, (REPEAT, CALM), now)
        told += [(later, one.event, one.text) for one in news]
    name, rest = "home (%s): the key is " % HOME.shown, "refused by the upstream (`ccproxy.py " \
        "doctor` checks keys)"
    assert told == [(10, "alert", name + rest), (610, "resolved", name + "no more " + rest)]


@pytest.mark.parametrize("states, percentage", [
    # the operator's accounts: how many are unusable
    ([], None), ([USABLE], 0), ([ccproxy.AccountState("unknown")], 0),
    ([state_of("refused", "refused")], 100), ([ccproxy.AccountState("refused")], 100),
    ([state_of("credit")], 100), ([state_of("window")], 100),
    ([state_of("cooldown")], 0),                # a lone key is called all the same
    ([state_of("cooldown"), state_of("window")], 100), ([state_of("credit"), USABLE], 50),
    ([state_of("credit"), state_of("refused", "refused"), state_of("window")], 100)])
def test_all_accounts_unusable(states, percentage):
    watched = ccproxy.watch_pool(states)
    assert [value for _, value, _ in watched] == ([] if percentage is None else [percentage])
    limits = {UNUSABLE: (100, 100)}
    standing, news = ccproxy.judge_alerts({}, watched, limits, (REPEAT, CALM), NOW)
    assert [one.text for one in news] == (
        ["the operator's accounts are all unusable (100 %)"] if percentage == 100 else [])
    later = NOW + CALM
    news = ccproxy.judge_alerts(standing, ccproxy.watch_pool([USABLE]), limits, (REPEAT, CALM),
                                later)[1]
    assert [one.text for one in news] == (
        ["the operator's accounts are no more all unusable (0 %)"] if percentage == 100 else [])


@pytest.mark.parametrize("steps, expected", [
    # error rates in percent (None: too few requests): what is told
    ([50], ["alert"]), ([49.9, 30, 0], []), ([60, 40, 25, 55], ["alert"]),
    ([60, 24.9], ["alert", "resolved"]), ([60, None, None, 20], ["alert", "resolved"])])
def test_the_error_rate(steps, expected):
    standing, told = {}, []
    for value in steps:
        standing, news = ccproxy.judge_alerts(
            standing, [(ERRORS, value, None)], {ERRORS: (50, 25)},
            (REPEAT, CALM), NOW)
        told += news
    assert [one.event for one in told] == expected
    assert all((one.alert.key, one.alert.name) == ("", "") for one in told)
    if told:
        assert told[0].text == "an error rate of %d %% is at or above errorRateAlert 50 %%" % steps[0]


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
