"""What tests share: a proxy in a thread of this process, and small clients for it."""
from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import ccproxy  # noqa: E402

KEY = "user_testkey123"
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
BARE = sys.platform != "win32" and not os.environ.get("CCPROXY_TEST_TRANSPORTS")
UPSTREAM_API = os.environ.get("CCPROXY_TEST_UPSTREAM", "")     # see tests/fake_upstream.py
if UPSTREAM_API:
    ccproxy.UPSTREAMS["provider"] = lambda model, endpoints: {
        "openai": ccproxy.OPENAI, "anthropic": ccproxy.ANTHROPIC}[UPSTREAM_API]
FAST = ccproxy.Limits(backoff=(0.01, 0.02), sweep=0.05, linger=0.5, news=0.05)


def make_config(**options: Any) -> Any:
    """A configuration with these options (in camelCase) set, the rest at their defaults."""
    return ccproxy.read_config({}, {}, options, "test")[0]


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    fields: Dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def frames(self) -> List[Any]:
        """The JSON of every SSE frame, in order."""
        return [json.loads(line[6:]) for line in self.body.decode().split("\n")
                if line.startswith("data: {")]

    @property
    def comments(self) -> List[str]:
        return [line[2:] for line in self.body.decode().split("\n") if line.startswith(": ")]


class Proxy:
    """ccproxy in a thread with a loop of its own."""

    def __init__(self, limits: Any = FAST, bare: bool = BARE, **options: Any) -> None:
        """`bare` False: with asyncio's own transports, as on Windows."""
        self.log = io.StringIO()
        logger = logging.Logger("ccproxy-test")
        handler = logging.StreamHandler(self.log)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel("DEBUG")
        self.asyncio_log = logging.getLogger("asyncio")
        self.asyncio_log.addHandler(handler)
        self.handler = handler
        if UPSTREAM_API:
            options.setdefault("upstream", "provider")
        config = make_config(**{"port": 0, **options})
        self.app = ccproxy.new_app(config, limits, logger)
        self.app.bare = bare
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        server = self.server = await ccproxy.listen(self.app)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stop.wait()
        server.close()
        await ccproxy.drain(self.app, self.hurry)

    def close(self, hurry: bool = True) -> None:
        """Stop in order; in a hurry nothing that runs is waited for.  Again is harmless."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.signal, hurry)
        self.thread.join(10)
        self.asyncio_log.removeHandler(self.handler)
        assert not self.thread.is_alive()

    def signal(self, hurry: bool = False) -> None:
        if hurry:
            self.hurry.set()
        self.stop.set()

    @property
    def base(self) -> str:
        return "http://127.0.0.1:%d" % self.port

    def connect(self, timeout: float = 10.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def request(self, method: str, path: str, body: Any = None,
                fields: Optional[Dict[str, str]] = None, key: Optional[str] = KEY) -> Answer:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = dict(fields or {})
        if key:
            headers.setdefault("authorization", "Bearer " + key)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value
                                          in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, path: str, fields: Optional[Dict[str, str]] = None, key: Optional[str] = KEY,
             **body: Any) -> Answer:
        """A generating request with one user message unless `messages` are given."""
        if "messages" not in body:
            body["messages"] = [{"role": "user", "content": "hi"}]
        if path == MESSAGES:
            body.setdefault("max_tokens", 1000)
        return self.request("POST", path, body, fields, key)

    def send_post(self, path: str, fields: Optional[Dict[str, str]] = None,
                  **body: Any) -> socket.socket:
        """A connection on which a generating request was sent and nothing read yet."""
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
        body.setdefault("max_tokens", 1000)
        sock = self.connect()
        sock.sendall(post_bytes(path, body, fields))
        return sock

    def raw(self, data: bytes, timeout: float = 5.0) -> bytes:
        """Send bytes as they are and read until the other side closes or is silent."""
        with self.connect(timeout) as sock:
            sock.sendall(data)
            return read_all(sock)

    def wait_quiet(self, seconds: float = 5.0) -> None:
        """Wait until no request runs and all log lines are written."""
        wait_until(lambda: not self.app.exchanges and not self.app.relays, seconds)


def post_bytes(path: str, body: Any, fields: Optional[Dict[str, str]] = None,
               key: Optional[str] = KEY) -> bytes:
    """A whole POST as it goes over the wire."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"host": "localhost", "content-length": str(len(content)), **(fields or {})}
    if key:
        given.setdefault("authorization", "Bearer " + key)
    head = ["POST %s HTTP/1.1" % path] + ["%s: %s" % pair for pair in given.items()]
    return "\r\n".join(head + ["", ""]).encode("latin-1") + content


def parse_answers(data: bytes, head_only: bool = False) -> List[Answer]:
    """All whole answers that stand in these bytes, 1xx among them; chunks are taken apart."""
    answers = []
    while data:
        head, separator, data = data.partition(b"\r\n\r\n")
        assert separator, head
        line, *rows = head.decode("latin-1").split("\r\n")
        assert line.startswith("HTTP/1.1 "), line
        status = int(line.split(" ")[1])
        fields = {name.lower(): value for name, value in (row.split(": ", 1) for row in rows)}
        body = b""
        if status < 200 or status == 204 or head_only:
            pass
        elif fields.get("transfer-encoding") == "chunked":
            size = -1
            while size:
                number, _, data = data.partition(b"\r\n")
                size = int(number, 16)
                assert data[size:size + 2] == b"\r\n", "a chunk is cut off"
                body, data = body + data[:size], data[size + 2:]
        elif "content-length" in fields:
            length = int(fields["content-length"])
            assert len(data) >= length, "a body is cut off"
            body, data = data[:length], data[length:]
        else:
            body, data = data, b""
        answers.append(Answer(status, fields, body))
    return answers


class FakeClock:
    """The clock on the wall, as the whole process sees it; `now` may be anything."""

    def __init__(self, monkeypatch: Any) -> None:
        self.now = time.time()
        monkeypatch.setattr(time, "time", lambda: self.now)


@contextlib.contextmanager
def full_listener() -> Iterator[Tuple[str, int]]:
    """An address that answers no SYN: somebody listens, but the backlog is full."""
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(8):
            sock = held.enter_context(socket.socket())
            sock.settimeout(0.05)
            try:
                sock.connect(address)
            except OSError:             # timed out: so will all that follow
                break
        yield address


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    """Read until these bytes have come; the assertion shows what came instead."""
    data = b""
    while mark not in data:
        piece = sock.recv(65536)
        assert piece, "closed after %r" % data[-300:]
        data += piece
    return data


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while True:
            piece = sock.recv(65536)
            if not piece:
                return data
            data += piece
    except OSError:
        return data


def wait_until(condition: Any, seconds: float = 5.0) -> None:
    """Wait for a condition; the assertion tells which one was not met."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.01)


def fold_chat(frames: List[Any]) -> Tuple[Dict[str, Any], Optional[str], Optional[Dict[str, Any]]]:
    """(message, finish_reason, usage) as an SDK folds chat chunks."""
    message: Dict[str, Any] = {"content": ""}
    calls: List[Dict[str, Any]] = []
    reason = usage = None
    for frame in frames:
        usage = frame.get("usage") or usage
        for choice in frame["choices"]:
            delta = choice["delta"]
            assert reason is None, "a choice after the finish reason"
            reason = choice["finish_reason"]
            message["content"] += delta.get("content") or ""
            for name in ("reasoning_content", "refusal"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "type": call["type"], "function": {
                        "name": call["function"]["name"], "arguments": ""}})
                assert call["index"] < len(calls)
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
    return message, reason, usage


def fold_messages(frames: List[Any]) -> Dict[str, Any]:
    """The message that an SDK has when a stream of Messages is over."""
    message: Dict[str, Any] = {}
    partial: Dict[int, str] = {}
    open_index = None
    for frame in frames:
        kind = frame["type"]
        if kind == "message_start":
            message = json.loads(json.dumps(frame["message"]))
        elif kind == "content_block_start":
            assert open_index is None and frame["index"] == len(message["content"])
            open_index = frame["index"]
            message["content"].append(dict(frame["content_block"]))
        elif kind == "content_block_delta":
            assert frame["index"] == open_index
            block, delta = message["content"][open_index], frame["delta"]
            if delta["type"] == "input_json_delta":
                partial[open_index] = partial.get(open_index, "") + delta["partial_json"]
            elif delta["type"] == "signature_delta":
                assert not block["signature"]
                block["signature"] = delta["signature"]
            else:
                member = delta["type"].split("_")[0]
                block[member] += delta[member]
        elif kind == "content_block_stop":
            assert frame["index"] == open_index
            block = message["content"][open_index]
            if block["type"] == "tool_use":
                block["input"] = parse_partial(partial.get(open_index, ""))
            open_index = None
        elif kind == "message_delta":
            message.update(frame["delta"], usage=frame["usage"])
    return message


def parse_partial(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return text


PROGRAM = ccproxy.__file__
COMPILED = os.path.join(tempfile.gettempdir(), "ccproxy-tests-compiled")
STATE = os.path.join(tempfile.gettempdir(), "ccproxy-tests-state")     # of all programs alike
PROXY_NAMES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


def clean_environment(**more: str) -> Dict[str, str]:
    """This environment without whatever would configure ccproxy, and with `more`."""
    taken = {name for option in ccproxy.OPTIONS for name in ccproxy.environment_names(option)}
    taken.update(ccproxy.CREDENTIAL_VARIABLES)
    kept = {name: value for name, value in os.environ.items() if name not in taken
            and name.lower() not in PROXY_NAMES and name != "SSL_CERT_FILE"}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**kept, "PYTHONPYCACHEPREFIX": COMPILED, "XDG_STATE_HOME": STATE, **more}


STARTER = """import sys
sys.path[0] = %r
import ccproxy
ccproxy.Limits.__new__.__defaults__ = tuple(
    ccproxy.Limits(sweep=0.1, watch=0.1, news=0.1))
api = %r
if api:
    known = {"openai": ccproxy.OPENAI, "anthropic": ccproxy.ANTHROPIC}[api]
    ccproxy.UPSTREAMS["provider"] = lambda model, endpoints: known
%s
ccproxy.leave(ccproxy.main())"""


def command_of(program: str, before: str = "") -> List[str]:
    """How a program is started: the one that is tested, or that in another folder, as an import
    with shorter intervals, for Python compiles a script anew at every start (test_command_line.py
    starts the script itself).  Without site: it needs nothing of site-packages.  `before` is a
    statement that is done first."""
    if program != PROGRAM and not os.path.isdir(program):
        return [sys.executable, program]
    folder = os.path.dirname(os.path.abspath(program)) if program == PROGRAM else program
    return [sys.executable, "-S", "-c", STARTER % (folder, UPSTREAM_API, before)]


def run_program(*arguments: str, environment: Optional[Dict[str, str]] = None,
                program: str = PROGRAM) -> "subprocess.CompletedProcess[str]":
    """Run ccproxy.py as a person does and wait for its end."""
    return subprocess.run([*command_of(program), *arguments], timeout=30,
                          env=clean_environment(**(environment or {})), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def run_on_terminal(*arguments: str, **environment: str) -> Tuple[int, str]:
    """(exit status, all that it wrote on its terminal); ends lines with a carriage return too."""
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [*command_of(PROGRAM), *arguments], stdin=subprocess.DEVNULL, stdout=follower,
        stderr=follower, env=clean_environment(TERM="xterm", **environment))
    os.close(follower)
    data = b""
    try:
        while True:
            data += os.read(leader, 65536)
    except OSError:         # Linux says the end of a terminal so
        pass
    os.close(leader)
    return process.wait(20), data.decode().replace("\r\n", "\n")


def call_program(*arguments: str, environment: Optional[Dict[str, str]] = None,
                 ) -> "subprocess.CompletedProcess[str]":
    """As run_program, but main() in this process: where nothing depends on one of its own."""
    out, errors = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, clean_environment(**(environment or {})), clear=True), \
            open(os.devnull) as nothing, mock.patch.object(sys, "stdin", nothing), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = ccproxy.main(list(arguments))
        except SystemExit as ended:
            status = ended.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())


class Program:
    """ccproxy.py in a process of its own, listening on a free port."""

    def __init__(self, *arguments: str, environment: Optional[Dict[str, str]] = None,
                 program: str = PROGRAM, until: str = "note", before: str = "") -> None:
        """`until` stands on the last line of the start-up screen.  `before`: see command_of."""
        if UPSTREAM_API and not {"--demo", "--cli-version"} & set(arguments):   # alpha's alone
            arguments = ("--upstream", "provider", *arguments)
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [*command_of(program, before), "--port", "0", *arguments], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=self.errors, encoding="utf-8",
            env=clean_environment(**(environment or {})))
        self.screen = ""
        while until not in self.screen:
            line = self.process.stdout.readline()
            assert line, self.log
            self.screen += line
        self.port = int(re.search(r" on http://\S+:([0-9]+)", self.screen)[1])

    connect = Proxy.connect
    request, post, send_post = Proxy.request, Proxy.post, Proxy.send_post

    @property
    def log(self) -> str:
        """All of standard error so far."""
        return os.pread(self.errors.fileno(), 1 << 24, 0).decode()

    def stop(self, number: int = signal.SIGTERM) -> Tuple[int, str]:
        """(exit status, all of standard error) after this signal."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> Tuple[int, str]:
        self.screen += self.process.stdout.read()
        return self.process.wait(20), self.log

    def close(self) -> None:
        """Whatever became of it: end it and let go of its files."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self.process.stdout.close()
        self.errors.close()
