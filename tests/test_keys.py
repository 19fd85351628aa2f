"""KEYS: the caller's key, and the ids of its conversation."""
from __future__ import annotations

import json
import re
import uuid

import pytest
from harness import ccproxy

# Finding the key.


@pytest.mark.parametrize("fields, key", [
    ({"authorization": "Bearer user_abc"}, "user_abc"),
    ({"authorization": "bearer user_abc"}, "user_abc"),
    ({"authorization": "BEARER   user_abc  "}, "user_abc"),
    ({"authorization": "user_abc"}, "user_abc"),
    ({"authorization": "Bearer \"user_A-b_9\""}, "user_A-b_9"),
    ({"authorization": "Bearer user_abc, Bearer user_def"}, "user_abc"),
    ({"authorization": "Bearer sk-proj-1:user_abc"}, "user_abc"),
    ({"authorization": "token user_abc"}, "user_abc"), ({"api-key": "user_abc"}, "user_abc"),
    ({"x-api-key": "user_abc"}, "user_abc"),
    ({"x-api-key": " user_abc;x"}, "user_abc"),
    # Authorization is looked at first; the first that holds one counts.
    ({"authorization": "Bearer user_one", "x-api-key": "user_two"}, "user_one"),
    ({"authorization": "Bearer sk-other", "x-api-key": "user_two"}, "user_two"),
    ({"authorization": "", "x-api-key": "user_two"}, "user_two"),
])
def test_the_key_is_found(fields, key):
    assert ccproxy.find_caller(fields, ccproxy.Operator(), "", "POST").keys[0].key == key


@pytest.mark.parametrize("fields, words", [
    ({}, "No key"), ({"authorization": ""}, "No key"), ({"authorization": "  "}, "No key"),
    ({"x-other": "user_abc"}, "No key"), ({"cookie": "user_abc"}, "No key"),
    ({"authorization": "Bearer "}, "not a Command Code key"),
    ({"authorization": "Bearer sk-proj-SECRET"}, "not a Command Code key"),
    ({"x-api-key": "sk-ant-SECRET"}, "not a Command Code key"),
    ({"authorization": "Bearer user_"}, "not a Command Code key"),
    ({"authorization": "Bearer USER_SECRET"}, "not a Command Code key"),
    ({"authorization": "Basic dXNlcl9hYmM6"}, "not a Command Code key"),
    ({"authorization": "Digest username=user_SECRET"}, "not a Command Code key"),
    ({"api-key": "SECRET"}, "not a Command Code key"),
    ({"authorization": "Bearer user_\xe9"}, "not a Command Code key"),
])
def test_without_a_key_the_error_says_what_is_expected(fields, words):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.find_caller(fields, ccproxy.Operator(), "", "POST").keys[0].key
    error = caught.value
    assert (error.kind, error.status) == ("authentication", 401)
    assert words in error.message
    assert "user_..." in error.message
    assert "SECRET" not in error.message        # never what was sent


MISTAKES = [
    ("user_...", "the placeholder"), ("user_\u2026", "the placeholder"),
    ("user_..", "the placeholder"),
    ("user_\xe2\x80\xa6", "the placeholder"), ("user_xxx", "the placeholder"),
    ("user_XXXXXXXXXXXX", "the placeholder"), ("user_xxxx...", "the placeholder"),
    ("user_***", "the placeholder"), ("user_<your key>", "the placeholder"),
    ("user_[key]", "the placeholder"), ("user_YOUR_KEY", "the placeholder"),
    ("user_YOUR_API_KEY", "the placeholder"), ("user_your-api-key-here", "the placeholder"),
    ("user_my_command_code_key", "the placeholder"), ("user_key", "the placeholder"),
    ("user_yourtoken", "the placeholder"),
    ("sk-ant-api03-x", "Anthropic"), ("sk-or-v1-x", "OpenRouter"), ("sk-proj-x", "OpenAI"),
    ("sk-x", "OpenAI"), ("gsk_x", "Groq"), ("AIzaSyx", "Google"), ("xai-x", "xAI"),
    ("ghp_x", "GitHub"),
    ("user_a", ""), ("user_xx", ""), ("user_keyed1", ""), ("user_myKq3", ""), ("user_yours", ""),
    ("user_", ""), ("user_xxxa", ""), ("user_tokenkey1", ""), ("", ""), ("a-clientKey", ""),
    ("task-1", ""), ("user_" + "a1B2" * 20, "")]


@pytest.mark.parametrize("text, kind", MISTAKES)
def test_what_stands_in_place_of_a_key_is_named(text, kind):
    named = ccproxy.mistaken_key(text)
    assert kind in named and bool(kind) == bool(named)
    if "\u2026" in text or not text:
        return
    for fields in ({"authorization": "Bearer " + text}, {"x-api-key": text}):
        if text.startswith("user_") and not kind and text != "user_":
            assert ccproxy.find_caller(fields, ccproxy.Operator(), "", "POST").keys[0].key == text
            continue
        with pytest.raises(ccproxy.ProxyError) as caught:
            ccproxy.find_caller(fields, ccproxy.Operator(), "", "POST")
        told = caught.value.message
        assert caught.value.status == 401
        assert ", but " + named in told if kind else ", but " not in told
        assert "user_..." in told and "commandcode.ai" in told


def test_a_mistake_is_named_beside_a_client_key_too():
    operator = ccproxy.Operator((ccproxy.new_ring_key("user_a"),), "sk-team")
    for key in ("user_...", "user_xxx", "sk-other"):
        with pytest.raises(ccproxy.ProxyError, match="not a Command Code key.*, but .*clientKey"):
            ccproxy.find_caller({"x-api-key": key}, operator, "", "POST")
    assert ccproxy.find_caller({"x-api-key": "sk-team"}, operator, "", "POST").operator


# The client's own name for its conversation.


def claude_code(session):
    return json.dumps({"device_id": "d", "account_uuid": "", "session_id": session})


@pytest.mark.parametrize("fields, user_id, expected", [
    ({}, None, ""), ({}, 5, ""), ({}, ["x"], ""), ({}, "", ""),
    ({"x-claude-code-session-id": "a"}, None, "a"), ({"x-session-id": "b"}, None, "b"),
    ({"session-id": "c"}, None, "c"), ({"session_id": "d"}, None, "d"), ({}, "user-1", "user-1"),
    # in this order
    ({"x-claude-code-session-id": "a", "x-session-id": "b", "session-id": "c", "session_id": "d"},
     "e", "a"),
    ({"x-session-id": "b", "session-id": "c", "session_id": "d"}, "e", "b"),
    ({"session-id": "c", "session_id": "d"}, "e", "c"), ({"session_id": "d"}, "e", "d"),
    ({"x-claude-code-session-id": "", "session_id": "d"}, "e", "d"), ({"session-id": ""}, "e", "e"),
    # metadata.user_id of Claude Code holds JSON
    ({}, claude_code("s-1"), "s-1"), ({}, "{not json", "{not json"), ({}, "{}", "{}"),
    ({}, '{"session_id": 5}', '{"session_id": 5}'), ({}, '{"session_id": ""}',
                                                    '{"session_id": ""}'),
    ({}, '["session_id"]', '["session_id"]'), ({}, "{" * 300, "{" * 300),
    ({"x-session-id": "x" * 1000}, None, "x" * 512), ({}, "y" * 1000, "y" * 512),
    ({}, claude_code("z" * 1000), "z" * 512),
])
def test_how_the_client_names_its_conversation(fields, user_id, expected):
    assert ccproxy.session_value(fields, user_id) == expected


def test_no_user_id_makes_it_raise():
    for user_id in ('{"a":' * 100000, '{"session_id":"\\ud800"}', "\ud800", "{\x00",
                    '{"a":1e999}'):
        assert isinstance(ccproxy.session_value({}, user_id), str)


# The derived id.

SUBJECTS = [
    # (key, the client's name, first user message): any difference that counts, another id
    ("user_a", "s", "hello"), ("user_b", "s", "hello"), ("user_a", "t", "hello"),
    ("user_a", "", "hello"), ("user_a", "", "hello "), ("user_b", "", "hello"), ("user_a", "", ""),
    ("user_a", "hello", ""), ("user_as", "", "hello"), ("user_a", "", "session\ns"),
    ("user_a", "\u4e2d", ""), ("user_a", "", "\U0001f600"), ("user_a", "", "x" * 1_000_000),
]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: repr(subject)[:40])
def test_a_session_is_a_strict_uuid_and_always_the_same(subject):
    session = ccproxy.derive_session(*subject)
    found = uuid.UUID(session)
    assert (str(found), found.version, found.variant) == (session, 4, uuid.RFC_4122)
    assert session == ccproxy.derive_session(*subject)


def test_every_conversation_has_a_session_of_its_own():
    assert len({ccproxy.derive_session(*subject) for subject in SUBJECTS}) == len(SUBJECTS)


def test_ids_stay_the_same_from_version_to_version():
    # Other processes and hosts, of any version, agree without sharing anything.
    assert ccproxy.derive_session("user_a", "s", "") == expected_session("user_a", "session\ns")
    assert ccproxy.derive_session("user_a", "", "hi") == expected_session("user_a", "message\nhi")


def expected_session(key, subject):
    import hashlib
    import hmac
    value = int(hmac.new(key.encode(), subject.encode(), hashlib.sha256).hexdigest()[:32], 16)
    value = value & ~(0xf << 76) | 4 << 76              # version 4
    value = value & ~(0x3 << 62) | 2 << 62              # variant of RFC 4122
    return str(uuid.UUID(int=value))


def test_where_the_client_names_it_the_first_message_does_not_count():
    one = ccproxy.derive_session("user_a", "s", "first")
    assert one == ccproxy.derive_session("user_a", "s", "compacted") == ccproxy.derive_session(
        "user_a", "s", "")


def test_no_text_makes_deriving_raise():
    for text in ("\ud800", "\x00", "\ufffe"):
        assert ccproxy.derive_session("user_a", text, "")
        assert ccproxy.derive_session("user_a", "", text)


def test_many_sessions_are_all_different_and_well_formed():
    found = {ccproxy.derive_session("user_a", str(number), "") for number in range(3000)}
    assert len(found) == 3000
    shape = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    assert all(shape.fullmatch(one) for one in found)
    assert {one[19] for one in found} == set("89ab")


# traceparent.

FRESH = "0123456789abcdef" * 3
MADE = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"


@pytest.mark.parametrize("given, expected", [
    (GIVEN, GIVEN), (GIVEN[:-2] + "ff", GIVEN[:-2] + "ff"),
    ("", MADE), ("x", MADE), (GIVEN.upper(), MADE), (GIVEN + "-x", MADE), (" " + GIVEN, MADE),
    (GIVEN + "\n", MADE), ("ff" + GIVEN[2:], MADE), (GIVEN[:-3], MADE), (GIVEN[:-1], MADE),
    ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", MADE),
    ("00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", MADE),
    (GIVEN.replace("-", "_"), MADE), (GIVEN + ", " + GIVEN, MADE),
    (GIVEN.replace("b", "\xb2"), MADE),
])
def test_traceparent(given, expected):
    assert ccproxy.choose_traceparent(given, FRESH) == expected
