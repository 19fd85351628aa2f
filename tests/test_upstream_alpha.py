"""UPSTREAM FORMAT: ALPHA: a prompt as the envelope, lines as events, usage, reasons, the lane."""
from __future__ import annotations

import json
import re

import pytest
from fake_upstream import ndjson, recorded
from harness import ccproxy
from pure import (NAMES, check_events, has_note, params_of, plain_line, read_events, read_prompt,
                  request, split_lines, translate)

FINISH = {"type": "finish", "finishReason": "stop"}


# The envelope.

def test_envelope_to_the_byte():
    """Member order of UPSTREAM 4.1: the prefix must be the same on every turn."""
    prompt = read_prompt("chat", request("chat", model="m", max_tokens=9))
    assert ccproxy.build_alpha(prompt, "S").decode() == (
        '{"config":{"workingDir":"/workspace","date":"2026-01-01","environment":"linux",'
        '"structure":[],"isGitRepo":false,"currentBranch":"","mainBranch":"","gitStatus":"",'
        '"recentCommits":[]},"memory":null,"taste":null,"skills":null,'
        '"permissionMode":"standard","threadId":"S","params":{"model":"m","messages":'
        '[{"role":"user","content":[{"type":"text","text":"hi"}]}],"tools":[],"system":" ",'
        '"max_tokens":9,"stream":true}}')


def test_envelope_is_utf8_without_escapes():
    prompt = read_prompt("chat", request("chat", messages=[
        {"role": "user", "content": "\u00e9\U0001f680\u2028\x00"}]))
    assert '"text":"\u00e9\U0001f680\u2028\\u0000"'.encode() in ccproxy.build_alpha(prompt, "S")


OPTIONAL = [
    ({"temperature": 0}, {"temperature": 0}), ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"top_p": 0.5}, {"top_p": 0.5}), ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
    ({"temperature": None, "top_p": None, "reasoning_effort": None, "tool_choice": None}, {})]


@pytest.mark.parametrize("asked,sent", OPTIONAL, ids=range(len(OPTIONAL)))
def test_optional_params_are_sent_when_given(asked, sent):
    params = params_of("chat", request("chat", **asked))
    names = {"temperature", "top_p", "reasoning_effort", "tool_choice", "stop"}
    assert {name: params[name] for name in params if name in names} == sent


@pytest.mark.parametrize("body", [
    b'{"messages":[{"role":"user","content":"a"}],"tools":[{"name":"f",'
    b'"input_schema":{"x":1e999}}]}',
    b'{"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"1","name":"f",'
    b'"input":{"x":1e999}}]}]}'])
def test_numbers_without_a_json_word_are_a_400(body):
    with pytest.raises(ccproxy.ProxyError) as caught:
        translate("messages", body)
    assert caught.value.kind == "invalid"


def test_every_conversation_turn_begins_with_the_same_bytes():
    """What was sent on one turn is a prefix of what is sent on the next (prompt caching)."""
    call = {"id": "c", "type": "function", "function": {"name": "f.g", "arguments": "{}"}}
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "one"},
               {"role": "assistant", "content": "a", "reasoning_content": "r",
                "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "c", "content": [
                   {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
               {"role": "assistant", "content": "b"}, {"role": "user", "content": "two"},
               {"role": "assistant", "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "c", "content": "again"},
               {"role": "assistant", "content": "c"}, {"role": "user", "content": "three"}]
    sent = [ccproxy.build_alpha(read_prompt("chat", request("chat", messages=history[:size])), "S")
            for size in (2, 4, 6, 8, 10)]
    for before, after in zip(sent, sent[1:]):
        assert after.startswith(before[:before.index(b'],"tools":')])


# Lines.

LINES = [   # (line, texts of its events)
    (b'{"type":"text-delta","id":"0","text":"a"}', "a"),
    (b'{"type":"text-delta","text":"a"}', "a"),
    (b'{ "text" : "a" , "type" : "text-delta" }', "a"),
    (b'data: {"type":"text-delta","id":"0","text":"a"}', "a"),
    (b'data:{"type":"text-delta","id":"0","text":"a"}\r', "a"),
    (b'  {"type":"text-delta","id":"0","text":"a"}  ', "a"),
    (b'{"type":"text-delta","id":"0","text":"\xe2\x80\xa8"}', "\u2028"),
    (b'{"type":"text-delta","id":"0","text":"a\xffb"}', "a\ufffdb"),
    (b'{"type":"text-delta","id":"0","text":"a","text":"b"}', "b"),
    (b'{"type":"text-delta","id":"0","delta":"a"}', ""),
    (b'{"type":"text-delta","id":"0","textDelta":"a"}', ""),
    (b'{"type":"text-delta","id":"0","text":null}', ""),
    (b'{"type":"text-delta","id":"0","text":["a"]}', ""),
    (b'{"type":"reasoning-delta","id":"0","text":5}', ""),
    (b'{"type":"unknown","text":"a"}', ""), (b'{"type":["text-delta"],"text":"a"}', ""),
    (b'{"type":{"a":1},"text":"a"}', ""), (b'{"text":"a"}', ""),
    (b"[DONE]", ""), (b"data: [DONE]", ""), (b": ping", ""), (b"event: message", ""), (b"", ""),
    (b"null", ""), (b"7", ""), (b'["a"]', ""), (b'{"type":"text-delta","text":"a"', ""),
    (b'{"type":"start-step","request":{"text":"a"', "")]


@pytest.mark.parametrize("line,words", LINES, ids=range(len(LINES)))
def test_lines(line, words):
    reading = ccproxy.Reading()
    events = list(ccproxy.ALPHA.read_line(reading, line))
    assert "".join(event.text for event in events if isinstance(event, ccproxy.Delta)) == words
    assert all(not isinstance(event, (ccproxy.End, ccproxy.Fail)) for event in events)


@pytest.mark.parametrize("line,noted", [
    (b'{"type":"text-delta"', True), (b"{", True), (b"[DONE]", False), (b'{"type":"new"}', False),
    (b'{"type":"start-step","x', False), (b'{"a":' * 100000, True)], ids=range(6))
def test_lines_that_leave_a_note(line, noted):
    reading = ccproxy.Reading()
    list(ccproxy.ALPHA.read_line(reading, line))
    assert has_note(reading.notes, "not JSON") == noted


def test_start_step_is_dropped_before_it_is_kept():
    answer_lines = ccproxy.LineBuffer(ccproxy.ALPHA.skip)
    for piece in [b'{"type":"sta', b'rt-step","request":"'] + [b"x" * 65536] * 100:
        assert answer_lines.feed(piece) == b"" and answer_lines.size < 65536
    assert answer_lines.feed(b'"}\n{"type":"start"}\n') == b'{"type":"start"}\n'


# Reasons.

REASONS = [     # (finishReason, rawFinishReason, ours; None for a failure)
    ("stop", "stop", "stop"), ("end_turn", None, "stop"), (None, None, "stop"), ("", "", "stop"),
    ("other", None, "stop"), ("unknown", None, "stop"), ("wibble", "wobble", "stop"),
    ("length", "length", "length"), ("max_tokens", None, "length"),
    ("max_output_tokens", None, "length"), ("other", "max_tokens", "length"),
    ("unknown", "length", "length"), ("content-filter", None, "filtered"),
    ("content_filter", None, "filtered"), ("stop", "refusal", "stop"), ("other", "refusal",
                                                                        "filtered"),
    ("pause_turn", None, "paused"), ("other", "pause_turn", "paused"),
    ("stop", "pause_turn", "paused"), ("tool-calls", "tool_calls", "stop"), ("error", None, None),
    ("error", "stop", None), (5, ["stop"], "stop"), ({"unified": "stop"}, None, "stop")]


@pytest.mark.parametrize("reason,raw,ours", REASONS, ids=range(len(REASONS)))
def test_finish_reasons(reason, raw, ours):
    _, events = read_events([plain_line({"type": "finish", "finishReason": reason,
                                         "rawFinishReason": raw})])
    check_events(events)
    assert getattr(events[-1], "reason", None) == ours


@pytest.mark.parametrize("reason", ["tool-calls", "tool_calls", "tool_use", "stop", "end_turn",
                                    "other", None])
def test_finish_reasons_with_a_call(reason):
    _, events = read_events([plain_line({"type": "tool-call", "toolCallId": "1", "toolName": "f",
                                         "input": {}}),
                             plain_line({"type": "finish", "finishReason": reason})])
    assert events[-1].reason == "tool_calls"


# Usage.

USAGES = [  # (totalUsage, (input, output, cache read, cache write, reasoning) or None)
    ({"inputTokens": 7, "outputTokens": 3}, (7, 3, None, None, None)),
    ({"inputTokens": 7, "outputTokens": 3, "cachedInputTokens": 2, "reasoningTokens": 1},
     (7, 3, 2, None, 1)),
    ({"inputTokens": 7, "outputTokens": 3, "cachedInputTokens": 2,
      "inputTokenDetails": {"cacheReadTokens": 0, "cacheWriteTokens": 4}, "reasoningTokens": 5,
      "outputTokenDetails": {"reasoningTokens": 0}}, (7, 3, 0, 4, 0)),
    ({"inputTokens": 7}, (7, 0, None, None, None)),
    ({"outputTokens": 7}, (0, 7, None, None, None)),
    ({"inputTokens": 0, "outputTokens": 0}, (0, 0, None, None, None)),
    ({"inputTokens": 7, "outputTokens": 3, "inputTokenDetails": None, "outputTokenDetails": 5},
     (7, 3, None, None, None)),
    ({"inputTokens": "7", "outputTokens": None}, None),
    ({"inputTokens": -7, "outputTokens": True}, None),
    ({}, None), (None, None), ([], None), ("x", None)]


@pytest.mark.parametrize("given,usage", USAGES, ids=range(len(USAGES)))
def test_usage(given, usage):
    reading, _ = read_events([plain_line({**FINISH, "totalUsage": given})])
    assert reading.usage == (usage and ccproxy.Usage(*usage))


def test_usage_of_a_step_is_the_fallback():
    step = plain_line({"type": "finish-step", "usage": {"inputTokens": 1, "outputTokens": 2}})
    reading, _ = read_events([step, plain_line(FINISH)])
    assert reading.usage == ccproxy.Usage(1, 2)
    reading, _ = read_events([step, plain_line({**FINISH, "totalUsage": {"inputTokens": 9,
                                                                         "outputTokens": 8}})])
    assert reading.usage == ccproxy.Usage(9, 8)


RECORDED = {    # (input, output, cache read, cache write, reasoning), cost
    "01": ((15, 6, 0, None, 0), "0.000100"), "02": ((17, 17, 0, None, 11), "0.000100"),
    "03": ((373, 61, 0, None, 18), "0.000100"), "04": ((412, 88, 256, None, 0), "0.000100"),
    "05": ((310, 246, 0, None, 240), "0.000100"), "06": ((20, 96, 0, None, 96), "0.000100"),
    "07": (None, None), "08": (None, None), "09": ((20492, 31, 18432, 2048, 0), "0.000100"),
    "10_": ((18, 60, 0, None, 0), "0.000100"), "10b": ((18, 6, 0, None, 0), "0.000100"),
    "11": ((14, 20000, 0, None, 0), "0.000100"), "12": (None, None), "13": (None, None),
    "14": ((100, 9, 64, None, 0), None), "15": ((24, 8, 0, None, 0), "0.000100")}


def test_the_table_names_every_recorded_stream():
    assert sorted(RECORDED) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_usage_and_cost_of_recorded(name):
    reading = ccproxy.Reading()
    for line in split_lines(recorded(name)):
        list(ccproxy.ALPHA.read_line(reading, line))
    usage, cost = RECORDED[name]
    assert reading.usage == (usage and ccproxy.Usage(*usage)) and reading.cost == cost


COSTS = [({"gateway": {"cost": "0.002607672"}}, "0.002607672"), ({"gateway": {"cost": 0.1}}, None),
         ({"gateway": {"cost": "free; x"}}, None), ({"gateway": 5}, None), ({}, None),
         ([], None), (None, None), ({"gateway": {}}, None)]


@pytest.mark.parametrize("metadata,cost", COSTS, ids=range(len(COSTS)))
def test_costs(metadata, cost):
    reading = ccproxy.Reading()
    list(ccproxy.ALPHA.read_line(reading, plain_line({"type": "provider-metadata",
                                                      "providerMetadata": metadata})))
    assert reading.cost == cost


# Signatures.

def thinking(words, **more):
    return {"type": "reasoning-delta", "id": "0", "text": words, **more}


def signed(signature, provider="anthropic"):
    return {"providerMetadata": {"x": 5, provider: {"signature": signature}}}


SIGNATURES = [
    ([thinking("a", **signed("s"))], "s"),
    ([thinking("a"), thinking("", **signed("s"))], "s"),
    ([thinking("a"), {"type": "reasoning-end", "id": "0", **signed("s", "bedrock")}], "s"),
    ([thinking("a"), thinking("", **signed("s")), {"type": "reasoning-end", "id": "0"}], "s"),
    ([thinking("a", **signed("")), thinking("b", **signed(5))], ""),
    ([thinking("a"), {"type": "text-start", "id": "1"},
      {"type": "reasoning-end", "id": "0", **signed("s")}], "s"),
    ([{"type": "tool-input-start", "id": "c", "toolName": "f"},
      {"type": "tool-input-delta", "id": "c", "delta": "{"}, thinking("a"),
      thinking("", **signed("s")),
      {"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": {}}], "s")]


@pytest.mark.parametrize("events,signature", SIGNATURES, ids=range(len(SIGNATURES)))
def test_signatures(events, signature):
    """The upstream's, wherever it came, also of thinking that waits for a call."""
    text = {"type": "text-delta", "text": "x"}
    _, shown = read_events(split_lines(ndjson(*events, text, FINISH)))
    blocks = [event.block for event in shown if isinstance(event, ccproxy.Close)
              and event.block.kind == ccproxy.THINKING]
    assert [block.signature for block in blocks] == [signature]


# Calls.

ARGUMENTS = [   # (members of the tool-call, arguments)
    ({"input": {"a": 1}}, {"a": 1}), ({"input": {}}, {}), ({"input": None}, {}), ({}, {}),
    ({"input": '{"a": 1}'}, {"a": 1}), ({"input": ""}, {}), ({"input": "  "}, {}),
    ({"input": [{"a": 1}]}, {"a": 1}), ({"input": "bare text"}, {"input": "bare text"}),
    ({"input": "[1,2]"}, {"input": [1, 2]}), ({"input": 5}, {"input": 5}),
    ({"input": [1, 2]}, {"input": [1, 2]}), ({"args": {"a": 1}}, {"a": 1}),
    ({"arguments": '{"a":1}'}, {"a": 1}), ({"input": {"q": "\u00e9\U0001f680\n\"\\"}},
                                           {"q": "\u00e9\U0001f680\n\"\\"}),
    ({"input": '{"a": 1'}, {"input": '{"a": 1'})]


@pytest.mark.parametrize("members,arguments", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments_of_a_call(members, arguments):
    _, events = read_events([plain_line({"type": "tool-call", "toolCallId": "1", "toolName": "f",
                                         **members}), plain_line(FINISH)])
    (block,) = [event.block for event in events if isinstance(event, ccproxy.Close)]
    assert block.whole and json.loads(block.text) == arguments


@pytest.mark.parametrize("line", [
    b'{"type":"tool-call","toolCallId":"1","toolName":"f","input":{"x":1e999}}',
    b'{"type":"tool-call","toolCallId":"1","toolName":"f","input":{"x":NaN}}',
    b'{"type":"tool-call","toolCallId":"1","toolName":"f","input":"{\\"x\\": NaN}"}'],
    ids=range(3))
def test_arguments_are_always_json(line):
    """Numbers that JSON has no word for must not become a word that no client can parse."""
    def refuse(word):
        raise AssertionError(word)

    _, events = read_events([line, plain_line(FINISH)])
    for event in events:
        if isinstance(event, ccproxy.Close):
            json.loads(event.block.text, parse_constant=refuse)


CALLS = [   # (events, [(id, name)])
    ([{"type": "tool-call", "toolCallId": "1", "toolName": "f", "input": {}}], [("1", "f")]),
    ([{"type": "tool-call", "toolCallId": "1", "input": {}}], [("1", "unknown")]),
    ([{"type": "tool-call", "toolName": "f", "input": {}},
      {"type": "tool-call", "toolName": "g", "input": {}}], [("call_0", "f"), ("call_1", "g")]),
    ([{"type": "tool-call", "toolCallId": "call_1", "toolName": "f", "input": {}},
      {"type": "tool-call", "toolName": "g", "input": {}}], [("call_1", "f"), ("*", "g")]),
    ([{"type": "tool-call", "toolCallId": "1", "toolName": "f", "providerExecuted": True}], []),
    ([{"type": "tool-input-start", "id": "1", "toolName": "f", "providerExecuted": True},
      {"type": "tool-input-delta", "id": "1", "delta": "{}"},
      {"type": "tool-call", "toolCallId": "1", "toolName": "f", "input": {}},
      {"type": "tool-result", "toolCallId": "1", "result": "x"},
      {"type": "tool-error", "toolCallId": "1", "error": "x"}], [])]


@pytest.mark.parametrize("events,calls", CALLS, ids=range(len(CALLS)))
def test_calls(events, calls):
    _, shown = read_events(split_lines(ndjson(*events, FINISH)))
    blocks = [event.block for event in shown if isinstance(event, ccproxy.Close)]
    assert [block.name for block in blocks] == [name for _, name in calls]
    assert all(expected in ("*", block.call_id) for block, (expected, _) in zip(blocks, calls))
    assert len({block.call_id for block in blocks}) == len(blocks)
    assert shown[-1].reason == ("tool_calls" if calls else "stop")


# The lane's pattern: exactly a delta line, and the string in it.

LANES = [   # (kind, bytes, string; None where the ordinary way must be taken)
    ("text", b'{"type":"text-delta","id":"0","text":"a"}\n', b"a"),
    ("text", b'{"type":"text-delta","id":"0","text":"a\\n\\"\\\\\\/\\u00e9\\uFFFD"}\n',
     b'a\\n\\"\\\\\\/\\u00e9\\uFFFD'),
    ("text", b'{"type":"text-delta","id":"0","text":"\xc3\xa9"}\r\n', b"\xc3\xa9"),
    ("text", b'data: {"type":"text-delta","id":"0","text":"a"}\n\n', b"a"),
    ("thinking", b'{"type":"reasoning-delta","id":"0","text":"a"}\n', b"a"),
    ("tool", b'{"type":"tool-input-delta","id":"0","delta":"a"}\n', b"a"),
    ("text", b'{"type":"text-delta","id":"0","text":""}\n', None),
    ("text", b'{"type":"text-delta","id":"0","text":"\\ud83d"}\n', None),
    ("text", b'{"type":"text-delta","id":"0","text":"\\uD83D\\uDE80"}\n', None),
    ("text", b'{"type":"text-delta","id":"0","text":"\\x"}\n', None),
    ("text", b'{"type":"text-delta","id":"0","text":"\\u12"}\n', None),
    ("text", b'{"type":"text-delta","id":"0","text":"a\x01"}\n', None),
    ("text", b'{"type":"text-delta","id":"0","text":"a"', None),
    ("text", b'{"type":"text-delta","id":"0","text":"a"}', None),
    ("text", b'{"type":"text-delta","id":"0","text":"a","x":1}\n', None),
    ("text", b'{"type":"text-delta","id":"0","text":"a"}{"type":"finish"}\n', None),
    ("text", b'{"type":"text-delta","text":"a"}\n', None),
    ("text", b'{"type":"reasoning-delta","id":"0","text":"a"}\n', None),
    ("text", b' {"type":"text-delta","id":"0","text":"a"}\n', None),
    ("text", b'{"type":"text-delta","id":"a\\"b","text":"a"}\n', None)]


@pytest.mark.parametrize("kind,line,string", LANES, ids=range(len(LANES)))
def test_lane_patterns(kind, line, string):
    found = re.match(ccproxy.ALPHA.lanes[kind], line)
    assert (found and found.group(2)) == string
    assert found is None or found.end() == len(line)
