"""ANSWER FILTERS: stop sequences, code fences, tool names and hidden thinking, over every cut."""
from __future__ import annotations

import itertools
import random

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
