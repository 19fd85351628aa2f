"""ERRORS: which failure is meant, and what a client is told."""
from __future__ import annotations

import pytest
from harness import ccproxy

ANTHROPIC_TYPES = {
    "invalid_request_error", "authentication_error", "billing_error", "permission_error",
    "not_found_error", "request_too_large", "rate_limit_error", "timeout_error", "api_error",
    "overloaded_error"}


def by_kind(kind):
    return ccproxy.KINDS[kind]


UPSTREAM_FAILURES = [
    # (upstream status, its code, its message) -> (our status, Anthropic type, OpenAI code, repeat)
    ((400, "BAD_REQUEST", "Invalid request error. Often missing required parameters or typo."),
     (400, "invalid_request_error", None, False)),
    ((400, "BAD_REQUEST", "insufficient credits: top up"),
     (402, "billing_error", "insufficient_quota", False)),
    ((400, "", "You have INSUFFICIENT CREDITS left"),
     (402, "billing_error", "insufficient_quota", False)),
    ((401, "UNAUTHORIZED", "bad key"), (401, "authentication_error", "invalid_api_key", False)),
    ((402, "", ""), (402, "billing_error", "insufficient_quota", False)),
    ((402, "server_error", "Insufficient Balance"),
     (402, "billing_error", "insufficient_quota", False)),
    ((403, "MODEL_NOT_IN_PLAN", "GPT-6 Astra is not part of your plan"),
     (403, "permission_error", "model_not_in_plan", False)),
    ((403, "PREMIUM_CREDITS_EXHAUSTED", "empty"),
     (402, "billing_error", "insufficient_quota", False)),
    ((403, "", "Model/provider not recognized: anthropic:claude-x"),
     (404, "not_found_error", "model_not_found", False)),
    ((400, "unsupported_model", "no such model"),
     (404, "not_found_error", "model_not_found", False)),
    ((403, "USAGE_EXCEEDED", "Spend cap reached"),
     (403, "permission_error", "permission_denied", False)),
    ((403, "permission_error", "Authentication failed. Please check your credentials."),
     (403, "permission_error", "permission_denied", False)),
    ((403, "upgrade_required", "Your Go plan doesn't include API access."),
     (403, "permission_error", "model_not_in_plan", False)),
    ((404, "", ""), (404, "not_found_error", "not_found", False)),
    ((408, "", ""), (504, "timeout_error", "timeout", True)),
    ((413, "", "too big"), (413, "request_too_large", "request_too_large", False)),
    ((413, "", "Prompt is too long"),
     (400, "invalid_request_error", "context_length_exceeded", False)),
    ((400, "context_length_exceeded", "too much"),
     (400, "invalid_request_error", "context_length_exceeded", False)),
    ((400, "", "prompt is too long: 250000 tokens > 200000 maximum"),
     (400, "invalid_request_error", "context_length_exceeded", False)),
    ((422, "CMD_ZDR_NO_PROVIDERS", "no such upstream"),
     (422, "invalid_request_error", "unprocessable", False)),
    ((429, "RATE_LIMITED", "user concurrency limit exceeded"),
     (429, "rate_limit_error", "rate_limit_exceeded", True)),
    ((429, "", "providers are currently at capacity"),
     (429, "rate_limit_error", "rate_limit_exceeded", True)),
    ((429, "RATE_LIMITED", "You've reached your weekly usage limit"),
     (429, "rate_limit_error", "usage_limit_reached", False)),
    ((429, "RATE_LIMITED", "You've reached your 5-hour usage limit"),
     (429, "rate_limit_error", "usage_limit_reached", False)),
    ((500, "", ""), (502, "api_error", "upstream_error", True)),
    ((501, "", ""), (502, "api_error", "upstream_error", True)),
    ((502, "", "Network connection lost."), (502, "api_error", "upstream_error", True)),
    ((503, "", "Service Unavailable"), (503, "overloaded_error", "service_unavailable", True)),
    ((504, "", ""), (504, "timeout_error", "timeout", True)),
    ((529, "overloaded_error", "Overloaded"), (529, "overloaded_error", "overloaded", True)),
    # An error event need not carry a status: markers count anywhere in its text, in any case.
    ((None, "", "upstream said: Premium_Credits_Exhausted"),
     (402, "billing_error", "insufficient_quota", False)),
    ((None, "", "gateway: model_NOT_in_plan"), (403, "permission_error", "model_not_in_plan",
                                                False)),
    ((None, "", "insufficient credits"), (402, "billing_error", "insufficient_quota", False)),
    ((None, "", "You've reached your weekly usage limit"),
     (429, "rate_limit_error", "usage_limit_reached", False)),
    ((None, "", "prompt is too long"),
     (400, "invalid_request_error", "context_length_exceeded", False)),
    ((None, "", "boom"), (502, "api_error", "upstream_error", True)),
    # Statuses that no row names.
    ((418, "", "teapot"), (400, "invalid_request_error", None, False)),
    ((409, "", ""), (400, "invalid_request_error", None, False)),
    ((599, "", ""), (502, "api_error", "upstream_error", True)),
    ((0, "", ""), (502, "api_error", "upstream_error", True)),
]


@pytest.mark.parametrize("failure, expected", UPSTREAM_FAILURES)
def test_what_an_upstream_failure_means(failure, expected):
    status, anthropic, code, again = expected
    error = ccproxy.ProxyError(ccproxy.classify_failure(*failure), "x")
    row = by_kind(error.kind)
    assert (error.status, row.anthropic, row.code) == (status, anthropic, code)
    assert error.retryable is again


# Words, and the statuses in which they say more than the status does (None: none was told).
BEDROCK = "Too many tokens, please wait before trying again."
REFINED = [
    ("too_long", (400, 413, None), ["prompt is too long: 9 > 5", "exceeds the context window",
                                    "context_length_exceeded", "too many input tokens",
                                    "Your request exceeded model token limit: 5 (requested: 9)"]),
    ("too_long", (), [BEDROCK, "Throttling error: " + BEDROCK, "Too many tokens per day"]),
    ("billing", (400, 402, 403, 429, None), ["Insufficient credits", "insufficient balance",
                                             "Your credit balance is too low",
                                             "premium_credits_exhausted: buy more"]),
    ("plan", (400, 403, None), ["model_not_in_plan", "upgrade_required"]),
    ("model", (400, 403, 404, None), ["Model/provider not recognized: anthropic:x",
                                      "unknown model x"]),
    ("model", (), ["unknown model error"]),
    ("usage_window", (429, None), ["You've reached your 5-hour usage limit"])]
EVERY_STATUS = [None, *(status for status in range(400, 600))]


@pytest.mark.parametrize("kind, refined, message", [
    (kind, refined, message) for kind, refined, messages in REFINED for message in messages])
def test_words_refine_some_statuses_and_outrank_none(kind, refined, message):
    for status in EVERY_STATUS:
        plain = ccproxy.classify_failure(status, "", "")
        expected = kind if status in refined else plain
        assert ccproxy.classify_failure(status, "", message) == expected, status
        # a code that only says what a status says decides nothing beside one
        assert ccproxy.classify_failure(status, "invalid_request_error", message) == expected


@pytest.mark.parametrize("code, kind", [
    ("insufficient_quota", "billing"), ("PREMIUM_CREDITS_EXHAUSTED", "billing"),
    ("billing_error", "billing"), ("MODEL_NOT_IN_PLAN", "plan"), ("upgrade_required", "plan"),
    ("context_length_exceeded", "too_long"), ("model_not_found", "model"),
    ("unsupported_model", "model"), ("usage_limit_reached", "usage_window")])
def test_codes_count_in_any_status(code, kind):
    for status in EVERY_STATUS:
        for word in (code, code.upper(), code.lower()):
            assert ccproxy.classify_failure(status, word, "words") == kind
        plain = ccproxy.classify_failure(status, "", "")        # the whole code, no word in it
        assert ccproxy.classify_failure(status, "not_%s_at_all" % code, "") == plain


def test_every_row_that_looks_for_words_names_what_they_refine():
    for row in ccproxy.FAILURES:
        assert bool(row.words) == bool(row.refines)
        assert all(code == code.lower() for code in row.codes)
    codes = [code for row in ccproxy.FAILURES for code in row.codes]
    assert len(codes) == len(set(codes)) and not set(codes) & set(ccproxy.NAME_STATUSES)


@pytest.mark.parametrize("status, never", [
    (402, 429), (403, 401), (400, 401), (401, 403), (429, 402), (529, 500), (503, 500)])
def test_what_must_not_be_taken_for_something_else(status, never):
    assert by_kind(ccproxy.classify_failure(status, "", "")).status == status != never


@pytest.mark.parametrize("row", ccproxy.FAILURES, ids=lambda row: row.kind)
def test_every_row_can_be_told(row):
    assert row.status in ccproxy.REASONS
    assert row.anthropic in ANTHROPIC_TYPES
    assert row.openai and row.openai == row.openai.lower()
    assert row.again in (ccproxy.NEVER, ccproxy.CLIENT, ccproxy.BOTH)
    if 400 <= row.status < 500 and row.status not in (408, 429):
        assert row.again == ccproxy.NEVER       # the same request fails the same way


def test_each_kind_is_one_row():
    kinds = [row.kind for row in ccproxy.FAILURES]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("kind, status", [
    ("invalid", 400), ("authentication", 401), ("billing", 402), ("permission", 403),
    ("not_found", 404), ("method", 405), ("slow_client", 408), ("length_required", 411),
    ("too_large", 413), ("target_too_long", 414), ("encoding", 415), ("expectation", 417),
    ("head_too_large", 431), ("internal", 500), ("not_implemented", 501), ("upstream", 502),
    ("upstream_final", 502), ("empty", 502), ("busy", 503), ("timeout", 504), ("late", 504),
    ("http_version", 505)])
def test_the_status_of_each_kind(kind, status):
    assert ccproxy.ProxyError(kind, "x").status == status


def test_an_unknown_kind_is_a_mistake_of_ours():
    with pytest.raises(KeyError):
        ccproxy.ProxyError("nonsense", "x")


def test_what_an_error_knows():
    bare = ccproxy.ProxyError("rate_limit", "slow down")
    assert (str(bare), bare.message, bare.kind, bare.status) == ("slow down", "slow down",
                                                                 "rate_limit", 429)
    assert (bare.code, bare.param, bare.details, bare.retry_after, bare.trace_id) == (None,) * 5
    told = ccproxy.ProxyError("upstream", "x", status=599, code="C", param="a.b", details={"a": 1},
                              retry_after=2.5, retryable=False, trace_id="t")
    assert (told.status, told.code, told.param, told.details, told.retry_after, told.retryable,
            told.trace_id) == (599, "C", "a.b", {"a": 1}, 2.5, False, "t")


@pytest.mark.parametrize("kind, known, expected", [
    ("invalid", {}, {"x-should-retry": "false"}),
    ("billing", {}, {"x-should-retry": "false"}),
    ("empty", {}, {"x-should-retry": "false"}),
    ("upstream_final", {}, {"x-should-retry": "false"}),
    ("usage_window", {"retry_after": 3600.0}, {"x-should-retry": "false", "retry-after": "3600"}),
    ("authentication", {}, {"x-should-retry": "false",
                            "www-authenticate": 'Bearer realm="Command Code"'}),
    ("rate_limit", {}, {}),
    ("rate_limit", {"retry_after": 7.0}, {"retry-after": "7"}),
    ("rate_limit", {"retry_after": 0.2}, {"retry-after": "1"}),     # rounded up, never to 0
    ("rate_limit", {"retry_after": 2.0001}, {"retry-after": "3"}),
    ("rate_limit", {"retry_after": 0.0}, {"retry-after": "0"}),
    ("rate_limit", {"retryable": False}, {"x-should-retry": "false"}),
    ("upstream", {}, {}),
    ("upstream", {"retryable": False}, {"x-should-retry": "false"}),
    ("unavailable", {"retry_after": 5.0}, {"retry-after": "5"}),
    ("busy", {"retry_after": 1.0}, {"retry-after": "1"}),
    ("invalid", {"retryable": True}, {}),   # an upstream that says so
    ("late", {}, {}),                       # the client may, we do not
    ("internal", {}, {}),
])
def test_headers_of_an_error(kind, known, expected):
    fields = ccproxy.error_fields(ccproxy.ProxyError(kind, "x", **known))
    assert dict(fields) == expected
    assert len(fields) == len(expected)


@pytest.mark.parametrize("known, expected", [
    ({}, {}),
    ({"code": "MODEL_NOT_IN_PLAN"}, {"upstream_code": "MODEL_NOT_IN_PLAN"}),
    ({"retry_after": 1.2}, {"retry_after": 2}),
    ({"retry_after": 0.0}, {"retry_after": 0}),
    ({"trace_id": "t", "details": {"a": 1}, "param": "x"}, {"trace_id": "t", "details": {"a": 1}}),
])
def test_extras_of_an_error(known, expected):
    assert ccproxy.error_extras(ccproxy.ProxyError("upstream", "x", **known)) == expected
