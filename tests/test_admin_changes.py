"""ADMIN CHANGES: the configuration and the models, shown and changed over HTTP."""
from __future__ import annotations

import json
import os
import stat
import threading

import pytest
from harness import CHAT, KEY, ccproxy

ADMIN = "the-admin-key"
BEARER = {"authorization": "Bearer " + ADMIN}


@pytest.fixture
def place(make_proxy, tmp_path, monkeypatch):
    """A proxy whose config file is in tmp_path: (proxy, path)."""
    for option in ccproxy.OPTIONS:
        for name in ccproxy.environment_names(option):
            monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"adminKey": ADMIN, "modelAliases": {}, "logLevel": "debug",
                                "useProviderModels": False}))
    proxy = make_proxy(adminKey=ADMIN, logLevel="debug", useProviderModels=False)
    proxy.app.settings = ccproxy.read_settings({"maxTotalInFlight": "50"}, str(path))
    return proxy, path


def put(place, body, fields=BEARER):
    return place[0].request("PUT", "/admin/config", body, fields, None)


def options_of(proxy):
    return {row["name"]: row for row in proxy.request("GET", "/admin/config").json["options"]}


def test_what_is_shown(place):
    proxy, path = place
    shown = proxy.request("GET", "/v1/admin/config").json
    assert (shown["file"], shown["writable"], shown["restart_needed"]) == (
        str(path), True, ["port", "apiBase"])       # as the fixture has it
    rows = {row["name"]: row for row in shown["options"]}
    assert list(rows) == [option.name for option in ccproxy.OPTIONS]
    assert rows["logLevel"] == {
        "name": "logLevel", "kind": "choice", "value": "debug", "default": "info",
        "choices": list(ccproxy.LOG_LEVELS), "help": "least level that is logged",
        "source": str(path), "at_start": False, "secret": False, "set": True}
    assert (rows["adminKey"]["value"], rows["adminKey"]["set"], rows["adminKey"]["secret"]) == (
        None, True, True)
    assert (rows["clientKey"]["value"], rows["clientKey"]["set"]) == (None, False)
    assert rows["maxTotalInFlight"]["source"] == "--max-total-in-flight"
    assert rows["port"]["at_start"] and ADMIN not in json.dumps(shown)


def test_a_change_is_written_and_counts_at_once(place):
    proxy, path = place
    answer = put(place, {"modelAliases": {"mine": "kimi"}, "models": [{"id": "glm", "enabled": False}],
                         "port": 4321, "maxTotalInFlight": 7, "upstreamIdleSeconds": "1 minute"})
    assert answer.status == 200
    assert answer.json == {
        "applied": ["modelAliases", "models", "upstreamIdleSeconds"], "restart_needed": ["port"],
        "overridden": {"maxTotalInFlight": "--max-total-in-flight"}}
    assert list(json.loads(path.read_text()).items()) == [
        ("adminKey", ADMIN), ("modelAliases", {"mine": "kimi"}), ("logLevel", "debug"),
        ("useProviderModels", False), ("models", [{"id": "glm", "enabled": False}]), ("port", 4321),
        ("maxTotalInFlight", 7), ("upstreamIdleSeconds", 60)]
    assert path.read_text().startswith('{\n  "adminKey"')
    assert proxy.post(CHAT, model="mine").status == 200
    assert proxy.post(CHAT, model="glm").status == 404
    assert proxy.app.config.port == 0 and options_of(proxy)["port"]["value"] == 4321
    assert put(place, {"models": None, "port": None}).json["applied"] == ["models"]
    assert proxy.post(CHAT, model="glm").status == 200 and "models" not in path.read_text()
    assert "configuration written over HTTP: changed " in proxy.log.getvalue()


def test_a_removed_option_is_told_of_and_not_written(place):
    proxy, path = place
    words = "workers was removed: see README, several processes"
    before = path.read_text()
    for value in (4, "x", {}, False):
        assert put(place, {"workers": value}).json == {
            "applied": [], "restart_needed": [], "overridden": {}, "warnings": [words]}
    assert path.read_text() == before and proxy.log.getvalue().count("WARNING " + words) == 4
    entries = {**json.loads(before), "workers": 2}
    path.write_text(json.dumps(entries))
    answer = put(place, {"defaultModel": "glm", "workers": 3})       # once, also where both hold it
    assert answer.json == {"applied": ["defaultModel"], "restart_needed": [], "overridden": {},
                           "warnings": [words]}
    assert json.loads(path.read_text()) == {**entries, "defaultModel": "glm"}
    answer = put(place, {"workers": None})
    assert answer.json == {"applied": ["workers"], "restart_needed": [], "overridden": {}}
    assert "workers" not in path.read_text() and proxy.log.getvalue().count(words) == 5
    assert put(place, {"workers": 1, "nonsense": 1}).json["error"]["param"] == "nonsense"


@pytest.mark.parametrize("body, param, words", [
    ({"port": 70000}, "port", "must be from 0 to 65535"),
    ({"models": [{"id": "x"}]}, "models", "entry 1"), ({"nonsense": 1}, "nonsense", "unknown option"),
    ({"cliVersion": "new"}, "cliVersion", "must be a version"),
    ({"logFile": "/nowhere/at/all.log"}, "logFile", "cannot be written"),
    ({"clientKey": "user_abcdefghijklmn"}, "clientKey", "looks like a Command Code key"),
    ({"credentialsFile": "/nowhere/keys.json"}, None, "No such file"),
    ({"logLevel": "error", "port": -1}, "port", "must be from"),
    ([], None, "must be a JSON object"), (b"{", None, "not JSON"), (b"\xff", None, "not UTF-8")])
def test_what_is_wrong_is_refused_whole(place, body, param, words):
    proxy, path = place
    before = path.read_bytes()
    answer = put(place, body)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)
    assert words in answer.json["error"]["message"] and "abcdefghijklmn" not in answer.body.decode()
    assert path.read_bytes() == before and os.listdir(path.parent) == ["config.json"]
    assert proxy.app.config.log_level == "debug"


@pytest.mark.parametrize("fields, status", [
    ({}, 401), ({"authorization": "Bearer " + KEY}, 401), ({"authorization": "Bearer "}, 401),
    ({"x-api-key": ADMIN}, 200)])
def test_who_may_write(place, fields, status):
    assert put(place, {"logLevel": "debug"}, fields).status == status


def test_nobody_may_write_without_an_admin_key(make_proxy):
    proxy = make_proxy(clientKey="word")
    answer = proxy.request("PUT", "/admin/config", {}, {"authorization": "Bearer word"}, None)
    assert answer.status == 403 and "adminKey" in answer.json["error"]["message"]


def test_a_program_without_a_file(make_proxy):
    proxy = make_proxy(adminKey=ADMIN)
    shown = proxy.request("GET", "/admin/config").json
    assert (shown["file"], shown["writable"]) == (None, False)
    assert proxy.request("PUT", "/admin/config", {}, BEARER, None).status == 409


def test_the_environment_wins_over_the_file(place, monkeypatch):
    proxy, path = place
    monkeypatch.setenv("CC_DEFAULT_MODEL", "glm")
    answer = put(place, {"defaultModel": "kimi", "corsOrigin": "http://a.example"})
    assert answer.json == {"applied": ["corsOrigin"], "restart_needed": [],
                           "overridden": {"defaultModel": "environment CC_DEFAULT_MODEL"}}
    assert json.loads(path.read_text())["defaultModel"] == "kimi"
    assert proxy.app.config.default_model == "glm"


def test_a_file_changed_by_hand_loses_nothing(place):
    proxy, path = place
    path.write_text(json.dumps({"projectSlug": "by-hand", "adminKey": ADMIN, "logLevel": "info"}))
    assert put(place, {"defaultModel": "glm"}).status == 200
    assert list(json.loads(path.read_text())) == ["projectSlug", "adminKey", "logLevel", "defaultModel"]
    assert (proxy.app.config.project_slug, proxy.app.config.log_level) == ("by-hand", "info")


def test_a_file_broken_by_hand_is_left_alone(place):
    _, path = place
    path.write_text("{broken")
    answer = put(place, {"defaultModel": "glm"})
    assert answer.status == 400 and "is not JSON" in answer.json["error"]["message"]
    assert path.read_text() == "{broken"


def test_many_at_once_are_all_kept(place):
    _, path = place
    names = ["projectSlug", "corsOrigin", "defaultModel", "drainSeconds", "rateLimitMax", "maxBodyBytes",
             "maxConnections", "keyCooldownSeconds"]
    values = ["a", "b", "glm", 5, 6, 2048, 99, 8]
    threads = [threading.Thread(target=put, args=(place, {name: value}))
               for name, value in zip(names, values)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = json.loads(path.read_text())
    assert [kept[name] for name in names] == values


def test_the_new_admin_key_counts_for_the_next(place):
    assert put(place, {"adminKey": "another-key"}).status == 200
    assert put(place, {"logLevel": "info"}).status == 401
    assert put(place, {"logLevel": "info"}, {"authorization": "Bearer another-key"}).status == 200


def test_models_are_listed_with_what_is_off(place):
    proxy, _ = place
    put(place, {"models": [{"id": name, "enabled": False} for name in (
        "KIMI", "New/One", "hy3", "mine", "deepseek-pro", "tencent/Hy3")],
        "modelAliases": {"mine": "minimax-m3-free", "deepseek-pro": "kimi"}})
    proxy.post(CHAT, model="glm")
    proxy.wait_quiet()
    rows = {row["id"]: row for row in proxy.request("GET", "/admin/models").json["models"]}
    assert rows["zai-org/GLM-5.3"] == {
        "id": "zai-org/GLM-5.3", "name": "GLM-5.3", "context": 1000000, "max_output": None,
        "vision": False, "efforts": ["low", "high", "max"], "plan": "Go", "enabled": True, "requests": 1}
    # Models that are off and not in the list stand behind it, by whatever name they are off.
    assert list(rows)[-3:] == ["New/One", "tencent/Hy3", "minimax/minimax-m3-free"]
    assert [name for name in rows if not rows[name]["enabled"]] == [
        "moonshotai/Kimi-K3", *list(rows)[-3:]]


def test_a_preflight_allows_the_methods(make_proxy):
    proxy = make_proxy(corsOrigin="https://page.example")
    fields = proxy.request("OPTIONS", "/v1/messages", None, {
        "origin": "https://page.example", "access-control-request-method": "PUT"}).fields
    assert {"PUT", "PATCH", "DELETE"} <= set(fields["access-control-allow-methods"].split(", "))
    foreign = proxy.request("OPTIONS", "/admin/config", None, {"origin": "https://other.example"})
    assert "access-control-allow-methods" not in foreign.fields


def test_no_secret_comes_back(place):
    """Not in an answer, the log or the files beside it, but for the config file itself."""
    proxy, path = place
    secret = "user_5ecr3tPartOfAKey0123456789"
    answers = [put(place, {"adminKey": ADMIN, "corsOrigin": secret}), put(place, {"clientKey": secret}),
               put(place, {"port": secret}), put(place, {secret: 1}), put(place, {"upstream": secret}),
               put(place, {"models": [{"id": secret, "enabled": False}]}),
               proxy.request("GET", "/admin/config"), proxy.request("GET", "/admin/models"),
               proxy.request("PUT", "/admin/" + secret, {}, BEARER)]
    assert [answer.status for answer in answers] == [200, 400, 400, 400, 400, 200, 200, 200, 404]
    assert [answer for answer in answers if secret in repr(answer)] == []
    proxy.wait_quiet()
    assert secret not in proxy.log.getvalue() and ADMIN not in proxy.log.getvalue()
    assert stat.S_IMODE(os.stat(path).st_mode) == stat.S_IMODE(
        os.stat(path.parent / ".config.json.previous").st_mode)
