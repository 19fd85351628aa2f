"""A seeded mutation fuzzer of everything that reads what others send: request and response heads,
the chunked coding, the upstreams' lines in all three APIs, and the three request translators.

    python3 tests/fuzz.py --minutes 10 --seed 1         # round and round all targets
    python3 tests/fuzz.py --case chunks:1:4711          # one case again, as a finding names it

The law: nothing but ProxyError is raised, what comes out keeps the grammar of its API, and bytes
cut anywhere mean the same as in one piece.  A case that takes far longer per byte than its target's
median is measured again and reported, not judged.
"""
from __future__ import annotations

import argparse
import base64
import copy
import json
import os
import random
import statistics
import sys
import time
import traceback
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from fake_provider import say_in  # noqa: E402
from fake_upstream import recorded, text_answer  # noqa: E402
from harness import ccproxy  # noqa: E402
from pure import (ALL_FACES, CONFIG, MODELS, NAMES, PNG, check_frames, check_params,  # noqa: E402
                  cut_bytes, random_cuts)
from pure_formats import UPSTREAMS, make_answer, new_answer  # noqa: E402

SLOW = 50               # times the median per byte: worth a look
SHORT_BYTES = 2000      # a shorter case counts as this long: its time is mostly setting up
MOST_BYTES = 300_000    # of one case
CHECKED_BYTES = 200_000     # of frames that are read back


# Good input, to be mutated.

HEADS = [
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:8787\r\nAuthorization: Bearer user_a1"
    b"\r\nContent-Type: application/json\r\nContent-Length: 12\r\nConnection: keep-alive\r\n\r\n",
    b"POST /v1/messages?beta=true HTTP/1.1\r\nhost: [::1]:80\r\nx-api-key: user_b\r\nExpect: "
    b"100-continue\r\ntransfer-encoding: chunked\r\nAccept-Encoding: gzip, br\r\n\r\n",
    b"GET http://example.com:99/v1/models/a%2Fb?x=1#y HTTP/1.1\r\nHost: example.com:99\r\n\r\n",
    b"OPTIONS * HTTP/1.0\r\nAccept: */*\r\nAccept: text/html;q=0.5\r\nX-Empty:\r\n\r\n",
    b"HEAD /health HTTP/1.1\r\nHost: h\r\ncontent-length: 0\r\ncontent-length: 0\r\n\r\n"]
RESPONSE_HEADS = [
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.0 503 \r\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\nContent-Length: 10\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: /x\r\ncontent-encoding: gzip\r\nconnection: close\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n"]
CHUNKS = [
    b"5\r\nhello\r\n1\r\n \r\n00b;name=\"va l\";x\r\nhello world\r\n0\r\n\r\n",
    b"A\r\n0123456789\r\n0\r\nTrailer: a\r\nX-Other: b\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"1\r\na\r\n" * 40 + b"0\r\n\r\n", b"0fF\r\n" + b"x" * 255 + b"\r\n000\r\n\r\n"]
WIRE_WORDS = [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b";", b"=",
    b'"', b"-1", b"+1", b"0x1", b"1_0", b"\xd9\xa1", b"\x85", b"\xe2\x84\xaa", b"9" * 19,
    b"9" * 5000, b"f" * 17, b"0" * 16, b"chunked", b"gzip, chunked", b"chunked, chunked",
    b"identity", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Host: a\r\n",
    b"Expect: 100-continue\r\n", b"HTTP/2.0", b"HTTP/1.9", b"PRI * HTTP/2.0", b"%00",
    b"\x1b[31m", b"user_key", b" folded\r\n", b"http://", b"//", b"[::", b"]", b"@", b"close"]
LINE_WORDS = [b"\n", b"\r\n", b"\\ud83d", b"\\ude80", b"\\u0000", b"\\", b'"', b"\xff", b"\xc3",
    b"{", b"}", b"[", b"]", b"data: ", b"event: x\n", b": c\n", b"[DONE]\n", b"null", b"NaN",
    b"1e999", b"-1", b"9" * 30, b"9" * 5000, b"\xe2\x80\xa8", b"=lane-mark=", b"\x00",
    b"\xef\xbb\xbf", b'"type":"error",', b'"type":"finish",', b'"text":5,', b'"id":null,',
    b'"input":"{",', b'{"type":"start"}\n', b'{"type":"text-delta","id":"t","text":"x"}\n',
    b'{"type":"reasoning-delta","id":"r","text":"x"}\n', b'{"type":"abort"}\n',
    b'{"type":"finish","finishReason":"stop"}\n', b"[" * 3000, b'{"a":' * 3000,
    b'{"type":"tool-input-start","id":"c","toolName":"f"}\n',
    b'{"type":"tool-input-delta","id":"c","delta":"{"}\n',
    b'{"type":"tool-call","toolCallId":"c","toolName":"f","input":{}}\n']
SSE_WORDS = LINE_WORDS + [
    b"data:", b"event: error\n", b'"index":1,', b'"index":null,', b'"choices":[],',
    b'"finish_reason":"length",', b'"content":[5],', b'"tool_calls":{},', b'"arguments":{},',
    b'"signature":5,', b'"partial_json":"}",', b'"stop_reason":"tool_use",',
    b'data: {"error":"x"}\n', b'data: {"type":"message_stop"}\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n',
    b'data: {"choices":[{"index":0,"delta":{"reasoning_content":"x","content":"y"}}]}\n',
    b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"d","function":{'
    b'"name":"f","arguments":"{}"}}]},"finish_reason":"tool_calls"}]}\n',
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"tool_use","id":"d",'
    b'"name":"f","input":{"a":1}}}\n',
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"signature_delta",'
    b'"signature":"s"}}\n', b'data: {"type":"content_block_stop","index":0}\n',
    b'data: {"type":"message_delta","delta":{"stop_reason":"max_tokens"},"usage":null}\n']

SCHEMA = {"type": "object", "properties": {"city": {"type": ["string", "null"]}, "n": {
    "$ref": "#/$defs/n"}}, "required": ["city"], "$defs": {"n": {"anyOf": [
        {"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": "number"}}]}},
    "additionalProperties": False}
REQUESTS: Dict[str, List[Any]] = {
    "chat": [
        {"model": "deepseek-v4-flash", "stream": True, "stream_options": {"include_usage": True},
         "max_tokens": 100, "temperature": 0.5, "stop": ["x", "yy"], "reasoning_effort": "high",
         "user": "u", "n": 1, "tool_choice": {"type": "function", "function": {"name": "f"}},
         "tools": [{"type": "function", "function": {"name": "f", "description": "d",
                                                     "parameters": SCHEMA, "strict": True}},
                   {"type": "custom", "custom": {"name": "raw", "format": {"type": "text"}}}],
         "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
         "messages": [
             {"role": "system", "content": "be"}, {"role": "developer", "content": [
                 {"type": "text", "text": "short", "cache_control": {"type": "ephemeral"}}]},
             {"role": "user", "name": "n", "content": [
                 {"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {
                     "url": PNG, "detail": "low"}},
                 {"type": "file", "file": {"filename": "a.txt", "file_data":
                                           "data:text/plain;base64,b25l"}}]},
             {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
                 {"id": "c1", "type": "function", "function": {"name": "f", "arguments":
                                                               "{\"city\": \"x\"}"}},
                 {"id": "c2", "type": "custom", "custom": {"name": "raw", "input": "text"}}]},
             {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "22"}]},
             {"role": "tool", "tool_call_id": "c2", "content": "ok"},
             {"role": "assistant", "content": "done", "refusal": None},
             {"role": "user", "content": "go on"}]},
        {"model": "gpt-4o", "functions": [{"name": "g", "parameters": {"type": "object"}}],
         "function_call": {"name": "g"}, "max_completion_tokens": 5,
         "response_format": {"type": "json_object"}, "messages": [
             {"role": "user", "content": "hi"}, {"role": "assistant", "function_call": {
                 "name": "g", "arguments": "{}"}}, {"role": "function", "name": "g",
                                                    "content": "1"}]}],
    "messages": [
        {"model": "claude-sonnet-4-5", "max_tokens": 100, "stream": True, "stop_sequences": ["x"],
         "system": [{"type": "text", "text": "be", "cache_control": {"type": "ephemeral",
                                                                     "ttl": "1h"}}],
         "thinking": {"type": "enabled", "budget_tokens": 2000},
         "metadata": {"user_id": "u_session_1"},
         "temperature": 1, "top_k": 5, "output_config": {"effort": "low", "format": {
             "type": "json_schema", "schema": SCHEMA}},
         "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
         "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA},
                   {"type": "web_search_20250305", "name": "web_search"},
                   {"type": "memory_20250818", "name": "memory"},
                   {"type": "computer_20251124", "name": "computer", "display_width_px": 9,
                    "display_height_px": 9, "enable_zoom": True},
                   {"type": "computer_toolset_20260801", "configs": {"zoom": {"enabled": False}}},
                   {"type": "custom", "name": "a.b c", "input_schema": {"anyOf": [
                       {"properties": {"a": {"type": "array"}}, "required": ["a"]},
                       {"$ref": "#/$defs/n"}], "$defs": {"n": {"minimum": 5, "allOf": [
                           {"properties": {"b": {"maximum": 1, "exclusiveMaximum": True}}}]}}}}],
         "messages": [
             {"role": "user", "content": [
                 {"type": "text", "text": "hi"}, {"type": "image", "source": {
                     "type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}},
                 {"type": "document", "title": "t", "context": "c", "source": {
                     "type": "text", "media_type": "text/plain", "data": "one"}},
                 {"type": "search_result", "source": "s", "title": "t",
                  "content": [{"type": "text", "text": "x"}]}]},
             {"role": "assistant", "content": [
                 {"type": "thinking", "thinking": "hm", "signature": "s"},
                 {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"},
                 {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"q": "x"}},
                 {"type": "web_search_tool_result", "tool_use_id": "s", "content": [
                     {"type": "web_search_result", "url": "u", "title": "t"}]},
                 {"type": "tool_use", "id": "c1", "name": "f", "input": {"city": "x"}}]},
             {"role": "user", "content": [
                 {"type": "tool_result", "tool_use_id": "c1", "is_error": True, "content": [
                     {"type": "text", "text": "22"}, {"type": "tool_reference", "tool_name": "f"},
                     {"type": "image", "source": {"type": "url", "url": PNG}}]},
                 {"type": "text", "text": "go on", "cache_control": {"type": "ephemeral"}}]}]}],
    "responses": [
        {"model": "gpt-5", "stream": True, "instructions": "be", "max_output_tokens": 50,
         "store": False, "include": ["reasoning.encrypted_content"], "temperature": 0,
         "reasoning": {"effort": "medium", "summary": "auto"}, "parallel_tool_calls": True,
         "metadata": {"a": "b"}, "prompt_cache_key": "k", "truncation": "auto",
         "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
         "tool_choice": {"type": "function", "name": "f"},
         "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": False},
                   {"type": "custom", "name": "apply_patch", "format": {
                       "type": "grammar", "syntax": "lark", "definition": "start: x"}},
                   {"type": "namespace", "name": "ns", "tools": [
                       {"type": "function", "name": "g", "parameters": {"type": "object"}}]},
                   {"type": "web_search"}, {"type": "local_shell"},
                   {"type": "shell", "environment": {"type": "local"}}, {"type": "computer"},
                   {"type": "tool_search", "execution": "client", "parameters": SCHEMA}],
         "input": [
             {"role": "developer", "content": "d"},
             {"type": "message", "role": "user", "content": [
                 {"type": "input_text", "text": "hi"}, {"type": "input_image", "image_url": PNG},
                 {"type": "input_file", "filename": "a.txt", "file_data": "b25l"}]},
             {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}],
              "encrypted_content": "x", "content": [{"type": "reasoning_text", "text": "r"}]},
             {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{\"n\":1}"},
             {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "***"},
             {"type": "function_call_output", "call_id": "c1", "output": "1"},
             {"type": "custom_tool_call_output", "call_id": "c2", "output": [
                 {"type": "input_text", "text": "ok"}]},
             {"type": "shell_call", "call_id": "c3", "action": {"commands": ["ls"]}},
             {"type": "shell_call_output", "call_id": "c3", "output": [
                 {"stdout": "x", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
             {"type": "local_shell_call", "id": "l", "call_id": "c4", "action": {
                 "type": "exec", "command": ["ls"], "env": {}}},
             {"type": "local_shell_call_output", "id": "l", "output": "{}"},
             {"type": "tool_search_call", "call_id": "c5", "execution": "client",
              "arguments": {"query": "x"}},
             {"type": "tool_search_output", "call_id": "c5", "tools": [
                 {"type": "function", "name": "h"}]},
             {"type": "web_search_call", "id": "ws", "action": {"query": "x"}},
             {"type": "message", "id": "msg_2", "role": "assistant", "status": "completed",
              "content": [{"type": "output_text", "text": "a", "annotations": []},
                          {"type": "refusal", "refusal": "no"}]},
             {"role": "user", "content": "go on"}]},
        {"model": "x", "input": "hi"}]}

VALUES: List[Any] = [
    None, True, False, 0, -1, 1, 5, 1.5, 1e30, -1e300, 10 ** 30, float("inf"), float("nan"), "",
    " ", "x", "a.b c", "\x00", "\ud83d", "\ude80x", "\u2028", "\r\nX: y", "{", "{}", "[1]", "null",
    "1e999", [], {}, [[]], [None], ["x"], [5], {"x": None}, {"": ""}, "data:image/png;base64,", PNG,
    "data:,x", "data:image/png;base64,%%%", "http://127.0.0.1/x", "user", "tool", "assistant",
    "system", "auto", "none", "any", "required", "f", "c1", {"type": "text", "text": "x"},
    {"type": []}, {"type": "text"}, {"type": "object", "properties": None}, {"$ref": "#"},
    {"$ref": "#/$defs/n"}, {"type": ["string", "null", 5]}, {"role": "user"}, {"function": None},
    {"name": "x"}]
NAMES_OF_MEMBERS = sorted({name for word in [
    "type role content text name id input arguments tools tool_calls tool_choice messages stream "
    "function functions function_call parameters input_schema schema strict stop reasoning effort "
    "format thinking cache_control image_url source data url media_type file file_data is_error "
    "tool_use_id call_id output summary encrypted_content instructions metadata "
    "previous_response_id system $ref $defs anyOf items properties required enum const "
    "pattern user n seed store"]
    for name in word.split()})


# Mutations.

def paths_of(value: Any, path: Tuple[Any, ...] = ()) -> List[Tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    inner: Any = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    found = []
    for step, child in inner:
        found += [path + (step,)] + paths_of(child, path + (step,))
    return found


def value_at(value: Any, path: Tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def deep_value(rng: random.Random) -> Any:
    value: Any = rng.choice(VALUES)
    name = rng.choice(NAMES_OF_MEMBERS)
    wrap = rng.choice([lambda one: [one], lambda one: {name: one},
                       lambda one: {"type": "array", "items": one}])
    for _ in range(rng.choice([3, 30, 150, 240, 400])):
        value = wrap(value)
    return value


def mutate_json(rng: random.Random, body: Any) -> Any:
    """A changed copy of a JSON value: members replaced, removed, added, moved, multiplied."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        paths = paths_of(body)
        if not paths:
            return body
        path = rng.choice(paths)
        holder, step = value_at(body, path[:-1]), path[-1]
        act = rng.random()
        if act < 0.5:
            holder[step] = copy.deepcopy(rng.choice(VALUES))
        elif act < 0.6:
            del holder[step]
        elif act < 0.75:
            holder[step] = copy.deepcopy(value_at(body, rng.choice(paths)))
        elif act < 0.8:
            holder[step] = deep_value(rng)
            return body             # another copy of it could go deeper than Python does
        elif isinstance(holder, dict):
            value = rng.choice(VALUES + [holder[step]])
            holder[rng.choice(NAMES_OF_MEMBERS)] = copy.deepcopy(value)
        else:
            times = rng.choice([1, 2, 2, 100])
            holder[step:step] = [copy.deepcopy(holder[step]) for _ in range(times)]
    return body


def mutate_bytes(rng: random.Random, data: bytes, words: List[bytes]) -> bytes:
    """Changed bytes: some flipped, cut out, put in, moved, or repeated many times."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([0, 1, 1, 2, 5, 20, 200]))
        piece, act = data[start:end], rng.random()
        if act < 0.4:
            data = data[:start] + rng.choice(words) + data[end:]
        elif act < 0.55:
            data = data[:start] + bytes([rng.randrange(256)]) + data[end:]
        elif act < 0.7:
            data = data[:start] + data[end:]
        elif act < 0.85:
            at = rng.randrange(len(data) + 1)
            data = data[:at] + piece + data[at:]
        elif act < 0.9:
            data = data[:start]
        else:
            data = data[:start] + piece * rng.choice([2, 3, 50, 50, 5000]) + data[end:]
    return data[:MOST_BYTES]


def make_wire(rng: random.Random, seeds: List[Any]) -> bytes:
    return mutate_bytes(rng, rng.choice(seeds), WIRE_WORDS)


def mutate_line(rng: random.Random, line: bytes) -> bytes:
    """An event of an answer changed as JSON, whether it is a line or the data of a frame."""
    field = b"data: " if line.startswith(b"data: ") else b""
    try:
        event = mutate_json(rng, json.loads(line[len(field):]))
        return field + json.dumps(event).encode() + b"\n"
    except (ValueError, RecursionError):
        return field + b"{}\n"


def make_lines(rng: random.Random, seeds: List[Any], words: List[bytes] = LINE_WORDS) -> bytes:
    """A recorded answer with some events changed as JSON, some as bytes, some put elsewhere."""
    lines = list(rng.choice(seeds))
    for _ in range(rng.choice([0, 1, 1, 3])):
        at = rng.randrange(len(lines))
        lines[at] = mutate_line(rng, lines[at])
    if rng.random() < 0.3:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines) * rng.choice([1, 1, 2, 300]))
    data = b"".join(lines)
    return mutate_bytes(rng, data, words) if rng.random() < 0.6 else data[:MOST_BYTES]


def make_frames(rng: random.Random, seeds: List[Any]) -> bytes:
    return make_lines(rng, seeds, SSE_WORDS)


def make_request(rng: random.Random, seeds: List[Any]) -> bytes:
    """A good request changed as JSON, as bytes, or both."""
    body, act = rng.choice(seeds), rng.random()
    if act < 0.85:
        body = mutate_json(rng, body)
    data = json.dumps(body).replace("Infinity", "1e999").encode()
    return mutate_bytes(rng, data, LINE_WORDS) if act > 0.7 else data[:MOST_BYTES]


# Targets: what is done with a case.  Whatever they raise but ProxyError is a finding.

def outcome(work: Callable[[], Any]) -> Any:
    """A result, or the kind of the ProxyError that came instead."""
    try:
        return work()
    except ccproxy.ProxyError as error:
        return error.kind


def check_head(head: Any) -> None:
    """Nothing that could end a line or a value is in what a head gives."""
    for name, value in head.fields.items():
        assert not set(name + value) & {"\0", "\r", "\n"}, name
        assert name == name.lower() and " " not in name and value == value.lstrip("\t"), name
    assert head.framing.length is None or 0 <= head.framing.length < 10 ** 18
    assert not (head.framing.chunked and head.framing.length)


def run_head(rng: random.Random, data: bytes, parse: Any, fault: Any) -> None:
    """The end of a head, in one piece and byte by byte as it grows, and the head."""
    def grow() -> int:
        buffer, seen, found = bytearray(), 0, -1
        for piece in cut_bytes(data, random_cuts(rng, data)):
            buffer += piece
            found = ccproxy.find_head_end(buffer, seen, fault)
            if found >= 0:
                return found
            seen = len(buffer)
        return found
    end, grown = outcome(lambda: ccproxy.find_head_end(data, 0, fault)), outcome(grow)
    refused = isinstance(end, str) and isinstance(grown, str)      # for either of two reasons
    assert refused or grown == end, "a head cut in pieces ends elsewhere"
    if isinstance(end, int) and end >= 0:
        head = outcome(lambda: parse(data[:end]))
        if not isinstance(head, str):
            check_head(head)


def run_request_head(rng: random.Random, data: bytes) -> None:
    run_head(rng, data, ccproxy.parse_request_head, ccproxy.client_fault)


def run_response_head(rng: random.Random, data: bytes) -> None:
    run_head(rng, data, ccproxy.parse_response_head, ccproxy.upstream_fault)


def unchunk(data: bytes, cuts: Any) -> Any:
    """(content, rest), or (content, kind of the error behind it)."""
    body, content, taken = ccproxy.ChunkedBody(ccproxy.client_fault), b"", 0
    try:
        for piece in cut_bytes(data, cuts):
            content += body.feed(piece)
            taken += len(piece)
            if body.broken is not None:
                return content, body.broken.kind
            if body.done:
                break
        body.eof()
    except ccproxy.ProxyError as error:
        return content, error.kind
    return content, body.rest + data[taken:]


def run_chunks(rng: random.Random, data: bytes) -> None:
    """The chunked coding means the same however it is cut."""
    cuts = "bytewise" if len(data) < 600 and rng.random() < 0.3 else random_cuts(rng, data)
    assert unchunk(data, cuts) == unchunk(data, None), "chunks cut in pieces mean something else"


def run_lines(rng: random.Random, data: bytes) -> None:
    """Complete lines in order; only a line that nobody wants may be missing."""
    buffer, pieces = ccproxy.LineBuffer(ccproxy.ALPHA.skip), b""
    for piece in cut_bytes(data, random_cuts(rng, data)):
        lines = buffer.feed(piece)
        assert not lines or lines.endswith(b"\n")
        pieces += lines
    pieces += buffer.flush()
    wanted = [line for line in data.split(b"\n") if not line.startswith(ccproxy.ALPHA.skip)]
    got = [line for line in pieces.split(b"\n") if not line.startswith(ccproxy.ALPHA.skip)]
    assert b"".join(got) == b"".join(wanted), "lines are lost"


def feed_all(answer: Any, data: bytes, cuts: Any) -> bytes:
    frames = b""
    for piece in cut_bytes(data, cuts):
        frames += answer.feed(piece)
        if answer.over:
            return frames
    return frames + answer.eof()


def run_answer(face: str, rng: random.Random, data: bytes,
               upstream: Any = ccproxy.ALPHA) -> None:
    """A stream keeps its grammar, a plain answer can be written; a failure too."""
    members = rng.choice([{}, {"stops": ["x", "Hello"]}, {"show_thinking": False},
                          {"include_usage": True}, {"carry_thinking": True}])
    lanes = rng.random() < 0.8
    answer = new_answer(upstream, face, True, lanes, **members)
    try:
        frames = feed_all(answer, data, random_cuts(rng, data))
    except ccproxy.ProxyError as error:
        frames = answer.stop(error)
    if not lanes:       # else broken UTF-8 in the same piece decides how strings are escaped
        whole = feed_all(new_answer(upstream, face, True, lanes, **members), data, None)
        assert whole == frames, "an answer cut in pieces means something else"
    # Deltas of a call that its last line contradicts, or that were no object and so were healed,
    # cannot be taken back; Responses tells both.
    healed = any(block.text.startswith('{"input":') for block in answer.reply.of_kind("tool"))
    if len(frames) < CHECKED_BYTES and not (face == "responses" and (b"tool-" in data or healed)):
        check_frames(face, answer, frames)
    if answer.error is not None:
        answer.failure(answer.error)
    plain = new_answer(upstream, face, False, **members)
    try:
        feed_all(plain, data, None)
    except ccproxy.ProxyError as error:
        plain.stop(error)
    if plain.over and plain.error is None:
        ccproxy.to_json(plain.body())


def run_request(face: str, rng: random.Random, data: bytes) -> None:
    """A request is refused as the client's fault, or becomes what an upstream can take; then its
    answer can be written.  RecursionError is caught where the shell catches it."""
    notes: List[str] = []
    try:
        body = ccproxy.parse_object(data, notes)
        reader = ccproxy.choose_reader(ALL_FACES[face], body)
        prompt = reader.parse(body, notes)
        model = ccproxy.resolve_model(prompt.asked, MODELS, CONFIG, notes)
        prompt.model = model.id
        prompt.effort = ccproxy.fit_effort(prompt.effort, model, notes)
        prompt.max_tokens = ccproxy.fit_max_tokens(prompt.max_tokens, model, notes)
        ccproxy.repair_prompt(prompt)
        ccproxy.derive_session("user_k", ccproxy.session_value({}, prompt.user_id),
                               ccproxy.first_user_text(prompt))
        payload = ccproxy.build_alpha(prompt, "session")
        documented = {api: upstream.build(prompt, "session") for api, upstream in UPSTREAMS.items()}
        assert ccproxy.estimate_input(prompt) >= 1
    except ccproxy.ProxyError as error:
        assert error.status in (400, 404, 501) and error.message, error.status
        ccproxy.to_json(ALL_FACES[face].error(error))
        return
    except RecursionError:
        return
    ccproxy.format_notes(notes).encode("latin-1")
    check_params(json.loads(payload, parse_constant=refuse)["params"])
    check_openai(json.loads(documented["openai"], parse_constant=refuse))
    check_anthropic(json.loads(documented["anthropic"], parse_constant=refuse))
    reply = ccproxy.Reply("id", prompt.asked, 0, echo=prompt.echo,
                          include_usage=prompt.include_usage, carry_thinking=prompt.carry_thinking)
    answer = ccproxy.Answer(ALL_FACES[face], ccproxy.ALPHA, reply, prompt, False)
    feed_all(answer, ANSWERED, None)
    if answer.over and answer.error is None:
        ccproxy.to_json(answer.body())


def check_openai(body: Any) -> None:
    """Every call is answered right behind its message, and no message is empty."""
    assert body["stream"] is True and body["messages"] and body.get("tools") != []
    pending: List[str] = []
    for message in body["messages"]:
        if message["role"] == "tool":
            pending.remove(message["tool_call_id"])
            assert isinstance(message["content"], str)
            continue
        assert not pending, "a call without its result"
        calls = message.get("tool_calls", [])
        assert message["content"] or calls or message.get("reasoning_content"), message
        pending = [call["id"] for call in calls]
        for call in calls:
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert not pending, "a call without its result"


def check_anthropic(body: Any) -> None:
    """Roles take turns, nothing is blank, results stand first behind their calls, thinking is
    signed and not the last."""
    assert body["stream"] is True and body["max_tokens"] >= 1 and body.get("tools") != []
    assert body.get("thinking", {}).get("budget_tokens", 0) < body["max_tokens"]
    pending: List[str] = []
    roles = [message["role"] for message in body["messages"]]
    assert roles[0] == "user" and all(one != other for one, other in zip(roles, roles[1:])), roles
    for message in body["messages"]:
        blocks = message["content"]
        kinds = [block["type"] for block in blocks]
        assert kinds and kinds[-1] != "thinking", kinds
        results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        assert sorted(results) == sorted(pending) and kinds[:len(results)].count(
            "tool_result") == len(results), (results, pending)
        assert all(block["text"].strip() for block in blocks if block["type"] == "text")
        assert all(block["signature"] for block in blocks if block["type"] == "thinking")
        pending = [block["id"] for block in blocks if block["type"] == "tool_use"]
        assert len(set(pending)) == len(pending)
    assert not pending, "a call without its result"


def refuse(word: str) -> Any:
    raise AssertionError("%s went to the upstream" % word)


ANSWERED = text_answer("Hello", " {\"city\": 1}")


class Target(NamedTuple):
    name: str
    seeds: List[Any]
    make: Callable[[random.Random, List[Any]], bytes]
    run: Callable[[random.Random, bytes], None]


def stream_seeds() -> List[List[bytes]]:
    """The recorded answers as lines, the long ones by their beginning and end."""
    seeds = []
    for name in NAMES:
        lines = [line for line in recorded(name).splitlines(True) if len(line) < 3000]
        seeds.append(lines if len(lines) < 40 else lines[:25] + lines[-10:])
    return seeds


def frame_seeds(api: str) -> List[List[bytes]]:
    """The same answers said in a documented API, and some with calls told at the same time."""
    said = [say_in(api, b"".join(lines)).splitlines(True) for lines in stream_seeds()]
    return said + [lines for lines in (make_answer(api, seed).data.splitlines(True)
                                       for seed in range(20)) if lines]


def answer_target(api: str, face: str) -> Target:
    return Target("%s-%s" % (api, face), frame_seeds(api), make_frames,
                  lambda rng, data: run_answer(face, rng, data, UPSTREAMS[api]))


def face_target(kind: str, face: str, seeds: List[Any], make: Any, run: Any) -> Target:
    return Target("%s-%s" % (kind, face), seeds, make, lambda rng, data: run(face, rng, data))


def all_targets() -> List[Target]:
    streams = stream_seeds()
    return [Target("head", HEADS, make_wire, run_request_head),
            Target("response-head", RESPONSE_HEADS, make_wire, run_response_head),
            Target("chunks", CHUNKS, make_wire, run_chunks),
            Target("lines", streams, make_lines, run_lines),
            *[face_target("answer", face, streams, make_lines, run_answer) for face in ALL_FACES],
            *[answer_target(api, face) for api in UPSTREAMS for face in ALL_FACES],
            *[face_target("request", face, REQUESTS[face], make_request, run_request)
              for face in ALL_FACES]]


# Running.

class Finding(NamedTuple):
    case: str
    data: bytes
    trace: str


class Tally:
    """What a run found: cases by target, findings, and the slowest per byte."""

    def __init__(self) -> None:
        self.cases = 0
        self.findings: List[Finding] = []
        self.rates: Dict[str, List[float]] = {}
        self.slow: Dict[str, Tuple[float, str]] = {}

    def add_time(self, target: Target, case: str, seconds: float, size: int) -> None:
        rate = seconds / max(size, SHORT_BYTES)
        rates = self.rates.setdefault(target.name, [])
        if len(rates) < 2000:
            rates.append(rate)
        if rate > self.slow.get(target.name, (0.0, ""))[0] and len(rates) > 50 \
                and rate > SLOW * statistics.median(rates[:200]):
            self.slow[target.name] = rate, case


def run_case(target: Target, case: str) -> Tuple[bytes, float, Optional[str]]:
    """(bytes, seconds, what was raised) of one case; its name is its seed."""
    rng = random.Random(case)
    data = target.make(rng, target.seeds)
    began, trace = time.perf_counter(), None
    try:
        target.run(rng, data)
    except Exception:
        trace = traceback.format_exc(limit=-4)
    return data, time.perf_counter() - began, trace


def fuzz(seed: str, cases: Optional[int] = None, seconds: float = 0.0) -> Tally:
    """So many cases of each target, or as many as there is time for."""
    tally, targets, number = Tally(), all_targets(), 0
    deadline = time.monotonic() + seconds
    while number != cases and (cases is not None or time.monotonic() < deadline):
        for target in targets:
            case = "%s:%s:%d" % (target.name, seed, number)
            data, spent, trace = run_case(target, case)
            tally.cases += 1
            if trace is not None:
                tally.findings.append(Finding(case, data, trace))
            else:
                tally.add_time(target, case, spent, len(data))
        number += 1
    return tally


def show_finding(finding: Finding) -> None:
    print("FOUND %s\n%s" % (finding.case, finding.trace))
    print("again: python3 tests/fuzz.py --case '%s'" % finding.case)
    if len(finding.data) < 20_000:
        print("bytes (base64): %s" % base64.b64encode(finding.data).decode())
    print()


def unique_findings(findings: List[Finding]) -> List[Finding]:
    """The shortest case of each kind of finding, known by where and what was raised."""
    best: Dict[str, Finding] = {}
    for one in findings:
        place = "\n".join(line for line in one.trace.splitlines() if line.startswith("  File"))
        sort = one.case.split(":")[0] + place
        if sort not in best or len(one.data) < len(best[sort].data):
            best[sort] = one
    return list(best.values())


def show_slow(tally: Tally, by_name: Dict[str, Target]) -> None:
    """Cases that were slow and are slow again, at their best of three."""
    for name, (_, case) in sorted(tally.slow.items()):
        runs = [run_case(by_name[name], case) for _ in range(3)]
        spent, size = min(one[1] for one in runs), len(runs[0][0])
        times = spent / max(size, SHORT_BYTES) / statistics.median(tally.rates[name])
        print("%s %s: %.1f ms for %d bytes, %.0f x the median per byte"
              % ("SLOW" if times > SLOW else "slow once", case, 1000 * spent, size, times))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--case", help="run one case again: target:seed:number")
    given = parser.parse_args()
    by_name = {target.name: target for target in all_targets()}
    if given.case:
        data, spent, trace = run_case(by_name[given.case.split(":")[0]], given.case)
        print("%d bytes, %.1f ms\n%r\n%s" % (len(data), 1000 * spent, data[:3000], trace or "fine"))
        return int(trace is not None)
    began = time.monotonic()
    tally = fuzz(given.seed, seconds=given.minutes * 60)
    for finding in unique_findings(tally.findings):
        show_finding(finding)
    show_slow(tally, by_name)
    spent = time.monotonic() - began
    print("%d cases of %d targets in %.0f s (%.0f per second), %d findings"
          % (tally.cases, len(by_name), spent, tally.cases / spent, len(tally.findings)))
    return int(bool(tally.findings))


if __name__ == "__main__":
    sys.exit(main())
