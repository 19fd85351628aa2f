"""The real Claude Code, where it is installed, through the proxy to a scripted upstream.

It is found as `claude` on the PATH or by the path in CCPROXY_TEST_CLAUDE.  Everything it keeps goes
into a home of its own; tools are allowed one by one, which works for root as well.
"""
from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from typing import Any, Dict, List, Tuple

import pytest

from fake_upstream import Request, ndjson, recorded, status, stream, text_answer
from harness import KEY, wait_until

CLAUDE = os.environ.get("CCPROXY_TEST_CLAUDE") or shutil.which("claude") or ""
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg==")
USAGE = {"inputTokens": 1000, "outputTokens": 20,
         "inputTokenDetails": {"noCacheTokens": 400, "cacheReadTokens": 600}}

pytestmark = pytest.mark.skipif(not CLAUDE, reason="Claude Code is not installed")


@pytest.fixture
def claude(proxy, tmp_path):
    """Runs `claude -p` in a directory of its own; gives its exit status and what it printed."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()

    def run(prompt: str, *arguments: str, **more: str) -> Tuple[int, str]:
        environment = {
            "PATH": os.environ.get("PATH", ""), "HOME": str(home), "ANTHROPIC_BASE_URL": proxy.base,
            "ANTHROPIC_API_KEY": KEY, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_MAX_RETRIES": "1", **more}
        done = subprocess.run([CLAUDE, "-p", prompt, *arguments], env=environment, cwd=str(work),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=25, encoding="utf-8")
        proxy.wait_quiet()
        return done.returncode, done.stdout.strip()
    run.work = work
    return run


def calling(*calls: Tuple[str, str, Dict[str, Any]], thinking: str = "") -> bytes:
    """An answer that calls tools, their inputs in pieces as the upstream sends them."""
    events: List[Dict[str, Any]] = [{"type": "start"}]
    if thinking:
        events += [{"type": "reasoning-start", "id": "r"},
                   {"type": "reasoning-delta", "id": "r", "text": thinking},
                   {"type": "reasoning-end", "id": "r"}]
    for name, tool, given in calls:
        text = json.dumps(given)
        events += [{"type": "tool-input-start", "id": name, "toolName": tool},
                   {"type": "tool-input-delta", "id": name, "delta": text[:7]},
                   {"type": "tool-input-delta", "id": name, "delta": text[7:]},
                   {"type": "tool-input-end", "id": name},
                   {"type": "tool-call", "toolCallId": name, "toolName": tool, "input": given}]
    return ndjson(*events, {"type": "finish", "finishReason": "tool-calls", "totalUsage": USAGE})


def results(request: Request) -> Dict[str, str]:
    """The tool results of a request's last tool turn, by call id."""
    turn = [turn for turn in request.json["params"]["messages"] if turn["role"] == "tool"][-1]
    return {part["toolCallId"]: part["output"]["value"] for part in turn["content"]}


def last_assistant(request: Request) -> List[Any]:
    turn = [turn for turn in request.json["params"]["messages"] if turn["role"] == "assistant"][-1]
    return turn["content"]


FINAL = stream(text_answer("The final answer."))


def test_turn_with_a_tool(upstream, proxy, claude):
    """The model calls Bash, Claude Code runs it, the result goes up, and the text comes back."""
    upstream.scripts = [stream(calling(("call_00_a", "Bash", {
        "command": "echo hello-$((40+2)) | tee made.txt", "description": "Say hello"})), cut=40)]
    upstream.default = FINAL
    assert claude("Please say hello.", "--allowedTools", "Bash") == (0, "The final answer.")
    assert (claude.work / "made.txt").read_text() == "hello-42\n"
    first, second = upstream.requests
    assert "Bash" in [tool["name"] for tool in first.json["params"]["tools"]]
    assert results(second) == {"call_00_a": "hello-42"}
    assert first.json["threadId"] == second.json["threadId"]
    check_request(first)
    log = proxy.log.getvalue()
    assert log.count("200 api=messages") == 2
    assert "notes=" not in log and "error" not in log and KEY not in log


def check_request(request: Request) -> None:
    """Nothing of the client's own accounting goes up, and what it told in `system` all does."""
    params = request.json["params"]
    texts = [part["text"] for part in params["system"]]
    assert texts and not any("billing-header" in text for text in texts)
    assert {turn["role"] for turn in params["messages"]} == {"user"}
    assert "Please say hello." in json.dumps(params["messages"])


def test_parallel_calls_and_thinking(upstream, claude):
    """Two calls at once, one of which fails; the thinking before them comes back."""
    upstream.scripts = [stream(calling(
        ("call_00_b", "Bash", {"command": "sleep 0.1; echo one", "description": "One"}),
        ("call_01_b", "Bash", {"command": "echo two; exit 3", "description": "Two"}),
        thinking="Both are needed."))]
    upstream.default = FINAL
    assert claude("Run both.", "--allowedTools", "Bash") == (0, "The final answer.")
    second = upstream.requests[-1]
    given = results(second)
    assert given["call_00_b"] == "one" and "two" in given["call_01_b"]
    thinking, *calls = last_assistant(second)
    assert thinking == {"type": "reasoning", "text": "Both are needed."}
    assert [call["toolCallId"] for call in calls] == ["call_00_b", "call_01_b"]


def test_read_a_picture(upstream, claude):
    path = claude.work / "a.png"
    path.write_bytes(PNG)
    upstream.scripts = [stream(calling(("call_00_c", "Read", {"file_path": str(path)})))]
    upstream.default = FINAL
    assert claude("What is it?", "--allowedTools", "Read") == (0, "The final answer.")
    image = upstream.requests[-1].json["params"]["messages"][-1]["content"][-1]
    assert image["type"] == "image" and image["mimeType"] == "image/png"


def test_continue(upstream, claude):
    """`claude -c` sends what was said, thinking and signature included, in the same thread."""
    upstream.scripts = [stream("09")]
    upstream.default = FINAL
    assert claude("Summarise.") == (0, "A short summary.")
    assert claude("And now?", "-c") == (0, "The final answer.")
    first, second = upstream.requests
    assert [part["text"] for part in last_assistant(second)] == [
        "Short summary needed.", "A short summary."]
    assert first.json["threadId"] == second.json["threadId"]


def test_error_in_mid_stream(upstream, proxy, claude):
    """It repeats the request without a stream (R19): the broken block was left open."""
    upstream.scripts = [stream("07")]
    upstream.default = FINAL
    code, text = claude("Tell a story.")
    assert (code, text) == (0, "The final answer.")
    assert len(upstream.requests) == 2
    wait_until(lambda: "Network connection lost" in proxy.log.getvalue())


@pytest.mark.parametrize("end", [
    {"type": "error", "error": {"message": "terminated"}},
    {"type": "finish", "finishReason": "length", "totalUsage": USAGE}], ids=["error", "length"])
def test_cut_call_is_not_run(upstream, claude, end):
    """A call that was cut before its first argument is not run as if it had none."""
    upstream.scripts = [stream(ndjson(
        {"type": "start"}, {"type": "text-delta", "id": "t", "text": "I look."},
        {"type": "tool-input-start", "id": "call_00_d", "toolName": "CronList"}, end))]
    upstream.default = FINAL
    claude("What is planned?", "--allowedTools", "CronList")
    assert not any(turn["role"] == "tool" for request in upstream.requests
                   for turn in request.json["params"]["messages"])


@pytest.mark.parametrize("script", [
    stream("08"), status(402, {"success": False, "error": {"code": "X", "message": "No balance"}})])
def test_out_of_credit(upstream, claude, script):
    """Shown at once with the upstream's words, and not repeated."""
    upstream.default = script
    code, text = claude("hi")
    assert code == 1 and "402" in text and "alance" in text
    assert len(upstream.requests) == 1


def test_all_went_into_thinking(upstream, claude):
    """Cut by length after thinking alone: Claude Code asks the model to go on."""
    upstream.scripts = [stream(recorded("06"))]
    upstream.default = FINAL
    assert claude("Prove it.") == (0, "The final answer.")
    assert len(upstream.requests) == 2


def test_another_vendors_key(upstream, claude):
    code, text = claude("hi", ANTHROPIC_API_KEY="sk-ant-something")
    assert code == 1 and "API key" in text and not upstream.requests
