"""CLIENT TOOLS: tools that the client runs are offered as functions over every upstream, calls come
back in the client's own types, and calls and results of a history reach the model."""
from __future__ import annotations

import json

import pytest
from fake_upstream import FakeUpstream, ndjson, stream
from harness import CHAT, MESSAGES, Proxy, ccproxy, fold_chat, fold_messages
from pure import (PNG, at, check_params, has_note, new_answer, params_of, read_frames, read_prompt,
                  refusal, request, run, run_plain, run_stream, translate)

RESPONSES = "/v1/responses"
CACHE = {"type": "ephemeral"}


def offered(entry, face="messages"):
    """(the tools that are sent for an entry, notes)."""
    body, notes = translate(face, request(face, tools=[entry]))
    check_params(body["params"])
    return body["params"]["tools"], notes


def shape(schema):
    """A schema's parameters: {name: type or choices}, and those that are required."""
    return {name: one.get("enum") or one["type"] for name, one in schema["properties"].items()}, \
        schema.get("required", [])


# Offered: (entry, name, {parameter: type or choices}, required).

EDITS = ["view", "create", "str_replace", "insert"]
FILES = {"path": "string", "view_range": "array", "file_text": "string", "old_str": "string",
         "new_str": "string", "insert_line": "integer"}
FIRST = ["key", "type", "mouse_move", "left_click", "left_click_drag", "right_click",
         "middle_click", "double_click", "screenshot", "cursor_position"]
SECOND = FIRST + ["hold_key", "left_mouse_down", "left_mouse_up", "triple_click", "scroll", "wait"]
MOVES = {"coordinate": "array", "start_coordinate": "array", "text": "string",
         "duration": "number", "scroll_direction": ["up", "down", "left", "right"],
         "scroll_amount": "integer"}
ACTION = {"type": ["click", "double_click", "drag", "keypress", "move", "screenshot", "scroll",
                   "type", "wait"], "x": "integer", "y": "integer",
          "button": ["left", "right", "wheel", "back", "forward"], "keys": "array",
          "path": "array", "scroll_x": "integer", "scroll_y": "integer", "text": "string"}
SCREEN = {"display_width_px": 1024, "display_height_px": 768}
OFFERED = [
    *(({"type": "bash_" + date, "name": "bash"}, "bash",
       {"command": "string", "restart": "boolean"}, [])
      for date in ("20241022", "20250124", "20271231")),
    *(({"type": "text_editor_" + date, "name": "str_replace_editor"}, "str_replace_editor",
       {"command": EDITS + ["undo_edit"], **FILES}, ["command", "path"])
      for date in ("20241022", "20250124")),
    *(({"type": "text_editor_" + date, "name": "str_replace_based_edit_tool"},
       "str_replace_based_edit_tool", {"command": EDITS, **FILES, "insert_text": "string"},
       ["command", "path"]) for date in ("20250429", "20250728", "20271231")),
    ({"type": "text_editor_20250728"}, "str_replace_based_edit_tool",
     {"command": EDITS, **FILES, "insert_text": "string"}, ["command", "path"]),
    *(({"type": "memory_" + date, "name": "memory"}, "memory",
       {"command": EDITS + ["delete", "rename"], **FILES, "insert_text": "string",
        "old_path": "string", "new_path": "string"}, ["command"])
      for date in ("20250818", "20271231")),
    ({"type": "computer_20241022", "name": "computer", **SCREEN}, "computer",
     {"action": FIRST, "coordinate": "array", "text": "string"}, ["action"]),
    *(({"type": "computer_" + date, "name": "computer", **SCREEN}, "computer",
       {"action": SECOND, **MOVES}, ["action"]) for date in ("20250124", "20251124", "20271231")),
    ({"type": "computer_20251124", "name": "computer", **SCREEN, "enable_zoom": True}, "computer",
     {"action": SECOND + ["zoom"], **MOVES, "region": "array"}, ["action"]),
    ({"type": "shell"}, "shell",
     {"commands": "array", "timeout_ms": "integer", "max_output_length": "integer"}, ["commands"]),
    ({"type": "shell", "environment": {"type": "local"}}, "shell",
     {"commands": "array", "timeout_ms": "integer", "max_output_length": "integer"}, ["commands"]),
    ({"type": "local_shell"}, "local_shell",
     {"command": "array", "env": "object", "working_directory": "string", "timeout_ms": "integer",
      "user": "string"}, ["command"]),
    ({"type": "apply_patch"}, "apply_patch",
     {"type": ["create_file", "update_file", "delete_file"], "path": "string", "diff": "string"},
     ["type", "path"]),
    ({"type": "computer_use_preview", "environment": "mac", "display_width": 1024,
      "display_height": 768}, "computer_use_preview", ACTION, ["type"]),
    ({"type": "computer"}, "computer", {"actions": "array"}, ["actions"]),
    ({"type": "tool_search", "execution": "client"}, "tool_search", {"query": "string"}, ["query"]),
    ({"type": "tool_search", "execution": "client", "description": "d", "parameters": {
        "type": "object", "properties": {"goal": {"type": "string"}}}}, "tool_search",
     {"goal": "string"}, [])]


@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
@pytest.mark.parametrize("entry,name,members,required", OFFERED, ids=range(len(OFFERED)))
def test_offered_with_documented_parameters(face, entry, name, members, required):
    (tool,), notes = offered(entry, face)
    assert (tool["name"], notes) == (name, []) and tool["description"]
    assert shape(tool["input_schema"]) == (members, required)
    again, _ = offered({"name": "f", "input_schema": tool["input_schema"]})
    assert again[0]["input_schema"] == tool["input_schema"], "its own schema is fine"


TOLD = [        # (entry, words of the description)
    ({"type": "computer_20250124", "name": "computer", **SCREEN}, "1024 pixels wide and 768"),
    ({"type": "text_editor_20250728", "max_characters": 9000}, "at most 9000 characters"),
    ({"type": "computer_use_preview", "environment": "mac", "display_width": 1024,
      "display_height": 768}, '"display_width":1024,"display_height":768'),
    ({"type": "shell", "environment": {"type": "local", "skills": [
        {"name": "pdf", "description": "reads", "path": "/skills/pdf"}]}}, "/skills/pdf")]


@pytest.mark.parametrize("entry,words", TOLD, ids=range(len(TOLD)))
def test_settings_are_told_in_the_description(entry, words):
    assert words in offered(entry)[0][0]["description"]


def test_a_tool_keeps_its_own_name_and_cache_control():
    (tool,), _ = offered({"type": "bash_20250124", "name": "my_bash", "cache_control": CACHE})
    assert tool["name"] == "my_bash" and tool["cache_control"] == CACHE


HOSTED = [{"type": "web_search_20250305", "name": "web_search"}, {"type": "web_search"},
          {"type": "web_fetch_20250910", "name": "web_fetch"}, {"type": "file_search"},
          {"type": "code_execution_20250825", "name": "code_execution"},
          {"type": "code_interpreter", "container": {}}, {"type": "image_generation"},
          {"type": "mcp", "server_label": "x"}, {"type": "tool_search", "execution": "server"},
          {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
          {"type": "mcp_toolset", "mcp_server_name": "x"}, {"type": "tool_search"},
          {"type": "shell", "environment": {"type": "container_auto"}},
          {"type": "shell", "environment": {"type": "container_reference", "container_id": "c"}}]


@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
@pytest.mark.parametrize("entry", HOSTED, ids=range(len(HOSTED)))
def test_only_what_the_vendor_runs_is_left_out_with_a_note(face, entry):
    tools, notes = offered(entry, face)
    assert tools == [] and [note.partition("=")[0] for note in notes] == ["left_out"]
    assert entry["type"] in notes[0]


def test_a_hosted_tool_leaves_room_for_a_function_of_its_name():
    prompt = read_prompt("chat", request("chat", tools=[
        {"type": "web_search"}, {"type": "web_search"}, {"name": "web_search"}]))
    assert [tool.name for tool in prompt.tools] == ["web_search"]
    assert set(prompt.notes) == {"left_out=tool web_search (web_search)"}


# The computer toolset: a tool for each action; its calls name the toolset.

def test_the_computer_toolset():
    tools, notes = offered({"type": "computer_toolset_20260801", "cache_control": CACHE,
                            "configs": {"zoom": {"enabled": False}, "wait": {"enabled": True}}})
    assert [tool["name"] for tool in tools] == ["computer__" + name for name in SECOND]
    assert shape(tools[0]["input_schema"]) == ({"text": "string", "repeat": "integer"}, ["text"])
    assert [tool["name"] for tool in tools if "cache_control" in tool] == ["computer__wait"]
    assert len(offered({"type": "computer_toolset_20260801"})[0]) == 17
    assert [note for note in notes if not note.startswith("renamed=")] == []


def test_calls_of_a_toolset_name_it():
    prompt = read_prompt("messages", request("messages", tools=[
        {"type": "computer_toolset_20260801"}], messages=[
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "wait",
                                           "toolset_name": "computer", "input": {"duration": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]))
    assert prompt.turns[1].parts[0].name == "computer__wait"
    data = calling("computer__left_click", {"coordinate": [1, 2]})
    expected = {"type": "tool_use", "id": "c1", "name": "left_click", "toolset_name": "computer",
                "input": {"coordinate": [1, 2]}}
    assert run_plain("messages", data, names=prompt.names)[1]["content"] == [expected]
    assert run_stream("messages", data, names=prompt.names)[1]["content"] == [expected]


# Calls that come back as items: (tool, the function's arguments, the item).

def calling(name, given, call_id="c1"):
    written = given if isinstance(given, str) else json.dumps(given)
    return ndjson({"type": "start"}, {"type": "tool-input-start", "id": call_id, "toolName": name},
                  *({"type": "tool-input-delta", "id": call_id, "delta": piece}
                    for piece in (written[:5], written[5:])),
                  {"type": "tool-call", "toolCallId": call_id, "toolName": name, "input": given},
                  {"type": "finish", "finishReason": "tool-calls"})


SHELL, LOCAL, PATCH = {"type": "shell"}, {"type": "local_shell"}, {"type": "apply_patch"}
NO_LIMITS = {"timeout_ms": None, "max_output_length": None}
NOBODY = {"timeout_ms": None, "user": None, "working_directory": None}
CLICK = {"type": "click", "x": 1, "y": 2, "button": "left"}
ITEMS = [
    (SHELL, {"commands": ["ls", "pwd"]},
     {"type": "shell_call", "action": {"commands": ["ls", "pwd"], **NO_LIMITS}}),
    (SHELL, {"commands": ["ls"], "timeout_ms": 5, "max_output_length": 9},
     {"type": "shell_call", "action": {"commands": ["ls"], "timeout_ms": 5,
                                       "max_output_length": 9}}),
    (SHELL, {"action": {"commands": ["ls"]}},
     {"type": "shell_call", "action": {"commands": ["ls"], **NO_LIMITS}}),
    (SHELL, {"commands": "ls"}, {"type": "shell_call", "action": {"commands": ["ls"],
                                                                  **NO_LIMITS}}),
    (SHELL, {}, {"type": "shell_call", "action": {"commands": [], **NO_LIMITS}}),
    (LOCAL, {"command": ["ls", "-l"], "env": {"A": "b"}, "working_directory": "/x"},
     {"type": "local_shell_call", "action": {**NOBODY, "type": "exec", "command": ["ls", "-l"],
                                             "env": {"A": "b"}, "working_directory": "/x"}}),
    (LOCAL, {"command": "ls -l"}, {"type": "local_shell_call", "action": {
        **NOBODY, "type": "exec", "command": ["bash", "-lc", "ls -l"], "env": {}}}),
    (LOCAL, {"action": {"type": "exec", "command": ["ls"], "env": {}}},
     {"type": "local_shell_call", "action": {**NOBODY, "type": "exec", "command": ["ls"],
                                             "env": {}}}),
    *((PATCH, {"type": kind, "path": "a.txt", "diff": "+x"},
       {"type": "apply_patch_call", "operation": {"type": kind, "path": "a.txt", "diff": "+x"}})
      for kind in ("create_file", "update_file")),
    (PATCH, {"type": "delete_file", "path": "a.txt", "diff": ""},
     {"type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a.txt"}}),
    (PATCH, {"operation": {"type": "update_file", "path": "a", "diff": "+\u00e9\U0001f680"}},
     {"type": "apply_patch_call", "operation": {"type": "update_file", "path": "a",
                                                "diff": "+\u00e9\U0001f680"}}),
    ({"type": "computer_use_preview", "display_width": 1, "display_height": 1,
      "environment": "linux"}, CLICK,
     {"type": "computer_call", "action": CLICK, "pending_safety_checks": []}),
    ({"type": "computer"}, {"actions": [CLICK]},
     {"type": "computer_call", "actions": [CLICK], "pending_safety_checks": []}),
    ({"type": "tool_search", "execution": "client"}, {"query": "x"},
     {"type": "tool_search_call", "arguments": {"query": "x"}, "execution": "client"})]


@pytest.mark.parametrize("tool,given,item", ITEMS, ids=range(len(ITEMS)))
def test_calls_come_back_as_the_items_of_the_client(tool, given, item):
    names = read_prompt("responses", request("responses", tools=[tool])).names
    data = calling(tool["type"], given)
    answer, folded = run_stream("responses", data, names=names)
    shown = folded["items"][0]
    for told in (shown.done, folded["response"]["output"][0],
                 run_plain("responses", data, names=names)[1]["output"][0]):
        assert {**item, "id": shown.shown["id"], "call_id": "c1", "status": "completed"} == told
    frames = read_frames(run(new_answer("responses", names=names), data))
    assert [frame["type"] for frame in frames[2:]] == [
        "response.output_item.added", "response.output_item.done", "response.completed"]
    for cuts in ("bytewise", [7, 90]):
        assert run(new_answer("responses", names=names), data, cuts) == run(
            new_answer("responses", names=names, lanes=False), data)


@pytest.mark.parametrize("tool,given,item", ITEMS, ids=range(len(ITEMS)))
def test_the_items_of_an_answer_reach_the_model_in_the_next_turn(tool, given, item):
    """What was answered, sent back as it is, with an output."""
    names = read_prompt("responses", request("responses", tools=[tool])).names
    told = run_plain("responses", calling(tool["type"], given), names=names)[1]["output"][0]
    output = {"type": told["type"] + "_output", "call_id": "c1", "output": "fine", "tools": []}
    output["type"] = output["type"].replace("tool_search_call", "tool_search")
    body, notes = translate("responses", request("responses", tools=[tool], input=[
        {"role": "user", "content": "x"}, told, output]))
    check_params(body["params"])
    _, said, result = body["params"]["messages"]
    assert said["content"][0]["toolName"] == tool["type"] == result["content"][0]["toolName"]
    assert notes == []
    again = run_plain("responses", calling(tool["type"], said["content"][0]["input"]), names=names)
    assert again[1]["output"][0] == told


@pytest.mark.parametrize("written", ['{"commands":["ls"', '{"comm', "{"])
def test_a_call_that_was_cut_is_never_told_done(written):
    names = read_prompt("responses", request("responses", tools=[SHELL])).names
    data = ndjson({"type": "tool-input-start", "id": "c", "toolName": "shell"},
                  {"type": "tool-input-delta", "id": "c", "delta": written},
                  {"type": "finish", "finishReason": "length"})
    _, folded = run_stream("responses", data, names=names)
    assert [item.done for item in folded["items"]] == [None]
    assert folded["items"][0].shown["action"] == {"commands": [], **NO_LIMITS}
    assert folded["response"]["output"] == [] and folded["response"]["status"] == "incomplete"


@pytest.mark.parametrize("face", ["chat", "messages"])
def test_other_apis_show_such_a_call_as_an_ordinary_one(face):
    names = read_prompt(face, request(face, tools=[SHELL])).names
    data = calling("shell", {"commands": ["ls"]})
    _, folded = run_stream(face, data, names=names)
    _, body = run_plain(face, data, names=names)
    if face == "messages":
        assert folded["content"] == body["content"] == [
            {"type": "tool_use", "id": "c1", "name": "shell", "input": {"commands": ["ls"]}}]
        return
    call = {"id": "c1", "type": "function", "function": {
        "name": "shell", "arguments": '{"commands": ["ls"]}'}}
    assert folded["message"]["tool_calls"] == [call]
    assert at(body, "choices.0.message.tool_calls") == [call]


# A history of items: (items, the call's arguments, words of the result, whether it is an error).

def shell_item(**members):
    return {"type": "shell_call", "id": "sh_1", "call_id": "c", "status": "completed",
            "action": {"commands": ["ls"], "timeout_ms": None}, **members}


def shell_output(*chunks, **members):
    return {"type": "shell_call_output", "call_id": "c", "output": list(chunks), **members}


EXIT = {"stdout": "one\n", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}
EXEC = {"type": "local_shell_call", "id": "lsh_1", "call_id": "c", "status": "completed",
        "action": {"type": "exec", "command": ["ls"], "env": {}, "timeout_ms": None}}
PATCHED = {"type": "apply_patch_call", "id": "apc_1", "call_id": "c", "status": "completed",
           "operation": {"type": "delete_file", "path": "a"}}
HISTORY = [
    ([shell_item(), shell_output(EXIT)], {"commands": ["ls"]}, ["one", "exit code 0"], False),
    ([shell_item(), shell_output(EXIT, {"stdout": "", "stderr": "bad", "outcome": {
        "type": "timeout"}})], {"commands": ["ls"]}, ["one", "stderr: bad", "timed out"], False),
    ([shell_item(), shell_output(status="failed")], {"commands": ["ls"]}, [""], True),
    ([shell_item(), shell_output({"stdout": "x", "outcome": "failure"}, 5)],
     {"commands": ["ls"]}, ["x"], False),
    ([shell_item(), {**shell_output(), "output": "plain"}], {"commands": ["ls"]}, ["plain"], False),
    ([EXEC, {"type": "local_shell_call_output", "id": "c", "output": '{"stdout":"one"}'}],
     {"command": ["ls"], "env": {}}, ['{"stdout":"one"}'], False),
    ([EXEC, {"type": "local_shell_call_output", "id": "lsh_1", "output": "one"}],
     {"command": ["ls"], "env": {}}, ["one"], False),
    ([EXEC, {"type": "local_shell_call_output", "call_id": "c", "id": "o", "output": "one"}],
     {"command": ["ls"], "env": {}}, ["one"], False),
    ([PATCHED, {"type": "apply_patch_call_output", "call_id": "c", "status": "completed",
                "output": "Done"}], {"type": "delete_file", "path": "a"}, ["Done"], False),
    ([PATCHED, {"type": "apply_patch_call_output", "call_id": "c", "status": "failed",
                "output": "no file"}], {"type": "delete_file", "path": "a"}, ["no file"], True),
    ([PATCHED, {"type": "apply_patch_call_output", "call_id": "c", "status": "completed"}],
     {"type": "delete_file", "path": "a"}, ["completed"], False)]


@pytest.mark.parametrize("items,given,words,failed", HISTORY, ids=range(len(HISTORY)))
def test_items_of_a_history_reach_the_model(items, given, words, failed):
    prompt = ccproxy.parse_responses({"model": "m", "input": items}, [])
    assert [turn.role for turn in prompt.turns] == ["assistant", "user"] and prompt.notes == []
    (call,), (result,) = prompt.turns[0].parts, prompt.turns[1].parts
    assert call.arguments == given and call.id == result.id == "c"
    assert all(word in result.text for word in words) and result.is_error == failed
    check_params(params_of("responses", request("responses", input=items)))


def test_a_screenshot_is_shown_as_a_picture():
    params = params_of("responses", request("responses", input=[
        {"type": "computer_call", "call_id": "c", "action": {"type": "screenshot"},
         "pending_safety_checks": []},
        {"type": "computer_call_output", "call_id": "c", "output": {
            "type": "computer_screenshot", "image_url": PNG}}]))
    assert at(params, "messages.0.content.0.input") == {"type": "screenshot"}
    assert at(params, "messages.2.content.1.image") == PNG


def test_tools_that_a_search_found_are_offered():
    found = [{"type": "namespace", "name": "crm", "tools": [
        {"type": "function", "name": "find", "parameters": {"type": "object"}}]},
        {"type": "function", "name": "old", "parameters": {}}]
    body = request("responses", tools=[{"type": "tool_search", "execution": "client"},
                                       {"type": "function", "name": "old"}], input=[
        {"role": "user", "content": "x"},
        {"type": "tool_search_call", "call_id": "c", "execution": "client",
         "arguments": {"query": "crm"}},
        {"type": "tool_search_output", "call_id": "c", "execution": "client", "tools": found},
        {"type": "additional_tools", "role": "developer", "tools": [
            {"type": "function", "name": "more"}]}],
        tool_choice={"type": "function", "name": "find", "namespace": "crm"})
    params = params_of("responses", body)
    check_params(params)
    assert [tool["name"] for tool in params["tools"]] == ["tool_search", "old", "crm__find", "more"]
    assert "find" in at(params, "messages.2.content.0.output.value")
    assert params["tool_choice"] == {"type": "tool", "name": "crm__find"}


def test_a_found_function_counts_before_a_hosted_tool_of_its_name():
    body = request("responses", tools=[{"type": "web_search"}], input=[
        {"role": "user", "content": "x"}, {"type": "additional_tools", "tools": [
            {"type": "function", "name": "web_search"}]}],
        tool_choice={"type": "function", "name": "web_search"})
    params = params_of("responses", body)
    assert [tool["name"] for tool in params["tools"]] == ["web_search"]
    assert params["tool_choice"] == {"type": "tool", "name": "web_search"}


def test_many_tools_and_choices_cost_linear_time():
    """A choice is looked up, not searched for: this would take minutes."""
    names = ["f%d" % number for number in range(20_000)]
    body = request("responses", tools=[{"type": "function", "name": name} for name in names],
                   tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [
                       {"type": "function", "name": name} for name in reversed(names)]},
                   input=[{"role": "user", "content": "x"}, *(
                       {"type": "additional_tools", "tools": [{"type": "function", "name": name}]}
                       for name in names)])
    assert len(params_of("responses", body)["tools"]) == 20_000


# Wrong types name their path.

WRONG = [
    ({"input": [{**shell_item(), "action": 5}]}, "input[0].action"),
    ({"input": [{**shell_item(), "call_id": 5}]}, "input[0].call_id"),
    ({"input": [{"type": "tool_search_output", "tools": 5}]}, "input[0].tools"),
    ({"tools": [{"type": "bash_20250124", "name": 5}]}, "tools[0].name"),
    ({"tools": [{"type": "computer_toolset_20260801", "configs": 5}]}, "tools[0].configs")]


@pytest.mark.parametrize("members,path", WRONG, ids=range(len(WRONG)))
def test_wrong_types_name_their_path(members, path):
    assert refusal("responses", request("responses", **members)).param == path


# A whole round over every upstream: offered, called, and the result in the next turn's body.

BASH = {"type": "bash_20250124", "name": "bash"}
MEMORY = {"type": "memory_20250818", "name": "memory"}
EDITOR = {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"}
COMPUTER = {"type": "computer_20250124", "name": "computer", **SCREEN}
ROUNDS = [      # (path, tool, the function's name, its arguments)
    (MESSAGES, BASH, "bash", {"command": "ls"}),
    (MESSAGES, MEMORY, "memory", {"command": "view", "path": "/memories"}),
    (MESSAGES, EDITOR, "str_replace_based_edit_tool", {"command": "view", "path": "/a"}),
    (MESSAGES, COMPUTER, "computer", {"action": "left_click", "coordinate": [1, 2]}),
    (CHAT, BASH, "bash", {"command": "ls"}), (CHAT, SHELL, "shell", {"commands": ["ls"]}),
    (RESPONSES, SHELL, "shell", {"commands": ["ls"]}),
    (RESPONSES, LOCAL, "local_shell", {"command": ["ls"]}),
    (RESPONSES, PATCH, "apply_patch", {"type": "update_file", "path": "a", "diff": "+x"}),
    (RESPONSES, BASH, "bash", {"command": "ls"}),
    (RESPONSES, {"type": "custom", "name": "apply_patch"}, "apply_patch", {"input": "*** Begin"})]
UPSTREAMS = {"alpha": ("alpha", "deepseek/deepseek-v4-flash"),
             "openai": ("provider", "deepseek/deepseek-v4-flash"),
             "anthropic": ("provider", "claude-sonnet-4-6")}


@pytest.fixture(scope="module")
def bed():
    upstream = FakeUpstream()
    proxy = Proxy(apiBase=upstream.base, useProviderModels=False)
    yield upstream, proxy
    proxy.close()
    upstream.close()


def fold(path, answer, streamed):
    """The message or the items of an answer, as they are sent back in the next turn."""
    if path == RESPONSES:
        return (answer.frames[-1]["response"] if streamed else answer.json)["output"]
    if path == CHAT:
        message = fold_chat(answer.frames)[0] if streamed else at(answer.json, "choices.0.message")
        return [{**message, "role": "assistant"}]
    message = fold_messages(answer.frames) if streamed else answer.json
    return [{"role": "assistant", "content": message["content"]}]


def result_of(path, told):
    """(the call's type, the message or item that answers it)."""
    if path == MESSAGES:
        (call,) = told[0]["content"]
        return call["type"], {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call["id"], "content": "RESULT"}]}
    if path == CHAT:
        (call,) = told[0]["tool_calls"]
        return call["type"], {"role": "tool", "tool_call_id": call["id"], "content": "RESULT"}
    (call,) = told
    output = [{"stdout": "RESULT", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}] \
        if call["type"] == "shell_call" else "RESULT"
    return call["type"], {"type": call["type"] + "_output", "call_id": call["call_id"],
                          "output": output}


OWN_TYPES = {"shell": "shell_call", "local_shell": "local_shell_call", "custom": "custom_tool_call",
             "apply_patch": "apply_patch_call"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("upstream_name", list(UPSTREAMS))
@pytest.mark.parametrize("path,tool,name,given", ROUNDS, ids=range(len(ROUNDS)))
def test_a_round_over_every_upstream(bed, upstream_name, path, tool, name, given, streamed):
    upstream, proxy = bed
    option, model = UPSTREAMS[upstream_name]
    user = {"role": "user", "content": "go"}

    def ask(turns):
        turns = {"input": turns} if path == RESPONSES else {"messages": turns, "max_tokens": 99}
        return proxy.request("POST", path, {"model": model, "stream": streamed, "tools": [tool],
                                            **turns}, {"x-ccproxy-upstream": option})

    upstream.requests[:] = []
    upstream.scripts = [stream(calling(name, given))]
    answer = ask([user])
    assert answer.status == 200, answer.body
    assert [one["name"] for one in upstream.requests[0].params["tools"]] == [name]
    kind, result = result_of(path, fold(path, answer, streamed))
    own = {MESSAGES: "tool_use", CHAT: "function"}.get(path)
    assert kind == (own or OWN_TYPES.get(tool["type"], "function_call"))
    assert ask([user, *fold(path, answer, streamed), result]).status == 200
    _, said, answered = upstream.requests[1].params["messages"]
    (call,), (told,) = said["content"], answered["content"]
    assert (call["toolName"], told["toolCallId"]) == (name, call["toolCallId"])
    assert {key: call["input"].get(key) for key in given} == given
    assert "RESULT" in json.dumps(told)
