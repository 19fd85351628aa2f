"""ADMIN KEYS: the operator's keys shown, added, changed and taken out over HTTP."""
from __future__ import annotations

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import CHAT, ccproxy

ADMIN, CLIENT = "the-admin-key", "the-client-key"
BEARER = {"authorization": "Bearer " + ADMIN}
ONE, TWO = "user_5ecr3tOne0123456789abc", "user_5ecr3tTwo0123456789abc"


def shown(key):
    return "key:" + hashlib.sha256(key.encode()).hexdigest()[:6]


@pytest.fixture
def place(make_proxy, tmp_path):
    """A proxy that lends the keys of a file: (proxy, path)."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"note": "kept", "credentials": [
        {"id": "one", "apiKey": ONE}, {"id": "two", "apiKey": TWO, "enabled": False}]}))
    proxy = make_proxy(adminKey=ADMIN, clientKey=CLIENT, credentialsFile=str(path),
                       useProviderModels=False, logLevel="debug")
    proxy.app.operator = ccproxy.read_operator(proxy.app.config)
    return proxy, path


def change(place, method, name, body=None, fields=BEARER):
    return place[0].request(method, "/admin/keys" + name, body, fields, None)


def listed(proxy):
    return {row["id"]: row for row in proxy.request("GET", "/admin/keys", key=None).json["keys"]}


def lent(proxy):
    """The key that a caller with the clientKey is served by."""
    return proxy.post(CHAT, {"authorization": "Bearer " + CLIENT}).fields.get("x-ccproxy-key")


def test_all_keys_are_shown_also_those_switched_off(place):
    proxy, path = place
    whole = proxy.request("GET", "/v1/admin/keys", key=None).json
    assert (whole["file"], whole["writable"], whole["policy"]) == (str(path), True, "daily_burn_priority")
    one, two = whole["keys"]
    assert (one["id"], one["key"], one["enabled"], one["fit"]) == ("one", shown(ONE), True, True)
    assert (two["id"], two["key"], two["enabled"]) == ("two", shown(TWO), False)
    assert {"weight", "reason", "account", "through_proxy", "max_in_flight"} <= set(one)


def test_of_two_proxies_that_share_a_file_each_keeps_the_others_keys(start_program, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"credentials": [{"id": "one", "apiKey": ONE}]}))
    proxies = [start_program("--credentials-file", str(path), "--admin-key", ADMIN,
                             "--client-key", CLIENT, until="curl") for _ in range(2)]

    def add(proxy, name):
        for number in range(15):
            answer = change((proxy, path), "POST", "", {
                "id": "%s%d" % (name, number), "apiKey": "user_5ecr3t%s%022d" % (name, number)})
            assert answer.status == 201, answer.json

    with ThreadPoolExecutor() as pool:
        list(pool.map(add, proxies, "ab"))
    names = {row["id"] for row in json.loads(path.read_text())["credentials"]}
    assert names == {"one", *("%s%d" % (name, number) for name in "ab" for number in range(15))}
    assert os.listdir(str(tmp_path)) == ["keys.json"]


def test_a_key_without_user_is_warned_about(place):
    proxy, _ = place
    key = "cmd_5ecr3tNew0123456789abc"
    answer = change(place, "POST", "", {"id": "new", "apiKey": key})
    assert answer.status == 201 and answer.json["key"] == shown(key)
    assert "WARNING" in proxy.log.getvalue() and "begin with user_, not so: new" in proxy.log.getvalue()
    assert key not in proxy.log.getvalue() + str(answer)


def test_a_life_of_a_key(place):
    """Added, used at once, renamed, limited, switched off, taken out."""
    proxy, path = place
    new = "user_5ecr3tNew0123456789abc"
    answer = change(place, "POST", "", {"id": "new one/x", "apiKey": new, "weight": 3})
    assert answer.status == 201
    assert (answer.json["id"], answer.json["key"], answer.json["weight"]) == ("new one/x", shown(new), 3)
    assert change(place, "PATCH", "/one", {"enabled": False}).json["enabled"] is False
    assert lent(proxy) == shown(new)
    renamed = change(place, "PATCH", "/new%20one%2Fx", {"id": "new", "maxInFlight": 2})
    assert (renamed.json["id"], renamed.json["max_in_flight"]) == ("new", 2)
    assert change(place, "PATCH", "/two", {"enabled": True}).status == 200
    assert change(place, "DELETE", "/new").json == {"id": "new", "deleted": True}
    assert lent(proxy) == shown(TWO) and list(listed(proxy)) == ["one", "two"]
    assert json.loads(path.read_text()) == {"note": "kept", "credentials": [
        {"id": "one", "apiKey": ONE, "enabled": False}, {"id": "two", "apiKey": TWO, "enabled": True}]}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and os.listdir(path.parent) == ["keys.json"]


@pytest.mark.parametrize("method, name, body, status, param", [
    ("POST", "", {"id": "x", "apiKey": "nothing"}, 400, "apiKey"),
    ("POST", "", {"id": "one", "apiKey": "user_new3333"}, 409, "id"),
    ("POST", "", {"id": "x", "apiKey": ONE}, 409, "apiKey"),
    ("PATCH", "/one", {"weight": -1}, 400, "weight"), ("PATCH", "/one", {"apiKey": ONE}, 400, "apiKey"),
    ("PATCH", "/nobody", {}, 404, None), ("DELETE", "/nobody", None, 404, None),
    ("DELETE", "/", None, 405, None), ("PUT", "/one", {}, 405, None), ("PATCH", "/one", b"[]", 400, None)])
def test_what_is_refused(place, method, name, body, status, param):
    before = place[1].read_bytes()
    answer = change(place, method, name, body)
    assert (answer.status, answer.json["error"]["param"]) == (status, param)
    assert place[1].read_bytes() == before


@pytest.mark.parametrize("method, name", [("POST", ""), ("PATCH", "/one"), ("DELETE", "/one")])
def test_changes_want_the_admin_key(place, method, name):
    for fields in ({}, {"authorization": "Bearer " + CLIENT}, {"authorization": "Bearer " + ONE}):
        assert change(place, method, name, {}, fields).status == 401
    assert len(listed(place[0])) == 2


def test_without_a_file_of_their_own(make_proxy, monkeypatch):
    """Keys of the environment are shown, and cannot be changed here."""
    proxy = make_proxy(adminKey=ADMIN, clientKey=CLIENT)
    proxy.app.operator = ccproxy.Operator((ccproxy.new_ring_key(ONE),), CLIENT)
    whole = proxy.request("GET", "/admin/keys").json
    assert (whole["file"], whole["writable"]) == (None, False)
    assert [row["id"] for row in whole["keys"]] == [shown(ONE)]
    for method, name in (("POST", ""), ("PATCH", "/one"), ("DELETE", "/one")):
        answer = change((proxy,), method, name, {})
        assert answer.status == 409 and "COMMANDCODE_CREDENTIALS_FILE" in answer.json["error"]["message"]


def test_a_key_that_nobody_may_reach_is_not_written(make_proxy, tmp_path):
    """What would be refused at a start: keys for the whole network without a clientKey."""
    path = tmp_path / "keys.json"
    path.write_text("[]")
    proxy = make_proxy(adminKey=ADMIN, host="0.0.0.0", credentialsFile=str(path))
    answer = change((proxy,), "POST", "", {"id": "x", "apiKey": ONE})
    assert answer.status == 400 and "clientKey" in answer.json["error"]["message"]
    assert path.read_text() == "[]"


def test_a_file_that_cannot_be_written(place, monkeypatch):
    """A full disk, a read-only folder: told, and nothing changes."""
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ccproxy.os, "replace", full)
    before = place[1].read_bytes()
    answer = change(place, "DELETE", "/one")
    assert answer.status == 409 and "No space left on device" in answer.json["error"]["message"]
    assert place[1].read_bytes() == before and os.listdir(place[1].parent) == ["keys.json"]
    assert lent(place[0]) == shown(ONE)


def test_a_file_that_is_broken_by_hand(place):
    place[1].write_text('{"credentials": [{"apiKey": "%s"' % ONE)
    for answer in (change(place, "GET", ""), change(place, "DELETE", "/one")):
        assert answer.status == 400 and "is not JSON" in answer.json["error"]["message"]
        assert ONE not in answer.body.decode()
    assert lent(place[0]) == shown(ONE)


def test_no_key_comes_back(place):
    """Not from a good request, a bad one, or in the log."""
    proxy, _ = place
    new = "user_5ecr3tNew0123456789abc"
    answers = [change(place, "POST", "", {"id": "n", "apiKey": new}), change(place, "GET", ""),
               change(place, "POST", "", {"id": new, "apiKey": new}),
               change(place, "POST", "", {"id": "m", "apiKey": new}),
               change(place, "POST", "", {"id": "m", "apiKey": new + "!"}),
               change(place, "POST", "", {new: 1, "apiKey": TWO[:-1], "id": "p"}),
               change(place, "PATCH", "/n", {"apiKey": new}), change(place, "PATCH", "/n", {"id": new}),
               change(place, "PATCH", "/" + new, {}), change(place, "DELETE", "/" + new),
               change(place, "PATCH", "/n", {"allowedModels": [new]}), change(place, "GET", ""),
               change(place, "DELETE", "/n")]
    assert [answer.status for answer in answers] == [201, 200, 400, 409, 400, 400, 400, 400, 404, 404, 200,
                                                     200, 200]
    proxy.wait_quiet()
    for text in [proxy.log.getvalue(), *map(repr, answers)]:
        assert not any(secret.lower() in text.lower() for secret in (new, ONE, TWO, ADMIN, CLIENT))
