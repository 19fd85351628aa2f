"""`service` with a real `systemd --user` and its journal, in namespaces of their own."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from harness import PROGRAM, clean_environment

SYSTEMD, JOURNALD = "/lib/systemd/systemd", "/lib/systemd/systemd-journald"
INSIDE = """
mount --make-rprivate / && mount -t tmpfs tmpfs /run || exit 77
mkdir -p /run/systemd/system /run/systemd/journal /run/log/journal /run/user/0
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup && ip link set lo up || exit 77
export XDG_RUNTIME_DIR=/run/user/0
%s >/dev/null 2>&1 &
sleep 0.3
%s --user >/dev/null 2>&1 &
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
    systemctl --user is-system-running >/dev/null 2>&1 && break
    sleep 0.2
done
systemctl --user is-system-running >/dev/null || exit 77
exec "$@"
""" % (JOURNALD, SYSTEMD)


def control_groups():
    """Where the second version of control groups is mounted; "" for nowhere."""
    with open("/proc/mounts", encoding="utf-8") as file:
        rows = [line.split() for line in file]
    return next((row[1] for row in rows if row[2] == "cgroup2"), "")


def why_not():
    """Why there can be no systemd of our own here; "" where there can be one."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return "needs Linux and root"
    missing = [name for name in ("unshare", "systemctl", "journalctl", "ip", SYSTEMD, JOURNALD)
               if not shutil.which(name)]
    return "there is no " + missing[0] if missing else "" if control_groups() else "no cgroup2 here"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


class Machine:
    """A home folder for which a systemd runs while `run` runs a script."""

    def __init__(self, home):
        self.home = home
        self.group = os.path.join(control_groups(), "ccproxy-test-%d" % os.getpid())

    def run(self, script):
        """What a shell script printed whose `service` is the command; both kinds of output."""
        path = self.home / "inside.sh"
        path.write_text(INSIDE)
        start = 'mkdir -p "$GROUP" && echo $$ > "$GROUP/cgroup.procs" || exit 77\n' \
            'exec unshare -mpfCn --kill-child --mount-proc sh "$@"'
        environment = clean_environment(HOME=str(self.home), GROUP=self.group)
        for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "SSL_CERT_DIR",
                     "DBUS_SESSION_BUS_ADDRESS"):
            environment.pop(name, None)
        lead = 'service() { "%s" "%s" service "$@"; echo "status $?"; }\n' % (sys.executable, PROGRAM)
        done = subprocess.run(
            ["sh", "-c", start, "sh", str(path), "sh", "-c", lead + script], timeout=120,
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", cwd="/")
        if done.returncode == 77 or "unshare failed" in done.stdout:
            pytest.skip("no systemd can run in namespaces here: " + done.stdout[-200:])
        return done.stdout

    def close(self):
        for folder, _, _ in os.walk(self.group, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:     # a process of it is still ending
                pass


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.close()


def test_it_is_installed_and_answers(machine):
    """With paths that count from the config file's folder, wherever the service starts."""
    config = machine.home / "etc" / "mine.json"
    (machine.home / "etc" / "logs").mkdir(parents=True)
    config.write_text(json.dumps({"logFile": "logs/cc.log", "usageDb": "usage.db", "port": 3111}))
    said = machine.run("service install --demo --config %s; systemctl --user is-active ccproxy\n"
                       "%s -c \"import urllib.request as r; print(r.urlopen("
                       "'http://127.0.0.1:3111/health?nonce=%s').read())\"\n"
                       "service restart; service uninstall; systemctl --user is-active ccproxy"
                       % (config, sys.executable, "ab" * 16))
    assert "waiting for it on http://127.0.0.1:3111\nit answers\nstatus 0\nactive\n" in said
    assert '"proof":' in said           # so `run` may send it a key
    assert said.endswith("status 0\ninactive\n") and said.count("status 0") == 3
    log = (config.parent / "logs" / "cc.log").read_text()
    assert "started" in log and "WARNING" not in log
    assert not (machine.home / "logs").exists()


@pytest.mark.parametrize("entries, before, words", [
    ({"port": "x"}, "", "port must be a number"),
    ({"logFile": "/proc/cc.log"}, "", "logFile /proc/cc.log"),
    ({"port": 3111}, "python3 -m http.server 3111 >/dev/null 2>&1 & sleep 1",
     "the service does not run: cannot listen on 127.0.0.1 port 3111"),
    ({"port": 3112}, "'%s' '%s' --demo --port 3112 >/dev/null 2>&1 & sleep 2"
     % (sys.executable, PROGRAM), "the service does not run: cannot listen on 127.0.0.1 port 3112")])
def test_what_keeps_it_from_running_is_said(machine, entries, before, words):
    config = machine.home / "etc" / "mine.json"
    config.parent.mkdir()
    config.write_text(json.dumps(entries))
    said = machine.run("%s\nservice install --demo --config %s" % (before, config))
    assert words in said and "it answers" not in said
    assert said.rstrip().endswith(("status 1", "status 2"))


def test_without_a_bus(machine):
    said = machine.run("unset XDG_RUNTIME_DIR; service install --demo --port 3111")
    assert "no bus of systemd's user manager" in said and "install --system" in said
    assert said.endswith("status 1\n")


