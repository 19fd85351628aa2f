"""Every route over real sockets: paths, methods, error shapes, model lists, keys, CORS."""
from __future__ import annotations

import http.client
import json
import threading
import time

import ccproxy
import pytest
from fake_upstream import ndjson, raw, stall, stream
from harness import CHAT, FAST, KEY, MESSAGES, parse_answers, wait_until

ANTHROPIC = {"anthropic-version": "2023-06-01"}
LIVE = ["deepseek/deepseek-v4-flash", "vendor/New-Model"]
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}


# Paths.


@pytest.mark.parametrize("path", [
    "/v1/chat/completions", "/chat/completions", "/v1/v1/chat/completions",
    "/v1/chat/completions/", "/v1/chat/completions?beta=true&x=/y", "//v1//chat/completions",
    "/v1/chat/completions/?", "/openai/v1/chat/completions", "/openai/chat/completions",
    "/api/v1/chat/completions", "/api/v1/v1/chat/completions", "/anthropic/v1/chat/completions",
    # a base URL that names the endpoint, and what its client adds to it
    "/v1/chat/completions/chat/completions", "/v1/chat/completions/v1/chat/completions",
    "/chat/completions/v1/chat/completions", "/openai/v1/chat/completions/chat/completions/",
    "/v1/chat/completions/chat/completions/chat/completions", "/v1/messages/v1/chat/completions",
    "/v1/responses/chat/completions"])
def test_chat_paths(proxy, path):
    answer = proxy.request("POST", path, HI)
    assert answer.json["choices"][0]["message"] == {"role": "assistant", "content": "Hello there"}
    assert answer.json["object"] == "chat.completion"


@pytest.mark.parametrize("path", [
    "/v1/messages", "/messages", "/v1/v1/messages", "/v1/messages/", "/v1/messages?beta=true",
    "/anthropic/v1/messages", "/anthropic/messages", "/anthropic/v1/messages/?beta=true",
    "/v1/messages/v1/messages?beta=true", "/v1/messages/messages", "/api/v1/messages",
    "/anthropic/v1/messages/v1/messages", "/v1/chat/completions/v1/messages"])
def test_messages_paths(proxy, path):
    answer = proxy.request("POST", path, HI)
    assert answer.json["content"] == [{"type": "text", "text": "Hello there"}]
    assert answer.json["type"] == "message"


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/v1/models/", "/v1/v1/models",
                                  "/v1/models?limit=1000", "/anthropic/v1/models",
                                  "/openai/v1/models", "/api/v1/models", "/v1/models/models",
                                  "/v1/chat/completions/models", "/v1/messages/v1/models"])
def test_model_list_paths(proxy, path):
    assert [row["id"] for row in proxy.request("GET", path, key=None).json["data"]] == LIVE


@pytest.mark.parametrize("path, expected", [
    ("/v1/responses/v1/responses", "/responses"), ("/explain/openai/v1/responses", "/responses"),
    ("/v1/messages/v1/messages/count_tokens", "/messages/count_tokens"),
    ("/v1/messages/messages/count_tokens", "/messages/count_tokens"),
    ("/responses/responses/input_tokens", "/responses/input_tokens"),
    ("/v1/chat/completions/v1/models/a%2Fb", "/models/a%2Fb"),
    # what only looks so
    ("/api/version", "/api/version"), ("/api/v1x/models", "/api/v1x/models"), ("/api", "/api"),
    ("/v1/responses/resp_1", "/responses/resp_1"), ("/v1/models/responses", "/models/responses"),
    ("/v1/models/vendor/models", "/models/vendor/models"),
    ("/openaiv1/messages", "/openaiv1/messages"),
    ("/messages/messagesx", "/messages/messagesx"), ("/v1/messages/admin/state",
                                                     "/messages/admin/state"),
    ("/messages" + "/v1" * 5000 + "/x", "/messages" + "/v1" * 5000 + "/x"), ("*", "*"),
])
def test_what_a_path_comes_to(path, expected):
    assert ccproxy.normal_path(path) == expected


BASES = [
    ("/foo/v1/chat/completions", {"host": "ai.example:8080"}, "http://ai.example:8080"),
    ("/openai/deployments/gpt/chat/completions?api-version=1", {"host": "[::1]:9"},
     "http://[::1]:9"),
    ("/v2/messages", {"host": "h"}, "http://h"), ("/v1/foo/responses/", {"host": "h"}, "http://h"),
    ("/x/v1/models/some", {"host": "h"}, "http://h"),
    ("/x/v1/messages/count_tokens", {"host": "h", "x-forwarded-proto": "https"}, "https://h"),
    ("/x/messages", {"host": "h", "x-forwarded-proto": "https://e"}, "http://h"),
    ("/x/messages", {"host": "%s" % KEY}, "http://key:"), ("/x/health", {"host": "h"}, ""),
    ("/v1/embeddings", {"host": "h"}, ""), ("/v1/messages/batches", {"host": "h"}, ""),
]


@pytest.mark.parametrize("path, fields, base", BASES)
def test_behind_a_strange_prefix_the_base_url_is_told(proxy, upstream, path, fields, base):
    answer = proxy.request("POST", path, HI, fields)
    message = answer.json["error"]["message"]
    assert answer.status == 404 and KEY not in message and not upstream.requests
    if not base:
        assert "base URL" not in message and "POST /v1/messages" in message
    elif base.endswith(":"):
        assert base in message
    else:
        assert "base URL to %s/v1 (OpenAI" % base in message and " %s (Anthropic" % base in message


def test_without_a_host_the_base_url_has_a_gap(proxy):
    data = proxy.raw(b"POST /x/messages HTTP/1.0\r\ncontent-length: 0\r\n\r\n")
    assert data.startswith(b"HTTP/1.1 404") and b"http://HOST:PORT/v1 (OpenAI" in data


# Unknown paths and wrong methods, in both shapes.

LOST = [
    ("GET", "/nothing", {}, 404, None), ("GET", "/v1", {}, 200, None),
    ("GET", "/favicon.ico", {}, 404, None), ("POST", "/v1/embeddings", {}, 404, None),
    ("GET", "/v1/nothing", ANTHROPIC, 404, None), ("POST", "/v1/messages/batches", {}, 404, None),
    ("GET", "/v1/chat/completions", {}, 405, "POST"), ("PUT", "/v1/messages", {}, 405, "POST"),
    ("DELETE", "/v1/models", {}, 405, "GET"), ("POST", "/v1/models", ANTHROPIC, 405, "GET"),
    ("POST", "/v1/models/some", {}, 405, "GET"), ("POST", "/health", {}, 405, "GET"),
    ("PATCH", "/", {}, 405, "GET"),
    ("BREW", "/v1/chat/completions", {}, 405, "POST")]


@pytest.mark.parametrize("method, path, fields, expected, allowed", LOST)
def test_unknown_paths_and_wrong_methods(proxy, upstream, method, path, fields, expected, allowed):
    answer = proxy.request(method, path, None, fields, key=None)
    assert answer.status == expected
    if expected == 200:
        return
    anthropic = bool(fields) or "/messages" in path
    error = answer.json["error"]
    assert answer.fields["content-type"] == "application/json"
    if anthropic:
        assert answer.json["type"] == "error" and set(answer.json) == {"type", "error"}
        assert error["type"] == ("not_found_error" if expected == 404 else
                                 "invalid_request_error")
    else:
        assert set(answer.json) == {"error"}
        assert {"message", "type", "param", "code"} <= set(error)
    if expected == 405:
        methods = {one.strip() for one in answer.fields["allow"].split(",")}
        assert methods == {allowed, "OPTIONS"} | ({"HEAD"} if allowed == "GET" else set())
    else:
        assert "allow" not in answer.fields
    assert answer.fields["x-should-retry"] == "false"
    assert not upstream.connections


@pytest.mark.parametrize("head", [b"CONNECT other.example:443 HTTP/1.1\r\nhost: a\r\n\r\n",
                                  b"TRACE / HTTP/1.1\r\nhost: a\r\ncookie: s3cret\r\n\r\n"],
                         ids=["CONNECT", "TRACE"])
def test_connect_and_trace(proxy, head):
    """Neither a tunnel nor a mirror (RFC 9110 9.3.6, 9.3.8)."""
    answer = parse_answers(proxy.raw(head + b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
                                     b"\r\n"))[0]
    assert answer.status in (405, 501) and b"s3cret" not in answer.body


# HEAD.


@pytest.mark.parametrize("path, expected", [
    ("/", 200), ("/health", 200), ("/v1/models", 200), ("/v1/models/vendor%2FNew-Model", 200),
    ("/api/hello", 200), ("/api/version", 200), ("/api/tags", 200), ("/api/show", 405),
    ("/nothing", 404), ("/v1/messages", 405)])
def test_head(proxy, path, expected):
    """The head of the GET, no body, and the connection goes on."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=10)
    lengths = []
    for method in ("HEAD", "GET", "HEAD"):
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        lengths.append(int(answer.getheader("content-length")))
        assert answer.status == expected and len(body) == (lengths[-1] if method == "GET" else 0)
    connection.close()
    assert lengths[0] == lengths[2] > 0
    if path not in ("/health", "/v1/messages", "/api/show"):     # the time, and the method
        assert lengths[0] == lengths[1]


def test_start_up_noise(proxy, upstream):
    """What Claude Code asks its own vendor at start is answered here, without a key."""
    assert proxy.request("HEAD", "/api/hello", key=None).status == 200
    for path in ("/api/event_logging/batch", "/api/event_logging/v2/batch"):
        answer = proxy.request("POST", path, {"events": []}, key=None)
        assert (answer.status, answer.json) == (200, {})
    assert not upstream.connections


# What clients with a provider for Ollama ask.


def test_the_version_that_ollamas_clients_ask(proxy):
    answer = proxy.request("GET", "/api/version", key=None)
    assert (answer.status, answer.json) == (200, {"version": ccproxy.__version__})


def test_the_models_that_ollamas_clients_list(make_proxy):
    proxy = make_proxy(allowedModels=["vendor/New-Model", LIVE[0]], modelAliases={"mine": LIVE[0]})
    models = proxy.request("GET", "/api/tags", key=None).json["models"]
    assert [row["name"] for row in models] == ["mine"] + LIVE
    for row in models:
        assert row["model"] == row["name"] and set(row["details"]) == {
            "parent_model", "format", "family", "families", "parameter_size", "quantization_level"}
        assert (row["size"], row["digest"]) == (0, "") and row["modified_at"].endswith("Z")
    lengths = {row["id"]: row.get("context_length")
               for row in proxy.request("GET", "/v1/models", key=None).json["data"]}
    assert {row["name"]: row.get("context_length") for row in models} == lengths
    assert lengths[LIVE[0]] > 1000
    only = make_proxy(allowedModels=[LIVE[1]]).request("GET", "/api/tags", key=None).json["models"]
    assert [row["name"] for row in only] == [LIVE[1]]


@pytest.mark.parametrize("body", [{"model": LIVE[0]}, {"name": LIVE[0]}, {"model": LIVE[0].upper()},
                                  {"model": LIVE[0] + ":latest", "verbose": True}])
def test_what_ollamas_clients_ask_of_a_model(proxy, body):
    answer = proxy.request("POST", "/api/show", body, key=None)
    info = answer.json["model_info"]
    length = info[info["general.architecture"] + ".context_length"]
    known = {row["id"]: row for row in proxy.request("GET", "/v1/models", key=None).json["data"]}
    assert answer.status == 200 and length == known[LIVE[0]]["context_length"]
    assert {"completion", "tools"} <= set(answer.json["capabilities"])
    assert info["general.basename"] == known[LIVE[0]]["name"] and answer.json["details"]


@pytest.mark.parametrize("body, expected, words", [
    ({"model": "nobody"}, 404, "model 'nobody' not found"), ({}, 400, "model is required"),
    ({"model": 5}, 400, "model is required"), ([], 400, "object"), (b"{", 400, "JSON"),
    (b"[" * 60000, 400, "nested"), (b" " * 70000 + b"{}", 413, "larger")])
def test_what_is_refused_there_is_in_ollamas_shape(proxy, upstream, body, expected, words):
    answer = proxy.request("POST", "/api/show", body, key=None)
    assert answer.status == expected and set(answer.json) == {"error"}
    assert words in answer.json["error"]
    assert not upstream.requests


def test_a_model_that_is_not_served_is_not_shown_there(make_proxy):
    proxy = make_proxy(models=[{"id": LIVE[0], "enabled": False}])
    assert proxy.request("POST", "/api/show", {"model": LIVE[0]}, key=None).status == 404
    assert proxy.request("POST", "/api/show", {"model": LIVE[1]}, key=None).status == 200
    closed = make_proxy(allowedModels=[LIVE[1]])
    assert closed.request("POST", "/api/show", {"model": LIVE[0]}, key=None).status == 404


def test_root_tells_a_person_what_this_is(proxy):
    answer = proxy.request("GET", "/", key=None)
    assert answer.status == 200 and answer.fields["content-type"].startswith("text/plain")
    for part in ("ccproxy", ccproxy.__version__, "/v1/chat/completions", "/v1/messages"):
        assert part in answer.body.decode()


def test_health(make_proxy, upstream):
    proxy = make_proxy(useProviderModels=False)
    health = proxy.request("GET", "/health", key=None).json
    assert set(health) == {"status", "version", "upstream", "uptime_seconds", "open_streams",
                           "token_estimate", "worker", "workers", "operator_keys",
                           "routing_policy"}
    assert (health["worker"], health["workers"]) == (1, 1)
    assert health["status"] == "ok" and health["version"] == ccproxy.__version__
    assert health["upstream"].startswith(upstream.base) and health["open_streams"] == 0
    upstream.default = stall()
    sock = proxy.send_post(CHAT, stream=True)
    wait_until(lambda: upstream.requests)
    later = proxy.request("GET", "/health", key=None).json
    assert later["open_streams"] == 1 and later["uptime_seconds"] >= health["uptime_seconds"]
    sock.close()
    wait_until(lambda: not proxy.request("GET", "/health").json["open_streams"])


# CORS.

PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, content-type, x-stainless-os"}


def cors_of(answer):
    return {name: value for name, value in answer.fields.items()
            if name.startswith("access-control-")}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/models", "/nothing"])
def test_options_without_cors(proxy, path):
    answer = proxy.request("OPTIONS", path, None, PREFLIGHT, key=None)
    assert answer.status == 204 and not answer.body and "content-length" not in answer.fields
    assert not cors_of(answer)


@pytest.mark.parametrize("allowed, granted", [
    ("*", "*"), ("https://app.example", "https://app.example"),
    ("https://other.example, https://app.example", "https://app.example"),
    ("https://other.example", None), ("https://app.example.evil", None)])
def test_options_with_cors(make_proxy, allowed, granted):
    """Preflights come without a key; what follows carries the same permission, errors too."""
    proxy = make_proxy(corsOrigin=allowed)
    preflight = proxy.request("OPTIONS", CHAT, None, PREFLIGHT, key=None)
    assert preflight.status == 204
    answers = [preflight, proxy.post(CHAT, PREFLIGHT), proxy.post(CHAT, PREFLIGHT, stream=True),
               proxy.post(CHAT, PREFLIGHT, None), proxy.request("GET", "/nothing", None, PREFLIGHT)]
    assert [answer.status for answer in answers] == [204, 200, 200, 401, 404]
    for answer in answers:
        assert answer.fields.get("access-control-allow-origin") == granted
        assert "access-control-allow-credentials" not in answer.fields
        assert ("origin" in answer.fields.get("vary", "").lower()) is (allowed != "*")
    if granted is None:
        assert not cors_of(preflight)
    else:
        assert "POST" in preflight.fields["access-control-allow-methods"]
        words = preflight.fields["access-control-allow-headers"].lower()
        assert words == "*" or all(word in words for word in ("authorization", "x-stainless-os"))


# Keys.

GOOD_KEYS = [
    {"authorization": "Bearer user_a"}, {"authorization": "bearer   user_a"},
    {"Authorization": "BEARER user_a"}, {"authorization": "user_a"},
    {"authorization": 'Bearer "user_a"'}, {"authorization": "Token user_a"},
    {"authorization": "token  'user_a'"}, {"authorization": "user_a,"},
    {"x-api-key": "user_a"}, {"X-API-Key": " user_a "},
    {"authorization": "Bearer sk-123", "x-api-key": "user_a"},
    {"authorization": "Bearer user_a", "x-api-key": "user_b"},
    {"authorization": "Bearer user_a user_b"},
    {"api-key": "user_a"}, {"Api-Key": "Bearer user_a"}, {"api-key": "sk-1, user_a"},
    {"x-api-key": "user_a", "api-key": "user_b"},
    {"authorization": "Basic dXNlcjpwdw==", "api-key": "user_a"},
    {"authorization": "Digest username=user_b", "x-api-key": "sk-1", "api-key": "user_a"}]
BAD_KEYS = [{}, {"authorization": ""}, {"authorization": "Bearer"},
            {"authorization": "Bearer user_"},
            {"authorization": "Bearer sk-proj-123"}, {"x-api-key": "sk-ant-123"},
            {"authorization": "Bearer USER_a"}, {"cookie": "key=user_a"}, {"api-key": "sk-123"},
            # the credentials of another scheme hold no key (RFC 9110 11.4)
            {"authorization": "Basic user_a,"}, {"authorization": "Negotiate user_a"},
            {"authorization": 'Digest username="user_a", nonce="user_b", response=user_c'},
            {"authorization": "AWS4-HMAC-SHA256 Credential=user_a, Signature=user_b"},
            {"authorization": "Key user_a"}, {"authorization": "basic  user_a"}]


@pytest.mark.parametrize("fields", GOOD_KEYS)
def test_keys_that_are_found(proxy, upstream, fields):
    for path in (CHAT, MESSAGES):
        assert proxy.post(path, fields, None).status == 200
        assert upstream.requests[-1].field("authorization") == "Bearer user_a"


@pytest.mark.parametrize("fields", BAD_KEYS)
def test_keys_that_are_none(proxy, upstream, fields):
    for path in (CHAT, MESSAGES):
        answer = proxy.post(path, fields, None)
        assert answer.status == 401 and answer.fields["www-authenticate"].startswith("Bearer")
        assert answer.fields["x-should-retry"] == "false"
        error = answer.json["error"]
        assert error["type"] == "authentication_error" and "user_" in error["message"]
        assert "123" not in error["message"]
        if path == CHAT:
            assert error["code"] == "invalid_api_key"
    assert not upstream.connections


EMPTY = "The key sent is not a Command Code key, but empty (is the variable set that "


@pytest.mark.parametrize("fields, word", [
    ({}, "No key was sent: "), ({"x-api-key": " "}, "No key was sent: "),
    ({"authorization": "Bearer"}, EMPTY), ({"authorization": "token "}, EMPTY),
    ({"authorization": "Bearer ", "x-api-key": ""}, EMPTY),
    ({"authorization": "Bearer your key"}, "The key sent is not a Command Code key: "),
    ({"x-api-key": "key"}, "The key sent is not a Command Code key: ")])
def test_how_a_missing_key_is_told(proxy, fields, word):
    """`Bearer $KEY` with an empty variable has a word of its own; no word of ours is hidden."""
    message = proxy.post(CHAT, fields, None).json["error"]["message"]
    assert message.startswith(word) and "hidden" not in message


# Model lists.


def test_the_openai_list(proxy):
    body = proxy.request("GET", "/v1/models", key=None).json
    assert body["object"] == "list" and [row["id"] for row in body["data"]] == LIVE
    for row in body["data"]:
        assert row["object"] == "model" and row["created"] == 1 and row["owned_by"]


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21", "whatever"])
def test_the_anthropic_list(proxy, version):
    body = proxy.request("GET", "/v1/models", None, {"anthropic-version": version}, None).json
    assert [row["id"] for row in body["data"]] == LIVE
    assert body["has_more"] is False
    assert (body["first_id"], body["last_id"]) == (LIVE[0], LIVE[-1])
    for row in body["data"]:
        assert row["type"] == "model" and row["display_name"] and row["description"]
        assert row["created_at"] == "1970-01-01T00:00:01Z"      # what the upstream tells
    assert [(row["max_input_tokens"], row["max_tokens"]) for row in body["data"]] == [
        (1000000, 200000), (123, 200000)]
    assert body["data"][1]["display_name"] == "Brand New"


def test_created_is_the_upstreams_at_each_refresh(make_proxy, upstream):
    """It tells another moment with every call; a model of which it tells none has 0."""
    proxy = make_proxy()
    for created in (1793000000, 1793003600):
        upstream.models = {"data": [{"id": "vendor/New-Model", "created": created},
                                    {"id": "old/one"}]}
        proxy.app.home.models_due = 0.0
        rows = proxy.request("GET", "/v1/models", key=None).json["data"]
        assert [row["created"] for row in rows] == [created, 0]
    row = proxy.request("GET", "/v1/models/new-model", None, ANTHROPIC, None).json
    assert row["created_at"] == "2026-10-26T08:33:20Z"
    rows = make_proxy(useProviderModels=False).request("GET", "/v1/models", key=None).json["data"]
    assert {row["created"] for row in rows} == {0}


@pytest.mark.parametrize("path, found", [
    ("vendor%2FNew-Model", "vendor/New-Model"), ("vendor/New-Model", "vendor/New-Model"),
    ("VENDOR%2fnew-model", "vendor/New-Model"), ("vendor%2FNew-Model/", "vendor/New-Model"),
    ("vendor%2FNew-Model?x=y", "vendor/New-Model"),
    ("deepseek%2Fdeepseek-v4-flash", "deepseek/deepseek-v4-flash"),
    ("openrouter%2Fdeepseek%2Fdeepseek-v4-flash:nitro", "deepseek/deepseek-v4-flash"),
    ("default", "deepseek/deepseek-v4-flash"), ("new.model", "vendor/New-Model"),
    ("nothing-like-it", None), ("%FF%00", None), ("vendor%2F", None)])
def test_one_model(proxy, path, found):
    for prefix in ("/v1/models/", "/models/", "/anthropic/v1/models/"):
        plain = proxy.request("GET", prefix + path, key=None)
        anthropic = proxy.request("GET", prefix + path, None, ANTHROPIC, None)
        if found is None:
            assert plain.status == anthropic.status == 404
            assert plain.json["error"]["code"] == "model_not_found"
            assert anthropic.json["error"]["type"] == "not_found_error"
        else:
            assert (plain.json["id"], plain.json["object"]) == (found, "model")
            assert (anthropic.json["id"], anthropic.json["type"]) == (found, "model")


def listed(proxy):
    return [row["id"] for row in proxy.request("GET", "/v1/models", key=None).json["data"]]


BROKEN_LISTS = [
    ("closed", raw(b"", close=True)),
    ("status", raw(b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n")),
    ("not JSON", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{]")),
    ("deep", raw(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"[" * 200_000, close=True)),
    ("a list", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]")),
    ("empty", raw(b'HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{"data":[]}')),
    ("odd rows", raw(b'HTTP/1.1 200 OK\r\ncontent-length: 27\r\n\r\n{"data":[1,null,{"id":""}]}')),
    ("not text", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n\xff\xfe")),
    ("garbage", raw(b"SSH-2.0-OpenSSH\r\n\r\n", close=True)),
    ("cut off", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", close=True)),
    ("bad chunk", raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", close=True)),
    ("redirect", raw(b"HTTP/1.1 302 X\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n")),
    ("silent", stall())]


@pytest.mark.parametrize("script", [row[1] for row in BROKEN_LISTS],
                         ids=[row[0] for row in BROKEN_LISTS])
def test_a_list_that_cannot_be_had(make_proxy, upstream, script):
    """The built-in catalogue stands in, and chat goes on."""
    upstream.side_script = script
    proxy = make_proxy(limits=FAST._replace(list_wait=0.5, side_call=0.1))
    shown = listed(proxy)
    assert len(shown) >= 80 and "deepseek/deepseek-v4-flash" in shown
    assert "moonshotai/Kimi-K3" in shown
    assert len(upstream.side_requests) == 1
    assert proxy.post(CHAT, model="vendor/New-Model").status == 200
    assert len(upstream.side_requests) == 1         # not asked again at once
    wait_until(proxy.app.home.models_task.done)
    assert proxy.app.home.models_task.exception() is None
    assert "model list not refreshed" in proxy.log.getvalue()


def test_a_list_that_comes_when_none_is_wanted_any_more(make_proxy, upstream):
    """useProviderModels is switched off while the upstream is asked."""
    proxy, asked, go = make_proxy(), threading.Event(), threading.Event()

    def slow(sock, request):
        asked.set()
        go.wait(10)
        body = json.dumps(upstream.models).encode()
        sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    upstream.side_script = slow
    assert proxy.post(CHAT).status == 200 and asked.wait(10)
    proxy.app.config = proxy.app.config._replace(use_provider_models=False)
    go.set()
    wait_until(proxy.app.home.models_task.done)
    assert proxy.app.home.models_task.exception() is None
    assert len(listed(proxy)) >= 80


def test_a_trust_store_that_cannot_be_read_is_no_list(make_proxy, monkeypatch):
    proxy = make_proxy(apiBase="https://127.0.0.1:1")
    monkeypatch.setattr(ccproxy.ssl, "create_default_context", lambda: open("/nonexistent"))
    assert len(listed(proxy)) >= 80
    assert proxy.app.home.models_task.exception() is None
    assert "model list not refreshed" in proxy.log.getvalue()


def test_a_list_without_hidden_models(make_proxy):
    """Models that the vendor hides are known, but not shown."""
    shown = listed(make_proxy(useProviderModels=False))
    assert len(shown) == len(set(shown)) >= 80


def test_a_slow_list_is_shown_later(make_proxy, upstream):
    """A client waits for it for a moment only, and gets the built-in one meanwhile."""
    def slow(sock, request):
        time.sleep(0.2)
        body = json.dumps(upstream.models).encode()
        sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    upstream.side_script = slow
    proxy = make_proxy(limits=FAST._replace(list_wait=0.05))
    assert len(listed(proxy)) >= 80
    wait_until(lambda: listed(proxy) == LIVE)
    assert len(upstream.side_requests) == 1


def test_the_list_is_cached(make_proxy, upstream):
    proxy = make_proxy(modelRefreshIntervalMs=1000)
    for _ in range(5):
        assert listed(proxy) == LIVE
    assert len(upstream.side_requests) == 1
    upstream.models = {"data": [{"id": "vendor/Newer"}]}
    proxy.app.home.models_due = 0.0          # as if the interval were over
    assert listed(proxy) == ["vendor/Newer"]


def test_no_live_list_wanted(make_proxy, upstream):
    proxy = make_proxy(useProviderModels=False)
    assert len(listed(proxy)) >= 80 and proxy.post(CHAT).status == 200
    assert not upstream.side_requests


def test_aliases_and_allowed_models_in_the_list(make_proxy):
    proxy = make_proxy(modelAliases={"mine": "vendor/New-Model", "claude-*": "vendor/New-Model"},
                       allowedModels=["vendor/New-Model"])
    assert listed(proxy) == ["mine", "vendor/New-Model"]
    assert proxy.request("GET", "/v1/models/mine").json["id"] == "mine"


@pytest.mark.parametrize("asked, sent", [
    (None, "deepseek/deepseek-v4-flash"), ("default", "deepseek/deepseek-v4-flash"),
    ("VENDOR/new-model", "vendor/New-Model"), ("new-model", "vendor/New-Model"),
    ("claude-opus-5-5[1m]", "vendor/New-Model"), ("mine", "moonshotai/Kimi-K3"),
    ("quite/unknown", "quite/unknown"), ("moonshotai/kimi-k3", "moonshotai/Kimi-K3"),
    ("openai/gpt-5.5", "gpt-5.5"), ("x-ai/grok-4.5:nitro", "xai/grok-4.5")])
def test_models_are_resolved(make_proxy, upstream, asked, sent):
    """The answer names the model that was asked for, the upstream gets its own id."""
    proxy = make_proxy(modelAliases={"mine": "kimi", "claude-*": "vendor/New-Model"})
    assert listed(proxy) == ["mine"] + LIVE
    for path in (CHAT, MESSAGES):
        answer = proxy.post(path, **({"model": asked} if asked else {}))
        assert answer.status == 200
        assert upstream.requests[-1].json["params"]["model"] == sent
        assert answer.json["model"] == (asked or sent)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_notes_on_models(make_proxy, upstream, path):
    """What is sent instead, or that nothing here knows the name; strictness refuses either."""
    proxy = make_proxy(useProviderModels=False)
    for asked, sent, note in (
            ("anthropic/claude-sonnet-4.6", "claude-sonnet-4-6",
             "anthropic/claude-sonnet-4.6 -> claude-sonnet-4-6"),
            ("claude-opus-6", "claude-opus-6",
             "claude-opus-6 is not a known model, passed on (nearest: claude-opus-5)"),
            ("claude-opus-5", "claude-opus-5", None)):
        answer = proxy.post(path, model=asked)
        assert (answer.status, answer.json["model"]) == (200, asked)
        assert upstream.requests[-1].json["params"]["model"] == sent
        assert answer.fields.get("x-ccproxy-notes") == (note and "model=" + note)
        strict = proxy.post(path, {"x-ccproxy-strict": "1"}, model=asked)
        assert strict.status == (400 if note else 200)


def test_models_that_are_refused(make_proxy, upstream):
    strict = make_proxy(allowUnknownModels=False)
    closed = make_proxy(allowedModels=["vendor/New-Model"])
    for proxy, asked in ((strict, "quite/unknown"), (closed, "moonshotai/Kimi-K3")):
        chat, messages = proxy.post(CHAT, model=asked), proxy.post(MESSAGES, model=asked)
        assert chat.status == messages.status == 404
        assert chat.json["error"]["code"] == "model_not_found"
        assert chat.json["error"]["param"] == "model"
        assert messages.json["error"]["type"] == "not_found_error"
    assert not upstream.requests


# Bodies that are refused, in both shapes.


BAD_BODIES = [b"", b"{", b"[]", b'"x"', b"null", b'{"messages": NaN}', b"[" * 100_000,
              b'{"a":' * 100_000, b"\xff\xfe", b'{"a": 1} x', b'{"messages": "x"}',
              b'{"messages": [1]}', b"{}"]


@pytest.mark.parametrize("body", BAD_BODIES, ids=[repr(body[:20]) for body in BAD_BODIES])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_bad_bodies(proxy, upstream, path, body):
    answer = proxy.request("POST", path, body, {"content-length": str(len(body))})
    assert answer.status == 400 and answer.json["error"]["type"] == "invalid_request_error"
    assert not upstream.requests


def test_ids_look_like_the_apis_own(proxy):
    chat, messages = proxy.post(CHAT), proxy.post(MESSAGES)
    assert chat.json["id"].startswith("chatcmpl-") and messages.json["id"].startswith("msg_")
    assert chat.fields["x-request-id"] and messages.fields["request-id"]
    assert len({proxy.post(CHAT).json["id"] for _ in range(5)}) == 5


def test_include_reasoning(make_proxy, upstream):
    upstream.default = stream("02")
    assert "reasoning_content" in make_proxy().post(CHAT).json["choices"][0]["message"]
    hidden = make_proxy(includeReasoning=False)
    assert "reasoning_content" not in hidden.post(CHAT).json["choices"][0]["message"]
    assert b"reasoning_content" not in hidden.post(CHAT, stream=True).body


@pytest.mark.parametrize("policy, expected", [("error_on_length", 502), ("allow", 200)])
def test_empty_response_policy(make_proxy, upstream, policy, expected):
    """`length` before anything was shown."""
    upstream.default = stream(ndjson({"type": "start"}, {"type": "finish",
                                                         "finishReason": "length"}))
    proxy = make_proxy(emptyResponsePolicy=policy)
    for path, streamed in ((CHAT, False), (CHAT, True), (MESSAGES, False), (MESSAGES, True)):
        answer = proxy.post(path, stream=streamed)
        assert answer.status == expected
        if expected == 502:
            assert answer.fields["x-should-retry"] == "false"
    assert len(upstream.requests) == 4


def test_the_key_of_each_caller_is_used(proxy, upstream):
    for key in ("user_one", "user_two", KEY):
        proxy.post(CHAT, key=key)
    assert [request.field("authorization") for request in upstream.requests] == [
        "Bearer user_one", "Bearer user_two", "Bearer " + KEY]
