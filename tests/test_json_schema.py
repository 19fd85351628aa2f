"""JSON SCHEMA: what is valid under a schema, in which words a violation is told, and what a hostile
schema may cost."""
from __future__ import annotations

import json
import types

import pytest
from harness import ccproxy


def violation(schema, value):
    return ccproxy.find_violation(json.dumps(value), schema)


# (schema, a valid value or more)

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {
    "type": "integer", "minimum": 0}}, "required": ["name"], "additionalProperties": False}
TREE = {"$defs": {"node": {"type": "object", "required": ["value"], "properties": {
    "value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"},
                                                     {"type": "null"}]}}}},
        "$ref": "#/$defs/node"}
VALID = [
    ({}, [None, 1, "x", [], {}]), (True, [None, {"a": 1}]), (None, [1, []]),
    ({"type": "object"}, [{}, {"a": 1}]), ({"type": "array"}, [[], [1]]),
    ({"type": "string"}, ["", "x"]), ({"type": "null"}, [None]),
    ({"type": "boolean"}, [True, False]), ({"type": "number"}, [0, -1, 1.5, 1e300]),
    ({"type": "integer"}, [0, -5, 10 ** 30, 2.0]), ({"type": ["string", "null"]}, ["x", None]),
    ({"type": "wibble"}, [1]), ({"enum": ["a", 1, None, [1], {"a": 1}]},
                                ["a", 1, 1.0, None, [1], {"a": 1}]),
    ({"const": "a"}, ["a"]), ({"const": None}, [None]), ({"const": [1, {"a": 2}]},
                                                         [[1, {"a": 2}]]),
    ({"minimum": 1, "maximum": 3}, [1, 2, 3, 1.5, "not a number"]),
    ({"exclusiveMinimum": 1, "exclusiveMaximum": 3}, [2, 1.01]),
    ({"minLength": 2, "maxLength": 3}, ["ab", "abc", "\U0001f680\U0001f680", 5]),
    ({"minItems": 1, "maxItems": 2}, [[1], [1, 2], "abc"]),
    ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}, []]),
    ({"required": ["a"]}, [{"a": None}, "no object"]),
    (PERSON, [{"name": "x"}, {"name": "x", "age": 0}]),
    ({"additionalProperties": {"type": "integer"}}, [{}, {"a": 1}]),
    ({"properties": {"a": False}}, [{}, {"b": 1}]),
    ({"items": {"type": "integer"}}, [[], [1, 2]]),
    ({"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}, [["a"], ["a", 1]]),
    ({"prefixItems": [{"type": "string"}]}, [["a", None], []]),
    ({"prefixItems": [{}], "items": False}, [[1], []]),
    ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, [1, 3]),
    ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, ["x", 5]),
    ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ["x", 1]),
    ({"not": {"type": "string"}}, [1, None]), ({"not": {"enum": ["a"]}}, ["b"]),
    (TREE, [{"value": 1}, {"value": 1, "next": {"value": 2, "next": None}}]),
    ({"properties": {"a/b~c": {"type": "string"}}, "required": ["a/b~c"], "allOf": [
        {"properties": {"d": {"$ref": "#/properties/a~1b~0c"}}}]}, [{"a/b~c": "x", "d": "y"}]),
    ({"definitions": {"x": {"type": "string"}}, "items": {"$ref": "#/definitions/x"}}, [["a"]]),
    ({"$ref": "#/nowhere"}, [1]), ({"$ref": "https://x.test/schema"}, [1]),
    ({"title": "T", "description": "d", "default": 1, "examples": [2], "$schema": "x",
      "$comment": "c", "format": "date", "pattern": "^a$", "uniqueItems": True,
      "contains": {"type": "null"}, "wibble": 5}, ["x", [1, 1], {}]),
    ({"patternProperties": {"^x": {}}, "additionalProperties": False}, [{"x1": 1}])]


@pytest.mark.parametrize("schema,values", VALID, ids=range(len(VALID)))
def test_valid(schema, values):
    assert [violation(schema, value) for value in values] == [None] * len(values)


# (schema, value, words of the violation: the path first)

INVALID = [
    (False, 1, "$ must not be there"),
    ({"type": "object"}, [], "$ must be of type object"),
    ({"type": "array"}, {}, "$ must be of type array"), ({"type": "string"}, 5, "type string"),
    ({"type": "null"}, 0, "type null"), ({"type": "boolean"}, 1, "type boolean"),
    ({"type": "number"}, True, "type number"), ({"type": "number"}, "1", "type number"),
    ({"type": "integer"}, 1.5, "type integer"), ({"type": "integer"}, False, "type integer"),
    ({"type": ["string", "null"]}, 5, "type string or null"),
    ({"enum": ["a", "b"]}, "c", '$ must be one of ["a", "b"]'), ({"enum": []}, 1, "one of []"),
    ({"enum": [1]}, True, "one of [1]"), ({"enum": [0]}, False, "one of [0]"),
    ({"const": "a"}, "b", '$ must be "a"'), ({"const": None}, 0, "$ must be null"),
    ({"const": 1}, True, "$ must be 1"), ({"enum": [[1]]}, [True], "one of"),
    ({"const": {"a": 0}}, {"a": False}, "must be"),
    ({"minimum": 1}, 0, "$ must be at least 1"), ({"maximum": 3}, 3.5, "$ must be at most 3"),
    ({"exclusiveMinimum": 1}, 1, "$ must be above 1"),
    ({"exclusiveMaximum": 3}, 3, "$ must be below 3"),
    ({"minLength": 2}, "a", "length at least 2"), ({"maxLength": 1}, "ab", "length at most 1"),
    ({"minItems": 1}, [], "length at least 1"), ({"maxItems": 1}, [1, 2], "length at most 1"),
    ({"minProperties": 1}, {}, "size at least 1"), ({"maxProperties": 0}, {"a": 1}, "at most 0"),
    (PERSON, {}, '$ lacks the member "name"'),
    (PERSON, {"name": 5}, "$.name must be of type string"),
    (PERSON, {"name": "x", "age": -1}, "$.age must be at least 0"),
    (PERSON, {"name": "x", "more": 1}, "$.more must not be there"),
    ({"additionalProperties": {"type": "integer"}}, {"a": "x"}, "$.a must be of type integer"),
    ({"properties": {"a": False}}, {"a": 1}, "$.a must not be there"),
    ({"items": {"type": "integer"}}, [1, "x"], "$[1] must be of type integer"),
    ({"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}, ["a", "b"], "$[1] must"),
    ({"prefixItems": [{}], "items": False}, [1, 2], "$[1] must not be there"),
    ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, 4, "$ must be at most 3"),
    ({"anyOf": [{"type": "string"}, {"minimum": 5}]}, 4, "none of anyOf: $ must be of type string"),
    ({"oneOf": [{"type": "string"}, {"type": "null"}]}, 4, "none of oneOf"),
    ({"oneOf": [{"minimum": 1}, {"minimum": 2}]}, 3, "more than one of oneOf"),
    ({"not": {"type": "string"}}, "x", "`not`"), ({"not": {}}, 1, "`not`"),
    (TREE, {"value": 1, "next": {"value": "x"}}, "$.next fits none of anyOf: $.next.value must"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}, "minLength": 2}, "a", "at least 2"),
    ({"properties": {"a": {"items": {"properties": {"b": {"enum": ["x"]}}}}}},
     {"a": [{"b": "x"}, {"b": "y"}]}, "$.a[1].b must be one of")]


@pytest.mark.parametrize("schema,value,words", INVALID, ids=range(len(INVALID)))
def test_violations(schema, value, words):
    found = violation(schema, value)
    assert found is not None and words in found


# What cannot be judged is never a violation: (schema, values).

ANCHORED = {"$defs": {"a": {"$anchor": "name", "type": "integer"}}, "type": "string"}
EMBEDDED = {"$id": "https://x.test/root", "$defs": {
    "b": {"type": "integer"}, "a": {"$id": "a", "$defs": {"b": {"type": "string"}},
                                    "properties": {"x": {"$ref": "#/$defs/b"}}}},
    "properties": {"y": {"$ref": "#/$defs/a"}, "z": {"$ref": "#/$defs/b"}}}
UNKNOWN = [     # a schema under which nothing is known of 1, nor of "x"
    {"pattern": "^a"}, {"format": "date"}, {"patternProperties": {"a": {}}}, {"uniqueItems": True},
    {"contains": {"type": "null"}}, {"multipleOf": 2}, {"propertyNames": {"maxLength": 1}},
    {"dependentRequired": {"a": ["b"]}}, {"unevaluatedProperties": False}, {"additionalItems": {}},
    {"if": {"type": "string"}, "then": False, "else": False}, {"$dynamicRef": "#node"},
    {"$recursiveRef": "#"}, {"wibble": 5}, {"$ref": "#name"}, {"$ref": "#/nowhere"},
    {"$ref": "other.json"}, {"$ref": "https://x.test/schema"}, {"$ref": 5}, {"type": "wibble"},
    {"type": []}, {"type": 5}, {"type": ["wibble", "object"]}, {"minimum": "5"},
    {"minimum": True}, {"required": True}, {"required": "name"}, {"properties": ["a"]},
    {"items": [{"type": "string"}]}, {"enum": 5}, {"allOf": {"a": 1}}, {"anyOf": [5]},
    {"not": 5}, {"not": {"pattern": "^a"}}, {"not": {"not": {"format": "date"}}},
    {"oneOf": [{"pattern": "^a"}, {"pattern": "^b"}]}, {"allOf": [{}, {"format": "date"}]}, 5,
    None, "x", []]


@pytest.mark.parametrize("under", UNKNOWN, ids=range(len(UNKNOWN)))
def test_what_cannot_be_judged_is_no_violation(under):
    for value in (1, "x"):
        for schema in (under, {"not": under}, {"oneOf": [under, {}]}, {"oneOf": [under] * 3},
                       {"anyOf": [{"type": "null"}, under]}, {"not": {"not": under}},
                       {"not": {"anyOf": [under, {"type": "null"}]}}, {"not": {"allOf": [under]}}):
            assert violation(schema, value) is None, schema
    for schema in ({"properties": {"a": under}}, {"not": {"properties": {"a": under}}},
                   {"items": {"not": under}}, {"not": {"additionalProperties": under}}):
        assert violation(schema, {"a": 1}) is None, schema
    assert violation({"not": {"items": under}}, [1]) is None


STILL_JUDGED = [    # (schema, value, words): what is certain beside what is not
    ({"pattern": "^a", "maxLength": 1}, "abc", "at most 1"), ({"not": {"type": "string"},
                                                             "format": "date"}, "x", "`not`"),
    ({"oneOf": [{"pattern": "^a"}, {}, {"type": "string"}]}, "x", "more than one"),
    ({"anyOf": [{"type": "null", "format": "x"}, {"enum": [5]}]}, "x", "none of anyOf"),
    ({"$ref": "#name", "type": "integer"}, "x", "type integer"),
    ({"allOf": [{"pattern": "^a"}, {"type": "integer"}]}, "x", "type integer"),
    ({"patternProperties": {"^x": {}}, "required": ["a"]}, {}, 'lacks the member "a"'),
    ({"items": {"anyOf": [{"$ref": "#name"}, {}]}, "maxItems": 1}, [1, 2], "at most 1"),
    ({"properties": {"a": {"if": {}, "then": False}, "b": {"type": "null"}}}, {"a": 1, "b": 1},
     "$.b must be of type null"), ({"type": "string"}, None, "type string"),
    (EMBEDDED, {"y": {"x": 1}}, "$.y.x must be of type string"),
    (EMBEDDED, {"z": "a"}, "$.z must be of type integer"),
    ({"$defs": {"a b": {"type": "null"}}, "$ref": "#/$defs/a%20b"}, 1, "type null")]


@pytest.mark.parametrize("schema,value,words", STILL_JUDGED, ids=range(len(STILL_JUDGED)))
def test_what_is_certain_is_still_a_violation(schema, value, words):
    assert words in violation(schema, value)


@pytest.mark.parametrize("schema,value", [
    (ANCHORED, "x"), ({**ANCHORED, "$ref": "#name"}, "x"),
    ({"not": {"$ref": "#name"}, "$defs": ANCHORED["$defs"]}, "x"), (EMBEDDED, {"y": {"x": "s"}}),
    (EMBEDDED, {"z": 1}), ({"type": "string", "nullable": True}, None)])
def test_names_and_relative_references(schema, value):
    assert violation(schema, value) is None


RUN_OUT = [     # (schema, value): valid, and too long to be judged
    ({"not": {"items": {"type": "integer"}}}, [1] * 50_000 + ["x"]),
    ({"oneOf": [{"items": {"type": "string"}}, {"items": {"type": "integer"}}]},
     ["x"] * 50_000 + [1]),
    ({"oneOf": [{"items": {"type": "integer"}}, {"contains": {}}]}, [1] * 50_000),
    ({"not": {"$ref": "#/$defs/a"}, "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, 1),
    ({"items": {"not": {"const": "y"}}}, ["x"] * 50_000)]


@pytest.mark.parametrize("schema,value", RUN_OUT, ids=range(len(RUN_OUT)))
def test_steps_that_run_out_are_no_violation(schema, value):
    assert violation(schema, value) is None


NOT_JSON = ["", "x", "{", '{"a":1}}', "{'a':1}", "[1,]", "NaN", "[Infinity]", "```json\n{}\n```",
            "[" * 100_000]


@pytest.mark.parametrize("text", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_not_json_is_a_violation(text):
    for schema in (None, {}, {"type": "object"}):
        assert "not JSON" in ccproxy.find_violation(text, schema)


# Whatever stands in a schema, checking never raises.

KEYWORDS = ["type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
            "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
            "required", "properties", "additionalProperties", "items", "prefixItems", "allOf",
            "anyOf", "oneOf", "not", "$ref", "$defs", "pattern", "format"]
ODD = [None, True, False, 0, -1, 1.5, 1e308, "", "x", "#", "#/a/0", [], [None], [5], ["x"], [[]],
       [{}], {}, {"a": 5}, {"type": {}}, [{"type": [[]]}]]
VALUES = [None, True, 1, 1.5, 1e300, "x", [], [1, "a", None], {"a": 1, "b": {"c": []}}]


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_odd_keywords_never_raise(keyword):
    for odd in ODD:
        for schema in ({keyword: odd}, {"items": {keyword: odd}},
                       {"properties": {"a": {keyword: odd}}},
                       {"anyOf": [{keyword: odd}, {"type": "null"}]}):
            for value in VALUES:
                found = violation(schema, value)
                assert found is None or found.startswith("$")


@pytest.mark.parametrize("text", ["1e999", "-1e999", "[1e999]", '{"a":1e999}'])
def test_endless_numbers_never_raise(text):
    for schema in ({"type": "integer"}, {"items": {"type": "integer"}}, {"maximum": 5},
                   {"additionalProperties": {"const": 1}}):
        assert ccproxy.find_violation(text, schema) is None or "$" in ccproxy.find_violation(
            text, schema)


@pytest.mark.parametrize("schema", [5, "x", [], [1]])
def test_a_schema_that_is_none_holds(schema):
    assert violation(schema, {"a": 1}) is None


# What a hostile schema costs.

def deep(keyword, levels):
    schema = {"type": "object"}
    for _ in range(levels):
        schema = {keyword: [schema] if keyword in ("allOf", "anyOf", "oneOf") else schema}
    return schema


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


HOSTILE = [     # (schema, value)
    ({"$ref": "#"}, 1), ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, 1),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, 1),
    ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, 1), ({"oneOf": [{"$ref": "#"}] * 9}, 1),
    ({"allOf": [{"$ref": "#"}] * 9}, 1), ({"not": {"$ref": "#"}}, 1),
    ({"properties": {"a": {"$ref": "#"}}}, nested(400)),
    (deep("allOf", 400), {}), (deep("not", 400), {}),
    ({"anyOf": [{"type": "null"}] * 50_000}, 1),
    ({"items": {"anyOf": [{"type": "null"}] * 1000}}, [1] * 1000),
    ({"items": {"type": "integer"}}, [1] * 100_000),
    ({"$defs": dict(("a%d" % n, {"allOf": [{"$ref": "#/$defs/a%d" % (n + 1)}] * 2})
                    for n in range(60)), "$ref": "#/$defs/a0"}, 1)]


@pytest.mark.parametrize("schema,value", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_schemas_cost_bounded_steps(schema, value, monkeypatch):
    taken, check_type = [], ccproxy.check_type

    def count(*arguments):
        taken.append(1)
        return check_type(*arguments)

    monkeypatch.setattr(ccproxy, "CHECKS", (count,) + ccproxy.CHECKS[1:])
    ccproxy.find_violation(json.dumps(value), schema)
    assert 0 < len(taken) <= ccproxy.MAX_SCHEMA_STEPS


COMPARED = [    # (schema, value): comparisons are work too
    ({"items": {"enum": list(range(1000))}}, [-1.5] * 2),
    ({"items": {"not": {"enum": list(range(1000))}}}, [-1] * 1000)]


@pytest.mark.parametrize("schema,value", COMPARED, ids=range(len(COMPARED)))
def test_comparisons_are_bounded(schema, value, monkeypatch):
    compared, same_value = [], ccproxy.same_value

    def count(one, other):
        compared.append(1)
        return same_value(one, other)

    monkeypatch.setattr(ccproxy, "same_value", count)
    ccproxy.find_violation(json.dumps(value), schema)
    assert 0 < len(compared) <= 10 * ccproxy.MAX_SCHEMA_STEPS


@pytest.mark.parametrize("schema", [
    {"items": {"not": {"const": ["x" * 100] * 1000}}},
    {"items": {"anyOf": [{"enum": [["x" * 1000] * 100]}, {}]}}])
def test_violations_that_nobody_is_told_are_seldom_written(schema, monkeypatch):
    written, dumps = [], json.dumps

    def count(value):
        written.append(dumps(value))
        return written[-1]

    text = json.dumps([1] * 10_000)
    monkeypatch.setattr(ccproxy, "json", types.SimpleNamespace(dumps=count))
    assert ccproxy.find_violation(text, schema) is None
    assert 0 < sum(map(len, written)) < 200 * ccproxy.MAX_SCHEMA_STEPS


class Watched(list):
    """A list that counts how many of its items were looked at."""

    looked = 0

    def __iter__(self):
        for item in super().__iter__():
            Watched.looked += 1
            yield item


LISTS = [       # what a list or a reference of the schema may cost at each of its uses
    {"items": {"$ref": "#/anyOf/3"}, "anyOf": Watched([{}] * 50_000)},
    {"items": {"type": Watched(["string", "object"] * 50_000)}},
    {"items": {"required": Watched(["a"] * 100_000)}}, {"items": {"$ref": "#" + "/a" * 500_000}}]


@pytest.mark.parametrize("schema", LISTS, ids=range(len(LISTS)))
def test_long_lists_and_references_are_looked_at_seldom(schema, monkeypatch):
    Watched.looked, used = 0, []
    monkeypatch.setattr(ccproxy, "unquote", lambda text: used.append(len(text)) or text)
    ccproxy.find_violation(json.dumps([{"a": 1}] * 10_000), schema)
    assert Watched.looked + sum(used) < 30 * ccproxy.MAX_SCHEMA_STEPS


def test_a_long_violation_is_told_short():
    assert len(violation({"enum": ["x" * 1000] * 100}, 1)) < 400


@pytest.mark.parametrize("step", ["\u00b2", "\u0663", "9" * 5000, "-1", "+1", "01", "1_0", " 1"])
def test_only_plain_numbers_point_into_lists(step):
    """No odd digit raises, none is taken for an index."""
    assert ccproxy.resolve_reference("#/anyOf/" + step, {"anyOf": [{}] * 20}) is True
