"""ADMIN ACCESS: who may read and change, tried from other origins, names and proxies."""
from __future__ import annotations

import json

import pytest
from fake_upstream import FakeUpstream
from harness import Proxy, ccproxy, run_program

ADMIN = "adm1n-key"
BEARER = {"authorization": "Bearer " + ADMIN}
PRIVATE = (("GET", "/admin/state"), ("HEAD", "/admin/events"), ("GET", "/admin/config"),
           ("GET", "/admin/models"), ("GET", "/admin/keys"), ("GET", "/metrics"),
           ("GET", "/v1/admin/commandcode/credentials"), ("PUT", "/explain/v1//admin/config"),
           ("POST", "/admin/keys"), ("PATCH", "/admin/keys/x"), ("DELETE", "/admin/keys/x"),
           ("GET", "/admin/restart"))


@pytest.fixture(scope="module")
def place():
    """A proxy that any web page may call, and whose admin answers none may read."""
    fake = FakeUpstream()
    proxy = Proxy(apiBase=fake.base, adminKey=ADMIN, corsOrigin="*")
    yield proxy
    proxy.close()
    fake.close()


@pytest.mark.parametrize("fields", [{}, BEARER], ids=["no key", "adminKey"])
@pytest.mark.parametrize("method,path", PRIVATE)
def test_no_page_of_another_origin_reads_it(place, method, path, fields):
    """Whatever corsOrigin says, and nothing of it is kept on its way."""
    body = {"clientKey": 1} if method in ("POST", "PUT", "PATCH") else None
    answer = place.request(method, path, body, {"origin": "https://evil.example", **fields}, None)
    asked = place.request("OPTIONS", path, None, {
        "origin": "https://evil.example", "access-control-request-method": method}, None)
    for one in (answer, asked):
        assert not [name for name in one.fields if name.startswith("access-control")]
    assert answer.fields["x-content-type-options"] == "nosniff"
    assert "no-store" in answer.fields["cache-control"]


def test_other_answers_are_for_any_page(place):
    fields = {"origin": "https://evil.example"}
    for method in ("GET", "OPTIONS"):
        answer = place.request(method, "/v1/models", None, fields)
        assert answer.fields["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("head,status", [
    ("GET /admin/state HTTP/1.1\r\nhost: localhost", 200),
    ("GET /admin/state HTTP/1.1\r\nhost: [::1]:3000", 200),
    ("GET http://127.0.0.1:3000/admin/state HTTP/1.1\r\nhost: 127.0.0.1:3000", 200),
    ("GET http://evil.example/admin/state HTTP/1.1\r\nhost: localhost", 401),
    ("GET http://localhost/admin/state HTTP/1.1\r\nhost: localhost\r\norigin: null", 401),
    ("GET /admin/state HTTP/1.1\r\nhost: localhost.", 401),
    ("GET /admin/state HTTP/1.1\r\nhost: localhost.evil.example", 401),
    ("GET /admin/state HTTP/1.1\r\nhost: localhost:80@evil.example", 400),
    ("GET /admin/state HTTP/1.1\r\nhost: localhost\r\nhost: evil.example", 400),
    ("GET /admin/state HTTP/1.0", 401),
    ("GET /admin/state HTTP/1.1\r\nhost: localhost\r\nsec-fetch-site: same-site", 401)])
def test_only_this_machines_own_names_count(place, head, status):
    data = place.raw((head + "\r\nconnection: close\r\n\r\n").encode())
    assert int(data.split(b" ")[1]) == status


@pytest.mark.parametrize("fields, status", [
    ({"authorization": ADMIN}, 200), ({"authorization": "token  " + ADMIN}, 200),
    ({"x-api-key": ADMIN}, 200), ({"api-key": ADMIN}, 200),
    ({"authorization": "Basic " + ADMIN}, 401), ({"authorization": "Digest " + ADMIN}, 401),
    ({"authorization": "Negotiate " + ADMIN}, 401), ({"authorization": "Bearer x, " + ADMIN}, 401)])
@pytest.mark.parametrize("path", ["/admin/state", "/metrics"])
def test_the_headers_that_may_hold_the_admin_key(place, fields, status, path):
    answer = place.request("GET", path, None, {"x-forwarded-for": "1.2.3.4", **fields}, None)
    assert answer.status == status


@pytest.mark.parametrize("name", [
    "Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto",
    "X-Forwarded-Port", "X-Forwarded-Server", "X-Real-IP", "X-Client-IP", "True-Client-IP",
    "CF-Connecting-IP", "CF-Ray", "X-Original-Host", "X-Envoy-External-Address", "CDN-Loop"])
def test_who_comes_through_a_proxy_is_no_user_of_this_machine(name):
    fields = {"host": "127.0.0.1:3000"}
    assert ccproxy.loopback_fault(fields, "127.0.0.1", "GET") == ""
    fields[name.lower()] = "x"
    assert "another machine" in ccproxy.loopback_fault(fields, "127.0.0.1", "GET")


@pytest.mark.parametrize("given,refused", [
    ({"adminKey": "one", "clientKey": "other"}, False), ({"adminKey": "", "clientKey": ""}, False),
    ({"adminKey": "user_5ecr3t"}, True), ({"adminKey": "x-user_5ecr3t"}, True),
    ({"adminKey": "5ecr3t", "clientKey": "5ecr3t"}, True)])
def test_an_admin_key_is_no_callers_key(given, refused):
    config, _ = ccproxy.read_config({}, {}, given, "config.json")
    if not refused:
        ccproxy.check_admin_key(config)
        return
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.check_admin_key(config)
    assert (caught.value.kind, caught.value.param) == ("config", "adminKey")
    assert "5ecr3t" not in caught.value.message


def test_nor_does_a_program_start_with_one_or_take_it_over_http(start_program, tmp_path):
    bad = run_program("--demo", "--port", "0", environment={"CC_ADMIN_KEY": "word", "CC_CLIENT_KEY": "word"})
    assert bad.returncode == 2 and "adminKey must not be" in bad.stderr
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"adminKey": ADMIN}))
    program = start_program("--config", str(path))
    for changes in ({"clientKey": ADMIN}, {"adminKey": "user_5ecr3t"}):
        answer = program.request("PUT", "/admin/config", changes, BEARER, None)
        assert (answer.status, answer.json["error"]["param"]) == (400, "adminKey")
    assert json.loads(path.read_text()) == {"adminKey": ADMIN}


def test_a_key_among_the_models_is_told_to_no_caller(make_proxy):
    proxy = make_proxy(allowedModels=["user_5ecr3tPartOfAKey01"])
    answer = proxy.post("/v1/messages", model="kimi")
    assert answer.status == 404 and b"5ecr3t" not in answer.body
