"""A scriptable stand-in for Command Code on loopback: it can stall, cut, trickle, refuse and lie.

Each POST takes the next script from `scripts`, or `default` when none is left.  A script is a
function of (socket, request); the makers below cover what tests want most.
"""
from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import struct
import threading
import time
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Union

from fake_provider import api_of, params_of, say_in

# Set to openai or anthropic, all that is made here is said in that API from the start, and
# tests/harness.py asks for it.  test_provider_upstream.py is meant to run so, and whatever else
# does not look into what alpha is sent (test_life.py, test_restart.py, test_secrets.py, ...).
DIALECT = os.environ.get("CCPROXY_TEST_UPSTREAM", "")
STREAMS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "streams")
MODELS = {"object": "list", "data": [
    {"id": "deepseek/deepseek-v4-flash", "object": "model", "created": 1, "owned_by": "x",
     "name": "DeepSeek V4 Flash", "context_length": 1000000},
    {"id": "vendor/New-Model", "object": "model", "created": 1, "owned_by": "x",
     "name": "Brand New", "context_length": 123}]}


class Request(NamedTuple):
    """What arrived: the head's first line, its fields in order, and the body's bytes."""

    line: str
    fields: List[Any]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def params(self) -> Any:
        """What is asked for, in alpha's words, whichever upstream's API it came in."""
        return params_of(self.json)

    def field(self, name: str) -> Optional[str]:
        return next((value for key, value in self.fields if key.lower() == name.lower()), None)


Script = Callable[[socket.socket, Request], None]


def recorded(name: str) -> bytes:
    """A recorded answer by the beginning of its file name."""
    found = [one for one in sorted(os.listdir(STREAMS)) if one.startswith(name)]
    with open(os.path.join(STREAMS, found[0]), "rb") as file:
        return file.read()


def ndjson(*events: Any) -> bytes:
    lines = b"".join(json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
                     for event in events)
    return say_in(DIALECT, lines) if DIALECT else lines


def text_answer(*texts: str, reason: str = "stop", **usage: int) -> bytes:
    """A plain answer of these text deltas."""
    used = {"inputTokens": 7, "outputTokens": 3, **usage}
    return ndjson({"type": "start"}, *[{"type": "text-delta", "id": "0", "text": text}
                                       for text in texts],
                  {"type": "finish", "finishReason": reason, "totalUsage": used})


def pieces_of(data: bytes, cut: Optional[int]) -> Iterable[bytes]:
    return [data] if not cut else [data[at:at + cut] for at in range(0, len(data), cut)]


def stream(data: Union[bytes, str], cut: Optional[int] = None, pause: float = 0.0,
           fields: str = "", end: bool = True) -> Script:
    """A 200 whose chunked body is `data` (or a recorded answer), in chunks of `cut` bytes; in the
    API that was asked for."""
    given = recorded(data) if isinstance(data, str) else data
    said = {"": given}

    def run(sock: socket.socket, request: Request) -> None:
        api = api_of(request.line)
        if api not in said:
            said[api] = say_in(api, given)
        content = said[api]
        sock.sendall(("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-trace-id: "
                      "0123456789abcdef0123456789abcdef\r\n%stransfer-encoding: chunked\r\n\r\n"
                      % fields).encode())
        for piece in pieces_of(content, cut):
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            if pause:
                time.sleep(pause)
        if end:
            sock.sendall(b"0\r\n\r\n")
        else:
            sock.close()
    return run


def status(code: int, body: Union[bytes, Dict[str, Any]], fields: str = "") -> Script:
    """An answer of another status with a JSON or other body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return raw(("HTTP/1.1 %d X\r\n%scontent-length: %d\r\n\r\n" % (code, fields, len(content))
                ).encode() + content)


def raw(data: bytes, close: bool = False, pause: float = 0.0) -> Script:
    """These bytes, whatever they are."""
    def run(sock: socket.socket, request: Request) -> None:
        sock.sendall(data)
        if pause:
            time.sleep(pause)
        if close:
            sock.close()
    return run


def reset(data: bytes = b"") -> Script:
    """These bytes and then a RST."""
    def run(sock: socket.socket, request: Request) -> None:
        if data:
            sock.sendall(data)
            time.sleep(0.05)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    return run


def stall(data: bytes = b"", seconds: float = 30.0) -> Script:
    """These bytes and then silence, until the other side leaves or the time is over."""
    def run(sock: socket.socket, request: Request) -> None:
        if data:
            sock.sendall(data)
        sock.settimeout(seconds)
        try:
            sock.recv(1)
        except OSError:
            pass
        sock.close()
    return run


def in_pieces(pieces: Iterable[bytes], pause: float = 0.001, close: bool = False) -> Script:
    """Each piece in a segment of its own, and after the last one perhaps a FIN."""
    def run(sock: socket.socket, request: Request) -> None:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(pause)
        if close:
            sock.close()
    return run


def endless(head: bytes, piece: bytes, pause: float = 0.0) -> Script:
    """These bytes and then a piece again and again, until the other side leaves."""
    def run(sock: socket.socket, request: Request) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(piece)
            if pause:
                time.sleep(pause)
    return run


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def close_listener(listener: socket.socket) -> None:
    """Also for the thread that waits in accept()."""
    with contextlib.suppress(OSError):      # as macOS has it
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


class FakeUpstream:
    """The listening socket and what arrived there."""

    def __init__(self, tls: Optional[ssl.SSLContext] = None, port: int = 0) -> None:
        self.scripts: List[Script] = []
        self.default: Script = stream(text_answer("Hello", " there"))
        self.models: Any = MODELS
        self.side_script: Optional[Script] = None       # answers GETs instead of `models`
        self.requests: List[Request] = []
        self.side_requests: List[Request] = []
        self.open = 0               # connections that are open now
        self.connections = 0
        self.tls = tls
        self.lock = threading.Lock()
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.socket.listen(512)
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def base(self) -> str:
        return "%s://127.0.0.1:%d" % ("https" if self.tls else "http", self.port)

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.socket.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        with self.lock:
            self.open += 1
            self.connections += 1
            number = self.connections
        try:
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            while self.serve_one(sock, number):
                pass
        except OSError:
            pass
        finally:
            sock.close()
            with self.lock:
                self.open -= 1

    def serve_one(self, sock: socket.socket, number: int) -> bool:
        """One request and its answer; False when the connection is done."""
        data = b""
        while b"\r\n\r\n" not in data:
            piece = sock.recv(65536)
            if not piece:
                return False
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        line, *rows = head.decode("latin-1").split("\r\n")
        fields = [tuple(row.split(": ", 1)) for row in rows]
        length = int(dict((key.lower(), value) for key, value in fields).get("content-length", 0))
        while len(body) < length:
            piece = sock.recv(65536)
            if not piece:
                return False
            body += piece
        request = Request(line, fields, body, number)
        if line.startswith("GET"):
            self.side_requests.append(request)
            if self.side_script:
                self.side_script(sock, request)
                return sock.fileno() >= 0
            answer = json.dumps(self.models).encode()
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
                         b"%d\r\n\r\n%b" % (len(answer), answer))
            return True
        with self.lock:
            self.requests.append(request)
            script = self.scripts.pop(0) if self.scripts else self.default
        script(sock, request)
        return sock.fileno() >= 0

    def close(self) -> None:
        close_listener(self.socket)


class FakeProxy:
    """An HTTP proxy: CONNECT and absolute-form; what comes behind a head is passed on as it is."""

    def __init__(self, answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> None:
        self.answer = answer            # to CONNECT
        self.heads: List[bytes] = []
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(64)
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self) -> str:
        return "http://127.0.0.1:%d" % self.port

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        try:
            self.serve_one(sock)
        except OSError:
            sock.close()

    def serve_one(self, sock: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = sock.recv(65536)
            if not piece:
                return
            data += piece
        self.heads.append(data.partition(b"\r\n\r\n")[0])
        method, target = data.split(b" ")[:2]
        if method != b"CONNECT" and not target.startswith(b"http://"):
            sock.sendall(b"HTTP/1.1 400 Not For A Proxy\r\ncontent-length: 0\r\n\r\n")
            sock.close()
            return
        authority = target if method == b"CONNECT" else target.split(b"/")[2]
        host, _, port = authority.decode().rpartition(":")
        if method == b"CONNECT":
            sock.sendall(self.answer)
            if b" 200 " not in self.answer:
                sock.close()
                return
            data = b""
        other = socket.create_connection((host, int(port)))
        other.sendall(data)
        threading.Thread(target=pump, args=(other, sock), daemon=True).start()
        pump(sock, other)

    def close(self) -> None:
        close_listener(self.socket)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on bytes in one direction until either side is done."""
    try:
        data = source.recv(65536)
        while data:
            sink.sendall(data)
            data = source.recv(65536)
    except OSError:
        pass
    finally:
        for sock in (source, sink):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def main() -> None:
    """Serve a recorded answer (argument 2) on a port (argument 1), for trying things by hand."""
    import sys
    upstream = FakeUpstream()
    if len(sys.argv) > 1:
        upstream.default = stream(sys.argv[1], cut=int(sys.argv[2]) if len(sys.argv) > 2 else None)
    print(upstream.base, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
