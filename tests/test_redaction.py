"""REDACTION & LOG LINES: what may be shown of a key or of what a client sent."""
from __future__ import annotations

import hashlib
import random
import re

import pytest
from harness import ccproxy

KEY = "user_Abc-123_xyz-0456789"
NAME = "key:" + hashlib.sha256(KEY.encode()).hexdigest()[:6]


def test_a_key_is_shown_as_six_digits_of_its_digest():
    assert ccproxy.key_name(KEY) == NAME
    assert ccproxy.key_name(KEY + "x") != NAME
    assert re.fullmatch(r"key:[0-9a-f]{6}", NAME)


@pytest.mark.parametrize("text, expected", [
    ("", ""), ("nothing here", "nothing here"), (KEY, NAME),
    ("Bearer %s, again %s." % (KEY, KEY), "Bearer %s, again %s." % (NAME, NAME)),
    ('{"key":"%s"}' % KEY, '{"key":"%s"}' % NAME),
    ("a" + KEY + " b", "a" + NAME + " b"), ("x=%s&y" % KEY, "x=%s&y" % NAME),
    (KEY + "\n" + KEY, NAME + "\n" + NAME), ("user_", "user_"), ("user name", "user name"),
    # percent-encoded, however often
    ("/x/" + KEY.replace("_", "%5F"), "/x/" + NAME),
    (KEY.replace("_", "%25255f") + ";", NAME + ";"), ("%2575%25252573er" + KEY[4:], NAME),
    ("100%, %zz %41 %", "100%, %zz %41 %"),
    # a word of fewer than 16 characters behind user_ is a name
    ("user_name, user_location: user_id", "user_name, user_location: user_id"),
    ("user_" + "a" * 15, "user_" + "a" * 15),
    ("user_" + "a" * 16, ccproxy.key_name("user_" + "a" * 16)),
    # other vendors' keys, bridge tokens, Bearer values
    ("key sk-proj-Abc_123456 no", "key %s no" % ccproxy.key_name("sk-proj-Abc_123456")),
    ("=sk-ant-api03-Abc123;", "=%s;" % ccproxy.key_name("sk-ant-api03-Abc123")),
    ("ccx_0123456789abcdef.", ccproxy.key_name("ccx_0123456789abcdef") + "."),
    ("Bearer eyJhbGciOi.J9-_x/=", "Bearer " + ccproxy.key_name("eyJhbGciOi.J9-_x/=")),
    ("task-management-of-words, ask-for-what-you-want", "task-management-of-words, "
     "ask-for-what-you-want"),
    ("sk-x, sk-SK, ccx_, `Authorization: Bearer user_...`, Bearer ..., Bearer %s" % NAME,
     "sk-x, sk-SK, ccx_, `Authorization: Bearer user_...`, Bearer ..., Bearer %s" % NAME),
    ("bearer authentication, Bearer credentials", "bearer authentication, Bearer credentials"),
])
def test_redaction(text, expected):
    assert ccproxy.redact(text) == expected
    assert ccproxy.redact(expected) == expected
    assert ccproxy.printable(text, 500) == expected.replace("\n", "?")


SECRETS = ["hunter2", "user_test", "user_test2", "https://h.example/T/x?y", "a%41bcdefg", "x"]


@pytest.mark.parametrize("text, expected", [
    ("", ""), ("nothing", "nothing"), ("hunter2", "[hidden]"), ("(hunter2).", "([hidden])."),
    # one shorter than 8 characters only as a whole word
    ("hunter23 xhunter2 hunter2-a _hunter2", "hunter23 xhunter2 hunter2-a _hunter2"),
    ("x=x-api-key x", "[hidden]=x-api-key [hidden]"),
    # others anywhere, the longest first
    ("auser_testb user_test2", "a%sb %s" % (ccproxy.key_name("user_test"),
                                           ccproxy.key_name("user_test2"))),
    ("to https://h.example/T/x?y!", "to [hidden]!"),
    ("https://h.example/T/", "https://h.example/T/"),
    # percent-encoded, however often, and one that looks so
    ("/v1/user%5Ftest", "/v1/" + ccproxy.key_name("user_test")),
    ("/u%2573er%25255ftes%74/%2F", "/%s//" % ccproxy.key_name("user_test")), ("/%2F%41", "/%2F%41"),
    ("a%41bcdefg", "[hidden]"),
])
def test_known_secrets_are_hidden_exactly(text, expected):
    assert ccproxy.hide(text, SECRETS) == expected
    if "%" not in text:
        assert ccproxy.conceal({text: [text, 1, None, {"a": text}]}, SECRETS) == {
            expected: [expected, 1, None, {"a": expected}]}
    assert ccproxy.redact(text, SECRETS) == expected


@pytest.mark.parametrize("fields, expected", [
    ({}, set()), ({"authorization": ""}, set()), ({"authorization": "Bearer"}, set()),
    ({"authorization": "Bearer user_a"}, {"user_a"}), ({"cookie": "user_a"}, set()),
    ({"authorization": "Token sk-1", "x-api-key": "user_a", "api-key": "user_b"},
     {"sk-1", "user_a", "user_b"}),
    ({"x-api-key": "w=user_a;weight=2, \"sk 2\""}, {"user_a", "w=user_a;weight=2"}),
    ({"x-api-key": "dummy"}, {"dummy"}), ({"x-api-key": "Bearer sk 2"}, {"sk 2", "2"}),
    ({"authorization": "Bearer user_", "api-key": "user_..."}, set()),
    ({"authorization": "Bearer your key", "api-key": "KEY"}, {"your key"}),
    ({"authorization": "Basic dXNlcjpwdw=="}, {"Basic dXNlcjpwdw==", "dXNlcjpwdw=="}),
])
def test_what_a_request_sends_as_keys(fields, expected):
    assert set(ccproxy.sent_secrets(fields)) == expected


def test_no_list_of_keys_costs_much_to_look_for():
    value = "a" * 8 + "," + "b," * 30000 + "user_a," * 1000
    assert len(ccproxy.sent_secrets({name: value for name, _ in ccproxy.KEY_FIELDS})) <= 64


@pytest.mark.parametrize("text, most, expected", [
    ("plain words", 50, "plain words"), ("", 50, ""),
    ("a\nb\r\nc\td", 50, "a?b??c?d"), ("\x00\x1b[31mred\x7f", 50, "??[31mred?"),
    ("caf\xe9 \u4e2d \U0001f600", 50, "caf\\xe9 \\u4e2d \\U0001f600"),
    ("\x85\u2028\xa0", 50, "\\x85\\u2028\\xa0"), ("\ud800", 50, "\\ud800"),
    ("x" * 20, 20, "x" * 20), ("x" * 21, 20, "x" * 17 + "..."), ("\xe9" * 10, 20,
                                                                "\\xe9\\xe9\\xe9\\xe9\\..."),
    (KEY, 50, NAME),
])
def test_printable(text, most, expected):
    assert ccproxy.printable(text, most) == expected


def test_printable_text_is_ascii_on_one_line_bounded_and_without_keys():
    chance = random.Random(6)
    letters = "ab \n\r\t\x00\x1b\x7f\x85\xa0\xe9\u2028\u4e2d\ud800\U0001f600;=\"'\\"
    for _ in range(500):
        before = "".join(chance.choices(letters, k=chance.randrange(120)))
        text = before + KEY + "".join(chance.choices(letters, k=chance.randrange(120)))
        for most in (10, 40, 300):
            shown = ccproxy.printable(text, most)
            assert len(shown) <= most
            assert re.fullmatch(r"[ -~]*", shown)
            assert KEY not in shown
            assert "Abc-123" not in shown


@pytest.mark.parametrize("place", range(0, 60))
def test_no_cut_shows_a_part_of_a_key(place):
    secret = "user_" + "S3cret" * 10
    for text in ("x" * place + secret + " y", secret + " " + secret + "x" * place + secret):
        assert "S3cret" not in ccproxy.printable(text, 16)
        assert "S3cret" not in ccproxy.own_words("\xe9" + text, 32)


@pytest.mark.parametrize("value, expected", [
    (True, "yes"), (False, "no"), (0, "0"), (17, "17"), (1.23456, "1.235"), (0.0, "0.000"),
    ("word", "word"), ("a/b:c,d->e", "a/b:c,d->e"), ("two words", '"two words"'), ("a=b", '"a=b"'),
    ('say "hi"', '"say \\"hi\\""'), ("a;b", '"a;b"'), ("", '""'),
    ("a\nstatus=200", '"a?status=200"'),
    ("\u2028", "\\u2028"), (KEY, NAME), ("x" * 2000, "x" * 1097 + "..."),
])
def test_log_values(value, expected):
    assert ccproxy.log_value(value) == expected


@pytest.mark.parametrize("fields, expected", [
    ({}, ""),
    ({"status": 200, "api": "chat", "stream": True, "total": 1.5},
     "status=200 api=chat stream=yes total=1.500"),
    ({"a": None, "b": "", "c": 0, "d": False}, "c=0 d=no"),
    ({"model": "x\nERROR forged", "key": KEY}, 'model="x?ERROR forged" key=' + NAME),
    ({"error": 'bad "thing" = ' + KEY}, 'error="bad \\"thing\\" = %s"' % NAME),
])
def test_log_lines(fields, expected):
    assert ccproxy.log_line(fields) == expected


def test_a_log_line_can_be_taken_apart_again():
    chance = random.Random(7)
    for _ in range(300):
        value = "".join(chance.choices("ab =\";\\\n\u2028", k=chance.randrange(1, 30)))
        line = ccproxy.log_line({"first": value, "last": 1})
        assert "\n" not in line
        assert re.fullmatch(r'first=("([^"\\]|\\.)*"|[^\s"=;]+) last=1', line)


# Notes.

@pytest.mark.parametrize("code, detail, expected", [
    ("clamped", "max_tokens 9 -> 8", "clamped=max_tokens 9 -> 8"),
    ("dropped", "a; b=c", "dropped=a, b=c"), ("dropped", "a\r\nx-evil: 1", "dropped=a??x-evil: 1"),
    ("dropped", "caf\xe9", "dropped=caf\\xe9"),
    # a caller's own names, for that caller
    ("schema", "of tool user_name_of_the_customer", "schema=of tool user_name_of_the_customer"),
    ("x", "y" * 100 + KEY, "x=" + "y" * 100 + NAME),      # but nothing of a key that is cut
    ("x", "y" * 500, "x=" + "y" * 117 + "..."),
])
def test_notes(code, detail, expected):
    notes = []
    ccproxy.add_note(notes, code, detail)
    assert notes == [expected]


@pytest.mark.parametrize("notes, expected", [
    ([], ""), (["a=1"], "a=1"), (["a=1", "b=2"], "a=1; b=2"), (["a=1", "b=2", "a=1"], "a=1; b=2"),
])
def test_the_notes_header(notes, expected):
    assert ccproxy.format_notes(notes) == expected
    assert ccproxy.format_notes(iter(notes)) == expected


@pytest.mark.parametrize("count, size", [(9, 120), (10, 120), (40, 30), (5000, 10), (200, 120)])
def test_the_notes_header_has_at_most_1_kib_and_tells_what_is_left_out(count, size):
    notes = []
    for number in range(count):
        ccproxy.add_note(notes, "n", ("%06d" % number).ljust(size, "x"))
    header = ccproxy.format_notes(notes)
    assert len(header) <= 1024
    shown = header.split("; ")
    assert shown[:-1] == notes[:len(shown) - 1]
    assert shown[-1] == "+%d more" % (count - len(shown) + 1)
    assert len(header) > 700            # what fits is shown
