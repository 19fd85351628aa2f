"""MODELS COMMAND: the catalogue as a table, live or built in."""
from __future__ import annotations

import json
import select
import sys

import pytest
from fake_upstream import raw, stall, status
from harness import call_program, ccproxy, run_on_terminal, run_program

SECRET = "5ecr3tPartOfAKey0123456789"


def listed(upstream, *arguments, **options):
    done = call_program("models", "--json", "--api-base", getattr(upstream, "base", upstream),
                       *arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


def test_the_live_list(upstream):
    """It says that it is live, and knows of each model what the catalogue knows."""
    told = listed(upstream)
    assert (told["source"], told["reason"]) == ("live", None)
    assert [model["id"] for model in told["models"]] == [
        "deepseek/deepseek-v4-flash", "vendor/New-Model"]
    assert told["models"][0] == {
        "id": "deepseek/deepseek-v4-flash", "name": "DeepSeek V4 Flash", "context": 1000000,
        "max_output": None, "vision": False, "efforts": ["high", "max"], "plan": "Go",
        "enabled": True, "allowed": True, "default": True}
    assert told["models"][1]["efforts"] is None and told["models"][1]["plan"] is None
    assert [request.field("authorization") for request in upstream.side_requests] == [None]
    assert not upstream.requests


@pytest.mark.parametrize("script, word", [
    (status(500, {}), "500"), (raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"), "no list"),
    (raw(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"),
     "302"), (raw(b"nonsense\r\n\r\n", close=True), "malformed")])
def test_without_a_live_list(upstream, script, word):
    upstream.side_script = script
    told = listed(upstream)
    assert told["source"] == "built-in" and word in told["reason"]
    assert len(told["models"]) == len(ccproxy.builtin_models().listed)


@pytest.mark.parametrize("base, word", [
    ("http://ccproxy.invalid", "ccproxy.invalid"), ("http://127.0.0.1:1", "refused")])
def test_without_a_network(base, word):
    told = listed(base)
    assert told["source"] == "built-in" and word in told["reason"].lower()


def test_a_slow_upstream_is_not_waited_for(upstream, monkeypatch):
    """Neither a silent one nor one that sends a byte now and then."""
    monkeypatch.setattr(ccproxy, "LIST_SECONDS", 0.3)
    config = ccproxy.read_config({}, {}, {"apiBase": upstream.base}, "test")[0]

    def trickle(sock, request):
        sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(100):
            sock.sendall(b" ")
            select.select([], [], [], 0.05)

    for script in (stall(), trickle):
        upstream.side_script = script
        models, why = ccproxy.find_models(config, False)
        assert models == ccproxy.builtin_models() and ("0.3 seconds" in why or "timed out" in why)


def test_nobody_is_asked_where_that_is_switched_off(upstream):
    for arguments, word in ((["--demo"], "--demo"),
                            (["--use-provider-models=false"], "useProviderModels")):
        assert word in listed(upstream, *arguments)["reason"]
    assert upstream.connections == 0


def test_what_is_not_served_is_marked(upstream):
    told = listed(upstream, "--allowed-models", "VENDOR/new-model",
                  "--model-aliases", "fast=vendor/New-Model", "--default-model", "fast")
    assert [(model["allowed"], model["default"]) for model in told["models"]] == [
        (False, False), (True, True)]
    assert told["aliases"] == {"fast": "vendor/New-Model"}
    for name in ("New.Model", "fast", "openrouter/VENDOR/new-model:nitro", "default"):
        told = listed(upstream, "--allowed-models", name, "--model-aliases",
                      "fast=vendor/New-Model", "--default-model", "fast")
        assert [(model["allowed"], model["default"]) for model in told["models"]] == [
            (False, False), (True, True)]
    told = listed(upstream, "--models", "v4-FLASH=off,deepseek-v4-flash=off")
    assert [(model["enabled"], model["default"]) for model in told["models"]] == [
        (False, False), (True, False)]
    done = run_program("models", "--api-base", upstream.base, "--allowed-models",
                       "vendor/New-Model", "--model-aliases", "fast=vendor/New-Model")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "context", "output", "vision", "efforts", "plan"]
    assert lines[1].split() == ["deepseek/deepseek-v4-flash", "1M", "high", "max", "Go", "not",
                                "allowed"]
    assert lines[2].split() == ["vendor/New-Model", "123", "yes", "?", "?"]
    assert lines[3:] == ["alias fast = vendor/New-Model",
                         "2 models, live from " + upstream.base]
    assert done.stderr == "" and "\x1b" not in done.stdout and "asking" not in done.stdout


@pytest.mark.parametrize("efforts, text", [
    (None, "?"), ((), ""), (("high", "max"), "high max"), (("low", "high", "max"), "low high max"),
    (("low", "medium", "high"), "low-high"), (("medium", "high", "xhigh", "max"), "medium-max"),
    (("odd", "low", "medium"), "odd low medium")])
def test_short_efforts(efforts, text):
    assert ccproxy.short_efforts(efforts) == text


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals on Windows")
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_on_a_terminal(upstream, columns):
    """The table fits, and nothing is left of the progress line."""
    status, text = run_on_terminal("models", "--api-base", upstream.base, COLUMNS=str(columns),
                                   NO_COLOR="1")
    assert status == 0 and "asking the upstream\u2026" in text
    progress, _, table = text.rpartition("\r")
    assert "models, live" not in progress and "asking" not in table
    lines = table.splitlines()
    assert len(lines) == 4 and all(len(line) <= columns for line in lines)


def test_no_key_is_shown(upstream):
    """Whatever the settings hold and the upstream says."""
    for text in ("Invalid user_" + SECRET, ""):
        upstream.side_script = status(401, {"error": text}) if text else None
        for arguments in ((), ("--json",)):
            done = call_program("models", "--api-base", upstream.base, *arguments, environment={
                "COMMANDCODE_API_KEY": "user_" + SECRET, "BRIDGE_API_KEY": "client-" + SECRET,
                "CC_ADMIN_KEY": "admin-" + SECRET})
            assert done.returncode == 0 and SECRET not in done.stdout + done.stderr
    assert all(SECRET not in str(request.fields) for request in upstream.side_requests)


def test_a_proxy_with_a_password_is_not_shown():
    told = listed("http://127.0.0.2:1", environment={
        "HTTP_PROXY": "http://me:%s@127.0.0.1:1" % SECRET})
    assert told["source"] == "built-in" and SECRET not in json.dumps(told)
