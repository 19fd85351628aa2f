"""A key planted in a request is found in no log line, answer, header or file."""
from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import threading

import pytest
from fake_upstream import FakeUpstream, ndjson, raw, status, stream
from harness import (CHAT, FAST, MESSAGES, Program, Proxy, call_program, ccproxy, post_bytes,
                     read_all, read_until, wait_until)

SECRET = "5ecr3tPartOfAKey0123456789"
KEY = "user_" + SECRET
BEARER = {"authorization": "Bearer " + KEY}
ECHO = "Invalid key %s for model" % KEY
RESPONSES = "/v1/responses"
COUNTS = ("/v1/messages/count_tokens", "/v1/responses/input_tokens")
CODEX = {"originator": "codex_exec", "user-agent": "codex_exec/0.169.0"}
STRICT, DRY = {"x-ccproxy-strict": "1"}, {"x-ccproxy-dry-run": "1"}


@pytest.fixture(scope="module")
def place():
    """One proxy for all cases, logging at debug level, and its upstream."""
    fake = FakeUpstream()
    proxy = Proxy(apiBase=fake.base, corsOrigin="*")
    yield proxy, fake
    proxy.close()
    fake.close()


def send(proxy, data):
    """Everything that comes back for these bytes, heads and all."""
    with proxy.connect() as sock:
        sock.sendall(data)
        return read_all(sock)


def take_log(proxy):
    """What was logged since the last case: each answers for itself."""
    proxy.wait_quiet()
    said = proxy.log.getvalue()
    proxy.log.seek(0)
    proxy.log.truncate(0)
    return said


def holds_secret(data):
    """Whether the key, or enough of it to matter, stands there."""
    text = data if isinstance(data, str) else data.decode("latin-1")
    return SECRET[:16] in text or SECRET[-16:] in text


def with_head(line, *rows):
    return "\r\n".join((line, "host: a", "connection: close") + rows + ("", "")).encode("latin-1")


def post(path=CHAT, fields=None, **body):
    body.setdefault("messages", [{"role": "user", "content": "hi"}])
    body.setdefault("max_tokens", 100)
    return post_bytes(path, body, {"connection": "close", **BEARER, **(fields or {})}, None)


def respond(fields=None, **body):
    """A request of Responses."""
    return post_bytes(RESPONSES, {"input": "hi", **body}, {"connection": "close", **BEARER,
                                                           **(fields or {})}, None)


REQUESTS = {
    "good": post(), "good, streamed": post(MESSAGES, stream=True),
    "x-api-key": post(fields={"authorization": "", "x-api-key": KEY}),
    "in both": post(fields={"x-api-key": KEY}),
    "in other headers": post(fields={name: KEY for name in (
        "user-agent", "referer", "origin", "traceparent", "x-session-id", "x-request-id",
        "anthropic-beta", "cookie", "x-trace-id")}),
    "in a preflight": with_head("OPTIONS /v1/messages HTTP/1.1", "origin: " + KEY,
                                "access-control-request-method: POST",
                                "access-control-request-headers: x-" + KEY),
    "another vendor's": post_bytes(CHAT, {}, {"authorization": "Bearer sk-" + SECRET,
                                              "connection": "close"}, None),
    "no underscore": post_bytes(CHAT, {}, {"authorization": "Bearer user-" + SECRET,
                                           "connection": "close"}, None),
    "upper case": post_bytes(MESSAGES, {}, {"x-api-key": "USER_" + SECRET,
                                            "connection": "close"}, None),
    "on a broken header line": with_head("POST /v1/messages HTTP/1.1",
                                         "authorization : Bearer " + KEY),
    "on a line without a colon": with_head("POST /v1/messages HTTP/1.1", "Bearer " + KEY),
    "with a control character": with_head("POST /v1/messages HTTP/1.1",
                                          "authorization: Bearer %s\x01" % KEY),
    "folded": with_head("GET /v1/models HTTP/1.1", "authorization: Bearer", " " + KEY),
    "as the request line": b"%s\r\n\r\n" % KEY.encode(),
    "as the method": with_head("%s / HTTP/1.1" % KEY[:31]),
    "in a bad request line": with_head("GET /%s HTTP/1.1 x" % KEY),
    "in the path": with_head("GET /v1/%s HTTP/1.1" % KEY),
    "in the path, encoded twice": with_head("GET /v1/user%%255f%s HTTP/1.1" % SECRET),
    "as an operator's key": with_head("DELETE /admin/keys/user%%25255F%s HTTP/1.1" % SECRET),
    "in the path, encoded": with_head("GET /v1/user%%5F%s HTTP/1.1" % SECRET),
    "in the path, wrong method": with_head("PUT /v1/models/%s HTTP/1.1" % KEY),
    "as a model's id": with_head("GET /v1/models/%s HTTP/1.1" % KEY),
    "as a model's id, encoded": with_head("GET /v1/models/user%%5f%s HTTP/1.1" % SECRET),
    "in the query": with_head("GET /v1/models?key=%s HTTP/1.1" % KEY),
    "in the address": with_head("GET http://%s@a/health HTTP/1.1" % KEY),
    "as host": ("GET /health HTTP/1.1\r\nhost: %s/\r\n\r\n" % KEY).encode(),
    "as content coding": post(fields={"content-encoding": KEY}),
    "as expectation": post(fields={"expect": KEY}),
    "as transfer coding": with_head("POST /v1/messages HTTP/1.1", "transfer-encoding: " + KEY),
    "as a length": with_head("POST /v1/messages HTTP/1.1", "content-length: " + KEY),
    "as a chunk size": with_head("POST /v1/messages HTTP/1.1", "authorization: Bearer " + KEY,
                                 "transfer-encoding: chunked") + KEY.encode() + b"\r\n",
    "in a prompt": post(messages=[{"role": "user", "content": KEY},
                                  {"role": "assistant", "content": KEY},
                                  {"role": "user", "content": [{"type": "text", "text": KEY}]}]),
    "in system": post(MESSAGES, system=KEY, metadata={"user_id": KEY}),
    "not JSON": post_bytes(CHAT, b'{"key": "%s"' % KEY.encode(), {
        "connection": "close", **BEARER}, None),
    "as a field": post(**{KEY: 1}),
    "as a role": post(messages=[{"role": KEY, "content": "x"}]),
    "as a part's type": post(messages=[{"role": "user", "content": [{"type": KEY}]}]),
    "as an image": post(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "https://a.example/?key=" + KEY}}]}]),
    "as a data URL": post(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/%s;base64,AAAA" % KEY}}]}]),
    "as a tool's type": post(tools=[{"type": KEY}]),
    "as a tool's name": post(tools=[{"type": "function", "function": {"name": KEY + " x"}}]),
    "as tool_choice": post(tool_choice=KEY),
    "as an effort": post(reasoning_effort=KEY),
    "as a format": post(response_format={"type": KEY}),
    "as thinking": post(MESSAGES, thinking={"type": KEY}),
    "as temperature": post(temperature=KEY),
    "as a decision model": post(model="typesafe/jev " + KEY),
    "as a bad model": post(model=KEY + "\u00e9"),
    "at responses": respond(), "at responses, streamed": respond(stream=True),
    "at responses, from Codex": respond(CODEX, stream=True),
    "as a stored response": with_head("GET /v1/responses/%s HTTP/1.1" % KEY),
    "as a stored response, encoded": with_head("DELETE /v1/responses/user%%5F%s HTTP/1.1" % SECRET),
    "in a WebSocket upgrade": with_head(
        "GET /v1/responses?key=%s HTTP/1.1" % KEY, "connection: Upgrade", "upgrade: websocket",
        "authorization: Bearer " + KEY, "sec-websocket-protocol: openai-insecure-api-key." + KEY),
    "as previous_response_id": respond(previous_response_id=KEY),
    "as an item's type": respond(input=[{"type": KEY}, {"role": "user", "content": "hi"}]),
    "as an item's role": respond(input=[{"role": KEY, "content": "x"}]),
    "as an effort at responses": respond(reasoning={"effort": KEY}),
    "as tool_choice at responses": respond(tool_choice=KEY),
    "as a format at responses": respond(text={"format": {"type": KEY}}),
    "as a bad model at responses": respond(model=KEY + "\u00e9"),
    "as an item, from Codex": respond(CODEX, input=[{"role": KEY, "content": "x"}]),
    "as a model, from Codex": respond(CODEX, model="typesafe/jev " + KEY),
    "not JSON, from Codex": post_bytes(RESPONSES, b'{"key": "%s"' % KEY.encode(), {
        "connection": "close", **BEARER, **CODEX}, None),
}
for path in COUNTS:
    REQUESTS.update({
        "counted at " + path: post(path), "counted in a prompt at " + path: post(path, messages=[
            {"role": "user", "content": KEY}]),
        "counted as a role at " + path: post(path, messages=[{"role": KEY, "content": "x"}]),
        "counted, not JSON at " + path: post_bytes(path, KEY.encode(), {
            "connection": "close", **BEARER}, None),
        "counted as a model at " + path: post(path, model=KEY + "\u00e9")})
for path in (CHAT, MESSAGES, RESPONSES):
    # What is explained or refused is the client's own request, but for the key that it came with.
    REQUESTS.update({
        "dry run at " + path: post(path, DRY), "explained at " + path: post("/explain" + path),
        "dry run by x-api-key at " + path: post(path, {**DRY, "authorization": "",
                                                       "x-api-key": KEY}),
        "dry run, other headers at " + path: post(path, {**DRY, "traceparent": KEY,
                                                         "x-session-id": KEY, "user-agent": KEY}),
        "dry run, refused at " + path: post(path, DRY, messages=[{"role": KEY, "content": "x"}]),
        "strict at " + path: post(path, STRICT, seed=1, tools=[{"type": KEY}], top_k=1),
        "strict, a name at " + path: post(path, STRICT, tools=[{"type": "web", "name": KEY}]),
        "strict dry run at " + path: post(path, {**STRICT, **DRY}, tools=[{"type": KEY}]),
        "strict, from Codex at " + path: post(path, {**STRICT, **CODEX}, tools=[{"type": KEY}])})


@pytest.mark.parametrize("name", REQUESTS)
def test_no_answer_no_header_and_no_log_line(place, name):
    proxy, _ = place
    data = send(proxy, REQUESTS[name])
    said = take_log(proxy)
    assert data.startswith(b"HTTP/1.1 ")
    assert not holds_secret(data) and not holds_secret(said)


STATUSES = {        # so that those cases are what their names say
    "dry run at " + CHAT: b"200", "explained at " + MESSAGES: b"200",
    "strict at " + CHAT: b"400", "strict dry run at " + MESSAGES: b"400",
    "strict, from Codex at " + RESPONSES: b"200", "strict, from Codex at " + CHAT: b"400",
    "as an item, from Codex": b"200", "counted at " + COUNTS[0]: b"200",
    "counted as a role at " + COUNTS[1]: b"400", "in a WebSocket upgrade": b"426",
    "as a stored response": b"404", "at responses, streamed": b"200"}


@pytest.mark.parametrize("name", STATUSES)
def test_those_requests_go_where_they_should(place, name):
    proxy, fake = place
    before = len(fake.requests)
    data = send(proxy, REQUESTS[name])
    assert data.split(b" ")[1] == STATUSES[name]
    assert len(fake.requests) - before == (name == "at responses, streamed")
    if "dry run at" in name and STATUSES[name] == b"200" or "explained" in name:
        assert b'"authorization":"Bearer key:' in data
    if "from Codex" in name and STATUSES[name] == b"200":
        assert b"response.failed" in data
    take_log(proxy)


SHORT = "5h0rtK3y"          # too short to look like a key: hidden as what was sent
SHORT_KEY = "user_" + SHORT
UNSENT = {      # no head comes of them, or one in which no key is sent
    "in a preflight", "as the request line", "as the method", "in a bad request line", "as host",
    "on a broken header line", "on a line without a colon", "with a control character", "folded",
    "in the address", "as transfer coding", "as a length"}


def shortened(data):
    """The same request with a short key, which it sends too."""
    head, _, body = data.partition(b"\r\n\r\n")
    size, body = len(body), body.replace(SECRET.encode(), SHORT.encode())
    head = head.replace(SECRET.encode(), SHORT.encode()).replace(
        b"content-length: %d" % size, b"content-length: %d" % len(body))
    if not (b"authorization: Bearer" in head or b"x-api-key: user_" in head):
        head += b"\r\nauthorization: Bearer " + SHORT_KEY.encode()
    return head + b"\r\n\r\n" + body


@pytest.mark.parametrize("name", sorted(set(REQUESTS) - UNSENT))
def test_a_short_key_that_was_sent(place, name):
    proxy, _ = place
    data = send(proxy, shortened(REQUESTS[name]))
    said = take_log(proxy)
    assert data.startswith(b"HTTP/1.1 ") and said
    assert SHORT not in said and SHORT.encode() not in data


SHORT_ECHO = "Invalid key %s for model" % SHORT_KEY
SHORT_ECHOES = {
    "a status": status(401, {"error": {"code": "BAD", "message": SHORT_ECHO}}),
    "its code": status(400, {"error": {"code": SHORT_KEY, "message": "no"}}),
    "text": status(500, SHORT_ECHO.encode()),
    "a trace id": status(402, b"", "x-trace-id: %s\r\n" % SHORT_KEY),
    "a good trace id": stream(ndjson({"type": "finish", "finishReason": "stop"}),
                              fields="x-trace-id: %s\r\n" % SHORT_KEY),
    "an event": stream(ndjson({"type": "error", "error": {"message": SHORT_ECHO,
                                                          "statusCode": 401}})),
    "a later event": stream(ndjson({"type": "text-delta", "id": "0", "text": "Half"},
                                   {"type": "error", "error": {"message": SHORT_ECHO,
                                                               "code": SHORT_KEY}})),
    "a repeated failure": stream(ndjson({"type": "error", "error": {
        "message": SHORT_ECHO, "statusCode": 503, "isRetryable": True}})),
}


@pytest.mark.parametrize("name", SHORT_ECHOES)
def test_a_short_key_that_the_upstream_echoes(place, name):
    proxy, fake = place
    fake.default = SHORT_ECHOES[name]
    fields = {"authorization": "Bearer " + SHORT_KEY}
    for path in (CHAT, MESSAGES, RESPONSES):
        for streamed in (True, False):
            answer = send(proxy, post(path, fields, stream=streamed))
            assert answer.startswith(b"HTTP/1.1 ") and SHORT.encode() not in answer
    state = proxy.request("GET", "/admin/state", key=None)
    assert SHORT.encode() not in state.body and SHORT not in take_log(proxy)


HELD_SECRETS = {"clientKey": "cl1ent", "adminKey": "adm1n-5ecret",
                "alertWebhookToken": "t0ken-5ecret",
                "alertWebhookUrl": "https://hooks.example/T0/5ecret"}


def test_the_secrets_that_the_program_holds(monkeypatch):
    """Of its options, of its operator's keys and of the way to its upstream, whoever says them."""
    monkeypatch.setenv("COMMANDCODE_API_KEY", "user_0perat0r")
    fake = FakeUpstream()
    proxy = Proxy(apiBase=fake.base, **HELD_SECRETS)
    proxy.app.operator = ccproxy.read_operator(proxy.app.config)
    proxy.app.home.proxy_authorization = "Basic " + base64.b64encode(b"me:pr0xy-5ecret").decode()
    secrets = [*HELD_SECRETS.values(), "user_0perat0r", proxy.app.home.proxy_authorization[6:],
               "pr0xy-5ecret"]
    words = "no " + ", ".join(secrets) + "; but cl1entele"
    fake.default = status(400, {"error": {"message": words, "code": words}})
    try:
        fields = {"authorization": "Bearer user_someone"}
        answers = [send(proxy, post(path, fields, stream=streamed))
                   for path in (CHAT, MESSAGES, RESPONSES) for streamed in (True, False)]
        answers += [send(proxy, post(model=words + "\u00e9")),
                    send(proxy, post("/v1/" + secrets[1])),
                    send(proxy, post(tools=[{"type": "x", "name": words}], messages=1)),
                    send(proxy, post(tools=[{"type": "x", "name": words}], fields=STRICT)),
                    send(proxy, post(RESPONSES, fields=DRY, tool_choice=words)),
                    send(proxy, with_head("GET /x/%s HTTP/1.1" % secrets[3]))]
        state = proxy.request("GET", "/admin/state", None, {"x-api-key": "adm1n-5ecret"}, None)
        said = take_log(proxy)
    finally:
        proxy.close()
        fake.close()
    assert b"but cl1entele" in answers[0] and len(state.json["recent"]) >= 6
    for data in (*answers, state.body, said.encode()):
        assert not [one for one in secrets if one.encode() in data.replace(b"cl1entele", b"")]


OWN = "user_name_of_the_customer"           # would look like a key, were it not a name
OWN_TOOL = {"type": "function", "function": {"name": OWN, "parameters": {
    "type": "string", "properties": {"user_location": {"type": "string"}}}}}


def test_a_callers_own_names_come_back_to_it(place):
    """Of tools and schemas: in notes and in what Responses repeat; but no key among them."""
    proxy, fake = place
    fake.default = stream("01")
    body = {"messages": [{"role": "user", "content": "hi"}],
            "tools": [OWN_TOOL, {"type": "web", "name": OWN + "_2"}]}
    answer = proxy.request("POST", CHAT, body, BEARER, None)
    assert "of tool %s:" % OWN in answer.fields["x-ccproxy-notes"]
    assert OWN + "_2 " in answer.fields["x-ccproxy-notes"]
    schema = {"type": "object", "properties": {OWN: {"type": "string"}, "user_location": {},
                                               KEY: {"enum": [KEY]}}}
    body = {"input": "hi", "tool_choice": {"type": "function", "name": OWN}, "metadata": {OWN: OWN},
            "tools": [{"type": "function", "name": OWN, "parameters": schema}],
            "text": {"format": {"type": "json_schema", "name": OWN, "schema": schema}}}
    echo = proxy.request("POST", RESPONSES, body, BEARER, None).json
    name = "key:" + hashlib.sha256(KEY.encode()).hexdigest()[:6]
    assert echo["text"]["format"]["schema"]["properties"] == {
        OWN: {"type": "string"}, "user_location": {}, name: {"enum": [name]}}
    assert (echo["tool_choice"]["name"], echo["metadata"]) == (OWN, {OWN: OWN})
    take_log(proxy)


ECHOES = {
    "a status": status(401, {"error": {"code": "BAD", "message": ECHO}}),
    "its code": status(400, {"error": {"code": KEY, "message": "no"}}),
    "its type": status(403, {"error": {"type": KEY}}),
    "an object as code": status(403, {"error": {"code": {"key": KEY}, "message": {"key": KEY}}}),
    "text": status(500, ECHO.encode()), "a string": status(402, {"error": ECHO}),
    "a trace id": status(402, b"", "x-trace-id: %s\r\n" % KEY),
    "Retry-After": status(429, b"", "retry-after: %s\r\n" % KEY),
    "a long text": status(400, {"error": {"message": "x" * 1990 + " " + KEY}}),
    "escaped": status(400, b'{"error":{"message":"user\\u005f%s"}}' % SECRET.encode()),
    "an event": stream(ndjson({"type": "error", "error": {"message": ECHO, "statusCode": 401}})),
    "a string event": stream(ndjson({"type": "error", "error": ECHO})),
    "a later event": stream(ndjson({"type": "text-delta", "id": "0", "text": "Half"},
                                   {"type": "error", "error": {"message": ECHO, "code": KEY}})),
    "an envelope event": stream(ndjson({"type": "error", "error": "401 " + json.dumps(
        {"error": {"message": ECHO, "code": KEY}})})),
    "a bad status line": raw(b"HTP/1.1 %s\r\n\r\n" % KEY.encode(), close=True),
    "a bad header line": raw(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % KEY.encode(), close=True),
    "a bad chunk": raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%s\r\n"
                       % KEY.encode(), close=True),
    "a content coding": raw(b"HTTP/1.1 200 OK\r\ncontent-encoding: %s\r\n\r\n" % KEY.encode(),
                            close=True),
    "a redirect": status(302, b"", "location: /%s\r\n" % KEY),
    "a good trace id": stream(ndjson({"type": "finish", "finishReason": "stop"}),
                              fields="x-trace-id: %s\r\n" % KEY),
    "a cost": stream(ndjson({"type": "finish", "finishReason": "stop"}, {
        "type": "provider-metadata", "providerMetadata": {"gateway": {"cost": KEY}}})),
    "a line that is not JSON": stream(KEY.encode() + b"\n{" + KEY.encode() + b"\n" + ndjson(
        {"type": "finish", "finishReason": "stop"})),
}


@pytest.mark.parametrize("name", ECHOES)
def test_what_the_upstream_echoes(place, name):
    """Whatever it says about the key that it was sent, as an error or beside an answer."""
    proxy, fake = place
    fake.default = ECHOES[name]
    answers = [send(proxy, post(path, stream=streamed))
               for path in (CHAT, MESSAGES, RESPONSES) for streamed in (True, False)]
    answers.append(send(proxy, respond(CODEX, stream=True)))
    said = take_log(proxy)
    assert said and not holds_secret(said)
    for data in answers:
        assert data.startswith(b"HTTP/1.1 ") and not holds_secret(data)


def test_the_whole_program(tmp_path, monkeypatch):
    """Its screen, its log and its directory hold the key's name at most; the upstream got it."""
    monkeypatch.chdir(tmp_path)
    fake = FakeUpstream()
    fake.scripts = [status(401, {"error": {"message": ECHO}}), stream("01"),
                    stream(ndjson({"type": "error",
                                   "error": {"message": ECHO, "statusCode": 403}}))]
    program = Program("--api-base", fake.base, "--log-level", "debug", "--log-file", "proxy.log")
    try:
        answers = [program.post(path, BEARER, None, stream=True) for path in (
            CHAT, MESSAGES, CHAT, "/v1/" + KEY)]
        code, errors = program.stop()
    finally:
        program.close()
        fake.close()
    assert [answer.status for answer in answers] == [401, 200, 403, 404] and code == 0
    assert not any(holds_secret(repr(answer)) for answer in answers)
    assert {request.field("authorization") for request in fake.requests} == {"Bearer " + KEY}
    assert not any(request.field("authorization") for request in fake.side_requests)
    assert os.listdir(tmp_path) == ["proxy.log"]
    log = (tmp_path / "proxy.log").read_text()
    assert not any(holds_secret(text) for text in (log, errors, program.screen))
    assert log.count("key:" + hashlib.sha256(KEY.encode()).hexdigest()[:6]) >= 3


def test_a_traceback_in_the_log(tmp_path):
    """An exception may quote what it failed on."""
    path = tmp_path / "proxy.log"
    log, other = logging.getLogger("ccproxy"), logging.getLogger("asyncio")
    before = [(one, one.handlers, one.propagate, one.level) for one in (log, other)]
    ccproxy.open_log(ccproxy.read_config({}, {}, {"logFile": str(path)}, "")[0])
    try:
        {}[KEY]
    except KeyError:
        log.error("internal error", exc_info=True)
    log.handlers[0].close()
    for one, handlers, propagate, level in before:
        one.handlers, one.propagate, one.level = handlers, propagate, level
    said = path.read_text()
    assert "KeyError" in said and "Traceback" in said and not holds_secret(said)


PLANTED = [
    post(model=KEY), post(MESSAGES, model=KEY, stream=True), post(model="kimi", tools=[{"type": KEY}]),
    post(fields={"user-agent": "codex/" + KEY, "x-trace-id": KEY, "traceparent": KEY}),
    post(model=KEY + "\u00e9"), respond(model=KEY, previous_response_id=KEY),
    post(fields={"authorization": "Bearer work=%s,%s" % (KEY, KEY + "2")}, stream=True)]


def plant(proxy, fake):
    """Requests with the key in every place that a record could take something from."""
    for script in (ECHOES["a status"], ECHOES["a later event"], ECHOES["a good trace id"],
                   ECHOES["a cost"], ECHOES["its code"]):
        fake.default = script
        for data in PLANTED:
            assert send(proxy, data).startswith(b"HTTP/1.1 ")
    proxy.wait_quiet()


def test_metrics(place):
    proxy, fake = place
    before = len(proxy.app.recent)
    plant(proxy, fake)
    answer = proxy.request("GET", "/metrics", key=None)
    assert len(proxy.app.recent) - before >= 5 * len(PLANTED)
    assert b'ccproxy_errors_total{kind="authentication"}' in answer.body
    assert not holds_secret(answer.body) and not holds_secret(repr(proxy.app.recent))
    take_log(proxy)


HELD = raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", pause=0.3, close=True)
ALL_OVER = {name: KEY for name in ("user-agent", "x-session-id", "traceparent", "x-trace-id",
                                   "referer", "x-request-id", "anthropic-beta", "cookie")}


def test_what_the_state_and_the_events_tell():
    """Of every request above, of every answer above, and of one while it runs."""
    fake = FakeUpstream()
    proxy = Proxy(apiBase=fake.base, limits=FAST._replace(news=0.02))
    told = []
    with proxy.connect(60) as events:
        events.sendall(b"GET /admin/events HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        reader = threading.Thread(target=lambda: told.append(read_all(events)))
        reader.start()
        for data in REQUESTS.values():
            send(proxy, data)
        for answer in ECHOES.values():
            fake.default = answer
            send(proxy, post(model=KEY, stream=True))
            send(proxy, post(MESSAGES, ALL_OVER, model="x-" + KEY))
        fake.default = HELD
        with proxy.connect() as sock:
            sock.sendall(post(fields=ALL_OVER, model=KEY, stream=True))
            wait_until(lambda: any(one.relay for one in list(proxy.app.exchanges)))
            running = proxy.request("GET", "/admin/state", key=None)
            assert running.json["live"][0]["model"].startswith("key:")
            read_until(sock, b"\r\n\r\n")
        wait_until(lambda: len(proxy.app.exchanges) == 1)       # the one who reads the events
        state = proxy.request("GET", "/admin/state", key=None)
        proxy.close()
        reader.join(10)
    fake.close()
    kept = state.json["recent"]
    assert len(kept) > 80 and told[0].count(b"event: request") >= len(kept)
    assert b'"live":[{' in told[0]
    assert {"billing", "authentication", "invalid"} <= {one["error"].partition(":")[0]
                                                        for one in kept}
    for data in (told[0], state.body, running.body, proxy.log.getvalue()):
        assert not holds_secret(data)
def test_the_database_and_what_is_read_from_it(tmp_path):
    """Every file of it, byte by byte, while the proxy runs and when it has ended."""
    fake = FakeUpstream()
    path = tmp_path / "usage.db"
    proxy = Proxy(apiBase=fake.base, usageDb=str(path))
    try:
        plant(proxy, fake)
        files = [(tmp_path / name).read_bytes() for name in os.listdir(tmp_path)]
    finally:
        proxy.close(hurry=False)
        fake.close()
    files.append(path.read_bytes())
    assert files[-1].count(b"key:") >= 5 * len(PLANTED) and not any(map(holds_secret, files))
    for by in ("model", "key", "client", "status"):
        for form in ([], ["--json"], ["--csv"]):
            done = call_program("usage", "--usage-db", str(path), "--by", by, *form)
            assert done.returncode == 0 and not holds_secret(done.stdout + done.stderr)
    assert not holds_secret(proxy.log.getvalue())
