"""ANSWER FILTERS: stop sequences, code fences, tool names and hidden thinking, over every cut."""
from __future__ import annotations

import bisect
import itertools
import random
import re
import types

import pytest
from harness import ccproxy

TEXT, THINKING, TOOL = ccproxy.TEXT, ccproxy.THINKING, ccproxy.TOOL


def every_cut(words):
    """The text whole, char by char, and in two and three pieces cut anywhere."""
    yield [words]
    yield list(words)
    for one, two in itertools.combinations_with_replacement(range(len(words) + 1), 2):
        yield [piece for piece in (words[:one], words[one:two], words[two:]) if piece]


def run_filter(run, pieces, kind=TEXT):
    """(text, stop sequence, text shown after each piece) of one block through a filter."""
    block = ccproxy.Block(kind)
    shown, steps = "", []
    events = run(ccproxy.Open(block))
    for event in [ccproxy.Delta(block, piece) for piece in pieces] + [ccproxy.Close(block)]:
        events = events + run(event)
        shown = "".join(one.text for one in events if isinstance(one, ccproxy.Delta))
        steps.append(shown)
        if isinstance(events[-1], ccproxy.End):
            break
    assert all(one.text for one in events if isinstance(one, ccproxy.Delta))
    assert isinstance(events[0], ccproxy.Open)
    end = events.pop() if isinstance(events[-1], ccproxy.End) else None
    assert isinstance(events[-1], ccproxy.Close) and len(
        [one for one in events if isinstance(one, ccproxy.Close)]) == 1
    return shown, end and end.sequence, steps


# Stop sequences.

def cut_plainly(words, stops):
    """(text, sequence) by the definition: the sequence that is complete first counts, of those
    that end there the longest."""
    for end in range(len(words) + 1):
        ended = [stop for stop in stops if words[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return words[:end - len(longest)], longest
    return words, None


STOPS = [   # (text, sequences, shown, sequence)
    ("abc END def", ["END"], "abc ", "END"),
    ("abc", ["END"], "abc", None),
    ("", ["END"], "", None),
    ("END", ["END"], "", "END"),
    ("abEND", ["END"], "ab", "END"),
    ("EEND", ["END"], "E", "END"),
    ("ENEND", ["END"], "EN", "END"),
    ("EN", ["END"], "EN", None),
    ("aabaac", ["aac"], "aab", "aac"),
    ("aaaa", ["aa"], "", "aa"),
    ("one two", ["two", "one"], "", "one"),
    ("abcd", ["abcd", "bc"], "a", "bc"),
    ("xabc", ["bc", "abc"], "x", "abc"),
    ("a\n\nb", ["\n\n"], "a", "\n\n"),
    ("a\nb\n", ["\n\n"], "a\nb\n", None),
    ("x\U0001f680y", ["\U0001f680"], "x", "\U0001f680"),
    ("</s> </stop>", ["</stop>"], "</s> ", "</stop>"),
    ("a.b", ["."], "a", "."),
    ("aXbY", ["Y", "X"], "a", "X")]


@pytest.mark.parametrize("words,stops,shown,sequence", STOPS, ids=range(len(STOPS)))
def test_stops_over_every_cut(words, stops, shown, sequence):
    assert cut_plainly(words, stops) == (shown, sequence)
    for pieces in every_cut(words):
        assert run_filter(ccproxy.cut_at_stops(stops), pieces)[:2] == (shown, sequence), pieces


def test_stops_over_random_texts():
    rng = random.Random(1)
    for _ in range(2000):
        words = "".join(rng.choice("ab") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 5)))
                 for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.randrange(len(words) + 1) for _ in range(rng.randrange(4)))
        pieces = [words[start:end] for start, end in zip([0] + cuts, cuts + [len(words)])]
        found = run_filter(ccproxy.cut_at_stops(stops), [piece for piece in pieces if piece])
        assert found[:2] == cut_plainly(words, stops), (words, stops, pieces)


def test_only_a_possible_beginning_is_held_back():
    rng = random.Random(2)
    for _ in range(500):
        words = "".join(rng.choice("abc") for _ in range(rng.randrange(1, 12)))
        stops = ["ab" + rng.choice("abc"), "cc"]
        whole, sequence = cut_plainly(words, stops)
        steps = run_filter(ccproxy.cut_at_stops(stops), list(words))[2]
        for count, shown in enumerate(steps[:-1], 1):
            held = max([size for stop in stops for size in range(len(stop))
                        if words[:count].endswith(stop[:size])])
            assert shown == words[:count - held], (words, stops, count)
        assert steps[-1] == whole


ALIKE = ["a" * (1023 - size) + "b" for size in range(64)]
LONG = [        # (sequences of the greatest number and length, pieces of text)
    (ALIKE, ["a"] * 3000), (ALIKE, (["a"] * 900 + ["c"]) * 3), (ALIKE, ["a" * 5000] * 3),
    (["a" * 511 + "b" + "a" * (448 + size) for size in range(64)],
     (["a"] * 511 + ["b"] + ["a"] * 300 + ["c"]) * 3),
    (["%02d" % size + "ab" * 511 for size in range(64)], list("01ab" * 500) + ["01ab" * 2000])]


@pytest.mark.parametrize("stops,pieces", LONG, ids=range(len(LONG)))
def test_the_cost_of_a_piece_does_not_grow_with_what_is_held(stops, pieces, monkeypatch):
    """Counted, not timed: a place in the text is tried once, but for one more at each piece."""
    tried = []

    def bisect_left(*arguments):
        tried.append(arguments)
        return bisect.bisect_left(*arguments)

    monkeypatch.setattr(ccproxy, "bisect", types.SimpleNamespace(bisect_left=bisect_left))
    text = "".join(pieces)
    assert run_filter(ccproxy.cut_at_stops(stops), pieces)[:2] == (text, None)
    assert len(pieces) / 2 < len(tried) <= len(text) + len(pieces)


def test_stops_of_any_length_over_random_texts():
    rng = random.Random(5)
    for _ in range(500):
        words = "".join(rng.choice("aab") for _ in range(rng.randrange(200)))
        stops = [words[at:at + rng.randrange(1, 60)] + rng.choice(["", "b", "c"]) or "x"
                 for at in [rng.randrange(len(words) + 1) for _ in range(rng.randrange(1, 9))]]
        cuts = sorted(rng.randrange(len(words) + 1) for _ in range(rng.randrange(30)))
        pieces = [words[start:end] for start, end in zip([0] + cuts, cuts + [len(words)])]
        found = run_filter(ccproxy.cut_at_stops(stops), [piece for piece in pieces if piece])
        assert found[:2] == cut_plainly(words, stops), (words, stops, pieces)


def test_stops_leave_other_blocks_alone():
    for kind in (THINKING, TOOL):
        assert run_filter(ccproxy.cut_at_stops(["b"]), ["abc"], kind)[:2] == ("abc", None)


def test_stops_do_not_reach_over_blocks():
    run = ccproxy.cut_at_stops(["END"])
    assert run_filter(run, ["xE"])[:2] == ("xE", None)
    assert run_filter(run, ["ND"])[:2] == ("ND", None)
    assert run_filter(run, ["aENDb"])[:2] == ("a", "END")


# Code fences.

FENCES = [
    ('{"a":1}', '{"a":1}'),
    ('```json\n{"a":1}\n```', '{"a":1}'),
    ('```json\n{"a":1}\n```\n', '{"a":1}'),
    ('```json\n{"a":1}\n```  \n\n', '{"a":1}'),
    ('```\n{"a":1}\n```', '{"a":1}'),
    ('```JSON\r\n{"a":1}\r\n```', '{"a":1}'),
    ('\n \n```json \n{"a":1}\n```', '{"a":1}'),
    ('```json\n{\n  "a": 1\n}\n```', '{\n  "a": 1\n}'),
    ('```json\n{"a":1}', '{"a":1}'),
    ('```json\n{"a":"x```y"}\n```', '{"a":"x```y"}'),
    ('```json\n{"a":"`"}\n```', '{"a":"`"}'),
    ('```json\n```', ''),
    ('{"a":"```"}', '{"a":"```"}'),
    ('{"a":1}\n```', '{"a":1}\n```'),
    ('`x`', '`x`'),
    ('``', '``'),
    ('```json', '```json'),
    (' [1]', ' [1]'),
    ('  ', '  '),
    ('', '')]


@pytest.mark.parametrize("words,shown", FENCES, ids=range(len(FENCES)))
def test_fences_over_every_cut(words, shown):
    for pieces in every_cut(words):
        assert run_filter(ccproxy.strip_fence(), pieces)[:2] == (shown, None), pieces


BLANK = " \n\t\r\x85\u2003" * 500
ENDLESS = [     # (pieces, shown)
    (list(BLANK), BLANK), (list(BLANK + "x"), BLANK + "x"), (list(BLANK + "``"), BLANK + "``"),
    (list(BLANK + '```json\n{"a":1}\n```'), '{"a":1}'), ([BLANK] * 20, BLANK * 20),
    (list("```" + "a" * 3000), "```" + "a" * 3000), (list("```" + "a" * 3000 + "\n1\n```"), "1"),
    (list("```" + " " * 3000 + "\n1"), "1"), (list("``" + BLANK), "``" + BLANK),
    (list("```" + " " * 3000 + "a\n1"), "```" + " " * 3000 + "a\n1"),
    (list("```\n" + BLANK + "x"), BLANK + "x"),
    (list("```\n1" + BLANK + "2\n```"), "1" + BLANK + "2")]


class Measured:
    """A pattern that counts how many characters it was given."""

    def __init__(self, pattern):
        self.pattern, self.length = pattern, 0

    def match(self, text):
        self.length += len(text)
        return self.pattern.match(text)

    def fullmatch(self, text):
        self.length += len(text)
        return self.pattern.fullmatch(text)


@pytest.mark.parametrize("pieces,shown", ENDLESS, ids=range(len(ENDLESS)))
def test_fences_behind_endless_white_space(pieces, shown, monkeypatch):
    """Counted, not timed: what is held is not looked at again with each piece."""
    patterns = [Measured(pattern) for pattern in (ccproxy.FENCE_START, ccproxy.FENCE_MAYBE)]
    monkeypatch.setattr(ccproxy, "FENCE_START", patterns[0])
    monkeypatch.setattr(ccproxy, "FENCE_MAYBE", patterns[1])
    assert run_filter(ccproxy.strip_fence(), pieces)[:2] == (shown, None)
    assert all(pattern.length <= 8 * len("".join(pieces)) for pattern in patterns)


def test_an_endless_beginning_is_shown_at_last(monkeypatch):
    monkeypatch.setattr(ccproxy, "MAX_FENCE_CHARS", 100)
    steps = run_filter(ccproxy.strip_fence(), [" "] * 102 + ["```\n1"])[2]
    assert steps[99] == "" and steps[100] == " " * 101 and steps[-1] == " " * 102 + "```\n1"


def test_fences_as_they_were_understood_whole():
    """Over random texts and cuts, by the definition of a fence."""
    rng = random.Random(6)
    for _ in range(3000):
        words = "".join(rng.choice(["`", "``", "```", " ", "\n", "\r", "\t", "json", "x", "{"])
                        for _ in range(rng.randrange(10)))
        opening = re.match(r"\s*```[A-Za-z0-9_-]*[ \t]*\r?\n", words)
        whole = re.sub(r"\s*(```\s*)?\Z", "", words[opening.end():], count=1) if opening else words
        cuts = sorted(rng.randrange(len(words) + 1) for _ in range(rng.randrange(6)))
        pieces = [words[start:end] for start, end in zip([0] + cuts, cuts + [len(words)])]
        found = run_filter(ccproxy.strip_fence(), [piece for piece in pieces if piece])[0]
        if not opening or "`" not in whole:
            assert found == whole, (words, pieces)


def test_fences_of_two_blocks():
    run = ccproxy.strip_fence()
    assert run_filter(run, ["```json\n1\n```"])[0] == "1"
    assert run_filter(run, ["```json\n2\n```"])[0] == "2"


def test_fences_leave_other_blocks_alone():
    for kind in (THINKING, TOOL):
        assert run_filter(ccproxy.strip_fence(), ["```\nx\n```"], kind)[0] == "```\nx\n```"


def test_text_between_fences_goes_out_as_it_comes():
    steps = run_filter(ccproxy.strip_fence(), ["```json\n", '{"a":', "1}", "\n```"])[2]
    assert steps == ["", '{"a":', '{"a":1}', '{"a":1}', '{"a":1}']


# Names, thinking, and which filters a prompt has.

def test_names_are_restored():
    run = ccproxy.restore_names({"a_b": ccproxy.ToolName("a.b")})
    for sent, shown in (("a_b", "a.b"), ("other", "other")):
        block = ccproxy.Block(TOOL, "1", sent)
        assert run(ccproxy.Open(block)) == [ccproxy.Open(block)] and block.name == shown


def test_thinking_is_hidden():
    for kind, kept in ((THINKING, 0), (TEXT, 1), (TOOL, 1)):
        block = ccproxy.Block(kind)
        for event in (ccproxy.Open(block), ccproxy.Delta(block, "x"), ccproxy.Close(block)):
            assert ccproxy.hide_thinking(event) == [event] * kept
    for event in (ccproxy.Begin(), ccproxy.End("stop")):
        assert ccproxy.hide_thinking(event) == [event]


CHOSEN = [
    ({}, []),
    ({"show_thinking": False}, [{THINKING}]),
    ({"names": {"a_b": "a.b"}}, [set()]),
    ({"json_format": {}}, [{TEXT}]),
    ({"stops": ["x"]}, [{TEXT}]),
    ({"show_thinking": False, "names": {"a_b": "a.b"}, "json_format": {"schema": {}},
      "stops": ["x"]}, [{THINKING}, set(), {TEXT}, {TEXT}])]


@pytest.mark.parametrize("members,touches", CHOSEN, ids=range(len(CHOSEN)))
def test_filters_of_a_prompt(members, touches):
    """The lane may stay open for what no filter touches."""
    prompt = ccproxy.Prompt(asked="m", turns=[], **members)
    assert [set(one.touches) for one in ccproxy.choose_filters(prompt)] == touches
