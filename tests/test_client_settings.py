"""CLIENT SETTINGS: what each client is given, and how three shells are told."""
from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest
from harness import KEY, ccproxy

HOSTILE = "it's`$(touch x)`\"%PATH%\\;&|<$HOME>!#"
BASE = "http://127.0.0.1:3999"
FLASH = ccproxy.find_model("deepseek/deepseek-v4-flash", ccproxy.builtin_models())
TARGET = ccproxy.Target(BASE, KEY, FLASH)
every_client = pytest.mark.parametrize("name", ccproxy.CLIENTS)


def lines_of(name, shell="sh", target=TARGET._replace(key=ccproxy.KEY_MARK), **variables):
    return ccproxy.environment_lines(name, target, ccproxy.SHELLS[shell], variables)


def text_given(target, name):
    """All that a client is given."""
    client = ccproxy.CLIENTS[name]
    return json.dumps([client.environment(target), client.arguments(target),
                       client.files(target)])


@every_client
def test_address_key_and_model_reach_every_client(name):
    client, target = ccproxy.CLIENTS[name], TARGET._replace(folder="/tmp/x")
    assert KEY in client.environment(target).values()
    given = text_given(target, name)
    assert BASE in given and FLASH.id in given


@every_client
def test_the_key_is_in_no_argument_and_no_file(name):
    client, target = ccproxy.CLIENTS[name], TARGET._replace(folder="/tmp/x")
    assert KEY not in json.dumps([client.arguments(target), client.files(target)])
    assert [value for value in client.environment(target).values()
            if KEY in value and value != KEY] == []


@pytest.mark.parametrize("name, path", [
    ("claude", BASE), ("aider", BASE + "/v1"), ("codex", BASE + "/v1"), ("opencode", BASE + "/v1"),
    ("llm", BASE + "/v1"), ("pi", BASE + "/v1")])
def test_the_base_address_is_as_each_client_wants_it(name, path):
    found = set(re.findall(r"http://[\w.:/]+", text_given(TARGET._replace(folder="/f"), name)))
    assert found == {path}


def test_claude_code_uses_the_one_model_for_all_it_does():
    names = ccproxy.claude_environment(TARGET)
    models = {name: value for name, value in names.items() if name.endswith("_MODEL")}
    assert len(models) == 5 and set(models.values()) == {FLASH.id}
    assert names["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "1000000"


def test_beside_a_claude_model_claude_code_chooses_its_small_ones():
    opus = ccproxy.find_model("claude-opus-5-5", ccproxy.builtin_models())
    names = ccproxy.claude_models(TARGET._replace(model=opus))
    assert names == {"ANTHROPIC_BASE_URL": BASE, "ANTHROPIC_MODEL": "claude-opus-5-5"}


def test_what_is_not_known_of_a_model_is_not_said():
    target = TARGET._replace(model=ccproxy.Model("new/thing", "new/thing"), folder="/f")
    assert "CLAUDE_CODE_MAX_CONTEXT_TOKENS" not in ccproxy.claude_environment(target)
    assert "model_context_window" not in " ".join(ccproxy.codex_arguments(target))
    models = ccproxy.opencode_entries(target)["provider"]["ccproxy"]["models"]
    assert "limit" not in models["new/thing"]


def test_opencode_declares_every_model_that_may_be_chosen():
    target = TARGET._replace(models=(ccproxy.Model("b/c", "C", 1000, 0, False),))
    entries = ccproxy.opencode_entries(target)
    assert entries["model"] == entries["small_model"] == "ccproxy/" + FLASH.id
    models = entries["provider"]["ccproxy"]["models"]
    assert set(models) == {FLASH.id, "b/c"}
    assert models["b/c"]["limit"] == {"context": 1000, "output": 500}


def test_arguments_for_codex_need_no_quotes():
    assert [word for word in ccproxy.codex_arguments(TARGET) if re.search("[\"' ]", word)] == []


@pytest.mark.parametrize("name, foreign, kept", [
    ("claude", "ANTHROPIC_API_KEY ANTHROPIC_CUSTOM_HEADERS CLAUDE_CODE_USE_BEDROCK "
     "CLAUDE_CODE_OAUTH_TOKEN CLAUDE_CODE_USE_ANTHROPIC_AWS CLAUDE_CODE_SUBAGENT_MODEL",
     "CLAUDE_CONFIG_DIR CLAUDE_CODE_MAX_RETRIES CLAUDE_CODE_USE_POWERSHELL_TOOL OPENAI_API_KEY"),
    ("codex", "OPENAI_API_KEY OPENAI_BASE_URL CODEX_API_KEY", "CODEX_HOME ANTHROPIC_API_KEY"),
    ("opencode", "OPENCODE_CONFIG_CONTENT", "OPENCODE_CONFIG OPENCODE_PERMISSION"),
    ("aider", "OPENAI_API_BASE AIDER_MODEL AIDER_WEAK_MODEL AIDER_OPENAI_API_KEY",
     "AIDER_DARK_MODE ANTHROPIC_API_KEY"),
    ("llm", "OPENAI_BASE_URL LLM_MODEL LLM_USER_PATH", "LLM_LOAD_PLUGINS"),
    ("pi", "", "PI_OFFLINE OPENAI_API_KEY")])
def test_what_would_lead_elsewhere_is_known(name, foreign, kept):
    names = (foreign + " " + kept).split()
    assert ccproxy.foreign_names(ccproxy.CLIENTS[name], names) == sorted(foreign.split())


@pytest.mark.parametrize("given, expected", [
    ({}, None), ({"NO_PROXY": "a"}, None), ({"http_proxy": ""}, None),
    ({"http_proxy": "p"}, "127.0.0.1,localhost,::1"),
    ({"HTTPS_PROXY": "p", "no_proxy": "a.b"}, "a.b,127.0.0.1,localhost,::1"),
    ({"ALL_PROXY": "p", "NO_PROXY": "*"}, "*")])
def test_loopback_is_never_reached_through_a_proxy(given, expected):
    found = ccproxy.without_detour(given)
    assert found == ({"NO_PROXY": expected, "no_proxy": expected} if expected else {})


@pytest.mark.parametrize("shell, windows, expected", [
    ("/bin/bash", False, "sh"), ("/usr/bin/fish", False, "fish"), ("", False, "sh"),
    ("", True, "powershell"), ("/usr/bin/pwsh", False, "powershell"),
    (r"C:\Git\usr\bin\bash", True, "sh")])
def test_the_shell_in_use(shell, windows, expected):
    assert ccproxy.shell_of({"SHELL": shell}, windows) == expected


@pytest.mark.parametrize("shell, text, expected", [
    ("sh", "a'b$", "'a'\\''b$'"), ("fish", "a'b\\$", "'a\\'b\\\\$'"),
    ("powershell", "a'b\u2019$", "'a''b\u2019\u2019$'")])
def test_quotes(shell, text, expected):
    assert ccproxy.SHELLS[shell].quoted(text) == expected


RUN = {"sh": ["sh", "-uc"], "fish": ["fish", "-c"], "powershell": ["pwsh", "-NoProfile", "-c"]}


@every_client
@pytest.mark.parametrize("shell", RUN)
def test_a_real_shell_takes_the_lines_as_they_are_meant(name, shell, tmp_path):
    program = shutil.which(RUN[shell][0])
    if program is None:
        pytest.skip("there is no %s here" % RUN[shell][0])
    target = TARGET._replace(model=ccproxy.Model(HOSTILE, HOSTILE))
    foreign = {"OPENAI_ORGANIZATION": "o", "ANTHROPIC_API_KEY": "k"}
    lines = lines_of(name, shell, target._replace(key=ccproxy.KEY_MARK), http_proxy="p", **foreign)
    start = shlex.join(["env", "-0"]) if shell != "powershell" else "/usr/bin/env -0"
    done = subprocess.run([program, *RUN[shell][1:], "\n".join(lines + [start])], cwd=tmp_path,
                          env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
                               "COMMANDCODE_KEY": KEY, **foreign}, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    found = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
    client = ccproxy.CLIENTS[name]
    wanted = {**client.environment(target), "NO_PROXY": "127.0.0.1,localhost,::1"}
    assert {one: found.get(one) for one in wanted} == wanted
    gone = ccproxy.foreign_names(client, foreign)
    assert [one for one in gone if one in found and one not in wanted] == []
    assert done.stderr == "" and not (tmp_path / "x").exists()


@every_client
@pytest.mark.parametrize("shell", ccproxy.SHELLS)
def test_lines_name_the_key_and_never_hold_one(name, shell):
    text = "\n".join(lines_of(name, shell, COMMANDCODE_KEY=KEY, OPENAI_API_KEY=KEY))
    assert "COMMANDCODE_KEY" in text and KEY not in text and "\0" not in text
    assert "ccproxy.py env " + name in text


def test_what_an_environment_cannot_carry_is_told():
    told = [line for line in lines_of("codex") if line.startswith("# codex -c ")]
    words = shlex.split(told[0][2:])
    assert words == ["codex"] + ccproxy.codex_arguments(TARGET)
    assert "extra-openai-models.yaml" in "\n".join(lines_of("llm"))
    assert "models.json" in "\n".join(lines_of("pi"))
