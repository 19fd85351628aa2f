"""TOML FILES: entries between marks, others' set aside as comments and brought back."""
from __future__ import annotations

import random

import pytest
from harness import ccproxy

try:
    import tomllib
except ImportError:         # before 3.11
    tomllib = None

TABLE = ("model_providers", "ccproxy")
ENTRIES = {("model",): "m/x", ("model_provider",): "ccproxy", ("model_context_window",): 1000,
           TABLE: {"name": "ccproxy", "base_url": "http://127.0.0.1:3000/v1"}}
NAMES = ("model", "model_provider", "model_context_window")
TOP = """# ccproxy begin
model = "m/x"
model_provider = "ccproxy"
model_context_window = 1000
# ccproxy end
"""
END = """# ccproxy begin
[model_providers.ccproxy]
name = "ccproxy"
base_url = "http://127.0.0.1:3000/v1"
# ccproxy end
"""


def edit(text):
    return ccproxy.edit_toml(text, ENTRIES, "f")


def restore(text, before):
    return ccproxy.restore_toml(text, before, list(ENTRIES), "f")


@pytest.mark.parametrize("text, body", [
    ("", "\n"), ("a = 1", "a = 1\n"), ("# only a comment\n", "# only a comment\n"),
    ('model = "mine" # best\na = 1\n', '# ccproxy set aside: model = "mine" # best\na = 1\n'),
    ('"model" = \'mine\'\n', '# ccproxy set aside: "model" = \'mine\'\n'),
    ("[t]\nmodel = 1\n", "[t]\nmodel = 1\n"),
    ('a = """\nmodel = 1\n[b]\n"""\n', 'a = """\nmodel = 1\n[b]\n"""\n'),
    ("a = '''x\nmodel = ''''\n", "a = '''x\nmodel = ''''\n"),
    ("a = [\n  [1],\n  # ]\n  '['\n]\n[t]\n", "a = [\n  [1],\n  # ]\n  '['\n]\n[t]\n"),
    ("[ model_providers . \"ccproxy\" ]\na = 1\n[x]\n",
     '# ccproxy set aside: [ model_providers . "ccproxy" ]\n# ccproxy set aside: a = 1\n[x]\n'),
    ("[model_providers.ccproxy]\na = [\n 1\n]\n[model_providers.ccproxy.headers]\nb = 1\n",
     "".join("# ccproxy set aside: %s\n" % line for line in (
         "[model_providers.ccproxy]", "a = [", " 1", "]", "[model_providers.ccproxy.headers]",
         "b = 1"))),
    ("[model_providers]\nother = {name = 'o'}\nccproxy.name = 'x'\n",
     "[model_providers]\nother = {name = 'o'}\n# ccproxy set aside: ccproxy.name = 'x'\n"),
    ("model_providers.ccproxy.name = 'x'\n",
     "# ccproxy set aside: model_providers.ccproxy.name = 'x'\n"),
    ("model.x = 1\n[model]\nb = 1\n[c]\n", "# ccproxy set aside: model.x = 1\n"
     "# ccproxy set aside: [model]\n# ccproxy set aside: b = 1\n[c]\n"),
    ("[[a.b]]\nc = 1\n[[a.b]]\n", "[[a.b]]\nc = 1\n[[a.b]]\n")])
def test_entries_stand_between_marks_and_others_aside(text, body):
    changed = edit(text)
    assert changed == TOP + body + END
    assert edit(changed) == changed
    assert restore(changed, text) == text
    if tomllib:
        found = tomllib.loads(changed)
        assert (found["model"], found["model_providers"]["ccproxy"]) == ("m/x", ENTRIES[TABLE])


def test_a_value_of_several_lines_comes_back_from_its_comment():
    before = 'model = """a\n\n\u2028b"""\n# mine\n'
    assert "# mine\n" in edit(before) and restore(edit(before), before) == before
    assert restore(edit(before) + "z = 1\n", before) == before + "z = 1\n"


def test_an_entry_that_is_not_wanted_goes_and_comes_back():
    text = "model_context_window = 5\n"
    changed = ccproxy.edit_toml(edit(text), {
        **ENTRIES, ("model_context_window",): ccproxy.ENTRY_GONE}, "f")
    assert changed == TOP.replace("model_context_window = 1000\n", "") + (
        "# ccproxy set aside: " + text) + END
    assert restore(changed, text) == text


def test_line_ends_are_kept():
    text = "a = 1\r\nmodel = 'm'\r\n[t]\r\n"
    changed = edit(text)
    assert "\n" not in changed.replace("\r\n", "") and edit(changed) == changed
    assert restore(changed, text) == text


def test_what_another_program_writes_stays_even_between_our_marks():
    before = 'model = "mine"\n'
    changed = edit(before)
    changed = changed.replace("context_window = 1000\n", "context_window = 1000\neffort = 'high'\n")
    changed = changed.replace('/v1"\n', '/v1"\n\n[projects."/x"]\ntrust = "yes"\n')
    changed = changed.replace('model = "m/x"', 'model = "other"')
    assert restore(changed, before) == (
        "effort = 'high'\nmodel = \"mine\"\n\n[projects.\"/x\"]\ntrust = \"yes\"\n")
    assert edit(changed).count("[model_providers.ccproxy]") == 1


@pytest.mark.parametrize("text", [
    "a = [1\n", "a = 1]\n", 'a = "open\n', "a = 'open", "a\n", "= 1\n", "[t\n", "[t]]\n", "[]\n",
    "{\n", '"""\n', "a = \n", "a b = 1\n", "{\"json\": 1}\n",
    pytest.param("a = 1\na = 2\n", marks=pytest.mark.skipif(not tomllib, reason="no tomllib")),
    pytest.param("a = what\n", marks=pytest.mark.skipif(not tomllib, reason="no tomllib"))])
def test_what_does_not_parse_is_refused(text):
    with pytest.raises(ccproxy.ProxyError) as raised:
        edit("b = 1\n" + text)
    assert raised.value.kind == "config" and raised.value.message.startswith("f: is not TOML")


def test_a_table_on_one_line_cannot_be_added_to():
    with pytest.raises(ccproxy.ProxyError) as raised:
        edit("model_providers = {other = {}}\n")
    assert "one line" in raised.value.message


PIECES = ['model = "a"\n', "effort = 1 # [x]\n", "\n", "# model = 1\n", 'x = [\n"]", # [\n]\n',
          "s = '''\n[t]\n'''\n"]
TABLES = ["[tui]\nmodel = 2\n", "[model_providers.other]\nname = 'o'\n\n", "# about\n[p.\"/x\"]\n",
          "[model_providers.ccproxy]\nname = 'old'\n", "[[hooks]]\na = 1\n"]


@pytest.mark.parametrize("seed", range(60))
def test_any_text_comes_back_byte_for_byte(seed):
    chance = random.Random(seed)
    text = "".join(chance.sample(PIECES, chance.randrange(len(PIECES)))
                   + chance.sample(TABLES, chance.randrange(len(TABLES))))
    text = text.rstrip("\n") if chance.random() < 0.3 else text
    text = text.replace("\n", "\r\n") if chance.random() < 0.3 else text
    changed = edit(text)
    assert edit(changed) == changed and restore(changed, text) == text
    if tomllib:
        before, after = tomllib.loads(text), tomllib.loads(changed)
        for name in NAMES:
            before.pop(name, None)
            after.pop(name)
        after["model_providers"].pop("ccproxy")
        before.get("model_providers", {}).pop("ccproxy", None)
        assert {**before, "model_providers": before.get("model_providers", {})} == after
