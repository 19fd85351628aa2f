"""The 318 files of JSONTestSuite (MIT, (c) 2016 Nicolas Seriot: hostile/README.md) as bodies: what
is not JSON, and what is JSON but no request, is a 400 in the API's shape, and nobody is asked."""
from __future__ import annotations

import base64
import json
import os

import pytest
from harness import CHAT, MESSAGES, ccproxy
from pure import ALL_FACES, refusal, text

PATHS = {"chat": CHAT, "messages": MESSAGES, "responses": "/v1/responses"}
SUITE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hostile", "jsontestsuite.jsonl")
with open(SUITE, encoding="ascii") as file:
    FILES = {row["name"]: base64.b64decode(row["b64"]) for row in map(json.loads, file)}
LONG = ["n_structure_100000_opening_arrays", "n_structure_open_array_object"]
SAMPLE = sorted(set(sorted(FILES)[::8] + LONG))
NOT_AN_OBJECT = "The body must be a JSON object."


def names(prefix):
    return sorted(name for name in FILES if name.startswith(prefix))


def read(data):
    """The object that a body is, or the ProxyError that it is refused with."""
    try:
        return ccproxy.parse_object(data, [])
    except ccproxy.ProxyError as error:
        return error


def is_object(data):
    try:
        return isinstance(json.loads(data.decode()), dict)
    except (ValueError, RecursionError):
        return False


def error_members(face, body):
    """The error of an answer in this API's own shape; nothing else may stand beside it."""
    if face == "messages":
        assert body["type"] == "error" and set(body) <= {"type", "error", "request_id"}
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error"
    return body["error"]


def test_the_suite_is_whole():
    assert [len(names(prefix)) for prefix in ("y_", "n_", "i_")] == [95, 188, 35]
    assert len(FILES) == 318 and len(SAMPLE) >= 40
    assert {name[:2] for name in SAMPLE} == {"y_", "n_", "i_"}


@pytest.mark.parametrize("name", names("n_"))
def test_what_is_not_json_is_refused(name):
    error = read(FILES[name])
    assert isinstance(error, ccproxy.ProxyError)
    assert (error.kind, error.status) == ("invalid", 400)
    assert error.message != NOT_AN_OBJECT and error.message.startswith("The body is not")


@pytest.mark.parametrize("name", names("y_"))
def test_what_is_json_is_read_or_is_no_object(name):
    value = read(FILES[name])
    if is_object(FILES[name]):
        json.loads(ccproxy.to_json(value))
        assert isinstance(value, dict)
    else:
        assert (value.kind, value.status, value.message) == ("invalid", 400, NOT_AN_OBJECT)


@pytest.mark.parametrize("name", names("i_"))
def test_what_is_left_to_the_reader_is_read_or_refused(name):
    value = read(FILES[name])
    if isinstance(value, dict):
        ccproxy.to_json(value).decode()
    else:
        assert (value.kind, value.status) == ("invalid", 400)


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_is_a_request(name):
    for face in ALL_FACES:
        error = refusal(face, FILES[name])
        assert error is not None and (error.kind, error.status) == ("invalid", 400)
        assert error_members(face, ALL_FACES[face].error(error))["message"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_good_request_with_a_file_inside_is_sent_as_json_or_refused(name):
    """The file's value as a tool's argument: strict JSON goes to the upstream, or nothing does."""
    body = (b'{"model":"vendor/unknown","max_tokens":9,"messages":[{"role":"user","content":"hi"},'
            b'{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"f",'
            b'"input":{"x":%b}}]}]}') % FILES[name]
    notes = []
    try:
        prompt = ALL_FACES["messages"].parse(ccproxy.parse_object(body, notes), notes)
        ccproxy.repair_prompt(prompt)
        payload = ccproxy.build_alpha(prompt, "session")
    except ccproxy.ProxyError as error:
        assert error.status == 400 and not name.startswith("y_")
        return
    assert not name.startswith("n_")
    turns = json.loads(payload.decode(), parse_constant=pytest.fail)["params"]["messages"]
    assert turns[0]["content"] == [text("hi")]


def test_a_sample_over_sockets_at_every_api(upstream, proxy):
    for name in SAMPLE:
        for face, path in PATHS.items():
            answer = proxy.request("POST", path, FILES[name])
            assert answer.status == 400, (name, face, answer.body[:200])
            assert answer.fields["content-type"] == "application/json"
            assert error_members(face, answer.json)["message"], name
    assert upstream.requests == []
    assert proxy.post(CHAT).status == 200       # nothing of it disturbed the next caller
