"""The documented upstream over real sockets, in both of its formats and in every API.

All fault tests of tests/test_faults.py run here once more, its answers said in OpenAI's and in
Anthropic's words: each row in one of the six ways, another one in each format, and in all six
with CCPROXY_TEST_UPSTREAM=openai or =anthropic set.  Then comes what only this upstream has: its
requests, its choice, its answers' contents, and its refusal of plans without access.
"""
from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import sys
import types

import pytest
from fake_provider import PATHS as UPSTREAM_PATHS
from fake_provider import SSE_OF, say_in
from fake_upstream import CHUNKED_HEAD, FakeProxy, FakeUpstream, chunked, raw, status, stream
from harness import UPSTREAM_API, Proxy, ccproxy, fold_chat, fold_messages

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = {"openai": "deepseek/deepseek-v4-flash", "anthropic": "claude-sonnet-4-6"}
FORMATS = [UPSTREAM_API] if UPSTREAM_API else list(MODELS)

# The fault tests in other words.  A change is (what stands in the file, what is to stand there);
# one that finds nothing fails, so that no change of the file passes unseen.

DELTAS = {      # a data line with one text delta, before and behind its text
    "openai": (b'data: {"choices":[{"index":0,"delta":{"content":"', b'"}}]}'),
    "anthropic": (b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
                  b'"text":"', b'"}}')}
ENDINGS = {
    "openai": b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
              b'data: [DONE]\n',
    "anthropic": b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n'
                 b'data: {"type":"message_stop"}\n'}
CHANGES = [
    # all that is made of events is said in the other API
    ("\n\nPATHS = ", "\nplain_ndjson, plain_answer = ndjson, text_answer\n"
     "ndjson = lambda *events: say_in(API, plain_ndjson(*events))\n"
     "text_answer = lambda *texts: say_in(API, plain_answer(*texts))\n\nPATHS = "),
    # what the file spells out
    (r"""SHORT = b'{"type":"text-delta","text":"Hi"}\n{"type":"finish"}\n'""",
     r"""SHORT = BEFORE + b"Hi" + BEHIND + b"\n\n" + ENDING"""),
    (r"""b'"Hi"}\n'""", r"""(b"Hi" + BEHIND + b"\n")"""),
    (r"""UTF8 = ndjson({"type": "text-delta", "id": "0", "text": ODD})""",
     r"""UTF8 = BEFORE + ODD.encode() + BEHIND + b"\n\n" """),
    (r"""json.dumps({"type": "text-delta", "id": "0", "text": ODD + "\n\"\\/"}).encode() + b"\n" """
     .rstrip(), r"""BEFORE + json.dumps(ODD + "\n\"\\/").encode()[1:-1] + BEHIND + b"\n\n" """),
    ("UTF8[:-3]", r"""UTF8[:-len(BEHIND + b"\n\n")]"""),
    ("""BOTH.index(b'"text":')""", "BOTH.index(ODD.encode())"),
    (r"""b'{"type":"text-delta","id":"0","text":"%b"}\n' % (""",
     r"""(BEFORE + b"%%b" + BEHIND + b"\n\n") % (""".replace("%%", "%")),
    (r"""b'{"type":"text-delta","id":"0","text":"%b"}\n' % piece""",
     r"""(BEFORE + b"%b" + BEHIND + b"\n\n") % piece"""),
    ("""b'{"type":"text-delta","id":"0","text":"' + """, "BEFORE + "),
    # lines of SSE, not of JSON
    (r'b"event: x\nid: 1\ndata: %b\n\n: waiting\n\n" % line', r'b"id: 1\n%b\n: waiting\n" % line'),
    (r'b"".join(b"data:%b\n\n" % line for line in GOOD.splitlines())',
     'GOOD.replace(b"data: ", b"data:")'),
    (r'b" \t%b \n" % line', r'b"%b \t\n" % line'), ("GOOD[:-1]", "GOOD.rstrip()"),
    ("json.dumps(json.loads(line)).encode()", "spaced(line)"),
    ('{"type": "start-step", "x"', '{"type": "ping", "x"'),
    # another upstream, and what its requests look like
    ('{"model": "vendor/model", "stream"', '{"model": MODEL, "stream"'),
    ('{\n        "stream": way.streamed, "input"',
     '{\n        "model": MODEL, "stream": way.streamed, "input"'),
    ("useProviderModels=False", "upstream='provider', useProviderModels=False"),
    ('"/alpha/generate"', "UPSTREAM_PATH"),
    ('"POST /alpha/generate HTTP/1.1"', '"POST %s HTTP/1.1" % UPSTREAM_PATH'),
    ('request.json["params"]["messages"][0]["content"][0]["text"]', "user_text(request.json)"),
    ('    assert len({call.json["threadId"] for call in stage.calls}) == 1\n', ""),
    ('    assert len({call.field("x-session-id") for call in stage.calls}) == 1\n', "")]
OTHERWISE = {       # rows that these formats take in another way
    "openai": {"nothing": "error: null is no error", "an empty object": "nor is this",
               "a start-step beyond the limit": "no line is passed over unread"},
    "anthropic": {"a start-step beyond the limit": "no line is passed over unread"}}
# What goes wrong in these, goes wrong below all formats: each row in one of them, for time.
FRAMING = ("test_before_any_text", "test_redirects", "test_statuses", "test_endless",
           "test_pooled_connections_die_while_idle")
FIXTURES = ("stage", "elsewhere", "tls_stages", "silences")


def spaced(line):
    """A line of SSE with the spaces that Python's json puts."""
    if not line.startswith(b"data: {"):
        return line
    return b"data: " + json.dumps(json.loads(line[6:])).encode()


def user_text(body):
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def faults_in(api):
    """tests/test_faults.py as a module whose upstream speaks this API."""
    path = os.path.join(HERE, "test_faults.py")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for old, new in CHANGES:
        assert old in text, old
        text = text.replace(old, new)
    module = types.ModuleType("faults_" + api)
    sys.modules[module.__name__] = module
    vars(module).update(
        __file__=path, API=api, MODEL=MODELS[api], UPSTREAM_PATH=UPSTREAM_PATHS[api],
        BEFORE=DELTAS[api][0], BEHIND=DELTAS[api][1], ENDING=ENDINGS[api], say_in=say_in,
        spaced=spaced, user_text=user_text)
    exec(compile(text, path, "exec", dont_inherit=True), vars(module))
    return module


FAULTS = {api: faults_in(api) for api in FORMATS}
FIRST = FAULTS[FORMATS[0]]
KEYS, QUICK, THINK, WAYS, ask, each, each_way, told = (
    FIRST.KEYS, FIRST.QUICK, FIRST.THINK, FIRST.WAYS, FIRST.ask, FIRST.each, FIRST.each_way,
    FIRST.told)
check_broken, check_keys, check_refusal = FIRST.check_broken, FIRST.check_keys, FIRST.check_refusal


def rows_of(mark):
    """[(values by name, id)] of one parametrize mark."""
    names = [name.strip() for name in mark.args[0].split(",")]
    ids = mark.kwargs.get("ids") or [str(value) for value in mark.args[1]]
    return [(dict(zip(names, value if len(names) > 1 else (value,))), shown)
            for value, shown in zip(mark.args[1], ids)]


def choose_rows(function, api):
    """The function's cases: each row in one way of asking, and in another for each API; where
    there are no rows, every third way; all of them where one API alone is tested."""
    tables = [rows_of(mark) for mark in reversed(getattr(function, "pytestmark", []))]
    ways = [rows for rows in tables if set(rows[0][0]) & {"way", "api"}]
    others = [rows for rows in tables if rows not in ways]
    kept = [case for case in itertools.product(*others)
            if not {shown for _, shown in case} & set(OTHERWISE[api])]
    if function.__name__ in FRAMING and not UPSTREAM_API:
        kept = kept[FORMATS.index(api)::2]
    chosen = []
    for number, case in enumerate(kept):
        asked = ways[0] if ways else [({}, "")]
        if not UPSTREAM_API:
            place = number + FORMATS.index(api) * (3 if others else 1)
            asked = asked[place % len(asked)::len(asked) if others else 3]
        chosen += [(*case, way) for way in asked]
    function.pytestmark = []
    if tables:
        names = sorted(name for values, _ in chosen[0] for name in values)
        merged = [{name: value for values, _ in case for name, value in values.items()}
                  for case in chosen]
        function.pytestmark = [pytest.mark.parametrize(
            names, [[values[name] for name in names] for values in merged],
            ids=["-".join(shown for _, shown in case if shown) for case in chosen]).mark]
    return function


def own_fixture(name):
    """The fixture of this name as one of the class that asks for it."""
    def run(request):
        made = inspect.unwrap(vars(FAULTS[request.cls.api])[name])
        if inspect.isgeneratorfunction(made):
            yield from made()
        else:
            yield made()
    return pytest.fixture(scope="class", name=name)(run)


def fault_class(api):
    """A class of all fault tests over this API."""
    tests = {name: staticmethod(choose_rows(value, api)) for name, value in
             vars(FAULTS[api]).items() if name.startswith("test_")}
    assert len(tests) > 25
    return type("TestFaults", (), {"api": api, **tests})


globals().update({"own_" + name: own_fixture(name) for name in FIXTURES})
if "openai" in FORMATS:
    TestFaultsInOpenAI = fault_class("openai")
if "anthropic" in FORMATS:
    TestFaultsInAnthropic = fault_class("anthropic")


# The stage of all that follows: both formats through one proxy, whose upstream is `provider`.


each_format = pytest.mark.parametrize("api", FORMATS)
only_by_name = pytest.mark.skipif(bool(UPSTREAM_API), reason="one format serves all models now")


def bed_of(upstream):
    """A fixture: a proxy with this option, and its upstream."""
    @pytest.fixture(scope="module")
    def run():
        fake = FakeUpstream()
        proxy = Proxy(QUICK, apiBase=fake.base, upstream=upstream, useProviderModels=False)
        yield proxy, fake
        proxy.close()
        fake.close()
        assert "Traceback" not in proxy.log.getvalue(), proxy.log.getvalue()
    return run


bed = bed_of("provider")


def answer_of(bed, api, way, *scripts, always=None, tries=1, **members):
    """The answer of a model of this format to calls that meet these scripts; the calls' keys,
    addresses and number are checked."""
    proxy, fake = bed
    key, good = next(KEYS), fake.default
    fake.requests[:], fake.scripts = [], list(scripts)
    fake.default = always or good
    try:
        answer = ask(proxy, way, key, **{"model": MODELS[api], **members})
    finally:
        fake.default = good
    assert [call.line for call in fake.requests] == [
        "POST %s HTTP/1.1" % UPSTREAM_PATHS[api]] * tries
    check_keys(fake.requests, key)
    assert not any(name.lower().startswith(("x-command", "x-cli", "x-session", "x-project"))
                   for call in fake.requests for name, _ in call.fields)
    return answer


# What answers hold.


def chat_shown(way, answer):
    if way.streamed:
        message, reason, usage = fold_chat(answer.frames)
    else:
        choice, = answer.json["choices"]
        message, reason, usage = choice["message"], choice["finish_reason"], answer.json["usage"]
    calls = [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
             for call in message.get("tool_calls") or ()]
    return {"text": message["content"] or "", "thinking": message.get("reasoning_content", ""),
            "calls": calls, "end": reason,
            "tokens": (usage["prompt_tokens"], usage["completion_tokens"]),
            "read": usage["prompt_tokens_details"]["cached_tokens"]}


def messages_shown(way, answer):
    message = fold_messages(answer.frames) if way.streamed else answer.json
    blocks, usage = message["content"], message["usage"]
    read = usage.get("cache_read_input_tokens")
    write = usage.get("cache_creation_input_tokens")
    return {"text": "".join(one.get("text", "") for one in blocks),
            "thinking": "".join(one.get("thinking", "") for one in blocks),
            "signatures": [one["signature"] for one in blocks if one["type"] == "thinking"],
            "calls": [(one["id"], one["name"], one["input"]) for one in blocks
                      if one["type"] == "tool_use"], "end": message["stop_reason"],
            "tokens": (usage["input_tokens"] + (read or 0) + (write or 0),
                       usage["output_tokens"]), "read": read or 0, "write": write}


def responses_shown(way, answer):
    body = answer.frames[-1]["response"] if way.streamed else answer.json
    output, usage = body["output"], body["usage"]
    incomplete = body["incomplete_details"]
    return {"text": "".join(part["text"] for one in output if one["type"] == "message"
                            for part in one["content"]),
            "thinking": "".join(part["text"] for one in output if one["type"] == "reasoning"
                                for part in one["summary"]),
            "calls": [(one["call_id"], one["name"], json.loads(one["arguments"]))
                      for one in output if one["type"] == "function_call"],
            "end": incomplete["reason"] if incomplete else body["status"],
            "tokens": (usage["input_tokens"], usage["output_tokens"]),
            "read": usage["input_tokens_details"]["cached_tokens"]}


SHOWN = {"chat": chat_shown, "messages": messages_shown, "responses": responses_shown}
ENDS = {"stop": ("stop", "end_turn", "completed"), "tool_calls": ("tool_calls", "tool_use",
                                                                  "completed"),
        "length": ("length", "max_tokens", "max_output_tokens"),
        "filtered": ("content_filter", "refusal", "content_filter")}
WORDS = "Gr\u00fc\u00dfe \U0001f469\u200d\U0001f680 \u65e5\u672c e\u0301 \u2028\t\n\"\\"
OSLO = [("start", "call_1", "f"), ("more", "call_1", '{"city":'), ("more", "call_1", '"Oslo"}'),
        ("stop", "call_1")]
PAULO = [("start", "call_2", "g"), ("more", "call_2", '{"city": "S\u00e3o Paulo"}'),
         ("stop", "call_2")]
CALLS = [("call_1", "f", {"city": "Oslo"}), ("call_2", "g", {"city": "S\u00e3o Paulo"})]
CONTENTS = [        # what is said, how it ends, text, thinking, calls
    ("text", [("text", "Hello"), ("text", " there")], "stop", "Hello there", "", []),
    ("unicode", [("text", one) for one in WORDS], "stop", WORDS, "", []),
    ("thinking", [("thinking", "Hm"), ("thinking", "m."), ("signature", "c2lnbg=="),
                  ("text", "Yes.")], "stop", "Yes.", "Hmm.", []),
    ("a call", OSLO, "tool_calls", "", "", CALLS[:1]),
    ("all of it", [("thinking", "Hmm."), ("signature", "c2lnbg=="), ("text", "Both."), *OSLO,
                   *PAULO], "tool_calls", "Both.", "Hmm.", CALLS),
    ("length", [("text", "Half a")], "length", "Half a", "", []),
    ("filtered", [("text", "I")], "filtered", "I", "", [])]
FIGURES = {"input": 30, "output": 9, "read": 20, "write": 4, "reasoning": 5}


@each_way
@each_format
@each("steps, end, text, thinking, calls", CONTENTS)
def test_contents(bed, api, way, steps, end, text, thinking, calls):
    """All that an answer holds, with its end and its figures."""
    data = SSE_OF[api]([*steps, ("usage", FIGURES), ("end", end)])
    tools = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    if way.api == "messages":
        tools = {"name": "f", "input_schema": {"type": "object"}}
    elif way.api == "chat":
        tools = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    more = {"stream_options": {"include_usage": True}} if way.api == "chat" else {}
    answer = answer_of(bed, api, way, stream(data), tools=[tools], **THINK[way.api], **more)
    assert answer.status == 200, answer.body
    shown = SHOWN[way.api](way, answer)
    signatures, written = shown.pop("signatures", []), shown.pop("write", None)
    assert shown == {"text": text, "thinking": thinking, "calls": calls,
                     "end": ENDS[end][list(SHOWN).index(way.api)], "tokens": (30, 9), "read": 20}
    if way.api == "messages":
        assert len(signatures) == bool(thinking) and all(signatures)
        assert written in ((4,) if api == "anthropic" else (None, 0))
        assert api == "openai" or signatures in ([], ["c2lnbg=="])


@each_format
def test_cut_after_thinking(bed, api):
    """While nothing but thinking was shown another call mends it; text is never said twice.  At
    every byte where one format alone is tested."""
    data = SSE_OF[api]([("thinking", "Hmm"), ("text", "Hi"), ("end", "stop")])
    text_end = data.index(b"\n", data.index(b'"Hi"')) + 1
    end = data.index(b"\n", data.index(b"[DONE]" if api == "openai" else b"data: " + b'{"type":'
                                       b'"message_stop"')) + 1
    for cut in range(0, len(data) + 1, 1 if UPSTREAM_API else 5):
        way = WAYS[cut % 6]
        script = raw(CHUNKED_HEAD + chunked(data[:cut]) if cut else CHUNKED_HEAD, close=True)
        over, seen = cut >= end, cut >= text_end and way.streamed
        answer = answer_of(bed, api, way, script, tries=1 if over or seen else 2, **THINK[way.api])
        if over:
            assert told(way, answer) == ("Hi", "Hmm"), cut
        elif seen:
            assert check_broken(way.api, answer, "upstream")[:2] == ("Hi", "Hmm"), cut
        else:
            text, thought = told(way, answer)
            assert text == "Hello there" and thought in ("", "Hmm"), cut


# What is asked: exactly these headers, this body, and nothing of the client's.


TRACEPARENT = re.compile("00-[0-9a-f]{32}-[0-9a-f]{16}-01")
SETTINGS = {
    "chat": {"messages": [{"role": "system", "content": "Be brief."},
                          {"role": "user", "content": "hi"}], "max_tokens": 900},
    "messages": {"system": "Be brief.", "max_tokens": 900},
    "responses": {"instructions": "Be brief.", "max_output_tokens": 900}}
TOOLS = {
    "chat": {"type": "function", "function": {"name": "f", "description": "d", "parameters": {
        "type": "object"}}},
    "messages": {"name": "f", "description": "d", "input_schema": {"type": "object"}},
    "responses": {"type": "function", "name": "f", "description": "d",
                  "parameters": {"type": "object"}}}
EMPTY = {"type": "object", "properties": {}}
BODIES = {
    "openai": {
        "model": MODELS["openai"], "messages": SETTINGS["chat"]["messages"],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d",
                                                    "parameters": EMPTY}}],
        "max_tokens": 900, "temperature": 0.5, "stream": True,
        "stream_options": {"include_usage": True}},
    "anthropic": {
        "model": MODELS["anthropic"], "max_tokens": 900,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "tools": [{"name": "f", "description": "d", "input_schema": EMPTY}],
        "temperature": 0.5, "stream": True}}


def check_request(request, api, key, line):
    """The request of a call, to the byte of its head."""
    assert request.line == line
    version = [("anthropic-version", "2023-06-01")] if api == "anthropic" else []
    trace = request.field("traceparent")
    assert TRACEPARENT.fullmatch(trace)
    assert request.fields == [
        ("host", request.field("host")), ("authorization", "Bearer " + key),
        ("content-type", "application/json"), ("accept", "*/*"), ("accept-encoding", "identity"),
        ("user-agent", "ccproxy/" + ccproxy.__version__), *version, ("traceparent", trace),
        ("content-length", str(len(request.body)))]


NOSY = {"x-command-code-version": "9", "x-session-id": "s", "anthropic-beta": "b",
        "anthropic-version": "2024-01-01", "openai-organization": "org", "user-agent": "client/1",
        "cookie": "a=b", "x-forwarded-for": "10.0.0.1", "accept-encoding": "gzip"}


@each_way
@each_format
def test_requests(bed, api, way):
    """The same from every API, whatever headers the client sends."""
    proxy, fake = bed
    fake.requests[:] = []
    key = next(KEYS)

    class Nosy:
        @staticmethod
        def request(method, path, body, fields, none):
            return proxy.request(method, path, body, {**fields, **NOSY}, none)
    answer = ask(Nosy, way, key, model=MODELS[api], temperature=0.5, tools=[TOOLS[way.api]],
                 **SETTINGS[way.api])
    assert told(way, answer) == ("Hello there", "")
    request, = fake.requests
    check_request(request, api, key, "POST %s HTTP/1.1" % UPSTREAM_PATHS[api])
    assert request.field("host") == "127.0.0.1:%d" % fake.port
    assert request.json == BODIES[api]


@each_format
def test_through_a_proxy_and_below_a_path(make_proxy, upstream, monkeypatch, api):
    between = FakeProxy()
    monkeypatch.setenv("HTTP_PROXY", between.url)
    proxy = make_proxy(apiBase=upstream.base + "/gate/way/", upstream="provider",
                       useProviderModels=False)
    key = next(KEYS)
    assert told(WAYS[0], ask(proxy, WAYS[0], key, model=MODELS[api])) == ("Hello there", "")
    line = "POST %s/gate/way%s HTTP/1.1" % (upstream.base, UPSTREAM_PATHS[api])
    check_request(upstream.requests[0], api, key, line)
    assert len(between.heads) == 1
    between.close()


@each_way
@each_format
def test_explained(bed, api, way):
    """The dry run tells the request as it would be sent, and nobody is called."""
    proxy, fake = bed
    fake.requests[:] = []
    fields = {"x-ccproxy-dry-run": "1"}
    body = {"model": MODELS[api], "stream": way.streamed, "max_tokens": 900, "input": "hi",
            "messages": [{"role": "user", "content": "hi"}]}
    paths = {"chat": "/v1/chat/completions", "messages": "/v1/messages",
             "responses": "/v1/responses"}
    key = next(KEYS)
    answer = proxy.request("POST", paths[way.api], body, fields, key)
    assert answer.status == 200 and not fake.requests
    assert answer.json["url"] == fake.base + UPSTREAM_PATHS[api]
    assert ("anthropic-version" in answer.json["headers"]) is (api == "anthropic")
    assert key.encode() not in answer.body


# Which upstream serves.


def lines(fake):
    return [request.line.split(" ")[1] for request in fake.requests]


def choose(proxy, way, word, key=None, **members):
    """A request with x-ccproxy-upstream."""

    class Choosing:
        @staticmethod
        def request(method, path, body, fields, none):
            return proxy.request(method, path, body, {**fields, "x-ccproxy-upstream": word}, none)
    return ask(Choosing, way, key or next(KEYS), **members)


plain_bed = bed_of("alpha")
ALPHA = "/alpha/generate"
CHOICES = [     # the header, and what it makes of a proxy set to alpha and of one set to provider
    ("provider", "provider", "provider"), ("alpha", "alpha", "alpha"),
    ("in capitals", "PROVIDER", "provider"), ("with spaces", "  alpha ", "alpha"),
    ("empty", "", None)]


@only_by_name
@each_way
@each_format
@each("word, chosen", CHOICES)
def test_the_header_chooses(bed, plain_bed, api, way, word, chosen):
    for (proxy, fake), set_to in ((bed, "provider"), (plain_bed, "alpha")):
        fake.requests[:] = []
        answer = choose(proxy, way, word, model=MODELS[api])
        assert told(way, answer) == ("Hello there", "")
        assert lines(fake) == [ALPHA if (chosen or set_to) == "alpha" else UPSTREAM_PATHS[api]]
        fields = [name.lower() for name, _ in fake.requests[0].fields]
        assert ("x-command-code-version" in fields) is (lines(fake) == [ALPHA])


@each_format
@pytest.mark.parametrize("word", ["beta", "URL", "URL with a key", "provider,alpha", "provider/v1",
                                  "openai", "demo", "null", "0", "\u00e9"])
def test_an_unknown_upstream(bed, plain_bed, api, word):
    """A 400 that tells which there are; nobody is called, least of all what the word names."""
    elsewhere = FakeUpstream()
    key = next(KEYS)
    words = {"URL": elsewhere.base, "URL with a key": "%s/%s" % (elsewhere.base, key)}
    word = words.get(word, word)
    for (proxy, fake), way in itertools.product((bed, plain_bed), WAYS):
        before = fake.connections
        answer = choose(proxy, way, word, key, model=MODELS[api])
        message = check_refusal(way, answer, "invalid")
        assert "x-ccproxy-upstream" in message and "alpha" in message and "provider" in message
        assert fake.connections == before and not elsewhere.connections
        assert key.encode() not in answer.body and key not in proxy.log.getvalue()
    elsewhere.close()


def test_health_and_usage_tell(bed, plain_bed):
    """What serves is told; where an account stands is asked alike."""
    asked = []
    for proxy, fake in (bed, plain_bed):
        del fake.side_requests[:]
        body = proxy.request("GET", "/health", None, {}, None).json
        path = "/provider/v1" if proxy is bed[0] else ALPHA
        assert body["upstream"] == fake.base + path
        usage = proxy.request("GET", "/v1/usage", None, {}, next(KEYS))
        assert usage.status == 200 and len(usage.json["keys"]) == 1
        asked.append(sorted(request.line for request in fake.side_requests))
    assert asked[0] == asked[1] and asked[0]


@only_by_name
@pytest.mark.parametrize("how", ["flag", "environment", "file", "not"])
def test_the_screen_tells(start_program, upstream, tmp_path, how):
    """And whoever chose it is told what that means; the program then does so."""
    arguments, environment = {"flag": ["--upstream", "provider"]}.get(how, []), {}
    if how == "environment":
        environment = {"CC_UPSTREAM": "provider"}
    if how == "file":
        path = tmp_path / "config.json"
        path.write_text('{"upstream": "provider"}', encoding="utf-8")
        arguments = ["--config", str(path)]
    program = start_program(*arguments, "--use-provider-models", "false", environment=environment)
    told_path = ALPHA if how == "not" else "/provider/v1"
    assert "upstream  " + upstream.base + told_path + "\n" in program.screen
    assert ("403 upgrade_required" in program.screen) is (how != "not")
    assert program.request("GET", "/health").json["upstream"] == upstream.base + told_path
    for api in FORMATS:
        program.post("/v1/chat/completions", model=MODELS[api])
    assert lines(upstream) == [ALPHA if how == "not" else UPSTREAM_PATHS[api] for api in FORMATS]


CHAT_END, MESSAGES_END = "/provider/v1/chat/completions", "/provider/v1/messages"
LISTED = [      # a model, its supported_endpoints, and which of them is asked
    ("vendor/by-list", [MESSAGES_END], MESSAGES_END),
    ("claude-by-list", [CHAT_END], CHAT_END),
    ("vendor/both", [CHAT_END, MESSAGES_END], CHAT_END),
    ("claude-both", [CHAT_END, MESSAGES_END], MESSAGES_END),
    ("vendor/other", ["/provider/v1/responses"], CHAT_END),
    ("claude-other", [], MESSAGES_END), ("vendor/none", None, CHAT_END),
    ("vendor/bad", "no list", CHAT_END), ("claude-bad", [5, None, {}], MESSAGES_END),
    ("vendor/slash", [MESSAGES_END + "/"], MESSAGES_END),
    ("vendor/short", ["/v1/messages"], MESSAGES_END)]


@only_by_name
def test_the_list_of_models_decides(make_proxy, upstream):
    """Which endpoint a model has; where the list does not tell, its name does."""
    upstream.models = {"object": "list", "data": [
        {"id": name, "object": "model", "created": 1, "owned_by": "x", "name": name,
         "context_length": 1000, **({} if ends is None else {"supported_endpoints": ends})}
        for name, ends, _ in LISTED]}
    proxy = make_proxy(upstream="provider")
    told_names = [row["id"] for row in proxy.request("GET", "/v1/models").json["data"]]
    for number, (name, _, expected) in enumerate(LISTED):
        way = WAYS[number % 6]
        assert name in told_names
        upstream.requests[:] = []
        assert told(way, ask(proxy, way, next(KEYS), model=name)) == ("Hello there", "")
        assert lines(upstream) == [expected], name
    upstream.requests[:] = []
    told(WAYS[0], ask(proxy, WAYS[0], next(KEYS), model="claude-unheard-of"))
    assert lines(upstream) == [MESSAGES_END]


# What it refuses.


GO = "Your Go plan doesn't include API access. Upgrade at https://commandcode.ai/billing"
NO_ACCESS = [
    ("OpenAI's shape", {"error": {"message": GO, "type": "permission_error", "param": None,
                                  "code": "upgrade_required"}}),
    ("Anthropic's shape", {"type": "error", "error": {"type": "permission_error",
                                                      "message": GO}}),
    ("Anthropic's, by its type", {"type": "error", "error": {
        "type": "upgrade_required", "message": GO}}),
    ("the vendor's own", {"success": False, "error": {
        "code": "upgrade_required", "status": 403, "message": GO}})]


@each_way
@each_format
@each("body", NO_ACCESS)
def test_a_plan_without_access(bed, api, way, body):
    """The upstream's words and whose doing it is; one call, and none to another upstream."""
    answer = answer_of(bed, api, way, status(403, body))
    message = check_refusal(way, answer, "plan")
    assert GO in message and "upstream: provider" in message
    assert answer.json["error"]["upstream_code"] == "upgrade_required"


@each_format
def test_a_ring_goes_on_to_the_next_key(bed, api):
    """Of the same upstream, whose plan may have access."""
    proxy, fake = bed
    first, second = next(KEYS), next(KEYS)
    fake.requests[:], fake.scripts = [], [status(403, NO_ACCESS[0][1])]
    answer = ask(proxy, WAYS[0], "%s,%s" % (first, second), model=MODELS[api])
    assert told(WAYS[0], answer) == ("Hello there", "")
    assert lines(fake) == [UPSTREAM_PATHS[api]] * 2
    assert sorted(call.field("authorization") for call in fake.requests) == sorted(
        "Bearer " + key for key in (first, second))


STREAM_ERRORS = [("invalid_request_error", "invalid", 1), ("authentication_error", "key", 1),
                 ("billing_error", "billing", 1), ("permission_error", "permission", 1),
                 ("not_found_error", "not found", 1), ("request_too_large", "too large", 1),
                 ("rate_limit_error", "rate", 3), ("timeout_error", "late", 3),
                 ("overloaded_error", "overloaded", 3), ("api_error", "upstream", 3),
                 ("new_error", "upstream", 3)]


@each_way
@each_format
@each("said, kind, tries", [(row[0], *row) for row in STREAM_ERRORS])
def test_errors_in_the_stream(bed, api, way, said, kind, tries):
    """By their type, which stands for the status that they would have had."""
    error = ("error", said, "Words of the upstream.")
    answer = answer_of(bed, api, way, always=stream(SSE_OF[api]([error])), tries=tries)
    assert check_refusal(way, answer, kind, final=tries == 1) == "Words of the upstream."
    if way.streamed:
        answer = answer_of(bed, api, way, stream(SSE_OF[api]([("text", "Half"), error])))
        text, _, message = check_broken(way.api, answer, kind)
        assert (text, message) == ("Half", "Words of the upstream.")
