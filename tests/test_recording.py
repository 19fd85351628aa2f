"""RECORDING: a request that is over becomes its record."""
from __future__ import annotations

import pytest
from fake_upstream import ndjson, status, stream
from harness import CHAT, KEY, MESSAGES, ccproxy, wait_until

COSTED = ndjson(
    {"type": "text-delta", "text": "Hi"}, {"type": "finish", "finishReason": "stop", "totalUsage": {
        "inputTokens": 100, "outputTokens": 7, "reasoningTokens": 3, "cachedInputTokens": 60}})


def record_of(proxy, number=-1):
    proxy.wait_quiet()
    wait_until(lambda: proxy.app.recent)
    return proxy.app.recent[number]


@pytest.mark.parametrize("path,api", [(CHAT, "chat"), (MESSAGES, "messages")])
@pytest.mark.parametrize("streaming", [True, False])
def test_an_answer_is_recorded(proxy, upstream, path, api, streaming):
    upstream.default = stream(COSTED)
    proxy.post(path, {"user-agent": "OpenAI/Python 3.52.0"}, model="kimi", stream=streaming)
    record = record_of(proxy)
    assert (record.api, record.client, record.asked, record.model, record.status) == (
        api, "openai-py", "kimi", "moonshotai/Kimi-K3", 200)
    assert (record.stream, record.key, record.retries, record.error) == (
        streaming, ccproxy.key_name(KEY), 0, "")
    assert (record.input, record.output, record.cached, record.reasoning) == (100, 7, 60, 3)
    assert 0 < record.first <= record.total < 10
    assert "model=kimi -> moonshotai/Kimi-K3" in record.notes


def test_a_refusal_is_recorded(proxy, upstream):
    upstream.default = status(402, {"error": {"message": "no credits"}})
    proxy.post(CHAT)
    record = record_of(proxy)
    assert record.status == 402 and record.error.startswith("billing: ")
    assert record.first is None and record.output is None


def test_a_request_without_a_key_is_recorded_without_one(proxy):
    proxy.post(CHAT, key=None)
    record = record_of(proxy)
    assert (record.status, record.key, record.model) == (401, "", "")


@pytest.mark.parametrize("method,path,body", [
    ("GET", "/health", None), ("GET", "/v1/models", None), ("GET", "/nowhere", None),
    ("POST", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ("POST", "/explain/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})])
def test_what_asks_no_model_is_not_recorded(proxy, method, path, body):
    proxy.request(method, path, body)
    proxy.post(CHAT)
    record_of(proxy)
    assert len(proxy.app.recent) == 1


def test_records_are_told_to_listeners_and_bounded(proxy):
    heard = []
    proxy.app.listeners.append(heard.append)
    proxy.post(CHAT)
    assert heard == [record_of(proxy)]
    assert proxy.app.recent.maxlen == ccproxy.MAX_RECORDS
