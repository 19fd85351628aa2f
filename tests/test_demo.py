"""--demo as a person starts it: every API, with any key and none, errors by markers, its end."""
from __future__ import annotations

import asyncio
import hashlib
import json
import signal

import ccproxy
import pytest
from fake_upstream import FakeUpstream
from harness import CHAT, MESSAGES, PROGRAM, Program, Proxy, fold_chat, fold_messages

RESPONSES = "/v1/responses"
DOORS = (CHAT, MESSAGES, RESPONSES)
LAST_LINE = "Say hello."         # of its start-up screen
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5E"
         "rkJggg==")
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
KEYS = [(None, False), (None, True), ("user_anything", True), ("sk-another-vendors", False)]


@pytest.fixture(scope="module")
def bystander():
    """An upstream that is configured, and must never be called."""
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def demo(bystander):
    program = Program("--demo", "--api-base", bystander.base, until=LAST_LINE)
    yield program
    program.close()


@pytest.fixture(scope="module")
def quick():
    """The demo in this process, without pauses between words and with short ones between attempts.
    """
    slow, patch = ccproxy.demo_stream, pytest.MonkeyPatch()
    patch.setattr(ccproxy, "demo_stream", lambda params, asked: [
        (0.0, line) for _, line in slow(params, asked)])
    proxy = Proxy(useProviderModels=False, apiBase="http://127.0.0.1:9")
    asyncio.run_coroutine_threadsafe(ccproxy.start_demo(proxy.app), proxy.loop).result(10)
    yield proxy
    proxy.close()
    patch.undo()
    assert "Traceback" not in proxy.log.getvalue()


def ask(demo, path, words, key=None, **members):
    """A request of the API with one user message, as curl would send it."""
    if path == RESPONSES:
        body = {"input": [{"role": "user", "content": words}]}
    else:
        body = {"messages": [{"role": "user", "content": words}], "max_tokens": 1000}
    return demo.request("POST", path, {**body, **members}, key=key)


def text_of(path, answer):
    """The text of an answer in either form."""
    assert answer.status == 200, answer.body
    streamed = answer.fields["content-type"].startswith("text/event-stream")
    if path == CHAT:
        message = fold_chat(answer.frames)[0] if streamed else answer.json["choices"][0]["message"]
        return message["content"]
    if path == MESSAGES:
        message = fold_messages(answer.frames) if streamed else answer.json
        return "".join(block.get("text", "") for block in message["content"])
    response = answer.frames[-1]["response"] if streamed else answer.json
    return "".join(part["text"] for item in response["output"] if item["type"] == "message"
                   for part in item["content"])


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("key, streamed", KEYS)
def test_every_api_with_any_key_or_none(quick, path, key, streamed):
    text = text_of(path, ask(quick, path, "Say 'h\u00e9llo'.", key, stream=streamed))
    assert "demo of ccproxy, not a model" in text and "12 characters" in text
    assert "h\u00e9llo" not in text and "\U0001f680" in text


@pytest.mark.parametrize("path, key, streamed", [(CHAT, "sk-another-vendors", True),
                                                 (MESSAGES, None, True), (RESPONSES, None, False)])
def test_every_api_of_the_program(demo, path, key, streamed):
    """The same through the program as it is started."""
    assert "10 characters" in text_of(path, ask(demo, path, "Say hello.", key, stream=streamed))


def test_the_command_on_the_screen(demo):
    """The curl command that it prints needs no key and gets an answer."""
    lines = demo.screen.split("\n")
    assert "curl http://127.0.0.1:%d/v1/chat/completions" % demo.port in demo.screen
    assert "Authorization" not in demo.screen and "user_" not in demo.screen
    body = next(line for line in lines if " -d " in line).split("'")[1]
    answer = demo.request("POST", CHAT, json.loads(body), {"content-type": "application/json"},
                          None)
    assert "not a model" in text_of(CHAT, answer)


def test_the_screen(demo, bystander):
    """It says that this is the demo, and nothing of the vendor: nobody is called."""
    assert "--demo" in demo.screen and bystander.base not in demo.screen
    assert "note" not in demo.screen and "vendor" not in demo.screen
    assert demo.request("GET", "/health", key=None).json["upstream"] == "demo"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/moonshotai%2FKimi-K3", "/", "/health",
                                  "/api/hello"])
def test_gets(demo, path):
    assert demo.request("GET", path, key=None).status == 200


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/v1/responses/input_tokens"])
def test_counts(demo, path):
    body = {"messages": [{"role": "user", "content": "How many?"}]}
    assert demo.request("POST", path, body, key=None).json["input_tokens"] > 1


# Errors by markers.

MARKERS = [         # marker, status, error.type at chat, error.type at messages, x-should-retry
    ("400", 400, "invalid_request_error", "invalid_request_error", "false"),
    ("402", 402, "insufficient_quota", "billing_error", "false"),
    ("403", 403, "permission_error", "permission_error", "false"),
    ("429", 429, "rate_limit_exceeded", "rate_limit_error", None),
    ("500", 502, "server_error", "api_error", None),
    ("503", 503, "server_error", "overloaded_error", None)]


@pytest.mark.parametrize("marker, expected, chat, messages, retry", MARKERS)
@pytest.mark.parametrize("streamed", [False, True])
def test_errors_by_markers(quick, marker, expected, chat, messages, retry, streamed):
    for path in DOORS:
        answer = ask(quick, path, "Please fail. [demo:%s]" % marker, stream=streamed)
        assert answer.status == expected
        error = answer.json["error"]
        assert error["type"] == (messages if path == MESSAGES else chat)
        assert "demo:" + marker in error["message"]
        assert answer.fields.get("x-should-retry") == retry
        assert answer.fields.get("retry-after") == ("7" if marker == "429" else None)


@pytest.mark.parametrize("marker", ["402", "429"])
def test_errors_of_the_program(demo, marker):
    """The same through the program as it is started."""
    answer = ask(demo, CHAT, "[demo:%s]" % marker)
    assert answer.status == int(marker) and marker in answer.json["error"]["message"]


def test_codex_in_the_demo(quick):
    answer = quick.request("POST", RESPONSES, {"input": "[demo:402]", "stream": True},
                           {"originator": "codex_exec"}, None)
    assert answer.status == 200 and answer.frames[0]["type"] == "response.failed"


REASONS = {CHAT: lambda body: body["choices"][0]["finish_reason"] == "length",
           MESSAGES: lambda body: body["stop_reason"] == "max_tokens",
           RESPONSES: lambda body: body["status"] == "incomplete"}
LAST = {CHAT: "error", MESSAGES: "error", RESPONSES: "response.failed"}


@pytest.mark.parametrize("path", DOORS)
def test_cut_by_length(quick, path):
    """An answer that was cut, not a failure, also for who asked for no thinking."""
    answer = ask(quick, path, "[demo:length]")
    assert answer.status == 200 and REASONS[path](answer.json)


@pytest.mark.parametrize("path", DOORS)
@pytest.mark.parametrize("marker", ["error", "cut"])
def test_errors_in_mid_stream(quick, path, marker):
    """Text first, then an error as the last event; a plain request gets a real status."""
    answer = ask(quick, path, "[demo:%s]" % marker, stream=True)
    assert answer.status == 200 and b"demo" in answer.body
    last = answer.frames[-1]
    assert LAST[path] in (last.get("type"), *last)
    assert b"[DONE]" not in answer.body and b"message_stop" not in answer.body
    assert ask(quick, path, "[demo:%s]" % marker).status in (502, 503)


# What it shows.


def test_thinking_and_usage(quick):
    answer = ask(quick, CHAT, "Think.", reasoning_effort="high")
    message = answer.json["choices"][0]["message"]
    assert message["reasoning_content"] == "The demo thinks a little."
    usage = answer.json["usage"]
    assert usage["prompt_tokens"] > 1 and usage["completion_tokens"] > 1


@pytest.mark.parametrize("path, part", [
    (CHAT, {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}),
    (MESSAGES, {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                            "data": PIXEL}}),
    (RESPONSES, {"type": "input_image", "image_url": "data:image/png;base64," + PIXEL})])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_pictures(quick, path, part, pictures):
    text = "input_text" if path == RESPONSES else "text"
    answer = ask(quick, path, [{"type": text, "text": "What is it?"}] + [part] * pictures)
    assert ("picture" in text_of(path, answer)) is (pictures > 0)
    assert "%d picture" % pictures in text_of(path, answer) or not pictures


def function(name):
    return {"type": "function", "function": {"name": name, "parameters": CITY}}


@pytest.mark.parametrize("names, words, called", [
    (["get_weather"], "Hi.", []), (["get_weather"], "[demo:call get_weather]", ["get_weather"]),
    (["bash", "look"], "[demo:parallel]", ["look"]), (["bash"], "look at bash", []),
    (["bash"], "[demo:call bash]", ["bash"]),
    (["look", "listen"], "[demo:parallel]", ["look", "listen"])])
def test_tool_calls(quick, names, words, called):
    """A tool is called when a marker asks for it, with valid arguments; one that changes things
    only when the marker names it."""
    answer = ask(quick, CHAT, words, tools=[function(name) for name in names])
    calls = answer.json["choices"][0]["message"].get("tool_calls", [])
    assert [call["function"]["name"] for call in calls] == called
    assert all(json.loads(call["function"]["arguments"]) == {"city": "example"} for call in calls)
    assert answer.json["choices"][0]["finish_reason"] == ("tool_calls" if called else "stop")


def test_a_tool_loop_ends(quick):
    """The result of the tool is seen, and answered with text."""
    tools = [function("look")]
    call, = ask(quick, CHAT, "[demo:call look]", tools=tools).json[
        "choices"][0]["message"]["tool_calls"]
    answer = quick.post(CHAT, key=None, tools=tools, messages=[
        {"role": "user", "content": "[demo:call look]"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "rain in Z\u00fcrich"}])
    assert "The tool answered 14 characters." in text_of(CHAT, answer)
    assert answer.json["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path, members", [
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "c",
                                                                       "schema": CITY}}}),
    (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": CITY}}}),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "c", "schema": CITY}}})])
def test_structured_output(quick, path, members):
    answer = ask(quick, path, "Which city?", **members)
    assert json.loads(text_of(path, answer)) == {"city": "example"}
    assert "json_" not in answer.fields["x-ccproxy-notes"].replace("json_format", "")


# Its beginning and its end.


def test_nobody_was_called_and_nothing_went_wrong(demo, bystander):
    """After requests of every kind: the log is clean, and the configured upstream was left alone.
    """
    for path in ("/v1/models", CHAT, "/v1/nothing"):
        demo.request("POST" if path == CHAT else "GET", path,
                     {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else None)
    assert "Traceback" not in demo.log and "never retrieved" not in demo.log
    assert not bystander.connections


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(number):
    program = Program("--demo", until=LAST_LINE)
    try:
        assert "demo" in text_of(CHAT, ask(program, CHAT, "Hi."))
        code, errors = program.stop(number)
    finally:
        program.close()
    assert code == 0 and "Traceback" not in errors and "never retrieved" not in errors


def test_a_bare_box(tmp_path):
    """One file in an empty directory, and no other machine's settings: the first command."""
    program = tmp_path / "ccproxy.py"
    with open(PROGRAM, "rb") as file:
        program.write_bytes(file.read())
    dead = "http://127.0.0.1:9"
    started = Program("--demo", program=str(program), until=LAST_LINE, environment={
        "HTTP_PROXY": dead, "http_proxy": dead, "HTTPS_PROXY": dead, "ALL_PROXY": dead})
    try:
        assert "demo" in text_of(CHAT, ask(started, CHAT, "Hi."))
        assert started.stop()[0] == 0
    finally:
        started.close()


def test_without_demo_a_key_is_needed(start_program):
    """The same program without the flag takes no other vendor's key, and tells the vendor's note.
    """
    program = start_program()
    assert program.post(CHAT, key=None).status == 401
    assert program.post(CHAT, key="sk-another-vendors").status == 401
    assert "vendor" in program.screen and "--demo" not in program.screen


def test_the_key_is_hidden_in_the_demo_too(demo):
    """A real key that is sent by mistake is in no log line and no answer."""
    key = "user_verySecretKey0123456789"
    answer = ask(demo, CHAT, "Hi.", key)
    dry = demo.request("POST", "/explain" + CHAT, {"messages": [{"role": "user", "content": "x"}]},
                       key=key)
    for text in (repr(answer), repr(dry), demo.log, demo.screen):
        assert "verySecret" not in text
    assert hashlib.sha256(key.encode()).hexdigest()[:6] in dry.body.decode()
