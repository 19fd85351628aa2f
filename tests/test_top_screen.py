"""TOP: what `ccproxy.py top` shows of what the proxy told."""
from __future__ import annotations

import json
import time

import pytest
from harness import ccproxy

RUNNING = {"id": 1, "at": 1.0, "api": "chat", "client": "curl", "asked": "kimi",
           "model": "moonshotai/Kimi-K3", "key": "key:123456", "stream": True, "seconds": 2.5,
           "phase": "answering", "output_chars": 12345}
DONE = {"at": 1e9, "api": "chat", "client": "codex", "asked": "glm", "model": "zai/GLM",
        "key": "key:123456", "status": 200, "stream": True, "input": 1000, "output": 7,
        "cached": 900, "reasoning": None, "cost": None, "first": 0.5, "total": 2.0, "retries": 0,
        "notes": "", "error": "", "trace": ""}
MINUTE = {"at": 4e9, "requests": 3, "errors": 1, "input": 200, "output": 20, "cached": 50,
          "first_p50": 0.5, "first_p95": 3.0}
STATE = {"version": "1.2", "status": "ok", "upstream": {"kind": "alpha", "address": "https://up"},
         "uptime_seconds": 11_000, "open_streams": 2, "in_flight": 2, "clients": 5,
         "admin_key": False, "operator_keys": 0, "live": [RUNNING], "alerts": [],
         "recent": [DONE], "minutes": [MINUTE, {**MINUTE, "first_p50": None}]}


def lines_of(state, width=10_000, height=60, trouble=""):
    return ccproxy.screen_lines(state, "http://here", trouble, width, height)


def test_the_whole_screen():
    head, summary, _, live_head, live, _, recent_head, recent = lines_of(STATE)
    assert head == "ccproxy 1.2  ok  up 3h03m  http://here  upstream https://up"
    assert summary == ("2 open streams  5 clients  5 min: 6 requests  2 errors  400 in  40 out  "
                       "25% cached  first event 500ms, p95 3.00s")
    assert live.split() == ["2.50s", "answering", "12.3k", "moonshotai/Kimi-K3", "curl", "chat",
                            "key:123456"]
    assert live_head.split()[0] == "running" and recent_head.split()[0] == "last"
    assert recent.split()[1:] == ["200", "zai/GLM", "codex", "chat", "key:123456", "1k", "900", "7",
                                  "500ms", "2.00s"]


def test_figures_go_on_in_a_second_line_where_the_first_is_full():
    assert lines_of(STATE, 60)[:3] == [
        "ccproxy 1.2  ok  up 3h03m  http://here  upstream https://up",
        "2 open streams  5 clients  5 min: 6 requests  2 errors",
        "400 in  40 out  25% cached  first event 500ms, p95 3.00s"]


@pytest.mark.parametrize("width, lines", [
    (64, ["ccproxy 1.2  ok  up 3h03m  http://here", "upstream https://an-upstream.example"]),
    (30, ["ccproxy 1.2  ok  up 3h03m", "http://here",
          "upstream https://an-upstream.\u2026"])])
def test_lines_end_between_figures(width, lines):
    """One that is longer than a line is cut."""
    state = dict(STATE, upstream={"address": "https://an-upstream.example"})
    assert lines_of(state, width)[:len(lines)] == lines


def test_trouble_and_alerts_stand_above():
    state = dict(STATE, alerts=[{"key": "key:1", "name": "home", "kind": "minCurrentBalance",
                                 "value": 1.5, "limit": 5, "since": 1},
                                {"key": "", "name": None, "kind": "errorRateAlert", "value": 75,
                                 "limit": 50, "since": 1},
                                {"key": "key:2", "name": None, "kind": "ofLater", "value": 1.5,
                                 "limit": 5, "since": 1}])
    assert lines_of(state, trouble="no answer since 12:00:00")[2:6] == [
        "alert: home (key:1): balance of 1.50 USD is below minCurrentBalance 5.00",
        "alert: an error rate of 75 % is at or above errorRateAlert 50 %",
        "alert: key:2 ofLater is 1.50 (5.00)", "no answer since 12:00:00"]


@pytest.mark.parametrize("width", [20, 40, 61, 80, 132])
@pytest.mark.parametrize("height", [1, 3, 10, 24, 50])
def test_it_fits_every_terminal(width, height):
    failed = {**DONE, "error": "upstream: " + "x" * 200}
    state = dict(STATE, live=[RUNNING] * 40, recent=[failed] * 99)
    lines = lines_of(state, width, height)
    assert len(lines) <= height and max(map(len, lines)) <= width
    assert len(lines) == height
    if height >= 24 and width >= 40:
        assert sum("answering" in line for line in lines) >= 2
        assert sum(" 200 " in line for line in lines) >= 2


def test_room_that_running_requests_do_not_need_is_the_others():
    lines = lines_of(dict(STATE, recent=[DONE] * 99), 132, 30)
    assert sum("zai/GLM" in line for line in lines) == 30 - 8 + 1
    lines = lines_of(dict(STATE, live=[RUNNING] * 99, recent=[]), 132, 30)
    assert sum("answering" in line for line in lines) == 30 - 6


EVIL = "\x1b[2J\x07\x9b31m\u202e\nnext <b>"


def test_no_control_character_reaches_the_terminal():
    state = dict({name: EVIL if isinstance(value, str) else value
                  for name, value in STATE.items()}, upstream={"address": EVIL},
                 live=[{name: EVIL for name in RUNNING}], recent=[{name: EVIL for name in DONE}],
                 alerts=[{"name": EVIL, "kind": EVIL}], minutes=[{"at": EVIL, "requests": EVIL}])
    text = "".join(lines_of(state))
    assert text.isascii() and text.isprintable() and "[2J" in text


@pytest.mark.parametrize("wrong", [
    None, "x", 7, -1, 1e300, float("nan"), float("inf"), True, [], {}, [[]], [None], {"a": {}}])
def test_whatever_a_field_holds_it_is_no_fault(wrong):
    for name in STATE:
        lines_of({**STATE, name: wrong})
    for name in RUNNING:
        lines_of(dict(STATE, live=[{**RUNNING, name: wrong}]), 80)
    for name in DONE:
        lines_of(dict(STATE, recent=[{**DONE, name: wrong}]), 80)
    for name in MINUTE:
        lines_of(dict(STATE, minutes=[{**MINUTE, name: wrong}]))


@pytest.mark.parametrize("body", [
    None, [], "x", 7, {}, {"version": "1"}, {"live": []}, ["version", "live"], "[" * 100_000, "{"])
def test_another_server_is_told_apart(monkeypatch, body):
    text = body if isinstance(body, str) else json.dumps(body)
    monkeypatch.setattr(ccproxy, "ask_url", lambda *given: (200, {}, text.encode()))
    with pytest.raises(ccproxy.ProxyError, match="no ccproxy"):
        ccproxy.read_state("http://here", "")


@pytest.mark.parametrize("body, reason", [
    ({"error": {"message": "not yours"}}, "status 403: not yours"),
    ({"error": "no"}, "status 403: that is no ccproxy, or too old a one"),
    ([], "status 403: that is no ccproxy, or too old a one")])
def test_a_refusal_is_told_in_the_words_of_the_proxy(monkeypatch, body, reason):
    monkeypatch.setattr(ccproxy, "ask_url", lambda *given: (403, {}, json.dumps(body).encode()))
    with pytest.raises(ccproxy.ProxyError, match=reason):
        ccproxy.read_state("http://here", "")


def test_the_summary_is_of_the_last_five_minutes():
    now = time.time()
    state = dict(STATE, minutes=[{**MINUTE, "at": now - 60 * ago} for ago in range(59, -1, -1)])
    assert "5 min: 15 requests" in lines_of(state)[1]
    assert "5 min: 0 requests" in lines_of(dict(STATE, minutes=[{**MINUTE, "at": now - 999}]))[1]


def test_a_model_that_is_not_known_is_shown_as_it_was_asked_for():
    assert "glm" in lines_of(dict(STATE, recent=[{**DONE, "model": ""}]))[-1]


@pytest.mark.parametrize("entry, colour", [
    ({"status": 200}, ""), ({"status": 499, "error": "the client left"}, "dim"),
    ({"status": 502}, "red"), ({"status": 200, "error": "upstream: x"}, "red"), ({}, "")])
def test_colours(entry, colour):
    assert ccproxy.colour_of(entry) == colour


def test_painting_does_not_disturb_the_width(monkeypatch):
    monkeypatch.setattr(ccproxy, "has_colours", lambda: True)
    lines = lines_of(dict(STATE, recent=[{**DONE, "status": 502}]), 40, 24)
    assert lines[0].startswith("\x1b[1m") and lines[-1].startswith("\x1b[31m")
    assert all(len(line.replace("\x1b[1m", "").replace("\x1b[31m", "").replace("\x1b[0m", "")) <= 40
               for line in lines)
