"""CLIENTS SET UP, SETUP: `setup` and its --undo on files of every kind, and with the real Claude Code,
Codex and opencode where they are installed."""
from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from typing import NamedTuple
from unittest import mock

import pytest
from fake_upstream import FakeUpstream, status
from harness import KEY, call_program, ccproxy, clean_environment
from test_launchers import Bench, real_program

SECRET = "user_5ecr3tPartOfAKey0123456789"
POSIX = pytest.mark.skipif(os.name != "posix", reason="modes and links are POSIX here")
FILES = {"claude": ".claude/settings.json", "codex": ".codex/config.toml",
         "opencode": ".config/opencode/opencode.json"}
BEFORE = {
    "claude": '{"permissions": {"allow": ["Read"]},\n  "apiKeyHelper": "mine",\n  "env": '
              '{"ANTHROPIC_AUTH_TOKEN": "%s", "FOO": "bar"}}' % SECRET,
    "codex": '# mine\r\nmodel = "gpt-5"\r\n\r\n[tui]\r\nnotifications = true',
    "opencode": '{\n\t"$schema": "s",\n\t"model": "mine/x", "provider": {"o": {"k": "%s"}}\n}\n'
                % SECRET}
every_client = pytest.mark.parametrize("name", FILES)


class Done(NamedTuple):
    """What became of a command."""

    returncode: int
    stdout: str
    stderr: str


class Home:
    """A home folder with a client's settings."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, name):
        return self.folder / FILES[name]

    def backup(self, name):
        return self.folder / (FILES[name] + ".ccproxy-backup")

    def write(self, name, text):
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_bytes(text.encode())

    def read(self, name):
        return self.path(name).read_bytes().decode()

    def names(self):
        """Every file below."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*")
                      if not path.is_dir())

    def run(self, name, *arguments, **more):
        """The command, in this process: a start for each of so many would take long."""
        environment = {one: value for one, value in clean_environment().items()
                       if not re.match("CLAUDE|CODEX|OPENCODE|XDG|ANTHROPIC|COMMANDCODE", one)}
        environment.update(HOME=str(self.folder), USERPROFILE=str(self.folder), **more)
        with mock.patch.dict(os.environ, environment, clear=True), \
                contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                status = ccproxy.main(["setup", name, *arguments])
            except SystemExit as end:
                status = end.code
        return Done(status, out.getvalue(), errors.getvalue())


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def settings_of(name, text):
    """The settings in a file, as data (of TOML only what a plain search finds)."""
    if name != "codex":
        return json.loads(text)
    return dict(re.findall(r'(?m)^(\w+) = "(.*?)"', text))


LED = {"claude": lambda got: got["env"]["ANTHROPIC_BASE_URL"],
       "codex": lambda got: got["base_url"][:-3],
       "opencode": lambda got: got["provider"]["ccproxy"]["options"]["baseURL"][:-3]}


@every_client
@pytest.mark.parametrize("before", [None, "", "some"])
def test_settings_are_written_and_brought_back(home, name, before):
    text = BEFORE[name] if before == "some" else before
    if text is not None:
        home.write(name, text)
    done = home.run(name, "--port", "4000", "--model", "kimi", COMMANDCODE_KEY=KEY)
    assert done.returncode == 0, done.stderr
    changed = home.read(name)
    got = settings_of(name, changed)
    assert LED[name](got) == "http://127.0.0.1:4000"
    assert "moonshotai/Kimi-K3" in changed and KEY not in changed + done.stdout
    assert "COMMANDCODE_KEY" in changed and SECRET not in done.stdout + done.stderr
    assert home.names() == sorted([FILES[name], FILES[name] + ".ccproxy-backup"])
    assert home.run(name, "--port", "4000", "--model", "kimi").returncode == 0
    assert home.read(name) == changed
    done = home.run(name, "--undo")
    assert done.returncode == 0, done.stderr
    assert home.names() == ([FILES[name]] if text is not None else [])
    if text is not None:
        assert home.read(name) == text


@every_client
def test_a_second_model_replaces_the_first_and_undo_knows_the_beginning(home, name):
    home.write(name, BEFORE[name])
    for model in ("kimi", "claude-opus-5-5", "some/unknown-model", "glm"):
        assert home.run(name, "--model", model).returncode == 0
    changed = home.read(name)
    assert "zai-org/GLM-5.3" in changed
    assert not re.search("Kimi|opus-5|unknown", changed)
    assert home.run(name, "--undo").returncode == 0
    assert home.read(name) == BEFORE[name]


def test_what_would_win_is_set_aside_and_the_rest_stays(home):
    home.write("claude", BEFORE["claude"])
    assert home.run("claude").returncode == 0
    got = settings_of("claude", home.read("claude"))
    assert "ANTHROPIC_AUTH_TOKEN" not in got["env"] and got["env"]["FOO"] == "bar"
    assert got["permissions"] == {"allow": ["Read"]}
    assert got["apiKeyHelper"] == ccproxy.key_helper(False)


def test_what_changed_since_survives_undo(home):
    home.write("claude", BEFORE["claude"])
    home.run("claude")
    got = settings_of("claude", home.read("claude"))
    got["theme"], got["env"]["FOO"] = "dark", "baz"
    home.write("claude", json.dumps(got))
    assert home.run("claude", "--undo").returncode == 0
    assert settings_of("claude", home.read("claude")) == {
        "permissions": {"allow": ["Read"]}, "apiKeyHelper": "mine", "theme": "dark",
        "env": {"FOO": "baz", "ANTHROPIC_AUTH_TOKEN": SECRET}}
    assert home.names() == [FILES["claude"]]


@every_client
@pytest.mark.parametrize("undo", [False, True])
def test_what_another_process_writes_meanwhile_is_kept(home, name, undo):
    """Both wait for a change that is not over, and then begin with what it left."""
    home.write(name, "" if name == "codex" else "{}")
    if undo:
        assert home.run(name).returncode == 0

    def edit(old):
        held.set()
        time.sleep(0.2)
        if name == "codex":
            return old + b"[theirs]\n"
        return json.dumps({**json.loads(old), "theirs": 1}).encode()

    held = threading.Event()
    other = threading.Thread(target=ccproxy.change_file, args=(str(home.path(name)), edit))
    other.start()
    held.wait()
    assert home.run(name, *["--undo"] * undo).returncode == 0
    other.join()
    assert "theirs" in home.read(name) and ("127.0.0.1" in home.read(name)) == (not undo)
    assert home.names() == [FILES[name]] + [FILES[name] + ".ccproxy-backup"] * (not undo)


@every_client
@pytest.mark.parametrize("broken", ["{", "\u0000", "[1", '"', "\udcff"])
def test_what_does_not_parse_is_left_alone(home, name, broken):
    home.path(name).parent.mkdir(parents=True)
    data = broken.encode("utf-8", "surrogateescape")
    home.path(name).write_bytes(data)
    done = home.run(name)
    assert done.returncode in (1, 2) and "is not" in done.stderr, done.stderr
    assert home.path(name).read_bytes() == data and home.names() == [FILES[name]]


def test_comments_are_never_lost(home):
    text = '{\n  // mine\n  "autoupdate": false\n}\n'
    path = home.folder / ".config" / "opencode" / "opencode.jsonc"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    done = home.run("opencode", "--port", "4000")
    assert done.returncode == 1 and "Nothing was written" in done.stderr
    assert LED["opencode"](json.loads(done.stdout)) == "http://127.0.0.1:4000"
    assert path.read_text() == text and len(home.names()) == 1


@every_client
def test_a_dry_run_writes_nothing(home, name):
    home.write(name, BEFORE[name])
    done = home.run(name, "--dry-run", "--port", "4000")
    assert done.returncode == 0 and "http://127.0.0.1:4000" in done.stdout
    assert str(home.path(name)) in done.stdout and SECRET not in done.stdout
    assert home.read(name) == BEFORE[name] and home.names() == [FILES[name]]
    home.run(name)
    changed = home.read(name)
    assert home.run(name, "--undo", "--dry-run").returncode == 0
    assert home.read(name) == changed and len(home.names()) == 2


@every_client
def test_undo_without_a_setup_says_so(home, name):
    home.write(name, BEFORE[name])
    done = home.run(name, "--undo")
    assert done.returncode == 1 and "nothing was set up" in done.stderr
    assert home.read(name) == BEFORE[name]


def test_undo_of_a_file_that_was_deleted_brings_it_back(home):
    home.write("codex", BEFORE["codex"])
    home.run("codex")
    home.path("codex").unlink()
    assert home.run("codex", "--undo").returncode == 0
    assert home.read("codex") == BEFORE["codex"]


def test_undo_of_a_file_that_broke_since_keeps_both(home):
    home.write("claude", BEFORE["claude"])
    home.run("claude")
    home.write("claude", "{")
    assert home.run("claude", "--undo").returncode == 2
    assert home.read("claude") == "{"
    assert home.backup("claude").read_text() == BEFORE["claude"]


def test_a_byte_order_mark_stays(home):
    home.write("claude", "\ufeff{}")
    assert home.run("claude").returncode == 0
    assert home.read("claude").startswith("\ufeff{")
    assert home.run("claude", "--undo").returncode == 0 and home.read("claude") == "\ufeff{}"


@POSIX
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_modes_are_kept(home, mode):
    home.write("claude", "{}")
    home.path("claude").chmod(mode)
    home.run("claude")
    for path in (home.path("claude"), home.backup("claude")):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    home.run("claude", "--undo")
    assert stat.S_IMODE(home.path("claude").stat().st_mode) == mode


@POSIX
def test_a_new_file_is_for_its_owner_alone(home):
    home.run("claude")
    assert stat.S_IMODE(home.path("claude").stat().st_mode) == 0o600


@POSIX
def test_a_link_stays_a_link(home):
    real = home.folder / "dotfiles" / "settings.json"
    real.parent.mkdir()
    real.write_text(BEFORE["claude"])
    home.path("claude").parent.mkdir()
    home.path("claude").symlink_to(real)
    home.run("claude")
    assert home.path("claude").is_symlink() and "ANTHROPIC_BASE_URL" in real.read_text()
    home.run("claude", "--undo")
    assert home.path("claude").is_symlink() and real.read_text() == BEFORE["claude"]


@POSIX
@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said(home):
    home.path("claude").parent.mkdir(mode=0o500)
    done = home.run("claude")
    assert done.returncode == 2 and "Permission denied" in done.stderr


@pytest.mark.parametrize("name, variable, value, expected", [
    ("claude", "CLAUDE_CONFIG_DIR", "c", "c/settings.json"),
    ("codex", "CODEX_HOME", "c", "c/config.toml"),
    ("opencode", "XDG_CONFIG_HOME", "c", "c/opencode/opencode.json"),
    ("opencode", "OPENCODE_CONFIG", "c/mine.json", "c/mine.json")])
def test_settings_are_where_the_client_looks(home, name, variable, value, expected):
    done = home.run(name, **{variable: str(home.folder / value)})
    assert done.returncode == 0, done.stderr
    assert home.names() == sorted([expected, expected + ".ccproxy-backup"])


def test_undo_finds_what_was_set_up_beside_a_newer_file(home):
    assert home.run("opencode").returncode == 0
    (home.path("opencode").parent / "opencode.jsonc").write_text("// mine\n{}")
    assert home.run("opencode", "--undo").returncode == 0
    assert home.names() == [".config/opencode/opencode.jsonc"]


def test_what_wins_over_a_setup_is_named(home):
    done = home.run("claude", ANTHROPIC_AUTH_TOKEN=SECRET)
    assert "Unset what wins over it here: ANTHROPIC_AUTH_TOKEN\n" in done.stdout
    assert SECRET not in done.stdout


@pytest.mark.parametrize("arguments, told", [
    (("aider",), "aider"), (("claude", "--port", "0"), "port 0"),
    (("claude", "--model", "a b"), "model must be")])
def test_what_cannot_be_set_up_is_said(home, arguments, told):
    done = home.run(*arguments)
    assert done.returncode == 2 and told in done.stderr and home.names() == []


@every_client
@pytest.mark.parametrize("arguments, words", [
    ((), "export COMMANDCODE_KEY=user_... (or a clientKey) where "),
    (("--demo",), "export COMMANDCODE_KEY=x (any word) where ")])
def test_the_key_that_the_proxy_takes_is_named(home, name, arguments, words):
    assert words in home.run(name, *arguments).stdout


def test_help_has_an_example():
    shown = " ".join(call_program("setup", "--help").stdout.split())
    assert "ccproxy.py setup claude --dry-run" in shown and "--undo" in shown


@pytest.mark.parametrize("windows, needed, helper", [
    (False, False, 'echo "${COMMANDCODE_KEY:-no-key}"'), (True, False, "echo %COMMANDCODE_KEY%"),
    (True, True, "if not defined COMMANDCODE_KEY (echo COMMANDCODE_KEY holds no key: set "
     "COMMANDCODE_KEY=user_..., then start claude again>&2& exit 1) else echo %COMMANDCODE_KEY%")])
def test_the_key_helper_speaks_the_systems_shell(windows, needed, helper):
    assert ccproxy.key_helper(windows, needed) == helper


MISSING = "COMMANDCODE_KEY holds no key: export COMMANDCODE_KEY=user_..., then start claude again\n"


@POSIX
@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh"])
@pytest.mark.parametrize("given, expected", [
    ("a'b$c\\n%s", (0, "a'b$c\\n%s\n", "")), (KEY, (0, KEY + "\n", "")), ("-n", (0, "-n\n", "")),
    (None, (1, "", MISSING)), ("", (1, "", MISSING)), ("user_...", (1, "", MISSING))])
def test_the_key_helper_gives_the_key_or_says_what_is_missing(shell, given, expected):
    if shutil.which(shell) is None:
        pytest.skip("there is no %s here" % shell)
    done = subprocess.run([shutil.which(shell), "-c", ccproxy.key_helper(False)],
                          env={} if given is None else {"COMMANDCODE_KEY": given},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == expected


USAGE = '{"keys":[%s]}'
GOOD, BAD = '{"state":"usable"}', '{"state":"refused","reason":"x"}'
CALLED_REFUSED = ("COMMANDCODE_KEY holds a key that is refused (commandcode.ai, settings, API keys "
                  "shows yours): export COMMANDCODE_KEY=user_..., then start claude again\n")


@POSIX
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh"])
@pytest.mark.parametrize("code, body, refused", [
    (200, USAGE % GOOD, False), (200, USAGE % BAD, True), (200, USAGE % (BAD + "," + BAD), True),
    (200, USAGE % (BAD + "," + GOOD), False), (200, USAGE % '{"state":"unknown"}', False),
    (200, "not JSON", False), (401, '{"error":{"message":"No"}}', True), (404, "{}", False),
    (502, "{}", False)])
def test_the_key_helper_fails_for_a_key_that_the_proxy_calls_refused(shell, code, body, refused):
    if shutil.which(shell) is None:
        pytest.skip("there is no %s here" % shell)
    proxy = FakeUpstream()
    proxy.side_script = status(code, body.encode())
    done = subprocess.run(
        [shutil.which(shell), "-c", ccproxy.key_helper(False)], stdout=subprocess.PIPE,
        env={"COMMANDCODE_KEY": "k'\"$x\\", "ANTHROPIC_BASE_URL": proxy.base},
        stderr=subprocess.PIPE, encoding="utf-8")
    proxy.close()
    assert (done.returncode, done.stdout, done.stderr) == (
        (1, "", CALLED_REFUSED) if refused else (0, "k'\"$x\\\n", ""))
    asked, = proxy.side_requests
    assert asked.line == "GET /v1/usage HTTP/1.1"
    assert asked.field("authorization") == "Bearer k'\"$x\\"


@POSIX
def test_the_key_helper_tells_that_the_proxy_has_no_network(make_proxy):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    proxy = make_proxy(apiBase="http://127.0.0.1:9")
    for _ in range(2):      # it is looked at anew each time
        done = subprocess.run(
            ["/bin/sh", "-c", ccproxy.key_helper(False)], stdout=subprocess.PIPE,
            env={"COMMANDCODE_KEY": KEY, "PATH": os.environ["PATH"],
                 "ANTHROPIC_BASE_URL": proxy.base}, stderr=subprocess.PIPE, encoding="utf-8")
        assert (done.returncode, done.stdout, done.stderr) == (
            1, "", "the proxy reaches no upstream: ccproxy.py doctor looks for the cause\n")


@POSIX
def test_the_key_helper_tells_that_no_proxy_runs_and_does_without_curl(tmp_path):
    for name in ("grep", "sort", "tr"):
        (tmp_path / name).symlink_to(shutil.which(name))
    told = "no proxy answers at %s: start ccproxy there, then start claude again\n" % "http://[::1]:9"
    for path, expected in ((str(tmp_path), (0, KEY + "\n", "")), (os.environ["PATH"], (1, "", told))):
        done = subprocess.run(
            ["/bin/sh", "-c", ccproxy.key_helper(False)], stdout=subprocess.PIPE,
            env={"COMMANDCODE_KEY": KEY, "PATH": path, "ANTHROPIC_BASE_URL": "http://[::1]:9"},
            stderr=subprocess.PIPE, encoding="utf-8")
        assert (done.returncode, done.stdout, done.stderr) == expected


@POSIX
@pytest.mark.parametrize("arguments, environment, needed", [
    ((), {}, True), (("--demo",), {}, False),
    (("--operator-keys", "loopback"), {"COMMANDCODE_API_KEYS": KEY}, False),
    (("--operator-keys", "loopback"), {}, True),
    (("--client-key", "c"), {"COMMANDCODE_API_KEYS": KEY}, True),
    (("--url", "http://team.example:1/"), {"COMMANDCODE_API_KEYS": KEY,
                                            "CC_OPERATOR_KEYS": "loopback"}, True)])
def test_the_key_helper_asks_for_a_key_where_the_proxy_does(home, arguments, environment, needed):
    assert home.run("claude", *arguments, **environment).returncode == 0
    helper = settings_of("claude", home.read("claude"))["apiKeyHelper"]
    done = subprocess.run(["sh", "-c", helper], env={}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (
        (1, "", MISSING) if needed else (0, ccproxy.NO_KEY + "\n", ""))


@every_client
@pytest.mark.parametrize("url", ["https://team.example:8443/x", "https://team.example:8443/x/v1/"])
def test_clients_are_led_to_another_hosts_proxy(home, name, url):
    done = home.run(name, "--url", url, COMMANDCODE_KEY="a-team's-clientKey")
    assert (done.returncode, done.stderr) == (0, "")
    assert LED[name](settings_of(name, home.read(name))) == "https://team.example:8443/x"
    assert "The proxy: another host's" in done.stdout and "clientKey" in done.stdout
    assert home.run(name, "--undo").returncode == 0 and home.names() == []


@pytest.mark.parametrize("key, told", [
    ("", ""), ("user_...", "the placeholder of the README"),
    ("xai-5ecr3t", "a key of xAI (xai-...)"), (KEY, ""), ("a-clientKey", "")])
def test_a_setup_says_what_is_wrong_with_the_key(home, key, told):
    done = home.run("claude", COMMANDCODE_KEY=key)
    assert done.returncode == 0 and told in done.stderr and bool(told) == bool(done.stderr)
    assert "5ecr3t" not in done.stdout + done.stderr


# The real programs.


def log_of(program):
    return [line for line in program.log.splitlines() if " api=" in line]


@POSIX
@pytest.mark.parametrize("name, words", [
    ("claude", ("-p", "hello")), ("codex", ("exec", "--skip-git-repo-check", "hello")),
    ("opencode", ("run", "hello"))])
def test_real_clients_follow_their_settings(tmp_path, start_program, name, words):
    program = real_program(name)
    bench, home = Bench(tmp_path), Home(tmp_path / "home")
    os.unlink(tmp_path / "bin" / name)
    proxy = start_program("--demo", until="curl")
    home.write(name, BEFORE[name])
    environment = bench.environment(
        COMMANDCODE_KEY=SECRET, DISABLE_AUTOUPDATER="1", OPENCODE_DISABLE_AUTOUPDATE="1",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        PATH="%s:%s" % (os.path.dirname(program), os.environ["PATH"]))
    assert home.run(name, "--port", str(proxy.port), "--model", "kimi").returncode == 0
    done = subprocess.run([program, *words], env=environment, cwd=tmp_path, timeout=60,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "This is the demo of ccproxy, not a model" in done.stdout
    lines = log_of(proxy)
    assert lines and all(ccproxy.key_name(SECRET) in line and "model=moonshotai/Kimi-K3" in line
                         for line in lines)
    # `run` leads elsewhere than such settings, to a proxy of its own.
    done = bench.run("run", name, "--demo", "--model", "glm", "--", *words, **{
        one: environment[one] for one in ("PATH", "DISABLE_AUTOUPDATER",
                                          "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC")})
    assert done.returncode == 0 and "This is the demo of ccproxy" in done.stdout, done.stderr
    assert log_of(proxy) == lines
    assert home.run(name, "--undo").returncode == 0
    assert home.read(name) == BEFORE[name]


@POSIX
def test_what_codex_writes_itself_survives_undo(tmp_path):
    program = real_program("codex")
    home = Home(tmp_path / "home")
    home.write("codex", BEFORE["codex"].replace("\r\n", "\n"))
    assert home.run("codex").returncode == 0
    environment = {"PATH": os.environ["PATH"], "HOME": str(home.folder)}
    subprocess.run([program, "mcp", "add", "echo", "--", "cat"], env=environment, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    assert "mcp_servers" in home.read("codex")
    assert home.run("codex", "--undo").returncode == 0
    text = home.read("codex")
    assert "ccproxy" not in text and 'model = "gpt-5"' in text
    assert "[mcp_servers.echo]" in text and "notifications = true" in text
    listed = subprocess.run([program, "mcp", "list"], env=environment, check=True,
                            stdout=subprocess.PIPE, encoding="utf-8", cwd=tmp_path).stdout
    assert "echo" in listed
