"""The laws of STYLE 10 over a provider format's random answers; both test files call these."""
from __future__ import annotations

import json
import random
from typing import Any

from harness import ccproxy
from pure import (check_events, has_note, random_cuts, read_frames, run)
from pure_formats import (UPSTREAMS, hold_parity, make_answer, new_answer, read_events, run_plain,
                          run_stream)

SEEDS = range(60)
PROMPTS = [{}, {"show_thinking": False}, {"include_usage": True}]
FILTERED = PROMPTS + [{"stops": ["th", "quoted\"Hel"]}, {"json_format": {}}]


def grammar_law(api: str, odd: bool) -> None:
    for seed in SEEDS:
        made = make_answer(api, seed, odd)
        _, events = read_events(UPSTREAMS[api], made.data)
        check_events(events)
        assert isinstance(events[-1], ccproxy.End) == bool(made.reason), seed


def truth_law(api: str, odd: bool) -> None:
    """Against what the maker of the answer knows, for a client that asked for all."""
    for seed in SEEDS:
        made = make_answer(api, seed, odd)
        answer, folded = run_stream(UPSTREAMS[api], "chat", made.data, allow_empty=True)
        assert (answer.error is None) == bool(made.reason), seed
        message = folded["message"]
        said, thought = message["content"], message.get("reasoning_content", "")
        refused = message.get("refusal", "")
        if not made.reason:
            assert made.text.startswith(said) and made.thinking.startswith(thought), seed
            assert made.refusal.startswith(refused), seed
            continue
        assert (said, thought, refused) == (made.text, made.thinking, made.refusal), seed
        shown = {one["id"]: one["function"]["arguments"] for one in message.get("tool_calls", ())}
        assert sorted(shown) == sorted(made.shown), seed
        cut = [name for name, given in made.calls.items() if given is None]
        assert has_note(answer.reply.notes, "cut=") == bool(cut), seed
        for name in made.shown:
            if name not in cut:
                assert json.loads(shown[name]) == made.calls[name], seed
        whole = {block.call_id for block in answer.reply.of_kind("tool") if block.whole}
        assert whole == set(made.calls) - set(cut), seed
        if cut or made.reason == "length":
            assert folded["finish_reason"] == "length", seed
        elif made.reason in ("stop", "tool_calls"):
            assert folded["finish_reason"] == ("tool_calls" if made.calls else "stop"), seed


def parity_law(api: str, face: str, odd: bool) -> None:
    for seed in SEEDS:
        for members in PROMPTS:
            hold_parity(UPSTREAMS[api], face, make_answer(api, seed, odd).data, **members)


def cuts_law(api: str, face: str) -> None:
    for seed in SEEDS:
        data, rng = make_answer(api, seed).data, random.Random(seed)
        members: Any = FILTERED[seed % len(FILTERED)]
        whole = run(new_answer(UPSTREAMS[api], face, **members), data)
        for cuts in ("bytewise", random_cuts(rng, data)):
            assert run(new_answer(UPSTREAMS[api], face, **members), data, cuts) == whole, seed
        answers = [run_plain(UPSTREAMS[api], face, data)[1]]
        answer = new_answer(UPSTREAMS[api], face, stream=False)
        run(answer, data, "bytewise")
        assert (answer.error is None) == (answers[0] is not None), seed
        assert answers[0] is None or json.loads(ccproxy.to_json(answer.body())) == answers[0], seed


def reframed(rng: random.Random, data: bytes) -> bytes:
    """The same server-sent events in some other legal way: data over several lines, other fields
    and comments between them, any line end, a byte order mark."""
    lines = []
    for line in data.replace(b"\r\n", b"\n").split(b"\n"):
        whole = ccproxy.decode_object(line[5:].strip()) if line.startswith(b"data:") else None
        if whole and rng.random() < 0.7:
            for piece in json.dumps(whole, indent=rng.choice([0, 1])).encode().split(b"\n"):
                lines.append(rng.choice([b"data:", b"data: "]) + piece)
                lines += [rng.choice([b": x", b"id: 1", b"retry: 5", b"data", b"data:", b"wibble",
                                      b"event: y", b" "])] * (rng.random() < 0.1)
        else:
            lines.append(line)
    ends = rng.choice([[b"\n"], [b"\n", b"\r\n"], [b"\r"], [b"\r", b"\r\n"]])
    made = b"".join(line + rng.choice(ends) for line in lines[:-1])
    return (b"\xef\xbb\xbf" if rng.random() < 0.5 else b"") + made


def framing_law(api: str, face: str) -> None:
    """An answer is the same however its server-sent events are framed, and however that is cut."""
    for seed in SEEDS:
        for odd in (False, True):
            data, rng = make_answer(api, seed, odd).data, random.Random(seed)
            other = reframed(rng, data)
            wanted = read_frames(run(new_answer(UPSTREAMS[api], face), data))
            whole = run(new_answer(UPSTREAMS[api], face), other)
            assert read_frames(whole) == wanted, seed
            for cuts in ("bytewise", random_cuts(rng, other)):
                again = run(new_answer(UPSTREAMS[api], face), other, cuts)
                assert read_frames(again) == wanted if odd else again == whole, seed


def lane_law(api: str, face: str) -> None:
    """Equal bytes where strings are escaped as JSON.stringify does, else equal JSON."""
    for seed in SEEDS:
        for odd in (False, True):
            data = make_answer(api, seed, odd).data
            members: Any = PROMPTS[seed % len(PROMPTS)]
            fast, slow = [run(new_answer(UPSTREAMS[api], face, lanes=lanes, **members), data)
                          for lanes in (True, False)]
            assert read_frames(fast) == read_frames(slow) if odd else fast == slow, seed
            fast, slow = [run_plain(UPSTREAMS[api], face, data, lanes=lanes)[1]
                          for lanes in (True, False)]
            assert fast == slow, seed


def restart_law(api: str, face: str) -> None:
    """A call that broke after thinking is repeated: both ways and all cuts show the same."""
    for seed in list(SEEDS)[:40]:
        made = make_answer(api, seed)
        shown = []
        for lanes, cuts in ((True, None), (False, None), (True, "bytewise")):
            answer = new_answer(UPSTREAMS[api], face, lanes=lanes)
            frames = answer.feed(first_thinking(api))
            assert answer.error is not None and not answer.visible
            answer.restart()
            shown.append(frames + run(answer, made.data, cuts))
        assert shown[0] == shown[1] == shown[2], seed


def first_thinking(api: str) -> bytes:
    from fake_provider import SSE_OF
    return SSE_OF[api]([("thinking", "The"), ("thinking", " user"),
                        ("error", "overloaded_error", "Overloaded")])


def count_ordinary_lines(api: str, face: str, data: bytes) -> int:
    """How many lines of a stream the lane does not take."""
    read = []

    def read_line(reading: Any, line: bytes) -> Any:
        read.append(line)
        return UPSTREAMS[api].read_line(reading, line)

    answer = new_answer(UPSTREAMS[api], face)
    answer.upstream = UPSTREAMS[api]._replace(read_line=read_line)
    run(answer, data)
    assert answer.error is None
    return len(read)
