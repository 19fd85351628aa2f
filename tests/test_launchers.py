"""A PROXY AT HAND, LAUNCHERS: `env` and `run` with programs that tell what they were given, and with
the real Claude Code and Codex where they are installed."""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request

import pytest
from doctoring import CERTS, Clinic, tls_of
from fake_upstream import pump, raw, stall, status
from harness import (KEY, PROGRAM, call_program, ccproxy, clean_environment, command_of,
                     full_listener, wait_until)

SECRET = "user_5ecr3tPartOfAKey0123456789"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and fake programs are POSIX here")
every_client = pytest.mark.parametrize("name", ccproxy.CLIENTS)
pytestmark = POSIX

# Tells its arguments, environment, files and the machine's processes, then does as FAKE_DOES says.
FAKE = r'''#!%s -SE
import json, os, signal, socket, subprocess, sys, time
def addresses(value):
    import re
    return re.findall(r"http://127[\w.:]+", value)
os.environ.pop("CC_API_BASE")       # no address for a client
given = json.dumps([sys.argv, dict(os.environ)])
folder = os.environ.get("LLM_USER_PATH", "")
extensions = [word for word in sys.argv if word.endswith("ccproxy.js")]
files = {}
for path in extensions + ([folder + "/extra-openai-models.yaml"] if folder else []):
    with open(path) as file:
        files[path] = file.read()
base = addresses(given + json.dumps(files))[-1:]
health = {}
if base:
    with socket.create_connection(base[0][len("http://"):].split(":")) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        health = json.loads(sock.makefile("rb").read().partition(b"\r\n\r\n")[2])
report = {"argv": sys.argv[1:], "env": dict(os.environ), "files": files, "base": "".join(base),
          "health": health, "pid": os.getpid(), "linked": sorted(os.listdir(folder or "/")),
          "ps": subprocess.run(["ps", "-eo", "pid,ppid,args"], stdout=subprocess.PIPE,
                               encoding="utf-8").stdout}
received = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: received.append(number))
with open(os.environ["FAKE_REPORT"] + ".new", "w") as file:
    json.dump(report, file)
os.rename(os.environ["FAKE_REPORT"] + ".new", os.environ["FAKE_REPORT"])
print("the client speaks", flush=True)
exec(os.environ.get("FAKE_DOES", ""))
'''


class Bench:
    """Fake programs on the PATH, and a folder for all they leave.  `python` stands for Python when a
    launcher starts its proxy: a compiled program, where the script would be compiled each time."""

    def __init__(self, folder, api_base="http://127.0.0.1:9"):
        self.folder, self.report_path, self.api_base = folder, str(folder / "report.json"), api_base
        self.python, self.before = str(folder / "python"), ""
        self.temporary = folder / "tmp"
        self.home = folder / "home"
        for made in (self.temporary, self.home, folder / "bin"):
            made.mkdir()
        for name in ccproxy.CLIENTS:
            path = folder / "bin" / name
            path.write_text(FAKE % sys.executable)
            path.chmod(0o755)
        python = folder / "python"
        python.write_text("#!/bin/sh\nshift\nexec %s \"$@\"\n" % shlex.join(command_of(PROGRAM)))
        python.chmod(0o755)

    def environment(self, **more):
        given = {"PATH": "%s:/usr/bin:/bin" % (self.folder / "bin"), "HOME": str(self.home),
                 "TMPDIR": str(self.temporary), "FAKE_REPORT": self.report_path,
                 "CC_API_BASE": self.api_base,
                 "XDG_CONFIG_HOME": str(self.home / ".config"), **more}
        kept = {name: value for name, value in clean_environment(**given).items()
                if not re.match("ANTHROPIC|CLAUDE|OPENAI|LLM_|AIDER|CODEX|OPENCODE", name)
                or name in more}
        return {name: value for name, value in kept.items() if value is not None}

    def command(self, *arguments):
        return [*command_of(PROGRAM, "sys.executable = %r%s" % (self.python, self.before)),
                *arguments]

    def run(self, *arguments, **more):
        return subprocess.run(self.command(*arguments), env=self.environment(**more), timeout=60,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, encoding="utf-8", cwd=self.folder)

    def call(self, *arguments, **more):
        """What starts nothing, in this process."""
        return call_program(*arguments, environment=self.environment(**more))

    def start(self, *arguments, **more):
        return subprocess.Popen(self.command(*arguments), env=self.environment(**more),
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, encoding="utf-8", cwd=self.folder)

    def script(self, *arguments):
        """What to type on a terminal to start this: short, for an echo of one line."""
        (self.folder / "go").write_text("exec " + shlex.join(self.command(*arguments)))
        return "sh ./go\n"

    @property
    def report(self):
        with open(self.report_path) as file:
            return json.load(file)

    def wait_report(self):
        wait_until(lambda: os.path.exists(self.report_path), 30)
        return self.report


@pytest.fixture
def bench(tmp_path, upstream):
    return Bench(tmp_path, upstream.base)


@pytest.fixture
def clinic():
    """An upstream that knows one key, user_good."""
    fake = Clinic()
    yield fake
    fake.close()


def own_proxies(report):
    """Process ids of the proxies that a client saw beside itself."""
    rows = [line.split(None, 2) for line in report["ps"].splitlines()]
    parent = next(row[1] for row in rows if row[0] == str(report["pid"]))
    return [int(row[0]) for row in rows if row[1] == parent and "--while-stdin" in row[2]]


class Relay:
    """Another program's port, on which it passes all connections on to the proxy."""

    def __init__(self, port):
        import socket
        import threading
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

        def serve():
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", port))
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=(one, other), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()


def is_gone(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE,
                           encoding="utf-8").stdout.strip()
    return state == "" or state.startswith("Z")


def check_alone(bench):
    """Nothing of a run is left: neither its proxy nor a temporary file."""
    found = own_proxies(bench.report)
    assert len(found) == 1
    wait_until(lambda: is_gone(found[0]), 10)
    assert os.listdir(bench.temporary) == []


# What the client is given.


@every_client
def test_a_client_is_led_to_a_proxy_of_its_own(bench, name):
    done = bench.run("run", name, "--demo", "--", "--its-own", "words", OPENAI_API_KEY="foreign",
                     ANTHROPIC_API_KEY="foreign", LLM_MODEL="foreign", HTTPS_PROXY="http://h:1")
    assert (done.returncode, done.stdout) == (0, "the client speaks\n"), done.stderr
    assert done.stderr == ""
    report = bench.report
    assert report["argv"][-2:] == ["--its-own", "words"]
    assert report["health"]["upstream"] == "demo" and report["base"] != "http://127.0.0.1:3000"
    model = ccproxy.builtin_models().known[ccproxy.DEFAULT_MODEL]
    folder = os.path.dirname("".join(report["files"]))
    target = ccproxy.Target(report["base"], ccproxy.NO_KEY, model, (), folder)
    client = ccproxy.CLIENTS[name]
    assert report["argv"][:-2] == client.arguments(target)
    wanted = client.environment(target)
    if name == "opencode":      # which may choose among all
        wanted.pop("OPENCODE_CONFIG_CONTENT")
        assert len(json.loads(report["env"]["OPENCODE_CONFIG_CONTENT"])["provider"]["ccproxy"][
            "models"]) > 50
    assert {one: report["env"][one] for one in wanted} == wanted
    given = {one for one, value in report["env"].items() if value == "foreign"}
    assert [one for one in given if re.fullmatch(client.foreign, one)] == []
    assert "127.0.0.1" in report["env"]["NO_PROXY"]
    check_alone(bench)


def test_the_model_is_chosen_by_any_of_its_names(bench):
    assert bench.run("run", "claude", "--demo", "--model", "kimi").returncode == 0
    assert bench.report["env"]["ANTHROPIC_MODEL"] == "moonshotai/Kimi-K3"
    assert bench.run("run", "claude", "--demo", CC_DEFAULT_MODEL="glm-5").returncode == 0
    assert bench.report["env"]["ANTHROPIC_MODEL"] == "zai-org/GLM-5"


def test_llm_keeps_its_own_folder(bench):
    home = bench.home / ".config" / "io.datasette.llm"
    home.mkdir(parents=True)
    (home / "aliases.json").write_text("{}")
    done = bench.run("run", "llm", "--demo", FAKE_DOES="open(folder + '/logs.db', 'w').write('x')")
    assert done.returncode == 0, done.stderr
    assert bench.report["linked"] == ["aliases.json", "extra-openai-models.yaml", "logs.db"]
    assert (home / "logs.db").read_text() == "x"
    assert sorted(os.listdir(home)) == ["aliases.json", "logs.db"]


def test_secrets_of_whoever_runs_the_proxy_stay_with_it(bench):
    done = bench.run("run", "codex", COMMANDCODE_KEY=KEY, CC_CLIENT_KEY="c1", CC_ADMIN_KEY="a1",
                     BRIDGE_API_KEY="b1", COMMANDCODE_API_KEYS="user_operator")
    assert done.returncode == 0, done.stderr
    assert not {"CC_CLIENT_KEY", "CC_ADMIN_KEY", "BRIDGE_API_KEY", "COMMANDCODE_API_KEYS"} & set(
        bench.report["env"])
    assert bench.report["health"]["operator_keys"] == 1


# Which proxy.


def test_a_running_proxy_is_used(bench, start_program):
    program = start_program("--demo", until="curl")
    done = bench.run("run", "claude", "--demo", "--port", str(program.port))
    assert done.returncode == 0, done.stderr
    assert bench.report["base"] == "http://127.0.0.1:%d" % program.port
    assert own_proxies(bench.report) == []
    assert program.process.poll() is None


def test_a_proxy_of_another_upstream_is_not(bench, start_program):
    program = start_program("--demo", until="curl")
    done = bench.run("run", "claude", "--port", str(program.port), COMMANDCODE_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert bench.report["health"]["upstream"] == bench.api_base + "/alpha/generate"
    check_alone(bench)


def plain_answer(text):
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text.encode())


@pytest.mark.parametrize("answer, told", [
    (plain_answer("[]"), False), (b"HTTP/1.1 500 No\r\n\r\n{", False), (b"SSH-2.0-x\r\n", False),
    ("", True), ('"proof": 5, ', True), ('"proof": "%s", ' % (64 * "0"), True),
    ('"proof": "\\u00e9", ', True)])
def test_a_stranger_on_the_port_gets_no_key(bench, answer, told):
    import socket
    import threading
    seen = []
    if told:        # it says all that a ccproxy of these settings says, but cannot prove it
        answer = plain_answer(
            '{%s"status": "ok", "version": "%s", "upstream": "%s", "open_streams": 0, '
            '"operator_keys": 0}' % (answer, ccproxy.__version__,
                                     bench.api_base + "/alpha/generate"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            sock, _ = listener.accept()
            with sock:
                seen.append(sock.recv(65536))
                sock.sendall(answer)
        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        done = bench.run("run", "claude", "--port", str(port), COMMANDCODE_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    assert bench.report["base"] != "http://127.0.0.1:%d" % port
    assert len(seen) == 1 and SECRET.encode() not in seen[0]
    assert re.match(rb"GET /health\?nonce=[0-9a-f]{64} ", seen[0])
    lines = done.stderr.splitlines()
    assert len(lines) == told and all("--url http://127.0.0.1:%d" % port in line for line in lines)


@pytest.mark.parametrize("spoil", ["", "another account", "another port", "an open file"])
def test_a_running_proxy_proves_that_it_is_ours(bench, start_program, upstream, spoil):
    state = bench.folder / "state"
    program = start_program(environment={"XDG_STATE_HOME": str(state)})
    port = program.port
    if spoil == "another account":
        state = bench.folder / "another"
    elif spoil == "another port":       # a program that passes all on to the real one
        relay = Relay(program.port)
        port = relay.port
    elif spoil == "an open file":
        (state / "ccproxy" / "instance.key").chmod(0o644)
    done = bench.run("run", "claude", "--port", str(port), COMMANDCODE_KEY=KEY,
                     XDG_STATE_HOME=str(state))
    base = "http://127.0.0.1:%d" % port
    assert done.returncode == 0, done.stderr
    assert (bench.report["base"] == base) is not bool(spoil)
    assert done.stderr.count("cannot prove that it is run by this account") == bool(spoil)
    assert ("other accounts" in done.stderr) == (spoil == "an open file")
    assert KEY not in program.log and ("/v1/usage" in program.log) is not bool(spoil)
    done = bench.run("run", "claude", "--url", base, COMMANDCODE_KEY=KEY, XDG_STATE_HOME=str(state))
    assert (done.returncode, done.stderr) == (0, "") and bench.report["base"] == base


def test_flags_reach_the_proxy_of_its_own_unseen(bench, upstream):
    bench.python = sys.executable           # as with anybody
    done = bench.run("run", "claude", "--api-base", upstream.base, "--admin-key", "planted-admin",
                     COMMANDCODE_KEY=KEY, FAKE_DOES="time.sleep(0)")
    assert done.returncode == 0, done.stderr
    assert bench.report["health"]["upstream"] == upstream.base + "/alpha/generate"
    assert len(own_proxies(bench.report)) == 1
    assert "planted-admin" not in "".join(
        line for line in bench.report["ps"].splitlines() if "--while-stdin" in line)


def test_a_removed_option_is_told_of_by_the_command_alone(bench):
    done = bench.run("run", "claude", "--demo", "--workers", "2", "--log-level", "loud", CC_WORKERS="2")
    assert done.returncode == 2 and "workers" not in done.stderr
    log = bench.folder / "log"
    done = bench.run("run", "claude", "--demo", "--workers", "2", "--log-file", str(log), CC_WORKERS="2")
    assert (done.returncode, done.stderr) == (
        0, "ccproxy: warning: workers was removed: see README, several processes\n")
    assert log.exists() and "workers" not in log.read_text()
    path = bench.folder / "removed.json"        # which the proxy reads too, and fails
    path.write_text('{"workers": 2}')
    done = bench.run("run", "claude", "--demo", "--config", str(path), "--log-file", str(bench.folder / "no" / "log"))
    assert done.returncode == 1 and done.stderr.count("workers") == 1


def test_a_proxy_that_cannot_start_says_why(bench):
    done = bench.run("run", "claude", "--demo", "--log-file", str(bench.folder / "no" / "log"))
    assert done.returncode == 1 and "the proxy did not start: logFile" in done.stderr, done.stderr
    assert not os.path.exists(bench.report_path) and os.listdir(bench.temporary) == []


def test_a_proxy_that_never_listens_is_not_waited_for(bench):
    with open(bench.python, "w") as file:
        file.write("#!/bin/sh\necho $$ >%s\nexec sleep 60\n" % shlex.quote(bench.report_path))
    bench.before = "\nccproxy.START_SECONDS = 0.5"
    done = bench.run("run", "llm", "--demo")
    assert (done.returncode, done.stderr) == (
        1, "ccproxy: the proxy did not start: no answer within 0.5 seconds\n")
    assert is_gone(bench.report) and os.listdir(bench.temporary) == []


def test_a_proxy_that_dies_is_told_of(bench):
    rows = "[r.split(None, 2) for r in report['ps'].splitlines()]"
    kill = ("pid = [int(r[0]) for r in %s if '--while-stdin' in r[2] and r[1] == str(os.getppid())]"
            "\nos.kill(pid[0], 9)\ntime.sleep(0.3)" % rows)
    done = bench.run("run", "claude", "--demo", FAKE_DOES=kill)
    assert done.returncode == 0
    assert "the proxy ended before the client" in done.stderr


def test_what_the_proxy_logs_never_reaches_the_screen(bench):
    ask = ("import urllib.request\nurllib.request.urlopen(urllib.request.Request(base[0] + '/v1/chat/completions', "
           "b'{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}'))")
    done = bench.run("run", "claude", "--demo", "--log-level", "debug", FAKE_DOES=ask)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the client speaks\n", "")


# The key.


@pytest.mark.parametrize("given, expected", [
    ({"COMMANDCODE_KEY": KEY}, KEY), ({"COMMANDCODE_API_KEY": KEY}, KEY),
    ({"COMMANDCODE_KEY": " %s\n" % KEY, "COMMANDCODE_API_KEY": "user_other"}, KEY),
    ({"COMMANDCODE_KEY": "user_a,home=user_b"}, "user_a,home=user_b"),
    ({"COMMANDCODE_API_KEYS": "user_o", "CC_CLIENT_KEY": "lent"}, "lent"),
    ({"COMMANDCODE_API_KEYS": "user_o", "CC_OPERATOR_KEYS": "loopback"}, ccproxy.NO_KEY)])
def test_the_key_comes_from_the_environment_or_is_lent(bench, given, expected):
    done = bench.run("run", "claude", **given)
    assert done.returncode == 0, done.stderr
    assert bench.report["env"]["ANTHROPIC_AUTH_TOKEN"] == expected


@pytest.mark.parametrize("given, told", [
    ({}, "no key: set COMMANDCODE_KEY"), ({"COMMANDCODE_API_KEYS": "user_o"}, "no key"),
    ({"COMMANDCODE_KEY": "sk-5ecr3t"}, "holds no Command Code key"),
    ({"COMMANDCODE_KEY": "sk-ant-5ecr3t"}, "a key of Anthropic (sk-ant-...)"),
    ({"COMMANDCODE_API_KEY": "", "COMMANDCODE_KEY": "AIza5ecr3t"}, "a key of Google (AIza...)"),
    ({"COMMANDCODE_KEY": "user_..."}, "the placeholder of the README"),
    ({"COMMANDCODE_KEY": "user_\u2026"}, "the placeholder of the README"),
    ({"COMMANDCODE_KEY": "user_YOUR_KEY"}, "the placeholder of the README"),
    ({"COMMANDCODE_KEY": "user_..."}, "commandcode.ai, settings, API keys"),
    ({"COMMANDCODE_KEY": "user_a\nuser_5ecr3t"}, "a character that no header takes"),
    ({"COMMANDCODE_KEY": "5ecr3t\u00e9"}, "a character that no header takes"),
    ({"COMMANDCODE_KEY": "5ecr3t-clientkey"}, "name one with --url"),
    ({"CC_CLIENT_KEY": "5ecr3t-clientkey"}, "name one with --url")])
def test_without_a_key_it_says_what_to_do(bench, given, told):
    done = bench.run("run", "claude", **given)
    assert done.returncode == 2 and told in done.stderr and "5ecr3t" not in done.stderr
    assert not os.path.exists(bench.report_path) and len(done.stderr.splitlines()) == 1
    if given:       # env and setup say it, and do their work: the variable may be set later
        shown = bench.call("env", "claude", **{"COMMANDCODE_KEY": "", **given})
        assert shown.returncode == 0 and "5ecr3t" not in shown.stdout + shown.stderr
        assert told in shown.stderr or "--url" in told or "no key" in told
        assert shown.stderr or "COMMANDCODE_KEY" not in given or "clientkey" in given["COMMANDCODE_KEY"]


def log_in(bench, key=SECRET, name=".commandcode"):
    path = bench.home / name / "auth.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"apiKey": key}))


@pytest.mark.parametrize("folder", [".commandcode", ".config/commandcode"])
def test_the_login_of_the_vendors_own_client_is_offered(bench, folder):
    log_in(bench, name=folder)
    done = bench.run("run", "claude", "--log-level", "warning")
    step = re.search(r"To use it: .*(run claude --operator-keys loopback[^;]*);", done.stderr)
    assert done.returncode == 2 and "no key" not in done.stderr and SECRET not in done.stderr
    assert "~/%s/auth.json" % folder in done.stderr and "--log-level=warning" in step[1]
    for command in ("env", "setup"):
        shown = bench.call(command, "claude")
        assert shown.returncode == 0 and "~/%s/auth.json" % folder in shown.stderr
        assert SECRET not in shown.stdout + shown.stderr
    done = bench.run(*shlex.split(step[1]))     # the next step works as it is said
    assert (done.returncode, done.stderr) == (0, "")
    assert bench.report["env"]["ANTHROPIC_AUTH_TOKEN"] == ccproxy.NO_KEY
    assert bench.report["health"]["operator_keys"] == 1


def test_a_login_is_for_no_other_host(bench):
    log_in(bench)
    done = bench.run("run", "claude", "--url", "http://127.0.0.1:9")
    assert "no key: set COMMANDCODE_KEY" in done.stderr and "auth.json" not in done.stderr
    assert "--demo" not in done.stderr
    for command in ("env", "setup"):
        for given in (("--url", "http://127.0.0.1:9"), ("--demo",), ("--operator-keys", "loopback")):
            assert bench.call(command, "claude", *given).stderr == ""


@pytest.mark.parametrize("text", ["{", '{"apiKey": "sk-x"}', "[]", "\0"])
def test_a_login_that_is_none(bench, text):
    log_in(bench)
    (bench.home / ".commandcode" / "auth.json").write_text(text)
    done = bench.run("run", "claude")
    assert done.returncode == 2 and "no key: set COMMANDCODE_KEY" in done.stderr


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="there is no bash here")
@pytest.mark.parametrize("answer, used", [("\n", True), ("y\n", True), ("n\n", False)])
def test_a_person_is_asked_whether_the_login_may_be_used(bench, answer, used):
    log_in(bench)
    terminal = Terminal(bench.environment(), bench.folder)
    try:
        terminal.send(bench.script("run", "codex"))
        terminal.read_until("(~/.commandcode/auth.json). Use its key %s? [Y/n] "
                            % ccproxy.key_name(SECRET))
        terminal.send(answer)
        if not used:
            terminal.read_until("Command Code key (user_")
            terminal.send(KEY + "\n")
        terminal.read_until("the client speaks")
    finally:
        terminal.close()
    assert bench.report["env"]["COMMANDCODE_KEY"] == (SECRET if used else KEY)


TEAM = "a-team's-clientKey"


@pytest.fixture
def team(start_program, clinic, tmp_path):
    """A proxy with an operator's key, for who has the clientKey."""
    return start_program("--api-base", clinic.base, until="note", environment={
        "COMMANDCODE_API_KEYS": "user_good", "CC_CLIENT_KEY": TEAM})


@pytest.mark.parametrize("given", [{"COMMANDCODE_KEY": TEAM}, {"CC_CLIENT_KEY": TEAM},
                                   {"BRIDGE_API_KEY": TEAM}, {"COMMANDCODE_KEY": "user_good"}])
@pytest.mark.parametrize("path", ["", "/", "/v1/"])
def test_another_hosts_proxy_is_used_with_its_client_key(bench, team, given, path):
    base = "http://127.0.0.1:%d" % team.port
    done = bench.run("run", "claude", "--url", base + path, XDG_STATE_HOME=str(bench.folder),
                     **given)
    assert (done.returncode, done.stderr) == (0, "")
    assert bench.report["base"] == base and own_proxies(bench.report) == []
    assert bench.report["env"]["ANTHROPIC_AUTH_TOKEN"] == "".join(given.values())


def test_a_client_key_is_for_a_proxy_of_this_account_too(bench, team):
    bench.api_base = team.request("GET", "/health").json["upstream"][:-len("/alpha/generate")]
    done = bench.run("run", "claude", "--port", str(team.port), COMMANDCODE_KEY=TEAM)
    assert (done.returncode, done.stderr) == (0, "")
    assert bench.report["base"] == "http://127.0.0.1:%d" % team.port


@pytest.mark.parametrize("key", ["wrong", "sk-other", "user_bad"])
def test_a_proxy_that_refuses_the_key_is_told_before_the_client_starts(bench, team, key):
    done = bench.run("run", "claude", "--url", "http://127.0.0.1:%d" % team.port,
                     COMMANDCODE_KEY=key)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and key not in done.stderr
    assert "answers 401" in done.stderr or "refused the key" in done.stderr
    assert not os.path.exists(bench.report_path)


@pytest.mark.parametrize("url, told", [
    ("http://127.0.0.1:9", "no proxy answers on http://127.0.0.1:9"), ("ftp://x", "--url: must be"),
    ("http://a:b@c", "--url: must hold only"), ("x", "--url: must be")])
def test_an_address_where_no_proxy_is(bench, url, told):
    done = bench.run("run", "claude", "--url", url, COMMANDCODE_KEY=KEY)
    assert done.returncode in (1, 2) and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_another_program_at_the_address(bench, upstream):
    """What it answers tells nothing of the key."""
    (bench.folder / "bin" / "claude").write_text("#!/bin/sh\n")
    done = bench.run("run", "claude", "--url", upstream.base, COMMANDCODE_KEY=KEY)
    assert done.returncode == 0 and "starts all the same" in done.stderr, done.stderr
    upstream.side_script = status(404, {"error": "no"})
    done = bench.run("run", "claude", "--url", upstream.base, COMMANDCODE_KEY=KEY)
    assert done.returncode == 0 and "answers 404: is it a ccproxy?" in done.stderr, done.stderr


# What is asked before the client starts.


def whoami_keys(fake):
    return [(one.field("authorization") or "")[len("Bearer "):] for one in fake.side_requests
            if one.line.startswith("GET /alpha/whoami ")]


@pytest.mark.parametrize("given, asked", [
    ({"COMMANDCODE_KEY": "user_good"}, ["user_good"]),
    ({"COMMANDCODE_KEY": "user_bad,user_good"}, ["user_bad", "user_good"]),
    ({"COMMANDCODE_API_KEYS": "user_good,user_bad", "CC_CLIENT_KEY": "lent"}, ["user_good"])])
def test_the_upstream_is_asked_one_question(bench, clinic, given, asked):
    bench.api_base = clinic.base
    done = bench.run("run", "claude", **given)
    assert (done.returncode, done.stderr) == (0, "") and whoami_keys(clinic) == asked
    assert len(clinic.side_requests) == len(asked)


def test_a_running_proxy_asks_in_our_place(bench, clinic, start_program):
    program = start_program("--api-base", clinic.base)
    bench.api_base = clinic.base
    for _ in range(2):
        done = bench.run("run", "claude", "--port", str(program.port), COMMANDCODE_KEY="user_good")
        assert (done.returncode, done.stderr) == (0, "")
        assert bench.report["base"] == "http://127.0.0.1:%d" % program.port
    assert whoami_keys(clinic) == ["user_good"]     # its figures are known for minutes


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("given", [
    {"COMMANDCODE_KEY": "user_bad"}, {"COMMANDCODE_KEY": "user_bad,user_worse"},
    {"COMMANDCODE_API_KEYS": "user_bad", "CC_CLIENT_KEY": "lent"}])
def test_a_refused_key_is_told_before_the_client_starts(
        bench, clinic, start_program, given, running):
    bench.api_base = clinic.base
    port = start_program("--api-base", clinic.base, environment=given).port if running else 0
    done = bench.run("run", "claude", "--port", str(port), **given)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "refused" in done.stderr and "commandcode.ai, settings, API keys" in done.stderr
    assert "user_bad" not in done.stderr and not os.path.exists(bench.report_path)
    assert os.listdir(bench.temporary) == []


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("base, told", [
    ("http://127.0.0.1:9", "no connection to 127.0.0.1:9: Connection refused"),
    ("https://a.ccproxy.invalid", "DNS knows a.ccproxy.invalid")])
def test_no_way_to_the_upstream_is_told_before_the_client_starts(
        bench, start_program, base, told, running):
    bench.api_base = base
    port = start_program("--api-base", base).port if running else 0
    done = bench.run("run", "claude", "--port", str(port), COMMANDCODE_KEY=KEY)
    assert done.returncode == 1 and told in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not os.path.exists(bench.report_path)
    assert bench.run("run", "claude", "--demo").returncode == 0     # which needs none


def test_without_a_network_it_says_so(bench):
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-n", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no network namespaces here")
    bench.api_base = "https://api.commandcode.ai"
    up = "ip link set lo up; exec " if shutil.which("ip") else "exec "
    done = subprocess.run(
        [unshare, "-n", "sh", "-c", up + shlex.join(bench.command("run", "claude"))], timeout=60,
        env=bench.environment(COMMANDCODE_KEY=KEY), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert done.returncode == 1 and "there is no network" in done.stderr, done.stderr
    assert not os.path.exists(bench.report_path)


def test_a_connection_that_does_not_come_about(bench):
    bench.before = "\nccproxy.STEP_SECONDS = 0.3"
    with full_listener() as (host, port):
        bench.api_base = "http://%s:%d" % (host, port)
        done = bench.run("run", "claude", COMMANDCODE_KEY=KEY)
    assert done.returncode == 1 and "timed out" in done.stderr, done.stderr


def test_a_name_server_that_does_not_answer(bench):
    bench.before = ("\nccproxy.STEP_SECONDS = 0.3\n"
                    "ccproxy.socket.getaddrinfo = lambda *_, **__: ccproxy.time.sleep(60)")
    bench.api_base = "https://a.example"
    done = bench.run("run", "claude", "--port", "0", COMMANDCODE_KEY=KEY)
    assert (done.returncode, done.stderr) == (
        1, "ccproxy: names: no answer within 0.3 seconds. Try again.\n")


def test_a_certificate_that_is_not_trusted(bench, tmp_path):
    fake = Clinic(tls=tls_of("other.pem"))
    try:
        bench.api_base = "https://localhost:%d" % fake.port
        done = bench.run("run", "claude", COMMANDCODE_KEY="user_good",
                         SSL_CERT_FILE=os.path.join(CERTS, "ca.pem"))
    finally:
        fake.close()
    assert done.returncode == 1 and "tls: " in done.stderr, done.stderr
    assert "mismatch" in done.stderr


@pytest.mark.parametrize("script, told", [
    (stall(seconds=5.0), "timed out"), (status(500, {"error": "x"}), "answers 500"),
    (status(403, {"error": "x"}), "answers 403"), (raw(b"no http\r\n\r\n"), "malformed HTTP")])
def test_a_question_without_an_answer_keeps_nobody_waiting(bench, upstream, script, told):
    upstream.side_script = script
    bench.before = "\nccproxy.STEP_SECONDS = 0.3"
    done = bench.run("run", "claude", COMMANDCODE_KEY=KEY)
    assert (done.returncode, done.stdout) == (0, "the client speaks\n"), done.stderr
    assert told in done.stderr and "claude starts all the same" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("running", [False, True])
def test_all_questions_together_take_a_few_seconds_at_most(bench, upstream, start_program, running):
    port = start_program().port if running else 0
    upstream.side_script = stall(seconds=5.0)
    bench.before = "\nccproxy.AHEAD_SECONDS = 0.3"
    done = bench.run("run", "claude", "--port", str(port), COMMANDCODE_KEY=KEY)
    assert (done.returncode, done.stdout) == (0, "the client speaks\n"), done.stderr
    assert "no answer within 0.3 seconds; claude starts all the same" in done.stderr


@pytest.mark.parametrize("name", ["codex", "llm", "pi"])
def test_a_planted_key_is_seen_nowhere(bench, name):
    done = bench.run("run", name, COMMANDCODE_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    report = bench.report
    assert SECRET in report["env"].values()
    assert SECRET not in done.stdout + done.stderr + report["ps"] + json.dumps(report["files"])


@pytest.mark.parametrize("arguments, step", [
    ((), "env claude)"), (("--demo",), "env claude --demo"),
    (("--port", "3000"), "env claude --port=3000"),
    (("--url", "https://team.example/v1", "--model", "kimi"),
     "env claude --model=kimi --url=https://team.example/v1")])
def test_env_says_how_it_was_asked(bench, arguments, step):
    shown = bench.call("env", "claude", *arguments)
    assert (shown.returncode, shown.stderr) == (0, "") and step in shown.stdout
    assert "first set COMMANDCODE_KEY to your key (user_...), or its clientKey\n" in shown.stdout
    base = "https://team.example" if "--url" in arguments else "http://127.0.0.1:3000"
    assert "export ANTHROPIC_BASE_URL='%s'\n" % base in shown.stdout


def test_env_shows_no_planted_key(bench):
    shown = bench.call("env", "claude", COMMANDCODE_KEY=SECRET, COMMANDCODE_API_KEY=SECRET,
                      ANTHROPIC_API_KEY=SECRET)
    assert shown.returncode == 0 and SECRET not in shown.stdout + shown.stderr


# Ends.


@pytest.mark.parametrize("does, status", [
    ("sys.exit(7)", 7), ("1 / 0", 1), ("os.kill(os.getpid(), 9)", 137)])
def test_the_exit_status_is_the_clients(bench, does, status):
    assert bench.run("run", "claude", "--demo", FAKE_DOES=does).returncode == status
    check_alone(bench)


WAIT = "\nwhile not received: time.sleep(0.01)\nsys.exit(40 + received[0])"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(bench, number):
    process = bench.start("run", "pi", "--demo", FAKE_DOES=WAIT)
    bench.wait_report()
    process.send_signal(number)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (40 + number, "")
    check_alone(bench)


def test_no_proxy_outlives_a_run_that_is_killed(bench):
    process = bench.start("run", "claude", "--demo", FAKE_DOES="time.sleep(60)")
    report = bench.wait_report()
    try:
        found = own_proxies(report)
        assert len(found) == 1 and not is_gone(found[0])
        process.kill()
        process.wait()
        wait_until(lambda: is_gone(found[0]), 10)
    finally:
        os.kill(report["pid"], signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_a_signal_before_the_client_runs_leaves_nothing(bench, number):
    """It comes when the temporary folder has just been filled."""
    early = ("import sys; sys.path[0] = %r; import ccproxy, os; fill = ccproxy.fill_folder; "
             "ccproxy.fill_folder = lambda *a: (fill(*a), os.kill(os.getpid(), %d)); "
             "ccproxy.leave(ccproxy.main())" % (os.path.dirname(PROGRAM), number))
    done = subprocess.run([sys.executable, "-c", early, "run", "llm", "--demo"],
                          env=bench.environment(), timeout=60, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (128 + number, b"")
    assert os.listdir(bench.temporary) == [] and not os.path.exists(bench.report_path)


def test_an_exit_status_is_known_where_the_ends_of_children_are_ignored(bench):
    known = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = bench.start("run", "claude", "--demo", FAKE_DOES="sys.exit(7)")
    finally:
        signal.signal(signal.SIGCHLD, known)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (7, "")


def test_a_missing_client_is_told_with_its_package(bench):
    for name, package in (("claude", "@anthropic-ai/claude-code"), ("aider", "aider-chat")):
        os.unlink(bench.folder / "bin" / name)
        done = bench.call("run", name, "--demo")
        assert done.returncode == 127 and package in done.stderr
        assert "not installed" in done.stderr


def test_a_client_that_cannot_start(bench):
    path = bench.folder / "bin" / "claude"
    path.write_text("#!/no/such/interpreter\n")
    assert bench.run("run", "claude", "--demo").returncode == 126
    assert os.listdir(bench.temporary) == []


class Terminal:
    """A shell with job control on a terminal of its own."""

    def __init__(self, environment, folder):
        import pty
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"],
                      {**environment, "PS1": "PROMPT ", "TERM": "dumb"})
        self.shown = ""

    def send(self, text):
        os.write(self.descriptor, text.encode())

    def read_until(self, mark):
        import select
        while mark not in self.shown:
            ready = select.select([self.descriptor], [], [], 30)[0]
            assert ready, "%r did not come: %r" % (mark, self.shown)
            self.shown += os.read(self.descriptor, 4096).decode("utf-8", "replace")
        before, _, self.shown = self.shown.partition(mark)
        return before

    def close(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.descriptor)


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="there is no bash here")
def test_keys_of_a_terminal_work_as_ever(bench):
    # One Ctrl-C is one signal for the client; Ctrl-Z gives the prompt back and fg goes on.
    does = ("received.clear()\nprint('count', len(input('ready ')), flush=True)\n"
            "while not received: time.sleep(0.01)\ntime.sleep(0.3)\n"
            "print('signals', len(received), flush=True)\nsys.exit(9)")
    terminal = Terminal(bench.environment(FAKE_DOES=does), bench.folder)
    try:
        terminal.send(bench.script("run", "claude", "--demo"))
        terminal.read_until("by way of ccproxy on http://127.0.0.1:")
        terminal.read_until("ready ")
        terminal.send("\x1a")
        terminal.read_until("Stopped")
        terminal.read_until("PROMPT ")
        terminal.send("echo in-$((1+1))-between; fg\n")
        terminal.read_until("in-2-between")
        terminal.send("four\n")
        terminal.read_until("count 4")
        terminal.send("\x03")
        terminal.read_until("signals 1")
        terminal.read_until("PROMPT ")
        terminal.send("echo status-$?-\n")
        terminal.read_until("status-9-")
    finally:
        terminal.close()
    check_alone(bench)


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="there is no bash here")
def test_a_key_that_is_asked_for_is_not_shown(bench):
    terminal = Terminal(bench.environment(), bench.folder)
    try:
        terminal.send(bench.script("run", "codex"))
        terminal.read_until("Command Code key (user_")
        terminal.read_until("): ")
        terminal.send(SECRET + "\n")
        assert SECRET not in terminal.read_until("the client speaks")
        terminal.read_until("PROMPT ")
    finally:
        terminal.close()
    assert bench.report["env"]["COMMANDCODE_KEY"] == SECRET


# A program that starts the proxy itself.


def test_a_proxy_bound_to_standard_input_ends_with_it():
    process = subprocess.Popen([*command_of(PROGRAM), "--demo", "--port", "0", "--while-stdin"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=clean_environment())
    base = re.search(rb" on (http://\S+)", process.stdout.readline())[1].decode()
    process.stdin.write(b"anything\n")
    process.stdin.flush()
    assert urllib.request.urlopen(base + "/health").status == 200
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdout.close()


# env.


def test_env_takes_address_and_model_from_the_settings(bench):
    done = bench.call("env", "claude", "--port", "4000", "--host", "0.0.0.0", "--model", "kimi",
                     SHELL="/usr/bin/fish")
    assert done.returncode == 0
    assert "set -gx ANTHROPIC_BASE_URL 'http://127.0.0.1:4000'" in done.stdout
    assert "set -gx ANTHROPIC_MODEL 'moonshotai/Kimi-K3'" in done.stdout


@pytest.mark.parametrize("arguments, told", [
    (("env",), "required"), (("env", "vim"), "vim"), (("run", "-p", "claude"), "unrecognized"),
    (("env", "pi", "--shell", "tcsh"), "tcsh"), (("env", "pi", "--model", "a b"), "model must be")])
def test_what_is_not_understood_is_said(bench, arguments, told):
    done = bench.call(*arguments)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command, example", [
    ("run", 'ccproxy.py run claude --demo -p "Say hello."'),
    ("env", "ccproxy.py env claude --shell fish")])
def test_help_has_an_example(bench, command, example):
    shown = " ".join(bench.call(command, "--help").stdout.split())
    assert example in shown and "claude|codex|opencode|aider|llm|pi" in shown


# The real programs.


def real_program(name):
    """Where a real client is: on the PATH, or where tests/clients/run.py puts it."""
    folder = {"claude": "claude-code"}.get(name, name)
    installed = os.path.join(tempfile.gettempdir(), "ccproxy-clients", folder, "node_modules",
                             ".bin", name)
    found = os.environ.get("CCPROXY_TEST_" + name.upper()) or shutil.which(name) or (
        installed if os.path.exists(installed) else "")
    if not found:
        pytest.skip("%s is not installed" % name)
    return found


@pytest.mark.parametrize("name, words", [
    ("claude", ("-p", "hello")), ("codex", ("exec", "--skip-git-repo-check", "hello"))])
def test_real_clients_run_against_the_demo(bench, name, words):
    os.unlink(bench.folder / "bin" / name)
    bench.python, program = sys.executable, real_program(name)
    done = bench.run("run", name, "--demo", "--", *words, DISABLE_AUTOUPDATER="1",
                     CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
                     PATH="%s:%s" % (os.path.dirname(program), os.environ["PATH"]))
    assert done.returncode == 0, done.stderr
    assert "This is the demo of ccproxy, not a model" in done.stdout
    assert os.path.exists(bench.home / {"claude": ".claude", "codex": ".codex"}[name])
