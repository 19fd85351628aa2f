"""SOCKETS, LISTENING AND CONNECTING: Channels on real sockets, plain and TLS, and asyncio's own
transports in their place."""
from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import struct
import threading

import pytest
from fake_upstream import FakeUpstream, stream, text_answer
from harness import CHAT, FAST, MESSAGES, ccproxy, wait_until

CERTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "certs")


class Sink(asyncio.BufferedProtocol):
    """A protocol that remembers what happens to it."""

    def __init__(self):
        self.data, self.said, self.buffer = b"", [], bytearray(65536)

    def connection_made(self, transport):
        self.transport = transport

    def get_buffer(self, sizehint):
        return memoryview(self.buffer)

    def buffer_updated(self, nbytes):
        self.data += self.buffer[:nbytes]

    def eof_received(self):
        self.said.append("eof")

    def connection_lost(self, exc):
        self.said.append("lost")

    def pause_writing(self):
        self.said.append("pause")

    def resume_writing(self):
        self.said.append("resume")


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    assert condition()


def with_pair(work, small=False):
    """Run `work(channel, protocol, other socket)` in a loop of its own."""
    async def run():
        ours, theirs = socket.socketpair()
        if small:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        ours.setblocking(False)
        theirs.settimeout(10)
        protocol = Sink()
        channel = ccproxy.Channel(ours, protocol)
        try:
            await work(channel, protocol, theirs)
        finally:
            channel.abort()
            theirs.close()
            await until(lambda: "lost" in protocol.said)
            assert protocol.said.count("lost") == 1 and ours.fileno() == -1
    asyncio.run(run())


def read_slowly(sock, size):
    data = b""
    while len(data) < size:
        data += sock.recv(3000)
    return data


def test_what_comes_is_handed_over():
    async def work(channel, protocol, theirs):
        theirs.sendall(b"hello")
        await until(lambda: protocol.data == b"hello")
        channel.pause_reading()
        theirs.sendall(b" world")
        await asyncio.sleep(0.05)
        assert protocol.data == b"hello"
        channel.resume_reading()
        await until(lambda: protocol.data == b"hello world")
        theirs.shutdown(socket.SHUT_WR)
        await until(lambda: protocol.said == ["eof", "lost"])
        channel.write(b"too late")
        channel.write_eof()
    with_pair(work)


def test_a_slow_reader_gets_everything_in_order():
    async def work(channel, protocol, theirs):
        pieces = [bytes([number]) * (number * 997) for number in range(1, 60)]
        wanted = b"".join(pieces)
        for piece in pieces:
            channel.write(piece)
        assert protocol.said == ["pause"]
        assert channel.get_write_buffer_size() > 64 * 1024
        channel.write_eof()
        got = await asyncio.get_running_loop().run_in_executor(None, read_slowly, theirs,
                                                               len(wanted))
        assert got == wanted and protocol.said == ["pause", "resume"]
        assert theirs.recv(1) == b""            # the FIN came behind all of it
        assert channel.get_write_buffer_size() == 0 and not channel.is_closing()
        theirs.sendall(b"still here")
        await until(lambda: protocol.data == b"still here")
    with_pair(work, small=True)


def test_closing_sends_what_waits():
    async def work(channel, protocol, theirs):
        channel.write(b"x" * 500_000)
        channel.close()
        assert channel.is_closing() and "lost" not in protocol.said
        got = await asyncio.get_running_loop().run_in_executor(None, read_slowly, theirs, 500_000)
        assert got == b"x" * 500_000
        await until(lambda: "lost" in protocol.said)
    with_pair(work, small=True)


@pytest.mark.parametrize("first", ["", "close"])
def test_aborting_loses_what_waits(first):
    async def work(channel, protocol, theirs):
        channel.write(b"x" * 500_000)
        if first:
            channel.close()
        channel.abort()
        assert channel.is_closing() and channel.get_write_buffer_size() == 0
        await until(lambda: "lost" in protocol.said)
        channel.abort()
        channel.close()
    with_pair(work, small=True)


@pytest.mark.parametrize("waits", [False, True])
def test_a_reset_is_the_end(waits):
    async def work():
        listening = socket.create_server(("127.0.0.1", 0))
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
        ours.setblocking(False)
        protocol = Sink()
        channel = ccproxy.Channel(ours, protocol)
        if waits:
            while not channel.get_write_buffer_size():
                channel.write(b"x" * 100_000)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        await until(lambda: "lost" in protocol.said)
        listening.close()
    asyncio.run(work())


# TLS.

def server_context():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(CERTS, "server.pem"))
    return context


def with_tls(serve, work):
    """Run `work(channel, protocol)` against `serve(TLS socket)` in a thread."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer():
        sock, _ = listening.accept()
        with sock:
            serve(sock)

    async def run():
        context = ssl.create_default_context(cafile=os.path.join(CERTS, "ca.pem"))
        sock = await ccproxy.connect_socket(*listening.getsockname())
        protocol = Sink()
        channel = ccproxy.Channel(sock, protocol)
        try:
            await work(channel, protocol, channel.start_tls(context, "localhost"))
        finally:
            channel.abort()
            await until(lambda: "lost" in protocol.said)
    thread = threading.Thread(target=answer)
    thread.start()
    try:
        asyncio.run(run())
    finally:
        thread.join(10)
        listening.close()
    assert not thread.is_alive()


def test_tls_both_ways_with_much_data():
    sent = os.urandom(3_000_000)

    def serve(sock):
        with server_context().wrap_socket(sock, server_side=True) as tls:
            got = b""
            while len(got) < len(sent):
                got += tls.recv(65536)
            tls.sendall(got)
            tls.recv(1)

    async def work(channel, protocol, handshake):
        await handshake
        assert not channel.can_write_eof()
        for at in range(0, len(sent), 700_000):
            channel.write(sent[at:at + 700_000])
        await until(lambda: len(protocol.data) == len(sent))
        assert protocol.data == sent
    with_tls(serve, work)


def test_bytes_that_openssl_holds_are_not_forgotten():
    """Reading is paused between two reads of one record, and goes on."""
    def serve(sock):
        with server_context().wrap_socket(sock, server_side=True) as tls:
            tls.sendall(b"a" * 16000)
            tls.recv(1)

    async def work(channel, protocol, handshake):
        def first_piece(nbytes):
            Sink.buffer_updated(protocol, nbytes)
            channel.pause_reading()
            del protocol.buffer_updated
        protocol.buffer, protocol.buffer_updated = bytearray(100), first_piece
        await handshake
        await until(lambda: protocol.data)
        await asyncio.sleep(0.05)
        assert len(protocol.data) == 100
        channel.resume_reading()
        await until(lambda: protocol.data == b"a" * 16000)
    with_tls(serve, work)


def test_a_channel_closed_in_its_handshake():
    def serve(sock):
        sock.recv(65536)
        sock.recv(1)

    async def work(channel, protocol, handshake):
        task = asyncio.ensure_future(handshake)
        await asyncio.sleep(0.05)
        channel.abort()
        with pytest.raises(ConnectionAbortedError):
            await task
    with_tls(serve, work)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_a_server_that_speaks_no_tls(answer):
    def serve(sock):
        sock.recv(65536)
        sock.sendall(answer)

    async def work(channel, protocol, handshake):
        with pytest.raises(OSError):
            await handshake
    with_tls(serve, work)


# Listening and connecting.

def test_connections_wait_while_descriptors_are_short(make_proxy, monkeypatch):
    """One line in the log, and they are served when there are some again."""
    proxy = make_proxy()

    class Short:
        """A listening socket whose first accept fails."""

        def __init__(self, sock):
            self.sock, self.failed = sock, 0

        def __getattr__(self, name):
            return getattr(self.sock, name)

        def accept(self):
            self.failed += 1
            if self.failed == 1:
                raise OSError(errno.EMFILE, "Too many open files")
            return self.sock.accept()
    if not proxy.app.bare:
        pytest.skip("asyncio accepts here")
    short = Short(proxy.server.sockets[0])

    def exchange():
        proxy.loop.remove_reader(short.sock.fileno())
        proxy.server.watch(short)
    proxy.loop.call_soon_threadsafe(exchange)
    assert proxy.request("GET", "/health").status == 200
    assert short.failed >= 2
    assert proxy.log.getvalue().count("connections wait for a second: Too many open files") == 1


def test_an_address_after_one_that_refuses(monkeypatch):
    """All addresses of a name are tried, in order."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as gone:
        refused = gone.getsockname()
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
             for address in (refused, ("127.0.0.1", port))]
    real = socket.getaddrinfo

    def resolve(host, *rest, flags=0, **more):
        if host != "two.example":
            return real(host, *rest, flags=flags, **more)
        if flags:
            raise socket.gaierror(socket.EAI_NONAME, "not an address")
        return found
    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    async def run():
        sock = await ccproxy.connect_socket("two.example", port)
        assert sock.getpeername() == ("127.0.0.1", port) and not sock.getblocking()
        sock.close()
    asyncio.run(run())
    listening.close()


def test_names_are_looked_up_without_blocking(make_proxy, monkeypatch):
    """A resolver that hangs holds nobody up but its own request."""
    real, go = socket.getaddrinfo, threading.Event()

    def resolve(host, *rest, flags=0, **more):
        if host == "slow.example":
            if flags:
                raise socket.gaierror(socket.EAI_NONAME, "not an address")
            go.wait(10)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *rest, flags=flags, **more)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    proxy = make_proxy(apiBase="http://slow.example", useProviderModels=False,
                       limits=FAST._replace(backoff=()))
    with proxy.send_post(CHAT) as sock:
        wait_until(lambda: proxy.app.relays)
        assert proxy.request("GET", "/health").status == 200
        go.set()
        sock.settimeout(10)
        assert b"502" in sock.recv(65536)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("stream_it", [True, False])
@pytest.mark.parametrize("tls", [False, True])
def test_asyncios_own_transports(make_proxy, monkeypatch, path, stream_it, tls):
    """What Windows uses: the same answers, over TLS too."""
    fake = FakeUpstream(server_context() if tls else None)
    fake.default = stream(text_answer("Hello", " there"), cut=7)
    monkeypatch.setenv("SSL_CERT_FILE", os.path.join(CERTS, "ca.pem"))
    shown = []
    for bare in (True, False):
        proxy = make_proxy(bare=bare, apiBase=fake.base, useProviderModels=False)
        for _ in range(2):
            answer = proxy.post(path, stream=stream_it)
            assert answer.status == 200
            shown.append(b"there" in answer.body)
    assert shown == [True] * 4
    fake.close()
