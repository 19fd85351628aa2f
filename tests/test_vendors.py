"""Vendors' own APIs beside Command Code: which ids name them, who may use their keys, what is sent
and what comes back, in every API over both formats."""
from __future__ import annotations

import json
import socket

import pytest
from fake_provider import say_in
from fake_upstream import FakeUpstream, ndjson, status, stream, text_answer
from harness import CHAT, MESSAGES, Proxy, ccproxy, make_config, wait_until

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


def test_a_fifth_vendor_is_one_row(monkeypatch):
    fake = FakeUpstream()
    monkeypatch.setitem(ccproxy.VENDORS, "fifth", (fake.base + "/v9", "openai"))
    config = make_config(backends=["fifth"])
    row = ccproxy.Vendor("fifth", ccproxy.VENDORS["fifth"][0], ccproxy.OWN_APIS["openai"], KEY)
    proxy = Proxy(**{"apiBase": fake.base, "useProviderModels": False})
    proxy.app.vendors = ccproxy.vendor_backends([row])
    try:
        assert config.backends == ["fifth"]
        fake.default = stream(say_in("openai", text_answer("Hello")))
        for path in (CHAT, MESSAGES, RESPONSES):
            body = {"input": "hi"} if path == RESPONSES else {
                "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000}
            answer = proxy.request("POST", path, {"model": "fifth/m", **body}, JSON, None)
            assert said(path, answer) == ("Hello", "fifth/m")
        assert {request.line for request in fake.requests} == {
            "POST /v9/chat/completions HTTP/1.1"}
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


# Who may.

@pytest.mark.parametrize("place", [{"clientKey": CLIENT}], indirect=True)
def test_with_a_client_key_it_must_be_presented(place):
    place.say("openai")
    assert place.ask(CHAT, "openai/m").status == 401
    assert place.ask(CHAT, "openai/m", OWN).status == 401
    assert place.ask(CHAT, "openai/m", "another").status == 401
    assert place.vendor.requests == []
    assert place.ask(CHAT, "openai/m", CLIENT).status == 200


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
    assert place.proxy.request("GET", "/v1/models/mine%2Fsmall").status == 404
    turn_on(place.proxy)
    health = json.loads(place.proxy.request("GET", "/health").body)
    assert [(row["name"], row["state"]) for row in health["backends"]] == [
        (name, "unavailable" if name.startswith("mine") else "ready") for name in FORMATS]


def test_records_name_the_backend(place):
    place.say("openai")
    place.ask(CHAT, "moonshot/kimi")
    wait_until(lambda: place.proxy.app.recent)
    assert place.proxy.app.recent[-1].model == "moonshot/kimi"


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
