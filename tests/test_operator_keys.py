"""Keys of an operator: their sources, the start, who may use them, and that nobody sees them."""
from __future__ import annotations

import contextlib
import io
import json
import os
import re
from unittest import mock

import pytest
from fake_upstream import FakeUpstream, stall, status, stream, text_answer
from harness import (CHAT, MESSAGES, FakeClock, Program, Proxy, ccproxy, clean_environment,
                     make_config, post_bytes, read_all, run_program, wait_until)

SECRET = "5ecr3tPartOfAKey"
CLIENT = "c1ient-5ecr3t-word"
A, B, C, OWN = ("user_%s%s" % (letter, SECRET) for letter in ("a", "b", "c", "own"))
NAMES = {key: ccproxy.key_name(key) for key in (A, B, C, OWN)}
ADMIN = "/admin/commandcode/credentials"
JSON = {"content-type": "application/json"}
RESPONSES = "/v1/responses"


def leaks(*said):
    return any(word in str(one) for one in said for word in (SECRET, CLIENT))


# Where the keys come from.

FILE, ALL, MANY, ONE = "COMMANDCODE_CREDENTIALS_FILE", *ccproxy.CREDENTIAL_VARIABLES
CLI = (".commandcode/auth.json", ".config/commandcode/auth.json")


def write(path, content, mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    path.chmod(mode)
    return str(path)


def read_operator(tmp_path, environment, **options):
    with mock.patch.dict(os.environ, clean_environment(HOME=str(tmp_path), **environment),
                         clear=True):
        return ccproxy.read_operator(make_config(**options))


def keys_of(operator):
    return [key.key for key in operator.keys]


@pytest.mark.parametrize("held, first", [
    ("file all many one", "file"), ("all many one", "all"), ("many one", "many"), ("one", "one"),
    ("one cli", "one"), ("cli", "cli"), ("cli other", "cli"), ("other", "other"), ("", "")])
def test_the_first_source_in_order(tmp_path, held, first):
    texts = {name: "user_%s%s" % (name, SECRET) for name in held.split()}
    places = {"all": ALL, "many": MANY, "one": ONE}
    environment = {places[name]: text for name, text in texts.items() if name in places}
    options = {"clientKey": CLIENT}
    if "file" in texts:
        options["credentialsFile"] = write(tmp_path / "keys.json", [texts["file"]])
    for name, place in zip(("cli", "other"), CLI):
        if name in texts:
            write(tmp_path / place, {"apiKey": texts[name], "userId": "x", "userName": "me"})
    operator = read_operator(tmp_path, environment, **options)
    assert keys_of(operator) == ([texts[first]] if first else [])
    assert not leaks(operator.source)


@pytest.mark.parametrize("options, count", [
    ({}, 0), ({"clientKey": CLIENT}, 1), ({"operatorKeys": "loopback"}, 1)])
def test_the_clis_file_only_where_operator_keys_are_asked_for(tmp_path, options, count):
    write(tmp_path / CLI[0], {"apiKey": A})
    assert len(read_operator(tmp_path, {}, **options).keys) == count


@pytest.mark.parametrize("place, empty", [
    ("file", "[]"), ("file", ""), ("file", "{}"), ("file", "\n"), ("all", "[]"), ("many", ","),
    ("many", " "), ("all", '{"credentials": []}')])
def test_a_source_without_keys_is_passed_over(tmp_path, place, empty):
    options, environment = {"clientKey": CLIENT}, {ONE: C}
    if place == "file":
        options["credentialsFile"] = write(tmp_path / "keys.json", empty)
    else:
        environment[{"all": ALL, "many": MANY}[place]] = empty
    assert keys_of(read_operator(tmp_path, environment, **options)) == [C]


@pytest.mark.parametrize("place", ["file", "variable"])
def test_the_clis_file_behind_a_source_without_keys(tmp_path, place):
    write(tmp_path / CLI[0], {"apiKey": A})
    options, environment = {"clientKey": CLIENT}, {}
    if place == "file":
        options["credentialsFile"] = write(tmp_path / "keys.json", "[]")
    else:
        environment[MANY] = ","
    assert keys_of(read_operator(tmp_path, environment, **options)) == [A]


def test_every_member_of_a_row(tmp_path):
    name = write(tmp_path / "keys.json", {"credentials": [
        {"id": "work", "apiKey": A, "weight": 2.5, "maxInFlight": 3, "allowedModels": ["X/y"]},
        {"id": "off", "apiKey": B, "enabled": False}, {"id": "home", "apiKey": C}]})
    first, second = read_operator(tmp_path, {FILE: name, ONE: B},
                                  credentialsFile=name).keys
    assert (first.name, first.weight, first.max_in_flight, first.allowed_models) == (
        "work", 2.5, 3, ("x/y",))
    assert (second.name, second.weight, second.max_in_flight, second.allowed_models) == (
        "home", 1, 0, ())


# What ends the start: one line, status 2, and no key in it.

def run_main(*arguments, environment=None):
    """(status, standard output, standard error), without starting anything."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with mock.patch.dict(os.environ, clean_environment(**(environment or {})), clear=True), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = ccproxy.main(["--check", *arguments])
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue(), err.getvalue()


BAD = {
    "not JSON": '[{"apiKey": "%s",]' % A, "cut": '{"credentials": ["%s"' % A,
    "another vendor's": '[{"apiKey": "sk-%s"}]' % SECRET, "a bare other": "sk-" + SECRET,
    "a number": '["%s", 5]' % A, "weight": '[{"apiKey": "%s", "weight": "2"}]' % A,
    "weight 0": '[{"apiKey": "%s", "weight": 0}]' % A,
    "enabled": '[{"apiKey": "%s", "enabled": "yes"}]' % A,
    "in flight": '[{"apiKey": "%s", "maxInFlight": -1}]' % A,
    "models": '[{"apiKey": "%s", "allowedModels": "x"}]' % A,
    "id": '[{"apiKey": "user_x", "id": "%s"}]' % A, "two ids": '[{"apiKey": "%s", "id": "x"},'
    '{"apiKey": "%s", "id": "x"}]' % (A, B), "an object": '{"credentials": {"a": "%s"}}' % A,
    "an unknown name": '{"keys": ["%s"]}' % A, "words around": "my key is %s" % A,
    "deep": "[" * 20000, "too many": ",".join(
        "user_%d%s" % (number, SECRET) for number in range(257)),
    "a key as a name": "%s=%s" % (A, B), "a placeholder": "user_...", "too short": "abc",
    **{"of " + prefix: "%s%s" % (prefix, SECRET) for prefix in (
        "sk-ant-", "gsk_", "AIza", "xai-", "ghp_", "github_pat_")}}


@pytest.mark.parametrize("place", [FILE, ALL, MANY, ONE])
@pytest.mark.parametrize("name", BAD)
def test_bad_credentials_end_the_start(tmp_path, place, name):
    text = write(tmp_path / "keys.json", BAD[name]) if place == FILE else BAD[name]
    code, out, err = run_main(environment={place: text})
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and len(err) < 1100
    assert ("keys.json" if place == FILE else place) in err and not leaks(err)


@pytest.mark.parametrize("prefix, vendor", [
    ("sk-", "OpenAI"), ("gsk_", "Groq"), ("AIza", "Google"), ("xai-", "xAI"), ("ghp_", "GitHub")])
def test_another_vendors_key_is_told_by_its_vendor(prefix, vendor):
    code, _, err = run_main(environment={ONE: prefix + SECRET})
    assert code == 2 and vendor in err and "begin with user_" in err and not leaks(err)


STRANGE = "cmd_key_" + SECRET


@pytest.mark.parametrize("text, named", [
    (STRANGE, ccproxy.key_name(STRANGE)), ("work=" + STRANGE, "work"),
    (json.dumps([A, {"id": "work", "apiKey": STRANGE}]), "work"),
    (json.dumps({"credentials": [{"name": "work", "api_key": STRANGE}]}), "work"),
    (json.dumps({"credentials": [{"name": "work", "token": STRANGE + "/+~."}]}), "work")])
def test_a_key_without_user_is_accepted_with_a_warning(tmp_path, text, named):
    name = write(tmp_path / "keys.json", text)
    code, out, err = run_main(environment={FILE: name})
    assert code == 0 and len(err.splitlines()) == 1 and not leaks(out, err)
    assert "begin with user_" in err and named in err and "keys.json" in err
    with mock.patch.dict(os.environ, clean_environment(), clear=True):
        key = ccproxy.read_settings({"credentialsFile": name}, None).operator.keys[-1]
    assert key.key.startswith(STRANGE) and STRANGE not in repr(key)


def test_the_other_spellings_of_a_row(tmp_path):
    name = write(tmp_path / "keys.json", [{
        "name": "n", "token": A, "allowed_models": ["X/y"], "max_in_flight": 3},
        {"id": "i", "name": "n", "apiKey": B, "key": C}])
    first, second = read_operator(tmp_path, {}, credentialsFile=name).keys
    assert (first.key, first.name, first.allowed_models, first.max_in_flight) == (
        A, "n", ("x/y",), 3)
    assert (second.key, second.name) == (B, "i")        # our own names win


@pytest.mark.parametrize("case", ["missing", "folder", "binary", "a key", "JSON"])
def test_files_that_cannot_be_read(tmp_path, case):
    names = {"missing": str(tmp_path / "none.json"), "folder": str(tmp_path), "a key": A,
             "JSON": json.dumps([{"apiKey": A}])}
    if case == "binary":
        (tmp_path / "keys.json").write_bytes(b"\xff\xfe\x00" + A.encode())
    code, out, err = run_main(environment={FILE: names.get(case, str(tmp_path / "keys.json"))})
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and not leaks(err)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "proxy.example", "128.0.0.1"])
@pytest.mark.parametrize("mode", ["off", "loopback"])
def test_a_bind_beyond_loopback_without_client_key(host, mode):
    code, out, err = run_main("--host", host, "--operator-keys", mode, environment={ONE: A})
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "BRIDGE_API_KEY" in err and ONE in err and not leaks(err)
    assert run_main("--host", host, "--client-key", CLIENT, environment={ONE: A})[0] == 0
    assert run_main("--host", host, "--operator-keys", mode)[0] == 0        # no keys: nothing to do


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.8.7"])
def test_a_bind_on_loopback_needs_nothing(host):
    assert run_main("--host", host, environment={ONE: A})[0] == 0


@pytest.mark.parametrize("given", [A, "x %s" % A, "pass\tword", "pass\nword"])
def test_a_client_key_that_cannot_be_one(given):
    code, out, err = run_main(environment={"BRIDGE_API_KEY": given, ONE: B})
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "clientKey" in err and not leaks(err) and "pass" not in err


def test_the_whole_program_ends_so():
    for arguments, environment in (((), {ALL: "[%s]" % A}), (("--host", "0.0.0.0"), {MANY: A})):
        done = run_program(*arguments, environment=environment)
        assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
        assert not leaks(done.stderr)


def test_a_key_without_user_is_sent_and_never_shown(upstream, tmp_path):
    """Not even where the upstream repeats it."""
    upstream.scripts = [stream(text_answer("x")), status(401, {"error": {
        "message": "bad key " + STRANGE, "code": STRANGE}}, "connection: close\r\n")]
    program = Program("--api-base", upstream.base, "--client-key", CLIENT, "--log-level", "debug",
                      environment={ONE: STRANGE})
    try:
        answers = [program.post(CHAT, {"authorization": "Bearer " + CLIENT}, None)
                   for _ in range(2)]
        answers.append(program.request("GET", ADMIN, None, {"authorization": "Bearer " + CLIENT},
                                       None))
        _, log = program.stop()
    finally:
        program.close()
    assert [answer.status for answer in answers] == [200, 502, 200]
    assert upstream.requests[0].field("authorization") == "Bearer " + STRANGE
    assert not leaks(log, *answers) and ccproxy.key_name(STRANGE) in log


@pytest.mark.parametrize("as_flag", [True, False])
def test_check_shows_no_key(tmp_path, as_flag):
    name = write(tmp_path / "keys.json", [A, B])
    flags = ("--client-key", CLIENT) if as_flag else ()
    code, out, err = run_main("--credentials-file", name, *flags, environment={
        MANY: C, **({} if as_flag else {"BRIDGE_API_KEY": CLIENT})})
    assert (code, err) == (0, "") and not leaks(out)
    row = next(line for line in out.splitlines() if line.startswith("clientKey"))
    assert "(secret)" in row and ("--client-key" if as_flag else "BRIDGE_API_KEY") in row


# The running program: its screen.

@pytest.fixture
def upstream():
    fake = FakeUpstream()
    fake.side_script = status(404, {}, "connection: close\r\n")
    yield fake
    fake.close()


@pytest.mark.parametrize("mode, arguments, words, warned", [
    (0o600, ("--client-key", CLIENT), "2 of", False), (0o644, ("--client-key", CLIENT), "2 of",
                                                       True),
    (0o660, ("--operator-keys", "loopback"), "callers on this machine", True),
    (0o600, (), "are unused", False)])
def test_the_screen(upstream, tmp_path, mode, arguments, words, warned):
    name = write(tmp_path / "keys.json", [A, B], mode)
    program = Program("--api-base", upstream.base, "--credentials-file", name, "--log-level",
                      "debug", *arguments, environment={"HOME": str(tmp_path)}, until="note")
    try:
        plain = program.post(CHAT, JSON, None)
        held = program.post(CHAT, {**JSON, "authorization": "Bearer " + CLIENT}, None)
        health = program.request("GET", "/health", None, {}, None)
        code, log = program.stop()
    finally:
        program.close()
    rows = [line for line in program.screen.splitlines() if line.startswith("  keys ")]
    assert len(rows) == 1 and words in rows[0] and name in rows[0]
    assert ("chmod 600" in program.screen) == warned
    assert health.json["operator_keys"] == 2 and health.json["routing_policy"]
    assert (plain.status == 200) == ("loopback" in arguments)
    assert (held.status == 200) == bool(arguments)
    assert not leaks(program.screen, log, plain, held, health) and code == 0
    assert not {"id", "credentials"} & set(health.json)
    assert (program.screen + log).count("keys.json") <= 3


# Who may use them.

@pytest.fixture
def make_place(upstream):
    """Proxies with operator's keys, and what was said in the end."""
    made = []

    def make(client_key="", loopback=True, text="%s,%s" % (A, B), **options):
        proxy = Proxy(**{"apiBase": upstream.base, "fallbackPolicy": "drain_first",
                         "useProviderModels": False, **options})
        source, keys = ccproxy.read_credentials([("source", text)])
        proxy.app.operator = ccproxy.Operator(keys, client_key, loopback, source)
        made.append(proxy)
        return proxy
    yield make
    for proxy in made:
        proxy.close()
        assert not leaks(proxy.log.getvalue()), proxy.log.getvalue()
        assert "Traceback" not in proxy.log.getvalue()


def served(fake):
    return [request.field("authorization")[7:] for request in fake.requests]


HOSTS = ("localhost", "LOCALHOST:3000", "127.0.0.1", "127.0.0.1:3000", "[::1]:3000", "127.8.9.1:1")
GOOD = [*({"host": host} for host in HOSTS), {"authorization": "Bearer sk-x"},
        {"x-api-key": "sk-x"}, {"authorization": "Bearer "}, {"authorization": "Basic eDp5"},
        {"authorization": "sk-ant-api03-dummy", "x-api-key": "dummy"},
        {"content-type": "application/json; charset=utf-8"}, {"content-type": "Application/JSON"},
        {"host": "localhost:3000", "origin": "http://localhost:3000"},
        {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}]
EVIL = [{"host": "evil.example"}, {"host": "localhost.evil.example"}, {"host": "127.0.0.1.nip.io"},
        {"host": "0.0.0.0"}, {"host": "192.168.1.1"},
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "https://localhost"},
        {"origin": "http://localhost:5173"}, {"origin": "http://localhost.evil.example"},
        {"content-type": "text/plain"}, {"content-type": ""}, {"content-type": "text/json"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "text/plain; application/json"}, {"content-type": "multipart/form-data"},
        {"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=1.2.3.4"}, {"via": "1.1 x"},
        {"x-real-ip": "1.2.3.4"}, {"x-forwarded-host": "localhost"},
        {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}]


def send(proxy, path=CHAT, method="POST", **fields):
    """(status, everything) for a request from loopback with these fields."""
    given = {"host": "localhost", "connection": "close", **JSON, **fields}
    data = post_bytes(path, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
                      given, None)
    if method == "GET":
        rows = ["%s: %s" % pair for pair in given.items() if pair[0] != "content-type"]
        data = "\r\n".join(["GET %s HTTP/1.1" % path, *rows, "", ""]).encode()
    with proxy.connect() as sock:
        sock.sendall(data)
        answer = read_all(sock)
    assert not leaks(answer.decode("latin-1"))
    return int(answer.split(b" ")[1]), answer


def test_requests_of_this_machines_user(make_place, upstream):
    proxy = make_place()
    for fields in GOOD:
        code, answer = send(proxy, **{name.replace("_", "-"): value
                                      for name, value in fields.items()})
        assert (code, NAMES[A].encode() in answer) == (200, True), fields
    assert send(proxy, MESSAGES)[0] == 200
    assert set(served(upstream)) == {A}


def test_requests_that_a_page_or_another_machine_could_send(make_place, upstream):
    proxy = make_place(corsOrigin="*")
    for fields in EVIL:
        for path in (CHAT, MESSAGES):
            code, answer = send(proxy, path, **fields)
            assert code == 403 and b"x-ccproxy-key" not in answer, fields
        code, answer = send(proxy, CHAT, **fields, **{"x-ccproxy-dry-run": "1"})
        assert code == 403, fields
        if "content-type" not in fields:
            assert send(proxy, "/v1/usage", "GET", **fields)[0] == 403, fields
            assert send(proxy, "/v1/usage", "GET", **fields,
                        authorization="Bearer " + OWN)[0] == 200
        assert send(proxy, CHAT, **fields, authorization="Bearer " + OWN)[0] == 200, fields
    assert set(served(upstream)) == {OWN}


def test_without_a_host(make_place, upstream):
    proxy = make_place()
    answer = proxy.raw(b"POST %s HTTP/1.0\r\ncontent-type: application/json\r\n"
                       b"content-length: 2\r\n\r\n{}" % CHAT.encode())
    assert answer.split(b" ")[1] == b"403" and not served(upstream)


@pytest.mark.parametrize("client_key, loopback", [("", False), (CLIENT, False), (CLIENT, True)])
def test_a_caller_without_key_where_it_was_not_asked_for(make_place, upstream, client_key,
                                                         loopback):
    proxy = make_place(client_key, loopback)
    for fields in ({}, {"authorization": "Bearer sk-x"}, {"x-api-key": CLIENT + "x"},
                   {"authorization": "Bearer " + CLIENT[:-1]}, {"authorization": "Bearer "}):
        assert send(proxy, **fields)[0] == 401
        assert send(proxy, "/v1/usage", "GET", **fields)[0] == 401
    assert served(upstream) == []


@pytest.mark.parametrize("fields", [
    {"authorization": "Bearer " + CLIENT}, {"authorization": "bearer  " + CLIENT},
    {"authorization": CLIENT}, {"x-api-key": CLIENT},
    {"authorization": "Bearer sk-x", "x-api-key": CLIENT}])
def test_who_presents_the_client_key(make_place, upstream, fields):
    proxy = make_place(CLIENT, False)
    # wherever it comes from: the key is proof enough
    fields = {**fields, "host": "proxy.example", "x-forwarded-for": "1.2.3.4",
              "origin": "https://a.example", "content-type": "text/plain"}
    upstream.scripts = [status(429, {}, "connection: close\r\n")]
    code, answer = send(proxy, **fields)
    assert code == 200 and served(upstream) == [A, B]       # they are a ring
    assert b"x-ccproxy-key: " + NAMES[B].encode() in answer
    code, answer = send(proxy, "/v1/usage", "GET", **fields)
    assert code == 200 and b'"keys_of":"operator"' in answer.replace(b": ", b":")


@pytest.mark.parametrize("path, method, fields, words", [
    (path, method, fields, words) for path, method in (
        (CHAT, "POST"), (MESSAGES, "POST"), (RESPONSES, "POST"), ("/explain" + CHAT, "POST"),
        ("/v1/usage", "GET"), (ADMIN, "GET"))
    for fields, words in (
        ({"authorization": "Bearer " + CLIENT[:-1]}, b"The clientKey sent is wrong"),
        ({"authorization": "Bearer sk-x"}, b"The clientKey sent is wrong"),
        ({}, b"No clientKey was sent" if path == ADMIN else b"No key was sent"))])
def test_a_wrong_client_key_is_told_so(make_place, upstream, path, method, fields, words):
    code, answer = send(make_place(CLIENT, False), path, method, **fields)
    assert code == 401 and words in answer and b"clientKey" in answer and served(upstream) == []


def test_without_a_client_key_nothing_is_said_of_one(make_place):
    code, answer = send(make_place("", False), authorization="Bearer sk-x")
    assert code == 401 and b"not a Command Code key" in answer and b"clientKey" not in answer


def test_the_right_client_key_of_an_operator_without_keys(make_place):
    code, answer = send(make_place(CLIENT, False, text=""), authorization="Bearer " + CLIENT)
    assert code == 401 and b"The clientKey is right, but" in answer


# A key of the operator's that the upstream refuses is not the caller's fault.

REFUSED = status(401, {"error": {"message": "Invalid API key", "code": "authentication_error"}},
                 "connection: close\r\n")
REFUSED_EVENT = stream(b'{"type":"error","error":{"message":"Invalid API key","statusCode":401}}\n')


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("script", [REFUSED, REFUSED_EVENT], ids=["401", "event"])
@pytest.mark.parametrize("text", ["home=" + A, "home=%s,%s" % (A, B)], ids=["one", "two"])
def test_a_refused_key_of_the_operators(make_place, upstream, text, script, path, streamed):
    proxy = make_place(CLIENT, False, text=text)
    upstream.default = script
    body = {"input": "hi"} if path == RESPONSES else {
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    for memory in (False, True):
        answer = proxy.request("POST", path, {**body, "stream": streamed}, {
            "authorization": "Bearer " + CLIENT, **JSON}, None)
        said = answer.body.decode()
        assert (answer.status, answer.fields["x-should-retry"]) == (502, "false"), said
        assert "www-authenticate" not in answer.fields and not leaks(said)
        assert "the operator's key %s (home) was refused" % NAMES[A] in said
        assert ("also refused: " + NAMES[B] in said) == ("," in text)
        for word in ("Invalid API key", "invalid_api_key", "authentication_error"):
            assert word not in said
    assert len(served(upstream)) == 2           # of two keys, none is asked a second time
    wait_until(lambda: len(proxy.app.recent) == 2)
    assert all(record.error.startswith("upstream_final: ") for record in proxy.app.recent)
    assert "WARNING %s (home) was refused by the upstream (401)" % NAMES[A] in \
        proxy.log.getvalue()


@pytest.mark.parametrize("first, second, code", [
    # what the operator's two keys are answered with: what the caller gets
    (401, 402, 402), (402, 401, 402), (401, 429, 429), (401, 503, 503), (401, 401, 502),
    (402, 402, 402), (403, 401, 403)])
def test_the_most_useful_error_of_the_operators_keys(make_place, upstream, first, second, code):
    proxy = make_place(CLIENT, False)
    upstream.scripts = [status(one, {"error": {"message": "no"}}, "connection: close\r\n")
                        for one in (first, second)]
    assert send(proxy, authorization="Bearer " + CLIENT)[0] == code
    assert served(upstream) == [A, B]


def test_another_key_of_the_operators_takes_over_from_a_refused_one(make_place, upstream):
    proxy = make_place(CLIENT, False)
    upstream.scripts = [REFUSED]
    assert send(proxy, authorization="Bearer " + CLIENT)[0] == 200 and served(upstream) == [A, B]


def test_a_refused_key_that_is_lent_on_loopback(make_place, upstream):
    upstream.default = REFUSED
    code, answer = send(make_place("", True, text=A))
    assert code == 502 and b"the operator's key %s was refused" % NAMES[A].encode() in answer


def test_a_callers_own_refused_key_is_its_own_fault(make_place, upstream):
    proxy = make_place(CLIENT, False)
    upstream.default = REFUSED
    for keys in (OWN, "%s,%s" % (OWN, C)):
        code, answer = send(proxy, authorization="Bearer " + keys)
        assert code == 401 and b"invalid_api_key" in answer and b"operator" not in answer


@pytest.mark.parametrize("count, words", [
    (1, "key (n0) was refused by Command Code (401). The"),
    (2, "key (n0) was refused by Command Code (401); also refused: key (n1). The"),
    (5, "key (n1), key (n2), key (n3), key (n4). The"),
    (7, "key (n1), key (n2), key (n3), key (n4) and 2 more. The")])
def test_refused_keys_are_named(count, words):
    keys = [ccproxy.new_ring_key("user_%d" % number, name="n%d" % number)
            for number in range(count)]
    error = ccproxy.operator_refusal(ccproxy.ProxyError(
        "authentication", "x", trace_id="t"), keys)
    assert words in re.sub("key:[0-9a-f]{6}", "key", error.message)
    assert (error.kind, error.status, error.retryable, error.trace_id) == (
        "upstream_final", 502, False, "t")


@pytest.mark.parametrize("fields", [
    {"authorization": "Bearer " + OWN}, {"x-api-key": OWN},
    {"authorization": "Bearer " + OWN, "x-api-key": CLIENT},
    {"authorization": "Bearer " + CLIENT, "x-api-key": OWN}])
@pytest.mark.parametrize("client_key", ["", CLIENT])
def test_a_callers_own_key_wins(make_place, upstream, fields, client_key):
    proxy = make_place(client_key)
    assert send(proxy, **fields)[0] == 200 and served(upstream) == [OWN]
    code, answer = send(proxy, "/v1/usage", "GET", **fields)
    assert code == 200 and NAMES[OWN].encode() in answer and NAMES[A].encode() not in answer


def test_a_client_key_beyond_ascii():
    """No header can hold it, so it could never match."""
    for word in ("schl\u00fcssel", "two words", "line\n"):
        with pytest.raises(ccproxy.ProxyError) as caught:
            ccproxy.check_operator(ccproxy.Operator((), word), "127.0.0.1")
        assert "ASCII" in caught.value.message and word not in caught.value.message


def test_what_a_row_says_holds(make_place, upstream):
    text = json.dumps([{"id": "small", "apiKey": A, "allowedModels": ["only/this"]},
                       {"id": "big", "apiKey": B, "maxInFlight": 1}])
    proxy = make_place(text=text, routingPolicy="drain_first")
    for model, key in (("only/this", A), ("ONLY/This", A), ("other/one", B)):
        answer = proxy.post(CHAT, JSON, None, model=model)
        assert (answer.status, served(upstream)[-1]) == (200, key)
    alone = make_place(text=json.dumps([json.loads(text)[0]]))
    answer = alone.post(CHAT, JSON, None, model="other/one")
    assert answer.status == 404 and answer.json["error"]["code"] == "model_not_found"
    busy = make_place(text=json.dumps([json.loads(text)[1]]))
    upstream.scripts = [stall()]
    sock = busy.connect()
    sock.sendall(post_bytes(CHAT, {"messages": [{"role": "user", "content": "x"}]}, JSON, None))
    wait_until(lambda: not upstream.scripts)
    answer = busy.post(CHAT, JSON, None)
    assert (answer.status, answer.fields["retry-after"]) == (429, "1")
    sock.close()


@pytest.mark.parametrize("allowed", [
    "moonshotai/kimi-k3", "Kimi", "kimi-k3[1m]", "mine", "openrouter/moonshotai/Kimi.K3",
    "default"])
def test_a_keys_allowed_models_are_met_by_any_name(make_place, upstream, allowed):
    text = json.dumps([{"id": "small", "apiKey": A, "allowedModels": [allowed]},
                       {"id": "big", "apiKey": B}])
    options = {"modelAliases": "mine=kimi", "defaultModel": "mine"}
    proxy = make_place(text=text, routingPolicy="drain_first", **options)
    for model, key in (("kimi", A), ("mine", A), ("moonshotai/Kimi-K3", A), ("glm", B), ("x/y", B)):
        assert proxy.post(CHAT, JSON, None, model=model).status == 200
        assert served(upstream)[-1] == key
    alone = make_place(text=json.dumps([json.loads(text)[0]]), **options)
    assert alone.post(CHAT, JSON, None, model="kimi-k3").status == 200
    answer = alone.post(CHAT, JSON, None, model="glm")
    assert answer.status == 404 and answer.json["error"]["code"] == "model_not_found"


def test_the_client_key_is_one_caller(make_place, monkeypatch):
    clock = FakeClock(monkeypatch)
    proxy = make_place(CLIENT, rateLimitMax=2, rateLimitWindow="1 minute")
    fields = {"authorization": "Bearer " + CLIENT}
    assert [send(proxy, **fields)[0] for _ in range(3)] == [200, 200, 429]
    assert send(proxy, **{"x-api-key": CLIENT})[0] == 429
    assert b"retry-after: 60" in send(proxy, **fields)[1].lower()
    assert send(proxy, authorization="Bearer " + A)[0] == 200       # its owner is another caller
    assert send(proxy, "/v1/usage", "GET", **fields)[0] == 200
    clock.now += 61
    assert send(proxy, **fields)[0] == 200


def test_references_are_counted_for_operator_callers_too(make_place):
    proxy = make_place(CLIENT)
    fields = {"authorization": "Bearer " + CLIENT, **JSON}
    counts = []
    for head in (fields, {"authorization": "Bearer " + OWN}):
        answer = proxy.request("POST", RESPONSES, {"input": "hi"}, head, None)
        item = answer.json["output"][-1]["id"]
        counts.append(proxy.request("POST", RESPONSES + "/input_tokens", {"input": [
            {"role": "user", "content": "hi"}, {"type": "item_reference", "id": item},
            {"role": "user", "content": "more"}]}, head, None).json["input_tokens"])
    assert counts[0] == counts[1]


# The admin's route, and /health.

def test_the_admin_route(make_place, upstream):
    proxy = make_place(CLIENT, text="work=%s,home=%s" % (A, B))
    good = {"authorization": "Bearer " + CLIENT}
    for fields in ({}, {"authorization": "Bearer sk-x"}, {"authorization": "Bearer " + A},
                   {"authorization": "Bearer " + CLIENT + "x"}, {"x-api-key": CLIENT.upper()}):
        code, answer = send(proxy, ADMIN, "GET", **fields)
        assert code == 401 and NAMES[A].encode() not in answer
        assert NAMES[A] not in repr(send(proxy, ADMIN + "?refresh=true", "GET", **fields))
    assert not upstream.side_requests
    for fields in (good, {"x-api-key": CLIENT}):
        answer = proxy.request("GET", ADMIN, None, fields, None)
        assert answer.status == 200 and not leaks(answer)
        assert [(key["key"], key["name"]) for key in answer.json["keys"]] == [
            (NAMES[A], "work"), (NAMES[B], "home")]
    assert proxy.request("POST", ADMIN, {}, good, None).status == 405
    assert proxy.request("GET", ADMIN + "?format=text", None, good, None).body.startswith(b"KEY")


def test_the_admin_route_refreshes_when_told(make_place, upstream):
    proxy = make_place(CLIENT)
    good = {"authorization": "Bearer " + CLIENT}
    counts = []
    for query in ("", "", "?refresh=true", "?refresh=false", "?format=text&refresh=true"):
        upstream.side_script = status(200, {"credits": {"monthlyCredits": 5 + len(counts)}})
        answer = proxy.request("GET", ADMIN + query, None, good, None)
        counts.append(sum("whoami" in one.line for one in upstream.side_requests))
        assert answer.status == 200
        if query != "?format=text&refresh=true":
            assert [key["account"]["credits_usd"]["monthly"] for key in answer.json["keys"]] == \
                [7.0 if counts[-1] == 4 else 5.0] * 2
    assert counts == [2, 2, 4, 4, 6]


@pytest.mark.parametrize("client_key, text, code", [
    ("", A, 401), (CLIENT, "", 404), (CLIENT, json.dumps([{"apiKey": A, "enabled": False}]), 404)])
def test_no_admin_route_without_client_key_or_keys(make_place, client_key, text, code):
    proxy = make_place(client_key, text=text)
    fields = {"authorization": "Bearer " + client_key} if client_key else {}
    assert send(proxy, ADMIN, "GET", **fields)[0] == code


def test_health_tells_number_and_policy_alone(make_place):
    proxy = make_place(CLIENT, text="firm=%s,own=%s" % (A, B), routingPolicy="round_robin")
    answer = proxy.request("GET", "/health", None, {}, None)
    assert (answer.json["operator_keys"], answer.json["routing_policy"]) == (2, "round_robin")
    said = answer.body.decode()
    assert not leaks(said) and not any(word in said for word in ("firm", "own", "key:", "source"))


# No key anywhere.

def with_head(line, *rows):
    return "\r\n".join((line, "host: a", "connection: close") + rows + ("", "")).encode("latin-1")


@pytest.mark.parametrize("code", [400, 401, 402, 403, 429, 500, 503])
def test_what_the_upstream_says_of_an_operators_key(make_place, upstream, code):
    proxy = make_place(CLIENT)
    upstream.default = status(code, {"error": {"message": "no %s or %s" % (A, B), "code": A}},
                              "x-trace-id: %s\r\nconnection: close\r\n" % B)
    for path in (CHAT, MESSAGES, RESPONSES):
        for fields in ({}, {"x-ccproxy-dry-run": "1"}, {"originator": "codex_exec"}):
            send(proxy, path, authorization="Bearer " + CLIENT, **fields)
    send(proxy, "/v1/usage?format=text", "GET", authorization="Bearer " + CLIENT)
    send(proxy, ADMIN, "GET", authorization="Bearer " + CLIENT)
    proxy.wait_quiet()          # the log is looked at in the end


def test_the_client_key_in_wrong_places(make_place, upstream):
    proxy = make_place(CLIENT)
    for data in (with_head("POST /v1/messages HTTP/1.1", "authorization : Bearer " + CLIENT),
                 with_head("GET /v1/usage HTTP/1.1", "Bearer " + CLIENT),
                 with_head("GET /v1/usage?key=%s HTTP/1.1" % CLIENT),
                 with_head("GET http://%s@a/health HTTP/1.1" % CLIENT),
                 with_head("GET /v1/usage HTTP/1.1", "authorization: Bearer %s\x01" % CLIENT),
                 with_head("GET /v1/usage HTTP/1.1", "authorization: Bearer", " " + CLIENT),
                 with_head("GET /v1/usage HTTP/1.1", "authorization: Bearer %s,x" % CLIENT),
                 with_head("GET /v1/usage HTTP/1.1", "authorization: Bearer user_a,%s,user_b"
                           % CLIENT)):
        answer = proxy.raw(data)
        assert answer.startswith(b"HTTP/1.1 ") and not leaks(answer.decode("latin-1"))
    explained = proxy.post("/explain" + CHAT, {"authorization": "Bearer " + CLIENT}, None)
    assert explained.status == 200 and not leaks(explained)
    assert explained.json["headers"]["authorization"] == "Bearer " + NAMES[A]
    assert not served(upstream)


@pytest.mark.parametrize("level", ["debug", "error"])
def test_the_whole_program_says_no_key(upstream, tmp_path, monkeypatch, level):
    monkeypatch.chdir(tmp_path)
    upstream.scripts = [status(401, {"error": {"message": "bad key " + A}},
                               "connection: close\r\n"), stream(text_answer("x"))]
    program = Program("--api-base", upstream.base, "--log-level", level, "--log-file", "a.log",
                      "--client-key", CLIENT, environment={ALL: json.dumps([A, {"apiKey": B}])})
    try:
        client, ring = {"authorization": "Bearer " + CLIENT}, {"x-api-key": "%s,%s" % (OWN, C)}
        answers = [program.post(CHAT, client, None, stream=True),
                   program.request("GET", ADMIN + "?refresh=true", None, client, None),
                   program.post(MESSAGES, ring, None),
                   program.post(CHAT, {**ring, "x-ccproxy-dry-run": "1"}, None),
                   program.request("GET", "/v1/usage?format=text", None, ring, None),
                   program.request("GET", "/health", None, {}, None)]
        code, errors = program.stop()
    finally:
        program.close()
    assert [answer.status for answer in answers] == [200] * 6 and code == 0
    assert served(upstream) == [A, B, OWN]
    assert os.listdir(tmp_path) == ["a.log"]
    log = (tmp_path / "a.log").read_text()
    assert not leaks(errors, log, program.screen, *answers)
    assert (NAMES[B] in log) == (level == "debug")
