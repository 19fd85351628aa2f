"""The documented APIs' streams, made of neutral steps (for tests/fake_upstream.py).

A step is a tuple: ("text", words), ("thinking", words), ("signature", word), ("start", id, name),
("more", id, piece of JSON text), ("stop", id), ("usage", {input, output, read, write, reasoning}),
("end", stop | length | tool_calls | filtered), ("error", type, message), ("raw", bytes).
A list without ("end", ...) or ("error", ...) is a stream that was cut.
"""
from __future__ import annotations

import json
import re
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

Step = Tuple[Any, ...]
Write = Callable[[Any], str]
OPENAI_ENDS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls",
               "filtered": "content_filter"}
ANTHROPIC_ENDS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use",
                  "filtered": "refusal"}
HALF = re.compile("[\ud800-\udfff]")


def compact(value: Any) -> str:
    """JSON as JSON.stringify writes it: lone surrogates escaped, all else as it is."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return HALF.sub(lambda found: "\\u%04x" % ord(found[0]), text)


def openai_chunk(delta: Any, reason: Optional[str] = None, **more: Any) -> Dict[str, Any]:
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000,
            "model": "m", "system_fingerprint": None, "choices": [
                {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}], **more}


def openai_usage(told: Dict[str, int]) -> Dict[str, Any]:
    usage: Dict[str, Any] = {"prompt_tokens": told["input"], "completion_tokens": told["output"],
                             "total_tokens": told["input"] + told["output"]}
    if "read" in told:
        usage["prompt_tokens_details"] = {"cached_tokens": told["read"]}
    if "reasoning" in told:
        usage["completion_tokens_details"] = {"reasoning_tokens": told["reasoning"]}
    return usage


def openai_sse(steps: Iterable[Step], write: Write = compact) -> bytes:
    """The stream of Chat Completions that says these steps."""
    indexes: Dict[str, int] = {}
    frames: List[Any] = [openai_chunk({"role": "assistant", "content": ""})]
    for step in steps:
        kind, rest = step[0], step[1:]
        if kind == "text":
            frames.append(openai_chunk({"content": rest[0]}))
        elif kind == "thinking":
            frames.append(openai_chunk({"reasoning_content": rest[0]}))
        elif kind == "start":
            index = indexes.setdefault(rest[0], len(indexes))
            frames.append(openai_chunk({"tool_calls": [
                {"index": index, "id": rest[0], "type": "function",
                 "function": {"name": rest[1], "arguments": ""}}]}))
        elif kind == "more":
            frames.append(openai_chunk({"tool_calls": [
                {"index": indexes[rest[0]], "function": {"arguments": rest[1]}}]}))
        elif kind == "usage":
            frames.append({**openai_chunk({}), "choices": [], "usage": openai_usage(rest[0])})
        elif kind == "end":
            place = len(frames) - (bool(frames[-1]) and isinstance(frames[-1], dict)
                                   and not frames[-1].get("choices", [1]))
            frames.insert(place, openai_chunk({}, OPENAI_ENDS[rest[0]]))
            frames.append(b"data: [DONE]\n\n")
        elif kind == "error":
            frames.append({"error": {"type": rest[0], "message": rest[1]}})
        elif kind == "raw":
            frames.append(rest[0])
    return b"".join(frame if isinstance(frame, bytes)
                    else b"data: %b\n\n" % write(frame).encode() for frame in frames)


class AnthropicBlocks:
    """Content blocks of a Messages stream, opened and closed as the steps need it."""

    def __init__(self) -> None:
        self.frames: List[Any] = []
        self.count = self.place = 0
        self.open = ""                      # kind of the open block of text or thinking
        self.calls: Dict[str, int] = {}

    def close(self) -> None:
        if self.open:
            self.add("content_block_stop", index=self.count - 1)
            self.open = ""

    def add(self, kind: str, **members: Any) -> None:
        self.frames.append({"type": kind, **members})

    def start(self, block: Any) -> int:
        self.close()
        self.add("content_block_start", index=self.count, content_block=block)
        self.count += 1
        return self.count - 1

    def words(self, kind: str, words: str) -> None:
        if self.open != kind:
            more = {"signature": ""} if kind == "thinking" else {}
            self.place = self.start({"type": kind, kind: "", **more})
            self.open = kind
        self.add("content_block_delta", index=self.place, delta={"type": kind + "_delta",
                                                                 kind: words})


def anthropic_sse(steps: Iterable[Step], write: Write = compact) -> bytes:
    """The stream of Messages that says these steps."""
    blocks, used = AnthropicBlocks(), {"input": 1, "output": 1}
    steps = list(steps)
    used = next((step[1] for step in steps if step[0] == "usage"), used)
    first = {"input_tokens": used["input"] - used.get("read", 0) - used.get("write", 0),
             "output_tokens": 1}
    for name, member in (("read", "cache_read_input_tokens"),
                         ("write", "cache_creation_input_tokens")):
        if name in used:
            first[member] = used[name]
    blocks.add("message_start", message={"id": "msg_1", "type": "message", "role": "assistant",
                                         "model": "m", "content": [], "stop_reason": None,
                                         "stop_sequence": None, "usage": first})
    blocks.add("ping")
    for step in steps:
        kind, rest = step[0], step[1:]
        if kind in ("text", "thinking"):
            blocks.words(kind, rest[0])
        elif kind == "signature":
            blocks.add("content_block_delta", index=blocks.count - 1,
                       delta={"type": "signature_delta", "signature": rest[0]})
            blocks.close()
        elif kind == "start":
            blocks.calls[rest[0]] = blocks.start({"type": "tool_use", "id": rest[0],
                                                  "name": rest[1], "input": {}})
            blocks.add("content_block_delta", index=blocks.calls[rest[0]],
                       delta={"type": "input_json_delta", "partial_json": ""})
        elif kind == "more":
            blocks.add("content_block_delta", index=blocks.calls[rest[0]],
                       delta={"type": "input_json_delta", "partial_json": rest[1]})
        elif kind == "stop":
            blocks.add("content_block_stop", index=blocks.calls[rest[0]])
        elif kind == "end":
            blocks.close()
            blocks.add("message_delta", delta={"stop_reason": ANTHROPIC_ENDS[rest[0]],
                                               "stop_sequence": None},
                       usage={"output_tokens": used["output"]})
            blocks.add("message_stop")
        elif kind == "error":
            blocks.add("error", error={"type": rest[0], "message": rest[1]})
        elif kind == "raw":
            blocks.frames.append(rest[0])
    return b"".join(frame if isinstance(frame, bytes) else b"event: %b\ndata: %b\n\n"
                    % (frame["type"].encode(), write(frame).encode()) for frame in blocks.frames)


SSE_OF = {"openai": openai_sse, "anthropic": anthropic_sse}
