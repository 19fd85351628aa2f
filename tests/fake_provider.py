"""The documented APIs' streams, made of neutral steps (for tests/fake_upstream.py).

A step is a tuple: ("text", words), ("thinking", words), ("refusal", words; OpenAI alone),
("signature", word), ("start", id, name),
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
        elif kind == "refusal":
            frames.append(openai_chunk({"refusal": rest[0]}))
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


# Command Code's own events said in either API, so that one table of answers serves all upstreams.

ALPHA_ENDS = {"stop": "stop", "length": "length", "tool-calls": "tool_calls",
              "content-filter": "filtered"}
SILENT = ("start-step", "finish-step", "text-start", "text-end", "reasoning-start",
          "provider-metadata")
ABORTED = {"type": "api_error", "message": "The answer was aborted."}


def alpha_usage(used: Any) -> Dict[str, int]:
    """A finish event's figures in the words of a ("usage", ...) step; there are two shapes."""
    read, sent = used.get("inputTokenDetails", {}), used.get("outputTokenDetails", {})
    found = {"input": used.get("inputTokens", 0), "output": used.get("outputTokens", 0),
             "read": read.get("cacheReadTokens", used.get("cachedInputTokens")),
             "write": read.get("cacheWriteTokens"),
             "reasoning": sent.get("reasoningTokens", used.get("reasoningTokens"))}
    return {name: count for name, count in found.items() if count is not None}


def signature_of(event: Any) -> str:
    return event.get("providerMetadata", {}).get("anthropic", {}).get("signature", "")


class OpenAISpeaker:
    """Says Command Code's events one by one as chunks of Chat Completions."""

    def __init__(self) -> None:
        self.indexes: Dict[str, int] = {}
        self.told: Dict[str, str] = {}

    def frame(self, body: Any) -> bytes:
        return b"data: %b\n\n" % compact(body).encode()

    def delta(self, **members: Any) -> bytes:
        return self.frame(openai_chunk(members))

    def start_call(self, given: str, name: str) -> bytes:
        self.told[given] = ""
        return self.delta(tool_calls=[{
            "index": self.indexes.setdefault(given, len(self.indexes)), "id": given,
            "type": "function", "function": {"name": name, "arguments": ""}}])

    def more(self, given: str, piece: str) -> bytes:
        self.told[given] = self.told.get(given, "") + piece
        return self.delta(tool_calls=[{"index": self.indexes.setdefault(given, len(self.indexes)),
                                       "function": {"arguments": piece}}])

    def call(self, event: Any) -> bytes:
        """A call told as a whole: what of it was not told before."""
        given, data = event["toolCallId"], b""
        if given not in self.told:
            data = self.start_call(given, event["toolName"])
        return data if self.told[given] else data + self.more(given, compact(event["input"]))

    def stop_call(self, given: str) -> bytes:
        return b""

    def thinking(self, event: Any) -> bytes:
        return self.delta(reasoning_content=event["text"])

    def end_thinking(self, event: Any) -> bytes:
        return b""

    def error(self, said: Any) -> bytes:
        return self.frame({"error": said})

    def begin(self) -> bytes:
        return self.delta(role="assistant", content="")

    def text(self, words: Any) -> bytes:
        return self.delta(content=words)

    def finish(self, reason: str, used: Any) -> bytes:
        data = self.frame(openai_chunk({}, OPENAI_ENDS[reason]))
        if used is not None:
            told = alpha_usage(used)
            usage = openai_usage(told)
            if "write" in told:
                usage.setdefault("prompt_tokens_details", {})["cache_write_tokens"] = told["write"]
            data += self.frame({**openai_chunk({}), "choices": [], "usage": usage})
        return data + b"data: [DONE]\n\n"

    def say(self, event: Any) -> bytes:
        """The frames of one event; one that has no counterpart stands there as it is."""
        kind = event.get("type")
        if kind == "start":
            return self.begin()
        if kind == "text-delta" and isinstance(event.get("text"), str):
            return self.text(event["text"])
        if kind == "reasoning-delta":
            return self.thinking(event)
        if kind == "reasoning-end":
            return self.end_thinking(event)
        if kind == "tool-input-start":
            return self.start_call(event["id"], event["toolName"])
        if kind == "tool-input-delta":
            return self.more(event["id"], event["delta"])
        if kind == "tool-input-end":
            return self.stop_call(event["id"])
        if kind == "tool-call":
            return self.call(event)
        if kind == "error":
            return self.error(event.get("error"))
        if kind == "abort" or event.get("finishReason") == "error":
            return self.error(ABORTED)
        if kind == "finish":
            return self.finish(ALPHA_ENDS[event.get("finishReason", "stop")],
                               event.get("totalUsage"))
        return b"" if isinstance(kind, str) and kind in SILENT else self.frame(event)


class AnthropicSpeaker(OpenAISpeaker):
    """Says Command Code's events one by one as events of Messages."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.open, self.stopped = 0, "", set()

    def event(self, kind: str, **members: Any) -> bytes:
        return b"event: %b\n" % kind.encode() + self.frame({"type": kind, **members})

    def close(self) -> bytes:
        if not self.open:
            return b""
        self.open = ""
        return self.event("content_block_stop", index=self.count - 1)

    def start_block(self, block: Any) -> bytes:
        data = self.close()
        self.count += 1
        return data + self.event("content_block_start", index=self.count - 1, content_block=block)

    def words(self, kind: str, words: str) -> bytes:
        data = b""
        if self.open != kind:
            data = self.start_block({"type": kind, kind: "", **(
                {"signature": ""} if kind == "thinking" else {})})
            self.open = kind
        return data + self.event("content_block_delta", index=self.count - 1, delta={
            "type": kind + "_delta", kind: words})

    def begin(self) -> bytes:
        return self.event("message_start", message={
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
            "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": 0, "output_tokens": 1}}) + self.event("ping")

    def text(self, words: str) -> bytes:
        return self.words("text", words)

    def thinking(self, event: Any) -> bytes:
        data = self.words("thinking", event["text"]) if event["text"] else b""
        return data + self.sign(event)

    def sign(self, event: Any) -> bytes:
        signature = signature_of(event)
        return self.event("content_block_delta", index=self.count - 1, delta={
            "type": "signature_delta", "signature": signature}) if signature else b""

    def end_thinking(self, event: Any) -> bytes:
        return self.sign(event) + self.close()

    def start_call(self, given: str, name: str) -> bytes:
        self.told[given] = ""
        data = self.start_block({"type": "tool_use", "id": given, "name": name, "input": {}})
        self.indexes[given] = self.count - 1
        return data

    def more(self, given: str, piece: str) -> bytes:
        self.told[given] = self.told.get(given, "") + piece
        return self.event("content_block_delta", index=self.indexes.get(given, 0), delta={
            "type": "input_json_delta", "partial_json": piece})

    def stop_call(self, given: str) -> bytes:
        if given in self.stopped or not self.told.get(given):   # told whole by what follows
            return b""
        self.stopped.add(given)
        return self.event("content_block_stop", index=self.indexes[given])

    def call(self, event: Any) -> bytes:
        return super().call(event) + self.stop_call(event["toolCallId"])

    def error(self, said: Any) -> bytes:
        return self.event("error", error=said)

    def finish(self, reason: str, used: Any) -> bytes:
        """With cumulative figures of all kinds, as message_delta has them."""
        told = alpha_usage(used or {})
        read, write = told.get("read"), told.get("write")
        usage = {"input_tokens": told["input"] - (read or 0) - (write or 0),
                 "output_tokens": told["output"]} if used else {}
        usage.update({name: count for name, count in (
            ("cache_read_input_tokens", read), ("cache_creation_input_tokens", write))
            if count is not None})
        return self.close() + self.event("message_delta", usage=usage, delta={
            "stop_reason": ANTHROPIC_ENDS[reason], "stop_sequence": None}) + self.event(
                "message_stop")


SPEAKERS: Dict[str, Any] = {"openai": OpenAISpeaker, "anthropic": AnthropicSpeaker}
PATHS = {"openai": "/provider/v1/chat/completions", "anthropic": "/provider/v1/messages"}


def say_in(api: str, lines: bytes) -> bytes:
    """Lines of Command Code's answer in the words of an API; what is none stays as it is."""
    if b"data:" in lines or not re.search(rb'(?m)^\{"type":"[a-z]+(?:-[a-z]+)*"[,}]', lines):
        return lines
    speaker, said = SPEAKERS[api](), []
    for line in lines.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict):
            said.append(speaker.say(event))
        elif line:
            said.append(line + b"\n")
    return b"".join(said)


def api_of(line: str) -> str:
    """The API that a request's first line asks for; nothing where it is Command Code's own."""
    return next((api for api, path in PATHS.items() if path in line), "")


# What was asked, whichever API it came in.

def openai_parts(message: Dict[str, Any]) -> List[Dict[str, Any]]:
    """A message of Chat Completions as alpha's parts."""
    parts = [{"type": "reasoning", "text": message["reasoning_content"]}] \
        if message.get("reasoning_content") else []
    content = message.get("content") or []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        parts.append({"type": "image", "image": part["image_url"]["url"]}
                     if part["type"] == "image_url" else part)
    return parts + [{"type": "tool-call", "toolCallId": call["id"],
                     "toolName": call["function"]["name"],
                     "input": json.loads(call["function"]["arguments"])}
                    for call in message.get("tool_calls", ())]


def openai_params(body: Dict[str, Any]) -> Dict[str, Any]:
    """A body of Chat Completions with alpha's members."""
    turns, system = [], []
    for message in body["messages"]:
        if message["role"] == "system":
            system.append({"type": "text", "text": message["content"]})
        elif message["role"] == "tool":
            turns.append({"role": "tool", "content": [{
                "type": "tool-result", "toolCallId": message["tool_call_id"],
                "output": {"type": "text", "value": message["content"]}}]})
        else:
            turns.append({"role": message["role"], "content": openai_parts(message)})
    tools = [{**tool["function"], "input_schema": tool["function"]["parameters"]}
             for tool in body.get("tools", ())]
    return {**body, "messages": turns, "system": system, "tools": tools}


def anthropic_part(block: Dict[str, Any]) -> Dict[str, Any]:
    """A content block of Messages as alpha's part."""
    kind = block["type"]
    if kind == "thinking":
        return {"type": "reasoning", "text": block["thinking"]}
    if kind == "image":
        return {"type": "image", "image": "data:%s;base64,%s" % (
            block["source"]["media_type"], block["source"]["data"])}
    if kind == "tool_use":
        return {"type": "tool-call", "toolCallId": block["id"], "toolName": block["name"],
                "input": block["input"]}
    if kind == "tool_result":
        return {"type": "tool-result", "toolCallId": block["tool_use_id"],
                "output": {"type": "text", "value": block.get("content", "")}}
    return block


def anthropic_params(body: Dict[str, Any]) -> Dict[str, Any]:
    """A body of Messages with alpha's members; results of tools are turns of their own there."""
    turns: List[Dict[str, Any]] = []
    for message in body["messages"]:
        parts = [anthropic_part(block) for block in message["content"]]
        results = [part for part in parts if part["type"] == "tool-result"]
        others = [part for part in parts if part["type"] != "tool-result"]
        turns += [{"role": "tool", "content": results}] if results else []
        turns += [{"role": message["role"], "content": others}] if others else []
    return {**body, "messages": turns, "system": body.get("system", []),
            "tools": body.get("tools", [])}


def params_of(body: Dict[str, Any]) -> Dict[str, Any]:
    """What a request asks for, in alpha's words."""
    if "params" in body:
        return body["params"]
    return openai_params(body) if "stream_options" in body else anthropic_params(body)
