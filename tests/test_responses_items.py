"""RESPONSES ITEMS: every kind of input item as turns and system texts (CLIENTS R42)."""
from __future__ import annotations

import base64

import pytest
from harness import ccproxy
from pure import (PNG, at, check_params, has_note, params_of, read_prompt, refusal, request,
                  translate)

Call, Image, Result, Text, Thinking, Turn = (
    ccproxy.Call, ccproxy.Image, ccproxy.Result, ccproxy.Text, ccproxy.Thinking, ccproxy.Turn)
HI = {"role": "user", "content": "hi"}
PICTURE = Image(PNG, "image/png")


def message(role, *parts, **members):
    return {"type": "message", "role": role, "content": list(parts), **members}


def part(words, kind="input_text"):
    return {"type": kind, "text": words}


def parse(items, **members):
    return ccproxy.parse_responses({"model": "m", "input": items, **members}, [])


def call(name="f", arguments="{}", call_id="c", **members):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments,
            **members}


def output(given, kind="function_call_output", call_id="c"):
    return {"type": kind, "call_id": call_id, "output": given}


def custom(given="x", **members):
    return {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": given,
            **members}


def reasoning(**members):
    return {"type": "reasoning", "id": "rs_1", "summary": [], **members}


def user(*parts):
    return Turn("user", list(parts))


def assistant(*parts):
    return Turn("assistant", list(parts))


# Items: (an item, the turns it becomes).

CARRIED = ccproxy.carry_thinking("I think \u00e9\U0001f680\n")
ITEMS = [
    (HI, [user(Text("hi"))]), ({**HI, "type": None}, [user(Text("hi"))]),
    (message("user", part("hi")), [user(Text("hi"))]),
    (message("user", part("hi"), id="msg_1", status="completed"), [user(Text("hi"))]),
    (message("user", part("a"), part("b")), [user(Text("a"), Text("b"))]),
    (message("user", {"type": "input_image", "image_url": PNG, "detail": "high"}), [user(PICTURE)]),
    (message("user", {"type": "input_image", "image_url": PNG}, part("what?")),
     [user(PICTURE, Text("what?"))]),
    (message("assistant", part("yes", "output_text"), id="msg_2", phase="final"),
     [assistant(Text("yes"))]),
    (message("assistant", {"type": "refusal", "refusal": "no"}), [assistant(Text("no"))]),
    ({"role": "assistant", "content": "yes"}, [assistant(Text("yes"))]),
    (call("f", '{"a":1}'), [assistant(Call("c", "f", {"a": 1}))]),
    (call("f", '{"a":1}', id="fc_1", status="completed"), [assistant(Call("c", "f", {"a": 1}))]),
    (call("f", ""), [assistant(Call("c", "f", {}))]),
    (call("f", "{}", namespace="multi_agent_v1"),
     [assistant(Call("c", "f", {}, namespace="multi_agent_v1"))]),
    (output("done"), [user(Result("c", "done"))]), (output(""), [user(Result("c", ""))]),
    (output(None), [user(Result("c", ""))]), (output([]), [user(Result("c", ""))]),
    (output([part("a"), part("b", "output_text")]), [user(Result("c", "a\nb"))]),
    (output({"temp": 21}), [user(Result("c", '{"temp":21}'))]),
    (output([5]), [user(Result("c", "[5]"))]), (output(["a"]), [user(Result("c", '["a"]'))]),
    (output([part("a"), {"temp": 21}]), [user(Result("c", 'a\n{"temp":21}'))]),
    (output({"temp": 21}, "custom_tool_call_output"), [user(Result("c", '{"temp":21}'))]),
    (output([{"type": "input_image", "image_url": PNG}]), [user(Result("c", "", (PICTURE,)))]),
    (output([part("see"), {"type": "input_image", "image_url": PNG, "detail": "auto"}]),
     [user(Result("c", "see", (PICTURE,)))]),
    (custom("*** Begin Patch\n\"\\"), [assistant(
        Call("c", "apply_patch", {"input": "*** Begin Patch\n\"\\"}))]),
    (custom("", id="ctc_1", status="completed"), [assistant(Call("c", "apply_patch",
                                                                 {"input": ""}))]),
    (output("Success", "custom_tool_call_output"), [user(Result("c", "Success"))]),
    (output([part("Success")], "custom_tool_call_output"), [user(Result("c", "Success"))]),
    (reasoning(encrypted_content=CARRIED), [assistant(Thinking("I think \u00e9\U0001f680\n"))]),
    (reasoning(encrypted_content=CARRIED, summary=[part("short", "summary_text")]),
     [assistant(Thinking("I think \u00e9\U0001f680\n"))]),
    (reasoning(encrypted_content=ccproxy.carry_thinking("hm", "c2ln+/=="), summary=[
        part("short", "summary_text")]), [assistant(Thinking("hm", "c2ln+/=="))]),
    (reasoning(encrypted_content=ccproxy.carry_thinking("", "sig"), summary=[
        part("of nobody", "summary_text")]), [assistant(Thinking("", "sig"))]),
    (reasoning(encrypted_content=ccproxy.carry_thinking("hm") + ".%", summary=[
        part("short", "summary_text")]), [assistant(Thinking("short"))]),
    (reasoning(summary=[part("short", "summary_text")]), [assistant(Thinking("short"))]),
    (reasoning(summary=[part("one", "summary_text"), part("", "summary_text"),
                        part("two", "summary_text")]), [assistant(Thinking("one\n\ntwo"))]),
    (reasoning(content=[part("long", "reasoning_text")]), [assistant(Thinking("long"))]),
    (reasoning(content=[part("one", "reasoning_text"), part("two", "reasoning_text")],
               summary=[part("short", "summary_text")]), [assistant(Thinking("one\n\ntwo"))]),
    (reasoning(content=[part("", "reasoning_text")], summary=[part("s", "summary_text")]),
     [assistant(Thinking("s"))]),
    (reasoning(content=None, encrypted_content=None, summary=[part("s", "summary_text")]),
     [assistant(Thinking("s"))])]


@pytest.mark.parametrize("item,turns", ITEMS, ids=range(len(ITEMS)))
def test_items(item, turns):
    prompt = parse([item])
    assert prompt.turns == turns and prompt.notes == []


def test_arguments_that_were_cut_are_shown_as_they_were():
    prompt = parse([call("f", '{"a":')])
    assert prompt.turns == [assistant(Call("c", "f", {"input": '{"a":'}))]
    assert has_note(prompt.notes, "input[0].arguments")


SYSTEM = [      # (body's members, system texts)
    ({"input": [message("developer", part("be good")), HI]}, ["be good"]),
    ({"input": [message("system", part("be good")), HI]}, ["be good"]),
    ({"input": [{"role": "developer", "content": "be good"}, HI]}, ["be good"]),
    ({"input": "hi", "instructions": "first"}, ["first"]),
    ({"input": "hi", "instructions": None}, []), ({"input": "hi", "instructions": ""}, []),
    ({"input": "hi", "instructions": [part("list")]}, ["list"]),
    ({"input": [message("developer", part("two"), part("three")), HI], "instructions": "one"},
     ["one", "two", "three"])]


@pytest.mark.parametrize("members,texts", SYSTEM, ids=range(len(SYSTEM)))
def test_instructions_and_developer_items(members, texts):
    prompt = ccproxy.parse_responses({"model": "m", **members}, [])
    assert [text.text for text in prompt.system] == texts
    assert prompt.turns == [user(Text("hi"))]


def test_later_developer_items_keep_their_place():
    prompt = parse([message("developer", part("lead")), HI, message("developer", part("late"))])
    assert [text.text for text in prompt.system] == ["lead"]
    assert prompt.turns == [user(Text("hi")), Turn("system", [Text("late")])]


def test_a_developer_item_between_parallel_calls_comes_behind_their_results():
    items = [HI, call(call_id="1"), message("developer", part("late")), call(call_id="2"),
             output("a", call_id="1"), output("b", call_id="2")]
    body, notes = translate("responses", request("responses", input=items))
    assert [one["role"] for one in at(body, "params.messages")] == ["user", "assistant", "tool",
                                                                    "user"]
    assert "late" in at(body, "params.messages.3.content.0.text") and notes == []


def test_a_string_is_one_user_turn():
    assert parse("hi \u00e9\U0001f680").turns == [user(Text("hi \u00e9\U0001f680"))]


# Left out: (an item, words of its note).

LEFT_OUT = [
    (reasoning(), "reasoning at input[0]"),
    (reasoning(encrypted_content="gAAAAABforeign=="), "reasoning at input[0]"),
    (reasoning(encrypted_content=ccproxy.CARRIED + "!!"), "reasoning at input[0]"),
    (reasoning(encrypted_content=ccproxy.CARRIED + base64.b64encode(b"\xff").decode()),
     "reasoning at input[0]"),
    (reasoning(encrypted_content=ccproxy.CARRIED), "reasoning at input[0]"),
    (reasoning(encrypted_content=5), "reasoning at input[0]"),
    ({"type": "web_search_call", "id": "ws_1", "status": "completed"}, "web_search_call"),
    ({"type": "tool_search_call", "call_id": "c"}, "tool_search_call"),
    ({"type": "local_shell_call"}, "local_shell_call"), ({"type": "wibble"}, "wibble"),
    ({"type": "shell_call", "call_id": "c", "action": None}, "shell_call at input[0]")]


@pytest.mark.parametrize("item,words", LEFT_OUT, ids=range(len(LEFT_OUT)))
def test_items_that_are_left_out_with_a_note(item, words):
    prompt = parse([item, HI])
    assert prompt.turns == [user(Text("hi"))] and has_note(prompt.notes, words)


# What OpenAI's own tools did: (item, lines of its text, words that must not be there).

HOSTED = [
    ({"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {
        "type": "search", "query": "oslo", "sources": [{"type": "url", "url": "https://a.test"}]}},
     ["query: oslo", "url: https://a.test"], "ws_1"),
    ({"type": "file_search_call", "id": "fs_1", "queries": ["q"], "results": [
        {"file_id": "file_1", "filename": "a.md", "score": 0.5, "text": "found"}]},
     ["queries: q", "filename: a.md", "text: found"], "file_1"),
    ({"type": "code_interpreter_call", "id": "ci_1", "code": "print(1)", "outputs": [
        {"type": "logs", "logs": "1\n"}, {"type": "image", "url": "data:image/png;base64,AA=="}]},
     ["code: print(1)", "logs: 1"], "base64"),
    ({"type": "mcp_call", "id": "m", "name": "find", "server_label": "crm", "arguments": "{}",
      "output": "it", "error": None}, ["name: find", "server_label: crm", "output: it"], "error"),
    ({"type": "mcp_list_tools", "id": "m", "server_label": "crm", "tools": [
        {"name": "find", "description": "finds", "input_schema": {"title": "hidden"}}]},
     ["name: find", "description: finds"], "hidden"),
    ({"type": "image_generation_call", "id": "i", "revised_prompt": "a cat", "result": "iVBOR"},
     ["revised_prompt: a cat"], "iVBOR"),
    ({"type": "tool_search_call", "id": "t", "execution": "server", "arguments": {"query": "x"}},
     ["query: x"], "tool_search_call\n[")]


@pytest.mark.parametrize("item,lines,absent", HOSTED, ids=range(len(HOSTED)))
def test_what_a_vendors_tool_did_stays_as_text(item, lines, absent):
    prompt = parse([item, HI])
    said = prompt.turns[0].parts[0].text
    assert prompt.turns == [assistant(Text(said)), user(Text("hi"))]
    assert set(lines) <= set(said.split("\n")) and absent not in said
    assert prompt.notes == ["replaced=%s at input[0] by its text" % item["type"]]


# Refused: (body's members, the field that is named, words).

REFUSED = [
    ({"input": None}, "input", "string or a list"), ({"input": []}, "input", "at least one"),
    ({"input": 5}, "input", "string or a list"), ({"input": {}}, "input", "string or a list"),
    ({"input": ["hi"]}, "input[0]", "an object"), ({"input": [HI, 5]}, "input[1]", "an object"),
    ({"input": [{"type": 5}]}, "input[0].type", "a string"),
    ({"input": [{"type": "message"}]}, "input[0].role", "one of"),
    ({"input": [{"role": 5, "content": "x"}]}, "input[0].role", "a string"),
    ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role", "one of"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "a string or a list"),
    ({"input": [message("user", 5)]}, "input[0].content[0]", "an object"),
    ({"input": [message("user", part(5))]}, "input[0].content[0].text", "a string"),
    ({"input": [HI, message("user", {"type": "input_image", "image_url": 5})]},
     "input[1].content[0].image_url", "a string"),
    ({"input": [message("user", {"type": "input_image", "image_url": "https://x.test/a.png"})]},
     "input[0].content[0].image_url", "data URL"),
    ({"input": [message("user", {"type": "input_image", "file_id": "file_1"})]},
     "input[0].content[0]", "image_url"),
    ({"input": [call(5)]}, "input[0].name", "a string"),
    ({"input": [call("f", 5)]}, "input[0].arguments", "a string"),
    ({"input": [call("f", "{}", 5)]}, "input[0].call_id", "a string"),
    ({"input": [call("f", "{}", namespace=5)]}, "input[0].namespace", "a string"),
    ({"input": [output(5)]}, "input[0].output", "a string or a list"),
    ({"input": [output([part(5)])]}, "input[0].output[0].text", "a string"),
    ({"input": [output("x", call_id=5)]}, "input[0].call_id", "a string"),
    ({"input": [custom(5)]}, "input[0].input", "a string"),
    ({"input": [reasoning(summary=5)]}, "input[0].summary", "a list"),
    ({"input": [reasoning(content={})]}, "input[0].content", "a list"),
    ({"input": [HI, {"type": "item_reference", "id": "msg_1"}]}, "input[1]", "store"),
    ({"input": "hi", "previous_response_id": "resp_1"}, "previous_response_id", "history"),
    ({"input": "hi", "conversation": "conv_1"}, "conversation", "history"),
    ({"input": "hi", "conversation": {"id": "conv_1"}}, "conversation", "history"),
    ({"input": "hi", "background": True}, "background", "history")]


@pytest.mark.parametrize("members,path,words", REFUSED, ids=range(len(REFUSED)))
def test_refusals_name_the_field(members, path, words):
    error = refusal("responses", {"model": "m", **members})
    assert error is not None and (error.kind, error.status, error.param) == ("invalid", 400, path)
    assert path in error.message and words in error.message


@pytest.mark.parametrize("given", ["", [message("user", part(""))], [message("developer",
                                                                             part(""))]])
def test_nothing_to_answer_names_the_field_that_responses_has(given):
    error = refusal("responses", {"model": "m", "input": given})
    assert error.status == 400 and error.param == "input" and "messages" not in error.message


def test_a_missing_input_is_refused():
    assert refusal("responses", {"model": "m"}).param == "input"


# Thinking that is carried without a store.

@pytest.mark.parametrize("text", ["", "a", "two\nlines", "\u00e9\u4e16\U0001f680", "\"\\\x00",
                                  "x" * 100_000])
@pytest.mark.parametrize("signature", ["", "c2ln+/==", "s" * 10_000])
def test_carried_thinking_comes_back(text, signature):
    carried = ccproxy.carry_thinking(text, signature)
    assert ccproxy.carried_thinking(carried) == Thinking(text, signature)


def test_unsigned_thinking_is_carried_as_ever():
    """Clients keep histories for long: what was sent out before signatures reads the same."""
    assert ccproxy.carry_thinking("a") == "ccproxy1.YQ=="
    assert ccproxy.carry_thinking("a", "b") == "ccproxy1.YQ==.Yg=="


LONG = "x" * (ccproxy.MAX_SIGNATURE_BYTES + 1)


@pytest.mark.parametrize("given", [
    None, 5, [], {}, "", "gAAAA", "ccproxy1", "ccproxy1.%", "ccproxy1.\u00e9", "xccproxy1.YQ==",
    "ccproxy1.YQ", "ccproxy1.YQ==.%", "ccproxy1.YQ==.Yg", "ccproxy1.YQ==.Yg==.Yw==",
    "ccproxy1.YQ==./w==", "ccproxy1.YQ==.Y\u00e9==", ccproxy.carry_thinking("a", LONG)])
def test_what_is_not_ours_carries_nothing(given):
    assert ccproxy.carried_thinking(given) == Thinking("")


# Whole conversations, as they reach the upstream.

CODEX = [       # R40-R42: what Codex sends on a second turn
    message("developer", part("You are Codex.")), message("user", part("<environment_context>")),
    message("user", part("Fix it"), {"type": "input_image", "image_url": PNG, "detail": "high"}),
    reasoning(encrypted_content=ccproxy.carry_thinking("hm")),
    message("assistant", part("I look", "output_text"), id="msg_1"),
    call("view_image", '{"path":"a.png"}', "c1", id="fc_1"),
    call("spawn", "{}", "c2", namespace="multi_agent_v1"),
    {"type": "custom_tool_call", "call_id": "c3", "name": "apply_patch", "input": "*** Begin"},
    output([{"type": "input_image", "image_url": PNG}], call_id="c1"),
    output("spawned", call_id="c2"), output("Done!", "custom_tool_call_output", "c3"),
    message("user", part("thanks"))]
TOOLS = [{"type": "function", "name": "view_image", "parameters": {"type": "object"}},
         {"type": "namespace", "name": "multi_agent_v1", "tools": [
             {"type": "function", "name": "spawn", "parameters": {"type": "object"}}]},
         {"type": "custom", "name": "apply_patch"}]


def test_a_second_turn_of_codex():
    params = params_of("responses", request("responses", input=CODEX, tools=TOOLS))
    check_params(params)
    roles = [one["role"] for one in params["messages"]]
    assert roles == ["user", "user", "assistant", "tool", "user", "user"]
    parts = at(params, "messages.2.content")
    assert [one["type"] for one in parts] == ["reasoning", "text"] + ["tool-call"] * 3
    assert parts[0]["text"] == "hm"
    assert [(one["toolName"], one["input"]) for one in parts[2:]] == [
        ("view_image", {"path": "a.png"}), ("multi_agent_v1__spawn", {}),
        ("apply_patch", {"input": "*** Begin"})]
    results = at(params, "messages.3.content")
    assert [one["toolName"] for one in results] == [one["toolName"] for one in parts[2:]]
    assert [one["output"]["value"] for one in results][1:] == ["spawned", "Done!"]
    assert at(params, "messages.4.content.1.type") == "image"


ORDERS = [      # items out of order, or lacking: the upstream's rules hold all the same
    [HI, output("orphan")], [HI, call()], [call(), call(), output("a"), output("b")],
    [HI, call(), reasoning(summary=[part("s")]), output("late")],
    [HI, call(), message("user", part("impatient")), output("late")],
    [custom(), output("mixed kinds")], [call(), output("x", "custom_tool_call_output")],
    [HI, call("no such tool"), output("x")], [call("", "null", ""), output("x", call_id="")]]


@pytest.mark.parametrize("items", ORDERS, ids=range(len(ORDERS)))
def test_any_order_of_items_is_fit_for_the_upstream(items):
    check_params(params_of("responses", request("responses", input=items, tools=TOOLS)))


def test_items_of_one_turn_become_one_message():
    items = [HI, reasoning(summary=[part("s")]), message("assistant", part("a", "output_text")),
             call(), output("r")]
    prompt = read_prompt("responses", request("responses", input=items))
    assert [turn.role for turn in prompt.turns] == ["user", "assistant", "tool"]


def test_the_same_history_begins_the_same_way():
    """The upstream's cache lives on equal beginnings."""
    shorter = params_of("responses", request("responses", input=CODEX[:-1], tools=TOOLS))
    longer = params_of("responses", request("responses", input=CODEX, tools=TOOLS))
    count = len(shorter["messages"])
    assert longer["messages"][:count] == shorter["messages"]
    assert (longer["system"], longer["tools"]) == (shorter["system"], shorter["tools"])


def test_a_thread_of_many_items_is_read_whole():
    items = [item for number in range(300) for item in (
        message("user", part("%d" % number)), call("f", "{}", "c%d" % number),
        output("r%d" % number, call_id="c%d" % number))]
    body, notes = translate("responses", request("responses", input=items))
    assert len(at(body, "params.messages")) == 900 and not has_note(notes, "repaired")
    check_params(body["params"])
