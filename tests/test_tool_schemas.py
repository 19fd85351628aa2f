"""TOOL SCHEMAS: a tool's parameters as one object that every provider takes, each change noted."""
from __future__ import annotations

import json

import pytest
from harness import ccproxy
from pure import at, has_note, params_of, read_prompt, request, translate

EMPTY = {"type": "object", "properties": {}}
STRING, NUMBER = {"type": "string"}, {"type": "number"}
A = {"type": "object", "properties": {"x": STRING}, "required": ["x"]}
B = {"type": "object", "properties": {"y": NUMBER}, "required": ["y"]}
AB = {"x": STRING, "y": NUMBER}
REF = {"$ref": "#/$defs/A"}


def nest(schema):
    """The schema as that of a parameter, inside others."""
    return {"type": "object", "properties": {"a": {"type": "object", "properties": {
        "b": {"anyOf": [schema, {"type": "null"}]}}}}, "required": ["a"]}


def nested_in(schema):
    return schema["properties"]["a"]["properties"]["b"]["anyOf"][0]


def read(schema):
    """(the schema as it is sent, the changes that are noted)."""
    notes = []
    sent = ccproxy.read_schema(schema, "f", [ccproxy.MAX_MERGE_STEPS], notes)
    assert all(note.startswith("schema=of tool f: ") for note in notes)
    return sent, [note.partition(": ")[2] for note in notes]


# Fine as they are: sent byte for byte.

FINE = [
    EMPTY, A, {"properties": {}, "type": "object"}, {**A, "additionalProperties": False},
    {"title": "T", "type": "object", "description": "d", "properties": {
        "$ref": REF, "type": STRING, "items": {"type": "array", "items": STRING},
        "anyOf": {"enum": [1, "array"]}}, "$defs": {"A": A}},
    nest(STRING), nest({"type": ["string", "null"]}), nest({"type": "array", "items": {}}),
    nest({"type": "array", "items": True}), nest({"type": ["array", "null"], "items": STRING}),
    nest({"type": "number", "minimum": 5, "exclusiveMaximum": 9}), nest(REF),
    nest({"enum": [{"type": "array"}]}), nest({"default": {"type": "array"}}),
    nest({"const": {"exclusiveMinimum": True}}),
    nest({"allOf": [A, B], "not": {"required": ["z"]}}), nest(True), nest({"type": 5}),
    {**EMPTY, "additionalProperties": True}, {**EMPTY, "additionalProperties": STRING},
    {**EMPTY, "if": A, "then": B}, {**EMPTY, "required": []}]


@pytest.mark.parametrize("schema", FINE, ids=range(len(FINE)))
@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
def test_what_is_fine_is_sent_byte_for_byte(face, schema):
    tool = {"type": "function", "name": "f", "parameters": schema}
    prompt = read_prompt(face, request(face, tools=[tool]))
    assert prompt.notes == []
    for upstream in (ccproxy.ALPHA, ccproxy.OPENAI, ccproxy.ANTHROPIC):
        assert json.dumps(schema, separators=(",", ":")).encode() in upstream.build(prompt, "s")
    assert prompt.notes == []


# Changed: (schema, what is sent, words of each note).

TOPS = [
    ({}, EMPTY, ["type made object", "properties added"]),
    ({"type": "object"}, EMPTY, ["properties added"]),
    ({"properties": {"x": STRING}}, {"type": "object", "properties": {"x": STRING}},
     ["type made object"]),
    ({"type": None, "properties": {"x": STRING}}, {"type": "object", "properties": {"x": STRING}},
     ["type made object"]),
    ({"type": ["object", "null"], "properties": {"x": STRING}},
     {"type": "object", "properties": {"x": STRING}}, ["type made object"]),
    ({"type": ["null", "object"]}, EMPTY, ["type made object", "properties added"]),
    ({"type": "object", "properties": None}, EMPTY, ["properties added"]),
    ({"type": "object", "properties": [], "required": ["x"]}, {**EMPTY, "required": ["x"]},
     ["properties added"]),
    ({"type": "object", "additionalProperties": STRING},
     {"type": "object", "additionalProperties": STRING, "properties": {}}, ["properties added"]),
    ({"$schema": "http://json-schema.org/draft-07/schema#", **A}, A, [])] + [
    (given, EMPTY, ["made an object"]) for given in (
        True, False, [], [A], "object", 5, {"type": "string"}, {"type": "array", "items": A},
        {"type": ["string", "null"]}, {"type": []}, {"type": 5}, {"type": {}})]
UNIONS = [
    ({"type": "object", "anyOf": [A, B]}, {"type": "object", "properties": AB}, ["anyOf"]),
    ({"anyOf": [A, B]}, {"type": "object", "properties": AB}, ["anyOf", "type made object"]),
    ({"oneOf": [A, {**B, "required": ["y", "x"]}], "type": "object"},
     {"type": "object", "properties": AB, "required": ["x"]}, ["oneOf"]),
    ({"type": "object", "allOf": [A, B]},
     {"type": "object", "properties": AB, "required": ["x", "y"]}, ["allOf"]),
    ({**A, "allOf": [B]}, {**A, "properties": AB, "required": ["x", "y"]}, ["allOf"]),
    ({**A, "anyOf": [B, EMPTY]}, {**A, "properties": AB}, ["anyOf"]),
    ({**A, "anyOf": [{"required": ["x"]}, {"required": ["y"]}]}, A, ["anyOf"]),
    ({**A, "additionalProperties": False, "oneOf": [{"properties": {"x": NUMBER}}, B]},
     {**A, "additionalProperties": False, "properties": AB}, ["oneOf"]),
    ({"type": "object", "anyOf": [A, {**A, "properties": {"x": NUMBER}}, A]},
     {"type": "object", "properties": {"x": {"anyOf": [STRING, NUMBER]}}, "required": ["x"]},
     ["anyOf"]),
    ({"type": "object", "anyOf": [{"anyOf": [A, B]}, {"allOf": [A, B]}]},
     {"type": "object", "properties": AB}, ["anyOf"]),
    ({"type": "object", "anyOf": [A, {"type": "null"}, True, 5]}, A, ["anyOf"]),
    ({"type": "object", "anyOf": [STRING]}, EMPTY, ["anyOf"]),
    ({"type": "object", "anyOf": 5}, EMPTY, ["anyOf"]),
    ({**A, "not": {"required": ["y"]}, "enum": [{}]}, A, ["not, enum"])]
REFERENCES = [
    ({**REF, "$defs": {"A": A}}, {**A, "$defs": {"A": A}}, ["$ref"]),
    ({"$ref": "#/definitions/a~1b~0c", "definitions": {"a/b~c": {**A, "title": "T"}}},
     {**A, "title": "T", "definitions": {"a/b~c": {**A, "title": "T"}}}, ["$ref"]),
    ({"anyOf": [REF, {"$ref": "#/$defs/B"}], "$defs": {"A": A, "B": B}, "type": "object"},
     {"type": "object", "$defs": {"A": A, "B": B}, "properties": AB}, ["anyOf"]),
    ({**A, "$ref": "#"}, A, ["$ref"]),
    ({**A, "$ref": "#/$defs/none"}, A, ["$ref"]), ({**A, "$ref": "https://x.test/y"}, A, ["$ref"]),
    ({**A, "$ref": 5}, A, ["$ref"]), ({**A, "$ref": "#/$defs/" + "x" * 2000}, A, ["$ref"]),
    ({**A, "$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
     {**A, "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, ["$ref"]),
    ({"type": "object", "anyOf": [A, {"properties": {"z": {"$ref": "#/anyOf/0/properties/x"}}}]},
     {"type": "object", "properties": {
         "x": STRING, "z": {"$ref": "#/$defs/anyOf_0/properties/x"}},
      "$defs": {"anyOf_0": A, "anyOf_1": {"properties": {
          "z": {"$ref": "#/$defs/anyOf_0/properties/x"}}}}}, ["anyOf"])]
CHANGED = TOPS + UNIONS + REFERENCES


@pytest.mark.parametrize("schema,sent,changes", CHANGED, ids=range(len(CHANGED)))
def test_a_top_made_one_object(schema, sent, changes):
    given, noted = read(schema)
    assert given == sent and len(noted) == len(changes)
    assert all(one in note for one, note in zip(changes, noted))
    assert read(given) == (given, []), "what was sent is fine"


INSIDE = [
    ({"type": "array"}, {"type": "array", "items": {}}, ["items added"]),
    ({"type": "array", "items": None}, {"type": "array", "items": {}}, ["items added"]),
    ({"type": ["array", "null"]}, {"type": ["array", "null"], "items": {}}, ["items added"]),
    ({"type": "array", "prefixItems": [STRING]},
     {"type": "array", "prefixItems": [STRING], "items": {}}, ["items added"]),
    ({"type": "array", "items": [STRING, NUMBER]},
     {"type": "array", "items": {"anyOf": [STRING, NUMBER]}}, ["list of items"]),
    ({"items": [STRING]}, {"items": {"anyOf": [STRING]}}, ["list of items"]),
    ({"type": "array", "items": []}, {"type": "array", "items": {}}, ["list of items"]),
    ({"type": "array", "items": {"type": "array"}},
     {"type": "array", "items": {"type": "array", "items": {}}}, ["items added"]),
    ({"minimum": 5, "exclusiveMinimum": True}, {"exclusiveMinimum": 5}, ["exclusiveMinimum"]),
    ({"minimum": 5, "exclusiveMinimum": False}, {"minimum": 5}, ["exclusiveMinimum"]),
    ({"exclusiveMinimum": True}, {}, ["exclusiveMinimum"]),
    ({"maximum": 5, "exclusiveMaximum": True, "minimum": 1},
     {"exclusiveMaximum": 5, "minimum": 1}, ["exclusiveMaximum"]),
    ({"minimum": 1, "exclusiveMinimum": True, "maximum": 9, "exclusiveMaximum": True},
     {"exclusiveMinimum": 1, "exclusiveMaximum": 9}, ["exclusiveMinimum", "exclusiveMaximum"])]
PLACES = [lambda one: {**EMPTY, "additionalProperties": one}, lambda one: {**EMPTY, "allOf": [
    {"properties": {"x": one}}]}, lambda one: {**EMPTY, "$defs": {"a": {"not": one}}},
    lambda one: {**EMPTY, "patternProperties": {"": {"if": {}, "then": one}}}]


@pytest.mark.parametrize("schema,sent,changes", INSIDE, ids=range(len(INSIDE)))
def test_schemas_inside(schema, sent, changes):
    given, noted = read(nest(schema))
    assert nested_in(given) == sent and given == nest(sent) and len(noted) == len(changes)
    assert all(one in note for one, note in zip(changes, noted))
    assert list(given) == list(nest(schema))
    for place in PLACES:
        assert read(place(schema))[0] == read(place(sent))[0]


def test_each_change_is_noted_once_with_its_tool():
    _, notes = translate("chat", request("chat", tools=[
        {"type": "function", "function": {"name": "f", "parameters": nest({"type": "array"})}},
        {"type": "function", "function": {"name": "g", "parameters": {
            "type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "array"}}}}},
        {"type": "function", "function": {"name": "fine", "parameters": A}}]))
    assert notes == ["schema=of tool f: items added to an array",
                     "schema=of tool g: items added to an array"]


# Lists of types, for Gemini alone.

SINGLE_TYPES = [
    ({"type": ["string", "null"]}, {"anyOf": [STRING, {"type": "null"}]}),
    ({"type": ["string"]}, STRING), ({"type": ["null"]}, {"type": "null"}),
    ({"type": ["string", "number", "null"], "description": "d"},
     {"anyOf": [STRING, NUMBER, {"type": "null"}], "description": "d"}),
    ({"type": "object", "properties": {"type": {"type": ["integer", "null"]}}},
     {"type": "object", "properties": {"type": {"anyOf": [{"type": "integer"},
                                                          {"type": "null"}]}}}),
    ({"type": ["string", "null"], "anyOf": [STRING, {"type": "null"}]},
     {"anyOf": [STRING, {"type": "null"}]}),
    ({"type": "array", "items": {"type": ["string", "null"]}},
     {"type": "array", "items": {"anyOf": [STRING, {"type": "null"}]}}),
    ({"enum": ["a", None]}, {"enum": ["a", None]}), (STRING, STRING), ({"type": []}, {"type": []}),
    ({"default": {"type": ["a", "b"]}}, {"default": {"type": ["a", "b"]}})]


@pytest.mark.parametrize("schema,sent", SINGLE_TYPES, ids=range(len(SINGLE_TYPES)))
def test_lists_of_types_for_gemini_alone(schema, sent):
    tools = [{"name": "f", "input_schema": {"type": "object", "properties": {"x": schema}}}]
    for model, shown in (("google/gemini-3.8-flash", sent), ("vendor/other", schema)):
        prompt = read_prompt("messages", request("messages", model=model, tools=tools))
        alpha = json.loads(ccproxy.build_alpha(prompt, "s"))["params"]["tools"]
        openai = json.loads(ccproxy.build_openai(prompt, "s"))["tools"]
        assert at(alpha, "0.input_schema.properties.x") == shown
        assert at(openai, "0.function.parameters.properties.x") == shown
        assert has_note(prompt.notes, "schema=of tool f: lists of types") == (shown != schema)


# Hostile schemas: what they cost is bounded, whatever is left out is told.

@pytest.mark.parametrize("width,depth,told", [
    (2, 40, False), (100, 40, True), (100, 2, True), (20, 2, False)])
def test_unions_that_multiply_at_every_step(width, depth, told):
    levels = {"d%d" % n: {"anyOf": [{"$ref": "#/$defs/d%d" % (n + 1)}] * width}
              for n in range(depth)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**levels, "d%d" % depth: A}}
    sent, noted = read(schema)
    assert sent["type"] == "object" and has_note(noted, "left out what is beyond") == told
    assert len(json.dumps(sent)) < 2 * len(json.dumps(schema))


def test_all_tools_of_a_request_share_what_may_be_looked_at():
    ref = {"$ref": "#/$defs/a"}
    schema = {"anyOf": [ref] * 60, "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/A"}] * 60},
                                             "A": A}}
    tools = [{"name": "f%d" % n, "input_schema": schema} for n in range(3)]
    _, notes = translate("messages", request("messages", tools=tools))
    assert [has_note(notes, "f%d: left out" % n) for n in range(3)] == [False, True, True]


def test_a_schema_that_refers_to_itself():
    tree = {"type": "object", "properties": {"inner": {"type": "array", "items": {"$ref": "#"}}},
            "required": ["inner"]}
    assert read(tree) == (tree, [])
    assert read({**tree, "anyOf": [{"$ref": "#"}, A]})[0] == {
        **tree, "properties": {**tree["properties"], "x": STRING}}


def test_branches_that_share_one_large_schema_do_not_multiply_it():
    large = {"enum": ["x" * 100] * 1000}
    branch = {"allOf": [{"$ref": "#/$defs/A"}, {"properties": {"x": {"minLength": 1}}}]}
    schema = {"anyOf": [dict(branch) for _ in range(3000)],
              "$defs": {"A": {"properties": {"x": large}}}}
    sent, _ = read(schema)
    assert len(json.dumps(sent)) < 3 * len(json.dumps(large))


def test_depth_is_bounded():
    schema = {"type": "array"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    sent, _ = read({"type": "object", "properties": {"a": schema}})
    assert sent == {"type": "object", "properties": {"a": schema}}     # beyond: as it is
    schema = A
    for _ in range(200):
        schema = {"anyOf": [schema]}
    assert read(schema)[0] == EMPTY


def test_tools_of_every_api_share_the_rule():
    tools = [{"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}},
             {"type": "function", "name": "b", "parameters": {"anyOf": [A, B]}},
             {"name": "c", "input_schema": {}},
             {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "d",
                                                           "parameters": {"type": ["object"]}}]}]
    for face in ("chat", "messages", "responses"):
        for tool in params_of(face, request(face, tools=tools))["tools"]:
            assert tool["input_schema"]["type"] == "object"
            assert isinstance(tool["input_schema"]["properties"], dict)
    old = request("chat", functions=[{"name": "f", "parameters": {"type": "object"}}])
    assert params_of("chat", old)["tools"][0]["input_schema"] == EMPTY
