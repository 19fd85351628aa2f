"""What every SDK has to show: one check per feature, the same for all clients and APIs.

A driver (sdk_driver.py, sdk_driver.mjs) runs inside the client's own environment; it takes tasks as
lines of JSON and gives back what its user would have seen.
"""
from __future__ import annotations

import base64
import json
import queue
import subprocess
import threading
from typing import Any, Callable, Dict, List, Tuple

from bed import (FINAL_TEXT, HALF, KEY, MODEL, NO_CREDIT, OTHER_KEY, PNG, TOO_FAST, UNICODE,
                 Bed, NotApplicable, Request, calling, check_cancelled, expect, images, stall,
                 stream, text_answer, thinking_answer, thought_before, tool_results)

OSLO = ("call_00_one", "get_weather", {"city": "Oslo"})
PAULO = ("call_01_two", "get_weather", {"city": "S\u00e3o Paulo"})
NO_THINKING_SHOWN = {("langchain", "chat"), ("llm", "chat")}    # no `reasoning_content` there
NO_FAILURE_SHOWN = {("llm", "responses")}       # it passes over `response.failed`
NO_SECOND_TURN = {"chat", "llm"}                # do not send thinking back by themselves
NOT_402 = {("litellm", "messages"): 500}        # what it makes of a 402
NO_STREAM = {("litellm", "responses")}          # it asks for a whole answer and cuts it itself
LEAVE_BY_ENDING = {"litellm", "llm"}            # their streams have no way to be closed


class Driver:
    """A driver process of one client."""

    def __init__(self, command: List[str], environment: Dict[str, str], work: str) -> None:
        self.process = subprocess.Popen(command, env=environment, cwd=work, encoding="utf-8",
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        self.lines: "queue.Queue[str]" = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)

    def ask(self, task: Dict[str, Any], seconds: float = 60) -> Dict[str, Any]:
        """One task, and what the client showed."""
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        while True:
            line = self.lines.get(timeout=seconds)
            if line.startswith("{"):
                return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


class Sdk:
    """One API of one client: asks with the options that a check needs."""

    def __init__(self, bed: Bed, driver: Driver, name: str, api: str) -> None:
        self.bed, self.driver, self.name, self.api = bed, driver, name, api

    def ask(self, prompt: str = "hi", **options: Any) -> Dict[str, Any]:
        task = {"api": self.api, "base": self.bed.proxy.base, "key": KEY, "model": MODEL,
                "prompt": prompt, "retries": 2, "stream": False, **options}
        shown = self.driver.ask(task)
        if not options.get("leave"):
            self.bed.quiet()
        return shown

    def good(self, prompt: str = "hi", **options: Any) -> Dict[str, Any]:
        """What is shown when nothing may go wrong."""
        shown = self.ask(prompt, **options)
        expect("error" not in shown, shown, self.bed.log)
        return shown


def check_text(bed: Bed, sdk: Sdk) -> None:
    expect(sdk.good()["text"] == FINAL_TEXT)
    expect(len(bed.requests) == 1)


def check_unicode(bed: Bed, sdk: Sdk) -> None:
    for streaming in (False, True):
        bed.reset(stream(text_answer(*UNICODE), cut=3))
        shown = sdk.good(UNICODE, stream=streaming)
        expect(shown["text"] == UNICODE, shown)
        expect(UNICODE in json.dumps(bed.params(), ensure_ascii=False))


def check_streaming(bed: Bed, sdk: Sdk) -> None:
    bed.reset(stream(text_answer("one ", "two ", "three"), cut=60, pause=0.05))
    shown = sdk.good(stream=True)
    expect(shown["text"] == "one two three" and shown["pieces"] >= 2, shown)


def check_tools(bed: Bed, sdk: Sdk) -> None:
    """Two calls at once, their results, and the final text, streaming and not."""
    for streaming in (False, True):
        bed.reset(stream(calling(OSLO, PAULO, text="Both."), cut=50))
        shown = sdk.good("Weather?", tools=True, stream=streaming)
        expect(shown["text"].strip().endswith(FINAL_TEXT), streaming, shown)
        given = tool_results(bed.params())
        expect(set(given) == {OSLO[0], PAULO[0]}, given)
        expect("wet in Oslo" in given[OSLO[0]] and "S\u00e3o Paulo" in given[PAULO[0]], given)
        expect([tool["name"] for tool in bed.params()["tools"]] == ["get_weather"])


CLIENT_TOOLS: Dict[str, List[Tuple[str, str, Any, str]]] = {
    # by client: (its tool, the function's name, its arguments, words of the result)
    "anthropic-py": [
        ("memory", "memory", {"command": "create", "path": "/memories/a.txt",
                              "file_text": "one \u00e9"}, "a.txt"),
        ("memory", "memory", {"command": "view", "path": "/memories/a.txt"}, "one \u00e9")],
    "openai-agents": [
        ("shell", "shell", {"commands": ["echo one-$((40+2))", "echo two; exit 3"]}, "one-42"),
        ("shell", "shell", {"commands": ["exit 3"]}, "exit code 3"),
        ("local_shell", "local_shell", {"command": ["echo", "three"], "env": {}}, "three"),
        ("apply_patch", "apply_patch", {"type": "create_file", "path": "new.txt",
                                        "diff": "+one\n+two"}, "created new.txt"),
        ("apply_patch", "apply_patch", {"type": "update_file", "path": "new.txt",
                                        "diff": "@@\n one\n-two\n+2"}, "updated new.txt"),
        ("apply_patch", "apply_patch", {"type": "delete_file", "path": "new.txt"},
         "deleted new.txt")]}


def check_client_tools(bed: Bed, sdk: Sdk) -> None:
    """Tools that the client itself has and runs: offered, called, and their results sent back."""
    if sdk.name not in CLIENT_TOOLS:
        raise NotApplicable("it has no such tools of its own")
    for streaming in (False, True):
        for tool, name, given, words in CLIENT_TOOLS[sdk.name]:
            bed.reset(stream(calling(("call_00_t", name, given)), cut=50))
            shown = sdk.good("Go.", client_tool=tool, stream=streaming)
            expect(shown["text"].strip().endswith(FINAL_TEXT), tool, streaming, shown)
            expect([one["name"] for one in bed.params(0)["tools"]] == [name], bed.params(0))
            result = tool_results(bed.params())
            expect(words in result["call_00_t"], tool, streaming, given, result)


def check_thinking(bed: Bed, sdk: Sdk) -> None:
    """Thinking is shown, and a second turn with it in the history is taken."""
    for streaming in (False, True):
        bed.reset(stream(thinking_answer("Let me see.", "Four.")))
        shown = sdk.good("2+2?", thinking=True, stream=streaming)
        thinking = "" if (sdk.name, sdk.api) in NO_THINKING_SHOWN else "Let me see."
        expect((shown["text"], shown["thinking"]) == ("Four.", thinking), streaming, shown)
        if NO_SECOND_TURN & {sdk.api, sdk.name}:
            continue
        bed.reset(stream(thinking_answer("Let me see.", "Four.")))
        shown = sdk.good("2+2?", thinking=True, stream=streaming, again=True)
        expect(shown["text"] == FINAL_TEXT, streaming, shown)
        told = [part["type"] for turn in bed.params()["messages"] if turn["role"] == "assistant"
                for part in turn["content"]]
        expect(told == thought_before(sdk.api in ("chat", "compatible")),
               "thinking did not come back", told, bed.log)


def check_default_store(bed: Bed, sdk: Sdk) -> None:
    """Who leaves `store` at its default finds his history in the next turn all the same."""
    if sdk.api not in ("responses", "openai", "agents") or NO_SECOND_TURN & {sdk.api, sdk.name}:
        raise NotApplicable("only for what sends the items of a Responses answer back")
    for streaming in (False, True):
        bed.reset(stream(thinking_answer("Let me see.", "Four.")))
        shown = sdk.good("2+2?", thinking=True, stream=streaming, again=True, store=True)
        expect(shown["text"] == FINAL_TEXT, streaming, shown)
        told = [part.get("text") for turn in bed.params()["messages"] for part in turn["content"]
                if turn["role"] == "assistant"]
        expect(told[-1:] == ["Four."], "the answer did not come back", told, bed.log)


def check_image(bed: Bed, sdk: Sdk) -> None:
    expect(sdk.good("What?", image=PNG)["text"] == FINAL_TEXT)
    expect(images(bed.params()) == [base64.b64decode(PNG)], bed.params()["messages"])


def check_structured(bed: Bed, sdk: Sdk) -> None:
    def answer(sock: Any, request: Request) -> None:
        """By the tool, where the client asks by one (AI SDK, LangChain), else by the text."""
        tools = request.params.get("tools")
        stream(calling(("call_00_j", tools[0]["name"], {"city": "Oslo"})) if tools
               else text_answer('{"city":', ' "Oslo"}'))(sock, request)
    bed.upstream.default = answer
    shown = sdk.good("Where?", schema=True)
    expect(shown["parsed"] == {"city": "Oslo"}, shown, bed.log)
    told = json.dumps([bed.params(0).get("system"), bed.params(0).get("tools")])
    expect("city" in told, "the schema did not reach the model", told)


def check_refused_key(bed: Bed, sdk: Sdk) -> None:
    shown = sdk.ask(key=OTHER_KEY)
    expect(shown.get("status") == 401, shown, bed.log)
    expect("key" in shown["message"] and not bed.requests, shown)


def check_credit(bed: Bed, sdk: Sdk) -> None:
    """Shown at once with the upstream's words, however many retries are allowed."""
    for streaming in (False, True):
        bed.reset()
        bed.upstream.default = NO_CREDIT
        shown = sdk.ask(stream=streaming)
        code = NOT_402.get((sdk.name, sdk.api), 402)
        expect(shown.get("status") == code and "No credit" in shown["message"], shown, bed.log)
        expect(len(bed.requests) == 1, "%d requests" % len(bed.requests))


def check_rate(bed: Bed, sdk: Sdk) -> None:
    """Shown as what it is; a client that retries gets through."""
    bed.reset()
    bed.upstream.default = TOO_FAST
    shown = sdk.ask(retries=0)
    expect(shown.get("status") == 429 and "slow down" in shown["message"], shown, bed.log)
    bed.reset(TOO_FAST)
    expect(sdk.good()["text"] == FINAL_TEXT)


def check_mid_stream(bed: Bed, sdk: Sdk) -> None:
    if (sdk.name, sdk.api) in NO_STREAM:
        raise NotApplicable("it asks for a whole answer and cuts that into pieces itself")
    bed.reset(stream("07"))
    shown = sdk.ask(stream=True, retries=0, raw=True)
    if (sdk.name, sdk.api) in NO_FAILURE_SHOWN:
        expect(shown["text"] == "Once upon a", shown)
        raise NotApplicable("it passes over response.failed, its user sees a short answer")
    expect("Network connection lost" in shown.get("message", ""), shown, bed.log)
    expect(shown["text"] in ("Once upon a", ""), shown)


def check_cancel(bed: Bed, sdk: Sdk) -> None:
    if (sdk.name, sdk.api) in NO_STREAM:
        raise NotApplicable("it asks for a whole answer and cuts that into pieces itself")
    bed.reset(stall(HALF))
    shown = sdk.good(stream=True, leave=True)
    expect(shown["text"] == "Hello", shown)
    if sdk.name in LEAVE_BY_ENDING:
        sdk.driver.close()
    check_cancelled(bed, 1)
    expect("499" in bed.log, bed.log)


CHECKS: Dict[str, Callable[[Bed, Sdk], None]] = {
    "text": check_text, "unicode": check_unicode, "streaming": check_streaming,
    "tool loop, parallel calls": check_tools, "client-run tools": check_client_tools,
    "thinking": check_thinking,
    "second turn, default store": check_default_store, "image": check_image,
    "structured output": check_structured, "refused key (401)": check_refused_key,
    "out of credit (402)": check_credit, "rate limit (429)": check_rate,
    "error in mid-stream": check_mid_stream, "cancelled stream": check_cancel}
