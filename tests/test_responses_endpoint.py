"""/v1/responses over real sockets: both forms, what is not stored, true errors, Codex's errors."""
from __future__ import annotations

import json

import pytest
from fake_upstream import ndjson, raw, recorded, status, stream, text_answer
from harness import KEY, ccproxy, parse_answers, post_bytes, read_until

RESPONSES = "/v1/responses"
CODEX = [("originator", {"originator": "codex_exec"}),
         ("user agent", {"user-agent": "codex_exec/0.169.0 (Linux; x86_64) unknown"}),
         ("the terminal one", {"originator": "codex_cli_rs", "user-agent": "codex_cli_rs/0.169.0"}),
         ("in capitals", {"User-Agent": "Codex-Desktop/1.0"})]
OTHERS = [("nobody", {}), ("openai", {"user-agent": "OpenAI/Python 2.20.0"}),
          ("another originator", {"originator": "opencode"})]
CODEX_FIELDS = CODEX[0][1]
TRACE = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def proxy(make_proxy):
    return make_proxy(useProviderModels=False)


def ask(proxy, fields=None, key=KEY, **members):
    return proxy.request("POST", RESPONSES, {"input": "hi", **members}, fields, key)


def event_lines(answer):
    return [line[7:] for line in answer.body.decode().split("\n") if line.startswith("event: ")]


# Both forms.


@pytest.mark.parametrize("path", ["/v1/responses", "/responses", "/v1/v1/responses",
                                  "/v1/responses/", "/v1/responses?api-version=1",
                                  "//v1//responses"])
def test_paths(proxy, path):
    answer = proxy.request("POST", path, {"input": "hi"})
    assert answer.status == 200 and answer.json["object"] == "response"


def test_a_plain_answer(proxy, upstream):
    answer = ask(proxy, model="vendor/m", store=True, metadata={"a": "b"}, temperature=0.5)
    body = answer.json
    assert answer.fields["content-type"] == "application/json"
    assert body["id"].startswith("resp_") and answer.fields["x-request-id"] == body["id"]
    assert (body["status"], body["model"], body["store"]) == ("completed", "vendor/m", False)
    assert body["metadata"] == {"a": "b"} and body["temperature"] == 0.5
    assert body["error"] is None and body["incomplete_details"] is None
    item, = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "Hello there", "annotations": [],
                                "logprobs": []}]
    assert body["usage"] == {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10,
                             "input_tokens_details": {"cached_tokens": 0},
                             "output_tokens_details": {"reasoning_tokens": 0}}
    assert upstream.requests[0].json["params"]["temperature"] == 0.5


def test_a_streamed_answer(proxy):
    answer = ask(proxy, stream=True)
    assert answer.status == 200 and answer.fields["content-type"].startswith("text/event-stream")
    assert event_lines(answer) == [frame["type"] for frame in answer.frames] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.delta", "response.output_text.delta",
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.completed"]
    assert [frame["sequence_number"] for frame in answer.frames] == list(range(10))
    assert [frame["delta"] for frame in answer.frames if "delta" in frame] == ["Hello", " there"]
    whole = answer.frames[-1]["response"]
    assert whole["output"] == [answer.frames[-2]["item"]]
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize("name", ["01", "02", "03", "04", "05", "06"])
def test_the_two_forms_tell_the_same(proxy, upstream, name):
    """Over recorded answers, and however the upstream cuts its bytes."""
    tools = [{"type": "function", "name": one, "parameters": {"type": "object"}}
             for one in ("get_weather", "get_time", "read_file", "shell", "x")]
    upstream.scripts = [stream(name), stream(name), stream(recorded(name), cut=97)]
    plain = ask(proxy, tools=tools)
    assert plain.status == 200
    for _ in range(2):
        streamed = ask(proxy, tools=tools, stream=True)
        final = streamed.frames[-1]
        assert final["type"] == "response." + plain.json["status"]
        done = [frame["item"] for frame in streamed.frames
                if frame["type"] == "response.output_item.done"]
        assert final["response"]["output"] == done

        def bare(response):
            return json.dumps({**response, "id": "", "created_at": 0}).replace(
                response["id"].partition("_")[2], "ID")
        assert bare(final["response"]) == bare(plain.json)


def test_cut_by_length(proxy, upstream):
    upstream.default = stream(text_answer("Half", reason="length"))
    plain, streamed = ask(proxy), ask(proxy, stream=True)
    for body in (plain.json, streamed.frames[-1]["response"]):
        assert body["status"] == "incomplete"
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert streamed.frames[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize("data, code", [
    (ndjson({"type": "text-delta", "id": "0", "text": "Half"},
            {"type": "error", "error": {"message": "Insufficient credits", "statusCode": 402}}),
     "insufficient_quota"),
    (ndjson({"type": "text-delta", "id": "0", "text": "Half"},
            {"type": "error", "error": {"message": "no", "statusCode": 503}}), "server_error"),
    (ndjson({"type": "text-delta", "id": "0", "text": "Half"}), "server_error")])
@pytest.mark.parametrize("fields", [{}, CODEX_FIELDS])
def test_errors_in_mid_stream(proxy, upstream, data, code, fields):
    """The terminal event is response.failed; a plain answer that broke is a real status."""
    upstream.default = stream(data)
    answer = ask(proxy, fields, stream=True)
    last = answer.frames[-1]
    assert answer.status == 200 and last["type"] == "response.failed"
    assert last["response"]["status"] == "failed" and last["response"]["error"]["code"] == code
    assert [frame["type"] for frame in answer.frames].count("response.failed") == 1
    assert "response.completed" not in event_lines(answer)
    assert [frame["sequence_number"] for frame in answer.frames] == list(range(len(answer.frames)))
    assert ask(proxy, stream=False).status in (402, 502, 503)


def test_thinking_is_carried_to_the_next_turn(proxy, upstream):
    """Without any store: the reasoning item itself brings the text back."""
    upstream.default = stream(ndjson(
        {"type": "reasoning-delta", "id": "r", "text": "Hm, \u4e16."},
        {"type": "text-delta", "id": "0", "text": "Yes."},
        {"type": "finish", "finishReason": "stop", "totalUsage": {"inputTokens": 1,
                                                                  "outputTokens": 1}}))
    first = ask(proxy, include=["reasoning.encrypted_content"], stream=True)
    output = first.frames[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    ask(proxy, input=[{"role": "user", "content": "hi"}, *output,
                      {"role": "user", "content": "go on"}])
    turns = upstream.requests[1].json["params"]["messages"]
    assert turns[1] == {"role": "assistant", "content": [
        {"type": "reasoning", "text": "Hm, \u4e16."}, {"type": "text", "text": "Yes."}]}
    assert "encrypted_content" not in json.dumps(ask(proxy).json["output"])


def test_custom_and_namespaced_tools(proxy, upstream):
    """Codex's apply_patch gets its raw input, and a namespaced tool its namespace (R41)."""
    upstream.default = stream(ndjson(
        {"type": "tool-call", "toolCallId": "c1", "toolName": "apply_patch",
         "input": {"input": "*** Begin Patch\n+\u00e9"}},
        {"type": "finish", "finishReason": "tool-calls", "totalUsage": {"inputTokens": 1,
                                                                        "outputTokens": 1}}))
    tools = [{"type": "custom", "name": "apply_patch", "description": "p", "format": {
        "type": "grammar", "syntax": "lark", "definition": "start: x"}},
        {"type": "namespace", "name": "multi_agent_v1", "tools": [
            {"type": "function", "name": "spawn", "parameters": {"type": "object"}}]},
        {"type": "web_search"}, {"type": "tool_search", "execution": "client", "parameters": {}}]
    for streamed in (False, True):
        answer = ask(proxy, tools=tools, stream=streamed)
        response = answer.frames[-1]["response"] if streamed else answer.json
        item, = response["output"]
        assert (item["type"], item["call_id"], item["name"], item["input"]) == (
            "custom_tool_call", "c1", "apply_patch", "*** Begin Patch\n+\u00e9")
        assert "web_search" in answer.fields["x-ccproxy-notes"]
    sent = upstream.requests[0].json["params"]["tools"]
    assert [tool["name"] for tool in sent[2:]] == ["tool_search"]
    assert set(sent[0]["input_schema"]["properties"]) == {"input"}
    upstream.default = stream(ndjson(
        {"type": "tool-call", "toolCallId": "c2", "toolName": sent[1]["name"], "input": {}},
        {"type": "finish", "finishReason": "tool-calls", "totalUsage": {"inputTokens": 1,
                                                                        "outputTokens": 1}}))
    item, = ask(proxy, tools=tools).json["output"]
    assert (item["type"], item["name"], item["namespace"]) == ("function_call", "spawn",
                                                               "multi_agent_v1")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("close", [False, True])
def test_a_bad_escape_in_a_custom_tools_input(proxy, upstream, close, streamed):
    """Also in the last line of a connection that closes."""
    written = r'{"input":"s/\d+/x/"}'
    lines = ndjson({"type": "tool-input-start", "id": "c1", "toolName": "edit"},
                   {"type": "tool-input-delta", "id": "c1", "delta": written},
                   {"type": "tool-call", "toolCallId": "c1", "toolName": "edit", "input": written},
                   {"type": "finish", "finishReason": "tool-calls"})
    upstream.default = raw(b"HTTP/1.1 200 OK\r\n\r\n" + lines[:-1], close=True) if close else \
        stream(lines)
    answer = ask(proxy, tools=[{"type": "custom", "name": "edit"}], stream=streamed)
    response = answer.frames[-1]["response"] if streamed else answer.json
    item, = response["output"]
    assert (item["type"], item["input"]) == ("custom_tool_call", r"s/\d+/x/")
    if not streamed:
        said = proxy.post("/v1/chat/completions", tools=[{"type": "custom", "custom": {
            "name": "edit"}}]).json["choices"][0]
        assert said["finish_reason"] == "tool_calls"
        assert said["message"]["tool_calls"][0]["custom"]["input"] == r"s/\d+/x/"


# What would need a store.


@pytest.mark.parametrize("members", [{"previous_response_id": "resp_1"}, {"background": True},
                                     {"conversation": "conv_1"}, {"conversation": {"id": "c"}},
                                     {"prompt": {"id": "pmpt_1", "variables": {"a": "b"}}},
                                     {"input": [{"type": "item_reference", "id": "msg_1"}]}])
def test_what_needs_a_store_is_refused(proxy, upstream, members):
    answer = ask(proxy, **members)
    assert answer.status == 400 and not upstream.requests
    error = answer.json["error"]
    assert error["type"] == "invalid_request_error" and "send" in error["message"]
    name = list(members)[0]
    assert error["param"].startswith(name)


@pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
@pytest.mark.parametrize("path", ["/v1/responses/resp_0123", "/responses/xyz",
                                  "/v1/responses/xyz/cancel", "/v1/responses/xyz/input_items",
                                  "/v1/responses/xyz?include=a"])
def test_nothing_is_stored(proxy, upstream, method, path):
    answer = proxy.request(method, path, None, key=None)
    assert answer.status == 404 and answer.fields["content-type"] == "application/json"
    assert set(answer.json) == {"error"} and not upstream.connections
    assert {"message", "type", "param", "code"} <= set(answer.json["error"])
    assert "stored" in answer.json["error"]["message"]
    assert answer.fields["x-should-retry"] == "false"


def test_a_get_without_an_id(proxy):
    answer = proxy.request("GET", RESPONSES, key=None)
    assert answer.status == 404 and set(answer.json) == {"error"}


@pytest.mark.parametrize("target", ["/v1/responses", "/v1/responses?model=x", "/responses"])
@pytest.mark.parametrize("fields", ["", "originator: codex_exec\r\n"])
def test_a_websocket_is_refused_at_once(proxy, upstream, target, fields):
    """And the connection then serves the POST that comes instead."""
    upgrade = ("GET %s HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
               "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
               "openai-beta: responses_websockets=2026-02-06\r\n%s\r\n" % (target, fields)).encode()
    with proxy.connect() as sock:
        sock.sendall(upgrade)
        data = read_until(sock, b"}}")
        answer, = parse_answers(data)
        assert answer.status == 426 and "POST" in answer.json["error"]["message"]
        assert not upstream.connections
        sock.sendall(post_bytes(RESPONSES, {"input": "hi"}))
        data = read_until(sock, b'"input_tokens":7')
    assert data.startswith(b"HTTP/1.1 200 ")


# Errors: true statuses, except for Codex and what is permanent.


def envelope(code, message, number=400):
    return {"success": False, "error": {"code": code, "status": number, "message": message}}


PERMANENT = [       # upstream's status and body; ours; the code that Codex gets
    (400, envelope("BAD_REQUEST", "Invalid input: expected x"), 400, "invalid_prompt"),
    (400, envelope("BAD_REQUEST", "prompt is too long: 3 tokens > 2 maximum"), 400,
     "context_length_exceeded"),
    (402, envelope("INSUFFICIENT_CREDITS", "Insufficient credits"), 402, "invalid_prompt"),
    (403, envelope("MODEL_NOT_IN_PLAN", "Upgrade your plan"), 403, "invalid_prompt"),
    (403, envelope("FORBIDDEN", "Model/provider not recognized: x"), 404, "invalid_prompt"),
    (404, envelope("NOT_FOUND", "No such thing"), 404, "invalid_prompt"),
    (429, envelope("RATE_LIMITED", "You've reached your 5-hour usage limit"), 429,
     "invalid_prompt")]
PASSING = [         # what trying again, or another key, can mend
    (401, envelope("UNAUTHORIZED", "Invalid API key"), 401),
    (429, envelope("RATE_LIMITED", "slow down"), 429), (500, b"", 502), (502, b"", 502),
    (503, b"", 503), (529, b"", 529), (504, b"", 504)]


def codex_failure(answer):
    """error of the one event that Codex gets."""
    assert answer.status == 200 and answer.fields["content-type"].startswith("text/event-stream")
    assert event_lines(answer) == ["response.failed"]
    frame, = answer.frames
    assert frame["type"] == "response.failed" and frame["sequence_number"] == 0
    response = frame["response"]
    assert response["object"] == "response" and response["status"] == "failed"
    assert response["id"].startswith("resp_")
    return response["error"]


@pytest.mark.parametrize("given, body, expected, code", PERMANENT)
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("fields", [row[1] for row in OTHERS], ids=[row[0] for row in OTHERS])
def test_permanent_refusals(proxy, upstream, given, body, expected, code, streamed, fields):
    """Any client but Codex gets the real status in OpenAI's shape, after one call."""
    upstream.default = status(given, body, "x-trace-id: %s\r\n" % TRACE)
    answer = ask(proxy, fields, stream=streamed)
    assert answer.status == expected and len(upstream.requests) == 1
    assert answer.fields["content-type"] == "application/json"
    assert answer.fields["x-should-retry"] == "false"
    assert answer.json["error"]["message"] == body["error"]["message"]
    assert answer.json["error"]["trace_id"] == TRACE
    assert set(answer.json) == {"error"}


@pytest.mark.parametrize("given, body, expected, code", PERMANENT)
@pytest.mark.parametrize("fields", [row[1] for row in CODEX], ids=[row[0] for row in CODEX])
def test_permanent_refusals_for_codex(proxy, upstream, given, body, expected, code, fields):
    """It stops at once and shows the message (R44)."""
    upstream.default = status(given, body)
    answer = ask(proxy, fields, stream=True)
    assert codex_failure(answer) == {"code": code, "message": body["error"]["message"]}
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("given, body, expected, code", PERMANENT)
def test_refusals_inside_a_200_for_codex(proxy, upstream, given, body, expected, code):
    """An error event before any output is the same refusal."""
    upstream.default = stream(ndjson({"type": "start"}, {"type": "error", "error": {
        "message": body["error"]["message"], "code": body["error"]["code"],
        "statusCode": given}}))
    assert codex_failure(ask(proxy, CODEX_FIELDS, stream=True))["code"] == code
    assert ask(proxy, stream=True).status == expected


@pytest.mark.parametrize("given, body, expected", PASSING)
@pytest.mark.parametrize("fields", [{}, CODEX_FIELDS], ids=["others", "codex"])
def test_other_refusals_are_real_for_everybody(proxy, upstream, given, body, expected, fields):
    upstream.default = status(given, body)
    answer = ask(proxy, fields, stream=True)
    assert answer.status == expected and set(answer.json) == {"error"}
    assert b"response.failed" not in answer.body


OWN_REFUSALS = [    # members, the place that the message names, ours
    ({"input": 1}, "input", 400), ({"input": []}, "input", 400),
    ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role", 400),
    ({"previous_response_id": "resp_1"}, "previous_response_id", 400),
    ({"max_output_tokens": -2}, "max_output_tokens", 400),
    ({"model": "quite/unknown"}, "quite/unknown", 404)]


@pytest.mark.parametrize("members, place, expected", OWN_REFUSALS)
def test_our_own_refusals(make_proxy, upstream, members, place, expected):
    """Codex stops at those just the same; all others get a real status."""
    proxy = make_proxy(useProviderModels=False, allowUnknownModels=False)
    error = codex_failure(ask(proxy, CODEX_FIELDS, stream=True, **members))
    assert error["code"] == "invalid_prompt" and place in error["message"]
    answer = ask(proxy, stream=True, **members)
    assert answer.status == expected and place in answer.json["error"]["message"]
    assert not upstream.requests


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000],
                         ids=["empty", "open", "a list", "not text", "deep"])
def test_bodies_that_are_no_object(proxy, upstream, body):
    given = {"content-length": str(len(body))}
    answer = proxy.request("POST", RESPONSES, body, given)
    assert answer.status == 400 and set(answer.json) == {"error"}
    failed = proxy.request("POST", RESPONSES, body, {**given, **CODEX_FIELDS})
    assert codex_failure(failed)["code"] == "invalid_prompt"
    assert not upstream.requests


@pytest.mark.parametrize("fields", [{}, CODEX_FIELDS], ids=["others", "codex"])
def test_without_a_key(proxy, upstream, fields):
    answer = ask(proxy, fields, None, stream=True)
    assert answer.status == 401 and answer.json["error"]["code"] == "invalid_api_key"
    assert answer.fields["www-authenticate"].startswith("Bearer") and not upstream.connections


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_codex_errors_are_for_responses_only(proxy, upstream, path):
    upstream.default = status(402, envelope("PAYMENT", "Insufficient credits"))
    assert proxy.post(path, CODEX_FIELDS, stream=True).status == 402


def test_a_connection_goes_on_behind_codex_error(proxy, upstream):
    upstream.scripts = [status(402, b"")]
    with proxy.connect() as sock:
        sock.sendall(post_bytes(RESPONSES, {"input": "hi", "stream": True}, CODEX_FIELDS))
        data = read_until(sock, b'"sequence_number":0}\n\n')
        failed, = parse_answers(data)
        assert codex_failure(failed)["code"] == "invalid_prompt"
        sock.sendall(post_bytes(RESPONSES, {"input": "hi"}, CODEX_FIELDS))
        data = read_until(sock, b'"input_tokens":7')
    assert data.startswith(b"HTTP/1.1 200 ") and b'"status":"completed"' in data
    proxy.wait_quiet()
    assert "Payment" in proxy.log.getvalue() or "billing" in proxy.log.getvalue()


# References to earlier items, which the AI SDK sends by default.


def converse(proxy, second_input, key="user_testkey123", **first):
    """Two requests, the second of which may refer to the first's answer."""
    answer = proxy.request("POST", "/v1/responses", {"input": "hi", **first})
    names = [item["id"] for item in answer.json["output"]]
    return proxy.request("POST", "/v1/responses", {"input": second_input(names)}, key=key)


def refer(names):
    return [{"role": "user", "content": "hi"},
            *[{"type": "item_reference", "id": name} for name in names],
            {"role": "user", "content": "and?"}]


def test_references_are_resolved_from_memory(proxy, upstream):
    upstream.scripts = [stream("02")]
    assert converse(proxy, refer).status == 200
    sent = upstream.requests[-1].json["params"]["messages"][1]
    assert sent == {"role": "assistant", "content": [
        {"type": "reasoning", "text": "The user asks 2+2.\nIt is 4."},
        {"type": "text", "text": "The answer is **4**."}]}


def test_referred_thinking_keeps_its_signature(proxy, upstream):
    """The item that was sent may be without it: it was kept here all the same."""
    signed = {"providerMetadata": {"anthropic": {"signature": "sig"}}}
    upstream.scripts = [stream(ndjson(
        {"type": "reasoning-delta", "id": "r", "text": "Hm."},
        {"type": "reasoning-end", "id": "r", **signed}, {"type": "text-delta", "text": "Yes."},
        {"type": "finish", "finishReason": "stop", "totalUsage": {"inputTokens": 1,
                                                                  "outputTokens": 1}}))]
    answer = proxy.request("POST", "/v1/responses", {"input": "hi"}).json
    proxy.wait_quiet()
    kept = json.loads(next(iter(proxy.app.items.values())))
    assert "encrypted_content" not in answer["output"][0] and kept["type"] == "reasoning"
    assert ccproxy.carried_thinking(kept["encrypted_content"]) == ccproxy.Thinking("Hm.", "sig")


def test_references_of_others_and_of_what_was_not_to_be_kept(proxy, upstream):
    assert converse(proxy, refer, key="user_somebodyelse").status == 400
    assert converse(proxy, refer, store=False).status == 400
    assert len(upstream.requests) == 2 and len(proxy.app.items) == 1


def test_the_memory_is_bounded(proxy, upstream, monkeypatch):
    monkeypatch.setattr(ccproxy, "MAX_ITEMS", 3)
    for _ in range(5):
        proxy.request("POST", "/v1/responses", {"input": "hi"})
    assert len(proxy.app.items) == 3


def test_lost_thinking_is_noted_and_not_refused(proxy, upstream):
    answer = proxy.request("POST", "/v1/responses", {"input": refer(["rs_unknown01"])})
    assert answer.status == 200 and "dropped=" in answer.fields["x-ccproxy-notes"]
