"""FACE: MESSAGES: a Messages request as a prompt, events as named frames, a reply as one body."""
from __future__ import annotations

import json

import pytest
from fake_upstream import ndjson, recorded, text_answer
from harness import ccproxy
from pure import (CONFIG, USER, at, check_params, has_note, new_answer, params_of, read_comments,
                  read_frames, read_prompt, refusal, request, run, run_plain, run_stream, text,
                  translate)
from test_face_chat import UNICODE

FINISH = {"type": "finish", "finishReason": "stop"}
SIGNATURE = ccproxy.DEFAULT_SIGNATURE


# Requests: (members, path in params, what is sent there).

def thinking(kind, budget=None, **more):
    return {"thinking": {"type": kind, **({"budget_tokens": budget} if budget else {}), **more},
            "model": "claude-sonnet-5"}


SENT = [
    ({"max_tokens": 10}, "max_tokens", 10), ({"max_tokens": None}, "max_tokens", 64000),
    ({"max_tokens": 128_000}, "max_tokens", 128_000),
    ({"max_tokens": 250_000}, "max_tokens", 200_000),
    ({"model": "z-ai/glm-5.3-flash", "max_tokens": 150_000}, "max_tokens", 131_072),
    ({"temperature": 0}, "temperature", 0), ({"top_p": 0.9}, "top_p", 0.9),
    (thinking("enabled", 10_000), "reasoning_effort", "high"),
    (thinking("enabled", 31_999), "reasoning_effort", "high"),
    (thinking("enabled", 9_999), "reasoning_effort", "medium"),
    (thinking("enabled", 5_000), "reasoning_effort", "medium"),
    (thinking("enabled", 4_999), "reasoning_effort", "low"),
    (thinking("enabled", 2_000), "reasoning_effort", "low"),
    (thinking("enabled", 1_024, display="summarized"), "reasoning_effort", "low"),
    (thinking("enabled", -1), "reasoning_effort", "low"),
    ({**thinking("adaptive", display="omitted"), "output_config": {"effort": "max"}},
     "reasoning_effort", "max"),
    ({**thinking("enabled", 1_024), "output_config": {"effort": "xhigh"}}, "reasoning_effort",
     "xhigh"),
    ({"output_config": {"effort": "high"}, "model": "claude-sonnet-5"}, "reasoning_effort", "high"),
    ({"model": "claude-opus-5[1m]"}, "model", "claude-opus-5"),
    ({"model": "default"}, "model", CONFIG.default_model), ({"system": "s"}, "system", [text("s")])]


@pytest.mark.parametrize("members,path,value", SENT, ids=range(len(SENT)))
def test_sent(members, path, value):
    assert at(params_of("messages", request("messages", **members)), path) == value


ABSENT = [{}, thinking("disabled"), thinking("adaptive"), {"output_config": {}},
          {"thinking": None}, {"model": "zai-org/GLM-5", **{"thinking": {
              "type": "enabled", "budget_tokens": 9000}}}]


@pytest.mark.parametrize("members", ABSENT, ids=range(len(ABSENT)))
def test_params_that_are_not_sent(members):
    params = params_of("messages", request("messages", **members))
    assert set(params) == {"model", "messages", "tools", "system", "max_tokens", "stream"}


PROMPTS = [     # (members, attribute of the prompt, value)
    ({"stream": True}, "stream", True), ({}, "stream", False), ({}, "show_thinking", False),
    (thinking("enabled", 1024), "show_thinking", True),
    (thinking("adaptive"), "show_thinking", True),
    (thinking("adaptive", display="omitted"), "show_thinking", True),
    (thinking("disabled"), "show_thinking", False), ({"thinking": None}, "show_thinking", False),
    ({"output_config": {"effort": "high"}}, "show_thinking", False),
    ({"stop_sequences": ["a", "", "b"]}, "stops", ["a", "b"]),
    ({"stop_sequences": []}, "stops", []),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}}, "json_format",
     {"schema": {"a": 1}}),
    ({"metadata": {"user_id": '{"session_id":"x"}'}}, "user_id", '{"session_id":"x"}'),
    ({"metadata": {}}, "user_id", None)]


@pytest.mark.parametrize("members,name,value", PROMPTS, ids=range(len(PROMPTS)))
def test_prompts(members, name, value):
    assert getattr(read_prompt("messages", request("messages", **members)), name) == value


NOTED = [       # (members, words of the note; None for no note)
    ({"top_k": 5}, "top_k"), ({"service_tier": "standard_only"}, "service_tier"),
    ({"container": "c"}, "container"), ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"max_tokens": 300_000}, "max_tokens"), ({"model": "claude-haiku-4-5"}, "claude-haiku-4-5-2"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "json_format"),
    ({"service_tier": "auto", "mcp_servers": [], "container": None}, None),
    ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
      "metadata": {"user_id": "u"}, "betas": ["x"], "no_such_field": {"a": 1}}, None)]


@pytest.mark.parametrize("members,words", NOTED, ids=range(len(NOTED)))
def test_notes(members, words):
    _, notes = translate("messages", request("messages", **members))
    assert has_note(notes, words) if words else notes == []


@pytest.mark.parametrize("thread", [{"type": "create"}, {}, "x", {
    "type": "continue", "previous_message_id": "msg_1"}], ids=range(4))
def test_threads_are_refused_in_the_words_that_sdks_know(thread):
    """R17: without the history the answer would be nonsense."""
    error = refusal("messages", request("messages", thread=thread))
    shown = ccproxy.messages_error(error)
    assert error.status == 400 and shown["error"]["type"] == "invalid_request_error"
    assert shown["error"]["details"] == {"error_code": "thread_unsupported_request",
                                         "unsupported": ["thread"]}


def test_a_request_of_claude_code():
    """R10-R15 in one."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object",
              "properties": {"n": {"type": "number", "exclusiveMinimum": 0}}}
    cache = {"type": "ephemeral", "ttl": "1h"}
    body = {
        "model": "claude-opus-5-5", "max_tokens": 128_000, "stream": True,
        "thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": '{"session_id":"s"}'},
        "system": [text("x-anthropic-billing-header: cc_version=2; cch=1a2b;"),
                   text("You are an agent.", cache_control=cache)],
        "tools": [{"name": "ToolSearch", "description": "d", "input_schema": schema},
                  {"name": "DeferredToolPlaceholder", "description": "", "defer_loading": True,
                   "input_schema": schema}],
        "messages": [
            {"role": "user", "content": [text("hi", cache_control=cache)]},
            {"role": "system", "content": [text("Environment: ...")]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "foreign"},
                {"type": "tool_use", "id": "t1", "name": "ToolSearch", "input": {"n": 1}},
                {"type": "tool_use", "id": "t2", "name": "Read", "input": {}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t2", "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                                 "data": "AAAA"}}]},
                {"type": "tool_result", "tool_use_id": "t1", "content": [
                    {"type": "tool_reference", "tool_name": "Read"}]},
                text("go on")]}]}
    sent, notes = translate("messages", body)
    params = sent["params"]
    check_params(params)
    assert notes == [] and params["max_tokens"] == 128_000 and params["reasoning_effort"] == "high"
    assert params["system"] == [text("You are an agent.", cache_control=cache)]
    assert [message["role"] for message in params["messages"]] == ["user", "user", "assistant",
                                                                   "tool", "user", "user"]
    assert at(params, "messages.1.content.0.text") == \
        "<system-reminder>\nEnvironment: ...\n</system-reminder>"
    assert [part["toolCallId"] for part in at(params, "messages.3.content")] == ["t1", "t2"]
    assert at(params, "messages.3.content.0.output.value") == "Tool available: Read"
    assert at(params, "messages.4.content.1.image") == "data:image/png;base64,AAAA"
    assert at(params, "messages.5.content") == [text("go on")]
    assert at(params, "tools.0.input_schema.properties.n.exclusiveMinimum") == 0


# Frames.

USAGE = {"inputTokens": 20, "outputTokens": 3,
         "inputTokenDetails": {"cacheReadTokens": 8, "cacheWriteTokens": 2}}
USED = {"input_tokens": 10, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 8,
        "output_tokens": 3}
START = {"type": "message_start", "message": {
    "id": "id", "type": "message", "role": "assistant", "model": "m", "content": [],
    "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 5, "output_tokens": 0}}}
STOP = {"type": "message_stop"}


def opened(index, **block):
    return {"type": "content_block_start", "index": index, "content_block": block}


def grown(index, kind, **member):
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **member}}


def closed(index):
    return {"type": "content_block_stop", "index": index}


def ended(reason, sequence=None, usage=USED):
    return {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": usage}


def words(index, said):
    return [opened(index, type="text", text=""), grown(index, "text_delta", text=said),
            closed(index)]


def finish(reason):
    return {"type": "finish", "finishReason": reason, "totalUsage": USAGE}


STREAMS = [     # (events, prompt members, frames)
    ([{"type": "text-delta", "text": "Hi"}, finish("stop")], {},
     [START, *words(0, "Hi"), ended("end_turn"), STOP]),
    ([{"type": "reasoning-delta", "text": "h"}, {"type": "reasoning-delta", "text": "m"},
      {"type": "text-delta", "text": "Hi"}, finish("stop")], {},
     [START, opened(0, type="thinking", thinking="", signature=""),
      grown(0, "thinking_delta", thinking="h"), grown(0, "thinking_delta", thinking="m"),
      grown(0, "signature_delta", signature=SIGNATURE), closed(0), *words(1, "Hi"),
      ended("end_turn"), STOP]),
    ([{"type": "reasoning-delta", "text": "h", "providerMetadata": {"p": {"signature": "s1"}}},
      {"type": "text-delta", "text": "Hi"}, {"type": "reasoning-delta", "text": "i"},
      finish("stop")], {},
     [START, opened(0, type="thinking", thinking="", signature=""),
      grown(0, "thinking_delta", thinking="h"), grown(0, "signature_delta", signature="s1"),
      closed(0), *words(1, "Hi"), opened(2, type="thinking", thinking="", signature=""),
      grown(2, "thinking_delta", thinking="i"), grown(2, "signature_delta", signature=SIGNATURE),
      closed(2), ended("end_turn"), STOP]),
    ([{"type": "reasoning-delta", "text": "h"}, {"type": "text-delta", "text": "Hi"},
      finish("stop")], {"show_thinking": False},
     [START, *words(0, "Hi"), ended("end_turn"), STOP]),
    ([{"type": "tool-input-start", "id": "c", "toolName": "f"},
      {"type": "tool-input-delta", "id": "c", "delta": '{"a"'},
      {"type": "tool-input-delta", "id": "c", "delta": ":1}"},
      {"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": {"a": 1}},
      finish("tool-calls")], {},
     [START, opened(0, type="tool_use", id="c", name="f", input={}),
      grown(0, "input_json_delta", partial_json='{"a"'),
      grown(0, "input_json_delta", partial_json=":1}"), closed(0), ended("tool_use"), STOP]),
    ([finish("stop")], {}, [START, ended("end_turn"), STOP]),
    ([{"type": "text-delta", "text": "x"}, finish("length")], {},
     [START, *words(0, "x"), ended("max_tokens"), STOP]),
    ([{"type": "text-delta", "text": "x"}, finish("content-filter")], {},
     [START, *words(0, "x"), ended("refusal"), STOP]),
    ([{"type": "text-delta", "text": "x"}, finish("pause_turn")], {},
     [START, *words(0, "x"), ended("pause_turn"), STOP]),
    ([{"type": "text-delta", "text": "aSTOPb"}], {"stops": ["STOP"]},
     [START, *words(0, "a"), ended("stop_sequence", "STOP",
                                   {"input_tokens": 5, "output_tokens": 1}), STOP])]


@pytest.mark.parametrize("events,members,frames", STREAMS, ids=range(len(STREAMS)))
def test_streams(events, members, frames):
    assert read_frames(run(new_answer("messages", **members), ndjson(*events))) == frames


def test_frames_to_the_byte():
    data = run(new_answer("messages"), text_answer("a\u2028\""))
    assert ('event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
            '{"type":"text_delta","text":"a\\u2028\\""}}\n\n').encode() in data
    assert data.endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert b"event: ping" not in data


def test_every_event_line_names_its_type():
    for line in run(new_answer("messages"), recorded("03")).decode().split("\n\n")[:-1]:
        name, _, data = line.partition("\n")
        assert name == "event: " + json.loads(data[len("data: "):])["type"]


USAGES = [      # (totalUsage, usage of the answer)
    ({"inputTokens": 20, "outputTokens": 3}, {"input_tokens": 20, "output_tokens": 3}),
    ({"inputTokens": 20, "outputTokens": 3, "cachedInputTokens": 5},
     {"input_tokens": 15, "cache_read_input_tokens": 5, "output_tokens": 3}),
    (USAGE, USED),
    ({"inputTokens": 5, "outputTokens": 3, "cachedInputTokens": 9},
     {"input_tokens": 0, "cache_read_input_tokens": 9, "output_tokens": 3})]


@pytest.mark.parametrize("given,shown", USAGES, ids=range(len(USAGES)))
def test_usage(given, shown):
    data = ndjson({"type": "text-delta", "text": "a"}, {**FINISH, "totalUsage": given})
    assert run_plain("messages", data)[1]["usage"] == shown
    assert run_stream("messages", data)[1]["usage"] == shown


# Bodies.

def test_body_to_the_member():
    data = ndjson({"type": "reasoning-delta", "text": "hm"}, {"type": "text-delta", "text": "a"},
                  {"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": {"a": 1}},
                  finish("tool-calls"))
    assert run_plain("messages", data)[1] == {
        "id": "id", "type": "message", "role": "assistant", "model": "m", "content": [
            {"type": "thinking", "thinking": "hm", "signature": SIGNATURE},
            {"type": "text", "text": "a"},
            {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}],
        "stop_reason": "tool_use", "stop_sequence": None, "usage": USED}


def test_text_comes_first_where_thinking_was_not_asked_for():
    """A client that did not ask reads content[0].text."""
    for data in (recorded("02"), recorded("09")):
        body = run_plain("messages", data, show_thinking=False)[1]
        assert [block["type"] for block in body["content"]] == ["text"]


@pytest.mark.parametrize("reason", ["length", "stop", "tool-calls"])
def test_a_cut_call_is_left_out_of_a_body(reason):
    data = ndjson({"type": "text-delta", "text": "a"},
                  {"type": "tool-input-start", "id": "d", "toolName": "g"},
                  {"type": "tool-input-delta", "id": "d", "delta": '{"x":'}, finish(reason))
    answer, body = run_plain("messages", data)
    assert body["content"] == [text("a")] and body["stop_reason"] == "max_tokens"
    assert has_note(answer.reply.notes, "cut=tool call g")
    stream, folded = run_stream("messages", data)
    assert folded["content"][1]["input"] == '{"x":' and folded["stop_reason"] == "max_tokens"
    assert any("cut=tool call g" in comment for comment in read_comments(
        run(new_answer("messages"), data)))


# Errors.

ERRORS = [      # (kind, error.type)
    ("invalid", "invalid_request_error"), ("authentication", "authentication_error"),
    ("billing", "billing_error"), ("plan", "permission_error"), ("model", "not_found_error"),
    ("rate_limit", "rate_limit_error"), ("usage_window", "rate_limit_error"),
    ("too_long", "invalid_request_error"), ("overloaded", "overloaded_error"),
    ("unavailable", "overloaded_error"), ("timeout", "timeout_error"), ("upstream", "api_error"),
    ("empty", "api_error"), ("too_large", "request_too_large")]


@pytest.mark.parametrize("kind,name", ERRORS)
def test_errors(kind, name):
    error = ccproxy.ProxyError(kind, "words", trace_id="t", retry_after=1.2)
    shown = ccproxy.MESSAGES.error(error)
    assert shown == {"type": "error", "error": {"type": name, "message": "words", "trace_id": "t",
                                                "retry_after": 2}}
    data = ccproxy.MESSAGES.frames(None, ccproxy.Fail(error))
    assert data.startswith(b"event: error\ndata: ") and read_frames(data) == [shown]


# The recorded answers: (content, stop reason, usage), or the error's kind.

def used(fresh, output, read=None, write=None):
    return {"input_tokens": fresh, "output_tokens": output,
            **({} if read is None else {"cache_read_input_tokens": read}),
            **({} if write is None else {"cache_creation_input_tokens": write})}


def thought(said, signature=SIGNATURE):
    return {"type": "thinking", "thinking": said, "signature": signature}


def use(call_id, **given):
    return {"type": "tool_use", "id": call_id, "name": "get_weather", "input": given}


RECORDED = {
    "01": ([text("Hello there, friend.")], "end_turn", used(15, 6, 0)),
    "02": ([thought("The user asks 2+2.\nIt is 4."), text("The answer is **4**.")], "end_turn",
           used(17, 17, 0)),
    "03": ([thought("Need the tool."), use("call_00_AbCdEf0001", city="Oslo")], "tool_use",
           used(373, 61, 0)),
    "04": ([text("I'll check both."), use("call_00_par0001", city="Oslo"),
            use("call_01_par0002", city="S\u00e3o Paulo")], "tool_use", used(156, 88, 256)),
    "05": ([thought("A red square."), text("Red.")], "end_turn", used(310, 246, 0)),
    "06": ([thought("Let's think about this very carefully")], "max_tokens", used(20, 96, 0)),
    "07": "unavailable", "08": "billing",
    "09": ([thought("Short summary needed.", "c2lnbmF0dXJlLXRlc3Q="), text("A short summary.")],
           "end_turn", used(12, 31, 18432, 2048)),
    "10_": ([text(UNICODE)], "end_turn", used(18, 60, 0)),
    "10b": ([text("rocket \U0001f680 done")], "end_turn", used(18, 6, 0)),
    "12": "upstream", "13": "billing",
    "14": ([text("old shape")], "end_turn", used(36, 9, 64)),
    "15": ([text("step one step two")], "end_turn", used(24, 8, 0))}


@pytest.mark.parametrize("name", sorted(RECORDED))
@pytest.mark.parametrize("stream", [True, False])
def test_recorded(name, stream):
    answer, shown = (run_stream if stream else run_plain)("messages", recorded(name))
    expected = RECORDED[name]
    if isinstance(expected, str):
        assert answer.error.kind == expected
        return
    content, reason, usage = expected
    assert shown["content"] == content and shown["usage"] == usage
    assert (shown["stop_reason"], shown["stop_sequence"]) == (reason, None)
    assert shown["model"] == "m"


def test_recorded_thinking_alone_is_empty_for_who_did_not_ask():
    for stream in (True, False):
        answer = new_answer("messages", stream=stream, show_thinking=False)
        run(answer, recorded("06"))
        assert answer.error.kind == "empty" and answer.error.status == 502


def test_the_whole_prompt_reaches_the_answer():
    """From a request's members to what its answer shows."""
    for members, kinds in (({}, ["text"]), (thinking("adaptive"), ["thinking", "text"])):
        prompt = read_prompt("messages", request("messages", messages=[USER], **members))
        reply = ccproxy.Reply("id", "m", 0)
        answer = ccproxy.Answer(ccproxy.MESSAGES, ccproxy.ALPHA, reply, prompt, False)
        answer.feed(recorded("02"))
        assert [block["type"] for block in answer.body()["content"]] == kinds
