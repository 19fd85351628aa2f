"""JSON FILES: entries set and removed, all others, their order and their indentation kept."""
from __future__ import annotations

import json
import random
import re

import pytest
from harness import ccproxy

GONE = ccproxy.ENTRY_GONE


def edit(text, entries):
    return ccproxy.edit_json(text, entries, "f")


@pytest.mark.parametrize("text, entries, expected", [
    ("", {("a",): 1}, '{\n  "a": 1\n}\n'),
    ("{}", {("a",): 1}, '{\n  "a": 1\n}\n'),
    ("{}\n", {("a", "b"): "x"}, '{\n  "a": {\n    "b": "x"\n  }\n}\n'),
    ('{"b": 1}', {("a",): [1, 2]}, '{"b": 1, "a": [1, 2]}\n'),
    ('{"b":1, "c":2}', {("a",): 3}, '{"b": 1, "c": 2, "a": 3}\n'),
    ('{\n    "b": 1\n}\n', {("a",): {"x": {}}},
     '{\n    "b": 1,\n    "a": {\n        "x": {}\n    }\n}\n'),
    ('{\n\t"b": 1\n}', {("a",): [1]}, '{\n\t"b": 1,\n\t"a": [\n\t\t1\n\t]\n}\n'),
    ('{\r\n  "b": 1\r\n}\r\n', {("a",): 2}, '{\r\n  "b": 1,\r\n  "a": 2\r\n}\r\n'),
    ('{"a" : 1 , "b":2}', {("a",): "\u00e9"}, '{"a": "\u00e9", "b": 2}\n'),
    ('{"a":1,"a":2}', {("a",): 3}, '{"a": 3}\n'),
    ('{"e": {"x": 1}, "b": 2}', {("e", "y"): 2, ("e", "x"): GONE}, '{"e": {"y": 2}, "b": 2}\n'),
    ('{\n  "a": {},\n  "b": 1\n}', {("a", "x"): 1},
     '{\n  "a": {\n    "x": 1\n  },\n  "b": 1\n}\n'),
    ('{"a": 1, "b": 2}', {("a",): GONE}, '{"b": 2}\n'),
    ('{"a": 1, "b": 2}', {("b",): GONE}, '{"a": 1}\n'),
    ('{ "a": 1 }', {("a",): GONE}, "{}\n"),
    ('{"a": 1}', {("b",): GONE, ("c", "d"): GONE}, '{"a": 1}\n'),
    ('{"a": "}{,\\"", "b": [{"a": 1}]}', {("b",): 1}, '{"a": "}{,\\"", "b": 1}\n'),
    ('{"a": "\\ud800 \u00e9"}', {("b",): 1}, '{"a": "\\ud800 \\u00e9", "b": 1}\n')])
def test_entries_are_set_and_the_others_kept(text, entries, expected):
    assert edit(text, entries) == expected


@pytest.mark.parametrize("text, told", [
    ("{", "not JSON"), ("[]", "one JSON object"), ('{"a": 1,}', "not JSON"),
    ('// comment\n{"a": 1}', "not JSON"), ('{"a": 1 /* c */}', "not JSON"), ("nul", "not JSON"),
    ("[" * 100_000, "is not (usable|JSON)"),        # as far as this Python's stack lets it look
    ('{"a": "x"}', "a is not an object"), ('{"a": {}, "c": 1e400}', "cannot be written again")])
def test_what_cannot_be_kept_is_refused(text, told):
    with pytest.raises(ccproxy.ProxyError) as raised:
        edit(text, {("a", "b"): 1})
    assert re.search(told, raised.value.message) and raised.value.message.startswith("f: ")


@pytest.mark.parametrize("depth", [300, 800, 990, 1500, 5000, 30_000])
def test_deep_nesting_is_kept_or_refused(depth):
    text = '{\n "a": %s1%s\n}' % ("[" * depth, "]" * depth)
    try:
        changed = edit(text, {("b",): 1})
    except ccproxy.ProxyError as error:
        assert error.kind == "config"
    else:
        assert changed.count("[") == depth


def random_value(chance, depth=3):
    if not depth or chance.random() < 0.5:
        return chance.choice([None, True, 1.5, -3, "", "a\"b\\", "\u4e16{}[],:\n"])
    if chance.random() < 0.5:
        return [random_value(chance, depth - 1) for _ in range(chance.randrange(3))]
    return random_object(chance, depth - 1)


def random_object(chance, depth=3):
    return {chance.choice("abcde\u00e9\"{,"): random_value(chance, depth)
            for _ in range(chance.randrange(1, 5))}


def random_text(chance):
    value = random_object(chance)
    return value, json.dumps(value, indent=chance.choice([None, 1, 2, 4, "\t"]),
                             ensure_ascii=chance.random() < 0.5,
                             separators=chance.choice([(",", ":"), (" , ", " : ")]))


@pytest.mark.parametrize("seed", range(150))
def test_an_edited_text_means_what_an_edited_object_does(seed):
    chance = random.Random(seed)
    value, text = random_text(chance)
    path = tuple(chance.sample("abcx", chance.randrange(1, 3)))
    if path[1:] and not isinstance(value.get(path[0], {}), dict):
        path = path[:1]
    new = random_value(chance)
    changed = edit(text, {path: new})
    held = value.setdefault(path[0], {}) if path[1:] else value
    existed = path[-1] in held
    held[path[-1]] = new
    assert json.loads(changed) == value
    if not existed:     # what was added and taken out leaves no trace
        before = json.loads(text)
        again = ccproxy.restore_json(changed, text, [path], "f")
        assert json.loads(again) == before and again == text
    del held[path[-1]]
    assert json.loads(edit(changed, {path: GONE})) == value


def test_an_object_that_is_gone_since_is_not_made_again():
    before = '{"env": {"MINE": "1"}}'
    after = edit(before, {("env", "NEW"): 2, ("top",): 3})
    assert ccproxy.restore_json('{"other": 1}', before, [("env", "NEW"), ("top",)], "f") == (
        '{"other": 1}\n') and json.loads(after)["top"] == 3


def test_a_half_of_a_surrogate_pair_comes_back():
    before = '{"a": "\\ud800"}'
    text = ccproxy.restore_json('{"a": 1, "b": "\u00e9"}', before, [("a",)], "f")
    assert text.encode() and json.loads(text) == {"a": "\ud800", "b": "\u00e9"}


def test_what_others_changed_since_is_kept():
    before = '{"env": {"MINE": "1", "OURS": "was"}, "top": 1}'
    paths = [("env", "OURS"), ("env", "NEW"), ("provider", "ours")]
    after = edit(before, {("env", "OURS"): "is", ("env", "NEW"): 2, ("provider", "ours"): {}})
    changed = edit(after, {("theme",): "dark", ("env", "MINE"): "2"})
    assert json.loads(ccproxy.restore_json(changed, before, paths, "f")) == {
        "env": {"MINE": "2", "OURS": "was"}, "top": 1, "theme": "dark"}
    assert ccproxy.restore_json(after, before, paths, "f") == before
    assert ccproxy.restore_json(edit("", {("env", "NEW"): 2}), "", paths, "f") == ""
