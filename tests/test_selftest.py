"""SELFTEST: the program against itself, a line per feature, and its exit status."""
from __future__ import annotations

import http.client
import io
import logging
import re
import subprocess

import ccproxy
import pytest
from harness import PROGRAM, clean_environment, command_of, make_config

END = "all features work"
LINES = ["%s: %s, %s" % (api, name, form) for api in ("chat", "messages", "responses")
         for name, *_ in ccproxy.FEATURES for form in ("streaming", "plain")]
LINES += [name for name, *_ in ccproxy.PLAIN_FEATURES]
DEAD = "http://127.0.0.1:9"
RUNS = {        # the arguments and the environment of whole runs
    "ordinary": ([], {}),
    "LC_ALL=C": ([], {"LC_ALL": "C", "LANG": "C"}),
    "warnings are errors": ([], {"PYTHONWARNINGS": "error"}),
    "ASCII only": ([], {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
                        "PYTHONIOENCODING": "ascii"}),
    "odd options": (["--host", "127.0.0.2", "--port", "1", "--include-reasoning", "false",
                     "--default-model", "none/such", "--allow-unknown-models", "false",
                     "--empty-response-policy", "allow", "--cors-origin", "*",
                     "--api-base", DEAD],
                    {"HTTP_PROXY": DEAD, "http_proxy": DEAD, "ALL_PROXY": DEAD})}


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory):
    """All whole runs at the same time, from the first test on; looked at last."""
    empty = tmp_path_factory.mktemp("selftest") / "config.json"
    empty.write_text("{}")
    processes = {name: subprocess.Popen(
        [*command_of(PROGRAM), "selftest", "--config", str(empty), *arguments],
        env=clean_environment(**environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE) for name, (arguments, environment) in RUNS.items()}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def test_the_list_is_long():
    """Every API, streaming and not, and what all of them share."""
    assert len(LINES) == len(set(LINES)) > 50
    for words in ("text", "tool", "thinking", "picture", "usage", "refusal", "broken", "structured",
                  "count", "model lists"):
        assert any(words in line for line in LINES), words


# Runs in this process, of a few features.


def run(capsys):
    """(exit status, lines on the screen, standard error) of a selftest in this process."""
    log = logging.Logger("ccproxy-selftest")
    log.addHandler(logging.StreamHandler(io.StringIO()))
    app = ccproxy.new_app(make_config(), ccproxy.Limits(sweep=0.05), log)
    code = ccproxy.run_selftest(app)
    said = capsys.readouterr()
    assert not app.exchanges and not app.wires and not app.tasks
    return code, said.out.split("\n")[:-1], said.err


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """The demo upstream speaks without a pause between words."""
    slow = ccproxy.demo_stream
    monkeypatch.setattr(ccproxy, "demo_stream", lambda params, asked: [
        (0.0, line) for _, line in slow(params, asked)])


def keep_features(monkeypatch, names, plain=()):
    """Only these features, for the sake of time."""
    monkeypatch.setattr(ccproxy, "FEATURES", tuple(
        row for row in ccproxy.FEATURES if row[0] in names))
    monkeypatch.setattr(ccproxy, "PLAIN_FEATURES", tuple(
        row for row in ccproxy.PLAIN_FEATURES if row[0] in plain))


BREAKS = [          # what is broken in the program, and the lines that tell
    ("the reason of chat", "CHAT_REASONS", {**ccproxy.CHAT_REASONS, ccproxy.LENGTH: "stop"},
     "cut by length", r"chat: cut by length, (streaming|plain)"),
    ("the reason of messages", "STOP_REASONS", {**ccproxy.STOP_REASONS, ccproxy.LENGTH: "end_turn"},
     "cut by length", r"messages: cut by length, (streaming|plain)"),
    ("the counts of responses", "responses_usage", lambda usage: {"input_tokens": usage.input},
     "usage", r"responses: usage, (streaming|plain)"),
    ("the schema instruction", "add_format_instruction", lambda prompt: None,
     "structured output", r".*: structured output, (streaming|plain)"),
    ("the refusals' fields", "error_fields", lambda error: [], "refusals (402, 429)",
     r".*: refusals \(402, 429\), (streaming|plain)"),
    ("the count", "estimate_input", lambda prompt: 1, "", r"token counting"),
    ("the hidden key", "key_name", lambda key: key, "", r"dry run")]


@pytest.mark.parametrize("attribute, replacement, feature, broken", [row[1:] for row in BREAKS],
                         ids=[row[0] for row in BREAKS])
def test_it_sees_what_is_broken(monkeypatch, capsys, attribute, replacement, feature, broken):
    """A fault in the program is an \u2717 at its feature and at no other, and status 1."""
    keep_features(monkeypatch, ["text and unicode", feature] if feature else [],
                  ["token counting", "dry run", "model lists in both shapes"])
    monkeypatch.setattr(ccproxy, attribute, replacement)
    code, lines, _ = run(capsys)
    failed = [line for line in lines if line.startswith("\u2717 ")]
    assert code == 1 and failed and any(line[0] == "\u2713" for line in lines)
    for line in lines[:-1]:
        assert line[0] == ("\u2717" if re.fullmatch(broken, line[2:]) else "\u2713"), line
    assert lines[-1] == "%d failed" % len(failed)


SURPRISES = [OSError("gone"), ConnectionResetError("gone"), ValueError("no JSON"),
             http.client.IncompleteRead(b"half"), http.client.BadStatusLine("x"),
             http.client.RemoteDisconnected("x"), TimeoutError("late")]


@pytest.mark.parametrize("surprise", SURPRISES, ids=[type(one).__name__ for one in SURPRISES])
def test_any_surprise_means_that_it_does_not_work(monkeypatch, capsys, surprise):
    """Whatever happens to a request costs its own feature only."""
    ask = http.client.HTTPConnection.request

    def odd(connection, method, *given, **known):
        ask(connection, method, *given, **known)
        if method == "POST":
            raise surprise
    monkeypatch.setattr(http.client.HTTPConnection, "request", odd)
    keep_features(monkeypatch, ["usage"], ["model lists in both shapes"])
    code, lines, errors = run(capsys)
    assert code == 1 and lines == ["\u2717 %s: usage, %s" % (api, form) for api in (
        "chat", "messages", "responses") for form in ("streaming", "plain")] + [
            "\u2713 model lists in both shapes", "6 failed"]
    assert type(surprise).__name__ in errors and "Traceback" not in errors


@pytest.mark.parametrize("path, pattern, status", [
    ("/health", "no such word", 200), ("/health", "ok", 201), ("/nowhere", "", 200)])
def test_a_feature_that_is_not_there(monkeypatch, capsys, path, pattern, status):
    """A no is a no, without any error."""
    monkeypatch.setattr(ccproxy, "FEATURES", ())
    monkeypatch.setattr(ccproxy, "PLAIN_FEATURES", (
        ("absent", (ccproxy.Trial(path, None, pattern, status),)),))
    assert run(capsys) == (1, ["\u2717 absent", "1 failed"], "")


@pytest.mark.parametrize("word", ["self-test", "selftest selftest", "SELFTEST"])
def test_other_words_are_refused(word):
    done = subprocess.run([*command_of(PROGRAM), *word.split(" ")], env=clean_environment(),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=30,
                          stderr=subprocess.PIPE, encoding="utf-8")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


# Whole runs, as a person starts them.


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run(started, name):
    """Every feature works and has its line, and there is nothing besides but the last one."""
    out, err = started[name].communicate(timeout=60)
    lines = out.decode("ascii" if name == "ASCII only" else "utf-8").split("\n")
    mark = "ok  " if name == "ASCII only" else "\u2713"
    assert lines == ["%s %s" % (mark, line) for line in LINES] + [END, ""]
    assert started[name].returncode == 0 and err == b""
