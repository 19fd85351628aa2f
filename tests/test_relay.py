"""Answers on their way over real sockets: errors with true statuses, retries, silence, goodbyes."""
from __future__ import annotations

import json
import re
import socket
import threading
import time

import pytest
from fake_upstream import (CHUNKED_HEAD, chunked, ndjson, raw, recorded, reset, stall, status,
                           stream, text_answer)
from harness import (CHAT, FAST, KEY, MESSAGES, fold_chat, fold_messages, parse_answers,
                     post_bytes, read_all, read_until, wait_until)
from pure import read_as_old_go

TRACE = "0123456789abcdef0123456789abcdef"
PATIENT = FAST._replace(backoff=(30.0, 30.0))


@pytest.fixture
def proxy(make_proxy):
    return make_proxy(useProviderModels=False)


def envelope(code, message, number=400):
    return {"success": False, "error": {"code": code, "status": number, "message": message,
                                        "docs": "https://docs.example/errors"}}


BEDROCK = "Too many tokens, please wait before trying again."

# Errors before any output, by UPSTREAM 7: the upstream's status and body, and what a client gets:
# status, Anthropic's error.type, OpenAI's error.code, calls made, whether x-should-retry: false.

ERRORS = [
    ("schema", 400, envelope("BAD_REQUEST", 'Invalid input: expected "auto"'),
     400, "invalid_request_error", None, 1, True),
    ("out of credit", 400, envelope("BAD_REQUEST", "You have insufficient credits left."),
     402, "billing_error", "insufficient_quota", 1, True),
    ("bad key", 401, envelope("UNAUTHORIZED", "Invalid API key"),
     401, "authentication_error", "invalid_api_key", 1, True),
    ("payment", 402, envelope("PAYMENT_REQUIRED", "Insufficient Balance"),
     402, "billing_error", "insufficient_quota", 1, True),
    ("plan", 403, envelope("MODEL_NOT_IN_PLAN", "Upgrade your plan"),
     403, "permission_error", "model_not_in_plan", 1, True),
    ("premium", 403, envelope("PREMIUM_CREDITS_EXHAUSTED", "No premium credits"),
     402, "billing_error", "insufficient_quota", 1, True),
    ("unknown model", 403, envelope("FORBIDDEN", "Model/provider not recognized: anthropic:x"),
     404, "not_found_error", "model_not_found", 1, True),
    ("org cap", 403, envelope("USAGE_EXCEEDED", "Spend cap reached"),
     403, "permission_error", "permission_denied", 1, True),
    ("geography", 403, {"error": {"message": "Authentication failed. Please check your "
                                             "credentials.", "type": "permission_error"}},
     403, "permission_error", "permission_denied", 1, True),
    ("no such route", 404, b"", 404, "not_found_error", "not_found", 1, True),
    ("zero retention", 422, envelope("CMD_ZDR_NO_PROVIDERS", "No providers"),
     422, "invalid_request_error", "unprocessable", 1, True),
    ("too large", 413, envelope("TOO_LARGE", "Body too large"),
     413, "request_too_large", "request_too_large", 1, True),
    ("too long", 400, envelope("BAD_REQUEST", "prompt is too long: 300000 tokens > 200000 maximum"),
     400, "invalid_request_error", "context_length_exceeded", 1, True),
    ("rate", 429, envelope("RATE_LIMITED", "user concurrency limit exceeded"),
     429, "rate_limit_error", "rate_limit_exceeded", 3, False),
    ("window", 429, envelope("RATE_LIMITED", "You've reached your 5-hour usage limit"),
     429, "rate_limit_error", "usage_limit_reached", 1, True),
    ("quota", 429, {"error": {"message": "You exceeded your current quota", "type":
                              "insufficient_quota", "code": "insufficient_quota"}},
     402, "billing_error", "insufficient_quota", 1, True),
    ("throttled, 429", 429, envelope("RATE_LIMITED", BEDROCK),
     429, "rate_limit_error", "rate_limit_exceeded", 3, False),
    ("throttled, 503", 503, envelope("UNAVAILABLE", BEDROCK),
     503, "overloaded_error", "service_unavailable", 3, False),
    ("a window in a 500", 500, envelope("INTERNAL", "The context window broke"),
     502, "api_error", "upstream_error", 3, False),
    ("a model in a 502", 502, envelope("INTERNAL", "unknown model error"),
     502, "api_error", "upstream_error", 3, False),
    ("a limit in a 403", 403, envelope("FORBIDDEN", "Set a usage limit first"),
     403, "permission_error", "permission_denied", 1, True),
    ("said to be retryable, 400", 400, {"error": {"message": "Try again", "isRetryable": True}},
     400, "invalid_request_error", None, 3, False),
    ("said to be retryable, 403", 403, {"error": {"message": "Try again", "isRetryable": True}},
     403, "permission_error", "permission_denied", 1, True),
    ("timeout", 408, b"", 504, "timeout_error", "timeout", 3, False),
    ("server", 500, envelope("INTERNAL", "Oops"), 502, "api_error", "upstream_error", 3, False),
    ("gateway", 502, b"<html>Bad gateway</html>", 502, "api_error", "upstream_error", 3, False),
    ("unavailable", 503, b"try later", 503, "overloaded_error", "service_unavailable", 3, False),
    ("gateway timeout", 504, b"", 504, "timeout_error", "timeout", 3, False),
    ("overloaded", 529, b"", 529, "overloaded_error", "overloaded", 3, False),
]


@pytest.mark.parametrize("given, body, expected, kind, code, tries, final",
                         [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_errors_before_any_output(proxy, upstream, given, body, expected, kind, code, tries,
                                  final):
    upstream.default = status(given, body, "x-trace-id: %s\r\n" % TRACE)
    for path in (CHAT, MESSAGES):
        for streamed in (True, False):
            del upstream.requests[:]
            answer = proxy.post(path, stream=streamed)
            assert answer.status == expected
            assert answer.fields["content-type"] == "application/json"
            assert answer.fields.get("x-should-retry") == ("false" if final else None)
            error = answer.json["error"]
            assert error["type"] == kind if path == MESSAGES else error["code"] == code
            assert (answer.json.get("type") == "error") is (path == MESSAGES)
            assert error["trace_id"] == TRACE
            assert "retry_after" not in error and "retry-after" not in answer.fields
            if isinstance(body, dict):
                assert error["message"] == body["error"]["message"]
            assert len(upstream.requests) == tries
    assert "trace=" + TRACE in proxy.log.getvalue()


def error_event(error):
    return ndjson({"type": "start"}, {"type": "error", "error": error})


EVENTS = [
    ("balance", {"type": "server_error", "message": "Insufficient Balance", "statusCode": 402,
                 "isRetryable": False}, 402, "billing_error", 1),
    ("balance, said to be retryable", {"message": "Insufficient credits", "isRetryable": True},
     402, "billing_error", 1),
    ("marker in a string", "403 %s" % json.dumps(envelope("MODEL_NOT_IN_PLAN", "No", 403)),
     403, "permission_error", 1),
    ("envelope in a string", "429 %s" % json.dumps(envelope("RATE_LIMITED", "slow", 429)),
     429, "rate_limit_error", 3),
    ("capacity", {"message": "providers are currently at capacity", "statusCode": 429,
                  "isRetryable": True}, 429, "rate_limit_error", 3),
    ("a string", "Network connection lost.", 502, "api_error", 3),
    ("gateway", {"message": "Invalid error response format: Gateway request failed"},
     502, "api_error", 3),
    ("not retryable", {"message": "terminated", "isRetryable": False}, 502, "api_error", 1),
    ("not retryable, 503", {"message": "x", "statusCode": 503, "isRetryable": False},
     503, "overloaded_error", 1),
    ("retryable, 400", {"message": "x", "statusCode": 400, "isRetryable": True}, 400,
     "invalid_request_error", 3),
    ("retryable, 402", {"message": "x", "statusCode": 402, "isRetryable": True}, 402,
     "billing_error", 1),
    ("retryable, without a plan", {"message": "x", "code": "MODEL_NOT_IN_PLAN",
                                   "isRetryable": True}, 403, "permission_error", 1),
    ("a throttle's words", {"message": BEDROCK}, 502, "api_error", 3),
    ("a throttle's name", {"message": BEDROCK, "name": "ThrottlingException"}, 429,
     "rate_limit_error", 3),
    ("quota", {"message": "x", "code": "insufficient_quota"}, 402, "billing_error", 1),
    ("nothing", None, 502, "api_error", 3),
]


@pytest.mark.parametrize("error, expected, kind, tries", [row[1:] for row in EVENTS],
                         ids=[row[0] for row in EVENTS])
def test_error_events_before_any_output(proxy, upstream, error, expected, kind, tries):
    """An error inside a 200 is a real status as long as nothing went out."""
    upstream.default = stream(error_event(error) + text_answer("never")[17:])
    for path, streamed in ((MESSAGES, True), (CHAT, False)):
        del upstream.requests[:]
        answer = proxy.post(path, stream=streamed)
        assert answer.status == expected and len(upstream.requests) == tries
        assert answer.json["error"]["trace_id"] == TRACE and b"never" not in answer.body
        if path == MESSAGES:
            assert answer.json["error"]["type"] == kind
        if tries == 1:
            assert answer.fields["x-should-retry"] == "false"


@pytest.mark.parametrize("name", ["08", "13"])
def test_recorded_errors(proxy, upstream, name):
    upstream.default = stream(name)
    for path in (CHAT, MESSAGES):
        assert 400 <= proxy.post(path, stream=True).status < 500
    assert len(upstream.requests) == 2


# Retry-After.

LATER = "date: Fri, 20 Nov 2026 10:00:00 GMT\r\nretry-after: Fri, 20 Nov 2026 10:01:00 GMT\r\n"


@pytest.mark.parametrize("code, fields, shown, tries", [
    (429, "retry-after: 7\r\n", 7, 1), (503, "retry-after: 3\r\n", 3, 1),
    (529, "retry-after: 30\r\n", 30, 1), (429, "retry-after: 0\r\n", 0, 3),
    (503, "retry-after: 0\r\n", 0, 3), (429, "retry-after: soon\r\n", None, 3),
    (429, "retry-after: 999999999\r\n", 86400, 1), (429, LATER, 60, 1)],
    ids=["429", "503", "529", "429 now", "503 now", "nonsense", "absurd", "a date"])
def test_retry_after(proxy, upstream, code, fields, shown, tries):
    """A wait longer than two seconds is the client's decision: passed on, in both places."""
    upstream.default = status(code, {"error": {"message": "slow down"}}, fields)
    for path in (CHAT, MESSAGES):
        del upstream.requests[:]
        answer = proxy.post(path, stream=True)
        assert answer.status == code and len(upstream.requests) == tries
        assert answer.fields.get("retry-after") == (None if shown is None else str(shown))
        assert answer.json["error"].get("retry_after") == shown
        assert "x-should-retry" not in answer.fields


def test_a_short_retry_after_is_waited_for(make_proxy, upstream):
    upstream.scripts = [status(429, b"", "retry-after: 0.2\r\n")]
    proxy = make_proxy(useProviderModels=False)
    began = time.monotonic()
    assert proxy.post(CHAT).status == 200
    assert time.monotonic() - began >= 0.2 and len(upstream.requests) == 2


# Retries.

THINKING = ndjson({"type": "start"}, {"type": "reasoning-delta", "id": "r", "text": "Hmm"})
SOME_TEXT = ndjson({"type": "start"}, {"type": "text-delta", "id": "0", "text": "Half"})
SOME_CALL = ndjson({"type": "start"}, {"type": "tool-input-start", "id": "c", "toolName": "f"},
                   {"type": "tool-input-delta", "id": "c", "delta": '{"a":'})
LOST = {"type": "error", "error": {"message": "Network connection lost.", "isRetryable": True}}


@pytest.mark.parametrize("first", [status(503, b""), status(500, b""), status(408, b""), reset(),
                                   stream(ndjson(LOST)), stream(ndjson({"type": "start"}))],
                         ids=["503", "500", "408", "reset", "event", "no finish"])
def test_a_retry_is_the_same_request(proxy, upstream, first):
    upstream.scripts = [first, first]
    answer = proxy.post(MESSAGES, stream=True)
    assert answer.status == 200 and b"Hello" in answer.body
    bodies = [request.body for request in upstream.requests]
    assert len(bodies) == 3 and bodies[0] == bodies[1] == bodies[2]
    assert len({request.field("x-session-id") for request in upstream.requests}) == 1
    proxy.wait_quiet()
    assert "retries=2" in proxy.log.getvalue()


@pytest.mark.parametrize("end", [ndjson(LOST), None, b""], ids=["event", "reset", "no finish"])
@pytest.mark.parametrize("begin", [SOME_TEXT, SOME_CALL], ids=["text", "call"])
def test_nothing_is_repeated_after_text_or_a_call_was_shown(proxy, upstream, begin, end):
    """One error event comes last, and no fake end."""
    upstream.scripts = [stream(begin + end) if end is not None
                        else reset(CHUNKED_HEAD + chunked(begin))] * 2
    chat = proxy.post(CHAT, stream=True)
    assert chat.status == 200 and b"[DONE]" not in chat.body
    assert chat.frames[-1]["error"]["type"] == "server_error"
    assert all(not frame["choices"][0]["finish_reason"] for frame in chat.frames[:-1])
    messages = proxy.post(MESSAGES, stream=True)
    assert messages.frames[-1]["type"] == "error"
    assert messages.frames[-1]["error"]["type"] == "api_error"
    kinds = [frame["type"] for frame in messages.frames]
    assert kinds.count("error") == 1 and "message_stop" not in kinds
    assert "message_delta" not in kinds
    assert len(upstream.requests) == 2


def test_a_plain_answer_shows_nothing_early_and_so_is_repeated(proxy, upstream):
    upstream.scripts = [stream(SOME_TEXT + ndjson(LOST)), reset(CHUNKED_HEAD + chunked(SOME_CALL))]
    answer = proxy.post(CHAT)
    assert answer.json["choices"][0]["message"] == {"role": "assistant", "content": "Hello there"}
    assert answer.json["choices"][0]["finish_reason"] == "stop"
    assert len(upstream.requests) == 3


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_splice_after_thinking_only(proxy, upstream, path):
    """Thinking that was shown stays, the repeated call's is left out, its text follows."""
    again = ndjson({"type": "start"}, {"type": "reasoning-delta", "id": "r", "text": "Other"},
                   {"type": "text-delta", "id": "0", "text": "Done"},
                   {"type": "finish", "finishReason": "stop",
                    "totalUsage": {"inputTokens": 5, "outputTokens": 2}})
    upstream.scripts = [stream(THINKING + ndjson(LOST)), stream(again)]
    answer = proxy.post(path, stream=True, thinking={"type": "adaptive"})
    assert answer.status == 200 and len(upstream.requests) == 2
    if path == CHAT:
        message, reason, _ = fold_chat(answer.frames)
        assert message == {"content": "Done", "reasoning_content": "Hmm"} and reason == "stop"
    else:
        folded = fold_messages(answer.frames)
        assert [(block["type"], block.get("thinking", block.get("text")))
                for block in folded["content"]] == [("thinking", "Hmm"), ("text", "Done")]
        assert folded["stop_reason"] == "end_turn"


def test_the_last_failure_is_told_after_thinking(proxy, upstream):
    """Once the head went out an error can only be an event."""
    upstream.default = stream(THINKING + ndjson(LOST))
    answer = proxy.post(CHAT, stream=True)
    assert answer.status == 200 and len(upstream.requests) == 3
    assert answer.frames[-1]["error"]["message"] == "Network connection lost."
    assert answer.frames[-1]["error"]["trace_id"] == TRACE and b"[DONE]" not in answer.body


def test_recorded_streams_that_fail(proxy, upstream):
    """07 fails after text, 12 stops without finish: told in the stream, repeated when plain."""
    for name in ("07", "12"):
        upstream.scripts = [stream(name)]
        streamed = proxy.post(MESSAGES, stream=True)
        assert streamed.status == 200 and streamed.frames[-1]["type"] == "error"
        upstream.scripts = [stream(name)]
        assert proxy.post(MESSAGES).json["content"][0]["text"] == "Hello there"
    assert len(upstream.requests) == 6


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/responses"])
@pytest.mark.parametrize("script", [stream("07"), stream("12"), stream("07", end=False)],
                         ids=["told", "cut", "hung up"])
def test_the_connection_goes_on_behind_a_broken_stream(proxy, upstream, path, script):
    """Closed without a word, it would meet the next request of a client that keeps connections."""
    upstream.scripts = [script]
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    body = {"input": "hi"} if path == "/v1/responses" else body
    with proxy.connect() as sock:
        sock.sendall(post_bytes(path, {**body, "stream": True}))
        broken, = parse_answers(read_until(sock, b"\r\n0\r\n\r\n"))
        sock.sendall(post_bytes(path, body))
        assert broken.status == 200 and "error" in json.dumps(broken.frames[-1])
        assert "connection" not in broken.fields
        assert b"Hello there" in read_until(sock, b"Hello there")


# Silence.


def impatient(make_proxy, idle=0.1, silence=15.0, **options):
    return make_proxy(useProviderModels=False, upstreamIdleSeconds=idle,
                      limits=FAST._replace(silence=silence, sweep=0.02), **options)


STALLS = [("before the head", b""), ("in the head", b"HTTP/1.1 200 OK\r\nx"),
          ("before the first event", CHUNKED_HEAD),
          ("in the first line", CHUNKED_HEAD + b"fff\r\n" + SOME_TEXT[:20]),
          ("after start", CHUNKED_HEAD + chunked(ndjson({"type": "start"})))]


@pytest.mark.parametrize("sent, path", [
    (row[1], (CHAT, MESSAGES)[number % 2]) for number, row in enumerate(STALLS)],
    ids=[row[0] for row in STALLS])
def test_stalls_before_any_output_are_504(make_proxy, upstream, sent, path):
    """A timeout is never repeated; the upstream connection is given up."""
    upstream.default = stall(sent)
    proxy = impatient(make_proxy)
    answer = proxy.post(path, stream=path == CHAT)
    assert answer.status == 504
    assert "upstreamIdleSeconds" in answer.json["error"]["message"]
    assert answer.json["error"]["type"] == "timeout_error"
    assert len(upstream.requests) == 1
    wait_until(lambda: not upstream.open)


@pytest.mark.parametrize("sent", [row[1] for row in STALLS[::2]],
                         ids=[row[0] for row in STALLS[::2]])
def test_a_silent_stream_gets_comments(make_proxy, upstream, sent):
    """First the head and a comment, then more comments, then the error as the last event."""
    upstream.default = stall(sent)
    proxy = impatient(make_proxy, idle=0.15, silence=0.04)
    answer = proxy.post(MESSAGES, stream=True)
    assert answer.status == 200 and len(upstream.requests) == 1
    assert len(answer.comments) >= 2
    assert all(re.fullmatch("waiting [0-9]+s", comment) for comment in answer.comments)
    assert [frame["type"] for frame in answer.frames] == ["error"]
    assert answer.frames[0]["error"]["type"] == "timeout_error"
    assert b"ping" not in answer.body


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("shown", [False, True], ids=["before any output", "within it"])
def test_comments_to_old_go_clients_end_in_one_newline(make_proxy, upstream, path, shown):
    line = ndjson({"type": "text-delta", "id": "0", "text": "a"})
    upstream.default = stall(CHUNKED_HEAD + b"%x\r\n%b\r\n" % (len(line), line) if shown else b"")
    proxy = impatient(make_proxy, idle=0.15, silence=0.04)
    answer = proxy.post(path, stream=True, fields={"user-agent": "OpenAI/Go 1.12.0"})
    assert len(re.findall(rb"(?m)^: waiting [0-9]+s\n(?!\n)", answer.body)) >= 2
    events = read_as_old_go(answer.body)
    assert "error" in events[-1] and len(events) > 1 if shown else len(events) == 1


def test_comments_tell_how_long(make_proxy, upstream):
    upstream.default = stall()
    proxy = impatient(make_proxy, idle=0.6, silence=0.55)
    assert proxy.post(CHAT, stream=True).comments == ["waiting 1s"]


def test_a_plain_answer_goes_on_waiting(make_proxy, upstream):
    """No head and no comment goes out for it, however long it takes."""
    def slow(sock, request):
        time.sleep(0.12)
        stream(text_answer("late"))(sock, request)
    upstream.default = slow
    proxy = impatient(make_proxy, idle=5, silence=0.05)
    assert proxy.post(CHAT).json["choices"][0]["message"]["content"] == "late"
    upstream.default = status(402, {"error": {"message": "no"}})
    assert proxy.post(CHAT).status == 402


def test_an_answer_after_comments(make_proxy, upstream):
    def slow(sock, request):
        time.sleep(0.12)
        stream(text_answer("late", " but", " whole"), cut=30, pause=0.005)(sock, request)
    upstream.default = slow
    answer = impatient(make_proxy, idle=5, silence=0.05).post(CHAT, stream=True)
    assert answer.comments and fold_chat(answer.frames)[:2] == (
        {"content": "late but whole"}, "stop")
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_an_error_after_comments_is_an_event(make_proxy, upstream):
    def slow(sock, request):
        time.sleep(0.12)
        status(402, envelope("X", "Insufficient Balance"))(sock, request)
    upstream.default = slow
    answer = impatient(make_proxy, idle=5, silence=0.05).post(CHAT, stream=True)
    assert answer.status == 200 and answer.comments
    assert answer.frames[-1]["error"]["code"] == "insufficient_quota"
    assert b"[DONE]" not in answer.body


def test_a_stall_after_the_first_token(make_proxy, upstream):
    upstream.default = stall(CHUNKED_HEAD + chunked(SOME_TEXT))
    proxy = impatient(make_proxy, idle=0.12, silence=0.05)
    for path in (CHAT, MESSAGES):
        answer = proxy.post(path, stream=True)
        assert answer.status == 200 and b"Half" in answer.body and answer.comments
        last = answer.frames[-1]
        assert last["error"]["type"] == "timeout_error" and b"[DONE]" not in answer.body
        assert not any(frame.get("type") == "message_stop" for frame in answer.frames)
    assert len(upstream.requests) == 2
    wait_until(lambda: not upstream.open)


def trickle(head, piece, pause=0.02):
    """Bytes for ever, but never a whole line."""
    def run(sock, request):
        sock.sendall(head)
        while True:
            sock.sendall(piece)
            time.sleep(pause)
    return run


@pytest.mark.parametrize("script", [
    trickle(b"HTTP/1.1 200 OK\r\nx: ", b"y"), trickle(CHUNKED_HEAD, chunked(b"{")),
    trickle(CHUNKED_HEAD + chunked(ndjson({"type": "start"})), chunked(b" "))],
    ids=["head", "line", "later line"])
def test_bytes_without_a_whole_line_are_silence(make_proxy, upstream, script):
    upstream.default = script
    assert impatient(make_proxy).post(CHAT, stream=True).status == 504
    assert len(upstream.requests) == 1


def test_there_is_no_total_limit(make_proxy, upstream):
    """An answer may take many times the idle limit as long as lines come."""
    upstream.default = stream(text_answer(*"abcdefghijklmnopqrst"), cut=90, pause=0.03)
    answer = impatient(make_proxy, idle=0.2).post(CHAT, stream=True)
    assert fold_chat(answer.frames)[0]["content"] == "abcdefghijklmnopqrst"


# A client that leaves ends its upstream call, at every stage.


def slow_stream(sock, request, first=b""):
    sock.sendall(CHUNKED_HEAD + first)
    while True:
        sock.sendall(chunked(ndjson({"type": "text-delta", "id": "0", "text": "word "})))
        time.sleep(0.01)


LEAVING = [
    ("before the head", stall(), True), ("before the first event", stall(CHUNKED_HEAD), True),
    ("after the first token", stall(CHUNKED_HEAD + chunked(SOME_TEXT)), True),
    ("while it flows", slow_stream, True), ("plain, before the head", stall(), False),
    ("plain, while it flows", slow_stream, False),
    ("in an error's body", stall(b"HTTP/1.1 402 X\r\ncontent-length: 9\r\n\r\n{"), True)]


@pytest.mark.parametrize("script, streamed", [row[1:] for row in LEAVING],
                         ids=[row[0] for row in LEAVING])
def test_a_client_that_leaves(proxy, upstream, script, streamed):
    """With a FIN or a RST, streaming or not."""
    upstream.default = script
    for rude in (False, True):
        leave(proxy, upstream, script, streamed, rude)


def leave(proxy, upstream, script, streamed, rude):
    del upstream.requests[:]
    proxy.log.truncate(0)
    sock = proxy.send_post(CHAT, stream=streamed)
    wait_until(lambda: upstream.requests)
    if script is slow_stream and streamed:
        read_until(sock, b"word")
    time.sleep(0.02)
    assert upstream.open == 1 and proxy.app.exchanges
    if rude:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    wait_until(lambda: not upstream.open, 1.0)      # that is promised, on any machine
    proxy.wait_quiet()
    assert len(upstream.requests) == 1
    wait_until(lambda: "the client left" in proxy.log.getvalue())


def test_a_client_that_leaves_between_attempts(make_proxy, upstream):
    upstream.default = status(503, b"")
    proxy = make_proxy(limits=PATIENT, useProviderModels=False)
    sock = proxy.send_post(CHAT)
    wait_until(lambda: "retried: " in proxy.log.getvalue())
    sock.close()
    proxy.wait_quiet()
    assert len(upstream.requests) == 1


def test_a_client_that_leaves_while_connecting(make_proxy):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        proxy = make_proxy(apiBase="https://127.0.0.1:%d" % silent.getsockname()[1],
                           useProviderModels=False)
        sock = proxy.send_post(CHAT)
        taken, _ = silent.accept()
        assert taken.recv(65536)            # the beginning of a TLS handshake
        sock.close()
        taken.settimeout(5)
        assert read_all(taken) == b""
        proxy.wait_quiet()
        taken.close()


def test_a_client_that_leaves_while_it_sends(proxy, upstream):
    with proxy.connect() as sock:
        sock.sendall(post_bytes(CHAT, b"x" * 1000)[:-500])
        wait_until(lambda: proxy.app.exchanges)
    proxy.wait_quiet()
    assert not upstream.connections and not proxy.app.bodies


# A client that does not read.


def flood(progress, total=48 * 1024 * 1024):
    """As much text as it takes, counting in `progress` what could be sent."""
    line = ndjson({"type": "text-delta", "id": "0", "text": "x" * 4000})
    block = b"".join(chunked(line) for _ in range(16))

    def run(sock, request):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sock.sendall(CHUNKED_HEAD)
        while progress[0] < total:
            sock.sendall(block)
            progress[0] += len(block)
        sock.sendall(chunked(ndjson({"type": "finish", "finishReason": "stop"})) + b"0\r\n\r\n")
    return run


def lazy_client(proxy):
    """A client with small buffers that has sent its request."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
    sock.settimeout(10)
    sock.connect(("127.0.0.1", proxy.port))
    sock.sendall(post_bytes(CHAT, {"messages": [{"role": "user", "content": "hi"}],
                                   "stream": True}))
    return sock


def wait_stuck(progress):
    """Wait until the upstream cannot send any more."""
    seen, since = -1, time.monotonic()
    deadline = since + 10
    while time.monotonic() - since < 0.25 or progress[0] == 0:
        assert time.monotonic() < deadline, "the upstream is never held up"
        if progress[0] != seen:
            seen, since = progress[0], time.monotonic()
        time.sleep(0.01)
    return seen


def test_a_slow_client_slows_the_upstream(make_proxy, upstream):
    """The upstream's send blocks, others go on, and nothing is lost when reading goes on."""
    progress, total = [0], 20 * 1024 * 1024
    upstream.scripts = [flood(progress, total)]
    proxy = make_proxy(useProviderModels=False, upstreamIdleSeconds=0.2)
    sock = lazy_client(proxy)
    stuck = wait_stuck(progress)
    assert stuck < total
    relay = next(iter(proxy.app.relays))
    assert relay.client.transport.get_write_buffer_size() < 1024 * 1024
    assert len(relay.call.wire.buffer) < 1024 * 1024
    assert proxy.post(CHAT).status == 200
    size, data = 0, b""
    while not data.endswith(b"0\r\n\r\n"):
        piece = sock.recv(1 << 20)
        assert piece
        size += len(piece)
        data = data[-10:] + piece
    assert size > progress[0] >= total
    sock.close()


def test_a_client_that_never_reads_is_dropped(make_proxy, upstream):
    progress = [0]
    upstream.scripts = [flood(progress)]
    proxy = make_proxy(useProviderModels=False, limits=FAST._replace(write_stalled=0.3))
    sock = lazy_client(proxy)
    wait_until(lambda: progress[0])
    wait_until(lambda: not upstream.open, 10)
    proxy.wait_quiet()
    assert not proxy.app.clients
    sock.close()


# Several clients.


def test_two_clients_do_not_disturb_each_other(proxy, upstream):
    """One stalls, one fails, one leaves: the fourth streams on, exactly."""
    text = [" %d" % number for number in range(100)]

    def by_content(sock, request):
        word = request.json["params"]["messages"][0]["content"][0]["text"]
        {"stall": stall(CHUNKED_HEAD + chunked(SOME_TEXT)), "fail": raw(b"x\r\n\r\n", close=True),
         "leave": slow_stream, "good": stream(text_answer(*text), cut=50, pause=0.002)
         }[word](sock, request)
    upstream.default = by_content
    others = [proxy.send_post(CHAT, stream=True, messages=[{"role": "user", "content": word}])
              for word in ("stall", "fail", "leave")]
    answers = []

    def ask():
        answers.append(proxy.post(CHAT, stream=True,
                                  messages=[{"role": "user", "content": "good"}]))
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    read_until(others[2], b"word")
    others[2].close()
    for thread in threads:
        thread.join(20)
    assert [fold_chat(answer.frames)[:2] for answer in answers] == [
        ({"content": "".join(text)}, "stop")] * 4
    for sock in others[:2]:
        sock.close()


# Heads, notes, and the log.


def test_the_head_of_a_stream(proxy):
    answer = proxy.post(CHAT, stream=True)
    assert answer.fields["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.fields["cache-control"] == "no-cache, no-transform"
    assert answer.fields["x-accel-buffering"] == "no"
    assert answer.fields["transfer-encoding"] == "chunked"
    assert "content-length" not in answer.fields


@pytest.mark.parametrize("streamed", [True, False])
def test_notes(proxy, upstream, streamed):
    """What was dropped or changed is told in a header and in the log; else there is none."""
    assert "x-ccproxy-notes" not in proxy.post(CHAT, stream=streamed).fields
    answer = proxy.post(CHAT, stream=streamed, seed=1, logit_bias={"1": 1}, max_tokens=999_999)
    notes = answer.fields["x-ccproxy-notes"]
    for part in ("seed", "logit_bias", "999999", "200000"):
        assert part in notes
    assert all(re.fullmatch("[a-z_]+=[ -~]+", note) for note in notes.split("; "))
    upstream.default = status(402, b"")
    failed = proxy.post(CHAT, stream=streamed, seed=1)
    assert failed.status == 402 and "seed" in failed.fields["x-ccproxy-notes"]
    proxy.wait_quiet()
    assert proxy.log.getvalue().count("notes=") == 2


def test_many_notes_are_cut(proxy):
    """Arguments that are not JSON are one note each; the header stays under 1 KiB and ASCII."""
    calls = [{"role": "assistant", "tool_calls": [
        {"id": "c\u00e9%d" % number, "type": "function",
         "function": {"name": "bad name %d \u2603" % number, "arguments": "{}"}}]}
        for number in range(80)]
    answer = proxy.post(CHAT, messages=[{"role": "user", "content": "x"}] + calls)
    assert answer.status == 200
    notes = answer.fields["x-ccproxy-notes"]
    assert notes.isascii() and len(notes) <= 1024 + 16
    assert re.search(r"\+[0-9]+ more$", notes)


def test_late_notes_are_comments(proxy, upstream):
    """What comes up when the head is out is told in the stream."""
    upstream.default = stream(SOME_CALL + ndjson({"type": "finish", "finishReason": "length"}))
    answer = proxy.post(CHAT, stream=True)
    assert any(comment.startswith("note ") for comment in answer.comments)
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_one_log_line_a_request(proxy, upstream):
    upstream.default = stream("09")
    proxy.post(MESSAGES, stream=True)
    proxy.wait_quiet()
    lines = [line for line in proxy.log.getvalue().splitlines() if line.startswith("INFO")]
    assert len(lines) == 1
    for part in ("200", "api=messages", "model=deepseek/deepseek-v4-flash", "stream=yes", " in=",
                 " out=", " cached=", " first=", " total=", "trace=" + TRACE):
        assert part in lines[0], part
    assert re.search(r" key=key:[0-9a-f]{6} ", lines[0]) and KEY not in lines[0]


def test_the_end_is_not_held_up_by_what_follows(proxy, upstream):
    """The end of a stream goes out at `finish`, though the upstream goes on for its cost."""
    upstream.default = stall(CHUNKED_HEAD + chunked(text_answer("Hello")))
    with proxy.send_post(CHAT, stream=True) as sock:
        data = read_until(sock, b"0\r\n\r\n")
    assert parse_answers(data)[0].body.endswith(b"data: [DONE]\n\n")


def test_a_plain_answer_waits_a_moment_for_its_cost(make_proxy, upstream):
    upstream.default = stall(CHUNKED_HEAD + chunked(text_answer("Hello")))
    proxy = make_proxy(useProviderModels=False, limits=FAST._replace(after_end=0.1))
    assert proxy.post(CHAT).json["choices"][0]["message"]["content"] == "Hello"
    wait_until(lambda: not upstream.open)


def test_a_stop_sequence_ends_the_upstream_call(proxy, upstream):
    text = chunked(ndjson({"type": "text-delta", "id": "0", "text": "one two"}))
    upstream.default = lambda sock, request: slow_stream(sock, request, text)
    answer = proxy.post(MESSAGES, stream=True, stop_sequences=["two"])
    folded = fold_messages(answer.frames)
    assert folded["content"][0]["text"] == "one " and folded["stop_sequence"] == "two"
    wait_until(lambda: not upstream.open)


@pytest.mark.parametrize("cut", [1, 7, 1000, None])
def test_a_recorded_answer_in_any_pieces(proxy, upstream, cut):
    """The same text whether the upstream sends it in one piece or byte by byte."""
    upstream.default = stream("10_unicode", cut=cut)
    streamed, plain = proxy.post(CHAT, stream=True), proxy.post(CHAT)
    text = plain.json["choices"][0]["message"]["content"]
    assert fold_chat(streamed.frames)[0]["content"] == text and len(text) > 10
    told = [json.loads(line) for line in recorded("10_unicode").split(b"\n") if line]
    assert text == "".join(event["text"] for event in told if event["type"] == "text-delta")
