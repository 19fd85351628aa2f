"""FIELD TABLES: every field that the three APIs document is posted once, and is honoured or told.

The fields are those of OpenAI's API reference (create chat completion, create a model response),
of Anthropic's (create a message, beta), and of their packages' request types.
"""
from __future__ import annotations

import pytest

import ccproxy
from harness import CHAT, KEY, MESSAGES
from pure import ALL_FACES, PNG, USER, at, read_prompt, refusal, request, text, translate

PATHS = {"chat": CHAT, "messages": MESSAGES, "responses": "/v1/responses"}
STRICT = {"x-ccproxy-strict": "1"}
MODEL = "vendor/unknown"
F = {"type": "function", "name": "f", "description": "d",
     "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
CLEAR = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}

# What becomes of a field: told in a note, refused with a 400 that names it, nothing that an answer
# depends on, or the value of an attribute of the prompt, or of a member of what is sent.
TOLD, REFUSED, LABEL = "told", "refused", "label"


def prompt_has(name, value):
    return lambda prompt, sent: getattr(prompt, name) == value


def sent_has(path, value):
    return lambda prompt, sent: at(sent, path) == value


EVERYWHERE = [      # (field, a value that asks for something, what becomes of it)
    ("model", MODEL, sent_has("model", MODEL)), ("stream", True, prompt_has("stream", True)),
    ("temperature", 0.5, sent_has("temperature", 0.5)), ("top_p", 0.5, sent_has("top_p", 0.5)),
    ("stop", ["x"], prompt_has("stops", ["x"])),
    ("stop_sequences", ["x"], prompt_has("stops", ["x"])),
    ("tools", [F], sent_has("tools.0.name", "f")),
    ("functions", [{"name": "f"}], sent_has("tools.0.name", "f")),
    ("max_tokens", 77, sent_has("max_tokens", 77)),
    ("max_completion_tokens", 77, sent_has("max_tokens", 77)),
    ("max_output_tokens", 77, sent_has("max_tokens", 77)),
    ("tool_choice", "none", lambda prompt, sent: prompt.choice is None),
    ("parallel_tool_calls", True, LABEL),
    ("reasoning_effort", "high", sent_has("reasoning_effort", "high")),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
     prompt_has("json_format", {"schema": SCHEMA})),
    ("output_format", FORMAT, prompt_has("json_format", {"schema": SCHEMA})),
    ("output_config", {"effort": "low"}, sent_has("reasoning_effort", "low")),
    ("output_config", {"format": FORMAT}, prompt_has("json_format", {"schema": SCHEMA})),
    ("output_config", {"task_budget": {"type": "tokens", "total": 5}}, TOLD),
    ("text", {"format": FORMAT}, prompt_has("json_format", {"schema": SCHEMA})),
    ("text", {"verbosity": "low"}, TOLD), ("verbosity", "low", TOLD),
    ("reasoning", {"effort": "high"}, sent_has("reasoning_effort", "high")),
    ("reasoning", {"enabled": True}, sent_has("reasoning_effort", "medium")),
    ("reasoning", {"max_tokens": 6000}, prompt_has("budget", 6000)),
    ("reasoning", {"max_tokens": 6000}, sent_has("reasoning_effort", "medium")),
    ("reasoning", {"exclude": True}, prompt_has("show_thinking", False)),
    ("reasoning", {"summary": "concise"}, TOLD), ("reasoning", {"mode": "pro"}, TOLD),
    ("reasoning", {"generate_summary": "concise"}, TOLD),
    ("reasoning", {"context": "current_turn"}, TOLD),
    ("thinking", {"type": "enabled", "budget_tokens": 6000}, prompt_has("budget", 6000)),
    ("thinking", {"type": "between_tools"}, TOLD),
    ("thinking", {"type": "adaptive", "display": "updates"}, TOLD),
    ("thinking", {"type": "adaptive", "block_binding": {"x": "y"}}, LABEL),
    ("stream_options", {"include_obfuscation": True}, TOLD), ("seed", 5, TOLD),
    ("top_k", 5, TOLD), ("min_p", 0.1, TOLD), ("repetition_penalty", 1.1, TOLD),
    ("frequency_penalty", 0.5, TOLD), ("presence_penalty", 0.5, TOLD),
    ("logit_bias", {"5": 1}, TOLD), ("logprobs", True, TOLD), ("top_logprobs", 3, TOLD),
    ("modalities", ["text", "audio"], TOLD), ("audio", {"voice": "x"}, TOLD),
    ("prediction", {"type": "content", "content": "x"}, TOLD),
    ("web_search_options", {"search_context_size": "low"}, TOLD), ("service_tier", "flex", TOLD),
    ("container", "c", TOLD), ("mcp_servers", [{"url": "x"}], TOLD), ("inference_geo", "eu", TOLD),
    ("truncation", "auto", TOLD), ("max_tool_calls", 3, TOLD)]
OPENAI = [
    ("user", "u", LABEL), ("safety_identifier", "s", LABEL), ("prompt_cache_key", "k", LABEL),
    ("client_metadata", {"a": "b"}, LABEL), ("prompt_cache_retention", "24h", TOLD),
    ("prompt_cache_options", {"mode": "explicit"}, TOLD),
    ("prompt_cache_options", {"ttl": "12h"}, TOLD),
    ("prompt_cache_options", {"prewarm": True}, TOLD),
    ("prompt_cache_options", {"comparison_response_id": "resp_1"}, TOLD),
    ("moderation", {"model": "omni-moderation-latest"}, TOLD)]
ROWS = {
    "chat": EVERYWHERE + OPENAI + [
        ("messages", [USER], sent_has("messages.0.content.0.text", "hi")),
        ("system", "s", sent_has("system.0.text", "s")), ("metadata", {"a": "b"}, LABEL),
        ("function_call", "none", lambda prompt, sent: prompt.choice is None), ("n", 2, REFUSED),
        ("stream_options", {"include_usage": True}, prompt_has("include_usage", True)),
        ("prompt", {"id": "x"}, TOLD), ("store", True, TOLD)],
    "messages": EVERYWHERE + [
        ("messages", [USER], sent_has("messages.0.content.0.text", "hi")),
        ("system", "s", sent_has("system.0.text", "s")), ("thread", {"type": "create"}, REFUSED),
        ("betas", ["x"], LABEL), ("anthropic_version", "x", LABEL),
        ("anthropic_beta", ["x"], LABEL),
        ("user_profile_id", "u", LABEL), ("workspace_id", "w", LABEL),
        ("metadata", {"user_id": "u"}, prompt_has("user_id", "u")),
        ("cache_control", {"type": "ephemeral"},
         sent_has("messages.0.content.0.cache_control", {"type": "ephemeral"})),
        ("context_management", {"edits": [{"type": "clear_tool_uses_20250919"}]}, TOLD),
        ("context_management", {"edits": CLEAR["edits"] * 2}, TOLD),
        ("speed", "fast", TOLD), ("compaction", {"type": "summarize"}, TOLD),
        ("fallbacks", "default", TOLD), ("fallbacks", [{"model": "m"}], TOLD),
        ("fallback_credit_token", "t", TOLD), ("service_tier", "standard_only", TOLD),
        ("diagnostics", {"previous_message_id": "msg_1"}, TOLD), ("prompt", {"id": "x"}, TOLD),
        ("billing_policy", {"type": "billing_policy", "bill_to": "user_profile"}, TOLD),
        ("thinking", {"type": "adaptive"}, prompt_has("show_thinking", True))],
    "responses": EVERYWHERE + OPENAI + [
        ("input", "hey", sent_has("messages.0.content.0.text", "hey")),
        ("instructions", "s", sent_has("system.0.text", "s")),
        ("metadata", {"a": "b"}, lambda prompt, sent: prompt.echo["metadata"] == {"a": "b"}),
        ("include", ["reasoning.encrypted_content"], prompt_has("carry_thinking", True)),
        *(("include", [value], TOLD) for value in (
            "file_search_call.results", "web_search_call.results",
            "web_search_call.action.sources", "message.input_image.image_url",
            "computer_call_output.output.image_url", "code_interpreter_call.outputs",
            "message.output_text.logprobs")),
        ("store", False, prompt_has("remember", False)), ("background", True, REFUSED),
        ("previous_response_id", "resp_1", REFUSED), ("conversation", "conv_1", REFUSED),
        ("prompt", {"id": "pmpt_1"}, REFUSED), ("background_options", {
            "completion_window": "2h"}, TOLD), ("personality", "friendly", TOLD),
        ("context_management", [{"type": "compaction"}], TOLD),
        ("access_programs", {"cyber": "daybreak_blue"}, TOLD),
        ("image", {"context_compression": "enabled"}, TOLD)]}
CASES = [(face, *row) for face, rows in ROWS.items() for row in rows]
NAMES = ["%s-%s-%d" % (face, name, number) for number, (face, name, _, _) in enumerate(CASES)]


@pytest.mark.parametrize("face", ROWS)
def test_every_field_of_the_table_has_its_row(face):
    assert {name for name, _, _ in ROWS[face]} == set(ALL_FACES[face].fields)


@pytest.mark.parametrize("face,name,value,becomes", CASES, ids=NAMES)
def test_each_field_is_honoured_or_told(face, name, value, becomes):
    body = request(face, **{"model": MODEL, name: value})
    if name.startswith("max_"):
        body = {**request(face), name: value}
        body.pop("max_tokens" if name != "max_tokens" else "", None)
    if becomes == REFUSED:
        error = refusal(face, body)
        assert (error.status, error.param) == (400, name) and name in error.message
        return
    prompt = read_prompt(face, body)
    sent, notes = translate(face, body)
    ignored = [note for note in notes if note.startswith("ignored=" + name)]
    assert bool(ignored) == (becomes == TOLD)
    if callable(becomes):
        assert becomes(prompt, sent["params"])


@pytest.fixture(scope="module")
def explained():
    """What /explain says of each case, with and without x-ccproxy-strict."""
    from harness import Proxy
    proxy = Proxy(useProviderModels=False, apiBase="http://127.0.0.1:9")
    yield lambda face, body, fields=None: proxy.request(
        "POST", "/explain" + PATHS[face], body, fields, KEY)
    proxy.close()


@pytest.mark.parametrize("face,name,value,becomes", CASES, ids=NAMES)
def test_the_same_over_http(explained, face, name, value, becomes):
    """What is told is what x-ccproxy-strict refuses, by name."""
    body = request(face, **{"max_tokens": 9000, name: value})
    easy, strict = explained(face, body), explained(face, body, STRICT)
    told = [note for note in easy.fields.get("x-ccproxy-notes", "").split("; ")
            if note.startswith("ignored=" + name)]
    assert easy.status == (400 if becomes == REFUSED else 200)
    assert bool(told) == (becomes == TOLD)
    assert strict.status == (400 if becomes in (TOLD, REFUSED) else 200), strict.body
    if becomes == TOLD:
        assert told[0] in strict.json["error"]["message"]
        assert told[0] in strict.json["error"]["details"]["notes"]


NEUTRAL = {     # what asks for nothing: null, empty values and each API's defaults
    "any": [{"seed": None, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
             "logprobs": False, "top_logprobs": 0, "modalities": ["text"], "audio": None,
             "service_tier": "auto", "verbosity": "medium", "truncation": "disabled",
             "mcp_servers": [], "container": None, "output_config": {}, "reasoning": {},
             "stream_options": {}, "max_tool_calls": None, "prompt": None},
            {"service_tier": "default", "reasoning": {"summary": "auto", "context": "auto"},
             "text": {"verbosity": "medium"}, "stream_options": {"include_obfuscation": False},
             "thinking": None, "response_format": {"type": "text"}}],
    "chat": [{"store": False, "n": 1, "metadata": {}, "user": None},
             {"prompt_cache_options": {"mode": "implicit", "ttl": "30m", "prewarm": False},
              "prompt_cache_retention": "in_memory", "moderation": None}],
    "messages": [{"context_management": CLEAR, "speed": "standard", "fallbacks": None},
                 {"context_management": {"edits": [{**CLEAR["edits"][0], "keep": {
                     "type": "all"}}]}, "context_management2": None},
                 {"context_management": None, "diagnostics": {"previous_message_id": None},
                  "thinking": {"type": "disabled"}, "output_format": None},
                 {"billing_policy": {"type": "billing_policy", "bill_to": "self"}}],
    "responses": [{"background": False, "previous_response_id": None, "conversation": None,
                   "prompt": None, "include": [], "context_management": []},
                  {"access_programs": {"cyber": "standard"}, "image": {
                      "context_compression": "auto"}}]}


@pytest.mark.parametrize("face,members", [
    (face, members) for face in ROWS for members in NEUTRAL["any"] + NEUTRAL[face]],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_value_that_asks_for_nothing_leaves_no_note(face, members):
    assert translate(face, request(face, **members))[1] == []


UNKNOWN = [     # (members, the name under which x-ccproxy-strict refuses them)
    ({"no_such_field": 1}, "no_such_field"), ({"no_such_field": None}, "no_such_field"),
    ({"tool_choice": {"type": "auto", "no_such": 1}}, "tool_choice.no_such"),
    ({"stream_options": {"no_such": 1}}, "stream_options.no_such"),
    ({"text": {"no_such": 1}}, "text.no_such"),
    ({"reasoning": {"no_such": 1}}, "reasoning.no_such"),
    ({"output_config": {"no_such": 1}}, "output_config.no_such"),
    ({"thinking": {"type": "disabled", "no_such": 1}}, "thinking.no_such"),
    ({"response_format": {"type": "text", "no_such": 1}}, "response_format.no_such"),
    ({"response_format": {"type": "json_schema", "json_schema": {"no_such": 1}}},
     "response_format.json_schema.no_such"),
    ({"text": {"format": {"type": "text", "no_such": 1}}}, "text.format.no_such")]


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("members,name", UNKNOWN, ids=[row[1] for row in UNKNOWN])
def test_an_unknown_field_is_ignored_and_strict_refuses_it(explained, face, members, name):
    easy = explained(face, request(face, **members))
    assert easy.status == 200
    assert name.rpartition(".")[2] not in easy.fields.get("x-ccproxy-notes", "")
    strict = explained(face, request(face, **members), STRICT)
    assert strict.status == 400 and "ignored=" + name in strict.json["error"]["details"]["notes"]
    assert "ignored=" + name in strict.json["error"]["message"]


def test_members_of_metadata_and_cache_control(explained):
    for members in ({"metadata": {"no_such": 1}}, {"cache_control": {"no_such": 1}}):
        name = "ignored=%s.no_such" % next(iter(members))
        strict = explained("messages", request("messages", **members), STRICT)
        assert strict.status == 400 and strict.json["error"]["details"]["notes"] == [name]


def test_a_flood_of_unknown_fields_is_named_in_part(explained):
    body = request("chat", **{"field_%d" % number: number for number in range(5000)})
    error = explained("chat", body, STRICT).json["error"]
    assert len(error["details"]["notes"]) == ccproxy.MAX_UNKNOWN and len(error["message"]) < 1500


def test_no_key_stands_in_the_name_of_a_field(explained):
    answer = explained("chat", request("chat", **{KEY: 1}), STRICT)
    assert answer.status == 400 and KEY.encode() not in answer.body


@pytest.mark.parametrize("door,shape", [(door, shape) for door in ROWS for shape in ROWS
                                        if (door == "responses") != (shape == "responses")])
def test_strict_knows_the_fields_of_the_shape_that_is_read(explained, door, shape):
    """The body's shape picks the reader, and so the table."""
    members = {"responses": {"instructions": "s", "background": False},
               "chat": {"n": 1, "user": "u"}, "messages": {"n": 1, "user": "u"}}[shape]
    assert explained(door, request(shape, **members), STRICT).status == 200


# What OpenRouter's reasoning, formats and limits mean.

REASONING = [       # (members of a request, effort, budget)
    ({"reasoning": {"enabled": False}}, None, None),
    ({"reasoning": {"enabled": False, "effort": "high"}}, None, None),
    ({"reasoning": {"enabled": False, "max_tokens": 2000}}, None, None),
    ({"reasoning": {"enabled": True}}, "medium", None),
    ({"reasoning": {"enabled": True, "effort": "high"}}, "high", None),
    ({"reasoning": {"max_tokens": 2000}}, "low", 2000),
    ({"reasoning": {"max_tokens": 1}}, "low", 1),
    ({"reasoning": {"max_tokens": 5000, "enabled": True}}, "medium", 5000),
    ({"reasoning": {"max_tokens": 1e30}}, "high", ccproxy.MAX_OUTPUT_TOKENS),
    ({"reasoning": {"max_tokens": 5000, "effort": "low"}}, "low", 5000),
    ({"reasoning": {"max_tokens": 0}}, None, None), ({"reasoning": {"max_tokens": -5}}, None, None),
    ({"reasoning": {"max_tokens": None, "enabled": None}}, None, None),
    ({"reasoning": {}}, None, None),
    ({"reasoning": {"max_tokens": 20_000}, "thinking": {
        "type": "enabled", "budget_tokens": 3000}}, "low", 3000),
    ({"thinking": {"type": "adaptive"}, "reasoning": {"enabled": True}}, "medium", 0),
    ({"reasoning_effort": "none"}, None, None), ({"output_config": {"effort": "none"}}, None, None),
    ({"reasoning": {"effort": "none"}}, None, None), ({"reasoning_effort": "off"}, None, None)]


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("members,effort,budget", REASONING, ids=range(len(REASONING)))
def test_how_much_is_thought(face, members, effort, budget):
    """That a model may still think where it was asked not to is always told."""
    prompt = read_prompt(face, request(face, **members))
    assert (prompt.effort, prompt.budget) == (effort, budget)
    asked_not_to = "none" in str(members) or "off" in str(members) or "False" in str(members) or \
        members.get("reasoning", {}).get("max_tokens") in (0, -5)
    told = [note for note in prompt.notes if note.startswith("effort=")]
    assert bool(told) == asked_not_to and all("the model's own" in note for note in told)


@pytest.mark.parametrize("face", ROWS)
def test_thinking_that_is_excluded_is_not_shown(face):
    shown = {"thinking": {"type": "adaptive"}}
    for exclude in (True, False, None):
        prompt = read_prompt(face, request(face, reasoning={"exclude": exclude}, **shown))
        assert prompt.show_thinking is not bool(exclude) and prompt.notes == []


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("name,value", [("enabled", "yes"), ("max_tokens", "x"), ("exclude", 1)])
def test_wrong_types_in_reasoning(face, name, value):
    assert refusal(face, request(face, reasoning={name: value})).param == "reasoning." + name


JSON_FORMATS = [        # (a format, what is asked for): `schema` beside json_object is llama.cpp's
    ({"type": "json_object", "schema": SCHEMA}, {"schema": SCHEMA}),
    ({"type": "json_object", "json_schema": {"schema": SCHEMA}}, {"schema": SCHEMA}),
    ({"type": "json_object", "schema": {}}, {}), ({"type": "json_object", "schema": None}, {}),
    ({"type": "json_object"}, {}), (FORMAT, {"schema": SCHEMA}),
    ({"type": "json_schema", "json_schema": {"name": "n", "description": "about it", "strict": True,
                                             "schema": SCHEMA}},
     {"schema": {"description": "about it", **SCHEMA}}),
    ({**FORMAT, "description": "no", "schema": {"description": "own"}},
     {"schema": {"description": "own"}})]
FORMAT_NAMES = {"response_format": lambda given: {"response_format": given},
                "output_format": lambda given: {"output_format": given},
                "output_config": lambda given: {"output_config": {"format": given}},
                "text": lambda given: {"text": {"format": given}}}


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize("given,asked", JSON_FORMATS, ids=range(len(JSON_FORMATS)))
def test_json_formats(face, name, given, asked):
    prompt = read_prompt(face, request(face, **FORMAT_NAMES[name](given)))
    assert prompt.json_format == asked and prompt.notes == ["json_format=asked for in words"]
    if "schema" in asked:
        assert ccproxy.to_json(asked["schema"]).decode() in prompt.system[-1].text


def test_output_format_is_an_object_in_messages():
    assert refusal("messages", request("messages", output_format="x")).param == "output_format"
    assert refusal("chat", request("chat", output_format="png")) is None     # no field of Chat


LIMIT_NAMES = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("name", LIMIT_NAMES)
def test_a_limit_of_minus_one_is_none(face, name):
    body = {**request(face), "max_tokens": None}
    plain, notes = translate(face, {**body, name: -1})
    assert plain == translate(face, body)[0] and notes == ["ignored=%s -1" % name]
    assert translate(face, {**body, name: -1.0})[1] == notes


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("value", [-2, -0.5, 0.5, 1e30, True, "0", [0]])
@pytest.mark.parametrize("name", LIMIT_NAMES)
def test_other_limits_that_are_no_count(face, name, value):
    body = {**request(face), "max_tokens": None, name: value}
    assert refusal(face, body).param == name


def test_the_next_spelling_counts_where_one_is_unset():
    body = request("chat", max_completion_tokens=-1, max_tokens=5)
    assert read_prompt("chat", body).max_tokens == 5


# Members of tools, messages and content parts.

TOOLS = [       # (members of a tool, the one that is told)
    ({"strict": True}, "strict"), ({"strict": False}, None), ({"strict": None}, None),
    ({"input_examples": [{"a": 1}]}, "input_examples"), ({"input_examples": []}, None),
    ({"output_schema": {"type": "object"}}, "output_schema"), ({"async": True}, "async"),
    ({"allowed_callers": ["direct"]}, None),
    ({"allowed_callers": ["code_execution_20260120"]}, "allowed_callers"),
    ({"defer_loading": True}, None), ({"eager_input_streaming": True}, None),
    ({"cache_control": {"type": "ephemeral"}}, None), ({"description": "x"}, None)]
SHAPES = {      # how each API writes a tool
    "chat": lambda members: {"type": "function", "function": {"name": "f", **members}},
    "messages": lambda members: {"name": "f", "input_schema": F["parameters"], **members},
    "responses": lambda members: {**F, **members},
    "custom": lambda members: {"type": "custom", "name": "f", **members},
    "chat custom": lambda members: {"type": "custom", "custom": {"name": "f", **members}},
    "namespace": lambda members: {"type": "namespace", "name": "n", "tools": [{**F, **members}]}}


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("members,name", TOOLS, ids=range(len(TOOLS)))
def test_members_of_a_tool(face, shape, members, name):
    tools = [SHAPES[shape](members), {**F, "name": "g", **members}]
    notes = [note for note in translate(face, request(face, tools=tools))[1]
             if not note.startswith(("renamed", "schema"))]
    assert notes == (["ignored=tools." + name] if name else [])     # once, not for each tool


@pytest.mark.parametrize("face", ROWS)
def test_members_of_many_tools_are_told_once(face):
    tools = [{**F, "name": "f%d" % number, "strict": True, "input_examples": [{}],
              "output_schema": {"a": 1}, "async": True} for number in range(50)]
    assert sorted(translate(face, request(face, tools=tools))[1]) == [
        "ignored=tools." + name for name in ("async", "input_examples", "output_schema", "strict")]


MESSAGES_TOLD = [       # (message, the member that is told)
    ({"role": "user", "content": "x", "name": "Ada"}, "name"),
    ({"role": "assistant", "content": "x", "name": "Ada"}, "name"),
    ({"role": "system", "content": "x", "name": "Ada"}, "name"),
    ({"role": "developer", "content": "x", "name": "Ada"}, "name"),
    ({"role": "user", "content": "x", "name": None}, None),
    ({"role": "user", "content": "x", "name": ""}, None),
    ({"role": "assistant", "content": "x", "audio": {"id": "audio_1"}}, "audio"),
    ({"role": "system", "content": "x", "clear_at": "next_user_message"}, "clear_at"),
    ({"role": "system", "content": "x", "clear_at": "never"}, None),
    ({"role": "system", "content": "x", "output_config": {"effort": "low"}}, "output_config"),
    ({"role": "system", "content": "x", "output_config": {}}, None)]


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("message,name", MESSAGES_TOLD, ids=range(len(MESSAGES_TOLD)))
def test_members_of_a_message(face, message, name):
    history = {"input" if face == "responses" else "messages": [message, USER]}
    notes = [note for note in translate(face, request(face, **history))[1] if "ignored" in note]
    assert notes == (["ignored=message." + name] if name else [])


def test_the_name_of_a_result_is_the_tool_that_gave_it():
    messages = [USER, {"role": "assistant", "content": None, "function_call": {
        "name": "f", "arguments": "{}"}}, {"role": "function", "name": "f", "content": "r"}]
    assert translate("chat", request("chat", messages=messages))[1] == []


SOURCE = {"source": {"type": "text", "media_type": "text/plain", "data": "words"}}
BREAKPOINT = {"prompt_cache_breakpoint": {"mode": "explicit"}}
PARTS = [       # (part, what is told)
    ({"type": "document", **SOURCE, "citations": {"enabled": True}}, "document.citations"),
    ({"type": "document", **SOURCE, "citations": {"enabled": False}}, None),
    ({"type": "document", **SOURCE, "citations": None}, None),
    ({"type": "document", **SOURCE, "context": "about"}, "document.context"),
    ({"type": "search_result", "title": "t", "source": "s", "content": [text("x")],
      "citations": {"enabled": True}}, "search_result.citations"),
    ({"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
     "image_url.image_url.detail"),
    ({"type": "image_url", "image_url": {"url": PNG, "detail": "high"}}, None),
    ({"type": "input_image", "image_url": PNG, "detail": "low"}, "input_image.detail"),
    ({"type": "input_image", "image_url": PNG, "detail": "original"}, None),
    ({"type": "input_file", "filename": "a.txt", "detail": "low",
      "file_data": "data:text/plain;base64,b25l"}, "input_file.detail"),
    ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data":
                                  PNG.partition(",")[2]}, "transformations": {
         "oversized_image": "error"}}, "image.transformations"),
    (text("x", **BREAKPOINT), "text.prompt_cache_breakpoint"),
    ({"type": "input_text", "text": "x", **BREAKPOINT}, "input_text.prompt_cache_breakpoint"),
    (text("x", cache_control={"type": "ephemeral"}), None),
    (text("x", citations=[{"type": "char_location"}]), None)]       # of an earlier answer


@pytest.mark.parametrize("face", ROWS)
@pytest.mark.parametrize("part,told", PARTS, ids=range(len(PARTS)))
def test_members_of_a_part(face, part, told):
    name = "input" if face == "responses" else "messages"
    history = {name: [{"role": "user", "content": [part]}]}
    assert translate(face, request(face, **history))[1] == (["ignored=" + told] if told else [])


def test_the_tables_hold_every_field_of_the_packages():
    """The request types of the real `openai` and `anthropic` packages, where they are installed."""
    openai = pytest.importorskip("openai.types.responses.response_create_params")
    chat = pytest.importorskip("openai.types.chat.completion_create_params")
    beta = pytest.importorskip("anthropic.types.beta.message_create_params")
    for face, kind in (("chat", chat.CompletionCreateParamsStreaming),
                       ("responses", openai.ResponseCreateParamsStreaming),
                       ("messages", beta.MessageCreateParamsStreaming)):
        fields = set(kind.__annotations__)
        assert {"model", "tools"} <= fields <= set(ALL_FACES[face].fields), face


MEMBERS = [     # (a package's type, the table that holds its members)
    ("openai.types.shared_params.reasoning", "Reasoning", ccproxy.ANY_FIELDS["reasoning"]),
    ("openai.types.responses.function_tool_param", "FunctionToolParam", ccproxy.TOOL_FIELDS),
    ("openai.types.responses.custom_tool_param", "CustomToolParam", ccproxy.TOOL_FIELDS),
    ("openai.types.shared_params.function_definition", "FunctionDefinition", ccproxy.TOOL_FIELDS),
    ("openai.types.chat.chat_completion_stream_options_param", "ChatCompletionStreamOptionsParam",
     ccproxy.ANY_FIELDS["stream_options"]),
    ("openai.types.responses.response_text_config_param", "ResponseTextConfigParam",
     ccproxy.ANY_FIELDS["text"]),
    ("openai.types.responses.response_create_params", "PromptCacheOptions",
     ccproxy.OPENAI_FIELDS["prompt_cache_options"]),
    ("anthropic.types.beta.beta_tool_param", "BetaToolParam", ccproxy.TOOL_FIELDS),
    ("anthropic.types.beta.beta_output_config_param", "BetaOutputConfigParam",
     ccproxy.ANY_FIELDS["output_config"]),
    ("anthropic.types.beta.beta_thinking_config_enabled_param", "BetaThinkingConfigEnabledParam",
     ccproxy.ANY_FIELDS["thinking"]),
    ("anthropic.types.beta.beta_metadata_param", "BetaMetadataParam",
     ccproxy.MESSAGES_FIELDS["metadata"]),
    ("anthropic.types.beta.beta_cache_control_ephemeral_param", "BetaCacheControlEphemeralParam",
     ccproxy.MESSAGES_FIELDS["cache_control"])]


@pytest.mark.parametrize("module,kind,table", MEMBERS, ids=[row[1] for row in MEMBERS])
def test_the_tables_hold_every_member_of_the_packages(module, kind, table):
    fields = set(getattr(pytest.importorskip(module), kind).__annotations__)
    assert fields and fields <= set(table)
