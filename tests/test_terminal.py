"""TERMINAL: what commands print on a terminal, into a pipe, and where nobody reads."""
from __future__ import annotations

import io
import os
import sys

import pytest
from harness import ccproxy

pty = pytest.importorskip("pty") if sys.platform != "win32" else None


class Stream(io.StringIO):
    """A terminal or a pipe of some encoding."""

    def __init__(self, terminal=True, encoding="utf-8"):
        super().__init__()
        self.terminal, self.named = terminal, encoding

    encoding = property(lambda self: self.named)

    def isatty(self):
        return self.terminal

    def write(self, text):
        text.encode(self.named)
        return super().write(text)


@pytest.fixture
def out(monkeypatch):
    """Standard output and error are such streams; NO_COLOR and TERM of the machine do not matter."""
    def put(**known):
        stream = Stream(**known)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, stream)
        return stream
    for name in ("NO_COLOR", "WT_SESSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return put


@pytest.mark.parametrize("terminal, environment, painted", [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False),
    (True, {"NO_COLOR": ""}, True), (True, {"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_want_them(out, monkeypatch, terminal, environment, painted):
    out(terminal=terminal)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ccproxy.paint("a", "red") == ("\x1b[31ma\x1b[0m" if painted else "a")


@pytest.mark.parametrize("encoding, lines", [
    ("utf-8", "\u2713 good\n\u2717 bad\n- unknown\n"),
    ("ascii", "ok   good\nFAIL bad\n- unknown\n"), ("cp1252", "ok   good\nFAIL bad\n- unknown\n"),
    ("cp949", "ok   good\nFAIL bad\n- unknown\n")])
def test_ticks_in_every_encoding(out, encoding, lines):
    stream = out(terminal=False, encoding=encoding)
    for works, name in ((True, "good"), (False, "bad"), (None, "unknown")):
        ccproxy.show_feature(works, name)
    assert stream.getvalue() == lines


def test_what_an_encoding_lacks_is_said_all_the_same(out):
    stream = out(terminal=False, encoding="ascii")
    assert ccproxy.say("caf\u00e9 \u2026 \ud55c\n") and stream.getvalue() == "caf? ... ?\n"


def test_progress_is_gone_afterwards(out):
    stream = out()
    ccproxy.show_progress("asking the upstream\u2026")
    ccproxy.show_progress("")
    screen = [" "] * 200        # what a terminal would show of it
    at = 0
    for letter in stream.getvalue():
        if letter == "\r":
            at = 0
        else:
            assert letter != "\n"
            screen[at] = letter
            at += 1
    assert "asking" in stream.getvalue() and "".join(screen).strip() == "" and at == 0


def test_progress_is_nothing_in_a_pipe(out):
    stream = out(terminal=False)
    ccproxy.show_progress("asking")
    assert stream.getvalue() == ""


def test_streams_that_are_no_streams(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        assert ccproxy.paint("a", "red") == "a" and ccproxy.terminal_width() == 0


@pytest.mark.skipif(pty is None, reason="no pseudo terminals here")
def test_a_real_terminal(monkeypatch):
    """The width is the terminal's own, and standard output that is one counts as one."""
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as stream, os.fdopen(leader, "rb"):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", "61")
        assert ccproxy.is_terminal(stream) and ccproxy.terminal_width() == 61
