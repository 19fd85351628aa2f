"""TOKEN COUNT: a local estimate; tests say how far off it may be, and that it is cheap."""
from __future__ import annotations

import json
import random
import types

import pytest
from fake_upstream import recorded
from harness import ccproxy
from pure import NAMES

Call, Image, Result, Text, Thinking, Tool, Turn = (
    ccproxy.Call, ccproxy.Image, ccproxy.Result, ccproxy.Text, ccproxy.Thinking, ccproxy.Tool,
    ccproxy.Turn)
PICTURE = Image("data:image/png;base64," + "A" * 500_000, "image/png")
ENGLISH = ("The quick brown fox jumps over the lazy dog, and then it goes home to have some "
           "dinner with its family before the night begins. ")
CODE = "for (let i = 0; i < items.length; i++) { total += items[i].price * 1.19; }\n"
CHINESE = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u5427"


def prompt_of(*parts, system=(), tools=()):
    return ccproxy.Prompt("m", [Turn("user", list(parts))], system=list(system),
                          tools=list(tools))


def estimate(*parts, **more):
    return ccproxy.estimate_input(prompt_of(*parts, **more))


@pytest.mark.parametrize("text, least, most", [
    # what common tokenizers make of it, and a third off either way
    (ENGLISH * 20, 350, 800), (CODE * 20, 350, 900), (CHINESE * 20, 200, 480),
    ("\U0001f600" * 100, 60, 300), ("1234567890" * 30, 80, 200), ("a", 1, 20),
])
def test_the_estimate_is_in_the_right_region(text, least, most):
    assert least <= estimate(Text(text)) <= most


def test_an_empty_prompt_counts_at_least_one():
    assert ccproxy.estimate_input(ccproxy.Prompt("m", [])) == 1
    assert estimate() >= 1
    assert estimate(Text("")) >= 1


@pytest.mark.parametrize("part", [
    Text(ENGLISH), Thinking(ENGLISH), Call("id", "name", {"city": ENGLISH}), Result("id", ENGLISH),
    Call("id", "name", {ENGLISH: 1}), Call("id", "name", {"deep": {"er": [ENGLISH]}}),
    Call("id", ENGLISH, {}), PICTURE, Result("id", "", (PICTURE,))],
    ids=lambda part: repr(part)[:40])
def test_every_kind_of_part_counts(part):
    assert estimate(Text("x"), part) >= estimate(Text("x")) + 15


def test_system_and_tools_count():
    plain = estimate(Text("x"))
    assert estimate(Text("x"), system=[Text(ENGLISH)]) >= plain + 15
    later = ccproxy.Prompt("m", [Turn("user", [Text("x")]), Turn("system", [Text(ENGLISH)])])
    assert ccproxy.estimate_input(later) >= plain + 15
    assert estimate(Text("x"), tools=[Tool("f", ENGLISH, {})]) >= plain + 15
    assert estimate(Text("x"), tools=[Tool("f", "", {"description": ENGLISH})]) >= plain + 15


def test_a_picture_counts_as_a_picture_and_not_as_base64():
    assert 500 <= estimate(PICTURE) <= 3000
    assert estimate(Result("id", "", (PICTURE, PICTURE))) >= 2 * 500


@pytest.mark.parametrize("text", [ENGLISH, CODE, CHINESE, "\U0001f600", "x\n"])
def test_more_text_never_counts_less(text):
    sizes = [estimate(Text(text * times)) for times in (1, 2, 5, 20, 100, 1000, 3000)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 10 * sizes[2]


def test_a_long_prompt_is_judged_by_a_part_and_scaled():
    # Twice the text, twice the tokens, also beyond what is looked at.
    once = estimate(Text(ENGLISH * 4000))
    twice = estimate(Text(ENGLISH * 8000))
    assert abs(twice - 2 * once) <= 0.02 * twice
    many = estimate(*[Text(ENGLISH * 40)] * 100)
    assert abs(many - once) <= 0.1 * once


def test_a_mixture_is_judged_by_all_its_texts():
    mixed = [Text(ENGLISH * 2000), Text(CHINESE * 10000)]
    apart = estimate(mixed[0]) + estimate(mixed[1])
    assert abs(estimate(*mixed) - apart) <= 0.1 * apart


class Watched(str):
    """Text that counts how much of it was taken."""

    taken = 0

    def __getitem__(self, place):
        piece = str.__getitem__(self, place)
        Watched.taken += len(piece)
        return piece


def test_only_a_sample_of_a_long_prompt_is_looked_at():
    Watched.taken = 0
    ccproxy.texts_tokens([Watched("x" * 4_000_000), Watched("y" * 4_000_000)])
    assert 0 < Watched.taken <= 2 * ccproxy.SAMPLE_CHARS


@pytest.mark.parametrize("part", [Text("\ud800\x00"), Call("i", "n", {"a": float("1e308")}),
                                  Call("i", "n", {}), Result("i", "")])
def test_odd_parts_do_not_raise(part):
    assert estimate(part) >= 1


@pytest.mark.parametrize("characters, tokens", [(0, 1), (1, 1), (4, 1), (400, 100), (401, 100)])
def test_the_estimate_of_an_answer(characters, tokens):
    assert ccproxy.estimate_output(characters) == tokens


# Calibration by the true counts of finished answers.

Calibration, calibrated, learn_count = (ccproxy.Calibration, ccproxy.calibrated,
                                        ccproxy.learn_count)


def recorded_prompt(body):
    """The prompt that a start-step line tells of."""
    system = [Text(one["content"]) for one in body["prompt"] if one["role"] == "system"]
    turns = [Turn(one["role"], [Text(part["text"]) if part["type"] == "text" else Image(
        "data:%s;base64,%s" % (part["mediaType"], part["data"]), part["mediaType"])
        for part in one["content"]]) for one in body["prompt"] if one["role"] != "system"]
    tools = [Tool(one["name"], one["description"], one["inputSchema"]) for one in body["tools"]]
    return ccproxy.Prompt("m", turns, system=system, tools=tools)


def recorded_counts():
    """(family, raw estimate, true count, has a picture) of each recorded answer that tells all."""
    rows = []
    for name in NAMES:
        steps = [line for line in recorded(name).splitlines() if b'"start-step"' in line]
        ends = [line for line in recorded(name).splitlines() if b'"type":"finish"' in line]
        if not steps or not ends:
            continue
        body = json.loads(steps[0])["request"]["body"]
        prompt = recorded_prompt(body)
        family = ccproxy.model_family(min(body["providerOptions"]), bool(prompt.tools))
        pictures = any(isinstance(part, Image) for turn in prompt.turns for part in turn.parts)
        rows.append((family, ccproxy.estimate_input(prompt),
                     json.loads(ends[-1])["totalUsage"]["inputTokens"], pictures))
    return rows


def learn_all(rows, times=3):
    known = {}
    for family, raw, true, _ in rows * times:
        known[family] = learn_count(known.get(family, Calibration()), raw, true)
    return known


def is_near(given, true):
    """Within 15 %, or the few tokens that a prompt of one sentence may be off."""
    return abs(given - true) <= max(0.15 * true, 4)


@pytest.mark.parametrize("pictures", [False, True], ids=["text", "text and pictures"])
def test_recorded_counts_after_calibration(pictures):
    rows = [row for row in recorded_counts() if pictures or not row[3]]
    assert len(rows) >= 10
    known = learn_all(rows)
    far = [(family, calibrated(raw, known[family]), true) for family, raw, true, _ in rows
           if not is_near(calibrated(raw, known[family]), true)]
    assert far == []


def test_the_order_of_recorded_answers_does_not_matter_much():
    rows = [row for row in recorded_counts() if not row[3]]
    for seed in range(10):
        mixed = random.Random(seed).sample(rows, len(rows))
        known = learn_all(mixed)
        assert all(is_near(calibrated(raw, known[family]), true)
                   for family, raw, true, _ in rows), seed


def crafted(seed, slope, overhead, count=40):
    """(raw estimate, true count) of prompts of many kinds and sizes, counted by some tokenizer."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        text = rng.choice([ENGLISH, ENGLISH, CODE, '{"key": [1, 2, "three"], "b": null},\n'])
        raw = estimate(Text(text * rng.choice([1, 3, 20, 60, 200])))
        rows.append((raw, max(1, round((raw * slope + overhead) * rng.uniform(0.97, 1.03)))))
    return rows


TOKENIZERS = [(1.0, 0), (0.7, 0), (1.4, 0), (1.0, 350), (0.8, 400), (1.3, 20_000), (1.9, 10)]


@pytest.mark.parametrize("slope,overhead", TOKENIZERS)
def test_a_familys_tokenizer_is_learned(slope, overhead):
    known = Calibration()
    for raw, true in crafted(1, slope, overhead):
        known = learn_count(known, raw, true)
    for raw, true in crafted(2, slope, overhead):       # a small one may be off by a little
        assert abs(calibrated(raw, known) - true) <= max(0.15 * true, 400), (raw, true)


def test_the_error_figure_goes_down():
    known, errors = Calibration(), []
    for _ in range(20):
        known = learn_count(known, 60, 390)
        errors.append(known.error)
    assert errors[0] > 0.5 and errors[-1] < 0.05
    assert errors == sorted(errors, reverse=True)


def test_an_unknown_family_keeps_the_raw_estimate():
    assert [calibrated(raw, Calibration()) for raw in (0, 1, 17, 5000)] == [1, 1, 17, 5000]


def test_one_answer_teaches_already():
    known = learn_count(Calibration(), 60, 390)
    assert calibrated(60, known) == 390 and calibrated(120, known) > 390


def test_a_tokenizer_that_changes_is_learned_anew():
    known = Calibration()
    for slope in (1.0, 1.6):
        for raw, true in crafted(3, slope, 0, 100):
            known = learn_count(known, raw, true)
    assert all(is_near(calibrated(raw, known), true) for raw, true in crafted(4, 1.6, 0)
               if raw > 1000)


@pytest.mark.parametrize("rows", [
    [(10, 10 ** 9)], [(10 ** 9, 1)], [(1, 1), (10 ** 7, 1)], [(5, 5), (5, 5000)], [(1, 10 ** 12)],
    [(1200, 300), (14, 15)]], ids=range(6))
def test_odd_counts_leave_a_sane_estimate(rows):
    known = Calibration()
    for raw, true in rows * 3:
        known = learn_count(known, raw, true)
        assert 0 <= known.error <= 10
        counts = [calibrated(raw, known) for raw in (1, 10, 100, 10_000, 10 ** 7)]
        assert counts == sorted(counts) and counts[0] >= 1


FAMILIES = [    # (model, with tools, family)
    ("deepseek/deepseek-v4-flash", False, "deepseek"), ("claude-sonnet-5", False, "claude"),
    ("claude-sonnet-5", True, "claude+tools"), ("moonshotai/Kimi-K3", False, "kimi"),
    ("Qwen/Qwen3.8-27B", True, "qwen+tools"), ("", False, "other"), ("5/5", False, "other"),
    ("gpt-5.4", False, "gpt")]


@pytest.mark.parametrize("model,tools,family", FAMILIES, ids=range(len(FAMILIES)))
def test_families(model, tools, family):
    assert ccproxy.model_family(model, tools) == family


def test_families_are_bounded_and_only_true_counts_teach():
    backend = types.SimpleNamespace(calibrations={})

    def finish(family, usage=ccproxy.Usage(40, 1)):
        reply = ccproxy.Reply("id", "m", 0, raw_estimate=20, family=family, usage=usage)
        ccproxy.learn_usage(backend, reply)

    finish("a", None)
    finish("a", ccproxy.Usage(0, 1))
    finish("")
    assert backend.calibrations == {}
    for number in range(ccproxy.MAX_FAMILIES + 50):
        finish("f%d" % number)
    assert len(backend.calibrations) == ccproxy.MAX_FAMILIES
    newest = "f%d" % (ccproxy.MAX_FAMILIES + 49)
    before = backend.calibrations[newest]
    finish(newest)
    assert backend.calibrations[newest] != before


# Work.

def test_a_request_of_100_kb_takes_little_work(monkeypatch):
    """Each text is looked at once and in bulk: calls are counted, not seconds."""
    tools = [Tool("f%d" % n, ENGLISH, {"type": "object", "properties": {
        "a": {"type": "string", "description": ENGLISH}}}) for n in range(40)]
    parts = [Text(CODE * 10) for _ in range(100)]
    prompt = prompt_of(*parts, system=[Text(ENGLISH * 100)], tools=tools)
    counted = []
    for name in ("to_json", "texts_tokens"):
        def count(given, own=getattr(ccproxy, name), name=name):
            counted.append(name)
            return own(given)
        monkeypatch.setattr(ccproxy, name, count)
    size = sum(len(part.text) for part in parts) + 100 * len(ENGLISH)
    assert size > 80_000 and ccproxy.estimate_input(prompt) > 10_000
    assert counted.count("texts_tokens") == 1 and counted.count("to_json") <= len(tools)
