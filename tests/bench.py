"""What ccproxy costs: added time to first token, CPU, rates, memory, start, on this machine.

    python3 tests/bench.py                         # about a minute, never much over 90 s
    python3 tests/bench.py --quick --api messages  # some ten seconds, and rougher

A fake upstream, the load and ccproxy run in processes of their own, over loopback.  Every answer
is checked: complete, well framed, its text right byte for byte.  `direct` is the load calling the
fake upstream without a proxy between.  Where HAProxy is installed it does the same work as a plain
pass-through: it translates nothing, so it stands for what any proxy must cost.

Only figures of one run compare with each other, and CPU compares better than time: other work on
the machine moves CPU by 10 to 40 % and times by far more.  So the rounds alternate, and medians
are shown with their spread.  No figure is ever a failure; exit status 1 where an answer was
wrong, 2 where something could not be started.
"""
from __future__ import annotations

import argparse
import functools
import heapq
import json
import os
import platform
import re
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

try:
    import resource
except ImportError:         # Windows, which has no limit of this kind
    resource = None         # type: ignore[assignment]

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages",
         "responses": "/v1/responses", "raw": "/alpha/generate"}
LOOPBACK = "127.0.0.1"
LAST = b"0\r\n\r\n"
VARIANTS = 4                # texts of neighbouring streams differ, so that a mix-up is seen
OPENERS = 64                # requests that wait for their first text while many are opened
TURN = 1 << 18              # bytes the load takes from a connection before the others' turn
WRITES = 64                 # and what the upstream writes
PATIENCE = 20.0             # seconds without any progress: a hang, not a slow machine
START_SECONDS = 20.0
HAS_CPU = os.path.exists("/proc/self/stat")


class Failed(Exception):
    """Something could not be started, or died."""


class WrongAnswers(Exception):
    """Answers were wrong, so figures of whoever gave them mean nothing."""


# What is asked for, and the text that must come: upstream and load both know it.


class Spec(NamedTuple):
    """An answer: `count` deltas of `size` characters, `group` of them in a chunk and write."""

    count: int
    size: int = 24
    group: int = 1
    rate: int = 0           # deltas a second; 0: as fast as they are taken
    hold: int = 0           # 1: after the first delta wait for GET /release
    variant: int = 0

    def ask(self) -> str:
        """These figures as the prompt that tells them to the fake upstream."""
        return "bench " + " ".join("%s=%d" % pair for pair in self._asdict().items()) + "."


SPEC = re.compile(rb"bench " + b" ".join(b"%s=([0-9]+)" % name.encode()
                                         for name in Spec._fields) + rb"\.")
# Mostly plain words, as in life, with everything that JSON escapes and UTF-8 of all lengths.
WORDS = ("The quick brown fox said \"jump over\" the lazy dog.\n\tna\u00efve caf\u00e9 costs 3 "
         "\u20ac, C:\\temp, \u65e5\u672c\u8a9e, \U0001f600 and then it went on with plain words "
         "for as long as it would take to come back to where it had begun. ")


def text_of(spec: Spec, number: int) -> str:
    """The text of one delta; it begins with the stream's variant and its own number."""
    start = number * 7 % len(WORDS)
    filling = WORDS[start:] + WORDS * (spec.size // len(WORDS) + 1)
    return ("%d.%d " % (spec.variant, number) + filling)[:spec.size]


@functools.lru_cache(maxsize=8)
def whole_text(spec: Spec) -> str:
    return "".join(text_of(spec, number) for number in range(spec.count))


# The fake upstream: one thread, bytes made before they are asked for, one connection one stream.


def line_of(event: Dict[str, Any]) -> bytes:
    """An event as Command Code writes it: JSON.stringify and a newline."""
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-trace-id: "
        b"0123456789abcdef0123456789abcdef\r\ntransfer-encoding: chunked\r\n\r\n")
OPENING = b"".join(map(line_of, [
    {"type": "start"}, {"type": "start-step", "request": {"body": {"tools": []}}, "warnings": []},
    {"type": "text-start", "id": "txt-0"}]))
USAGE = {"inputTokens": 15, "outputTokens": 6, "totalTokens": 21}
CLOSING = b"".join(map(line_of, [
    {"type": "text-end", "id": "txt-0"},
    {"type": "finish-step", "finishReason": "stop", "rawFinishReason": "stop", "usage": USAGE},
    {"type": "finish", "finishReason": "stop", "rawFinishReason": "stop", "totalUsage": USAGE}]))
MODELS = {"object": "list", "data": [{"id": "deepseek/deepseek-v4-flash", "object": "model",
                                      "created": 1, "owned_by": "x", "context_length": 1000000}]}


@functools.lru_cache(maxsize=64)
def pieces_of(spec: Spec) -> List[bytes]:
    """An answer, each piece a write: its head, the first delta with what opens it, the groups."""
    lines = [line_of({"type": "text-delta", "id": "txt-0", "text": text_of(spec, number)})
             for number in range(spec.count)]
    groups = [lines[at:at + spec.group] for at in range(1, spec.count, spec.group)]
    return [HEAD, chunk(OPENING) + chunk(lines[0]), *[chunk(b"".join(group)) for group in groups],
            chunk(CLOSING) + LAST]


class Stream:
    """A connection to the fake upstream: what came in, and how far its answer has gone."""

    __slots__ = ("sock", "received", "pieces", "at", "offset", "until", "waits", "rate")

    def __init__(self, sock: socket.socket) -> None:
        self.sock: Any = sock               # None: closed
        self.received = b""
        self.pieces: List[bytes] = []
        self.at = self.offset = 0           # what is next, and how much of it was taken
        self.until = 0                      # pieces from here on have to wait
        self.waits = False                  # for the other side to take more
        self.rate = 0


class Upstream:
    """The fake upstream's listener, its connections, and what they wait for."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server((LOOPBACK, 0), backlog=1024)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.held: List[Stream] = []
        self.paced: List[Tuple[float, int, Stream]] = []    # a heap: when, tie-break, whose turn
        if os.name == "posix":              # the end of standard input: whoever started us is gone
            self.selector.register(sys.stdin, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until whoever started us is gone."""
        print(self.listener.getsockname()[1], flush=True)
        while True:
            wait = max(0.0, self.paced[0][0] - time.monotonic()) if self.paced else None
            for key, events in self.selector.select(wait):
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is self.listener:
                    self.accept()
                elif events & selectors.EVENT_READ:     # first: perhaps the other side left
                    self.receive(key.data)
                else:
                    self.send(key.data)
            self.send_due()

    def accept(self) -> None:
        try:
            sock = self.listener.accept()[0]
        except OSError:                     # gone again, or no descriptor left: the load will tell
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(sock, selectors.EVENT_READ, Stream(sock))

    def close(self, stream: Stream) -> None:
        self.selector.unregister(stream.sock)
        stream.sock.close()
        stream.sock = None

    def receive(self, stream: Stream) -> None:
        """Take what has come, and answer when it is a whole request."""
        try:
            data = stream.sock.recv(TURN)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self.close(stream)
        stream.received += data
        head, separator, body = stream.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
        if separator and len(body) >= (int(length[1]) if length else 0):
            stream.received = b""
            self.answer(stream, head, body)

    def answer(self, stream: Stream, head: bytes, body: bytes) -> None:
        """Begin the answer to a whole request."""
        found = SPEC.search(body)
        stream.at = stream.offset = 0
        if found:
            spec = Spec(*map(int, found.groups()))
            stream.pieces, stream.rate = pieces_of(spec), spec.rate
            stream.until = 2 if spec.hold else len(stream.pieces)
            self.held += [stream] * spec.hold
        else:
            if head.startswith(b"GET /release "):
                self.release()
            content = json.dumps(MODELS if b"/models" in head[:60] else {"status": "ok"}).encode()
            stream.pieces, stream.until = [
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
                b"%d\r\n\r\n%b" % (len(content), content)], 1
        self.send(stream)

    def release(self) -> None:
        """Let all held answers go on, those with a rate evenly spread over its period."""
        held, self.held, now = self.held, [], time.monotonic()
        for number, stream in enumerate(held):
            if stream.rate:
                due = now + (1 + number / len(held)) / stream.rate
                heapq.heappush(self.paced, (due, number, stream))
            elif stream.sock:
                stream.until = len(stream.pieces)
                self.send(stream)

    def send_due(self) -> None:
        """Send one piece of every paced answer whose time has come."""
        now = time.monotonic()
        while self.paced and self.paced[0][0] <= now:
            due, number, stream = heapq.heappop(self.paced)
            if stream.sock is None:
                continue
            stream.until += 1
            self.send(stream)
            if stream.until < len(stream.pieces):
                heapq.heappush(self.paced, (due + 1 / stream.rate, number, stream))

    def send(self, stream: Stream) -> None:
        """One turn: a write for each piece, until they have to wait or are not taken."""
        for _ in range(WRITES):
            if stream.at == stream.until:
                return self.wait(stream, False)
            piece = stream.pieces[stream.at]
            try:
                stream.offset += stream.sock.send(
                    memoryview(piece)[stream.offset:] if stream.offset else piece)
            except BlockingIOError:
                break
            except OSError:
                return self.close(stream)
            if stream.offset == len(piece):
                stream.at, stream.offset = stream.at + 1, 0
        self.wait(stream, True)

    def wait(self, stream: Stream, waits: bool) -> None:
        """Look for readiness only while there is something to send."""
        if waits != stream.waits:
            stream.waits = waits
            self.selector.modify(stream.sock, selectors.EVENT_READ
                                 | (selectors.EVENT_WRITE if waits else 0), stream)


# The check of an answer, done when the clock has stopped.


def unchunk(data: bytes) -> bytes:
    """The content of a chunked body; ValueError where the body is not whole, or more than that."""
    parts, at, size = [], 0, -1
    while size:
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        parts.append(data[end + 2:end + 2 + size])
        at = end + 4 + size
        if data[at - 2:at] != b"\r\n":
            raise ValueError("a chunk is cut off")
    if at != len(data):
        raise ValueError("bytes after the end")
    return b"".join(parts)


def content_of(answer: bytes) -> bytes:
    """The content of a whole HTTP answer; ValueError where it is none, or no success."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator or not head.startswith(b"HTTP/1.1 200 "):
        raise ValueError("answered %r" % answer[:300])
    if b"transfer-encoding: chunked" in head.lower():
        return unchunk(body)
    return body


class Shown(NamedTuple):
    """What an answer showed: its texts, and how many ends it had."""

    texts: List[str]
    ends: int


def show_raw(frames: List[Any]) -> Shown:
    return Shown([frame["text"] for frame in frames if frame["type"] == "text-delta"],
                 sum(frame["type"] == "finish" for frame in frames))


def show_chat(frames: List[Any]) -> Shown:
    choices = [choice for frame in frames for choice in frame["choices"]]
    return Shown([choice["delta"]["content"] for choice in choices
                  if choice["delta"].get("content")],
                 sum(choice["finish_reason"] == "stop" for choice in choices))


def show_messages(frames: List[Any]) -> Shown:
    return Shown([frame["delta"]["text"] for frame in frames
                  if frame["type"] == "content_block_delta"],
                 sum(frame["type"] == "message_stop" for frame in frames))


def show_responses(frames: List[Any]) -> Shown:
    return Shown([frame["delta"] for frame in frames
                  if frame["type"] == "response.output_text.delta"],
                 sum(frame["type"] == "response.completed" for frame in frames))


STREAMED = {"raw": show_raw, "chat": show_chat, "messages": show_messages,
            "responses": show_responses}
PLAIN: Dict[str, Callable[[Any], str]] = {
    "chat": lambda body: body["choices"][0]["message"]["content"],
    "messages": lambda body: body["content"][0]["text"],
    "responses": lambda body: body["output"][-1]["content"][0]["text"]}


def show_stream(face: str, content: bytes) -> Shown:
    """What a streamed answer showed; all its JSON is decoded in one call, for speed."""
    if face == "raw":
        rows = content.split(b"\n")[:-1]
    else:
        rows = re.findall(rb"^data: (.*)$", content, re.M)
        if not content.endswith(b"\n\n"):
            raise ValueError("ends inside a frame: %r" % content[-200:])
    if face == "chat" and (not rows or rows.pop() != b"[DONE]"):
        raise ValueError("does not end in [DONE]: %r" % content[-200:])
    return STREAMED[face](json.loads((b"[" + b",".join(rows) + b"]").decode()))


def check_answer(face: str, streamed: bool, answer: bytes, spec: Spec) -> Tuple[int, str]:
    """(how many texts it came in, what is wrong with it or nothing)."""
    try:
        content = content_of(answer)
        if streamed:
            shown = show_stream(face, content)
        else:
            shown = Shown([PLAIN[face](json.loads(content.decode()))], 1)
    except (ValueError, LookupError, TypeError) as fault:
        return 0, "%s: %s" % (type(fault).__name__, str(fault)[:400])
    text, expected = "".join(shown.texts), whole_text(spec)
    if text != expected:
        at = len(os.path.commonprefix([text, expected]))
        return 0, "the text is wrong from character %d of %d: %r, expected %r" % (
            at, len(expected), text[at:at + 40], expected[at:at + 40])
    if shown.ends != 1:
        return 0, "%d ends" % shown.ends
    return len(shown.texts), ""


# The load: one thread, callers on connections of their own, answers kept as bytes until the end.


class Work(NamedTuple):
    """What the load shall do: `requests` by `clients`, none begun after `seconds`."""

    port: int
    face: str
    spec: Spec
    clients: int
    requests: int
    seconds: float = 60.0
    streamed: bool = True
    pause: bool = False     # wait for a word when all callers have their first text
    stuck: bool = False     # read nothing more until that word


class Result(NamedTuple):
    """What came of it; `first` are the times to first token, in seconds."""

    seconds: float
    answers: int
    texts: int
    first: List[float]
    wrong: List[str]


def body_for(face: str, spec: Spec, streamed: bool) -> Dict[str, Any]:
    """A request that gets this answer."""
    said = [{"role": "user", "content": spec.ask()}]
    if face == "raw":
        return {"params": {"stream": True, "messages": said}}
    body = {"model": "deepseek/deepseek-v4-flash", "stream": streamed}
    if face == "responses":     # as Codex asks; else ccproxy keeps texts to look them up later
        return {**body, "input": said, "store": False}
    return {**body, "messages": said, "max_tokens": 64000}


def request_bytes(face: str, spec: Spec, streamed: bool) -> bytes:
    content = json.dumps(body_for(face, spec, streamed)).encode()
    return (b"POST %b HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer user_bench\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (PATHS[face].encode(), len(content), content))


class Caller:
    """A connection that asks again and again, and what has come of its present answer."""

    __slots__ = ("sock", "variant", "pieces", "tail", "length", "began", "first", "asked")

    def __init__(self, work: Work, variant: int) -> None:
        self.sock = socket.socket()
        if work.stuck:          # before connecting, else the kernel may still grow it to megabytes
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.sock.settimeout(PATIENCE)
        self.sock.connect((LOOPBACK, work.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.variant = variant
        self.asked, self.began = 0, 0.0
        self.clear()

    def clear(self) -> None:
        self.pieces: List[bytes] = []
        self.tail = b""
        self.length: Optional[int] = None   # of the whole answer; 0: it comes in chunks
        self.first = 0.0

    def is_whole(self, data: bytes) -> bool:
        """Whether these were the answer's last bytes."""
        if self.length is None:
            head, separator, _ = b"".join(self.pieces).partition(b"\r\n\r\n")
            found = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
            if separator:
                self.length = len(head) + 4 + int(found[1]) if found else 0
        if self.length:
            return sum(map(len, self.pieces)) >= self.length
        self.tail = (self.tail + data[-7:])[-7:]
        return self.tail == b"\r\n" + LAST      # no frame or line ends so


class Load:
    """One piece of work while it runs."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.selector = selectors.DefaultSelector()
        # Stuck readers have long answers, which would be much memory in many variants.
        self.specs = [work.spec._replace(variant=number)
                      for number in range(1 if work.stuck else VARIANTS)]
        self.requests = [request_bytes(work.face, spec, work.streamed) for spec in self.specs]
        self.marks = [b'"%d.0 ' % spec.variant for spec in self.specs]
        self.callers: List[Caller] = []
        self.asked = self.running = self.held = 0
        self.answers: List[Tuple[int, bytes]] = []
        self.first: List[float] = []
        self.wrong: List[str] = []

    def run(self) -> Result:
        """Do it all, then look at what came."""
        began = time.perf_counter()
        self.deadline = began + self.work.seconds
        for _ in range(min(self.work.clients, OPENERS)):
            self.open_caller()
        while self.running:
            ready = self.selector.select(PATIENCE)
            if not ready:
                self.wrong.append("%d answers do not go on" % self.running)
                break
            for key, _ in ready:
                self.receive(key.data)
            if self.work.pause and self.held == len(self.callers) == self.work.clients:
                self.wait_for_word()
        seconds = time.perf_counter() - began
        for caller in self.callers:
            caller.sock.close()
        self.selector.close()
        return self.judge(seconds)

    def open_caller(self) -> None:
        try:
            caller = Caller(self.work, len(self.callers) % len(self.specs))
        except OSError as fault:
            self.wrong.append("cannot connect: %s" % fault)
            return
        self.callers.append(caller)
        self.selector.register(caller.sock, selectors.EVENT_READ, caller)
        self.ask(caller)

    def ask(self, caller: Caller) -> None:
        """Ask once more, if there is more to be asked."""
        if self.asked >= self.work.requests or time.perf_counter() > self.deadline:
            self.selector.unregister(caller.sock)
            return
        caller.clear()
        self.asked += 1
        self.running += 1
        caller.asked += 1
        caller.began = time.perf_counter()
        try:
            caller.sock.send(self.requests[caller.variant])     # far below any socket's buffer
        except OSError as fault:
            self.drop(caller, "cannot send: %s" % fault)

    def drop(self, caller: Caller, reason: str) -> None:
        self.wrong.append(reason)
        self.running -= 1
        self.selector.unregister(caller.sock)

    def receive(self, caller: Caller) -> None:
        """Take what has come; at the end of an answer ask for the next one."""
        try:
            data = caller.sock.recv(TURN)
        except BlockingIOError:
            return
        except OSError as fault:
            return self.drop(caller, "broken off: %s" % fault)
        if not data:
            return self.drop(caller, "closed after %r" % b"".join(caller.pieces)[-300:])
        caller.pieces.append(data)
        if not caller.first and self.marks[caller.variant] in b"".join(caller.pieces):
            self.note_first(caller)
        if caller.is_whole(data):
            self.answers.append((caller.variant, b"".join(caller.pieces)))
            self.running -= 1
            self.ask(caller)

    def note_first(self, caller: Caller) -> None:
        """The first text is there; whoever has it lets another caller begin."""
        caller.first = time.perf_counter()
        if caller.asked > 1 or self.work.clients > 1:   # a new connection costs more, once
            self.first.append(caller.first - caller.began)
        if caller.asked == 1:
            self.held += 1
            if self.work.stuck:
                self.selector.unregister(caller.sock)
            if len(self.callers) < self.work.clients:
                self.open_caller()

    def wait_for_word(self) -> None:
        """Tell that all callers have their first text, and wait until we are told to go on."""
        self.held = -1
        print(json.dumps({"held": len(self.callers)}), flush=True)
        sys.stdin.readline()
        if self.work.stuck:
            for caller in self.callers:
                self.selector.register(caller.sock, selectors.EVENT_READ, caller)

    def judge(self, seconds: float) -> Result:
        """Check every answer, and let go of it."""
        count, texts = len(self.answers), 0
        while self.answers:
            variant, answer = self.answers.pop()
            found, wrong = check_answer(self.work.face, self.work.streamed, answer,
                                        self.specs[variant])
            texts += found
            if wrong:
                self.wrong.append(wrong)
        return Result(seconds, count, texts, self.first, self.wrong[:20])


def serve_load() -> None:
    """Do the work that comes on standard input, a line each, until that ends."""
    for line in sys.stdin:
        work = Work(*json.loads(line))
        print(json.dumps(Load(work._replace(spec=Spec(*work.spec))).run()), flush=True)


# Processes, their CPU and their memory.


def process_tree(pid: int) -> List[int]:
    """This process and all that descend from it."""
    children: Dict[int, List[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            parent = read_stat(int(name))[1]
            children.setdefault(int(parent), []).append(int(name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def read_stat(pid: int) -> List[str]:
    """/proc/PID/stat from the state on; of a process that is gone, noughts."""
    try:
        with open("/proc/%d/stat" % pid, encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return ["0"] * 20


def cpu_seconds(pid: int) -> float:
    """CPU that a process tree has used, with its children that have ended."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for one in process_tree(pid):
        used, system, ended, ended_system = map(int, read_stat(one)[11:15])
        try:        # the kernel's clock of that process: stat counts in hundredths of a second
            total += time.clock_gettime((~one << 3) | 2)
        except OSError:
            total += (used + system) / ticks
        total += (ended + ended_system) / ticks
    return total


def resident_kb(pid: int) -> float:
    """Resident memory of a process tree, shared pages counted in every process."""
    total = 0.0
    for one in process_tree(pid):
        for name in ("smaps_rollup", "status"):     # the second may lag by some pages
            try:
                with open("/proc/%d/%s" % (one, name), encoding="utf-8") as file:
                    total += int(re.search(r"(?m)^(?:Rss|VmRSS): *([0-9]+)", file.read())[1])
                break
            except (OSError, TypeError):
                continue
    return total


def start_process(command: List[str], log: Any, **pipes: Any) -> "subprocess.Popen[str]":
    """A process in a session of its own: Ctrl-C is for us, and we end the others."""
    names = ("PATH", "HOME", "LANG", "TMPDIR", "TEMP", "SYSTEMROOT", "LD_LIBRARY_PATH",
             "PYENV_VERSION", "PYTHONDONTWRITEBYTECODE")
    # Nothing else of the environment may matter: not CC_..., not PORT, not http_proxy.
    kept = {name: os.environ[name] for name in names if name in os.environ}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": log, **pipes}
    try:
        return subprocess.Popen(command, stderr=log, env=kept, encoding="utf-8",
                                start_new_session=True, **pipes)
    except OSError as fault:
        raise Failed("cannot start %s: %s" % (command[0], fault)) from fault


def end_process(process: "subprocess.Popen[str]", seconds: float) -> None:
    """End it and all that it started, politely as long as that takes no longer than this."""
    if seconds and process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
    if os.name == "posix":
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):   # all gone already
            pass
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        return listener.getsockname()[1]


def get(port: int, path: str) -> bytes:
    """The beginning of the answer to a small request; nothing where nobody listens."""
    try:
        with socket.create_connection((LOOPBACK, port), 5) as sock:
            sock.sendall(b"GET %b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
                         % path.encode())
            return sock.recv(65536)
    except OSError:
        return b""


HAPROXY = """global
  nbthread 1
  maxconn %(connections)d
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  option http-no-delay
frontend clients
  bind %(host)s:%(port)d
  default_backend upstream
backend upstream
  http-reuse always
  server upstream %(host)s:%(upstream)d
"""


class Target:
    """Who is measured: a proxy that can be started, or the way without one."""

    def __init__(self, name: str, face: str, log: Any,
                 command: Optional[Callable[[int], List[str]]] = None, port: int = 0) -> None:
        self.name, self.face, self.log, self.command, self.port = name, face, log, command, port
        self.process: Any = None

    def start(self) -> Tuple[float, float]:
        """(seconds, CPU seconds) until /health was good."""
        if self.command is None:
            return 0.0, 0.0
        self.port = free_port()
        began = time.perf_counter()
        self.process = start_process(self.command(self.port), self.log)
        while not re.match(rb"HTTP/1\.[01] 200 ", get(self.port, "/health")):
            if self.process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                raise Failed("%s did not start:\n%s" % (self.name, tail_of(self.log)))
            time.sleep(0.002)
        return time.perf_counter() - began, self.cpu()

    def cpu(self) -> float:
        return cpu_seconds(self.process.pid) if self.process and HAS_CPU else 0.0

    def memory(self) -> float:
        """Resident KB."""
        return resident_kb(self.process.pid) if self.process and HAS_CPU else 0.0

    def stop(self) -> None:
        if self.process:
            end_process(self.process, 3.0)
            self.process = None


def tail_of(log: Any) -> str:
    log.flush()
    with open(log.name, "rb") as file:
        return file.read()[-2000:].decode(errors="replace")


# The measures.


class Plan(NamedTuple):
    """How much of everything."""

    rounds: int = 3
    most_seconds: float = 85.0  # a round that would end later is not begun
    slices: int = 6             # of `asks` requests each, for the time to first token
    asks: int = 100
    paced_streams: int = 200    # at 50 deltas a second each
    paced_seconds: float = 2.0
    flat_streams: int = 16
    flat_events: int = 8192
    short_clients: int = 32
    short_seconds: float = 1.2
    open_streams: int = 1000
    stuck_readers: int = 4
    stuck_events: int = 12000   # of 1000 characters: far more than the kernel keeps for a reader
    stuck_seconds: float = 1.5


QUICK = Plan(rounds=2, most_seconds=14.0, slices=2, asks=60, paced_streams=100,
             paced_seconds=0.5, flat_events=2048, short_seconds=0.2, open_streams=200,
             stuck_readers=2, stuck_events=6000, stuck_seconds=0.3)


def scale_plan(plan: Plan, scale: float) -> Plan:
    """The plan with its sizes times this."""
    return Plan(*plan[:2], *[type(value)(max(2 if type(value) is int else 0.1, value * scale))
                             for value in plan[2:]])


class Row(NamedTuple):
    """A line of the table."""

    key: str
    title: str
    unit: str
    proc: bool = False      # whether it cannot be had without /proc
    ratio: bool = True      # whether HAProxy's figure is more than noise around nothing


ROWS = [Row("first_p50", "added time to first token, p50", "ms"),
        Row("first_p95", "added time to first token, p95", "ms", ratio=False),
        Row("first_p99", "added time to first token, p99", "ms", ratio=False),
        Row("paced_cpu", "CPU per event, many paced streams", "us", True),
        Row("flat_cpu", "CPU per event, flat out, 1 a write", "us", True),
        Row("group_cpu", "CPU per event, flat out, 64 a write", "us", True),
        Row("flat_rate", "events/s, flat out, 1 a write", "1/s"),
        Row("group_rate", "events/s, flat out, 64 a write", "1/s"),
        Row("merged", "frames per event", "", ratio=False),
        Row("short_cpu", "CPU per request, streamed, 5 events", "us", True),
        Row("plain_cpu", "CPU per request, not streamed", "us", True),
        Row("short_rate", "requests/s, streamed, 5 events", "1/s"),
        Row("plain_rate", "requests/s, not streamed", "1/s"),
        Row("start", "start, to first good /health", "ms"),
        Row("start_cpu", "CPU until then", "ms", True),
        Row("idle", "memory, idle after start", "MB", True),
        Row("per_stream", "memory per open stream", "KB", True),
        Row("stuck", "growth with stuck readers", "MB", True, False),
        Row("stuck_cpu", "CPU per second while they are stuck", "ms", True, False)]
Figures = Dict[str, float]


class Bench:
    """All processes, and what was measured."""

    def __init__(self, plan: Plan, api: str, program: str, haproxy: Optional[str]) -> None:
        self.plan, self.api, self.program, self.haproxy = plan, api, program, haproxy
        self.folder = tempfile.mkdtemp(prefix="ccproxy-bench-")
        self.log = open(os.path.join(self.folder, "log"), "w+", encoding="utf-8")
        self.processes: List[Any] = []
        self.targets: List[Target] = []
        self.figures: Dict[str, Dict[str, List[float]]] = {row.key: {} for row in ROWS}

    def start(self) -> None:
        """Start upstream, load and whoever is measured."""
        self.upstream = self.start_part("--upstream")
        self.upstream_port = int(self.hear(self.upstream))
        self.loader = self.start_part("--load")
        self.targets.append(Target("direct", "raw", self.log, port=self.upstream_port))
        if self.haproxy:
            try:
                self.start_target("HAProxy", "raw", self.haproxy_command)
            except Failed as fault:         # measure what can be measured
                print(fault, file=sys.stderr)
                self.targets.pop().stop()
                self.haproxy = None
        self.start_target("ccproxy", self.api, self.ccproxy_command)

    def start_target(self, name: str, face: str, command: Callable[[int], List[str]]) -> None:
        self.targets.append(Target(name, face, self.log, command))
        self.targets[-1].start()

    def start_part(self, role: str) -> "subprocess.Popen[str]":
        process = start_process([sys.executable, os.path.abspath(__file__), role], self.log,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.append(process)
        return process

    def hear(self, process: Any) -> str:
        line = process.stdout.readline()
        if not line:
            raise Failed("a part of the bench died:\n" + tail_of(self.log))
        return line

    def ccproxy_command(self, port: int) -> List[str]:
        """As a person starts it, but for a config file that may lie beside it."""
        config = os.path.join(self.folder, "config.json")
        with open(config, "w", encoding="utf-8") as file:
            file.write("{}")
        return [sys.executable, self.program, "--config", config, "--host", LOOPBACK, "--port",
                str(port), "--api-base", "http://%s:%d" % (LOOPBACK, self.upstream_port)]

    def haproxy_command(self, port: int) -> List[str]:
        config = os.path.join(self.folder, "haproxy-%d.cfg" % port)
        with open(config, "w", encoding="utf-8") as file:
            file.write(HAPROXY % {"host": LOOPBACK, "port": port, "upstream": self.upstream_port,
                                  "connections": self.plan.open_streams + 50})
        return [self.haproxy or "", "-db", "-f", config]

    def close(self) -> None:
        """End everything that was started."""
        for target in self.targets:
            target.stop()
        for process in self.processes:
            end_process(process, 0.0)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, target: Target, spec: Spec, clients: int, requests: int,
             **more: Any) -> Iterator[Result]:
        """Have work done: yields nothing but the result, after a pause if the work has one."""
        work = Work(target.port, target.face, spec, clients, requests, **more)
        print(json.dumps(work), file=self.loader.stdin, flush=True)
        answer = json.loads(self.hear(self.loader))
        if work.pause and "held" in answer:
            yield Result(0.0, answer["held"], 0, [], [])
            print("go", file=self.loader.stdin, flush=True)
            answer = json.loads(self.hear(self.loader))
        result = Result(*answer)
        if result.wrong:
            raise WrongAnswers("%s: %s" % (target.name, "\n".join(result.wrong[:5])))
        yield result

    def run(self, target: Target, spec: Spec, clients: int, requests: int, **more: Any) -> Result:
        return next(self.load(target, spec, clients, requests, **more))

    def release(self) -> None:
        get(self.upstream_port, "/release")


def percentile(values: List[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def measure_first(bench: Bench, order: List[Target]) -> Dict[str, Figures]:
    """One caller asks in turn through each; the way without a proxy is taken off."""
    times: Dict[str, List[float]] = {target.name: [] for target in order}
    for _ in range(bench.plan.slices):
        for target in order:
            times[target.name] += bench.run(target, Spec(3), 1, bench.plan.asks).first
    found = {}
    for name, values in times.items():
        found[name] = {}
        for key, share in (("first_p50", 0.5), ("first_p95", 0.95), ("first_p99", 0.99)):
            base = 0.0 if name == "direct" else percentile(times["direct"], share)
            found[name][key] = (percentile(values, share) - base) * 1e3
    return found


def measure_paced(bench: Bench, target: Target) -> Figures:
    """Many streams at 50 events a second; opening them is not counted."""
    plan = bench.plan
    spec = Spec(max(2, int(plan.paced_seconds * 50)), rate=50, hold=1)
    run = bench.load(target, spec, plan.paced_streams, plan.paced_streams, pause=True)
    next(run)
    before = target.cpu()
    bench.release()
    result = next(run)
    return {"paced_cpu": (target.cpu() - before) * 1e6 / (result.answers * (spec.count - 1))}


def measure_flat(bench: Bench, target: Target) -> Figures:
    """Few streams, each as fast as it is taken: one event in a chunk and write, then 64."""
    found, plan, merged = {}, bench.plan, []
    for name, group, times in (("flat", 1, 1), ("group", 64, 2)):
        spec = Spec(plan.flat_events, group=group)
        bench.run(target, spec, VARIANTS, VARIANTS)     # so that all its bytes are made
        before = target.cpu()
        result = bench.run(target, spec, plan.flat_streams, plan.flat_streams * times)
        events = result.answers * spec.count
        found[name + "_cpu"] = (target.cpu() - before) * 1e6 / events
        found[name + "_rate"] = events / result.seconds
        merged.append(result.texts / events)
    return {**found, "merged": min(merged)}


def measure_short(bench: Bench, target: Target) -> Figures:
    """Callers on kept connections ask for short answers, one after the other."""
    found = {}
    for name, streamed in (("short", True), ("plain", False)):
        if target.face == "raw" and not streamed:       # the upstream has no such answers
            continue
        clients = bench.plan.short_clients
        bench.run(target, Spec(5), clients, 2 * clients, streamed=streamed)
        before = target.cpu()
        result = bench.run(target, Spec(5), clients, 1 << 20, streamed=streamed,
                           seconds=bench.plan.short_seconds)
        found[name + "_cpu"] = (target.cpu() - before) * 1e6 / result.answers
        found[name + "_rate"] = result.answers / result.seconds
    return found


def measure_fresh(bench: Bench, target: Target) -> Figures:
    """A new process each for the open streams and for the stuck readers: memory once taken is
    seldom given back, so it would hide what comes after."""
    fresh = Target(target.name, target.face, bench.log, target.command)
    bench.targets.append(fresh)             # so that it is ended whatever happens
    try:
        started = fresh.start()
        time.sleep(0.2)
        idle = fresh.memory()
        found = measure_open(bench, fresh)
        fresh.stop()
        again = fresh.start()
        found.update(measure_stuck(bench, fresh))
    finally:
        fresh.stop()
        bench.targets.remove(fresh)
    return {"start": statistics.mean((started[0], again[0])) * 1e3, "idle": idle / 1024,
            "start_cpu": statistics.mean((started[1], again[1])) * 1e3, **found}


def measure_open(bench: Bench, target: Target) -> Figures:
    """Streams that have shown one event and wait for the next."""
    bench.run(target, Spec(5), 4, 20)
    before = target.memory()
    count = bench.plan.open_streams
    run = bench.load(target, Spec(2, hold=1), count, count, pause=True)
    held = next(run).answers
    time.sleep(0.1)
    grown = target.memory() - before
    bench.release()
    next(run)
    return {"per_stream": grown / held}


def measure_stuck(bench: Bench, target: Target) -> Figures:
    """Readers stop after the first event of a long answer; later they read the rest."""
    bench.run(target, Spec(5), 4, 20)
    plan, before = bench.plan, target.memory()
    run = bench.load(target, Spec(plan.stuck_events, size=1000, group=64), plan.stuck_readers,
                     plan.stuck_readers, pause=True, stuck=True)
    next(run)
    peak, half = before, plan.stuck_seconds / 2
    end = time.monotonic() + half           # until then all buffers on the way have filled
    while time.monotonic() < end:
        time.sleep(0.05)
        peak = max(peak, target.memory())
    used = target.cpu()
    time.sleep(half)
    used = target.cpu() - used
    peak = max(peak, target.memory())
    next(run)
    return {"stuck": (peak - before) / 1024, "stuck_cpu": used * 1e3 / half}


def measure_round(bench: Bench, number: int) -> None:
    """Every measure once, each in the same order of targets, which the next round turns."""
    turn = number % len(bench.targets)
    order = bench.targets[turn:] + bench.targets[:turn]
    proxies = [target for target in order if target.command]
    note_figures(bench, measure_first(bench, order))
    for measure, targets in ((measure_paced, proxies), (measure_flat, order),
                             (measure_short, order), (measure_fresh, proxies)):
        for target in targets:
            began = time.monotonic()
            note_figures(bench, {target.name: measure(bench, target)})
            if sys.stderr.isatty():
                print("round %d  %-14s %-8s %5.1f s" % (
                    number + 1, measure.__name__, target.name, time.monotonic() - began),
                      file=sys.stderr)


def note_figures(bench: Bench, found: Dict[str, Figures]) -> None:
    """Keep what can be known: CPU and memory only where /proc tells them."""
    for name, figures in found.items():
        for row in ROWS:
            if row.key not in figures or row.proc and (name == "direct" or not HAS_CPU):
                continue
            bench.figures[row.key].setdefault(name, []).append(figures[row.key])


# What is shown.


def first_match(path: str, pattern: str, otherwise: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            found = re.search(pattern, file.read())
    except OSError:
        found = None
    return found[1].strip() if found else otherwise


def describe_machine(haproxy: Optional[str]) -> Dict[str, Any]:
    """What the figures belong to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = subprocess.run([haproxy, "-v"], stdout=subprocess.PIPE, encoding="utf-8",
                          stdin=subprocess.DEVNULL).stdout if haproxy else ""
    version = re.search(r"version ([^\s-]+)", said)
    return {"cpu": first_match("/proc/cpuinfo", r"(?m)^model name\s*: (.*)$",
                               platform.processor() or platform.machine()),
            "cores": cores, "platform": platform.platform(terse=True),
            "python": "%s %s" % (platform.python_implementation(), platform.python_version()),
            "haproxy": version[1] if version else None,
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}


def machine_line(machine: Dict[str, Any]) -> str:
    """The same as a line."""
    return ", ".join([machine["cpu"], "%s cores" % machine["cores"], machine["platform"],
                      machine["python"],
                      "HAProxy %s" % machine["haproxy"] if machine["haproxy"] else "no HAProxy",
                      *(["load %s" % machine["load"]] if machine["load"] is not None else [])])


def shown(value: Optional[float]) -> str:
    """Three figures that count; the rest is noise."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return "{:,.0f}".format(value)
    return "%.1f" % value if abs(value) >= 10 else "%.2f" % value


def ratio_of(figures: Dict[str, List[float]]) -> Optional[float]:
    """The median of the rounds' own ratios: what slows one round slows both sides of it."""
    pairs = zip(figures.get("ccproxy", []), figures.get("HAProxy", []))
    ratios = [ours / theirs for ours, theirs in pairs if theirs > 0]
    return statistics.median(ratios) if ratios else None


def table_rows(bench: Bench) -> List[List[str]]:
    """The table as words: a heading, then a line for each row that was measured."""
    names = [target.name for target in bench.targets]
    rows = [["", "unit", *names, *(["ratio"] if bench.haproxy else []), "least..most"]]
    for row in ROWS:
        figures = bench.figures[row.key]
        if row.proc and not HAS_CPU:
            rows.append([row.title, row.unit, "not measured on " + platform.system()])
            continue
        medians = [statistics.median(figures[name]) if figures.get(name) else None
                   for name in names]
        ratio = ratio_of(figures) if row.ratio else None
        own = figures.get("ccproxy", [])
        rows.append([row.title, row.unit, *map(shown, medians),
                     *([shown(ratio) + "x" if ratio is not None else "-"]
                       if bench.haproxy else []),
                     "%s..%s" % (shown(min(own)), shown(max(own))) if own else "-"])
    return rows


def print_table(bench: Bench) -> None:
    rows = table_rows(bench)
    width = max(len(row[0]) for row in rows)
    for row in rows:
        print("%-*s  %-4s %s" % (width, row[0], row[1],
                                 " ".join("%10s" % cell for cell in row[2:-1])
                                 + ("  %17s" % row[-1] if len(row) > 3 else row[-1])))


def write_json(bench: Bench, machine: Dict[str, Any], path: str) -> None:
    """All rounds' figures, for comparing later."""
    units = {row.key: {"title": row.title, "unit": row.unit} for row in ROWS}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"machine": machine, "api": bench.api, "plan": bench.plan._asdict(),
                   "rows": units, "rounds": bench.figures}, file, indent=1)
        file.write("\n")


def room_for(streams: int) -> int:
    """As many streams as a proxy may have descriptors for: two each, and some to spare.

    The limit is raised for us and our children alone, no further than needed, and never above
    what the system allows."""
    if resource is None:
        return min(streams, 200)            # select() on Windows takes 512 at most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * streams + 500
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):       # macOS: less than the hard limit may be too much
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return streams if soft == resource.RLIM_INFINITY else max(2, min(streams, (soft - 150) // 2))


def stop_here(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="some seconds; rougher figures")
    parser.add_argument("--json", metavar="FILE", help="write all rounds' figures there")
    parser.add_argument("--api", choices=list(STREAMED)[1:], default="chat")
    parser.add_argument("--ccproxy", metavar="PATH", default=os.path.join(ROOT, "ccproxy.py"))
    parser.add_argument("--scale", type=float, default=1.0, help="all sizes times this")
    parser.add_argument("--rounds", type=int, help="at most so many")
    return parser.parse_args()


def run_rounds(bench: Bench) -> int:
    """The rounds, as many as there is time for; how many there were."""
    began, plan = time.monotonic(), bench.plan
    for number in range(plan.rounds):
        start = time.monotonic()
        measure_round(bench, number)
        now = time.monotonic()
        if now + (now - start) - began > plan.most_seconds:
            break
    return number + 1


def run_bench(bench: Bench) -> int:
    """Measure and show; the exit status."""
    status, began, rounds = 0, time.monotonic(), 0
    try:
        bench.start()
        rounds = run_rounds(bench)
    except WrongAnswers as fault:
        print("WRONG ANSWERS, so this is where it ends: %s\n%s" % (fault, tail_of(bench.log)))
        status = 1
    except Failed as fault:
        print(fault, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # a second Ctrl-C must not leave anything
        bench.close()
    print_table(bench)
    print("%d of %d rounds in %.0f s, medians; least..most: of ccproxy's rounds; direct: without "
          "a proxy" % (rounds, bench.plan.rounds, time.monotonic() - began)
          + ("\nratio: to HAProxy, which passes bytes through and translates nothing"
             if bench.haproxy else ""))
    return status


def main() -> int:
    arguments = read_arguments()
    plan = scale_plan(QUICK if arguments.quick else Plan(), arguments.scale)
    plan = plan._replace(rounds=max(1, arguments.rounds or plan.rounds))
    streams = room_for(plan.open_streams)
    program = os.path.abspath(arguments.ccproxy)
    haproxy = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
    machine = describe_machine(haproxy)
    print("ccproxy %s, %s API" % (first_match(program, r'(?m)^__version__ = "(.*)"', "?"),
                                  arguments.api))
    print(machine_line(machine), flush=True)
    if (machine["load"] or 0) > machine["cores"] / 2:
        print("the machine has other work: times will be far too high, CPU somewhat")
    if streams < plan.open_streams:
        print("descriptors are for %d open streams only" % streams)
        plan = plan._replace(open_streams=streams, paced_streams=min(streams, plan.paced_streams))
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)        # nohup stays what it is
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, stop_here)
    bench = Bench(plan, arguments.api, program, haproxy)
    status = run_bench(bench)
    if arguments.json and status < 2:
        write_json(bench, machine, arguments.json)
    return status


if __name__ == "__main__":
    if sys.argv[1:] == ["--upstream"]:
        Upstream().run()
    elif sys.argv[1:] == ["--load"]:
        serve_load()
    else:
        sys.exit(main())
