"""PROCESSES: signals, and the order in which a process ends."""
from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from fake_upstream import CHUNKED_HEAD, chunked, stall
from harness import (CHAT, PROGRAM, clean_environment, command_of, read_all, run_program,
                     wait_until)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")


def test_whoever_started_us_ignored_the_ends_of_children(start_program, tmp_path):
    """Which is inherited: what fails in a check is told all the same."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"adminKey": "the-admin-key"}))
    known = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        program = start_program("--config", str(config))
    finally:
        signal.signal(signal.SIGCHLD, known)
    config.write_text('{"logLevel": "loud"}')
    answer = program.request("POST", "/admin/restart", None, {
        "authorization": "Bearer the-admin-key"}, None)
    assert answer.status == 409 and "would not start again" in answer.json["error"]["message"]
    assert program.stop()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(start_program, number):
    code, words = start_program().stop(number)
    assert code == 0 and "Traceback" not in words


def test_running_answers_are_finished_first(start_program, upstream):
    program = start_program()
    go = threading.Event()

    def late(sock, request):
        go.wait(10)
        upstream_answer(sock, request)
    upstream_answer, upstream.default = upstream.default, late
    with program.send_post(CHAT, stream=True) as sock:
        wait_until(lambda: upstream.requests)
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping: 1 request in progress" in program.log)
        go.set()
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            piece = sock.recv(65536)
            assert piece, data
            data += piece
    assert b"[DONE]" in data
    assert program.wait()[0] == 0


def test_a_busy_port(start_program):
    done = run_program("--port", str(start_program().port))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "in use" in done.stderr


def test_a_fixed_port_is_free_again(start_program):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    for _ in range(2):
        done = subprocess.Popen([*command_of(PROGRAM), "--port", port],
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                env=clean_environment())
        while b"note" not in done.stdout.readline():
            assert done.poll() is None
        done.send_signal(signal.SIGTERM)
        assert done.wait(20) == 0
        done.stdout.close()


# drainDelaySeconds.


def test_requests_are_served_while_balancers_are_sent_away(start_program, upstream):
    """After a signal /health is 503, all else goes on, and every answer says goodbye."""
    program = start_program("--drain-delay-seconds", "600")
    kept = http.client.HTTPConnection("127.0.0.1", program.port, timeout=20)
    kept.request("GET", "/health")
    answer = kept.getresponse()
    assert (answer.status, answer.getheader("connection")) == (200, None) and answer.read()
    program.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping in 600 seconds" in program.log)
    health = program.request("GET", "/health")
    assert (health.status, health.json["status"]) == (503, "draining")
    for _ in range(4):
        answer = program.post(CHAT, stream=True)
        assert (answer.status, answer.fields["connection"]) == (200, "close")
    kept.request("GET", "/v1/models")           # a connection from before is served once more
    answer = kept.getresponse()
    assert (answer.status, answer.getheader("connection")) == (200, "close")
    kept.close()
    code, words = program.stop()                # a second signal hurries
    assert code == 0 and "Traceback" not in words


def test_a_second_signal_is_offered_and_is_not_told_as_the_clients(start_program, upstream):
    upstream.default = stall(CHUNKED_HEAD + chunked(b'{"type":"start"}\n'))
    program = start_program("--drain-seconds", "60")
    with program.send_post(CHAT, stream=True):
        wait_until(lambda: upstream.requests)
        program.process.send_signal(signal.SIGINT)
        wait_until(lambda: "at most 60 seconds more (drainSeconds), a second" in program.log)
        code, words = program.stop(signal.SIGINT)
    assert code == 0 and "the client left" not in words
    assert re.search(" 503 .*the proxy stopped first|The proxy is shutting down", words)


def test_the_delay_ends(start_program):
    program = start_program("--drain-delay-seconds", "0.3")
    began = time.monotonic()
    program.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping in 0.3 seconds" in program.log)
    assert program.post(CHAT).status == 200
    assert program.wait()[0] == 0 and time.monotonic() - began >= 0.3
    with pytest.raises(ConnectionRefusedError):
        program.connect()


def test_without_a_delay_the_port_is_closed_at_once(start_program, upstream):
    go = threading.Event()

    def late(sock, request):
        go.wait(10)
        answer(sock, request)
    answer, upstream.default = upstream.default, late
    program = start_program()
    with program.send_post(CHAT):
        wait_until(lambda: upstream.requests)
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping: " in program.log)
        with pytest.raises(ConnectionRefusedError):
            program.connect()
        go.set()
        assert program.wait()[0] == 0


def test_a_connection_that_was_just_opened_is_served(start_program):
    """Its request is on the way when the signal comes."""
    program = start_program()
    with program.connect() as sock:
        wait_until(lambda: program.request("GET", "/health").status == 200)     # it is accepted
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping: " in program.log)
        sock.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
        data = read_all(sock)
    assert data.startswith(b"HTTP/1.1 200 ") and b"connection: close" in data
    assert program.wait()[0] == 0
