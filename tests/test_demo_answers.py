"""DEMO ANSWERS: what the upstream inside the program says: markers, examples, harmless tools."""
from __future__ import annotations

import json

import pytest
from fake_upstream import ndjson
from harness import ccproxy
from pure import PNG, new_answer, request, run, run_plain, translate

OBJECT = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def demo(asked, face="chat", **members):
    """The demo's answer to what the proxy sends for this request."""
    if face == "chat" and "messages" not in members:
        members["messages"] = [{"role": "user", "content": asked}]
    return ccproxy.demo_answer(translate(face, request(face, **members))[0])


def tool(name, schema=OBJECT):
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def lines_of(answer):
    return ndjson(*[line for _, line in answer.lines])


def called(answer):
    return [line["toolName"] for _, line in answer.lines if line["type"] == "tool-call"]


# Markers: errors with a status.

@pytest.mark.parametrize("marker", sorted(ccproxy.DEMO_ERRORS))
def test_markers_of_errors(marker):
    answer = demo("please [demo:%s] now" % marker)
    assert answer.status == int(marker) and answer.lines == [] and not answer.cut
    error = answer.body["error"]
    assert answer.body["success"] is False and error["status"] == int(marker)
    assert "[demo:%s]" % marker in error["message"] and error["code"]
    failure = ccproxy.ALPHA.read_failure(answer.status, {}, json.dumps(answer.body).encode())
    assert failure.status >= 400 and "[demo:%s]" % marker in failure.message


def test_the_markers_that_the_readme_needs_are_there():
    assert {"402", "429", "503"} <= set(ccproxy.DEMO_ERRORS)


# Markers: streams.  (text of the user, reason of the end, kind of the failure)

STREAMS = [("hi", "stop", None), ("[demo:length]", "length", None), ("[demo:slow]", "stop", None),
           ("[demo:wibble]", "stop", None), ("[demo:]", "stop", None), ("", "stop", None),
           ("[demo:error]", None, "unavailable"), ("[demo:cut]", None, "upstream")]


@pytest.mark.parametrize("asked,reason,failure", STREAMS)
@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
def test_markers_of_streams(face, asked, reason, failure):
    shown = demo(asked, messages=[{"role": "user", "content": [
        {"type": "text", "text": asked or "?"}]}])
    assert shown.status == 200 and shown.cut == (asked == "[demo:cut]")
    answer = new_answer(face)
    run(answer, lines_of(shown))
    assert (answer.error and answer.error.kind) == failure
    assert failure or answer.reply.reason == reason
    assert failure or (answer.reply.usage.input > 0 and answer.reply.usage.output > 0)


def test_system_messages_behind_what_was_said_are_not_answered():
    later = {"role": "system", "content": "Environment"}
    shown = demo("", messages=[{"role": "user", "content": "[demo:429]"}, later])
    assert shown.status == 429
    calling = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {
        "name": "get_weather", "arguments": "{}"}}]}
    shown = demo("", tools=[tool("get_weather")], messages=[
        {"role": "user", "content": "[demo:call get_weather]"}, calling,
        {"role": "tool", "tool_call_id": "c", "content": "r"}, later])
    assert called(shown) == []


def test_slow_is_slower():
    pauses = [sum(pause for pause, _ in demo(asked).lines) for asked in ("hi", "[demo:slow] hi")]
    assert pauses[1] > 5 * pauses[0] > 0


def test_an_error_in_mid_stream_comes_behind_some_text():
    kinds = [line["type"] for _, line in demo("hello world [demo:error]").lines]
    assert kinds[-1] == "error" and "text-delta" in kinds and "finish" not in kinds
    kinds = [line["type"] for _, line in demo("hello world [demo:cut]").lines]
    assert kinds[-1] == "text-delta" and "finish" not in kinds


def test_only_the_last_user_message_has_markers():
    messages = [{"role": "user", "content": "[demo:402]"}, {"role": "assistant", "content": "x"},
                {"role": "user", "content": "go on"}]
    assert demo("", messages=messages).status == 200


def test_a_marker_does_not_refuse_what_comes_back_from_a_tool():
    messages = [{"role": "user", "content": "[demo:402]"},
                {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {
                    "name": "get_weather", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "12 degrees"}]
    assert demo("", messages=messages, tools=[tool("get_weather")]).status == 200


# What it says.

HOSTILE = "Gr\u00fc\u00df dich \U0001f680\nhello.py\n```python\nprint(1)\n```"


def test_it_says_what_it_is_and_repeats_nothing():
    """aider makes a file of what it reads in an answer, and Claude Code believes what stands there."""
    for messages in ([{"role": "user", "content": HOSTILE}],
                     [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}],
                     [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
                         {"id": "c", "type": "function", "function": {"name": "f",
                                                                      "arguments": "{}"}}]},
                      {"role": "tool", "tool_call_id": "c", "content": HOSTILE}]):
        _, body = run_plain("chat", lines_of(demo("", messages=messages)))
        message = body["choices"][0]["message"]
        assert "demo of ccproxy, not a model" in message["content"]
        assert "%d characters" % len(HOSTILE) in message["content"]
        assert not any(line in message["content"] for line in HOSTILE.split("\n"))
        assert message["reasoning_content"]


def test_it_sees_pictures():
    picture = {"type": "image_url", "image_url": {"url": PNG}}
    for count, words in ((1, "1 picture."), (2, "2 pictures.")):
        messages = [{"role": "user", "content": [{"type": "text", "text": "look"}]
                     + [picture] * count}]
        _, body = run_plain("chat", lines_of(demo("", messages=messages)))
        assert words in body["choices"][0]["message"]["content"]


def test_it_tells_that_a_tool_answered_and_calls_none_again():
    messages = [{"role": "user", "content": "[demo:call get_weather]"},
                {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {
                    "name": "get_weather", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "12 degrees"}]
    shown = demo("", messages=messages, tools=[tool("get_weather")])
    _, body = run_plain("chat", lines_of(shown))
    assert called(shown) == [] and "10 characters" in body["choices"][0]["message"]["content"]


# Tools: (names offered, text, tool_choice, names called).

NAMED = {"type": "function", "function": {"name": "bash"}}
TOOLS = [
    (["get_weather"], "weather?", None, []), (["get_weather"], "use get_weather now", None, []),
    (["get_weather"], "weather?", "none", []), ([], "weather?", None, []),
    (["get_weather"], "weather?", "auto", []),
    (["a_tool", "b_tool"], "[demo:call b_tool]", None, ["b_tool"]),
    (["a_tool", "b_tool", "c_tool"], "[demo:parallel]", None, ["a_tool", "b_tool"]),
    (["bash", "get_weather"], "[demo:parallel]", None, ["get_weather"]),
    (["bash", "get_weather"], "weather?", "required", ["get_weather"]),
    (["bash"], "hi", "required", ["bash"]), (["bash", "get_weather"], "hi", NAMED, ["bash"]),
    (["bash"], "[demo:call bash]", None, ["bash"]), (["bash"], "[demo:parallel]", None, []),
    (["bash"], "[demo:call other]", None, []),
    (["write", "edit", "exec"], "I am rewriting credits of executives", None, [])]


@pytest.mark.parametrize("names,asked,choice,expected", TOOLS, ids=range(len(TOOLS)))
def test_tools(names, asked, choice, expected):
    shown = demo(asked, tools=[tool(name) for name in names],
                 **({"tool_choice": choice} if choice else {}))
    assert called(shown) == expected
    answer = new_answer("chat", stream=False)
    run(answer, lines_of(shown))
    assert answer.reply.reason == ("tool_calls" if expected else "stop")
    for block in answer.reply.of_kind("tool"):
        assert block.whole and ccproxy.find_violation(block.text, OBJECT) is None
    assert len({block.call_id for block in answer.reply.of_kind("tool")}) == len(expected)


DANGEROUS = ["Bash", "bash", "shell", "local_shell", "exec_command", "write_stdin", "Write",
             "write", "Edit", "edit", "MultiEdit", "NotebookEdit", "apply_patch",
             "str_replace_based_edit_tool", "Task", "task", "Agent", "spawn_agent", "KillShell",
             "delete_file", "remove_file", "run_command", "run_terminal_cmd", "create_file",
             "search_replace"]


@pytest.mark.parametrize("name", DANGEROUS)
@pytest.mark.parametrize("asked", ["Say hello.", "[demo:parallel] go"])
def test_dangerous_tools_are_not_called_by_themselves(name, asked):
    """A demo must not make an agent change anything."""
    assert called(demo(asked, tools=[tool(name)])) == []
    assert name not in called(demo(asked, tools=[tool(name), tool("get_weather")]))
    assert called(demo("[demo:call %s]" % name, tools=[tool(name)])) == [name]


# Examples under their schema.

SCHEMAS = [
    {"type": "object"}, OBJECT, {"type": "object", "properties": {"a": {"type": "integer"}}},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": ["string", "null"]}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"const": 5}}},
    {"type": "object", "properties": {"a": {"const": None}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"enum": [None, 1]}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"const": False}, "b": {"enum": [0]}}},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"},
                                      "c": {"type": "number"}}},
    {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
    {"type": "object", "properties": {"a": {"type": "array", "minItems": 3, "items": OBJECT}}},
    {"type": "object", "properties": {"a": {"type": "array", "maxItems": 0}}},
    {"type": "object", "properties": {"a": OBJECT, "b": {"properties": {"c": {"type": "null"}}}}},
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}},
    {"type": "object", "properties": {"a": {"oneOf": [{"type": "string"}, {"type": "null"}]}}},
    {"type": "object", "properties": {"a": {}}, "required": ["a", "b"]},
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5}}},
    {"type": "object", "properties": {"a": {"type": "string", "minLength": 20}}},
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}},
    {"type": "object", "properties": {"a": {"type": "integer", "maximum": 0}}},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"],
     "$defs": {"x": {"type": "object", "properties": {"b": {"type": "integer"}},
                     "required": ["b"]}}},
    {"type": "object", "properties": {"a": {"allOf": [{"type": "integer"}]}}, "required": ["a"]},
    {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"],
     "anyOf": [{"required": ["a"]}]}]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_examples_are_valid_under_their_schema(schema):
    """As structured output and as a tool's input: whoever connects a client sees it accepted."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    _, body = run_plain("chat", lines_of(demo("hi", response_format=form)))
    assert ccproxy.find_violation(body["choices"][0]["message"]["content"], schema) is None
    _, body = run_plain("chat", lines_of(demo("[demo:call f]", tools=[tool("f", schema)])))
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert ccproxy.find_violation(call["function"]["arguments"], schema) is None


def test_any_json():
    _, body = run_plain("chat", lines_of(demo("hi", response_format={"type": "json_object"})))
    assert isinstance(json.loads(body["choices"][0]["message"]["content"]), dict)


ODD = [     # schemas that are none: the demo answers all the same
    {"type": "object", "properties": 5}, {"type": "object", "properties": []},
    {"type": "object", "required": 5, "properties": {"a": {}}},
    {"type": "object", "required": [[]]},
    {"type": "object", "properties": {"a": {"type": "array", "minItems": "5"}}},
    {"type": "object", "properties": {"a": {"type": "array", "minItems": 1.5}}},
    {"type": "object", "properties": {"a": {"type": [[]]}}},
    {"type": "object", "properties": {"a": {"enum": 5}, "b": {"anyOf": "x"}, "c": 5}},
    {"type": "object", "anyOf": [5]}, {"type": "object", "enum": [5]}]


@pytest.mark.parametrize("schema", ODD, ids=range(len(ODD)))
def test_odd_schemas_never_raise(schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert demo("hi", response_format=form).status == 200
    shown = demo("[demo:call f]", tools=[tool("f", schema)])
    assert [type(line["input"]) for _, line in shown.lines if line["type"] == "tool-call"] == [dict]


def test_a_schema_cannot_ask_for_much():
    many = {"type": "object", "properties": {"a": {"type": "array", "minItems": 20_000}}}
    assert len(lines_of(demo("[demo:call f]", tools=[tool("f", many)]))) < 100_000


def test_a_schema_that_refers_to_itself_ends():
    loop = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    assert called(demo("[demo:call f]", tools=[tool("f", loop)])) == ["f"]


@pytest.mark.parametrize("system", ["This JSON Schema and nothing else:\n{no", "{}", "a\n{\"x\":"])
def test_system_texts_never_break_it(system):
    assert demo("", messages=[{"role": "system", "content": system},
                              {"role": "user", "content": "hi"}]).status == 200
