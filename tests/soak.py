"""A soak of the whole program: many streams at once, then rounds of mixed requests, some good, some
bad, with failing upstreams, slow readers and clients that leave at every stage.

    python3 tests/soak.py                               # 2000 streams, 3 rounds of 5000, 200 keys
    python3 tests/soak.py --streams 200 --requests 500 --seconds 600    # rounds for ten minutes

The fake upstream and ccproxy run in processes of their own.  Every answer must hold what its own
request asked for, every upstream request its own caller's key; and when all is over, descriptors,
tasks and memory must be what they were.  Exit status 1 where anything is not.
"""
from __future__ import annotations

import argparse
import asyncio
import collections
import functools
import gc
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from fake_upstream import chunked, ndjson  # noqa: E402
from harness import CHAT, MESSAGES, ccproxy, clean_environment  # noqa: E402

RESPONSES = "/v1/responses"
APIS = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}
ENDS = {"chat": b"data: [DONE]", "messages": b"message_stop", "responses": b"response.completed"}
HEAD = (b"HTTP/1.1 200 OK\r\nx-trace-id: 0123456789abcdef0123456789abcdef\r\n"
        b"transfer-encoding: chunked\r\n\r\n")
LAST = b"0\r\n\r\n"
MARK = re.compile(rb"MARK-(\w+k([0-9]+))-([a-z]+)-")
FILLING = "x" * 4000        # a text of the mode `big` is many of these
BIG = 150
PATIENCE = 90.0             # seconds that any one wait may take: a hang, not a slow machine
LINGER = struct.pack("ii", 1, 0)


def expected_key(number: Any) -> str:
    return "user_soak%s" % number


# The upstream: what it does stands in the request, as MARK-<mark>-<mode>-.


class Upstream:
    """What the fake upstream has seen."""

    def __init__(self) -> None:
        self.requests = self.open = 0
        self.keys: Dict[str, int] = collections.Counter()
        self.tries: Dict[str, int] = collections.Counter()
        self.wrong: List[str] = []
        self.released = asyncio.Event()

    def note(self, head: str, body: bytes) -> Tuple[str, str]:
        """(mark, mode) of a request, after a look at whose key it carries."""
        found = MARK.findall(body)
        mark, number, mode = found[-1] if found else (b"none", b"", b"plain")
        keys = re.findall(r"(?im)^authorization: Bearer (.*?)\r?$", head)
        if keys != [expected_key(number.decode())] or b"user_soak" in body or not found:
            self.wrong.append("%s came with %s" % (mark.decode(), keys))
        self.requests += 1
        self.keys.update(keys)
        self.tries[mark.decode()] += 1
        return mark.decode(), mode.decode()

    async def serve(self, reader: Any, writer: Any) -> None:
        self.open += 1
        try:
            while await self.serve_one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def serve_one(self, reader: Any, writer: Any) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"(?i)content-length: ([0-9]+)", head)
        body = await reader.readexactly(int(length[1]) if length else 0)
        if head.startswith("GET"):
            await send(writer, whole(*self.control(head.split(" ")[1])))
            return True
        mark, mode = self.note(head, body)
        return await MODES[mode](self, reader, writer, mark)

    def control(self, target: str) -> Tuple[int, Any]:
        """What the soak itself asks; the proxy's question for models finds nothing here."""
        if target == "/release":
            self.released.set()
            self.released = asyncio.Event()
        if target not in ("/release", "/report"):
            return 404, {}
        return 200, {"requests": self.requests, "open": self.open, "wrong": self.wrong,
                     "keys": len(self.keys)}


def whole(status: int, value: Any) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


async def send(writer: Any, *pieces: bytes) -> None:
    writer.write(b"".join(pieces))
    await writer.drain()


def text(*said: str) -> bytes:
    return chunked(ndjson(*[{"type": "text-delta", "id": "0", "text": one} for one in said]))


def finish(reason: str = "stop") -> bytes:
    return chunked(ndjson({"type": "finish", "finishReason": reason, "totalUsage": {
        "inputTokens": 7, "outputTokens": 3}})) + LAST


START = chunked(ndjson({"type": "start"}))


async def plain(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    await send(writer, HEAD, START, text("echo ", mark, " end"), finish())
    return True


async def slow(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    for piece in (HEAD, START, text("echo "), text(mark), text(" end"), finish()):
        await send(writer, piece)
        await asyncio.sleep(random.random() * 0.1)
    return True


async def trickle(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    """Cut anywhere."""
    data = HEAD + START + text("echo ", mark, " end") + finish()
    for at in range(0, len(data), 37):
        await send(writer, data[at:at + 37])
        await asyncio.sleep(0)
    return True


async def think(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    thought = {"type": "reasoning-delta", "id": "r", "text": "thought of " + mark}
    await send(writer, HEAD, START, chunked(ndjson(thought)), text("echo ", mark, " end"),
               finish())
    return True


async def tool(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    given = json.dumps({"mark": mark}, separators=(",", ":"))
    events = [{"type": "tool-input-start", "id": "c" + mark, "toolName": "f"},
              {"type": "tool-input-delta", "id": "c" + mark, "delta": given[:7]},
              {"type": "tool-input-delta", "id": "c" + mark, "delta": given[7:]},
              {"type": "tool-call", "toolCallId": "c" + mark, "toolName": "f",
               "input": json.loads(given)}]
    await send(writer, HEAD, START, chunked(ndjson(*events)), finish("tool-calls"))
    return True


async def big(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    await send(writer, HEAD, START, text("echo ", mark))
    for _ in range(BIG):
        await send(writer, text(FILLING))
    await send(writer, text(" end"), finish())
    return True


async def flaky(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    """Resets the first call, in the middle of its thinking; the second is good."""
    if up.tries[mark] > 1:
        return await plain(up, reader, writer, mark)
    thought = {"type": "reasoning-delta", "id": "r", "text": "Hm"}
    await send(writer, HEAD, START, chunked(ndjson(thought)))
    writer.transport.abort()
    return False


async def broke(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    await send(writer, whole(402, {"error": {"code": "x", "message": "no credit for " + mark}}))
    return True


async def cut(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    await send(writer, HEAD, START, text("echo " + mark))
    return False


async def late(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    """An error event behind some text."""
    said = {"type": "error", "error": {"message": "sorry " + mark, "isRetryable": False}}
    await send(writer, HEAD, START, text("echo " + mark), chunked(ndjson(said)), LAST)
    return True


async def garbage(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    await send(writer, b"<html>500 no HTTP at all</html>\r\n\r\n")
    return False


async def mute(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    """Nothing at all, until the other side leaves."""
    await reader.read(1)
    return False


async def hold(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    """A beginning, and the end when it is released."""
    await send(writer, HEAD, START, text("echo ", mark))
    released = asyncio.ensure_future(up.released.wait())
    left = asyncio.ensure_future(reader.read(1))
    await asyncio.wait([released, left], return_when=asyncio.FIRST_COMPLETED)
    released.cancel()
    if not left.done():
        await send(writer, text(" end"), finish())
        await asyncio.wait([left])
    left.exception()        # looked at, or asyncio complains
    return False


async def flood(up: Upstream, reader: Any, writer: Any, mark: str) -> bool:
    """More and more, until the other side leaves."""
    await send(writer, HEAD, START, text("echo ", mark))
    while True:
        await send(writer, text(FILLING))


MODES: Dict[str, Callable[..., Any]] = {mode.__name__: mode for mode in (
    plain, slow, trickle, think, tool, big, flaky, broke, cut, late, garbage, mute, hold, flood)}
GOOD = ("plain", "plain", "plain", "slow", "slow", "trickle", "think", "tool", "flaky", "big")
FAILING = ("broke", "broke", "late", "cut", "garbage")


async def serve_upstream() -> None:
    up = Upstream()
    server = await asyncio.start_server(up.serve, "127.0.0.1", 0, limit=1 << 22, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


# The proxy: the program's own main, with one route more, which tells what is inside.


def resident(pid: Any = "self", name: str = "VmRSS") -> int:
    """KiB of a process, now or (VmHWM) at most."""
    with open("/proc/%s/status" % pid) as file:
        return int(re.search(name + r":\s+([0-9]+)", file.read())[1])


def trim() -> None:
    """Give the system back what malloc only keeps, where that can be asked for (glibc)."""
    import ctypes
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def figures(app: Any) -> Dict[str, Any]:
    """What lives in this process.  The question's own connection is among it."""
    gc.collect()
    objects = gc.get_objects()
    kinds = collections.Counter(type(one).__name__ for one in objects)
    kept = {name: len(getattr(app, name)) for name in ("items", "wires", "relays", "exchanges")}
    kept["calibrations"] = len(app.home.calibrations)
    return {"tasks": len(asyncio.all_tasks()), "objects": len(objects), "clients": app.clients,
            "idle": len(app.home.pool.idle), "bodies": app.bodies, "rss": resident(),
            "blocks": sys.getallocatedblocks(), "kinds": kinds.most_common(12),
            "descriptors": len(os.listdir("/proc/self/fd")) - 1, **kept}


async def serve_figures(app: Any, exchange: Any) -> None:
    if "trim" in exchange.head.target:
        trim()
    await ccproxy.respond_json(app, exchange, 200, figures(app))


def serve_proxy(arguments: List[str]) -> int:
    """The program, only with shorter pauses between attempts."""
    ccproxy.Limits = functools.partial(ccproxy.Limits, backoff=(0.1, 0.2))
    ccproxy.ROUTES["/soak"] = ccproxy.Route({"GET": serve_figures}, quiet=True)
    return ccproxy.main(arguments)


# Clients.


class Wrong(Exception):
    """An answer that is not what its request asked for."""


class Call(NamedTuple):
    """One generating request."""

    api: str
    streamed: bool
    mark: str
    key: str
    mode: str


def request_bytes(call: Call) -> bytes:
    """Anthropic's own clients send x-api-key: every second mark does too."""
    words = "MARK-%s-%s-" % (call.mark, call.mode)
    body: Dict[str, Any] = {"model": "deepseek/deepseek-v4-flash", "stream": call.streamed}
    if call.api == "responses":
        body.update(input=words)
    else:
        body.update(max_tokens=500, messages=[{"role": "user", "content": words}])
    name = "x-api-key: " if call.api == "messages" and len(call.mark) % 2 else \
        "authorization: Bearer "
    return post(APIS[call.api], json.dumps(body).encode(), name + call.key)


def post(path: str, content: bytes, *fields: str) -> bytes:
    rows = ["POST %s HTTP/1.1" % path, "host: localhost", "content-length: %d" % len(content)]
    return "\r\n".join(rows + list(fields) + ["", ""]).encode() + content


async def read_answer(reader: Any) -> Tuple[int, bytes]:
    """(status, body) of one answer, or an exception where it is cut."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status, body = int(head.split(" ")[1]), b""
    if "transfer-encoding: chunked" not in head:
        length = re.search(r"content-length: ([0-9]+)", head)
        return status, await reader.readexactly(int(length[1]))
    pieces: List[bytes] = []
    while not pieces or pieces[-1]:
        size = int(await reader.readuntil(b"\r\n"), 16)
        pieces.append((await reader.readexactly(size + 2))[:-2])
    body = b"".join(pieces)
    return status, body


def said_in_frame(api: str, frame: Dict[str, Any]) -> str:
    if api == "chat":
        delta = frame["choices"][0]["delta"] if frame.get("choices") else {}
        return (delta.get("content") or "") + "".join(
            one["function"]["arguments"] for one in delta.get("tool_calls", ()))
    if api == "messages":
        delta = frame.get("delta", {}) if frame["type"] == "content_block_delta" else {}
        return delta.get("text", "") + delta.get("partial_json", "")
    shown = frame["type"] in ("response.output_text.delta",
                              "response.function_call_arguments.delta")
    return frame["delta"] if shown else ""


def said_in_body(api: str, body: Dict[str, Any]) -> str:
    if api == "chat":
        message = body["choices"][0]["message"]
        return (message["content"] or "") + "".join(
            one["function"]["arguments"] for one in message.get("tool_calls", ()))
    if api == "messages":
        return "".join(block["text"] if block["type"] == "text" else
                       json.dumps(block["input"], separators=(",", ":"))
                       for block in body["content"] if block["type"] != "thinking")
    parts = [part["text"] for item in body["output"] if item["type"] == "message"
             for part in item["content"]]
    return "".join(parts + [item["arguments"] for item in body["output"]
                            if item["type"] == "function_call"])


def said(call: Call, body: bytes) -> str:
    """The text and the calls' arguments that an answer shows."""
    if not call.streamed:
        return said_in_body(call.api, json.loads(body))
    frames = [json.loads(line[6:]) for line in body.decode().split("\n")
              if line.startswith("data: {")]
    return "".join(said_in_frame(call.api, frame) for frame in frames)


def expected_text(call: Call) -> str:
    if call.mode == "tool":
        return '{"mark":"%s"}' % call.mark
    return "echo %s%s end" % (call.mark, FILLING * BIG if call.mode == "big" else "")


def check(call: Call, status: int, body: bytes) -> None:
    """Raises Wrong when this is no answer to that call."""
    ended = ENDS[call.api] in body
    if call.streamed and call.mode in FAILING and b"\n: waiting " in b"\n" + body:
        good = status == 200 and b"error" in body and not ended     # a head had to go out
    elif call.mode == "broke":
        good = status == 402 and call.mark.encode() in body
    elif call.mode in ("cut", "late", "garbage"):
        # What was shown cannot be taken back: a stream ends with an error, the rest is a status.
        shown = call.streamed and call.mode != "garbage"
        good = status == (200 if shown else 502) and b"error" in body and not ended
        good = good and (call.mark.encode() in body or call.mode == "garbage" or not shown)
    else:
        good = status == 200 and ended is call.streamed and said(call, body) == expected_text(call)
    if not good:
        raise Wrong("%s: %d %r" % (call, status, body[-300:]))


class Client:
    """A connection to the proxy."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, receive: int = 0) -> "Client":
        """`receive`: bytes of buffer, for a client that is to be slow."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=receive or 1 << 20))

    async def ask(self, data: bytes) -> Tuple[int, bytes]:
        self.writer.write(data)
        return await asyncio.wait_for(read_answer(self.reader), PATIENCE)

    async def read_until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            piece = await asyncio.wait_for(self.reader.read(65536), PATIENCE)
            if not piece:
                raise Wrong("closed in front of %r: %r" % (mark, data[-300:]))
            data += piece
        return data

    def leave(self, rude: bool) -> None:
        """With a RST or with a FIN."""
        if rude:
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            self.writer.transport.abort()
        self.writer.close()


class Plan(NamedTuple):
    """How much is done."""

    streams: int = 2000
    requests: int = 5000
    rounds: int = 3
    keys: int = 200
    seconds: float = 0.0        # rounds until this is over, where that is longer
    seed: int = 1
    together: int = 200         # requests at once
    warm: int = 400             # requests before anything is measured


class Caller:
    """One mixed request: who asks, what, and by which chance."""

    def __init__(self, port: int, mark: str, plan: Plan) -> None:
        self.rng = random.Random("%d:%s" % (plan.seed, mark))
        self.port, number = port, self.rng.randrange(plan.keys)
        self.mark, self.key = "%sk%d" % (mark, number), expected_key(number)

    def call(self, mode: str, streamed: Optional[bool] = None, part: str = "") -> Call:
        if streamed is None:
            streamed = self.rng.random() < 0.6
        return Call(self.rng.choice(list(APIS)), streamed, part + self.mark, self.key, mode)


async def do_good(caller: Caller) -> None:
    await do_ask(caller, caller.rng.choice(GOOD))


async def do_fail(caller: Caller) -> None:
    await do_ask(caller, caller.rng.choice(FAILING))


async def do_ask(caller: Caller, mode: str) -> None:
    client = await Client.connect(caller.port)
    try:
        call = caller.call(mode)
        check(call, *await client.ask(request_bytes(call)))
    finally:
        client.leave(caller.rng.random() < 0.3)


async def do_keep(caller: Caller) -> None:
    """Several requests on one connection, half of the time without waiting for answers."""
    client = await Client.connect(caller.port)
    calls = [caller.call(caller.rng.choice(("plain", "slow", "broke", "tool")), part="p%d" % part)
             for part in range(caller.rng.randrange(2, 5))]
    try:
        if caller.rng.random() < 0.5:
            client.writer.write(b"".join(map(request_bytes, calls)))
            for call in calls:
                check(call, *await client.ask(b""))
        else:
            for call in calls:
                check(call, *await client.ask(request_bytes(call)))
    finally:
        client.leave(False)


def bad_requests(caller: Caller) -> List[Tuple[bytes, int]]:
    """Requests that reach no upstream, and their status."""
    key = "authorization: Bearer " + caller.key
    path = caller.rng.choice(list(APIS.values()))
    good = b'{"max_tokens":9,"messages":[{"role":"user","content":"x"}]}'
    return [
        (post(path, b"{}"), 401), (post(path, good, "authorization: Bearer sk-other"), 401),
        (post(path, b"[NaN]", key), 400), (post(path, b'{"messages":3}', key), 400),
        (post(path, b"[" * 3000, key), 400), (post(path, b"{}", key, "content-encoding: br"), 415),
        (post("/v1/nothing", good, key), 404), (post("/v1/models", good, key), 405),
        (b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\nhello" % path.encode(), 400),
        (b"GET / HTTP/1.1\nhost: a\n\n", 400), (b"GET / HTTP/9.9\r\nhost: a\r\n\r\n", 505),
        (b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", 200),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n", 200),
        (post("/v1/messages/count_tokens", good, key), 200),
        (post("/explain/v1/messages", good, key), 200)]


async def do_wrong(caller: Caller) -> None:
    data, expected = caller.rng.choice(bad_requests(caller))
    client = await Client.connect(caller.port)
    try:
        status, body = await client.ask(data)
        if status != expected:
            raise Wrong("%r: %d %r" % (data[:200], status, body[:300]))
    finally:
        client.leave(caller.rng.random() < 0.3)


async def do_leave(caller: Caller) -> None:
    """Sends a request, or a part of it, and leaves: at once, soon, or when it was answered."""
    stage = caller.rng.choice(("request", "at once", "mute", "hold", "slow", "flood", "retry"))
    mode = {"request": "plain", "at once": "plain", "retry": "garbage"}.get(stage, stage)
    call = caller.call(mode, True if stage == "flood" else None)
    client = await Client.connect(caller.port, 16384 if stage == "flood" else 0)
    data = request_bytes(call)
    client.writer.write(data[:caller.rng.randrange(1, len(data))] if stage == "request" else data)
    await client.writer.drain()
    if call.streamed and stage in ("hold", "flood"):
        await client.read_until(call.mark.encode())
    if stage != "at once":
        await asyncio.sleep(caller.rng.random() * 0.2)
    client.leave(caller.rng.random() < 0.5)


async def do_lazy(caller: Caller) -> None:
    """Reads a long answer in small pieces, and misses nothing."""
    call = caller.call("big", True)
    client = await Client.connect(caller.port, 16384)
    try:
        client.writer.write(request_bytes(call))
        await asyncio.sleep(0.2)
        check(call, *await client.ask(b""))
    finally:
        client.leave(False)


ACTS = {do_good: 50, do_keep: 8, do_fail: 10, do_wrong: 12, do_leave: 17, do_lazy: 3}


# The soak.


class Round(NamedTuple):
    """What was found when all was quiet again."""

    name: str
    seconds: float
    rss: int
    peak: int
    inside: Dict[str, Any]

    def line(self) -> str:
        shown = {name: self.inside[name] for name in ("descriptors", "idle", "tasks", "objects",
                                                      "blocks", "items")}
        return "%-12s %6.1f s  rss %6d  peak %6d  %s" % (
            self.name, self.seconds, self.rss, self.peak,
            "  ".join("%s %d" % pair for pair in shown.items()))


class Soak:
    """Both processes, and what was found."""

    def __init__(self, plan: Plan, level: str = "info", debug: bool = False) -> None:
        self.plan, self.wrong, self.rounds = plan, [], []     # type: ignore[var-annotated]
        self.acts: Dict[str, int] = collections.Counter()
        self.full: Dict[str, Any] = {}
        self.log_file, self.logged = tempfile.NamedTemporaryFile(), ""
        self.errors = tempfile.TemporaryFile()
        self.upstream, self.upstream_port = self.start(["--upstream"], r"^([0-9]+)$")
        self.proxy, self.port = self.start(
            ["--serve", "--port", "0", "--drain-seconds", "5", "--log-level", level,
             "--log-file", self.log_file.name, "--api-base",
             "http://127.0.0.1:%d" % self.upstream_port],
            r" on http://\S+:([0-9]+)", **({"PYTHONASYNCIODEBUG": "1"} if debug else {}))

    def start(self, arguments: List[str], sign: str, **more: str) -> Tuple[Any, int]:
        """(process, its port) of this file in another role."""
        process = subprocess.Popen([sys.executable, os.path.abspath(__file__)] + arguments,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=self.errors, encoding="utf-8",
                                   env=clean_environment(**more))
        found = re.search(sign, process.stdout.readline())
        assert found, self.log()
        return process, int(found[1])

    def log(self) -> str:
        """All that the proxy, or either process on standard error, ever said."""
        said = os.pread(self.errors.fileno(), 1 << 26, 0).decode()
        if not self.log_file.closed:
            with open(self.log_file.name, encoding="utf-8") as file:
                self.logged = file.read()
        return said + self.logged

    def said(self) -> str:
        """The log without what asyncio's debug mode tells, at level debug, of each reset."""
        records = re.split(r"(?m)^(?=[0-9-]{10}T[0-9:]{8}Z )", self.log())
        return "".join(record for record in records
                       if not re.match(r"\S+ DEBUG .*: Fatal \w+ error on", record))

    async def get(self, port: int, path: str) -> Any:
        client = await Client.connect(port)
        try:
            request = "GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n" % path
            return json.loads((await client.ask(request.encode()))[1])
        finally:
            client.leave(False)

    async def settle(self, name: str, began: float) -> Round:
        """Wait until nothing runs, then look; what stays busy for long is a fault."""
        seconds, deadline = time.monotonic() - began, time.monotonic() + 10
        while True:
            await asyncio.sleep(0.1)
            inside = await self.get(self.port, "/soak")
            report = await self.get(self.upstream_port, "/report")
            busy = (inside["clients"] - 1, inside["relays"], inside["exchanges"] - 1,
                    inside["bodies"], report["open"] - 1 - inside["idle"])
            if not any(busy) or time.monotonic() > deadline:
                break
        if any(busy):
            self.wrong.append("%s: left behind: clients, relays, exchanges, bodies, upstream "
                              "connections %s" % (name, busy))
        found = Round(name, seconds, resident(self.proxy.pid),
                      resident(self.proxy.pid, "VmHWM"), inside)
        self.rounds.append(found)
        return found

    async def attempt(self, name: str, work: Any) -> None:
        try:
            await work
        except (Wrong, OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, LookupError,
                ValueError) as fault:
            self.wrong.append("%s: %s: %s" % (name, type(fault).__name__, str(fault)[:600]))

    async def mix(self, name: str, count: int) -> None:
        """A round: so many requests, each by its own chance, a fixed number of them at once."""
        turn = asyncio.Semaphore(self.plan.together)

        async def one(number: int) -> None:
            caller = Caller(self.port, "%sx%d" % (name, number), self.plan)
            act = caller.rng.choices(list(ACTS), list(ACTS.values()))[0]
            self.acts[act.__name__] += 1
            async with turn:
                await self.attempt("%s of %s" % (act.__name__, caller.mark), act(caller))
        await asyncio.gather(*map(one, range(count)))

    async def hold_streams(self) -> None:
        """All streams open at once; then one more request; then they all end."""
        count, opened = self.plan.streams, asyncio.Semaphore(0)
        turn = asyncio.Semaphore(100)
        tasks = [asyncio.ensure_future(self.attempt(
            "stream %d" % number, self.hold_one(number, turn, opened)))
                 for number in range(count)]
        for _ in range(count):
            await opened.acquire()
        self.full = await self.get(self.port, "/soak")
        if self.full["relays"] != count:
            self.wrong.append("%d of %d streams are open" % (self.full["relays"], count))
        await self.attempt("one between", do_ask(Caller(self.port, "between", self.plan), "plain"))
        await self.get(self.upstream_port, "/release")
        await asyncio.gather(*tasks)

    async def hold_one(self, number: int, turn: Any, opened: Any) -> None:
        key = number % self.plan.keys
        call = Call(list(APIS)[number % 3], True, "s%dk%d" % (number, key), expected_key(key),
                    "hold")
        client = None
        try:
            async with turn:
                client = await Client.connect(self.port, 8192)
                client.writer.write(request_bytes(call))
                data = await client.read_until(call.mark.encode())
        finally:
            opened.release()
        data += await client.read_until(b"\r\n0\r\n\r\n")
        shown = re.sub(rb"\r\n[0-9a-f]+\r\n", b"\n", data.partition(b"\r\n\r\n")[2])
        check(call, 200, b"\n" + shown)
        client.leave(False)

    async def run(self) -> None:
        """Warm up, hold many streams, then the rounds."""
        began = time.monotonic()
        await self.mix("warm", self.plan.warm)
        await self.settle("warmed up", began)
        if self.plan.streams:
            start = time.monotonic()
            await self.hold_streams()
            await self.settle("streams", start)
        number, end = 0, began + self.plan.seconds
        while number < self.plan.rounds or time.monotonic() < end:
            number, start = number + 1, time.monotonic()
            await self.mix("r%d" % number, self.plan.requests)
            await self.settle("round %d" % number, start)
        report = await self.get(self.upstream_port, "/report")
        self.seen, self.wrong_keys = report, report["wrong"]
        self.trimmed = (await self.get(self.port, "/soak?trim"))["rss"]

    def stop(self) -> None:
        self.proxy.terminate()
        try:
            self.status = self.proxy.wait(60)
        finally:
            self.close()
        if self.status:
            self.wrong.append("the proxy's exit status is %s" % self.status)

    def close(self) -> None:
        for process in (self.proxy, self.upstream):
            if process.poll() is None:
                process.kill()
                process.wait(10)
            process.stdout.close()
        self.log()              # is kept
        self.log_file.close()

    def faults(self) -> List[str]:
        """Everything that is not as it should be."""
        first, last = self.rounds[0], self.rounds[-1]
        found = list(self.wrong) + ["wrong key: " + one for one in self.wrong_keys]
        for name in ("descriptors", "tasks"):
            spare = (lambda one: one.inside["idle"]) if name == "descriptors" else (lambda _: 0)
            grown = [one.inside[name] - spare(one) for one in (first, last)]
            if grown[0] != grown[1]:
                found.append("%s: %d before, %d after" % (name, *grown))
        log = self.said()
        found += ["%s in the log: %r" % (words, log[max(0, log.index(words) - 200):][:1500])
                  for words in ("never retrieved", "Traceback", "never awaited") if words in log]
        return found + self.growth()

    def growth(self) -> List[str]:
        """From the first round to the last memory may not grow, except by a little unrest."""
        rounds = [one for one in self.rounds if one.name.startswith("round")]
        if len(rounds) < 2:
            return []
        first, last = rounds[0], rounds[-1]
        found = []
        if last.rss > first.rss * 1.05 + 2048:
            found.append("resident memory grew from %d to %d KiB" % (first.rss, last.rss))
        if last.inside["objects"] > first.inside["objects"] * 1.02 + 1000:
            found.append("objects: %d to %d" % (first.inside["objects"], last.inside["objects"]))
        return found


def soak(plan: Plan, level: str = "info", debug: bool = False) -> Soak:
    """A whole soak; whoever calls looks at its `faults`."""
    found = Soak(plan, level, debug)
    try:
        asyncio.run(found.run())
        found.stop()
    finally:
        found.close()
    return found


def tell(found: Soak) -> None:
    print("\n".join(one.line() for one in found.rounds))
    if found.full:
        before = found.rounds[0]
        grown = found.full["rss"] - before.rss
        print("%d streams open: descriptors %d, tasks %d, rss %d KiB (%.1f KiB a stream)" % (
            found.plan.streams, found.full["descriptors"], found.full["tasks"],
            found.full["rss"], grown / max(1, found.plan.streams)))
    print("after malloc_trim: rss %d KiB" % found.trimmed)
    print("requests: " + ", ".join("%s %d" % (name[3:], count)
                                   for name, count in sorted(found.acts.items())))
    log = found.said()
    print("upstream requests %d with %d keys; wrong answers %d, wrong keys %d; in the log: "
          "Traceback %d, never retrieved %d" % (
              found.seen["requests"], found.seen["keys"], len(found.wrong),
              len(found.wrong_keys), log.count("Traceback"), log.count("never retrieved")))


def room_for(streams: int) -> int:
    """As many streams as this process and its children may have descriptors for."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * streams + 1000
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return streams if soft == resource.RLIM_INFINITY else min(streams, (soft - 1000) // 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    for name, default in Plan()._asdict().items():
        parser.add_argument("--" + name, type=type(default), default=default)
    plan = Plan(**vars(parser.parse_args()))
    if plan.streams > room_for(plan.streams):
        plan = plan._replace(streams=room_for(plan.streams))
        print("descriptors are for %d streams only" % plan.streams)
    debugged = plan._replace(streams=min(plan.streams, 200), rounds=1, seconds=0.0,
                             requests=min(plan.requests, 1000))
    began, faults = time.monotonic(), []
    for level, part in (("info", plan), ("debug", debugged)):
        print("Python %s, log level %s, %s" % (sys.version.split()[0], level, part), flush=True)
        found = soak(part, level, level == "debug")
        tell(found)
        faults += found.faults()
    print("%.0f seconds; %s" % (time.monotonic() - began, "wrong:" if faults else "all is well"))
    print("\n".join(faults[:20]), end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--upstream"]:
        asyncio.run(serve_upstream())
    elif sys.argv[1:2] == ["--serve"]:
        ccproxy.leave(serve_proxy(sys.argv[2:]))
    else:
        sys.exit(main())
