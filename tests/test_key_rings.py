"""KEY RINGS and OPERATOR KEYS: several keys of one caller, and those that an operator lends."""
from __future__ import annotations

import hashlib
import json

import pytest
from harness import ccproxy

SECRET = "5ecr3tPartOfAKey0123456789"
PLANTED = "user_" + SECRET


def shape(keys):
    return [(key.key, key.name, key.weight) for key in keys]


def leaks(value):
    text = "%s %r" % (value, value)
    return SECRET[:10] in text or SECRET[-10:] in text


# A ring in a header.

@pytest.mark.parametrize("value, expected", [
    ("Bearer user_a", [("user_a", "", 1)]),
    ("Bearer user_a,user_b", [("user_a", "", 1), ("user_b", "", 1)]),
    ("user_b , user_a", [("user_b", "", 1), ("user_a", "", 1)]),
    ("bearer work=user_a,home=user_b", [("user_a", "work", 1), ("user_b", "home", 1)]),
    ("Bearer work=user_a;weight=2,user_b", [("user_a", "work", 2), ("user_b", "", 1)]),
    ("Bearer work = user_a ; weight = 0.5 , user_b", [("user_a", "work", 0.5), ("user_b", "", 1)]),
    ("Bearer user_a, Bearer user_b", [("user_a", "", 1), ("user_b", "", 1)]),   # two headers
    ("Bearer user_a,,user_b,", [("user_a", "", 1), ("user_b", "", 1)]),         # RFC 9110 5.6.1
    ("Bearer \"user_a\",user_b", [("user_a", "", 1), ("user_b", "", 1)]),
    ("Bearer work=user_a", [("user_a", "work", 1)]),
    ("Bearer user_a;weight=3", [("user_a", "", 3)]),
    # duplicates: the first counts
    ("user_a,user_a", [("user_a", "", 1)]), ("w=user_a,w=user_a", [("user_a", "w", 1)]),
    ("x=user_a;weight=2,user_b,y=user_a", [("user_a", "x", 2), ("user_b", "", 1)]),
    # one key with something around it is read as ever (R1)
    ("Bearer sk-proj-1:user_a", [("user_a", "", 1)]), (" user_a;x", [("user_a", "", 1)]),
    ("Bearer user_a.", [("user_a", "", 1)]), ("Bearer user_a, a", [("user_a", "", 1)]),
    ("Bearer user_a user_b", [("user_a", "", 1)]), ("user_a;user_b", [("user_a", "", 1)]),
    # empty entries, white space and quotes count for nothing; what is no key is left out
    ("Bearer user_a, ,\"user_b\"", [("user_a", "", 1), ("user_b", "", 1)]),
    ("Bearer ,user_a,\"\", '' ,\t,'user_b' ", [("user_a", "", 1), ("user_b", "", 1)]),
    ("Token \"work=user_a;weight=2\",\" home = user_b \"", [("user_a", "work", 2),
                                                           ("user_b", "home", 1)]),
    ("\"user_a,user_b\"", [("user_a", "", 1), ("user_b", "", 1)]),
    ("work='user_a',home=\"user_b\"", [("user_a", "work", 1), ("user_b", "home", 1)]),
    ("Bearer user_a,sk-x,user_b", [("user_a", "", 1), ("user_b", "", 1)]),
    ("sk-x, user_a", [("user_a", "", 1)]), ("user_a, Basic dXNlcjpwdw==", [("user_a", "", 1)]),
    ("Bearer sk-x, Bearer user_a", [("user_a", "", 1)]),
    ("sk-x=1;weight=z, user_a;weight=2, user_, user", [("user_a", "", 2)]),
    (",".join(["sk-x"] * 50 + ["user_a", "user_b"]), [("user_a", "", 1), ("user_b", "", 1)]),
    # none at all
    ("", []), ("Bearer sk-a,sk-b", []), ("Bearer ", []), ("Bearer user_", []),
])
def test_a_ring_is_read(value, expected):
    assert shape(ccproxy.parse_ring(value, "Authorization")) == expected


@pytest.mark.parametrize("value, words", [
    ("Bearer user_a,sk-x:%s,user_b" % PLANTED, "entry 2"), ("user_c,%s user_b" % PLANTED, "2"),
    ("user_a,%s;burn=2" % PLANTED, "entry 2"),
    ("%s;weight=0,user_b" % PLANTED, "weight"), ("%s;weight=1001" % PLANTED, "weight"),
    ("user_a,%s;weight=-1" % PLANTED, "entry 2"), ("user_a,%s;weight=1e3" % PLANTED, "entry 2"),
    ("user_a,%s;weight=nan" % PLANTED, "entry 2"), ("a b=%s,user_b" % PLANTED, "entry 1"),
    ("=%s,user_b" % PLANTED, "entry 1"), ("%s=user_b,user_c" % PLANTED, "entry 1"),
    ("%s=%s" % (PLANTED, PLANTED + "x"), "entry 1"), ("%s=%s,user_b" % ("n" * 33, PLANTED), "1"),
    ("one=user_a,one=%s" % PLANTED, "one name to two keys"),
    (",".join("user_%d%s" % (n, SECRET) for n in range(33)), "at most 32"),
    ("\u0663=user_a,%s" % PLANTED, "entry 1"),
])
def test_a_malformed_ring_is_a_400_that_never_says_what_was_sent(value, words):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.parse_ring(value, "x-api-key")
    error = caught.value
    assert (error.kind, error.status) == ("invalid", 400)
    assert words in error.message and "x-api-key" in error.message
    assert not leaks(error)


@pytest.mark.parametrize("fields, expected", [
    ({"authorization": "Bearer user_a", "x-api-key": "user_b,user_c"}, ["user_a"]),
    ({"authorization": "Bearer sk-x", "x-api-key": "user_b,user_c"}, ["user_b", "user_c"]),
    ({"x-api-key": "user_a", "api-key": "user_b"}, ["user_a"]), ({"api-key": "user_b"}, ["user_b"]),
    ({"authorization": "Digest a=user_x, user_y", "api-key": "user_b"}, ["user_b"]),
    ({"authorization": "work = user_a ; weight = 2"}, ["user_a"]),
    ({"authorization": "user_a user_b"}, ["user_a"]), ({"authorization": "Bearer , user_a"},
                                                       ["user_a"]),
    ({"x-api-key": "user_b,user_c"}, ["user_b", "user_c"]), ({}, []),
])
def test_authorization_comes_first(fields, expected):
    assert [key.key for key in ccproxy.ring_in(fields)] == expected


def test_the_first_key_of_a_ring_is_the_one_that_was_always_found():
    for value in ("Bearer user_abc, Bearer user_def", "Bearer sk-proj-1:user_abc", "user_abc;x"):
        fields = {"authorization": value}
        assert ccproxy.ring_in(fields)[0].key == "user_abc"


@pytest.mark.parametrize("value, places", [
    ("Bearer user_a, ,\"user_b\"", []), ("user_a", []), ("Bearer sk-x,sk-y", []),
    ("Bearer user_a, sk-%s" % SECRET, [2]), ("sk-%s, ,user_a,'x y',user_b" % SECRET, [1, 3]),
    ("lent, user_a", []), ("user_a,user_b, \"lent\" ,sk-x", [4]), ("user_a, lent.", [2]),
    ("user_a," + "sk," * 5000, list(range(2, 34))),
])
def test_a_note_tells_what_is_left_out_of_a_ring(value, places):
    """By its place alone; the clientKey beside a caller's own key is no stranger."""
    notes = []
    ccproxy.parse_ring(value, "api-key", notes, "lent")
    assert notes == ["left_out=api-key, entry %d: not a Command Code key" % one for one in places]
    assert not leaks(notes)


def test_a_long_ring_costs_little():
    with pytest.raises(ccproxy.ProxyError):
        ccproxy.parse_ring("user_a," * 9000, "Authorization")
    assert ccproxy.parse_ring("," * 60000 + "user_a", "Authorization")[0].key == "user_a"


def test_a_key_is_in_no_repr():
    ring = ccproxy.parse_ring("work=%s,user_b" % PLANTED, "Authorization")
    operator = ccproxy.Operator(ring, SECRET, True, "file")
    caller = ccproxy.Caller(ring, ring[0].digest)
    for value in (ring, operator, caller, ring[0]):
        assert not leaks(value)
    assert ring[0].shown == ccproxy.key_name(PLANTED)
    assert ring[0].digest == hashlib.sha256(PLANTED.encode()).hexdigest()
    assert ring[0].digest not in repr(ring[0])


# An operator's keys.

FULL = {"id": "work", "apiKey": "user_a", "weight": 2, "enabled": True, "maxInFlight": 3,
        "allowedModels": ["A/b", " c "]}


@pytest.mark.parametrize("text, expected", [
    ("user_a", [("user_a", "", 1)]), ("user_a,user_b", [("user_a", "", 1), ("user_b", "", 1)]),
    ("one=user_a, two=user_b", [("user_a", "one", 1), ("user_b", "two", 1)]),
    ("user_a\nuser_b\n", [("user_a", "", 1), ("user_b", "", 1)]),
    ('["user_a", "user_b"]', [("user_a", "", 1), ("user_b", "", 1)]),
    (json.dumps([FULL]), [("user_a", "work", 2)]),
    (json.dumps({"credentials": [FULL, "user_b"]}), [("user_a", "work", 2), ("user_b", "", 1)]),
    ("\ufeff" + json.dumps({"credentials": [{"key": "user_a"}]}), [("user_a", "", 1)]),
    (json.dumps({"apiKey": "user_a", "userId": "u", "userName": "n"}), [("user_a", "", 1)]),
    (json.dumps({"apiKeys": ["user_a", "user_a"]}), [("user_a", "", 1)]),
    (json.dumps([dict(FULL, enabled=False), "user_b"]), [("user_b", "", 1)]),
    (json.dumps([dict(FULL, weight=None, maxInFlight=None, allowedModels=None)]),
     [("user_a", "work", 1)]),
    ("", []), ("  ", []), ("[]", []), ("{}", []), ('{"apiKey": ""}', []), ('{"userId": "u"}', []),
])
def test_credentials_are_read_in_every_form(text, expected):
    source, keys = ccproxy.read_credentials([("source", text)])
    assert shape(keys) == expected
    assert source == ("source" if expected else "")


def test_a_row_says_what_its_key_may_do():
    key = ccproxy.read_credentials([("file", json.dumps([FULL]))])[1][0]
    assert (key.max_in_flight, key.allowed_models) == (3, ("a/b", "c"))


@pytest.mark.parametrize("text, words", [
    ('[{"apiKey": "sk-%s"}]' % SECRET, "credential 1"), ('["user_a", 5]', "credential 2"),
    ('[{"id": "%s", "apiKey": "user_a"}]' % PLANTED, "id"), ('[{"id": 5, "apiKey": "user_a"}]',
                                                             "id"),
    ('[{"apiKey": "%s", "weight": 0}]' % PLANTED, "weight"),
    ('[{"apiKey": "%s", "weight": true}]' % PLANTED, "weight"),
    ('[{"apiKey": "%s", "weight": "2"}]' % PLANTED, "weight"),
    ('[{"apiKey": "%s", "enabled": "no"}]' % PLANTED, "enabled"),
    ('[{"apiKey": "%s", "maxInFlight": 1.5}]' % PLANTED, "maxInFlight"),
    ('[{"apiKey": "%s", "maxInFlight": -1}]' % PLANTED, "maxInFlight"),
    ('[{"apiKey": "%s", "allowedModels": "a"}]' % PLANTED, "allowedModels"),
    ('[{"apiKey": "%s", "allowedModels": [1]}]' % PLANTED, "allowedModels"),
    ('{"credentials": "%s"}' % PLANTED, "a list"), ('{"apiKey": 5}', "credential 1"),
    ('[{"apiKey": "%s",]' % PLANTED, "JSON"), ("[" * 100000, "JSON"), ('[NaN]', "JSON"),
    ("sk-" + SECRET, "credential 1"), ("a=user_a,a=%s" % PLANTED, "one name"),
    (json.dumps(["user_%d" % n for n in range(257)]), "more than 256"),
])
def test_bad_credentials_end_the_start_in_words_without_a_key(text, words):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.read_credentials([("keys.json", text)])
    assert caught.value.kind == "config"
    assert words in caught.value.message and "keys.json" in caught.value.message
    assert not leaks(caught.value)


@pytest.mark.parametrize("texts, source", [
    (["user_a", "user_b"], "0"), (["", "user_b"], "1"), (["[]", "{}", " ", "user_d"], "3"),
    (["", ""], ""), ([], ""),
    (['[{"apiKey": "user_a", "enabled": false}]', "user_b"], "0"),     # off, and meant so
])
def test_the_first_source_that_holds_keys_counts(texts, source):
    sources = [(str(number), text) for number, text in enumerate(texts)]
    assert ccproxy.read_credentials(sources)[0] == source


RING = ccproxy.parse_ring("user_op1,user_op2", "x")


@pytest.mark.parametrize("operator, host, outcome", [
    (ccproxy.Operator(), "0.0.0.0", ""), (ccproxy.Operator(RING, "secret"), "0.0.0.0", ""),
    (ccproxy.Operator(RING, "", True, "f"), "127.0.0.1", ""),
    (ccproxy.Operator(RING, "", True, "f"), "localhost", ""),
    (ccproxy.Operator(RING, "", False, "f"), "::1", "unused"),
    (ccproxy.Operator(RING, "", True, "f"), "0.0.0.0", ccproxy.ProxyError),
    (ccproxy.Operator(RING, "", False, "f"), "192.168.1.2", ccproxy.ProxyError),
    (ccproxy.Operator(RING, "", True, "f"), "127.evil.example", ccproxy.ProxyError),
    (ccproxy.Operator((), PLANTED), "127.0.0.1", ccproxy.ProxyError),
])
def test_the_start_with_operator_keys(operator, host, outcome):
    if isinstance(outcome, str):
        assert outcome in ccproxy.check_operator(operator, host)
        return
    with pytest.raises(outcome) as caught:
        ccproxy.check_operator(operator, host)
    assert caught.value.kind == "config" and not leaks(caught.value)


LENT = ccproxy.Operator(RING, "the client key", False, "f")
LOCAL = ccproxy.Operator(RING, "", True, "f")
JSON_POST = {"host": "127.0.0.1:3000", "content-type": "application/json"}


@pytest.mark.parametrize("fields, operator, keys", [
    ({"authorization": "Bearer the client key"}, LENT, RING),
    ({"x-api-key": "the client key"}, LENT, RING),
    ({"authorization": "bearer  the client key "}, LENT, RING),
    ({"authorization": "Bearer sk-x", "x-api-key": "the client key"}, LENT, RING),
    # a caller's own key wins
    ({"authorization": "Bearer user_own", "x-api-key": "the client key"}, LENT, ["user_own"]),
    ({"authorization": "Bearer user_own", **JSON_POST}, LOCAL, ["user_own"]),
    ({"authorization": "Bearer user_a,user_b"}, LENT, ["user_a", "user_b"]),
    ({"authorization": "Bearer the client key, user_a"}, LENT, ["user_a"]),
    ({"authorization": "Token the client key"}, LENT, RING), ({"api-key": "the client key"}, LENT,
                                                              RING),
    # the clientKey in a list without a key of the caller's own
    ({"authorization": "Bearer sk-x, \"the client key\""}, LENT, RING),
    ({"x-api-key": " ,the client key,"}, LENT, RING),
    # on loopback, with or without the dummy key of an SDK
    (JSON_POST, LOCAL, RING), ({"authorization": "Bearer sk-x", **JSON_POST}, LOCAL, RING),
    ({"x-api-key": "sk-x", **JSON_POST}, LOCAL, RING),
    ({**JSON_POST, "content-type": "Application/JSON; charset=utf-8"}, LOCAL, RING),
    ({**JSON_POST, "host": "localhost"}, LOCAL, RING), ({**JSON_POST, "host": "[::1]:3000"}, LOCAL,
                                                        RING),
    ({**JSON_POST, "origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-origin"}, LOCAL,
     RING),
])
def test_who_is_served_with_which_keys(fields, operator, keys):
    caller = ccproxy.find_caller(fields, operator, "127.0.0.1", "POST")
    assert caller.operator == (keys is RING)
    assert [key.key for key in caller.keys] == [getattr(key, "key", key) for key in keys]


@pytest.mark.parametrize("fields, operator, peer, status", [
    ({}, LENT, "127.0.0.1", 401), ({"authorization": "Bearer the client ke"}, LENT, "", 401),
    ({"authorization": "Bearer THE CLIENT KEY"}, LENT, "", 401),
    ({"authorization": "Basic the client key"}, LENT, "", 401),
    ({"authorization": "Digest sk-x, the client key"}, LENT, "", 401),
    ({"authorization": "Bearer " + "x," * 32 + "the client key"}, LENT, "", 401),
    ({"authorization": "Bearer sk-" + SECRET}, LENT, "127.0.0.1", 401),
    (JSON_POST, LENT, "127.0.0.1", 401), (JSON_POST, ccproxy.Operator(), "127.0.0.1", 401),
    (JSON_POST, ccproxy.Operator(RING), "127.0.0.1", 401),
    (JSON_POST, ccproxy.Operator((), "", True), "127.0.0.1", 401),
    ({"authorization": "Bearer the client key"}, ccproxy.Operator((), "the client key"), "", 401),
    ({"authorization": "Bearer "}, ccproxy.Operator(RING, "", False), "127.0.0.1", 401),
    (JSON_POST, ccproxy.Operator(RING, "x", True), "127.0.0.1", 401),      # the client key counts
    (JSON_POST, LOCAL, "192.168.1.9", 403), (JSON_POST, LOCAL, "", 403),
    ({**JSON_POST, "host": "evil.example"}, LOCAL, "127.0.0.1", 403),
    ({**JSON_POST, "host": "127.evil.example:3000"}, LOCAL, "127.0.0.1", 403),
    ({**JSON_POST, "host": "127.0.0.1.evil.example"}, LOCAL, "127.0.0.1", 403),
    ({"content-type": "application/json"}, LOCAL, "127.0.0.1", 403),
    ({**JSON_POST, "origin": "https://evil.example"}, LOCAL, "127.0.0.1", 403),
    ({**JSON_POST, "origin": "http://127.0.0.1:8080"}, LOCAL, "127.0.0.1", 403),
    ({**JSON_POST, "origin": "null"}, LOCAL, "127.0.0.1", 403),
    ({**JSON_POST, "sec-fetch-site": "cross-site"}, LOCAL, "127.0.0.1", 403),
    ({**JSON_POST, "content-type": "text/plain"}, LOCAL, "127.0.0.1", 403),
    ({"host": "127.0.0.1"}, LOCAL, "127.0.0.1", 403),
    ({**JSON_POST, "x-forwarded-for": "1.2.3.4"}, LOCAL, "127.0.0.1", 403),
    ({"authorization": "Bearer user_a,%s;x=1" % PLANTED}, LOCAL, "127.0.0.1", 400),
])
def test_who_is_not(fields, operator, peer, status):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.find_caller(fields, operator, peer, "POST")
    assert caught.value.status == status
    assert not leaks(caught.value) and "client key" not in caught.value.message


@pytest.mark.parametrize("fields, notes", [
    ({"authorization": "Bearer user_a, sk-x"}, ["Authorization, entry 2"]),
    ({"authorization": "Bearer user_a, the client key"}, []),
    ({"authorization": "Bearer sk-x, the client key"}, ["Authorization, entry 1"]),
    ({"authorization": "Bearer the client key"}, []), ({"x-api-key": "the client key"}, []),
    # another header, from which nothing is taken, is none of this ring
    ({"authorization": "Bearer sk-x", "x-api-key": "user_a"}, []),
])
def test_a_caller_carries_those_notes(fields, notes):
    found = ccproxy.find_caller(fields, LENT, "", "POST").notes
    assert list(found) == ["left_out=%s: not a Command Code key" % one for one in notes]


def test_a_get_needs_no_content_type():
    assert ccproxy.find_caller({"host": "localhost:1"}, LOCAL, "::1", "GET").operator


def test_callers_are_limited_apart():
    one = ccproxy.find_caller({"authorization": "Bearer user_a,user_b"}, LENT, "", "POST")
    two = ccproxy.find_caller({"authorization": "Bearer user_b"}, LENT, "", "POST")
    three = ccproxy.find_caller({"x-api-key": "the client key"}, LENT, "", "POST")
    assert len({one.digest, two.digest, three.digest}) == 3
