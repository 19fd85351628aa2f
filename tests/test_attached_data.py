"""ATTACHED DATA: base64 and data URLs read and healed; a picture's type is told by its bytes."""
from __future__ import annotations

import base64
import random

import pytest
from harness import ccproxy

SOUND = "iVBORw0KGgoAAAAN"
CLEANED = [     # (data, what models are sent; None where it is broken)
    ("", ""), ("AAAA", "AAAA"), ("AAA=", "AAA="), ("AA==", "AA=="), ("ab+/", "ab+/"),
    ("AA AA", "AAAA"), ("AA\r\nAA\n", "AAAA"), ("\tAAAA", "AAAA"), ("AA\u00a0AA", "AAAA"),
    ("AA\x0bAA", "AAAA"), ("AAA", "AAA="), ("AA", "AA=="), ("AA=", "AA=="), ("AA===", "AA=="),
    ("-_-_", "+/+/"), ("A", None), ("AAAAA", None), ("=AAA", None), ("AA==AAAA", None),
    ("AAAA...", None), ("AA[cut]AA", None), ("AA<cut>AA", None), ("data:AAA", None),
    ("AA%3D%3D", None), ("AA\u00e9A", None), ("AA\uff21A", None), ("{}", None)]


@pytest.mark.parametrize("data,cleaned", CLEANED, ids=range(len(CLEANED)))
def test_clean_base64(data, cleaned):
    assert ccproxy.clean_base64(data) == cleaned


def test_clean_base64_keeps_what_it_means():
    rng = random.Random(1)
    for _ in range(300):
        data = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        plain = base64.b64encode(data).decode()
        assert ccproxy.clean_base64(plain) is plain
        for other in (base64.encodebytes(data).decode(), plain.rstrip("="),
                      base64.urlsafe_b64encode(data).decode()):
            assert ccproxy.clean_base64(other) == plain


SPLIT = [       # (text, label, (data, media type, inline, prefixes))
    ("AAAA", None, ("AAAA", "", False, 0)), ("AAAA", "Image/PNG", ("AAAA", "image/png", True, 0)),
    ("data:image/png;base64,AA", None, ("AA", "image/png", True, 1)),
    ("DATA:Image/PNG;a=b;BASE64,AA", None, ("AA", "image/png", True, 1)),
    ("data:image/png,AA", None, ("AA", "image/png", False, 1)),
    ("data:,AA", "text/plain", ("AA", "text/plain", False, 1)),
    ("data:image/png;base64,data:image/gif;base64,AA", None, ("AA", "image/gif", True, 2)),
    ("data:image/png;base64,data:;base64,AA", None, ("AA", "image/png", True, 2)),
    ("data:image/png AA", None, ("data:image/png AA", "", False, 0)),
    ("", None, ("", "", False, 0))]


@pytest.mark.parametrize("given,label,expected", SPLIT, ids=range(len(SPLIT)))
def test_split_data_url(given, label, expected):
    assert ccproxy.split_data_url(given, label) == (*expected, "", "")


def test_prefixes_without_end_are_not_all_read():
    found = ccproxy.split_data_url("data:," * 100_000, None)
    assert found.prefixes == ccproxy.MAX_DATA_PREFIXES and len(found.data) > 500_000


STARTS = [      # (bytes of a file, the media type that they tell)
    (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "image/png"),
    (b"\xff\xd8\xff\xe0\x00\x10JFIF", "image/jpeg"),
    (b"\xff\xd8\xff\xdb" + b"\x00" * 9, "image/jpeg"), (b"GIF87a\x01\x00\x01\x00", "image/gif"),
    (b"GIF89a\x01\x00\x01\x00", "image/gif"), (b"RIFF\x24\x00\x00\x00WEBPVP8 ", "image/webp"),
    (b"RIFF\xff\xff\xff\xffWEBPVP8L", "image/webp"), (b"\x00\x00\x00\x18ftypheic", "image/heic"),
    (b"\x00\x00\x00\x1cftypavif", "image/heic"), (b"II*\x00\x08\x00", "image/tiff"),
    (b"MM\x00*\x00\x00", "image/tiff"), (b"<svg xmlns=", "image/svg+xml"),
    (b"<?xml version=", "text/xml"), (b"%PDF-1.7", "application/pdf")]


@pytest.mark.parametrize("data,mime", STARTS, ids=range(len(STARTS)))
def test_bytes_decide_the_type(data, mime):
    """Whatever the label says; without bytes that are known, the label holds."""
    for label in ("image/png", "image/gif", "", "x/y"):
        found = ccproxy.examine_picture(base64.b64encode(data + b"\x00" * 9).decode(), label)
        assert found.mime == mime
        assert (found.fault == "") == (mime in ccproxy.IMAGE_TYPES)
        assert bool(found.healed) == (label != mime)
    unknown = ccproxy.examine_picture("AAAA", "image/webp")
    assert unknown == ccproxy.Attached("AAAA", "image/webp", True, 0)


DOCUMENTS = [   # (data, media type, whether in base64, (text, reason))
    ("b25l", "text/plain", True, ("one", "")), ("b25l", "application/json", True, ("one", "")),
    ("b25\nl", "text/x", True, ("one", "")), ("/w==", "text/x", True, ("\ufffd", "")),
    ("one%20%C3%A9", "text/x", False, ("one \u00e9", "")),
    ("IA==", "text/plain", True, ("", "it is empty")), ("%20", "text/plain", False,
                                                       ("", "it is empty")),
    ("A", "text/plain", True, ("", "its base64 is broken")),
    ("b25l", "application/pdf", True, ("", "application/pdf cannot be read as text"))]


@pytest.mark.parametrize("data,mime,encoded,expected", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_decode_document(data, mime, encoded, expected):
    assert ccproxy.decode_document(data, mime, encoded) == expected
