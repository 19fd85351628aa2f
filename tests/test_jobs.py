"""JOBS over real sockets: any shape at any door, strict, dry runs, structured output, counting."""
from __future__ import annotations

import hashlib
import json

import ccproxy
import pytest
from fake_upstream import ndjson, status, stall, stream, text_answer
from harness import CHAT, KEY, MESSAGES, fold_chat, fold_messages, wait_until

RESPONSES = "/v1/responses"
DOORS = (CHAT, MESSAGES, RESPONSES)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
          "additionalProperties": False}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5E"
PIXEL += "rkJggg=="
PICTURE = "data:image/png;base64," + PIXEL


@pytest.fixture
def proxy(make_proxy):
    return make_proxy(useProviderModels=False)


def text_shown(path, answer):
    """The text of a plain answer, read as a client of that path reads it."""
    assert answer.status == 200, answer.body
    if path == CHAT:
        assert answer.json["object"] == "chat.completion"
        return answer.json["choices"][0]["message"]["content"] or ""
    if path == MESSAGES:
        assert answer.json["type"] == "message"
        return "".join(block["text"] for block in answer.json["content"]
                       if block["type"] == "text")
    assert answer.json["object"] == "response"
    return "".join(part["text"] for item in answer.json["output"] if item["type"] == "message"
                   for part in item["content"])


def text_streamed(path, answer):
    """The text of a streamed answer, folded as a client of that path folds it."""
    if path == CHAT:
        assert answer.body.endswith(b"data: [DONE]\n\n")
        return fold_chat(answer.frames)[0]["content"]
    if path == MESSAGES:
        return "".join(block["text"] for block in fold_messages(answer.frames)["content"]
                       if block["type"] == "text")
    assert answer.frames[-1]["type"] == "response.completed"
    return "".join(frame["delta"] for frame in answer.frames
                   if frame["type"] == "response.output_text.delta")


def notes_of(answer):
    """The notes of an answer, as {code: detail}."""
    notes = answer.fields.get("x-ccproxy-notes", "")
    return dict(note.split("=", 1) for note in notes.split("; ") if note)


# Any shape at any door: the body's shape picks the reader, the path picks the face.

HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "Look"},
                                 {"type": "image", "image": PICTURE, "mimeType": "image/png"}]},
    {"role": "assistant", "content": [{"type": "tool-call", "toolCallId": "c1",
                                       "toolName": "get", "input": {"city": "Z\u00fcrich"}}]},
    {"role": "tool", "content": [{"type": "tool-result", "toolCallId": "c1", "toolName": "get",
                                  "output": {"type": "text", "value": "rain"}}]}]
SHAPES = {
    "responses": {"input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Look"},
                                     {"type": "input_image", "image_url": PICTURE}]},
        {"type": "function_call", "call_id": "c1", "name": "get",
         "arguments": '{"city": "Z\u00fcrich"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"}],
        "instructions": "Be brief.", "max_output_tokens": 77,
        "tools": [{"type": "function", "name": "get", "description": "G", "parameters": SCHEMA}]},
    "chat": {"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look"},
                                     {"type": "image_url", "image_url": {"url": PICTURE}}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {
                "name": "get", "arguments": '{"city": "Z\u00fcrich"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"}], "max_tokens": 77,
        "tools": [{"type": "function", "function": {"name": "get", "description": "G",
                                                    "parameters": SCHEMA}}]},
    "messages": {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Look"}, {
            "type": "image", "source": {"type": "base64", "media_type": "image/png",
                                        "data": PIXEL}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "get",
                                           "input": {"city": "Z\u00fcrich"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1",
                                      "content": "rain"}]}],
        "system": "Be brief.", "max_tokens": 77,
        "tools": [{"name": "get", "description": "G", "input_schema": SCHEMA}]}}


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_at_any_door(proxy, upstream, shape, path):
    """The same is sent whatever the shape, and the path's face shows the answer, in both forms."""
    plain = proxy.request("POST", path, {**SHAPES[shape], "model": "vendor/m"})
    streamed = proxy.request("POST", path, {**SHAPES[shape], "model": "vendor/m", "stream": True})
    assert text_shown(path, plain) == text_streamed(path, streamed) == "Hello there"
    assert not notes_of(plain) and plain.json["model"] == "vendor/m"
    first, second = (request.json["params"] for request in upstream.requests)
    assert first == second
    assert first["messages"] == HISTORY and first["max_tokens"] == 77
    assert first["system"] == [{"type": "text", "text": "Be brief."}]
    assert first["tools"] == [{"name": "get", "description": "G", "input_schema": SCHEMA}]


FOREIGN = [         # members of one API beside the messages of the other
    (CHAT, {"stop_sequences": ["there"]}), (MESSAGES, {"stop": ["there"]}),
    (CHAT, {"thinking": {"type": "enabled", "budget_tokens": 12000}}),
    (MESSAGES, {"reasoning_effort": "high"}), (CHAT, {"output_config": {"effort": "high"}}),
    (CHAT, {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
    (MESSAGES, {"response_format": {"type": "json_object"}}),
    (MESSAGES, {"functions": [{"name": "get", "parameters": SCHEMA}]})]


@pytest.mark.parametrize("path, members", FOREIGN, ids=["%s at %s" % (list(row[1])[0], row[0])
                                                        for row in FOREIGN])
def test_foreign_members_are_honoured_or_told(proxy, upstream, path, members):
    """Nothing is dropped in silence, also where the body is a mixture: the upstream is asked for
    something else, the answer ends there, or a note names the member."""
    ordinary, answer = proxy.post(path), proxy.post(path, **members)
    assert text_shown(path, ordinary) == "Hello there"
    sent, sent_now = upstream.requests[:2]
    assert sent_now.json != sent.json or text_shown(path, answer) == "Hello " or \
        list(members)[0] in answer.fields.get("x-ccproxy-notes", "")


@pytest.mark.parametrize("path, body", [
    (CHAT, {"input": [], "max_tokens": 5}), (MESSAGES, {"input": 1}),
    (RESPONSES, {"messages": []}), (RESPONSES, {"messages": [{"role": "nobody"}]}),
    (CHAT, {"input": "hi", "previous_response_id": "resp_1"}),
    (CHAT, {"input": "hi", "prompt": {"id": "pmpt_1"}}),
    (RESPONSES, {"prompt": {"id": "pmpt_1"}}),
    (MESSAGES, {"input": "hi", "background": True})])
def test_a_bad_body_of_a_foreign_shape(proxy, upstream, path, body):
    """The error names the field that was sent and has the shape of the path."""
    answer = proxy.request("POST", path, body)
    assert answer.status == 400 and not upstream.requests
    assert (answer.json.get("type") == "error") is (path == MESSAGES)
    error = answer.json["error"]
    assert error["type"] == "invalid_request_error"
    field = next(name for name in ("previous_response_id", "background", "prompt", "input",
                                   "messages") if name in body)
    assert field in error["message"]


@pytest.mark.parametrize("body, shown", [
    ({"input": "hi"}, False), ({"input": "hi", "reasoning": {"effort": "high"}}, True)])
def test_thinking_at_messages_of_a_foreign_shape(proxy, upstream, body, shown):
    """Anthropic's clients get thinking only when it was asked for, in whichever words."""
    upstream.default = stream("02")
    kinds = [block["type"] for block in proxy.request("POST", MESSAGES, body).json["content"]]
    assert ("thinking" in kinds) is shown and "text" in kinds


# x-ccproxy-strict: 1.

STRICT = {"x-ccproxy-strict": "1"}
NOTED = [
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "seed": 7, "logit_bias": {"1": 2}},
     ["ignored=seed", "ignored=logit_bias"]),
    (MESSAGES, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "top_k": 3,
                "tools": [{"type": "web_search_20250305", "name": "web_search"}]},
     ["ignored=top_k", "left_out=tool web_search (web_search_20250305)"]),
    (RESPONSES, {"input": [{"type": "message", "role": "user", "content": "hi"},
                           {"type": "web_search_call", "id": "ws_1"}], "text": {
                               "verbosity": "low"}},
     ["ignored=text.verbosity", "dropped=web_search_call at input[1]"])]


@pytest.mark.parametrize("path, body, notes", NOTED, ids=[row[0] for row in NOTED])
@pytest.mark.parametrize("streamed", [False, True])
def test_strict_with_notes(proxy, upstream, path, body, notes, streamed):
    """What would be a note is a 400 that lists them all; without the header it is a note."""
    body = {**body, "stream": streamed}
    answer = proxy.request("POST", path, body, STRICT)
    assert answer.status == 400 and not upstream.requests
    assert answer.fields["x-should-retry"] == "false"
    error = answer.json["error"]
    assert error["type"] == "invalid_request_error"
    assert sorted(error["details"]["notes"]) == sorted(notes)
    assert all(note in error["message"] for note in notes)
    easy = proxy.request("POST", path, body)
    assert easy.status == 200 and len(upstream.requests) == 1
    assert sorted(easy.fields["x-ccproxy-notes"].split("; ")) == sorted(notes)


@pytest.mark.parametrize("path", DOORS)
def test_strict_without_notes(proxy, upstream, path):
    body = {"input": "hi"} if path == RESPONSES else {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    answer = proxy.request("POST", path, body, STRICT)
    assert text_shown(path, answer) == "Hello there" and len(upstream.requests) == 1


@pytest.mark.parametrize("value", ["0", ""])
def test_strict_that_is_not_asked_for(proxy, value):
    assert proxy.post(CHAT, {"x-ccproxy-strict": value}, seed=7).status == 200


# Dry runs.

TRACEPARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
DRY_WAYS = {"header": ("", {"x-ccproxy-dry-run": "1"}), "path": ("/explain", {}),
            "both": ("/explain", {"x-ccproxy-dry-run": "1"}),
            "doubled slashes": ("//explain/", {})}
UNICODE = "Gr\u00fc\u00dfe, \u4e16\u754c \U0001f680"
ASKED = {CHAT: {"messages": [{"role": "user", "content": UNICODE}],
                "seed": 1, "temperature": 0.5, "tools": SHAPES["chat"]["tools"]},
         MESSAGES: {**SHAPES["messages"], "stream": True, "top_k": 1},
         RESPONSES: {**SHAPES["responses"], "stream": True, "text": {"verbosity": "high"}}}


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("way", DRY_WAYS)
def test_a_dry_run_is_the_call(proxy, upstream, way, path):
    """What it tells is, byte for byte, what the same request then sends; it calls nobody."""
    prefix, fields = DRY_WAYS[way]
    fields = {**fields, "traceparent": TRACEPARENT, "x-session-id": "mine"}
    answer = proxy.request("POST", prefix + path, ASKED[path], fields)
    assert answer.status == 200 and answer.fields["content-type"] == "application/json"
    assert not upstream.connections
    told = answer.json
    assert set(told) == {"method", "url", "headers", "body", "notes"}
    real = proxy.request("POST", path, ASKED[path], {"traceparent": TRACEPARENT,
                                                     "x-session-id": "mine"})
    sent = upstream.requests[0]
    assert real.status == 200 and len(upstream.requests) == 1
    assert json.dumps(told["body"], ensure_ascii=False, separators=(",", ":")).encode() == sent.body
    assert sent.line == "%s %s HTTP/1.1" % (told["method"], told["url"][len(upstream.base):])
    assert told["url"].startswith(upstream.base + "/")
    hidden = "Bearer key:" + hashlib.sha256(KEY.encode()).hexdigest()[:6]
    assert told["headers"] == {**dict(sent.fields), "authorization": hidden}
    assert KEY not in answer.body.decode() and sent.field("authorization") == "Bearer " + KEY
    assert told["notes"] == real.fields["x-ccproxy-notes"].split("; ")
    assert answer.fields["x-ccproxy-notes"] == real.fields["x-ccproxy-notes"]


def test_a_dry_run_asks_for_no_model_list(make_proxy, upstream):
    """It calls nobody: not even beside the answer."""
    proxy = make_proxy()
    assert proxy.post(CHAT, {"x-ccproxy-dry-run": "1"}).status == 200
    if proxy.app.home.models_task is not None:
        wait_until(proxy.app.home.models_task.done)
    assert not upstream.requests and not upstream.side_requests


@pytest.mark.parametrize("path, body, fields, key, expected", [
    (CHAT, {"messages": []}, {}, KEY, 400), (MESSAGES, {"messages": "x"}, {}, KEY, 400),
    (RESPONSES, {}, {}, KEY, 400), (CHAT, {"messages": [{"role": "user", "content": "x"}]}, {},
                                   None, 401),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "seed": 1}, STRICT, KEY, 400),
    ("/v1/nothing", {}, {}, KEY, 404)])
def test_a_dry_run_of_what_is_refused(proxy, upstream, path, body, fields, key, expected):
    """It is refused as the real request is."""
    dry = proxy.request("POST", "/explain" + path, body, fields, key)
    real = proxy.request("POST", path, body, fields, key)
    assert dry.status == real.status == expected and not upstream.requests
    if expected != 404:     # there the path is named
        assert dry.json == real.json


def test_the_base_url_explain(proxy, upstream):
    """A client whose base URL is /explain gets its lists as ever."""
    assert proxy.request("GET", "/explain/v1/models").json["object"] == "list"
    dry = proxy.request("POST", "/explain/anthropic/v1/messages", ASKED[MESSAGES])
    assert dry.json["method"] == "POST"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    counted = proxy.request("POST", "/explain/v1/messages/count_tokens", body)
    assert counted.json["input_tokens"] >= 1 and not upstream.connections


# max_tokens 0: an empty answer, and nobody is called.

LIMITS = [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (MESSAGES, "max_tokens"),
          (RESPONSES, "max_output_tokens"), (RESPONSES, "max_tokens")]


def body_of(path, **members):
    given = {"input": "hi"} if path == RESPONSES else {"messages": [{"role": "user",
                                                                     "content": "hi"}]}
    return {"model": "vendor/m", **given, **members}


@pytest.mark.parametrize("policy", ["error_on_length", "allow"])
@pytest.mark.parametrize("path, name", LIMITS)
def test_no_tokens_asked_for(make_proxy, upstream, path, name, policy):
    proxy = make_proxy(useProviderModels=False, emptyResponsePolicy=policy)
    answer = proxy.request("POST", path, body_of(path, **{name: 0}), STRICT)
    assert text_shown(path, answer) == "" and not upstream.requests
    assert notes_of(answer) == {"usage": "not told by the upstream"}
    sent, gained = tokens_of(path, answer)
    assert sent >= 1 and gained == 0
    shown = answer.json
    if path == CHAT:
        assert shown["choices"][0]["finish_reason"] == "length"
        assert shown["choices"][0]["message"] == {"role": "assistant", "content": ""}
    elif path == MESSAGES:
        assert (shown["stop_reason"], shown["content"]) == ("max_tokens", [])
    else:
        assert (shown["status"], shown["output"]) == ("incomplete", [])
        assert shown["incomplete_details"] == {"reason": "max_output_tokens"}
        assert shown["max_output_tokens"] == (0 if name == "max_output_tokens" else None)


@pytest.mark.parametrize("path, name", LIMITS)
def test_no_tokens_asked_for_in_a_stream(proxy, upstream, path, name):
    answer = proxy.request("POST", path, body_of(path, stream=True, stream_options={
        "include_usage": True}, **{name: 0}))
    assert answer.status == 200 and not upstream.requests
    assert answer.comments == ["note usage=not told by the upstream"]
    if path == CHAT:
        message, reason, usage = fold_chat(answer.frames)
        assert message["content"] == "" and reason == "length"
        assert usage["prompt_tokens"] >= 1 and usage["completion_tokens"] == 0
    elif path == MESSAGES:
        message = fold_messages(answer.frames)
        assert (message["stop_reason"], message["content"]) == ("max_tokens", [])
        assert message["usage"]["input_tokens"] >= 1 and message["usage"]["output_tokens"] == 0
    else:
        assert [frame["type"] for frame in answer.frames] == [
            "response.created", "response.in_progress", "response.incomplete"]
        assert answer.frames[-1]["response"]["usage"]["output_tokens"] == 0


def test_no_tokens_over_http_1_0(proxy, upstream):
    """Without chunks, the end of the connection is the end of the stream."""
    body = json.dumps(body_of(CHAT, stream=True, max_tokens=0)).encode()
    data = proxy.raw(b"POST %b HTTP/1.0\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
                     % (CHAT.encode(), KEY.encode(), len(body), body))
    assert data.endswith(b"data: [DONE]\n\n") and b"transfer-encoding" not in data.lower()
    assert not upstream.requests


def test_the_connection_goes_on_behind_an_empty_answer(proxy, upstream):
    """Both forms, then an ordinary request, on one connection."""
    from harness import parse_answers, post_bytes
    asked = [body_of(CHAT, max_tokens=0), body_of(CHAT, max_tokens=0, stream=True), body_of(CHAT)]
    data = b"".join(post_bytes(CHAT, body) for body in asked[:-1])
    data += post_bytes(CHAT, asked[-1], {"connection": "close"})
    answers = parse_answers(proxy.raw(data))
    assert [answer.status for answer in answers] == [200, 200, 200] and len(upstream.requests) == 1


@pytest.mark.parametrize("path, name", LIMITS)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_dry_run_of_no_tokens(proxy, upstream, path, name, streamed):
    answer = proxy.request("POST", "/explain" + path, body_of(path, stream=streamed, **{name: 0}),
                           STRICT)
    told = answer.json
    assert set(told) == {"method", "url", "headers", "body", "notes"} and not upstream.connections
    assert told["method"] is told["url"] is told["body"] is None
    assert len(told["notes"]) == 1 and "no upstream is called" in told["notes"][0]


def test_no_tokens_are_a_request_like_any_other(make_proxy, upstream):
    """It needs a key, counts against the limit, is refused for its faults, and is recorded."""
    proxy = make_proxy(useProviderModels=False, rateLimitMax=2)
    body = body_of(CHAT, max_tokens=0)
    assert proxy.request("POST", CHAT, body, None, None).status == 401
    assert proxy.request("POST", CHAT, {**body, "messages": []}).status == 400
    answer = proxy.request("POST", CHAT, {**body, "tools": [{"type": "web_search"}], "seed": 1})
    assert notes_of(answer)["ignored"] == "seed" and "left_out" in notes_of(answer)
    assert proxy.request("POST", CHAT, body).status == 429
    wait_until(lambda: len(proxy.app.recent) == 4)
    record = proxy.app.recent[2]
    assert (record.status, record.api, record.error) == (200, "chat", "")
    assert "ignored=seed" in record.notes and "usage=" in record.notes
    assert "200 api=chat" in proxy.log.getvalue() and not upstream.requests


def test_an_empty_answer_is_not_repaired(proxy, upstream):
    """Whatever form it was to have."""
    answer = ask(proxy, CHAT, FORMATS[CHAT], max_tokens=0)
    assert text_shown(CHAT, answer) == "" and not upstream.requests


# Structured output: plain answers are checked, and asked for once more.

GOOD, BAD = '{"city":"Paris"}', '{"town":"Paris"}'
FORMATS = {
    CHAT: {"response_format": {"type": "json_schema", "json_schema": {
        "name": "c", "schema": SCHEMA, "strict": True}}},
    MESSAGES: {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    RESPONSES: {"text": {"format": {"type": "json_schema", "name": "c", "schema": SCHEMA,
                                    "strict": True}}}}
JSON_TOOLS = {
    "messages, any": (MESSAGES, {"tools": [{"name": "json", "description": "R",
                                            "input_schema": SCHEMA}],
                                 "tool_choice": {"type": "any"}}),
    "messages, named": (MESSAGES, {"tools": [{"name": "json", "input_schema": SCHEMA}],
                                   "tool_choice": {"type": "tool", "name": "json"}}),
    "chat, required": (CHAT, {"tools": [{"type": "function", "function": {
        "name": "json", "parameters": SCHEMA}}], "tool_choice": "required"}),
    "chat, named": (CHAT, {"tools": [{"type": "function", "function": {
        "name": "json", "parameters": SCHEMA}}], "tool_choice": {
            "type": "function", "function": {"name": "json"}}})}


def ask(proxy, path, members, **more):
    body = {"input" if path == RESPONSES else "messages": [{"role": "user", "content": "hi"}],
            "max_tokens" if path != RESPONSES else "max_output_tokens": 500, **members, **more}
    return proxy.request("POST", path, body)


def tool_answer(arguments, call_id="call_1", **usage):
    used = {"inputTokens": 7, "outputTokens": 3, **usage}
    return ndjson({"type": "start"}, {"type": "tool-call", "toolCallId": call_id,
                                      "toolName": "json", "input": arguments},
                  {"type": "finish", "finishReason": "tool-calls", "totalUsage": used})


def tokens_of(path, answer):
    usage = answer.json["usage"]
    names = ("prompt_tokens", "completion_tokens") if path == CHAT else (
        "input_tokens", "output_tokens")
    return tuple(usage[name] for name in names)


@pytest.mark.parametrize("path", DOORS)
def test_an_answer_that_holds(proxy, upstream, path):
    upstream.default = stream(text_answer(GOOD))
    answer = ask(proxy, path, FORMATS[path])
    assert text_shown(path, answer) == GOOD and len(upstream.requests) == 1
    assert not {"json_repaired", "json_invalid"} & set(notes_of(answer))
    system = upstream.requests[0].json["params"]["system"][-1]["text"]
    assert "JSON Schema" in system and json.dumps(SCHEMA, separators=(",", ":")) in system


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("second, code", [(GOOD, "json_repaired"), ('{"city":1}', "json_invalid")])
def test_one_repair_turn(proxy, upstream, path, second, code):
    """The model is told what was wrong, once; both calls are one conversation and are counted."""
    upstream.scripts = [stream(text_answer(BAD)), stream(text_answer(
        second, inputTokens=20, outputTokens=5, inputTokenDetails={"cacheReadTokens": 0}))]
    answer = ask(proxy, path, FORMATS[path])
    assert text_shown(path, answer) == second and len(upstream.requests) == 2
    assert {"json_repaired", "json_invalid"} & set(notes_of(answer)) == {code}
    assert tokens_of(path, answer) == (27, 8)
    assert answer.json["id"] == answer.fields["x-request-id"]
    first, again = upstream.requests
    assert first.json["threadId"] == again.json["threadId"]
    assert again.field("x-session-id") == first.field("x-session-id")
    assert again.field("authorization") == "Bearer " + KEY
    before, after = first.json["params"], again.json["params"]
    history, longer = before.pop("messages"), after.pop("messages")
    added = longer[len(history):]
    assert longer[:len(history)] == history and after == before
    assert [turn["role"] for turn in added] == ["assistant", "user"]
    assert added[0]["content"] == [{"type": "text", "text": BAD}]
    assert "city" in added[1]["content"][0]["text"]


@pytest.mark.parametrize("said", ["Here you are: " + GOOD, "", "[1", '{"city":"a","b":1}', "null",
                                  '"Paris"', '{"city":NaN}'])
def test_what_does_not_hold(proxy, upstream, said):
    """Words around, nothing, syntax, members, types."""
    upstream.scripts = [stream(text_answer(said) if said else ndjson(
        {"type": "start"}, {"type": "reasoning-delta", "id": "0", "text": "Hm."},
        {"type": "finish", "finishReason": "stop", "totalUsage": {
            "inputTokens": 1, "outputTokens": 1}})), stream(text_answer(GOOD))]
    answer = ask(proxy, CHAT, FORMATS[CHAT])
    assert text_shown(CHAT, answer) == GOOD and len(upstream.requests) == 2
    assert "json_repaired" in notes_of(answer)


@pytest.mark.parametrize("said, calls", [('{"any":1}', 1), ("no JSON", 2)])
def test_any_json(proxy, upstream, said, calls):
    upstream.scripts = [stream(text_answer(said)), stream(text_answer("{}"))]
    answer = ask(proxy, CHAT, {"response_format": {"type": "json_object"}})
    assert text_shown(CHAT, answer) == (said if calls == 1 else "{}")
    assert len(upstream.requests) == calls


BROKEN = [("500", status(500, {"error": {"message": "oops"}})),
          ("402", status(402, {"error": {"message": "Insufficient credits"}})),
          ("429", status(429, {"error": {"message": "slow down"}}, "retry-after: 99\r\n")),
          ("cut", stream(b'{"type":"text-delta","id":"0","text":"Half"}\n', end=False)),
          ("in mid-stream", stream(ndjson({"type": "text-delta", "id": "0", "text": "Half"},
                                          {"type": "error", "error": {"message": "x"}})))]


@pytest.mark.parametrize("script", [row[1] for row in BROKEN], ids=[row[0] for row in BROKEN])
@pytest.mark.parametrize("path", DOORS)
def test_a_repair_that_fails_keeps_the_first_answer(proxy, upstream, path, script):
    upstream.scripts, upstream.default = [stream(text_answer(BAD))], script
    answer = ask(proxy, path, FORMATS[path])
    assert text_shown(path, answer) == BAD and len(upstream.requests) >= 2
    assert "city" in notes_of(answer)["json_invalid"] and tokens_of(path, answer) == (7, 3)


@pytest.mark.parametrize("path", DOORS)
def test_streams_are_never_repaired(proxy, upstream, path):
    upstream.default = stream(text_answer(BAD))
    answer = ask(proxy, path, FORMATS[path], stream=True)
    assert text_streamed(path, answer) == BAD and len(upstream.requests) == 1
    assert b"json_invalid" not in answer.body and "json_invalid" not in notes_of(answer)


@pytest.mark.parametrize("path", DOORS)
def test_streams_are_not_delayed(proxy, upstream, path):
    """The first piece is there while the upstream still has more to say."""
    line = ndjson({"type": "start"}, {"type": "text-delta", "id": "0", "text": '{"city":'})
    upstream.default = stall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n"
                             % (len(line), line), 5.0)
    members = {**FORMATS[path], "stream": True}
    if path == RESPONSES:
        members.update(input="hi", messages=None)
    sock = proxy.send_post(path, **{name: value for name, value in members.items() if value})
    data = b""
    while b"city" not in data:
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    sock.close()


def test_an_answer_that_was_cut_is_not_repaired(proxy, upstream):
    """Half an answer is told by its finish reason; a second one would be cut just the same."""
    upstream.default = stream(text_answer('{"ci', reason="length"))
    answer = ask(proxy, CHAT, FORMATS[CHAT])
    assert answer.json["choices"][0]["finish_reason"] == "length" and len(upstream.requests) == 1


def arguments_shown(path, answer):
    if path == CHAT:
        call, = answer.json["choices"][0]["message"]["tool_calls"]
        return json.loads(call["function"]["arguments"])
    return [block for block in answer.json["content"] if block["type"] == "tool_use"][0]["input"]


@pytest.mark.parametrize("name", JSON_TOOLS)
@pytest.mark.parametrize("first", [tool_answer({"town": 1}), text_answer("Paris, I think.")],
                         ids=["invalid", "not called"])
def test_the_json_tool(proxy, upstream, name, first):
    """The AI SDK's way to structured output is held to its schema as well."""
    path, members = JSON_TOOLS[name]
    upstream.scripts = [stream(first), stream(tool_answer({"city": "Paris"}, "call_2",
                                                          inputTokens=20))]
    answer = ask(proxy, path, members)
    assert arguments_shown(path, answer) == {"city": "Paris"} and len(upstream.requests) == 2
    assert "json_repaired" in notes_of(answer) and tokens_of(path, answer) == (27, 6)
    assert upstream.requests[0].json["threadId"] == upstream.requests[1].json["threadId"]
    said, told = upstream.requests[1].json["params"]["messages"][-2:]
    assert said["role"] == "assistant"
    if b"tool-call" in first:
        assert said["content"] == [{"type": "tool-call", "toolCallId": "call_1",
                                    "toolName": "json", "input": {"town": 1}}]
        assert told["role"] == "tool" and told["content"][0]["toolCallId"] == "call_1"
        assert "city" in told["content"][0]["output"]["value"]
    else:
        assert said["content"] == [{"type": "text", "text": "Paris, I think."}]
        assert told["role"] == "user" and "tool" in told["content"][0]["text"]


@pytest.mark.parametrize("name", JSON_TOOLS)
def test_the_json_tool_that_holds(proxy, upstream, name):
    path, members = JSON_TOOLS[name]
    upstream.default = stream(tool_answer({"city": "Paris"}))
    answer = ask(proxy, path, members)
    assert arguments_shown(path, answer) == {"city": "Paris"} and len(upstream.requests) == 1
    assert not {"json_repaired", "json_invalid"} & set(notes_of(answer))


FREE_TOOL = {"type": "function", "function": {"name": "json", "parameters": SCHEMA}}
OTHER_TOOL = {"type": "function", "function": {"name": "other", "parameters": SCHEMA}}


@pytest.mark.parametrize("members", [
    {"tools": [FREE_TOOL]}, {"tools": [FREE_TOOL], "tool_choice": "auto"},
    {"tools": [FREE_TOOL, OTHER_TOOL], "tool_choice": "required"},
    {"tools": [FREE_TOOL], "tool_choice": "required", "stream": True}])
def test_tools_that_are_not_structured_output(proxy, upstream, members):
    """A model's own mistake in a tool call is for the client's loop to answer."""
    upstream.default = stream(tool_answer({"town": 1}))
    assert ask(proxy, CHAT, members).status == 200 and len(upstream.requests) == 1


# Counting: no upstream call, no key.

COUNTS = ["/v1/messages/count_tokens", "/messages/count_tokens",
          "/v1/messages/count_tokens?beta=true", "/anthropic/v1/messages/count_tokens",
          "/v1/responses/input_tokens", "/responses/input_tokens"]


@pytest.mark.parametrize("path", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_counting(make_proxy, upstream, path, shape):
    """At once, of any shape, without a key, and without any call: not even for the model list."""
    proxy = make_proxy()
    body = {name: value for name, value in SHAPES[shape].items() if not name.startswith("max_")}
    answer = proxy.request("POST", path, body, key=None)
    assert answer.status == 200 and not upstream.connections
    assert 280 < answer.json["input_tokens"] < 2000        # a picture, a tool and a few words
    expected = {"object": "response.input_tokens"} if "responses" in path else {}
    assert answer.json == {**expected, "input_tokens": answer.json["input_tokens"]}
    longer = {**body, "tools": body["tools"] + [{
        "type": "function", "name": "more", "parameters": SCHEMA, "description": "word " * 400}]}
    assert proxy.request("POST", path, longer, key=None).json["input_tokens"] > \
        answer.json["input_tokens"] + 200


BAD_COUNTS = [b"", b"{", b"[]", b"{}", b'{"messages": 1}', b'{"input": 1}', b'{"messages": [1]}',
              b"[" * 100_000, b"\xff", b'{"messages": NaN}']


@pytest.mark.parametrize("path", [COUNTS[0], COUNTS[4]])
@pytest.mark.parametrize("body", BAD_COUNTS, ids=[repr(body[:20]) for body in BAD_COUNTS])
def test_wrong_bodies_of_counts(proxy, upstream, path, body):
    answer = proxy.request("POST", path, body, {"content-length": str(len(body))}, None)
    assert answer.status == 400 and answer.json["error"]["type"] == "invalid_request_error"
    assert (answer.json.get("type") == "error") is ("messages" in path)
    assert not upstream.connections


@pytest.mark.parametrize("path", [COUNTS[0], COUNTS[4]])
def test_counting_is_a_post(proxy, path):
    assert proxy.request("GET", path, key=None).status == 405


# Calibration.


def health(proxy):
    return proxy.request("GET", "/health", key=None).json["token_estimate"]


def test_calibration(make_proxy, upstream):
    """The true counts of answers teach the estimate, a family of models apart from the others."""
    proxy = make_proxy(useProviderModels=False)
    body = {"messages": [{"role": "user", "content": "word " * 100}], "max_tokens": 100}
    path = "/v1/messages/count_tokens"

    def count(**more):
        return proxy.request("POST", path, {**body, **more}, key=None).json["input_tokens"]
    before, other = count(), count(model="moonshotai/Kimi-K3")
    assert health(proxy) == {} and before != 150
    upstream.default = stream(text_answer("Hello", inputTokens=150))
    for _ in range(10):
        assert proxy.request("POST", MESSAGES, body).status == 200
    known = health(proxy)
    assert set(known) == {"deepseek"} and known["deepseek"]["answers"] > 5
    assert 0 <= known["deepseek"]["mean_error"] < 0.15
    assert abs(count() - 150) <= 0.15 * 150
    assert count(model="moonshotai/Kimi-K3") == other
    streamed = proxy.request("POST", MESSAGES, {**body, "stream": True})
    assert abs(streamed.frames[0]["message"]["usage"]["input_tokens"] - 150) <= 0.15 * 150
    tools = SHAPES["messages"]["tools"]
    assert proxy.request("POST", MESSAGES, {**body, "tools": tools}).status == 200
    proxy.wait_quiet()
    assert set(health(proxy)) == {"deepseek", "deepseek+tools"}


@pytest.mark.parametrize("shape", SHAPES)
def test_message_start_tells_the_same_estimate(proxy, shape):
    counted = proxy.request("POST", COUNTS[0], SHAPES[shape], key=None).json["input_tokens"]
    streamed = proxy.request("POST", MESSAGES, {**SHAPES[shape], "stream": True})
    assert streamed.frames[0]["message"]["usage"]["input_tokens"] == counted


@pytest.mark.parametrize("script", [status(402, b""), stream(text_answer("x", inputTokens=0)),
                                    stream(b'{"type":"text-delta","id":"0","text":"Half"}\n')],
                         ids=["refused", "no count", "cut off"])
def test_what_teaches_nothing(proxy, upstream, script):
    upstream.default = script
    proxy.post(CHAT)
    assert health(proxy) == {}


def test_families_are_bounded(proxy, upstream):
    """Whatever models a client makes up, the memory for them has an end."""
    upstream.default = stream(text_answer("x", inputTokens=150))
    most = ccproxy.MAX_FAMILIES
    letters = "abcdefghijklmnopqrstuvwxyz"
    for number in range(most + 3):
        name = "x/fam" + letters[number // 26] + letters[number % 26]
        assert proxy.post(CHAT, model=name).status == 200
    assert len(health(proxy)) == most
