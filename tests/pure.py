"""What the tests of the pure sections share: requests translated as the shell does it, answers
run without a socket, checks of both wire formats, and random answers."""
from __future__ import annotations

import functools
import json
import random
import re
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

from harness import ccproxy, fold_chat, fold_messages, make_config

FACES = {"chat": ccproxy.CHAT, "messages": ccproxy.MESSAGES}       # those that read `messages`
ALL_FACES = {**FACES, "responses": ccproxy.RESPONSES}
NAMES = ["01", "02", "03", "04", "05", "06", "07", "08", "09", "10_", "10b", "11", "12", "13",
         "14", "15"]
CONFIG, MODELS = make_config(), ccproxy.builtin_models()
PNG = "data:image/png;base64,iVBORw0KGgo="
USER = {"role": "user", "content": "hi"}
NO_LANES = ccproxy.ALPHA._replace(lanes={kind: re.compile(rb"(?!)") for kind in
                                         ccproxy.ALPHA.lanes})


# Requests.

def read_prompt(face: str, body: Any, model: Optional[str] = None) -> Any:
    """A request's body (JSON or bytes) as the prompt that is sent."""
    notes: List[str] = []
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    prompt = ALL_FACES[face].parse(ccproxy.parse_object(data, notes), notes)
    found = ccproxy.resolve_model(prompt.asked if model is None else model, MODELS, CONFIG,
                                  notes)
    prompt.model = found.id
    prompt.effort = ccproxy.fit_effort(prompt.effort, found, notes)
    prompt.max_tokens = ccproxy.fit_max_tokens(prompt.max_tokens, found, notes)
    ccproxy.repair_prompt(prompt)
    return prompt


def translate(face: str, body: Any, model: Optional[str] = None) -> Tuple[Any, List[str]]:
    """(the whole upstream body, notes) of a request."""
    prompt = read_prompt(face, body, model)
    return json.loads(ccproxy.build_alpha(prompt, "session")), prompt.notes


def params_of(face: str, body: Any, model: Optional[str] = None) -> Any:
    return translate(face, body, model)[0]["params"]


def refusal(face: str, body: Any) -> Any:
    """The ProxyError that a request is refused with, None when it is not."""
    try:
        translate(face, body)
    except ccproxy.ProxyError as error:
        return error
    return None


def request(face: str, **members: Any) -> Any:
    given = {"input": "hi"} if face == "responses" else {"messages": [USER]}
    body = {"model": "vendor/unknown", **given, **members}
    if face == "messages":
        body.setdefault("max_tokens", 100)
    return body


def at(value: Any, path: str) -> Any:
    """The member of a JSON value at a path such as `messages.0.content`."""
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def has_note(notes: Iterable[str], words: str) -> bool:
    return any(words in note for note in notes)


def text(words: str, **more: Any) -> Any:
    return {"type": "text", "text": words, **more}


def check_params(params: Any) -> None:
    """Whatever was asked, an upstream gets this: UPSTREAM 1.6, 1.8 and 4."""
    assert params["stream"] is True and 1 <= params["max_tokens"] <= 200000
    system = params["system"]
    assert system == " " or system and all(block["text"] for block in system)
    names = [tool["name"] for tool in params["tools"]]
    assert len(set(names)) == len(names)
    for tool in params["tools"]:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool["name"])
        assert tool["input_schema"]["type"] == "object" and "$schema" not in tool["input_schema"]
    choice = params.get("tool_choice", {"type": "auto"})
    assert choice["type"] in ("auto", "any") or choice["name"] in names
    check_messages(params["messages"])


def check_messages(messages: Any) -> None:
    """Roles and parts in order, every call answered once and right behind its turn."""
    assert messages
    pending: Dict[str, str] = {}
    seen: List[str] = []
    for message in messages:
        kinds = [part["type"] for part in message["content"]]
        assert kinds, "a message without content"
        assert all(part["text"] for part in message["content"] if part["type"] == "text")
        if message["role"] == "tool":
            results = {part["toolCallId"]: part["toolName"] for part in message["content"]}
            assert results == pending and len(kinds) == len(results)
            assert set(kinds) == {"tool-result"}
            pending = {}
            continue
        assert not pending, "a call without its result"
        if message["role"] == "user":
            assert set(kinds) <= {"text", "image"}
            continue
        assert message["role"] == "assistant" and set(kinds) <= {"reasoning", "text", "tool-call"}
        order = ["reasoning", "text", "tool-call"]
        assert kinds == sorted(kinds, key=order.index)
        for part in message["content"]:
            if part["type"] == "tool-call":
                assert isinstance(part["input"], dict) and part["toolCallId"] not in seen
                assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", part["toolName"])
                seen.append(part["toolCallId"])
                pending[part["toolCallId"]] = part["toolName"]
    assert not pending, "a call without its result"


# Answers.

def new_answer(face: str, stream: bool = True, lanes: bool = True, allow_empty: bool = False,
               **members: Any) -> Any:
    """An Answer; `members` are those of its Prompt."""
    prompt = ccproxy.Prompt(asked="m", turns=[], stream=stream, **members)
    reply = ccproxy.Reply("id", "m", 0, input_estimate=5, include_usage=prompt.include_usage,
                          carry_thinking=prompt.carry_thinking, echo=prompt.echo)
    return ccproxy.Answer(ALL_FACES[face], ccproxy.ALPHA if lanes else NO_LANES, reply, prompt,
                          allow_empty)


def run(answer: Any, data: bytes, cuts: Any = None) -> bytes:
    """All frames of an answer fed with these bytes in pieces that end at `cuts`."""
    frames = b"".join(answer.feed(piece) for piece in cut_bytes(data, cuts))
    return frames if answer.over else frames + answer.eof()


def cut_bytes(data: bytes, cuts: Any) -> Iterator[bytes]:
    if cuts == "bytewise":
        cuts = range(1, len(data))
    start = 0
    for cut in list(cuts or []) + [len(data)]:
        yield data[start:cut]
        start = cut


def random_cuts(rng: random.Random, data: bytes) -> List[int]:
    return sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 30)))


def read_frames(data: bytes) -> List[Any]:
    """The JSON of every SSE frame; comments are left out, [DONE] stays a string."""
    frames = []
    assert data == b"" or data.endswith(b"\n\n")
    assert data.decode().splitlines() == data.decode().split("\n")[:-1], "cut by splitlines"
    for frame in data.decode().split("\n\n")[:-1]:
        if frame.startswith(": "):
            assert "\n" not in frame
            continue
        lines = frame.split("\n")
        assert lines[-1].startswith("data: ") and len(lines) <= 2
        value = lines[-1][6:]
        decoded = value if value == "[DONE]" else json.loads(value)
        if len(lines) == 2:
            assert lines[0] == "event: " + decoded["type"]
        frames.append(decoded)
    return frames


def read_as_old_go(data: bytes) -> List[Any]:
    """The JSON of every event as openai-go before its pull request 621 reads it: each blank line
    ends an event, and one without data is JSON that ends unexpectedly."""
    events, said = [], b""
    for line in data.split(b"\n")[:-1]:
        if line == b"":
            if said.startswith(b"[DONE]"):
                break
            assert said, "unexpected end of JSON input"
            events.append(json.loads(said))
            said = b""
        elif line.startswith(b"data:"):
            said += line[5:].lstrip(b" ") + b"\n"
    return events


def read_comments(data: bytes) -> List[str]:
    return [frame[2:] for frame in data.decode().split("\n\n") if frame.startswith(": ")]


def check_frames(face: str, answer: Any, data: bytes) -> Any:
    """The wire grammar of a face's stream; gives the folded answer."""
    frames = read_frames(data)
    ended = answer.over and answer.error is None
    return CHECKS[face](frames, ended, answer.reply.include_usage)


def check_chat_frames(frames: List[Any], ended: bool, usage: bool) -> Any:
    assert ("[DONE]" in frames) == ended
    if ended:
        assert frames.pop() == "[DONE]"
    for number, frame in enumerate(frames):
        assert (frame["id"], frame["object"], frame["model"], frame["created"]) == (
            "id", "chat.completion.chunk", "m", 0)
        if not frame["choices"]:
            assert usage and ended and number == len(frames) - 1 and frame["usage"]
            continue
        (choice,) = frame["choices"]
        assert choice["index"] == 0 and "usage" not in frame
        assert ("role" in choice["delta"]) == (number == 0)
        assert all(set(call) - {"id", "type"} == {"index", "function"}
                   for call in choice["delta"].get("tool_calls", ()))
    message, reason, used = fold_chat(frames)
    assert (reason is not None) == ended
    return {"message": message, "finish_reason": reason, "usage": used}


def check_messages_frames(frames: List[Any], ended: bool, usage: bool) -> Any:
    kinds = [frame["type"] for frame in frames]
    assert kinds[:1] in ([], ["message_start"]) and kinds.count("message_start") <= 1
    assert (kinds[-2:] == ["message_delta", "message_stop"]) == ended
    assert kinds.count("message_delta") == kinds.count("message_stop") == int(ended)
    unclosed = kinds.count("content_block_start") - kinds.count("content_block_stop")
    assert unclosed == 0 or (unclosed == 1 and not ended)   # clients take a closed block for good
    for number, frame in enumerate(frames):
        if frame["type"] == "content_block_start":
            block = frame["content_block"]
            assert not (block.get("text") or block.get("thinking") or block.get("input"))
        if frame["type"] == "content_block_stop":
            before = frames[number - 1].get("delta", {}).get("type")
            start = next(one for one in frames if one["type"] == "content_block_start"
                         and one["index"] == frame["index"])
            thinking = start["content_block"]["type"] == "thinking"
            assert (before == "signature_delta") == thinking
    return fold_messages(frames)


RUNNING = {"response.output_text": "message", "response.reasoning_summary_text": "reasoning",
           "response.refusal": "message",
           "response.function_call_arguments": "function_call",
           "response.custom_tool_call_input": "custom_tool_call"}
INPUTS_OF_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
CLIENT_CALLS = {"shell_call": "action", "local_shell_call": "action", "computer_call": None,
                "apply_patch_call": "operation", "tool_search_call": "arguments"}
CALL_KINDS = {*INPUTS_OF_CALLS, *CLIENT_CALLS}


def part_text(part: Any) -> str:
    """What a content part of Responses says: its text, or its refusal."""
    return part["refusal" if part["type"] == "refusal" else "text"]


class Item:
    """An output item of a Responses stream as a client folds it."""

    def __init__(self, frame: Any) -> None:
        self.shown = frame["item"]
        self.kind, self.index = self.shown["type"], frame["output_index"]
        self.text, self.done, self.part = "", None, ""
        self.expected = ["part.added"] if self.kind in ("message", "reasoning") else ["delta"]
        if self.kind in CLIENT_CALLS:       # such an item has no deltas
            self.expected = ["item.done"]
            assert self.shown["status"] == "in_progress" and self.shown["call_id"]
        elif self.kind in INPUTS_OF_CALLS:
            assert self.shown[INPUTS_OF_CALLS[self.kind]] == ""
            assert self.shown["status"] == "in_progress" and self.shown["call_id"]
        else:
            assert self.shown["summary" if self.kind == "reasoning" else "content"] == []

    def read(self, frame: Any) -> None:
        """One event of this item: part added, deltas, text done, part done, item done."""
        if frame["type"] == "response.output_item.done":
            assert self.expected == ["item.done"]
            self.finish(frame["item"])
            return
        assert frame["item_id"] == self.shown["id"]
        name, _, step = frame["type"].rpartition(".")
        if self.kind not in INPUTS_OF_CALLS:
            assert frame["summary_index" if self.kind == "reasoning" else "content_index"] == 0
        if name.endswith("_part"):
            assert "part." + step in self.expected, frame
            assert part_text(frame["part"]) == ("" if step == "added" else self.text)
            self.part = frame["part"]["type"]
            self.expected = ["delta", "done"] if step == "added" else ["item.done"]
            return
        assert RUNNING[name] == self.kind and step in self.expected + ["done"]
        if step == "delta":
            assert frame["delta"]
            self.text += frame["delta"]
            self.expected = ["delta", "done"]
            return
        assert (name == "response.refusal") == (self.part == "refusal")
        told = frame[INPUTS_OF_CALLS.get(self.kind, "refusal" if self.part == "refusal"
                                         else "text")]
        assert told == self.text
        self.expected = ["item.done" if self.kind in INPUTS_OF_CALLS else "part.done"]

    def finish(self, item: Any) -> None:
        """A client acts on this event: the item must be complete, and what was shown."""
        assert (item["id"], item["type"]) == (self.shown["id"], self.kind)
        if self.kind in CLIENT_CALLS:
            assert item["call_id"] == self.shown["call_id"] and item["status"] == "completed"
            self.done = item
            return
        told = item[INPUTS_OF_CALLS[self.kind]] if self.kind in INPUTS_OF_CALLS else \
            part_text(item["summary" if self.kind == "reasoning" else "content"][0])
        assert told == self.text and item.get("status", "completed") == "completed"
        self.done = item


def check_responses_frames(frames: List[Any], ended: bool, usage: bool) -> Any:
    """{"items": all items, "response": the one that the terminal event holds, else None}."""
    assert [frame["sequence_number"] for frame in frames] == list(range(len(frames)))
    kinds = [frame["type"] for frame in frames]
    terminal = [kind for kind in kinds if kind in (
        "response.completed", "response.incomplete", "response.failed")]
    assert terminal == kinds[-1:] if terminal else not ended
    assert not ended or "response.failed" not in terminal
    if frames:
        assert kinds[:2] == ["response.created", "response.in_progress"]
        for frame in frames[:2]:
            shell = frame["response"]
            assert (shell["id"], shell["status"], shell["output"]) == ("id", "in_progress", [])
    items = fold_items(frames[2:len(frames) - len(terminal)])
    if not terminal:
        return {"items": items, "response": None}
    response = frames[-1]["response"]
    assert "response." + response["status"] == terminal[0] and response["id"] == "id"
    if ended:
        assert response["output"] == [item.done for item in items if item.done]
        assert all(item.done or item.kind in CALL_KINDS for item in items)
    return {"items": items, "response": response}


def fold_items(frames: List[Any]) -> List[Item]:
    """The items of a Responses stream: one after another, each under its own index and id."""
    items: List[Item] = []
    for frame in frames:
        if frame["type"] == "response.output_item.added":
            assert not items or items[-1].done or items[-1].kind in CALL_KINDS
            items.append(Item(frame))
            assert items[-1].index == len(items) - 1
            continue
        assert frame["output_index"] == items[-1].index and not items[-1].done
        items[-1].read(frame)
    assert len({item.shown["id"] for item in items}) == len(items)
    return items


CHECKS = {"chat": check_chat_frames, "messages": check_messages_frames,
          "responses": check_responses_frames}


def run_stream(face: str, data: bytes, cuts: Any = None, **members: Any) -> Tuple[Any, Any]:
    """(the answer, what an SDK folds of its stream); the wire grammar is checked on the way."""
    answer = new_answer(face, **members)
    return answer, check_frames(face, answer, run(answer, data, cuts))


def run_plain(face: str, data: bytes, **members: Any) -> Tuple[Any, Any]:
    """(the answer, its body or None when it failed)."""
    answer = new_answer(face, stream=False, **members)
    assert run(answer, data) == b"", "a plain answer has no frames"
    return answer, (json.loads(ccproxy.to_json(answer.body())) if not answer.error else None)


def read_events(lines: Iterable[bytes]) -> Tuple[Any, List[Any]]:
    """(reading, events up to the end) of an upstream's lines; a cut answer is ended as failed."""
    reading, events = ccproxy.Reading(), []
    for line in lines:
        if not reading.over:
            events += ccproxy.ALPHA.read_line(reading, line)
    if not reading.over:
        events += ccproxy.fail_answer(reading, ccproxy.ProxyError("upstream", "cut"))
    return reading, events


def check_events(events: List[Any]) -> None:
    """Begin (Open Delta* Close)* (End | Fail)."""
    assert [type(event) for event in (events[0], events[-1])] in (
        [ccproxy.Begin, ccproxy.End], [ccproxy.Begin, ccproxy.Fail])
    block, seen = None, []
    for event in events[1:-1]:
        if isinstance(event, ccproxy.Open):
            assert block is None and event.block not in seen
            block = event.block
            seen.append(block)
        elif isinstance(event, ccproxy.Delta):
            assert event.block is block is not None and event.text
            event.text.encode()
        else:
            assert isinstance(event, ccproxy.Close) and event.block is block is not None
            block = None
    assert block is None


# Random answers.

class Made(NamedTuple):
    """A random answer and what is in it, as far as its end."""

    data: bytes
    text: str
    thinking: str
    calls: Dict[str, Any]           # that have arguments, by id: the input, None where it was cut
    cut: bool                       # some call was announced and never whole
    ended: bool                     # by a `finish` that is no error


WORDS = ["a", "Hello", " there", "\u00e9\u2028", "\u2029(", "\x85", "\U0001f680", "\\",
         "\"quoted\"", "\n", "```",
         "<b>", "/", "\u65e5\u672c", "\x7f", "\t", "{\"x\":1}", "=lane-mark=", "data: "]
NOISE = [{"type": "text-start", "id": "t"}, {"type": "text-end", "id": "t"}, {"type": "wibble"},
         {"type": "reasoning-start", "id": "r"}, {"type": "source", "url": "x"}, {"type": 5},
         {"type": "text-delta", "id": "t", "text": ""}, {"type": "text-delta", "id": "t"},
         {"type": "text-delta", "id": "t", "text": 5}, {"type": "raw", "rawValue": {}}, {},
         {"type": "tool-input-delta", "id": "nobody", "delta": "x"},
         {"type": "tool-input-start", "id": "own", "toolName": "web", "providerExecuted": True},
         {"type": "tool-input-delta", "id": "own", "delta": "{}"},
         {"type": "tool-call", "toolCallId": "own", "toolName": "web", "input": {},
          "providerExecuted": True},
         {"type": "tool-result", "toolCallId": "own", "result": 1},
         {"type": "start-step", "request": {"body": "secret"}},
         {"type": "finish-step", "usage": {"inputTokens": 1, "outputTokens": 2}}]
BAD_LINES = [b"", b"\r", b"[DONE]", b"data: [DONE]", b": comment", b"null", b"[1]", b'"text"',
             b'{"type":"text-delta","id":"t","text":"cut', b"{", b"event: x", b"\xff\xfe",
             b'{"type":"text-delta","id":"t","text":"raw \x01 control"}']
USAGE = {"inputTokens": 20, "outputTokens": 9, "inputTokenDetails": {"cacheReadTokens": 4}}
FINISHES = [{"type": "finish", "finishReason": reason, "totalUsage": USAGE} for reason in
            ("stop", "tool-calls", "length", "content-filter", "other", "pause_turn", None)] + [
    {"type": "finish", "finishReason": "stop"}, {"type": "finish"}]
FAILURES = [{"type": "finish", "finishReason": "error"}, {"type": "abort"},
            {"type": "error", "error": "boom"}, {"type": "error", "error": {"statusCode": 503}}]
INPUTS = [{}, {"a": 1}, {"city": "S\u00e3o \U0001f680", "n": [1, {"b": None}]}, {"q": "\"\\/\n"}]


def plain_line(event: Any) -> bytes:
    """A line as JSON.stringify writes it: lone surrogates escaped, everything else as it is."""
    line = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
    return ccproxy.SURROGATE.sub(lambda found: "\\u%04x" % ord(found[0]), line).encode() + b"\n"


def odd_string(rng: random.Random, words: str) -> str:
    """A JSON string with some characters escaped that need not be."""
    out = []
    for char in words:
        if char in "\"\\" or char < " " or rng.random() < 0.1 or ccproxy.SURROGATE.match(char):
            units = char.encode("utf-16-be", "surrogatepass").hex()
            units = units.upper() if rng.random() < 0.5 else units
            out += ["\\u" + units[:4]] + (["\\u" + units[4:]] if units[4:] else [])
        else:
            out.append("\\/" if char == "/" else char)
    return '"%s"' % "".join(out)


def odd_line(rng: random.Random, event: Any) -> bytes:
    """The same event in some other legal way."""
    members = list(event.items())
    if rng.random() < 0.2:
        rng.shuffle(members)
    if rng.random() < 0.2:
        members.append(("providerMetadata", {"x": {}}))
    shown = [(name, odd_string(rng, value) if isinstance(value, str) and name != "type"
              else json.dumps(value)) for name, value in members]
    comma, colon = rng.choice([(",", ":"), (",", ":"), (", ", ": ")])
    line = "{%s}" % comma.join('"%s"%s%s' % (name, colon, value) for name, value in shown)
    prefix = rng.choice(["", "", "data: ", "data:"])
    return (prefix + line + rng.choice(["\n", "\n", "\r\n", "\n\n"])).encode()


class Maker:
    """Makes one random answer, line by line."""

    def __init__(self, rng: random.Random, odd: bool, halves: bool) -> None:
        self.rng, self.odd, self.halves = rng, odd, halves
        self.lines: List[bytes] = []
        self.text = self.thinking = ""
        self.calls: Dict[str, Any] = {}
        self.running: Dict[str, Tuple[Any, List[str]]] = {}
        self.cut: Set[str] = set()          # calls that were announced and are not whole
        self.begun: List[str] = []          # calls, in the order of their first argument

    def add(self, event: Any) -> None:
        self.lines.append(odd_line(self.rng, event) if self.odd else plain_line(event))

    def add_words(self) -> None:
        kind = self.rng.choice(["text", "reasoning"])
        for _ in range(self.rng.randrange(1, 5)):
            words = "".join(self.rng.choice(WORDS) for _ in range(self.rng.randrange(1, 4)))
            pieces = [words]
            if self.halves and self.rng.random() < 0.3:
                pieces = [words + "\ud83d", "\ude80"]
                words += "\U0001f680"
            for piece in pieces:
                self.add({"type": kind + "-delta", "id": kind[0], "text": piece})
            if kind == "text":
                self.text += words
            else:
                self.thinking += words

    def start_call(self) -> None:
        name = "call_%d" % len(self.calls)
        given = self.rng.choice(INPUTS)
        self.calls[name] = None
        compact = self.rng.random() < 0.5
        written = json.dumps(given, ensure_ascii=False,
                             separators=(",", ":") if compact else (", ", ": "))
        pieces = cut_text(self.rng, written)
        if compact and self.rng.random() < 0.3:     # the rest comes with the call itself
            pieces = pieces[:self.rng.randrange(len(pieces) + 1)]
        self.running[name] = (given, pieces)
        if self.rng.random() < 0.8:
            self.add({"type": "tool-input-start", "id": name, "toolName": "f"})
            self.cut.add(name)
        else:
            pieces.clear()

    def continue_call(self) -> None:
        name = self.rng.choice(list(self.running))
        given, pieces = self.running[name]
        for _ in range(self.rng.randrange(1, 4)):
            if pieces:
                self.add_piece(name, pieces.pop(0))
        if not pieces and self.rng.random() < 0.8:
            self.finish_call(name)

    def finish_call(self, name: str) -> None:
        given, pieces = self.running.pop(name)
        for piece in pieces:
            self.add_piece(name, piece)
        self.add({"type": "tool-call", "toolCallId": name, "toolName": "f", "input": given})
        self.calls[name] = given
        self.cut.discard(name)
        self.begun += [name] * (name not in self.begun)

    def add_piece(self, name: str, piece: str) -> None:
        self.add({"type": "tool-input-delta", "id": name, "delta": piece})
        self.begun += [name] * (name not in self.begun)

    def step(self) -> None:
        choice = self.rng.random()
        if choice < 0.35:
            self.add_words()
        elif choice < 0.5:
            self.start_call()
        elif choice < 0.8 and self.running:
            self.continue_call()
        elif choice < 0.9:
            self.add(self.rng.choice(NOISE))
        elif choice < 0.93:
            self.lines.append(b'{"type":"text-delta","id":"t","text":"\xff\xc3!"}\n')
            self.text += "\ufffd\ufffd!"
        else:
            self.lines.append(self.rng.choice(BAD_LINES) + b"\n")


def cut_text(rng: random.Random, words: str) -> List[str]:
    cuts = sorted({rng.randrange(len(words) + 1) for _ in range(rng.randrange(4))} | {0})
    return [piece for piece in (words[start:end] for start, end in
                                zip(cuts, cuts[1:] + [len(words)])) if piece]


@functools.lru_cache(maxsize=None)
def make_answer(seed: int, odd: bool = False, halves: bool = True) -> Made:
    """A random answer: all kinds of events in any order, calls mixed, any end or none."""
    rng = random.Random(seed)
    maker = Maker(rng, odd, halves)
    if rng.random() < 0.9:
        maker.add({"type": "start"})
    for _ in range(rng.randrange(14)):
        maker.step()
    if rng.random() < 0.7:
        for name in list(maker.running):
            maker.finish_call(name)
    made = (maker.text, maker.thinking,
            {name: maker.calls[name] for name in maker.begun}, bool(maker.cut))
    end = rng.random()
    if end < 0.9:
        maker.add(rng.choice(FINISHES if end < 0.75 else FAILURES))
        maker.add({"type": "provider-metadata", "providerMetadata": {"gateway": {"cost": "0.1"}}})
        maker.step()            # nothing of this may be seen
    data = b"".join(maker.lines)
    if rng.random() < 0.1:
        data = data[:-1]        # the last line without its newline
    return Made(data, *made, end < 0.75)


def split_lines(data: bytes) -> List[bytes]:
    return data.split(b"\n")
