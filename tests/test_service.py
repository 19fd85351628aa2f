"""SERVICE: the command as a person runs it, with service managers that only write down."""
from __future__ import annotations

import json
import os
import sys

import pytest
from harness import PROGRAM, call_program, ccproxy, run_program

SECRET = "5ecr3tPartOfAKey0123456789"
UNIT = ".config/systemd/user/ccproxy.service"

pytestmark = pytest.mark.skipif(sys.platform in ("win32", "darwin"),
                                reason="the fake service manager is systemd's")


@pytest.fixture
def machine(tmp_path):
    """A home, and commands that note how they were called and end with `statuses/NAME`."""
    return Machine(tmp_path)


class Machine:
    """A home folder with a systemctl and a journalctl of its own."""

    def __init__(self, home):
        self.home, self.bin = home, home / "bin"
        self.bin.mkdir()
        for name in ("systemctl", "journalctl"):
            path = self.bin / name
            path.write_text('#!/bin/sh\necho "%s $*" >> "$HOME/calls"\n'
                            'case " $* " in *" show "*) cat "$HOME/main" 2>/dev/null;; esac\n'
                            'for one in "$HOME"/fail-*; do case " $* " in '
                            '*" ${one##*/fail-} "*) status=$(cat "$one"); '
                            '[ -e "$HOME/once" ] && rm "$one"; exit $status;; esac; done\n'
                            'exit 0\n' % name)
            path.chmod(0o755)

    def run(self, *arguments, run=call_program, **environment):
        return run("service", *arguments, environment={
            "HOME": str(self.home), "PATH": "%s:/usr/bin:/bin" % self.bin, "XDG_CONFIG_HOME": "",
            "XDG_STATE_HOME": "", "SSL_CERT_DIR": "", "SSL_CERT_FILE": "", **environment})

    def fail(self, word, status, once=False):
        (self.home / ("fail-" + word)).write_text(str(status))
        if once:
            (self.home / "once").write_text("")

    @property
    def calls(self):
        path = self.home / "calls"
        text = path.read_text() if path.exists() else ""
        path.write_text("")
        return text.splitlines()

    @property
    def unit(self):
        return (self.home / UNIT).read_text()


INSTALLED = ["systemctl --user daemon-reload", "systemctl --user enable ccproxy.service",
             "systemctl --user restart ccproxy.service"]


def test_install_again_and_uninstall(machine):
    done = machine.run("install", "--port", "8080", run=run_program)
    assert (done.returncode, done.stderr) == (0, "") and machine.calls == INSTALLED
    assert done.stdout.startswith("written: %s\n" % (machine.home / UNIT))
    assert "loginctl enable-linger" in done.stdout
    assert "ExecStart=%s %s --port=8080\n" % (sys.executable, PROGRAM) in machine.unit
    assert os.stat(machine.home / UNIT).st_mode & 0o777 == 0o644
    done = machine.run("install", "--port", "8080")
    assert done.stdout.startswith("unchanged: ") and machine.calls == INSTALLED
    done = machine.run("install", "--port", "8081")
    assert done.stdout.startswith("replaced: ") and "--port=8081" in machine.unit
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
    assert machine.calls == [] and sorted(os.listdir(machine.home)) == ["bin", "calls"]


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
    assert machine.calls[-1].endswith("ExecMainStatus --value ccproxy.service")


@pytest.mark.parametrize("status", [217, 226])
def test_where_users_get_no_namespaces(machine, status):
    """The service is installed all the same, with less hardening, and that is told."""
    machine.fail("restart", 1, once=True)
    (machine.home / "main").write_text("%d\n" % status)
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
                                  "logFile": "not/this.log"}))
    log = machine.home / "elsewhere" / "cc.log"
    log.parent.mkdir()
    done = machine.run("install", "--config", str(config), "--log-file", str(log))
    assert done.returncode == 0, done
    writes = [line for line in machine.unit.splitlines() if line.startswith("ReadWritePaths")]
    assert writes == ["ReadWritePaths=-%s" % (machine.home / name) for name in (
        ".local/state/ccproxy", "elsewhere")]
    assert (machine.home / ".local/state/ccproxy").is_dir()
    assert "TimeoutStopSec=80" in machine.unit and "--config %s" % config in machine.unit
    config.write_text(json.dumps({"adminKey": SECRET, "logFile": str(log)}))
    assert machine.run("install", "--config", str(config)).returncode == 0
    assert "ReadWritePaths=-%s\n" % config.parent in machine.unit and SECRET not in machine.unit


def test_relative_paths_become_absolute(machine):
    config = machine.home / "mine.json"
    config.write_text('{"logFile": "logs/cc.log"}')     # from the home folder, as systemd has it
    assert "ReadWritePaths=-%s\n" % (machine.home / "logs") in machine.run(
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
    done = machine.run("install", COMMANDCODE_API_KEY="user_" + SECRET, CC_PORT="3111",
                       BRIDGE_API_KEY="client-" + SECRET, https_proxy="http://me:%s@h:1" % SECRET)
    said = done.stdout.splitlines()[-1]
    assert said.endswith(": BRIDGE_API_KEY, CC_PORT, COMMANDCODE_API_KEY, https_proxy")
    assert str(machine.home / ".config/ccproxy/environment") in said
    everything = machine.unit + done.stdout + done.stderr
    assert SECRET not in everything and "3111" not in everything


def test_no_key_is_written_or_shown(machine):
    """Not from the configuration, the credentials file or the environment, in any action."""
    credentials = machine.home / "keys.json"
    credentials.write_text(json.dumps(["user_" + SECRET]))
    config = machine.home / "mine.json"
    config.write_text(json.dumps({"clientKey": "client-" + SECRET, "adminKey": "a-" + SECRET,
                                  "credentialsFile": str(credentials)}))
    for action in ccproxy.SERVICE_ACTIONS:
        for more in (["--dry-run"], []):
            done = machine.run(action, "--config", str(config), *more,
                               COMMANDCODE_KEY="user_" + SECRET)
            assert done.returncode == 0 and SECRET not in done.stdout + done.stderr
        if action == "install":
            assert SECRET not in machine.unit
    assert SECRET not in "\n".join(machine.calls)
