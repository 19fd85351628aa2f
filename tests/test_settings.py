"""SETTINGS: where the configuration comes from besides flags: files, their folders, `.env`."""
from __future__ import annotations

import json
import os
import signal
import stat
from unittest import mock

import pytest
from harness import CHAT, call_program, ccproxy, clean_environment, run_program, wait_until

SECRET = "5ecr3tPartOfAKey0123"
KEY, OTHER = "user_a" + SECRET, "user_b" + SECRET
EXAMPLE = {
    "server": {"host": "127.0.0.2", "port": 9992},
    "routing": {"policy": "balance_priority", "fallbackPolicy": "drain_first",
                "maxInFlightPerCredential": 3, "maxTotalInFlight": 12},
    "models": [{"id": "gpt-6-sol", "enabled": False}],
    "credentials": [{"id": "primary", "apiKey": KEY, "weight": 1, "enabled": True}]}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that is not the working directory, with an empty config file."""
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    write(tmp_path / "etc" / "mine.json", {})
    return tmp_path / "etc"


def settings(folder, flags=None, env_file="", **variables):
    """The settings with the folder's config file; the environment is as before afterwards."""
    with mock.patch.dict(os.environ, clean_environment(HOME=str(folder), **variables), clear=True):
        return ccproxy.read_settings(flags or {}, str(folder / "mine.json"), env_file)


def check(folder, *arguments, **variables):
    """(status, {option: (value, source)}, standard error) of --check."""
    done = call_program("--check", "--config", str(folder / "mine.json"), *arguments,
                        environment=variables)
    rows = [line.partition("  (") for line in done.stdout.splitlines()]
    return done.returncode, {
        name.split()[0]: (name.split(None, 1)[1].strip(), source[:-1])
        for name, _, source in rows if source}, done.stderr


# A credentials file of commandcode-bridge.

def test_a_credentials_file_counts_below_all_else(folder):
    """Flags, environment, config file, then this file, then defaults."""
    keys = write(folder / "keys.json", EXAMPLE)
    found = settings(folder, COMMANDCODE_CREDENTIALS_FILE=keys)
    config = found.config
    assert (config.host, config.port, config.max_in_flight_per_key, config.max_total_in_flight) == (
        "127.0.0.2", 9992, 3, 12)
    assert (config.routing_policy, config.fallback_policy) == ("balance_priority", "drain_first")
    assert config.models == [{"id": "gpt-6-sol", "enabled": False}]
    assert [key.key for key in found.operator.keys] == [KEY] and found.warnings == ()
    assert {found.sources[name] for name in (
        "host", "port", "routingPolicy", "fallbackPolicy", "maxInFlightPerKey", "maxTotalInFlight",
        "models")} == {keys} and found.sources["drainSeconds"] == "default"
    write(folder / "mine.json", {"host": "127.0.0.3", "port": 3, "maxTotalInFlight": 3, "models": []})
    found = settings(folder, {"port": "1"}, COMMANDCODE_CREDENTIALS_FILE=keys, HOST="127.0.0.4")
    assert (found.config.port, found.config.host, found.config.max_total_in_flight) == (
        1, "127.0.0.4", 3)
    assert found.config.models == [] and found.config.max_in_flight_per_key == 3
    assert [found.sources[name] for name in ("port", "host")] == ["--port", "environment HOST"]


def test_a_host_of_the_file_is_checked_like_any_other(folder):
    keys = write(folder / "keys.json", {**EXAMPLE, "server": {"host": "0.0.0.0"}})
    code, _, errors = check(folder, COMMANDCODE_CREDENTIALS_FILE=keys)
    assert code == 2 and "host 0.0.0.0 is reachable" in errors
    keys = write(folder / "keys.json", {**EXAMPLE, "server": {"host": "0.0.0.0"},
                                        "bridgeApiKey": "c1ient-" + SECRET})
    code, found, errors = check(folder, COMMANDCODE_CREDENTIALS_FILE=keys)
    assert (code, errors) == (0, "") and found["clientKey"] == ('"(secret)"', keys)


def test_the_program_starts_and_names_what_it_does_not_understand(start_program, tmp_path):
    keys = write(tmp_path / "keys.json", {**EXAMPLE, "server": {}, "surprise": 1, "routing": {
        "policy": "random"}})
    program = start_program(environment={
        "COMMANDCODE_CREDENTIALS_FILE": keys, "COMMANDCODE_ROUTER_BACKENDS": "a=http://h",
        "COMMANDCODE_ROUTER_API_KEY": SECRET, "BRIDGE_API_KEY": "c1ient-" + SECRET})
    wait_until(lambda: program.log.count(" WARNING ") >= 3)
    lines = [line for line in program.log.splitlines() if " WARNING " in line]
    assert [sum(word in line for line in lines) for word in (
        "surprise", "routing.policy", "COMMANDCODE_ROUTER_")] == [1, 1, 1] and len(lines) == 3
    assert SECRET not in program.log
    answer = program.request("POST", CHAT, {"model": "gpt-6-sol", "messages": [
        {"role": "user", "content": "hi"}]}, {"authorization": "Bearer c1ient-" + SECRET})
    assert answer.status == 404 and answer.json["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("rows, multiplier, total", [
    ([KEY, OTHER], "3", 6), ([KEY], "2", 2), ([KEY, {"apiKey": OTHER, "enabled": False}], "3", 3),
    ([], "3", 0)])
def test_a_multiplier_makes_the_total_of_the_keys(folder, rows, multiplier, total):
    keys = write(folder / "keys.json", rows)
    found = settings(folder, COMMANDCODE_CREDENTIALS_FILE=keys,
                     COMMANDCODE_MAX_TOTAL_IN_FLIGHT_MULTIPLIER=multiplier)
    assert found.config.max_total_in_flight == total
    found = settings(folder, COMMANDCODE_CREDENTIALS_FILE=keys, COMMANDCODE_MAX_TOTAL_IN_FLIGHT="5",
                     COMMANDCODE_MAX_TOTAL_IN_FLIGHT_MULTIPLIER=multiplier)
    assert found.config.max_total_in_flight == 5


def test_a_variable_is_warned_about_once(folder):
    """One that is known of another bridge is no mistyped one of ours."""
    _, _, errors = check(folder, CC_MAX_INFLIGHT="3", CC_API_KEY="x", CC_MAX_BODY_BYTE="1")
    assert len(errors.splitlines()) == 3 and errors.count("did you mean") == 1


# Paths.

def test_paths_of_the_config_file_count_from_its_folder(folder):
    write(folder / "keys" / "keys.json", [KEY])
    write(folder / "mine.json", {"logFile": "../logs/cc.log", "usageDb": "usage.db",
                                 "credentialsFile": "keys/keys.json"})
    found = settings(folder)
    assert (found.config.log_file, found.config.usage_db, found.config.credentials_file) == (
        str(folder.parent / "logs/cc.log"), str(folder / "usage.db"),
        str(folder / "keys/keys.json"))
    assert len(found.operator.keys) == 1 and found.entries["usageDb"] == "usage.db"
    write(folder / "mine.json", {"logFile": "~/cc.log", "usageDb": "auto"})
    assert settings(folder).config.log_file == str(folder / "cc.log")
    assert settings(folder).config.usage_db == "auto"


def test_paths_of_flags_and_variables_count_from_the_working_directory(folder):
    write(folder / "keys.json", [OTHER])
    write(folder.parent / "away" / "keys.json", [KEY])
    for given in ({"flags": {"credentialsFile": "keys.json"}},
                  {"COMMANDCODE_CREDENTIALS_FILE": "keys.json"}):
        found = settings(folder, **given)
        assert [key.key for key in found.operator.keys] == [KEY]
        assert found.config.credentials_file == "keys.json"
    assert settings(folder, COMMANDCODE_CREDENTIALS_FILE="~/keys.json").operator.keys[0].key == OTHER
    assert settings(folder, LOG_FILE="x.log").config.log_file == "x.log"


def test_a_path_that_is_written_over_http_counts_so_too(make_proxy, folder):
    write(folder / "keys.json", [KEY])
    write(folder / "mine.json", {"adminKey": "the-admin-key-1", "port": 0})
    proxy = make_proxy(adminKey="the-admin-key-1")
    proxy.app.settings = settings(folder)
    answer = proxy.request("PUT", "/admin/config", {"credentialsFile": "keys.json"},
                           {"authorization": "Bearer the-admin-key-1"}, None)
    assert answer.status == 200, answer.body
    assert proxy.app.config.credentials_file == str(folder / "keys.json")
    assert json.loads((folder / "mine.json").read_text())["credentialsFile"] == "keys.json"


# --env-file.

def test_an_env_file_counts_below_the_environment(folder):
    path = write(folder / ".env", "export CC_PORT=1\nHOST='127.0.0.2'\nLOG_LEVEL=\"warn\"\n")
    found = settings(folder, env_file=path, LOG_LEVEL="error")
    assert (found.config.port, found.config.host, found.config.log_level) == (
        1, "127.0.0.2", "error")
    assert found.sources["port"] == "environment CC_PORT" and found.env_file == path
    write(folder / "mine.json", {"port": 3})
    assert settings(folder, env_file=path).config.port == 1
    assert settings(folder, {"port": "2"}, env_file=path).config.port == 2


def test_it_holds_keys_and_all_else_that_is_read_from_the_environment(folder, tmp_path):
    path = write(folder / ".env", "COMMANDCODE_API_KEYS=a=%s\nSSL_CERT_FILE=/nonexistent/x\n" % KEY)
    assert [key.key for key in settings(folder, env_file=path).operator.keys] == [KEY]
    done = run_program("--check", "--env-file", path)
    assert done.returncode == 2 and "SSL_CERT_FILE" in done.stderr


def test_it_counts_from_the_working_directory_and_for_every_command(folder):
    write(folder.parent / "away" / "my.env", "CC_DEFAULT_MODEL=glm\nCC_USAGE_DB=u.db\n")
    assert check(folder, "--env-file", "my.env")[1]["defaultModel"][0] == '"glm"'
    assert check(folder, "--env-file=my.env")[1]["usageDb"] == (
        '"u.db"', "environment CC_USAGE_DB")
    done = call_program("usage", "--env-file", "my.env")
    assert done.returncode == 2 and "there is no file" in done.stderr and "u.db" in done.stderr
    done = call_program("env", "claude", "--env-file", "my.env")
    assert done.returncode == 0 and "GLM" in done.stdout


@pytest.mark.parametrize("text, words", [
    (None, "No such file"), ("A=1\nB '%s'" % SECRET, "line 2"), ("", None)])
def test_what_is_wrong_with_it(folder, text, words):
    if text is not None:
        write(folder / ".env", text)
    code, _, errors = check(folder, "--env-file", str(folder / ".env"))
    assert SECRET not in errors and (code, len(errors.splitlines())) == ((2, 1) if words else (0, 0))
    assert not words or (words in errors and ".env" in errors)


def test_a_wrong_one_changes_nothing(folder, monkeypatch):
    """Nor does one that is well beside a config file that is not."""
    path = write(folder / ".env", "CC_PORT=1")
    write(folder / "mine.json", "{")
    for name in ("CC_PORT", ccproxy.FROM_ENV_FILE):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with pytest.raises(ccproxy.ProxyError):
        ccproxy.read_settings({}, str(folder / "mine.json"), path)
    assert dict(os.environ) == before


def test_it_is_read_again(folder):
    """What it no longer holds is gone, and what the environment itself held stays."""
    path = folder / ".env"
    with mock.patch.dict(os.environ, clean_environment(LOG_LEVEL="error"), clear=True):
        values = []
        for text in ("CC_PORT=1\nLOG_LEVEL=debug", "CC_PORT=2\nHOST=127.0.0.2", "HOST=127.0.0.3", ""):
            write(path, text)
            config = ccproxy.read_settings({}, str(folder / "mine.json"), str(path)).config
            values.append((config.port, config.host, config.log_level))
    assert values == [(1, "127.0.0.1", "error"), (2, "127.0.0.2", "error"),
                      (3000, "127.0.0.3", "error"), (3000, "127.0.0.1", "error")]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_sighup_and_a_restart_read_it_again(start_program, tmp_path):
    path = tmp_path / ".env"
    write(path, "CC_ROUTING_POLICY=drain_first\nCC_ADMIN_KEY=the-admin-key-1\nCC_GONE=1")

    def policy():
        return program.request("GET", "/health").json["routing_policy"]

    program = start_program("--env-file", str(path))
    assert policy() == "drain_first"
    write(path, "CC_ROUTING_POLICY=round_robin\nCC_ADMIN_KEY=the-admin-key-1")
    program.process.send_signal(signal.SIGHUP)
    wait_until(lambda: policy() == "round_robin", 10)
    write(path, "CC_ROUTING_POLICY=loud")
    program.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "stays as it is" in program.log, 10)
    assert policy() == "round_robin"
    if not hasattr(os, "fork"):
        return
    write(path, "CC_ADMIN_KEY=the-admin-key-1")
    bearer = {"authorization": "Bearer the-admin-key-1"}
    assert program.request("POST", "/admin/restart", None, bearer, None).status == 202
    wait_until(lambda: policy() == "daily_burn_priority", 20)


def test_the_log_may_be_silent(start_program):
    program = start_program(environment={"LOG_LEVEL": "silent"})
    assert program.request("GET", "/nowhere").status == 404
    assert program.log == ""


def test_the_file_is_not_written(folder):
    path = write(folder / ".env", "CC_PORT=1")
    settings(folder, env_file=path)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and open(path).read() == "CC_PORT=1"
