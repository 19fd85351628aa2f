"""DOCTOR CHECKS: Python, settings, the port and the clients of this machine."""
from __future__ import annotations

import json
import os
import socket
import stat
import sys
import threading

import pytest
from doctoring import bare, scene_of, settings_of  # noqa: F401
from fake_upstream import FakeUpstream
from harness import ccproxy

pytestmark = pytest.mark.usefixtures("bare")
posix = pytest.mark.skipif(os.name != "posix", reason="modes and scripts as POSIX has them")


@pytest.fixture
def look(tmp_path, monkeypatch):
    """One check, with these entries of the config file and variables."""
    def run(check, environment=None, **entries):
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        return check(scene_of(settings_of(tmp_path, **entries)))
    return run


def test_python(look):
    (finding,) = look(ccproxy.check_python)
    assert finding.works and "Python %d.%d" % sys.version_info[:2] in finding.words
    assert "OpenSSL" in finding.words and "zstd" in finding.words


def test_a_python_without_sqlite(look, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    assert look(ccproxy.check_python)[0][:1] == (True,)
    (finding,) = look(ccproxy.check_python, usageDb=str(tmp_path / "u.db"))
    assert finding.works is False and "usageDb" in finding.advice


def test_the_configuration(look, tmp_path):
    (finding,) = look(ccproxy.check_configuration, {"CC_PROJECT_SLUG": "a", "LOG_LEVEL": "info"},
                      port=3001, host="127.0.0.1")
    assert finding.works and "2 entries of %s" % (tmp_path / "config.json") in finding.words
    assert finding.words.endswith("from the environment: CC_PROJECT_SLUG, LOG_LEVEL")


def test_a_wrong_configuration(look):
    (finding,) = look(ccproxy.check_configuration, prot=3001)
    assert finding.works is False and "unknown option prot" in finding.words


def test_the_variable_of_a_removed_option_is_not_mistyped(look):
    assert len(look(ccproxy.check_configuration, {"CC_WORKERS": "2"})) == 1


def test_a_mistyped_variable(look):
    findings = look(ccproxy.check_configuration, {"CC_PROT": "1", "CC_FLAGS_FOR_THE_LINKER": "1"})
    assert [one.works for one in findings] == [True, None]
    assert findings[1].words.endswith(" CC_PROT")


@posix
def test_secrets_in_an_open_file(look, tmp_path):
    settings = settings_of(tmp_path, clientKey="a-secret", port=1)
    assert len(ccproxy.check_configuration(scene_of(settings))) == 1
    os.chmod(tmp_path / "config.json", 0o644)
    finding = ccproxy.check_configuration(scene_of(settings))[1]
    assert finding.works is False and "clientKey" in finding.words and "600" in finding.advice
    assert "a-secret" not in repr(finding)


@posix
def test_operator_keys(look, tmp_path):
    assert look(ccproxy.check_operator_keys)[0].works is None
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{"id": "a", "apiKey": "user_secret1"}, "user_secret2"]))
    os.chmod(path, 0o600)
    known = {"credentialsFile": str(path), "operatorKeys": "loopback"}
    (finding,) = look(ccproxy.check_operator_keys, **known)
    assert finding == (True, "2 of %s" % path, "")
    os.chmod(path, 0o640)
    assert [one.works for one in look(ccproxy.check_operator_keys, **known)] == [True, False]
    (finding, _) = look(ccproxy.check_operator_keys, credentialsFile=str(path))
    assert finding.works is None and "unused" in finding.words


@pytest.fixture
def listener():
    """Somebody on a port, who answers each connection with these bytes."""
    sockets = []

    def listen(answer, host="127.0.0.1"):
        sock = socket.socket()
        sock.bind((host, 0))
        sock.listen(8)
        sockets.append(sock)

        def serve():
            while True:
                try:
                    other, _ = sock.accept()
                except OSError:
                    return
                other.recv(1000)
                other.sendall(answer)
                other.close()

        threading.Thread(target=serve, daemon=True).start()
        return sock.getsockname()[1]
    yield listen
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{\"status\":\"ok\"}", b"SSH-2.0-x\r\n", b"",
    b"HTTP/1.1 200 OK\r\n\r\n[1]", b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000],
    ids=["http", "ssh", "nothing", "a list", "deep"])
def test_a_port_of_another_program(look, listener, answer):
    port = listener(answer)
    (finding,) = look(ccproxy.check_port, port=port)
    assert finding.works is False and "another program holds port %d" % port in finding.words
    assert "--port %d" % (port + 1) in finding.advice


def test_a_port_of_ccproxy(look, listener, proxy):
    (finding,) = look(ccproxy.check_port, port=proxy.port)
    assert finding == (True, "ccproxy %s answers on 127.0.0.1:%d" % (
        ccproxy.__version__, proxy.port), "")
    body = b'{"version":"0.0.9","open_streams":0}'
    port = listener(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    (finding,) = look(ccproxy.check_port, port=port, host="0.0.0.0")
    assert finding.works and "0.0.9" in finding.words and "restart" in finding.words


def test_a_free_port_and_none(look):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert look(ccproxy.check_port, port=port)[0] == (True, "%d is free" % port, "")
    assert look(ccproxy.check_port, port=0)[0].works is None


@pytest.mark.parametrize("host", ["192.0.2.1", "ccproxy.invalid"])
def test_a_host_that_is_not_here(look, host):
    (finding,) = look(ccproxy.check_port, host=host, port=1)
    assert finding.works is False and host in finding.words


@posix
def test_installed_clients(look, tmp_path, monkeypatch):
    scripts = {"claude": "echo '2.1.0 (Claude Code)'", "codex": "echo codex-cli 0.169.0 >&2",
               "llm": "echo hello", "pi": "exit 3", "aider": "sleep 30"}
    for name, script in scripts.items():
        path = tmp_path / "home" / name
        path.write_text("#!/bin/sh\nPATH=/usr/bin:/bin\n%s\n" % script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    path = tmp_path / "home" / "opencode"
    path.write_text("#!/nonexistent/interpreter\n")
    path.chmod(0o755)
    monkeypatch.setattr(ccproxy, "VERSION_SECONDS", 0.5)
    found = {one.words.partition(" ")[0]: one for one in look(ccproxy.check_clients)}
    assert {name: one.works for name, one in found.items()} == {
        "claude": True, "codex": True, "opencode": False, "aider": None, "llm": True, "pi": False}
    assert found["claude"].words == "claude 2.1.0" and found["codex"].words == "codex 0.169.0"
    assert "status 3" in found["pi"].words and "gives no version" in found["aider"].words


def test_no_clients(look):
    (finding,) = look(ccproxy.check_clients)
    assert finding.works is None and "claude" in finding.words


def put(tmp_path, name, text):
    path = tmp_path / "home" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_settings_of_clients(look, tmp_path):
    (finding,) = look(ccproxy.check_client_settings)
    assert finding.works is None
    put(tmp_path, ".claude/settings.json", json.dumps(
        {"env": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:3999", "OTHER": 1}}))
    put(tmp_path, ".codex/config.toml", 'model_provider = "a"\n[model_providers.a]\n'
        'base_url = "http://127.0.0.1:3000/v1"\n')
    found = look(ccproxy.check_client_settings, {"OPENAI_BASE_URL": "http://127.0.0.1:3000/v1"})
    assert [one.works for one in found] == [True, False, True]
    assert "claude's settings.json" in found[1].words and "3999" in found[1].words
    put(tmp_path, ".claude/settings.json", "{env")
    assert "not JSON" in look(ccproxy.check_client_settings)[1].words
    put(tmp_path, ".claude/settings.json", "[]")
    assert [one.works for one in look(ccproxy.check_client_settings)] == [True, True]


def test_settings_of_clients_elsewhere(look, tmp_path):
    put(tmp_path, "c/settings.json", '{"env": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}}')
    put(tmp_path, "x/config.toml", 'model_provider = "zed"')
    found = look(ccproxy.check_client_settings, {"CLAUDE_CONFIG_DIR": str(tmp_path / "home/c"),
                                                 "CODEX_HOME": str(tmp_path / "home/x")})
    assert [one.works for one in found] == [False, None] and "zed" in found[1].words


def test_a_proxy_of_another_port(look, proxy, upstream):
    """A ccproxy that was started with --port is one; something else on loopback is not."""
    base, other = "http://127.0.0.1:%d" % proxy.port, upstream.base
    (finding,) = look(ccproxy.check_client_settings, {"OPENAI_BASE_URL": base + "/v1"})
    assert finding.works is True
    (finding,) = look(ccproxy.check_client_settings, {"OPENAI_BASE_URL": other})
    assert finding.works is False


def test_nobody_listens_at_a_dead_port():
    fake = FakeUpstream()
    assert ccproxy.read_health(fake.base) == {}
    assert ccproxy.read_health("http://127.0.0.1:1") is None
    fake.close()
