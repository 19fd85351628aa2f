"""Vendors' own APIs beside Command Code: which ids name them, who may use their keys, what is sent
and what comes back, in every API over both formats."""
from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import pytest
from fake_provider import say_in
from fake_upstream import FakeUpstream, ndjson, status, stream, text_answer
from harness import CHAT, MESSAGES, Proxy, call_program, ccproxy, make_config, wait_until

RESPONSES = "/v1/responses"

KEY = "sk-vendor-0123456789abcdef"
OWN = "user_" + "c" * 20
CLIENT = "the-team-passes-this"
PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}
FORMATS = {"openai": "openai", "anthropic": "anthropic", "moonshot": "openai", "zai": "openai",
           "mine": "openai", "mine-too": "anthropic"}
JSON = {"content-type": "application/json"}


def turn_on(proxy, environment=None):
    proxy.app.vendors = ccproxy.vendor_backends(
        ccproxy.vendors_on(proxy.app.config, environment or {}))


class Place:
    """A proxy with every vendor on, and what stands in for the vendors and for Command Code."""

    def __init__(self, **options):
        self.vendor, self.home = FakeUpstream(), FakeUpstream()
        base = self.vendor.base + "/v1"
        mine = {name: {"base": base, "format": FORMATS[name], "keyEnv": "MINE",
                       "models": ["small", "org/large:free"]} for name in ("mine", "mine-too")}
        self.proxy = Proxy(**{
            "apiBase": self.home.base, "backends": list(FORMATS), "vendors": mine,
            "vendorBases": {name: base for name in ccproxy.VENDORS},
            **{name + "Key": KEY for name in ccproxy.VENDORS}, "useProviderModels": False,
            **options})
        turn_on(self.proxy, {"MINE": KEY})
        self.proxy.app.operator = ccproxy.Operator(client_key=self.proxy.app.config.client_key)

    def say(self, api, *lines):
        self.vendor.default = stream(say_in(api, ndjson(*lines) if lines else text_answer(
            "Hello", " there")))

    def ask(self, path, model, key=None, fields=None, **body):
        if path == RESPONSES:
            body.setdefault("input", "hi")
            return self.proxy.request("POST", path, {"model": model, **body},
                                      {**JSON, **(fields or {})}, key)
        return self.proxy.post(path, {**JSON, **(fields or {})}, key, model=model, **body)

    def sent(self):
        return self.vendor.requests[-1]

    def close(self):
        self.proxy.close()
        self.vendor.close()
        self.home.close()
        log = self.proxy.log.getvalue()
        assert KEY not in log and "Traceback" not in log, log


@contextlib.contextmanager
def demo_proxy():
    proxy = Proxy(backends=["openai"], openaiKey=KEY)
    try:
        turn_on(proxy)
        asyncio.run_coroutine_threadsafe(ccproxy.start_demo(proxy.app), proxy.loop).result(5)
        yield proxy
    finally:
        proxy.close()


@pytest.fixture
def place(request):
    made = Place(**getattr(request, "param", {}))
    yield made
    made.close()


def said(path, answer):
    body = json.loads(answer.body)
    if path == CHAT:
        return body["choices"][0]["message"]["content"], body["model"]
    if path == MESSAGES:
        return body["content"][0]["text"], body["model"]
    return body["output"][0]["content"][0]["text"], body["model"]


# Requests and answers.

@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("vendor", FORMATS)
def test_every_api_over_every_vendor(place, vendor, path):
    api = FORMATS[vendor]
    place.say(api)
    answer = place.ask(path, vendor + "/some-model", OWN)
    assert answer.status == 200, answer.body
    assert said(path, answer) == ("Hello there", vendor + "/some-model")
    request = place.sent()
    assert request.line == "POST %s HTTP/1.1" % PATHS[api]
    assert json.loads(request.body)["model"] == "some-model"
    fields = dict(request.fields)
    assert (fields.get("x-api-key"), fields.get("authorization")) == (
        (KEY, None) if api == "anthropic" else (None, "Bearer " + KEY))
    assert OWN not in str(request)          # a caller's key goes to nobody but Command Code
    assert not any(name.startswith(("x-session", "x-command", "x-cli", "x-project"))
                   for name in fields)
    assert place.home.requests == []
    streamed = place.ask(path, vendor + "/some-model", OWN, stream=True)
    assert streamed.status == 200 and b"Hello" in streamed.body and b" there" in streamed.body


CALL = ({"type": "tool-input-start", "id": "c1", "toolName": "look"},
        {"type": "tool-input-delta", "id": "c1", "delta": '{"at": "x"}'},
        {"type": "tool-input-end", "id": "c1"},
        {"type": "tool-call", "toolCallId": "c1", "toolName": "look", "input": {"at": "x"}},
        {"type": "finish", "finishReason": "tool-calls",
         "totalUsage": {"inputTokens": 12, "outputTokens": 3}})
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOLS = {CHAT: [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}],
         MESSAGES: [{"name": "look", "input_schema": SCHEMA}],
         RESPONSES: [{"type": "function", "name": "look", "parameters": SCHEMA}]}


def history(path, answer):
    """The next turn's body: the call that was made, and its result."""
    body = json.loads(answer.body)
    user = {"role": "user", "content": "hi"}
    if path == CHAT:
        message = body["choices"][0]["message"]
        return {"messages": [user, message, {
            "role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "found"}]}
    if path == MESSAGES:
        call = body["content"][-1]
        return {"messages": [user, {"role": "assistant", "content": body["content"]}, {
            "role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"],
                                         "content": "found"}]}]}
    call = body["output"][-1]
    return {"input": [user, call, {"type": "function_call_output", "call_id": call["call_id"],
                                   "output": "found"}]}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("vendor", ["openai", "anthropic"])
def test_a_tool_loop(place, vendor, path):
    place.say(vendor, *CALL)
    first = place.ask(path, vendor + "/m", tools=TOOLS[path])
    assert first.status == 200, first.body
    offered = json.loads(place.sent().body)["tools"][0]
    assert offered.get("function", offered)["name"] == "look"
    place.say(vendor)
    second = place.ask(path, vendor + "/m", tools=TOOLS[path], **history(path, first))
    assert said(path, second)[0] == "Hello there"
    sent = place.sent().body.decode()
    assert '"found"' in sent and "look" in sent and '"c1"' in sent


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_usage_and_pictures_arrive(place, path):
    place.say("openai", {"type": "text-delta", "id": "0", "text": "ok"}, {
        "type": "finish", "finishReason": "stop",
        "totalUsage": {"inputTokens": 12, "outputTokens": 3}})
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    answer = place.ask(path, "openai/gpt-5", messages=[
        {"role": "user", "content": [{"type": "text", "text": "see"}, picture]}])
    usage = json.loads(answer.body)["usage"]
    assert (usage.get("prompt_tokens", usage.get("input_tokens")),
            usage.get("completion_tokens", usage.get("output_tokens"))) == (12, 3)
    assert "iVBORw0KGgo=" in place.sent().body.decode()


def test_a_fifth_vendor_is_one_row():
    fake = FakeUpstream()
    row = {"base": fake.base + "/v9", "format": "openai", "key": KEY}
    proxy = Proxy(apiBase=fake.base, useProviderModels=False, backends=["fifth"],
                  vendors={"fifth": row})
    turn_on(proxy)
    try:
        fake.default = stream(say_in("openai", text_answer("Hello")))
        for path in (CHAT, MESSAGES, RESPONSES):
            body = {"input": "hi"} if path == RESPONSES else {
                "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000}
            answer = proxy.request("POST", path, {"model": "fifth/m", **body}, JSON, None)
            assert said(path, answer) == ("Hello", "fifth/m")
        assert [request.line for request in fake.requests] == [
            "POST /v9/chat/completions HTTP/1.1"] * 3
    finally:
        proxy.close()
        fake.close()


# Which ids name a backend.

ON = ("openai", "mine")


@pytest.mark.parametrize("name, found", [
    ("openai/gpt-5", ("openai", "gpt-5")), ("OpenAI/gpt-5", ("openai", "gpt-5")),
    ("bridge/openai/gpt-5", ("openai", "gpt-5")), ("Bridge/OPENAI/GPT-5", ("openai", "GPT-5")),
    ("mine/org/large:free", ("mine", "org/large:free")), ("mine/a[1m]~x@b+c", ("mine",
                                                                               "a[1m]~x@b+c")),
    ("anthropic/claude-sonnet-4.6", ("", "anthropic/claude-sonnet-4.6")),     # off
    ("gpt-5", ("", "gpt-5")), ("openai-x/gpt-5", ("", "openai-x/gpt-5")),
    ("commandcode/openai/gpt-5", ("", "openai/gpt-5")), ("bridge/commandcode/gpt-5", ("", "gpt-5")),
    ("", ("", ""))])
def test_which_ids_name_a_backend(name, found):
    assert ccproxy.split_backend(name, ON) == found


@pytest.mark.parametrize("name, code, words", [
    ("openai", 400, "model"), ("openai/", 400, "model"), ("bridge/openai", 400, "model"),
    ("openai/--flag", 400, "model"), ("openai/a b", 400, "model"),
    ("openai/" + "a" * 201, 400, "200"), ("openai/a\nb", 400, "model"),
    ("bridge/anthropic/claude", 404, "backends"), ("bridge/", 404, "backends")])
def test_ids_that_cannot_be(name, code, words):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.split_backend(name, ON)
    assert (caught.value.status, caught.value.param) == (code, "model")
    assert words in caught.value.message


def test_one_that_is_off_goes_the_ordinary_way(place):
    del place.proxy.app.vendors["openai"]
    answer = place.ask(CHAT, "openai/gpt-5", OWN)
    assert answer.status == 200 and place.vendor.requests == []
    assert len(place.home.requests) == 1
    refused = place.ask(CHAT, "bridge/openai/gpt-5", OWN)
    assert refused.status == 404
    assert json.loads(refused.body)["error"]["code"] == "model_not_found"


def test_commandcode_is_named_explicitly(place):
    for vendors in (place.proxy.app.vendors, {}):
        place.proxy.app.vendors = vendors
        for name in ("commandcode/deepseek/deepseek-v4-flash",
                     "Bridge/CommandCode/deepseek-v4-flash"):
            answer = place.ask(CHAT, name, OWN)
            assert answer.status == 200, answer.body
            sent = json.loads(place.home.requests[-1].body)
            assert sent["params"]["model"] == "deepseek/deepseek-v4-flash"
    assert place.ask(CHAT, "bridge/openai/gpt-5", OWN).status == 404


@pytest.mark.parametrize("place", [{"modelAliases": {"best": "mine/small"},
                                    "allowedModels": ["best", "openai/gpt-5"]}], indirect=True)
def test_aliases_and_allowed_models(place):
    place.say("openai")
    assert said(CHAT, place.ask(CHAT, "best")) == ("Hello there", "best")
    assert json.loads(place.sent().body)["model"] == "small"
    assert place.ask(CHAT, "openai/gpt-5").status == 200
    assert place.ask(CHAT, "openai/gpt-4").status == 404
    listed = json.loads(place.proxy.request("GET", "/v1/models").body)["data"]
    assert "mine/small" in {one["id"] for one in listed}        # as best
    assert not {one["id"] for one in listed} & {"mine-too/small", "mine/org/large:free"}


@pytest.mark.parametrize("place", [{"allowedModels": [
    "bridge/Mine/small", "OpenAI/GPT-5", "only"], "modelAliases": {"only": "bridge/zai/glm"}}],
    indirect=True)
def test_allowed_models_in_any_spelling(place):
    place.say("openai")
    for name in ("mine/small", "bridge/MINE/small", "openai/gpt-5", "only", "zai/glm"):
        assert place.ask(CHAT, name).status == 200, name
    for name in ("mine/large", "zai/other", "moonshot/small"):
        assert place.ask(CHAT, name).status == 404, name


@pytest.mark.parametrize("place", [{"models": [{"id": "mine/small", "enabled": False}]}],
                         indirect=True)
def test_models_switched_off(place):
    place.say("openai")
    assert place.ask(CHAT, "mine/small").status == 404
    assert place.ask(CHAT, "mine-too/small").status != 404
    listed = json.loads(place.proxy.request("GET", "/v1/models").body)["data"]
    assert "mine/small" not in {one["id"] for one in listed}


@pytest.mark.parametrize("place", [{"defaultModel": "mine/small"}], indirect=True)
def test_a_default_model_of_a_vendor(place):
    place.say("openai")
    for model in ("default", None, ""):
        assert place.ask(CHAT, model).status == 200
        assert json.loads(place.sent().body)["model"] == "small"
    assert place.home.requests == []


@pytest.mark.parametrize("place", [{"modelAliases": {
    "openai/gpt-5.4": "zai/glm", "best": "commandcode/openai/gpt-5.4"}}], indirect=True)
def test_commandcode_ids_are_no_aliases(place):
    for vendors in (place.proxy.app.vendors, {}):
        place.proxy.app.vendors = vendors
        for name in ("commandcode/openai/gpt-5.4", "bridge/commandcode/openai/gpt-5.4", "best"):
            assert place.ask(CHAT, name, OWN).status == 200, name
            sent = json.loads(place.home.requests[-1].body)
            assert sent["params"]["model"] == "gpt-5.4"


@pytest.mark.parametrize("place", [{"modelAliases": {"best": "bridge/kimi/deepseek-v4-flash"}}],
                         indirect=True)
def test_an_alias_that_leads_to_one_that_is_off(place):
    for vendors in (place.proxy.app.vendors, {}):
        place.proxy.app.vendors = vendors
        answer = place.ask(CHAT, "best", OWN)
        assert answer.status == 404 and "backends" in json.loads(answer.body)["error"]["message"]
    assert place.home.requests == []


@pytest.mark.parametrize("asked", [None, 100])
def test_a_limit_that_none_asked_for_is_sent_where_it_must_be(place, asked):
    limit = {} if asked is None else {"max_tokens": asked}
    for vendor, default in (("openai", None), ("anthropic", 64000)):
        place.say(FORMATS[vendor])
        assert place.ask(CHAT, vendor + "/gpt-4o", **limit).status == 200
        assert json.loads(place.sent().body).get("max_tokens") == (asked or default)


def test_the_upstream_header_is_read_as_ever(place):
    place.say("openai")
    for word, status_code in (("provider", 200), ("nonsense", 400)):
        answer = place.ask(CHAT, "openai/m", None, {"x-ccproxy-upstream": word})
        assert answer.status == status_code


# Who may.

@pytest.mark.parametrize("place", [{"clientKey": CLIENT}], indirect=True)
def test_with_a_client_key_it_must_be_presented(place):
    place.say("openai")
    assert place.ask(CHAT, "openai/m").status == 401
    assert place.ask(CHAT, "openai/m", OWN).status == 401
    assert place.ask(CHAT, "openai/m", "another").status == 401
    assert place.vendor.requests == []
    assert place.ask(CHAT, "openai/m", CLIENT).status == 200
    assert place.ask(CHAT, "openai/m", None, {"x-api-key": CLIENT}).status == 200
    assert place.ask(CHAT, "openai/m", "%s, %s" % (CLIENT, OWN)).status == 200
    assert place.ask(CHAT, "openai/m", OWN, {"x-api-key": CLIENT}).status == 200
    assert place.ask(CHAT, "openai/m", None, {"host": "evil.example", "x-api-key": CLIENT}
                     ).status == 200
    sent = str(place.vendor.requests)
    assert CLIENT not in sent and OWN not in sent and place.home.requests == []


def test_other_vendors_keys_and_placeholders_do_no_harm(place):
    place.say("openai")
    for fields in ({"x-api-key": "sk-ant-api03-abcdefghijkl"}, {"authorization": "Bearer dummy"},
                   {"authorization": "Basic dTpw"}, {"api-key": "x"}):
        assert place.ask(CHAT, "openai/m", None, fields).status == 200, fields
        assert not set(fields.values()) & set(dict(place.sent().fields).values())


@pytest.mark.parametrize("place", [{"rateLimitMax": 2}], indirect=True)
def test_the_rate_limit_holds_without_a_key(place):
    place.say("openai")
    assert [place.ask(CHAT, "openai/m").status for _ in range(3)] == [200, 200, 429]


OTHER = "user_" + "d" * 20


def test_items_are_their_callers_alone(place):
    place.say("openai")
    first = json.loads(place.ask(RESPONSES, "openai/m", OWN).body)
    reference = [{"type": "item_reference", "id": first["output"][0]["id"]},
                 {"role": "user", "content": "go on"}]
    for key, code in ((OWN, 200), (OTHER, 400), (None, 400)):
        count = {"model": "openai/m", "input": reference}
        assert place.ask(RESPONSES, "openai/m", key, input=reference).status == code
        assert place.proxy.request("POST", RESPONSES + "/input_tokens", count, JSON, key
                                   ).status == code
    assert len(place.vendor.requests) == 2
    assert "Hello there" in place.sent().body.decode()


@pytest.mark.parametrize("path", [MESSAGES + "/count_tokens", RESPONSES + "/input_tokens"])
@pytest.mark.parametrize("place", [{}, {"clientKey": CLIENT}], indirect=True)
def test_tokens_are_counted_for_anybody(place, path):
    body = {"model": "openai/m", "input": "hi"} if path.startswith(RESPONSES) else {
        "model": "openai/m", "messages": [{"role": "user", "content": "hi"}]}
    for key in (None, OWN, CLIENT):
        answer = place.proxy.request("POST", path, body, JSON, key)
        assert answer.status == 200 and json.loads(answer.body)["input_tokens"] > 0
    assert place.vendor.requests == place.home.requests == []


@pytest.mark.parametrize("fields", [
    {"host": "evil.example"}, {"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"},
    {"content-type": "text/plain"}, {"x-forwarded-for": "10.0.0.1"}, {"via": "1.1 x"}])
def test_without_one_it_is_for_this_machines_user(place, fields):
    place.say("openai")
    for key in (None, OWN):
        answer = place.ask(CHAT, "openai/m", key, fields)
        assert answer.status == 403, answer.body
    assert place.vendor.requests == []
    assert place.ask(CHAT, "openai/m").status == 200
    assert place.ask(CHAT, "openai/m", OWN).status == 200


def test_command_codes_models_still_want_a_key(place):
    answer = place.ask(CHAT, "deepseek/deepseek-v4-flash")
    assert answer.status == 401 and place.home.requests == []


def test_a_vendor_without_a_key(place):
    turn_on(place.proxy)                # MINE is not set
    answer = place.ask(CHAT, "mine/small")
    assert answer.status == 503 and "keyEnv" in json.loads(answer.body)["error"]["message"]
    assert place.vendor.requests == []


@pytest.mark.parametrize("code, kind", [(401, 401), (429, 429), (500, 502), (404, 404)])
def test_errors_of_a_vendor(place, code, kind):
    place.vendor.default = status(code, json.dumps({"error": {
        "message": "no: %s" % KEY, "type": "t"}}).encode())
    answer = place.ask(CHAT, "openai/m", stream=True)
    assert answer.status == kind and KEY not in answer.body.decode()
    if code == 401:
        assert "operator's key for openai" in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize("place", [{"zaiKey": "zai-key-0123456789"}], indirect=True)
def test_a_refused_key_is_an_alert(place):
    watch = ccproxy.AlertWatch()
    ccproxy.tell_alerts(place.proxy.app, watch, ())
    assert not watch.standing
    place.vendor.default = status(401, b'{"error": {"message": "no"}}')
    place.ask(CHAT, "zai/m")
    ccproxy.tell_alerts(place.proxy.app, watch, ())
    assert [(one["kind"], one["name"]) for one in place.proxy.app.alerts] == [
        ("accountRefused", "zai")], place.proxy.app.alerts
    place.say("openai")
    assert place.ask(CHAT, "zai/m").status == 200         # a single key is tried again
    key = place.proxy.app.vendors["zai"].key
    assert place.proxy.app.keys.states[key.digest].marks == {}


# What is told.

@pytest.mark.parametrize("place", [{"clientKey": CLIENT}], indirect=True)
def test_lists_and_health(place):
    own = json.loads(place.proxy.request("GET", "/v1/models").body)["data"]
    lent = json.loads(place.proxy.request("GET", "/v1/models", key=CLIENT).body)["data"]
    assert [(one["id"], one["owned_by"]) for one in lent[len(own):]] == [
        (name + model, name.strip("/")) for name in ("mine/", "mine-too/")
        for model in ("small", "org/large:free")]
    one = place.proxy.request("GET", "/v1/models/mine%2Fsmall", key=CLIENT)
    assert json.loads(one.body)["id"] == "mine/small"
    for name in ("MINE/small", "bridge/mine/small", "mine/org/large:free"):
        assert json.loads(place.proxy.request("GET", "/v1/models/" + name, key=CLIENT).body)[
            "owned_by"] == "mine"
    for name in ("mine/gpt-5.4", "openai/gpt-5.4", "bridge/kimi/x"):    # not Command Code's
        assert place.proxy.request("GET", "/v1/models/" + name, key=CLIENT).status == 404
    assert place.proxy.request("GET", "/v1/models/gpt-5.4").status == 200
    assert place.proxy.request("GET", "/v1/models/mine%2Fsmall").status == 404
    turn_on(place.proxy)
    health = json.loads(place.proxy.request("GET", "/health").body)
    assert [(row["name"], row["state"]) for row in health["backends"]] == [
        (name, "unavailable" if name.startswith("mine") else "ready") for name in FORMATS]
    assert not any("detail" in row for row in health["backends"])       # only to who may
    health = json.loads(place.proxy.request("GET", "/health", key=CLIENT).body)
    assert ["detail" in row for row in health["backends"]] == [
        name.startswith("mine") for name in FORMATS]


def test_lists_are_not_for_a_page_of_another_origin(place):
    for method in ("GET", "HEAD", "OPTIONS"):
        answer = place.proxy.request(method, "/v1/models", None,
                                     {"origin": "http://evil.example"}, None)
        assert b"mine/small" not in answer.body
    assert b"mine/small" in place.proxy.request("GET", "/v1/models", key=None).body


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_redirects_are_not_followed(place, code):
    other = FakeUpstream()
    head = "HTTP/1.1 %d x\r\nlocation: %s/v1\r\ncontent-length: 0\r\n\r\n" % (code, other.base)
    place.vendor.default = lambda sock, request: sock.sendall(head.encode())
    answer = place.ask(CHAT, "anthropic/m")
    assert answer.status == 502 and other.requests == []
    other.close()


def test_no_proxy_sees_what_goes_to_loopback(place, monkeypatch):
    """Plain http is for loopback: a proxy on the way there would see the key."""
    proxy = FakeUpstream()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.base)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    place.say("openai")
    assert place.ask(CHAT, "openai/m").status == 200
    assert proxy.requests == []
    proxy.close()


@pytest.mark.parametrize("place", [{"vendors": {"mine": {
    "base": "http://llm.example/v1", "format": "openai", "key": KEY, "insecure": True}},
    "backends": ["mine"]}], indirect=True)
def test_the_password_of_a_proxy_to_a_vendor_is_hidden(place, monkeypatch):
    proxy = FakeUpstream()
    monkeypatch.setenv("http_proxy", proxy.base.replace("//", "//me:the-password@"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    proxy.default = status(400, b'{"error": {"message": "no, the-password"}}')
    answer = place.ask(CHAT, "mine/m")
    assert answer.status == 400 and b"the-password" not in answer.body
    assert proxy.requests[0].line == "POST http://llm.example/v1/chat/completions HTTP/1.1"
    explained = place.ask(CHAT, "mine/m", None, {"x-ccproxy-dry-run": "1"})
    assert b"the-password" not in explained.body and KEY.encode() not in explained.body
    proxy.close()


def test_nothing_that_is_shown_holds_a_key(place):
    place.vendor.default = status(400, json.dumps({"error": {"message": KEY}}).encode())
    for stream_it in (False, True):
        assert KEY not in place.ask(CHAT, "openai/m", stream=stream_it).body.decode()
    place.say("openai", {"type": "text-delta", "id": "0", "text": "so"},
              {"type": "error", "error": {"message": "bad " + KEY}})
    assert KEY not in place.ask(CHAT, "openai/m", stream=True).body.decode()
    for path in ("/admin/state", "/admin/config", "/metrics", "/health", "/dashboard"):
        answer = place.proxy.request("GET", path)
        assert answer.status == 200 and KEY not in answer.body.decode(), path
    assert KEY not in str(list(place.proxy.app.recent))


@pytest.mark.parametrize("vendor", ["openai", "anthropic"])
def test_an_answer_in_the_wrong_form_is_asked_for_again(place, vendor):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}
    for text in ('{"n": "one"}', '{"n": 1}'):
        place.vendor.scripts.append(stream(say_in(vendor, text_answer(text))))
    answer = place.ask(CHAT, vendor + "/m", response_format=form)
    assert json.loads(json.loads(answer.body)["choices"][0]["message"]["content"]) == {"n": 1}
    assert "json_repaired" in answer.fields["x-ccproxy-notes"]
    for request in place.vendor.requests:
        assert request.line == "POST %s HTTP/1.1" % PATHS[vendor]
        assert KEY in str(request) and len(place.vendor.requests) == 2


def test_connections_end_with_the_proxy(place):
    for name in FORMATS:
        place.say(FORMATS[name])
        assert place.ask(CHAT, name + "/m").status == 200
    pools = [backend.pool for backend in place.proxy.app.vendors.values()]
    assert all(pool.idle for pool in pools)
    place.proxy.close()
    assert not any(pool.idle for pool in pools)


def test_the_demo_answers_all_by_itself():
    with demo_proxy() as demo:
        assert json.loads(demo.request("GET", "/health").body).get("backends") is None
        assert demo.post(CHAT, model="openai/gpt-5.4").status == 200
        assert demo.post(CHAT, model="bridge/openai/gpt-5.4").status == 404


def test_records_name_the_backend(place):
    place.say("openai")
    place.ask(CHAT, "moonshot/kimi")
    wait_until(lambda: place.proxy.app.recent)
    assert place.proxy.app.recent[-1].model == "moonshot/kimi"
    place.ask(CHAT, "mine/small")
    wait_until(lambda: len(place.proxy.app.recent) == 2)
    metrics = place.proxy.request("GET", "/metrics").body.decode()
    for label in ("mine/small", "moonshot/other"):      # a label is no client's word
        assert 'ccproxy_model_requests_total{model="%s",status="2xx"} 1' % label in metrics


def test_explain_shows_the_call_without_the_key(place):
    for vendor, field in (("openai", "authorization"), ("anthropic", "x-api-key")):
        answer = place.proxy.request("POST", "/explain/v1/chat/completions", {
            "model": vendor + "/m", "messages": [{"role": "user", "content": "hi"}]}, JSON, None)
        told = json.loads(answer.body)
        assert told["url"] == place.vendor.base + PATHS[vendor]
        assert KEY not in answer.body.decode() and "key:" in told["headers"][field]
    assert place.vendor.requests == []


def test_sessions_store_nothing(place):
    place.say("openai")
    assert place.ask(CHAT, "openai/m", None, {"x-session-id": "s1"}).status == 200
    assert "s1" not in str(place.sent())


# The options.

def on(environment=None, **options):
    return ccproxy.vendors_on(make_config(**options), environment or {})


def test_nothing_is_on_by_default():
    assert on() == () and on(openaiKey=KEY) == ()


def test_passthrough_is_each_that_has_a_key():
    assert [vendor.name for vendor in on(backends=["passthrough"], zaiKey=KEY, openaiKey=KEY)] == [
        "openai", "zai"]
    assert [vendor.name for vendor in on(backends=["ZAI", "passthrough"], openaiKey=KEY)] == [
        "zai", "openai"]


MINE = {"base": "https://a.example/v1", "format": "openai", "key": KEY}


@pytest.mark.parametrize("options, words", [
    ({"backends": ["gemini"]}, "gemini"), ({"backends": ["claude"]}, "claude"),
    ({"vendorBases": {"gemini": "https://a.example"}}, "gemini"),
    ({"vendorBases": {"openai": "ftp://a"}}, "openai"),
    ({"vendorBases": {"openai": "http://a.example/v1"}}, "plain http"),
    ({"vendors": {"mine": {**MINE, "base": "http://a.example/v1"}}}, "plain http"),
    ({"backends": ["openai"], "openaiKey": "a b"}, "visible ASCII"),
    ({"backends": ["passthrough"], "zaiKey": "\u043a"}, "visible ASCII"),
    ({"vendorBases": {"OpenAI": "https://a.example/v1"}}, "OpenAI"),
    ({"vendorBases": {"zai": "https://u:%s@a.example/v1" % KEY}}, "zai"),
    ({"vendorBases": {"zai": "https://a.example/v1?key=%s" % KEY}}, "zai"),
    ({"backends": ["openai"], "host": "0.0.0.0"}, "BRIDGE_BEARER")])
def test_what_ends_the_start(options, words):
    with pytest.raises(ccproxy.ProxyError) as caught:
        on(**options)
    assert caught.value.kind == "config" and words in caught.value.message
    assert KEY not in caught.value.message


@pytest.mark.parametrize("row", [
    {"openai": MINE}, {"passthrough": MINE}, {"Mine": MINE}, {"a" * 33: MINE}, {"": MINE},
    {"mine": []}, {"mine": {**MINE, "more": 1}}, {"mine": {"base": MINE["base"], "key": KEY}},
    {"mine": {**MINE, "keyEnv": "X"}}, {"mine": {**MINE, "format": "gemini"}},
    {"mine": {**MINE, "base": "a.example"}}, {"mine": {**MINE, "key": "a b"}},
    {"mine": {**MINE, "key": 5}}, {"mine": {**MINE, "models": ["--x"]}},
    {"mine": {**MINE, "models": "x"}}, {"mine": {**MINE, "insecure": 1}}, [], "x"])
def test_rows_that_cannot_be(row):
    with pytest.raises(ccproxy.ProxyError) as caught:
        make_config(vendors=row)
    assert caught.value.kind == "config" and KEY not in caught.value.message


def test_rows_that_can():
    rows = {"mine": {**MINE, "base": "http://a.example/v1", "insecure": True},
            "local": {"base": "http://127.0.0.1:9/v1", "format": "anthropic", "keyEnv": "K"}}
    mine, local = on({"K": "k"}, backends=["mine", "local"], vendors=rows)
    assert (mine.key, local.key, local.api.path) == (KEY, "k", "/messages")
    assert on({}, backends=["mine"], vendors=json.dumps(rows))[0] == mine
    assert KEY not in repr(mine)
    assert on(backends=["openai"], host="0.0.0.0", clientKey=CLIENT)[0].name == "openai"


def test_a_key_of_the_environment_that_cannot_be():
    rows = {"mine": {"base": "https://a.example/v1", "format": "openai", "keyEnv": "K"}}
    for value in ("sk-\u00e9" + KEY, KEY + "\r\nx: y", "a b"):
        with pytest.raises(ccproxy.ProxyError) as caught:
            on({"K": value}, backends=["mine"], vendors=rows)
        assert "mine" in caught.value.message and value not in caught.value.message
        assert on({"K": value}, vendors=rows) == ()


@pytest.mark.parametrize("value", ["a b", "\u043a\u043b", "x", "a\tb"])
def test_a_vendors_variable_changes_nothing_for_who_sets_no_backends(value):
    names = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "MOONSHOT_API_KEY", "ZAI_API_KEY")
    config = ccproxy.read_config({}, dict.fromkeys(names, value), {}, "test")[0]
    assert ccproxy.vendors_on(config, {}) == ()
    proxy = Proxy(openaiKey=value)
    try:
        assert value not in ccproxy.held_secrets(proxy.app)     # would be hidden in every text
    finally:
        proxy.close()


def test_what_a_start_reads(tmp_path):
    """From flags, the environment and the file alike; what is shown holds no key."""
    rows = json.dumps({"mine": MINE})
    for arguments, environment in (
            (["--backends", "mine,ZAI", "--vendors", rows, "--zai-key", KEY], {}),
            ([], {"BRIDGE_BACKENDS": "mine, zai", "CC_VENDORS": rows, "ZAI_API_KEY": KEY}),
            (["--config", str(tmp_path / "config.json")], {})):
        (tmp_path / "config.json").write_text(json.dumps({
            "backends": ["mine", "zai", "mine"], "vendors": {"mine": MINE}, "zaiKey": KEY}))
        (tmp_path / "config.json").chmod(0o600)
        ran = call_program("--check", *arguments, environment=environment)
        assert ran.returncode == 0, ran.stderr
        assert KEY not in ran.stdout + ran.stderr and "(secret)" in ran.stdout


def test_values_nested_without_end_are_config_errors():
    for text in ("[" * 100000, '{"a":' * 100000, "5", "null", '"x"'):
        with pytest.raises(ccproxy.ProxyError) as caught:
            make_config(vendors=text)
        assert caught.value.kind == "config"


def test_warnings_at_start():
    told = ccproxy.vendor_warnings(on(backends=["openai", "zai"], zaiKey=KEY),
                                   ccproxy.builtin_models())
    taken = sum(name.startswith("openai/") for name in ccproxy.builtin_models().known)
    assert len(told) == 1 + (taken > 0) and "openai has no key" in told[-1]
    assert not taken or str(taken) in told[0]


def test_the_vendors_own_address_is_never_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
    assert {vendor.base for vendor in on(backends=["openai", "anthropic"])} == {
        "https://api.openai.com/v1", "https://api.anthropic.com/v1"}


def test_a_vendor_that_does_not_listen(place):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    place.proxy.app.vendors["openai"].origin = ccproxy.parse_origin("http://127.0.0.1:%d" % port)
    answer = place.ask(CHAT, "openai/m")
    assert answer.status == 502 and str(port) in json.loads(answer.body)["error"]["message"]
