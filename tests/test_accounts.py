"""ACCOUNTS and rings over real sockets: failover, affinity, /v1/usage, limits, operator keys."""
from __future__ import annotations

import itertools
import json
import socket
import threading
import time

import pytest
from fake_upstream import FakeUpstream, ndjson, raw, reset, stall, status, stream, text_answer
from harness import (CHAT, MESSAGES, FakeClock, Proxy, ccproxy, fold_chat, fold_messages,
                     full_listener, parse_answers, post_bytes, read_all, read_until, wait_until)

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
    assert ask(proxy, keys=A + ";nonsense," + B).status == 400
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
    began = time.time()
    assert ask(proxy).fields["x-ccproxy-key"] == NAMES[A]       # the fallback: drain_first
    assert time.time() - began < 2
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


# One proxy for many cases, each with keys of its own.

COUNT = itertools.count()
RESPONSES = "/v1/responses"
NO_ACCOUNT = status(404, {}, "connection: close\r\n")
THINKING = ndjson({"type": "start"}, {"type": "reasoning-delta", "id": "r", "text": "Hmm"})
AGAIN = ndjson({"type": "start"}, {"type": "reasoning-delta", "id": "r", "text": "Other"},
               {"type": "text-delta", "id": "0", "text": "Done"},
               {"type": "finish", "finishReason": "stop",
                "totalUsage": {"inputTokens": 7, "outputTokens": 3}})


def fault(number, message="said by the upstream", fields="", **known):
    return status(number, {"error": {"message": message, **known}},
                  "connection: close\r\n" + fields)


def event(number, message="said by the upstream", before=b"", **known):
    return stream(before + ndjson({"type": "error", "error": {
        "message": message, "statusCode": number, **known}}))


class Place:
    """A proxy, its upstream, and a caller's fresh keys."""

    def __init__(self, keys=2, **options):
        self.fake = FakeUpstream()
        self.fake.side_script = NO_ACCOUNT
        self.proxy = Proxy(**{"apiBase": self.fake.base, "fallbackPolicy": "drain_first",
                              "useProviderModels": False, **options})
        self.renew(keys)

    def renew(self, keys=2):
        """Keys that nothing is known of, no connections left over, no requests counted."""
        number = next(COUNT)
        self.keys = ["user_%d%s%s" % (number, letter, SECRET) for letter in "abcdefgh"[:keys]]
        self.proxy.loop.call_soon_threadsafe(self.proxy.app.home.pool.prune, float("inf"))
        self.fake.requests.clear()
        self.fake.side_requests.clear()
        self.fake.scripts = []
        self.fake.default = stream(text_answer("Hello", " there"))

    @property
    def ring(self):
        return ",".join(self.keys)

    def ask(self, text="hi", ring=None, path=CHAT, fields=None, **known):
        """A whole answer; Messages ask for thinking, so that it is shown."""
        fields = {"authorization": "Bearer " + (ring or self.ring), **(fields or {})}
        known["input" if path == RESPONSES else "messages"] = [{"role": "user", "content": text}]
        if path == MESSAGES:
            known.update(max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024})
        answer = self.proxy.request("POST", path, known, fields, None)
        assert SECRET not in repr(answer)
        return answer

    def start(self, text="hi", ring=None, **known):
        """A request that nobody waits for."""
        return self.proxy.send_post(CHAT, {"authorization": "Bearer " + (ring or self.ring)},
                                    messages=[{"role": "user", "content": text}], **known)

    def served(self):
        """Letters of the keys that were called, in order."""
        return "".join("abcdefgh"[self.keys.index(request.field("authorization")[7:])]
                       for request in self.fake.requests)

    def usage(self, ring=None):
        answer = self.proxy.request("GET", "/v1/usage", None, {
            "authorization": "Bearer " + (ring or self.ring)}, None)
        assert answer.status == 200 and SECRET not in repr(answer)
        return answer.json["keys"]

    def reasons(self):
        return [entry["reason"] for entry in self.usage()]

    def asked(self, key=None):
        """How often accounts were asked for, in all or of one key."""
        return sum("/alpha/whoami" in one.line and key in (None, one.field("authorization")[7:])
                   for one in self.fake.side_requests)

    def close(self):
        self.proxy.close()
        self.fake.close()
        assert SECRET not in self.proxy.log.getvalue()
        assert "Traceback" not in self.proxy.log.getvalue(), self.proxy.log.getvalue()


@pytest.fixture(scope="module")
def common():
    made = Place()
    yield made
    made.close()


@pytest.fixture
def here(common):
    common.renew()
    return common


@pytest.fixture
def make_place():
    """Places with options of their own."""
    made = []

    def make(*arguments, **options):
        made.append(Place(*arguments, **options))
        return made[-1]
    yield make
    for one in made:
        one.close()


# Failover: what goes on to the next key, and what it says of the first one.

COOL, BROKE = "it is in cooldown", "it is out of credit"
TAKEN_OVER = {
    "401": (fault(401), "the upstream refused it"), "402": (fault(402), BROKE),
    "402, no body": (status(402, b"", "connection: close\r\n"), BROKE),
    "400 about credit": (fault(400, "Insufficient credits"), BROKE),
    "spending cap": (fault(403, code="USAGE_EXCEEDED"), BROKE),
    "plan": (fault(403, code="MODEL_NOT_IN_PLAN"), None),
    "upgrade": (fault(403, code="upgrade_required"), None), "403": (fault(403), None),
    "premium": (fault(402, code="PREMIUM_CREDITS_EXHAUSTED"), None),
    "429": (fault(429), COOL), "429 for 7 s": (fault(429, fields="retry-after: 7\r\n"), COOL),
    "429 for an hour": (fault(429, fields="retry-after: 3600\r\n"), COOL),
    "429 about quota": (fault(429, code="insufficient_quota"), BROKE),
    "window": (fault(429, "Usage limit reached"), "it is over its usage window"),
    "408": (fault(408), COOL), "500": (fault(500), COOL), "502": (fault(502), COOL),
    "503": (fault(503), COOL), "503, HTML": (status(503, b"<html>", "connection: close\r\n"),
                                             COOL),
    "504": (fault(504), COOL), "529": (fault(529), COOL), "reset": (reset(), COOL),
    "closed": (raw(b"", close=True), COOL), "half a head": (raw(b"HTTP/1.1 2", close=True), COOL),
    "garbage": (raw(b"what?\r\n\r\n", close=True), COOL),
    "reset behind the head": (reset(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
                              COOL),
    "closed behind the head": (stream(b"", end=False), COOL),
    "event 429": (event(429), COOL), "event 503": (event(503), COOL),
    "event 401": (event(401), "the upstream refused it"), "event 402": (event(402), BROKE),
    "event 403": (event(403, code="MODEL_NOT_IN_PLAN"), None)}


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("name", TAKEN_OVER)
def test_the_next_key_takes_over(here, name, streamed):
    script, reason = TAKEN_OVER[name]
    here.fake.scripts = [script]
    answer = here.ask(stream=streamed)
    assert answer.status == 200 and here.served() == "ab"
    assert answer.fields["x-ccproxy-key"] == ccproxy.key_name(here.keys[1])
    assert "failover=%s" % ccproxy.key_name(here.keys[0]) in answer.fields["x-ccproxy-notes"]
    if streamed:
        assert fold_chat(answer.frames)[0] == {"content": "Hello there"}
    else:
        assert answer.json["choices"][0]["message"]["content"] == "Hello there"
    first, second = (request.json for request in here.fake.requests)
    for key, request in zip(here.keys, here.fake.requests):
        session = ccproxy.derive_session(key, "", "hi")
        assert request.field("x-session-id") == request.json["threadId"] == session
    assert {**first, "threadId": 0} == {**second, "threadId": 0}
    entries = here.usage()
    assert [entry["reason"] for entry in entries] == [reason, None]
    assert [entry["models_passed_over"] for entry in entries] == [reason is None, 0]
    assert [entry["through_proxy"]["failures"] for entry in entries] == [1, 0]
    assert here.ask(stream=streamed).status == 200 and here.served() == "abb"


OWN_FAULTS = {"400": fault(400), "404": fault(404), "413": fault(413), "422": fault(422),
              "too long": fault(400, "Prompt is too long"), "event 400": event(400),
              "unknown model": fault(404, "unknown model"), "302": fault(302),
              "not to be repeated": event(500, isRetryable=False)}


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("name", OWN_FAULTS)
def test_the_requests_own_fault_is_told_at_once(here, name, streamed):
    here.fake.scripts = [OWN_FAULTS[name]]
    answer = here.ask(stream=streamed)
    assert answer.status >= 400 and here.served() == "a"
    assert here.reasons() == [None, None]


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
def test_what_an_upstream_says_may_be_tried_again_goes_on_to_the_next_key(here, streamed):
    """It says nothing of the first key."""
    here.fake.scripts = [event(400, isRetryable=True)]
    answer = here.ask(stream=streamed)
    assert answer.status == 200 and here.served() == "ab"
    assert here.reasons() == [None, None]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("script", [stream(THINKING, end=False), event(429, before=THINKING),
                                    event(402, before=THINKING)], ids=["cut", "429", "402"])
def test_thinking_is_spliced_to_another_keys_answer(here, path, script):
    here.fake.scripts = [script, stream(AGAIN)]
    answer = here.ask(path=path, stream=True)
    assert answer.status == 200 and here.served() == "ab"
    assert [request.field("x-session-id") for request in here.fake.requests] == [
        ccproxy.derive_session(key, "", "hi") for key in here.keys]
    text = answer.body.decode()
    assert "Other" not in text and "Hmm" in text
    if path == CHAT:
        assert fold_chat(answer.frames)[0] == {"content": "Done", "reasoning_content": "Hmm"}
        assert text.count('"role":"assistant"') == 1
    elif path == MESSAGES:
        assert [block.get("thinking") or block["text"] for block in
                fold_messages(answer.frames)["content"]] == ["Hmm", "Done"]
        assert text.count('"type":"message_start"') == 1
    else:
        assert text.count('"type":"response.created"') == 1
        assert answer.frames[-1]["type"] == "response.completed"


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("shown", [
    {"type": "text-delta", "id": "0", "text": "Half"},
    {"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": {}}],
    ids=["text", "tool call"])
def test_nothing_takes_over_once_something_was_shown(here, path, shown):
    here.fake.scripts = [event(429, before=ndjson({"type": "start"}, shown))]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tools = {CHAT: tool, MESSAGES: {"name": "f", "input_schema": {"type": "object"}},
             RESPONSES: {"type": "function", "name": "f", "parameters": {"type": "object"}}}
    answer = here.ask(path=path, stream=True, tools=[tools[path]])
    assert answer.status == 200 and here.served() == "a"
    assert "error" in answer.body.decode() and "Hello" not in answer.body.decode()
    assert here.reasons() == [COOL, None]       # but the next request knows


def test_a_plain_answer_that_was_cut_begins_anew(here):
    here.fake.scripts = [stream(text_answer("Half", reason="stop")[:-30], end=False)]
    answer = here.ask()
    assert here.served() == "ab"
    assert answer.json["choices"][0]["message"]["content"] == "Hello there"
    assert [entry["through_proxy"]["output_tokens"] for entry in here.usage()] == [0, 3]


def test_a_silent_upstream_is_not_asked_twice_but_its_key_rests(make_place):
    here = make_place(upstreamIdleSeconds=0.2)
    here.fake.scripts = [stall()]
    assert here.ask().status == 504 and here.served() == "a"
    assert here.reasons() == [COOL, None]
    assert here.ask().status == 200 and here.served() == "ab"


def test_nobody_listens(make_place):
    """Each key has its try, none is marked: it was no key's failure."""
    here = make_place(keys=3)
    here.fake.socket.shutdown(socket.SHUT_RDWR)
    here.fake.close()
    answer = here.ask()
    assert answer.status == 502 and "retry-after" not in answer.fields
    assert [entry["through_proxy"]["requests"] for entry in here.usage()] == [1, 1, 1]
    assert here.reasons() == [None] * 3


def test_an_upstream_that_no_connection_reaches_marks_no_key(make_place):
    """Nothing was sent: it was no key's failure, and once it is there again all is well."""
    with full_listener() as (host, port):
        here = make_place(apiBase="http://%s:%d" % (host, port), upstreamConnectSeconds=0.1,
                          accountTimeoutSeconds=0.1)
        assert here.ask().status == 504
        assert here.reasons() == [None, None]


@pytest.mark.parametrize("before", [b"", THINKING, ndjson({"type": "start"}, {
    "type": "text-delta", "id": "0", "text": "Half"})],
                         ids=["at the head", "thinking", "text"])
def test_a_client_that_leaves_counts_for_nothing(here, before):
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    here.fake.scripts = [stall(head + b"%x\r\n%b\r\n" % (len(before), before) if before else b"")]
    sock = here.start(stream=True)
    if before:
        read_until(sock, b"data: ")
    wait_until(lambda: here.served() == "a")
    sock.close()
    here.proxy.wait_quiet()
    entries = here.usage()
    assert [entry["through_proxy"]["failures"] for entry in entries] == [0, 0]
    assert [(entry["state"], entry["fit"], entry["in_flight"]) for entry in entries] == [
        ("usable", True, 0) if before else ("unknown", None, 0), ("unknown", None, 0)]
    assert here.ask().fields["x-ccproxy-key"] == ccproxy.key_name(here.keys[0])


# When no key is left.

@pytest.mark.parametrize("codes, status_shown", [
    ((401, 403), 403), ((403, 402), 402), ((402, 503), 503), ((503, 429), 429), ((429, 401), 429),
    ((401, 402, 403, 500, 429), 429), ((401, 401), 401), ((500, 403, 402), 502)])
def test_the_most_useful_error_is_told(here, codes, status_shown):
    here.renew(len(codes))
    here.fake.scripts = [fault(code, "number %d" % code) for code in codes]
    answer = here.ask()
    assert answer.status == status_shown
    assert here.served() == "abcdefgh"[:len(codes)]         # each once
    shown = {502: 500}.get(status_shown, status_shown)
    assert "number %d" % shown in answer.json["error"]["message"]


def test_the_earliest_end_is_the_retry_after(here):
    here.renew(3)
    here.fake.scripts = [fault(429, fields="retry-after: %d\r\n" % seconds)
                         for seconds in (500, 70, 900)]
    answer = here.ask()
    assert answer.status == 429 and int(answer.fields["retry-after"]) in (69, 70)
    again = here.ask(path=MESSAGES)                         # from memory
    assert again.status == 429 and int(again.fields["retry-after"]) in (69, 70)
    assert again.json["type"] == "error" and len(here.served()) == 3


@pytest.mark.parametrize("retry, wait", [("", 60), ("retry-after: 5\r\n", 5)])
def test_how_long_a_cooldown_lasts(make_place, monkeypatch, retry, wait):
    clock = FakeClock(monkeypatch)
    here = make_place()
    here.fake.scripts = [fault(503, fields=retry)] * 2
    answer = here.ask()
    assert (answer.status, answer.fields["retry-after"]) == (503, str(wait))
    clock.now += wait - 1
    assert here.ask().status == 503 and here.served() == "ab"
    clock.now += 2
    assert here.ask().status == 200 and len(here.served()) == 3


def test_refused_keys_name_no_time(here):
    here.fake.scripts = [fault(401), fault(401)]
    for _ in range(2):
        answer = here.ask()
        assert answer.status == 401 and "retry-after" not in answer.fields
    assert here.served() == "ab"


def test_a_key_that_is_fit_at_once_bounds_the_retry_after(make_place):
    here = make_place()

    def fall(sock, request):
        here.fake.socket.shutdown(socket.SHUT_RDWR)     # the second key finds nobody
        fault(429, fields="retry-after: 600\r\n")(sock, request)
    here.fake.scripts = [fall]
    answer = here.ask()
    assert answer.status == 429
    assert int(answer.fields.get("retry-after", 0)) <= 1


def test_a_stream_that_thought_ends_with_the_most_useful_error(here):
    here.fake.scripts = [event(429, "slow down", before=THINKING), fault(401)]
    answer = here.ask(path=MESSAGES, stream=True)
    assert answer.status == 200 and here.served() == "ab"
    assert answer.frames[-1]["type"] == "error"
    assert answer.frames[-1]["error"]["type"] == "rate_limit_error"


# Which key serves.

def test_a_conversation_stays_and_moves_once(make_place):
    here = make_place(routingPolicy="round_robin")
    assert [here.ask("one").status for _ in range(3)] == [200] * 3 and here.served() == "aaa"
    here.ask("two")
    here.ask("one", stream=True)
    here.ask("two")
    assert here.served() == "aaabab"
    here.fake.scripts = [fault(429, fields="retry-after: 0\r\n")]
    here.ask("one")
    assert here.served() == "aaabab" + "ab"
    for _ in range(3):          # the first key is fit again, but it moved
        here.ask("one")
    assert here.served()[-3:] == "bbb"
    sessions = {request.field("x-session-id") for request in here.fake.requests[-3:]}
    assert sessions == {ccproxy.derive_session(here.keys[1], "", "one")}


def test_four_at_once_on_a_key_while_another_is_free(make_place):
    here = make_place(routingPolicy="drain_first")
    here.ask("home")
    here.fake.default = stall()
    socks = []
    for number in range(10):
        socks.append(here.start("talk %d" % number))
        wait_until(lambda: len(here.served()) == number + 2)
    assert here.served() == "a" + "aaaa" + "bbbb" + "aa"        # a preference only
    for sock in socks[:2] + socks[-2:]:
        sock.close()
    wait_until(lambda: here.proxy.app.in_flight == 6)
    here.fake.default = stream(text_answer("x"))
    here.ask("home")
    assert here.served()[-1] == "a"
    for sock in socks:
        sock.close()


def test_a_busy_key_keeps_its_conversation(make_place):
    here = make_place(routingPolicy="drain_first", maxInFlightPerKey=1)
    here.ask("home")
    here.fake.scripts = [stall()]
    sock = here.start("other")
    wait_until(lambda: here.served() == "aa")
    here.ask("home")
    assert here.served() == "aab"
    sock.close()
    here.proxy.wait_quiet()
    here.ask("home")
    assert here.served() == "aaba"


ORDERS = [("drain_first", "aaaa"), ("round_robin", "abab"), (" Round_Robin ", "abab"),
          ("daily_burn_priority", "aaaa"), ("depletion_aware", "aaaa"),
          ("balance_priority", "aaaa")]


@pytest.mark.parametrize("policy, order", ORDERS)
def test_the_header_names_the_policy(here, policy, order):
    for number in range(4):
        answer = here.ask("talk %d" % number, fields={"x-ccproxy-routing": policy})
        assert answer.status == 200
    assert here.served() == order       # without figures: the fallback, here drain_first


@pytest.mark.parametrize("policy", ["best", "round-robin", "round_robin,drain_first", "0"])
def test_an_unknown_policy_is_a_400(here, policy):
    fields = {"x-ccproxy-routing": policy}
    for path in (CHAT, MESSAGES):
        answer = here.ask(path=path, fields=fields)
        assert answer.status == 400 and "drain_first" in answer.json["error"]["message"]
    assert here.ask(ring=here.keys[0], fields=fields).status == 400
    assert here.ask(fields={**fields, "x-ccproxy-dry-run": "1"}).status == 400
    assert here.proxy.request("GET", "/v1/usage", None, {
        **fields, "authorization": "Bearer " + here.ring}, None).status == 400
    assert here.served() == ""


LEFT_OUT = "left_out=Authorization, entry 3: not a Command Code key"


def test_what_is_no_key_in_a_ring_is_noted_and_goes_nowhere(here):
    """In every answer, in the log, and under x-ccproxy-strict as a refusal."""
    fields = {"authorization": "Bearer %s,sk-%s" % (here.ring, SECRET)}
    hi = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    requests = [("POST", path, {**hi, "stream": streamed}) for path in (CHAT, MESSAGES)
                for streamed in (True, False)]
    requests += [("POST", RESPONSES, {"input": "hi"}), ("POST", "/explain" + CHAT, hi),
                 ("POST", MESSAGES + "/count_tokens", hi),
                 ("POST", RESPONSES + "/input_tokens", {"input": "hi"}),
                 ("GET", "/v1/usage", None), ("GET", "/v1/usage?format=text", None)]
    for method, path, body in requests:
        answer = here.proxy.request(method, path, body, fields, None)
        assert (answer.status, answer.fields["x-ccproxy-notes"]) == (200, LEFT_OUT), path
        assert SECRET not in repr(answer).replace("user_" + SECRET, "")
    refused = here.proxy.request("POST", CHAT, {"messages": 1}, fields, None)
    assert (refused.status, refused.fields["x-ccproxy-notes"]) == (400, LEFT_OUT)
    strict = here.proxy.request("POST", CHAT, hi, {**fields, "x-ccproxy-strict": "1"}, None)
    assert strict.status == 400 and LEFT_OUT in strict.json["error"]["message"]
    assert len(here.fake.requests) == 5
    for request in here.fake.requests + here.fake.side_requests:
        assert "sk-" not in request.field("authorization") + repr(request.body)
    here.proxy.wait_quiet()
    assert here.proxy.log.getvalue().count(LEFT_OUT) >= 7


def test_a_ring_in_every_header(here):
    a, b = here.keys
    named = "work=%s;weight=2, home=%s" % (a, b)
    here.fake.default = fault(401)
    for fields in ({"x-api-key": named}, {"authorization": "Bearer sk-x", "x-api-key": named},
                   {"authorization": "bearer " + named}):
        here.fake.requests.clear()
        here.proxy.app.keys.states.clear()
        here.proxy.app.keys.conversations.clear()
        assert here.proxy.post(CHAT, fields, None).status == 401
        assert here.served() == "ab"
    here.proxy.app.keys.states.clear()
    here.proxy.app.keys.conversations.clear()
    here.fake.requests.clear()
    with here.proxy.connect() as sock:
        sock.sendall(post_bytes(CHAT, {"messages": [{"role": "user", "content": "x"}]}, {
            "connection": "close", "authorization": "Bearer %s\r\nauthorization: Bearer %s"
            % (a, b)}, None))
        assert parse_answers(read_all(sock))[0].status == 401
    assert here.served() == "ab"       # two headers are one list


# A single key keeps its own rules.

def test_a_single_key_has_its_own_retries(here):
    key = here.keys[0]
    here.fake.scripts = [fault(503), reset()]
    answer = here.ask(ring=key)
    assert answer.status == 200 and here.served() == "aaa"
    assert answer.fields["x-ccproxy-key"] == ccproxy.key_name(key)
    assert len({request.field("x-session-id") for request in here.fake.requests}) == 1
    assert here.asked() == 0                    # nobody asks for its account


@pytest.mark.parametrize("code, tries", [(503, 3), (429, 3), (401, 1), (402, 1), (403, 1)])
@pytest.mark.parametrize("form", ["%s", "work=%s;weight=2", "%s,%s"])
def test_a_single_key_is_never_refused_from_memory(here, code, tries, form):
    key = here.keys[0]
    ring = form % ((key,) * form.count("%s"))
    here.fake.scripts = [fault(code)] * tries
    assert here.ask(ring=ring).status == code and here.served() == "a" * tries
    assert here.ask(ring=ring).status == 200


def test_a_single_key_at_its_limit(make_place):
    here = make_place(maxInFlightPerKey=1)
    here.fake.scripts = [stall()]
    sock = here.start(ring=here.keys[0])
    wait_until(lambda: here.served() == "a")
    answer = here.ask("other", ring=here.keys[0])
    assert (answer.status, answer.fields["retry-after"]) == (429, "1")
    assert here.ask("other", ring=here.keys[1]).status == 200
    sock.close()
    here.proxy.wait_quiet()
    assert here.ask("other", ring=here.keys[0]).status == 200
    assert [entry["in_flight"] for entry in here.usage()] == [0, 0]


# What an answer tells.

def paid(text, cost=None, **usage):
    data = text_answer(text, **usage)
    return stream(data + (ndjson({"type": "provider-metadata", "providerMetadata": {
        "gateway": {"cost": cost}}}) if cost is not None else b""))


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("cost", [None, "0.00123"])
@pytest.mark.parametrize("cached", [None, 0, 5])
def test_cost_and_cached_tokens(here, path, cost, cached):
    here.fake.default = paid("x", cost, **({} if cached is None else {"cachedInputTokens": cached}))
    answer = here.ask(path=path)
    assert answer.fields.get("x-ccproxy-cost-usd") == cost
    assert answer.fields.get("x-ccproxy-cached-tokens") == (None if cached is None
                                                            else str(cached))
    here.ask(path=path, stream=True)
    here.proxy.wait_quiet()
    wait_until(lambda: here.usage()[0]["through_proxy"]["input_tokens"] == 14)
    through = here.usage()[0]["through_proxy"]
    assert through["requests"] == 2 and through["output_tokens"] == 6
    assert through["cached_tokens"] == 2 * (cached or 0)
    assert through["cost_usd"] == pytest.approx(2 * float(cost or 0))


@pytest.mark.parametrize("cost", ["1\r\nevil: 1", "", "x", -1, True, [], {"a": 1}, "9" * 5000,
                                  "nan", "\u0663", 1e400])
def test_a_cost_that_is_none(here, cost):
    here.fake.default = paid("x", cost)
    answer = here.ask()
    assert answer.status == 200 and "evil" not in answer.fields
    assert len(answer.fields.get("x-ccproxy-cost-usd", "")) <= 100
    assert here.usage()[0]["through_proxy"]["cost_usd"] >= 0


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def test_a_repaired_answer_costs_both_calls(here):
    here.fake.scripts = [paid("no", "0.5"), paid('{"a": 1}', "0.25")]
    answer = here.ask(response_format=FORMAT)
    assert answer.json["choices"][0]["message"]["content"] == '{"a": 1}'
    assert here.served() == "aa" and answer.json["usage"]["prompt_tokens"] == 14
    assert float(answer.fields["x-ccproxy-cost-usd"]) == 0.75
    through = here.usage()[0]["through_proxy"]
    assert (through["cost_usd"], through["input_tokens"]) == (0.75, 14)


def test_a_repaired_answer_stays_with_the_key_that_served(here):
    here.fake.scripts = [fault(429), paid("no"), paid('{"a": 1}')]
    answer = here.ask(response_format=FORMAT)
    assert here.served() == "abb" and "json_repaired" in answer.fields["x-ccproxy-notes"]
    assert len({request.json["threadId"] for request in here.fake.requests[1:]}) == 1
    assert answer.fields["x-ccproxy-key"] == ccproxy.key_name(here.keys[1])


# Account figures.

def slow_account(sock, request):
    time.sleep(0.1)
    status(200, {}, "connection: close\r\n")(sock, request)


def test_one_refresh_at_a_time_for_each_key(make_place):
    here = make_place()
    here.fake.side_script = slow_account
    threads = [threading.Thread(target=here.ask, args=("talk %d" % number,))
               for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: not here.proxy.app.refreshes)
    assert [here.asked(key) for key in here.keys] == [1, 1]


def test_accounts_are_asked_again_when_their_figures_are_old(make_place, monkeypatch):
    clock = FakeClock(monkeypatch)
    here = make_place(accountRefreshSeconds=100)
    for later, count in ((0, 1), (99, 1), (2, 2), (50, 2), (51, 3)):
        clock.now += later
        here.ask()
        wait_until(lambda: not here.proxy.app.refreshes)
        assert [here.asked(key) for key in here.keys] == [count, count]


def test_a_hanging_account_service_costs_a_moment_each(make_place):
    here = make_place(keys=8, accountTimeoutSeconds=0.5)
    here.fake.side_script = stall()
    began = time.monotonic()
    assert here.ask().status == 200
    assert time.monotonic() - began < 0.8
    wait_until(lambda: not here.proxy.app.refreshes)
    began = time.monotonic()
    assert [here.ask().status for _ in range(5)] == [200] * 5       # asked in vain just now
    assert time.monotonic() - began < 0.5
    assert here.asked() == 8 and here.served() == "a" * 6


LIES = {
    "negative": {"credits": {"monthlyCredits": -5, "freeCredits": -1}},
    "words": {"credits": {"monthlyCredits": "much", "freeCredits": [], "purchasedCredits": {}}},
    "huge": {"credits": {"monthlyCredits": 10 ** 400, "freeCredits": 1e308}},
    "shapes": {"credits": [], "windowLimits": 5}, "data": {"data": [1]}, "list": [[[]]],
    "null": None, "far reset": {"windowLimits": {"fiveHour": {
        "used": 1, "cap": 5, "resetAt": 1e300}, "weekly": {"cap": "x"}}},
    "plan": {"data": {"planId": {"a": 1}, "status": "x" * 9999, "currentPeriodEnd": "9999-99-99"}},
    "period": {"credits": {"monthlyCredits": 5}, "data": {"currentPeriodEnd": 1e300}}}


@pytest.mark.parametrize("name", LIES)
def test_accounts_that_lie_harm_nothing(here, name):
    body = json.dumps(LIES[name]).encode()
    here.fake.side_script = raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b"
                                % (len(body), body))
    try:
        assert [here.ask(str(number)).status for number in range(3)] == [200] * 3
        assert here.reasons() == [None, None]
        text = here.proxy.request("GET", "/v1/usage?format=text", None, {
            "authorization": "Bearer " + here.ring}, None).body.decode()
        assert len(text.splitlines()) == 3
    finally:
        here.fake.side_script = NO_ACCOUNT


REFUSED = status(401, {})


@pytest.mark.parametrize("script", [
    REFUSED, status(402, {}), status(429, {}, "retry-after: 900\r\n"), status(403, {}),
    reset(), raw(b"garbage\r\n\r\n", close=True), status(200, b"x" * 100000),
    status(302, b"", "location: http://elsewhere.example/\r\n")])
def test_what_the_account_service_refuses_marks_no_key(here, script):
    """No key is passed over for it.  That one is refused is shown, unless it was answered."""
    here.fake.side_script = script
    try:
        assert here.ask().status == 200
        assert here.reasons() == [None, None] and here.served() == "a"
        assert all(entry["account"] is None for entry in here.usage())
        denied = "refused" if script is REFUSED else "unknown"
        assert [entry["state"] for entry in here.usage()] == ["usable", denied]
        assert here.ask("x", ring=",".join(reversed(here.keys))).status == 200
        assert here.served() == "ab"
        assert [entry["state"] for entry in here.usage()] == ["usable", "usable"]
    finally:
        here.fake.side_script = NO_ACCOUNT


def test_the_figures_pass_a_key_over(make_place):
    """A used-up window, and no credit while another has some; a single key is asked regardless."""
    here = make_place(keys=3)
    reset_at = time.time() + 1000

    def tell(sock, request):
        letter = "abc"[here.keys.index(request.field("authorization")[7:])]
        body = {"credits": {"monthlyCredits": 0 if letter == "a" else 5},
                "windowLimits": {"limited": True, "fiveHour": {
                    "used": 3, "cap": 3, "exceeded": letter == "b", "resetAt": reset_at * 1000}}
                if letter == "b" else {}}
        status(200, body)(sock, request)
    here.fake.side_script = tell
    for number in range(3):
        here.ask(str(number))
    assert here.served() == "ccc"
    assert here.reasons() == [None, "it is over its usage window", None]
    assert here.ask(ring=here.keys[1]).status == 200
    answer = here.ask(ring="%s,%s" % (here.keys[1], here.keys[1]))
    assert answer.status == 200
    here.fake.scripts = [fault(429, fields="retry-after: 2000\r\n")]
    here.ask("x", ring="%s,%s" % (here.keys[2], here.keys[1]))
    answer = here.ask("x", ring="%s,%s" % (here.keys[1], here.keys[2]))
    assert answer.status == 429 and 990 <= int(answer.fields["retry-after"]) <= 1000


# Callers apart, and everything bounded.

def test_overlapping_rings_see_their_own_keys_alone(here):
    here.renew(3)
    a, b, c = here.keys
    here.fake.scripts = [fault(429, "about the first caller: SECRETWORD")]
    here.ask("private words", ring="mine=%s,%s" % (b, a))
    for ring, hidden in (("%s,theirs=%s" % (b, c), a), ("mine=%s,%s" % (b, a), c)):
        for query in ("", "?format=text"):
            said = here.proxy.request("GET", "/v1/usage" + query, None, {
                "authorization": "Bearer " + ring}, None).body.decode()
            assert ccproxy.key_name(b) in said and ccproxy.key_name(hidden) not in said
            assert ("mine" in said) == ("mine" in ring)
            assert "private" not in said and "SECRETWORD" not in said
    answer = here.ask("private words", ring="%s,%s" % (c, b))   # a conversation of its own
    assert answer.fields["x-ccproxy-key"] == ccproxy.key_name(c)
    here.fake.scripts = [fault(401)]
    answer = here.ask("more", ring="%s,%s" % (c, b))
    assert "SECRETWORD" not in answer.body.decode()


def test_ten_thousand_keys_leave_bounded_tables(make_place):
    here = make_place()
    here.fake.side_script = stall()         # so that few accounts are asked for
    app = here.proxy.app
    for number in range(316):
        ring = ",".join("user_%d_%d%s" % (number, one, SECRET) for one in range(32))
        assert here.proxy.post(CHAT, {"authorization": "Bearer " + ring}, None).status == 200
    assert len(app.keys.states) <= ccproxy.MAX_KEYS
    assert len(app.keys.conversations) <= 316 and len(app.keys.turns) <= 316
    assert len(app.refreshes) <= ccproxy.MAX_REFRESHES
    assert here.asked() <= 64
    answer = here.proxy.post(CHAT, {"authorization": "Bearer " + ",".join(
        "user_%d" % one for one in range(33))}, None)
    assert answer.status == 400
    assert here.usage()[0]["through_proxy"]["requests"] == 0


# /v1/usage.

def test_usage_needs_a_key_of_ones_own(here):
    for fields in ({}, {"authorization": "Bearer sk-x"}):
        assert here.proxy.request("GET", "/v1/usage", None, fields, None).status == 401
    fields = {"authorization": "Bearer " + here.ring}
    assert here.proxy.request("POST", "/v1/usage", {}, fields, None).status == 405
    head = here.proxy.request("HEAD", "/v1/usage", None, fields, None)
    assert head.status == 200 and head.body == b""
    bad = here.proxy.request("GET", "/v1/usage", None, {
        "authorization": "Bearer %s;nonsense" % here.ring}, None)
    assert bad.status == 400


@pytest.mark.parametrize("whoami, script, state, fit, words", [
    # what /alpha/whoami and a request are answered with: how the key is shown
    (401, None, "refused", False, ["refused"]), (404, None, "unknown", None, ["unknown"]),
    (200, None, "usable", True, ["usable"]), (401, 200, "refused", False, ["refused"]),
    (404, 200, "usable", True, ["usable"]), (404, fault(401), "refused", False, ["refused"]),
    (404, event(401), "refused", False, ["refused"]), (404, fault(400), "unknown", None, ["unknown"]),
    (404, fault(429, fields="retry-after: 9\r\n"), "skipped", False, [
        "skipped:", "it", "is", "in", "cooldown", "until"]),
    (404, fault(403, code="MODEL_NOT_IN_PLAN"), "usable", True, ["usable"])])
def test_how_a_key_is_shown(here, whoami, script, state, fit, words):
    here.fake.side_script = status(whoami, {}, "connection: close\r\n")
    key = here.keys[0]
    try:
        if script is not None:
            here.fake.scripts = [] if script == 200 else [script]
            here.ask(ring=key)
        (entry,) = here.usage(key)
        text = here.proxy.request("GET", "/v1/usage?format=text", None, {"x-api-key": key},
                                  None).body.decode()
    finally:
        here.fake.side_script = NO_ACCOUNT
    assert (entry["state"], entry["fit"]) == (state, fit)
    assert " ".join(words) in text.splitlines()[1] and "fit" not in text.lower()
    logged = "INFO %s was refused by the upstream (401)" % ccproxy.key_name(key)
    assert here.proxy.log.getvalue().count(logged) == (whoami == 401 or state == "refused")


def test_usage_tells_all(here):
    here.fake.side_script = lambda sock, request: status(200, {
        "credits": {"monthlyCredits": 6.5, "freeCredits": 1, "purchasedCredits": "2.25"},
        "windowLimits": {"fiveHour": {"used": 1, "cap": 3, "resetAt": "2099-01-01T00:00:00Z"},
                         "weekly": {"used": 2, "cap": 9}},
        "data": {"planId": "individual-pro", "status": "active",
                 "currentPeriodEnd": time.time() + 86400}})(sock, request)
    try:
        entry = here.usage("work=%s;weight=2,%s" % tuple(here.keys))[0]
    finally:
        here.fake.side_script = NO_ACCOUNT
    account = entry["account"]
    assert (entry["key"], entry["name"], entry["weight"]) == (
        ccproxy.key_name(here.keys[0]), "work", 2)
    assert account["plan"] == "individual-pro" and account["days_left"] == 1.0
    assert account["credits_usd"] == {"monthly": 6.5, "free": 1, "purchased": 2.25,
                                      "expiring": 7.5, "balance": 9.75}
    assert account["burn_usd_per_day"] == pytest.approx(7.5, 0.01)
    assert account["windows"]["weekly"] == {"used_usd": 2, "cap_usd": 9, "exceeded": False,
                                            "resets_at": None}
    text = here.proxy.request("GET", "/v1/usage?format=text", None, {
        "authorization": "Bearer work=%s,%s" % tuple(here.keys)}, None)
    assert text.fields["content-type"].startswith("text/plain")
    lines = text.body.decode().splitlines()
    assert len(lines) == 3 and "individual-pro" in lines[1] and "6.50" in lines[1]
    assert "1.00/3.00" in lines[1] and lines[1].split()[1] == "work"


def test_usage_of_a_large_ring_has_every_account(here):
    keys = ["user_%d_%d" % (next(COUNT), number) for number in range(32)]
    here.fake.side_script = lambda sock, request: status(200, {
        "credits": {"monthlyCredits": 6.5}})(sock, request)
    try:
        entries = here.usage(",".join(keys))
    finally:
        here.fake.side_script = NO_ACCOUNT
    assert [entry["account"] is None for entry in entries] == [False] * 32


# Limits of rate and number.

@pytest.mark.parametrize("given, seconds", [
    (60, 60), ("1 minute", 60), ("30s", 30), ("2 hours", 7200), ("5000 ms", 5), ("90", 90)])
def test_a_rate_window(make_place, monkeypatch, given, seconds):
    clock = FakeClock(monkeypatch)
    here = make_place(rateLimitMax=2, rateLimitWindow=given)
    assert [here.ask().status for _ in range(2)] == [200, 200]
    clock.now += 1
    answer = here.ask()
    assert (answer.status, answer.fields["retry-after"]) == (429, str(seconds - 1))
    assert here.ask(ring=here.keys[0]).status == 429        # the ring's first key is the caller
    assert here.ask(ring=here.keys[1]).status == 200
    assert len(here.usage()) == 2                           # a GET counts for nothing
    assert len(here.served()) == 3
    clock.now += seconds
    assert here.ask().status == 200


def test_the_cap_on_all_requests(make_place):
    here = make_place(maxTotalInFlight=2)
    here.fake.scripts = [stall(), stall()]
    socks = [here.start(str(number)) for number in range(2)]
    wait_until(lambda: len(here.served()) == 2)
    answer = here.ask("x")
    assert (answer.status, answer.fields["retry-after"]) == (503, "1")
    assert here.proxy.request("GET", "/health").status == 200
    socks[0].close()
    wait_until(lambda: here.proxy.app.in_flight == 1)
    assert here.ask("x").status == 200
    socks[1].close()


def test_the_cap_holds_for_bodies_that_come_later(make_place):
    here = make_place(maxTotalInFlight=1)
    here.fake.default = stall()
    data = post_bytes(CHAT, {"messages": [{"role": "user", "content": "hi"}]}, None, here.keys[0])
    socks = [here.proxy.connect() for _ in range(4)]
    for sock in socks:
        sock.sendall(data[:-5])
    wait_until(lambda: here.proxy.app.in_flight == 1 and len(here.proxy.app.exchanges) == 1)
    for sock in socks:
        sock.sendall(data[-5:])
    time.sleep(0.3)
    count = len(here.served())
    for sock in socks:
        sock.close()
    assert count == 1


# No key anywhere.

def test_rings_are_in_nothing_that_is_said(here):
    """ask() and usage() look at answers, close() at the log (debug level)."""
    a, b = here.keys
    named = "work=%s,home=%s" % (a, b)
    here.fake.scripts = [fault(429, "key %s is slow" % a, code=a),
                         fault(402, "key %s is broke, so is %s" % (b, a))]
    assert here.ask(ring=named).status == 429
    for ring in (named, "work=%s,work=%s" % (a, b), "%s=%s,%s" % (a, a, b), "%s,%s;weight=0"
                 % (a, b), "%s,%s;%s" % (a, b, a), "%s,sk-%s,%s" % (a, SECRET, b)):
        for fields in ({}, {"x-ccproxy-dry-run": "1"}, {"x-ccproxy-strict": "1"},
                       {"x-ccproxy-routing": a}):
            here.ask(ring=ring, fields=fields)
    dry = here.ask(ring=named, path="/explain" + CHAT)
    assert dry.status == 200 and dry.json["headers"]["authorization"] == \
        "Bearer " + ccproxy.key_name(a)
    text = here.proxy.request("GET", "/v1/usage?format=text&key=" + a, None, {
        "x-api-key": named}, None)
    assert text.status == 200 and SECRET not in repr(text)
    here.proxy.wait_quiet()
    assert SECRET not in here.proxy.log.getvalue()
