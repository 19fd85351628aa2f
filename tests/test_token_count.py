"""TOKEN COUNT: a local estimate; tests say how far off it may be, and that it is cheap."""
from __future__ import annotations

import pytest
from harness import ccproxy

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
