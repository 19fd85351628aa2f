"""GRAMMAR and ANSWER: where parallel calls are off, an answer's first call is kept and the rest are
noted, over every upstream's format, in every API, streamed and plain."""
from __future__ import annotations

import json
import random

import pytest
from fake_provider import SSE_OF, say_in
from fake_upstream import FakeUpstream, ndjson, stream
from harness import CHAT, KEY, MESSAGES, Proxy, ccproxy, wait_until
from pure import check_frames, has_note, random_cuts, read_comments, run
from pure_formats import new_answer

FORMATS = {"alpha": ccproxy.ALPHA, "openai": ccproxy.OPENAI, "anthropic": ccproxy.ANTHROPIC}
FACES = ["chat", "messages", "responses"]


def begin(name):
    return {"type": "tool-input-start", "id": "c" + name, "toolName": name}


def piece(name, words):
    return {"type": "tool-input-delta", "id": "c" + name, "delta": words}


def whole(name, given):
    return {"type": "tool-call", "toolCallId": "c" + name, "toolName": name, "input": given}


def words(text):
    return {"type": "text-delta", "id": "t", "text": text}


FINISH = {"type": "finish", "finishReason": "tool-calls",
          "totalUsage": {"inputTokens": 1, "outputTokens": 1}}
A, B, C = {"x": "one \u00e9\"\n"}, {"y": [1, 2]}, {}
FIRST = [begin("a"), piece("a", '{"x":'), piece("a", json.dumps(A["x"]) + "}"), whole("a", A)]
# (events, text, names of the calls that are left out)
ANSWERS = [
    ([*FIRST, FINISH], "", []),
    ([*FIRST, begin("b"), piece("b", '{"y":[1,2]}'), whole("b", B), FINISH], "", ["b"]),
    ([words("Now: "), *FIRST, whole("b", B), whole("d", C), words("done"), FINISH],
     "Now: done", ["b", "d"]),
    ([begin("a"), begin("b"), piece("a", '{"x":'), piece("b", '{"y":'),
      piece("a", json.dumps(A["x"]) + "}"), piece("b", "[1,2]}"), whole("b", B), whole("a", A),
      FINISH], "", ["b"]),
    ([whole("a", A), words("and"), whole("b", B), FINISH], "and", ["b"])]


def said(api, events):
    data = ndjson(*events)
    return data if api == "alpha" else say_in(api, data)


def calls_of(face, told):
    """(text, calls as (id, name, arguments), why it ended) of a folded stream or a body."""
    if face == "responses":
        told = told.get("response", told)
        text = "".join(part["text"] for item in told["output"] if item["type"] == "message"
                       for part in item["content"])
        return text, [(item["call_id"], item["name"], json.loads(item["arguments"]))
                      for item in told["output"] if item["type"] == "function_call"], told["status"]
    if face == "messages":
        text = "".join(block.get("text", "") for block in told["content"])
        return text, [(block["id"], block["name"], block["input"]) for block in told["content"]
                      if block["type"] == "tool_use"], told["stop_reason"]
    choice = told["choices"][0] if "choices" in told else told
    message = choice["message"]
    return message["content"] or "", [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message["tool_calls"]], choice["finish_reason"]


ENDS = {"chat": "tool_calls", "messages": "tool_use", "responses": "completed"}


@pytest.mark.parametrize("api", list(FORMATS))
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("events,text,left", ANSWERS, ids=range(len(ANSWERS)))
def test_the_first_call_is_kept_and_the_rest_are_noted(api, face, events, text, left):
    data = said(api, events)
    for cuts in (None, "bytewise"):
        answer = new_answer(FORMATS[api], face, parallel=False)
        frames = run(answer, data, cuts)
        shown = calls_of(face, check_frames(face, answer, frames))
        assert shown == (text, [("ca", "a", A)], ENDS[face])
        notes = [note for note in answer.reply.notes if note.startswith("left_out=")]
        assert notes == ["left_out=call of %s, for parallel calls are off" % name for name in left]
        assert all(has_note(read_comments(frames), note) for note in notes)
    plain = new_answer(FORMATS[api], face, stream=False, parallel=False)
    run(plain, data)
    assert calls_of(face, json.loads(ccproxy.to_json(plain.body()))) == shown
    assert [note for note in plain.reply.notes if note.startswith("left_out=")] == notes


@pytest.mark.parametrize("api", list(FORMATS))
def test_all_calls_are_shown_where_nothing_else_was_asked(api):
    answer = new_answer(FORMATS[api], "chat")
    folded = check_frames("chat", answer, run(answer, said(api, ANSWERS[1][0])))
    assert [call[1] for call in calls_of("chat", folded)[1]] == ["a", "b"]
    assert answer.reply.notes == []


@pytest.mark.parametrize("api", list(FORMATS))
@pytest.mark.parametrize("face", FACES)
def test_the_fast_lane_is_kept(api, face):
    """The kept call's deltas are copied, also those behind a piece of another call."""
    answer = new_answer(FORMATS[api], face, parallel=False)
    answer.feed(said(api, [begin("a"), piece("a", '{"x":'), piece("a", '"1')]))
    assert answer.lane is not None and answer.lane.block.name == "a"
    answer.feed(said(api, [begin("a"), begin("b"), piece("b", '{"y":')])[
        len(said(api, [begin("a")])):])
    assert answer.lane is not None and answer.lane.block.name == "a"
    for events, _, _ in ANSWERS:
        fast, slow = (run(new_answer(FORMATS[api], face, lanes=lanes, parallel=False),
                          said(api, events)) for lanes in (True, False))
        assert fast == slow


def test_a_first_call_without_arguments_stays_the_first():
    """Chat's chunks announce calls in order; the arguments of the first may come to nothing."""
    def chunk(delta, reason=None):
        return b"data: %b\n\n" % json.dumps({"choices": [
            {"index": 0, "delta": delta, "finish_reason": reason}]}).encode()

    def call(index, **members):
        return {"tool_calls": [{"index": index, **members}]}

    data = (chunk(call(0, id="c0", function={"name": "list", "arguments": ""}))
            + chunk(call(1, id="c1", function={"name": "read", "arguments": '{"x":1}'}))
            + chunk({}, "tool_calls") + b"data: [DONE]\n\n")
    answer = new_answer(ccproxy.OPENAI, "chat", parallel=False)
    folded = check_frames("chat", answer, run(answer, data))
    assert calls_of("chat", folded)[1] == [("c0", "list", {})]
    assert has_note(answer.reply.notes, "call of read")


@pytest.mark.parametrize("api", list(FORMATS))
@pytest.mark.parametrize("streamed", [True, False])
def test_a_repeated_call_of_the_upstream_begins_anew(api, streamed):
    """What an answer that broke had begun does not count."""
    broken = {"alpha": [{"type": "reasoning-delta", "id": "r", "text": "hm"},
                        {"type": "error", "error": {"message": "overloaded", "statusCode": 529}}]}
    data = said("alpha", broken["alpha"]) if api == "alpha" else SSE_OF[api](
        [("thinking", "hm"), ("error", "overloaded_error", "overloaded")])
    answer = new_answer(FORMATS[api], "chat", stream=streamed, parallel=False)
    frames = answer.feed(data)
    assert answer.error is not None
    answer.restart()
    frames += run(answer, said(api, ANSWERS[1][0]))
    told = check_frames("chat", answer, frames) if streamed else answer.body()
    assert calls_of("chat", told)[1] == [("ca", "a", A)]
    assert has_note(answer.reply.notes, "call of b")


def test_random_cuts():
    for seed in range(40):
        api, face = list(FORMATS)[seed % 3], FACES[seed % 2]
        data = said(api, ANSWERS[seed % len(ANSWERS)][0])
        once = run(new_answer(FORMATS[api], face, parallel=False), data)
        assert run(new_answer(FORMATS[api], face, parallel=False), data,
                   random_cuts(random.Random(seed), data)) == once, seed


@pytest.mark.parametrize("path,off", [
    (CHAT, {"parallel_tool_calls": False}), ("/v1/responses", {"parallel_tool_calls": False}),
    (MESSAGES, {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}})])
def test_over_real_sockets(path, off):
    upstream = FakeUpstream()
    upstream.default = stream(ndjson(*ANSWERS[1][0]))
    proxy = Proxy(apiBase=upstream.base, useProviderModels=False)
    try:
        for streamed in (False, True):
            turns = {"input": "hi"} if "responses" in path else {
                "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
            tools = [{"name": "a"}, {"name": "b"}]
            answer = proxy.request("POST", path, {"model": "m", "stream": streamed, "tools": tools,
                                                  **turns, **off}, key=KEY)
            assert answer.status == 200 and b'"a"' in answer.body and b'"b"' not in answer.body
            told = answer.comments if streamed else [answer.fields["x-ccproxy-notes"]]
            assert has_note(told, "call of b, for parallel calls are off")
        wait_until(lambda: not proxy.app.exchanges)
    finally:
        proxy.close()
        upstream.close()


TOOL = ccproxy.Tool("a", "", {"type": "object", "properties": {}})


@pytest.mark.parametrize("parallel, tools, choice, openai, anthropic", [
    (True, [TOOL], None, None, None), (False, [], None, None, None),
    (False, [TOOL], None, False, {"type": "auto", "disable_parallel_tool_use": True}),
    (False, [TOOL], ccproxy.Choice("any"), False,
     {"type": "any", "disable_parallel_tool_use": True}),
    (False, [TOOL], ccproxy.Choice("tool", "a"), False,
     {"type": "tool", "name": "a", "disable_parallel_tool_use": True})])
def test_the_documented_apis_are_told(parallel, tools, choice, openai, anthropic):
    prompt = ccproxy.Prompt("m", [ccproxy.Turn("user", [ccproxy.Text("hi")])], tools=tools,
                            choice=choice, parallel=parallel, max_tokens=100)
    prompt.model = "m"
    body = json.loads(ccproxy.OPENAI.build(prompt, ""))
    assert body.get("parallel_tool_calls") is openai
    assert json.loads(ccproxy.ANTHROPIC.build(prompt, "")).get("tool_choice") == anthropic
