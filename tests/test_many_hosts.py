"""Several processes or hosts: two instances behind a real HAProxy or nginx, as the README configures them."""
from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from fake_upstream import (CHUNKED_HEAD, FakeUpstream, chunked, ndjson, stall, stream, text_answer)
from harness import CHAT, KEY, MESSAGES, Program, Proxy, read_until, wait_until

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BALANCERS = ("haproxy", "nginx")
INSTANCE = ("--use-provider-models", "false", "--drain-delay-seconds", "2", "--drain-seconds", "20",
            "--operator-keys", "loopback")
SURROUNDING = """pid {folder}/pid; error_log stderr; worker_processes 1;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
    include {folder}/ccproxy.conf;
}}
"""


def as_written(name):
    """The README's configuration of this program."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        (found,) = re.findall(r"(?ms)^```%s\n(.*?)^```$" % name, file.read())
    return found


def command_for(name, folder, text):
    """What starts a balancer in the foreground with this configuration."""
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("%s is not installed" % name)
    own = os.path.join(folder, "ccproxy.conf")
    with open(own, "w", encoding="utf-8") as file:
        file.write(text)
    if name == "haproxy":
        return [program, "-f", own]
    whole = os.path.join(folder, "nginx.conf")
    with open(whole, "w", encoding="utf-8") as file:
        file.write(SURROUNDING.format(folder=folder))
    return [program, "-p", folder, "-c", whole, "-e", "stderr"]


@pytest.mark.parametrize("name, check", [("haproxy", "-c"), ("nginx", "-t")])
def test_the_configuration_is_accepted_as_it_is_written(name, check, tmp_path):
    done = subprocess.run([*command_for(name, str(tmp_path), as_written(name)), check],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
    assert done.returncode == 0, done.stdout
    assert b"WARNING" not in done.stdout and b"[warn]" not in done.stdout


class Balancer:
    """HAProxy or nginx in front of instances; only addresses differ from the README, and HAProxy
    asks for the health more often, so that tests need not wait."""

    def __init__(self, name, folder, programs):
        self.name, self.folder = name, str(folder)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.text = as_written(name)
        self.change(" :8080 " if name == "haproxy" else " 8080;",
                    (" 127.0.0.1:%d " if name == "haproxy" else " 127.0.0.1:%d;") % self.port)
        for number, program in enumerate(programs, 1):
            self.change("10.0.0.1%d:3000" % number, "127.0.0.1:%d" % program.port)
        if name == "haproxy":
            self.change("inter 2s fastinter 500ms", "inter 200ms fastinter 100ms")
        arguments = command_for(name, self.folder, self.text)
        arguments += ["-db"] if name == "haproxy" else ["-g", "daemon off;"]
        self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
        wait_until(self.listens)

    def change(self, old, new):
        assert self.text.count(old) == 1, old
        self.text = self.text.replace(old, new)

    def listens(self):
        try:
            return self.request("GET", "/health").status == 200
        except OSError:
            assert self.process.poll() is None
            return False

    connect, request = Proxy.connect, Proxy.request
    post, send_post = Proxy.post, Proxy.send_post

    def close(self):
        self.process.terminate()
        self.process.wait(20)


def start_instance(upstream):
    return Program("--api-base", upstream.base, *INSTANCE,
                   environment={"COMMANDCODE_API_KEY": "user_operator"})


@pytest.fixture(scope="module")
def hosts():
    """(upstream, two instances)"""
    upstream = FakeUpstream()
    programs = [start_instance(upstream) for _ in range(2)]
    yield upstream, programs
    for program in programs:
        program.close()
    upstream.close()


@pytest.fixture(scope="module", params=BALANCERS)
def balanced(request, hosts, tmp_path_factory):
    balancer = Balancer(request.param, tmp_path_factory.mktemp(request.param), hosts[1])
    yield balancer
    balancer.close()


def streams_of(program):
    return program.request("GET", "/health").json["open_streams"]


def served_by(program):
    return program.log.count(" api=chat ")


def test_streams_run_through_both_event_by_event(hosts, balanced):
    """No event waits for the next one: each is read before the next is sent."""
    upstream, programs = hosts
    words, turns = ["one", "two", "three"], [threading.Event() for _ in range(4)]

    def by_turns(sock, request):
        sock.sendall(CHUNKED_HEAD)
        for word, turn in zip(words, turns):
            sock.sendall(chunked(ndjson({"type": "text-delta", "id": "0", "text": word})))
            assert turn.wait(10)
        sock.sendall(chunked(text_answer("end")) + b"0\r\n\r\n")
    upstream.scripts = [by_turns, by_turns]
    socks = [balanced.send_post(path, stream=True) for path in (CHAT, MESSAGES)]
    for word, turn in zip(words, turns):
        for sock in socks:
            read_until(sock, b'"%s"' % word.encode())
        assert [streams_of(program) for program in programs] == [1, 1]
        turn.set()
    for sock, last in zip(socks, (b"[DONE]", b"message_stop")):
        read_until(sock, last)
        sock.close()


def test_a_conversation_has_one_id_on_either(hosts, balanced):
    upstream, programs = hosts
    before = [served_by(program) for program in programs]
    del upstream.requests[:]
    for _ in range(8):
        assert balanced.post(CHAT).status == 200
    assert len(upstream.requests) == 8
    assert len({request.field("x-session-id") for request in upstream.requests}) == 1
    wait_until(lambda: all(served_by(program) > count for program, count in zip(programs, before)))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_ends_its_upstream_call(hosts, balanced, streaming):
    upstream, _ = hosts
    ended = threading.Event()

    def silent(sock, request):
        stall()(sock, request)
        ended.set()
    upstream.scripts, before = [silent], len(upstream.requests)
    sock = balanced.send_post(CHAT, stream=streaming)
    wait_until(lambda: len(upstream.requests) > before)
    sock.close()
    assert ended.wait(5)


@pytest.mark.parametrize("path", ["/admin/state", "/v1/admin/state", "//Admin/state", "/dashboard",
                                  "/metrics", "/admin/commandcode/credentials"])
def test_what_is_the_operators_is_not_reached_from_outside(balanced, path):
    for host in ("127.0.0.1", "localhost:3000"):
        assert balanced.request("GET", path, None, {"host": host}).status == 404


def test_nobody_who_comes_through_counts_as_this_machines_user(hosts, balanced):
    """The instance lends its key to callers on its own machine, not to the balancer's clients."""
    fields = {"host": "localhost", "content-type": "application/json"}
    assert hosts[1][0].post(CHAT, fields, key=None).status == 200
    assert balanced.post(CHAT, fields, key=None).status == 403


class Traffic:
    """Clients that send one request after another, streamed and not, and note what fails."""

    def __init__(self, balancer, clients=6):
        self.balancer, self.done, self.failures = balancer, [], []
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(number % 2 == 0,), daemon=True)
                        for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self, streaming):
        connection = http.client.HTTPConnection("127.0.0.1", self.balancer.port, timeout=20)
        body = json.dumps({"stream": streaming, "messages": [{"role": "user", "content": "hi"}]})
        end = b"[DONE]\n\n" if streaming else b"}"
        while not self.over.is_set():
            try:
                connection.request("POST", CHAT, body, {"authorization": "Bearer " + KEY})
                answer = connection.getresponse()
                data = answer.read()
                if answer.status != 200 or not data.endswith(end):
                    self.failures.append((answer.status, data[-300:]))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
                connection.close()
            self.done.append(1)
        connection.close()

    def wait_for(self, more):
        """Wait until so many more requests are over."""
        wanted = len(self.done) + more
        wait_until(lambda: len(self.done) >= wanted, 20)

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join(20)


def refuses(program):
    try:
        program.connect().close()
    except OSError:
        return True
    return False


@pytest.fixture
def own_hosts(tmp_path):
    """(upstream, two instances, HAProxy in front of them), for a test that stops them"""
    upstream = FakeUpstream()
    upstream.default = stream(text_answer(*["word "] * 8), cut=120, pause=0.01)
    programs = [start_instance(upstream) for _ in range(2)]
    balancer = Balancer("haproxy", tmp_path, programs)
    yield upstream, programs, balancer
    balancer.close()
    for program in programs:
        program.close()
    upstream.close()


def test_one_instance_stops_in_mid_traffic_and_no_request_fails(own_hosts):
    """Nor is one sent twice; and a stream that outlives its instance's port goes on to its end."""
    upstream, (leaving, staying), balancer = own_hosts
    go = threading.Event()

    def long(sock, request):
        sock.sendall(CHUNKED_HEAD + chunked(ndjson({"type": "text-delta", "id": "0", "text": "a"})))
        go.wait(20)
        sock.sendall(chunked(text_answer("end")) + b"0\r\n\r\n")
    upstream.scripts = [long, long]
    socks = [balancer.send_post(CHAT, stream=True) for _ in range(2)]   # one on each
    wait_until(lambda: streams_of(leaving) == streams_of(staying) == 1)
    traffic = Traffic(balancer)
    try:
        traffic.wait_for(40)
        leaving.process.send_signal(signal.SIGTERM)
        wait_until(lambda: leaving.request("GET", "/health").status == 503)
        assert leaving.post(CHAT).status == 200         # it serves on meanwhile
        wait_until(lambda: refuses(leaving), 20)
        traffic.wait_for(40)
        go.set()
        for sock in socks:
            read_until(sock, b"[DONE]")
            sock.close()
        assert leaving.wait()[0] == 0
        traffic.wait_for(10)
    finally:
        traffic.stop()
    assert traffic.failures == []
    assert served_by(leaving) > 10
    wait_until(lambda: served_by(leaving) + served_by(staying) == len(traffic.done) + 3)
    assert len(upstream.requests) == len(traffic.done) + 3
