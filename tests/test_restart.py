"""RESTART, SOCKETS HANDED ON, PROCESSES: started again on the same sockets, nobody notices."""
from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from harness import (CHAT, KEY, PROGRAM, Program, ccproxy, clean_environment, parse_answers, post_bytes,
                     read_all, read_until, wait_until)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ADMIN = "the-admin-key"
BEARER = {"authorization": "Bearer " + ADMIN}
BODY = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def config(tmp_path):
    """A config file that can be changed."""
    path = tmp_path / "config.json"

    def write(**entries):
        path.write_text(json.dumps({"adminKey": ADMIN, "useProviderModels": False, **entries}))
        return str(path)
    write()
    write.path = path
    return write


@pytest.fixture
def go(upstream):
    """The upstream gives its `answer` from when this is set."""
    go = threading.Event()
    go.answer = upstream.default

    def late(sock, request):
        go.wait(20)
        go.answer(sock, request)
    upstream.default = late
    return go


def with_version(text, version):
    """The program's text as another version of it, and of another size: by that and by the second
    Python knows what it has compiled."""
    line = next(line for line in text.splitlines() if line.startswith("__version__"))
    return text.replace(line, line.replace(ccproxy.__version__, version) + "  # another")


@pytest.fixture
def start_copy(start_program, tmp_path):
    """(a program, the file of its own that it was started from)."""
    def start(*arguments):
        path = tmp_path / "copy" / "ccproxy.py"
        path.parent.mkdir()
        shutil.copy(PROGRAM, path)
        return start_program(*arguments, program=str(path.parent), environment={
            "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}), path
    return start


def restart(program):
    return program.request("POST", "/admin/restart", None, BEARER, None)


def screens(program):
    """Read start-up screens in the background: a list that grows by one with each start."""
    seen = [program.screen]

    def read():
        for line in program.process.stdout:
            if line.startswith("ccproxy "):
                seen.append("")
            seen[-1] += line
            if "note" in line:
                seen[-1] += "\n"
    threading.Thread(target=read, daemon=True).start()
    return seen


def started(seen, number):
    wait_until(lambda: len(seen) > number and seen[number].endswith("\n\n"), 20)


class Crowd:
    """Clients that connect anew for every request, and clients that keep their connection as long
    as the answers let them, until they are told to end."""

    def __init__(self, program, count=3):
        self.port, self.ended, self.answers, self.faults = program.port, False, 0, []
        self.threads = [threading.Thread(target=self.repeat, args=(ask,)) for ask in (
            *[self.connect_anew] * count, self.keep_connection(True), self.keep_connection(False))]
        for thread in self.threads:
            thread.start()

    def repeat(self, ask):
        while not self.ended:
            try:
                status = ask()
                assert status == 200, status
                self.answers += 1
            except (OSError, AssertionError, IndexError, http.client.HTTPException) as fault:
                self.faults.append(repr(fault))

    def connect_anew(self):
        with socket.create_connection(("127.0.0.1", self.port), 20) as sock:
            sock.sendall(post_bytes(CHAT, BODY, {"connection": "close"}))
            return parse_answers(read_all(sock))[0].status

    def keep_connection(self, stream):
        """A client that comes anew only when it was told to, as http.client does."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

        def ask():
            connection.request("POST", CHAT, json.dumps({**BODY, "stream": stream}),
                               {"authorization": "Bearer " + KEY})
            answer = connection.getresponse()
            answer.read()
            time.sleep(0.01)
            return answer.status
        return ask

    def end(self):
        self.ended = True
        for thread in self.threads:
            thread.join(20)


def test_no_connection_is_refused_or_reset(start_program, config):
    """Several restarts under traffic: every request is answered, and the process stays."""
    program = start_program("--config", config())
    seen = screens(program)
    crowd = Crowd(program)
    try:
        for number in range(1, 4):
            before = crowd.answers
            wait_until(lambda: crowd.answers > before + 5)
            assert restart(program).json == {"status": "restarting"}
            started(seen, number)
        before = crowd.answers
        wait_until(lambda: crowd.answers > before + 5)
    finally:
        crowd.end()
    assert crowd.faults == [] and program.process.poll() is None
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(20) == 0
    assert "Traceback" not in program.log


def test_a_stream_that_runs_is_finished(start_program, config, upstream, go):
    program = start_program("--config", config())
    seen = screens(program)
    with program.send_post(CHAT, stream=True) as sock:
        wait_until(lambda: upstream.requests)
        assert restart(program).status == 202
        wait_until(lambda: "stopping: 1 request in progress" in program.log)
        assert "in progress; new requests wait for 30 seconds at most" in program.log
        with program.connect() as other:        # waits in the system, for the new program
            other.sendall(post_bytes("/v1/models", {}, {"connection": "close"}).replace(b"POST", b"GET"))
            upstream.default = go.answer
            go.set()
            data = read_until(sock, b"0\r\n\r\n")
            assert b"[DONE]" in data
            started(seen, 1)
            assert read_all(other).startswith(b"HTTP/1.1 200 ")


def test_a_restart_waits_for_as_long_as_is_asked_for(start_program, config, upstream, go):
    """drain=N ends what still runs after N seconds, so that new requests wait no longer."""
    program = start_program("--config", config(drainSeconds=20))
    seen = screens(program)
    for words in ("drain=21", "drain=-1", "drain=x", "drain=", "drain=1&drain=1e9"):
        answer = program.request("POST", "/admin/restart?" + words, b"", BEARER, None)
        assert answer.status == 400 and answer.json["error"]["param"] == "drain"
        assert "from 0 to 20 (drainSeconds)" in answer.json["error"]["message"]
    with program.send_post(CHAT, stream=True) as sock:
        wait_until(lambda: upstream.requests)
        answer = program.request("POST", "/admin/restart?drain=0.2", b"", BEARER, None)
        assert answer.status == 202
        assert b"shutting down" in read_all(sock)       # while the upstream has not answered yet
        started(seen, 1)
        go.set()
    assert program.post(CHAT).status == 200


def test_a_start_and_a_restart_leave_a_line_in_the_log(start_program, config, tmp_path):
    log = tmp_path / "proxy.log"
    program = start_program("--config", config(logFile=str(log)))
    seen = screens(program)
    assert restart(program).status == 202
    started(seen, 1)
    wait_until(lambda: "started again: ccproxy" in log.read_text())
    lines = [line for line in log.read_text().splitlines() if " started" in line]
    address = "http://127.0.0.1:%d, process %d" % (program.port, program.process.pid)
    assert [line.partition(" INFO ")[2] for line in lines] == [
        "%s: ccproxy %s on %s" % (word, ccproxy.__version__, address)
        for word in ("started", "started again")]


def test_new_code_and_a_new_configuration_are_in_effect(start_copy, config, tmp_path):
    """Also what waits for a start, such as usageDb."""
    database = str(tmp_path / "usage.db")
    program, program_file = start_copy("--config", config())
    seen = screens(program)
    pid = program.process.pid
    assert program.request("GET", "/health").json["version"] == ccproxy.__version__
    program_file.write_text(with_version(program_file.read_text(), "9.8.7"))
    answer = program.request("PUT", "/admin/config", {"usageDb": database, "defaultModel": "glm"}, BEARER, None)
    assert answer.json == {"applied": ["defaultModel"], "restart_needed": ["usageDb"], "overridden": {}}
    assert program.post(CHAT).status == 200 and not os.path.exists(database)
    assert restart(program).status == 202
    started(seen, 1)
    assert program.request("GET", "/health").json["version"] == "9.8.7"
    assert program.process.pid == pid and "ccproxy 9.8.7 on http://127.0.0.1:%d" % program.port in seen[1]
    assert [program.post(CHAT).status for _ in range(6)] == [200] * 6
    wait_until(lambda: os.path.exists(database))


def test_what_would_not_start_is_not_tried(start_copy, config):
    program, program_file = start_copy("--config", config())
    good = program_file.read_text()
    program_file.write_text(good.replace("def main(", "def main(("))
    answer = restart(program)
    assert answer.status == 409 and "would not start again" in answer.json["error"]["message"]
    assert "(ccproxy.py, line " in answer.json["error"]["message"]
    program_file.write_text(good.replace("def main(", "raise SystemExit('no luck')\ndef main("))
    answer = restart(program)
    assert answer.status == 409 and "no luck" in answer.json["error"]["message"]
    program_file.write_text(good)
    config(logLevel="loud")
    answer = restart(program)
    assert answer.status == 409 and "logLevel must be one of" in answer.json["error"]["message"]
    config.path.write_text("{")
    assert restart(program).status == 409
    assert program.post(CHAT).status == 200 and "stopping" not in program.log


def test_an_address_that_is_taken_is_not_tried(tmp_path, upstream):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"adminKey": ADMIN, "port": 0, "apiBase": upstream.base}))
    process = subprocess.Popen([sys.executable, PROGRAM, "--config", str(path)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=clean_environment(), encoding="utf-8")
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            path.write_text(json.dumps({"adminKey": ADMIN, "port": taken.getsockname()[1]}))
            program = type("Place", (), {"port": port})
            answer = ask(program, "POST", "/admin/restart")
            assert answer.status == 409 and "cannot be had" in answer.json["error"]["message"]
        assert ask(program, "POST", "/admin/restart").status == 202     # it is free now

        def moved():
            program.port = json.loads(path.read_text())["port"]
            try:
                return ask(program, "GET", "/health").status == 200
            except OSError:
                return False
        wait_until(moved)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(program, method, path):
    with socket.create_connection(("127.0.0.1", program.port), 20) as sock:
        sock.sendall(("%s %s HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %s\r\nconnection: close"
                      "\r\n\r\n" % (method, path, ADMIN)).encode())
        return parse_answers(read_all(sock))[0]


def test_the_demo_starts_again_too(config):
    program = Program("--demo", "--config", config(), until="-d ")
    try:
        pid = program.process.pid
        assert restart(program).status == 202
        wait_until(lambda: "starting again" in program.log)
        assert program.post(CHAT, key=None).status == 200
        assert program.process.pid == pid
        assert program.stop()[0] == 0
    finally:
        program.close()


def test_a_signal_starts_again_too(start_program, config):
    program = start_program("--config", config())
    seen = screens(program)
    program.process.send_signal(signal.SIGUSR2)
    started(seen, 1)
    assert program.post(CHAT).status == 200
    config(logLevel="loud")
    program.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "would not start again" in program.log)
    assert program.post(CHAT).status == 200 and len(seen) == 2


def test_a_stop_in_the_middle_of_a_restart_is_a_stop(start_program, config, upstream, go):
    program = start_program("--config", config())
    with program.send_post(CHAT, stream=True) as sock:
        wait_until(lambda: upstream.requests)
        assert restart(program).status == 202
        wait_until(lambda: "stopping: 1 request in progress" in program.log)
        program.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionError):    # the signal has arrived, but ends no answer
            while True:
                program.connect().close()
        go.set()
        assert b"[DONE]" in read_all(sock)
        assert program.wait()[0] == 0
    assert "Traceback" not in program.log and program.screen.count("on http") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output_and_error(config):
    """It starts, and starts again."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--demo", "--config", config(),
             "--port", str(port)], stdin=subprocess.DEVNULL, stdout=full, stderr=full,
            env=clean_environment())

    def ask(method, path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request(method, path, headers=BEARER)
            return json.loads(connection.getresponse().read())
        except ConnectionError:         # not yet there
            return {}
        finally:
            connection.close()
    try:
        # A restart takes a third of a second where nothing else runs: old enough to tell it by age.
        wait_until(lambda: ask("GET", "/health").get("uptime_seconds", 0) >= 1, 20)
        begun = time.monotonic() - ask("GET", "/health")["uptime_seconds"]
        assert ask("POST", "/admin/restart") == {"status": "restarting"}
        wait_until(lambda: time.monotonic() - ask("GET", "/health").get(
            "uptime_seconds", 1e9) > begun + 0.5, 20)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


BOTH_AT_ONCE = '''
import asyncio, signal, sys
sys.path.insert(0, %r)
import ccproxy
actions, add = {}, asyncio.SelectorEventLoop.add_signal_handler
def note(loop, number, action):
    actions[number] = action
    add(loop, number, action)
asyncio.SelectorEventLoop.add_signal_handler = note
begin = ccproxy.begin_restart
def begin_and_stop(app):
    %s
ccproxy.begin_restart = begin_and_stop
ccproxy.leave(ccproxy.main())
'''


@pytest.mark.parametrize("order", ["begin(app); actions[signal.SIGTERM]()",
                                   "actions[signal.SIGTERM](); begin(app)"])
def test_a_restart_and_a_stop_at_once_are_a_stop(start_program, config, tmp_path, order):
    """Before the program has come to either."""
    script = tmp_path / "both.py"
    script.write_text(BOTH_AT_ONCE % (os.path.dirname(PROGRAM), order))
    program = start_program("--config", config(), program=str(script))
    assert restart(program).status == 202
    code, words = program.wait()
    assert code == 0 and "Traceback" not in words and program.screen.count(" on http") == 1


def test_who_may(start_program, config):
    program = start_program("--config", config())
    assert program.request("POST", "/admin/restart", None, {}, None).status == 401
    assert program.request("GET", "/admin/restart", None, BEARER, None).status == 405
    assert program.request("GET", "/admin/config", None, {}, None).json["restart"] is True


def test_a_proxy_that_another_program_runs_cannot(make_proxy):
    answer = make_proxy(adminKey=ADMIN).request("POST", "/admin/restart", None, BEARER, None)
    assert answer.status == 501 and "Windows" in answer.json["error"]["message"]


# --watch.


def test_watch(start_copy, config, tmp_path):
    """The program, its config and the operator's keys: each change starts it again, once."""
    keys = tmp_path / "keys.json"
    keys.write_text('["user_one1111"]')
    os.chmod(str(keys), 0o600)
    entries = {"clientKey": "word", "credentialsFile": str(keys)}
    program, program_file = start_copy("--watch", "--config", config(**entries))
    seen = screens(program)
    config(defaultModel="glm", **entries)
    started(seen, 1)
    keys.write_text('["user_one1111", "user_two2222"]')
    started(seen, 2)
    assert program.request("GET", "/health").json["operator_keys"] == 2
    good = program_file.read_text()
    program_file.write_text(good.replace("def main(", "def main(("))
    wait_until(lambda: "has changed: The program would not start again" in program.log)
    program_file.write_text(with_version(good, "7.8.9"))
    started(seen, 3)
    assert program.request("GET", "/health").json["version"] == "7.8.9"
    config(logLevel="loud")
    wait_until(lambda: "logLevel must be one of" in program.log)
    assert program.post(CHAT).status == 200 and len(seen) == 4


def test_what_is_written_over_http_is_no_change_to_watch(start_program, config):
    program = start_program("--watch", "--config", config())
    assert program.request("PUT", "/admin/config", {"logLevel": "debug"}, BEARER, None).status == 200
    time.sleep(0.4)         # twice as long as it would need
    assert "has changed" not in program.log


# What is handed on is looked at.


def test_only_listening_sockets_of_ours_are_taken_over(monkeypatch):
    config = ccproxy.read_config({}, {}, {"port": 0}, "")[0]
    with socket.socket() as listening, socket.socket() as other, open(os.devnull) as file:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        good = listening.dup()
        numbers = [good.fileno(), other.fileno(), file.fileno(), 0, 9999, "x", None, -1]

        def told(**more):
            monkeypatch.setenv(ccproxy.HANDED_ON, json.dumps({
                "process": os.getpid(), "host": config.host, "port": 0, "sockets": [numbers], **more}))
            return ccproxy.take_over(config)
        assert told(process=1) == [] and ccproxy.HANDED_ON not in os.environ
        taken, = told()
        assert taken.fileno() == good.detach() and not taken.get_inheritable()
        taken.close()
        assert os.fstat(other.fileno()) and os.fstat(file.fileno())     # left open


def test_sockets_of_several_processes_are_all_taken_over(monkeypatch):
    """As versions that had those told of them; what is handed on is read by them too."""
    config = ccproxy.read_config({}, {}, {"port": 0}, "")[0]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    numbers = [sock.detach() for sock in sockets]
    monkeypatch.setenv(ccproxy.HANDED_ON, json.dumps({
        "process": os.getpid(), "host": config.host, "port": 0, "sockets": [numbers[:1], numbers[1:]]}))
    taken = ccproxy.take_over(config)
    assert [sock.fileno() for sock in taken] == numbers
    ccproxy.hand_on(taken, config)
    assert json.loads(os.environ[ccproxy.HANDED_ON])["sockets"] == [numbers]
    assert all(map(os.get_inheritable, numbers))
    moved = config._replace(port=1)
    assert ccproxy.take_over(moved) == []       # and closed, for it listens elsewhere now
    for sock in taken:
        sock.detach()


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"process": 1}', '{"sockets": 5}', '{"sockets": [5]}',
                                  '{"process": %d, "sockets": [5]}' % os.getpid(),
                                  '{"process": %d, "sockets": [[[5]]]}' % os.getpid()])
def test_nonsense_is_not_taken_over(monkeypatch, text):
    monkeypatch.setenv(ccproxy.HANDED_ON, text)
    assert ccproxy.take_over(ccproxy.read_config({}, {}, {}, "")[0]) == []
