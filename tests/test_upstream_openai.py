"""UPSTREAM FORMAT: OPENAI: a prompt as a chat completions body, its SSE as events, and the laws."""
from __future__ import annotations

import json
import re

import laws
import pytest
from fake_provider import compact, openai_chunk, openai_sse
from harness import ccproxy
from pure import (ALL_FACES, PNG, USER, check_frames, has_note, read_frames, read_prompt, request,
                  run)
from pure_formats import new_answer, read_events, run_stream

OPENAI = ccproxy.OPENAI
OPENAI_LANES = ccproxy.OPENAI_LANES
build_openai = ccproxy.build_openai
read_provider_failure = ccproxy.read_provider_failure

FACE_NAMES = sorted(ALL_FACES)
DONE = b"data: [DONE]\n\n"


def body_of(face, **members):
    prompt = read_prompt(face, request(face, **members))
    return json.loads(build_openai(prompt, "session")), prompt.notes


def sse(*frames):
    return b"".join(frame if isinstance(frame, bytes) else b"data: %b\n\n" % compact(frame).encode()
                    for frame in frames)


def delta(reason=None, **members):
    return openai_chunk(members, reason)


def call_delta(**call):
    return delta(tool_calls=[call])


def ended(*frames, reason="stop"):
    return sse(*frames, delta(reason), DONE)


# The laws.

@pytest.mark.parametrize("odd", [False, True])
def test_grammar_and_truth(odd):
    laws.grammar_law("openai", odd)
    laws.truth_law("openai", odd)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("face", FACE_NAMES)
def test_parity(face, odd):
    laws.parity_law("openai", face, odd)


@pytest.mark.parametrize("law", [laws.cuts_law, laws.lane_law, laws.restart_law,
                                 laws.framing_law], ids=["cuts", "lane", "restart", "framing"])
@pytest.mark.parametrize("face", FACE_NAMES)
def test_laws(face, law):
    law("openai", face)


@pytest.mark.parametrize("face", FACE_NAMES)
def test_the_lane_is_used(face):
    steps = [("thinking", "hm")] * 300 + [("text", "word ")] * 300 + [("start", "c1", "f")] + [
        ("more", "c1", piece) for piece in ['{"a":"'] + ["x"] * 300 + ['"}']] + [
        ("stop", "c1"), ("usage", {"input": 1, "output": 2}), ("end", "tool_calls")]
    assert laws.count_ordinary_lines("openai", face, openai_sse(steps)) < 30


# The body.

def test_body_to_the_byte():
    prompt = read_prompt("chat", request("chat", model="m", max_tokens=9, messages=[
        {"role": "system", "content": "s"}, USER]))
    assert build_openai(prompt, "S").decode() == (
        '{"model":"m","messages":[{"role":"system","content":"s"},{"role":"user","content":"hi"}],'
        '"max_tokens":9,"stream":true,"stream_options":{"include_usage":true}}')


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {
    "type": "object", "properties": {"x": {"type": ["string", "null"]}}}}}
CALL = {"id": "c.1", "type": "function", "function": {"name": "f", "arguments": '{"x": "\u00e9"}'}}
HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "look"},
                                 {"type": "image_url", "image_url": {"url": PNG}}]},
    {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c.1", "content": "it is"},
    {"role": "assistant", "tool_calls": [{**CALL, "id": "c2"}]},
    {"role": "tool", "tool_call_id": "c2", "content": ""}, USER]


def test_history():
    body, notes = body_of("chat", messages=HISTORY, tools=[TOOL])
    shown = {"name": "f", "arguments": '{"x":"\u00e9"}'}
    assert body["messages"] == [
        HISTORY[0],
        {"role": "assistant", "content": "a", "reasoning_content": "r",
         "tool_calls": [{"id": "c.1", "type": "function", "function": shown}]},
        {"role": "tool", "tool_call_id": "c.1", "content": "it is"},
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "c2", "type": "function", "function": shown}]},
        {"role": "tool", "tool_call_id": "c2", "content": ""}, {"role": "user", "content": "hi"}]
    assert body["tools"] == [TOOL] and notes == []


def test_history_of_messages():
    """An Anthropic client's history, whose cache_control and signatures have no place here."""
    body, _ = body_of("messages", system=[{"type": "text", "text": "a"}, {
        "type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}], messages=[
        {"role": "user", "content": [{"type": "text", "text": "one"},
                                     {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"},
            {"type": "thinking", "thinking": "", "signature": "s"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "no",
                                      "is_error": True}]}])
    assert body["messages"] == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": [{"type": "text", "text": "one"},
                                     {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "reasoning_content": "t", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "Error: no"}]
    assert "cache_control" not in json.dumps(body)


SETTINGS = [    # (members asked, members sent)
    ({"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}),
    ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
    ({"stop": ["x"]}, {}), ({"temperature": None}, {}),
    ({"tools": [TOOL], "tool_choice": "auto"}, {"tool_choice": "auto"}),
    ({"tools": [TOOL], "tool_choice": "required"}, {"tool_choice": "required"}),
    ({"tools": [TOOL], "tool_choice": "none"}, {}),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
     {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ({"model": "gpt-5.5", "temperature": 0.3, "top_p": 1}, {}),
    ({"model": "gpt-4o", "temperature": 0.3}, {"temperature": 0.3})]


@pytest.mark.parametrize("asked,sent", SETTINGS, ids=range(len(SETTINGS)))
def test_settings(asked, sent):
    body, notes = body_of("chat", **asked)
    names = {"temperature", "top_p", "reasoning_effort", "tool_choice", "stop"}
    assert {name: body[name] for name in body if name in names} == sent
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    dropped = {"temperature", "top_p"} & {name for name, value in asked.items()
                                          if value is not None} - set(sent)
    assert all(has_note(notes, "ignored=" + name) for name in dropped)


@pytest.mark.parametrize("model,member", [
    ("gpt-5.5", "max_completion_tokens"), ("openai/gpt-6-sol", "max_completion_tokens"),
    ("gpt-5.3-codex", "max_completion_tokens"), ("o3-mini", "max_completion_tokens"),
    ("gpt-4o", "max_tokens"), ("deepseek/deepseek-v4-flash", "max_tokens"),
    ("vendor/o1x", "max_tokens"), ("foo-1", "max_tokens")])
def test_name_of_the_limit(model, member):
    body, _ = body_of("chat", model=model, max_tokens=7)
    assert body[member] == 7 and len({"max_tokens", "max_completion_tokens"} & set(body)) == 1


def test_an_assistant_that_only_thought_unseen_is_left_out():
    body, _ = body_of("messages", messages=[USER, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "", "signature": "s"}]}, USER])
    assert [message["role"] for message in body["messages"]] == ["user", "user"]


def test_numbers_without_a_json_word():
    prompt = ccproxy.Prompt("m", [ccproxy.Turn("assistant", [ccproxy.Call("1", "f", {
        "x": float("inf")})])], model="m")
    with pytest.raises(ccproxy.ProxyError) as caught:
        build_openai(prompt, "S")
    assert caught.value.kind == "invalid"


# Text, thinking, ends.

def words(events, kind="text"):
    return "".join(event.text for event in events
                   if isinstance(event, ccproxy.Delta) and event.block.kind == kind)


DELTAS = [      # (delta, text, thinking; a refusal, where there is one)
    ({"content": "a"}, "a", ""), ({"role": "assistant", "content": "a"}, "a", ""),
    ({"content": "", "reasoning_content": "t"}, "", "t"), ({"reasoning": "t"}, "", "t"),
    ({"reasoning": "t", "reasoning_content": "t"}, "", "t"),
    ({"content": "a", "reasoning": "t"}, "a", "t"), ({"content": None}, "", ""),
    ({"content": ["a"]}, "", ""), ({"refusal": "no"}, "", "", "no"), ({}, "", ""),
    ({"content": None, "refusal": "no"}, "", "", "no"), ({"refusal": ""}, "", ""),
    ({"content": "a", "refusal": None}, "a", ""), ({"refusal": 5}, "", ""),
    ({"content": "a", "refusal": "no"}, "a", "", "no"),
    ({"content": "a", "reasoning_content": None, "tool_calls": None}, "a", "")]


@pytest.mark.parametrize("row", DELTAS, ids=range(len(DELTAS)))
def test_deltas(row):
    members, text, thinking, refusal = (row + ("",))[:4]
    for data in (ended(delta(**members)), ended(delta(content="x"), delta(**members))):
        _, events = read_events(OPENAI, data)
        assert words(events).replace("x", "") == text and words(events, "thinking") == thinking
        assert words(events, "refusal") == refusal
        assert events[-1] == ccproxy.End("stop")


REFUSED = sse(delta(role="assistant", content="", refusal=None), delta(refusal="I can"),
              delta(refusal="not."), delta("stop"), DONE)


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_is_shown_as_one(stream):
    """In each API's own form; asked for by a schema or not, by stop sequences that are in it."""
    for members in ({}, {"json_format": {}}, {"stops": ["can"]}):
        told = {}
        for face in FACE_NAMES:
            answer = new_answer(OPENAI, face, stream=stream, **members)
            frames = run(answer, REFUSED)
            told[face] = check_frames(face, answer, frames) if stream else answer.body()
            assert answer.error is None and b"output_text" not in frames
        chat = told["chat"] if stream else told["chat"]["choices"][0]
        assert chat["message"]["refusal"] == "I cannot." and not chat["message"]["content"]
        assert chat["finish_reason"] == "stop"
        assert told["messages"]["content"] == [{"type": "text", "text": "I cannot."}]
        assert told["messages"]["stop_reason"] == "refusal"
        response = told["responses"]["response"] if stream else told["responses"]
        (item,) = response["output"]
        assert (response["status"], item["type"]) == ("completed", "message")
        assert item["content"] == [{"type": "refusal", "refusal": "I cannot."}]


def test_the_events_of_a_refusal():
    frames = read_frames(run(new_answer(OPENAI, "responses"), REFUSED))
    assert [frame["type"] for frame in frames[2:]] == [
        "response.output_item.added", "response.content_part.added", "response.refusal.delta",
        "response.refusal.delta", "response.refusal.done", "response.content_part.done",
        "response.output_item.done", "response.completed"]
    assert frames[3]["part"] == {"type": "refusal", "refusal": ""}
    assert frames[4]["delta"] == "I can" and frames[4]["content_index"] == 0
    assert frames[6]["refusal"] == "I cannot."
    assert frames[7]["part"] == {"type": "refusal", "refusal": "I cannot."}
    deltas = [frame["choices"][0]["delta"] for frame in read_frames(
        run(new_answer(OPENAI, "chat"), REFUSED))[:-1]]
    assert deltas == [{"role": "assistant", "content": ""}, {"refusal": "I can"},
                      {"refusal": "not."}, {}]


@pytest.mark.parametrize("reason,told", [("stop", "refusal"), ("content_filter", "refusal"),
                                         ("length", "max_tokens"), ("tool_calls", "refusal")])
def test_how_a_refused_message_ends(reason, told):
    answer = new_answer(OPENAI, "messages", stream=False)
    run(answer, ended(delta(content="Well. "), delta(refusal="No."), reason=reason))
    assert answer.body()["stop_reason"] == told
    assert [block["text"] for block in answer.body()["content"]] == ["Well. ", "No."]


ENDS = [("stop", "stop"), ("length", "length"), ("content_filter", "filtered"),
        ("tool_calls", "stop"), ("function_call", "stop"), ("end_turn", "stop"),
        ("wibble", "stop"), ("error", None), ("network_error", None), ("", None), (None, None),
        (5, None)]


@pytest.mark.parametrize("reason,ours", ENDS, ids=range(len(ENDS)))
def test_reasons(reason, ours):
    _, events = read_events(OPENAI, ended(delta(content="a"), reason=reason))
    assert getattr(events[-1], "reason", None) == ours


CUT = [b"", b"\n\n", b": x\n\n", sse(delta(content="a")), sse(delta(content="a"), delta("stop")),
       sse(delta(content="a"), DONE), DONE, sse(delta(content="a"), delta("stop"))[:-9] + b"\n\n",
       sse(delta(content="a"), delta("stop"), b"data: [DON")]


USED = {"prompt_tokens": 7, "completion_tokens": 3}
USAGE = {**delta(), "choices": [], "usage": USED}
CALLED = delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}])
NO_DONE = [     # (frames without [DONE], reason of the answer, None where it failed)
    ([delta(content="a"), delta("stop"), USAGE], "stop"),
    ([delta(content="a"), {**delta("stop"), "usage": USED}], "stop"),
    ([delta(content="a"), delta("length"), USAGE], "length"), ([delta("stop"), USAGE], "stop"),
    ([CALLED, delta("tool_calls"), USAGE], "tool_calls"),
    ([USAGE, delta(content="a"), delta("stop")], "stop"),
    ([delta(content="a"), delta("stop"), USAGE, b": x\n\n"], "stop"),
    ([delta(content="a"), delta("stop"), USAGE, b"data: [DON"], "stop"),
    ([delta(content="a"), delta("stop")], None), ([delta(content="a"), USAGE], None),
    ([USAGE], None),
    ([delta(content="a"), delta("stop"), {**USAGE, "usage": None}], None),
    ([delta(content="a"), delta("stop"), {**USAGE, "usage": {}}], None),
    ([delta(content="a"), delta("error"), USAGE], None),
    ([delta(content="a"), delta("stop"), USAGE, {"error": {"message": "boom"}}], None),
    ([{"error": {"message": "boom"}}, delta("stop"), USAGE], None)]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("cuts", [None, "bytewise"])
@pytest.mark.parametrize("frames,reason", NO_DONE, ids=range(len(NO_DONE)))
def test_a_stream_with_reason_and_usage_is_complete(frames, reason, cuts, stream):
    for data in (sse(*frames), sse(*frames).rstrip(b"\n")):
        answer = new_answer(OPENAI, "chat", stream=stream)
        told = run(answer, data, cuts)
        assert answer.over and (answer.error is None) == (reason is not None)
        if reason:
            assert (answer.reply.reason, answer.reply.usage) == (reason, ccproxy.Usage(7, 3))
            assert told.endswith(b"data: [DONE]\n\n") == stream


def test_only_the_bodys_end_completes_it():
    """What breaks the connection, or the rules of HTTP, is a failure as before."""
    answer = new_answer(OPENAI, "chat")
    answer.feed(sse(delta(content="a"), delta("stop"), USAGE))
    answer.stop(ccproxy.ProxyError("upstream", "reset"))
    assert answer.error.message == "reset"


WHOLE = {"id": "x", "object": "chat.completion", "usage": USED, "choices": [
    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a"}}]}
MESSAGES = [    # (message, what a chat client is told)
    ({"content": "a"}, {"content": "a"}), ({"content": None, "refusal": "no"}, {"refusal": "no"}),
    ({"content": "a", "reasoning_content": "t"}, {"content": "a", "reasoning_content": "t"}),
    ({"content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}},
                                      {"id": "d", "function": {"name": "g", "arguments": "{}"}}]},
     {"tool_calls": 2})]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("message,told", MESSAGES, ids=range(len(MESSAGES)))
def test_a_service_that_does_not_stream(message, told, stream):
    """Its answer in one piece is not taken for an empty one."""
    whole = json.loads(compact(WHOLE))
    whole["choices"][0]["message"] = message
    for data in (compact(whole).encode(), sse(whole, DONE), sse(whole)):
        answer = new_answer(OPENAI, "chat", stream=stream)
        frames = run(answer, data)
        shown = check_frames("chat", answer, frames) if stream else answer.body()["choices"][0]
        assert answer.error is None
        found = {name: len(value) if name == "tool_calls" else value
                 for name, value in shown["message"].items() if value and name != "role"}
        assert found == told
    again = sse(delta(content="a"), {**WHOLE, "choices": [{**WHOLE["choices"][0]}]}, DONE)
    assert words(read_events(OPENAI, again)[1]) == "a"


# Server-sent events in every form that WHATWG allows: (bytes, text, whether a bad line is noted).

ONE = compact(delta(content="one"))
TWO = b"\n".join(b"data: " + line for line in json.dumps(delta(content="two"), indent=1).encode(
    ).split(b"\n"))
END = sse(delta("stop"), DONE)
BAD = b'data: {"choices":[{"delta":{"content":"bad'
FORMS = [
    (sse(delta(content="one")) + TWO + b"\n\n" + END, "onetwo", False),
    (TWO + b"\n\n" + TWO + b"\n\n" + END, "twotwo", False),
    (TWO.replace(b"data: ", b"data:") + b"\n\n" + END, "two", False),
    (TWO.replace(b"\n", b"\n: comment\nid: 7\nevent: x\n") + b"\n\n" + END, "two", False),
    (b"data:\n" + TWO + b"\ndata\ndata:\n\n" + END, "two", False),
    (TWO + b"\n" + DONE + b"\n\n", None, False),
    (sse(delta("stop")) + TWO + b"\n" + DONE, "two", False),
    (TWO + b"\n\n" + sse(delta("stop"), USAGE).rstrip(b"\n"), "two", False),
    (sse(delta("stop", content="a"), USAGE)[:-2], "a", False),
    (b"data: " + ONE.encode() + b"\n" + END, "one", False),
    (BAD + b"\n\ndata: " + ONE.encode() + b"\n\n" + END, "one", True),
    (BAD + b"\ndata: " + ONE.encode() + b"\n" + END, "one", True),
    (BAD + b"\ndata: " + ONE.encode() + b"\n" + BAD + b"\n" + END.replace(b"\n\n", b"\n"), "one",
     True), (BAD + b"\n" + DONE, None, True), (b"\xef\xbb\xbf" + TWO + b"\n\n" + END, "two", False),
    (b"\xef\xbb\xbf: x\n\n" + TWO + b"\n\n" + END, "two", False),
    (b"data: {\ndata: }\n\n" + sse(delta(content="a")) + END, "a", False),
    (b" data: " + ONE.encode() + b"\n\ndata : " + ONE.encode() + b"\n\n" + END, "", False),
    (b"data: [\ndata: ]\n\n" + sse(delta(content="a")) + END, "a", False)]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("data,text,noted", FORMS, ids=range(len(FORMS)))
def test_forms_of_server_sent_events(data, text, noted, end):
    data, told = data.replace(b"\n", end), []
    for cuts in (None, "bytewise", range(7, len(data), 7)):
        answer = new_answer(OPENAI, "chat")
        told.append(run(answer, data, cuts))
        assert (answer.error is None) == (text is not None)
        assert text is None or check_frames("chat", answer, told[-1])["message"]["content"] == text
        assert has_note(answer.reply.notes, "not JSON") == noted
    assert told[0] == told[1] == told[2]


def test_an_event_of_many_lines_is_bounded(monkeypatch):
    monkeypatch.setattr(ccproxy, "MAX_LINE_BYTES", 1000)
    for lines, good in ((90, True), (110, False)):
        answer = new_answer(OPENAI, "chat")
        try:
            answer.feed(b"data: {\n" + b"data: 123456789\n" * lines)
            assert good and 900 <= len(answer.reading.event) <= 1000
        except ccproxy.ProxyError as error:
            assert not good and error.status == 502


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("data", CUT, ids=range(len(CUT)))
def test_a_stream_without_reason_and_done_or_usage_was_cut(data, stream):
    answer = new_answer(OPENAI, "chat", stream=stream)
    run(answer, data)
    assert answer.over and answer.error.kind == "upstream" and answer.error.retryable


def test_what_follows_the_end_is_nothing():
    answer = new_answer(OPENAI, "chat")
    answer.feed(ended(delta(content="a")))
    assert answer.over and answer.error is None
    assert answer.feed(ended(delta(content="b"), {"error": {"message": "x"}})) == b""
    assert answer.error is None


USAGES = [
    ({"prompt_tokens": 7, "completion_tokens": 3}, (7, 3, None, None, None)),
    ({"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {
        "cached_tokens": 4, "cache_write_tokens": 2}, "completion_tokens_details": {
        "reasoning_tokens": 1}}, (7, 3, 4, 2, 1)),
    ({"prompt_tokens": 7, "completion_tokens": 3, "prompt_cache_hit_tokens": 5,
      "prompt_tokens_details": None}, (7, 3, 5, None, None)),
    ({"prompt_tokens": 7}, (7, 0, None, None, None)), ({}, None), (None, None), ([], None),
    ({"prompt_tokens": -1, "completion_tokens": "3"}, None)]


@pytest.mark.parametrize("given,usage", USAGES, ids=range(len(USAGES)))
def test_usage(given, usage):
    last = {**delta(), "choices": [], "usage": given}
    inside = delta("stop")
    inside["choices"][0]["usage"] = given
    for data in (sse(delta("stop"), last, DONE), sse(inside, DONE),
                 sse({**delta("stop"), "usage": given}, DONE)):
        reading, _ = read_events(OPENAI, data)
        assert reading.usage == (usage and ccproxy.Usage(*usage))


# Calls.

def start(index, call_id, name="f", arguments=""):
    return call_delta(index=index, id=call_id, type="function",
                      function={"name": name, "arguments": arguments})


def more(index, piece):
    return call_delta(index=index, function={"arguments": piece})


CALLS = [       # (frames, reason, [(id, name, arguments or None where cut)], reason of the answer)
    ([start(0, "a"), more(0, '{"x"'), more(0, ":1}")], "tool_calls", [("a", "f", {"x": 1})],
     "tool_calls"),
    ([start(0, "a", arguments='{"x":1}')], "stop", [("a", "f", {"x": 1})], "tool_calls"),
    ([start(0, "a")], "tool_calls", [("a", "f", {})], "tool_calls"),
    ([start(0, "a")], "length", [], "length"),
    ([start(0, "a"), more(0, '{"x"')], "length", [("a", "f", None)], "length"),
    ([start(0, "a"), more(0, '{"x"')], "tool_calls", [("a", "f", None)], "length"),
    ([start(0, "a"), more(0, '{"x":1}')], "length", [("a", "f", {"x": 1})], "length"),
    ([start(0, "a"), start(1, "b", "g"), more(0, "{"), more(1, "{}"), more(0, "}")], "tool_calls",
     [("a", "f", {}), ("b", "g", {})], "tool_calls"),
    ([start(0, "a", arguments="{}"), start(0, "b", "g", '{"y":2}')], "tool_calls",
     [("a", "f", {}), ("b", "g", {"y": 2})], "tool_calls"),         # Gemini: one index for all
    ([call_delta(id="a", function={"name": "f", "arguments": "{"}), call_delta(
        function={"arguments": "}"})], "tool_calls", [("a", "f", {})], "tool_calls"),
    ([start(0, None, "f", "{}"), start(1, "", "g", "{}")], "tool_calls",
     [("call_0", "f", {}), ("call_1", "g", {})], "tool_calls"),
    ([start(0, "a", "f", "{}"), start(1, "a", "g", "{}")], "tool_calls",
     [("a", "f", {}), ("call_1", "g", {})], "tool_calls"),
    ([call_delta(index=0, id="a"), call_delta(index=0, function={"name": "f"}), more(0, "{}")],
     "tool_calls", [("a", "f", {})], "tool_calls"),
    ([call_delta(index=0, id="a", function={"name": "f", "arguments": {"x": 1}})], "tool_calls",
     [("a", "f", {"x": 1})], "tool_calls"),
    ([start(0, "a"), call_delta(index=0, id="other", function={"arguments": "{}"})], "stop",
     [("a", "f", {})], "tool_calls"),
    ([start(0, "a", arguments='"bare"')], "stop", [("a", "f", {"input": "bare"})], "tool_calls"),
    ([start(0, "a", arguments="null")], "stop", [("a", "f", {})], "tool_calls"),
    ([call_delta(function=None), call_delta(index=3, function={"arguments": "{}"})], "stop",
     [("call_1", "unknown", {}), ("call_0", "unknown", {})], "tool_calls"),
    ([delta(tool_calls=[5, None]), delta(tool_calls={}), delta(tool_calls="x")], "stop", [],
     "stop")]


@pytest.mark.parametrize("frames,reason,calls,ours", CALLS, ids=range(len(CALLS)))
def test_calls(frames, reason, calls, ours):
    _, events = read_events(OPENAI, ended(*frames, reason=reason))
    blocks = [event.block for event in events if isinstance(event, ccproxy.Close)]
    assert [(block.call_id, block.name, json.loads(block.text) if block.whole else None)
            for block in blocks] == calls
    assert events[-1] == ccproxy.End(ours)


def test_a_complete_call_does_not_hold_up_the_next():
    """Its second call, and text behind it, are shown before the end tells that all are whole."""
    answer = new_answer(OPENAI, "chat")
    shown = answer.feed(sse(start(0, "a"), more(0, '{"x":1}'), start(1, "b"), more(1, '{"y":')))
    assert b'"b"' in shown
    shown = answer.feed(sse(more(1, "2}"), delta(content="text")))
    assert b"text" in shown


# Errors.

ERRORS = [      # (error, kind, retryable)
    ({"message": "boom", "type": "server_error"}, "upstream", True),
    ({"message": "slow down", "code": "rate_limit_exceeded"}, "rate_limit", True),
    ({"message": "pay", "type": "insufficient_quota", "code": "insufficient_quota"}, "billing",
     False),
    ({"message": "down", "code": 503}, "unavailable", True),
    ({"message": "x", "code": 502, "metadata": {}}, "upstream", True),
    ({"message": "bad", "type": "invalid_request_error"}, "invalid", False),
    ("boom", "upstream", True), ({"message": "no", "isRetryable": False}, "upstream", False),
    ({"message": '403 {"error":{"code":"MODEL_NOT_IN_PLAN","message":"m"}}'}, "plan", False)]


@pytest.mark.parametrize("error,kind,retryable", ERRORS, ids=range(len(ERRORS)))
def test_errors_in_the_stream(error, kind, retryable):
    for before in ([], [delta(content="a")]):
        for face in FACE_NAMES:
            answer, _ = run_stream(OPENAI, face, ended(*before, {"error": error}))
            assert (answer.error.kind, answer.error.retryable) == (kind, retryable)


def test_an_error_without_a_prefix():
    _, events = read_events(OPENAI, b'{"error":{"message":"boom","type":"server_error"}}\n')
    assert events[-1].error.message == "boom"


GO = "Your Go plan doesn't include API access. Upgrade to Pro at https://commandcode.ai/billing"
STATUSES = [    # (status, body, kind, words)
    (403, {"error": {"message": GO, "code": "upgrade_required"}}, "plan", GO),
    (403, {"type": "error", "error": {"type": "permission_error", "message": GO}}, "plan", GO),
    (403, {"error": {"message": "m", "code": "MODEL_NOT_IN_PLAN"}}, "plan", "m"),
    (403, {"type": "error", "error": {"type": "permission_error", "message": "no"}}, "permission",
     "no"),
    (400, {"error": {"message": "m", "code": "unsupported_model"}}, "model", "m"),
    (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "m"}}, "invalid",
     "m"),
    (401, {"error": {"message": "m", "type": "authentication_error"}}, "authentication", "m"),
    (404, None, "not_found", "404"), (429, {"error": {"message": "m"}}, "rate_limit", "m"),
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, "overloaded",
     "m")]


@pytest.mark.parametrize("status,body,kind,said", STATUSES, ids=range(len(STATUSES)))
def test_errors_by_status(status, body, kind, said):
    data = json.dumps(body).encode() if body else b""
    error = read_provider_failure(status, {"x-trace-id": "t"}, data)
    assert error.kind == kind and said in error.message and error.trace_id == "t"
    if said == GO:
        assert error.code == "upgrade_required" and "provider" in error.message
        assert not error.retryable


# The lane's pattern: exactly one delta, and the string in it.

def text_line(chunk, end=b"\n\n"):
    return b"data: " + (chunk if isinstance(chunk, bytes) else compact(chunk).encode()) + end


def raw_delta(inner, tail=b""):
    return b'{"choices":[{"index":0,"delta":{%b}}]%b}' % (inner, tail)


LANES = [       # (kind, line, (mark, string) or None where the ordinary way must be taken)
    ("text", text_line(delta(content="a")), (b"", b"a")),
    ("text", text_line(delta(content="a"), b"\r\n\r\n"), (b"", b"a")),
    ("text", text_line(delta(role="assistant", content="a")), (b"", b"a")),
    ("text", text_line({**delta(content="a"), "usage": None, "obfuscation": "xyz"}), (b"", b"a")),
    ("text", text_line(delta(content="a", reasoning_content=None, refusal="")), (b"", b"a")),
    ("text", text_line(raw_delta(b'"content":"\\n\\u00e9\xc3\xa9"')),
     (b"", b"\\n\\u00e9\xc3\xa9")),
    ("thinking", text_line(delta(content=None, reasoning_content="a")), (b"", b"a")),
    ("thinking", text_line(delta(reasoning="a")), (b"", b"a")),
    ("tool", text_line(more(2, "{")), (b"2", b"{")),
    ("tool", text_line(more(12, "x")), (b"12", b"x")),
    ("tool", text_line(call_delta(index=1, id=None, type="function",
                                  function={"name": None, "arguments": "x"})), (b"1", b"x")),
    ("text", text_line(delta(content="")), None),
    ("text", text_line(delta(content="a", reasoning_content="b")), None),
    ("text", text_line(delta("stop", content="a")), None),
    ("text", text_line({**delta(content="a"), "usage": {"prompt_tokens": 1}}), None),
    ("text", text_line({**delta(content="a"), "error": None}), None),
    ("text", text_line(raw_delta(b'"content":"a","content":"b"')), None),
    ("text", text_line(raw_delta(b'"content":"a","content":null')), None),
    ("text", text_line(raw_delta(b'"content":"\\ud83d"')), None),
    ("text", text_line(raw_delta(b'"content":"a\x01"')), None),
    ("text", text_line(raw_delta(b'"content":"a"', b',"x":1')), None),
    ("text", text_line(raw_delta(b'"content":"a"'), b""), None),
    ("text", text_line(b'{"choices":[{"index":1,"delta":{"content":"a"}}]}'), None),
    ("text", text_line(b'{"choices":[{"index":0,"delta":{"content":"a"}},{"index":0,"delta":'
                       b'{"content":"b"}}]}'), None),
    ("thinking", text_line(delta(reasoning="a", reasoning_content="b")), None),
    ("thinking", text_line(delta(content="x", reasoning_content="a")), None),
    ("tool", text_line(start(0, "id", "f", "{")), None),
    ("tool", text_line(delta(tool_calls=[{"index": 0, "function": {"arguments": "a"}}] * 2)), None)]


@pytest.mark.parametrize("kind,line,groups", LANES, ids=range(len(LANES)))
def test_lane_patterns(kind, line, groups):
    found = re.match(OPENAI_LANES[kind], line)
    assert (found and found.groups()) == groups
    assert found is None or found.end() == len(line)


@pytest.mark.parametrize("kind,line,groups", LANES, ids=range(len(LANES)))
def test_lane_lines_mean_the_same_the_ordinary_way(kind, line, groups):
    if groups:
        reading = ccproxy.Reading(began=True)
        ccproxy.start_call(reading, "id", "f", groups[0].decode())
        events = list(OPENAI.read_line(reading, line.split(b"\n")[0]))
        assert words(events, kind) == json.loads(b'"%b"' % groups[1])


def test_hostile_lines_take_linear_time():
    import time
    begin = time.perf_counter()
    for size in (100_000, 200_000):
        for line in (b'data: {' + b'"id":"x",' * size,
                     b'data: {"choices":[{' + b'"index":0,' * size,
                     b'data: {"choices":[{"delta":{"content":"' + b"\\n" * size,
                     b'data: {"choices":[{"delta":{"content":"a"' + b',"refusal":null' * size):
            assert re.match(OPENAI_LANES["text"], line) is None
    assert time.perf_counter() - begin < 5
