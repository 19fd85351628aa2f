"""What the client checks share: a proxy before a scripted upstream, answers, and expectations."""
from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from typing import Any, Dict, List, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from fake_upstream import (CHUNKED_HEAD, DIALECT, FakeUpstream, Request, chunked,  # noqa: E402
                           ndjson, stall, status, stream, text_answer)
from harness import KEY, Proxy, clean_environment, wait_until  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = "deepseek/deepseek-v4-flash"
OTHER_KEY = "sk-somebody-elses"
PNG = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
       "rkJggg==")
UNICODE = "Gr\u00fc\u00dfe \U0001f469\u200d\U0001f680 \u2014 \u65e5\u672c\u8a9e e\u0301 \U0001d11e"
HALF = CHUNKED_HEAD + chunked(ndjson({"type": "start"},
                                     {"type": "text-delta", "id": "0", "text": "Hello"}))
USAGE = {"inputTokens": 1000, "outputTokens": 20}
NO_CREDIT = status(402, {"success": False, "error": {
    "code": "INSUFFICIENT_CREDITS", "message": "No credit is left"}})
TOO_FAST = status(429, {"success": False, "error": {
    "code": "RATE_LIMITED", "message": "slow down"}}, "retry-after: 1\r\n")
SIGNED = {"providerMetadata": {"anthropic": {"signature": "c2lnbmVk"}}}  # where the API has a place
FINAL_TEXT = "The final answer."
FINAL = stream(text_answer("The final", " answer."))


class NotApplicable(Exception):
    """Raised by a check that this client has no use for; the message says why."""


class Bed:
    """The proxy and the upstream that one client is driven against."""

    def __init__(self, scratch: str) -> None:
        self.scratch = scratch
        self.upstream = FakeUpstream()
        self.proxy = Proxy(apiBase=self.upstream.base)
        self.mark = 0

    def reset(self, *scripts: Any) -> None:
        """Forget what came, and answer the next requests so; after them the final answer."""
        self.upstream.requests[:] = []
        self.upstream.scripts = list(scripts)
        self.upstream.default = FINAL
        self.mark = len(self.proxy.log.getvalue())

    @property
    def requests(self) -> List[Request]:
        return self.upstream.requests

    @property
    def log(self) -> str:
        """What the proxy logged since the last reset."""
        return self.proxy.log.getvalue()[self.mark:]

    def params(self, number: int = -1) -> Dict[str, Any]:
        """The upstream parameters of a request."""
        return self.requests[number].params

    def quiet(self) -> None:
        self.proxy.wait_quiet(10)

    def close(self) -> None:
        self.proxy.close()
        self.upstream.close()


def calling(*calls: Tuple[str, str, Any], thinking: str = "", text: str = "") -> bytes:
    """An answer that calls tools (id, name, input), the inputs in pieces."""
    events: List[Dict[str, Any]] = [{"type": "start"}]
    if thinking:
        events += [{"type": "reasoning-start", "id": "r"},
                   {"type": "reasoning-delta", "id": "r", "text": thinking},
                   {"type": "reasoning-end", "id": "r", **SIGNED}]
    if text:
        events.append({"type": "text-delta", "id": "t", "text": text})
    for name, tool, given in calls:
        text = json.dumps(given)
        events += [{"type": "tool-input-start", "id": name, "toolName": tool},
                   {"type": "tool-input-delta", "id": name, "delta": text[:7]},
                   {"type": "tool-input-delta", "id": name, "delta": text[7:]},
                   {"type": "tool-input-end", "id": name},
                   {"type": "tool-call", "toolCallId": name, "toolName": tool, "input": given}]
    return ndjson(*events, {"type": "finish", "finishReason": "tool-calls", "totalUsage": USAGE})


def thinking_answer(thinking: str, text: str) -> bytes:
    """An answer of thinking and then text."""
    return ndjson({"type": "start"}, {"type": "reasoning-start", "id": "r"},
                  {"type": "reasoning-delta", "id": "r", "text": thinking},
                  {"type": "reasoning-end", "id": "r", **SIGNED},
                  {"type": "text-delta", "id": "t", "text": text},
                  {"type": "finish", "finishReason": "stop", "totalUsage": USAGE})


def thought_before(chat: bool) -> List[str]:
    """The kinds of an earlier answer's parts that go up again.  Messages takes thinking back only
    as it was signed, and Chat Completions has no place for a signature."""
    return ["text"] if chat and DIALECT == "anthropic" else ["reasoning", "text"]


def tool_results(params: Dict[str, Any]) -> Dict[str, str]:
    """Every tool result of a request as JSON text, by call id."""
    return {part["toolCallId"]: json.dumps(part["output"], ensure_ascii=False)
            for turn in params["messages"] if turn["role"] == "tool" for part in turn["content"]}


def images(params: Dict[str, Any]) -> List[bytes]:
    """The bytes of every picture of a request."""
    return [base64.b64decode(part["image"].partition(",")[2]) for turn in params["messages"]
            for part in turn["content"] if isinstance(part, dict) and part["type"] == "image"]


def check_cancelled(bed: Bed, busy: int) -> None:
    """The connection that was busy upstream is closed soon after the client left."""
    wait_until(lambda: bed.upstream.open < busy, 10)
    bed.quiet()


def expect(condition: Any, *shown: Any) -> None:
    """An assertion that shows what came."""
    if not condition:
        raise AssertionError(" | ".join(str(one)[-700:] for one in shown) or "not as expected")


def client_environment(home: str, **more: str) -> Dict[str, str]:
    """A client's environment: a home of its own, no proxies and no keys of this machine."""
    kept = {name: value for name, value in clean_environment().items()
            if name in ("PATH", "LANG", "TMPDIR")}
    return {**kept, "HOME": home, "NO_COLOR": "1", "CI": "1", **more}


def run_client(command: List[str], work: str, environment: Dict[str, str], seconds: float = 60,
               given: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a client to its end; both of its outputs are in `stdout`."""
    return subprocess.run(command, cwd=work, env=environment, input=given, timeout=seconds,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                          errors="replace")
