"""OPERATOR KEY CHANGES: keys added, changed and taken out of every form of the operator's file."""
from __future__ import annotations

import json

import pytest
from harness import ccproxy

ONE, TWO = "user_one1111222233334444", "user_two2222333344445555"
NEW = "user_new3333444455556666"
SHOWN = ccproxy.key_name(ONE)
ROWS = [{"id": "a", "apiKey": ONE, "note": "kept"}, {"id": "b", "apiKey": TWO, "enabled": False}]


def edit(text, work, *given):
    """(what came back, the whole file afterwards) of one change."""
    value, rows = ccproxy.open_credentials(text, "the file")
    name = work(rows, *given, "the file")
    after = ccproxy.dump_object(value, "", "x")
    ccproxy.read_credentials([("the file", after)])
    return name, json.loads(after)


ADDED = {"id": "n", "apiKey": NEW, "weight": 2}


@pytest.mark.parametrize("text, after", [
    ("", {"credentials": [ADDED]}), ("[]", [ADDED]), ("{}", {"credentials": [ADDED]}),
    (json.dumps(ROWS), ROWS + [ADDED]), ("\ufeff" + json.dumps([ONE]), [ONE, ADDED]),
    (json.dumps({"x": 1, "credentials": ROWS, "y": 2}), {"x": 1, "credentials": ROWS + [ADDED], "y": 2}),
    (json.dumps({"apiKeys": [ONE]}), {"apiKeys": [ONE, ADDED]}),
    (json.dumps({"apiKey": ONE, "userId": "u"}), {"userId": "u", "credentials": [ONE, ADDED]}),
    ("%s,home=%s" % (ONE, TWO), {"credentials": [{"id": "", "apiKey": ONE}, {"id": "home", "apiKey": TWO},
                                                 ADDED]}),
])
def test_a_key_is_added_to_every_form(text, after):
    assert edit(text, ccproxy.add_credential, dict(ADDED)) == ("n", after)


@pytest.mark.parametrize("name, body, row", [
    ("a", {"id": "c"}, {"id": "c", "apiKey": ONE, "note": "kept"}),
    ("a", {"enabled": False, "weight": 0.5}, {**ROWS[0], "enabled": False, "weight": 0.5}),
    ("a", {"allowedModels": ["glm"], "maxInFlight": 3}, {**ROWS[0], "allowedModels": ["glm"],
                                                         "maxInFlight": 3}),
    ("b", {"enabled": None}, {"id": "b", "apiKey": TWO}), ("b", {"id": "b"}, ROWS[1]),
    (SHOWN, {}, ROWS[0]),
])
def test_a_row_is_changed(name, body, row):
    back, after = edit(json.dumps(ROWS), ccproxy.change_credential, name, body)
    assert back == row["id"] and row in after and len(after) == 2


def test_other_spellings_of_a_row_become_ours():
    rows = [{"name": "a", "api_key": ONE, "max_in_flight": 2, "note": "kept"}]
    assert edit(json.dumps(rows), ccproxy.change_credential, "a", {"maxInFlight": None, "id": "b"}) == (
        "b", [{"id": "b", "apiKey": ONE, "note": "kept"}])


@pytest.mark.parametrize("key, taken", [
    ("cmd_key_1234567890", True), ("sk-1234567890123456", False), ("user_...", False), ("a b", False),
    ("", False), (5, False)])
def test_which_keys_can_be_added(key, taken):
    body = {"id": "n", "apiKey": key}
    if taken:
        assert edit("", ccproxy.add_credential, body) == ("n", {"credentials": [body]})
        return
    with pytest.raises(ccproxy.ProxyError) as caught:
        edit("", ccproxy.add_credential, body)
    assert caught.value.status == 400 and caught.value.param == "apiKey"


def test_a_bare_key_becomes_a_row():
    assert edit(json.dumps([ONE, TWO]), ccproxy.change_credential, SHOWN, {"id": "x"}) == (
        "x", [{"apiKey": ONE, "id": "x"}, TWO])


@pytest.mark.parametrize("name, left", [("a", ROWS[1:]), ("b", ROWS[:1]), (SHOWN, ROWS[1:])])
def test_a_row_is_taken_out(name, left):
    assert edit(json.dumps(ROWS), ccproxy.remove_credential, name)[1] == left


def refusal(work, *given):
    with pytest.raises(ccproxy.ProxyError) as caught:
        edit(json.dumps(ROWS), work, *given)
    assert not any(key in caught.value.message for key in (ONE, TWO, NEW))
    return caught.value.status, caught.value.param


@pytest.mark.parametrize("body, expected", [
    ({"id": "n"}, (400, "apiKey")), ({"id": "n", "apiKey": 5}, (400, "apiKey")),
    ({"id": "n", "apiKey": "sk-" + NEW}, (400, "apiKey")), ({"apiKey": NEW}, (400, "id")),
    ({"id": "", "apiKey": NEW}, (400, "id")), ({"id": NEW, "apiKey": NEW}, (400, "id")),
    ({"id": "n\x07", "apiKey": NEW}, (400, "id")), ({"id": "\ud55c", "apiKey": NEW}, (400, "id")),
    ({"id": "..", "apiKey": NEW}, (400, "id")), ({"id": ".", "apiKey": NEW}, (400, "id")),
    ({"id": "n" * 65, "apiKey": NEW}, (400, "id")), ({"id": "key:abcdef", "apiKey": NEW}, (400, "id")),
    ({"id": "n", "apiKey": NEW, "weight": 0}, (400, "weight")),
    ({"id": "n", "apiKey": NEW, "enabled": "yes"}, (400, "enabled")),
    ({"id": "n", "apiKey": NEW, "maxInFlight": -1}, (400, "maxInFlight")),
    ({"id": "n", "apiKey": NEW, "allowedModels": "glm"}, (400, "allowedModels")),
    ({"id": "n", "apiKey": NEW, "colour": 1}, (400, "colour")),
    ({"id": "a", "apiKey": NEW}, (409, "id")), ({"id": "b", "apiKey": NEW}, (409, "id")),
    ({"id": "n", "apiKey": TWO}, (409, "apiKey"))])
def test_what_cannot_be_added(body, expected):
    assert refusal(ccproxy.add_credential, body) == expected


@pytest.mark.parametrize("name, body, expected", [
    ("nobody", {}, (404, None)), ("a", {"id": "b"}, (409, "id")), ("a", {"apiKey": NEW}, (400, "apiKey")),
    ("a", {"id": None}, (400, "id")), ("a", {"weight": "2"}, (400, "weight")), (ONE, {}, (404, None))])
def test_what_cannot_be_changed(name, body, expected):
    assert refusal(ccproxy.change_credential, name, body) == expected


def test_there_is_a_bound():
    rows = [{"id": "k%d" % number, "apiKey": "user_key%d" % number}
            for number in range(ccproxy.MAX_OPERATOR_KEYS)]
    with pytest.raises(ccproxy.ProxyError) as caught:
        edit(json.dumps(rows), ccproxy.add_credential, dict(ADDED))
    assert caught.value.status == 409
