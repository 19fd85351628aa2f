"""STATE: /admin/state, what the proxy does and did."""
from __future__ import annotations

from harness import CHAT, KEY, ccproxy, wait_until
from test_live_events import CHANGING, MINUTE, STATE


def test_the_state_of_a_new_proxy(make_proxy, upstream):
    proxy = make_proxy(upstream="alpha")
    answer = proxy.request("GET", STATE, key=None)
    state = answer.json
    assert answer.status == 200 and answer.fields["cache-control"] == "no-store"
    assert set(state) == CHANGING | {"recent", "minutes"}
    assert state["upstream"] == {"kind": "alpha", "address": upstream.base + "/alpha/generate"}
    assert (state["status"], state["version"], state["clients"]) == ("ok", ccproxy.__version__, 1)
    assert state["admin_key"] is False
    assert state["live"] == state["recent"] == state["minutes"] == state["alerts"] == []


def test_what_was_asked_stands_in_it(proxy):
    for model in ("kimi", "glm"):
        proxy.post(CHAT, {"user-agent": "curl/8"}, model=model)
        proxy.wait_quiet()
    wait_until(lambda: len(proxy.app.recent) == 2)
    state = proxy.request("GET", "/v1" + STATE, key=None).json
    assert [one["asked"] for one in state["recent"]] == ["glm", "kimi"]
    assert set(state["recent"][0]) == set(ccproxy.Record._fields)
    assert state["recent"][0]["key"] == ccproxy.key_name(KEY)
    assert sum(one["requests"] for one in state["minutes"]) == 2
    assert all(set(one) == MINUTE for one in state["minutes"])
