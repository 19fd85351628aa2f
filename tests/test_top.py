"""TOP: `ccproxy.py top` on a terminal, in a pipe, and where no proxy answers."""
from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from fake_upstream import status, stream, text_answer
from harness import (CHAT, PROGRAM, Proxy, call_program, ccproxy, clean_environment, command_of,
                     make_config, run_program, wait_until)

needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals here")


class Screen:
    """A terminal with `top` on it; `text` is what it drew last."""

    def __init__(self, *arguments, columns=100, lines=30, **environment):
        import fcntl
        import struct
        import termios
        self.leader, follower = os.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        known = clean_environment(TERM="xterm", **environment)
        for name in ("COLUMNS", "LINES"):
            known.pop(name, None)
        self.process = subprocess.Popen(
            [*command_of(PROGRAM), "top", *arguments], env=known, stdin=follower, stdout=follower,
            stderr=follower, start_new_session=True)
        os.close(follower)
        self.data = b""

    def read(self, seconds=0.02):
        poll = select.poll()        # not select: a descriptor's number may be beyond 1023
        poll.register(self.leader, select.POLLIN)
        while poll.poll(1000 * seconds):
            try:
                piece = os.read(self.leader, 65536)
            except OSError:         # the last one who had it open is gone
                return
            if not piece:
                return
            self.data += piece

    @property
    def text(self):
        """The last whole drawing, without colours."""
        drawings = self.data.decode().split("\x1b[H")
        whole = [one for one in drawings if one.endswith("\x1b[J")]
        return re.sub(r"\x1b\[[0-9;]*[mKJ]", "", whole[-1]) if whole else ""

    def shows(self, words):
        wait_until(lambda: self.read() or words in self.text, 10)

    def end(self, number):
        """Its exit status after a signal, and all that it wrote last."""
        self.process.send_signal(number)
        deadline = time.monotonic() + 10
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        self.read()
        return self.process.wait(5), self.data

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self.leader)


@pytest.fixture
def open_screen():
    opened = []

    def make(*arguments, **known):
        opened.append(Screen(*arguments, **known))
        return opened[-1]
    yield make
    for screen in opened:
        screen.close()


@needs_pty
def test_a_terminal_shows_what_runs_and_what_ran(proxy, upstream, open_screen):
    upstream.default = stream(text_answer(*["word "] * 1000), cut=200, pause=0.02)
    screen = open_screen("--url", proxy.base)
    screen.shows("0 open streams")
    with proxy.send_post(CHAT, {"user-agent": "curl/8"}, stream=True, model="kimi"):
        screen.shows("answering")
        assert "moonshotai/Kimi-K3" in screen.text and "1 open stream" in screen.text
    screen.shows("the client left")
    upstream.default = status(402, {"error": {"message": "no credits"}})
    proxy.post(CHAT, model="glm")
    screen.shows("no credits")
    assert "\x1b[31m" in screen.data.decode()           # red


@needs_pty
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_however_it_ends_the_terminal_is_in_order(proxy, open_screen, number, code):
    screen = open_screen("--url", proxy.base)
    screen.shows("0 open streams")
    assert screen.data.startswith(b"\x1b[?1049h\x1b[?25l")      # other screen, no cursor
    ended, data = screen.end(number)
    assert ended == code and data.endswith(b"\x1b[?25h\x1b[?1049l")
    assert b"Traceback" not in data


@needs_pty
def test_it_fits_the_terminal_and_needs_no_colours(proxy, open_screen):
    for _ in range(20):
        proxy.post(CHAT)
    screen = open_screen("--url", proxy.base, columns=50, lines=12, NO_COLOR="1")
    screen.shows("200")
    lines = screen.text.splitlines()
    assert len(lines) == 12 and max(map(len, lines)) <= 50
    assert not re.search(rb"\x1b\[[0-9;]*m", screen.data)


@needs_pty
def test_a_terminal_that_changes_its_size(proxy, open_screen):
    import fcntl
    import struct
    import termios
    screen = open_screen("--url", proxy.base, columns=100)
    screen.shows("0 open streams")
    fcntl.ioctl(screen.leader, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 40, 0, 0))
    screen.process.send_signal(signal.SIGWINCH)
    wait_until(lambda: screen.read() or max(map(len, screen.text.splitlines())) <= 40, 5)


@needs_pty
def test_it_survives_the_end_of_the_proxy(upstream, make_proxy, open_screen):
    first = make_proxy()
    screen = open_screen("--url", first.base)
    screen.shows("0 open streams")
    first.close()
    screen.shows("asking again every second")
    assert "no answer since" in screen.text
    second = Proxy(apiBase=upstream.base, port=first.port)
    try:
        screen.shows("0 open streams")
        wait_until(lambda: screen.read() or "no answer" not in screen.text, 10)
        second.post(CHAT, model="kimi")
        screen.shows("Kimi")
    finally:
        second.close()


def top(*arguments, run=call_program, **environment):
    return run("top", *arguments, environment=environment)


def test_a_pipe_gets_it_once_as_plain_text(proxy):
    proxy.post(CHAT, model="kimi")
    for arguments in ((), ("--once",)):
        run = top("--url", proxy.base, *arguments, run=run_program)
        assert run.returncode == 0 and run.stderr == ""
        assert "0 open streams" in run.stdout and "Kimi" in run.stdout
        assert "\x1b" not in run.stdout


@needs_pty
def test_once_on_a_terminal_is_once(proxy, open_screen):
    screen = open_screen("--url", proxy.base, "--once", columns=40)
    assert screen.process.wait(20) == 0
    screen.read()
    assert b"0 open streams" in screen.data and b"\x1b[?1049h" not in screen.data


@pytest.mark.parametrize("told", ["flag", "environment"])
def test_the_address_is_that_of_the_options(proxy, told):
    run = top("--port", str(proxy.port)) if told == "flag" else top(CC_PORT=str(proxy.port))
    assert run.returncode == 0 and "127.0.0.1:%d" % proxy.port in run.stdout


@pytest.mark.parametrize("options, url, address", [
    ({}, None, "http://127.0.0.1:3000"), ({"host": "0.0.0.0"}, None, "http://127.0.0.1:3000"),
    ({"host": "::"}, None, "http://[::1]:3000"), ({"port": 0}, "https://a.b/c/", "https://a.b/c")])
def test_addresses(options, url, address):
    assert ccproxy.top_address(url, make_config(**options)) == address


@pytest.mark.parametrize("arguments", [("--url", "ftp://x"), ("--url", "http://a:99999"),
                                       ("--port", "0")])
def test_addresses_that_are_none(arguments):
    run = top(*arguments)
    assert run.returncode == 2 and arguments[0] in run.stderr and "Traceback" not in run.stderr


def test_where_no_proxy_answers():
    run = top("--url", "http://127.0.0.1:1")
    assert run.returncode == 1 and run.stdout == ""
    assert "no ccproxy answers at http://127.0.0.1:1" in run.stderr


def test_another_server_than_ccproxy(upstream):
    run = top("--url", upstream.base)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1


def test_a_proxy_that_is_too_old(proxy):
    """One that has no such path says so in its own way, which helps nobody."""
    run = top("--url", proxy.base + "/elsewhere")
    assert run.returncode == 1 and "status 404: that is no ccproxy, or too old a one" in run.stderr


ADMIN = "an-admin-key-of-some-length"


@pytest.mark.parametrize("given, code", [({"CC_ADMIN_KEY": ADMIN}, 0), ({}, 1),
                                         ({"CC_ADMIN_KEY": "wrong" + ADMIN}, 1)])
def test_the_admin_key_is_shown_to_a_proxy_that_asks(make_proxy, monkeypatch, given, code):
    monkeypatch.setattr(ccproxy.Wire, "peer_address", lambda wire: "10.0.0.1")
    proxy = make_proxy(adminKey=ADMIN)
    run = top("--url", proxy.base, **given)
    assert run.returncode == code and ADMIN not in run.stdout + run.stderr
    assert "adminKey" in run.stderr if code else "0 open streams" in run.stdout


@pytest.mark.parametrize("ours", [True, False])
def test_the_admin_key_is_for_a_proxy_of_this_account(make_proxy, monkeypatch, tmp_path, ours):
    """Without --url: what answers on the port may be anybody's."""
    state = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    seen = []
    monkeypatch.setattr(ccproxy.Wire, "peer_address", lambda wire: "10.0.0.1")
    check = ccproxy.check_reader
    monkeypatch.setattr(ccproxy, "check_reader", lambda fields, config, peer: (
        seen.append(fields), check(fields, config, peer)))
    proxy = make_proxy(adminKey=ADMIN)
    if not ours:        # it says all but the proof
        monkeypatch.setattr(ccproxy, "proof_entry", lambda app, nonce, port: {"proof": nonce})
    run = top("--port", str(proxy.port), CC_ADMIN_KEY=ADMIN, XDG_STATE_HOME=str(state))
    assert run.returncode == (0 if ours else 1), run.stderr
    assert any("authorization" in fields for fields in seen) is ours
    if not ours:
        assert "no key was sent. Add --url http://127.0.0.1:%d" % proxy.port in run.stderr
        assert len(run.stderr.splitlines()) == 1


def test_the_admin_key_is_not_shown_to_one_that_does_not_ask(proxy, monkeypatch):
    seen = []
    admit = ccproxy.admit_reader
    monkeypatch.setattr(ccproxy, "admit_reader", lambda app, exchange: (
        seen.append(exchange.head.fields), admit(app, exchange)))
    assert top("--url", proxy.base, CC_ADMIN_KEY=ADMIN).returncode == 0
    assert seen and not any("authorization" in fields for fields in seen)


def test_the_proxy_is_asked_directly(proxy):
    """HTTP_PROXY is for the upstream, and must not get the adminKey."""
    run = top("--url", proxy.base, http_proxy="http://127.0.0.1:1", run=run_program)
    assert run.returncode == 0 and "0 open streams" in run.stdout
