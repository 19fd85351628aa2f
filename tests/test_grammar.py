"""EVENTS and GRAMMAR: where blocks open and close, halves of characters, parallel calls, and
which reason an answer ends for."""
from __future__ import annotations

import json

import pytest
from fake_upstream import ndjson, recorded
from harness import ccproxy
from pure import NAMES, check_events, has_note, make_answer, plain_line, read_events, split_lines

TEXT, THINKING, TOOL = ccproxy.TEXT, ccproxy.THINKING, ccproxy.TOOL


# The law.

@pytest.mark.parametrize("name", NAMES)
def test_grammar_of_recorded(name):
    check_events(read_events(split_lines(recorded(name)))[1])


@pytest.mark.parametrize("odd", [False, True])
def test_grammar_of_random(odd):
    for seed in range(300):
        made = make_answer(seed, odd)
        reading, events = read_events(split_lines(made.data))
        check_events(events)
        assert isinstance(events[-1], ccproxy.End) == made.ended, seed
        if not made.ended:      # what waited behind an unfinished call is lost with it
            assert made.text.startswith(say(events, TEXT)), seed
            assert made.thinking.startswith(say(events, THINKING)), seed
            continue
        assert say(events, TEXT) == made.text and say(events, THINKING) == made.thinking, seed
        calls = {event.block.call_id: event.block for event in events
                 if isinstance(event, ccproxy.Close) and event.block.kind == TOOL}
        assert list(calls) == list(made.calls), seed
        for call_id, given in made.calls.items():
            block = calls[call_id]
            assert block.whole == (given is not None), seed
            shown = "".join(event.text for event in events if isinstance(event, ccproxy.Delta)
                            and event.block is block)
            assert block.text == shown, seed
            assert given is None or json.loads(shown) == given, seed


def say(events, kind):
    return "".join(event.text for event in events
                   if isinstance(event, ccproxy.Delta) and event.block.kind == kind)


# Scripts of what an upstream says, and the events in short.

def show(events):
    """Events in short: (t)ext, thin(k)ing or (c)all and what it says; `!` a call that was cut."""
    letters = {TEXT: "t", THINKING: "k", TOOL: "c"}
    shown, open_text = [], ""
    for event in events:
        if isinstance(event, ccproxy.Open):
            open_text = letters[event.block.kind] + (
                event.block.call_id + ":" if event.block.kind == TOOL else ":")
        elif isinstance(event, ccproxy.Delta):
            open_text += event.text
        elif isinstance(event, ccproxy.Close):
            cut = event.block.kind == TOOL and not event.block.whole
            shown.append(open_text + ("!" if cut else ""))
        elif isinstance(event, ccproxy.End):
            shown.append("=" + event.reason)
        elif isinstance(event, ccproxy.Fail):
            shown.append("=fail")
    return shown


def run_script(script):
    """`script` is a list of lines in short: (word, arguments...)."""
    reading, events = read_events([plain_line(SCRIPT_WORDS[name](*arguments))
                                   for name, *arguments in script])
    check_events(events)
    return reading, events


SCRIPT_WORDS = {
    "t": lambda words: {"type": "text-delta", "id": "0", "text": words},
    "k": lambda words: {"type": "reasoning-delta", "id": "0", "text": words},
    "start": lambda name: {"type": "tool-input-start", "id": name, "toolName": "f"},
    "more": lambda name, piece: {"type": "tool-input-delta", "id": name, "delta": piece},
    "done": lambda name, text: {"type": "tool-call", "toolCallId": name, "toolName": "f",
                                "input": json.loads(text)},
    "end": lambda reason: {"type": "finish", "finishReason": reason},
    "fail": lambda: {"type": "error", "error": "x"}}

STOP = ("end", "stop")
A, B = '{"a":1}', '{"b":2}'
SCRIPTS = [
    # Nothing, and single blocks.
    ([STOP], ["=stop"]),
    ([("fail",)], ["=fail"]),
    ([("t", "a"), ("t", "b"), STOP], ["t:ab", "=stop"]),
    ([("k", "a"), ("t", "b"), ("k", "c"), STOP], ["k:a", "t:b", "k:c", "=stop"]),
    ([("t", "a"), ("fail",)], ["t:a", "=fail"]),
    # Calls: pieces, whole, both, repeated.
    ([("start", "1"), ("more", "1", '{"a"'), ("more", "1", ":1}"), ("done", "1", A), STOP],
     ["c1:" + A, "=tool_calls"]),
    ([("done", "1", A), STOP], ["c1:" + A, "=tool_calls"]),
    ([("start", "1"), ("done", "1", A), STOP], ["c1:" + A, "=tool_calls"]),
    ([("start", "1"), ("more", "1", '{"a"'), ("done", "1", A), STOP], ["c1:" + A, "=tool_calls"]),
    ([("start", "1"), ("more", "1", '{ "a": 1 }'), ("done", "1", A), STOP],
     ['c1:{ "a": 1 }', "=tool_calls"]),
    ([("start", "1"), ("more", "1", "  "), ("done", "1", A), STOP], ["c1:  " + A, "=tool_calls"]),
    ([("start", "1"), ("start", "1"), ("done", "1", A), ("done", "1", A), ("more", "1", "x"), STOP],
     ["c1:" + A, "=tool_calls"]),
    ([("more", "1", "x"), ("t", "a"), STOP], ["t:a", "=stop"]),
    ([("done", "1", A), ("done", "2", B), STOP], ["c1:" + A, "c2:" + B, "=tool_calls"]),
    # Text around calls; what comes while a call is unfinished waits for it.
    ([("t", "a"), ("done", "1", A), ("t", "b"), STOP], ["t:a", "c1:" + A, "t:b", "=tool_calls"]),
    ([("start", "1"), ("more", "1", "{"), ("t", "b"), ("k", "c"), ("t", "d"), ("done", "1", A),
      ("t", "e"), STOP], ["c1:" + A, "t:b", "k:c", "t:de", "=tool_calls"]),
    ([("start", "1"), ("t", "b"), ("done", "1", A), STOP], ["t:b", "c1:" + A, "=tool_calls"]),
    ([("start", "1"), ("more", "1", "{"), ("t", "b"), STOP], ["c1:{!", "t:b", "=length"]),
    # Parallel calls, in the order in which they began.
    ([("start", "1"), ("start", "2"), ("more", "1", '{"a"'), ("more", "2", '{"b"'),
      ("more", "1", ":1}"), ("more", "2", ":2}"), ("done", "2", B), ("done", "1", A), STOP],
     ["c1:" + A, "c2:" + B, "=tool_calls"]),
    ([("start", "1"), ("start", "2"), ("more", "1", "{"), ("more", "2", B), ("done", "2", B),
      ("more", "1", A[1:]), ("done", "1", A), STOP], ["c1:" + A, "c2:" + B, "=tool_calls"]),
    ([("start", "1"), ("start", "2"), ("start", "3"), ("more", "1", "{"), ("more", "2", '{"b":'),
      ("done", "3", A), ("done", "1", A), ("more", "2", "2}"), ("done", "2", B), STOP],
     ["c1:" + A, "c2:" + B, "c3:" + A, "=tool_calls"]),
    ([("start", "1"), ("more", "1", "{"), ("t", "x"), ("start", "2"), ("more", "2", "{"),
      ("t", "y"), ("done", "2", B), ("done", "1", A), STOP],
     ["c1:" + A, "t:x", "c2:" + B, "t:y", "=tool_calls"]),
    ([("start", "1"), ("more", "1", "{"), ("done", "2", B), ("done", "1", A), STOP],
     ["c1:" + A, "c2:" + B, "=tool_calls"]),
    # Calls that were cut: as far as they came, not at all without any argument, never a good end.
    ([("start", "1"), STOP], ["=length"]),
    ([("start", "1"), ("more", "1", '{"a"'), STOP], ['c1:{"a"!', "=length"]),
    ([("start", "1"), ("more", "1", A), STOP], ["c1:%s!" % A, "=length"]),
    ([("start", "1"), ("more", "1", "{"), ("start", "2"), ("done", "2", B), STOP],
     ["c1:{!", "c2:" + B, "=length"]),
    ([("done", "1", A), ("start", "2"), ("more", "2", "{"), ("end", "tool-calls")],
     ["c1:" + A, "c2:{!", "=length"]),
    ([("start", "1"), ("more", "1", '{"a"'), ("fail",)], ['c1:{"a"!', "=fail"]),
    # The reason is judged by what was emitted.
    ([("t", "a"), ("end", "tool-calls")], ["t:a", "=stop"]),
    ([("done", "1", A), ("end", "tool-calls")], ["c1:" + A, "=tool_calls"]),
    ([("done", "1", A), ("end", "length")], ["c1:" + A, "=length"]),
    ([("t", "a"), ("end", "length")], ["t:a", "=length"]),
    ([("t", "a"), ("end", "content-filter")], ["t:a", "=filtered"]),
    ([("t", "a"), ("end", "pause_turn")], ["t:a", "=paused"])]


@pytest.mark.parametrize("script,shown", SCRIPTS, ids=range(len(SCRIPTS)))
def test_scripts(script, shown):
    reading, events = run_script(script)
    assert show(events) == shown
    assert reading.over and reading.live is None and not reading.waiting
    begun = {step[1] for step in script if step[0] == "start"}
    done = {step[1] for step in script if step[0] == "done"}
    assert len([note for note in reading.notes if note.startswith("cut=")]) == len(begun - done)


def test_deltas_of_the_open_call_go_out_at_once():
    reading = ccproxy.Reading(began=True)
    texts = []
    for step in (("start", "1"), ("more", "1", '{"a"'), ("more", "1", ":1}")):
        events = ccproxy.ALPHA.read_line(reading, plain_line(SCRIPT_WORDS[step[0]](*step[1:])))
        texts.append([event.text for event in events if isinstance(event, ccproxy.Delta)])
    assert texts == [[], ['{"a"'], [":1}"]]


def test_pieces_that_differ_from_the_call_are_noted_and_the_call_is_kept():
    reading, events = run_script([("start", "1"), ("more", "1", '{"a":2}'), ("done", "1", A), STOP])
    assert has_note(reading.notes, "tool_input=")
    (block,) = reading.calls.values()
    assert block.text == A and block.whole


def test_pieces_that_say_the_same_are_not_noted():
    reading, _ = run_script([("start", "1"), ("more", "1", '{"b": 1, "a": 2}'),
                             ("done", "1", '{"a":2,"b":1}'), STOP])
    assert reading.notes == []


# Halves of characters (a surrogate pair cut between two deltas).

HALVES = [
    (["\ud83d", "\ude80"], "\U0001f680"),
    (["a\ud83d", "\ude80b"], "a\U0001f680b"),
    (["\ud83d\ude80"], "\U0001f680"),
    (["a", "b"], "ab"),
    (["\ud83d"], "\ufffd"),
    (["a\ud83d", "b"], "a\ufffdb"),
    (["\ude80"], "\ufffd"),
    (["a\ude80b"], "a\ufffdb"),
    (["\ude80\ud83d"], "\ufffd\ufffd"),
    (["\ud83d", "\ud83d", "\ude80"], "\ufffd\U0001f680"),
    (["\ud83d", "", "\ude80"], "\U0001f680"),
    (["\U0001f680\ud83d", "\ude80\U0001f680"], "\U0001f680" * 3)]


@pytest.mark.parametrize("pieces,whole", HALVES, ids=range(len(HALVES)))
@pytest.mark.parametrize("kind", ["text", "reasoning"])
def test_halves_across_deltas(kind, pieces, whole):
    lines = [plain_line({"type": kind + "-delta", "id": "0", "text": one}) for one in pieces]
    _, events = read_events(lines + split_lines(ndjson({"type": "finish"})))
    check_events(events)
    assert say(events, THINKING if kind == "reasoning" else TEXT) == whole


@pytest.mark.parametrize("pieces,whole", HALVES, ids=range(len(HALVES)))
@pytest.mark.parametrize("waiting", [False, True])
def test_halves_in_calls(pieces, whole, waiting):
    """Also in a call that waits for another one."""
    lines = [plain_line({"type": "tool-input-start", "id": "0", "toolName": "g"}),
             plain_line({"type": "tool-input-delta", "id": "0", "delta": "{"})] * waiting
    lines.append(plain_line({"type": "tool-input-start", "id": "1", "toolName": "f"}))
    lines += [plain_line({"type": "tool-input-delta", "id": "1", "delta": piece})
              for piece in ['{"q":"'] + pieces + ['"}']]
    lines.append(plain_line({"type": "tool-call", "toolCallId": "1", "toolName": "f",
                             "input": {"q": whole}}))
    lines.append(plain_line({"type": "tool-call", "toolCallId": "0", "toolName": "g",
                             "input": {}}) if waiting else b"")
    _, events = read_events(lines + split_lines(ndjson({"type": "finish"})))
    check_events(events)
    block = [event.block for event in events if isinstance(event, ccproxy.Open)][-1]
    assert json.loads(block.text) == {"q": whole}


def test_a_half_at_the_end_of_a_block_is_not_joined_with_the_next_block():
    lines = [plain_line({"type": kind + "-delta", "id": "0", "text": half})
             for kind, half in (("reasoning", "\ud83d"), ("text", "\ude80"))]
    _, events = read_events(lines + split_lines(ndjson({"type": "finish"})))
    assert say(events, THINKING) == say(events, TEXT) == "\ufffd"


def test_waiting_pieces_and_halves():
    """Halves in text that waits for a call are joined as well."""
    half, other = ("t", "\ud83d"), ("t", "\ude80")
    _, events = run_script([("start", "1"), ("more", "1", "{"), half, other, ("done", "1", A), half,
                            other, STOP])
    assert say(events, TEXT) == "\U0001f680" * 2


# Blocks.

BLOCK_TEXTS = [([], ""), (["a", "b"], "ab"), ([b"a\\n", b"\\u00e9", "x"], "a\n\u00e9x"),
               (["x", b"\\ud83d", b"\\ude80", "y"], "x\U0001f680y"), ([b"\xc3\xa9"], "\u00e9")]


@pytest.mark.parametrize("pieces,whole", BLOCK_TEXTS, ids=range(len(BLOCK_TEXTS)))
def test_text_of_a_block(pieces, whole):
    """Bytes are escaped JSON, neighbouring ones are decoded together."""
    assert ccproxy.Block(TEXT, pieces=list(pieces)).text == whole
    assert ccproxy.Block(TEXT, pieces=list(pieces)).text == whole     # and may be read twice
