"""COMPRESSED BODIES over real sockets: gzip, deflate and zstd, bounded by what they become."""
from __future__ import annotations

import ctypes
import gzip
import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import zlib

import ccproxy
import pytest
from harness import CHAT, KEY, MESSAGES, parse_answers, read_all

RESPONSES = "/v1/responses"
WORDS = "Gr\u00f6\u00dfe \u4e16\u754c"
PLAIN = json.dumps({"messages": [{"role": "user", "content": WORDS}], "max_tokens": 100}).encode()
MOST = 100_000
BOMB = b'{"messages":"' + b" " * 3 * MOST + b'"}'
# What `zstd -19` makes of PLAIN, with and without a checksum, and of 300 KiB of spaces.
ZSTD = bytes.fromhex(
    "28b52ffd0468c5020062451318903b072b58ae6124521f329b5c3c620f583645f28499590891aa4a7676cbbc683c87"
    "f34c4574640142b740edea96ab2481a2da0d0ed16d740f79a6c3e57eb26ff3e02122d9799783799d4301020029c16f"
    "c17c02cb4649bb")
ZSTD_UNCHECKED = bytes.fromhex(
    "28b52ffd0068c5020062451318903b072b58ae6124521f329b5c3c620f583645f28499590891aa4a7676cbbc683c87"
    "f34c4574640142b740edea96ab2481a2da0d0ed16d740f79a6c3e57eb26ff3e02122d9799783799d4301020029c16f"
    "c17c02")
ZSTD_BOMB = bytes.fromhex("28b52ffd00585400001020200100fbff39c0020200102003800520")


def has_libzstd():
    try:
        ccproxy.load_libzstd()
    except ccproxy.ProxyError:
        return False
    return True


@pytest.fixture(params=["compression.zstd", "libzstd"])
def zstd_way(request, monkeypatch):
    """Each way to zstd that this machine has: Python's own (3.14), and the system's library."""
    if request.param == "libzstd":
        if not has_libzstd():
            pytest.skip("there is no libzstd on this machine")
        monkeypatch.setitem(sys.modules, "compression", None)
    else:
        try:
            importlib.import_module("compression.zstd")
        except ImportError:
            pytest.skip("this Python has no compression.zstd")
    return request.param


@pytest.fixture
def proxy(make_proxy):
    return make_proxy(useProviderModels=False, maxBodyBytes=MOST)


def post(proxy, body, coding=None, path=CHAT, key=KEY):
    fields = {"content-length": str(len(body))}
    if coding is not None:
        fields["content-encoding"] = coding
    return proxy.request("POST", path, body, fields, key)


def assert_understood(answer, upstream):
    assert answer.status == 200, answer.body
    part = upstream.requests[-1].json["params"]["messages"][0]["content"][0]
    assert part == {"type": "text", "text": WORDS}


def assert_refused(answer, upstream, expected):
    assert answer.status == expected
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert not upstream.connections


def raw_deflate(data):
    worker = zlib.compressobj(9, zlib.DEFLATED, -15)
    return worker.compress(data) + worker.flush()


# Whole bodies.

HALF = len(PLAIN) // 2
GOOD = [
    ("gzip", "gzip", gzip.compress(PLAIN)), ("x-gzip", "x-gzip", gzip.compress(PLAIN)),
    ("in capitals", " GZIP ", gzip.compress(PLAIN)), ("deflate", "deflate", zlib.compress(PLAIN)),
    ("two members", "gzip", gzip.compress(PLAIN[:HALF]) + gzip.compress(PLAIN[HALF:])),
    ("gzip without its header", None, gzip.compress(PLAIN)),
    ("gzip said to be identity", "identity", gzip.compress(PLAIN)),
    ("identity", "identity", PLAIN), ("an empty coding", "", PLAIN)]


@pytest.mark.parametrize("coding, body", [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_gzip_and_deflate(proxy, upstream, coding, body):
    assert_understood(post(proxy, body, coding), upstream)


@pytest.mark.parametrize("coding", ["zstd", "ZSTD", None, "identity", "gzip"])
@pytest.mark.parametrize("body", [ZSTD, ZSTD_UNCHECKED], ids=["with a checksum", "without"])
def test_zstd(proxy, upstream, zstd_way, coding, body):
    """By its header, and by its magic where the header is absent or lies."""
    assert_understood(post(proxy, body, coding), upstream)


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES, "/explain/v1/chat/completions",
                                  "/v1/messages/count_tokens", "/v1/responses/input_tokens"])
@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_every_door(proxy, path, coding):
    if coding == "zstd" and sys.version_info < (3, 14) and not has_libzstd():
        pytest.skip("there is no zstd on this machine")
    body = ZSTD if coding == "zstd" else gzip.compress(PLAIN)
    answer = post(proxy, body, coding, path)
    assert answer.status == 200
    plain = post(proxy, PLAIN, None, path).json
    for name in ("input_tokens", "usage", "body"):
        assert answer.json.get(name) == plain.get(name)


def test_what_the_zstd_command_makes(make_proxy, upstream, zstd_way):
    """A body of many blocks, from a pipe: its frame does not tell its size."""
    command = shutil.which("zstd")
    if command is None:
        pytest.skip("there is no zstd command")
    words = "".join("\u4e16%s" % hashlib.sha256(b"%d" % number).hexdigest()
                    for number in range(5000))
    body = json.dumps({"messages": [{"role": "user", "content": words}]}).encode()
    packed = subprocess.run([command, "-q", "-c"], input=body, stdout=subprocess.PIPE,
                            check=True).stdout
    assert 128 * 1024 < len(packed) < len(body)
    answer = post(make_proxy(useProviderModels=False), packed, "zstd")
    assert answer.status == 200
    assert upstream.requests[0].json["params"]["messages"][0]["content"][0]["text"] == words


def test_a_chunked_compressed_body(proxy, upstream):
    """In small chunks, and the next request is already behind it."""
    packed = gzip.compress(PLAIN)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(packed[at:at + 7]), packed[at:at + 7])
                      for at in range(0, len(packed), 7)) + b"0\r\n\r\n"
    head = ("POST %s HTTP/1.1\r\nhost: a\r\nauthorization: Bearer %s\r\ncontent-encoding: gzip\r\n"
            "transfer-encoding: chunked\r\n\r\n" % (CHAT, KEY)).encode()
    with proxy.connect() as sock:
        sock.sendall(head + chunks + b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
                     b"\r\n")
        answers = parse_answers(read_all(sock))
    assert_understood(answers[0], upstream)
    assert answers[1].json["status"] == "ok"


# Bodies that become too large.


@pytest.mark.parametrize("coding, body", [
    ("gzip", gzip.compress(BOMB)), (None, gzip.compress(BOMB)), ("deflate", zlib.compress(BOMB)),
    ("gzip", gzip.compress(b" " * MOST) + gzip.compress(b" "))],
    ids=["gzip", "gzip by its magic", "deflate", "two members"])
def test_bombs(proxy, upstream, coding, body):
    """Small on the wire, refused by their decoded size."""
    assert len(body) < 2000
    answer = post(proxy, body, coding)
    assert_refused(answer, upstream, 413)
    assert "maxBodyBytes" in answer.json["error"]["message"]


@pytest.mark.parametrize("coding", ["zstd", None])
def test_zstd_bombs(proxy, upstream, zstd_way, coding):
    assert_refused(post(proxy, ZSTD_BOMB, coding), upstream, 413)


@pytest.mark.parametrize("most, expected", [(len(PLAIN), 200), (len(PLAIN) - 1, 413)])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_the_bound_is_exact(most, expected, coding):
    """A body of just the size that is allowed is understood; one byte more is not."""
    if coding == "zstd" and sys.version_info < (3, 14) and not has_libzstd():
        pytest.skip("there is no zstd on this machine")
    body = {"gzip": gzip.compress(PLAIN), "deflate": zlib.compress(PLAIN), "zstd": ZSTD}[coding]
    if expected == 200:
        assert ccproxy.decode_body(body, coding, most) == PLAIN
    else:
        with pytest.raises(ccproxy.ProxyError) as caught:
            ccproxy.decode_body(body, coding, most)
        assert caught.value.status == 413


# Bodies that are not what they say.

WRONG = [
    ("cut", "gzip", gzip.compress(PLAIN)[:-9]), ("only a head", "gzip", gzip.compress(PLAIN)[:10]),
    ("wrong checksum", "gzip", gzip.compress(PLAIN)[:-8] + b"\0" * 8),
    ("plain JSON as gzip", "gzip", PLAIN), ("plain JSON as deflate", "deflate", PLAIN),
    ("deflate, cut", "deflate", zlib.compress(PLAIN)[:-5]),
    ("behind the end", "gzip", gzip.compress(PLAIN) + b"junk"), ("nothing", "gzip", b""),
    ("gzip inside gzip", "gzip", gzip.compress(gzip.compress(PLAIN))),
    ("empty inside", "gzip", gzip.compress(b""))]


@pytest.mark.parametrize("coding, body", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_broken_bodies(proxy, upstream, coding, body):
    assert_refused(post(proxy, body, coding), upstream, 400)


BROKEN_ZSTD = [("cut by one", ZSTD[:-1]), ("cut in the middle", ZSTD[:50]),
               ("magic only", ZSTD[:4]), ("plain JSON", PLAIN), ("nothing", b""),
               ("behind the end", ZSTD + b"junk"),
               ("wrong checksum", ZSTD[:-1] + b"\0"), ("noise", ZSTD[:6] + b"\xff" * 60)]


@pytest.mark.parametrize("body", [row[1] for row in BROKEN_ZSTD],
                         ids=[row[0] for row in BROKEN_ZSTD])
def test_broken_zstd(proxy, upstream, zstd_way, body):
    assert_refused(post(proxy, body, "zstd"), upstream, 400)


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, gzip", "gzip, br", "zstandard", "x"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_unknown_codings(proxy, upstream, coding, path):
    answer = post(proxy, gzip.compress(PLAIN)[2:], coding, path)
    assert_refused(answer, upstream, 415)
    message = answer.json["error"]["message"]
    assert "gzip" in message and "deflate" in message
    assert answer.fields["x-should-retry"] == "false"


@pytest.mark.parametrize("coding", ["zstd", None])
def test_no_zstd_at_all(proxy, upstream, monkeypatch, coding):
    """Neither Python nor the system knows it: a 415 that says so, and gzip goes on working."""
    def missing(name, *more):
        raise OSError("there is no " + name)
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    answer = post(proxy, ZSTD, coding)
    assert_refused(answer, upstream, 415)
    message = answer.json["error"]["message"]
    assert "zstd" in message and "gzip" in message and "libzstd" in message
    assert_understood(post(proxy, gzip.compress(PLAIN), "gzip"), upstream)


def test_no_key_no_decoding(proxy, upstream):
    """The key is looked at before a body is: nobody's bombs cost nothing."""
    assert post(proxy, gzip.compress(BOMB), "gzip", key=None).status == 401
    assert not upstream.connections
