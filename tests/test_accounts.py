"""ACCOUNTS and rings over real sockets: failover, affinity, /v1/usage, limits, operator keys."""
from __future__ import annotations

import json
import os
import sys
import threading

import pytest

from fake_upstream import FakeUpstream, status, stream, text_answer, stall
from harness import CHAT, FAST, Proxy, ccproxy

SECRET = "5ecr3tPart"
A, B = "user_a" + SECRET, "user_b" + SECRET
ACCOUNTS = {A: (10.0, "2026-12-20T00:00:00Z"), B: (20.0, "2026-12-20T00:00:00Z")}


def account(request):
    key = request.field("authorization")[len("Bearer "):]
    left, end = ACCOUNTS[key]
    path = request.line.split(" ")[1]
    return {"/alpha/whoami": {"org": None},
            "/alpha/billing/credits": {"credits": {"monthlyCredits": left, "freeCredits": 0}},
            "/alpha/billing/subscriptions": {"data": {
                "planId": "individual-pro", "status": "active", "currentPeriodEnd": end}}}[path]


def tell_accounts(sock, request):
    if "/alpha/" in request.line:
        status(200, account(request), "content-type: application/json\r\n")(sock, request)
    else:
        status(200, {"object": "list", "data": []})(sock, request)


@pytest.fixture()
def place():
    fake = FakeUpstream()
    proxy = Proxy(apiBase=fake.base, fallbackPolicy="drain_first")
    yield proxy, fake
    proxy.close()
    fake.close()
    assert SECRET not in proxy.log.getvalue()


def ask(proxy, keys="%s,%s" % (A, B), **known):
    fields = {"authorization": "Bearer " + keys, **known.pop("fields", {})}
    answer = proxy.post(CHAT, fields, None, **known)
    assert SECRET not in repr(answer)
    return answer


NAMES = {key: ccproxy.key_name(key) for key in (A, B)}


def served(fake):
    return [request.field("authorization")[7:12] for request in fake.requests
            if request.line.startswith("POST")]


def test_failover_before_output(place):
    proxy, fake = place
    fake.scripts = [status(429, {"error": {"code": "RATE_LIMITED", "message": "slow down"}})]
    answer = ask(proxy)
    assert answer.status == 200
    assert answer.fields["x-ccproxy-key"] == NAMES[B]
    assert "failover" in answer.fields["x-ccproxy-notes"]
    first, second = [one for one in fake.requests if one.line.startswith("POST")]
    assert first.field("x-session-id") != second.field("x-session-id")
    assert second.json["threadId"] == second.field("x-session-id")
    assert second.field("x-session-id") == ccproxy.derive_session(B, "", "hi")
    assert ask(proxy).fields["x-ccproxy-key"] == NAMES[B]      # it moved


def test_streamed_failover_and_none_after_output(place):
    proxy, fake = place
    fake.scripts = [status(503, {"error": {"message": "away"}})]
    answer = ask(proxy, stream=True)
    assert answer.status == 200 and answer.fields["x-ccproxy-key"] == NAMES[B]
    fake.scripts = [stream(text_answer("he")[:-20], end=False)]
    before = len(served(fake))
    answer = ask(proxy, stream=True)
    assert len(served(fake)) == before + 1
    assert any("error" in frame for frame in answer.frames)


def test_none_left(place):
    proxy, fake = place
    fake.scripts = [status(401, {"error": {"message": "bad key " + A}}),
                    status(402, {"error": {"message": "pay"}})]
    answer = ask(proxy)
    assert (answer.status, answer.fields["retry-after"]) == (402, "300")
    answer = ask(proxy)                     # from memory: nobody is asked
    assert answer.status == 402 and len(served(fake)) == 2
    assert ask(proxy, keys=A).status == 200     # a single key is never refused from memory


@pytest.mark.parametrize("code, body", [(400, {"error": {"message": "your fault"}})])
def test_no_failover_for_the_requests_own_fault(place, code, body):
    proxy, fake = place
    fake.scripts = [status(code, body)]
    assert ask(proxy).status == code
    assert len(served(fake)) == 1


def test_a_client_that_leaves_is_no_failure(place):
    proxy, fake = place
    fake.scripts = [stall()]
    sock = proxy.send_post(CHAT, {"authorization": "Bearer %s,%s" % (A, B)})
    threading.Event().wait(0.5)
    sock.close()
    proxy.wait_quiet()
    states = list(proxy.app.keys.states.values())
    assert all(not state.marks and not state.failures and not state.in_flight
               for state in states)


def test_a_bad_policy_and_a_bad_ring(place):
    proxy, fake = place
    assert ask(proxy, fields={"x-ccproxy-routing": "best"}).status == 400
    assert ask(proxy, keys=A + ",nonsense," + B).status == 400
    assert served(fake) == []


def test_usage(place):
    proxy, fake = place
    ask(proxy)
    body = proxy.request("GET", "/v1/usage", None, {"authorization": "Bearer x=%s,y=%s" % (A, B)},
                         None)
    assert body.status == 200 and SECRET not in repr(body)
    keys = body.json["keys"]
    assert [key["name"] for key in keys] == ["x", "y"]
    assert keys[0]["through_proxy"]["requests"] == 1
    text = proxy.request("GET", "/v1/usage?format=text", None, {"x-api-key": A}, None)
    assert text.body.decode().startswith("KEY")


def test_the_figures_decide(place):
    proxy, fake = place
    fake.side_script = tell_accounts
    names = [ask(proxy, messages=[{"role": "user", "content": str(number)}]).fields[
        "x-ccproxy-key"] for number in range(6)]
    assert [names.count(NAMES[key]) for key in (A, B)] == [2, 4]        # 10 and 20 USD left
    asked = [one for one in fake.side_requests if "/alpha/" in one.line]
    assert len(asked) == 6          # three answers a key, once
    body = proxy.request("GET", "/v1/usage", None, {"authorization": "Bearer %s,%s" % (A, B)},
                         None).json
    assert [key["account"]["credits_usd"]["monthly"] for key in body["keys"]] == [10.0, 20.0]


@pytest.mark.parametrize("script", [stall(), status(401, {"error": "no"}), status(200, b"{"),
                                    status(500, b"x"), status(200, b"[" * 1000)])
def test_account_answers_that_fail_harm_nothing(place, script):
    proxy, fake = place
    fake.side_script = script
    began = __import__("time").time()
    assert ask(proxy).fields["x-ccproxy-key"] == NAMES[A]       # the fallback: drain_first
    assert __import__("time").time() - began < 2
    assert all(not state.marks for state in proxy.app.keys.states.values())


def test_limits_of_rate_and_number():
    fake = FakeUpstream()
    proxy = Proxy(apiBase=fake.base, rateLimitMax=2, maxTotalInFlight=1)
    try:
        assert [ask(proxy).status for _ in range(3)] == [200, 200, 429]
        assert ask(proxy, keys=B).status == 200     # another caller
        fake.scripts = [stall()]
        sock = proxy.send_post(CHAT, {"authorization": "Bearer user_other"})
        threading.Event().wait(0.3)
        answer = ask(proxy, keys="user_third")
        assert (answer.status, answer.fields["retry-after"]) == (503, "1")
        sock.close()
    finally:
        proxy.close()
        fake.close()


def test_an_operators_keys_on_loopback():
    fake = FakeUpstream()
    proxy = Proxy(apiBase=fake.base)
    proxy.app.operator = ccproxy.Operator(ccproxy.parse_ring("%s,%s" % (A, B), "f"), "", True, "f")
    try:
        fields = {"content-type": "application/json", "authorization": "Bearer sk-x"}
        answer = proxy.post(CHAT, fields, None)
        assert (answer.status, answer.fields["x-ccproxy-key"]) == (200, NAMES[A])
        assert proxy.post(CHAT, {"content-type": "text/plain"}, None).status == 403
        assert proxy.post(CHAT, {**fields, "origin": "http://evil"}, None).status == 403
        answer = proxy.post(CHAT, {**fields, "authorization": "Bearer user_own"}, None)
        assert answer.fields["x-ccproxy-key"] == ccproxy.key_name("user_own")
    finally:
        proxy.close()
        fake.close()
