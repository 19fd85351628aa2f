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
from harness import KEY, PROGRAM, call_program, ccproxy, clean_environment, command_of, wait_until

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

    def __init__(self, folder):
        self.folder, self.report_path = folder, str(folder / "report.json")
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
def bench(tmp_path):
    return Bench(tmp_path)


def own_proxies(report):
    """Process ids of the proxies that a client saw beside itself."""
    rows = [line.split(None, 2) for line in report["ps"].splitlines()]
    parent = next(row[1] for row in rows if row[0] == str(report["pid"]))
    return [int(row[0]) for row in rows if row[1] == parent and "--while-stdin" in row[2]]


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
    assert bench.report["health"]["upstream"] == "https://api.commandcode.ai/alpha/generate"
    check_alone(bench)


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", b"HTTP/1.1 500 No\r\n\r\n{", b"SSH-2.0-x\r\n"])
def test_a_stranger_on_the_port_gets_no_key(bench, answer):
    import socket
    import threading
    seen = []
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
    ({"COMMANDCODE_KEY": "sk-5ecr3t"}, "holds no Command Code key")])
def test_without_a_key_it_says_what_to_do(bench, given, told):
    done = bench.run("run", "claude", **given)
    assert done.returncode == 2 and told in done.stderr and "5ecr3t" not in done.stderr
    assert not os.path.exists(bench.report_path)


@pytest.mark.parametrize("name", ["codex", "llm", "pi"])
def test_a_planted_key_is_seen_nowhere(bench, name):
    done = bench.run("run", name, COMMANDCODE_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    report = bench.report
    assert SECRET in report["env"].values()
    assert SECRET not in done.stdout + done.stderr + report["ps"] + json.dumps(report["files"])


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
