"""UPSTREAM FORMAT: ANTHROPIC: a prompt as a Messages body, its SSE as events, and the laws."""
from __future__ import annotations

import json
import re

import laws
import pytest
from fake_provider import anthropic_sse, compact
from harness import ccproxy
from pure import ALL_FACES, PNG, USER, check_frames, has_note, read_prompt, request, run
from pure_formats import new_answer, read_events, run_plain, run_stream

ANTHROPIC = ccproxy.ANTHROPIC
anthropic_usage = ccproxy.anthropic_usage
build_anthropic = ccproxy.build_anthropic
claude_version = ccproxy.claude_version
plain_call_id = ccproxy.plain_call_id

FACE_NAMES = sorted(ALL_FACES)
EPHEMERAL = {"type": "ephemeral"}


def body_of(face, **members):
    prompt = read_prompt(face, request(face, **members))
    return json.loads(build_anthropic(prompt, "session")), prompt.notes


def sse(*events):
    return b"".join(event if isinstance(event, bytes) else b"event: %b\ndata: %b\n\n" % (
        event["type"].encode(), compact(event).encode()) for event in events)


def begin(index, kind, **members):
    return {"type": "content_block_start", "index": index,
            "content_block": {"type": kind, **members}}


def grow(index, kind, **members):
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **members}}


def stop(index):
    return {"type": "content_block_stop", "index": index}


def text(index, words):
    return grow(index, "text_delta", text=words)


def thinking(index, words):
    return grow(index, "thinking_delta", thinking=words)


def signature(index, word):
    return grow(index, "signature_delta", signature=word)


def piece(index, words):
    return grow(index, "input_json_delta", partial_json=words)


def start_call(index, call_id="toolu_1", name="f", given=None):
    return begin(index, "tool_use", id=call_id, name=name, input=given or {})


START = {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}
STOP = {"type": "message_stop"}


def end(reason="end_turn", **usage):
    return sse({"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None},
                "usage": usage}, STOP)


# The laws.

@pytest.mark.parametrize("odd", [False, True])
def test_grammar_and_truth(odd):
    laws.grammar_law("anthropic", odd)
    laws.truth_law("anthropic", odd)


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("face", FACE_NAMES)
def test_parity(face, odd):
    laws.parity_law("anthropic", face, odd)


@pytest.mark.parametrize("law", [laws.cuts_law, laws.lane_law, laws.restart_law,
                                 laws.framing_law], ids=["cuts", "lane", "restart", "framing"])
@pytest.mark.parametrize("face", FACE_NAMES)
def test_laws(face, law):
    law("anthropic", face)


@pytest.mark.parametrize("face", FACE_NAMES)
def test_the_lane_is_used(face):
    """Names of events and empty lines between the data do not close it."""
    steps = [("thinking", "hm")] * 300 + [("text", "word ")] * 300 + [("start", "c1", "f")] + [
        ("more", "c1", one) for one in ['{"a":"'] + ["x"] * 300 + ['"}']] + [
        ("stop", "c1"), ("usage", {"input": 1, "output": 2}), ("end", "tool_calls")]
    assert laws.count_ordinary_lines("anthropic", face, anthropic_sse(steps)) < 70


# The body.

def test_body_to_the_byte():
    prompt = read_prompt("messages", request("messages", model="claude-x", max_tokens=9,
                                             system="s"))
    assert build_anthropic(prompt, "S").decode() == (
        '{"model":"claude-x","max_tokens":9,"system":[{"type":"text","text":"s"}],"messages":'
        '[{"role":"user","content":[{"type":"text","text":"hi"}]}],"stream":true}')


def test_history():
    """What came from this API goes back as it was, with its signatures and cache marks."""
    system = [{"type": "text", "text": "s", "cache_control": EPHEMERAL}]
    tools = [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {
        "x": {"type": ["string", "null"]}}}, "cache_control": EPHEMERAL},
        {"name": "g", "input_schema": {"type": "object", "properties": {}}}]
    messages = [
        {"role": "user", "content": [
            {"type": "text", "text": "look", "cache_control": EPHEMERAL},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                         "data": PNG.partition(",")[2]}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t1", "signature": "s1"},
            {"type": "text", "text": "a"},
            {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": None}},
            {"type": "thinking", "thinking": "", "signature": "s2"},
            {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "r1", "is_error": True},
            {"type": "tool_result", "tool_use_id": "toolu_2", "cache_control": EPHEMERAL},
            {"type": "text", "text": "go on"}]}]
    body, notes = body_of("messages", system=system, tools=tools, messages=messages)
    assert body["system"] == system and body["tools"] == tools and notes == []
    assert body["messages"] == messages


def test_history_of_chat():
    """Other providers' call ids and thinking are made fit; nothing is signed by us."""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    body, notes = body_of("chat", messages=[
        {"role": "system", "content": "s"}, USER, USER,
        {"role": "assistant", "reasoning_content": "r", "content": "a",
         "tool_calls": [{"id": "functions.f:0", **call}, {"id": "ok-1", **call}]},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": [
            {"type": "text", "text": "seen"}, {"type": "image_url", "image_url": {"url": PNG}}]},
        {"role": "tool", "tool_call_id": "ok-1", "content": ""},
        {"role": "user", "content": "  \n"}])
    first = plain_call_id("functions.f:0")
    assert first.startswith("functions_f_0_") and len(first) == 22
    user, assistant, results = body["messages"]
    assert user["content"] == [{"type": "text", "text": "hi"}] * 2
    assert [block["type"] for block in assistant["content"]] == ["text", "tool_use", "tool_use"]
    assert [block["id"] for block in assistant["content"][1:]] == [first, "ok-1"]
    assert [block["type"] for block in results["content"]] == ["tool_result", "tool_result", "text",
                                                               "image"]
    assert results["content"][:2] == [
        {"type": "tool_result", "tool_use_id": first, "content": "seen"},
        {"type": "tool_result", "tool_use_id": "ok-1"}]
    assert has_note(notes, "dropped=earlier thinking")


@pytest.mark.parametrize("signed,kept", [("s", True), ("", False), ("ccproxy", False),
                                         (None, False)])
def test_only_signed_thinking_goes_back(signed, kept):
    block = {"type": "thinking", "thinking": "t"}
    block.update({"signature": signed} if signed is not None else {})
    body, notes = body_of("messages", messages=[USER, {"role": "assistant", "content": [
        block, {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"}]}, USER])
    kinds = [one["type"] for one in body["messages"][1]["content"]]
    assert kinds == ["thinking"] * kept + ["text"]
    assert has_note(notes, "dropped=redacted_thinking")
    assert has_note(notes, "dropped=earlier thinking") != kept


@pytest.mark.parametrize("opening", [[], [{"role": "user", "content": " \n"}]])
def test_a_conversation_that_the_assistant_begins(opening):
    """The API takes it only behind a message of the user's, and no blank one."""
    hello = {"role": "assistant", "content": "Ahoy!"}
    body, notes = body_of("chat", messages=[*opening, hello, {"role": "user", "content": "hi"}])
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][0]["content"][0]["text"].strip() and has_note(notes, "repaired=")


def test_nothing_but_blank_text_is_refused():
    with pytest.raises(ccproxy.ProxyError) as caught:
        body_of("chat", messages=[{"role": "user", "content": " \n"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("before", [[], [{"type": "text", "text": "a"}]])
@pytest.mark.parametrize("times", [1, 2])
def test_thinking_that_led_to_nothing_does_not_go_back(before, times):
    """Of an interrupted answer: the API refuses a message whose final block is thinking."""
    signed = [{"type": "thinking", "thinking": "t", "signature": "s"}] * times
    body, notes = body_of("messages", messages=[
        USER, {"role": "assistant", "content": before + signed}, USER])
    kinds = [[one["type"] for one in message["content"]] for message in body["messages"]]
    assert kinds == ([["text"], ["text"], ["text"]] if before else [["text", "text"]])
    assert has_note(notes, "dropped=earlier thinking")


VERSIONS = [("claude-opus-4-7", (4, 7)), ("claude-haiku-4-5-20251001", (4, 5)),
            ("claude-sonnet-5", (5, 0)), ("claude-fable-5-1", (5, 1)), ("claude-opus-4.8", (4, 8)),
            ("claude-3-7-sonnet-20250219", (3, 7)), ("claude-sonnet-4-20250514", (4, 0)),
            ("anthropic/claude-opus-5-5", (5, 5)), ("Claude-Opus-5", (5, 0)),
            ("claude-x", (0, 0)), ("glm-4.7", (0, 0)), ("kimi-k3", (0, 0)), ("claude-10", (10, 0))]


@pytest.mark.parametrize("model,version", VERSIONS, ids=str)
def test_versions(model, version):
    assert claude_version(model) == version


ADAPTIVE = {"type": "adaptive", "display": "summarized"}
FORCED = {"tools": [{"name": "f", "input_schema": {"type": "object"}}],
          "tool_choice": {"type": "any"}}
CHAT_FORCED = {"tools": [{"type": "function", "function": {"name": "f"}}],
               "tool_choice": "required"}
BUDGET = {"thinking": {"type": "enabled", "budget_tokens": 6000}, "max_tokens": 9000}
ENABLED = {"type": "enabled", "budget_tokens": 6000}
THINKING = [    # (face, model, members, thinking, effort)
    ("messages", "claude-sonnet-5", {}, None, None),
    ("chat", "claude-sonnet-5", {}, None, None),
    ("chat", "claude-sonnet-5", {"reasoning_effort": "high"}, ADAPTIVE, "high"),
    ("responses", "claude-opus-4-7", {"reasoning": {"effort": "max"}}, ADAPTIVE, "max"),
    ("messages", "claude-sonnet-5", {"thinking": {"type": "adaptive"}}, ADAPTIVE, None),
    ("messages", "claude-sonnet-5", {"thinking": {"type": "disabled"}}, None, None),
    ("messages", "claude-sonnet-5", BUDGET, ADAPTIVE, "medium"),
    ("messages", "claude-sonnet-5", {"output_config": {"effort": "low"}}, {"type": "adaptive"},
     "low"),
    ("messages", "claude-sonnet-4-6", {"thinking": {"type": "adaptive"}}, {"type": "adaptive"},
     None),
    ("messages", "claude-sonnet-5", {**BUDGET, **FORCED}, None, "medium"),
    ("chat", "claude-opus-5", {"reasoning_effort": "low", **CHAT_FORCED}, None, "low"),
    ("messages", "claude-haiku-4-5", BUDGET, ENABLED, None),
    ("messages", "claude-haiku-4-5", {**BUDGET, **FORCED}, None, None),
    ("messages", "claude-haiku-4-5", {**BUDGET, "max_tokens": 5000},
     {"type": "enabled", "budget_tokens": 4999}, None),
    ("messages", "claude-haiku-4-5", {**BUDGET, "max_tokens": 1000}, None, None),
    ("messages", "claude-haiku-4-5", {"thinking": {"type": "adaptive"}, "max_tokens": 9000},
     {"type": "enabled", "budget_tokens": 5000}, None),
    ("chat", "vendor/unknown", {"reasoning_effort": "high", "max_tokens": 64000},
     {"type": "enabled", "budget_tokens": 10000}, None),
    ("chat", "vendor/unknown", {}, None, None)]


@pytest.mark.parametrize("face,model,members,shown,effort", THINKING, ids=range(len(THINKING)))
def test_thinking(face, model, members, shown, effort):
    body, notes = body_of(face, model=model, **members)
    assert body.get("thinking") == shown
    assert body.get("output_config") == (effort and {"effort": effort})
    asked = face == "messages" and members.get("thinking", {}).get("type") == "enabled"
    assert has_note(notes, "ignored=thinking") == (asked and not shown and not effort
                                                   and "tools" not in members)


@pytest.mark.parametrize("model,sends", [("claude-haiku-4-5", False), ("claude-sonnet-5", True)])
def test_a_budget_amid_calls_that_did_not_begin_with_thinking(model, sends):
    """Models with a budget answer that with a 400, later ones take it."""
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1",
                                           "content": "r"}]}
    signed = {"type": "thinking", "thinking": "t", "signature": "s"}
    for blocks, expected in (([call], sends), ([signed, call], True)):
        body, _ = body_of("messages", model=model, **BUDGET, messages=[
            USER, {"role": "assistant", "content": blocks}, result])
        assert ("thinking" in body) == expected


SAMPLING = [    # (model, members, sent)
    ("claude-sonnet-5", {"temperature": 0.5, "top_p": 0.5}, {}),
    ("claude-sonnet-4-6", {"temperature": 0.5}, {"temperature": 0.5}),
    ("claude-sonnet-4-6", {"temperature": 0, "top_p": 0.5}, {"temperature": 0}),
    ("claude-sonnet-4-6", {"top_p": 0.5}, {"top_p": 0.5}),
    ("claude-sonnet-4-6", {"temperature": 0.5, "reasoning_effort": "low"}, {}),
    ("claude-haiku-4-5", {"temperature": 1.7}, {"temperature": 1}),
    ("vendor/unknown", {"temperature": 0.5, "top_p": 0.5}, {"temperature": 0.5, "top_p": 0.5})]


@pytest.mark.parametrize("model,members,sent", SAMPLING, ids=range(len(SAMPLING)))
def test_sampling(model, members, sent):
    body, notes = body_of("chat", model=model, **members)
    assert {name: body[name] for name in ("temperature", "top_p") if name in body} == sent
    for name in ("temperature", "top_p"):
        assert has_note(notes, "ignored=" + name) == (name in members and name not in sent)


CHOICES = [("auto", {"type": "auto"}), ("required", {"type": "any"}), ("none", None),
           ({"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"})]


@pytest.mark.parametrize("asked,sent", CHOICES, ids=range(len(CHOICES)))
def test_choice(asked, sent):
    body, _ = body_of("chat", tools=CHAT_FORCED["tools"], tool_choice=asked, stop=["x"])
    assert body.get("tool_choice") == sent and "stop_sequences" not in body
    assert ("tools" in body) == (sent is not None)


# The stream.

def show(events):
    """[(kind, text or arguments, signature)] of the blocks that were closed."""
    said = {}
    for event in events:
        if isinstance(event, ccproxy.Open):
            said[event.block] = ""
        elif isinstance(event, ccproxy.Delta):
            said[event.block] += event.text
    return [(block.kind, words, block.signature) for block, words in said.items()]


STREAMS = [     # (events, blocks)
    ([begin(0, "text", text=""), text(0, "a"), text(0, "b"), stop(0)], [("text", "ab", "")]),
    ([begin(0, "text", text="a"), text(0, "b"), stop(0)], [("text", "ab", "")]),
    ([begin(0, "thinking", thinking="", signature=""), thinking(0, "t"), signature(0, "s"), stop(0),
      begin(1, "text", text=""), text(1, "a"), stop(1)],
     [("thinking", "t", "s"), ("text", "a", "")]),
    ([begin(0, "thinking", thinking=""), thinking(0, "t"), signature(0, "s"), stop(0),
      begin(1, "thinking", thinking=""), thinking(1, "u"), signature(1, "v"), stop(1)],
     [("thinking", "t", "s"), ("thinking", "u", "v")]),
    ([begin(0, "thinking", thinking=""), signature(0, "s"), stop(0), begin(1, "text", text=""),
      text(1, "a"), stop(1)], [("thinking", "", "s"), ("text", "a", "")]),
    ([begin(0, "redacted_thinking", data="x"), stop(0), begin(1, "text", text=""), text(1, "a"),
      stop(1)], [("text", "a", "")]),
    ([begin(0, "server_tool_use", id="srv", name="web"), piece(0, '{"q":1}'), stop(0),
      begin(1, "web_search_tool_result", content=[]), stop(1), begin(2, "text", text=""),
      text(2, "a"), grow(2, "citations_delta", citation={}), stop(2)], [("text", "a", "")]),
    ([start_call(0), piece(0, ""), piece(0, '{"x"'), piece(0, ":1}"), stop(0)],
     [("tool", '{"x":1}', "")]),
    ([start_call(0, given={"x": 1}), stop(0)], [("tool", '{"x":1}', "")]),
    ([start_call(0, given={"x": 1})], [("tool", '{"x":1}', "")]),
    ([start_call(0, given={"x": 1}), piece(0, '{"y"'), piece(0, ":2}"), stop(0)],
     [("tool", '{"y":2}', "")]),
    ([begin(0, "text", text=""), text(0, "a"), stop(0), start_call(1), piece(1, "{}"), stop(1),
      start_call(2, "toolu_2"), piece(2, "{}"), stop(2)],
     [("text", "a", ""), ("tool", "{}", ""), ("tool", "{}", "")])]


@pytest.mark.parametrize("events,blocks", STREAMS, ids=range(len(STREAMS)))
def test_streams(events, blocks):
    reading, shown = read_events(ANTHROPIC, sse(START, *events, end()))
    assert show(shown) == blocks and isinstance(shown[-1], ccproxy.End)
    odd = [one for one in events if one["type"] == "content_block_start"
           and one["content_block"]["type"] not in ("text", "thinking", "tool_use")]
    assert len([note for note in reading.notes if "a block of type" in note]) == len(odd)


def test_withheld_thinking_keeps_its_signature():
    data = sse(START, begin(0, "thinking", thinking=""), signature(0, "sig"), stop(0),
               begin(1, "text", text=""), text(1, "a"), stop(1), end())
    for answer, shown in (run_stream(ANTHROPIC, "messages", data),
                          run_plain(ANTHROPIC, "messages", data)):
        assert answer.error is None and shown["content"] == [
            {"type": "thinking", "thinking": "", "signature": "sig"}, {"type": "text", "text": "a"}]
    assert run_stream(ANTHROPIC, "chat", data)[1]["message"] == {"content": "a"}


@pytest.mark.parametrize("run_it", [run_stream, run_plain])
def test_responses_turns_keep_their_signatures(run_it):
    """Codex: with the results of tools the API wants the thinking before the calls, as signed."""
    data = sse(START, begin(0, "thinking", thinking=""), thinking(0, "h\u00e9"), signature(0, "s1"),
               stop(0), begin(1, "text", text=""), text(1, "I look."), stop(1),
               begin(2, "thinking", thinking=""), signature(2, "s2"), stop(2),
               start_call(3, "toolu_1"), piece(3, "{}"), stop(3), start_call(4, "toolu_2"),
               piece(4, "{}"), stop(4), end("tool_use"))
    shown = run_it(ANTHROPIC, "responses", data, carry_thinking=True)[1]
    items = shown.get("response", shown)["output"]
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "done"}
               for item in items if item["type"] == "function_call"]
    body, notes = body_of("responses", model="claude-opus-4-7", include=[
        "reasoning.encrypted_content"], input=[{"role": "user", "content": "q"}, *items, *results])
    assert [list(block.values())[:3] for block in body["messages"][1]["content"]] == [
        ["thinking", "h\u00e9", "s1"], ["text", "I look."], ["thinking", "", "s2"],
        ["tool_use", "toolu_1", "f"], ["tool_use", "toolu_2", "f"]]
    assert not has_note(notes, "dropped")


@pytest.mark.parametrize("face", FACE_NAMES)
def test_an_endless_signature_is_no_answer(face):
    data = sse(START, begin(0, "thinking", thinking=""), *[signature(0, "x" * 100_000)] * 11,
               stop(0), begin(1, "text", text=""), text(1, "a"), stop(1), end())
    for run_it in (run_stream, run_plain):
        answer = run_it(ANTHROPIC, face, data)[0]
        assert "signature" in answer.error.message and not answer.error.retryable


def test_a_repeated_calls_signature_is_not_put_under_other_thinking():
    answer = new_answer(ANTHROPIC, "messages")
    frames = answer.feed(sse(START, begin(0, "thinking", thinking=""), thinking(0, "first"),
                             {"type": "error", "error": {"type": "overloaded_error",
                                                         "message": "x"}}))
    answer.restart()
    frames += run(answer, sse(START, begin(0, "thinking", thinking=""), thinking(0, "second"),
                              signature(0, "of-second"), stop(0), begin(1, "text", text=""),
                              text(1, "a"), stop(1), end()))
    assert b"first" in frames and b"second" not in frames and b"of-second" not in frames


CALLS = [       # (events, stop_reason, whole calls, cut ones, reason of the answer)
    ([start_call(0), piece(0, '{"x":1}'), stop(0)], "tool_use", 1, 0, "tool_calls"),
    ([start_call(0), stop(0)], "tool_use", 1, 0, "tool_calls"),
    ([start_call(0), stop(0)], "max_tokens", 0, 1, "length"),
    ([start_call(0), piece(0, '{"x"'), stop(0)], "max_tokens", 0, 1, "length"),
    ([start_call(0), piece(0, '{"x"'), stop(0)], "tool_use", 0, 1, "length"),
    ([start_call(0), piece(0, '{"x":1}'), stop(0)], "max_tokens", 1, 0, "length"),
    ([start_call(0), piece(0, '{"x":1}')], "tool_use", 1, 0, "tool_calls"),
    ([start_call(0), stop(0), begin(1, "text", text=""), text(1, "a"), stop(1)], "end_turn", 1, 0,
     "tool_calls"),
    ([begin(0, "text", text=""), text(0, "a"), stop(0)], "tool_use", 0, 0, "stop")]


@pytest.mark.parametrize("events,reason,whole,cut,ours", CALLS, ids=range(len(CALLS)))
def test_calls(events, reason, whole, cut, ours):
    reading, shown = read_events(ANTHROPIC, sse(START, *events, end(reason)))
    assert [block.whole for block in reading.calls.values()] == [True] * whole + [False] * cut
    assert shown[-1] == ccproxy.End(ours) and has_note(reading.notes, "cut=") == bool(cut)


def test_a_call_is_judged_once_however_often_it_is_stopped(monkeypatch):
    """Counted, not timed: each look at its arguments takes as long as they are."""
    looked, whole_arguments = [], ccproxy.whole_arguments
    monkeypatch.setattr(ccproxy, "whole_arguments",
                        lambda text: looked.append(text) or whole_arguments(text))
    pieces = [one for _ in range(50) for one in (piece(0, "1,"), stop(0))]
    reading, events = read_events(ANTHROPIC, sse(
        START, start_call(0), piece(0, '{"x":['), *pieces, piece(0, "1]}"), stop(0),
        end("tool_use")))
    assert len(looked) <= 2 and events[-1] == ccproxy.End("tool_calls")
    (block,) = reading.calls.values()
    assert block.whole and json.loads(block.text) == {"x": [1] * 51}


ENDS = [("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"), ("refusal", "filtered"),
        ("pause_turn", "paused"), ("tool_use", "stop"), ("wibble", "stop"), (None, "stop")]


@pytest.mark.parametrize("reason,ours", ENDS, ids=str)
def test_reasons(reason, ours):
    _, events = read_events(ANTHROPIC, sse(START, begin(0, "text", text=""), text(0, "a"), stop(0),
                                           end(reason)))
    assert events[-1] == ccproxy.End(ours)


DETAILS = [     # (stop_details, the refusal that is shown)
    ({"type": "refusal", "category": "cyber", "explanation": "It could do harm."},
     "It could do harm."), ({"type": "refusal", "category": None, "explanation": None}, ""),
    ({"explanation": ""}, ""), ({"explanation": 5}, ""), (None, ""), ([], ""), ("x", "")]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("details,shown", DETAILS, ids=range(len(DETAILS)))
def test_why_an_answer_was_refused(details, shown, stream):
    """What Anthropic says of it is the refusal that each API shows."""
    data = sse(START, begin(0, "text", text=""), text(0, "Hello.."), stop(0), {
        "type": "message_delta", "delta": {"stop_reason": "refusal", "stop_details": details},
        "usage": {"output_tokens": 2}}, STOP)
    told = {}
    for face in FACE_NAMES:
        answer = new_answer(ANTHROPIC, face, stream=stream)
        frames = run(answer, data)
        assert answer.error is None
        told[face] = check_frames(face, answer, frames) if stream else answer.body()
    chat = told["chat"] if stream else told["chat"]["choices"][0]
    assert (chat["message"]["content"], chat["message"].get("refusal", "")) == ("Hello..", shown)
    assert chat["finish_reason"] == "content_filter"
    assert told["messages"]["stop_reason"] == "refusal"
    assert [block["text"] for block in told["messages"]["content"]] == ["Hello.."] + [shown] * bool(
        shown)
    response = told["responses"]["response"] if stream else told["responses"]
    assert response["incomplete_details"] == {"reason": "content_filter"}
    assert [item["content"][0].get("refusal") for item in response["output"]] == [None] + [
        shown] * bool(shown)


CUT = [b"", sse(START), sse(START, text(0, "a")), sse(START, text(0, "a"), stop(0)),
       sse(START, text(0, "a"), end()[:end().index(b"event: message_stop")]),
       sse(START, end())[:-4] + b"\n", b"event: message_stop\n\n", b": x\n\n"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("data", CUT, ids=range(len(CUT)))
def test_a_stream_without_message_stop_was_cut(data, stream):
    answer = new_answer(ANTHROPIC, "chat", stream=stream)
    run(answer, data)
    assert answer.over and answer.error.kind == "upstream" and answer.error.retryable


TWO = b"\n".join(b"data: " + line for line in json.dumps(text(0, "two"), indent=1).encode().split(
    b"\n"))
FORMS = [       # (bytes between start and end of an answer, its text)
    (sse(text(0, "one")) + TWO + b"\n\n", "onetwo"), (TWO.replace(b": ", b":") + b"\n\n", "two"),
    (b"event: content_block_delta\n" + TWO.replace(b"\n", b"\n: x\nevent: y\n") + b"\n\n", "two"),
    (b'data: {"type":"ping"\ndata: }\n\n' + TWO + b"\n\n", "two"),
    (b"data: {bad\n\n" + TWO + b"\n\n", "two"), (b"data: {bad\n" + sse(text(0, "one")), "one"),
    (sse(text(0, "one")).replace(b"\n\n", b"\n") * 2, "oneone")]


@pytest.mark.parametrize("end_of_line", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("data,words", FORMS, ids=range(len(FORMS)))
def test_forms_of_server_sent_events(data, words, end_of_line):
    data, told = sse(START, begin(0, "text", text="")) + data + sse(stop(0)) + end(), []
    for mark in (b"", b"\xef\xbb\xbf"):
        framed = mark + data.replace(b"\n", end_of_line)
        for cuts in (None, "bytewise"):
            answer = new_answer(ANTHROPIC, "messages")
            told.append(run(answer, framed, cuts))
            assert answer.error is None
            (block,) = check_frames("messages", answer, told[-1])["content"]
            assert block["text"] == words
    assert len(set(told)) == 1
    answer = new_answer(ANTHROPIC, "chat")
    run(answer, data[:-1])          # the last blank line is missing
    assert answer.error is None


USAGES = [      # (usages in order, (input, output, cache read, cache write) or None)
    ([{"input_tokens": 5, "output_tokens": 1}, {"output_tokens": 9}], (5, 9, None, None)),
    ([{"input_tokens": 5, "output_tokens": 1, "cache_read_input_tokens": 7,
       "cache_creation_input_tokens": 2}, {"output_tokens": 9}], (14, 9, 7, 2)),
    ([{"input_tokens": 5, "cache_read_input_tokens": 7, "output_tokens": 1},
      {"input_tokens": 5, "cache_read_input_tokens": 7, "output_tokens": 9}], (12, 9, 7, None)),
    ([{"input_tokens": 0, "output_tokens": 0}, {"input_tokens": 6, "output_tokens": 2,
                                                "cache_read_input_tokens": 0}], (6, 2, 0, None)),
    ([{"input_tokens": 6, "output_tokens": 1}, {"input_tokens": 0, "output_tokens": 4}],
     (6, 4, None, None)),
    ([{}, None, [], "x", {"output_tokens": "4"}], None)]


@pytest.mark.parametrize("told,usage", USAGES, ids=range(len(USAGES)))
def test_usage(told, usage):
    known = None
    for given in told:
        known = anthropic_usage(given, known)
    assert known == (usage and ccproxy.Usage(*usage))


def test_cache_figures_reach_the_client():
    data = sse({"type": "message_start", "message": {"usage": {
        "input_tokens": 5, "cache_read_input_tokens": 70, "cache_creation_input_tokens": 20,
        "output_tokens": 1}}}, begin(0, "text", text=""), text(0, "a"), stop(0),
        end(output_tokens=9))
    assert run_stream(ANTHROPIC, "messages", data)[1]["usage"] == {
        "input_tokens": 5, "cache_read_input_tokens": 70, "cache_creation_input_tokens": 20,
        "output_tokens": 9}
    used = run_plain(ANTHROPIC, "chat", data)[1]["usage"]
    assert used["prompt_tokens"] == 95 and used["prompt_tokens_details"] == {"cached_tokens": 70}


ERRORS = [({"type": "overloaded_error", "message": "Overloaded"}, "overloaded", True),
          ({"type": "api_error", "message": "x"}, "upstream", True),
          ({"type": "rate_limit_error", "message": "x"}, "rate_limit", True),
          ({"type": "invalid_request_error", "message": "x"}, "invalid", False),
          ({"type": "invalid_request_error", "message": "prompt is too long: 5"}, "too_long",
           False),
          ("boom", "upstream", True), (None, "upstream", True)]


@pytest.mark.parametrize("error,kind,retryable", ERRORS, ids=range(len(ERRORS)))
def test_errors_in_the_stream(error, kind, retryable):
    for before in ([], [START], [START, begin(0, "text", text=""), text(0, "a")]):
        for face in FACE_NAMES:
            data = sse(*before, {"type": "error", "error": error}, end())
            answer, _ = run_stream(ANTHROPIC, face, data)
            assert (answer.error.kind, answer.error.retryable) == (kind, retryable)


# The lane's pattern.

def line(data, name=b"event: content_block_delta\n", last=b"\n\n"):
    return name + b"data: " + (data if isinstance(data, bytes) else compact(data).encode()) + last


LANES = [       # (kind, line, (mark, string) or None where the ordinary way must be taken)
    ("text", line(text(0, "a")), (b"0", b"a")), ("text", line(text(0, "a"), b""), (b"0", b"a")),
    ("text", line(text(3, "a"), b"", b"\n"), (b"3", b"a")),
    ("tool", line(piece(12, "x")), (b"12", b"x")),
    ("text", line(text(0, "a")).replace(b"\n", b"\r\n"), (b"0", b"a")),
    ("text", line(compact(text(0, "a")).encode()[:-1] + b"      }"), (b"0", b"a")),
    ("thinking", line(thinking(1, "a")), (b"1", b"a")),
    ("tool", line(piece(2, '{"')), (b"2", b'{\\"')),
    ("text", line(text(0, "")), None), ("text", line(text(0, "a"), b"event: ping\n"), None),
    ("text", line(text(0, "\ud83d")), None), ("text", line(thinking(0, "a")), None),
    ("text", line({**text(0, "a"), "x": 1}), None),
    ("text", line(grow(0, "text_delta", text="a", x=1)), None),
    ("text", line(grow(0, "text_delta", x=1, text="a")), None),
    ("text", line(text(0, "a"), last=b""), None), ("thinking", line(signature(0, "a")), None),
    ("text", line(text(-1, "a")), None)]


@pytest.mark.parametrize("kind,data,groups", LANES, ids=range(len(LANES)))
def test_lane_patterns(kind, data, groups):
    found = re.match(ANTHROPIC.lanes[kind], data)
    assert (found and found.groups()) == groups
    assert found is None or found.end() == len(data)


def test_headers():
    assert list(ANTHROPIC.fields(None, "1.2.3", "session")) == [("anthropic-version", "2023-06-01")]


@pytest.mark.parametrize("word", ["error", "network_error"])
def test_an_end_that_is_none(word):
    """Other services that speak this API say so in the reason."""
    data = anthropic_sse([("text", "Half"), ("end", "stop")]).replace(b"end_turn", word.encode())
    answer, _ = run_stream(ANTHROPIC, "chat", data)
    assert answer.error is not None and answer.error.status == 502
