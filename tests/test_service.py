"""SERVICE: the command as a person runs it, with service managers that only write down."""
from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import sys
import threading
import time
from unittest import mock

import pytest
from harness import PROGRAM, call_program, ccproxy, run_program

SECRET = "5ecr3tPartOfAKey0123456789"
UNIT = ".config/systemd/user/ccproxy.service"

pytestmark = pytest.mark.skipif(sys.platform in ("win32", "darwin"),
                                reason="the fake service manager is systemd's")


class Health(http.server.BaseHTTPRequestHandler):
    """What a ccproxy says of itself that runs since `server.started`."""

    def do_GET(self):
        body = json.dumps({"status": "ok", "open_streams": 0, "version": "1", "uptime_seconds":
                           time.time() - self.server.started}).encode()
        self.send_response(200 if self.path.startswith("/health") else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@contextlib.contextmanager
def answering(port=0, age=0.0):
    """The port on which a ccproxy answers that was started so long ago."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Health)
    server.started = time.time() - age
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A home, and commands that note how they were called and end with `statuses/NAME`; what they
    start is a service that answers on `machine.port`."""
    monkeypatch.setattr(ccproxy, "SERVICE_SECONDS", 0.5)
    with answering() as port:
        machine = Machine(tmp_path)
        machine.port = port
        yield machine


MANAGER = '''#!/bin/sh
echo "NAME $*" >> "HOME/calls"
for one in "HOME"/shown-*; do case " $* " in *"${one##*/shown-}"*) cat "$one";; esac; done
for one in "HOME"/fail-*; do case " $* " in *" ${one##*/fail-} "*)
    status=$(cat "$one"); [ -e "HOME/once" ] && rm "$one"; exit $status;; esac; done
exit 0
'''


class Machine:
    """A home folder with a systemctl and a journalctl of its own."""

    def __init__(self, home):
        self.home, self.bin = home, home / "bin"
        self.bin.mkdir()
        for name in ("systemctl", "journalctl"):
            path = self.bin / name
            path.write_text(MANAGER.replace("HOME", str(home)).replace("NAME", name))
            path.chmod(0o755)
        self.show("LoadState", "loaded\n")

    def run(self, *arguments, run=call_program, **environment):
        """`service` with these arguments, which listens on `self.port` where they name no other."""
        port = () if "install" not in arguments or {"--port", "--config"} & set(arguments) else (
            "--port", str(self.port))
        return run("service", *arguments, *port, environment={
            "HOME": str(self.home), "PATH": "%s:/usr/bin:/bin" % self.bin, "XDG_CONFIG_HOME": "",
            "XDG_STATE_HOME": "", "SSL_CERT_DIR": "", "SSL_CERT_FILE": "", **environment})

    def show(self, words, text):
        """Let a command whose arguments hold these words print a text."""
        (self.home / ("shown-" + words)).write_text(text)

    def fail(self, word, status, once=False):
        (self.home / ("fail-" + word)).write_text(str(status))
        if once:
            (self.home / "once").write_text("")

    @property
    def calls(self):
        path = self.home / "calls"
        text = path.read_text() if path.exists() else ""
        path.write_text("")
        return [line for line in text.splitlines() if not re.search("SubState|LoadState", line)]

    @property
    def unit(self):
        return (self.home / UNIT).read_text()


INSTALLED = ["systemctl --user daemon-reload", "systemctl --user enable ccproxy.service",
             "systemctl --user restart ccproxy.service"]


def test_install_again_and_uninstall(machine):
    done = machine.run("install", run=run_program)
    assert (done.returncode, done.stderr) == (0, "") and machine.calls == INSTALLED
    assert done.stdout.startswith("written: %s\n" % (machine.home / UNIT))
    assert "loginctl enable-linger" in done.stdout
    assert done.stdout.endswith("waiting for it on http://127.0.0.1:%d\nit answers\n" % machine.port)
    assert "ExecStart=%s %s --port=%d\n" % (sys.executable, PROGRAM, machine.port) in machine.unit
    assert os.stat(machine.home / UNIT).st_mode & 0o777 == 0o644
    done = machine.run("install")
    assert done.stdout.startswith("unchanged: ") and machine.calls == INSTALLED
    done = machine.run("install", "--log-level", "debug")
    assert done.stdout.startswith("replaced: ") and "--log-level=debug" in machine.unit
    assert os.listdir(machine.home / ".config/systemd/user") == ["ccproxy.service"]
    assert machine.calls
    done = machine.run("uninstall")
    assert done.returncode == 0 and "removed: " in done.stdout
    assert machine.calls == ["systemctl --user disable --now ccproxy.service",
                             "systemctl --user daemon-reload"]
    assert not (machine.home / UNIT).exists()
    machine.fail("disable", 1)          # there is none to disable
    done = machine.run("uninstall")
    assert done.returncode == 0 and "there is no " in done.stdout


def test_a_dry_run_does_nothing(machine):
    for action in ccproxy.SERVICE_ACTIONS:
        done = machine.run(action, "--dry-run", "--usage-db", str(machine.home / "x/u.db"))
        assert (done.returncode, done.stderr) == (0, "") and "ccproxy.service" in done.stdout
    assert machine.calls == [] and sorted(os.listdir(machine.home)) == [
            "bin", "calls", "shown-LoadState"]


@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_unit_of_somebody_elses_is_left_alone(machine, action):
    path = machine.home / UNIT
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\nExecStart=/bin/true\n")
    done = machine.run(action)
    assert done.returncode == 2 and "was not written by ccproxy" in done.stderr
    assert machine.unit == "[Service]\nExecStart=/bin/true\n"


@pytest.mark.parametrize("action, word, call", [
    ("status", "status", "systemctl --user status --no-pager ccproxy.service"),
    ("logs", "-u", "journalctl --user --no-pager -u ccproxy.service -n 100"),
    ("restart", "restart", "systemctl --user restart ccproxy.service")])
@pytest.mark.parametrize("status", [0, 3])
def test_the_exit_status_is_passed_on(machine, action, word, call, status):
    machine.fail(word, status)
    assert machine.run(action).returncode == status and machine.calls == [call]


def test_arguments_for_the_manager(machine):
    assert machine.run("logs", "--", "-f", "--since", "today", run=run_program).returncode == 0
    assert machine.calls == [
        "journalctl --user --no-pager -u ccproxy.service -f --since today"]


def test_a_failed_install_says_so(machine):
    machine.fail("daemon-reload", 1)
    assert machine.run("install").returncode == 1
    assert any(call.endswith("ExecMainStatus --value ccproxy.service") for call in machine.calls)


@pytest.mark.parametrize("status", [217, 226])
def test_where_users_get_no_namespaces(machine, status):
    """The service is installed all the same, with less hardening, and that is told."""
    machine.fail("restart", 1, once=True)
    machine.show("ExecMainStatus", "%d\n" % status)
    done = machine.run("install")
    assert done.returncode == 0 and "no namespaces" in done.stdout
    assert "ProtectSystem" not in machine.unit and "NoNewPrivileges=yes" in machine.unit
    assert machine.calls[-3:] == INSTALLED


def test_without_a_service_manager(machine):
    done = machine.run("install", PATH="/nonexistent")
    assert done.returncode == 2 and "there is no systemctl on this system" in done.stderr
    assert not (machine.home / UNIT).exists()
    assert len(done.stderr.splitlines()) == 1 and "--dry-run" in done.stderr


def test_what_the_configuration_writes(machine):
    """The folders are there and may be written to, those of the configuration with an adminKey."""
    config = machine.home / "etc" / "mine.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"usageDb": "auto", "drainSeconds": 60, "drainDelaySeconds": 5,
                                  "logFile": "not/this.log", "port": machine.port}))
    log = machine.home / "elsewhere" / "cc.log"
    log.parent.mkdir()
    done = machine.run("install", "--config", str(config), "--log-file", str(log))
    assert done.returncode == 0, done
    writes = [line for line in machine.unit.splitlines() if line.startswith("ReadWritePaths")]
    assert writes == ["ReadWritePaths=-%s" % (machine.home / name) for name in (
        ".local/state/ccproxy", "elsewhere")]
    assert (machine.home / ".local/state/ccproxy").is_dir()
    assert "TimeoutStopSec=80" in machine.unit and "--config %s" % config in machine.unit
    config.write_text(json.dumps({"adminKey": SECRET, "logFile": str(log), "port": machine.port}))
    assert machine.run("install", "--config", str(config)).returncode == 0
    assert "ReadWritePaths=-%s\n" % config.parent in machine.unit and SECRET not in machine.unit


def test_relative_paths_become_absolute(machine):
    config = machine.home / "etc" / "mine.json"
    config.parent.mkdir()
    config.write_text('{"logFile": "logs/cc.log"}')     # from its own folder, as the service has it
    assert "ReadWritePaths=-%s\n" % (config.parent / "logs") in machine.run(
        "install", "--dry-run", "--config", str(config)).stdout
    done = machine.run("install", "--dry-run", "--log-file", "cc.log")
    assert "--log-file=%s" % os.path.abspath("cc.log") in done.stdout


@pytest.mark.parametrize("flags", [
    ["--client-key", SECRET], ["--admin-key=" + SECRET], ["--project-slug", "user_" + SECRET],
    ["--alert-webhook-token", SECRET]])
def test_secrets_are_refused(machine, flags):
    done = machine.run("install", *flags)
    assert done.returncode == 2 and "a secret does not go into a service's file" in done.stderr
    assert SECRET not in done.stdout + done.stderr and not (machine.home / UNIT).exists()


def test_settings_of_the_environment_are_named_not_taken(machine):
    done = machine.run("install", COMMANDCODE_API_KEY="user_" + SECRET, CC_DRAIN_SECONDS="3111",
                       BRIDGE_API_KEY="client-" + SECRET, https_proxy="http://me:%s@h:1" % SECRET)
    said = done.stdout.splitlines()[-1]
    assert said.endswith(": BRIDGE_API_KEY, CC_DRAIN_SECONDS, COMMANDCODE_API_KEY, "
                         "https_proxy")
    assert str(machine.home / ".config/ccproxy/environment") in said
    everything = machine.unit + done.stdout + done.stderr
    assert SECRET not in everything and "3111" not in everything
    assert "TimeoutStopSec=45" in machine.unit


def test_no_key_is_written_or_shown(machine):
    """Not from the configuration, the credentials file or the environment, in any action."""
    credentials = machine.home / "keys.json"
    credentials.write_text(json.dumps(["user_" + SECRET]))
    config = machine.home / "mine.json"
    config.write_text(json.dumps({"clientKey": "client-" + SECRET, "adminKey": "a-" + SECRET,
                                  "port": machine.port,
                                  "credentialsFile": str(credentials)}))
    for action in ccproxy.SERVICE_ACTIONS:
        for more in (["--dry-run"], []):
            done = machine.run(action, "--config", str(config), *more,
                               COMMANDCODE_KEY="user_" + SECRET)
            assert done.returncode == 0 and SECRET not in done.stdout + done.stderr
        if action == "install":
            assert SECRET not in machine.unit
    assert SECRET not in "\n".join(machine.calls)


# Whether it answers.

FREE = "1"          # nothing listens there


@pytest.mark.parametrize("told, shown", [
    ("2026-11-30T10:00:00Z INFO x\nccproxy: cannot listen on 127.0.0.1\nlast\n",
     "does not run: cannot listen on 127.0.0.1\n"),
    ("python3: can't open file 'x'\n", "does not run: python3: can't open file 'x'\n"),
    ("Traceback (most recent call last):\n  x\nImportError: no y\n", "ImportError: no y\n"),
    ("a\nccproxy.service: Failed at step EXEC\n", "does not run: ccproxy.service: Failed at step"),
    ("ccproxy: bad user_%s\n" % SECRET, "bad key:"), ("", "there is no line of it")])
def test_a_service_that_does_not_answer_is_told_with_its_first_error(machine, told, shown):
    machine.show("ExecMainPID", "4242\n")
    machine.show("_PID=4242", told)
    done = machine.run("install", "--port", FREE)
    assert done.returncode == 1 and shown in done.stderr and SECRET not in done.stderr
    assert "`service logs`" in done.stderr and "it answers" not in done.stdout
    assert (machine.home / UNIT).exists()


def test_on_macos_the_error_stands_in_a_file(machine):
    """Only what was added to it counts: launchd goes on with the file of earlier services."""
    log = machine.home / "cc.log"
    log.write_text("ccproxy: an old fault\nx\n")
    service = ccproxy.Service(("python",), "", "", log_file=str(log))
    length = len(log.read_bytes())
    log.write_text(log.read_text() + "y\nccproxy: port is wrong\nccproxy: more\n")
    with mock.patch.dict(os.environ, PATH=str(machine.bin)):
        assert ccproxy.first_error(service, time.time(), length) == "port is wrong"


def test_the_key_by_which_the_service_proves_itself_is_made_before_it_starts(machine):
    """The service itself may write into no home folder."""
    assert machine.run("install").returncode == 0
    key = machine.home / ".local/state/ccproxy/instance.key"
    assert len(key.read_bytes()) == 32 and key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("state", ["failed", "dead", "auto-restart"])
def test_one_that_has_ended_is_not_waited_for(machine, monkeypatch, state):
    monkeypatch.setattr(ccproxy, "SERVICE_SECONDS", 3600.0)
    machine.show("SubState", state + "\n")
    assert machine.run("install", "--port", FREE).returncode == 1


@pytest.mark.parametrize("age, state, status", [
    (-5.0, "running", 0), (3600.0, "running", 1), (3600.0, "", 0)])
def test_another_ccproxy_on_its_port_is_not_taken_for_it(machine, age, state, status):
    """Where the manager cannot be asked, what answers will do."""
    machine.show("SubState", state)
    with answering(age=age) as port:
        assert machine.run("install", "--port", str(port)).returncode == status


def test_where_it_is_to_answer_is_read_as_the_service_reads_it(machine):
    """The shell's variables do not count, those of the service's own file do, and what a
    credentials file says."""
    with answering() as port:
        keys = machine.home / "keys.json"
        keys.write_text(json.dumps({"server": {"port": port}}))
        config = machine.home / "mine.json"
        config.write_text(json.dumps({"credentialsFile": "keys.json"}))
        done = machine.run("install", "--config", str(config), CC_PORT=FREE)
        assert done.returncode == 0 and ":%d\nit answers" % port in done.stdout
        own = machine.home / ".config/ccproxy/environment"
        own.parent.mkdir(parents=True)
        own.write_text("CC_PORT=%d\n" % port)
        config.write_text("{}")
        assert machine.run("install", "--config", str(config), CC_PORT=FREE).returncode == 0


@pytest.mark.parametrize("place, text, words", [
    ("mine.json", '{"port": "x"}', "port must be a number"), ("mine.json", "{", "is not JSON"),
    (".config/ccproxy/environment", "CC_LOG_LEVEL=loud", "logLevel must be one of"),
    (".config/ccproxy/environment", "a b", "line 1")])
def test_a_configuration_that_would_not_do_is_not_installed(machine, place, text, words):
    (machine.home / "mine.json").write_text("{}")
    path = machine.home / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    done = machine.run("install", "--config", str(machine.home / "mine.json"))
    assert done.returncode == 2 and words in done.stderr and machine.calls == []
    assert not (machine.home / UNIT).exists()


def test_an_env_file_goes_with_the_service(machine):
    path = machine.home / "my.env"
    path.write_text("CC_PORT=%d\nCOMMANDCODE_API_KEY=user_%s\n" % (machine.port, SECRET))
    (machine.home / "mine.json").write_text("{}")
    done = machine.run("install", "--config", str(machine.home / "mine.json"), "--env-file", str(path))
    assert done.returncode == 0 and "will not see" not in done.stdout, done
    assert "--env-file %s" % path in machine.unit and SECRET not in machine.unit


# Without a user's bus, and for the system.

@pytest.mark.parametrize("action, word", [("install", "daemon-reload"), ("restart", "restart")])
def test_without_a_bus_it_says_why_and_what_to_do(machine, action, word):
    machine.fail(word, 1)
    machine.show("LoadState", "")
    done = machine.run(action)
    assert done.returncode == 1 and "no bus of systemd's user manager" in done.stderr
    assert "service %s --system" % action in done.stderr
    machine.show("LoadState", "loaded\n")
    done = machine.run(action)
    assert done.returncode == 1 and "no bus" not in done.stderr


def test_a_unit_of_the_system_needs_root(machine, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for action in ("install", "uninstall", "restart"):
        done = machine.run(action, "--system")
        assert done.returncode == 2 and "needs systemd and root: sudo " in done.stderr
        assert "service %s --system" % action in done.stderr and machine.calls == []
    assert machine.run("status", "--system").returncode == 0
    assert machine.calls == ["systemctl status --no-pager ccproxy.service"]
    assert machine.run("logs", "--system").returncode == 0
    assert machine.calls == ["journalctl --no-pager -u ccproxy.service -n 100"]


@pytest.mark.parametrize("owner", ["root", "nobody"])
def test_a_unit_of_the_system_is_shown(machine, monkeypatch, owner):
    """It runs under the account that owns the program; root's under one that systemd makes."""
    program = machine.home / "ccproxy.py"
    program.write_text("")
    if os.getuid():
        pytest.skip("only root can give files away")
    shutil.chown(program, owner)
    monkeypatch.setattr(ccproxy, "__file__", str(program))
    line = "DynamicUser=yes" if owner == "root" else "User=nobody"
    done = machine.run("install", "--system", "--dry-run", "--usage-db", "auto")
    assert (done.returncode, done.stderr) == (0, "") and machine.calls == []
    assert done.stdout.startswith("write /etc/systemd/system/ccproxy.service:\n")
    for words in (line, "StateDirectory=ccproxy", "EnvironmentFile=-/etc/ccproxy/environment",
                  "ReadWritePaths=-/var/lib/", "WantedBy=multi-user.target",
                  "run systemctl daemon-reload", "run systemctl restart ccproxy.service",
                  "wait http://127.0.0.1:%d" % machine.port):
        assert words in done.stdout
    assert "--user" not in done.stdout


def test_other_platforms_have_no_unit_of_the_system(machine, monkeypatch):
    monkeypatch.setattr(ccproxy, "service_manager", lambda: "launchd")
    done = machine.run("install", "--system", "--dry-run")
    assert done.returncode == 2 and "--system needs systemd" in done.stderr
