"""What the programs have to do: Claude Code, Codex, opencode, pi and aider, each in a fresh room.

A check gets an Agent: the bed, the folder the program is installed in, and a room with a home and a
working folder that are thrown away afterwards.
"""
from __future__ import annotations

import base64
import functools
import json
import os
import signal
import subprocess
from typing import Any, Callable, Dict, List, Tuple

from bed import (FINAL, FINAL_TEXT, HALF, KEY, MODEL, NO_CREDIT, OTHER_KEY, PNG, TOO_FAST, UNICODE,
                 Bed, Request, calling, check_cancelled, client_environment, expect, images,
                 run_client, stall, status, stream, text_answer, thinking_answer, thought_before,
                 tool_results, wait_until)

Done = Tuple[int, str]
GPT = "gpt-5.5"
IMAGE = base64.b64decode(PNG)


class Agent:
    """A program in a room of its own."""

    def __init__(self, bed: Bed, folder: str, room: str) -> None:
        self.bed, self.folder = bed, folder
        self.home, self.work = os.path.join(room, "home"), os.path.join(room, "work")
        os.makedirs(self.home)
        os.makedirs(self.work)

    def program(self, name: str) -> str:
        npm = os.path.join(self.folder, "node_modules", ".bin", name)
        return npm if os.path.exists(npm) else os.path.join(self.folder, "bin", name)

    def path(self, name: str) -> str:
        return os.path.join(self.work, name)

    def write(self, name: str, content: bytes) -> str:
        """A file of the working folder, or of the home when the name begins with ~."""
        path = os.path.join(self.home, name[2:]) if name.startswith("~/") else self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        return path

    def read(self, name: str) -> str:
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def run(self, command: List[str], **environment: str) -> Done:
        """Run to the end: exit status and all that was shown."""
        done = run_client(command, self.work, client_environment(self.home, **environment))
        self.bed.quiet()
        return done.returncode, done.stdout

    def interrupt(self, command: List[str], **environment: str) -> None:
        """Start, wait until the upstream answers, and end it as Ctrl-C does."""
        self.bed.reset()
        self.bed.upstream.default = stall(HALF)
        process = subprocess.Popen(
            command, cwd=self.work, env=client_environment(self.home, **environment),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        try:
            wait_until(lambda: self.bed.requests, 60)
            busy = self.bed.upstream.open
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGTERM)
            check_cancelled(self.bed, busy)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def final(done: Done, text: str = FINAL_TEXT) -> None:
    """The program ended well and showed this."""
    expect(done[0] == 0 and text in done[1], *done)


def told(bed: Bed, number: int = -1) -> str:
    """All messages of an upstream request as text."""
    return json.dumps(bed.params(number)["messages"], ensure_ascii=False)


def assistant_parts(bed: Bed) -> List[str]:
    """The kinds of the parts of every assistant turn of the last request."""
    return assistant_kinds(bed.params())


def assistant_kinds(params: Dict[str, Any]) -> List[str]:
    return [part["type"] for turn in params["messages"] if turn["role"] == "assistant"
            for part in turn["content"]]


# What every one of them has to do, given how it is run.

Run = Callable[..., Done]


def shared_checks(run: Run, interrupt: Callable[[Agent], None],
                  shell: Tuple[str, str]) -> Dict[str, Callable[[Agent], None]]:
    """Checks that differ only in how the program is run and what its shell tool is called."""
    tool, argument = shell

    def text(agent: Agent) -> None:
        final(run(agent, "Say something."))
        expect("Say something." in told(agent.bed, 0))

    def unicode(agent: Agent) -> None:
        answer = stream(text_answer(*UNICODE), cut=3)
        agent.bed.upstream.default = answer
        final(run(agent, UNICODE), UNICODE)
        expect(any(UNICODE in told(agent.bed, number) for number in range(len(agent.bed.requests))))

    def tools(agent: Agent) -> None:
        main_turn(agent, calling(
            ("call_00_a", tool, {argument: "echo one-$((40+2))", "description": "One"}),
            ("call_01_b", tool, {argument: "echo two-$((50+3))", "description": "Two"})))
        final(run(agent, "Run both."))
        given = tool_results(last_with_tools(agent.bed))
        expect("one-42" in given["call_00_a"] and "two-53" in given["call_01_b"], given)

    def refused_key(agent: Agent) -> None:
        code, shown = run(agent, "hi", key=OTHER_KEY)
        expect("Command Code key" in shown or "Invalid API key" in shown, code, shown)
        expect(not agent.bed.requests)

    def credit(agent: Agent) -> None:
        agent.bed.upstream.default = NO_CREDIT
        code, shown = run(agent, "hi")
        expect("No credit is left" in shown, code, shown, agent.bed.log)
        expect(main_requests(agent.bed) == 1, "%d requests" % len(agent.bed.requests), shown)

    def rate(agent: Agent) -> None:
        """Once is nothing that the user notices."""
        agent.bed.reset(TOO_FAST)
        final(run(agent, "hi"))

    def mid_stream(agent: Agent) -> None:
        main_turn(agent, None, stream("07"))
        code, shown = run(agent, "Tell a story.")
        expect(FINAL_TEXT in shown or "Network connection lost" in shown, code, shown)

    return {"text, streaming": text, "unicode": unicode, "tool loop, parallel calls": tools,
            "refused key (401)": refused_key, "out of credit (402)": credit,
            "rate limit (429)": rate, "error in mid-stream": mid_stream,
            "cancelled stream": interrupt}


def main_turn(agent: Agent, answer: Any, script: Any = None) -> None:
    """The first request that offers tools is answered so; titles and the like as always."""
    turns_with_tools(agent, script or stream(answer, cut=60))


def turns_with_tools(agent: Agent, *answers: Any) -> None:
    """Requests that offer tools are answered so, one by one; titles and the like as always."""
    left = [stream(one, cut=60) if isinstance(one, bytes) else one for one in answers]

    def route(sock: Any, request: Request) -> None:
        if request.params.get("tools") and left:
            left.pop(0)(sock, request)
        else:
            FINAL(sock, request)
    agent.bed.upstream.default = route


def last_with_tools(bed: Bed) -> Dict[str, Any]:
    return [request.params for request in bed.requests
            if request.params.get("tools")][-1]


def main_requests(bed: Bed) -> int:
    """How many requests were the program's turn itself and not a title."""
    return len([request for request in bed.requests if request.params.get("tools")]) or len(
        bed.requests)


# Claude Code.


def claude(agent: Agent, prompt: str, *arguments: str, key: str = KEY) -> Done:
    command, environment = claude_command(agent, prompt, *arguments, key=key)
    return agent.run(command, **environment)


def claude_command(agent: Agent, prompt: str, *arguments: str,
                   key: str = KEY) -> Tuple[List[str], Dict[str, str]]:
    """The command line of `claude -p`, and its environment."""
    return ([agent.program("claude"), "-p", prompt, "--allowedTools", "Bash,Edit,Read,Write",
             *arguments],
            {"ANTHROPIC_BASE_URL": agent.bed.proxy.base, "ANTHROPIC_API_KEY": key,
             "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1",
             "CLAUDE_CODE_MAX_RETRIES": "1"})


def claude_interrupt(agent: Agent) -> None:
    command, environment = claude_command(agent, "hi")
    agent.interrupt(command, **environment)


def claude_edits(agent: Agent) -> None:
    """It reads and edits a file by its own tools, and the results go up."""
    path = agent.write("a.txt", b"old line\n")
    agent.bed.reset(stream(calling(("call_00_r", "Read", {"file_path": path}))),
                    stream(calling(("call_00_e", "Edit", {
                        "file_path": path, "old_string": "old", "new_string": "n\u00e9w"}))))
    final(claude(agent, "Edit it."))
    expect(agent.read("a.txt") == "n\u00e9w line\n", agent.read("a.txt"))
    expect(set(tool_results(agent.bed.params())) == {"call_00_r", "call_00_e"})


def claude_continues(agent: Agent) -> None:
    """`claude -c` sends thinking back, in the same thread."""
    agent.bed.reset(stream(thinking_answer("Let me see.", "Four.")))
    final(claude(agent, "2+2?"), "Four.")
    final(claude(agent, "And now?", "-c"))
    expect(assistant_parts(agent.bed) == ["reasoning", "text"], assistant_parts(agent.bed))
    threads = {request.json.get("threadId") for request in agent.bed.requests}
    expect(len(threads) == 1, threads)


def claude_mid_stream(agent: Agent) -> None:
    """It repeats the request without a stream (R19)."""
    agent.bed.reset(stream("07"))
    final(claude(agent, "Tell a story."))
    expect(len(agent.bed.requests) == 2, len(agent.bed.requests))


def claude_rate(agent: Agent) -> None:
    """A limit that lasts is shown as one after its own retry."""
    agent.bed.upstream.default = TOO_FAST
    code, shown = claude(agent, "hi")
    expect(code == 1 and "slow down" in shown, code, shown)


def claude_thinks(agent: Agent) -> None:
    """Thinking is among the blocks that --output-format stream-json shows."""
    agent.bed.reset(stream(thinking_answer("Let me see.", "Four.")))
    code, shown = claude(agent, "2+2?", "--output-format", "stream-json", "--verbose")
    expect(code == 0 and '"thinking":"Let me see."' in shown, code, shown)


def claude_sees(agent: Agent) -> None:
    path = agent.write("a.png", IMAGE)
    agent.bed.reset(stream(calling(("call_00_c", "Read", {"file_path": path}))))
    final(claude(agent, "What is it?"))
    expect(len(images(agent.bed.params())) == 1, told(agent.bed))


def claude_structured(agent: Agent) -> None:
    """--json-schema: a tool with the schema is offered and its input is the answer."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    main_turn(agent, calling(("call_00_s", "StructuredOutput", {"city": "Oslo"})))
    code, shown = claude(agent, "Where?", "--output-format", "json", "--json-schema",
                         json.dumps(schema))
    expect(code == 0 and '"city":"Oslo"' in shown, code, shown)


CLAUDE_CODE = {
    **shared_checks(claude, claude_interrupt, ("Bash", "command")),
    "rate limit that lasts": claude_rate, "thinking": claude_thinks,
    "error in mid-stream": claude_mid_stream, "edits a file": claude_edits,
    "continues with thinking (-c)": claude_continues, "image": claude_sees,
    "structured output": claude_structured}


# Codex.


CODEX_CONFIG = """model_provider = "ccproxy"
[model_providers.ccproxy]
name = "ccproxy"
base_url = "%s/v1"
env_key = "CCPROXY_KEY"
wire_api = "responses"
"""


def codex_command(agent: Agent, prompt: str, *arguments: str, model: str = MODEL,
                  key: str = KEY) -> Tuple[List[str], Dict[str, str]]:
    """The command line of `codex exec`, and its environment."""
    agent.write("~/config.toml", (CODEX_CONFIG % agent.bed.proxy.base).encode())
    verb = arguments[:1] if arguments[:1] == ("resume",) else ()
    return ([agent.program("codex"), "exec", *verb, "--skip-git-repo-check",
             "--dangerously-bypass-approvals-and-sandbox", "-m", model, *arguments[len(verb):],
             prompt],
            {"CODEX_HOME": agent.home, "CCPROXY_KEY": key})


def codex(agent: Agent, prompt: str, *arguments: str, **options: str) -> Done:
    command, environment = codex_command(agent, prompt, *arguments, **options)
    return agent.run(command, **environment)


def codex_interrupt(agent: Agent) -> None:
    command, environment = codex_command(agent, "hi")
    agent.interrupt(command, **environment)


def codex_patches(agent: Agent) -> None:
    """The custom tool apply_patch takes the patch as it is (R41), not as JSON."""
    agent.write("a.txt", b"old line\n")
    patch = ("*** Begin Patch\n*** Update File: a.txt\n@@\n-old line\n+n\u00e9w \"line\"\n"
             "*** End Patch\n")
    agent.bed.reset(stream(calling(("call_00_p", "apply_patch", {"input": patch})), cut=33))
    final(codex(agent, "Patch it.", model=GPT))
    expect(agent.read("a.txt") == "n\u00e9w \"line\"\n", agent.read("a.txt"))
    expect("Success" in tool_results(agent.bed.params())["call_00_p"], told(agent.bed))


def codex_namespaced(agent: Agent) -> None:
    """A tool of the namespace multi_agent_v1 is called and not answered `unsupported call`."""
    codex(agent, "hi")
    name, = [tool["name"] for tool in agent.bed.params()["tools"] if "wait_agent" in tool["name"]]
    agent.bed.reset(stream(calling(("call_00_n", name, {"targets": [], "timeout_ms": 10000}))))
    final(codex(agent, "Wait."))
    given = tool_results(agent.bed.params())["call_00_n"]
    expect("unsupported" not in given and "agent" in given, given)


def codex_searches(agent: Agent) -> None:
    """Its own search for deferred tools is called, and what that finds is offered."""
    agent.bed.reset(stream(calling(("call_00_s", "tool_search", {"query": "spawn agent"})), cut=40))
    final(codex(agent, "Search.", model=GPT))
    expect("spawn_agent" in tool_results(agent.bed.params())["call_00_s"], told(agent.bed))
    names = [tool["name"] for tool in agent.bed.params()["tools"]]
    expect("multi_agent_v1__spawn_agent" in names, names)


def codex_continues(agent: Agent) -> None:
    """`codex exec resume --last` sends the thinking back that no store kept."""
    agent.bed.reset(stream(thinking_answer("Let me see.", "Four.")))
    final(codex(agent, "2+2?", model=GPT), "Four.")
    final(codex(agent, "And now?", "resume", "--last", model=GPT))
    expect(assistant_parts(agent.bed) == ["reasoning", "text"], assistant_parts(agent.bed))


def codex_thinks_and_calls(agent: Agent) -> None:
    """Thinking goes up again before the call that it led to, in the same turn."""
    agent.bed.reset(stream(calling(("call_00_t", "exec_command", {"cmd": "echo t-$((1+1))"}),
                                   thinking="I look.")))
    final(codex(agent, "Look.", model=GPT))
    expect(assistant_parts(agent.bed) == ["reasoning", "tool-call"], assistant_parts(agent.bed))
    expect("t-2" in tool_results(agent.bed.params())["call_00_t"], told(agent.bed))


def codex_thinks(agent: Agent) -> None:
    """The summary of the thinking is shown, for a model of any name."""
    agent.bed.reset(stream(thinking_answer("Let me see.", "Four.")))
    code, shown = codex(agent, "2+2?", "-c", 'model_reasoning_effort="high"', "-c",
                        'model_reasoning_summary="auto"', "-c",
                        "model_supports_reasoning_summaries=true")
    expect(code == 0 and "Four." in shown and "Let me see." in shown, code, shown)


def codex_stops(script: Any, words: str, agent: Agent) -> None:
    """A permanent refusal is shown at once with our words (R44)."""
    agent.bed.upstream.default = script
    code, shown = codex(agent, "hi")
    expect(code == 1 and words in shown and "Reconnecting" not in shown, code, shown)
    expect(agent.bed.log.count("api=responses") == 1, agent.bed.log)


def codex_sees(agent: Agent) -> None:
    path = agent.write("a.png", IMAGE)
    agent.bed.reset(stream(calling(("call_00_v", "view_image", {"path": path}))))
    final(codex(agent, "What is it?", model=GPT))
    expect(len(images(agent.bed.params())) == 1, told(agent.bed))


def codex_structured(agent: Agent) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
              "additionalProperties": False}
    path = agent.write("schema.json", json.dumps(schema).encode())
    agent.bed.upstream.default = stream(text_answer('{"city":', ' "Oslo"}'))
    command, environment = codex_command(agent, "Where?")
    final(agent.run(command[:-1] + ["--output-schema", path, "Where?"], **environment),
          '{"city": "Oslo"}')
    expect("city" in json.dumps(agent.bed.params(0)["system"]), agent.bed.params(0)["system"])


def refusal(code: int, name: str, message: str) -> Any:
    return status(code, {"success": False, "error": {"code": name, "message": message}})


CODEX = {
    **shared_checks(codex, codex_interrupt, ("exec_command", "cmd")),
    "402 stops it at once": functools.partial(codex_stops, NO_CREDIT, "No credit is left"),
    "403 stops it at once": functools.partial(
        codex_stops, refusal(403, "MODEL_NOT_IN_PLAN", "not in your plan"), "not in your plan"),
    "a usage window stops it at once": functools.partial(
        codex_stops, refusal(429, "X", "You've reached your 5-hour usage limit"), "5-hour"),
    "too long a prompt stops it at once": functools.partial(
        codex_stops, refusal(400, "X", "prompt is too long: 300000 tokens > 200000 maximum"),
        "context window"),
    "thinking": codex_thinks, "thinking before a call": codex_thinks_and_calls,
    "applies a patch (custom tool)": codex_patches, "namespaced tool": codex_namespaced,
    "searches for tools (tool_search)": codex_searches,
    "continues with thinking": codex_continues, "image": codex_sees,
    "structured output": codex_structured}


# opencode.


def opencode_command(agent: Agent, prompt: str, *arguments: str, vendor: str = "compatible",
                     key: str = KEY) -> Tuple[List[str], Dict[str, str]]:
    """The command line of `opencode run`, and its environment."""
    models = {MODEL: {"attachment": True, "reasoning": True, "tool_call": True,
                      "options": {"thinking": {"type": "enabled", "budgetTokens": 2000}}
                      if vendor == "anthropic-like" else {},
                      "modalities": {"input": ["text", "image"], "output": ["text"]}}}
    options = {"baseURL": agent.bed.proxy.base + "/v1", "apiKey": "{env:CCPROXY_KEY}"}
    provider = {name: {"npm": package, "options": options, "models": models}
                for name, package in (("compatible", "@ai-sdk/openai-compatible"),
                                      ("anthropic-like", "@ai-sdk/anthropic"))}
    agent.write("opencode.json", json.dumps({
        "autoupdate": False, "share": "disabled", "permission": "allow",
        "provider": provider}).encode())
    return ([agent.program("opencode"), "run", "-m", "%s/%s" % (vendor, MODEL), prompt,
             *arguments], {"CCPROXY_KEY": key})


def opencode(agent: Agent, prompt: str, *arguments: str, **options: str) -> Done:
    command, environment = opencode_command(agent, prompt, *arguments, **options)
    return agent.run(command, **environment)


def opencode_interrupt(agent: Agent) -> None:
    command, environment = opencode_command(agent, "hi")
    agent.interrupt(command, **environment)


def opencode_thinks(agent: Agent, vendor: str = "compatible") -> None:
    """Thinking is shown when asked for, and is in the history when the session goes on."""
    main_turn(agent, None, stream(thinking_answer("Let me see.", "Four.")))
    done = opencode(agent, "2+2?", "--thinking", vendor=vendor)
    final(done, "Four.")
    expect("Let me see." in done[1], done[1])
    agent.bed.reset()
    final(opencode(agent, "And now?", "-c", vendor=vendor))
    kinds = assistant_kinds(last_with_tools(agent.bed))
    expect(kinds == thought_before(vendor == "compatible"), kinds)


def opencode_edits(agent: Agent) -> None:
    path = agent.write("a.txt", b"old line\n")
    agent.bed.reset()
    turns_with_tools(agent, calling(("call_00_r", "read", {"filePath": path})),
                     calling(("call_00_e", "edit", {
                         "filePath": path, "oldString": "old", "newString": "n\u00e9w"})))
    final(opencode(agent, "Edit it."))
    expect(agent.read("a.txt") == "n\u00e9w line\n", agent.read("a.txt"))


def opencode_sees(agent: Agent) -> None:
    path = agent.write("a.png", IMAGE)
    final(opencode(agent, "What is it?", "-f", path))
    expect(len(images(last_with_tools(agent.bed))) == 1, told(agent.bed))


OPENCODE = {
    **shared_checks(opencode, opencode_interrupt, ("bash", "command")),
    "text over Messages": lambda agent: final(opencode(agent, "hi", vendor="anthropic-like")),
    "thinking": opencode_thinks,
    "thinking over Messages": functools.partial(opencode_thinks, vendor="anthropic-like"),
    "edits a file": opencode_edits, "image": opencode_sees}


# pi.


PI_APIS = {"chat": ("openai-completions", "/v1"), "messages": ("anthropic-messages", ""),
           "responses": ("openai-responses", "/v1")}


def pi_command(agent: Agent, prompt: str, *arguments: str, api: str = "chat",
               key: str = KEY) -> Tuple[List[str], Dict[str, str]]:
    """The command line of `pi -p`, and its environment."""
    model = {"id": MODEL, "reasoning": True, "input": ["text", "image"],
             "contextWindow": 128000, "maxTokens": 32000}
    providers = {name: {"baseUrl": agent.bed.proxy.base + path, "api": kind,
                        "apiKey": "CCPROXY_KEY", "models": [model]}
                 for name, (kind, path) in PI_APIS.items()}
    agent.write("~/.pi/agent/models.json", json.dumps({"providers": providers}).encode())
    return ([agent.program("pi"), "-p", "--provider", api, "--model", MODEL, "--thinking", "high",
             *arguments, prompt], {"CCPROXY_KEY": key, "PI_OFFLINE": "1"})


def pi(agent: Agent, prompt: str, *arguments: str, **options: str) -> Done:
    command, environment = pi_command(agent, prompt, *arguments, **options)
    return agent.run(command, **environment)


def pi_interrupt(agent: Agent) -> None:
    command, environment = pi_command(agent, "hi")
    agent.interrupt(command, **environment)


def pi_thinks(agent: Agent, api: str) -> None:
    """Thinking is shown as events, and is in the history when the session goes on."""
    agent.bed.reset(stream(thinking_answer("Let me see.", "Four.")))
    done = pi(agent, "2+2?", "--mode", "json", api=api)
    final(done, "Four.")
    expect("Let me see." in done[1], done[1])
    final(pi(agent, "And now?", "-c", api=api))
    expect(assistant_parts(agent.bed) == thought_before(api == "chat"), assistant_parts(agent.bed))


def pi_edits(agent: Agent, api: str) -> None:
    path = agent.write("a.txt", b"old line\n")
    agent.bed.reset(stream(calling(
        ("call_00_r", "read", {"path": path}),
        ("call_01_b", "bash", {"command": "echo b-$((1+1))"}),
        thinking="I look.")), stream(calling(("call_00_e", "edit", {
            "path": path, "edits": [{"oldText": "old", "newText": "n\u00e9w"}]}))))
    final(pi(agent, "Edit it.", api=api))
    expect(agent.read("a.txt") == "n\u00e9w line\n", agent.read("a.txt"), told(agent.bed))
    given = tool_results(agent.bed.params())
    expect(len(given) == 3 and any("b-2" in one for one in given.values()), given)


def pi_sees(agent: Agent, api: str) -> None:
    path = agent.write("a.png", IMAGE)
    final(pi(agent, "What is it?", "@" + path, api=api))
    expect(len(images(agent.bed.params())) == 1, told(agent.bed))


def pi_checks() -> Dict[str, Callable[[Agent], None]]:
    """The shared checks over Chat Completions, the telling ones over every API."""
    checks = shared_checks(pi, pi_interrupt, ("bash", "command"))
    for api in PI_APIS:
        for name, check in (("thinking", pi_thinks), ("edits a file", pi_edits),
                            ("image", pi_sees)):
            checks["%s (%s)" % (name, api)] = functools.partial(check, api=api)
        for name in ("unicode", "out of credit (402)", "error in mid-stream"):
            if api != "chat":
                checks["%s (%s)" % (name, api)] = shared_checks(
                    functools.partial(pi, api=api), pi_interrupt, ("bash", "command"))[name]
    return checks


PI = pi_checks()


# aider.


def aider_command(agent: Agent, prompt: str, *arguments: str,
                  key: str = KEY) -> Tuple[List[str], Dict[str, str]]:
    """The command line of `aider -m`, and its environment."""
    return ([agent.program("aider"), "--model", "openai/" + MODEL, "--yes-always", "--no-pretty",
             "--no-check-update", "--no-show-model-warnings", "--no-show-release-notes",
             "--no-analytics", "--no-gitignore", "--map-tokens", "0", *arguments, "-m", prompt],
            {"OPENAI_API_KEY": key, "OPENAI_API_BASE": agent.bed.proxy.base + "/v1",
             "LITELLM_LOCAL_MODEL_COST_MAP": "True", "GIT_CONFIG_NOSYSTEM": "1"})


def aider(agent: Agent, prompt: str, *arguments: str, **options: str) -> Done:
    command, environment = aider_command(agent, prompt, *arguments, **options)
    return agent.run(command, **environment)


def aider_interrupt(agent: Agent) -> None:
    command, environment = aider_command(agent, "hi", "--no-git")
    agent.interrupt(command, **environment)


def aider_credit(agent: Agent) -> None:
    """Shown at once; aider itself goes on trying for a minute, whatever it is told."""
    agent.bed.upstream.default = NO_CREDIT
    command, environment = aider_command(agent, "hi", "--no-git")
    process = subprocess.Popen(
        command, cwd=agent.work, env=client_environment(agent.home, **environment),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8")
    try:
        shown = ""
        while "No credit is left" not in shown:
            line = process.stdout.readline()
            expect(line, shown)
            shown += line
    finally:
        process.kill()
        process.communicate()
    expect(len(agent.bed.requests) <= 2, len(agent.bed.requests))


def aider_edits(agent: Agent) -> None:
    """It edits a file by a block in the text, and commits with a message it asks for."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", agent.work]
    agent.write("a.txt", b"old line\n")
    for command in (["init", "-q"], ["add", "a.txt"], ["commit", "-q", "-m", "first"]):
        subprocess.run(git + command, check=True, env=client_environment(agent.home))
    block = "a.txt\n```\nn\u00e9w line\n```\n"
    agent.bed.reset(stream(text_answer("Done.\n\n", block), cut=40),
                    stream(text_answer("fix: a new line")))
    code, shown = aider(agent, "Edit it.", "--edit-format", "whole", "--git-commit-verify", "a.txt")
    expect(code == 0 and agent.read("a.txt") == "n\u00e9w line\n", shown)
    log = subprocess.run(git + ["log", "--oneline"], stdout=subprocess.PIPE, encoding="utf-8",
                         env=client_environment(agent.home), check=True).stdout
    expect("fix: a new line" in log, log, shown)


def aider_sees(agent: Agent) -> None:
    agent.write("a.png", IMAGE)
    settings = agent.write("~/m.json", json.dumps({"openai/" + MODEL: {
        "max_input_tokens": 100000, "litellm_provider": "openai", "mode": "chat",
        "input_cost_per_token": 0, "output_cost_per_token": 0,
        "supports_vision": True}}).encode())
    final(aider(agent, "What is it?", "--no-git", "--model-metadata-file", settings, "a.png"))
    expect(len(images(agent.bed.params())) == 1, told(agent.bed)[-900:])


def aider_thinks(agent: Agent) -> None:
    agent.bed.upstream.default = stream(thinking_answer("Let me see.", "Four."))
    done = aider(agent, "2+2?", "--no-git")
    final(done, "Four.")
    expect("Let me see." in done[1], done[1])


def aider_plain(agent: Agent) -> None:
    """--no-stream asks for a whole answer."""
    final(aider(agent, "hi", "--no-git", "--no-stream"))


AIDER = {
    **{name: check for name, check in shared_checks(
        functools.partial(aider), aider_interrupt, ("", "")).items() if "tool" not in name},
    "out of credit (402)": aider_credit, "edits a file and commits": aider_edits,
    "thinking": aider_thinks, "image": aider_sees, "without streaming": aider_plain}
