"""KEY STATE, KEY ROUTING and CALLER LIMITS: which key of a ring serves, and why not another.

The clock is an argument, the account service a ledger of dollars that drains.
"""
from __future__ import annotations

import collections
import random

import pytest
from harness import ccproxy

NOW = 1_788_100_000.0
DAY = 86400.0
SECRET = "5ecr3tPartOfAKey"
ROUTING = ccproxy.Routing(model="m/one", upstream="alpha")
FOREVER = float("inf")


def ring(*words):
    return ccproxy.parse_ring(",".join(words), "Authorization")


ABC = ring("user_a" + SECRET, "user_b" + SECRET, "user_c" + SECRET)


def letter(key):
    return None if key is None else key.key[5:6]


def failure(kind, **known):
    return ccproxy.ProxyError(kind, known.pop("message", "said by the upstream"), **known)


def with_figures(table, key, now=NOW, **figures):
    days = figures.pop("days", 10)
    end = None if days is None else now + days * DAY
    ccproxy.state_of(table, key, now).figures = ccproxy.Figures(now, period_end=end, **figures)


def fail(table, key, error, now=NOW, routing=ROUTING):
    ccproxy.note_failure(ccproxy.state_of(table, key, now), error, routing, now)


def choose(table, keys=ABC, talk=None, now=NOW, routing=ROUTING, tried=()):
    choose.count += 1
    talk = "talk %d" % choose.count if talk is None else talk       # by default a new one
    return letter(ccproxy.choose_key(table, keys, talk, routing, now, tried))


choose.count = 0


def choices(table, count, **known):
    return "".join(choose(table, **known) for _ in range(count))


def policy(name, fallback="round_robin"):
    return ROUTING._replace(policy=name, fallback=fallback)


# Policies.

@pytest.mark.parametrize("name, expected", [
    ("", "round_robin"), ("daily_burn_priority", "daily_burn_priority"),
    ("depletion_aware", "daily_burn_priority"), (" Drain_First ", "drain_first"),
    ("balance_priority", "balance_priority"), ("round_robin", "round_robin")])
def test_a_policy_is_read(name, expected):
    assert ccproxy.parse_policy(name, "round_robin") == expected


@pytest.mark.parametrize("name", ["burn", "round-robin", "daily_burn_priority,round_robin", "\xe9"])
def test_an_unknown_policy_is_a_400_that_lists_them(name):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.parse_policy(name, "round_robin")
    assert caught.value.status == 400
    for known in ("daily_burn_priority", "balance_priority", "round_robin", "drain_first",
                  "depletion_aware"):
        assert known in caught.value.message


WEIGHTED = ring("user_a;weight=5", "user_b", "user_c")


@pytest.mark.parametrize("name, keys, figures, expected", [
    # by weight alone, spread evenly, the ring's own order at a tie
    ("round_robin", ABC, {}, "abcabcabc"), ("round_robin", WEIGHTED, {}, "aabacaaaabacaa"),
    ("round_robin", ring("user_b", "user_a"), {}, "baba"),
    ("round_robin", ring("user_a;weight=0.5", "user_b;weight=1.5"), {}, "babbbabb"),
    ("round_robin", ABC, {0: dict(monthly=100.0), 1: dict(monthly=1.0)}, "abcabc"),
    # burn: 1, 2 and 1 USD a day
    ("daily_burn_priority", ABC, {0: dict(monthly=10.0), 1: dict(monthly=20.0),
                                  2: dict(free=10.0)}, "bacbbacb"),
    ("daily_burn_priority", ABC, {n: dict(monthly=10.0) for n in range(3)}, "abcabc"),
    # the same credit, but the first ends ten times as soon
    ("daily_burn_priority", ABC[:2], {0: dict(monthly=10.0, days=1), 1: dict(monthly=10.0)},
     "aaaaabaaaaa"),
    # purchased credit counts for nothing beside credit that expires, and a year's share alone
    ("daily_burn_priority", ABC[:2], {0: dict(monthly=1.0, purchased=500.0),
                                      1: dict(monthly=1.0)}, "abab"),
    ("daily_burn_priority", ABC[:2], {0: dict(monthly=1.0), 1: dict(purchased=36.5)}, "abab"),
    ("daily_burn_priority", WEIGHTED, {n: dict(monthly=9.0) for n in range(3)}, "aabacaa"),
    # all are empty: in turn, for free models exist
    ("daily_burn_priority", ABC, {n: dict(monthly=0.0) for n in range(3)}, "abcabc"),
    ("balance_priority", ABC, {0: dict(monthly=1.0), 1: dict(monthly=1.0, purchased=9.0),
                               2: dict(free=5.0)}, "bbbb"),
    ("balance_priority", ABC, {n: dict(monthly=4.0) for n in range(3)}, "aaa"),
    ("balance_priority", WEIGHTED, {0: dict(monthly=2.0), 1: dict(monthly=9.0),
                                    2: dict(monthly=9.0)}, "aaa"),
    ("drain_first", ABC, {}, "aaa"), ("drain_first", ring("user_c", "user_a"), {}, "ccc"),
    # nothing left lowers a key while another has something
    ("drain_first", ABC, {0: dict(monthly=0.0)}, "bbb"),
    ("drain_first", ABC, {n: dict(monthly=0.0) for n in range(3)}, "aaa"),
    ("round_robin", ABC, {0: dict(monthly=0.0, free=0.0)}, "bcbc"),
    ("balance_priority", ABC, {0: dict(monthly=0.0), 1: dict(monthly=0.1), 2: dict(monthly=0.0)},
     "bb"),
])
def test_what_a_policy_chooses(name, keys, figures, expected):
    table = ccproxy.KeyTable()
    for index, known in figures.items():
        with_figures(table, keys[index], **dict(known))
    assert choices(table, len(expected), keys=keys, routing=policy(name)) == expected


@pytest.mark.parametrize("name", ["daily_burn_priority", "balance_priority"])
@pytest.mark.parametrize("fallback, expected", [("round_robin", "abcabc"), ("drain_first", "aaa")])
@pytest.mark.parametrize("case", ["none", "one missing", "no credits told", "stale"])
def test_without_figures_the_fallback_chooses(name, fallback, expected, case):
    table = ccproxy.KeyTable()
    for key in ABC[:{"none": 0, "one missing": 2}.get(case, 3)]:
        with_figures(table, key, **({} if case == "no credits told" else {"monthly": 5.0}))
    now = NOW + 3601 if case == "stale" else NOW
    assert choices(table, len(expected), routing=policy(name, fallback), now=now) == expected


@pytest.mark.parametrize("days, expected", [
    # days to the end of the first account's period: what is chosen
    (0.5, "aaaaaaaa"), (1e-6, "aaaaaaaa"),          # the last hours count, within a bound
    (0.0, "bbbbbbbb"), (-1.0, "bbbbbbbb")])         # an ended period is no reason to favour it
def test_an_account_whose_period_is_over_is_not_favoured(days, expected):
    table, keys = ccproxy.KeyTable(), ring("user_b", "user_a")
    with_figures(table, keys[1], monthly=10.0, days=days)
    with_figures(table, keys[0], monthly=10.0)
    burn = policy("daily_burn_priority", "drain_first")
    assert choices(table, 8, keys=keys, routing=burn) == expected
    with_figures(table, keys[1], monthly=100.0)     # the next period's figures came
    assert "a" in choices(table, 8, keys=keys, routing=burn)


def test_an_empty_account_may_have_credit_again_once_its_period_is_over():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    with_figures(table, ABC[0], monthly=0.0, days=1)
    assert choose(table, routing=drain) == "b"
    for key in ABC[1:]:
        with_figures(table, key, NOW + DAY, monthly=1.0)
    ccproxy.state_of(table, ABC[0], NOW).figures = ccproxy.Figures(
        NOW + DAY - 60, 0.0, period_end=NOW + DAY)
    assert choose(table, routing=drain, now=NOW + DAY + 1) == "a"


def test_smooth_weighting_is_exact_and_bounded_in_the_long_run():
    table, count = ccproxy.KeyTable(), collections.Counter()
    keys = ring("user_a;weight=0.1", "user_b;weight=0.7", "user_c;weight=0.2")
    for _ in range(10000):
        count[choose(table, keys, routing=policy("round_robin"))] += 1
    assert [count[name] for name in "abc"] == [1000, 7000, 2000]
    assert all(abs(turn) < 2 for turns in table.turns.values() for turn in turns.values())


class Ledger:
    """A fake account service: what each key has left, and when its period ends."""

    def __init__(self, **accounts):
        self.left = {name: list(given[:2]) for name, given in accounts.items()}
        self.monthly = {name: given[0] for name, given in accounts.items()}
        self.ends = {name: NOW + given[2] * DAY for name, given in accounts.items()}

    def spend(self, name, amount):
        """True when the account could pay: what expires first."""
        left = self.left[name]
        if left[0] + left[1] < amount:
            return False
        part = min(left[0], amount)
        left[0], left[1] = left[0] - part, left[1] - (amount - part)
        return True

    def figures(self, name, now):
        while now >= self.ends[name]:       # a new period, with new credit
            self.ends[name] += 30 * DAY
            self.left[name][0] = self.monthly[name]
        monthly, purchased = self.left[name]
        return ccproxy.Figures(now, monthly, 0.0, purchased, period_end=self.ends[name])


def spend_a_month(name, ledger, dollars, keys=ABC):
    """(USD paid by each key, USD nobody could pay, month's last choices) of 30 days, 48 requests
    a day; figures are as old as the refresh allows."""
    table, paid, refused, last = ccproxy.KeyTable(), collections.Counter(), 0.0, ""
    for step in range(30 * 48):
        now = NOW + step * 1800
        for key in keys:
            ccproxy.note_figures(ccproxy.state_of(table, key, now),
                                 ledger.figures(letter(key), now))
        tried = []
        while True:
            key = ccproxy.choose_key(table, keys, "talk %d" % step, policy(name), now, tried)
            if key is None:
                refused += dollars
                break
            tried.append(key.digest)
            if ledger.spend(letter(key), dollars):
                paid[letter(key)] += dollars
                last = (last + letter(key))[-9:]
                break
            fail(table, key, failure("billing"), now, policy(name))
    return {one: round(paid[one], 2) for one in "abc"}, round(refused, 2), last


# Three accounts: much credit that ends late, as much that ends in five days, a purchased reserve.
MONTH = dict(a=(30.0, 0.0, 31), b=(30.0, 0.0, 5), c=(0.0, 60.0, 31))


@pytest.mark.parametrize("name, check", [
    # what expires in five days comes first, the rest evenly; the reserve is hardly touched
    ("daily_burn_priority", lambda paid: paid["b"] > paid["a"] > 20 and paid["c"] < 4),
    # the greatest balance always
    ("balance_priority", lambda paid: paid["c"] > 25 and paid["c"] > paid["a"]),
    ("round_robin", lambda paid: all(abs(paid[one] - 20) < 0.1 for one in "abc")),
    ("drain_first", lambda paid: paid["a"] > 29.9 and paid["b"] > 29.9 and paid["c"] < 0.1),
])
def test_a_month_of_each_policy(name, check):
    paid, refused, _ = spend_a_month(name, Ledger(**MONTH), 60 / 1440)
    assert sum(paid.values()) == pytest.approx(60, abs=0.1)
    assert refused == 0
    assert check(paid), paid


@pytest.mark.parametrize("name", sorted(ccproxy.POLICIES))
def test_a_month_in_which_everything_is_spent_refuses_only_when_all_are_empty(name):
    ledger = Ledger(a=(10.0, 0.0, 40), b=(5.0, 0.0, 40), c=(0.0, 5.0, 40))
    paid, refused, _ = spend_a_month(name, ledger, 40 / 1440)
    assert sum(paid.values()) == pytest.approx(20, abs=0.1) == pytest.approx(40 - refused, abs=0.1)
    assert paid["a"] == pytest.approx(10, abs=0.05) and paid["b"] == pytest.approx(5, abs=0.05)


def test_drain_first_goes_in_the_rings_order():
    ledger = Ledger(a=(0.0, 10.0, 40), b=(0.0, 10.0, 40), c=(0.0, 100.0, 40))
    paid, _, last = spend_a_month("drain_first", ledger, 60 / 1440)
    assert paid == {"a": pytest.approx(10, abs=0.05), "b": pytest.approx(10, abs=0.05),
                    "c": pytest.approx(40, abs=0.1)}
    assert set(last) == {"c"}


# Reasons of unfitness, and their ends.

def window(exceeded=True, resets=NOW + 1000.0):
    return ccproxy.Window(3.0, 3.0, exceeded, resets)


@pytest.mark.parametrize("error, span", [
    # (what the upstream said, for how long its key is passed over; None: not at all)
    (failure("authentication"), FOREVER), (failure("billing"), 300),
    (failure("billing", status=400, message="insufficient credits"), 300),
    (failure("billing", retry_after=900.0), 900), (failure("billing", retry_after=5.0), 300),
    (failure("usage_window"), 300), (failure("usage_window", retry_after=7200.0), 7200),
    (failure("rate_limit"), 60), (failure("rate_limit", retry_after=7.0), 7),
    (failure("rate_limit", retry_after=600.0), 600), (failure("rate_limit", retryable=False), 60),
    (failure("timeout"), 60), (failure("late"), 60), (failure("unavailable"), 60),
    (failure("unavailable", retry_after=2.0), 2), (failure("overloaded"), 60),
    (failure("upstream"), 60), (failure("permission", code="USAGE_EXCEEDED"), 300),
    (failure("plan"), 3600), (failure("plan", code="upgrade_required"), 3600),
    (failure("permission"), 300), (failure("billing", code="PREMIUM_CREDITS_EXHAUSTED"), 300),
    # the request's own fault, or nobody's
    (failure("invalid"), None), (failure("too_long"), None), (failure("model"), None),
    (failure("unprocessable"), None), (failure("too_large"), None), (failure("not_found"), None),
    (failure("empty"), None), (failure("upstream_final"), None), (failure("busy"), None),
    (failure("internal"), None), (failure("upstream", retryable=False), None),
    (failure("invalid", message="premium_credits_exhausted, usage_exceeded"), None),
])
def test_what_a_failure_does_and_when_it_ends(error, span):
    table = ccproxy.KeyTable()
    fail(table, ABC[0], error)
    drain = policy("drain_first")
    if span is None:
        assert choose(table, routing=drain) == "a"
    elif span == FOREVER:
        assert choose(table, routing=drain, now=NOW + DAY - 1) == "b"
    else:
        assert choose(table, routing=drain, now=NOW + span - 0.5) == "b"
        assert choose(table, routing=drain, now=NOW + span + 0.5) == "a"


@pytest.mark.parametrize("error, others", [
    (failure("plan"), "a"), (failure("permission"), "a"),
    (failure("billing", code="PREMIUM_CREDITS_EXHAUSTED"), "a"),
    (failure("permission", code="USAGE_EXCEEDED"), "b"), (failure("billing"), "b"),
    (failure("rate_limit"), "b")])
def test_what_counts_for_one_model_alone(error, others):
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    fail(table, ABC[0], error)
    assert choose(table, routing=drain) == "b"
    assert choose(table, routing=drain._replace(model="M/One")) == "b"
    assert choose(table, routing=drain._replace(model="m/two")) == others
    assert choose(table, routing=drain._replace(upstream="provider")) == others


def test_another_plan_has_other_models():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    with_figures(table, ABC[0], plan="go", monthly=5.0)
    fail(table, ABC[0], failure("plan"))
    fail(table, ABC[0], failure("rate_limit", retry_after=5000.0))
    state = ccproxy.state_of(table, ABC[0], NOW)
    for plan, marks in (("go", 2), ("max", 1)):
        ccproxy.note_figures(state, state.figures._replace(plan=plan))
        assert len(state.marks) == marks
    assert choose(table, routing=drain) == "b"      # still in cooldown
    assert choose(table, routing=drain, now=NOW + 5001) == "a"


def test_a_refused_key_may_be_used_again_once_its_account_answers():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    fail(table, ABC[0], failure("authentication"))
    assert choose(table, routing=drain) == "b"
    state = ccproxy.state_of(table, ABC[0], NOW)
    state.asked = NOW - 1           # asked before it was refused: that tells nothing new
    ccproxy.note_figures(state, ccproxy.Figures(NOW, 1.0))
    assert choose(table, routing=drain) == "b"
    state.asked = NOW
    ccproxy.note_figures(state, ccproxy.Figures(NOW, 1.0))
    assert choose(table, routing=drain) == "a"


@pytest.mark.parametrize("figures, until", [
    (dict(five_hour=window()), 1000), (dict(weekly=window()), 1000),
    (dict(five_hour=window(), weekly=window(resets=NOW + 5000)), 5000),
    (dict(five_hour=window(exceeded=False)), None), (dict(weekly=window(resets=0.0)), 300),
    (dict(weekly=window(resets=NOW - 1)), None), ({}, None)])
def test_a_usage_window_by_the_figures(figures, until):
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    with_figures(table, ABC[0], monthly=5.0, **figures)
    if until is None:
        assert choose(table, routing=drain) == "a"
    else:
        assert choose(table, routing=drain, now=NOW + until - 1) == "b"
        assert choose(table, routing=drain, now=NOW + until + 1) == "a"


def test_the_upstreams_window_error_lasts_until_the_reset_that_the_figures_tell():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    with_figures(table, ABC[0], monthly=5.0, weekly=window(resets=NOW + 9000))
    fail(table, ABC[0], failure("usage_window"))
    ccproxy.state_of(table, ABC[0], NOW).figures = None
    assert choose(table, routing=drain, now=NOW + 8999) == "b"
    assert choose(table, routing=drain, now=NOW + 9001) == "a"


def test_allowed_models_of_an_operators_key():
    keys = ccproxy.read_credentials([
        ("f", '[{"apiKey": "user_a", "allowedModels": ["M/One"]},'
              ' {"apiKey": "user_b", "allowedModels": ["m/two"]}]')])[1]
    table = ccproxy.KeyTable()
    for model, expected in (("m/one", "a"), ("m/two", "b"), ("M/ONE", "a"), ("m/three", None)):
        assert choose(table, keys, routing=ROUTING._replace(model=model)) == expected
    error = ccproxy.spent_error(table, keys, ROUTING._replace(model="m/three"), NOW, [])
    assert (error.status, error.retry_after) == (404, None)
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.check_single(keys[0], ccproxy.KeyState(), ROUTING._replace(model="m/two"))
    assert caught.value.status == 404


def test_other_names_of_a_model_in_allowed_models():
    """Which names stand for the model is told beside it: the keys know no catalogue."""
    keys = ccproxy.read_credentials([
        ("f", '[{"apiKey": "user_a", "allowedModels": ["One", "three"]},'
              ' {"apiKey": "user_b", "allowedModels": ["m/two"]}]')])[1]
    for names, expected in (((), None), (("one",), "a"), (("three", "x"), "a"), (("m/two",), "b"),
                            (("x",), None)):
        routing = ROUTING._replace(names=frozenset(names))
        assert choose(ccproxy.KeyTable(), keys, routing=routing) == expected
        for key in keys:
            if key.key == "user_%s" % expected:
                ccproxy.check_single(key, ccproxy.KeyState(), routing)
                continue
            with pytest.raises(ccproxy.ProxyError) as caught:
                ccproxy.check_single(key, ccproxy.KeyState(), routing)
            assert caught.value.status == 404


@pytest.mark.parametrize("option, flying, expected", [
    (0, (3, 0, 0), "a"), (0, (4, 0, 0), "b"), (0, (4, 4, 3), "c"), (0, (9, 4, 4), "a"),
    (2, (2, 0, 0), "b"), (2, (2, 2, 5), "a"), (50, (49, 0, 0), "a")])
def test_the_in_flight_limit_is_a_preference(option, flying, expected):
    table = ccproxy.KeyTable()
    for key, count in zip(ABC, flying):
        ccproxy.state_of(table, key, NOW).in_flight = count
    routing = policy("drain_first")._replace(max_in_flight=option)
    assert choose(table, routing=routing) == expected


@pytest.mark.parametrize("option, own, flying, refused", [
    (0, 0, 10000, False), (2, 0, 1, False), (2, 0, 2, True), (0, 3, 3, True), (9, 3, 3, True)])
def test_a_single_key_is_limited_only_where_an_option_says_so(option, own, flying, refused):
    key = ccproxy.new_ring_key("user_a", max_in_flight=own)
    state = ccproxy.KeyState(in_flight=flying)
    routing = ROUTING._replace(max_in_flight=option)
    if not refused:
        ccproxy.check_single(key, state, routing)
        return
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.check_single(key, state, routing)
    assert (caught.value.status, caught.value.retry_after) == (429, 1)


def test_a_single_key_is_never_refused_from_memory():
    table = ccproxy.KeyTable()
    for kind in ("authentication", "billing", "usage_window", "rate_limit", "plan", "unavailable"):
        fail(table, ABC[0], failure(kind))
    with_figures(table, ABC[0], monthly=0.0, weekly=window())
    ccproxy.check_single(ABC[0], ccproxy.state_of(table, ABC[0], NOW), ROUTING)


# The one word for how an account is.

def known_state(marks=(), now=NOW, key=ABC[0], routing=ROUTING._replace(model=""), **members):
    state = ccproxy.KeyState(**members)
    for error in marks:
        ccproxy.note_failure(state, error, routing._replace(model="m/one"), NOW)
    return ccproxy.account_state(key, state, routing, now)


LATER, OF_ONE_MODEL = NOW + 2 * DAY, ROUTING._replace(model="m/one")


@pytest.mark.parametrize("known, word, reason", [
    # what is known of an account: how it is, and why routing passes it over
    ({}, "unknown", ""), ({"accepted": NOW - 5}, "usable", ""), ({"in_flight": 9}, "unknown", ""),
    ({"figures": ccproxy.Figures(NOW, 5.0)}, "usable", ""),
    ({"requests": 3, "failures": 3}, "unknown", ""),
    ({"marks": [failure("authentication")]}, "refused", "refused"),
    ({"marks": [failure("authentication")], "accepted": NOW - 5, "now": LATER}, "refused",
     "refused"),
    # by an account question alone: shown, but routing goes on with it
    ({"denied": NOW}, "refused", ""), ({"denied": NOW, "accepted": NOW - 5}, "refused", ""),
    ({"denied": NOW - 5, "accepted": NOW}, "usable", ""),
    ({"denied": NOW, "marks": [failure("billing")]}, "skipped", "credit"),
    # what ends by itself; what it says of the key stays
    ({"marks": [failure("billing")]}, "skipped", "credit"),
    ({"marks": [failure("billing")], "now": LATER}, "usable", ""),
    ({"marks": [failure("rate_limit")]}, "skipped", "cooldown"),
    ({"marks": [failure("rate_limit")], "now": LATER}, "unknown", ""),
    ({"marks": [failure("usage_window"), failure("rate_limit")]}, "skipped", "window"),
    ({"marks": [failure("rate_limit"), failure("authentication")]}, "refused", "refused"),
    ({"figures": ccproxy.Figures(NOW, 5.0, weekly=ccproxy.Window(3, 3, True, NOW + 9))}, "skipped",
     "window"),
    # of one model
    ({"marks": [failure("plan")]}, "usable", ""),
    ({"marks": [failure("plan")], "routing": OF_ONE_MODEL}, "skipped", "model"),
    ({"key": ccproxy.new_ring_key("user_x", allowed_models=("m/two",)), "routing": OF_ONE_MODEL},
     "skipped", "allowed"),
])
def test_how_an_account_is(known, word, reason):
    state = known_state(**known)
    assert (state.word, state.reason) == (word, reason)
    assert (state.until > known.get("now", NOW)) == bool(state.kind) == bool(reason)


def test_an_answer_ends_what_it_disproves():
    table = ccproxy.KeyTable()
    state = ccproxy.state_of(table, ABC[0], NOW)
    for kind in ("authentication", "rate_limit", "billing"):
        fail(table, ABC[0], failure(kind))
    ccproxy.note_success(state, NOW - 1, NOW + 1)       # began before: it disproves nothing
    assert set(state.marks) == {"refused", "cooldown", "credit"}
    ccproxy.note_success(state, NOW, NOW + 1)           # credit: free models exist
    assert set(state.marks) == {"credit"}


def test_account_questions_that_are_wrongly_denied_are_so_once():
    """Or an account would be refused and usable in turn, as questions and answers go."""
    state = ccproxy.KeyState()

    def word(now):
        return ccproxy.account_state(ABC[0], state, ROUTING, now).word

    ccproxy.note_key_check(state, 503, NOW)
    assert word(NOW) == "unknown"
    ccproxy.note_key_check(state, 401, NOW + 1)
    assert word(NOW + 1) == "refused"
    ccproxy.note_success(state, NOW - 99, NOW - 90)     # with a clock set back, too
    assert word(NOW - 90) == "usable"
    ccproxy.note_key_check(state, 401, NOW + 3)
    assert word(NOW + 3) == "usable"
    ccproxy.note_key_check(state, 200, NOW + 4)
    ccproxy.note_key_check(state, 401, NOW + 5)
    assert word(NOW + 5) == "refused"


# Conversations.

def test_a_conversation_stays_with_its_key():
    table = ccproxy.KeyTable()
    homes = {talk: choose(table, talk=talk) for talk in "stuvwx"}
    assert sorted(homes.values()) == list("aabbcc")
    for step in range(50):
        for talk, home in homes.items():
            assert choose(table, talk=talk, now=NOW + step) == home
    # whatever the policy, and though its account is empty by the figures
    with_figures(table, ABC[1], monthly=0.0)
    with_figures(table, ABC[0], monthly=9.0)
    for talk, home in homes.items():
        assert choose(table, talk=talk, routing=policy("balance_priority")) == home


def test_once_moved_it_stays_moved():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    assert choose(table, talk="t", routing=drain) == "a"
    fail(table, ABC[0], failure("rate_limit"))
    assert choose(table, talk="t", routing=drain) == "b"
    assert choose(table, talk="t", routing=drain, now=NOW + 100) == "b"     # though a is fit again
    assert choose(table, talk="new", routing=drain, now=NOW + 100) == "a"


def test_within_one_request_it_moves_to_the_key_that_served():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    digests = [key.digest for key in ABC]
    assert choose(table, talk="t", routing=drain) == "a"
    assert choose(table, talk="t", routing=drain, tried=digests[:1]) == "b"
    fail(table, ABC[0], failure("unavailable"))
    fail(table, ABC[1], failure("unavailable"))
    assert choose(table, talk="t", routing=drain, tried=digests[:2]) == "c"
    assert choose(table, talk="t", routing=drain, tried=digests) is None
    assert choose(table, talk="t", routing=drain, now=NOW + 100) == "c"


def test_a_busy_key_keeps_its_conversation():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    assert choose(table, talk="t", routing=drain) == "a"
    ccproxy.state_of(table, ABC[0], NOW).in_flight = 4
    assert choose(table, talk="t", routing=drain) == "b"        # this request alone
    ccproxy.state_of(table, ABC[0], NOW).in_flight = 3
    assert choose(table, talk="t", routing=drain) == "a"


def test_a_model_that_its_key_lacks_moves_alone():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    other = policy("round_robin")._replace(model="m/premium")
    assert choose(table, talk="t", routing=drain) == "a"
    fail(table, ABC[0], failure("plan"), routing=other)
    moved = choose(table, talk="t", routing=other, tried=[ABC[0].digest])
    assert moved in "bc"
    for _ in range(5):
        assert choose(table, talk="t", routing=other) == moved
        assert choose(table, talk="t", routing=drain) == "a"


def test_a_conversation_whose_key_left_the_ring_moves():
    table = ccproxy.KeyTable()
    assert choose(table, talk="t") == "a"
    assert choose(table, ABC[1:], talk="t") == "b"
    assert choose(table, ABC, talk="t") == "b"


# The error when none is left.

def spent(table, seen, now=NOW, keys=ABC, routing=ROUTING):
    return ccproxy.spent_error(table, keys, routing, now, seen)


@pytest.mark.parametrize("kinds, status", [
    (["authentication", "permission", "billing"], 402), (["authentication", "plan"], 403),
    (["billing", "unavailable"], 503), (["unavailable", "rate_limit"], 429),
    (["upstream", "unavailable"], 502), (["authentication"], 401),
    (["usage_window", "rate_limit"], 429), (["overloaded", "billing", "authentication"], 529)])
def test_the_most_useful_error_is_told(kinds, status):
    table = ccproxy.KeyTable()
    for orders in (kinds, list(reversed(kinds))):
        if orders[0] != kinds[0] and status == 502:
            continue        # among equals the first
        assert spent(table, [failure(kind) for kind in orders]).status == status


def test_it_keeps_the_upstreams_words_and_the_earliest_end():
    table = ccproxy.KeyTable()
    errors = [failure("authentication", message="bad key"),
              failure("rate_limit", message="slow down", retry_after=40.0, code="RATE_LIMITED",
                      trace_id="f" * 32),
              failure("unavailable", message="away")]
    for key, error in zip(ABC, errors):
        fail(table, key, error)
    error = spent(table, errors, NOW + 10)
    assert (error.message, error.code, error.trace_id) == ("slow down", "RATE_LIMITED", "f" * 32)
    assert error.retry_after == 30.0
    assert dict(ccproxy.error_fields(error))["retry-after"] == "30"


def test_from_memory_it_says_why_in_words_of_our_own():
    table = ccproxy.KeyTable()
    fail(table, ABC[0], failure("authentication", message="told to another caller"))
    fail(table, ABC[1], failure("unavailable", message="told to another caller"))
    with_figures(table, ABC[2], monthly=1.0, weekly=window(resets=NOW + 3000))
    assert choose(table) is None
    error = spent(table, [])
    assert (error.status, error.retry_after) == (429, 60.0)
    assert "another caller" not in error.message and SECRET not in error.message
    for key, words in zip(ABC, ("refused", "cooldown for 60 s", "window for 3000 s")):
        assert key.shown in error.message and words in error.message


def test_when_all_are_refused_there_is_no_time_to_wait_for():
    table = ccproxy.KeyTable()
    for key in ABC:
        fail(table, key, failure("authentication"))
    error = spent(table, [])
    assert (error.status, error.retry_after) == (401, None)


def test_the_message_names_few_keys_of_a_long_ring():
    keys = ring(*("user_%d%s" % (number, SECRET) for number in range(32)))
    table = ccproxy.KeyTable()
    for key in keys:
        fail(table, key, failure("unavailable"))
    error = spent(table, [], keys=keys)
    assert "and 27 more" in error.message and len(error.message) < 500


@pytest.mark.parametrize("error, replaced", [
    (failure("authentication"), True), (failure("billing"), True), (failure("plan"), True),
    (failure("plan", code="upgrade_required"), True), (failure("permission"), True),
    (failure("usage_window"), True), (failure("rate_limit"), True), (failure("timeout"), True),
    (failure("unavailable"), True), (failure("upstream"), True), (failure("overloaded"), True),
    (failure("late"), False), (failure("invalid"), False), (failure("too_long"), False),
    (failure("model"), False), (failure("unprocessable"), False), (failure("empty"), False),
    (failure("upstream_final"), False), (failure("upstream", retryable=False), False),
    (failure("invalid", retryable=True), True), (failure("unprocessable", retryable=True), True),
    (failure("unreachable"), True), (failure("unconnected"), False),
    (failure("busy"), False)])
def test_which_failures_go_on_to_the_next_key(error, replaced):
    assert ccproxy.is_replaceable(error) is replaced


# Callers apart, and everything bounded.

def test_overlapping_rings_of_two_callers():
    ours, theirs = ABC[:2], ABC[1:]
    table = ccproxy.KeyTable()
    # what is learned of the shared key counts for both
    fail(table, ABC[1], failure("rate_limit", message="their prompt"))
    assert choose(table, ours, "t") == "a" and choose(table, theirs, "u") == "c"
    # turns are a ring's own: the other's traffic moves nothing
    later = NOW + 100
    alone = choices(ccproxy.KeyTable(), 12, keys=ours, now=later)
    mixed = ""
    for _ in range(12):
        choices(table, 5, keys=theirs, now=later)
        mixed += choose(table, ours, now=later)
    assert mixed.count("a") == alone.count("a")
    # nothing of the other's key, conversations or errors is shown
    body = ccproxy.usage_body(table, ccproxy.Caller(ours, "d"), ROUTING, NOW)
    error = spent(table, [], keys=ours)
    for text in (repr(body), ccproxy.usage_text(body), error.message):
        assert ABC[2].shown not in text and "their prompt" not in text
    assert len(body["keys"]) == 2


def test_a_conversation_of_the_same_name_is_another_callers_own():
    # the shell derives a conversation's id with the caller's first key
    one = ccproxy.derive_session(ABC[0].key, "s", "")
    two = ccproxy.derive_session(ABC[1].key, "s", "")
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    assert choose(table, ABC[:2], one, routing=drain) == "a"
    assert choose(table, ABC[1:], two, routing=drain) == "b"
    fail(table, ABC[1], failure("rate_limit"))
    assert choose(table, ABC[1:], two, routing=drain) == "c"
    assert choose(table, ABC[:2], one, routing=drain) == "a"


def test_nothing_is_unbounded_after_ten_thousand_keys():
    table, windows = ccproxy.KeyTable(), {}
    chance = random.Random(6)
    for number in range(10000):
        keys = ring("user_%d" % number, "user_%dx" % number)
        routing = ROUTING._replace(model="m/%d" % number)
        now = NOW + number
        key = ccproxy.choose_key(table, keys, "talk %d" % number, routing, now)
        fail(table, key, failure(chance.choice(["plan", "billing", "rate_limit"])), now, routing)
        ccproxy.count_request(windows, keys[0].digest, 5, 60, now)
    assert len(table.states) == ccproxy.MAX_KEYS
    assert len(table.conversations) == ccproxy.MAX_CONVERSATIONS
    assert len(table.turns) == ccproxy.MAX_RINGS
    assert len(windows) == ccproxy.MAX_RATE_WINDOWS
    # the newest are those that are known
    assert ring("user_9999")[0].digest in table.states


def test_marks_of_models_are_bounded():
    table = ccproxy.KeyTable()
    for number in range(1000):
        fail(table, ABC[0], failure("plan"), routing=ROUTING._replace(model="m/%d" % number))
        fail(table, ABC[0], failure("rate_limit"))
    marks = ccproxy.state_of(table, ABC[0], NOW).marks
    assert len(marks) == ccproxy.MAX_KEY_MODELS + 1
    assert "alpha m/999" in marks and "alpha m/0" not in marks


def test_a_key_long_unused_is_forgotten():
    table, drain = ccproxy.KeyTable(), policy("drain_first")
    fail(table, ABC[0], failure("authentication"))
    assert choose(table, routing=drain, now=NOW + DAY - 1) == "b"       # used now
    assert choose(table, routing=drain, now=NOW + 2 * DAY - 2) == "b"
    ccproxy.state_of(table, ABC[2], NOW + 3 * DAY)
    assert set(table.states) == {ABC[2].digest}
    assert choose(table, routing=drain, now=NOW + 3 * DAY) == "a"


def test_a_clock_set_back_breaks_nothing():
    table = ccproxy.KeyTable()
    for now in (NOW, NOW - 10 * DAY, NOW + DAY, NOW - DAY):
        assert choose(table, now=now) in "abc"
        windows = {"d": (NOW, 5)}
        ccproxy.count_request(windows, "d", 6, 60, now)


def test_no_key_is_in_any_repr_or_error():
    table = ccproxy.KeyTable()
    choices(table, 5)
    error = failure("unavailable")
    fail(table, ABC[0], error)
    values = (table, table.states, table.turns, ABC, ROUTING, spent(table, [error]).message,
              ccproxy.account_state(ABC[0], ccproxy.state_of(table, ABC[0], NOW), ROUTING, NOW))
    assert all(SECRET not in repr(value) for value in values)


# The rate of a caller's requests.

def test_requests_in_a_window():
    windows = {}

    def count(now, name="d", most=3):
        try:
            ccproxy.count_request(windows, name, most, 60, now)
        except ccproxy.ProxyError as error:
            return error.status, error.retry_after
        return None

    assert [count(NOW + step) for step in (0, 10, 20)] == [None] * 3
    assert count(NOW + 45) == (429, 15.0)
    assert count(NOW + 45, "other") is None
    assert [count(NOW + 60 + step) for step in range(4)] == [None] * 3 + [(429, 57.0)]
    assert all(count(NOW, "free", 0) is None for _ in range(100))
    assert "free" not in windows


def test_what_ends_soon_is_spent_before_it_does():
    """Two accounts of 12 USD; one ends in five days, and only daily_burn_priority empties it."""
    paid = {}
    for name in sorted(ccproxy.POLICIES):
        ledger = Ledger(a=(12.0, 0.0, 40), b=(12.0, 0.0, 5))
        table, paid[name] = ccproxy.KeyTable(), 0.0
        for step in range(5 * 48):
            now = NOW + step * 1800
            for key in ABC[:2]:
                ccproxy.note_figures(ccproxy.state_of(table, key, now),
                                     ledger.figures(letter(key), now))
            chosen = choose(table, ABC[:2], now=now, routing=policy(name))
            if ledger.spend(chosen, 12 / 240) and chosen == "b":
                paid[name] += 12 / 240
    assert paid["daily_burn_priority"] > 10.5
    assert paid["round_robin"] == pytest.approx(6, abs=0.1)
    assert paid["drain_first"] < 0.1 and paid["balance_priority"] == pytest.approx(6, abs=0.1)
