"""Rows of the HTTP rules that have no test of their own elsewhere: the limits by their numbers, one
test for each bug that other Python servers had, and that no caller decides where a key goes."""
from __future__ import annotations

import gzip
import json
import socket
import time

import pytest
from fake_upstream import FakeUpstream, status, stream, text_answer
from harness import CHAT, FAST, KEY, MESSAGES, ccproxy, parse_answers, post_bytes, wait_until

MIB = 1024 * 1024
BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
LAST_HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
KEY_FIELD = b"authorization: Bearer %b\r\n" % KEY.encode()
CHAT_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n" + KEY_FIELD
CHUNKED = CHAT_HEAD + b"transfer-encoding: chunked\r\n"


@pytest.fixture
def proxy(make_proxy):
    return make_proxy(useProviderModels=False)


def statuses(proxy, data):
    return [answer.status for answer in parse_answers(proxy.raw(data + LAST_HEALTH, 3.0))]


def chunks(*pieces, trailer=b""):
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (
        b"0\r\n" + trailer + b"\r\n")


# The limits.


def test_the_limits_are_these():
    limits, config = ccproxy.Limits(), ccproxy.read_config({}, {}, {}, "")[0]
    assert (ccproxy.MAX_REQUEST_LINE_BYTES, ccproxy.MAX_HEAD_BYTES) == (16 * 1024, 64 * 1024)
    assert (ccproxy.MAX_HEAD_FIELDS, ccproxy.MAX_LEADING_CRLFS) == (128, 4)
    assert (ccproxy.MAX_CHUNK_LINE_BYTES, ccproxy.CHUNK_OVERHEAD_FACTOR,
            ccproxy.CHUNK_OVERHEAD_BYTES) == (4096, 16, 16 * 1024)
    assert config.max_body_bytes == 64 * MIB and 200 <= ccproxy.MAX_JSON_DEPTH <= 1000
    assert (limits.head, limits.first_request, limits.keep_alive) == (20, 60, 75)
    assert (limits.body_idle, limits.body_grace, limits.body_rate) == (30, 60, 500)
    assert (limits.write_stalled, limits.silence, limits.bodies) == (120, 15, 256 * MIB)
    assert (config.upstream_connect_seconds, config.upstream_idle_seconds) == (10, 300)
    assert ccproxy.MAX_LINE_BYTES == 32 * MIB and ccproxy.READ_AHEAD_BYTES == 64 * 1024
    assert (config.max_connections, config.drain_seconds, len(limits.backoff) + 1) == (4096, 30, 3)


@pytest.mark.parametrize("count, expected", [(1, [200, 200]), (4, [200, 200]), (5, [400])])
def test_leading_line_ends(proxy, count, expected):
    assert statuses(proxy, b"\r\n" * count + HEALTH) == expected


def test_connections_stay_below_the_descriptor_limit(proxy, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (264, 264))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    ccproxy.raise_descriptor_limit(proxy.app)
    assert proxy.app.max_clients == 100


def test_write_buffers_have_their_high_water_at_64_kib(make_proxy):
    """Ours, and asyncio's where that is used."""
    assert ccproxy.HIGH_WATER_BYTES == 64 * 1024
    proxy = make_proxy(bare=False)
    with proxy.connect():
        wait_until(lambda: proxy.app.clients == 1)
        wire = next(iter(proxy.app.wires))
        assert wire.transport.get_write_buffer_limits()[1] == 64 * 1024


# Bugs that other servers had.

ODD_NUMBERS = [b"+2", b"-2", b"0_2", b"0x2", b" 2 2", b"\xb2", b"\xd9\xa2", b"\xef\xbc\x92", b"2.0",
               b"2,", b"\x0b2", b"2\x1c", b"2\x85", b"\xa02", b"2\xa0", b"1" * 4301]


@pytest.mark.parametrize("number", ODD_NUMBERS, ids=lambda number: repr(number)[:12])
def test_int_is_not_trusted_with_lengths(proxy, number):
    """aiohttp CVE-2023-47627, CVE-2025-69225, waitress CVE-2022-24761, Tornado GHSA-qppv-j76h-2rpx,
    gunicorn #3047, werkzeug #2716, CPython gh-103204; h11 0.15: more than 4300 digits."""
    assert statuses(proxy, CHAT_HEAD + b"content-length: %b\r\n\r\n{}" % number) == [400]
    assert statuses(proxy, CHUNKED + b"\r\n%b\r\n{}\r\n0\r\n\r\n" % number) == [400]


@pytest.mark.parametrize("lines", [
    b"content-length: 2, 40\r\n", b"content-length: 2\r\ncontent-length: 40\r\n",
    b"content-length: 2,2\r\n"])
def test_pysec_2020_178_folded_lengths_are_no_length_of_zero(proxy, upstream, lines):
    assert statuses(proxy, CHAT_HEAD + lines + b"\r\n" + post_bytes(CHAT, BODY)) == [400]
    assert not upstream.requests


@pytest.mark.parametrize("field", [b"x: y\ntransfer-encoding: chunked", b"transfer-encoding: x",
                                   b"transfer-encoding:\x0bchunked",
                                   b"transfer-encoding\t: chunked", b"x: a\x0bb",
                                   b"\x0ctransfer-encoding: chunked"])
def test_waitress_ghsa_pg36_g2xc_m5ff_968f(proxy, upstream, field):
    """Bare LF, unknown transfer codings, and whitespace in headers."""
    found = statuses(proxy, CHAT_HEAD + field + b"\r\n\r\n" + chunks(BODY))
    assert found in ([400], [501]) and not upstream.requests


@pytest.mark.parametrize("value", [b" \t" * 30000 + b"\x00", b"a " * 30000 + b"\x7f",
                                   b"," * 60000 + b"\x00"])
def test_cve_2020_5236_no_header_costs_much(value):
    began = time.process_time()
    for name in (b"x", b"transfer-encoding", b"connection"):
        with pytest.raises(ccproxy.ProxyError):
            ccproxy.parse_request_head(b"GET / HTTP/1.1\r\nhost: a\r\n" + name + b": " + value
                                       + b"\r\n\r\n")
    assert time.process_time() - began < 0.5


def test_cve_2024_49768_nothing_behind_an_error_is_processed(proxy, upstream):
    """In one packet, and when what follows comes later."""
    bad = CHUNKED + b"\r\nzz\r\n"
    assert statuses(proxy, bad + post_bytes(CHAT, BODY) * 3) == [400]
    with proxy.connect() as sock:
        sock.sendall(bad)
        wait_until(lambda: not proxy.app.exchanges)
        sock.sendall(post_bytes(CHAT, BODY))
        time.sleep(0.05)
    proxy.wait_quiet()
    assert not upstream.requests


def test_cve_2024_49769_clients_gone_at_once_leave_nothing(proxy):
    for _ in range(50):
        sock = proxy.connect()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    wait_until(lambda: not proxy.app.clients and not proxy.app.wires)
    began = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - began < 0.08       # nothing spins


@pytest.mark.parametrize("coding", [b"chunked\r\ntransfer-encoding: chunked", b"chunked, identity",
                                    b"identity", b"xchunked", b"chunked\xa0", b"\x85chunked",
                                    b"chunked, chunked", b""])
def test_cve_2024_1135_6827_ghsa_753j_no_way_back_to_content_length(proxy, upstream, coding):
    """gunicorn and Tornado: an odd or doubled Transfer-Encoding must not be passed over."""
    for length in (b"", b"content-length: %d\r\n" % len(BODY)):
        data = CHAT_HEAD + length + b"transfer-encoding: " + coding + b"\r\n\r\n"
        assert statuses(proxy, data + BODY)[1:] == []
    assert not upstream.requests


def test_cve_2018_1000164_2020_7695_no_answer_is_split(make_proxy, upstream):
    """What goes back in headers: notes, the caller's origin, the upstream's Retry-After."""
    proxy = make_proxy(corsOrigin="http://a", useProviderModels=False)
    name = "x\r\nset-cookie: a=b\r\n\r\nHTTP/1.1 200 OK"
    upstream.scripts = [stream(text_answer("hi"))]
    answer = proxy.post(CHAT, {"origin": "http://a"}, model=name, **{name: 1})
    assert "set-cookie" not in answer.fields
    answer = proxy.request("GET", "/x%0d%0aset-cookie:%20a=b", fields={"origin": "http://a"})
    assert answer.status == 404 and "set-cookie" not in answer.fields
    head = ccproxy.response_head(200, [("x", "a\r\nset-cookie: b\x85\u2028")])
    assert head.count(b"\r\n") == 3 and b"\nset-cookie" not in head


def test_cve_2020_7694_no_escapes_reach_the_log(proxy):
    proxy.request("GET", "/%1b[31m%0aERROR%20forged%c2%9b%e2%80%a8")
    proxy.raw(b"GET /\x1b[31m HTTP/1.1\r\nhost: a\r\n\r\n")
    proxy.wait_quiet()
    log = proxy.log.getvalue()
    assert "forged" in log and all(line.isascii() and line.isprintable()
                                   for line in log.splitlines())
    assert not [line for line in log.split("\n") if line.startswith("ERROR")]


@pytest.mark.parametrize("end", [b"xx", b"\n\n", b"\r\r", b"\rx", b"0\r", b"\n"])
def test_cve_2025_43859_what_follows_a_chunk_is_checked(proxy, upstream, end):
    data = CHUNKED + b"\r\n%x\r\n%b" % (len(BODY), BODY) + end
    assert statuses(proxy, data + b"0\r\n\r\n") == [400]
    assert not upstream.requests


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1\nx", b"GET / HTTP/\xd9\xa1.1",
                                  b"G\rT / HTTP/1.1", b"GET / HTTP/1.1\x85", b"GET / HTTP/1.1;x"])
def test_cve_2023_49081_49082_nothing_hides_in_method_or_version(proxy, line):
    assert statuses(proxy, line + b"\r\nhost: a\r\n\r\n") == [400]


@pytest.mark.parametrize("extension", [b";a\nb", b";a\rb", b";a\x00", b";\x7f", b";a\n\r\n"])
def test_cve_2024_52304_no_line_ends_in_chunk_extensions(proxy, upstream, extension):
    data = CHUNKED + b"\r\n%x%b\r\n%b\r\n0\r\n\r\n" % (len(BODY), extension, BODY)
    assert statuses(proxy, data) == [400]
    assert not upstream.requests


def test_cve_2025_53643_trailers_are_parsed_and_never_merged(proxy, upstream):
    """A key, a length or a coding behind the body changes nothing."""
    trailer = (b"authorization: Bearer user_evil\r\nx-api-key: user_evil\r\ncontent-length: 900\r\n"
               b"transfer-encoding: gzip\r\nhost: b\r\nx-session-id: s\r\n")
    assert statuses(proxy, CHUNKED + b"\r\n" + chunks(BODY, trailer=trailer)) == [200, 200]
    assert upstream.requests[0].field("authorization") == "Bearer " + KEY
    without = CHUNKED.replace(KEY_FIELD, b"") + b"\r\n" + chunks(BODY, trailer=trailer)
    assert statuses(proxy, without) == [401]
    assert statuses(proxy, CHUNKED + b"\r\n" + chunks(BODY, trailer=HEALTH)) == [400]
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("value", ["chun\u212aed", "\u0441hunked", "chunke\u0501", "\uff43hunked"])
def test_cve_2025_69224_no_other_letter_is_one_of_chunked(proxy, value):
    data = CHAT_HEAD + b"transfer-encoding: " + value.encode() + b"\r\n\r\n" + chunks(BODY)
    assert statuses(proxy, data) == [400]
    assert not ccproxy.re.fullmatch("chunked", value, ccproxy.re.I | ccproxy.re.A)


def test_cve_2025_69223_2026_54278_a_bomb_is_unpacked_in_pieces(make_proxy, upstream):
    proxy = make_proxy(maxBodyBytes=MIB)
    bomb = gzip.compress(b" " * (40 * MIB))
    assert proxy.request("POST", CHAT, bomb, {"content-encoding": "gzip"}).status == 413
    assert not upstream.requests
    wait_until(lambda: not proxy.app.bodies)


def test_cve_2025_69229_many_small_chunks_take_linear_work():
    def seconds(count, step):
        body, data = ccproxy.ChunkedBody(ccproxy.client_fault), b"1\r\na\r\n" * count
        began = time.process_time()
        for at in range(0, len(data), step):
            body.feed(data[at:at + step])
        return time.process_time() - began
    for step in (1, 65536):
        assert seconds(40_000, step) < 12 * max(seconds(10_000, step), 0.005)


def test_cve_2025_69230_no_storm_in_the_log(proxy):
    """One line for a request whatever is wrong with it, and none for a head that was none."""
    before = len(proxy.log.getvalue().splitlines())
    cookies = "; ".join("a\x01b=%d" % number for number in range(500)).replace("\x01", "(")
    proxy.request("GET", "/nothing", fields={"cookie": cookies})
    for _ in range(20):
        proxy.raw(b"\x00bad\r\n\r\n")
    proxy.wait_quiet()
    assert len(proxy.log.getvalue().splitlines()) - before <= 21


@pytest.mark.parametrize("trailer", [b"a: b\r\n" * 129, b"a: %b\r\n" % (b"x" * 1000) * 70])
def test_cve_2026_22815_trailers_are_bounded(proxy, upstream, trailer):
    assert statuses(proxy, CHUNKED + b"\r\n" + chunks(BODY, trailer=trailer))[0] in (400, 431)
    assert not upstream.requests


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_cve_2026_34525_two_hosts(proxy, version):
    head = b"GET /health HTTP/" + version + b"\r\nhost: a\r\nhost: a\r\n\r\n"
    assert statuses(proxy, head) == [400]


def test_readline_limits_long_upstream_lines_and_heads(proxy, upstream):
    """asyncio's readers raise at 64 KiB; a line of 300 KiB here is a line."""
    upstream.default = stream(text_answer("x" * 300_000), cut=50_000)
    assert len(proxy.post(CHAT).json["choices"][0]["message"]["content"]) == 300_000


@pytest.mark.parametrize("text", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028",
                                  "\u2029"])
@pytest.mark.parametrize("streamed", [True, False])
def test_splitlines_cuts_no_text(proxy, upstream, text, streamed):
    """In either direction; frames and lines end with LF alone."""
    said = text + "a" + text + "b" + text
    upstream.default = stream(text_answer(said))
    answer = proxy.post(CHAT, stream=streamed, messages=[{"role": "user", "content": said}])
    sent = upstream.requests[0].json["params"]["messages"][0]["content"][0]["text"]
    if streamed:
        got = "".join(choice["delta"].get("content") or "" for frame in answer.frames
                      for choice in frame["choices"])
    else:
        got = answer.json["choices"][0]["message"]["content"]
    assert (sent, got) == (said, said)


@pytest.mark.parametrize("value", [b"\xa0gzip", b"gzip\x85", b"\x85", b"\xa0"])
def test_only_blanks_are_stripped_from_content_encoding(proxy, value):
    body = gzip.compress(BODY) if b"gzip" in value else BODY
    data = CHAT_HEAD + b"content-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (value, len(body))
    assert statuses(proxy, data + body)[0] == 415


# Where a key goes: to the configured upstream, whatever a caller says.


@pytest.fixture
def elsewhere():
    fake = FakeUpstream()
    yield fake
    fake.close()


def directions(there):
    """Fields that name another place."""
    host = "127.0.0.1:%d" % there.port
    return {"host": host, "x-forwarded-host": host, "x-forwarded-for": host, "via": "1.1 " + host,
            "x-forwarded-proto": "http", "forwarded": "for=%s;host=%s;proto=http" % (host, host),
            "x-original-url": there.base + "/x", "x-rewrite-url": there.base, "referer": there.base,
            "x-ccproxy-api-base": there.base,
            "x-ccproxy-base-url": there.base, "api-base": there.base, "x-api-base": there.base,
            "x-base-url": there.base, "origin": there.base, "location": there.base,
            "proxy": there.base, "http-proxy": there.base, "x-http-method-override": "PUT",
            "traceparent": there.base, "x-session-id": there.base, "openai-base-url": there.base}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/responses"])
def test_no_header_target_or_body_decides_where_the_key_goes(proxy, upstream, elsewhere, path):
    """LiteLLM CVE-2024-6587; the side call too, and pictures by URL are never fetched."""
    there = elsewhere.base
    member = "input" if "responses" in path else "messages"
    body = {name: there for name in ("api_base", "base_url", "apiBase", "baseURL", "api_type",
                                     "endpoint", "proxy", "custom_llm_provider", "upstream")}
    body.update({member: [{"role": "user", "content": "hi"}], "max_tokens": 50,
                 "extra_headers": {"host": there}, "metadata": {"api_base": there}})
    for target in (path, there + path, path + "?api_base=" + there, "https://other.example" + path):
        data = post_bytes(target, body, directions(elsewhere))
        answer = parse_answers(proxy.raw(data + LAST_HEALTH, 3.0))[0]
        assert answer.status == 200, answer.body
    assert len(upstream.requests) == 4
    for request in upstream.requests:
        assert request.line == "POST /alpha/generate HTTP/1.1"
        assert request.field("host") == "127.0.0.1:%d" % upstream.port
        assert str(elsewhere.port) not in "".join(value for _, value in request.fields)
    assert elsewhere.connections == 0


def test_urls_in_bodies_are_never_fetched(proxy, upstream, elsewhere):
    url = elsewhere.base + "/a.png"
    proxy.post(CHAT, messages=[{"role": "user", "content": [
        {"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": url}}]}])
    proxy.post(MESSAGES, messages=[{"role": "user", "content": [
        {"type": "text", "text": "hi"},
        {"type": "image", "source": {"type": "url", "url": url}}]}])
    time.sleep(0.05)
    assert elsewhere.connections == 0


def test_a_redirect_moves_no_key(proxy, upstream, elsewhere):
    upstream.default = status(307, b"", "location: %s/alpha/generate\r\n" % elsewhere.base)
    assert proxy.post(CHAT).status == 502
    assert elsewhere.connections == 0


ODD_VALUES = [b"\xe9\xa0\x85", b"x" * 60_000, b"a\tb", b"\xff" * 500, b"$(id) `id` %0d%0aset: x",
              b"\\r\\nx-evil: 1", b"00-" + b"\xb2" * 32 + b"-" + b"0" * 16 + b"-01", b"{}",
              b"\"'<>"]


@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: repr(value)[:20])
def test_values_of_callers_never_reach_upstream_headers_as_they_are(proxy, upstream, value):
    """Not those: only a derived id and a well-formed traceparent, printable and bounded."""
    names = ["x-session-id", "traceparent", "session_id", "tracestate", "x-claude-code-session-id",
             "x-request-id", "user-agent"]
    for name in names:
        data = CHAT_HEAD + name.encode() + b": " + value + b"\r\ncontent-length: %d\r\n\r\n" % len(
            BODY) + BODY
        assert statuses(proxy, data) == [200, 200]
        fields = dict(upstream.requests[-1].fields)
        shown = "".join(fields.values())
        assert shown.isascii() and shown.isprintable() and len(shown) < 1000
        assert value.decode("latin-1") not in fields.values()
        assert fields["x-session-id"].count("-") == 4 and len(fields["traceparent"]) == 55
    assert len(upstream.requests) == len(names)


@pytest.mark.parametrize("value", [b"a\r\nx-evil: 1", b"a\nx-evil: 1", b"a\rx-evil: 1", b"a\x00b"])
@pytest.mark.parametrize("name", [b"x-session-id", b"traceparent", b"authorization", b"x-api-key"])
def test_line_ends_in_callers_values_reach_no_upstream_header(proxy, upstream, name, value):
    """A CR LF makes a field of its own, which is dropped; the rest are malformed."""
    data = CHAT_HEAD + name + b": " + value + b"\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
    assert statuses(proxy, data)[0] == (200 if b"\r\n" in value else 400)
    assert not any("evil" in field for request in upstream.requests for field, _ in request.fields)


def test_a_very_long_key_is_bounded_by_the_head(make_proxy, upstream):
    """It goes whole to the configured upstream or nowhere."""
    proxy = make_proxy(limits=FAST, useProviderModels=False)
    long_key = "user_" + "a" * 50_000
    answer = proxy.post(CHAT, key=long_key)
    assert answer.status in (200, 401)
    assert [request.field("authorization") for request in upstream.requests] in (
        [], ["Bearer " + long_key])
    assert proxy.post(CHAT, key="user_" + "a" * 70_000).status == 431
