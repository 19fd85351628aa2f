"""STREAM FRAMING: bytes to lines on the way in, JSON to SSE frames on the way out."""
from __future__ import annotations

import json
import random
import re

import pytest
from fake_upstream import recorded
from harness import ccproxy

SKIP = b'{"type":"start-step"'


def cuts(data, seed=1, times=12):
    """The same bytes whole, one at a time, and cut at random."""
    yield [data]
    yield [data[at:at + 1] for at in range(len(data))]
    chance = random.Random(seed)
    for _ in range(times if len(data) > 1 else 0):
        marks = sorted(chance.sample(range(1, len(data)), min(len(data) - 1,
                                                              chance.randrange(1, 6))))
        yield [data[a:b] for a, b in zip([0] + marks, marks + [len(data)])]


# Lines.


def wanted(lines):
    """Lines without those that nobody wants, whose dropping is a matter of memory alone."""
    return [line for line in lines if not line.startswith(SKIP)]


def read_lines(pieces):
    """(complete lines, what stood behind the last newline) of a stream in pieces."""
    buffer, data = ccproxy.LineBuffer(SKIP), b""
    for piece in pieces:
        lines = buffer.feed(piece)
        assert not lines or lines.endswith(b"\n")
        data += lines
    return wanted(data.split(b"\n")[:-1]), buffer.flush()


START = SKIP + b',"request":{"body":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}}'

BOM = b"\xef\xbb\xbf"
STREAMS = [
    # (bytes, lines, rest)
    (b"", [], b""),
    (b"a\n", [b"a"], b""),
    (b"a\nb\n", [b"a", b"b"], b""),
    (b"a", [], b"a"),
    (b"a\nb", [b"a"], b"b"),
    (b"\n\n\na\n\n", [b"", b"", b"", b"a", b""], b""),
    (b"a\r\nb\r\n", [b"a", b"b"], b""),
    # CR ends a line too, alone or before a newline, and nothing else does.
    (b"a\rb\r", [b"a", b"b"], b""), (b"a\r\r\n\rb", [b"a", b"", b""], b"b"),
    (b"\r\n\r\r\n\n\n\r", [b""] * 6, b""), (b"\na\n\rb\r\r", [b"", b"a", b"", b"b", b""], b""),
    (START.replace(b",", b", ") + b"\r\ra\r", [b"", b"a"], b""), (START + b"\r\na\n", [b"a"], b""),
    ("ab\x0bc\x0cd\x1ce\x85f\u2028g\u2029\n".encode(),
     ["ab\x0bc\x0cd\x1ce\x85f\u2028g\u2029".encode()], b""),
    # A byte order mark is dropped at the start, and nowhere else.
    (BOM + b"a\n", [b"a"], b""), (BOM + b"\r\na\r\n" + BOM + b"b\n", [b"", b"a", BOM + b"b"], b""),
    (BOM + BOM + b"a\n", [BOM + b"a"], b""), (BOM, [], b""), (BOM + START + b"\na\n", [b"a"], b""),
    (b"\n" + BOM + b"\n", [b"", BOM], b""),
    (b"\x00\xff\xfe\n\xc3", [b"\x00\xff\xfe"], b"\xc3"),
    ('{"text":"\u4e2d\U0001f600"}\n'.encode() * 3, ['{"text":"\u4e2d\U0001f600"}'.encode()] * 3,
     b""),
    # The kind of line that nobody wants, at the beginning, in the middle, at the end, cut off.
    (START + b"\na\n", [b"a"], b""),
    (b"a\n" + START + b"\nb\n", [b"a", b"b"], b""),
    (START + b"\n" + START + b"\n\n" + START + b"\nb", [b""], b"b"),
    (b"a\n" + START + b"\n", [b"a"], b""),
    # What only looks like it.
    (SKIP[:-1] + b"s\"}\na\n", [SKIP[:-1] + b"s\"}", b"a"], b""),
    (b" " + START + b"\na\n", [b" " + START, b"a"], b""),
    (b"x" + START + b"\na\n", [b"x" + START, b"a"], b""),
    (SKIP[:7] + b"\n" + SKIP[7:] + b"\na\n", [SKIP[:7], SKIP[7:], b"a"], b""),
]


@pytest.mark.parametrize("data, lines, rest", STREAMS)
def test_lines_however_they_are_cut(data, lines, rest):
    for pieces in cuts(data, times=40):
        assert read_lines(pieces) == (lines, rest)


@pytest.mark.parametrize("data, lines, rest", STREAMS)
def test_lines_with_more_behind_them(data, lines, rest):
    behind = b'"tail"}\nnext\nlast'
    expected = re.sub(b"\r\n?", b"\n", data + behind).split(b"\n")
    expected[0] = expected[0][3 * expected[0].startswith(BOM):]
    for pieces in cuts(data + behind, seed=2, times=20):
        assert read_lines(pieces) == (wanted(expected[:-1]), b"last")
    assert read_lines([data, behind]) == (wanted(expected[:-1]), b"last")


@pytest.mark.parametrize("name", ["01", "05", "10_", "10b", "13"])
def test_recorded_streams_have_the_same_lines_however_they_are_cut(name):
    data = recorded(name)
    expected = wanted(data.split(b"\n")[:-1])
    assert expected
    for size in (1, 2, 3, 7, 64, 1000, 65536):
        pieces = [data[at:at + size] for at in range(0, len(data), size)]
        assert read_lines(pieces)[0] == expected


def test_a_line_that_is_whole_is_handed_on_at_once():
    buffer = ccproxy.LineBuffer(SKIP)
    assert buffer.feed(b"a\nb") == b"a\n"
    assert buffer.feed(b"c") == b""
    assert buffer.feed(b"\n") == b"bc\n"


def test_flush_leaves_nothing_behind():
    buffer = ccproxy.LineBuffer(SKIP)
    buffer.feed(b"abc")
    assert (buffer.flush(), buffer.flush()) == (b"abc", b"")
    buffer.feed(START)
    assert buffer.flush() == b""


@pytest.mark.parametrize("first, piece", [
    (b"", SKIP + b"x" * 50), (SKIP[:5], SKIP[5:] + b"x" * 50), (SKIP, b"x" * 50)])
def test_a_skipped_line_of_any_length_is_not_kept(monkeypatch, first, piece):
    monkeypatch.setattr(ccproxy, "MAX_LINE_BYTES", 100)
    buffer = ccproxy.LineBuffer(SKIP)
    assert buffer.feed(first) == buffer.feed(piece) == b""
    for _ in range(500):
        assert buffer.feed(b"x" * 60) == b""        # 30000 bytes where 100 are the limit
    assert buffer.feed(b"x\nafter\n") == b"after\n"


@pytest.mark.parametrize("size", [1, 7, 40])
def test_an_endless_line_is_the_upstreams_fault(monkeypatch, size):
    monkeypatch.setattr(ccproxy, "MAX_LINE_BYTES", 100)

    def feed(total):
        buffer = ccproxy.LineBuffer(SKIP)
        for at in range(0, total, size):
            buffer.feed(b"x" * min(size, total - at))
        return buffer.feed(b"\n")
    assert feed(100) == b"x" * 100 + b"\n"
    with pytest.raises(ccproxy.ProxyError) as caught:
        feed(101)
    assert caught.value.status == 502


def test_the_limit_counts_one_line_and_not_the_stream(monkeypatch):
    monkeypatch.setattr(ccproxy, "MAX_LINE_BYTES", 100)
    buffer = ccproxy.LineBuffer(SKIP)
    for _ in range(50):
        assert buffer.feed(b"x" * 60) == b""
        assert buffer.feed(b"y\nz") .endswith(b"y\n")
        assert buffer.feed(b"\n") == b"z\n"


class Counted(bytes):
    """Bytes that count how many of them were searched."""

    searched = 0

    def find(self, *arguments):
        Counted.searched += len(self)
        return bytes.find(self, *arguments)

    def rfind(self, *arguments):
        Counted.searched += len(self)
        return bytes.rfind(self, *arguments)

    def startswith(self, *arguments):
        raise AssertionError("whole pieces are not compared")


def test_a_long_line_in_many_pieces_is_searched_once():
    # Counted, not timed: each piece is searched a fixed number of times, held ones never again.
    Counted.searched = 0
    buffer = ccproxy.LineBuffer(SKIP)
    pieces = 2000
    for _ in range(pieces):
        assert buffer.feed(Counted(b"x" * 50)) == b""
    assert buffer.feed(b"\n") == b"x" * 50 * pieces + b"\n"
    assert pieces * 50 <= Counted.searched <= 3 * pieces * 50


# JSON going out.

@pytest.mark.parametrize("value, expected", [
    ({}, b"{}"),
    ({"a": [1, True, None, 1.5, "x"], "b": {}}, b'{"a":[1,true,null,1.5,"x"],"b":{}}'),
    ("a\"b\\c/", b'"a\\"b\\\\c/"'),
    ("\b\t\n\f\r", b'"\\b\\t\\n\\f\\r"'),
    ("\x00\x01\x0b\x1b\x1f", b'"\\u0000\\u0001\\u000b\\u001b\\u001f"'),
    ("\x7f\x80\x85\xa0", '"\x7f\x80\x85\xa0"'.encode()),           # as JSON.stringify: as they are
    ("\u2028\u2029", '"\u2028\u2029"'.encode()),
    ("\u4e2d\u6587 \U0001f600 e\u0301", '"\u4e2d\u6587 \U0001f600 e\u0301"'.encode()),
    ("\ud800", b'"\\ud800"'), ("a\udfffb", b'"a\\udfffb"'),        # well-formed JSON.stringify
    ({"\ud83d": "\ude00"}, b'{"\\ud83d":"\\ude00"}'),
])
def test_json_is_compact_utf8_escaped_as_stringify_does(value, expected):
    assert ccproxy.to_json(value) == expected
    assert json.loads(expected.decode("utf-8")) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_what_is_not_json_is_not_written(value):
    with pytest.raises(ValueError):
        ccproxy.to_json(value)


@pytest.mark.parametrize("frame, expected", [
    (ccproxy.data_frame({"a": 1}), b'data: {"a":1}\n\n'),
    (ccproxy.data_frame({"a": "x\ny\r\nz"}), b'data: {"a":"x\\ny\\r\\nz"}\n\n'),
    (ccproxy.event_frame("ping", {"type": "ping"}), b'event: ping\ndata: {"type":"ping"}\n\n'),
    (ccproxy.comment_frame("waiting 15s"), b": waiting 15s\n\n"),
    (ccproxy.comment_frame("a\n\ndata: {}\r\n"), b": a??data: {}??\n\n"),
    (ccproxy.comment_frame("caf\xe9"), b": caf\\xe9\n\n"),
])
def test_frames(frame, expected):
    assert frame == expected


def test_line_breaks_of_python_are_escaped_in_frames_alone():
    value = {"a\u2028": ["\u2029\x85\u2027\x84\u0a28", "\\u2028 \u00e9"]}
    escaped = ('{"a\\u2028":["\\u2029\\u0085\u2027\x84\u0a28","\\\\u2028 \u00e9"]}').encode()
    assert ccproxy.data_frame(value) == b"data: %b\n\n" % escaped
    assert ccproxy.event_frame("x", value) == b"event: x\ndata: %b\n\n" % escaped
    assert json.loads(escaped) == value == json.loads(ccproxy.to_json(value))
    assert "\u2028".encode() in ccproxy.to_json(value)


@pytest.mark.parametrize("text", ["\n", "a\n\nevent: x\ndata: {}\n\n", "\r\n\r\n", "\u2028\x85",
                                  "\u2029", "\v\f\x1c\x1d\x1e\x1f\x85"])
def test_no_text_can_make_a_frame_of_its_own(text):
    for frame in (ccproxy.data_frame({"t": text}), ccproxy.event_frame("x", {"t": text})):
        assert frame.endswith(b"\n\n")
        assert frame.count(b"\n\n") == 1
        assert frame.decode().splitlines() == frame.decode().split("\n")[:-1]
        assert b"\r" not in frame
        assert json.loads(frame.partition(b"data: ")[2]) == {"t": text}
    assert ccproxy.comment_frame(text).count(b"\n") == 2


@pytest.mark.parametrize("agent, end", [
    ("", b"\n\n"), ("OpenAI/Python 2.20.0", b"\n\n"), ("OpenAI/JS 6.1.0", b"\n\n"),
    ("OpenAI/Go 1.12.0", b"\n"), ("OpenAI/Go", b"\n"), ("crush/1.0 OpenAI/Go 3.0", b"\n"),
    ("OpenAI/Golf 1", b"\n\n"), ("Go-http-client/1.1", b"\n\n"), ("Anthropic/Go 1.5", b"\n\n")])
def test_what_ends_a_comment(agent, end):
    assert ccproxy.comment_end(agent) == end
    assert ccproxy.comment_frame("x", ccproxy.comment_end(agent)) == b": x" + end


def test_a_comment_shows_no_key_and_is_bounded():
    frame = ccproxy.comment_frame("user_abcdefghijklmnop " + "x" * 100000)
    assert b"user_abcdef" not in frame
    assert len(frame) < 600


# JSON coming in.

@pytest.mark.parametrize("data, value", [
    (b"{}", {}), (b' {"a": [1, 2.5, -3e2, true, null, "x"]}\r\n',
                  {"a": [1, 2.5, -300.0, True, None, "x"]}),
    (b"\xef\xbb\xbf{}", {}),
    (b'{"a":"\\u00e9\\ud83d\\ude00"}', {"a": "\xe9\U0001f600"}),
    ('{"a":"\u4e2d\u2028"}'.encode(), {"a": "\u4e2d\u2028"}),
    (b'{"a":1,"a":2}', {"a": 2}),
    (b'{"a":123456789012345678901234567890}', {"a": 123456789012345678901234567890}),
    (b'{"a":"\\\\ud800"}', {"a": "\\ud800"}),
])
def test_good_bodies(data, value):
    notes = []
    assert ccproxy.parse_object(data, notes) == value
    assert notes == []


@pytest.mark.parametrize("data, value", [
    (b'{"a":"\\ud800"}', {"a": "\ufffd"}),
    (b'{"a":"x\\uDFFFy"}', {"a": "x\ufffdy"}),
    (b'{"a":["\\ude00\\ud83d",{"\\ud83d":1}]}', {"a": ["\ufffd\ufffd", {"\ufffd": 1}]}),
    (b'{"a":"\\ud83d\\ud83d\\ude00"}', {"a": "\ufffd\U0001f600"}),
])
def test_lone_surrogates_become_replacement_characters_with_a_note(data, value):
    notes = []
    assert ccproxy.parse_object(data, notes) == value
    assert len(notes) == 1
    ccproxy.to_json(value).decode("utf-8")          # the upstream body is always valid UTF-8


@pytest.mark.parametrize("data", [
    b"", b" ", b"{", b"}", b'{"a"}', b'{"a":}', b'{"a":1,}', b"{'a':1}", b'{"a":1}}', b"{}{}",
    b'{"a":01}', b'{"a":.5}', b'{"a":+1}', b'{"a":0x1}', b'{"a":tru}', b'{"a":"\n"}',
    b'{"a":"\\x"}', b'{"a":"\\u12"}', b'{"a":"', b"\x00", b"{}\x00", b"model=x", b"data: {}",
    b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":[NaN]}',
    b"[]", b"null", b"true", b"1", b'"x"', b'[{"a":1}]',
    b"\xff", b'{"a":"\xff"}', b'{"a":"\xc3"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\xc0\xaf"}',
    '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-16-le"), '{"a":1}'.encode("utf-32"),
    b'{"a":' + b"[" * 100000, b'{"a":' * 100000, b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}",
])
def test_bad_bodies_are_refused_in_plain_words(data):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.parse_object(data, [])
    assert caught.value.status == 400
    assert 10 < len(caught.value.message) < 200


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"x":', b"}")])
@pytest.mark.parametrize("depth, refused", [(200, False), (1100, True), (3000, True)])
def test_nesting_is_bounded_alike_on_every_python(depth, refused, opening, closing):
    # 200 levels are always taken, 1000 are the most (what walks a body later is recursive too).
    inner = opening * depth + (b"1" if closing == b"}" else b"") + closing * depth
    data = b'{"a":' + inner + b"}"
    if refused:
        with pytest.raises(ccproxy.ProxyError) as caught:
            ccproxy.parse_object(data, [])
        assert caught.value.status == 400
    else:
        assert "a" in ccproxy.parse_object(data, [])


def test_a_bad_body_is_not_repeated_in_the_error():
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.parse_object(b'{"secret words": user_abc}', [])
    assert "secret" not in caught.value.message
    assert "user_abc" not in caught.value.message


def test_no_bytes_make_parsing_raise_anything_but_400():
    chance = random.Random(4)
    good = b'{"model":"m","messages":[{"role":"user","content":"h\\ud83d\\ude00i"}],"n":1.5e3}'
    refused = 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            data[at:at + chance.randrange(3)] = bytes(chance.choices(b'{}[]":,\\ud8\x00\xffe-19',
                                                                     k=chance.randrange(3)))
        try:
            assert isinstance(ccproxy.parse_object(bytes(data), []), dict)
        except ccproxy.ProxyError as error:
            assert error.status == 400
            refused += 1
    assert 1000 < refused < 3000


@pytest.mark.parametrize("cut", [10, 1000, 1020, 1023, 1024])
def test_the_longest_line_is_as_long_however_it_comes(monkeypatch, cut):
    monkeypatch.setattr(ccproxy, "MAX_LINE_BYTES", 1024)
    for size, good in ((1024, True), (1025, False)):
        buffer, line = ccproxy.LineBuffer(b"no"), b"x" * size + b"\n"
        try:
            assert buffer.feed(line[:cut]) + buffer.feed(line[cut:]) == line and good
        except ccproxy.ProxyError as error:
            assert error.status == 502 and not good
