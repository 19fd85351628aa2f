"""CATALOGUE, MODELS, MODEL LISTS: what a request's `model` means and what that model takes."""
from __future__ import annotations

import collections
import json
import random
import re

import pytest
from harness import ccproxy, make_config

BUILTIN = ccproxy.builtin_models()
ROWS = ccproxy.CATALOGUE.strip().splitlines()
CATALOGUE = list(ccproxy.builtin_models().known.values())
PLAIN = make_config()
EFFORTS = list(ccproxy.EFFORTS)


def resolve(asked, models=BUILTIN, **options):
    """(the id that is sent, the notes) for a request's model."""
    notes = []
    return ccproxy.resolve_model(asked, models, make_config(**options), notes).id, notes


# The catalogue.

@pytest.mark.parametrize("model", CATALOGUE, ids=lambda model: model.id)
def test_every_row_of_the_catalogue_makes_sense(model):
    assert re.fullmatch(r"[A-Za-z0-9._/:-]+", model.id)
    assert model.name and model.name == model.name.strip()
    assert model.context == 0 or 100_000 <= model.context <= 2_000_000
    assert 0 <= model.max_output <= ccproxy.MAX_OUTPUT_TOKENS
    assert list(model.efforts) == [one for one in EFFORTS if one in model.efforts]     # rising
    assert model.plan in ("Go", "GOAT", "Pro", "Max", "")


def test_the_catalogue_is_complete():
    plans = collections.Counter(row.rpartition("|")[2] for row in ROWS)
    assert plans == {"Go": 50, "GOAT": 8, "Pro": 14, "Max": 8, "hidden": 4, "-": 1}
    assert sum(model.vision for model in CATALOGUE) == 61
    assert sum(model.max_output > 0 for model in CATALOGUE) == 7
    assert len({model.id.lower() for model in CATALOGUE}) == len(ROWS) == 85
    assert sum(model.plan == "" for model in CATALOGUE) == 5
    assert [model.id for model in CATALOGUE if not model.context] == [
        "zai-org/GLM-5.1", "MiniMaxAI/MiniMax-M2.7", "Qwen/Qwen3.6-Max-Preview",
        "Qwen/Qwen3.6-Plus"]


def test_hidden_models_are_known_and_not_listed():
    assert len(BUILTIN.listed) == 81
    assert "tencent/Hy3" not in BUILTIN.listed
    assert resolve("tencent/Hy3") == ("tencent/Hy3", [])


@pytest.mark.parametrize("name, target", sorted(ccproxy.SHORT_NAMES.items()))
def test_short_names_stand_for_catalogue_ids(name, target):
    assert BUILTIN.known[target.lower()].id == target
    assert BUILTIN.known[target.lower()].plan != "hidden"
    assert resolve(name)[0] == target


# Resolving.

@pytest.mark.parametrize("asked, expected", [
    ("deepseek/deepseek-v4-pro", "deepseek/deepseek-v4-pro"),
    ("MOONSHOTAI/kimi-k3", "moonshotai/Kimi-K3"),                   # ids in any case
    ("zai-org/glm-5.3", "zai-org/GLM-5.3"),
    ("kimi-k3", "moonshotai/Kimi-K3"),                              # without the vendor
    ("GLM-5.3-Flash", "z-ai/glm-5.3-flash"),
    ("kimi", "moonshotai/Kimi-K3"), ("Opus", "claude-opus-5-5"),    # a family's name
    ("claude-opus-5[1m]", "claude-opus-5"), ("Sonnet[1M]", "claude-sonnet-5"),
    ("claude-haiku-4-5", "claude-haiku-4-5-20251001"),
    ("claude-haiku-4-5-20251001", "claude-haiku-4-5-20251001"),
    ("claude-opus-5-20260101", "claude-opus-5"),
    ("inclusionai/ling-3.0-flash-sante:free", "inclusionai/ling-3.0-flash-sante:free"),
    ("", ccproxy.DEFAULT_MODEL), ("default", ccproxy.DEFAULT_MODEL),
    ("gpt-5.4-2026-03-05", "gpt-5.4"),                              # OpenAI's dates
    # OpenRouter's spelling: another vendor or none here, dots for dashes, dashes for dots.
    ("anthropic/claude-sonnet-4.6", "claude-sonnet-4-6"),
    ("claude-sonnet-4.6", "claude-sonnet-4-6"),
    ("anthropic/claude-opus-4.7", "claude-opus-4-7"), ("openai/gpt-5.5", "gpt-5.5"),
    ("Anthropic/Claude-Opus-4.7[1m]", "claude-opus-4-7"), ("x-ai/grok-4.5", "xai/grok-4.5"),
    ("anthropic/claude-haiku-4.5", "claude-haiku-4-5-20251001"),
    ("anthropic/claude-sonnet-4.6-20260217", "claude-sonnet-4-6"),
    ("z-ai/glm-5.3", "zai-org/GLM-5.3"), ("minimax/minimax-m3", "MiniMaxAI/MiniMax-M3"),
    ("qwen/qwen3.8-max", "Qwen/Qwen3.8-Max"), ("kimi-k2-6", "moonshotai/Kimi-K2.6"),
    ("google/gemini-3.8-flash", "google/gemini-3.8-flash"),         # an id that keeps its vendor
    ("openrouter/anthropic/claude-sonnet-4.6", "claude-sonnet-4-6"),
    ("openai/moonshotai/Kimi-K3", "moonshotai/Kimi-K3"),            # litellm's "any such server"
    ("azure/gpt-5.5", "gpt-5.5"), ("foo/claude-sonnet-5", "claude-sonnet-5"),
    # How a model is run is no part of its name; a free model never becomes the paid one.
    ("openai/gpt-5.5:nitro", "gpt-5.5"), ("kimi-k3:floor", "moonshotai/Kimi-K3"),
    ("openai/gpt-5.5:online", "gpt-5.5"), ("openai/gpt-5.5:exacto", "gpt-5.5"),
    ("kimi-k3:latest", "moonshotai/Kimi-K3"),
    ("poolside/laguna-s-2.1:free", "poolside/laguna-s-2.1-free"),
    ("meituan/longcat-2.0-free", "meituan/LongCat-2.0:free"),
])
def test_what_a_name_means(asked, expected):
    found, notes = resolve(asked)
    assert found == expected
    changed = asked not in ("", expected)
    assert notes == (["model=%s -> %s" % (asked, expected)] if changed else [])


@pytest.mark.parametrize("asked, near", [
    ("gpt-6.1-sol", "gpt-6-sol"), ("claude-opus-6", "claude-opus-5"),
    ("claude-sonnet-5-5", "claude-sonnet-5"), ("kimi-k99", "moonshotai/Kimi-K3"),
    ("kim", "moonshotai/Kimi-K3"), ("claude-sonet-5", "claude-sonnet-5"),
    ("gemini-pro", "google/gemini-3.8-flash"), ("glm5.3", "zai-org/GLM-5.3"),
    ("deepseek/deepseek-v4-pro:free", "deepseek/deepseek-v4-pro"),
    ("foo/kimi", "moonshotai/Kimi-K3"), ("grok4", "xai/grok-4.5"), ("gpt-4o", "gpt-5.5"),
    ("claude-3-5-haiku", "claude-haiku-4-5-20251001"),
    ("kimmi", "moonshotai/Kimi-K3"), ("kimi-k3-" + "x" * 10, "moonshotai/Kimi-K3"),
    # Nothing looks like these: they are new, not misspelt.
    ("New/Vendor-Model", None), ("mistral-large", None), ("acme/rocket-9", None), ("m", None),
    ("x" * 200, None), ("a/", None), ("/", None), ("moonshotai/x", None)])
def test_an_unknown_name_is_passed_on_and_the_nearest_known_one_is_named(asked, near):
    """The catalogue is always behind, so it is no error."""
    found, notes = resolve(asked)
    assert found == asked
    assert notes == ([] if near is None else [
        "model=%s is not a known model, passed on (nearest: %s)" % (asked, near)])


def test_a_note_on_a_long_name_names_the_nearest_one_all_the_same():
    asked = "claude-opus-claude-sonnet-claude-haiku-claude-opus-5-sonnet-5"
    assert resolve(asked)[1] == [
        "model=%s... is not a known model, passed on (nearest: claude-sonnet-5)" % asked[:45]]


def test_the_nearest_one_is_one_that_is_served():
    only = dict(allowedModels=["gpt-6-luna", "kimi", "gpt-6.1-sol"])
    assert resolve("gpt-6.1-sol", **only) == (
        "gpt-6.1-sol", ["model=gpt-6.1-sol is not a known model, passed on (nearest: gpt-6-luna)"])
    assert resolve("gpt-6.1-sol", allowedModels=["gpt-6.1-sol"])[1] == []
    assert resolve("", defaultModel="kimi-k33")[1] == [
        "model=kimi-k33 is not a known model, passed on (nearest: moonshotai/Kimi-K3)"]
    assert resolve("mine", modelAliases={"mine": "kimi-k33"})[1] == ["model=mine -> kimi-k33", (
        "model=kimi-k33 is not a known model, passed on (nearest: moonshotai/Kimi-K3)")]


def test_the_search_for_near_names_runs_once_for_each_name(monkeypatch):
    """Claude Code's default model may be unknown, and comes with every request."""
    calls = []
    monkeypatch.setattr(ccproxy, "letter_pairs", lambda text: calls.append(text) or frozenset("x"))
    for _ in range(10):
        resolve("a-name-of-this-test-alone")
    assert len(calls) == 1 + len(BUILTIN.listed)


def test_an_exact_id_wins_over_every_other_spelling():
    ids = ["foo/claude-sonnet-4.6", "gpt-5-5", "kimi-k3:nitro", "vendor/x-20250101", "vendor/x",
           "other/y", "some/y", "claude-z-4-6", "openai/gpt-5.5-2026-01-01", "odd/"]
    models = ccproxy.merge_live_models({"data": [{"id": one} for one in ids]}, BUILTIN)
    for one in ids:
        assert resolve(one, models) == (one, [])
    for asked, expected in [
            ("anthropic/claude-sonnet-4.6", "foo/claude-sonnet-4.6"),   # exact but for the vendor
            ("claude-sonnet-4-6", "claude-sonnet-4-6"), ("openai/gpt-5-5", "gpt-5-5"),
            ("openai/gpt-5.5", "gpt-5.5"), ("kimi-k3:floor", "moonshotai/Kimi-K3"),
            ("x", "vendor/x"), ("x-20260101", "vendor/x"), ("x-20250101", "vendor/x-20250101"),
            ("y", "other/y"), ("more/y", "other/y"),            # the earlier one
            ("gpt-5.5-2026-01-01", "openai/gpt-5.5-2026-01-01"),
            ("anthropic/claude-z-4.6", "claude-z-4-6"), ("foo/", "foo/"), ("/", "/")]:
        assert resolve(asked, models)[0] == expected


def test_no_two_models_of_the_catalogue_share_a_short_form():
    forms = collections.Counter(
        form for model in CATALOGUE for form in set(ccproxy.short_forms(model.id.lower())))
    assert [form for form, count in forms.items() if count > 1] == []


@pytest.mark.parametrize("aliases, asked, expected", [
    ({"mine": "gpt-6-sol"}, "mine", "gpt-6-sol"),
    ({"Mine": "gpt-6-sol"}, "mINE", "gpt-6-sol"),
    ({"mine": "kimi"}, "mine", "moonshotai/Kimi-K3"),               # a target may be a short name
    ({"mine": "new/model"}, "mine", "new/model"),
    ({"claude-*": "zai-org/GLM-5.3"}, "claude-opus-5-5", "zai-org/GLM-5.3"),
    ({"claude-*": "zai-org/GLM-5.3"}, "claude-", "zai-org/GLM-5.3"),
    ({"claude-*": "zai-org/GLM-5.3"}, "claude", "claude-sonnet-5"),
    ({"claude-*": "zai-org/GLM-5.3"}, "xclaude-1", "xclaude-1"),
    ({"*": "kimi", "claude-*": "glm", "claude-opus-*": "grok"}, "claude-opus-5", "xai/grok-4.7"),
    ({"*": "kimi", "claude-*": "glm"}, "anything", "moonshotai/Kimi-K3"),
    ({"*": "kimi", "gpt": "glm"}, "gpt", "zai-org/GLM-5.3"),        # exact before patterns
    ({"*-mini": "kimi"}, "gpt-5.4-mini", "moonshotai/Kimi-K3"),
    ({"a*b*c": "kimi"}, "a-bb-c", "moonshotai/Kimi-K3"),
    ({"a*b*c": "kimi"}, "a-c-b", "a-c-b"),
    ({"a.c": "kimi"}, "abc", "abc"), ({"a+*": "kimi"}, "aa", "aa"), # nothing but * is special
    ({"[a-z]*": "kimi"}, "abc", "abc"), ({"a?": "kimi"}, "ab", "ab"),
    ({"gpt-6-sol": "kimi"}, "gpt-6-sol", "moonshotai/Kimi-K3"),     # over a catalogue id too
    ({"a": "b", "b": "kimi"}, "a", "b"),                            # one step, so no circles
    ({"a*a": "kimi"}, "a", "a"), ({"a*a": "kimi"}, "aa", "moonshotai/Kimi-K3"),
    ({"*x*": "kimi"}, "axb", "moonshotai/Kimi-K3"), ({"**": "kimi"}, "b", "moonshotai/Kimi-K3"),
    ({"*": "kimi"}, "two words\n", "moonshotai/Kimi-K3"),
])
def test_aliases(aliases, asked, expected):
    assert resolve(asked, modelAliases=aliases)[0] == expected


def test_patterns_mean_what_a_regular_expression_would():
    chance = random.Random(11)
    for _ in range(20_000):
        pattern = "".join(chance.choice("ab**") for _ in range(chance.randrange(7))) + "*"
        pattern += "".join(chance.choice("ab") for _ in range(chance.randrange(3)))
        name = "".join(chance.choice("ab") for _ in range(chance.randrange(9)))
        regex = ".*".join(map(re.escape, pattern.split("*")))
        fits = ccproxy.fits_pattern(name, pattern)
        assert fits == bool(re.fullmatch(regex, name)), (name, pattern)


def test_a_pattern_costs_linear_time_on_a_name_without_end():
    """Three stars against a million letters took hours as a regular expression."""
    with pytest.raises(ccproxy.ProxyError) as caught:
        resolve("a" * 1_000_000, modelAliases={"*a*a*b*c": "kimi"})
    assert caught.value.status == 400 and len(caught.value.message) < 300


@pytest.mark.parametrize("options, asked, expected", [
    ({"defaultModel": "gpt-6-sol"}, "", "gpt-6-sol"),
    ({"defaultModel": "gpt-6-sol"}, "default", "gpt-6-sol"),
    ({"defaultModel": "kimi"}, "default", "moonshotai/Kimi-K3"),
    ({"defaultModel": "mine", "modelAliases": {"mine": "glm"}}, "", "zai-org/GLM-5.3"),
    ({"defaultModel": "gpt-6-sol"}, "gpt-6-luna", "gpt-6-luna"),
])
def test_the_default_model(options, asked, expected):
    assert resolve(asked, **options)[0] == expected


@pytest.mark.parametrize("options, asked, status", [
    ({"allowedModels": ["gpt-6-sol"]}, "gpt-6-sol", None),
    ({"allowedModels": ["GPT-6-SOL"]}, "gpt-6-sol", None),
    ({"allowedModels": ["moonshotai/Kimi-K3"]}, "kimi", None),
    ({"allowedModels": ["new/model"]}, "New/Model", None),
    ({"allowedModels": ["gpt-6-sol"]}, "gpt-6-luna", 404),
    ({"allowedModels": ["gpt-6-sol"]}, "", 404),
    ({"allowedModels": ["gpt-6-sol"]}, "unknown/model", 404),
    ({"allowUnknownModels": False}, "gpt-6-sol", None),
    ({"allowUnknownModels": False}, "kimi", None),
    ({"allowUnknownModels": False}, "gpt-6-soll", 404),
    ({}, "typesafe/jev", 400), ({}, "JEV", 400), ({"modelAliases": {"x": "jev-latest"}}, "x", 400),
    ({}, "two words", 400), ({}, "caf\xe9", 400), ({}, "a\nb", 400), ({}, "x" * 201, 400),
    ({}, "\x00", 400), ({}, "\ufffd", 400), ({}, "x" * 200, None),
])
def test_models_that_are_refused(options, asked, status):
    if status is None:
        assert resolve(asked, **options)[0]
        return
    with pytest.raises(ccproxy.ProxyError) as caught:
        resolve(asked, **options)
    assert (caught.value.status, caught.value.param) == (status, "model")
    assert len(caught.value.message) < 2000


def test_a_refusal_names_what_is_near():
    with pytest.raises(ccproxy.ProxyError) as caught:
        resolve("kimi-k33", allowUnknownModels=False)
    assert "moonshotai/Kimi-K3" in caught.value.message
    with pytest.raises(ccproxy.ProxyError) as caught:
        resolve("gpt-6-luna", allowedModels=["gpt-6-sol"])
    assert "gpt-6-sol" in caught.value.message


def test_a_very_long_name_costs_nothing_and_says_little():
    with pytest.raises(ccproxy.ProxyError) as caught:
        resolve("claude-" + "x" * 1_000_000, modelAliases={"gpt-*": "kimi"})
    assert len(caught.value.message) < 300


# Effort and output limit.


def effort(asked, efforts):
    notes = []
    return ccproxy.fit_effort(asked, ccproxy.Model("m", "m", efforts=efforts), notes), notes


@pytest.mark.parametrize("asked, efforts, expected", [
    (None, ("low", "high"), None), ("", ("low", "high"), None),
    ("none", ("low", "high"), None), ("off", ("low", "high"), None), ("none", (), None),
    ("high", ("low", "high"), "high"), ("low", ("low", "high", "max"), "low"),
    ("medium", ("low", "high", "max"), "low"),                      # the nearest lower
    ("xhigh", ("low", "high", "max"), "high"), ("max", ("low", "medium", "high"), "high"),
    ("max", ("low", "medium", "xhigh"), "xhigh"), ("high", ("low", "medium", "xhigh"), "medium"),
    ("low", ("high", "max"), "high"),                               # none lower: the lowest
    ("medium", ("high", "max"), "high"), ("minimal", ("low", "high"), "low"),
    ("minimal", ("high", "max"), "high"),
    ("high", (), None), ("low", (), None),                          # takes none
    ("high", None, "high"), ("minimal", None, "low"), ("max", None, "max"),     # not known
    ("extreme", None, None), ("extreme", ("low", "high"), None),
])
def test_effort_is_fitted_to_the_model(asked, efforts, expected):
    found, notes = effort(asked, efforts)
    assert found == expected
    changed = asked not in (None, "", expected)
    assert len(notes) == changed
    assert all(note.startswith("effort=" + asked) for note in notes)


def test_whatever_is_asked_the_model_takes_what_is_sent():
    words = EFFORTS + ["minimal", "none", "off", "extreme", "HIGH", "\ufffd"]
    for model in CATALOGUE:
        for word in words:
            fitted = ccproxy.fit_effort(word, model, [])
            assert fitted is None or fitted in model.efforts
            if word in EFFORTS and model.efforts:
                assert fitted is not None


@pytest.mark.parametrize("asked, most, expected, noted", [
    (None, 0, 64000, False), (None, 32768, 32768, False), (None, 131072, 64000, False),
    (1, 0, 1, False), (64001, 0, 64001, False), (200000, 0, 200000, False),
    (200001, 0, 200000, True), (10 ** 9, 0, 200000, True), (32768, 32768, 32768, False),
    (32769, 32768, 32768, True), (200000, 131072, 131072, True), (250000, 300000, 200000, True),
])
def test_max_tokens(asked, most, expected, noted):
    notes = []
    model = ccproxy.Model("m", "m", max_output=most)
    assert ccproxy.fit_max_tokens(asked, model, notes) == expected
    assert notes == (["clamped=max_tokens %d -> %d" % (asked, expected)] if noted else [])


# The live list.

LIVE = {"object": "list", "data": [
    {"id": "moonshotai/Kimi-K3", "name": "Kimi K3 New", "context_length": 5,
     "supported_endpoints": ["chat", "messages"], "created": 1793000000},
    {"id": "GPT-6-Sol"},
    {"id": "vendor/New-Model", "name": "Brand New", "created": 1793000001.5},
]}


def test_the_live_list_is_enriched_by_the_catalogue():
    models = ccproxy.merge_live_models(LIVE, BUILTIN)
    assert models.listed == ["moonshotai/Kimi-K3", "GPT-6-Sol", "vendor/New-Model"]
    kimi = models.known["moonshotai/kimi-k3"]
    assert (kimi.name, kimi.context, kimi.efforts, kimi.endpoints) == (
        "Kimi K3 New", 5, ("low", "high", "max"), ("chat", "messages"))
    assert models.known["gpt-6-sol"].id == "GPT-6-Sol"              # the live list's spelling
    assert models.known["gpt-6-sol"].context == 1050000
    assert models.known["vendor/new-model"].efforts is None         # not known, not: takes none
    assert [models.known[one.lower()].created for one in models.listed] == [
        1793000000, 0, 1793000001]
    assert models.known["deepseek/deepseek-v4-pro"].created == 0    # built in, so nobody tells
    assert resolve("new-model", models)[0] == "vendor/New-Model"
    assert resolve("openrouter/new.model:nitro", models)[0] == "vendor/New-Model"
    assert resolve("deepseek/deepseek-v4-pro", models)[0] == "deepseek/deepseek-v4-pro"
    assert BUILTIN.known["gpt-6-sol"].id == "gpt-6-sol"             # unharmed


def test_catalogue_ids_come_before_short_names():
    models = ccproxy.merge_live_models({"data": [{"id": "vendor/Kimi"}, {"id": "glm"}]}, BUILTIN)
    assert resolve("kimi", models)[0] == "vendor/Kimi"
    assert resolve("GLM", models)[0] == "glm"


@pytest.mark.parametrize("live", [
    None, [], "x", 5, {}, {"data": None}, {"data": {}}, {"data": []}, {"data": [1, None, "x", []]},
    {"data": [{"name": "no id"}, {"id": None}, {"id": 5}, {"id": ""}, {"id": "two words"},
              {"id": "x" * 300}, {"id": "a\nb"}, {"id": "caf\xe9"}]},
    {"error": {"message": "x"}},
])
def test_a_list_without_a_model_is_no_list(live):
    assert ccproxy.merge_live_models(live, BUILTIN) is None


@pytest.mark.parametrize("member, value, expected", [
    ("context_length", 5, 5), ("context_length", 262144.0, 262144),
    # What is no number of tokens leaves what the catalogue knows.
    *[("context_length", value, 1000000) for value in (
        None, 0, 0.0, -5, True, False, "1000", [], {}, 10 ** 400, 10 ** 12, float("nan"),
        float("inf"), float("-inf"))],
    ("created", 1793000000, 1793000000), ("created", 1793000000.9, 1793000000),
    *[("created", value, 0) for value in (
        None, 0, -1, True, "1793000000", [], 10 ** 400, 1793000000000, float("nan"), float("inf"))],
    ("name", "Kimi", "Kimi"), ("name", " Kimi\n", "Kimi"), ("name", "\ud83d", "\ufffd"),
    *[("name", value, "Kimi K3") for value in (None, "", " \t", 5, True, [], {})],
    ("supported_endpoints", ["/messages", None, 1, True, ["/x"], {}, "/responses"],
     ("/messages", "/responses")),
    ("supported_endpoints", ["/%d" % number for number in range(100_000)],
     tuple("/%d" % number for number in range(16))),
    *[("supported_endpoints", value, ()) for value in (None, [], "/messages", {"/messages": 1}, 5)],
])
def test_members_of_the_live_list(member, value, expected):
    row = {"id": "Moonshotai/kimi-k3", member: value}
    models = ccproxy.merge_live_models({"data": [row]}, BUILTIN)
    [model] = [models.known[name.lower()] for name in models.listed]
    field = {"context_length": "context", "supported_endpoints": "endpoints"}.get(member, member)
    found = getattr(model, field)
    assert (found, type(found)) == (expected, type(expected))
    assert model.id == "Moonshotai/kimi-k3"
    for make in (ccproxy.openai_model, ccproxy.anthropic_model, ccproxy.model_entry):
        json.dumps(make(model), allow_nan=False)
    if model.context:
        ccproxy.short_number(model.context)


def test_ids_that_differ_in_case_alone_are_one_model():
    models = ccproxy.merge_live_models({"data": [
        {"id": "GPT-6-Sol", "name": "first"}, {"id": "a/b"}, {"id": "gpt-6-sol", "name": "second"},
        {"id": "A/B"}, {"id": "GPT-6-Sol", "name": "third"}]}, BUILTIN)
    assert models.listed == ["GPT-6-Sol", "a/b"]
    assert models.known["gpt-6-sol"].name == "first"
    assert shown(models) == ["GPT-6-Sol", "a/b"]


def test_the_live_list_is_kept_within_bounds():
    rows = [{"id": "v/%d" % number} for number in range(3 * ccproxy.MAX_LIVE_MODELS)]
    models = ccproxy.merge_live_models({"data": [None, "x"] * 5000 + rows}, BUILTIN)
    assert models.listed == [row["id"] for row in rows[:ccproxy.MAX_LIVE_MODELS]]
    assert len(models.known) == ccproxy.MAX_LIVE_MODELS + len(CATALOGUE)


def test_models_without_chat_are_not_listed():
    names = ["typesafe/jev", "Jev", "vendor/one"]
    assert ccproxy.merge_live_models({"data": [{"id": one} for one in names]}, BUILTIN).listed == [
        "vendor/one"]
    assert ccproxy.merge_live_models({"data": [{"id": "typesafe/jev"}]}, BUILTIN) is None


def test_bad_rows_and_members_do_not_harm_good_ones():
    models = ccproxy.merge_live_models({"data": [
        None, {"id": "a\r\nb"}, {"id": "good/one", "name": 5, "context_length": "big",
                                 "supported_endpoints": "chat"},
        {"id": "good/two", "name": "x" * 5000, "supported_endpoints": [1, None]}]}, BUILTIN)
    assert models.listed == ["good/one", "good/two"]
    assert models.known["good/one"] == ccproxy.Model("good/one", "good/one")
    assert len(models.known["good/two"].name) <= 200
    json.dumps(ccproxy.openai_model_list(ccproxy.listed_models(models, PLAIN)))


# The lists that clients get.


def shown(models=BUILTIN, **options):
    return [model.id for model in ccproxy.listed_models(models, make_config(**options))]


@pytest.mark.parametrize("options, expected", [
    ({}, BUILTIN.listed),
    ({"allowedModels": ["GPT-6-sol", "nonsense", "moonshotai/Kimi-K3"]},
     ["moonshotai/Kimi-K3", "gpt-6-sol"]),
    ({"modelAliases": {"b": "kimi", "a": "new/model", "claude-*": "glm"}},
     ["a", "b"] + BUILTIN.listed),
    ({"modelAliases": {"GPT-6-sol": "kimi"}},            # the alias hides the id: listed once
     ["GPT-6-sol"] + [one for one in BUILTIN.listed if one != "gpt-6-sol"]),
])
def test_what_is_listed(options, expected):
    assert shown(**options) == expected


def test_an_alias_is_listed_with_its_targets_figures():
    first = ccproxy.listed_models(BUILTIN, make_config(modelAliases={"mine": "ling"}))[0]
    assert (first.id, first.context, first.max_output) == ("mine", 256000, 32768)
    assert "Ling 3.0 Flash" in first.name


@pytest.mark.parametrize("model, expected", [
    (ccproxy.Model("v/m", "M", 1000, 50),
     {"id": "v/m", "object": "model", "created": 0, "owned_by": "command-code", "name": "M",
      "context_length": 1000, "max_output_tokens": 50}),
    (ccproxy.Model("m", "m", created=1793000000),
     {"id": "m", "object": "model", "created": 1793000000, "owned_by": "command-code",
      "name": "m"}),
    (ccproxy.Model("m", "m"),
     {"id": "m", "object": "model", "created": 0, "owned_by": "command-code", "name": "m"}),
])
def test_a_model_in_openais_shape(model, expected):
    assert ccproxy.openai_model(model) == expected
    assert ccproxy.openai_model_list([model]) == {"object": "list", "data": [expected]}


@pytest.mark.parametrize("model, expected", [
    (BUILTIN.known["claude-sonnet-5"], {
        "id": "claude-sonnet-5", "display_name": "Claude Sonnet 5", "max_input_tokens": 1000000,
        "max_tokens": 200000, "created_at": "1970-01-01T00:00:00Z", "description":
        "Claude Sonnet 5 at Command Code; 1000000 tokens of context; text and image input; effort "
        "low, medium, high, xhigh, max; from the Pro plan on."}),
    (BUILTIN.known["zai-org/glm-5.1"], {
        "id": "zai-org/GLM-5.1", "display_name": "GLM-5.1", "max_input_tokens": None,
        "max_tokens": 200000, "created_at": "1970-01-01T00:00:00Z",
        "description": "GLM-5.1 at Command Code; text input; from the Go plan on."}),
    (BUILTIN.known["tencent/hy3"], {
        "id": "tencent/Hy3", "display_name": "Tencent Hy3 (Free)", "max_input_tokens": 262144,
        "max_tokens": 200000, "created_at": "1970-01-01T00:00:00Z", "description":
        "Tencent Hy3 (Free) at Command Code; 262144 tokens of context; text input."}),
    (ccproxy.Model("v/new", "New", 5000, 70, created=1793000000), {      # by the live list alone
        "id": "v/new", "display_name": "New", "max_input_tokens": 5000, "max_tokens": 70,
        "created_at": "2026-10-26T07:33:20Z",
        "description": "New at Command Code; 5000 tokens of context."}),
    (ccproxy.Model("m", "m", max_output=300000), {
        "id": "m", "display_name": "m", "max_input_tokens": None, "max_tokens": 200000,
        "created_at": "1970-01-01T00:00:00Z", "description": "m at Command Code."})])
def test_a_model_in_anthropics_shape(model, expected):
    assert ccproxy.anthropic_model(model) == {**expected, "type": "model", "lifecycle": "active"}


def test_the_max_tokens_that_is_told_is_the_most_that_is_sent():
    for model in CATALOGUE:
        most = ccproxy.anthropic_model(model)["max_tokens"]
        notes = []
        assert ccproxy.fit_max_tokens(most, model, notes) == most and not notes
        assert ccproxy.fit_max_tokens(most + 1, model, notes) == most and notes


def test_models_in_anthropics_shape():
    one, two = ccproxy.Model("a", "A", 5), ccproxy.Model("b", "B")
    listed = ccproxy.anthropic_model_list([one, two])
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "a", "b")
    assert listed["data"] == [ccproxy.anthropic_model(one), ccproxy.anthropic_model(two)]


def test_empty_lists():
    assert ccproxy.openai_model_list([]) == {"object": "list", "data": []}
    assert ccproxy.anthropic_model_list([]) == {"data": [], "has_more": False, "first_id": None,
                                                "last_id": None}
