"""ADMIN ACCESS: who may read and change, tried from other origins, names and proxies."""
from __future__ import annotations

import json
import signal

import pytest
from fake_upstream import FakeUpstream
from harness import Proxy, ccproxy, make_config, run_program, wait_until

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


def fault_of(config, refused):
    """What is said of an adminKey, "" where it is taken, as it must be unless it is refused."""
    if not refused:
        ccproxy.check_admin_key(config)
        return ""
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.check_admin_key(config)
    assert (caught.value.kind, caught.value.param) == ("config", "adminKey")
    return caught.value.message


@pytest.mark.parametrize("given,refused", [
    ({"adminKey": "one", "clientKey": "other"}, False), ({"adminKey": "", "clientKey": ""}, False),
    ({"adminKey": "user_5ecr3t"}, True), ({"adminKey": "x-user_5ecr3t"}, True),
    ({"adminKey": "5ecr3t", "clientKey": "5ecr3t"}, True)])
def test_an_admin_key_is_no_callers_key(given, refused):
    config, _ = ccproxy.read_config({}, {}, given, "config.json")
    assert "5ecr3t" not in fault_of(config, refused)


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


# Guessing the adminKey.


class Guesser:
    """Requests with a key from one address, by a clock that the test sets."""

    def __init__(self, known=None, address="192.0.2.1"):
        self.known, self.address, self.now = {} if known is None else known, address, 1000.0

    def guess(self, wrong=True):
        """0 where the key counts, else the Retry-After."""
        try:
            ccproxy.judge_guess(self.known, self.address, wrong, self.now)
        except ccproxy.ProxyError as error:
            assert error.status == 429
            return error.retry_after
        return 0


def test_five_wrong_keys_in_a_minute_begin_a_wait_that_doubles():
    guesser = Guesser()
    assert [guesser.guess() for _ in range(14)] == [0] * 5 + [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_the_wait_doubles_too_where_it_is_kept_to():
    guesser, waits = Guesser(), []
    for _ in range(5):
        guesser.guess()
    for _ in range(9):
        guesser.now += waits[-1] if waits else 1.0
        waits.append(guesser.guess())
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_the_right_key_waits_as_long_and_not_longer():
    guesser = Guesser()
    for _ in range(5):
        assert guesser.guess() == 0
    assert [guesser.guess(wrong=False) for _ in range(3)] == [1, 2, 4]
    guesser.now += 1.0          # a program that asks every second comes in again
    assert guesser.guess(wrong=False) == 0
    assert guesser.guess() == 8
    guesser.now += 7.9
    assert guesser.guess(wrong=False) == 16
    guesser.now += 0.1
    assert guesser.guess(wrong=False) == 0


def test_wrong_keys_count_for_a_minute():
    guesser = Guesser()
    for _ in range(20):
        assert guesser.guess() == 0
        guesser.now += 15.0
    guesser = Guesser()
    assert [guesser.guess() for _ in range(7)] == [0] * 5 + [1, 2]
    guesser.now += 62.0         # after the wait, a minute of peace
    assert [guesser.guess() for _ in range(7)] == [0] * 5 + [1, 2]


def test_the_right_key_leaves_no_trace_and_addresses_are_apart():
    guesser = Guesser()
    assert [guesser.guess(wrong=False) for _ in range(100)] == [0] * 100 and guesser.known == {}
    for _ in range(6):
        guesser.guess()
    assert Guesser(guesser.known, "192.0.2.2").guess() == 0
    assert guesser.guess() > 1


def test_so_many_addresses_are_remembered_and_the_oldest_goes_first():
    known = {}
    for number in range(1001):
        Guesser(known, str(number)).guess()
    assert len(known) == 1000 and "0" not in known and "1" in known


LONG = "adm1n-key-of-some-length"


def tries(proxy, method, path, keys, **fields):
    """The statuses of requests with these keys, and the Retry-After of those that have one."""
    answers = [proxy.request(method, path, {}, {"content-type": "application/json", **fields}, key)
               for key in keys]
    return [(one.status, one.fields.get("retry-after")) for one in answers]


@pytest.mark.parametrize("method, path, fields", [
    ("PUT", "/admin/config", {}), ("POST", "/admin/keys", {}), ("POST", "/admin/restart", {}),
    ("DELETE", "/admin/keys/x", {}), ("GET", "/metrics", {"x-forwarded-for": "198.51.100.1"}),
    ("GET", "/admin/state", {"host": "elsewhere.example"})])
def test_guesses_over_http(make_proxy, method, path, fields):
    proxy = make_proxy(adminKey=LONG)
    assert tries(proxy, method, path, [None] * 8, **fields) == [(401, None)] * 8    # no guesses
    assert tries(proxy, method, path, ["wrong"] * 7, **fields) == [
        (401, None)] * 5 + [(429, "1"), (429, "2")]
    for where in ("/admin/state", "/admin/config", "/admin/models", "/admin/keys", "/metrics"):
        ((status, after),) = tries(proxy, "GET", where, [LONG])
        assert status == 429 and int(after) >= 4
        assert proxy.request("GET", where, key=None).status == 200      # as ever, on this machine
    answer = proxy.request("GET", "/metrics", fields={"x-api-key": LONG}, key=None)
    assert answer.status == 429 and "adminKey" in answer.json["error"]["message"]
    assert proxy.post("/v1/chat/completions").status == 200             # callers' keys are others
    assert LONG not in proxy.log.getvalue()


def test_a_wrong_key_that_is_not_needed_is_no_guess(make_proxy):
    proxy = make_proxy(adminKey=LONG)
    assert tries(proxy, "GET", "/metrics", ["wrong"] * 8) == [(200, None)] * 8
    assert tries(proxy, "PUT", "/admin/config", [LONG])[0][0] == 409    # no file to write to
    unset = make_proxy()
    assert tries(unset, "PUT", "/admin/config", ["wrong"] * 8) == [(403, None)] * 8


# An adminKey that other machines could guess.


@pytest.mark.parametrize("host, key, refused", [
    ("0.0.0.0", "a" * 15, True), ("::", "a", True), ("192.0.2.1", "a" * 15, True),
    ("0.0.0.0", "a" * 16, False), ("0.0.0.0", "", False), ("127.0.0.1", "a", False),
    ("localhost", "a", False), ("::1", "a", False)])
def test_a_short_admin_key_is_for_loopback(host, key, refused):
    config = make_config(host=host, adminKey=key)
    told = fault_of(config, refused)
    assert not refused or ("16 characters" in told and host in told)


def test_nor_does_a_program_start_with_a_short_one():
    done = run_program("--demo", "--port", "0", "--host", "0.0.0.0",
                       environment={"CC_ADMIN_KEY": "5ecr3t-key"})
    assert (done.returncode, done.stdout) == (2, "") and "adminKey" in done.stderr
    assert "5ecr3t" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_nor_does_it_take_one_while_it_runs(start_program, tmp_path):
    path = tmp_path / "config.json"
    entries = {"adminKey": LONG, "host": "0.0.0.0"}
    path.write_text(json.dumps(entries))
    program = start_program("--config", str(path))
    bearer = {"authorization": "Bearer " + LONG}
    for changes in ({"adminKey": "short"}, {"adminKey": "short", "host": "127.0.0.1"}):
        answer = program.request("PUT", "/admin/config", changes, bearer, None)     # host waits
        assert (answer.status, answer.json["error"]["param"]) == (400, "adminKey")
    assert json.loads(path.read_text()) == entries
    assert program.request("PUT", "/admin/config", {"adminKey": LONG + "er"}, bearer,
                           None).status == 200


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_nor_by_sighup(start_program, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"adminKey": LONG, "host": "0.0.0.0"}))
    program = start_program("--config", str(path))
    path.write_text(json.dumps({"adminKey": "5ecr3t", "host": "127.0.0.1"}))
    program.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "stays as it is" in program.log, 10)
    assert "adminKey" in program.log and "5ecr3t" not in program.log
    assert tries(program, "GET", "/metrics", [LONG], host="elsewhere.example") == [(200, None)]
