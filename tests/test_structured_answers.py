"""STRUCTURED ANSWERS: whether an answer holds the form that was asked for, and how it is asked for
again."""
from __future__ import annotations

import json

import pytest
from fake_upstream import ndjson
from harness import ccproxy
from pure import check_params, new_answer, read_prompt, request, run

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}
FORMATS = {
    "chat": {"response_format": {"type": "json_schema", "json_schema": {"name": "x",
                                                                        "schema": SCHEMA}}},
    "messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}}
JSON_TOOL = {"name": "json", "description": "Respond with a JSON object.", "input_schema": SCHEMA}
FINISH = {"type": "finish", "finishReason": "stop"}


def call(given, tool="json", name="c1"):
    return {"type": "tool-call", "toolCallId": name, "toolName": tool, "input": given}


def answered(prompt, data):
    """The reply to a plain prompt."""
    answer = new_answer("chat", stream=False, json_format=prompt.json_format)
    run(answer, data)
    assert answer.error is None
    return answer.reply


# Which prompts are checked: (face, members, whether).

ANY = {"tool_choice": {"type": "any"}}
CHECKED = [
    ("chat", {}, False), ("chat", FORMATS["chat"], True),
    ("chat", {**FORMATS["chat"], "stream": True}, False),
    ("chat", {"response_format": {"type": "json_object"}}, True),
    ("chat", {"response_format": {"type": "text"}}, False),
    ("messages", {}, False), ("messages", FORMATS["messages"], True),
    ("messages", {**FORMATS["messages"], "stream": True}, False),
    ("responses", {}, False), ("responses", FORMATS["responses"], True),
    ("responses", {**FORMATS["responses"], "stream": True}, False),
    ("messages", {"tools": [JSON_TOOL], **ANY}, True),
    ("messages", {"tools": [JSON_TOOL], "tool_choice": {"type": "tool", "name": "json"}}, True),
    ("messages", {"tools": [JSON_TOOL], "stream": True, **ANY}, False),
    ("messages", {"tools": [JSON_TOOL]}, False),
    ("messages", {"tools": [JSON_TOOL], "tool_choice": {"type": "auto"}}, False),
    ("messages", {"tools": [{**JSON_TOOL, "name": "f"}], **ANY}, False),
    ("messages", {"tools": [JSON_TOOL, {**JSON_TOOL, "name": "f"}], **ANY}, False)]


@pytest.mark.parametrize("face,members,checked", CHECKED, ids=range(len(CHECKED)))
def test_which_answers_are_checked(face, members, checked):
    prompt = read_prompt(face, request(face, **members))
    assert ccproxy.has_checked_format(prompt) is checked


# Answers: (members, upstream's events, words of the violation).

ASKED, TOOL = FORMATS["messages"], {"tools": [JSON_TOOL], **ANY}


def says(text, reason="stop"):
    return [{"type": "text-delta", "id": "0", "text": text}, {**FINISH, "finishReason": reason}]


ANSWERS = [
    (ASKED, says('{"a":1}'), None), (ASKED, says(' {"a": 1}\n'), None),
    (ASKED, says('```json\n{"a":1}\n```'), None),
    (ASKED, says('{"a":"x"}'), "$.a must be of type integer"),
    (ASKED, says("{}"), 'lacks the member "a"'), (ASKED, says('{"a":1,"b":2}'), "$.b must not"),
    (ASKED, says("Sure! {}"), "not JSON"), (ASKED, says('{"a":1} Done.'), "not JSON"),
    (ASKED, [FINISH], "not JSON"), (ASKED, says('{"a":', "length"), None),
    (ASKED, says("I refuse", "content-filter"), None),
    (ASKED, [call({"q": 1}, "f"), {**FINISH, "finishReason": "tool-calls"}], None),
    ({}, says("no JSON at all"), None), (TOOL, [call({"a": 1}), FINISH], None),
    (TOOL, [call({"a": "x"}), FINISH], "$.a must be of type integer"),
    (TOOL, [call({}), FINISH], 'lacks the member "a"'),
    (TOOL, says('{"a":1}'), "was not called"), (TOOL, says("no"), "was not called")]


@pytest.mark.parametrize("members,events,words", ANSWERS, ids=range(len(ANSWERS)))
def test_violations_of_answers(members, events, words):
    prompt = read_prompt("messages", request("messages", **members))
    found = ccproxy.format_violation(prompt, answered(prompt, ndjson(*events)))
    assert found is None if words is None else words in found


@pytest.mark.parametrize("members", [ASKED, TOOL])
def test_a_refusal_is_not_asked_for_again(members):
    prompt = read_prompt("messages", request("messages", **members))
    reply = answered(prompt, ndjson(*says("not JSON")))
    assert ccproxy.format_violation(prompt, reply)
    reply.blocks.append(ccproxy.Block("refusal", pieces=["No."]))
    assert ccproxy.format_violation(prompt, reply) is None


@pytest.mark.parametrize("text,valid", [("{}", True), ("[1]", False), ("x", False), ("", False)])
def test_any_json_must_be_an_object(text, valid):
    prompt = read_prompt("chat", request("chat", response_format={"type": "json_object"}))
    found = ccproxy.format_violation(prompt, answered(prompt, ndjson(*says(text or " "))))
    assert (found is None) is valid


# The repair turn: (members, events, roles added).

REPAIRS = [
    (ASKED, says('{"a":"x"}'), ["assistant", "user"]),
    (ASKED, [FINISH], ["assistant", "user"]),
    (TOOL, [call({"a": "x"}), FINISH], ["assistant", "tool"]),
    (TOOL, says("Here: ")[:1] + [call({"a": "x"}), FINISH], ["assistant", "tool"]),
    (TOOL, [call({"a": "x"}), call({}, name="c2"), FINISH], ["assistant", "tool"]),
    (TOOL, says("no"), ["assistant", "user"])]


@pytest.mark.parametrize("members,events,roles", REPAIRS, ids=range(len(REPAIRS)))
def test_what_is_said_to_the_model(members, events, roles):
    prompt = read_prompt("messages", request("messages", **members))
    reply = answered(prompt, ndjson(*events))
    violation = ccproxy.format_violation(prompt, reply)
    assert violation
    ccproxy.add_repair_turns(prompt, reply, violation)
    params = json.loads(ccproxy.build_alpha(prompt, "session"))["params"]
    check_params(params)
    assert [turn["role"] for turn in params["messages"]] == ["user"] + roles
    assert all(violation in part.text for part in prompt.turns[-1].parts)
    said = [part["text"] for part in params["messages"][1]["content"] if part["type"] == "text"]
    assert said in ([block.text for block in reply.of_kind("text")], ["(nothing)"])


def test_a_call_that_was_repaired_keeps_its_arguments():
    prompt = read_prompt("messages", request("messages", **TOOL))
    reply = answered(prompt, ndjson(call({"a": "x", "b": [1]}), FINISH))
    ccproxy.add_repair_turns(prompt, reply, "wrong")
    assert prompt.turns[-2].parts == [ccproxy.Call("c1", "json", {"a": "x", "b": [1]})]
    assert prompt.turns[-1].parts[0].is_error and prompt.turns[-1].parts[0].id == "c1"


# The usage of both calls together.

Usage = ccproxy.Usage
USAGES = [      # (one, other, both)
    (None, None, None), (Usage(1, 2), None, Usage(1, 2)), (None, Usage(1, 2), Usage(1, 2)),
    (Usage(1, 2), Usage(3, 4), Usage(4, 6)),
    (Usage(1, 2, 3, 4, 5), Usage(1, 2, 3, 4, 5), Usage(2, 4, 6, 8, 10)),
    (Usage(1, 2, None, 4), Usage(1, 2, 3), Usage(2, 4, 3, 4)), (Usage(0, 0, 0), Usage(0, 0),
                                                               Usage(0, 0, 0))]


@pytest.mark.parametrize("one,other,both", USAGES, ids=range(len(USAGES)))
def test_usage_of_both_calls(one, other, both):
    assert ccproxy.add_usage(one, other) == both
