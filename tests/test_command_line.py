"""The program as a person starts it: screen, flags, environment, config file, and what is wrong."""
from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from unittest import mock

import ccproxy
import pytest
from fake_upstream import FakeUpstream
from harness import CHAT, KEY, PROGRAM, Program, clean_environment, run_program, wait_until

# Every option, its environment names besides CC_ and the name in upper snake case, and a value
# that is not its default.

OPTIONS = {
    "port": (["PORT"], "4321", 4321),
    "host": (["HOST"], "127.0.0.2", "127.0.0.2"),
    "apiBase": (["COMMANDCODE_API_BASE"], "http://other.example:1/x", "http://other.example:1/x"),
    "defaultModel": (["COMMANDCODE_DEFAULT_MODEL"], "a/b", "a/b"),
    "modelAliases": ([], "a=b/c,d-*=e", {"a": "b/c", "d-*": "e"}),
    "allowedModels": (["COMMANDCODE_ALLOWED_MODELS"], "a,b/c", ["a", "b/c"]),
    "allowUnknownModels": (["COMMANDCODE_ALLOW_UNKNOWN_MODELS"], "false", False),
    "useProviderModels": ([], "0", False),
    "modelRefreshIntervalMs": ([], "5000", 5000),
    "includeReasoning": (["INCLUDE_REASONING"], "no", False),
    "emptyResponsePolicy": (["COMMANDCODE_EMPTY_VISIBLE_RESPONSE_POLICY"], "allow", "allow"),
    "corsOrigin": (["CORS_ORIGIN"], "https://a.example", "https://a.example"),
    "maxBodyBytes": (["REQUEST_BODY_LIMIT_BYTES"], "2048", 2048),
    "upstreamConnectSeconds": ([], "1.5", 1.5),
    "upstreamIdleSeconds": ([], "60", 60),
    "projectSlug": (["PROJECT_SLUG"], "slug", "slug"),
    "cliVersion": (["COMMANDCODE_CLI_VERSION"], "1.65.0", "1.65.0"),
    "logLevel": (["LOG_LEVEL"], "debug", "debug"),
    "logFile": (["LOG_FILE"], "some.log", "some.log"),
}
DEFAULTS = {"port": 3000, "host": "127.0.0.1", "apiBase": "https://api.commandcode.ai",
            "upstreamConnectSeconds": 10, "upstreamIdleSeconds": 300, "allowUnknownModels": True,
            "includeReasoning": True, "corsOrigin": "", "maxBodyBytes": 64 * 1024 * 1024,
            "logFile": "", "modelAliases": {}, "allowedModels": []}


def snake(name):
    return re.sub("[A-Z]", lambda letter: "_" + letter[0], name).upper()


def kebab(name):
    return "--" + snake(name).lower().replace("_", "-")


@pytest.fixture
def empty(tmp_path):
    """A config file without entries."""
    path = tmp_path / "empty.json"
    path.write_text("{}")
    return str(path)


def checked(*arguments, environment=None, whole=False):
    """(value, source) of every option, as --check prints them; `whole`: by a process of its own."""
    if whole:
        done = run_program("--check", "--all", *arguments, environment=environment)
        assert (done.returncode, done.stderr) == (0, "")
        printed = done.stdout
    else:
        with mock.patch.dict(os.environ, clean_environment(**(environment or {})), clear=True), \
                contextlib.redirect_stdout(io.StringIO()) as out:
            assert ccproxy.main(["--check", "--all", *arguments]) == 0
        printed = out.getvalue()
    rows = [re.fullmatch(r"(\w+) +(.*)  \((.*)\)", line) for line in printed.splitlines()]
    return {row[1]: (json.loads(row[2]), row[3]) for row in rows}


def test_defaults(empty):
    found = checked("--config", empty)
    assert set(OPTIONS) <= set(found)
    assert {source for _, source in found.values()} == {"default"}
    assert {name: found[name][0] for name in DEFAULTS} == DEFAULTS


def test_the_shipped_file_holds_the_defaults(empty):
    with open(os.path.join(os.path.dirname(PROGRAM), "config.json"), encoding="utf-8") as file:
        shipped = json.load(file)
    defaults = checked("--config", empty)
    assert shipped and all(defaults[name][0] == value for name, value in shipped.items())


def test_the_shipped_file_leaves_room_for_a_credentials_file():
    """What stands in it counts above what commandcode-bridge's file says."""
    with open(os.path.join(os.path.dirname(PROGRAM), "config.json"), encoding="utf-8") as file:
        assert not set(ccproxy.FILE_MEMBERS.values()) & set(json.load(file))


def test_flags(empty):
    flags = [word for name, (_, text, _) in OPTIONS.items() for word in (kebab(name), text)]
    found = checked("--config", empty, *flags)
    for name, (_, _, value) in OPTIONS.items():
        assert found[name] == (value, kebab(name))


@pytest.mark.parametrize("place", [0, 1])
def test_every_environment_name(empty, place):
    """The CC_ name of each option, and the one that other bridges' users have set already."""
    names = {name: ["CC_" + snake(name)] + others for name, (others, _, _) in OPTIONS.items()}
    environment = {names[name][place]: text for name, (_, text, _) in OPTIONS.items()
                   if place < len(names[name])}
    found = checked("--config", empty, environment=environment)
    for name, (_, _, value) in OPTIONS.items():
        if place < len(names[name]):
            assert found[name][0] == value and names[name][place] in found[name][1]
        else:
            assert found[name][1] == "default"


def test_the_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({name: value for name, (_, _, value) in OPTIONS.items()}),
                    encoding="utf-8-sig")
    found = checked("--config", str(path))
    values = {name: value for name, (_, _, value) in OPTIONS.items()}
    values["logFile"] = str(tmp_path / "some.log")      # it counts from the file's folder
    assert {name: found[name] for name in OPTIONS} == {
        name: (value, str(path)) for name, value in values.items()}


def test_the_order(tmp_path):
    """Flags, then environment, then the file, then defaults; an empty variable is no value."""
    path = tmp_path / "mine.json"
    path.write_text('{"port": 1, "projectSlug": "file", "corsOrigin": "*", "logLevel": "error"}')
    found = checked("--config", str(path), "--port", "3", whole=True, environment={
        "PORT": "2", "PROJECT_SLUG": "environment", "CORS_ORIGIN": "", "CC_HOST": "127.0.0.3",
        "HOST": "127.0.0.4"})
    assert [found[name][0] for name in ("port", "projectSlug", "corsOrigin", "host", "logLevel")] \
        == [3, "environment", "*", "127.0.0.3", "error"]


def test_the_file_beside_the_program(tmp_path):
    """One file on a bare box, with and without a config.json beside it."""
    program = tmp_path / "ccproxy.py"
    with open(PROGRAM, "rb") as file:
        program.write_bytes(file.read())
    bare = run_program("--check", program=str(program))
    assert bare.returncode == 0 and "config.json" not in bare.stdout
    (tmp_path / "config.json").write_text('{"port": 4444}')
    done = run_program("--check", program=str(program))
    assert re.search(r"^port +4444 +\(.*config\.json\)$", done.stdout, re.M)


@pytest.mark.parametrize("form", [["--include-reasoning=false"], ["--include-reasoning", "off"]])
def test_ways_to_write_a_flag(empty, form):
    assert checked("--config", empty, *form)["includeReasoning"][0] is False


def test_a_bool_flag_alone_means_true(empty):
    found = checked("--config", empty, "--use-provider-models",
                    environment={"CC_USE_PROVIDER_MODELS": "0"})
    assert found["useProviderModels"] == (True, "--use-provider-models")


REMOVED = "workers was removed: see README, several processes"


@pytest.mark.parametrize("arguments, environment, content", [
    (["--workers", "4"], {}, "{}"), (["--workers=4"], {}, "{}"), (["--workers"], {}, "{}"),
    (["--workers=many", "--workers", "2"], {}, "{}"), ([], {"CC_WORKERS": "2"}, "{}"),
    ([], {"CC_WORKERS": "lots"}, "{}"), ([], {}, '{"workers": 2}'), ([], {}, '{"workers": null}'),
    ([], {}, '{"workers": ["2"]}'), (["--workers", "4"], {"CC_WORKERS": "3"}, '{"workers": 2}')])
def test_a_removed_option_is_one_warning_and_no_refusal(tmp_path, arguments, environment, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    for command in (["--check"], ["env", "claude"]):
        done = run_program(*command, "--config", str(path), *arguments, environment=environment)
        assert (done.returncode, done.stderr) == (0, "ccproxy: warning: %s\n" % REMOVED)
        assert "workers" not in done.stdout


def test_a_removed_option_is_no_mistyped_flag(empty):
    done = run_program("--check", "--config", empty, "--workers", "2", "--worker", "2")
    assert done.returncode == 2 and "unrecognized arguments: --worker" in done.stderr
    assert "workers" not in run_program("--help").stdout


def test_a_start_with_a_removed_option_is_one_warning(start_program, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"workers": 2}')
    program = start_program("--config", str(path), "--workers", "2", environment={"CC_WORKERS": "2"})
    health = program.request("GET", "/health").json
    assert (health["worker"], health["workers"]) == (1, 1)
    code, words = program.stop()
    assert code == 0 and words.count("workers") == 1 and "WARNING " + REMOVED in words


# --help and --version.


def test_version():
    done = run_program("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "ccproxy " + ccproxy.__version__


def test_help_has_a_line_for_each_command():
    lines = ccproxy.main_parser().format_help().splitlines()
    for name, command in ccproxy.COMMANDS.items():
        (line,) = [one for one in lines if one.startswith("  %s " % name)]
        assert line.endswith(" " + command.help) and len(line) < 80


@pytest.mark.parametrize("name", ccproxy.COMMANDS)
def test_the_usage_of_a_command_is_as_it_is_typed(name):
    """Flags with what stands behind them, words with their choices."""
    command = ccproxy.COMMANDS[name]
    usage = ccproxy.command_parser(name, command).format_usage()
    for flag, known in command.arguments:
        wanted = "[%s]" % flag if "action" in known else \
            "[%s " % flag if flag[0] == "-" else "|".join(known["choices"])
        assert wanted in usage


def test_a_key_in_the_wrong_place_is_not_printed(empty):
    key = "user_5ecr3tPartOfAKey01"
    known = checked("--config", empty, "--project-slug", key, "--model-aliases", key + "=kimi")
    assert known["projectSlug"][0] == ccproxy.key_name(key)
    assert known["modelAliases"][0] == {ccproxy.key_name(key): "kimi"}


def test_help_names_every_option_and_variable():
    done = run_program("--help-all")
    assert (done.returncode, done.stderr) == (0, "")
    words = set(re.findall(r"[A-Za-z_][\w-]*|--[\w-]+", done.stdout))
    for name, (others, _, _) in OPTIONS.items():
        assert kebab(name) in words or kebab(name) in done.stdout.split()
        for variable in ["CC_" + snake(name)] + others:
            assert variable in words
    for flag in ("--config", "--check", "--version"):
        assert flag in done.stdout


# What is wrong: exit status 2, exactly one line that names it.

WRONG = [
    ("an unknown flag", ["--prot", "1"], {}, None, "--prot"),
    ("a flag cut short", ["--por", "1"], {}, None, "--por"),
    ("a flag without value", ["--port"], {}, None, "--port"),
    ("a stray word", ["start"], {}, None, "start"),
    ("a word for a number", ["--port", "abc"], {}, None, "port"),
    ("a fraction", ["--port", "80.5"], {}, None, "port"),
    ("a port too high", ["--port", "65536"], {}, None, "port"),
    ("a port below zero", ["--port=-1"], {}, None, "port"),
    ("a number that is none", ["--port", "9" * 5000], {}, None, "port"),
    ("other digits", ["--port", "\u0663\u0660"], {}, None, "port"),
    ("in the environment", [], {"PORT": "http"}, None, "PORT"),
    ("in the environment, CC_", [], {"CC_LOG_LEVEL": "loud"}, None, "CC_LOG_LEVEL"),
    ("no URL", ["--api-base", "api.example"], {}, None, "apiBase"),
    ("another scheme", ["--api-base", "ftp://api.example"], {}, None, "apiBase"),
    ("a bad port in a URL", ["--api-base", "http://api.example:99999"], {}, None, "apiBase"),
    ("a word as port in a URL", ["--api-base", "http://api.example:http"], {}, None, "apiBase"),
    ("a URL with brackets", ["--api-base", "http://[::1"], {}, None, "apiBase"),
    ("a URL with a query", ["--api-base", "http://api.example/?a=b"], {}, None, "apiBase"),
    ("a URL with a space", ["--api-base", "http://api.example/a b"], {}, None, "apiBase"),
    ("a bad level", ["--log-level", "loud"], {}, None, "logLevel"),
    ("a bad policy", ["--empty-response-policy", "x"], {}, None, "emptyResponsePolicy"),
    ("a bad switch", ["--include-reasoning=maybe"], {}, None, "includeReasoning"),
    ("a bad map", ["--model-aliases", "{"], {}, None, "modelAliases"),
    ("a map without value", ["--model-aliases", "a"], {}, None, "modelAliases"),
    ("a bad version", ["--cli-version", "newest"], {}, None, "cliVersion"),
    ("a size too small", ["--max-body-bytes", "1"], {}, None, "maxBodyBytes"),
    ("a control character", ["--project-slug", "a\nb"], {}, None, "projectSlug"),
    ("a log that cannot be written", ["--log-file", "/nonexistent/x.log"], {}, None, "logFile"),
    ("a log that is a directory", ["--log-file", "/"], {}, None, "logFile"),
    ("no such config file", ["--config", "/nonexistent/c.json"], {}, None, "/nonexistent/c.json"),
    ("authorities that are not there", [], {"SSL_CERT_FILE": "/nonexistent/ca.pem"}, None,
     "SSL_CERT_FILE"),
    ("an unknown entry", [], {}, b'{"prot": 1}', "prot"),
    ("a wrong type", [], {}, b'{"port": "x"}', "port"),
    ("true for a number", [], {}, b'{"port": true}', "port"),
    ("an endless number", [], {}, b'{"port": 1e999}', "port"),
    ("no number", [], {}, b'{"upstreamIdleSeconds": NaN}', "upstreamIdleSeconds"),
    ("a number for a string", [], {}, b'{"host": 1}', "host"),
    ("a list of numbers", [], {}, b'{"allowedModels": [1]}', "allowedModels"),
    ("a list for a map", [], {}, b'{"modelAliases": []}', "modelAliases"),
    ("not JSON", [], {}, b'{"port": 1,}', "mine.json"),
    ("not an object", [], {}, b"[]", "mine.json"),
    ("not UTF-8", [], {}, b'{"host": "\xff"}', "mine.json"),
    ("deep", [], {}, b"[" * 200_000, "mine.json"),
    ("an address that is not ours", ["--host", "192.0.2.1"], {}, None, "192.0.2.1"),
]


WHOLE_PROGRAM = {       # those that are tried in a process of their own; the others call main()
    "an unknown flag", "a bad port in a URL", "deep", "a log that cannot be written",
    "a log that is a directory", "authorities that are not there", "an address that is not ours"}


def run_main(arguments, environment):
    """(exit status, standard output, standard error) of main() in this process."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, clean_environment(**environment), clear=True), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.raises(SystemExit) as ended:
        ccproxy.main(arguments + ["--check"])       # so that a miss cannot start a server
    return ended.value.code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name, arguments, environment, content, word", WRONG,
                         ids=[row[0] for row in WRONG])
def test_what_is_wrong_is_one_line(tmp_path, name, arguments, environment, content, word):
    path = tmp_path / "mine.json"
    path.write_bytes(content if content is not None else b"{}")
    if "--config" not in arguments:
        arguments = ["--config", str(path)] + arguments
    if name in WHOLE_PROGRAM:
        done = run_program(*arguments, environment=environment)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        code, out, err = run_main(arguments, environment)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.endswith("\n") and len(err) < 1200
    assert word in err and "Traceback" not in err


def test_a_busy_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(1)
        port = str(sock.getsockname()[1])
        done = run_program("--port", port)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and port in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["selftset"], "there is no such command (did you mean selftest?)"),
    (["versoin"], "(did you mean version?)"), (["xyzzy"], "no such command; --help lists"),
    (["user_secret"], "there is no such command;"), (["demo"], "(did you mean --demo?)"),
    (["claude"], "(did you mean run claude?)"), (["codx", "-p"], "(did you mean run codex?)"),
    (["--log-file", "nowhere/x.log"], "cannot be written, for there is no folder "),
    (["--prot", "1"], "--prot (did you mean --port?)"), (["--xyzzy"], "arguments: --xyzzy (python3"),
    (["--adminkey=hidden"], "--adminkey (did you mean --admin-key?)"),
    (["run", "--modle", "x", "claude"], "(did you mean --model?)"),
    (["models", "--undoo"], "arguments: --undoo --check (python3 ccproxy.py models --help)"),
    (["setup", "claude", "--undoo"], "--check (did you mean --undo?)"),
    (["service"], "install|uninstall")], ids=str)
def test_a_mistyped_word_is_told_from_what_was_meant(arguments, words):
    code, out, err = run_main(arguments, {})
    assert (code, out) == (2, "") and words in err
    assert "secret" not in err and "hidden" not in err


@pytest.mark.parametrize("arguments, command, flags, rest", [
    ("", "", {}, ""), ("serve --port 1", "", {"port": "1"}, ""), ("-p 1", "", {"port": "1"}, ""),
    ("-p=1 serve", "", {"port": "1"}, ""), ("serve -p 1", "", {"port": "1"}, ""),
    ("run claude -p hi", "run", {}, "-p hi"), ("run claude hi --port 1", "run", {}, "hi --port 1"),
    ("-p 1 run claude -p hi", "run", {"port": "1"}, "-p hi"),
    ("run --port 1 claude --host=a -p hi", "run", {"port": "1", "host": "a"}, "-p hi"),
    ("run claude --demo --model x --resume", "run", {}, "--resume"),
    ("run claude --por 1", "run", {}, "--por 1"), ("run claude --version", "run", {}, "--version"),
    ("run claude --port 1 -- --port 2", "run", {"port": "1"}, "--port 2"),
    ("run claude -- -- x", "run", {}, "-- x"), ("run claude x -- y", "run", {}, "x -- y"),
    ("run --include-reasoning claude off", "run", {"includeReasoning": "true"}, "off"),
    ("run claude --include-reasoning off on", "run", {"includeReasoning": "off"}, "on"),
    ("--use-provider-models models --json", "models", {"useProviderModels": "true"}, ""),
    ("service logs -- -f", "service", {}, "-f"), ("service install --port 1", "service",
                                                  {"port": "1"}, "")])
def test_whose_each_word_is(arguments, command, flags, rest):
    """Ours before the client's name and behind it, as long as they are our flags in full."""
    name, found, given, left = ccproxy.read_arguments_of(arguments.split())
    assert (name, found, left) == (command, flags, rest.split())
    assert name != "run" or given.client == "claude"


@pytest.mark.parametrize("words, shown", [
    (["help"], "commands (each"), (["help", "run"], "codex|opencode"), (["run", "--help"], "--model"),
    (["help", "serve"], "--watch"), (["version"], "ccproxy " + ccproxy.__version__),
    (["run", "claude", "--help"], "Start a client")])
def test_help_and_version_are_commands_too(capsys, words, shown):
    with pytest.raises(SystemExit) as ended:
        ccproxy.read_arguments_of(words)
    assert ended.value.code == 0 and shown in capsys.readouterr().out


def test_help_shows_what_matters_and_help_all_the_rest(capsys):
    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            ccproxy.read_arguments_of([word])
        text = capsys.readouterr().out
        shown[word] = {option.name for option in ccproxy.OPTIONS
                       if ccproxy.flag_name(option) + " " in text}
    assert shown["--help"] == set(ccproxy.MAIN_OPTIONS) and len(shown["--help"]) == 10
    assert shown["--help-all"] == {option.name for option in ccproxy.OPTIONS}


def test_check_shows_what_differs_first(empty):
    """What is at its default is shown with --all alone, behind the rest."""
    done = run_program("--check", "--config", empty, "--log-level", "debug", "--port", "3000")
    lines = done.stdout.splitlines()
    assert lines[0] == 'logLevel  "debug"  (--log-level)'
    assert lines[1:] == ["default values: %d options (--check --all shows them)"
                         % (len(ccproxy.OPTIONS) - 1)]
    whole = run_program("--check", "--all", "--config", empty, "--log-level", "debug")
    assert [line.split()[0] for line in whole.stdout.splitlines()] == ["logLevel"] + [
        option.name for option in ccproxy.OPTIONS if option.name != "logLevel"]


@pytest.mark.parametrize("variable, meant", [
    ("CC_LOGLEVEL", "CC_LOG_LEVEL"), ("CC_PROT", "CC_PORT"), ("CC_ADMINKEY", "CC_ADMIN_KEY"),
    ("CC_", ""), ("CC_FLAGS", ""), ("CC_x86_64_linux", ""), ("CCACHE_DIR", ""), ("CC_PORT", "")])
def test_a_variable_that_is_spelled_much_like_an_options_is_warned_about(variable, meant):
    found = ccproxy.variable_warnings({variable: "5", "HOME": "/"})
    assert found == (["environment %s is not an option (did you mean %s?)" % (variable, meant)]
                     if meant else [])


def test_the_warning_is_one_line_and_the_proxy_starts(empty):
    done = run_program("--check", "--config", empty, environment={"CC_LOGLEVEL": "s3cret"})
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "CC_LOGLEVEL" in done.stderr and "s3cret" not in done.stderr


def test_a_closed_pipe_ends_in_silence():
    """`ccproxy.py --help-all | head -1`"""
    for arguments in (["--check", "--all"], ["doctor"], ["models"]):
        process = subprocess.Popen(
            [sys.executable, PROGRAM, *arguments, "--demo"], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=clean_environment())
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        process.wait(60)


def test_an_older_python_is_told_what_is_needed():
    """3.7 and 3.8 by a sentence; the parsers of older ones stop at a line that holds one."""
    with open(PROGRAM, encoding="utf-8") as file:
        lines = file.read().splitlines()
    place = next(number for number, line in enumerate(lines) if re.match(r"\w+: \w+ = ", line))
    assert "needs Python 3.9" in lines[place] and "version_info < (3, 9)" in lines[place + 1]
    older = next((line for line in lines if line.startswith("from __future__")))
    assert "Python 3.9" in older


# The start-up screen.


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
            return True
    except OSError:
        return False


def test_the_screen(start_program, upstream, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"projectSlug": "x"}')
    program = start_program("--config", str(path))
    for part in (ccproxy.__version__, "http://127.0.0.1:%d" % program.port, upstream.base,
                 str(path), "/alpha/generate"):
        assert part in program.screen
    assert "vendor" in program.screen and "README" in program.screen
    assert "warning" not in program.screen.lower()
    assert len(program.screen.splitlines()) <= 12
    code, log = program.stop()
    assert code == 0 and "warning" not in program.screen.lower()


@pytest.mark.parametrize("host, local", [
    ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_the_curl_line_works(start_program, host, local):
    """What the screen says to copy is a request that is answered."""
    if host == "::" and not has_ipv6():
        pytest.skip("no IPv6 here")
    program = start_program("--host", host)
    lines = program.screen[program.screen.index("curl"):].split("\n")
    wanted = []
    for line in lines:
        wanted.append(line.rstrip("\\"))
        if not line.endswith("\\"):
            break
    words = shlex.split(" ".join(wanted))
    assert words[0] == "curl"
    address = next(word for word in words if word.startswith("http"))
    assert address == "http://%s:%d%s" % (local, program.port, CHAT)
    options = list(zip(words, words[1:]))
    fields = dict(value.replace("user_...", KEY).split(": ", 1)
                  for flag, value in options if flag == "-H")
    body = next(value for flag, value in options if flag == "-d")
    request = urllib.request.Request(address, body.encode(), fields)
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"] == "Hello there"


@pytest.mark.parametrize("host, warned", [("0.0.0.0", True), ("localhost", False)])
def test_a_bind_beyond_loopback_is_warned_about(start_program, host, warned):
    program = start_program("--host", host)
    assert program.request("GET", "/health").status == 200
    code, _ = program.stop()
    found = [line for line in program.screen.splitlines() if "warning" in line.lower()]
    assert code == 0 and len(found) == warned


def test_options_reach_the_running_program(start_program, upstream):
    """From the environment and from flags, not only in what --check prints."""
    program = start_program("--cli-version", "1.70.1", environment={"PROJECT_SLUG": "from-env"})
    assert program.post(CHAT).status == 200
    assert upstream.requests[0].field("x-project-slug") == "from-env"
    assert upstream.requests[0].field("x-command-code-version") == "1.70.1"


def test_two_processes_agree_on_a_session(start_program, proxy, upstream):
    """Derived, not stored: several processes give one conversation one id."""
    for one in (start_program(), proxy):
        assert one.post(CHAT).status == 200
    first, second = (request.field("x-session-id") for request in upstream.requests)
    assert first == second


def test_started_from_anywhere(upstream, tmp_path, monkeypatch):
    """The working directory does not matter, and nothing is written to it."""
    monkeypatch.chdir(tmp_path)
    program = Program("--api-base", upstream.base)
    try:
        assert program.post(CHAT).status == 200
        assert program.stop()[0] == 0
    finally:
        program.close()
    assert os.listdir(tmp_path) == []


def test_nobody_is_called_at_start(start_program):
    """No telemetry, no check: the upstream hears of us with the first request."""
    fake = FakeUpstream()
    program = start_program("--api-base", fake.base)
    assert program.request("GET", "/health").status == 200
    assert fake.connections == 0
    program.post(CHAT)
    wait_until(lambda: fake.side_requests)
    program.stop()
    assert {request.line.split(" ")[1] for request in fake.requests + fake.side_requests} == {
        "/alpha/generate", "/provider/v1/models"}
    fake.close()


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX here")
@pytest.mark.parametrize("place, expected", [
    ("\n# === ANSWER (pure)", (-signal.SIGINT, "", "")),           # while the file is read
    ("\n    leave(main())", (130, "", ""))])
def test_ctrl_c_is_no_traceback(tmp_path, place, expected):
    with open(os.path.join(os.path.dirname(PROGRAM), "ccproxy.py"), encoding="utf-8") as file:
        before, mark, after = file.read().partition(place)
    assert mark
    pressed = "import os; os.kill(os.getpid(), signal.SIGINT)\n"
    if "leave" in place:        # in a command that waits
        pressed = "    def check_surroundings(config): %s" % pressed
    (tmp_path / "ccproxy.py").write_text("%s\n%s%s%s" % (before, pressed, mark, after),
                                         encoding="utf-8")
    done = subprocess.run([sys.executable, str(tmp_path / "ccproxy.py"), "--check"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                          env=clean_environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == expected


# Outputs that cannot be written.

full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")


@full
@pytest.mark.parametrize("arguments,code", [
    (["--check"], 1), (["selftest"], 0), (["--help"], 0), (["version"], 0), (["help", "run"], 0)])
def test_a_full_standard_output(arguments, code):
    """One line, no traceback."""
    with open("/dev/full", "w") as out:
        done = subprocess.run([sys.executable, PROGRAM, *arguments], stdout=out,
                              stderr=subprocess.PIPE, encoding="utf-8", env=clean_environment(),
                              timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert "standard output: " in done.stderr


@full
def test_a_full_disk_costs_log_lines_only(start_program):
    program = start_program("--log-file", "/dev/full", "--log-level", "debug")
    assert [program.post(CHAT).status for _ in range(5)] == [200] * 5
    code, words = program.stop()
    assert code == 0
    assert len(words.splitlines()) == 1 and "lines are lost" in words
