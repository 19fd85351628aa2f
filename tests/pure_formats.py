"""What the tests of the provider formats share (for tests/pure.py): answers over any upstream
format, the laws, and random answers as neutral steps."""
from __future__ import annotations

import functools
import json
import random
import re
from typing import Any, Dict, List, NamedTuple

from fake_provider import SSE_OF, compact
from harness import ccproxy
from pure import ALL_FACES, INPUTS, WORDS, check_frames, cut_text, odd_string, run
from test_answer import check_parity

UPSTREAMS = {"openai": ccproxy.OPENAI, "anthropic": ccproxy.ANTHROPIC}
NEVER = re.compile(rb"(?!)")


def new_answer(upstream: Any, face: str, stream: bool = True, lanes: bool = True,
               allow_empty: bool = False, **members: Any) -> Any:
    """An Answer over this upstream format; `members` are those of its Prompt."""
    if not lanes:
        upstream = upstream._replace(lanes={kind: NEVER for kind in upstream.lanes})
    prompt = ccproxy.Prompt(asked="m", turns=[], stream=stream, **members)
    reply = ccproxy.Reply("id", "m", 0, input_estimate=5, include_usage=prompt.include_usage,
                          carry_thinking=prompt.carry_thinking, echo=prompt.echo)
    return ccproxy.Answer(ALL_FACES[face], upstream, reply, prompt, allow_empty)


def run_stream(upstream: Any, face: str, data: bytes, cuts: Any = None, **members: Any) -> Any:
    """(the answer, what an SDK folds of its stream); the wire grammar is checked on the way."""
    answer = new_answer(upstream, face, **members)
    return answer, check_frames(face, answer, run(answer, data, cuts))


def run_plain(upstream: Any, face: str, data: bytes, **members: Any) -> Any:
    """(the answer, its body or None when it failed)."""
    answer = new_answer(upstream, face, stream=False, **members)
    assert run(answer, data) == b"", "a plain answer has no frames"
    return answer, (json.loads(ccproxy.to_json(answer.body())) if not answer.error else None)


def hold_parity(upstream: Any, face: str, data: bytes, **members: Any) -> None:
    stream, folded = run_stream(upstream, face, data, **members)
    check_parity(face, stream, folded, *run_plain(upstream, face, data, **members))


def read_events(upstream: Any, data: bytes) -> Any:
    """(reading, events up to the end); a cut answer is ended as failed."""
    reading, events = ccproxy.Reading(), []
    for line in data.split(b"\n"):
        if not reading.over:
            events += upstream.read_line(reading, line)
    if not reading.over:
        events += ccproxy.fail_answer(reading, ccproxy.ProxyError("upstream", "cut"))
    return reading, events


class Made(NamedTuple):
    """A random answer and what is in it."""

    data: bytes
    text: str
    thinking: str
    calls: Dict[str, Any]       # by id: the arguments, None where the call was cut
    shown: List[str]            # ids of calls that have arguments, or are whole without any
    reason: str                 # "" when the answer was cut or failed
    refusal: str = ""


NOISE = {
    "openai": [b": OPENROUTER PROCESSING\n\n", b"\n", b"event: x\n", b"data: {}\n\n",
               b'data: {"choices":[]}\n\n', b'data: {"choices":null}\n\n', b"data: [1]\n\n",
               b'data: {"choices":[{"index":1,"delta":{"content":"second"}}]}\n\n',
               b'data: {"choices":[{"index":0,"delta":{"content":null,"tool_calls":[]}}]}\n\n',
               b'data: {"choices":[{"index":0,"delta":{"content":5},"finish_reason":null}]}\n\n',
               b'data: {"choices":[{"index":0}]}\n\n', b'data: {"choices":[{"delta":[]}]}\n\n',
               b'data: {"choices":[{"index":0,"delta":{"content":"cut\n\n', b"\r\n", b"\xff\n",
               b'data: {"error":null,"choices":[]}\n\n', b"data:\n\n"],
    "anthropic": [b'event: ping\ndata: {"type": "ping"}\n\n', b": x\n\n", b"\n", b"data: {}\n\n",
                  b'data: {"type":"new_event","index":0}\n\n', b"data: [1]\n\n", b"\r\n",
                  b'data: {"type":"content_block_delta","index":0,"delta":{"type":"x"}}\n\n',
                  b'data: {"type":"content_block_delta","index":0,"delta":null}\n\n',
                  b'data: {"type":["x"]}\n\n', b'data: {"type":"message_delta"}\n\n',
                  b'data: {"type":"content_block_delta","index":99,"delta":{"type":'
                  b'"input_json_delta","partial_json":"x"}}\n\n', b"data: {cut\n\n", b"\xff\xfe\n"]}


def odd_json(rng: random.Random, value: Any) -> str:
    """JSON of a value in some other legal way: members in any order, blanks, needless escapes."""
    comma, colon = rng.choice([(",", ":"), (",", ":"), (", ", ": ")])
    if isinstance(value, str):
        return odd_string(rng, value)
    if isinstance(value, list):
        return "[%s]" % comma.join(odd_json(rng, one) for one in value)
    if isinstance(value, dict):
        members = list(value.items())
        if rng.random() < 0.1:
            rng.shuffle(members)
        if rng.random() < 0.05:
            members.append(("x_extra", {"a": 1}))
        return "{%s}" % comma.join('"%s"%s%s' % (name, colon, odd_json(rng, one))
                                   for name, one in members)
    return json.dumps(value)


class StepMaker:
    """Makes the steps of one random answer."""

    def __init__(self, rng: random.Random, api: str, mixed: bool) -> None:
        self.rng, self.api, self.mixed = rng, api, mixed
        self.steps: List[Any] = []
        self.text = self.thinking = self.refusal = ""
        self.calls: Dict[str, Any] = {}
        self.running: Dict[str, List[str]] = {}
        self.cut: List[str] = []

    def add_words(self) -> None:
        kind = self.rng.choice(["text", "thinking", "text", "thinking"] + ["refusal"] * (
            self.api == "openai"))
        for _ in range(self.rng.randrange(1, 5)):
            words = "".join(self.rng.choice(WORDS) for _ in range(self.rng.randrange(1, 4)))
            pieces = [words]
            if self.rng.random() < 0.2:
                pieces, words = [words + "\ud83d", "\ude80"], words + "\U0001f680"
            self.steps += [(kind, piece) for piece in pieces]
            setattr(self, kind, getattr(self, kind) + words)
        if kind == "thinking" and self.rng.random() < 0.5:
            self.steps.append(("signature", "sig+/="))

    def start_call(self) -> None:
        name = "call_%d" % len(self.calls)
        self.calls[name] = given = self.rng.choice(INPUTS)
        written = json.dumps(given, ensure_ascii=False)
        self.running[name] = [] if not given and self.rng.random() < 0.5 else cut_text(
            self.rng, written)
        self.steps.append(("start", name, "f"))
        if not self.mixed:
            self.finish_call(name)

    def finish_call(self, name: str) -> None:
        self.steps += [("more", name, piece) for piece in self.running.pop(name)]
        self.steps.append(("stop", name))

    def continue_call(self) -> None:
        name = self.rng.choice(list(self.running))
        for _ in range(self.rng.randrange(1, 4)):
            if self.running[name]:
                self.steps.append(("more", name, self.running[name].pop(0)))
        if not self.running[name]:
            self.finish_call(name)

    def step(self) -> None:
        choice = self.rng.random()
        if choice < 0.45:
            self.add_words()
        elif choice < 0.65:
            self.start_call()
        elif choice < 0.85 and self.running:
            self.continue_call()
        else:
            self.steps.append(("raw", self.rng.choice(NOISE[self.api])))

    def cut_last(self) -> None:
        """A last call that max_tokens cut in the middle of its arguments."""
        name = "call_%d" % len(self.calls)
        self.calls[name] = None
        self.cut.append(name)
        self.steps += [("start", name, "f"), ("more", name, '{"a": [1'), ("stop", name)]


@functools.lru_cache(maxsize=None)
def make_answer(api: str, seed: int, odd: bool = False) -> Made:
    """A random answer of an API: any blocks in any order, calls mixed, any end or none."""
    rng = random.Random(seed)
    maker = StepMaker(rng, api, rng.random() < 0.5)
    for _ in range(rng.randrange(10)):
        maker.step()
    for name in list(maker.running):
        maker.finish_call(name)
    reason = rng.choice(["stop", "length", "tool_calls", "filtered"])
    if rng.random() < 0.2:
        maker.cut_last()
    empty = [step[1] for step in maker.steps if step[0] == "start" and not any(
        one[:2] == ("more", step[1]) for one in maker.steps)]
    calls = {name: None if name in empty and reason == "length" else given
             for name, given in maker.calls.items()}
    if rng.random() < 0.8:
        maker.steps.append(("usage", {"input": 20, "output": 9, "read": 4}))
    end = rng.random()
    if end < 0.75:
        maker.steps.append(("end", reason))
        maker.step()                # nothing of this may be seen
    elif end < 0.9:
        maker.steps.append(("error", "overloaded_error", "Overloaded"))
    said = {"text": maker.text, "thinking": maker.thinking, "refusal": maker.refusal}
    if end < 0.75:
        before = maker.steps.index(("end", reason))
        said = {kind: whole(step[1] for step in maker.steps[:before] if step[0] == kind)
                for kind in said}
    data = SSE_OF[api](maker.steps, (lambda value: odd_json(rng, value)) if odd else compact)
    if odd and rng.random() < 0.5:
        data = data.replace(b"\n", b"\r\n")
    shown = [name for name in calls if name not in empty or reason != "length"]
    return Made(data, said["text"], said["thinking"], calls, shown,
                reason if end < 0.75 else "", said["refusal"])


def whole(pieces: Any) -> str:
    """Pieces whose surrogate pairs may be cut, joined."""
    text = "".join(pieces)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
