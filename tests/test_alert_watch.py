"""ALERT WATCH: accounts looked at, alerts told in the log, in App and to a webhook on loopback."""
from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import threading
from collections import deque

import pytest
from fake_upstream import (FakeProxy, FakeUpstream, raw, reset, stall, status, stream,
                           text_answer)
from harness import CHAT, FAST, FakeClock, Proxy, ccproxy, wait_until

CERTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "certs")
SECRET, TOKEN = "5ecr3tPart", "t0ken-of-the-webhook"
A, B = "user_a" + SECRET, "user_b" + SECRET
HOOK = FAST._replace(alert_tick=0.02, webhook=0.5, webhook_backoff=(0.02, 0.02, 0.02))
LIMITS = {"minCurrentBalance": 5}


class Place:
    """Accounts, a webhook, and a proxy that watches the one and tells the other."""

    def __init__(self):
        self.left = {A: 3.0, B: 50.0}
        self.refused, self.used = set(), {}         # keys; percentages of a window
        self.upstream, self.hook = FakeUpstream(), FakeUpstream()
        self.upstream.side_script = self.tell
        self.hook.default = status(200, b"ok")
        self.proxy = None

    def tell(self, sock, request):
        key = (request.field("authorization") or "")[len("Bearer "):]
        if key in self.refused and "/alpha/" in request.line:
            status(401, {"error": {"message": "no"}}, "connection: close\r\n")(sock, request)
            return
        left = self.left.get((request.field("authorization") or "")[len("Bearer "):])
        path = request.line.split(" ")[1].replace(self.upstream.base, "")   # through a proxy
        if left is None:
            status(503, {"error": {"message": "away"}})(sock, request)
            return
        status(200, {
            "/alpha/whoami": {"org": None},
            "/alpha/billing/credits": {
                "credits": {"monthlyCredits": left, "freeCredits": 0},
                "windowLimits": {"weekly": {"used": self.used.get(key, 0), "cap": 100}}},
        }.get(path, {"data": None}))(sock, request)

    def start(self, keys="home=%s,work=%s" % (A, B), limits=HOOK, **options):
        options = {"alertWebhookUrl": self.hook.base + "/hook/5lackSecret",
                   "alertWebhookToken": TOKEN, "useProviderModels": False, **options}
        self.proxy = Proxy(limits, apiBase=self.upstream.base, **options)
        self.proxy.app.operator = ccproxy.Operator(ccproxy.parse_ring(keys, "x"), "c", False, "x")
        return self.proxy

    @property
    def posts(self):
        return [request.json for request in self.hook.requests]

    @property
    def log(self):
        return self.proxy.log.getvalue()

    def logged(self, words):
        return [line for line in self.log.splitlines() if words in line]

    def let_it_look(self):
        """Some turns of the watch."""
        asyncio.run_coroutine_threadsafe(asyncio.sleep(5 * HOOK.alert_tick),
                                         self.proxy.loop).result(10)

    def close(self):
        if self.proxy:
            self.proxy.close()
            assert "Traceback" not in self.log and "never retrieved" not in self.log
            for secret in (SECRET, TOKEN, "5lackSecret"):
                assert secret not in self.log
        self.upstream.close()
        self.hook.close()


@pytest.fixture
def place():
    made = Place()
    yield made
    made.close()


def test_an_alert_is_logged_shown_and_posted(place):
    app = place.start(**LIMITS).app
    wait_until(lambda: place.posts)
    (post,) = place.posts
    (alert,) = app.alerts
    assert alert == post["alert"]
    assert (alert["key"], alert["name"], alert["kind"], alert["value"], alert["limit"]) == (
        ccproxy.key_name(A), "home", "minCurrentBalance", 3.0, 5.0)
    assert (post["source"], post["event"]) == ("ccproxy", "alert")
    assert post["text"].startswith("ccproxy: home (key:") and post["at"].endswith("Z")
    request = place.hook.requests[0]
    assert request.line == "POST /hook/5lackSecret HTTP/1.1"
    assert request.field("authorization") == "Bearer " + TOKEN
    assert request.field("content-type") == "application/json"
    assert place.logged("WARNING") == ["WARNING alert: " + post["text"][len("ccproxy: "):]]
    assert SECRET not in json.dumps(app.alerts)


def test_told_again_and_ended(place, monkeypatch):
    clock = FakeClock(monkeypatch)
    app = place.start(**LIMITS, alertIntervalSeconds=60, alertRepeatSeconds=3600).app
    wait_until(lambda: len(place.posts) == 1)
    looks = len(place.upstream.side_requests)
    clock.now += 61
    wait_until(lambda: len(place.upstream.side_requests) == 2 * looks)
    place.left[A] = 2.0
    clock.now += 3600
    wait_until(lambda: len(place.posts) == 2)
    assert app.alerts[0]["value"] == 2.0
    place.left[A] = 20.0
    clock.now += 61
    wait_until(lambda: len(place.posts) == 3)
    assert [post["event"] for post in place.posts] == ["alert", "alert", "resolved"]
    assert app.alerts == [] and place.posts[2]["alert"]["value"] == 20.0
    assert len(place.logged("WARNING")) == 2 and len(place.logged("INFO resolved")) == 1


def test_accounts_that_cannot_be_read_are_no_alert(place):
    place.left = {}
    app = place.start(**LIMITS).app
    wait_until(lambda: len(place.upstream.side_requests) >= 2)
    wait_until(lambda: not app.refreshes)
    assert (app.alerts, place.posts) == ([], [])


@pytest.mark.parametrize("options, keys", [
    ({"alertWebhookUrl": ""}, None), ({"accountAlerts": False, "windowAlert": 0}, None),
    (LIMITS, "")])
def test_nobody_is_asked_without_a_limit_a_webhook_or_a_key(place, options, keys):
    place.start(**options, **({} if keys is None else {"keys": keys}))
    place.let_it_look()
    assert place.upstream.side_requests == []


def test_a_change_of_the_configuration_counts_at_once(place):
    app = place.start().app
    place.let_it_look()
    assert app.alerts == []
    app.config = app.config._replace(min_expiring_balance=60.0)
    wait_until(lambda: len(place.posts) == 2)
    assert {alert["name"] for alert in app.alerts} == {"home", "work"}
    app.config = app.config._replace(min_expiring_balance=0.0)
    wait_until(lambda: len(place.posts) == 4)
    assert [post["event"] for post in place.posts] == ["alert", "alert", "resolved", "resolved"]
    assert app.alerts == []


def test_without_a_webhook_the_log_tells(place):
    place.start(alertWebhookUrl="", **LIMITS)
    wait_until(lambda: place.logged("WARNING alert: home"))
    assert place.posts == []


def told(place):
    return [(post["event"], post["alert"]["kind"], post["alert"]["name"]) for post in place.posts]


def ask(place, count=1):
    """Requests of a caller that is lent the operator's keys; their statuses."""
    fields = {"authorization": "Bearer c"}
    return [place.proxy.post(CHAT, fields, None, messages=[
        {"role": "user", "content": "%d" % number}]).status for number in range(count)]


def test_a_window_that_fills_and_empties(place, monkeypatch):
    clock = FakeClock(monkeypatch)
    place.used = {A: 89, B: 50}
    app = place.start().app
    steps = [([("alert", "windowAlert", "home")], {A: 92}), ([], {A: 85, B: 89}), ([], {A: 91}),
             ([("resolved", "windowAlert", "home")], {A: 79})]
    expected = []
    for events, used in steps:
        place.used, looks = used, len(place.upstream.side_requests)
        clock.now += 301
        wait_until(lambda: len(place.upstream.side_requests) >= looks + 6)
        expected += events
        wait_until(lambda: len(place.posts) == len(expected))
        place.let_it_look()
        place.let_it_look()
        assert told(place) == expected
        assert [one["kind"] for one in app.alerts] == ["windowAlert"] * (used != {A: 79})
    assert len(place.logged("WARNING alert: home (key:")) == 1
    assert len(place.logged("INFO resolved: home (key:")) == 1


def test_without_a_webhook_accounts_are_asked_while_their_keys_are_used(place, monkeypatch):
    clock = FakeClock(monkeypatch)
    app = place.start(alertWebhookUrl="").app
    place.let_it_look()
    assert place.upstream.side_requests == []
    assert ask(place) == [200]
    wait_until(lambda: len(place.upstream.side_requests) == 6)
    place.let_it_look()
    clock.now += 301
    place.let_it_look()
    assert len(place.upstream.side_requests) == 6       # unused since
    place.used = {A: 95}
    assert ask(place) == [200]
    wait_until(lambda: app.alerts)
    looks = len(place.upstream.side_requests)
    clock.now += 301
    wait_until(lambda: len(place.upstream.side_requests) == looks + 6)      # as long as it stands


@pytest.mark.parametrize("by", ["a request", "an account question"])
def test_refused_keys(place, monkeypatch, by):
    """One, then all; each told once each way, and resolved a while after it works again."""
    clock = FakeClock(monkeypatch)
    scripts = [status(401, {"error": {"message": "no"}}, "connection: close\r\n")]
    keys = ["home=" + A, "work=" + B]
    if by == "a request":
        place.upstream.scripts = list(scripts)
    else:
        place.refused = {A}
        keys.reverse()
    app = place.start(",".join(keys), routingPolicy="drain_first").app
    assert ask(place) == [200]
    wait_until(lambda: len(place.posts) == 1)
    assert told(place) == [("alert", "accountRefused", "home")]
    place.refused = {A, B}
    place.upstream.default = scripts[0]
    assert ask(place, 3) == [502] * 3
    wait_until(lambda: len(place.posts) == 3)
    assert sorted(told(place)[1:]) == [
        ("alert", "accountRefused", "work"), ("alert", "accountsUnusable", None)]
    assert {one["kind"] for one in app.alerts} == {"accountRefused", "accountsUnusable"}
    place.let_it_look()
    assert len(place.posts) == 3
    place.refused, place.upstream.default = set(), stream(text_answer("well"))
    for _ in range(3):
        clock.now += 301
        place.let_it_look()
        wait_until(lambda: not app.refreshes)
    wait_until(lambda: len(place.posts) == 6)
    assert sorted(told(place)[3:]) == [
        ("resolved", "accountRefused", "home"), ("resolved", "accountRefused", "work"),
        ("resolved", "accountsUnusable", None)]
    assert app.alerts == [] and len(place.logged("WARNING alert: ")) == 3


def test_the_error_rate_is_told_without_an_operators_key(place):
    app = place.start(keys="", limits=HOOK._replace(backoff=())).app
    place.upstream.default = status(503, {"error": {"message": "away"}}, "connection: close\r\n")
    own = {"authorization": "Bearer user_own" + SECRET}
    for _ in range(19):
        assert place.proxy.post(CHAT, own, None).status == 503
    place.let_it_look()
    assert place.posts == []
    place.proxy.post(CHAT, own, None)
    wait_until(lambda: place.posts)
    (alert,) = app.alerts
    assert alert == {"key": "", "name": None, "kind": "errorRateAlert", "value": 100.0,
                     "limit": 50.0, "since": alert["since"]}
    place.upstream.default = stream(text_answer("well"))
    while app.alerts and len(app.recent) < 100:
        assert len(place.posts) == 1
        assert place.proxy.post(CHAT, own, None).status == 200
        place.let_it_look()
    assert len(app.recent) in (81, 82)              # 20 of 81 are below 25 %
    wait_until(lambda: len(place.posts) == 2)
    assert told(place) == [("alert", "errorRateAlert", None), ("resolved", "errorRateAlert", None)]
    assert place.logged("alert: an error rate of 100 % is at or above errorRateAlert 50 %")
    assert place.upstream.side_requests == []


@pytest.mark.parametrize("options", [
    {"accountAlerts": False, "windowAlert": 0, "errorRateAlert": 0}, {}])
def test_what_is_switched_off_is_not_told(place, options):
    place.used, place.left = {A: 95}, {A: 9.0, B: 9.0}
    place.start(limits=HOOK._replace(backoff=()), **options)
    place.upstream.default = status(401, {"error": {"message": "no"}}, "connection: close\r\n")
    assert ask(place, 22) == [502] * 22
    if options:
        place.let_it_look()
        assert place.posts == [] and place.proxy.app.alerts == []
    else:
        wait_until(lambda: len(place.posts) >= 5)
        assert {kind for _, kind, _ in told(place)} >= {
            "accountRefused", "accountsUnusable", "errorRateAlert", "windowAlert"}


# A webhook that misbehaves.


def closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize("script", [
    status(500, b""), status(503, b"x" * 70000), status(429, b""), status(408, b""), reset(),
    raw(b"nonsense\r\n\r\n", close=True), raw(b"", close=True), stall(seconds=5),
    stall(b"HTTP/1.1 200 OK\r\n", seconds=5)],
    ids=["500", "503", "429", "408", "reset", "nonsense", "closed", "stall", "half a head"])
def test_what_fails_once_is_posted_again(place, script):
    place.hook.scripts = [script]
    place.start(**LIMITS)
    wait_until(lambda: len(place.posts) == 2)
    assert place.posts[0] == place.posts[1]
    wait_until(lambda: not place.hook.scripts)
    assert place.logged("not delivered") == []


def test_what_keeps_failing_is_given_up_with_one_line(place):
    """Two alerts: the second is not tried after the first was given up, and is told as lost."""
    place.hook.default = status(500, b"5ecr3tPart")
    place.start(**LIMITS, minExpiringBalance=5)
    wait_until(lambda: place.logged("not delivered"))
    assert len(place.posts) == 4            # once, and three times again
    assert place.logged("not delivered") == [
        "WARNING alerts not delivered to 127.0.0.1: status 500; lost: 2"]
    assert place.proxy.post(CHAT).status == 200


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(place, code):
    other = FakeUpstream()
    try:
        place.hook.default = status(code, b"", "location: %s/x\r\n" % other.base)
        place.start(**LIMITS)
        wait_until(lambda: place.logged("not delivered"))
        assert "status %d" % code in place.log and len(place.posts) == 1
        assert other.connections == 0
    finally:
        other.close()


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_what_repeating_cannot_mend_is_not_repeated(place, code):
    place.hook.default = status(code, b"")
    place.start(**LIMITS)
    wait_until(lambda: place.logged("not delivered"))
    assert len(place.posts) == 1


def test_nobody_listens(place):
    place.start(alertWebhookUrl="http://127.0.0.1:%d/5lackSecret" % closed_port(), **LIMITS)
    wait_until(lambda: place.logged("not delivered"))
    assert len(place.logged("not delivered")) == 1


def test_a_late_answer_holds_up_neither_service_nor_the_watch(place, monkeypatch):
    """While the webhook is silent, accounts are looked at, requests served; then all arrives, in
    order."""
    clock, go = FakeClock(monkeypatch), threading.Event()

    def late(sock, request):
        go.wait(10)
        status(204, b"")(sock, request)
    place.hook.scripts = [late]
    app = place.start(limits=HOOK._replace(webhook=10.0), **LIMITS).app
    wait_until(lambda: place.posts)
    place.left[A] = 30.0
    clock.now += 301
    wait_until(lambda: not app.alerts)
    assert place.proxy.post(CHAT).status == 200
    assert len(place.posts) == 1
    go.set()
    wait_until(lambda: len(place.posts) == 2)
    assert [post["event"] for post in place.posts] == ["alert", "resolved"]


def test_stopping_does_not_wait_for_a_webhook(place):
    place.hook.default = stall(seconds=60)
    place.start(limits=HOOK._replace(webhook=60.0), **LIMITS)
    wait_until(lambda: place.posts)
    place.proxy.close(hurry=False)          # within ten seconds, or it fails
    assert place.logged("not delivered") == []


def test_nor_for_one_that_is_tried_again(place):
    place.hook.default = status(500, b"")
    place.start(limits=HOOK._replace(webhook_backoff=(60.0,)), **LIMITS)
    wait_until(lambda: place.posts)
    place.proxy.close(hurry=False)


def test_a_webhook_that_is_taken_away_is_not_asked_again(place):
    place.hook.default = status(500, b"")
    app = place.start(limits=HOOK._replace(webhook_backoff=(0.3,)), **LIMITS).app
    wait_until(lambda: place.posts)
    app.config = app.config._replace(alert_webhook_url="")
    wait_until(lambda: len(app.tasks) <= 3)
    assert len(place.posts) == 1 and place.logged("not delivered") == []


def test_the_proxy_of_the_environment_is_used(place, monkeypatch):
    through = FakeProxy()
    try:
        monkeypatch.setenv("http_proxy", through.url)
        monkeypatch.setenv("no_proxy", "")
        place.start(**LIMITS)
        wait_until(lambda: place.posts)
        assert through.heads[-1].startswith(b"POST http://127.0.0.1:%d/" % place.hook.port)
    finally:
        through.close()


@pytest.mark.parametrize("trusted", [True, False])
def test_the_certificate_is_verified(place, monkeypatch, trusted):
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", os.path.join(CERTS, "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(CERTS, "server.pem"))
    place.hook.close()
    place.hook = FakeUpstream(tls=context)
    place.hook.default = status(200, b"")
    place.start(**LIMITS)
    wait_until(lambda: place.posts or place.logged("not delivered"))
    assert bool(place.posts) == trusted
    assert trusted or "certificate" in place.log


def test_a_trust_that_cannot_be_read_is_one_line(place, monkeypatch, tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    place.start(alertWebhookUrl="https://127.0.0.1:1/5lackSecret", **LIMITS)
    wait_until(lambda: place.logged("not delivered"))
    assert len(place.logged("not delivered")) == 1


def test_news_that_push_others_out_while_one_is_posted(monkeypatch):
    """What is posted goes from the queue first, or the next one would in its place."""
    posts, sent = deque([{"n": 1}, {"n": 2}], maxlen=2), []

    async def post(app, body):
        sent.append(json.loads(body)["n"])
        if len(sent) == 1:
            posts.append({"n": 3})
        return ""

    monkeypatch.setattr(ccproxy, "try_post", post)
    asyncio.run(ccproxy.send_posts(None, posts))
    assert sent == [1, 2, 3]
