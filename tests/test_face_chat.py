"""FACE: CHAT: a Chat Completions request as a prompt, events as chunks, a reply as one body."""
from __future__ import annotations

import json

import pytest
from fake_upstream import ndjson, recorded, text_answer
from harness import ccproxy
from pure import (CONFIG, MODELS, PNG, USER, at, check_params, has_note, new_answer, params_of,
                  read_comments, read_frames, read_prompt, refusal, request, run, run_plain,
                  run_stream, text, translate)

FINISH = {"type": "finish", "finishReason": "stop"}
HEAD = {"id": "id", "object": "chat.completion.chunk", "created": 0, "model": "m"}


# Requests: (members, path in params, what is sent there).

SENT = [
    ({}, "max_tokens", 64000), ({"max_tokens": 10}, "max_tokens", 10),
    ({"max_completion_tokens": 11}, "max_tokens", 11),
    ({"max_tokens": 10, "max_completion_tokens": 11}, "max_tokens", 11),
    ({"max_tokens": 250_000}, "max_tokens", 200_000), ({"max_tokens": 5.0}, "max_tokens", 5),
    ({"model": "z-ai/glm-5.3-flash", "max_tokens": 150_000}, "max_tokens", 131_072),
    ({"model": "Qwen/Qwen3.8-27B"}, "max_tokens", 32_768),
    ({"temperature": 0}, "temperature", 0), ({"temperature": 1.5}, "temperature", 1.5),
    ({"top_p": 0.9}, "top_p", 0.9),
    ({"model": "claude-sonnet-5", "reasoning_effort": "xhigh"}, "reasoning_effort", "xhigh"),
    ({"model": "claude-sonnet-5", "reasoning_effort": "minimal"}, "reasoning_effort", "low"),
    ({"model": "gpt-5.4", "reasoning_effort": "max"}, "reasoning_effort", "xhigh"),
    ({"model": "MiniMaxAI/MiniMax-M3", "reasoning_effort": "xhigh"}, "reasoning_effort", "high"),
    ({"model": "deepseek/deepseek-v4-flash", "reasoning_effort": "xhigh"}, "reasoning_effort",
     "high"),
    ({"model": "claude-sonnet-5", "reasoning": {"effort": "medium"}}, "reasoning_effort", "medium"),
    ({"model": "KIMI-k3"}, "model", "moonshotai/Kimi-K3"),
    ({"model": "moonshotai/kimi-k3"}, "model", "moonshotai/Kimi-K3"),
    ({"model": "claude-haiku-4-5"}, "model", "claude-haiku-4-5-20251001"),
    ({"model": "default"}, "model", CONFIG.default_model), ({"model": ""}, "model",
                                                           CONFIG.default_model),
    ({"model": "some/unknown-id"}, "model", "some/unknown-id"), ({}, "stream", True),
    ({"stream": False}, "stream", True)]


@pytest.mark.parametrize("members,path,value", SENT, ids=range(len(SENT)))
def test_sent(members, path, value):
    assert at(params_of("chat", request("chat", **members)), path) == value


def test_a_missing_model_is_the_default():
    assert ccproxy.parse_chat({"messages": [USER]}, []).asked == ""
    model = ccproxy.resolve_model("", MODELS, CONFIG, [])
    assert model.id == CONFIG.default_model


ABSENT = [{}, {"reasoning_effort": "none"}, {"reasoning_effort": None},
          {"model": "zai-org/GLM-5", "reasoning_effort": "high"}]


@pytest.mark.parametrize("members", ABSENT, ids=range(len(ABSENT)))
def test_params_that_are_not_sent(members):
    params = params_of("chat", request("chat", **members))
    assert set(params) == {"model", "messages", "tools", "system", "max_tokens", "stream"}


PROMPTS = [     # (members, attribute of the prompt, value)
    ({"stream": True}, "stream", True), ({}, "stream", False), ({}, "include_usage", False),
    ({"stream_options": {"include_usage": True}}, "include_usage", True),
    ({"stream_options": {"include_usage": False}}, "include_usage", False),
    ({"stream_options": {}}, "include_usage", False), ({"stop": "a"}, "stops", ["a"]),
    ({"stop": ["a", "", "b"]}, "stops", ["a", "b"]), ({"stop": []}, "stops", []),
    ({"stop": None}, "stops", []), ({}, "show_thinking", True),
    ({"response_format": {"type": "json_object"}}, "json_format", {}),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}},
     "json_format", {"schema": {"a": 1}}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_format",
     {}), ({"response_format": {"type": "text"}}, "json_format", None), ({"n": 1}, "stops", [])]


@pytest.mark.parametrize("members,name,value", PROMPTS, ids=range(len(PROMPTS)))
def test_prompts(members, name, value):
    assert getattr(read_prompt("chat", request("chat", **members)), name) == value


NOTED = [       # (members, words of the note; None for no note)
    ({"seed": 5}, "seed"), ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": 1}, "presence_penalty"), ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"logprobs": True}, "logprobs"), ({"top_logprobs": 5}, "top_logprobs"),
    ({"parallel_tool_calls": False}, None), ({"top_k": 5}, "top_k"),
    ({"modalities": ["audio"]}, "modalities"), ({"audio": {"voice": "x"}}, "audio"),
    ({"prediction": {"type": "content"}}, "prediction"), ({"verbosity": "low"}, "verbosity"),
    ({"web_search_options": {"x": 1}}, "web_search_options"), ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"), ({"max_tokens": 300_000}, "max_tokens"),
    ({"model": "kimi-k3"}, "Kimi-K3"),
    ({"model": "gpt-5.4", "reasoning_effort": "max"}, "effort"),
    ({"response_format": {"type": "json_object"}}, "json_format"),
    ({"tools": [{"type": "web_search"}]}, "web_search"),
    ({"tools": [{"name": "f"}], "tool_choice": {"type": "allowed_tools"}}, "allowed_tools"),
    ({"seed": None, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": None,
      "logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True, "store": False,
      "modalities": ["text"], "service_tier": "auto", "n": 1}, None),
    ({"logit_bias": {}}, None), ({"user": "u", "metadata": {"a": "b"}, "prompt_cache_key": "x",
                                  "safety_identifier": "y", "no_such_field": [1]}, None)]


@pytest.mark.parametrize("members,words", NOTED, ids=range(len(NOTED)))
def test_notes(members, words):
    _, notes = translate("chat", request("chat", **members))
    assert has_note(notes, words) if words else notes == []
    assert ccproxy.format_notes(notes).isascii()


def test_several_answers_are_refused():
    for count in (2, 8):
        error = refusal("chat", request("chat", n=count))
        assert error.param == "n" and error.status == 400


ROLES = ["user", "assistant", "system", "developer", "tool", "function"]


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_taken(role):
    message = {"role": role, "content": "x", **({"tool_call_id": "c"} if role == "tool" else {}),
               **({"name": "f"} if role == "function" else {})}
    check_params(params_of("chat", request("chat", messages=[USER, message, USER])))


CURSOR = [      # what Cursor posts to Chat Completions (FIELD 35)
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
     "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}]},
    {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
     "tools": [{"type": "function", "name": "f", "description": "d",
                "parameters": {"type": "object"}}]}]


@pytest.mark.parametrize("body", CURSOR, ids=["anthropic", "parts"])
def test_what_cursor_posts(body):
    params = params_of("chat", {"model": "m", **body})
    assert params["messages"] == [{"role": "user", "content": [text("hi")]}]
    assert params["tools"] == [{"name": "f", "description": "d", "input_schema":
                                {"type": "object", "properties": {}}}]


def test_anthropic_history_in_chat():
    messages = [USER, {"role": "assistant", "content": [
        text("a"), {"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                         "data": PNG.partition(",")[2]}}]}]}]
    params = params_of("chat", request("chat", messages=messages))
    check_params(params)
    assert [message["role"] for message in params["messages"]] == ["user", "assistant", "tool",
                                                                   "user"]


# Frames.

def choice(delta, reason=None):
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def tool(index, **function):
    return choice({"tool_calls": [{"index": index, "function": function}]})


def opened(index, call_id, name):
    return choice({"tool_calls": [{"index": index, "id": call_id, "type": "function",
                                   "function": {"name": name, "arguments": ""}}]})


ROLE = choice({"role": "assistant", "content": ""})
USAGE = {"inputTokens": 7, "outputTokens": 3, "inputTokenDetails": {"cacheReadTokens": 2},
         "outputTokenDetails": {"reasoningTokens": 1}}
STREAMS = [     # (events, prompt members, frames)
    ([{"type": "text-delta", "text": "Hi"}, {"type": "text-delta", "text": "!"},
      {**FINISH, "totalUsage": USAGE}], {},
     [ROLE, choice({"content": "Hi"}), choice({"content": "!"}), choice({}, "stop"), "[DONE]"]),
    ([{"type": "text-delta", "text": "Hi"}, {**FINISH, "totalUsage": USAGE}],
     {"include_usage": True},
     [ROLE, choice({"content": "Hi"}), choice({}, "stop"),
      {**HEAD, "choices": [], "usage": {
          "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
          "prompt_tokens_details": {"cached_tokens": 2},
          "completion_tokens_details": {"reasoning_tokens": 1}}}, "[DONE]"]),
    ([{"type": "reasoning-delta", "text": "hm"}, {"type": "text-delta", "text": "Hi"}, FINISH], {},
     [ROLE, choice({"reasoning_content": "hm"}), choice({"content": "Hi"}), choice({}, "stop"),
      "[DONE]"]),
    ([{"type": "reasoning-delta", "text": "hm"}, {"type": "text-delta", "text": "Hi"}, FINISH],
     {"show_thinking": False},
     [ROLE, choice({"content": "Hi"}), choice({}, "stop"), "[DONE]"]),
    ([{"type": "tool-input-start", "id": "c", "toolName": "f"},
      {"type": "tool-input-delta", "id": "c", "delta": '{"a"'},
      {"type": "tool-input-delta", "id": "c", "delta": ":1}"},
      {"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": {"a": 1}},
      {"type": "tool-call", "toolCallId": "d", "toolName": "g", "input": {}},
      {"type": "finish", "finishReason": "tool-calls"}], {},
     [ROLE, opened(0, "c", "f"), tool(0, arguments='{"a"'), tool(0, arguments=":1}"),
      opened(1, "d", "g"), tool(1, arguments="{}"), choice({}, "tool_calls"), "[DONE]"]),
    ([FINISH], {}, [ROLE, choice({}, "stop"), "[DONE]"]),
    ([{"type": "text-delta", "text": "no"}, {"type": "finish", "finishReason": "content-filter"}],
     {}, [ROLE, choice({"content": "no"}), choice({}, "content_filter"), "[DONE]"]),
    ([{"type": "text-delta", "text": "x"}, {"type": "finish", "finishReason": "length"}],
     {}, [ROLE, choice({"content": "x"}), choice({}, "length"), "[DONE]"]),
    ([{"type": "text-delta", "text": "x"}, {"type": "finish", "finishReason": "pause_turn"}],
     {}, [ROLE, choice({"content": "x"}), choice({}, "stop"), "[DONE]"]),
    ([{"type": "text-delta", "text": "x"}], {}, [ROLE, choice({"content": "x"})]),
    ([{"type": "text-delta", "text": "aSTOPb"}], {"stops": ["STOP"]},
     [ROLE, choice({"content": "a"}), choice({}, "stop"), "[DONE]"])]


@pytest.mark.parametrize("events,members,frames", STREAMS, ids=range(len(STREAMS)))
def test_streams(events, members, frames):
    assert read_frames(run(new_answer("chat", **members), ndjson(*events))) == frames


def test_frames_to_the_byte():
    data = run(new_answer("chat"), text_answer("a\u2028\u00e9\"\n"))
    assert ('data: {"id":"id","object":"chat.completion.chunk","created":0,"model":"m","choices":'
            '[{"index":0,"delta":{"content":"a\\u2028\u00e9\\"\\n"},"finish_reason":null}]}\n\n'
            ).encode() in data
    assert data.endswith(b"data: [DONE]\n\n")


def test_no_usage_chunk_where_no_usage_is_known():
    """A figure that is not known is left out, not made 0 (FIELD 7)."""
    frames = read_frames(run(new_answer("chat", include_usage=True), ndjson(FINISH)))
    assert all(frame == "[DONE]" or frame["choices"] for frame in frames)


# Bodies.

def test_body_to_the_member():
    data = ndjson({"type": "reasoning-delta", "text": "hm"}, {"type": "text-delta", "text": "a"},
                  {"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": {"a": 1}},
                  {"type": "text-delta", "text": "b"},
                  {"type": "finish", "finishReason": "tool-calls", "totalUsage": USAGE})
    assert run_plain("chat", data)[1] == {
        "id": "id", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "logprobs": None, "finish_reason": "tool_calls", "message": {
            "role": "assistant", "content": "ab", "reasoning_content": "hm",
            "tool_calls": [{"id": "c", "type": "function", "function": {
                "name": "f", "arguments": '{"a":1}'}}]}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
                  "prompt_tokens_details": {"cached_tokens": 2},
                  "completion_tokens_details": {"reasoning_tokens": 1}}}


CONTENTS = [([{"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": {}}], None),
            ([], ""), ([{"type": "text-delta", "text": "a"}], "a")]


@pytest.mark.parametrize("events,content", CONTENTS, ids=range(len(CONTENTS)))
def test_content_of_a_body(events, content):
    _, body = run_plain("chat", ndjson(*events, FINISH))
    assert at(body, "choices.0.message.content") == content and "usage" not in body


@pytest.mark.parametrize("reason", ["length", "stop", "tool-calls", "content-filter"])
def test_a_cut_call_is_left_out_of_a_body(reason):
    data = ndjson({"type": "text-delta", "text": "a"},
                  {"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": {}},
                  {"type": "tool-input-start", "id": "d", "toolName": "g"},
                  {"type": "tool-input-delta", "id": "d", "delta": '{"x":'},
                  {"type": "finish", "finishReason": reason})
    answer, body = run_plain("chat", data)
    message = at(body, "choices.0.message")
    assert [call["id"] for call in message["tool_calls"]] == ["c"]
    assert at(body, "choices.0.finish_reason") == "length"
    assert has_note(answer.reply.notes, "cut=tool call g")
    stream, folded = run_stream("chat", data)
    shown = folded["message"]["tool_calls"][1]["function"]["arguments"]
    assert shown == '{"x":' and folded["finish_reason"] == "length"
    assert any("cut=tool call g" in comment for comment in read_comments(
        run(new_answer("chat"), data)))


# Errors.

ERRORS = [      # (kind, known, members of the error object)
    ("invalid", {"param": "n"}, {"type": "invalid_request_error", "param": "n", "code": None}),
    ("authentication", {}, {"type": "authentication_error", "code": "invalid_api_key"}),
    ("billing", {}, {"type": "insufficient_quota", "code": "insufficient_quota"}),
    ("plan", {}, {"type": "permission_error", "code": "model_not_in_plan"}),
    ("model", {}, {"type": "invalid_request_error", "code": "model_not_found"}),
    ("rate_limit", {"retry_after": 1.2}, {"type": "rate_limit_exceeded", "retry_after": 2}),
    ("too_long", {}, {"code": "context_length_exceeded"}),
    ("upstream", {"trace_id": "t", "code": "c"}, {"type": "server_error", "trace_id": "t",
                                                  "upstream_code": "c"}),
    ("empty", {}, {"type": "server_error", "code": "empty_response"})]


@pytest.mark.parametrize("kind,known,members", ERRORS, ids=[row[0] for row in ERRORS])
def test_errors(kind, known, members):
    error = ccproxy.ProxyError(kind, "words", **known)
    shown = ccproxy.CHAT.error(error)
    assert list(shown) == ["error"] and shown["error"]["message"] == "words"
    assert {name: shown["error"][name] for name in members} == members
    (frame,) = read_frames(ccproxy.CHAT.frames(None, ccproxy.Fail(error)))
    assert frame == shown


# The recorded answers: (text, thinking, calls, finish reason, usage), or the error's kind.

def used(prompt, completion, cached, reasoning):
    return {"prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning}}


UNICODE = ("Gr\u00fc\u00dfe \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 und "
           "\U0001f469\u200d\U0001f680 \u2014 \u65e5\u672c\u8a9e\u30c6\u30b9\u30c8 e\u0301 "
           "\U0001f1f8\U0001f1ea \u2028 tab\t nl\n quote\" back\\slash \U0001d11e fin\u00a0.")
RECORDED = {
    "01": ("Hello there, friend.", None, [], "stop", used(15, 6, 0, 0)),
    "02": ("The answer is **4**.", "The user asks 2+2.\nIt is 4.", [], "stop", used(17, 17, 0, 11)),
    "03": ("", "Need the tool.", [("call_00_AbCdEf0001", "get_weather", {"city": "Oslo"})],
           "tool_calls", used(373, 61, 0, 18)),
    "04": ("I'll check both.", None, [
        ("call_00_par0001", "get_weather", {"city": "Oslo"}),
        ("call_01_par0002", "get_weather", {"city": "S\u00e3o Paulo"})], "tool_calls",
        used(412, 88, 256, 0)),
    "05": ("Red.", "A red square.", [], "stop", used(310, 246, 0, 240)),
    "06": ("", "Let's think about this very carefully", [], "length", used(20, 96, 0, 96)),
    "07": "unavailable", "08": "billing",
    "09": ("A short summary.", "Short summary needed.", [], "stop", used(20492, 31, 18432, 0)),
    "10_": (UNICODE, None, [], "stop", used(18, 60, 0, 0)),
    "10b": ("rocket \U0001f680 done", None, [], "stop", used(18, 6, 0, 0)),
    "12": "upstream", "13": "billing",
    "14": ("old shape", None, [], "stop", used(100, 9, 64, 0)),
    "15": ("step one step two", None, [], "stop", used(24, 8, 0, 0))}


@pytest.mark.parametrize("name", sorted(RECORDED))
@pytest.mark.parametrize("stream", [True, False])
def test_recorded(name, stream):
    if stream:
        answer, folded = run_stream("chat", recorded(name), include_usage=True)
        message = folded and folded["message"]
    else:
        answer, body = run_plain("chat", recorded(name))
        folded = body and {**body["choices"][0], "usage": body["usage"]}
        message = folded and folded["message"]
    expected = RECORDED[name]
    if isinstance(expected, str):
        assert answer.error.kind == expected
        return
    calls = [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
             for call in message.get("tool_calls", [])]
    assert (message["content"] or "", message.get("reasoning_content"), calls,
            folded["finish_reason"], folded["usage"]) == expected


def test_the_longest_recorded():
    words = "".join(json.loads(line)["text"] for line in recorded("11").splitlines()
                    if line.startswith(b'{"type":"text-delta"'))
    answer, folded = run_stream("chat", recorded("11"), include_usage=True)
    assert folded["message"] == {"content": words} and len(words) > 100_000
    assert folded["usage"] == used(14, 20000, 0, 0)


def test_nothing_of_the_request_echo_is_shown():
    for name in ("01", "05", "15"):
        data = run(new_answer("chat"), recorded(name))
        assert b"You are terse" not in data and b"providerOptions" not in data
