"""PROMPT REPAIR: a history in order, calls answered, ids unique, names that providers take."""
from __future__ import annotations

import json
import random
import re

import pytest
from harness import ccproxy
from pure import (PNG, USER, at, check_messages, check_params, has_note, params_of, read_prompt,
                  refusal, request, text, translate)


def use(call_id, name="f", **given):
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def result(call_id, content="r"):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content}


def picture():
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                        "data": PNG.partition(",")[2]}}


def said(*parts):
    return {"role": "assistant", "content": list(parts)}


def asked(*parts):
    return {"role": "user", "content": list(parts)}


def shorten(messages):
    """A history in short: `u:` texts, `a:` parts, `t:` id=value."""
    out = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "tool-call":
                parts.append("%s(%s)" % (part["toolName"], part["toolCallId"]))
            elif part["type"] == "tool-result":
                parts.append("%s=%s" % (part["toolCallId"], part["output"]["value"]))
            else:
                parts.append({"image": "IMAGE", "reasoning": "*%s*"}.get(part["type"], "%s")
                             .replace("%s", part.get("text", "")))
        out.append("%s:%s" % (message["role"][0], " ".join(parts)))
    return out


NO_RESULT = ccproxy.NO_RESULT
ORPHAN = "[Result of an earlier tool call] "
SHOWN = "Pictures returned by the tool f: IMAGE"
HISTORIES = [   # (messages, what is sent in short, words of a note)
    # Order inside a turn.
    ([USER, said(text("b"), use("1"), {"type": "thinking", "thinking": "a"}), asked(result("1"))],
     ["u:hi", "a:*a* b f(1)", "t:1=r"], None),
    ([USER, said(text("a")), said(text("b")), USER], ["u:hi", "a:a b", "u:hi"], None),
    ([USER, USER], ["u:hi", "u:hi"], None),
    ([said(text("a")), USER], ["a:a", "u:hi"], None),
    ([USER, said(text("a"))], ["u:hi", "a:a"], "prefill"),
    ([USER, said(), USER], ["u:hi", "u:hi"], None),
    ([USER, said(text("")), asked(text("")), said(text("a")), USER], ["u:hi", "a:a", "u:hi"], None),
    ([USER, said(text("\n")), asked(text(" "), text("two"))], ["u:hi", "u:two"], None),
    ([USER, said(use("1")), asked(result("1", " "))], ["u:hi", "a:f(1)", "t:1= "], None),
    ([USER, {"role": "system", "content": "s"}, said(text("a")), USER],
     ["u:hi", "u:<system-reminder>\ns\n</system-reminder>", "a:a", "u:hi"], None),
    # Results in any order, text behind them, in several messages.
    ([USER, said(use("1"), use("2")), asked(result("2", "y"), result("1", "x"))],
     ["u:hi", "a:f(1) f(2)", "t:1=x 2=y"], None),
    ([USER, said(use("1"), use("2")), asked(result("2", "y")), asked(result("1", "x"))],
     ["u:hi", "a:f(1) f(2)", "t:1=x 2=y"], None),
    ([USER, said(use("1")), asked(text("before"), result("1"), text("after"))],
     ["u:hi", "a:f(1)", "t:1=r", "u:before after"], None),
    ([USER, said(use("1")), USER, asked(result("1"))], ["u:hi", "a:f(1)", "t:1=r", "u:hi"], None),
    # Calls without result, results without call.
    ([USER, said(use("1")), asked(text("stop"))],
     ["u:hi", "a:f(1)", "t:1=" + NO_RESULT, "u:stop"], "without a result"),
    ([USER, said(use("1"), use("2")), asked(result("2"))],
     ["u:hi", "a:f(1) f(2)", "t:1=%s 2=r" % NO_RESULT], "without a result"),
    ([USER, said(use("1"))], ["u:hi", "a:f(1)", "t:1=" + NO_RESULT], "without a result"),
    ([USER, said(use("1")), said(text("x")), USER],
     ["u:hi", "a:x f(1)", "t:1=" + NO_RESULT, "u:hi"], "without a result"),
    ([asked(result("9", "lost"), text("x"))], ["u:%slost x" % ORPHAN], "unknown call"),
    ([USER, said(use("1")), asked(result("1")), said(text("x")), asked(result("1", "late"))],
     ["u:hi", "a:f(1)", "t:1=r", "a:x", "u:%slate" % ORPHAN], "unknown call"),
    ([USER, said(use("1")), asked(result("1", "x"), result("1", "y"))],
     ["u:hi", "a:f(1)", "t:1=x", "u:%sy" % ORPHAN], "unknown call"),
    # Ids used twice or empty.
    ([USER, said(use("1")), asked(result("1", "x")), said(use("1")), asked(result("1", "y"))],
     ["u:hi", "a:f(1)", "t:1=x", "a:f(1_2)", "t:1_2=y"], "used twice"),
    ([USER, said(use("1"), use("1")), asked(result("1", "x"), result("1", "y"))],
     ["u:hi", "a:f(1) f(1_2)", "t:1=x 1_2=y"], "used twice"),
    ([USER, said(use("1_2")), asked(result("1_2")), said(use("1"), use("1")),
      asked(result("1", "x"), result("1", "y"))],
     ["u:hi", "a:f(1_2)", "t:1_2=r", "a:f(1) f(1_3)", "t:1=x 1_3=y"], "used twice"),
    ([USER, said(use("")), asked(result(""))], ["u:hi", "a:f(call)", "t:call=r"], None),
    ([USER, said(use(""), use("")), asked(result("", "x"), result("", "y"))],
     ["u:hi", "a:f(call) f(call_2)", "t:call=x call_2=y"], None),
    # Pictures of tools come behind all results of the turn.
    ([USER, said(use("1")), asked(result("1", [picture()]))], ["u:hi", "a:f(1)", "t:1=",
                                                               "u:" + SHOWN], None),
    ([USER, said(use("1"), use("2")), asked(result("1", [text("x"), picture()]), result("2"),
                                            text("look"))],
     ["u:hi", "a:f(1) f(2)", "t:1=x 2=r", "u:" + SHOWN, "u:look"], None),
    ([asked(result("9", [text("x"), picture()]))], ["u:%sx IMAGE" % ORPHAN], "unknown call")]


@pytest.mark.parametrize("messages,sent,note", HISTORIES, ids=range(len(HISTORIES)))
def test_histories(messages, sent, note):
    body, notes = translate("messages", request("messages", messages=messages))
    check_messages(at(body, "params.messages"))
    assert shorten(at(body, "params.messages")) == sent
    assert has_note(notes, note) if note else notes == []


def test_chat_histories():
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}}
             for name in "12"]
    messages = [USER, {"role": "assistant", "content": None, "reasoning_content": "a",
                       "tool_calls": calls},
                {"role": "tool", "tool_call_id": "2", "content": "y"},
                {"role": "tool", "tool_call_id": "1", "content": [text("x"), {
                    "type": "image_url", "image_url": {"url": PNG}}]}, USER]
    params = params_of("chat", request("chat", messages=messages))
    assert shorten(params["messages"]) == ["u:hi", "a:*a* f(1) f(2)", "t:1=x 2=y", "u:" + SHOWN,
                                           "u:hi"]


def test_nothing_left_to_answer():
    for messages in ([asked(text(""))], [said()], [{"role": "system", "content": ""}],
                     [asked(text(" \n"))], [asked(text(" ")), said(text("\n"))],
                     [asked(), {"role": "system", "content": [text("")]}]):
        assert refusal("messages", request("messages", messages=messages)).param == "messages"


# System messages amid a conversation: each upstream format's messages in short, `s:` for OpenAI's
# own role and `<words>` for a reminder.

BUILDERS = {"alpha": ccproxy.build_alpha, "openai": ccproxy.build_openai,
            "anthropic": ccproxy.build_anthropic}
REMINDER = re.compile("<system-reminder>\n(.*?)\n</system-reminder>", re.S)


def system(*parts, role="system", **members):
    return {"role": role, "content": parts[0] if len(parts) == 1 else list(parts), **members}


def upstream_messages(fmt, messages, face="messages", **members):
    """(system texts, messages) as they are sent in an upstream format."""
    name = "input" if face == "responses" else "messages"
    prompt = read_prompt(face, request(face, **{name: messages}, **members))
    body = json.loads(BUILDERS[fmt](prompt, "S"))
    body = body.get("params", body)
    sent = body["messages"]
    if fmt == "openai" and sent[0]["role"] == "system":
        return sent[0]["content"], sent[1:]
    return body.get("system", []), sent


def flatten(messages):
    """Every part of a request with its role, in order: what a provider's cache goes by."""
    flat = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            flat.append([message["role"], part])
        flat += [[message["role"], call] for call in message.get("tool_calls", [])]
    return flat


def short_part(role, part):
    """A part of any format in short."""
    if isinstance(part, str):
        return {"tool": "=%s", "system": "s:%s"}.get(role, "%s") % part
    kind = part["type"].replace("_", "-")
    if kind in ("tool-result", "tool-call", "tool-use", "function"):
        return "=" + (part["content"] if "content" in part else part["output"]["value"]) \
            if kind == "tool-result" else "f()"
    return "IMAGE" if kind.startswith("image") else REMINDER.sub(r"<\1>", part.get("text", ""))


def short_of(messages):
    return " ".join(short_part(role, part) for role, part in flatten(messages) if part is not None)


MID = [     # (messages, what user parts, calls and results become; a reminder is <words>)
    ([USER, system("s"), said(text("a")), USER], "hi <s> a hi"),
    ([USER, said(text("a")), system("s"), USER], "hi a <s> hi"),
    ([USER, said(text("a")), system("s", role="developer"), USER], "hi a <s> hi"),
    ([USER, said(text("a")), USER, system("s")], "hi a hi <s>"),
    ([USER, said(text("a")), system("s"), system("t"), USER], "hi a <s> <t> hi"),
    ([system("lead"), USER, system("s"), USER], "hi <s> hi"),
    ([said(text("a")), system("s"), USER], "a <s> hi"),
    ([USER, system([text("s"), text("t")]), USER], "hi <s\n\nt> hi"),
    ([USER, system([text("x-anthropic-billing-header: cch=1"), text("")]), USER], "hi hi"),
    # Calls that are open: the results come first.
    ([USER, said(use("1")), system("s"), asked(result("1"))], "hi f() =r <s>"),
    ([USER, said(use("1")), system("s"), asked(text("x"), result("1"))], "hi f() =r <s> x"),
    ([USER, said(use("1")), asked(result("1")), system("s"), USER], "hi f() =r <s> hi"),
    ([USER, said(use("1"), use("2")), asked(result("1")), system("s"), asked(result("2", "q"))],
     "hi f() f() =r =q <s>"),
    ([USER, said(use("1")), system("s"), said(use("2")), asked(result("1")),
      asked(result("2", "q"))], "hi f() f() =r =q <s>"),
    ([USER, said(use("1")), system("s"), said(text("a")), system("t"), asked(result("1")), USER],
     "hi a f() =r <s> <t> hi"),
    ([USER, said(use("1")), system("s"), asked(result("1", [text("r"), picture()]))],
     "hi f() =r Pictures returned by the tool f: IMAGE <s>"),
    ([USER, said(use("1")), system("s"), USER], "hi f() =%s <s> hi" % NO_RESULT),
    ([USER, said(use("1")), asked(result("1")), system("s"), said(text("a")), USER],
     "hi f() =r <s> a hi")]


@pytest.mark.parametrize("fmt", sorted(BUILDERS))
@pytest.mark.parametrize("messages,sent", MID, ids=range(len(MID)))
def test_system_messages_keep_their_place(fmt, messages, sent):
    """Behind all results of open calls, in front of what the user says next."""
    texts, messages = upstream_messages(fmt, messages)
    assert "s" not in texts and all("s" != block for block in texts)
    if fmt == "anthropic" and messages[0]["content"][0].get("text") == "(begin)":
        del messages[0]
    shown = short_of(messages)
    if fmt == "openai":
        assert "<" not in shown
        sent = re.sub("<(.*?)>", r"s:\1", sent, flags=re.S)
    assert shown == sent


def test_a_reminder_begins_the_next_user_turn_or_is_one_of_its_own():
    _, sent = upstream_messages("alpha", [USER, said(text("a")), system("s"), USER])
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[2]["content"] == [text("<system-reminder>\ns\n</system-reminder>"), text("hi")]
    _, sent = upstream_messages("alpha", [USER, system("s"), said(text("a")), USER])
    assert [message["role"] for message in sent] == ["user", "user", "assistant", "user"]


@pytest.mark.parametrize("fmt", ["alpha", "anthropic"])
@pytest.mark.parametrize("message", [
    system("s", cache_control={"type": "ephemeral"}),
    system([text("s", cache_control={"type": "ephemeral"})])])
def test_a_reminder_keeps_its_cache_control(fmt, message):
    _, sent = upstream_messages(fmt, [USER, said(text("a")), message, USER])
    assert sent[2]["content"][0]["cache_control"] == {"type": "ephemeral"}
    assert "cache_control" not in sent[2]["content"][1]


GROWING = [     # a conversation by its requests: what each adds to the one before
    [system("lead"), USER, system("env", cache_control={"type": "ephemeral"})],
    [said(text("a"), use("1"), use("2")), system("s"), asked(result("1"), result("2"))],
    [said(use("3")), asked(result("3", [text("r"), picture()])), system("t"), system("u")],
    [said(text("b")), system("v"), USER],
    [said(use("1")), system("w"), said(use("4")), asked(result("1")), system("x"),
     asked(result("4")), asked(text("and"))],
    [system("y")], [said(text("c")), USER]]


@pytest.mark.parametrize("fmt", sorted(BUILDERS))
@pytest.mark.parametrize("face", ["chat", "messages"])
def test_a_longer_conversation_begins_as_the_shorter_one(face, fmt):
    """The provider's cache lives on equal beginnings: system texts, messages, their parts."""
    messages, before, lead = [], [], None
    for added in GROWING:
        messages += added
        texts, sent = upstream_messages(fmt, messages, face)
        flat = flatten(sent)
        assert flat[:len(before)] == before and len(flat) > len(before)
        assert texts == (lead or texts)
        before, lead = flat, texts


ALONE = [       # messages without any but system messages: (messages, system texts, user's parts)
    ([system("a")], [], ["a"]), ([system("a", role="developer")], [], ["a"]),
    ([system("a"), system("b"), system([text("c"), text("d")])], ["a", "b"], ["c", "d"]),
    ([system("a"), system("")], [], ["a"]), ([system("a"), asked(text(""))], [], ["a"])]


@pytest.mark.parametrize("fmt", sorted(BUILDERS))
def test_white_space_alone_is_nothing_in_any_format(fmt):
    messages = [system(" "), asked(text("\n"), text("one")), said(text(" ")), system("\n"),
                asked(text(" "), text("two"))]
    texts, sent = upstream_messages(fmt, messages)
    assert texts in ([], " ") and short_of(sent) == "one two"


@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
@pytest.mark.parametrize("messages,texts,parts", ALONE, ids=range(len(ALONE)))
def test_system_messages_alone_are_answered(face, messages, texts, parts):
    name = "input" if face == "responses" else "messages"
    body, notes = translate(face, request(face, **{name: messages}))
    params = body["params"]
    shown = [] if params["system"] == " " else [block["text"] for block in params["system"]]
    assert "".join(shown).split() == texts
    assert params["messages"] == [{"role": "user", "content": [text(part) for part in parts]}]
    assert has_note(notes, "repaired=")
    prompt = read_prompt(face, request(face, **{name: messages}))
    assert ccproxy.first_user_text(prompt) == "\n".join(parts)


def test_system_of_the_request_is_not_made_the_users():
    error = refusal("messages", request("messages", system="s", messages=[asked(text(""))]))
    assert error.param == "messages"


def test_a_system_message_does_not_change_what_a_conversation_is_known_by():
    messages = [said(text("x")), system("s"), USER]
    assert ccproxy.first_user_text(read_prompt("chat", request("chat", messages=messages))) == "hi"


def test_a_request_wide_cache_control_on_a_system_message():
    cache = {"type": "ephemeral"}
    _, sent = upstream_messages("alpha", [USER, system("s")], cache_control=cache)
    assert sent[1]["content"][0]["cache_control"] == cache


def test_many_system_messages_wait_for_a_result():
    messages = [USER, said(*[text("a")] * 2000, use("1"))] + [system("s")] * 20_000 + [
        asked(result("1"))]
    _, sent = upstream_messages("alpha", messages)
    assert [len(message["content"]) for message in sent] == [1, 2001, 1, 20_000]


def random_history(rng):
    ids = ["1", "2", "3", ""]
    messages = []
    for _ in range(rng.randrange(1, 9)):
        if rng.random() < 0.5:
            parts = [rng.choice([text("a"), text(""), {"type": "thinking", "thinking": "t"},
                                 use(rng.choice(ids), rng.choice(["f", "g.h", "x" * 70]))])
                     for _ in range(rng.randrange(4))]
            messages.append(said(*parts))
        elif rng.random() < 0.3:
            messages.append(system(rng.choice(["s", "", [text("s"), text("t")]])))
        else:
            parts = [rng.choice([text("b"), text(""), picture(), result(rng.choice(ids)),
                                 result(rng.choice(ids), [text("x"), picture()])])
                     for _ in range(rng.randrange(4))]
            messages.append(asked(*parts))
    return messages


def test_random_histories_are_made_fit():
    rng = random.Random(1)
    for _ in range(400):
        messages = random_history(rng)
        try:
            body, notes = translate("messages", request("messages", messages=messages))
        except ccproxy.ProxyError as error:
            assert error.param == "messages"
            continue
        params = body["params"]
        try:
            check_params(params)
        except AssertionError:
            raise AssertionError(json.dumps(messages)) from None
        sent, given = json.dumps(params["messages"]), json.dumps(messages)
        assert sent.count('"image":') == given.count('"media_type"')
        assert sent.count('"tool-call"') == given.count('"tool_use"')
        assert sent.count('"text": "b"') == given.count('"text": "b"')
        leading = [one["role"] == "system" for one in messages + [USER]].index(False)
        reminders = sum(one["role"] == "system" and one["content"] != ""
                        for one in messages[leading:])
        alone = has_note(notes, "last system message")
        assert alone or sent.count("<system-reminder>") == reminders


def test_many_equal_ids():
    calls = [use("1")] * 3000
    params = params_of("messages", request("messages", messages=[USER, said(*calls)]))
    assert len({part["toolCallId"] for part in at(params, "messages.1.content")}) == 3000


# Names.

NAMES = ["f", "a_b-C9", "x" * 64, "a.b", "a:b", "a b", "a/b", "x" * 65, "\u00e9", "\U0001f680", "-"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_mapped_and_mapped_back(name):
    tools = [{"name": name}, {"name": "other"}]
    messages = [USER, said(use("1", name)), asked(result("1"))]
    prompt = read_prompt("messages", request("messages", tools=tools, messages=messages,
                                             tool_choice={"type": "tool", "name": name}))
    params = json.loads(ccproxy.build_alpha(prompt, "S"))["params"]
    sent = params["tools"][0]["name"]
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", sent)
    assert at(params, "messages.1.content.0.toolName") == sent
    assert at(params, "messages.2.content.0.toolName") == sent
    assert params["tool_choice"]["name"] == sent and params["tools"][1]["name"] == "other"
    assert (sent == name) == (re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is not None)
    if sent != name:
        assert prompt.names[sent].name == name and has_note(prompt.notes, "renamed=")
        answered = ccproxy.Block("tool", "1", sent)
        ccproxy.restore_names(prompt.names)(ccproxy.Open(answered))
        assert answered.name == name
    else:
        assert not prompt.names and prompt.notes == []


def test_names_that_become_equal_stay_different():
    names = ["a.b", "a:b", "a_b", "x" * 65, "x" * 66, "x" * 64]
    params = params_of("messages", request("messages", tools=[{"name": name} for name in names]))
    assert len({tool["name"] for tool in params["tools"]}) == len(names)
    assert params["tools"][2]["name"] == "a_b"


def test_names_are_the_same_on_every_turn():
    """A name depends on nothing but itself, else the cache would be lost."""
    alone = params_of("messages", request("messages", tools=[{"name": "a.b"}]))
    among = params_of("messages", request("messages", tools=[{"name": "z.z"}, {"name": "a.b"}]))
    assert alone["tools"][0] == among["tools"][1]


# JSON answers.

FORMATS = [     # (face, members, words of the instruction, None for no instruction)
    ("chat", {"response_format": {"type": "json_object"}}, "JSON object"),
    ("chat", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": {"type": "object", "title": "UNIQUE"}, "strict": True}}}, "UNIQUE"),
    ("chat", {"response_format": {"type": "text"}}, None),
    ("chat", {"response_format": None}, None),
    ("chat", {"response_format": {}}, None),
    ("messages", {"output_config": {"format": {"type": "json_schema", "schema": {
        "type": "object", "title": "UNIQUE"}}}}, "UNIQUE"),
    ("messages", {"output_config": {}}, None), ("messages", {"output_config": {"format": None}},
                                                None)]


@pytest.mark.parametrize("face,members,words", FORMATS, ids=range(len(FORMATS)))
def test_json_formats(face, members, words):
    system = [{"role": "system", "content": "first"}, USER]
    prompt = read_prompt(face, request(face, messages=system, **members))
    texts = [block["text"] for block in json.loads(
        ccproxy.build_alpha(prompt, "S"))["params"]["system"]]
    assert texts[0].strip() == "first" and len(texts) == (2 if words else 1)
    fenced = [one for one in ccproxy.choose_filters(prompt) if "text" in one.touches]
    assert len(fenced) == (1 if words else 0)
    if words:
        assert words in texts[-1] and has_note(prompt.notes, "json_format")


# What a conversation is known by.

FIRST = [([USER], "hi"), ([{"role": "system", "content": "s"}, USER], "hi"),
         ([said(text("x")), USER, asked(text("later"))], "hi"),
         ([asked(text("a"), text("b"))], "a\nb"),
         ([USER, said(use("1")), asked(result("1"), text("later"))], "hi")]


@pytest.mark.parametrize("messages,words", FIRST, ids=range(len(FIRST)))
def test_first_user_text(messages, words):
    prompt = read_prompt("messages", request("messages", messages=messages))
    assert ccproxy.first_user_text(prompt) == words
