"""SERVICE UNITS: the files and steps for systemd, launchd and Windows."""
from __future__ import annotations

import itertools
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from harness import ccproxy

SERVICE = ccproxy.Service(("/usr/bin/python3", "/opt/cc/ccproxy.py", "--port=8080"),
                          "/home/me/.config/systemd/user", "/home/me/.config/ccproxy/environment",
                          ("/home/me/.local/state/ccproxy", "/home/me/my logs"), 40.0,
                          "/Users/me/Library/Logs/ccproxy.log", 501)
ODD = ("/opt/my python/bin/python3", "/home/me/100%/it's \"mine\"/cc;proxy.py",
       "--project-slug=$HOME %h \\n", "--cors-origin=*", "--x=#a", "--y=", "--z=a\tb\u00e9",
       "--w=;", "--v='")


def entries(text):
    """{section: [(name, value)]} of a unit file."""
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
            found[section] = []
        elif line and not line.startswith("#"):
            name, sign, value = line.partition("=")
            assert sign and re.fullmatch(r"[A-Z][A-Za-z]+", name), line
            found[section].append((name, value))
    return found


def value_of(text, name):
    return [value for key, value in entries(text)["Service"] if key == name]


def split_command(value):
    """A command line as systemd.service(5) and systemd.syntax(7) take it apart, specifiers and
    variables resolved."""
    words, at = [], 0
    pattern = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^\s"\']+)(?=\s|$)')
    while at < len(value):
        found = pattern.match(value, at)
        assert found, value[at:]
        word, at = found[1], found.end()
        if word.startswith('"'):
            word = word[1:-1]
        word = re.sub(r"\\x([0-9a-f]{2})|\\(.)", lambda one: chr(int(one[1], 16)) if one[1]
                      else {"\\": "\\", '"': '"'}[one[2]], word)
        assert not re.search(r"(?<!%)(%%)*%(?!%)", word), word
        word = word.replace("%%", "%")
        if words:
            assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", word), word
            word = word.replace("$$", "$")
        words.append(word)
    return tuple(words)


@pytest.mark.parametrize("command", [SERVICE.command, ODD], ids=["plain", "odd"])
def test_the_command_of_a_unit(command):
    text = ccproxy.unit_text(SERVICE._replace(command=command))
    (value,) = value_of(text, "ExecStart")
    assert split_command(value) == command


def test_the_unit():
    text = ccproxy.unit_text(SERVICE)
    found = entries(text)
    assert list(found) == ["Unit", "Service", "Install"] and ccproxy.SERVICE_MARK in text
    one = dict(found["Service"])
    assert one["Restart"] == "on-failure" and one["TimeoutStopSec"] == "55"
    assert one["KillSignal"] == "SIGTERM" and one["ExecReload"].endswith("kill -HUP $MAINPID")
    assert one["EnvironmentFile"] == "-" + SERVICE.environment_file
    for name in ("NoNewPrivileges", "LockPersonality", "PrivateTmp", "PrivateUsers"):
        assert one[name] == "yes"
    assert (one["ProtectSystem"], one["ProtectHome"]) == ("strict", "read-only")
    assert one["SystemCallArchitectures"] == "native" and "AF_INET6" in one[
        "RestrictAddressFamilies"]
    assert value_of(text, "ReadWritePaths") == ["-/home/me/.local/state/ccproxy",
                                                '"-/home/me/my logs"']
    assert found["Install"] == [("WantedBy", "default.target")]


@pytest.mark.parametrize("account", ["User=me", "DynamicUser=yes"])
def test_a_unit_of_the_system(account):
    one = entries(ccproxy.unit_text(SERVICE._replace(account=account)))
    assert tuple(account.split("=")) in one["Service"]
    assert ("StateDirectory", "ccproxy") in one["Service"]
    assert ("Environment", "XDG_STATE_HOME=%S") in one["Service"]
    assert one["Install"] == [("WantedBy", "multi-user.target")]
    assert not {"User", "DynamicUser", "StateDirectory"} & {
        name for name, _ in entries(ccproxy.unit_text(SERVICE))["Service"]}
    service = SERVICE._replace(account=account, folder="/etc/systemd/system")
    for action in ccproxy.SERVICE_ACTIONS:
        steps = ccproxy.systemd_steps(service, action, ())
        assert not any("--user" in step.words for step in steps)
        assert action in ("status", "logs", "restart") or any(
            step.words == ("/etc/systemd/system/ccproxy.service",) for step in steps)


def test_a_unit_without_namespaces():
    whole, plain = ccproxy.unit_text(SERVICE), ccproxy.unit_text(SERVICE, namespaces=False)
    left_out = set(whole.splitlines()) - set(plain.splitlines())
    assert {line.partition("=")[0] + "=" for line in left_out} == set(ccproxy.NAMESPACE_RULES)
    assert "NoNewPrivileges=yes" in plain and "LockPersonality=yes" in plain


@pytest.mark.parametrize("known, private", [
    ({}, True), ({"command": ("/usr/bin/python3", "/tmp/ccproxy.py")}, False),
    ({"writes": ("/var/tmp",)}, False), ({"writes": ("/tmpfiles",)}, True)])
def test_what_lies_in_tmp_is_not_hidden(known, private):
    text = ccproxy.unit_text(SERVICE._replace(**known))
    assert ("PrivateTmp=yes" in text) is private and "ProtectSystem=strict" in text


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
@pytest.mark.parametrize("namespaces", [True, False])
@pytest.mark.parametrize("account", ["", "User=root", "DynamicUser=yes"])
def test_systemd_accepts_it(tmp_path, namespaces, account):
    """Every directive is known and every value understood: not a word of complaint."""
    program = tmp_path / "it's 100% \"my\" $program.py"
    program.write_text("")
    service = SERVICE._replace(command=(sys.executable, str(program), *ODD[2:]), account=account)
    scope = [] if account else ["--user"]
    path = tmp_path / "ccproxy.service"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}

    def verify(text):
        path.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", *scope, str(path)], env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        if "Failed to initialize manager" in done.stdout:
            pytest.skip("systemd-analyze does not work here")
        return done.returncode, done.stdout

    text = ccproxy.unit_text(service, namespaces)
    assert verify(text) == (0, "")
    assert "PrivateUserz" in verify(text.replace("LockPersonality", "PrivateUserz"))[1]


def test_the_property_list():
    command = tuple(word.replace("\x00", "") for word in ODD)
    text = ccproxy.plist_text(SERVICE._replace(command=command))
    assert ccproxy.SERVICE_MARK in text
    known = plistlib.loads(text.encode())
    assert known["ProgramArguments"] == list(command) and known["Label"] == "local.ccproxy"
    assert known["RunAtLoad"] is True and known["KeepAlive"] == {"SuccessfulExit": False}
    assert known["ExitTimeOut"] == 55 and known["StandardErrorPath"] == SERVICE.log_file


def test_words_of_windows():
    """As Python's own subprocess writes them."""
    for size in range(6):
        for letters in itertools.product('a "\\', repeat=size):
            word = "".join(letters)
            assert ccproxy.windows_word(word) == subprocess.list2cmdline([word])


def commands(manager, action, rest=()):
    steps = ccproxy.SERVICE_MANAGERS[manager](SERVICE, action, rest)
    return [(step.kind, " ".join(step.words)) for step in steps]


UNIT = "/home/me/.config/systemd/user/ccproxy.service"
PLIST = "/home/me/.config/systemd/user/local.ccproxy.plist"
STEPS = {
    ("systemd", "install"): [
        ("write", UNIT), ("run", "systemctl --user daemon-reload"),
        ("run", "systemctl --user enable ccproxy.service"),
        ("run", "systemctl --user restart ccproxy.service"), ("tell", "")],
    ("systemd", "uninstall"): [
        ("run", "systemctl --user disable --now ccproxy.service"), ("remove", UNIT),
        ("run", "systemctl --user daemon-reload")],
    ("systemd", "status"): [("run", "systemctl --user status --no-pager ccproxy.service")],
    ("systemd", "logs"): [("run", "journalctl --user --no-pager -u ccproxy.service -n 100")],
    ("systemd", "restart"): [("run", "systemctl --user restart ccproxy.service")],
    ("launchd", "install"): [
        ("write", PLIST), ("run", "launchctl bootout gui/501/local.ccproxy"),
        ("run", "launchctl bootstrap gui/501 " + PLIST)],
    ("launchd", "uninstall"): [
        ("run", "launchctl bootout gui/501/local.ccproxy"), ("remove", PLIST)],
    ("launchd", "status"): [("run", "launchctl print gui/501/local.ccproxy")],
    ("launchd", "logs"): [("run", "tail -n 100 " + SERVICE.log_file)],
    ("launchd", "restart"): [("run", "launchctl kickstart -k gui/501/local.ccproxy")]}


@pytest.mark.parametrize("manager, action", STEPS, ids=map("-".join, STEPS))
def test_steps(manager, action):
    assert commands(manager, action) == STEPS[manager, action]


def test_further_arguments():
    assert commands("systemd", "logs", ("-f",))[0][1].endswith("-u ccproxy.service -f")
    assert commands("launchd", "logs", ("-f",))[0][1] == "tail -f " + SERVICE.log_file
    assert commands("systemd", "status", ("-l",))[0][1].endswith("ccproxy.service -l")


@pytest.mark.parametrize("action", ccproxy.SERVICE_ACTIONS)
def test_on_windows_it_is_told(action):
    service = SERVICE._replace(command=("C:\\Program Files\\Py\\python.exe", "C:\\cc\\ccproxy.py",
                                        "--port=80"))
    (step,) = ccproxy.windows_steps(service, action, ())
    assert step.kind == "tell" and ("schtasks" in step.text) is (action != "logs")
    if action == "install":
        assert ('/TR "\\"C:\\Program Files\\Py\\pythonw.exe\\" C:\\cc\\ccproxy.py --port=80"'
                in step.text)


def test_what_a_dry_run_shows():
    shown = [ccproxy.step_text(step) for step in ccproxy.systemd_steps(SERVICE, "install", ())]
    assert shown[0].startswith("write %s:\n# " % UNIT) and "\nExecStart=" in shown[0]
    assert shown[1] == "run systemctl --user daemon-reload\n" and "enable-linger" in shown[-1]
    assert shlex.split(ccproxy.step_text(ccproxy.Step("run", ODD)))[1:] == list(ODD)
