"""HTTP WIRE: heads, framing and codings of both directions, and what must be refused."""
from __future__ import annotations

import gzip
import random
import re
import types
import zlib

import pytest
from harness import ccproxy

try:
    from re import _constants as sre_constants, _parser as sre_parser
except ImportError:                 # Python 3.10 and older
    import sre_constants
    import sre_parse as sre_parser

CLIENT, UPSTREAM = ccproxy.client_fault, ccproxy.upstream_fault
NEXT = b"GET /next HTTP/1.1\r\nhost: h\r\n\r\n"
KIB = 1024


def short_id(value):
    return repr(value)[:60]


def table(names, rows):
    """Cases with short names."""
    return pytest.mark.parametrize(names, rows, ids=short_id)


def cuts(data, seed=1, times=12):
    """The same bytes whole, one at a time, and cut at random."""
    yield [data]
    yield [data[at:at + 1] for at in range(len(data))]
    chance = random.Random(seed)
    for _ in range(times if len(data) > 1 else 0):
        marks = sorted(chance.sample(range(1, len(data)), min(len(data) - 1,
                                                              chance.randrange(1, 6))))
        yield [data[a:b] for a, b in zip([0] + marks, marks + [len(data)])]


def status_of(call, *arguments):
    """The status of the ProxyError that a call raises; None when it raises nothing."""
    try:
        call(*arguments)
    except ccproxy.ProxyError as error:
        return error.status
    return None


# Finding the end of a head.


def head_end_in_pieces(pieces, fault=CLIENT):
    """(end of the head, bytes that had come by then), looking after each piece as a server does."""
    buffer, seen = bytearray(), 0
    for piece in pieces:
        buffer += piece
        end = ccproxy.find_head_end(buffer, seen, fault)
        if end >= 0:
            return end, len(buffer)
        seen = len(buffer)
    return -1, len(buffer)


WHOLE_HEADS = [
    b"GET / HTTP/1.1\r\nhost: h\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"POST /v1/messages HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nx: \xe9\r\n\r\n",
]


@table("behind", [b"", NEXT, b"{}\n\n\r\r\x00", b"\r\n", b"\n"])
@table("head", WHOLE_HEADS)
def test_head_end_is_found_however_it_is_cut(head, behind):
    for pieces in cuts(head + behind):
        end, had = head_end_in_pieces(pieces)
        assert end == len(head)
        assert had >= end
    assert head_end_in_pieces([head[at:at + 1] for at in range(len(head))]) == (len(head),
                                                                              len(head))


@table("head", WHOLE_HEADS)
def test_no_beginning_of_a_head_has_an_end(head):
    for most in range(len(head)):
        assert ccproxy.find_head_end(head[:most], 0, CLIENT) == -1


@table("data", [
    b"GET / HTTP/1.1\nhost: h\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\n\nx\r\n\r\n",
    b"GET / HTTP/1.1\n\n",
    b"GET / HTTP/1.1\rhost: h\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\na: b\rTransfer-Encoding: chunked\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: h\r\n\r\r\n\r\n",
    b"\nGET / HTTP/1.1\r\nhost: h\r\n\r\n",
    b"\rGET / HTTP/1.1\r\nhost: h\r\n\r\n",
])
def test_bare_line_ends_are_refused(data):
    for pieces in cuts(data + NEXT):
        assert status_of(head_end_in_pieces, pieces, CLIENT) == 400
        assert status_of(head_end_in_pieces, pieces, UPSTREAM) == 502


def padded_head(size):
    start = b"GET / HTTP/1.1\r\nhost: h\r\n"
    rest = size - len(start) - 2
    lines = b""
    while rest > 2000:
        lines += b"x: " + b"a" * 995 + b"\r\n"
        rest -= 1000
    return start + lines + b"x: " + b"a" * (rest - 5) + b"\r\n\r\n"


@table("size, client, upstream", [
    (64 * KIB, None, None), (64 * KIB + 1, 431, 502), (200 * KIB, 431, 502)])
def test_a_head_of_more_than_64_kib_is_refused(size, client, upstream):
    head = padded_head(size)
    assert len(head) == size
    for pieces in ([head], [head[:size // 2], head[size // 2:]], [head[:-1], head[-1:] + NEXT]):
        assert status_of(head_end_in_pieces, pieces, CLIENT) == client
        assert status_of(head_end_in_pieces, pieces, UPSTREAM) == upstream


def test_a_head_without_end_is_refused_before_its_end():
    assert status_of(head_end_in_pieces, [padded_head(64 * KIB)[:-4]], CLIENT) is None
    for data in (padded_head(70 * KIB)[:-4], b"G" * 65 * KIB):
        assert status_of(head_end_in_pieces, [data], CLIENT) == 431
        assert status_of(head_end_in_pieces, [data], UPSTREAM) == 502


def test_a_body_behind_a_head_does_not_count_as_head():
    head = WHOLE_HEADS[2]
    assert ccproxy.find_head_end(head + b"x" * 200 * KIB, 0, CLIENT) == len(head)


def test_what_stands_before_start_is_not_looked_at_again():
    # So a head in many pieces costs linear time; the bare LF was seen when it came.
    assert ccproxy.find_head_end(b"a\nb" + b"x" * 100, 50, CLIENT) == -1
    assert status_of(ccproxy.find_head_end, b"a\nb" + b"x" * 100, 0, CLIENT) == 400


# Request heads.


def request(*lines, first=b"POST /v1/messages HTTP/1.1", host=b"host: h"):
    return b"\r\n".join([first] + ([host] if host is not None else []) + list(lines)) + b"\r\n\r\n"


def read_request(pieces):
    """Head of a request in pieces, read the way the server does it."""
    data = b"".join(pieces)
    end, _ = head_end_in_pieces(pieces)
    assert end >= 0
    return ccproxy.parse_request_head(data[:end])


GOOD_REQUESTS = [
    # (head, what its RequestHead says)
    (request(first=b"GET / HTTP/1.1"),
     {"method": "GET", "target": "/", "path": "/", "minor": 1, "keep_alive": True,
      "framing": ccproxy.Framing(False, 0), "fields": {"host": "h"}}),
    (request(first=b"GET /a%2Fb?x=1&y=/?z HTTP/1.1"),
     {"path": "/a%2Fb", "target": "/a%2Fb?x=1&y=/?z"}),
    (request(b"content-length: 5"), {"framing": ccproxy.Framing(False, 5)}),
    (request(b"content-length: 0"), {"framing": ccproxy.Framing(False, 0)}),
    (request(b"content-length: 007"), {"framing": ccproxy.Framing(False, 7)}),
    (request(b"content-length: 5", b"Content-Length: 5"),
     {"framing": ccproxy.Framing(False, 5)}),
    (request(b"content-length: 999999999999999999"),
     {"framing": ccproxy.Framing(False, 10 ** 18 - 1)}),
    (request(b"transfer-encoding: chunked"), {"framing": ccproxy.Framing(True, 0)}),
    (request(b"Transfer-Encoding:\t ChUnKeD \t"), {"framing": ccproxy.Framing(True, 0)}),
    (request(b"A-b:  x \t y\t "), {"fields": {"host": "h", "a-b": "x \t y"}}),
    (request(b"a:", b"b:x:y"), {"fields": {"host": "h", "a": "", "b": "x:y"}}),
    (request(b"a: 1", b"A: 2"), {"fields": {"host": "h", "a": "1, 2"}}),
    (request(b"a: \xe9\xa0\x85"), {"fields": {"host": "h", "a": "\xe9\xa0\x85"}}),
    (request(b"a: \xa0x\x85"), {"fields": {"host": "h", "a": "\xa0x\x85"}}),  # not str.strip()
    (request(b"!#$%&'*+.^_`|~9z: 1"), {"fields": {"host": "h", "!#$%&'*+.^_`|~9z": "1"}}),
    (request(host=b"HOST:h:80"), {"fields": {"host": "h:80"}}),
    (request(host=b"Host: [::1]:3000"), {"fields": {"host": "[::1]:3000"}}),
    (request(host=b"Host: 127.0.0.1:3000"), {"minor": 1}),
    (request(b"connection: close"), {"keep_alive": False}),
    (request(b"connection: upgrade, Close"), {"keep_alive": False}),
    (request(b"connection: keep-alive"), {"keep_alive": True}),
    (request(b"connection: closed"), {"keep_alive": True}),
    (request(first=b"GET / HTTP/1.0", host=None), {"minor": 0, "keep_alive": False}),
    (request(b"connection: Keep-Alive", first=b"GET / HTTP/1.0"), {"keep_alive": True}),
    (request(first=b"GET / HTTP/1.2"), {"minor": 1}),
    (request(b"expect: 100-Continue"), {"minor": 1}),
    (request(b"expect: something", first=b"GET / HTTP/1.0"), {"minor": 0}),
    # Absolute form: its authority is checked, and counts instead of Host.
    (request(first=b"GET http://other.example/v1/models?x=1 HTTP/1.1"),
     {"path": "/v1/models", "fields": {"host": "other.example"}}),
    (request(first=b"GET HTTPS://u:443 HTTP/1.1"), {"path": "/"}),
    (request(first=b"GET http://u?x=/y HTTP/1.1"), {"path": "/", "target": "http://u?x=/y"}),
    # Forms and methods that routes refuse, not heads.
    (request(first=b"OPTIONS * HTTP/1.1"), {"method": "OPTIONS", "path": "*"}),
    (request(first=b"CONNECT h:443 HTTP/1.1"), {"method": "CONNECT", "path": "h:443"}),
    (request(first=b"TRACE / HTTP/1.1"), {"method": "TRACE"}),
    (request(first=b"get / HTTP/1.1"), {"method": "get"}),
]


@table("head, expected", GOOD_REQUESTS)
def test_good_request_heads(head, expected):
    whole = ccproxy.parse_request_head(head)
    assert {name: getattr(whole, name) for name in expected} == expected
    for behind in (b"", NEXT):
        for pieces in cuts(head + behind, times=4):
            assert read_request(pieces) == whole


BAD_REQUESTS = [
    # The request line.
    (b"GET /\r\nhost: h\r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET / HTTP/1.1 \r\nhost: h\r\n\r\n", 400),
    (b" GET / HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET\t/\tHTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET / a HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET  HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"G(T / HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"" + b"G" * 33 + b" / HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET / http/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET / HTTP/1.10\r\nhost: h\r\n\r\n", 400),
    (b"GET / HTTP/1\r\nhost: h\r\n\r\n", 400),
    (b"GET / HTTP/1.\xd9\xa1\r\nhost: h\r\n\r\n", 400),
    (b"GET /\x00 HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET /\x7f HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET /\xc3\xa9 HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"GET /\x0bx HTTP/1.1\r\nhost: h\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),                     # a TLS hello
    # The target is a path, an http URL, or * of OPTIONS (RFC 9112 3.2).
    (request(first=b"GET ?x HTTP/1.1"), 400),
    (request(first=b"GET ?x HTTP/1.0"), 400),
    (request(first=b"GET x HTTP/1.1"), 400),
    (request(first=b"GET v1/models HTTP/1.1"), 400),
    (request(first=b"GET #x HTTP/1.1"), 400),
    (request(first=b"GET * HTTP/1.1"), 400),
    (request(first=b"OPTIONS *x HTTP/1.1"), 400),
    (request(first=b"GET h:443 HTTP/1.1"), 400),
    (request(first=b"GET ftp://h/ HTTP/1.1"), 400),
    (request(first=b"POST %2Fv1/messages HTTP/1.1"), 400),
    # Versions.
    (b"PRI * HTTP/2.0\r\n\r\n", 505),
    (request(first=b"GET / HTTP/2.0"), 505),
    (request(first=b"GET / HTTP/5.6"), 505),
    (request(first=b"GET / HTTP/0.9"), 505),
    # Header lines.
    (request(b"a : b"), 400),
    (request(b"a\t: b"), 400),
    (request(b": b"), 400),
    (request(b"no colon"), 400),
    (request(b"a(b: c"), 400),
    (request(b"a b: c"), 400),
    (request(b"\xc3\xa9: c"), 400),
    (request(b"a\x00: c"), 400),
    (request(b" a: folded first"), 400),
    (request(b"a: b", b" folded"), 400),
    (request(b"a: b", b"\tfolded"), 400),
    (request(b"a: b", b" "), 400),
    (request(b"a: \x00"), 400),
    (request(b"a: b\x00c"), 400),
    (request(b"a: \x01"), 400),
    (request(b"a: \x0b"), 400),
    (request(b"a: \x0c"), 400),
    (request(b"a: \x1c"), 400),
    (request(b"a: \x7f"), 400),
    (b"POST / HTTP/1.1\r\n host: h\r\n\r\n", 400),
    # Host.
    (request(host=None), 400),
    (request(b"Host: h"), 400),
    (request(b"HOST: other"), 400),
    (request(b"Host: h", first=b"GET / HTTP/1.0"), 400),
    (request(host=b"host:"), 400),
    (request(host=b"host: a b"), 400),
    (request(host=b"host: a/b"), 400),
    (request(host=b"host: u@h"), 400),
    (request(host=b"host: h:x"), 400),
    (request(host=b"host: h:80:80"), 400),
    (request(host=b"host: h:-1"), 400),
    (request(host=b"host: [::1"), 400),
    (request(host=b"host: ::1"), 400),
    (request(host=b"host: [x]"), 400),
    (request(host=b"host: h:\xb2"), 400),
    (request(host=b"host: http://h"), 400),
    (request(first=b"GET http://u@h/ HTTP/1.1"), 400),
    (request(first=b"GET http:///x HTTP/1.1"), 400),
    (request(first=b"GET http://[::1/x HTTP/1.1"), 400),
    (request(first=b"GET http://h:x/ HTTP/1.1"), 400),
    (request(first=b"GET http://h/ HTTP/1.1", host=None), 400),
    # Content-Length: never a bare int().
    (request(b"content-length:"), 400),
    (request(b"content-length: +1"), 400),
    (request(b"content-length: -1"), 400),
    (request(b"content-length: 1_0"), 400),
    (request(b"content-length: 0x1"), 400),
    (request(b"content-length: 1 1"), 400),
    (request(b"content-length: 1.0"), 400),
    (request(b"content-length: 1e1"), 400),
    (request(b"content-length: 5, 5"), 400),
    (request(b"content-length: 5,6"), 400),
    (request(b"content-length: 5", b"content-length: 6"), 400),
    (request(b"content-length: 5", b"content-length: 05"), 400),
    (request(b"content-length: 5", b"content-length:"), 400),
    (request(b"content-length: \xb2"), 400),
    (request(b"content-length: \xd9\xa5"), 400),                    # an Arabic digit
    (request(b"content-length: \xa05"), 400),
    (request(b"content-length: 5\x85"), 400),
    (request(b"content-length: 1234567890123456789"), 400),
    (request(b"content-length: " + b"9" * 5000), 400),
    # Transfer-Encoding.
    (request(b"transfer-encoding: chunked", b"content-length: 5"), 400),
    (request(b"content-length: 0", b"transfer-encoding: chunked"), 400),
    (request(b"transfer-encoding: chunked", first=b"POST / HTTP/1.0"), 400),
    (request(b"transfer-encoding: chunked", b"transfer-encoding: chunked"), 400),
    (request(b"transfer-encoding: chunked, chunked"), 400),
    (request(b"transfer-encoding: chunked, gzip"), 400),
    (request(b"transfer-encoding: chunked", b"transfer-encoding: identity"), 400),
    (request(b"transfer-encoding:"), 400),
    (request(b"transfer-encoding: chunked,"), 400),
    (request(b"transfer-encoding: ,chunked"), 400),
    (request(b"transfer-encoding: chunked;q=1"), 400),
    (request(b'transfer-encoding: "chunked"'), 400),
    (request(b"transfer-encoding: chun ked"), 400),
    (request(b"transfer-encoding: \xa0chunked"), 400),
    (request(b"transfer-encoding: chunked\x85"), 400),
    (request(b"transfer-encoding: chun\xe2\x84\xaaed"), 400),       # the Kelvin sign
    (request(b"transfer-encoding: gzip"), 501),
    (request(b"transfer-encoding: identity"), 501),
    (request(b"transfer-encoding: xchunked"), 501),
    (request(b"transfer-encoding: gzip, chunked"), 501),
    (request(b"transfer-encoding : chunked"), 400),
    # Expect.
    (request(b"expect: something"), 417),
    (request(b"expect: 100-continue, x"), 417),
]


@table("head, status", BAD_REQUESTS)
def test_bad_request_heads(head, status):
    assert status_of(ccproxy.parse_request_head, head) == status
    for pieces in cuts(head + NEXT, times=2):
        assert status_of(read_request, pieces) == status


@table("connection", [b"close, keep-alive", b"keep-alive, close"])
@table("version", [b"1.0", b"1.1"])
def test_close_wins_over_keep_alive(version, connection):
    # RFC 9112 9.3: the close option is looked for first, in both versions.
    head = request(b"connection: " + connection, first=b"GET / HTTP/" + version)
    assert ccproxy.parse_request_head(head).keep_alive is False
    answer = b"HTTP/%b 200 OK\r\ncontent-length: 0\r\nconnection: %b\r\n\r\n" % (version,
                                                                                connection)
    assert ccproxy.parse_response_head(answer).keep_alive is False


def request_line_of(size):
    return b"GET /" + b"a" * (size - len(b"GET / HTTP/1.1")) + b" HTTP/1.1"


@table("head, status", [
    (request(first=request_line_of(16 * KIB)), None),
    (request(first=request_line_of(16 * KIB + 1)), 414),
    (request(first=request_line_of(60 * KIB)), 414),
    (request(*[b"a: b"] * 127), None),
    (request(*[b"a: b"] * 128), 431),
    (request(*[b"a%d: b" % number for number in range(2000)]), 431),
])
def test_sizes_within_a_request_head(head, status):
    assert status_of(ccproxy.parse_request_head, head) == status


def test_an_error_shows_little_of_a_bad_line():
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.parse_request_head(request(b"a\x1b[2J " + b"x" * 5000))
    assert len(caught.value.message) < 200
    assert "\x1b" not in caught.value.message


# Response heads.

GOOD_ANSWERS = [
    (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", 200, ccproxy.Framing(False, 3), True),
    (b"HTTP/1.1 200\r\ncontent-length: 3\r\n\r\n", 200, ccproxy.Framing(False, 3), True),
    (b"HTTP/1.1 200 \r\ncontent-length: 3\r\n\r\n", 200, ccproxy.Framing(False, 3), True),
    (b"HTTP/1.1 200 Tr\xe8s bien\r\ncontent-length: 0\r\n\r\n", 200, ccproxy.Framing(False, 0),
     True),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n", 200, ccproxy.Framing(True, None),
     True),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n", 200,
     ccproxy.Framing(True, None), False),
    (b"HTTP/1.1 200 OK\r\n\r\n", 200, ccproxy.Framing(False, None), False),
    (b"HTTP/1.0 200 OK\r\n\r\n", 200, ccproxy.Framing(False, None), False),
    (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n", 200, ccproxy.Framing(False, 5), False),
    (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive\r\n\r\n", 200,
     ccproxy.Framing(False, 5), True),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 204, ccproxy.Framing(False, 0), True),
    (b"HTTP/1.1 204 No Content\r\ncontent-length: 7\r\n\r\n", 204, ccproxy.Framing(False, 0),
     True),
    (b"HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n", 304,
     ccproxy.Framing(False, 0), True),
    (b"HTTP/1.1 100 Continue\r\n\r\n", 100, ccproxy.Framing(False, 0), True),
    (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", 103, ccproxy.Framing(False, 0), True),
    (b"HTTP/1.1 529 \r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\n", 529,
     ccproxy.Framing(False, 2), True),
]


@table("head, status, framing, keep_alive", GOOD_ANSWERS)
def test_good_response_heads(head, status, framing, keep_alive):
    answer = ccproxy.parse_response_head(head)
    assert (answer.status, answer.framing, answer.keep_alive) == (status, framing, keep_alive)
    for pieces in cuts(head + b"HTTP/1.1 500 x\r\n\r\n", times=3):
        assert head_end_in_pieces(pieces, UPSTREAM)[0] == len(head)


@table("head", [
    b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 600 x\r\n\r\n",
    b"HTTP/1.1 099 x\r\n\r\n", b"HTTP/1.1  200 OK\r\n\r\n", b"HTTP/2 200 OK\r\n\r\n",
    b"HTTP/2.0 200 OK\r\n\r\n", b"http/1.1 200 OK\r\n\r\n", b" HTTP/1.1 200 OK\r\n\r\n",
    b"ICY 200 OK\r\n\r\n", b"SSH-2.0-OpenSSH_9\r\n\r\n", b"<html>\r\n\r\n", b"\r\n\r\n",
    b"HTTP/1.1 200 O\x00K\r\n\r\n", b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\na : b\r\n\r\n", b"HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n",
    b"HTTP/1.1 200 OK\r\na: \x00\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: +5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length:\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 129 + b"\r\n",
])
def test_bad_response_heads_are_the_upstreams_fault(head):
    assert status_of(ccproxy.parse_response_head, head) == 502


@table("head", [
    b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n"])
def test_an_answer_with_doubtful_framing_is_not_kept_alive(head):
    # Chunked wins and the connection is closed, or the answer is refused (RFC 9112 6.1, 6.3).
    try:
        answer = ccproxy.parse_response_head(head)
    except ccproxy.ProxyError as error:
        assert error.status == 502
    else:
        assert (answer.framing.chunked, answer.keep_alive) == (True, False)


# Bodies.


def feed(body, piece):
    """Content; a fault behind it is raised at once."""
    content = body.feed(piece)
    if body.broken is not None:
        raise body.broken
    return content


def read_body(make, pieces):
    """(content, what came behind it) of a body fed piece by piece; rest is taken when done."""
    body, content, behind = make(), b"", b""
    for piece in pieces:
        if body.done:
            behind += piece
            continue
        content += feed(body, piece)
        if body.done:
            behind += body.rest
    if not body.done:
        body.eof()
    return content, behind


CHUNKED_BODIES = [
    (b"0\r\n\r\n", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world"),
    (b"1\r\na\r\n1\r\nb\r\n00\r\n\r\n", b"ab"),
    (b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"01234567890123456789"),
    (b"0000000000000003\r\nabc\r\n0000000000000000\r\n\r\n", b"abc"),
    (b"3;name=value\r\nabc\r\n0;last\r\n\r\n", b"abc"),
    (b"3 ; a=\"b;c\"\t\r\nabc\r\n0\r\n\r\n", b"abc"),
    (b"3\t\r\nabc\r\n0 \r\n\r\n", b"abc"),
    (b"3;\xe9\r\nabc\r\n0\r\n\r\n", b"abc"),
    (b"2\r\n\r\n\r\n2\r\n0\r\r\n0\r\n\r\n", b"\r\n0\r"),
    (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
    (b"3\r\nabc\r\n0\r\nTrailer: x\r\n\r\n", b"abc"),
    (b"3\r\nabc\r\n0\r\nAuthorization: Bearer user_x\r\nb:\r\n\r\n", b"abc"),
    (b"0\r\n" + b"a: b\r\n" * 128 + b"\r\n", b""),
    (b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n", b"x" * 1024),
]


@table("behind", [b"", NEXT, b"0\r\n\r\n", b"\r\n\n\x00"])
@table("data, content", CHUNKED_BODIES)
def test_chunked_bodies_however_they_are_cut(data, content, behind):
    for pieces in cuts(data + behind):
        assert read_body(lambda: ccproxy.ChunkedBody(CLIENT), pieces) == (content, behind)


@table("data, content", CHUNKED_BODIES[:9])
def test_a_chunked_body_without_its_end_is_a_fault(data, content):
    for most in range(len(data)):
        body = ccproxy.ChunkedBody(UPSTREAM)
        assert content.startswith(body.feed(data[:most]))
        assert not body.done
        assert status_of(body.eof) == 502


def test_content_before_a_fault_is_read_however_it_is_cut():
    for pieces in cuts(b"5\r\nhello\r\n6\r\n world\r\nnonsense\r\n"):
        body, content, fault = ccproxy.ChunkedBody(UPSTREAM), b"", None
        while fault is None:
            try:
                content += body.feed(pieces.pop(0))
                fault = body.broken
            except ccproxy.ProxyError as error:
                fault = error
        assert (content, fault.status, body.done) == (b"hello world", 502, False)


BAD_CHUNKS = [
    # size lines
    b"\r\n\r\n", b"g\r\n", b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"-1\r\n", b"1_0\r\n",
    b" 5\r\nhello\r\n", b"\t5\r\nhello\r\n", b"5 5\r\nhello\r\n", b"5,5\r\nhello\r\n",
    b"12345678901234567\r\n", b"00000000000000005\r\nhello\r\n", b";a\r\n", b"5.\r\nhello\r\n",
    b"\xef\xbc\x95\r\nhello\r\n", b"\xb2\r\n", b"5\x00\r\nhello\r\n", b"5\x0b\r\nhello\r\n",
    b"5\xa0\r\nhello\r\n",
    # extensions
    b"5;\x00\r\nhello\r\n", b"5;a\x01\r\nhello\r\n", b"5;a\x7f\r\nhello\r\n",
    b"5;a\rb\r\nhello\r\n", b"5;a\nb\r\nhello\r\n", b"5;\n0\r\n\r\n",
    # bare line ends
    b"5\nhello\r\n0\r\n\r\n", b"5\rhello\r\n0\r\n\r\n", b"5\r\r\nhello\r\n", b"\n5\r\nhello\r\n",
    b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\r0\r\n\r\n", b"0\n\r\n", b"0\r\n\n",
    # wrong terminators: the two bytes behind a chunk must be CR LF
    b"5\r\nhelloXX0\r\n\r\n", b"5\r\nhello!\r\n0\r\n\r\n", b"5\r\nhello\r!0\r\n\r\n",
    b"5\r\nhello0\r\n\r\n", b"5\r\nhel\r\n0\r\n\r\n0\r\n\r\n",
    # trailers
    b"0\r\nno colon\r\n\r\n", b"0\r\n a: b\r\n\r\n", b"0\r\na : b\r\n\r\n", b"0\r\n: b\r\n\r\n",
    b"0\r\na: \x00\r\n\r\n", b"0\r\na: b\n\r\n", b"0\r\na: b\rc: d\r\n\r\n",
    b"0\r\na: b\r\n c\r\n\r\n",
    b"3\r\nabc\r\n0\r\na: b\r\n\n",
]


@table("data", BAD_CHUNKS)
def test_bad_chunks_are_refused_however_they_are_cut(data):
    for pieces in cuts(data + NEXT, times=4):
        for fault, status in ((CLIENT, 400), (UPSTREAM, 502)):
            assert status_of(read_body, lambda: ccproxy.ChunkedBody(fault), pieces) == status


@table("before", [b"", b"2710\r\n" + b"x" * 10000 + b"\r\n"])
def test_a_chunk_line_of_more_than_4_kib_is_refused_however_it_is_cut(before):
    data = before + b"1;" + b"a" * 5000 + b"\r\nx\r\n0\r\n\r\n"
    for pieces in cuts(data, times=3):
        assert status_of(read_body, lambda: ccproxy.ChunkedBody(CLIENT), pieces) == 400
    endless = before + b"1;" + b"a" * 5000
    for pieces in cuts(endless, times=3):
        body = ccproxy.ChunkedBody(CLIENT)
        assert status_of(lambda: [feed(body, piece) for piece in pieces]) == 400


def test_chunks_with_much_more_framing_than_content_are_refused():
    good = b"1\r\nx\r\n" * 20000 + b"0\r\n\r\n"
    assert read_body(lambda: ccproxy.ChunkedBody(CLIENT), [good]) == (b"x" * 20000, b"")
    bad = (b"1;" + b"a" * 60 + b"\r\nx\r\n") * 2000 + b"0\r\n\r\n"
    for size in (len(bad), 1000, 7):
        pieces = [bad[at:at + size] for at in range(0, len(bad), size)]
        assert status_of(read_body, lambda: ccproxy.ChunkedBody(CLIENT), pieces) == 400


@table("trailers, refused", [
    (b"a: b\r\n" * 128, False), (b"a: b\r\n" * 129, True),
    (b"a: %b\r\n" % (b"x" * 2000), False),
    (b"a: %b\r\n" % (b"x" * 60000), False),
    ((b"a: %b\r\n" % (b"x" * 1000)) * 100, True),
    (b"a: %b\r\n" % (b"x" * 200 * KIB), True),
])
@table("content", [b"", b"y" * 100000])
def test_trailers_are_bounded_however_they_are_cut(trailers, refused, content):
    first = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
    tail = b"0\r\n" + trailers + b"\r\n"
    for size in (len(tail), 4096, 97):
        pieces = [first] + [tail[at:at + size] for at in range(0, len(tail), size)]
        status = status_of(read_body, lambda: ccproxy.ChunkedBody(CLIENT), pieces)
        assert status in ((400, 431) if refused else (None,)), size


def test_a_trailer_may_come_byte_by_byte():
    data = b"3\r\nabc\r\n0\r\na: " + b"x" * 2000 + b"\r\n\r\n"
    pieces = [data[at:at + 1] for at in range(len(data))]
    assert read_body(lambda: ccproxy.ChunkedBody(CLIENT), pieces) == (b"abc", b"")


def test_content_of_a_large_chunk_is_handed_on_as_it_comes():
    body = ccproxy.ChunkedBody(CLIENT)
    assert body.feed(b"ffffffffffffffff\r\nabc") == b"abc"
    assert body.feed(b"def") == b"def"
    assert not body.done


@table("behind", [b"", NEXT])
@table("content", [b"", b"x", b"hello\r\n\r\n", bytes(range(256)) * 3])
def test_plain_bodies_however_they_are_cut(content, behind):
    for pieces in cuts(content + behind) if content + behind else [[]]:
        body = ccproxy.PlainBody(len(content), CLIENT)
        assert body.done == (not content)
        got = read_body(lambda: ccproxy.PlainBody(len(content), CLIENT), pieces)
        assert got == (content, behind)


@table("content", [b"x", b"0\r\n\r\n", bytes(range(256))])
def test_a_body_until_the_end_of_the_connection(content):
    for pieces in cuts(content):
        body = ccproxy.PlainBody(None, UPSTREAM)
        assert b"".join(map(body.feed, pieces)) == content
        assert not body.done
        body.eof()
        assert body.done


@table("length, given, status", [
    (5, b"", 502), (5, b"hell", 502), (5, b"hello", None), (0, b"", None)])
def test_a_plain_body_that_is_cut_off_is_a_fault(length, given, status):
    body = ccproxy.PlainBody(length, UPSTREAM)
    body.feed(given)
    assert status_of(body.eof) == status


LONG = bytes(random.Random(3).choices(range(97, 123), k=3000))


def framed(content, chunked):
    """(reader of this content's framing, the content framed that way)."""
    if not chunked:
        return lambda: ccproxy.PlainBody(len(content), UPSTREAM), content
    halves = [content[:len(content) // 2], content[len(content) // 2:]]
    data = b"".join(map(ccproxy.chunk, halves)) + ccproxy.LAST_CHUNK
    return lambda: ccproxy.ChunkedBody(UPSTREAM), data


@table("behind", [b"", NEXT])
@table("chunked", [False, True])
@table("squeeze", [gzip.compress, zlib.compress])
@table("content", [b"hello", LONG])
def test_inflated_bodies_however_they_are_cut(content, squeeze, chunked, behind):
    make, data = framed(squeeze(content), chunked)
    for pieces in cuts(data + behind, times=5):
        got = read_body(lambda: ccproxy.InflatedBody(make(), UPSTREAM), pieces)
        assert got == (content, behind)


def test_an_inflated_body_until_the_end_of_the_connection():
    for pieces in cuts(gzip.compress(LONG), times=4):
        body = ccproxy.InflatedBody(ccproxy.PlainBody(None, UPSTREAM), UPSTREAM)
        assert b"".join(map(body.feed, pieces)) == LONG
        body.eof()
        assert body.done


def test_an_inflated_body_of_several_gzip_members():
    # RFC 1952 2.2: members simply follow one another; their content is one content.
    make, data = framed(gzip.compress(b"first, ") + gzip.compress(b"second"), False)
    for pieces in cuts(data, times=4):
        got = read_body(lambda: ccproxy.InflatedBody(make(), UPSTREAM), pieces)
        assert got == (b"first, second", b"")


@table("chunked", [False, True])
@table("content", [
    b"this is no gzip", gzip.compress(LONG)[:-6] + b"xxxxxx"])
def test_content_that_is_not_the_gzip_it_says_to_be(content, chunked):
    make, data = framed(content, chunked)
    for pieces in cuts(data, times=3):
        got = status_of(read_body, lambda: ccproxy.InflatedBody(make(), UPSTREAM), pieces)
        assert got == 502


@table("chunked", [False, True])
@table("lost", [1, 8, 9, 500])
def test_compressed_content_that_is_cut_off_within_whole_framing_is_a_fault(lost, chunked):
    make, data = framed(gzip.compress(LONG)[:-lost], chunked)

    def read(pieces):
        body = ccproxy.InflatedBody(make(), UPSTREAM)
        for piece in pieces:
            body.feed(piece)
        body.eof()
    for pieces in cuts(data, times=3):
        assert status_of(read, pieces) == 502


def test_a_bomb_is_not_inflated(monkeypatch):
    monkeypatch.setattr(ccproxy, "MAX_INFLATED_BYTES", 10000)
    bomb = gzip.compress(b"\x00" * 5_000_000)
    body = ccproxy.InflatedBody(ccproxy.PlainBody(len(bomb), UPSTREAM), UPSTREAM)
    assert status_of(body.feed, bomb) == 502
    small = gzip.compress(b"\x00" * 10000)
    body = ccproxy.InflatedBody(ccproxy.PlainBody(len(small), UPSTREAM), UPSTREAM)
    assert body.feed(small) == b"\x00" * 10000


@table("framing, coding, kind", [
    (ccproxy.Framing(True, None), "", ccproxy.ChunkedBody),
    (ccproxy.Framing(True, 0), "identity", ccproxy.ChunkedBody),
    (ccproxy.Framing(False, 5), "", ccproxy.PlainBody),
    (ccproxy.Framing(False, None), "identity", ccproxy.PlainBody),
    (ccproxy.Framing(False, 5), "gzip", ccproxy.InflatedBody),
    (ccproxy.Framing(False, 5), "x-gzip", ccproxy.InflatedBody),
    (ccproxy.Framing(True, None), "deflate", ccproxy.InflatedBody),
    (ccproxy.Framing(True, None), "br", None), (ccproxy.Framing(True, None), "zstd", None),
    (ccproxy.Framing(True, None), "gzip, gzip", None),
    (ccproxy.Framing(True, None), "user_secretsecretsecret", None),
])
def test_which_reader_a_framing_and_coding_get(framing, coding, kind):
    if kind is None:
        with pytest.raises(ccproxy.ProxyError) as caught:
            ccproxy.open_body(framing, coding, UPSTREAM)
        assert caught.value.status == 502
        assert "user_secretsecret" not in caught.value.message
    else:
        assert type(ccproxy.open_body(framing, coding, UPSTREAM)) is kind


RAW_DEFLATE = zlib.compressobj(9, zlib.DEFLATED, -15)


@table("data, coding, expected", [
    (b"{}", "", b"{}"), (b"{}", "identity", b"{}"), (b"", "", b""),
    (gzip.compress(LONG), "gzip", LONG), (gzip.compress(LONG), "x-gzip", LONG),
    (zlib.compress(LONG), "deflate", LONG),
    (gzip.compress(b"a") + gzip.compress(b"b"), "gzip", b"ab"),
    (gzip.compress(b"x" * 10000), "gzip", b"x" * 10000),
    (gzip.compress(b"x" * 10001), "gzip", 413),
    (gzip.compress(b"x" * 6000) + gzip.compress(b"x" * 6000), "gzip", 413),
    (gzip.compress(b"x" * 10000) + gzip.compress(b"x"), "gzip", 413),
    (gzip.compress(b"\x00" * 5_000_000), "gzip", 413),
    (zlib.compress(b"\x00" * 5_000_000), "deflate", 413),
    (gzip.compress(LONG)[:-1], "gzip", 400), (gzip.compress(LONG)[:20], "gzip", 400),
    (gzip.compress(LONG)[:-8] + b"\x00" * 8, "gzip", 400),
    (gzip.compress(LONG) + b"junk", "gzip", 400), (b"{}", "gzip", 400), (b"{}", "deflate", 400),
    (b"{}", "br", 415), (b"{}", "zstd", 415), (b"{}", "compress", 415),
    (gzip.compress(b"{}"), "gzip, gzip", 415), (b"{}", "utf-8", 415),
])
def test_request_bodies_without_their_coding(data, coding, expected):
    if isinstance(expected, bytes):
        assert ccproxy.inflate(data, coding, 10000) == expected
    else:
        assert status_of(ccproxy.inflate, data, coding, 10000) == expected


def bytes_read_by_zlib(monkeypatch, data):
    """How many bytes `inflate` hands to zlib for this body, together."""
    count = []

    class Counted:
        def __init__(self, *arguments):
            self.inner = zlib.decompressobj(*arguments)

        def decompress(self, piece, *most):
            count.append(len(piece))
            return self.inner.decompress(piece, *most)

        def __getattr__(self, name):
            return getattr(self.inner, name)
    monkeypatch.setattr(ccproxy, "zlib", types.SimpleNamespace(decompressobj=Counted,
                                                               error=zlib.error))
    try:
        ccproxy.inflate(data, "gzip", 10000)
    except ccproxy.ProxyError:
        pass                    # so many members may be refused
    monkeypatch.undo()
    return sum(count)


def test_many_gzip_members_cost_linear_work(monkeypatch):
    # Each member must not cost a look at all that is behind it: counted, not timed.
    member = gzip.compress(b"")
    once = bytes_read_by_zlib(monkeypatch, member * 8000)
    twice = bytes_read_by_zlib(monkeypatch, member * 16000)
    assert once > 0
    assert twice <= 2.5 * once


# No pattern over raw bytes may backtrack through what another repeat before it has eaten.


def set_of(item):
    """The byte values that a parsed one-character item matches; None for other items."""
    kind, value = item
    if kind is sre_constants.LITERAL:
        return {value}
    if kind is sre_constants.NOT_LITERAL:
        return set(range(256)) - {value}
    if kind is sre_constants.ANY:
        return set(range(256)) - {10}
    if kind is not sre_constants.IN:
        return None
    found, negated = set(), False
    for name, what in value:
        if name is sre_constants.NEGATE:
            negated = True
        elif name is sre_constants.LITERAL:
            found.add(what)
        elif name is sre_constants.RANGE:
            found.update(range(what[0], what[1] + 1))
        else:
            raise AssertionError("patterns over bytes use explicit classes: %s" % (name,))
    return set(range(256)) - found if negated else found


def readings(parsed):
    """Every sequence of steps (byte values, may be left out, may be repeated without end) that a
    parsed pattern can mean; a longer group that may be left out gives one without it."""
    found = [[]]
    for item in parsed:
        kind, value = item
        steps = [[]]
        if kind is sre_constants.SUBPATTERN:
            steps = readings(value[3])
        elif kind in (sre_constants.MAX_REPEAT, sre_constants.MIN_REPEAT):
            least, most, inner = value
            if len(inner) == 1 and set_of(inner[0]) is not None:
                steps = [[(set_of(inner[0]), least == 0, most is sre_constants.MAXREPEAT)]]
            else:
                steps = readings(inner) + ([[]] if least == 0 else [])
        elif set_of(item) is not None:
            steps = [[(set_of(item), False, False)]]
        found = [before + more for before in found for more in steps]
    return found


def overlapping_repeats(pattern):
    """Whether two endless repeats that may stand side by side can eat the same byte."""
    for steps in readings(sre_parser.parse(pattern.pattern, pattern.flags)):
        for at, (values, _, endless) in enumerate(steps):
            for other, optional, endless_too in steps[at + 1:] if endless else ():
                if endless_too and values & other:
                    return True
                if not optional:
                    break
    return False


@table("text, expected", [
    (rb"a*a*", True), (rb":[\t ]*([\t -~]*)", True), (rb"a+b?[ab]*c", True),
    (rb"a*b*", False), (rb"a+:a+", False), (rb"[\t ]*(?:;[\t -~]*)?\r\n", False)])
def test_the_check_for_overlapping_repeats_itself(text, expected):
    assert overlapping_repeats(re.compile(text)) is expected


@table("name", ["REQUEST_LINE", "STATUS_LINE", "FIELD_LINE", "CHUNK_LINE",
                                  "BARE_LINE_END"])
def test_patterns_over_raw_bytes_take_linear_time(name):
    # Two overlapping repeats side by side make one header of 64 KiB cost seconds (CVE-2020-5236).
    assert not overlapping_repeats(getattr(ccproxy, name))


# Heads that we write.

@table("fields, expected", [
    ([], b"GET / HTTP/1.1\r\n\r\n"),
    ([("a", "b"), ("c", "d e\tf")], b"GET / HTTP/1.1\r\na: b\r\nc: d e\tf\r\n\r\n"),
    ([("a", "x\r\nset-cookie: y")], b"GET / HTTP/1.1\r\na: x??set-cookie: y\r\n\r\n"),
    ([("a", "x\ny")], b"GET / HTTP/1.1\r\na: x?y\r\n\r\n"),
    ([("a", "x\ry")], b"GET / HTTP/1.1\r\na: x?y\r\n\r\n"),
    ([("a\r\nb", "x")], b"GET / HTTP/1.1\r\na??b: x\r\n\r\n"),
    ([("a", "\x00\x1b[2J\x7f")], b"GET / HTTP/1.1\r\na: ??[2J?\r\n\r\n"),
    ([("a", "caf\xe9 \u4e2d \U0001f600 \ud800")], b"GET / HTTP/1.1\r\na: caf? ? ? ?\r\n\r\n"),
])
def test_no_value_can_end_a_line_of_our_heads(fields, expected):
    assert ccproxy.head_bytes("GET / HTTP/1.1", fields) == expected


@table("status, line", [
    (200, b"HTTP/1.1 200 OK\r\n"), (402, b"HTTP/1.1 402 Payment Required\r\n"),
    (431, b"HTTP/1.1 431 Request Header Fields Too Large\r\n"),
    (299, b"HTTP/1.1 299 Unknown\r\n")])
def test_status_lines(status, line):
    head = ccproxy.response_head(status, [("content-length", "2")])
    assert head == line + b"content-length: 2\r\n\r\n"
    assert ccproxy.parse_response_head(head).status == status


def test_what_we_write_is_what_we_read():
    data = b"".join(map(ccproxy.chunk, [b"a", b"b" * 16, LONG])) + ccproxy.LAST_CHUNK
    for pieces in cuts(data + NEXT):
        got = read_body(lambda: ccproxy.ChunkedBody(UPSTREAM), pieces)
        assert got == (b"a" + b"b" * 16 + LONG, NEXT)


# Whole connections, and bytes at random.


def read_messages(pieces):
    """Every (path, body) of a connection's pipelined requests, and the status that ended it."""
    buffer, messages = bytearray(), []
    head = body = None
    content, seen = b"", 0
    pieces = list(pieces)
    try:
        while True:
            if head is None:
                end = ccproxy.find_head_end(buffer, seen, CLIENT)
                seen = 0 if end >= 0 else len(buffer)
                if end >= 0:
                    head = ccproxy.parse_request_head(bytes(buffer[:end]))
                    del buffer[:end]
                    body, content = ccproxy.open_body(head.framing, "", CLIENT), b""
            if head is not None:
                if not body.done:
                    content += feed(body, bytes(buffer))
                    buffer[:] = body.rest if body.done else b""
                if body.done:
                    messages.append((head.path, content))
                    head = None
                    continue
            if not pieces:
                return messages, None
            buffer += pieces.pop(0)
    except ccproxy.ProxyError as error:
        return messages, error.status


PIPELINE = (request(b"content-length: 4", first=b"POST /1 HTTP/1.1") + b"body"
            + request(b"transfer-encoding: chunked", first=b"POST /2 HTTP/1.1")
            + b"3\r\nabc\r\n2;x\r\nde\r\n0\r\nt: u\r\n\r\n"
            + request(first=b"GET /3 HTTP/1.1"))


@table("data, expected", [
    (PIPELINE, ([("/1", b"body"), ("/2", b"abcde"), ("/3", b"")], None)),
    # Nothing that stands behind a framing error is read.
    (request(b"content-length: x", first=b"POST /1 HTTP/1.1") + NEXT, ([], 400)),
    (PIPELINE + request(b"transfer-encoding: chunked", b"content-length: 5") + b"0\r\n\r\n" + NEXT,
     ([("/1", b"body"), ("/2", b"abcde"), ("/3", b"")], 400)),
    (request(b"transfer-encoding: chunked", first=b"POST /1 HTTP/1.1") + b"3\r\nabcd\r\n" + NEXT,
     ([], 400)),
    (request(b"content-length: 4", first=b"POST /1 HTTP/1.1") + b"body" + b"GET / HTTP/1.1\n\n"
     + NEXT, ([("/1", b"body")], 400)),
])
def test_a_connection_is_read_alike_however_it_is_cut(data, expected):
    for pieces in cuts(data, seed=5, times=40):
        assert read_messages(pieces) == expected


def mutate(chance, data):
    data = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(data))
        data[at:at + chance.randrange(0, 3)] = bytes(
            chance.choice(b"\x00\r\n\t :;,0159aAfF\x7f\x85\xa0\xff")
            for _ in range(chance.randrange(0, 3)))
        if not data:
            data += b"x"
    return bytes(data)


def test_no_bytes_make_a_reader_raise_anything_but_its_fault():
    chance = random.Random(11)
    refused = 0
    for _ in range(1500):
        data = mutate(chance, PIPELINE)
        whole = read_messages([data])
        refused += whole[1] is not None
        size = chance.randrange(1, 40)
        cut = read_messages([data[at:at + size] for at in range(0, len(data), size)])
        assert cut == whole
    assert refused > 300


def test_no_bytes_make_the_reading_of_answers_raise_anything_but_its_fault():
    chance = random.Random(12)
    refused = 0
    for _ in range(1500):
        head = mutate(chance, chance.choice(GOOD_ANSWERS)[0])
        status = status_of(ccproxy.parse_response_head, head[:-4] + b"\r\n\r\n")
        assert status in (None, 502)
        refused += status is not None
    assert 100 < refused < 1500
