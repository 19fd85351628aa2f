"""REQUEST RECORDS: what is kept of a request when it is over."""
from __future__ import annotations

import pytest
from harness import ccproxy


@pytest.mark.parametrize("agent,family", [
    ("claude-cli/2.1.329 (external, cli)", "claude-code"), ("codex_cli_rs/0.169.0", "codex"),
    ("codex_exec/0.169.0 (Debian)", "codex"), ("opencode/1.18.33", "opencode"),
    ("OpenAI/Python 3.52.0", "openai-py"), ("OpenAI/JS 7.55.0", "openai-js"),
    ("Anthropic/Python 2.11.0", "anthropic-py"), ("Anthropic/JS 1.11.0", "anthropic-js"),
    ("ai-sdk/openai/4.0.118 ai/7.0", "ai-sdk"), ("litellm/1.83.0", "litellm"),
    ("curl/8.5.0", "curl"), ("python-httpx/0.28", "python"), ("Mozilla/5.0 (X11)", "browser"),
    ("", "other"), ("<script>alert(1)</script>", "other"), ("x" * 100_000, "other")])
def test_a_client_belongs_to_a_family(agent, family):
    assert ccproxy.client_family(agent) == family


@pytest.mark.parametrize("cost,value", [("0.0125", 0.0125), (None, None), ("", None), ("x", None),
                                        ("nan", None), ("inf", None), ("-1", None)])
def test_a_cost_is_a_number_or_nothing(cost, value):
    assert ccproxy.read_cost(cost) == value
