"""FACE: RESPONSES: a Responses request as a prompt, events as numbered SSE events, one body; and
tools of free text, which Chat Completions has too."""
from __future__ import annotations

import json
import random

import pure_formats
import pytest
from fake_provider import SSE_OF
from fake_upstream import ndjson, recorded, text_answer
from harness import ccproxy
from pure import (NAMES, at, check_params, has_note, make_answer, new_answer, params_of,
                  plain_line, random_cuts, read_frames, read_prompt, refusal, request, run,
                  run_plain, run_stream, translate)

USAGE = {"inputTokens": 20, "outputTokens": 9, "inputTokenDetails": {"cacheReadTokens": 4},
         "outputTokenDetails": {"reasoningTokens": 3}}
FINISH = {"type": "finish", "finishReason": "stop", "totalUsage": USAGE}
RAW = {"apply_patch": ccproxy.ToolName("apply_patch", type="custom")}


def delta(words, kind="text"):
    return {"type": kind + "-delta", "id": "0", "text": words}


def call(given, name="c1", tool="f"):
    return {"type": "tool-call", "toolCallId": name, "toolName": tool, "input": given}


def piece(words, name="c1"):
    return {"type": "tool-input-delta", "id": name, "delta": words}


def start(name="c1", tool="apply_patch"):
    return {"type": "tool-input-start", "id": name, "toolName": tool}


# Requests: (members, path in params, what is sent there).

EMPTY = {"type": "object", "properties": {}}
F = {"type": "function", "name": "f", "description": "d", "parameters": EMPTY, "strict": True}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Patches.", "format": {
    "type": "grammar", "syntax": "lark", "definition": "start: \"x\""}}
SPACE = {"type": "namespace", "name": "ns", "description": "many", "tools": [
    {"type": "function", "name": "spawn", "parameters": EMPTY},
    {"type": "function", "name": "wait", "parameters": EMPTY}]}
SENT = [
    ({"max_output_tokens": 10}, "max_tokens", 10), ({}, "max_tokens", 64000),
    ({"max_output_tokens": None}, "max_tokens", 64000),
    ({"temperature": 0}, "temperature", 0), ({"top_p": 0.5}, "top_p", 0.5),
    ({"model": "claude-sonnet-5", "reasoning": {"effort": "xhigh"}}, "reasoning_effort", "xhigh"),
    ({"model": "claude-sonnet-5", "reasoning": {"effort": "minimal", "summary": "auto"}},
     "reasoning_effort", "low"),
    ({"instructions": "be good"}, "system.0.text", "be good"), ({}, "system", " "),
    ({"tools": [F]}, "tools.0.name", "f"), ({"tools": [F]}, "tools.0.input_schema", EMPTY),
    ({"tools": [PATCH]}, "tools.0.name", "apply_patch"),
    ({"tools": [PATCH]}, "tools.0.input_schema", ccproxy.RAW_SCHEMA),
    ({"tools": [SPACE]}, "tools.0.name", "ns__spawn"),
    ({"tools": [SPACE, F]}, "tools.2.name", "f"),
    ({"tools": [F], "tool_choice": "auto"}, "tool_choice", {"type": "auto"}),
    ({"tools": [F], "tool_choice": "required"}, "tool_choice", {"type": "any"}),
    ({"tools": [F], "tool_choice": "none"}, "tools", []),
    ({"tools": [F], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice",
     {"type": "tool", "name": "f"}),
    ({"tools": [PATCH, F], "tool_choice": {"type": "custom", "name": "apply_patch"}},
     "tool_choice", {"type": "tool", "name": "apply_patch"}),
    ({"tools": [SPACE], "tool_choice": {"type": "function", "name": "wait", "namespace": "ns"}},
     "tool_choice", {"type": "tool", "name": "ns__wait"}),
    ({"tools": [F], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
     "tool_choice", {"type": "auto"}),
    ({"stream": False}, "stream", True)]


@pytest.mark.parametrize("members,path,value", SENT, ids=range(len(SENT)))
def test_sent(members, path, value):
    params = params_of("responses", request("responses", **members))
    assert at(params, path) == value
    check_params(params)


def test_a_grammar_is_told_in_words():
    described = at(params_of("responses", request("responses", tools=[PATCH])),
                   "tools.0.description")
    assert described.startswith("Patches.") and 'lark grammar:\nstart: "x"' in described


PROMPTS = [     # (members, attribute of the prompt, value)
    ({"stream": True}, "stream", True), ({}, "stream", False), ({}, "json_format", None),
    ({"text": {"format": {"type": "text"}}}, "json_format", None),
    ({"text": {"format": {"type": "json_object"}}}, "json_format", {}),
    ({"text": {"format": {"type": "json_schema", "name": "x", "strict": True, "schema":
                          {"a": 1}}}}, "json_format", {"schema": {"a": 1}}),
    ({"text": {"verbosity": "low"}}, "json_format", None), ({}, "carry_thinking", False),
    ({"include": ["reasoning.encrypted_content"]}, "carry_thinking", True),
    ({"include": ["message.output_text.logprobs"]}, "carry_thinking", False),
    ({"include": None}, "carry_thinking", False), ({"text": None}, "json_format", None),
    ({"reasoning": None}, "effort", None)]


@pytest.mark.parametrize("members,name,value", PROMPTS, ids=range(len(PROMPTS)))
def test_prompts(members, name, value):
    assert getattr(read_prompt("responses", request("responses", **members)), name) == value


NOTED = [       # (members, words of the note; None: no note, for it changes nothing)
    ({"tools": [{"type": "web_search"}]}, "web_search"),
    ({"tools": [{"type": "tool_search", "execution": "server"}]}, "tool_search"),
    ({"tools": [{"type": "code_interpreter", "container": {}}]}, "code_interpreter"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "mcp"),
    ({"tools": [F, F]}, "second tool named f"), ({"text": {"verbosity": "low"}}, "verbosity"),
    ({"text": {"verbosity": "medium"}}, None), ({"parallel_tool_calls": False}, None),
    ({"parallel_tool_calls": True}, None), ({"top_logprobs": 3}, "top_logprobs"),
    ({"truncation": "auto"}, "truncation"), ({"truncation": "disabled"}, None),
    ({"max_tool_calls": 3}, "max_tool_calls"),
    ({"service_tier": "auto", "store": True, "metadata": {"a": "b"}, "user": "u",
      "prompt_cache_key": "k", "client_metadata": {}, "safety_identifier": "s"}, None),
    ({"store": False, "include": ["reasoning.encrypted_content"], "background": False,
      "previous_response_id": None, "conversation": None,
      "reasoning": {"summary": "auto"}}, None)]


@pytest.mark.parametrize("members,words", NOTED, ids=range(len(NOTED)))
def test_notes(members, words):
    notes = [note for note in translate("responses", request("responses", **members))[1]
             if "model" not in note]
    assert has_note(notes, words) if words else notes == []


REFUSED = [     # (members, the field that is named)
    ({"model": 5}, "model"), ({"stream": "yes"}, "stream"), ({"tools": {}}, "tools"),
    ({"tools": [5]}, "tools[0]"), ({"tools": [{"type": 5}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": 5}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "description": 5}]}, "tools[0].description"),
    ({"tools": [{"type": "custom"}]}, "tools[0].name"),
    ({"tools": [{"type": "custom", "name": "p", "format": 5}]}, "tools[0].format"),
    ({"tools": [{"type": "namespace", "name": 5}]}, "tools[0].name"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": 5}]}, "tools[0].tools"),
    ({"tools": [F, {"type": "namespace", "name": "n", "tools": [{"name": 5}]}]},
     "tools[1].tools[0].name"),
    ({"tool_choice": 5}, "tool_choice"), ({"tool_choice": "wibble"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "function", "name": 5}}, "tool_choice.name"),
    ({"max_output_tokens": "5"}, "max_output_tokens"),
    ({"max_output_tokens": -2}, "max_output_tokens"),
    ({"max_output_tokens": 1.5}, "max_output_tokens"), ({"temperature": "x"}, "temperature"),
    ({"top_p": []}, "top_p"), ({"reasoning": "high"}, "reasoning"),
    ({"reasoning": {"effort": 5}}, "reasoning.effort"), ({"text": "x"}, "text"),
    ({"text": {"format": 5}}, "text.format"), ({"text": {"format": {"type": 5}}},
                                               "text.format.type"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format.schema"),
    ({"text": {"verbosity": 5}}, "text.verbosity"), ({"include": "x"}, "include"),
    ({"instructions": 5}, "instructions")]


@pytest.mark.parametrize("members,path", REFUSED, ids=range(len(REFUSED)))
def test_wrong_types_name_their_path(members, path):
    error = refusal("responses", request("responses", **members))
    assert error is not None and (error.kind, error.status, error.param) == ("invalid", 400, path)
    assert path in error.message


# The event sequence (R43).  Events: (upstream's events, kinds behind created and in_progress).

TEXT_KINDS = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done",
              "content_part.done", "output_item.done"]
THINKING_KINDS = ["output_item.added", "reasoning_summary_part.added",
                  "reasoning_summary_text.delta", "reasoning_summary_text.done",
                  "reasoning_summary_part.done", "output_item.done"]
CALL_KINDS = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
              "output_item.done"]
RAW_KINDS = ["output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done",
             "output_item.done"]
SEQUENCES = [
    ([delta("a"), FINISH], TEXT_KINDS), ([delta("a", "reasoning"), FINISH], THINKING_KINDS),
    ([call({"a": 1}), FINISH], CALL_KINDS),
    ([call({"input": "x"}, "c1", "apply_patch"), FINISH], RAW_KINDS),
    ([delta("h", "reasoning"), delta("a"), call({}), call({}, "c2"), FINISH],
     THINKING_KINDS + TEXT_KINDS + CALL_KINDS * 2), ([FINISH], [])]


@pytest.mark.parametrize("events,kinds", SEQUENCES, ids=range(len(SEQUENCES)))
def test_the_event_sequence(events, kinds):
    frames = read_frames(run(new_answer("responses", names=RAW), ndjson({"type": "start"},
                                                                        *events)))
    assert [frame["type"] for frame in frames] == ["response." + kind for kind in [
        "created", "in_progress"] + kinds + ["completed"]]


MEMBERS = {"id", "object", "created_at", "status", "background", "error", "incomplete_details",
           "instructions", "max_output_tokens", "metadata", "model", "output",
           "parallel_tool_calls", "previous_response_id", "reasoning", "store", "temperature",
           "text", "tool_choice", "tools", "top_p", "truncation", "usage"}


def test_every_response_object_has_all_members():
    prompt = read_prompt("responses", request("responses"))
    frames = read_frames(run(new_answer("responses", echo=prompt.echo), text_answer("a")))
    shown = [frame["response"] for frame in frames if "response" in frame]
    assert len(shown) == 3 and all(set(one) == MEMBERS for one in shown)


def test_deltas_go_out_as_they_come():
    answer = new_answer("responses")
    for words in ("one", "two"):
        frames = read_frames(answer.feed(ndjson(delta(words))))
        assert frames[-1]["type"] == "response.output_text.delta"
        assert frames[-1]["delta"] == words and frames[-1]["content_index"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_recorded_stream_ends_once(name):
    answer = new_answer("responses")
    frames = run(answer, recorded(name))
    if answer.error is not None:
        frames += answer.failure(answer.error)
    kinds = [frame["type"] for frame in read_frames(frames)]
    ends = [kind for kind in kinds if kind in ("response.completed", "response.incomplete",
                                               "response.failed")]
    word = {"06": "incomplete"}.get(name, "failed" if name in ("07", "08", "12", "13")
                                    else "completed")
    assert ends == kinds[-1:] == ["response." + word]


# Bodies: (events, path, value).

BODIES = [
    ([delta("a"), FINISH], "status", "completed"), ([delta("a"), FINISH], "object", "response"),
    ([delta("a"), FINISH], "incomplete_details", None), ([delta("a"), FINISH], "error", None),
    ([delta("a"), FINISH], "store", False), ([delta("a"), FINISH], "background", False),
    ([delta("a"), FINISH], "created_at", 0), ([delta("a"), FINISH], "previous_response_id", None),
    ([delta("a"), FINISH], "output.0.role", "assistant"),
    ([delta("a"), FINISH], "output.0.status", "completed"),
    ([delta("a"), FINISH], "output.0.content.0", {"type": "output_text", "text": "a",
                                                  "annotations": [], "logprobs": []}),
    ([delta("hm", "reasoning"), delta("a"), FINISH], "output.0.summary",
     [{"type": "summary_text", "text": "hm"}]),
    ([delta("hm", "reasoning"), delta("a"), FINISH], "output.0.type", "reasoning"),
    ([call({"a": 1}), FINISH], "output.0.arguments", '{"a":1}'),
    ([call({"a": 1}), FINISH], "output.0.call_id", "c1"),
    ([call({"a": 1}), FINISH], "output.0.type", "function_call"),
    ([delta("a"), FINISH], "usage", {
        "input_tokens": 20, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 3}, "total_tokens": 29}),
    ([delta("a"), {"type": "finish", "finishReason": "stop"}], "usage", None),
    ([delta("a"), {**FINISH, "finishReason": "length"}], "status", "incomplete"),
    ([delta("a"), {**FINISH, "finishReason": "length"}], "incomplete_details",
     {"reason": "max_output_tokens"}),
    ([delta("a"), {**FINISH, "finishReason": "content-filter"}], "incomplete_details",
     {"reason": "content_filter"}),
    ([delta("a"), {**FINISH, "finishReason": "content-filter"}], "status", "incomplete"),
    ([delta("a"), {**FINISH, "finishReason": "other"}], "status", "completed"),
    ([delta("a"), {**FINISH, "finishReason": "pause_turn"}], "status", "completed")]


@pytest.mark.parametrize("events,path,value", BODIES, ids=range(len(BODIES)))
def test_bodies(events, path, value):
    _, body = run_plain("responses", ndjson(*events))
    found = at(body, path)
    assert (json.loads(found) == json.loads(value)) if path.endswith("arguments") else \
        found == value
    _, folded = run_stream("responses", ndjson(*events))
    assert at(folded["response"], path) == found


ECHO = [        # (members of a request, path in the response, value)
    ({}, "tool_choice", "auto"), ({}, "metadata", {}), ({}, "text", {"format": {"type": "text"}}),
    ({}, "parallel_tool_calls", True), ({}, "max_output_tokens", None),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", False),
    ({"parallel_tool_calls": True}, "parallel_tool_calls", True),
    ({"parallel_tool_calls": None}, "parallel_tool_calls", True),
    ({"metadata": {"a": "b"}}, "metadata", {"a": "b"}),
    ({"max_output_tokens": 10}, "max_output_tokens", 10), ({"temperature": 0}, "temperature", 0),
    ({"top_p": 0.5}, "top_p", 0.5), ({"tools": [F], "tool_choice": "required"}, "tool_choice",
                                     "required"),
    ({"reasoning": {"effort": "low", "summary": "auto"}}, "reasoning",
     {"effort": "low", "summary": "auto"}), ({}, "reasoning", {"effort": None, "summary": None}),
    ({"text": {"format": {"type": "json_object"}}}, "text.format", {"type": "json_object"}),
    ({"store": True}, "store", False)]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("members,path,value", ECHO, ids=range(len(ECHO)))
def test_what_a_response_repeats_of_its_request(members, path, value, stream):
    prompt = read_prompt("responses", request("responses", stream=stream, **members))
    data = text_answer("{}")
    shown = run_stream("responses", data, echo=prompt.echo)[1]["response"] if stream else \
        run_plain("responses", data, echo=prompt.echo)[1]
    assert at(shown, path) == value


CODES = [       # (kind, status, code of the failed response)
    ("invalid", 400, "invalid_prompt"), ("too_long", 400, "context_length_exceeded"),
    ("billing", 402, "insufficient_quota"), ("rate_limit", 429, "rate_limit_exceeded"),
    ("upstream", 502, "server_error"), ("unavailable", 503, "server_error")]


@pytest.mark.parametrize("kind,status,code", CODES)
def test_failed_responses(kind, status, code):
    error = ccproxy.ProxyError(kind, "What to do.", status=status)
    answer = new_answer("responses")
    frames = answer.feed(ndjson(delta("a"))) + answer.stop(error)
    last = read_frames(frames + answer.failure(error))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": code, "message": "What to do."}


# Reasoning that survives the next turn.

@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("words", [["hm"], ["h", "m \u00e9\U0001f680\n"], ["\ud83d", "\ude80"]])
def test_reasoning_comes_back_with_its_text(words, stream):
    data = b"".join(plain_line(event) for event in [
        *[delta(word, "reasoning") for word in words], delta("a"), FINISH])
    run_it = run_stream if stream else run_plain
    shown = run_it("responses", data, carry_thinking=True)[1]
    item = (shown["response"] if stream else shown)["output"][0]
    prompt = read_prompt("responses", request("responses", input=[
        {"role": "user", "content": "q"}, {**item, "summary": []},
        {"role": "user", "content": "go on"}]))
    text = "".join(words).encode("utf-16", "surrogatepass").decode("utf-16")
    assert prompt.turns[1].parts == [ccproxy.Thinking(text)]


def test_reasoning_is_carried_only_where_it_was_asked_for():
    data = recorded("02")
    assert b"encrypted_content" not in run(new_answer("responses"), data)
    assert b"encrypted_content" in run(new_answer("responses", carry_thinking=True), data)


# Names mapped, and mapped back.

def test_names_and_namespaces_come_back():
    long = {"type": "function", "name": "my.tool", "parameters": EMPTY}
    tools = [SPACE, {**SPACE, "name": "other"}, PATCH, F, long]
    prompt = read_prompt("responses", request("responses", tools=tools))
    sent = [tool.name for tool in prompt.tools]
    assert len(set(sent)) == 7
    data = ndjson(*[call({"input": "x"}, "c%d" % number, name)
                    for number, name in enumerate(sent)], FINISH)
    for shown in (run_plain("responses", data, names=prompt.names)[1],
                  run_stream("responses", data, names=prompt.names)[1]["response"]):
        assert [(item["type"], item["name"], item.get("namespace"))
                for item in shown["output"]] == [
            ("function_call", "spawn", "ns"), ("function_call", "wait", "ns"),
            ("function_call", "spawn", "other"), ("function_call", "wait", "other"),
            ("custom_tool_call", "apply_patch", None), ("function_call", "f", None),
            ("function_call", "my.tool", None)]


def test_a_name_that_looks_like_a_namespaced_one_stays_apart():
    tools = [{**F, "name": "ns__spawn"}, SPACE]
    prompt = read_prompt("responses", request("responses", tools=tools))
    assert len({tool.name for tool in prompt.tools}) == 3
    assert sorted((own.namespace, own.name) for own in prompt.names.values()) == [
        ("", "ns__spawn"), ("ns", "spawn"), ("ns", "wait")]


# Tools of free text, over every cut.

INPUTS = ["", "x", r"\ud83d \\ud83d", "*** Begin Patch\n+a\tb\\n\n", "\"quoted\" \\ / \\u0041",
          "\u00e9\u4e16\U0001f680!", "\U0001f680\U0001f680", "}\"}", "=lane-mark="]
WRITTEN = [     # ways in which a model may write the one argument
    lambda text: json.dumps({"input": text}),
    lambda text: json.dumps({"input": text}, ensure_ascii=False, separators=(",", ":")),
    lambda text: '\n { "input" :\t%s }\n' % json.dumps(text).replace("/", "\\/")]


def fold_raw(face, frames):
    """The input of the only custom call, from its deltas."""
    if face == "responses":
        return "".join(frame["delta"] for frame in frames
                       if frame["type"] == "response.custom_tool_call_input.delta")
    calls = [one for frame in frames if frame != "[DONE]" for choice in frame["choices"]
             for one in choice["delta"].get("tool_calls", ())]
    assert {one["index"] for one in calls} == {0} and calls[0]["type"] == "custom"
    return "".join(one["custom"].get("input", "") for one in calls)


def told_raw(face, body):
    """The input of the only custom call in a body."""
    if face == "responses":
        return body["output"][0]["input"]
    return body["choices"][0]["message"]["tool_calls"][0]["custom"]["input"]


@pytest.mark.parametrize("face", ["chat", "responses"])
@pytest.mark.parametrize("write", WRITTEN, ids=range(len(WRITTEN)))
@pytest.mark.parametrize("text", INPUTS)
def test_free_text_over_every_cut(face, write, text):
    written = write(text)
    for cut in range(len(written) + 1):
        events = [start()] + [piece(one) for one in (written[:cut], written[cut:]) if one]
        data = ndjson(*events, call({"input": text}, "c1", "apply_patch"), FINISH)
        frames = read_frames(run(new_answer(face, names=RAW), data))
        assert fold_raw(face, frames) == text, cut
        assert told_raw(face, run_plain(face, data, names=RAW)[1]) == text, cut
    singly = ndjson(start(), *map(piece, written), call({"input": text}, "c1", "apply_patch"),
                    FINISH)
    assert fold_raw(face, read_frames(run(new_answer(face, names=RAW), singly, "bytewise"))) == text


@pytest.mark.parametrize("text", INPUTS)
def test_free_text_in_the_grammar_of_responses(text):
    """The items' own checks: what is told done is what was streamed."""
    written = json.dumps({"input": text})
    answer, folded = run_stream("responses", ndjson(
        delta("hm", "reasoning"), start(), *map(piece, written),
        call({"input": text}, "c1", "apply_patch"), FINISH), names=RAW)
    item = folded["items"][-1]
    assert (item.kind, item.done["input"], item.done["name"]) == ("custom_tool_call", text,
                                                                  "apply_patch")
    assert item.done["id"].startswith("ctc_") and "arguments" not in item.done


def test_free_text_goes_out_as_it_comes():
    answer = new_answer("responses", names=RAW)
    assert not fold_raw("responses", read_frames(answer.feed(ndjson(start(), piece('{"inp')))))
    for words, shown in (('ut":"*** Be', "*** Be"), ("gin\\", "gin"), ("n+", "\n+"),
                         ("\\ud83d", ""), ("\\ude80", "\U0001f680"), ('"}', "")):
        assert fold_raw("responses", read_frames(answer.feed(ndjson(piece(words))))) == shown


OTHERWISE = [   # arguments that are not one string `input`: stream and body still say the same
    '{"patch": "x"}', '{"input": 5}', '{"input": {"a": 1}}', '{"input": null}', '["x"]', '"x"',
    '{"note": "y", "input": "x"}', '{"input": "x", "note": "y"}', "{}"]


@pytest.mark.parametrize("face", ["chat", "responses"])
@pytest.mark.parametrize("written", OTHERWISE)
def test_odd_arguments_of_free_text_are_streamed_as_they_are_told(face, written):
    data = ndjson(start(), piece(written), call(json.loads(written), "c1", "apply_patch"), FINISH)
    told = told_raw(face, run_plain(face, data, names=RAW)[1])
    assert fold_raw(face, read_frames(run(new_answer(face, names=RAW), data))) == told


@pytest.mark.parametrize("written", ['{"input":"*** Beg', '{"input":"\\ud83d', '{"inp', "{"])
def test_free_text_that_was_cut_is_never_told_done(written):
    answer, folded = run_stream("responses", ndjson(delta("a"), start(), piece(written), FINISH),
                                names=RAW)
    assert folded["response"]["status"] == "incomplete"
    assert [item.done is None for item in folded["items"]] == [False, True]
    assert len(folded["response"]["output"]) == 1


@pytest.mark.parametrize("face", ["chat", "responses"])
def test_random_free_text_over_random_cuts(face):
    for seed in range(60):
        rng = random.Random(seed)
        text = "".join(rng.choice("ab\n\"\\/\u00e9\U0001f680\u2028\x01{}") for _ in range(12))
        written = json.dumps({"input": text}, ensure_ascii=rng.random() < 0.5)
        places = [0] + random_cuts(rng, written.encode())[:4] + [len(written)]
        places = sorted(min(place, len(written)) for place in places)
        pieces = [written[one:two] for one, two in zip(places, places[1:]) if one < two]
        data = ndjson(start(), *map(piece, pieces), call({"input": text}, "c1", "apply_patch"),
                      FINISH)
        whole = run(new_answer(face, names=RAW), data)
        assert run(new_answer(face, names=RAW), data, "bytewise") == whole, seed
        assert run(new_answer(face, names=RAW, lanes=False), data) == whole, seed
        assert fold_raw(face, read_frames(whole)) == text, seed


def test_random_answers_with_a_free_text_tool_keep_their_law():
    """`f` of the random answers as a tool of free text: grammar, cuts and lane law hold."""
    names = {"f": ccproxy.ToolName("f", type="custom")}
    for seed in range(40):
        data = make_answer(seed).data
        whole = run(new_answer("responses", names=names), data)
        assert run(new_answer("responses", names=names), data, "bytewise") == whole, seed
        assert run(new_answer("responses", names=names, lanes=False), data) == whole, seed


# Free text whose JSON is not quite JSON, as models write it.

LOOSE = [   # (the arguments as the model wrote them, the free text that they mean)
    (r'{"input":"s/\d+/x/"}', r"s/\d+/x/"), (r'{"input":"\d"}', r"\d"),
    (r'{ "input" : "a\nb\qc\"d\\e" } ', 'a\nb\\qc"d\\e'), (r'{"input":"\u12x4"}', r"\u12x4"),
    (r'{"input":"C:\Users\me"}', r"C:\Users\me"), ('{"input":"one\ntwo\t"}', "one\ntwo\t"),
    (r'{"input":"\ud83d\ude80\p{L}"}', "\U0001f680\\p{L}"), (r'{"input":"\ud83d\q"}', "\ufffd\\q")]


def check_loose(new, data, text):
    """An answer with one custom call, streamed in any pieces and whole, in both APIs."""
    for face in ("chat", "responses"):
        answer = new(face)
        frames = run(answer, data)
        assert answer.error is None and answer.reply.reason == "tool_calls"
        assert fold_raw(face, read_frames(frames)) == text
        assert run(new(face), data, "bytewise") == frames
        answer = new(face, stream=False)
        run(answer, data)
        assert answer.error is None and told_raw(face, answer.body()) == text
        if face == "responses":
            done = [frame for frame in read_frames(frames)
                    if frame["type"] == "response.output_item.done"]
            assert [frame["item"]["input"] for frame in done] == [text]


@pytest.mark.parametrize("written, text", LOOSE)
def test_free_text_with_a_bad_escape(written, text):
    """Whatever the whole call says of it: the text as it was written, decoded, or the object."""
    for told in (written, {"input": text}, json.dumps({"input": text})):
        for cut in range(len(written) + 1):
            pieces = [piece(one) for one in (written[:cut], written[cut:]) if one]
            check_loose(lambda face, **known: new_answer(face, names=RAW, **known), ndjson(
                {"type": "start"}, start(), *pieces, call(told, "c1", "apply_patch"), FINISH), text)


@pytest.mark.parametrize("name", sorted(SSE_OF))
@pytest.mark.parametrize("written, text", LOOSE)
def test_free_text_with_a_bad_escape_over_other_upstreams(name, written, text):
    """The call is complete where its brackets are."""
    upstream = pure_formats.UPSTREAMS[name]
    for cut in range(1, len(written)):
        steps = [("start", "c1", "apply_patch"), ("more", "c1", written[:cut]),
                 ("more", "c1", written[cut:]), ("stop", "c1"), ("end", "tool_calls")]
        check_loose(lambda face, **known: pure_formats.new_answer(upstream, face, names=RAW,
                                                                  **known),
                    SSE_OF[name](steps), text)


@pytest.mark.parametrize("name", sorted(SSE_OF))
@pytest.mark.parametrize("written", [r'{"input":"s/\d', r'{"input":"s/\d"', r'{"input":"s\"}',
                                     '{"input":"one\n', "{", '{"input":"\\', '{"input":"say "hi"',
                                     '{"input":"x = {"a":"b"}'])
@pytest.mark.parametrize("reason", ["length", "tool_calls"])
def test_free_text_that_was_cut_is_no_call(name, written, reason):
    upstream = pure_formats.UPSTREAMS[name]
    data = SSE_OF[name]([("text", "a"), ("start", "c1", "apply_patch"), ("more", "c1", written),
                         ("stop", "c1"), ("end", reason)])
    for face in ("chat", "responses"):
        answer, body = pure_formats.run_plain(upstream, face, data, names=RAW)
        assert answer.reply.reason == "length" and "apply_patch" not in json.dumps(body)


def test_what_was_told_stays_where_the_whole_call_says_otherwise():
    """Told so far, and what was kept, in its best reading.  A whole answer has the call's own word,
    or where that is no JSON, the same reading."""
    for written, told, shown in (
            (r'{"input":"s/\d+/x/"}', {"input": "s#d#"}, r"s/\d+/x/"),
            (r'{"input":"ab\"}', {"input": "other"}, 'ab"}'),
            ('{"input":"say "hi" now"}', '{"input":"say "hi" now"}', 'say "hi" now'),
            ('{"input":"abc', '{"input":"abc', "abc"),
            ('{"input":"abc"}', {"input": "xyz"}, "abc")):
        for step in (1, 3, 100):
            pieces = [piece(written[at:at + step]) for at in range(0, len(written), step)]
            data = ndjson(start(), *pieces, call(told, "c1", "apply_patch"), FINISH)
            frames = read_frames(run(new_answer("chat", names=RAW), data))
            assert fold_raw("chat", frames) == shown, (written, step)
            whole = told["input"] if isinstance(told, dict) else shown
            assert told_raw("chat", run_plain("chat", data, names=RAW)[1]) == whole


@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
@pytest.mark.parametrize("name", sorted(SSE_OF))
def test_ordinary_arguments_with_a_bad_escape(face, name):
    """They are JSON in a plain answer, and no call is lost."""
    data = SSE_OF[name]([("start", "c1", "grep"), ("more", "c1", r'{"pattern":"\d+"}'),
                         ("stop", "c1"), ("end", "tool_calls")])
    answer, body = pure_formats.run_plain(pure_formats.UPSTREAMS[name], face, data)
    assert answer.reply.reason == "tool_calls"
    place = {"chat": "choices.0.message.tool_calls.0.function.arguments",
             "messages": "content.0.input", "responses": "output.0.arguments"}[face]
    given = at(body, place)
    assert (json.loads(given) if isinstance(given, str) else given) == {"pattern": r"\d+"}


def test_much_free_text_behind_a_bad_escape_costs_no_more():
    """Kept in pieces: no piece is looked at twice."""
    words = ["x" * 50] * 20_000
    for before in ('{"input":"', r'{"input":"\q', '{"patch":"', " "):
        reader = ccproxy.RawInput()
        for one in [before, *words]:
            reader.feed(one)
        assert len(reader.held) <= 2000


@pytest.mark.parametrize("tool,fast", [("f", True), ("apply_patch", False)])
def test_only_calls_of_a_free_text_tool_lose_the_fast_lane(tool, fast):
    answer = new_answer("responses", names={**RAW, "f": ccproxy.ToolName("f")})
    answer.feed(ndjson(start(tool=tool), piece('{"input":"'), piece("x")))
    assert (answer.lane is not None) == fast


# Chat Completions with custom tools.

def test_chat_with_a_custom_tool():
    nested = {"type": "custom", "custom": {"name": "apply_patch", "description": "Patches.",
                                           "format": {"type": "grammar", "grammar": {
                                               "syntax": "lark", "definition": "start: x"}}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None,
                "tool_calls": [{"id": "c", "type": "custom",
                                "custom": {"name": "apply_patch", "input": "p\n"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "Done!"}]
    body = request("chat", tools=[nested], messages=messages, tool_choice={
        "type": "custom", "custom": {"name": "apply_patch"}})
    params = params_of("chat", body)
    check_params(params)
    assert params["tool_choice"] == {"type": "tool", "name": "apply_patch"}
    assert at(params, "tools.0.input_schema") == ccproxy.RAW_SCHEMA
    assert "lark grammar:\nstart: x" in at(params, "tools.0.description")
    assert at(params, "messages.1.content.0.input") == {"input": "p\n"}
    names = read_prompt("chat", body).names
    _, told = run_plain("chat", ndjson(call({"input": "p"}, "c1", "apply_patch"), FINISH),
                        names=names)
    assert at(told, "choices.0.message.tool_calls") == [
        {"id": "c1", "type": "custom", "custom": {"name": "apply_patch", "input": "p"}}]


def test_messages_shows_a_raw_tool_as_an_ordinary_one():
    _, body = run_plain("messages", ndjson(call({"input": "p"}, "c1", "apply_patch"), FINISH),
                        names=RAW)
    assert at(body, "content.0.input") == {"input": "p"}
