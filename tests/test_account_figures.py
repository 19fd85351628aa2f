"""ACCOUNT FIGURES and USAGE REPORT: what an account has left, and how that is told."""
from __future__ import annotations

import json

import pytest
from harness import ccproxy

NOW = 1_788_100_000.0
DAY = 86400
BILLING = {"credits": {"belowThreshold": False, "creditThreshold": 0, "monthlyCredits": 8.54,
                       "purchasedCredits": 0, "freeCredits": 0},
           "windowLimits": {"limited": True, "exceeded": None,
                            "fiveHour": {"used": 0.02, "cap": 3, "exceeded": False,
                                         "resetAt": 1788120642625},
                            "weekly": {"used": 1.45, "cap": 6, "exceeded": False,
                                       "resetAt": 1788451558879}}}     # UPSTREAM 2.3
SUBSCRIPTION = {"success": True, "data": {
    "id": "s", "status": "active", "planId": "individual-go", "orgId": None,
    "currentPeriodStart": "2026-08-10T00:00:00.000Z",
    "currentPeriodEnd": "2026-09-10T12:00:00.000Z"}}                   # UPSTREAM 2.2


def test_the_recorded_answers_are_read():
    figures = ccproxy.read_figures(BILLING, SUBSCRIPTION, NOW)
    assert (figures.monthly, figures.free, figures.purchased) == (8.54, 0, 0)
    assert (figures.plan, figures.status, figures.known) == ("individual-go", "active", True)
    assert figures.period_end == 1_789_041_600.0
    assert figures.five_hour == ccproxy.Window(0.02, 3, False, 1788120642.625)
    assert figures.weekly == ccproxy.Window(1.45, 6, False, 1788451558.879)


@pytest.mark.parametrize("billing, subscription, expected", [
    (None, None, None), ({}, {}, None), ([], "x", None), ({"credits": 5}, {"data": []}, None),
    ({"credits": {"monthlyCredits": "x", "freeCredits": True}}, None, None),
    ({"credits": {"monthlyCredits": float("inf")}}, None, None),
    ({"credits": {"monthlyCredits": "8.5"}}, None, dict(monthly=8.5)),
    ({"data": {"credits": {"freeCredits": 1}}}, None, dict(free=1.0)),
    ({"credits": {"purchasedCredits": -2}}, {"data": None}, dict(purchased=-2.0)),
    (None, {"success": True, "data": None}, None),
    (None, {"data": {"planId": "individual-pro"}}, dict(plan="individual-pro")),
    (None, {"data": {"planId": ["x"], "currentPeriodEnd": "soon"}}, dict(plan="['x']")),
    (None, {"data": {"status": "user_5ecret5ecret5ecr"}}, dict(
        status=ccproxy.key_name("user_5ecret5ecret5ecr"))),
    ({"windowLimits": {"fiveHour": {"used": 3, "cap": 3, "resetAt": 0}}}, None,
     dict(five_hour=ccproxy.Window(3, 3, True, 0))),
    ({"windowLimits": {"fiveHour": {"used": 1, "cap": 0}, "weekly": None}}, None, None),
    ({"windowLimits": {"limited": False, "fiveHour": {"used": 9, "cap": 3}}}, None, None),
    ({"windowLimits": {"weekly": {"exceeded": True}}}, None,
     dict(weekly=ccproxy.Window(0, 0, True, 0))),
    # a reset in seconds, and one that no window can have
    ({"windowLimits": {"weekly": {"used": 1, "cap": 6, "resetAt": 1788451558}}}, None,
     dict(weekly=ccproxy.Window(1, 6, False, 1788451558))),
    ({"windowLimits": {"weekly": {"used": 1, "cap": 6, "resetAt": 9e14}}}, None,
     dict(weekly=ccproxy.Window(1, 6, False, 0))),
])
def test_whatever_is_missing_counts_as_not_told(billing, subscription, expected):
    figures = ccproxy.read_figures(billing, subscription, NOW)
    assert figures == (None if expected is None else ccproxy.Figures(NOW, **expected))


@pytest.mark.parametrize("value, expected", [
    (1788120642, 1788120642.0), (1788120642625, 1788120642.625), ("1788120642", None), (0, None),
    (-1, None), (None, None), (True, None), ("", None), ("2026-09-10T12:00:00Z", 1789041600.0),
    ("2026-09-10T12:00:00.123456789Z", 1789041600.0), ("2026-09-10T14:00:00+02:00", 1789041600.0),
    ("2026-09-10T14:00:00+0200", 1789041600.0), ("2026-09-10 12:00:00", 1789041600.0),
    ("2026-13-10T12:00:00Z", None), ("9999-99-99T99:99:99Z", None), ("0001-01-01T00:00:00+23:59",
                                                                     None),
])
def test_moments(value, expected):
    assert ccproxy.read_moment(value) == expected


@pytest.mark.parametrize("whoami, org", [
    ({"success": True, "user": {"id": "u"}, "org": None}, ""), ({"org": {"id": "o-1"}}, "o-1"),
    ({"data": {"org": {"id": "o_2"}}}, "o_2"), ({"org": {"id": "a&b=c"}}, ""), (None, ""),
    ({"org": {"id": 5}}, ""), ([], "")])
def test_the_organisation(whoami, org):
    assert ccproxy.read_org(whoami) == org


@pytest.mark.parametrize("credits, days, burn", [
    # (monthly, free, purchased), days to the period's end: USD a day
    ((10, 0, 0), 10, 1.0), ((10, 5, 0), 10, 1.5), ((10, 0, 100), 10, 1.0),
    ((10, 0, 0), 0.1, 40.0), ((10, 0, 0), 1e-9, 40.0),         # never fewer than 0.25 days
    # the period is over: not known, but for a reserve that does not end with it
    ((10, 0, 0), 0, None), ((10, 0, 0), -3, None), ((0, 2, 0), -3, None), ((0, 0, 365), -3, 1.0),
    ((None, None, None), 10, None), ((None, None, None), None, None),
    ((10, 0, 0), None, 10 / 30),                                # no end is told: a month
    ((0, 0, 365), 10, 1.0), ((0, 0, 0), 10, 0.0), ((-5, 0, 0), 10, 0.0),
    ((None, None, 730), None, 2.0), ((None, 3, None), 3, 1.0),
])
def test_the_burn(credits, days, burn):
    end = None if days is None else NOW + days * DAY
    figures = ccproxy.Figures(NOW, *credits, period_end=end)
    assert ccproxy.burn_of(figures, NOW) == (None if burn is None else pytest.approx(burn))
    told = ccproxy.account_entry(figures, NOW)
    assert told["burn_usd_per_day"] == (None if burn is None else pytest.approx(burn, abs=1e-6))
    assert told["days_left"] == (None if days is None or days <= 0 else round(days, 2))


@pytest.mark.parametrize("credits", [(10, 0, 0), (0, 0, 0), (0, 0, 365)])
def test_a_period_that_ended_since_is_unknown_until_new_figures_come(credits):
    old = ccproxy.Figures(NOW - 60, *credits, period_end=NOW - 1)
    assert ccproxy.burn_of(old, NOW) is None and ccproxy.burn_of(old, NOW - 2) is not None
    new = old._replace(at=NOW, period_end=NOW + 30 * DAY)
    assert ccproxy.burn_of(new, NOW) == pytest.approx(credits[0] / 30 or credits[2] / 365)
    row = ccproxy.usage_row(ccproxy.usage_entry(
        RING[0], ccproxy.KeyState(figures=old), ROUTING, NOW))
    assert row[6:8] == ("-", "-")


# The report.

RING = ccproxy.parse_ring("work=user_5ecretA;weight=2,user_5ecretB", "x")
ROUTING = ccproxy.Routing()


def table_with(**figures):
    table = ccproxy.KeyTable()
    state = ccproxy.state_of(table, RING[0], NOW)
    ccproxy.note_figures(state, ccproxy.read_figures(BILLING, SUBSCRIPTION, NOW)._replace(
        **figures))
    state.requests, state.in_flight = 3, 1
    ccproxy.note_usage(state, ccproxy.Usage(100, 20, 60), "0.25")
    ccproxy.note_usage(state, ccproxy.Usage(1, 1), None)
    ccproxy.note_usage(state, None, "nonsense")
    ccproxy.note_usage(state, None, "1e-7")
    return table


def test_the_report_as_json():
    body = ccproxy.usage_body(table_with(), ccproxy.Caller(RING, "d"), ROUTING, NOW + 60)
    assert json.loads(ccproxy.to_json(body)) == body
    assert (body["object"], body["keys_of"], body["policy"]) == (
        "ccproxy.usage", "caller", "daily_burn_priority")
    first, second = body["keys"]
    assert (first["key"], first["name"], first["weight"], first["fit"]) == (
        ccproxy.key_name("user_5ecretA"), "work", 2, True)
    assert first["through_proxy"] == {"requests": 3, "failures": 0, "input_tokens": 101,
                                      "output_tokens": 21, "cached_tokens": 60, "cost_usd": 0.25}
    account = first["account"]
    assert account["plan"] == "individual-go"
    assert account["credits_usd"] == {"monthly": 8.54, "free": 0, "purchased": 0, "expiring": 8.54,
                                      "balance": 8.54}
    assert (account["period_end"], account["days_left"], account["age_seconds"]) == (
        "2026-09-10T12:00:00Z", 10.9, 60)
    assert account["burn_usd_per_day"] == pytest.approx(8.54 / 10.8975, rel=1e-3)
    assert account["windows"]["five_hour"] == {"used_usd": 0.02, "cap_usd": 3, "exceeded": False,
                                               "resets_at": "2026-08-30T20:10:42Z"}
    assert (second["account"], second["name"], second["fit"]) == (None, None, None)
    assert [one["state"] for one in body["keys"]] == ["usable", "unknown"]


def test_the_report_says_why_and_until_when_a_key_is_not_fit():
    table = table_with(weekly=ccproxy.Window(6, 6, True, NOW + 3600))
    state = ccproxy.state_of(table, RING[1], NOW)
    ccproxy.note_failure(state, ccproxy.ProxyError("authentication", "user_5ecretB"), ROUTING, NOW)
    first, second = ccproxy.usage_body(table, ccproxy.Caller(RING, "d"), ROUTING, NOW)["keys"]
    assert (first["fit"], first["fit_at"]) == (False, ccproxy.shown_moment(NOW + 3600))
    assert "window" in first["reason"] and "refused" in second["reason"]
    assert (second["fit"], second["fit_at"]) == (False, None)
    assert (first["state"], second["state"]) == ("skipped", "refused")


def test_models_that_others_asked_for_are_counted_not_named():
    table = table_with()
    state = ccproxy.state_of(table, RING[0], NOW)
    ccproxy.note_failure(state, ccproxy.ProxyError("plan", "no"),
                         ROUTING._replace(model="secret-project/model"), NOW)
    body = ccproxy.usage_body(table, ccproxy.Caller(RING, "d"), ROUTING, NOW)
    assert body["keys"][0]["models_passed_over"] == 1 and body["keys"][0]["fit"]
    assert "secret-project" not in json.dumps(body)


def test_the_report_as_a_table():
    body = ccproxy.usage_body(table_with(weekly=ccproxy.Window(6, 6, True, NOW + 3600)),
                              ccproxy.Caller(RING, "d", True), ROUTING, NOW)
    text = ccproxy.usage_text(body)
    head, first, second = text.splitlines()
    assert head.split()[:3] == ["KEY", "NAME", "PLAN"] and text.endswith("\n")
    assert "6.00/6.00!" in first and "8.54" in first
    assert first.endswith("  skipped: it is over its usage window until 2026-08-30T15:26:40Z")
    assert second.split()[0] == RING[1].shown and second.endswith("  unknown")
    assert head.endswith("  STATE") and "fit" not in text.lower()
    assert first.index("work") == head.index("NAME") and text.isascii()


@pytest.mark.parametrize("figures", [None, ccproxy.Figures(NOW), ccproxy.Figures(
    NOW, period_end=1e30), ccproxy.Figures(NOW, 1.0, period_end=-5.0),
    ccproxy.Figures(NOW, weekly=ccproxy.Window(0, 0, True, 9e99))])
def test_no_figures_make_the_report_fail(figures):
    table = ccproxy.KeyTable()
    ccproxy.state_of(table, RING[0], NOW).figures = figures
    body = ccproxy.usage_body(table, ccproxy.Caller(RING[:1], "d"), ROUTING, NOW)
    assert body["policy"] is None
    assert ccproxy.to_json(body) and ccproxy.usage_text(body)


def test_no_key_is_in_the_report_or_what_it_is_made_of():
    table = table_with()
    caller = ccproxy.Caller(RING, "d")
    body = ccproxy.usage_body(table, caller, ROUTING, NOW)
    for value in (body, ccproxy.usage_text(body), table, caller, list(table.states.values())):
        assert "5ecret" not in "%s %r" % (value, value)
