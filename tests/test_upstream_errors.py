"""UPSTREAM ERRORS: a status with a body, or an error event, as what the client is told."""
from __future__ import annotations

import json

import pytest
from fake_upstream import ndjson
from harness import ccproxy
from pure import new_answer, run
from pure_formats import run_stream


def envelope(message, code="BAD_REQUEST", **more):
    return json.dumps({"success": False, "error": {"code": code, "message": message, **more}})


ZDR = "No provider is available that keeps no data."
PLAN = "Your Go plan doesn't include API access. Upgrade at https://example.invalid/billing"

STATUSES = [    # (status, body, kind, our status, words of the message, retryable)
    (400, envelope("Invalid request error. HINT: expected \"auto\" at \"params.x\"", status=400),
     "invalid", 400, "params.x", False),
    (400, envelope("You have insufficient credits to go on."), "billing", 402, "credits", False),
    (402, envelope("Insufficient Balance"), "billing", 402, "Insufficient Balance", False),
    (402, "", "billing", 402, "402", False),
    (401, envelope("Invalid API key", "UNAUTHORIZED"), "authentication", 401, "Invalid", False),
    (403, envelope("Model is above your plan", "MODEL_NOT_IN_PLAN"), "plan", 403, "plan", False),
    (403, envelope("no more", "PREMIUM_CREDITS_EXHAUSTED"), "billing", 402, "no more", False),
    (403, envelope("Model/provider not recognized: anthropic:foo"), "model", 404, "foo", False),
    (403, json.dumps({"error": {"message": "Authentication failed. Please check your credentials.",
                                "type": "permission_error"}}),
     "permission", 403, "Authentication failed", False),
    (403, json.dumps({"error": {"message": PLAN, "code": "upgrade_required"}}), "plan", 403,
     "Go plan", False),
    (404, envelope("no such route"), "not_found", 404, "no such route", False),
    (400, envelope("unsupported_model"), "model", 404, "unsupported_model", False),
    (422, envelope(ZDR, "CMD_ZDR_NO_PROVIDERS"), "unprocessable", 422, ZDR, False),
    (413, "too big", "too_large", 413, "too big", False),
    (429, envelope("user concurrency limit exceeded", "RATE_LIMITED"), "rate_limit", 429,
     "concurrency", True),
    (429, envelope("You've reached your 5-hour usage limit"), "usage_window", 429, "5-hour", False),
    (429, envelope("You've reached your weekly usage limit"), "usage_window", 429, "weekly", False),
    (408, "", "timeout", 504, "408", True),
    (504, "", "timeout", 504, "504", True),
    (500, envelope("oops", "INTERNAL"), "upstream", 502, "oops", True),
    (502, "<html>bad gateway</html>", "upstream", 502, "502", True),
    (503, "upstream connect error", "unavailable", 503, "upstream connect error", True),
    (529, envelope("Overloaded"), "overloaded", 529, "Overloaded", True),
    (520, "", "upstream", 502, "520", True),
    (418, "", "invalid", 400, "418", False),
    (400, envelope("maximum context length is 5 tokens"), "too_long", 400, "prompt is too long",
     False),
    (400, envelope("prompt is too long: 9 tokens > 5 maximum"), "too_long", 400,
     "prompt is too long: 9 tokens > 5 maximum", False),
    (301, "", "upstream_final", 502, "redirect", False),
    (500, '{"error": "just words"}', "upstream", 502, "just words", True),
    (500, '{"message": "flat"}', "upstream", 502, "flat", True),
    (500, '{"error": null, "message": "beside"}', "upstream", 502, "beside", True),
    (500, '{"error": {', "upstream", 502, "500", True),
    (500, "[1]", "upstream", 502, "", True),
    (500, '{"error": {"message": 5}}', "upstream", 502, "5", True),
    (500, '{"error": {"message": {"a": 1}, "code": {"b": 2}}}', "upstream", 502, "", True)]


@pytest.mark.parametrize("status,body,kind,ours,words,retryable", STATUSES,
                         ids=["%d-%d" % (row[0], at) for at, row in enumerate(STATUSES)])
def test_statuses(status, body, kind, ours, words, retryable):
    error = ccproxy.read_upstream_failure(status, {"x-trace-id": "a" * 32}, body.encode())
    assert (error.kind, error.status, error.retryable) == (kind, ours, retryable)
    assert words in error.message and error.message and error.trace_id == "a" * 32
    assert "html" not in error.message
    useless = ("x-should-retry", "false") in ccproxy.error_fields(error)
    assert useless != retryable


def test_prefix_of_too_long_stands_once():
    for said in ("prompt is too long: 9 > 5", "Prompt is too long", "input is too long"):
        error = ccproxy.read_upstream_failure(400, {}, envelope(said).encode())
        assert error.message.lower().count("prompt is too long") == 1 and said in error.message


@pytest.mark.parametrize("body", [b"", b"\xff\xfe\x00", b"{" * 5000, b"null", b'"x"', b"\x00" * 9,
                                  b'{"error":' * 3000, b'{"a":' + b"9" * 5000 + b"}"],
                         ids=range(8))
@pytest.mark.parametrize("status", [400, 403, 429, 500, 503])
def test_no_body_breaks_it(status, body):
    error = ccproxy.read_upstream_failure(status, {}, body)
    assert error.message and len(error.message) <= 2100
    for face in (ccproxy.CHAT, ccproxy.MESSAGES):
        ccproxy.to_json(face.error(error))


RETRY_AFTER = [("2", 2), ("0", 0), ("1.5", 2), ("3600", 3600), ("99999999", 24 * 3600),
               ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None), ("", None), ("soon", None)]


@pytest.mark.parametrize("value,seconds", RETRY_AFTER)
def test_retry_after(value, seconds):
    """Passed on in the header and in the body, whole seconds."""
    error = ccproxy.read_upstream_failure(429, {"retry-after": value}, b"slow down")
    fields = dict(ccproxy.error_fields(error))
    assert fields.get("retry-after") == (None if seconds is None else str(seconds))
    for face in (ccproxy.CHAT, ccproxy.MESSAGES):
        assert face.error(error)["error"].get("retry_after") == seconds


def test_keys_are_not_shown():
    key = "user_abcDEF123abcDEF456"
    error = ccproxy.read_upstream_failure(401, {"x-trace-id": key}, envelope(
        "bad key %s" % key, "code " + key).encode())
    for face in (ccproxy.CHAT, ccproxy.MESSAGES):
        assert key not in json.dumps(face.error(error))
    assert "key:" in error.message


def test_what_is_known_is_in_both_error_shapes():
    error = ccproxy.read_upstream_failure(
        403, {"x-trace-id": "abc", "retry-after": "7"}, envelope("m", "MODEL_NOT_IN_PLAN").encode())
    extras = {"upstream_code": "MODEL_NOT_IN_PLAN", "retry_after": 7, "trace_id": "abc"}
    assert ccproxy.chat_error(error) == {"error": {
        "message": "m", "type": "permission_error", "param": None, "code": "model_not_in_plan",
        **extras}}
    assert ccproxy.messages_error(error) == {"type": "error", "error": {
        "type": "permission_error", "message": "m", **extras}}


EVENTS = [  # (the event's members, kind, our status, words of the message, retryable)
    ({"error": "boom"}, "upstream", 502, "boom", True),
    ({"error": {"type": "server_error", "message": "Insufficient Balance", "statusCode": 402}},
     "billing", 402, "Insufficient Balance", False),
    ({"error": {"message": "Network connection lost.", "statusCode": 503, "isRetryable": True}},
     "unavailable", 503, "lost", True),
    ({"error": {"message": "providers are currently at capacity", "statusCode": 429}},
     "rate_limit", 429, "capacity", True),
    ({"error": {"message": "x", "statusCode": 503, "isRetryable": False}}, "unavailable", 503,
     "x", False),
    ({"error": {"message": "x", "isRetryable": False}}, "upstream", 502, "x", False),
    ({"error": {"message": "Overloaded", "statusCode": 529}}, "overloaded", 529, "Over", True),
    ({"error": {"message": "terminated"}}, "upstream", 502, "terminated", True),
    ({"error": {"message": "prompt is too long: 9 tokens > 5 maximum", "statusCode": 400}},
     "too_long", 400, "prompt is too long: 9", False),
    ({"error": '403 {"success":false,"error":{"code":"PREMIUM_CREDITS_EXHAUSTED","status":403,'
               '"message":"premium_credits_exhausted"}}'}, "billing", 402, "premium", False),
    ({"error": '403 {"error":{"code":"MODEL_NOT_IN_PLAN","message":"no"}}'}, "plan", 403, "no",
     False),
    ({"error": '429 {"error":{"code":"RATE_LIMITED","message":"slow"}}'}, "rate_limit", 429,
     "slow", True),
    ({"error": '500 {"error":'}, "upstream", 502, "500", True),
    ({"error": "something about model_not_in_plan here"}, "plan", 403, "here", False),
    ({"error": "You have Insufficient Credits"}, "billing", 402, "Insufficient", False),
    ({"error": {"message": '403 {"error":{"code":"MODEL_NOT_IN_PLAN","message":"deep"}}'}},
     "plan", 403, "deep", False),
    ({"error": {"name": "AI_APICallError", "message": "Invalid error response format: Gateway "
                "request failed"}}, "upstream", 502, "Gateway request failed", True),
    ({"error": {}}, "upstream", 502, "", True),
    ({"message": "beside"}, "upstream", 502, "beside", True),
    ({"error": None, "message": "beside"}, "upstream", 502, "beside", True),
    ({"error": 5}, "upstream", 502, "5", True),
    ({"error": ["a"]}, "upstream", 502, "a", True),
    ({"error": {"message": "x", "statusCode": "503"}}, "upstream", 502, "x", True),
    ({"error": {"message": "x", "statusCode": 200}}, "upstream", 502, "x", True),
    ({"error": {"message": "x", "statusCode": True, "code": 7}}, "upstream", 502, "x", True)]


@pytest.mark.parametrize("members,kind,ours,words,retryable", EVENTS, ids=range(len(EVENTS)))
def test_error_events(members, kind, ours, words, retryable):
    answer = new_answer("chat")
    run(answer, ndjson({"type": "start"}, {"type": "error", **members}))
    error = answer.error
    assert (error.kind, error.status, error.retryable) == (kind, ours, retryable)
    assert words in error.message and error.message not in ("", "None")


def test_an_error_without_any_word_still_says_something():
    answer = new_answer("chat")
    run(answer, ndjson({"type": "error", "error": None}))
    assert "None" not in answer.error.message and len(answer.error.message) > 10


# The same error in a head and in a stream, in all three formats.

FORMATS = {"alpha": ccproxy.ALPHA, "openai": ccproxy.OPENAI, "anthropic": ccproxy.ANTHROPIC}


def in_head(name, status, error):
    body = json.dumps({"type": "error", "error": error}).encode()
    return FORMATS[name].read_failure(status, {}, body)


def in_stream(name, error):
    event = {"error": error} if name == "openai" else {"type": "error", "error": error}
    if name != "alpha":
        data = b"data: %b\n\n" % json.dumps(event).encode()
        return run_stream(FORMATS[name], "chat", data)[0].error
    answer = new_answer("chat")
    run(answer, ndjson(event))
    return answer.error


BEDROCK = "Too many tokens, please wait before trying again."
SAME = [    # (status of the head, error without a status, kind, our status, tried again)
    (429, {"message": "x", "type": "insufficient_quota", "code": "insufficient_quota"}, "billing",
     402, False),
    (429, {"message": "x", "type": "insufficient_quota", "code": None}, "billing", 402, False),
    (500, {"message": "x", "code": "insufficient_quota"}, "billing", 402, False),
    (402, {"message": "Insufficient Balance", "code": "invalid_request_error"}, "billing", 402,
     False),
    (402, {"message": "x", "type": "billing_error"}, "billing", 402, False),
    (403, {"message": "x", "code": "PREMIUM_CREDITS_EXHAUSTED"}, "billing", 402, False),
    (403, {"message": "x", "code": "MODEL_NOT_IN_PLAN"}, "plan", 403, False),
    (403, {"message": "x", "code": "USAGE_EXCEEDED"}, "permission", 403, False),
    (400, {"message": "x", "type": "invalid_request_error", "code": "context_length_exceeded"},
     "too_long", 400, False),
    (500, {"message": "x", "code": "context_length_exceeded"}, "too_long", 400, False),
    (400, {"message": "prompt is too long: 9", "type": "invalid_request_error"}, "too_long", 400,
     False),
    (404, {"message": "x", "type": "invalid_request_error", "code": "model_not_found"}, "model",
     404, False),
    (403, {"message": "x", "code": "model_not_found"}, "model", 404, False),
    (429, {"message": "x", "type": "usage_limit_reached"}, "usage_window", 429, False),
    (429, {"message": "You've reached your weekly usage limit", "code": "RATE_LIMITED"},
     "usage_window", 429, False),
    (429, {"message": BEDROCK, "code": "rate_limit_exceeded"}, "rate_limit", 429, True),
    (429, {"message": BEDROCK, "type": "rate_limit_error"}, "rate_limit", 429, True),
    (429, {"message": BEDROCK, "name": "ThrottlingException"}, "rate_limit", 429, True),
    (503, {"message": BEDROCK, "code": 503}, "unavailable", 503, True),
    (503, {"message": BEDROCK, "type": "service_unavailable"}, "unavailable", 503, True),
    (529, {"message": "Overloaded", "type": "overloaded_error"}, "overloaded", 529, True),
    (500, {"message": "The context window broke", "type": "api_error"}, "upstream", 502, True),
    (502, {"message": "unknown model error"}, "upstream", 502, True),
    (500, {"message": BEDROCK}, "upstream", 502, True),
    (500, {"message": "The usage limit service is down", "type": "server_error"}, "upstream", 502,
     True),
    (403, {"message": "No: usage limit", "type": "permission_error"}, "permission", 403, False),
    (401, {"message": "x", "type": "authentication_error"}, "authentication", 401, False),
    (401, {"message": "x", "code": "invalid_api_key"}, "authentication", 401, False),
    (401, {"message": "x", "code": "UNAUTHORIZED"}, "authentication", 401, False),
    (403, {"message": "x", "code": "FORBIDDEN"}, "permission", 403, False),
    (403, {"message": "Model/provider not recognized: anthropic:x", "code": "FORBIDDEN"}, "model",
     404, False),
    (404, {"message": "x", "code": "NOT_FOUND"}, "not_found", 404, False),
    (422, {"message": "x", "code": "CMD_ZDR_NO_PROVIDERS"}, "unprocessable", 422, False),
    (400, {"message": "x", "code": "BAD_REQUEST"}, "invalid", 400, False),
    (413, {"message": "x", "type": "request_too_large"}, "too_large", 413, False),
    (400, {"message": '403 {"error":{"code":"MODEL_NOT_IN_PLAN","message":"deep"}}'}, "plan", 403,
     False)]


@pytest.mark.parametrize("status,error,kind,ours,again", SAME, ids=range(len(SAME)))
@pytest.mark.parametrize("name", FORMATS)
def test_the_same_error_in_a_head_and_in_a_stream(name, status, error, kind, ours, again):
    found = [in_head(name, status, error), in_stream(name, error)]
    if name == "alpha":
        found.append(in_stream(name, {**error, "statusCode": status}))
    for one in found:
        assert (one.kind, one.status, one.retryable) == (kind, ours, again)
        assert (("x-should-retry", "false") in ccproxy.error_fields(one)) is not again


NEVER_AGAIN = ("billing", "plan", "model", "usage_window")


@pytest.mark.parametrize("name", FORMATS)
def test_what_an_upstream_says_of_trying_again(name):
    """`isRetryable` counts whatever the status, but for those of a key and four kinds."""
    codes = [None, "context_length_exceeded", "insufficient_quota", "MODEL_NOT_IN_PLAN",
             "model_not_found", "usage_limit_reached"]
    for status in range(400, 600):
        for code in codes:
            said = {"message": "x", **({"code": code} if code else {})}
            for retryable in (True, False):
                error = {**said, "isRetryable": retryable}
                found = [in_head(name, status, error)]
                if name == "alpha":
                    found.append(in_stream(name, {**error, "statusCode": status}))
                for one in found:
                    final = status in (401, 402, 403) or one.kind in NEVER_AGAIN
                    assert one.retryable is (retryable and not final), (status, code)
                    useless = ("x-should-retry", "false") in ccproxy.error_fields(one)
                    assert useless is not one.retryable


def test_an_error_that_names_no_status():
    for said in ("boom", {"message": "boom"}, {"message": "x", "statusCode": 200}, 5, ["a"], {},
                 {"message": "x", "statusCode": True}, {"message": "x", "type": "AI_APICallError"}):
        assert ccproxy.decode_error(said)[0] is None
    for said, status in ((('429 {"error":{"code":"X"}}'), 429), ({"statusCode": 402}, 402),
                         ({"status": 418}, 418), ({"code": 503}, 503), ("503 sorry", 503),
                         ('403 {"error":{"status":404}}', 404), ({"type": "api_error"}, 500),
                         ({"message": '429 {"error":{"message":"a"}}'}, 429),
                         ({"statusCode": 402, "type": "server_error"}, 402)):
        assert ccproxy.decode_error(said)[0] == status


def test_an_envelope_within_other_text():
    """Gemini's endpoint for OpenAI clients answers with a list; gateways add words behind it."""
    for text in ('[{"error": {"code": 429, "message": "slow", "status": "RESOURCE_EXHAUSTED"}}]',
                 'failed: {"error": {"code": 429, "message": "slow"}} (attempt 1)'):
        error = ccproxy.read_upstream_failure(429, {}, text.encode())
        assert (error.kind, error.message) == ("rate_limit", "slow")
