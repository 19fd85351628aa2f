"""DOCTOR: the command as a person runs it, and that it shows no key."""
from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import pytest
from doctoring import Clinic
from fake_upstream import stall, status
from harness import (PROGRAM, call_program, ccproxy, clean_environment, command_of, run_on_terminal,
                     run_program, wait_until)

SECRET = "5ecr3tPartOfAKey0123456789"


@pytest.fixture
def clinic():
    fake = Clinic()
    yield fake
    fake.close()


def bare_machine(tmp_path):
    """Variables of a machine with nothing on it."""
    names = ["CLAUDE_CONFIG_DIR", "CODEX_HOME", "COMMANDCODE_KEY"]
    for address, _, keys in ccproxy.ADDRESS_VARIABLES:
        names += [address, *keys]
    return {**dict.fromkeys(names, ""), "HOME": str(tmp_path), "USERPROFILE": str(tmp_path),
            "PATH": str(tmp_path)}


def doctor(clinic, tmp_path, *arguments, run=call_program, **environment):
    """The command on a machine with nothing else on it."""
    return run("doctor", "--port", "0", "--api-base", clinic.base, *arguments,
                       environment={**bare_machine(tmp_path), **environment})


def test_lines_and_status(clinic, tmp_path):
    done = doctor(clinic, tmp_path, run=run_program, COMMANDCODE_KEY="user_good")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line[0] for line in lines].count("\u2717") == 0
    assert {line[0] for line in lines} == {"\u2713", "-"} and "\x1b" not in done.stdout
    assert {line[2:18].strip() for line in lines} == {
        check.name for check in ccproxy.DOCTOR_CHECKS}
    done = doctor(clinic, tmp_path, COMMANDCODE_KEY="user_bad")
    crosses = [line for line in done.stdout.splitlines() if line[0] == "\u2717"]
    assert done.returncode == 1 and len(crosses) == 1 and "is refused (401). Make" in crosses[0]


@pytest.mark.parametrize("key, works, word", [
    ("user_...", False, "the placeholder of the README"), ("user_xxx", False, "the placeholder"),
    ("sk-ant-5ecr3t", False, "a key of Anthropic (sk-ant-...)"), ("gsk_5ecr3t", False, "Groq"),
    ("a-5ecr3t", None, "whether it is a proxy's clientKey"), ("user_good", True, "is accepted"),
    ("", None, "none is set")])
@pytest.mark.parametrize("lent", [{}, {"COMMANDCODE_API_KEYS": "user_good"}])
def test_what_is_no_key_is_named(clinic, tmp_path, key, works, word, lent):
    done = doctor(clinic, tmp_path, "--json", COMMANDCODE_KEY=key, **lent)
    rows = [row for row in json.loads(done.stdout)["checks"] if row["check"] == "keys"]
    if key or not lent:
        assert rows[0]["works"] is works and word in rows[0]["words"], rows
    assert (works is False) == (done.returncode == 1) and "5ecr3t" not in done.stdout
    assert any("is accepted" in row["words"] for row in rows) == (bool(lent) or key == "user_good")
    asked = {(one.field("authorization") or "Bearer user_good") for one in clinic.side_requests}
    assert asked == {"Bearer user_good"}        # what is no key goes nowhere


@pytest.mark.parametrize("key, crosses", [("user_...", 1), ("sk-ant-5ecr3t", 1), ("user_good", 0)])
def test_what_is_no_key_is_named_without_an_upstream(tmp_path, key, crosses):
    done = call_program("doctor", "--json", "--api-base", "http://127.0.0.1:9", "--port", "0",
                        environment=clean_environment(COMMANDCODE_KEY=key, HOME=str(tmp_path)))
    rows = [row for row in json.loads(done.stdout)["checks"] if row["check"] == "keys"]
    assert [row["works"] for row in rows] == [False] * crosses + [None]
    assert "not tried: see upstream" in rows[-1]["words"] and "5ecr3t" not in done.stdout


def test_the_client_key_of_the_settings_is_no_mistake(clinic, tmp_path):
    done = doctor(clinic, tmp_path, COMMANDCODE_KEY="sk-team", CC_CLIENT_KEY="sk-team")
    assert done.returncode == 0 and "whether it is a proxy's clientKey" in done.stdout


def test_json(clinic, tmp_path):
    done = doctor(clinic, tmp_path, "--json", COMMANDCODE_KEY="user_bad")
    told = json.loads(done.stdout)
    assert (done.returncode, done.stderr, told["sound"]) == (1, "", False)
    assert told["version"] == ccproxy.__version__
    assert all(set(row) == {"check", "works", "words", "advice"} for row in told["checks"])
    assert [row["check"] for row in told["checks"] if row["works"] is False] == ["keys"]


@pytest.mark.parametrize("text, word", [
    ('{"prot": 1}', "unknown option prot"), ("{", "is not JSON"), (None, "No such file")])
def test_settings_that_are_wrong(clinic, tmp_path, text, word):
    """Other commands end with one line; the doctor goes on, with the defaults."""
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    done = doctor(clinic, tmp_path, "--config", str(path), "--json")
    rows = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    assert rows["configuration"]["works"] is False and word in rows["configuration"]["words"]
    assert rows["upstream"]["works"] is True        # the flags hold all the same
    assert "python" in rows and "models" in rows and done.stderr == ""
    assert call_program("models", "--config", str(path)).returncode == 2


def test_a_terminal_that_knows_no_ticks(clinic, tmp_path):
    done = doctor(clinic, tmp_path, run=run_program, PYTHONIOENCODING="ascii", COMMANDCODE_KEY="user_bad")
    assert "\nFAIL keys " in done.stdout and done.stdout.startswith("ok   python ")
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals on Windows")
def test_progress_on_a_terminal(clinic):
    _, text = run_on_terminal("doctor", "--port", "0", "--api-base", clinic.base,
                              COLUMNS="70", PATH="/nonexistent", NO_COLOR="")
    assert "checking: upstream\u2026" in text and "\x1b[32m\u2713\x1b[0m upstream" in text
    shown = [line.rpartition("\r")[2] for line in text.split("\n")]
    assert not any("checking" in line for line in shown)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process on Windows")
@pytest.mark.parametrize("command", ["doctor", "models"])
def test_ctrl_c_while_it_waits(clinic, command):
    clinic.side_script = stall()
    process = subprocess.Popen(
        [*command_of(PROGRAM), command, "--port", "0", "--api-base", clinic.base],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=clean_environment(), encoding="utf-8")
    wait_until(lambda: clinic.side_requests, 20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")


def test_without_a_network(tmp_path):
    """A network namespace of its own: one cross, and the rest is not tried."""
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-n", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no network namespaces here")
    done = subprocess.run(
        [unshare, "-n", *command_of(PROGRAM), "doctor", "--port", "0"], timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env=clean_environment(**bare_machine(tmp_path)))
    crosses = [line for line in done.stdout.splitlines() if line[0] == "\u2717"
               and line[2:15] != "authorities  "]
    assert done.returncode == 1 and len(crosses) == 1 and done.stderr == ""
    assert "there is no network" in crosses[0]
    assert done.stdout.count("not tried: see network") == 6


def plant(tmp_path):
    """Keys wherever the doctor looks."""
    key = "user_" + SECRET
    for name, text in ((".claude/settings.json", json.dumps({"env": {
            "ANTHROPIC_BASE_URL": "http://127.0.0.1:9/" + key, "ANTHROPIC_AUTH_TOKEN": key}})),
            (".codex/config.toml", 'model_provider = "%s"\n[model_providers.%s]\nbase_url = '
                                   '"http://127.0.0.1:9/%s"\nenv_key="%s"' % (key, key, key, key)),
            (".commandcode/auth.json", json.dumps({"apiKey": key}))):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(text)
    path = tmp_path / "claude"
    path.write_text("#!/bin/sh\necho 1.2.3-%s\n" % key)
    path.chmod(0o755)
    return {"COMMANDCODE_KEY": "%s=%s" % ("name", key), "COMMANDCODE_API_KEYS": "a=" + key,
            "BRIDGE_API_KEY": "client-" + SECRET, "CC_ADMIN_KEY": "admin-" + SECRET,
            "ANTHROPIC_BASE_URL": "http://%s:x@127.0.0.1/" % key, "ANTHROPIC_API_KEY": key,
            "OPENAI_BASE_URL": "http://127.0.0.1:4/?k=" + key, "OPENAI_API_KEY": "sk-" + SECRET,
            "SSL_CERT_DIR": "/nonexistent/" + key, "CC_CORS_ORIGIM": key,
            "NO_PROXY": key, "HTTPS_PROXY": "http://%s:%s@127.0.0.1:1" % (key, SECRET)}


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize("answer", [None, 401, 500], ids=["well", "refused", "broken"])
def test_no_key_is_shown(clinic, tmp_path, arguments, answer):
    """Whatever lies around, and whatever the upstream says of it."""
    clinic.known = ("user_" + SECRET,)
    environment = plant(tmp_path)
    if answer:
        clinic.side_script = status(answer, {"error": {"message": "bad user_" + SECRET}})
    done = doctor(clinic, tmp_path, *arguments, **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert SECRET[:12] not in done.stdout + done.stderr
    assert ccproxy.key_name("user_" + SECRET) in done.stdout


def test_a_wrong_setting_that_holds_a_key_is_not_shown(clinic, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"user_" + SECRET: 1}))
    done = doctor(clinic, tmp_path, "--config", str(path))
    assert done.returncode == 1 and SECRET[:12] not in done.stdout + done.stderr
