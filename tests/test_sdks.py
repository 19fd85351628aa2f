"""curl and the real `openai` and `anthropic` packages against every recorded stream.

EXPECTED says what each recorded stream means; curl, openai and anthropic have to show exactly
that, streaming and not.  Then what the packages do besides: tool loops, pictures, lists, errors,
retries, structured answers, threads, and clients that leave.  What is not installed is skipped.
"""
from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import pytest

from fake_upstream import (CHUNKED_HEAD, DIALECT, FakeUpstream, chunked, ndjson, recorded, stall,
                           status, stream, text_answer)
from harness import (CHAT, KEY, MESSAGES, PROXY_NAMES, Answer, Proxy, fold_chat, fold_messages,
                     wait_until)

MODEL = "deepseek/deepseek-v4-flash"
PNG = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
       "rkJggg==")
OSLO = ("call_00_par0001", "get_weather", {"city": "Oslo"})
PAULO = ("call_01_par0002", "get_weather", {"city": "São Paulo"})
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
THINKING = {"type": "enabled", "budget_tokens": 1024}
HALF = CHUNKED_HEAD + chunked(ndjson({"type": "start"},
                                     {"type": "text-delta", "id": "0", "text": "Hello"}))
CHAT_REASONS = {"end_turn": "stop", "max_tokens": "length", "tool_use": "tool_calls"}


class Expected(NamedTuple):
    """What one recorded stream means: its text, thinking, calls, reason, and counted tokens."""

    text: str = ""
    thinking: str = ""
    calls: Tuple[Any, ...] = ()
    reason: str = "end_turn"
    tokens: Tuple[int, int] = (0, 0)            # input with cached ones, output
    cached: Tuple[Optional[int], Optional[int]] = (0, None)     # read, written
    reasoning: Optional[int] = 0
    fails: int = 0                              # status of a plain request
    in_stream: bool = False                     # a stream has shown `text` before it fails


def long_text() -> str:
    """The text of the longest stream, read without the proxy."""
    events = map(json.loads, recorded("11").splitlines())
    return "".join(event["text"] for event in events if event["type"] == "text-delta")


EXPECTED = {
    "01": Expected("Hello there, friend.", tokens=(15, 6)),
    "02": Expected("The answer is **4**.", "The user asks 2+2.\nIt is 4.", tokens=(17, 17),
                   reasoning=11),
    "03": Expected("", "Need the tool.", (("call_00_AbCdEf0001", "get_weather",
                                           {"city": "Oslo"}),), "tool_use", (373, 61),
                   reasoning=18),
    "04": Expected("I'll check both.", calls=(OSLO, PAULO), reason="tool_use", tokens=(412, 88),
                   cached=(256, None)),
    "05": Expected("Red.", "A red square.", tokens=(310, 246), reasoning=240),
    "06": Expected("", "Let's think about this very carefully", reason="max_tokens",
                   tokens=(20, 96), reasoning=96),
    "07": Expected("Once upon a", fails=503, in_stream=True),
    "08": Expected(fails=402),
    "09": Expected("A short summary.", "Short summary needed.", tokens=(20492, 31),
                   cached=(18432, 2048)),
    "10_": Expected(
        "Gr\u00fc\u00dfe \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 und "
        "\U0001f469\u200d\U0001f680 \u2014 \u65e5\u672c\u8a9e\u30c6\u30b9\u30c8 e\u0301 "
        "\U0001f1f8\U0001f1ea \u2028 tab\t nl\n quote\" back\\slash \U0001d11e fin\u00a0.",
        tokens=(18, 60)),
    "10b": Expected("rocket \U0001f680 done", tokens=(18, 6)),
    "11": Expected(long_text(), tokens=(14, 20000)),
    "12": Expected("Half an ans", fails=502, in_stream=True),
    "13": Expected(fails=402),
    "14": Expected("old shape", tokens=(100, 9), cached=(64, None)),
    "15": Expected("step one step two", tokens=(24, 8))}
if DIALECT == "anthropic":          # that API does not tell how much of its output was thinking
    EXPECTED = {name: want._replace(reasoning=None) for name, want in EXPECTED.items()}
GOOD = [name for name in EXPECTED if not EXPECTED[name].fails]
BAD = [name for name in EXPECTED if EXPECTED[name].fails]


# What is expected, in the words of each API.


def chat_expected(want: Expected) -> Dict[str, Any]:
    """What a chat client is shown of a stream."""
    (taken, given), (read, _) = want.tokens, want.cached
    return {"text": want.text, "thinking": want.thinking, "calls": list(want.calls),
            "reason": CHAT_REASONS[want.reason], "usage": (taken, given, taken + given),
            "cached": read, "reasoning": want.reasoning}


def messages_expected(want: Expected, thinking: bool = True) -> Dict[str, Any]:
    """What a messages client is shown of a stream; input tokens are those that were not cached."""
    (taken, given), (read, written) = want.tokens, want.cached
    return {"text": want.text, "thinking": want.thinking if thinking else "",
            "calls": list(want.calls), "reason": want.reason,
            "usage": (taken - (read or 0) - (written or 0), given), "cached": (read, written)}


def chat_shown(message: Dict[str, Any], reason: Any, usage: Dict[str, Any]) -> Dict[str, Any]:
    calls = [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
             for call in message.get("tool_calls") or ()]
    return {"text": message.get("content") or "", "calls": calls, "reason": reason,
            "thinking": message.get("reasoning_content") or "",
            "usage": (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]),
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
            "reasoning": (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")}


def messages_shown(message: Dict[str, Any]) -> Dict[str, Any]:
    blocks, usage = message["content"], message["usage"]
    for block in blocks:
        if block["type"] == "thinking":
            assert block["signature"]
    return {"text": "".join(one["text"] for one in blocks if one["type"] == "text"),
            "thinking": "".join(one["thinking"] for one in blocks if one["type"] == "thinking"),
            "calls": [(one["id"], one["name"], one["input"]) for one in blocks
                      if one["type"] == "tool_use"],
            "reason": message["stop_reason"],
            "usage": (usage["input_tokens"], usage["output_tokens"]),
            "cached": (usage.get("cache_read_input_tokens"),
                       usage.get("cache_creation_input_tokens"))}


# One proxy for all of this file: each test starts with an empty script.


@pytest.fixture(scope="module")
def bed():
    upstream = FakeUpstream()
    proxy = Proxy(apiBase=upstream.base)
    yield upstream, proxy
    proxy.close()
    upstream.close()
    assert "Traceback" not in proxy.log.getvalue(), proxy.log.getvalue()


@pytest.fixture
def upstream(bed):
    fake = bed[0]
    fake.scripts, fake.requests[:] = [], []
    fake.default = stream(text_answer("Hello", " there"))
    return fake


@pytest.fixture
def proxy(bed):
    return bed[1]


@pytest.fixture(scope="module")
def no_proxies():
    """Clients that live longer than a test must not see the machine's proxies either."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PROXY_NAMES:
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        yield


@pytest.fixture(scope="module")
def oai(bed, no_proxies):
    """An openai client that does not retry."""
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with openai.OpenAI(base_url=bed[1].base + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(bed, no_proxies):
    """An anthropic client that does not retry."""
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    with anthropic.Anthropic(base_url=bed[1].base, api_key=KEY, max_retries=0) as client:
        yield client


def ask(text: str = "hi") -> List[Any]:
    return [{"role": "user", "content": text}]


# curl.


def curl(proxy: Proxy, path: str, body: Dict[str, Any]) -> Answer:
    """A request by curl as the start-up screen prints it."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    done = subprocess.run(
        ["curl", "-sN", "-w", "\n%{http_code}", proxy.base + path, "-H", "authorization: Bearer "
         + KEY, "-H", "content-type: application/json", "--data-binary", "@-"],
        input=json.dumps(body).encode(), stdout=subprocess.PIPE, timeout=30)
    answer, _, code = done.stdout.rpartition(b"\n")
    assert done.returncode == 0, done
    return Answer(int(code), {}, answer)


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("name", GOOD)
def test_curl_chat(upstream, proxy, name, streaming):
    upstream.default = stream(name)
    answer = curl(proxy, CHAT, {"model": MODEL, "messages": ask(), "stream": streaming,
                                "stream_options": {"include_usage": True}})
    assert answer.status == 200
    if streaming:
        assert answer.body.endswith(b"data: [DONE]\n\n")
        shown = chat_shown(*fold_chat(answer.frames))
    else:
        choice = answer.json["choices"][0]
        shown = chat_shown(choice["message"], choice["finish_reason"], answer.json["usage"])
    assert shown == chat_expected(EXPECTED[name])


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("name", GOOD)
def test_curl_messages(upstream, proxy, name, streaming):
    upstream.default = stream(name)
    answer = curl(proxy, MESSAGES, {"model": MODEL, "messages": ask(), "max_tokens": 2000,
                                    "stream": streaming, "thinking": THINKING})
    assert answer.status == 200
    message = fold_messages(answer.frames) if streaming else answer.json
    assert messages_shown(message) == messages_expected(EXPECTED[name])


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("name", BAD)
def test_curl_failures(upstream, proxy, name, path):
    upstream.default, want = stream(name), EXPECTED[name]
    body = {"model": MODEL, "messages": ask(), "max_tokens": 2000}
    assert curl(proxy, path, body).status == want.fails
    answer = curl(proxy, path, {**body, "stream": True})
    if want.in_stream:
        assert answer.status == 200 and answer.frames[-1]["error"]["message"]
        assert b"[DONE]" not in answer.body and b"message_stop" not in answer.body
    else:
        assert answer.status == want.fails and answer.json["error"]["message"]


# openai.


# The openai package and the Responses API.


def responses_shown(response: Any) -> Dict[str, Any]:
    """What a Responses client reads off a finished response."""
    output = response.output
    used = response.usage
    return {"text": response.output_text,
            "thinking": "".join(part.text for item in output if item.type == "reasoning"
                                for part in item.summary),
            "calls": [(item.call_id, item.name, json.loads(item.arguments)) for item in output
                      if item.type == "function_call"],
            "status": response.status,
            "usage": (used.input_tokens, used.output_tokens, used.total_tokens),
            "cached": used.input_tokens_details.cached_tokens,
            "reasoning": used.output_tokens_details.reasoning_tokens}


def responses_expected(want: Expected) -> Dict[str, Any]:
    (taken, given), (read, _) = want.tokens, want.cached
    return {"text": want.text, "thinking": want.thinking, "calls": list(want.calls),
            "status": "incomplete" if want.reason == "max_tokens" else "completed",
            "usage": (taken, given, taken + given), "cached": read or 0,
            "reasoning": want.reasoning or 0}


@pytest.mark.parametrize("name", GOOD)
def test_openai_responses_plain(upstream, oai, name):
    upstream.default = stream(name)
    response = oai.responses.create(model=MODEL, input="hi")
    assert responses_shown(response) == responses_expected(EXPECTED[name])


@pytest.mark.parametrize("name", GOOD)
def test_openai_responses_stream(upstream, oai, name):
    upstream.default = stream(name, cut=61)
    want, text, events = EXPECTED[name], "", []
    for event in oai.responses.create(model=MODEL, input="hi", stream=True):
        events.append(event)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert text == want.text and events[0].type == "response.created"
    assert responses_shown(events[-1].response) == responses_expected(want)


@pytest.mark.parametrize("name", BAD)
def test_openai_responses_failures(upstream, oai, name):
    import openai
    upstream.default, want = stream(name), EXPECTED[name]
    client = oai.with_options(max_retries=0)
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(model=MODEL, input="hi")
    assert caught.value.status_code == want.fails
    if not want.in_stream:
        with pytest.raises(openai.APIStatusError) as caught:
            client.responses.create(model=MODEL, input="hi", stream=True)
        assert caught.value.status_code == want.fails
        return
    events = list(client.responses.create(model=MODEL, input="hi", stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.error.message
    assert "".join(event.delta for event in events
                   if event.type == "response.output_text.delta") == want.text


def chat_of(chunks: Any) -> Tuple[Dict[str, Any], Any, Any]:
    """What the chunks of an openai stream come to; text alone is taken the short way."""
    frames = []
    for chunk in chunks:
        choice = chunk.choices[0] if chunk.choices else None
        if choice and choice.delta.model_fields_set == {"content"} and not choice.finish_reason:
            frames.append({"choices": [{"delta": {"content": choice.delta.content},
                                        "finish_reason": None}]})
        else:
            frames.append(chunk.to_dict())
    return fold_chat(frames)


@pytest.mark.parametrize("name", GOOD)
def test_openai_plain(upstream, oai, name):
    upstream.default = stream(name)
    answer = oai.chat.completions.create(model=MODEL, messages=ask())
    choice, = answer.choices
    assert chat_shown(choice.message.model_dump(), choice.finish_reason,
                      answer.usage.model_dump()) == chat_expected(EXPECTED[name])
    assert answer.model == MODEL and answer.id.startswith("chatcmpl-")


@pytest.mark.parametrize("name", GOOD)
def test_openai_stream(upstream, oai, name):
    upstream.default = stream(name)
    chunks = oai.chat.completions.create(model=MODEL, messages=ask(), stream=True,
                                         stream_options={"include_usage": True})
    assert chat_shown(*chat_of(chunks)) == chat_expected(EXPECTED[name])


def test_openai_stream_helper(upstream, oai):
    upstream.default = stream("04", cut=7)
    with oai.chat.completions.stream(model=MODEL, messages=ask()) as events:
        final = events.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Oslo", "São Paulo"]
    assert final.choices[0].finish_reason == "tool_calls"


def test_openai_chunks_have_a_choice_without_include_usage(upstream, oai):
    upstream.default = stream("02")
    chunks = list(oai.chat.completions.create(model=MODEL, messages=ask(), stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("name", BAD)
def test_openai_failures(upstream, oai, name):
    import openai
    upstream.default, want = stream(name), EXPECTED[name]
    with pytest.raises(openai.APIStatusError) as caught:
        oai.chat.completions.create(model=MODEL, messages=ask())
    assert caught.value.status_code == want.fails
    if want.fails == 402:
        assert caught.value.code == "insufficient_quota" and len(upstream.requests) == 1
    shown = ""
    with pytest.raises(openai.APIError) as late:
        for chunk in oai.chat.completions.create(model=MODEL, messages=ask(), stream=True):
            shown += chunk.choices[0].delta.content or ""
    assert shown == want.text
    assert isinstance(late.value, openai.APIStatusError) is not want.in_stream
    assert late.value.message


@pytest.mark.parametrize("script, calls", [
    (stream("08"), 1), (stream("13"), 1),
    (status(402, {"success": False, "error": {"code": "X", "message": "no credit"}}), 1),
    (status(400, {"success": False, "error": {"code": "X", "message": "insufficient credits"}}), 1),
    (status(403, {"success": False, "error": {"code": "MODEL_NOT_IN_PLAN", "message": "no"}}), 1),
    (status(429, {"success": False, "error": {
        "code": "X", "message": "You've reached your 5-hour usage limit"}}), 1)])
def test_permanent_refusals_are_not_retried(upstream, oai, claude, script, calls):
    import anthropic
    import openai
    upstream.default = script
    with pytest.raises(openai.APIStatusError):
        oai.with_options(max_retries=2).chat.completions.create(model=MODEL, messages=ask())
    assert len(upstream.requests) == calls
    with pytest.raises(anthropic.APIStatusError):
        claude.with_options(max_retries=2).messages.create(
            model=MODEL, messages=ask(), max_tokens=100)
    assert len(upstream.requests) == 2 * calls


def test_openai_rate_limit(upstream, oai):
    import openai
    upstream.default = status(429, {"success": False, "error": {
        "code": "RATE_LIMITED", "message": "slow down"}}, "retry-after: 7\r\n")
    with pytest.raises(openai.RateLimitError) as caught:
        oai.chat.completions.create(model=MODEL, messages=ask())
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.body["retry_after"] == 7 and len(upstream.requests) == 1


def test_openai_refused_key_leaves_the_connection_in_order(upstream, oai):
    """The connection on which a key was refused carries the next request."""
    import openai
    with pytest.raises(openai.AuthenticationError) as caught:
        oai.with_options(api_key="sk-other").chat.completions.create(model=MODEL, messages=ask())
    assert "user_" in caught.value.message and not upstream.requests
    assert oai.chat.completions.create(model=MODEL, messages=ask()).choices


def test_openai_model_and_field_errors(upstream, oai):
    import openai
    with pytest.raises(openai.NotFoundError) as missing:
        oai.models.retrieve("nobody/has-this")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        oai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": 7}])
    assert wrong.value.param == "messages[0].content"


def test_openai_tool_loop(upstream, oai):
    """Two calls at once, answered in the other order, and then the text."""
    upstream.scripts = [stream("04"), stream("01")]
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    messages = ask("Weather in Oslo and São Paulo?")
    first = oai.chat.completions.create(model=MODEL, messages=messages, tools=tools)
    message = first.choices[0].message
    messages.append(message)
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "wet in "
                  + json.loads(call.function.arguments)["city"]}
                 for call in reversed(message.tool_calls)]
    last = oai.chat.completions.create(model=MODEL, messages=messages, tools=tools)
    assert last.choices[0].message.content == EXPECTED["01"].text
    check_replay(upstream)


def check_replay(upstream: FakeUpstream) -> None:
    """The second request upstream carries both calls and both results, matched by id."""
    first, second = upstream.requests
    assert [tool["name"] for tool in first.params["tools"]] == ["get_weather"]
    assert first.json.get("threadId") == second.json.get("threadId")
    _, assistant, *results = second.params["messages"]
    assert [(part["toolCallId"], part["toolName"], part["input"]) for part in assistant["content"]
            if part["type"] == "tool-call"] == [OSLO, PAULO]
    assert {part["toolCallId"]: part["output"]["value"] for tool in results
            for part in tool["content"]} == {
        OSLO[0]: "wet in Oslo", PAULO[0]: "wet in São Paulo"}


def test_openai_picture(upstream, oai):
    url = "data:image/png;base64," + PNG
    oai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [
        {"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]}])
    text, image = upstream.requests[0].params["messages"][0]["content"]
    assert (text["text"], image["image"]) == ("What?", url)


def test_openai_models(proxy, oai):
    models = list(oai.models.list())
    assert MODEL in [model.id for model in models]
    assert oai.models.retrieve("vendor/New-Model").id == "vendor/New-Model"


def test_openai_raw_response(upstream, oai):
    raw = oai.chat.completions.with_raw_response.create(model=MODEL, messages=ask(), seed=7)
    assert raw.parse().choices[0].message.content == "Hello there"
    assert "seed" in raw.headers["x-ccproxy-notes"] and raw.headers["x-request-id"]


def test_openai_parse(upstream, oai):
    """Structured output: asked for in words, the code fence taken off."""
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: str
        degrees: int

    upstream.default = stream(text_answer("```json\n", '{"city": "Oslo",', ' "degrees": 3}\n```'))
    answer = oai.chat.completions.parse(model=MODEL, messages=ask(), response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Oslo", degrees=3)
    assert "degrees" in json.dumps(upstream.requests[0].params["system"])
    with oai.chat.completions.stream(model=MODEL, messages=ask(),
                                     response_format=Weather) as events:
        assert events.get_final_completion().choices[0].message.parsed.degrees == 3


def test_openai_leaves(upstream, proxy, oai):
    """A stream that is closed early ends its upstream call."""
    upstream.default = stall(HALF)
    chunks = oai.chat.completions.create(model=MODEL, messages=ask(), stream=True)
    assert next(iter(chunks)).choices
    busy = upstream.open
    chunks.close()
    wait_until(lambda: upstream.open < busy)
    proxy.wait_quiet()


def test_openai_async(upstream, proxy, oai):
    import openai

    async def both() -> Tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=proxy.base + "/v1", api_key=KEY) as client:
            plain, chunks = await asyncio.gather(
                client.chat.completions.create(model=MODEL, messages=ask()),
                client.chat.completions.create(model=MODEL, messages=ask(), stream=True))
            text = [chunk.choices[0].delta.content or "" async for chunk in chunks]
            return plain.choices[0].message.content, "".join(text)

    assert asyncio.run(both()) == ("Hello there", "Hello there")


# anthropic.


@pytest.mark.parametrize("name", GOOD)
def test_anthropic_plain(upstream, claude, name):
    upstream.default = stream(name)
    answer = claude.messages.create(model=MODEL, messages=ask(), max_tokens=2000,
                                    thinking=THINKING)
    assert messages_shown(answer.model_dump()) == messages_expected(EXPECTED[name])
    assert answer.model == MODEL and answer.id.startswith("msg_") and answer.role == "assistant"


@pytest.mark.parametrize("name", GOOD)
def test_anthropic_stream(upstream, claude, name):
    upstream.default = stream(name)
    with claude.messages.stream(model=MODEL, messages=ask(), max_tokens=2000,
                                thinking=THINKING) as events:
        final = events.get_final_message()
    assert messages_shown(final.model_dump()) == messages_expected(EXPECTED[name])


@pytest.mark.parametrize("name", [name for name in GOOD if name not in ("06", "11")])
def test_anthropic_without_thinking(upstream, claude, name):
    """Who did not ask for thinking reads content[0].text, or content[0] is the call."""
    upstream.scripts, want = [stream(name), stream(name)], EXPECTED[name]
    answer = claude.messages.create(model=MODEL, messages=ask(), max_tokens=2000)
    assert messages_shown(answer.model_dump()) == messages_expected(want, thinking=False)
    assert not want.text or answer.content[0].text == want.text
    with claude.messages.stream(model=MODEL, messages=ask(), max_tokens=2000) as events:
        kinds = [event.content_block.type for event in events
                 if event.type == "content_block_start"]
    assert "thinking" not in kinds and kinds


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "plain"])
def test_anthropic_empty_answer_is_a_final_error(upstream, claude, streaming):
    """All went into thinking that was not asked for: an error that nobody repeats."""
    import anthropic
    upstream.default = stream("06")
    with pytest.raises(anthropic.InternalServerError) as caught:
        claude.with_options(max_retries=2).messages.create(
            model=MODEL, messages=ask(), max_tokens=96, stream=streaming)
    assert caught.value.status_code == 502 and len(upstream.requests) == 1
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("name", BAD)
def test_anthropic_failures(upstream, claude, name):
    import anthropic
    upstream.default, want = stream(name), EXPECTED[name]
    with pytest.raises(anthropic.APIStatusError) as caught:
        claude.messages.create(model=MODEL, messages=ask(), max_tokens=2000)
    assert caught.value.status_code == want.fails
    if want.fails == 402:
        assert caught.value.body["error"]["type"] == "billing_error"
        assert len(upstream.requests) == 1
    shown = ""
    with pytest.raises(anthropic.APIError) as late:
        with claude.messages.stream(model=MODEL, messages=ask(), max_tokens=2000) as events:
            for text in events.text_stream:
                shown += text
    assert shown == want.text
    assert late.value.body["error"]["type"] == {
        "07": "overloaded_error", "12": "api_error"}.get(name, "billing_error")


def test_anthropic_refused_key_leaves_the_connection_in_order(upstream, claude):
    import anthropic
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="sk-ant-other").messages.create(
            model=MODEL, messages=ask(), max_tokens=10)
    assert not upstream.requests
    assert claude.messages.create(model=MODEL, messages=ask(), max_tokens=10).content


def test_anthropic_error_classes(upstream, claude):
    import anthropic
    upstream.default = status(429, {"success": False, "error": {
        "code": "RATE_LIMITED", "message": "slow down"}}, "retry-after: 7\r\n")
    with pytest.raises(anthropic.RateLimitError) as caught:
        claude.messages.create(model=MODEL, messages=ask(), max_tokens=10)
    assert caught.value.response.headers["retry-after"] == "7" and len(upstream.requests) == 1
    with pytest.raises(anthropic.NotFoundError):
        claude.models.retrieve("nobody/has-this")


def test_anthropic_tool_loop(upstream, claude):
    upstream.scripts = [stream("04"), stream("01")]
    tools = [{"name": "get_weather", "description": "", "input_schema": SCHEMA}]
    messages = ask("Weather in Oslo and São Paulo?")
    first = claude.messages.create(model=MODEL, messages=messages, tools=tools, max_tokens=500)
    assert first.stop_reason == "tool_use"
    messages.append({"role": "assistant", "content": first.content})
    messages.append({"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": block.id, "content": "wet in " + block.input["city"]}
        for block in reversed(first.content) if block.type == "tool_use"]})
    last = claude.messages.create(model=MODEL, messages=messages, tools=tools, max_tokens=500)
    assert last.content[0].text == EXPECTED["01"].text
    check_replay(upstream)


def test_anthropic_server_tool_that_is_chosen(upstream, claude):
    """Claude Code's web search names a tool that cannot be offered: left out, not refused."""
    raw = claude.messages.with_raw_response.create(
        model=MODEL, messages=ask(), max_tokens=100, tool_choice={"type": "tool", "name":
                                                                  "web_search"},
        tools=[{"type": "web_search_20250305", "name": "web_search", "max_uses": 8}])
    assert raw.parse().content[0].text == "Hello there"
    assert "web_search" in raw.headers["x-ccproxy-notes"]
    params = upstream.requests[0].params
    assert params["tools"] == [] and "tool_choice" not in params


def test_anthropic_thinking_comes_back(upstream, claude):
    """Thinking with the upstream's signature, or the proxy's own word, is taken in later turns; an
    upstream that wants its signature gets what it signed only."""
    messages = ask()
    for name in ("09", "02"):
        upstream.scripts = [stream(name)]
        with claude.messages.stream(model=MODEL, messages=messages, max_tokens=2000,
                                    thinking={"type": "adaptive"}) as events:
            final = events.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text"]
        messages += [{"role": "assistant", "content": final.content}, *ask("and?")]
    claude.messages.create(model=MODEL, messages=messages, max_tokens=2000)
    replayed = upstream.requests[-1].params["messages"]
    assert [[part["text"] for part in turn["content"]] for turn in replayed
            if turn["role"] == "assistant"] == [
        [EXPECTED["09"].thinking, EXPECTED["09"].text],
        [EXPECTED["02"].thinking] * (DIALECT != "anthropic") + [EXPECTED["02"].text]]


def test_anthropic_picture(upstream, claude):
    claude.messages.create(model=MODEL, max_tokens=100, messages=[{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
        {"type": "text", "text": "What?"}]}])
    image, text = upstream.requests[0].params["messages"][0]["content"]
    assert (text["text"], image["image"]) == ("What?", "data:image/png;base64," + PNG)


def test_anthropic_models(proxy, claude):
    page = claude.models.list(limit=1000)
    assert MODEL in [model.id for model in page] and not page.has_more
    model = claude.models.retrieve("vendor/New-Model")
    assert (model.type, model.id, model.display_name) == ("model", "vendor/New-Model", "Brand New")
    for one in [*page, model]:
        assert type(one).model_validate(one.to_dict()) == one       # every field is of its type
        assert one.created_at.timestamp() == 1 and one.lifecycle == "active"
        context = 123 if one.id == model.id else 1000000
        assert (one.max_input_tokens, one.max_tokens) == (context, 200000)
        assert one.description.startswith(one.display_name)


def test_anthropic_raw_response(upstream, claude):
    raw = claude.messages.with_raw_response.create(
        model=MODEL.upper(), messages=ask(), max_tokens=100, stop_sequences=["there"])
    message = raw.parse()
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "there")
    assert message.content[0].text == "Hello " and message.model == MODEL.upper()
    assert MODEL in raw.headers["x-ccproxy-notes"] and raw.headers["request-id"] == message.id


def test_anthropic_parse(upstream, claude):
    if not hasattr(claude.messages, "parse"):
        pytest.skip("this anthropic package has no messages.parse")
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: str

    upstream.default = stream(text_answer("```json\n", '{"city": "Oslo"}', "\n```\n"))
    answer = claude.messages.parse(model=MODEL, messages=ask(), max_tokens=100,
                                   output_format=Weather)
    assert answer.parsed_output == Weather(city="Oslo")
    assert "city" in json.dumps(upstream.requests[0].params["system"])


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "plain"])
def test_anthropic_tool_runner(upstream, proxy, claude, streaming):
    """Newer packages ask for message threads; refused, they send the whole history (R17)."""
    anthropic = pytest.importorskip("anthropic")
    if not hasattr(claude.beta.messages, "tool_runner"):
        pytest.skip("this anthropic package has no tool_runner")
    upstream.scripts = [stream("04"), stream("01")]

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Weather for a city."""
        return "wet in " + city

    runner = claude.beta.messages.tool_runner(
        model=MODEL, max_tokens=500, tools=[get_weather], messages=ask(), stream=streaming)
    if streaming:
        final = [turn.get_final_message() for turn in runner][-1]
    else:
        final = runner.until_done()
    assert final.content[0].text == EXPECTED["01"].text
    check_replay(upstream)


def test_thread_refusal(proxy, upstream):
    """The refusal's exact shape, on which the packages act."""
    answer = proxy.post(MESSAGES, model=MODEL, thread={"type": "create"})
    error = answer.json["error"]
    assert (answer.status, error["type"]) == (400, "invalid_request_error")
    assert error["details"] == {"error_code": "thread_unsupported_request",
                                "unsupported": ["thread"]}
    assert not upstream.requests


def test_anthropic_leaves(upstream, proxy, claude):
    upstream.default = stall(HALF)
    with claude.messages.stream(model=MODEL, messages=ask(), max_tokens=100) as events:
        assert next(iter(events.text_stream)) == "Hello"
        busy = upstream.open
    wait_until(lambda: upstream.open < busy)
    proxy.wait_quiet()


def test_anthropic_async(upstream, proxy, claude):
    import anthropic

    async def both() -> Tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=proxy.base, api_key=KEY) as client:
            async def streamed() -> str:
                async with client.messages.stream(model=MODEL, messages=ask(),
                                                  max_tokens=100) as events:
                    return await events.get_final_text()
            plain, text = await asyncio.gather(
                client.messages.create(model=MODEL, messages=ask(), max_tokens=100), streamed())
            return plain.content[0].text, text

    assert asyncio.run(both()) == ("Hello there", "Hello there")


def test_async_client_cancels(upstream, proxy, claude):
    """A cancelled task closes its connection, and so the upstream's."""
    import anthropic
    upstream.default = stall(CHUNKED_HEAD)
    before = len(proxy.log.getvalue())

    async def cancelled() -> None:
        async with anthropic.AsyncAnthropic(base_url=proxy.base, api_key=KEY) as client:
            task = asyncio.ensure_future(client.messages.create(
                model=MODEL, messages=ask(), max_tokens=100))
            while not upstream.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    proxy.wait_quiet()
    wait_until(lambda: "499" in proxy.log.getvalue()[before:])
