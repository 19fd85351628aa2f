"""ANSWER: the one read loop.  The laws of every face over recorded and random answers, repeated
calls, empty answers, and what is noted."""
from __future__ import annotations

import json
import random
import re

import pytest
from fake_upstream import ndjson, recorded, text_answer
from harness import ccproxy
from pure import (ALL_FACES, INPUTS_OF_CALLS, NAMES, cut_bytes, check_frames, has_note, make_answer,
                  new_answer, random_cuts, read_as_old_go, read_comments, read_frames, run,
                  run_plain, run_stream)

FACE_NAMES = sorted(ALL_FACES)
SEEDS = range(80)
PROMPTS = [{}, {"show_thinking": False}, {"include_usage": True}]
RECORDED = [(name, members) for name in NAMES for members in PROMPTS[:1 if name == "11" else 3]]
FINISH = {"type": "finish", "finishReason": "stop",
          "totalUsage": {"inputTokens": 20, "outputTokens": 9}}
BROKEN = {"type": "error", "error": {"message": "terminated", "isRetryable": True}}


def delta(words, kind="text"):
    return {"type": kind + "-delta", "id": "0", "text": words}


def start(name="c1", tool="f"):
    return {"type": "tool-input-start", "id": name, "toolName": tool}


def piece(words, name="c1"):
    return {"type": "tool-input-delta", "id": name, "delta": words}


def call(given, name="c1", tool="f"):
    return {"type": "tool-call", "toolCallId": name, "toolName": tool, "input": given}


def finish(reason, **usage):
    return {**FINISH, "finishReason": reason}


# The laws.

def check_parity(face, stream, folded, plain, body):
    """The folded stream says what the plain body says, without calls that were cut."""
    whole = [block.whole for block in stream.reply.of_kind("tool")]
    if plain.error is not None:
        if stream.error is None:        # the stream could show a call as far as it came
            assert plain.error.kind == "empty" and stream.reply.reason == "length"
            assert whole and not any(whole) and len(whole) == len(stream.reply.blocks)
            return
        assert (stream.error.kind, stream.error.message) == (plain.error.kind, plain.error.message)
        return
    assert stream.error is None
    PARITY[face](folded, body, whole, stream.reply.include_usage)
    assert stream.reply.cost == plain.reply.cost
    assert stream.reply.notes == plain.reply.notes


def check_chat_parity(folded, body, whole, include_usage):
    (choice,) = body["choices"]
    message, calls = folded["message"], folded["message"].pop("tool_calls", [])
    shown = [one for one, kept in zip(calls, whole) if kept]
    told = choice["message"].get("tool_calls", [])
    assert shown == told
    assert message["content"] == (choice["message"]["content"] or "")
    for name in ("reasoning_content", "refusal"):
        assert message.get(name) == choice["message"].get(name)
    assert folded["finish_reason"] == choice["finish_reason"]
    if include_usage:
        assert folded["usage"] == body.get("usage")
    else:
        assert folded["usage"] is None


def check_messages_parity(folded, body, whole, include_usage):
    kept = iter(whole)
    folded["content"] = [block for block in folded["content"]
                         if block["type"] != "tool_use" or next(kept)]
    assert folded == body


def check_responses_parity(folded, body, whole, include_usage):
    assert folded["response"] == body
    calls = [item for item in folded["items"] if item.kind in INPUTS_OF_CALLS]
    assert [item.done is not None for item in calls] == whole


PARITY = {"chat": check_chat_parity, "messages": check_messages_parity,
          "responses": check_responses_parity}


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("name,members", RECORDED, ids=str)
def test_parity_of_recorded(face, name, members):
    data = recorded(name)
    stream, folded = run_stream(face, data, **members)
    check_parity(face, stream, folded, *run_plain(face, data, **members))


@pytest.mark.parametrize("members", PROMPTS, ids=str)
@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("odd", [False, True])
def test_parity_of_random(face, odd, members):
    for seed in SEEDS:
        data = make_answer(seed, odd).data
        stream, folded = run_stream(face, data, **members)
        check_parity(face, stream, folded, *run_plain(face, data, **members))


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_answers_say_what_the_upstream_said(odd, seed):
    """Against what the maker of the answer knows, and for a client that asked for all."""
    made = make_answer(seed, odd)
    answer, folded = run_stream("chat", made.data, allow_empty=True)
    assert (answer.error is None) == made.ended
    message = folded["message"]
    calls = message.get("tool_calls", [])
    said, thought = message["content"], message.get("reasoning_content", "")
    assert has_note(answer.reply.notes, "cut=") == made.cut
    if not made.ended:      # what waited behind an unfinished call is lost with it
        assert made.text.startswith(said) and made.thinking.startswith(thought)
        assert list(made.calls)[:len(calls)] == [one["id"] for one in calls]
        return
    assert (said, thought) == (made.text, made.thinking)
    assert [one["id"] for one in calls] == list(made.calls)
    for one, given in zip(calls, made.calls.values()):
        assert given is None or json.loads(one["function"]["arguments"]) == given
    if made.cut:
        assert folded["finish_reason"] == "length"
    elif answer.reply.reason in ("stop", "tool_calls"):
        assert folded["finish_reason"] == ("tool_calls" if made.calls else "stop")


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_cuts_of_recorded(face, name):
    data = recorded(name)
    if len(data) > 100_000:
        data = data[:40_000]        # byte by byte, the rest shows nothing new
    whole = run(new_answer(face), data)
    assert run(new_answer(face), data, "bytewise") == whole
    rng = random.Random(name)
    for _ in range(5):
        assert run(new_answer(face), data, random_cuts(rng, data)) == whole


@pytest.mark.parametrize("face", FACE_NAMES)
def test_cuts_of_the_longest(face):
    data = recorded("11")
    whole = run(new_answer(face), data)
    for size in (997, 65536):
        assert run(new_answer(face), data, range(size, len(data), size)) == whole


@pytest.mark.parametrize("members", PROMPTS + [{"stops": ["th", "quoted\"Hel"]},
                                               {"json_format": {}}], ids=str)
@pytest.mark.parametrize("face", FACE_NAMES)
def test_cuts_of_random(face, members):
    for seed in SEEDS:
        data, rng = make_answer(seed).data, random.Random(seed)
        whole = run(new_answer(face, **members), data)
        assert run(new_answer(face, **members), data, "bytewise") == whole, seed
        assert run(new_answer(face, **members), data, random_cuts(rng, data)) == whole, seed


@pytest.mark.parametrize("face", FACE_NAMES)
def test_cuts_of_random_escapes(face):
    """Where strings are escaped otherwise, equal JSON is enough."""
    for seed in SEEDS:
        data, rng = make_answer(seed, odd=True).data, random.Random(seed)
        whole = read_frames(run(new_answer(face), data))
        assert read_frames(run(new_answer(face), data, "bytewise")) == whole, seed
        assert read_frames(run(new_answer(face), data, random_cuts(rng, data))) == whole, seed


@pytest.mark.parametrize("face", FACE_NAMES)
def test_cuts_of_plain(face):
    for seed in SEEDS:
        data = make_answer(seed, seed % 2 == 0).data
        whole, body = run_plain(face, data)
        answer = new_answer(face, stream=False)
        run(answer, data, "bytewise")
        assert (answer.error is None) == (body is not None), seed
        assert body is None or json.loads(ccproxy.to_json(answer.body())) == body, seed


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("name,members", RECORDED, ids=str)
def test_lane_law_of_recorded(face, name, members):
    """What the fast lane copies is what the ordinary way writes, byte for byte."""
    data = recorded(name)
    assert run(new_answer(face, **members), data) == run(
        new_answer(face, lanes=False, **members), data)


@pytest.mark.parametrize("members", PROMPTS, ids=str)
@pytest.mark.parametrize("face", FACE_NAMES)
def test_lane_law_of_random(face, members):
    for seed in SEEDS:
        data = make_answer(seed).data
        assert run(new_answer(face, **members), data) == run(
            new_answer(face, lanes=False, **members), data), seed


@pytest.mark.parametrize("face", FACE_NAMES)
def test_lane_law_of_random_escapes(face):
    for seed in SEEDS:
        data = make_answer(seed, odd=True).data
        assert read_frames(run(new_answer(face), data)) == read_frames(
            run(new_answer(face, lanes=False), data)), seed


@pytest.mark.parametrize("face", FACE_NAMES)
def test_lane_law_of_plain(face):
    for seed in SEEDS:
        data = make_answer(seed, seed % 2 == 0).data
        answers = [run_plain(face, data, lanes=lanes) for lanes in (True, False)]
        assert answers[0][1] == answers[1][1], seed
        assert [str(answer.error) for answer, _ in answers[:1]] == [
            str(answer.error) for answer, _ in answers[1:]], seed


@pytest.mark.parametrize("face", FACE_NAMES)
def test_the_lane_is_used(face):
    """The law above would hold for a lane that is never open."""
    read = []

    def read_line(reading, line):
        read.append(line)
        return ccproxy.ALPHA.read_line(reading, line)

    answer = new_answer(face)
    answer.upstream = ccproxy.ALPHA._replace(read_line=read_line)
    run(answer, recorded("11"))
    assert len(read) < 20


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("name", ["01", "03", "09"])
def test_a_byte_order_mark_and_other_line_ends(face, name):
    data = recorded(name)
    whole = run(new_answer(face), data)
    for other in (b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r"),
                  b"\xef\xbb\xbf\r\n" + data.replace(b"\n", b"\r\r\n")):
        for cuts in (None, "bytewise"):
            assert run(new_answer(face), other, cuts) == whole


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("name", ["01", "04", "09", "13"])
def test_data_over_several_lines(face, name):
    """Command Code's lines as server-sent events, each over as many lines as it has members."""
    lines = [json.dumps(json.loads(line), indent=1).split("\n")
             for line in recorded(name).decode().split("\n") if line]
    data = "\n".join("".join("data: %s\n" % line for line in event) for event in lines).encode()
    whole = [read_frames(run(new_answer(face), some, cuts))
             for some in (recorded(name), data + b"\n", data, data.replace(b"\n", b"\r"))
             for cuts in (None, "bytewise")]
    assert whole.count(whole[0]) == len(whole) == 8


def test_a_repeated_call_may_begin_with_a_byte_order_mark_too():
    answer = new_answer("chat")
    answer.feed(b"\xef\xbb\xbf" + ndjson(delta("hm", "reasoning"), BROKEN))
    answer.restart()
    run(answer, b"\xef\xbb\xbf" + text_answer("a"))
    assert answer.error is None


# Line breaks of Python's, at which clients cut that read by `str.splitlines`.

BREAKS = ["\u2028", "\u2029", "\x85", "a\u2028b\u2029c\x85d", "\u65e5\u2028\u672c", "\\u2028\x85"]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("kind", ["text", "reasoning"])
@pytest.mark.parametrize("words", BREAKS, ids=range(len(BREAKS)))
def test_line_breaks_of_python_leave_the_lane(face, kind, words):
    data = ndjson(delta("one", kind), delta("two", kind), delta(words, kind), delta("three", kind),
                  FINISH)
    whole = run(new_answer(face), data)
    assert whole == run(new_answer(face, lanes=False), data)
    assert whole == run(new_answer(face), data, "bytewise")
    assert whole.decode().splitlines() == whole.decode().split("\n")[:-1]
    assert json.dumps(read_frames(whole)).count(json.dumps(words)[1:-1]) >= 1


def test_a_read_with_line_breaks_does_not_close_the_lane(monkeypatch):
    seen = []
    copy_deltas = ccproxy.Answer.copy_deltas
    monkeypatch.setattr(ccproxy.Answer, "copy_deltas", lambda self, lane, lines, at, frames: (
        seen.append(lines), copy_deltas(self, lane, lines, at, frames))[1])
    answer = new_answer("chat")
    for words in ("a", "b\u00e9", "c\u2028", "d", "\x85", "\u0085\u00e9", "e"):
        answer.feed(ndjson(delta(words)))
    assert [json.loads(lines)["text"] for lines in seen] == ["b\u00e9", "d", "e"]


@pytest.mark.parametrize("face", FACE_NAMES)
def test_what_httpx_reads_line_by_line(face):
    httpx = pytest.importorskip("httpx")

    class Pieces(httpx.SyncByteStream):
        def __iter__(self):
            return cut_bytes(data, cuts)

    for words in BREAKS:
        data = run(new_answer(face), ndjson(*[delta(words)] * 3, FINISH))
        for cuts in (None, "bytewise"):
            told = [json.loads(line[6:]) for line in httpx.Response(
                200, stream=Pieces()).iter_lines() if line.startswith("data: {")]
            assert told == [frame for frame in read_frames(data) if frame != "[DONE]"]


# Numbers where the upstream told none.

NO_USAGE = [
    [delta("Hello"), delta(" there,"), delta(" how are you?"), {"type": "finish"}],
    [delta("Let me think about it", "reasoning"), delta(" for a while", "reasoning"),
     delta("Yes"), delta(", indeed"), {"type": "finish"}],
    [start(), piece('{"city":'), piece('"Oslo and so on"}'), call({"city": "Oslo and so on"}),
     {"type": "finish"}]]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("events", NO_USAGE, ids=range(len(NO_USAGE)))
def test_estimated_usage_counts_all_that_was_shown(events, stream):
    """Every way through the loop counts: whole, in pieces, with and without the lane."""
    data, shown = ndjson(*events), []
    for lanes in (True, False):
        for cuts in (None, "bytewise"):
            answer = new_answer("messages", stream=stream, lanes=lanes)
            frames = run(answer, data, cuts)
            body = check_frames("messages", answer, frames) if stream else answer.body()
            shown.append(body["usage"]["output_tokens"])
            assert has_note(answer.reply.notes, "usage=")
    letters = sum(len(event.get("text", event.get("delta", ""))) for event in events)
    assert len(set(shown)) == 1 and 2 <= shown[0] <= letters / 2


def test_thinking_counts_in_an_answer_that_a_stop_sequence_ended():
    data = ndjson(*[delta("0123456789", "reasoning")] * 40, delta("Yes END no"), FINISH)
    _, folded = run_stream("messages", data, stops=["END"])
    assert folded["usage"]["output_tokens"] >= 40


# Empty answers, ends and failures.

EMPTY = [   # (events before a `length`, thinking shown, error kind in a stream, in a plain answer)
    ([], True, "empty", "empty"),
    ([delta("hm", "reasoning")], True, None, None),
    ([delta("hm", "reasoning")], False, "empty", "empty"),
    ([delta("", "text")], True, "empty", "empty"),
    ([delta("x")], False, None, None),
    ([start(), piece('{"a":')], True, None, "empty"),
    ([start(), piece('{"a":1}'), call({"a": 1})], True, None, None),
    ([call({"a": 1})], True, None, None),
    ([delta("hm", "reasoning"), start()], False, "empty", "empty"),
    ([start()], True, "empty", "empty")]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("events,shown,streamed,plain", EMPTY, ids=range(len(EMPTY)))
def test_length_without_anything_shown(face, events, shown, streamed, plain):
    data = ndjson(*events, finish("length"))
    for stream, kind in ((True, streamed), (False, plain)):
        answer = new_answer(face, stream=stream, show_thinking=shown)
        frames = run(answer, data)
        assert (answer.error and answer.error.kind) == kind
        if kind:
            assert frames == b"" and answer.error.status == 502 and not answer.error.retryable
            assert ("x-should-retry", "false") in ccproxy.error_fields(answer.error)
        else:
            assert answer.reply.reason == "length"
        allowed = new_answer(face, stream=stream, show_thinking=shown, allow_empty=True)
        run(allowed, data)
        assert allowed.error is None and allowed.reply.reason == "length"


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("reason", ["stop", "other", "content-filter", "tool-calls"])
def test_an_ordinary_end_without_text_is_a_success(face, reason):
    answer, folded = run_stream(face, ndjson({"type": "start"}, finish(reason)))
    assert answer.error is None and folded
    assert run_plain(face, ndjson(finish(reason)))[1] is not None


FAILED = [  # (bytes, kind, retryable, words of the message)
    (b"", "upstream", True, "empty"),
    (b"\n\n", "upstream", True, "empty"),
    (ndjson({"type": "start"}), "upstream", True, "stopped before its end"),
    (ndjson(delta("a")), "upstream", True, "stopped before its end"),
    (recorded("12"), "upstream", True, "stopped before its end"),
    (ndjson({"type": "abort"}), "upstream", True, "aborted"),
    (ndjson(delta("a"), {"type": "abort"}, FINISH), "upstream", True, "aborted"),
    (ndjson(finish("error")), "upstream", True, "error"),
    (recorded("07"), "unavailable", True, "Network connection lost."),
    (recorded("08"), "billing", False, "Insufficient Balance"),
    (recorded("13"), "billing", False, "premium_credits_exhausted"),
    (ndjson({"success": False, "error": {"message": "boom"}}), "upstream", True, "boom"),
    (ndjson({"type": "error", "error": "x"}, delta("later"), FINISH), "upstream", True, "x")]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("data,kind,retryable,words", FAILED, ids=range(len(FAILED)))
def test_failures_never_look_like_an_end(face, stream, data, kind, retryable, words):
    answer = new_answer(face, stream=stream)
    frames = run(answer, data)
    check_frames(face, answer, frames)      # and so no end
    assert answer.over and answer.error.kind == kind and answer.error.retryable == retryable
    assert words in answer.error.message
    assert stream or frames == b""
    assert b"later" not in frames


@pytest.mark.parametrize("face", FACE_NAMES)
def test_nothing_is_shown_before_an_error_at_the_start(face):
    answer = new_answer(face)
    assert run(answer, recorded("08")) == b"" and not answer.visible


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("data", [text_answer("Hi"), recorded("02"), recorded("03")],
                         ids=["text", "thinking", "call"])
def test_what_follows_the_end_is_only_the_cost(face, data):
    answer = new_answer(face)
    end = answer.feed(data.split(b'{"type":"provider-metadata"')[0])
    assert answer.over and answer.error is None
    more = ndjson({"type": "provider-metadata", "providerMetadata": {"gateway": {"cost": "0.25"}}},
                  delta("more"), start("c9"), {"type": "error", "error": "late"}, finish("length"))
    assert answer.feed(more) == b"" and answer.error is None and answer.reply.cost == "0.25"
    check_frames(face, answer, end)


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("more", [
    [piece('1}'), call({"a": 1})], [call({"a": 1})], [delta("more")], [call({}, "c2")],
    [delta("more", "reasoning")]], ids=range(5))
def test_what_follows_the_end_changes_no_body(face, more):
    """A plain answer's body is written up to a second behind its end."""
    data = ndjson(delta("hm", "reasoning"), delta("text"), start(), piece('{"a":'), FINISH)
    answer = new_answer(face, stream=False)
    answer.feed(data)
    body = json.loads(ccproxy.to_json(answer.body()))
    answer.feed(ndjson(*more))
    assert json.loads(ccproxy.to_json(answer.body())) == body


def test_stop_of_the_connection():
    """A failure of the connection is the answer's, and counts once only; the block in which it
    came is not closed, for clients take a closed one for good."""
    answer = new_answer("messages")
    frames = answer.feed(ndjson(delta("a")))
    frames += answer.stop(ccproxy.ProxyError("late", "silent"))
    assert answer.error.kind == "late"
    assert [frame["type"] for frame in read_frames(frames)][-1] == "content_block_delta"
    assert answer.stop(ccproxy.ProxyError("late", "again")) == b""
    assert answer.error.message == "silent"


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("members", [{}, {"stops": ["END"]}], ids=["plainly", "held back"])
def test_a_failure_comes_last_behind_all_text(face, members):
    """Later errors: one error event last, and what a filter held back before it."""
    answer = new_answer(face, **members)
    frames = answer.feed(ndjson(delta("text E"), BROKEN))
    folded = read_frames(frames + answer.failure(answer.error))
    if face == "responses":
        assert folded[-1]["type"] == "response.failed"
        assert folded[-1]["response"]["error"]["message"] == answer.error.message
        check_frames(face, answer, frames)
        assert "".join(frame["delta"] for frame in folded if "delta" in frame) == "text E"
        return
    assert folded[-1] == ALL_FACES[face].error(answer.error)
    assert "".join(frame["choices"][0]["delta"].get("content", "") if face == "chat"
                   else frame.get("delta", {}).get("text", "") for frame in folded[:-1]) == "text E"


def test_lines_read_counts_whole_lines():
    answer = new_answer("chat")
    counts = []
    for part in cut_bytes(b'{"type":"start"}\n{"type"', [5, 17]):
        answer.feed(part)
        counts.append(answer.lines_read)
    assert counts == [0, 1, 1]


@pytest.mark.parametrize("face", FACE_NAMES)
def test_visible_is_text_or_a_call(face):
    rows = [(ndjson({"type": "start"}), False), (ndjson(delta("a", "reasoning")), False),
            (ndjson(delta("a")), True), (ndjson(start()), False),
            (ndjson(start(), piece("{")), True), (ndjson(call({})), True)]
    for data, visible in rows:
        answer = new_answer(face)
        answer.feed(data)
        assert answer.visible is visible
        plain = new_answer(face, stream=False)
        plain.feed(data)
        assert plain.visible is False


HELD = [({"stops": ["END"]}, "EN"), ({"json_format": {}}, "```json"), ({}, "\ud83d")]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("members,words", HELD, ids=["stop", "fence", "half"])
def test_what_was_held_back_does_not_prevent_a_repetition(face, members, words):
    """Nothing went out, so the failure can still be repaired by a second call."""
    answer = new_answer(face, **members)
    frames = answer.feed(json.dumps(delta(words)).encode() + b"\n" + ndjson(BROKEN))
    assert answer.error is not None and not answer.visible
    folded = check_frames(face, answer, frames)
    answer.restart()
    frames += run(answer, text_answer("again"))
    folded = check_frames(face, answer, frames)
    assert b"again" in frames and b"EN" not in frames and folded


# Repeated calls.

@pytest.mark.parametrize("cuts", [None, "bytewise"])
@pytest.mark.parametrize("face", FACE_NAMES)
def test_restart_after_thinking(face, cuts):
    """One Begin, the thinking once, one signature for each block of it."""
    answer = new_answer(face)
    frames = answer.feed(ndjson({"type": "start"}, delta("The user", "reasoning"), BROKEN))
    assert answer.error.retryable and not answer.visible
    answer.restart()
    assert not answer.over and answer.error is None
    frames += run(answer, recorded("02"), cuts)
    folded = check_frames(face, answer, frames)
    if face == "chat":
        assert folded["message"] == {"content": "The answer is **4**.",
                                     "reasoning_content": "The user"}
        return
    if face == "responses":
        assert [(item.kind, item.text) for item in folded["items"]] == [
            ("reasoning", "The user"), ("message", "The answer is **4**.")]
        assert folded["response"]["usage"]["output_tokens"] == 17
        return
    assert folded["content"] == [
        {"type": "thinking", "thinking": "The user", "signature": ccproxy.DEFAULT_SIGNATURE},
        {"type": "text", "text": "The answer is **4**."}]
    assert folded["usage"]["output_tokens"] == 17


def test_the_signature_of_thinking_that_is_not_shown_signs_nothing():
    answer = new_answer("messages")
    frames = answer.feed(ndjson({"type": "start"}, delta("Hmm", "reasoning"), BROKEN))
    answer.restart()
    frames += run(answer, recorded("09"))
    thinking = check_frames("messages", answer, frames)["content"][0]
    assert (thinking["thinking"], thinking["signature"]) == ("Hmm", ccproxy.DEFAULT_SIGNATURE)


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("first", [
    b"", ndjson({"type": "start"}), ndjson({"type": "start"}, BROKEN),
    b'{"type":"start-step","request', b'{"type":"text-del'], ids=range(5))
@pytest.mark.parametrize("name", ["01", "02", "04", "09"])
def test_restart_after_nothing(face, first, name):
    answer = new_answer(face)
    assert run(answer, first) == b"" and answer.error is not None
    answer.restart()
    again = new_answer(face)
    assert read_frames(run(answer, recorded(name))) == read_frames(run(again, recorded(name)))


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("first", [
    [delta("half an answer")], [delta("hm", "reasoning"), delta("text")],
    [start(), piece('{"a":')], [call({"x": 1}), delta("y")]], ids=range(4))
@pytest.mark.parametrize("show_thinking", [True, False])
def test_restart_of_a_plain_answer(face, first, show_thinking):
    """Nothing went out, so the second answer alone counts, thinking and all."""
    answer = new_answer(face, stream=False, show_thinking=show_thinking)
    run(answer, ndjson(*first, BROKEN))
    assert not answer.visible
    answer.restart()
    run(answer, recorded("03"))
    again = new_answer(face, stream=False, show_thinking=show_thinking)
    run(again, recorded("03"))
    assert answer.body() == again.body() and answer.reply.reason == again.reply.reason


def test_restart_of_a_plain_answer_forgets_what_was_noted_of_the_failed_one():
    answer = new_answer("chat", stream=False)
    run(answer, ndjson(start(), piece('{"a":'), BROKEN))
    answer.restart()
    run(answer, recorded("01"))
    assert not has_note(answer.reply.notes, "cut=")


def test_restart_of_a_plain_answer_estimates_the_second_alone():
    answer = new_answer("messages", stream=False)
    run(answer, ndjson(delta("0123456789" * 40), BROKEN))
    answer.restart()
    run(answer, ndjson(delta("0123"), {"type": "finish"}))
    assert answer.body()["usage"]["output_tokens"] == 1


@pytest.mark.parametrize("face", FACE_NAMES)
def test_restart_with_hidden_thinking(face):
    answer = new_answer(face, show_thinking=False)
    assert answer.feed(ndjson(delta("hm", "reasoning"), BROKEN)) == b""
    answer.restart()
    assert run(answer, recorded("02")) == run(new_answer(face, show_thinking=False),
                                              recorded("02"))


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("name", ["01", "02", "03", "04", "09"])
def test_lane_law_and_cuts_after_a_restart(face, name):
    """The lane must not show what a repeated call's readers leave out."""
    shown = []
    for lanes, cuts in ((True, None), (False, None), (True, "bytewise")):
        answer = new_answer(face, lanes=lanes)
        frames = answer.feed(ndjson(delta("The", "reasoning"), delta(" user", "reasoning"), BROKEN))
        answer.restart()
        shown.append(frames + run(answer, recorded(name), cuts))
        check_frames(face, answer, shown[-1])
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize("face", FACE_NAMES)
def test_two_restarts(face):
    answer = new_answer(face)
    frames = b""
    for words in ("one", "two"):
        frames += answer.feed(ndjson(delta(words, "reasoning"), BROKEN))
        answer.restart()
    frames += run(answer, text_answer("end"))
    check_frames(face, answer, frames)
    shown = "".join(json.dumps(frame) for frame in read_frames(frames)
                    if "delta" in frame or face == "chat")
    assert shown.count('"one"') == 1 and "two" not in shown and '"end"' in shown


@pytest.mark.parametrize("face", FACE_NAMES)
def test_a_restart_that_ends_by_length_after_shown_thinking(face):
    answer = new_answer(face)
    frames = answer.feed(ndjson(delta("hm", "reasoning"), BROKEN))
    answer.restart()
    frames += run(answer, ndjson(delta("hm hm", "reasoning"), finish("length")))
    assert answer.error is None and answer.reply.reason == "length"
    check_frames(face, answer, frames)


# Notes that come late.

LATE = [    # (events, words of the comment)
    ([start(), piece('{"a":'), finish("length")], "cut=tool call f"),
    ([delta("a"), start(), finish("tool-calls")], "cut=tool call f"),
    ([delta("a"), start("c1", "g"), BROKEN], "cut=tool call g"),
    ([delta("a"), start("c1", "g"), piece("{"), {"type": "abort"}], "cut=tool call g"),
    ([delta("a"), {"type": "finish"}], "usage=not told"),
    ([start(), piece('{"a":2}'), call({"a": 1}), FINISH], "tool_input=")]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("events,words", LATE, ids=range(len(LATE)))
def test_late_notes_for_old_go_clients(face, events, words):
    told = []
    for agent in ("OpenAI/Go 1.12.0", "OpenAI/Python 2.20.0"):
        answer = new_answer(face)
        answer.comment_end = ccproxy.comment_end(agent)
        frames = run(answer, ndjson(*events))
        told.append(frames + answer.failure(answer.error) if answer.error else frames)
    assert re.search(": note [^\n]*" + words, told[0].decode()) and told[0] != told[1]
    assert read_as_old_go(told[0]) == [frame for frame in read_frames(told[1]) if frame != "[DONE]"]
    with pytest.raises(AssertionError):
        read_as_old_go(told[1])


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("events,words", LATE, ids=range(len(LATE)))
def test_late_notes_are_comments_and_in_the_reply(face, events, words):
    answer = new_answer(face)
    frames = run(answer, ndjson(*events))
    frames += answer.failure(answer.error) if answer.error else b""
    assert has_note(answer.reply.notes, words)
    assert any(words in comment for comment in read_comments(frames))
    assert all(comment.startswith("note ") for comment in read_comments(frames))
    assert len(set(read_comments(frames))) == len(read_comments(frames))


@pytest.mark.parametrize("face", FACE_NAMES)
def test_notes_that_went_out_in_the_head_are_not_repeated(face):
    answer = new_answer(face)
    answer.reply.notes.append("early=one")
    answer.noted = 1
    frames = run(answer, ndjson(delta("a"), {"type": "finish"}))
    assert read_comments(frames) == ["note usage=not told by the upstream"]


def test_a_line_that_is_not_json_is_noted():
    answer = new_answer("chat")
    run(answer, b'{"type":"text-delta","text":"a"\n' + text_answer("b"))
    assert has_note(answer.reply.notes, "not JSON")


# Filters in the loop.

def test_a_stop_sequence_ends_the_answer_and_the_upstream_call():
    for face, reason, sequence in (("chat", "stop", None), ("messages", "stop_sequence", "END"),
                                   ("responses", "completed", None)):
        for stream in (True, False):
            answer = new_answer(face, stream=stream, stops=["END"])
            frames = answer.feed(ndjson(delta("abc E"), delta("N"), delta("D def")))
            assert answer.over and answer.error is None
            assert not answer.reading.over      # the shell ends the call
            shown = check_frames(face, answer, frames) if stream else answer.body()
            if face == "chat":
                shown = shown if stream else shown["choices"][0]
                assert shown["message"]["content"] == "abc "
                assert shown["finish_reason"] == reason
            elif face == "responses":
                shown = shown["response"] if stream else shown
                assert shown["output"][0]["content"][0]["text"] == "abc "
                assert len(shown["output"]) == 1 and shown["status"] == reason
            else:
                assert shown["content"] == [{"type": "text", "text": "abc "}]
                assert (shown["stop_reason"], shown["stop_sequence"]) == (reason, sequence)
            assert answer.feed(ndjson(delta("more"), finish("length"))) == b""


@pytest.mark.parametrize("face", FACE_NAMES)
def test_stop_sequences_look_at_text_only(face):
    data = ndjson(delta("END", "reasoning"), delta("ab"), call({"q": "END"}), delta("c"),
                  finish("tool-calls"))
    answer, _ = run_stream(face, data, stops=["END", "bc"])
    assert answer.reply.sequence is None and answer.reply.reason == "tool_calls"
    assert [block.kind for block in answer.reply.blocks] == ["thinking", "text", "tool", "text"]


def test_names_are_mapped_back():
    data = recorded("04").replace(b'"toolName":"get_weather"', b'"toolName":"my_tool_1"')
    for face in FACE_NAMES:
        names = {"my_tool_1": ccproxy.ToolName("my.tool")}
        for answer, shown in (run_stream(face, data, names=names),
                              run_plain(face, data, names=names)):
            shown = json.dumps(shown.get("response", shown))
            assert shown.count('"my.tool"') == 2
            assert "my_tool_1" not in shown


# What Responses promises besides.

@pytest.mark.parametrize("events", [
    [start(), piece('{"a":'), finish("length")],
    [delta("a"), start(), piece('{"a":'), finish("tool-calls")],
    [call({"a": 1}, "c0"), start(), piece('{"a":'), FINISH],
    [start(), piece('{"a":'), delta("behind"), call({}, "c2"), FINISH]], ids=range(4))
@pytest.mark.parametrize("cuts", [None, "bytewise"])
def test_a_call_that_was_cut_is_never_told_done(events, cuts):
    """Codex acts on output_item.done: half a call must not run."""
    answer, folded = run_stream("responses", ndjson(*events), cuts)
    assert answer.error is None and folded["response"]["status"] == "incomplete"
    cut = [item for item in folded["items"] if item.shown.get("call_id") == "c1"]
    assert [item.done for item in cut] == [None] and cut[0].text == '{"a":'
    told = [item.get("call_id") for item in folded["response"]["output"]]
    assert "c1" not in told
    plain, body = run_plain("responses", ndjson(*events))
    assert plain.error is not None or "c1" not in [one.get("call_id") for one in body["output"]]


@pytest.mark.parametrize("events", [
    [BROKEN], [delta("a"), BROKEN], [delta("hm", "reasoning"), BROKEN],
    [start(), piece('{"a":'), BROKEN], [call({}), delta("b"), {"type": "abort"}], []],
    ids=range(6))
def test_the_terminal_event_of_a_broken_stream_is_one_failure(events):
    answer = new_answer("responses")
    frames = run(answer, ndjson(*events))
    assert answer.error is not None
    frames += answer.failure(answer.error)
    kinds = [frame["type"] for frame in read_frames(frames)]
    terminal = [kind for kind in kinds if kind.split(".")[-1] in ("completed", "failed",
                                                                 "incomplete")]
    assert terminal == ["response.failed"] == kinds[-1:]
    numbers = [frame["sequence_number"] for frame in read_frames(frames)]
    assert numbers == list(range(len(numbers)))
    assert answer.feed(ndjson(FINISH)) == b""


def test_numbers_go_on_over_a_restart():
    answer = new_answer("responses")
    frames = answer.feed(ndjson(delta("hm", "reasoning"), BROKEN))
    count = len(read_frames(frames))
    answer.restart()
    more = read_frames(run(answer, recorded("02")))
    assert [frame["sequence_number"] for frame in more] == list(range(count, count + len(more)))


def test_a_flood_of_bad_lines_is_noted_once():
    answer = new_answer("chat")
    answer.feed(b'{"type":"start"}\n' + b"{\n" * 10_000)
    assert len(answer.reply.notes) == 1


# What an upstream gone wild may cost.

def test_blank_lines_are_nothing():
    answer = new_answer("chat")
    assert answer.feed(b"\n" * 65536) == b"" and not answer.reading.began
    assert check_frames("chat", answer, run(answer, text_answer("a")))["message"]["content"] == "a"


def test_tool_calls_are_bounded():
    """Ever new ids, whether or not anything of them is shown."""
    answer = new_answer("chat")
    with pytest.raises(ccproxy.ProxyError) as caught:
        for number in range(ccproxy.MAX_CALLS + 1):
            answer.feed(ndjson({"type": "tool-input-start", "id": "c%d" % number,
                                "toolName": "t"}))
    assert caught.value.status == 502 and len(answer.reading.calls) == ccproxy.MAX_CALLS


@pytest.mark.parametrize("face,stream", [("chat", False), ("responses", True), ("chat", True)])
def test_what_is_kept_of_an_answer_is_bounded(monkeypatch, face, stream):
    """A stream of an API that needs no text again may go on for ever."""
    monkeypatch.setattr(ccproxy, "MAX_KEPT_BYTES", 10_000)
    answer, line = new_answer(face, stream=stream), ndjson(delta("x" * 100))

    def run_on():
        for _ in range(100):
            answer.feed(line)
    if face == "chat" and stream:
        run_on()
        return
    with pytest.raises(ccproxy.ProxyError) as caught:
        run_on()
    assert caught.value.status == 502 and not caught.value.retryable
