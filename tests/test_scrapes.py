"""SCRAPES: GET /metrics."""
from __future__ import annotations

import os

import pytest
from fake_upstream import ndjson, status, stream
from harness import CHAT, MESSAGES, ccproxy, wait_until
from test_metrics import parse

FINISH = {"type": "finish", "finishReason": "stop", "totalUsage": {
    "inputTokens": 100, "outputTokens": 7, "cachedInputTokens": 60}}
THOUGHT = [{"type": "reasoning-start", "id": "r"}, {"type": "reasoning-delta", "id": "r",
                                                    "text": "Hmm"}]
LOST = {"type": "error", "error": {"message": "Network connection lost."}}


def scrape(proxy):
    """{sample as it is written, without the prefix: value}, after a strict reading."""
    answer = proxy.request("GET", "/metrics", key=None)
    assert answer.status == 200
    assert answer.fields["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    parse(answer.body.decode())
    lines = (line.rsplit(" ", 1) for line in answer.body.decode().splitlines() if line[0] != "#")
    return {name[len("ccproxy_"):]: float(value) for name, value in lines}


def test_a_fresh_proxy(proxy):
    wait_until(lambda: scrape(proxy)['uptime_seconds{worker="1"}'] > 0)
    values = scrape(proxy)
    version = 'build_info{version="%s"' % ccproxy.__version__
    assert [value for name, value in values.items() if name.startswith(version)] == [1]
    assert values["client_connections"] == 1 and values["open_streams"] == 0
    assert values["retries_total"] == values["splices_total"] == 0
    assert 0 < values['uptime_seconds{worker="1"}'] < 100
    assert "cache_share_ratio" not in values


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_the_process(proxy):
    values = scrape(proxy)
    with open("/proc/self/status") as file:
        known = int(file.read().partition("VmRSS:")[2].split()[0]) * 1024
    assert 0.8 < values['resident_memory_bytes{worker="1"}'] / known < 1.25
    assert 3 < values['open_descriptors{worker="1"}'] < 200


def test_memory_where_there_is_no_proc(monkeypatch):
    def missing(*_):
        raise FileNotFoundError
    pytest.importorskip("resource")
    monkeypatch.setattr("builtins.open", missing)
    assert 5e6 < ccproxy.resident_bytes() < 5e9


def test_requests_are_counted(proxy, upstream):
    upstream.default = stream(ndjson({"type": "text-delta", "text": "Hi"}, FINISH))
    for path in (CHAT, MESSAGES):
        for streaming in (True, False):
            proxy.post(path, {"user-agent": "curl/8"}, model="kimi", stream=streaming)
    proxy.post(CHAT, key=None)
    proxy.wait_quiet()
    wait_until(lambda: len(proxy.app.recent) == 5)
    values = scrape(proxy)
    for api in ("chat", "messages"):
        for word in ("true", "false"):
            assert values['requests_total{api="%s",client="curl",status="2xx",stream="%s"}' % (
                api, word)] == 1
    assert values['errors_total{kind="authentication"}'] == 1
    assert values['tokens_total{model="moonshotai/Kimi-K3",kind="input"}'] == 400
    assert values["cache_share_ratio"] == 0.6
    assert values['first_event_seconds_count{stream="true"}'] == 2
    connections = [values['upstream_connections_total{kind="%s"}' % kind]
                   for kind in ("opened", "reused")]
    assert sum(connections) == 4 and connections[1] > 0
    assert values["upstream_idle_connections"] == len(proxy.app.home.pool.idle) > 0


def test_a_retry_and_a_splice(proxy, upstream):
    """A splice goes on behind thinking that was shown; a plain answer begins anew."""
    whole = stream(ndjson({"type": "text-delta", "text": "Hi"}, FINISH))
    cut = stream(ndjson(*THOUGHT, LOST))
    for streaming in (True, False):
        upstream.scripts = [cut, whole]
        proxy.post(CHAT, reasoning_effort="high", stream=streaming)
    upstream.scripts = [status(503, b""), whole]
    proxy.post(CHAT, stream=True)
    proxy.wait_quiet()
    wait_until(lambda: len(proxy.app.recent) == 3)
    values = scrape(proxy)
    assert (values["retries_total"], values["splices_total"]) == (3, 1)
    assert values['notes_total{code="retried"}'] == 3 and values["failovers_total"] == 0


def test_a_failover(proxy, upstream):
    upstream.scripts = [status(402, b""), stream(ndjson(FINISH))]
    proxy.post(CHAT, key="user_a,user_b")
    wait_until(lambda: proxy.app.recent)
    values = scrape(proxy)
    assert values["failovers_total"] == values["retries_total"] == 1


def test_an_open_stream_is_seen(proxy, upstream):
    import threading
    go = threading.Event()

    def held(sock, request):
        go.wait(10)
        upstream_answer(sock, request)
    upstream_answer, upstream.default = upstream.default, held
    with proxy.send_post(CHAT, stream=True) as sock:
        wait_until(lambda: scrape(proxy)["open_streams"] == 1)
        assert scrape(proxy)["requests_in_flight"] == 1
        assert scrape(proxy)["client_connections"] == 2
        go.set()
        while sock.recv(65536)[-5:] != b"0\r\n\r\n":
            pass
    wait_until(lambda: scrape(proxy)["open_streams"] == 0)


@pytest.mark.parametrize("options, fields, expected", [
    ({}, {}, 200), ({}, {"host": "evil.example"}, 403), ({}, {"origin": "http://evil.example"}, 403),
    ({"adminKey": "s3cret"}, {"host": "evil.example"}, 401),
    ({"adminKey": "s3cret"}, {"host": "evil.example", "authorization": "Bearer s3cret"}, 200),
    ({"clientKey": "c"}, {"host": "evil.example", "authorization": "Bearer c"}, 200)])
def test_who_may_read(make_proxy, options, fields, expected):
    proxy = make_proxy(**options)
    answer = proxy.request("GET", "/metrics", None, fields, key=None)
    assert answer.status == expected
    assert (b"ccproxy_" in answer.body) == (expected == 200)
