"""CONTENT PARTS, TOOLS and MESSAGES TO TURNS: what any API may bring, what is sent of it, what a
wrong type is answered with, and that nothing but ProxyError ever comes of a request."""
from __future__ import annotations

import base64
import copy
import json
import random

import pytest
from harness import ccproxy
from pure import (FACES, PNG, USER, at, check_params, has_note, params_of, read_prompt, refusal,
                  request, text, translate)

FACE_NAMES = sorted(FACES)
SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
IMAGE = {"type": "image", "image": PNG, "mimeType": "image/png"}
CACHE = {"type": "ephemeral"}
DATA = base64.b64encode(b"one\ntwo").decode()


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


# Parts of a user message, in either API: (part, what is sent, words of a note).

def data_url(mime, extra=""):
    return {"type": "image_url", "image_url": {"url": "data:%s%s;base64,AAAA" % (mime, extra)}}


def picture(mime):
    return {"type": "image", "image": "data:%s;base64,AAAA" % mime, "mimeType": mime}


PARTS = [
    (text("a"), [text("a")], None),
    (text(""), [], None), (text(" "), [], None), (text("\n\t \u00a0\u3000"), [], None),
    (" \n", [], None),
    (text(" a\n"), [text(" a\n")], None), (text(" ", cache_control=CACHE), [], None),
    ({"type": "refusal", "refusal": " "}, [], None),
    (text("a", cache_control=CACHE), [text("a", cache_control=CACHE)], None),
    (text("a", cache_control={"type": "ephemeral", "ttl": "1h", "x": 1}),
     [text("a", cache_control={"type": "ephemeral", "ttl": "1h"})], None),
    (text("", cache_control=CACHE), [], None),
    ({"text": "a"}, [text("a")], None),
    ("a", [text("a")], None),
    ({"type": "input_text", "text": "a"}, [text("a")], None),
    ({"type": "output_text", "text": "a"}, [text("a")], None),
    ({"type": "refusal", "refusal": "no"}, [text("no")], None),
    ({"type": "image_url", "image_url": {"url": PNG}}, [IMAGE], None),
    ({"type": "image_url", "image_url": {"url": PNG, "detail": "high"}}, [IMAGE], None),
    ({"type": "image_url", "image_url": PNG}, [IMAGE], None),
    ({"type": "input_image", "image_url": PNG, "detail": "auto"}, [IMAGE], None),
    ({"type": "image", "source": SOURCE}, [IMAGE], None),
    ({"type": "image", "source": {"type": "url", "url": PNG}}, [IMAGE], None),
    ({"type": "image", "source": SOURCE, "cache_control": CACHE}, [{**IMAGE, "cache_control":
                                                                    CACHE}], None),
    (data_url("image/jpeg"), [picture("image/jpeg")], None),
    (data_url("image/jpg"), [picture("image/jpeg")], None),
    (data_url("image/gif"), [picture("image/gif")], None),
    (data_url("image/webp"), [picture("image/webp")], None),
    (data_url("IMAGE/PNG"), [picture("image/png")], None),
    (data_url("image/png", ";charset=utf-8"), [picture("image/png")], None),
    ({"type": "tool_reference", "tool_name": "f"}, [text("Tool available: f")], None),
    ({"type": "search_result", "title": "T", "source": "S", "content": [text("c")]},
     [text("T\nS\nc")], None),
    ({"type": "search_result", "title": "T", "source": "S", "content": [
        text("c"), {"type": "image", "source": SOURCE}]}, [text("T\nS\nc")],
     "pictures in search_result"),
    ({"type": "compaction", "content": "SUMMARY"}, [text("SUMMARY")], None),
    ({"type": "compaction", "content": "SUMMARY", "cache_control": CACHE},
     [text("SUMMARY", cache_control=CACHE)], None),
    ({"type": "compaction", "content": None}, [], None), ({"type": "compaction"}, [], None),
    ({"type": "compaction", "content": [text("a"), text("b")]}, [text("a\nb")], None),
    ({"type": "mid_conv_system", "content": [text("a"), text("b")], "cache_control": CACHE},
     [text("<system-reminder>\na\n\nb\n</system-reminder>", cache_control=CACHE)], None),
    ({"type": "mid_conv_system", "content": []}, [], None),
    ({"type": "wibble", "x": 1}, [], "wibble"),
    ({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "one"},
      "title": "a.txt"}, [text('<document title="a.txt">\none\n</document>')], None),
    ({"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": DATA}},
     [text('<document title="unnamed">\none\ntwo\n</document>')], None),
    ({"type": "document", "source": {"type": "content", "content": [text("one"), text("two")]}},
     [text('<document title="unnamed">\none\ntwo\n</document>')], None),
    ({"type": "document", "source": {"type": "content", "content": "one"}, "cache_control": CACHE},
     [text('<document title="unnamed">\none\n</document>', cache_control=CACHE)], None),
    ({"type": "file", "file": {"filename": "b.md",
                               "file_data": "data:text/markdown;base64," + DATA}},
     [text('<document title="b.md">\none\ntwo\n</document>')], None),
    ({"type": "input_file", "filename": "b.json",
      "file_data": "data:application/json;base64," + DATA},
     [text('<document title="b.json">\none\ntwo\n</document>')], None)]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("part,sent,note", PARTS, ids=range(len(PARTS)))
def test_parts_of_a_user(face, part, sent, note):
    """Faces share the table of parts: clients mix them (FIELD 35)."""
    body, notes = translate(face, request(face, messages=user(text("x"), part)))
    assert at(body, "params.messages.0.content") == [text("x")] + sent
    assert has_note(notes, note) if note else notes == []


# Parts that cannot be shown: (part, the part's path behind its own, the name, words of the reason).

def document(mime, data, **members):
    return {"type": "document", "source": {"type": "base64", "media_type": mime, "data": data},
            **members}


def chat_file(**members):
    return {"type": "file", "file": members}


def source(**members):
    return {"type": "image", "source": members}


UNREADABLE = [
    (document("application/pdf", "JVBERi0=", title="a.pdf"), "", "a.pdf", "application/pdf"),
    (document("application/pdf", "JVBERi0=", title="a\nb\tc"), "", "a b c", "application/pdf"),
    (document("application/pdf", "JVBERi0="), "", "document", "application/pdf"),
    (document("text/plain", "A"), "", "document", "broken"),
    (document("text/plain", "IA=="), "", "document", "empty"),
    ({"type": "document", "source": {"type": "url", "url": "https://example.invalid/a.pdf"},
      "title": "a.pdf"}, "", "a.pdf", "nothing is fetched"),
    ({"type": "document", "source": {"type": "file", "file_id": "file_1"}, "title": "a.pdf"}, "",
     "a.pdf", "no files are kept"),
    ({"type": "document", "source": {"type": "content", "content": []}}, "", "document", "empty"),
    ({"type": "document", "source": {"type": "text", "data": " "}}, "", "document", "empty"),
    ({"type": "document"}, "", "document", "no data"),
    (chat_file(filename="a.pdf", file_data="data:application/pdf;base64,JVBERi0="), "", "a.pdf",
     "application/pdf"),
    (chat_file(file_id="file_1"), "", "document", "no files are kept"),
    ({"type": "input_file", "filename": "a.pdf", "file_id": "file_1"}, "", "a.pdf",
     "no files are kept"),
    ({"type": "input_file", "file_url": "https://example.invalid/a.pdf"}, "", "document",
     "nothing is fetched"),
    ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "", "audio",
     "only text and pictures"),
    ({"type": "input_audio", "input_audio": {}}, "", "audio", "only text and pictures"),
    ({"type": "audio_url", "audio_url": {"url": "https://x.test/a"}}, "", "audio", "only text"),
    ({"type": "video_url", "video_url": {"url": "https://x.test/a"}}, "", "video", "only text"),
    ({"type": "input_video", "input_video": {}}, "", "video", "only text"),
    ({"type": "container_upload", "file_id": "file_1"}, "", "file", "no files are kept"),
    ({"type": "image_url", "image_url": {"url": "https://example.invalid/x.png"}},
     ".image_url.url", "picture", "inline"),
    ({"type": "image_url", "image_url": "http://example.invalid/x.png"}, ".image_url", "picture",
     "inline"),
    ({"type": "image_url", "image_url": "x.png"}, ".image_url", "picture", "inline"),
    (source(type="url", url="https://example.invalid/x.png"), ".source.url", "picture", "inline"),
    ({"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,AAAA"}},
     ".image_url.url", "picture", "image/svg+xml is not one of png, jpeg, gif or webp"),
    (data_url("image/png", ",x"), ".image_url.url", "picture", "inline"),
    ({"type": "image_url", "image_url": {"url": "data:image/png,AAAA"}}, ".image_url.url",
     "picture", "inline"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, ".image_url.url",
     "picture", "empty"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo...[cut]"}},
     ".image_url.url", "picture", "broken"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAAA"}}, ".image_url.url",
     "picture", "broken"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==AAAA"}},
     ".image_url.url", "picture", "broken"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA\u00e9A"}},
     ".image_url.url", "picture", "broken"),
    ({"type": "image_url", "image_url": {"url": ""}}, ".image_url.url", "picture", "empty"),
    ({"type": "image_url", "image_url": {}}, ".image_url.url", "picture", "no data"),
    ({"type": "image_url", "image_url": {"file_id": "file_1"}}, ".image_url.url", "picture",
     "no files are kept"),
    ({"type": "image_url"}, "", "picture", "no data"),
    ({"type": "image"}, "", "picture", "no data"),
    ({"type": "input_image", "file_id": "file_1"}, "", "picture", "no files are kept"),
    (source(type="file", file_id="file_1"), ".source", "picture", "no files are kept"),
    (source(type="base64", media_type="image/tiff", data="AAAA"), ".source.media_type", "picture",
     "image/tiff"),
    (source(type="base64", data="AAAA"), ".source.media_type", "picture", "an unknown type"),
    (source(type="base64", media_type="image/png", data=""), ".source.media_type", "picture",
     "empty"),
    (source(type="base64", media_type="image/png", data="PHN2ZyB4bWxucz0i"), ".source.media_type",
     "picture", "image/svg+xml"),
    (source(type="base64", media_type="image/jpeg", data="AAAAGGZ0eXBoZWlj"),
     ".source.media_type", "picture", "image/heic")]
each_unreadable = pytest.mark.parametrize("part,path,name,reason", UNREADABLE,
                                          ids=range(len(UNREADABLE)))


def is_attachment(words, name, reason):
    return words.startswith("[attached: %s, not shown: " % name) and words.endswith("]") \
        and reason in words and "\n" not in words and "JVBER" not in words


@pytest.mark.parametrize("face", FACE_NAMES)
@each_unreadable
def test_a_part_that_cannot_be_shown_becomes_one_line(face, part, path, name, reason):
    """A 400 would lock the conversation: clients send the part again on every turn."""
    body, notes = translate(face, request(face, messages=user(text("x"), part)))
    beside, shown = at(body, "params.messages.0.content")
    assert beside == text("x") and is_attachment(shown["text"], name, reason)
    assert has_note(notes, "unreadable=") and has_note(notes, "messages[0].content[1]" + path)


@pytest.mark.parametrize("face", FACE_NAMES)
@each_unreadable
def test_a_newest_message_of_such_parts_alone_is_refused(face, part, path, name, reason):
    for parts in ([part], [part, part], [text(""), part]):
        error = refusal(face, request(face, messages=[USER, *user(*parts)]))
        at_part = "messages[1].content[%d]%s" % (parts.index(part), path)
        assert (error.kind, error.status, error.param) == ("invalid", 400, at_part)
        assert error.param in error.message and reason in error.message


@pytest.mark.parametrize("face", FACE_NAMES)
@each_unreadable
def test_an_earlier_message_of_such_parts_alone_is_no_error(face, part, path, name, reason):
    for behind in ([USER], [{"role": "assistant", "content": "a"}, USER]):
        body, notes = translate(face, request(face, messages=user(part) + behind))
        (shown,) = at(body, "params.messages.0.content")
        assert is_attachment(shown["text"], name, reason) and has_note(notes, "unreadable=")


CALLED = {"messages": {"role": "assistant", "content": [
    {"type": "tool_use", "id": "c", "name": "f", "input": {}}]}, "chat": {
    "role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {
        "name": "f", "arguments": "{}"}}]}}


def with_result(face, content):
    answered = {"role": "tool", "tool_call_id": "c", "content": content} if face == "chat" else \
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c",
                                      "content": content}]}
    return [USER, CALLED[face], answered]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("part,path,name,reason", [
    row for row in UNREADABLE if any(isinstance(value, dict) for value in row[0].values())])
def test_such_a_part_in_a_result_never_refuses(face, part, path, name, reason):
    body, notes = translate(face, request(face, messages=with_result(face, [part])))
    value = at(body, "params.messages.2.content.0.output.value")
    assert is_attachment(value, name, reason) and has_note(notes, "unreadable=")


def test_a_result_beside_such_a_part_is_no_error():
    messages = with_result("messages", "r")
    messages[-1]["content"].append({"type": "input_audio", "input_audio": {}})
    body, _ = translate("messages", request("messages", messages=messages))
    assert "[attached: audio" in at(body, "params.messages.3.content.0.text")


def test_such_a_part_of_an_assistant_or_a_system_message():
    part = {"type": "input_audio", "input_audio": {}}
    for role in ("assistant", "system"):
        messages = [USER, {"role": role, "content": [text("a"), part]}, USER]
        body, notes = translate("chat", request("chat", messages=messages))
        assert "[attached: audio" in json.dumps(body) and has_note(notes, "unreadable=")


# Pictures whose bytes or base64 say another thing than their label.

PNG_DATA, JPEG_DATA, GIF_DATA = "iVBORw0KGgoAAAAN", "/9j/4AAQSkZJRgAB", "R0lGODlhAQABAIAA"
WEBP_DATA = "UklGRiQAAABXRUJQVlA4"
HEALED = [      # (part, the data URL that is sent, words of a note)
    (source(type="base64", media_type="image/jpeg", data=PNG_DATA),
     "data:image/png;base64," + PNG_DATA, "image/png labelled image/jpeg"),
    (source(type="base64", media_type="image/png", data=JPEG_DATA),
     "data:image/jpeg;base64," + JPEG_DATA, "image/jpeg labelled image/png"),
    (source(type="base64", media_type="image/png", data=GIF_DATA),
     "data:image/gif;base64," + GIF_DATA, "image/gif labelled"),
    (source(type="base64", media_type="image/png", data=WEBP_DATA),
     "data:image/webp;base64," + WEBP_DATA, "image/webp labelled"),
    (source(type="base64", media_type="application/octet-stream", data=PNG_DATA), PNG[:22]
     + PNG_DATA, "image/png labelled"),
    (source(type="base64", data=PNG_DATA), PNG[:22] + PNG_DATA, "labelled nothing"),
    (source(type="base64", media_type="image/png", data=PNG[:22] + PNG_DATA), PNG[:22] + PNG_DATA,
     "base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64," + PNG_DATA}},
     PNG[:22] + PNG_DATA, "image/png labelled"),
    ({"type": "image_url", "image_url": {"url": PNG[:22] + PNG[:22] + PNG_DATA}},
     PNG[:22] + PNG_DATA, "base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,data:;base64," + PNG_DATA}},
     PNG[:22] + PNG_DATA, "base64"),
    ({"type": "image_url", "image_url": {"url": PNG[:22] + "iVBORw0K\r\nGgoA AAAN\n"}},
     PNG[:22] + PNG_DATA, "base64"),
    ({"type": "image_url", "image_url": {"url": PNG[:22] + "iVBORw0KGgoAAAA-_w"}},
     PNG[:22] + "iVBORw0KGgoAAAA+/w==", "base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/png," + PNG_DATA}},
     PNG[:22] + PNG_DATA, ""),
    ({"type": "image_url", "image_url": {"url": PNG_DATA}}, PNG[:22] + PNG_DATA,
     "labelled nothing"),
    ({"type": "image_url", "image_url": {"url": "DATA:image/PNG;BASE64," + PNG_DATA}},
     PNG[:22] + PNG_DATA, ""),
    ({"type": "image", "data": PNG_DATA, "mimeType": "image/png"}, PNG[:22] + PNG_DATA, ""),
    (chat_file(filename="a.png", file_data=PNG[:22] + PNG_DATA), PNG[:22] + PNG_DATA, ""),
    (document("image/png", PNG_DATA), PNG[:22] + PNG_DATA, "")]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("part,url,note", HEALED, ids=range(len(HEALED)))
def test_pictures_are_healed_and_their_bytes_decide_their_type(face, part, url, note):
    body, notes = translate(face, request(face, messages=user(text("x"), part)))
    mime = url.partition(";")[0][len("data:"):]
    assert at(body, "params.messages.0.content.1") == {"type": "image", "image": url,
                                                       "mimeType": mime}
    assert len(notes) == (1 if note else 0)
    assert not note or notes[0].startswith("repaired=") and note in notes[0]


def test_pictures_of_results_are_healed_too():
    part = source(type="base64", media_type="image/jpeg", data=PNG_DATA)
    body, notes = translate("messages", request("messages",
                                                messages=with_result("messages", [part])))
    assert at(body, "params.messages.3.content.1.mimeType") == "image/png"
    assert has_note(notes, "image/png labelled image/jpeg")


def test_a_text_document_that_is_not_base64():
    part = chat_file(filename="a", file_data="data:text/plain,one%20two")
    body, _ = translate("chat", request("chat", messages=user(part)))
    assert at(body, "params.messages.0.content") == [
        text('<document title="a">\none two\n</document>')]


def test_pictures_in_a_document_are_noted():
    part = {"type": "document", "source": {"type": "content", "content": [
        text("one"), {"type": "image", "source": SOURCE}]}}
    body, notes = translate("messages", request("messages", messages=user(part)))
    sent = json.dumps(body)
    assert "one" in sent and ("iVBOR" in sent or notes)


# Assistants and tools.

def call(name="f", arguments="{}", call_id="c"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


ASSISTANTS = [  # (face, message, what is sent of it)
    ("chat", {"content": "a"}, [text("a")]),
    ("chat", {"content": None, "reasoning_content": "r"}, [{"type": "reasoning", "text": "r"}]),
    ("chat", {"content": "a", "reasoning": "r"}, [{"type": "reasoning", "text": "r"}, text("a")]),
    ("chat", {"content": [text("a"), text("b")]}, [text("a"), text("b")]),
    ("chat", {"content": "\n"}, []), ("messages", {"content": [text(" "), text("a")]}, [text("a")]),
    ("chat", {"content": None, "refusal": "no"}, [text("no")]),
    ("chat", {"content": "", "tool_calls": []}, []),
    ("chat", {"content": "a", "refusal": "no"}, [text("a"), text("no")]),
    ("chat", {"content": "a", "refusal": ""}, [text("a")]),
    ("messages", {"content": [{"type": "compaction", "content": "SUMMARY"}, text("ok")]},
     [text("SUMMARY"), text("ok")]),
    ("chat", {"content": [{"type": "thinking", "thinking": "r", "signature": "s"}, text("a")]},
     [{"type": "reasoning", "text": "r"}, text("a")]),
    ("messages", {"content": [{"type": "thinking", "thinking": "r", "signature": "x"}, text("a")]},
     [{"type": "reasoning", "text": "r"}, text("a")]),
    ("messages", {"content": [{"type": "thinking", "thinking": "r"}]},
     [{"type": "reasoning", "text": "r"}]),
    ("messages", {"content": [{"type": "thinking", "thinking": "r", "signature": None}]},
     [{"type": "reasoning", "text": "r"}]),
    ("messages", {"content": [{"type": "thinking", "thinking": "", "signature": "s"}]}, []),
    ("messages", {"content": "a"}, [text("a")]),
    ("messages", {"content": [text("a"), {"type": "thinking", "thinking": "r"}]},
     [{"type": "reasoning", "text": "r"}, text("a")])]


@pytest.mark.parametrize("face,message,sent", ASSISTANTS, ids=range(len(ASSISTANTS)))
def test_assistants(face, message, sent):
    messages = [USER, {"role": "assistant", **message}, USER]
    params = params_of(face, request(face, messages=messages))
    assert [one["content"] for one in params["messages"] if one["role"] == "assistant"] == (
        [sent] if sent else [])


def test_redacted_thinking_leaves_a_note():
    message = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"},
                                                text("a")]}
    _, notes = translate("messages", request("messages", messages=[USER, message, USER]))
    assert has_note(notes, "redacted_thinking")


ARGUMENTS = [   # (arguments, input, noted)
    ("{}", {}, False), ("", {}, False), (None, {}, False), ("  ", {}, False),
    ('{"a": 1}', {"a": 1}, False), ({"a": 1}, {"a": 1}, False),
    ('{"a": "\\u00e9"}', {"a": "\u00e9"}, False),
    ('{"a": 1', {"input": '{"a": 1'}, True), ("[1]", {"input": [1]}, True),
    ("words", {"input": "words"}, True), ('"x"', {"input": "x"}, True),
    ('{"a": "\\ud83d"}', {"a": "\ufffd"}, True), (r'{"a": "\d+"}', {"a": r"\d+"}, True),
    ('{"a": "x\ny"}', {"a": "x\ny"}, True),
    (r'{"a": "\ud83d\q', {"input": r'{"a": "\ud83d\q'}, True)]


@pytest.mark.parametrize("given,sent,noted", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments_of_calls(given, sent, noted):
    """Arguments of the history, also such as were cut off when they were made."""
    messages = [USER, {"role": "assistant", "tool_calls": [call(arguments=given)]},
                {"role": "tool", "tool_call_id": "c", "content": "r"}]
    body, notes = translate("chat", request("chat", messages=messages))
    part = at(body, "params.messages.1.content.0")
    assert part == {"type": "tool-call", "toolCallId": "c", "toolName": "f", "input": sent}
    assert bool(notes) == noted


RESULTS = [     # (content of a tool_result, value)
    ("r", "r"), ([text("a"), text("b")], "a\nb"), ([], ""), (None, ""), ("", ""), (" ", " "),
    ({"temp": 21}, '{"temp":21}'), ({}, "{}"), ([1, 2], "[1,2]"), (["a", "b"], '["a","b"]'),
    ([None], "[null]"), ([[]], "[[]]"), ([True, 1.5, "\u00e9"], '[true,1.5,"\u00e9"]'),
    ([{"temp": 21}, {"temp": 22}], '[{"temp":21},{"temp":22}]'), ({"a": {"b": []}},
                                                                  '{"a":{"b":[]}}'),
    (text("a"), "a"), ({"text": "a"}, "a"), ({"text": "a", "score": 1}, '{"text":"a","score":1}'),
    ([text("a"), {"temp": 21}, "b", 5], 'a\n{"temp":21}\nb\n5'),
    ([text("a"), text("\n"), text("b")], "a\nb"), ([text(" ")], ""),
    ({"type": "weather", "temp": 21}, '{"type":"weather","temp":21}'),
    ([{"type": "file", "name": "a.txt"}, {"type": "directory", "name": "b"}],
     '[{"type":"file","name":"a.txt"},{"type":"directory","name":"b"}]'),
    ({"type": "file", "file": "a.txt"}, '{"type":"file","file":"a.txt"}'),
    ({"type": "text"}, '{"type":"text"}'), ({"type": None, "a": 1}, '{"type":null,"a":1}'),
    ({"type": ["x"], "a": 1}, '{"type":["x"],"a":1}'), ({"type": 5}, '{"type":5}'),
    ({"type": "tool_use", "name": "f"}, '{"type":"tool_use","name":"f"}'),
    ([{"type": "tool_reference", "tool_name": "f"}], "Tool available: f"),
    ([text("a"), {"type": "tool_reference", "tool_name": "g"}], "a\nTool available: g")]


@pytest.mark.parametrize("content,value", RESULTS, ids=range(len(RESULTS)))
@pytest.mark.parametrize("is_error", [None, False, True])
def test_results_of_messages(content, value, is_error):
    messages = [USER, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c",
                                      "content": content, "is_error": is_error,
                                      "cache_control": CACHE}, text("and")]}]
    sent = params_of("messages", request("messages", messages=messages))["messages"]
    (part,) = sent[2]["content"]
    assert sent[2]["role"] == "tool" and part["cache_control"] == CACHE
    assert (part["toolCallId"], part["toolName"]) == ("c", "f")
    assert part["output"]["type"] == "text"
    assert part["output"]["value"] == ("Error: " + value if is_error else value)
    assert sent[3] == {"role": "user", "content": [text("and")]}


@pytest.mark.parametrize("content,value", RESULTS, ids=range(len(RESULTS)))
def test_results_of_chat(content, value):
    messages = [USER, {"role": "assistant", "tool_calls": [call()]},
                {"role": "tool", "tool_call_id": "c", "content": content}]
    sent = params_of("chat", request("chat", messages=messages))["messages"]
    assert at(sent, "2.content.0.output") == {"type": "text", "value": value}


def test_an_error_that_says_so_is_not_marked_twice():
    for words in ("Error: x", "<tool_use_error>x</tool_use_error>", "error x"):
        messages = [USER, {"role": "assistant", "content": [
            {"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c",
                                          "content": words, "is_error": True}]}]
        sent = params_of("messages", request("messages", messages=messages))["messages"]
        assert at(sent, "2.content.0.output.value") == words


def test_legacy_functions():
    """`function_call` and role `function`: calls are known by their name."""
    messages = [USER, {"role": "assistant", "content": None,
                       "function_call": {"name": "f", "arguments": '{"a":1}'}},
                {"role": "function", "name": "f", "content": "r"},
                {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": "s"}]
    params = params_of("chat", request("chat", messages=messages, functions=[
        {"name": "f", "parameters": {"type": "object"}}], function_call={"name": "f"}))
    check_params(params)
    assert params["tools"] == [{"name": "f", "description": "", "input_schema":
                                {"type": "object", "properties": {}}}]
    assert params["tool_choice"] == {"type": "tool", "name": "f"}
    values = [part["output"]["value"] for message in params["messages"]
              if message["role"] == "tool" for part in message["content"]]
    assert values == ["r", "s"]


# Roles and system texts.

SYSTEMS = [     # (face, body members, texts sent; [] when the one space is)
    ("chat", {}, []),
    ("chat", {"messages": [{"role": "system", "content": "a"}, USER]}, ["a"]),
    ("chat", {"messages": [{"role": "developer", "content": "a"}, USER]}, ["a"]),
    ("chat", {"messages": [{"role": "system", "content": [text("a"), text("b")]},
                           {"role": "developer", "content": "c"}, USER,
                           {"role": "system", "content": "d"}]}, ["a\n", "b\n", "c"]),
    ("chat", {"messages": [{"role": "system", "content": ""}, USER]}, []),
    ("chat", {"messages": [{"role": "system", "content": None}, USER]}, []),
    ("chat", {"messages": [{"role": "system", "content": " \n"}, USER]}, []),
    ("messages", {"system": "x-anthropic-billing-header: cch=abc\n \n"}, []),
    ("messages", {"system": [text(" "), text("a"), text("\n")]}, ["a"]),
    ("messages", {"system": "a"}, ["a"]), ("messages", {"system": ""}, []),
    ("messages", {"system": None}, []), ("messages", {"system": []}, []),
    ("messages", {"system": [text("")]}, []),
    ("messages", {"system": [text("a"), text("b\n"), text("c")]}, ["a\n", "b\n", "c"]),
    ("messages", {"system": [text("x-anthropic-billing-header: cch=abc"), text("a")]}, ["a"]),
    ("messages", {"system": "x-anthropic-billing-header: cch=abc\nrest"}, ["rest"]),
    ("messages", {"system": "x-anthropic-billing-header: cch=abc"}, []),
    ("messages", {"system": "a", "messages": [{"role": "system", "content": "b"}, USER,
                                              {"role": "system", "content": [text("c")]}]},
     ["a\n", "b"])]


@pytest.mark.parametrize("face,members,texts", SYSTEMS, ids=range(len(SYSTEMS)))
def test_system_texts(face, members, texts):
    body, notes = translate(face, request(face, **members))
    assert at(body, "params.system") == ([text(words) for words in texts] or " ")
    assert all(message["role"] == "user" for message in at(body, "params.messages"))
    assert notes == []


def test_system_keeps_cache_control():
    blocks = [text("a", cache_control=CACHE), text("b")]
    for face, members in (("messages", {"system": blocks}),
                          ("chat", {"messages": [{"role": "system", "content": blocks}, USER]})):
        assert params_of(face, request(face, **members))["system"] == [
            text("a\n", cache_control=CACHE), text("b")]


def test_a_picture_in_system_leaves_a_note():
    _, notes = translate("messages", request("messages", system=[
        text("a"), {"type": "image", "source": SOURCE}]))
    assert has_note(notes, "image in system")


CACHES = [      # (members of a Messages request, content of the last message)
    ({"cache_control": CACHE}, [text("hi", cache_control=CACHE)]),
    ({"cache_control": CACHE, "messages": user(text("a"), text("b"))},
     [text("a"), text("b", cache_control=CACHE)]),
    ({"cache_control": None}, [text("hi")]),
    ({"messages": [{"role": "user", "content": "a", "cache_control": CACHE}]},
     [text("a", cache_control=CACHE)])]


@pytest.mark.parametrize("members,content", CACHES, ids=range(len(CACHES)))
def test_cache_control_is_lifted_to_a_block(members, content):
    params = params_of("messages", request("messages", **members))
    assert params["messages"][-1]["content"] == content
    assert "cache_control" not in params


def test_cache_control_of_tools_and_calls():
    tools = [{"name": "f", "input_schema": {"type": "object"}, "cache_control": CACHE}]
    messages = [USER, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "c", "name": "f", "input": {}, "cache_control": CACHE}]}, USER]
    params = params_of("messages", request("messages", tools=tools, messages=messages))
    assert params["tools"][0]["cache_control"] == CACHE
    assert at(params, "messages.1.content.0.cache_control") == CACHE


# What a vendor's own tools gave in earlier turns: (part, lines of its text that must be there,
# words that must not).

SEARCHED = {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": [
    {"type": "web_search_result", "url": "https://one.test/a", "title": "One \u00e9",
     "page_age": "2 days", "encrypted_content": "SECRET=="},
    {"type": "web_search_result", "url": "https://two.test", "title": "Two",
     "encrypted_content": "SECRET=="}]}
HOSTED = [
    ({"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {
        "query": "oslo weather"}}, ["name: web_search", "query: oslo weather"], "srv_1"),
    (SEARCHED, ["title: One \u00e9", "url: https://one.test/a", "title: Two",
                "url: https://two.test"], "SECRET"),
    ({"type": "web_search_tool_result", "tool_use_id": "s", "content": {
        "type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"}},
     ["error_code: max_uses_exceeded"], "tool_use_id"),
    ({"type": "web_fetch_tool_result", "tool_use_id": "s", "content": {
        "type": "web_fetch_result", "url": "https://one.test", "content": {
            "type": "document", "title": "T", "source": {
                "type": "text", "media_type": "text/plain", "data": "line 1\nline 2"}}}},
     ["url: https://one.test", "title: T", "data: line 1", "line 2"], "text/plain"),
    ({"type": "web_fetch_tool_result", "tool_use_id": "s", "content": {
        "type": "web_fetch_result", "url": "https://one.test/x.pdf", "content": {
            "type": "document", "source": {"type": "base64", "data": "JVBERi0="}}}},
     ["url: https://one.test/x.pdf"], "JVBERi0="),
    ({"type": "code_execution_tool_result", "tool_use_id": "s", "content": {
        "type": "code_execution_result", "stdout": "42\n", "stderr": "", "return_code": 0}},
     ["stdout: 42", "return_code: 0"], "stderr"),
    ({"type": "bash_code_execution_tool_result", "tool_use_id": "s", "content": {
        "type": "bash_code_execution_result", "stdout": "", "stderr": "bad", "return_code": 1,
        "content": [{"type": "bash_code_execution_output", "file_id": "file_1"}]}},
     ["stderr: bad", "return_code: 1"], "file_1"),
    ({"type": "text_editor_code_execution_tool_result", "tool_use_id": "s", "content": {
        "type": "text_editor_code_execution_str_replace_result", "lines": ["-a", "+b"]}},
     ["lines: -a", "lines: +b"], "tool_use_id"),
    ({"type": "mcp_tool_use", "id": "m", "name": "find", "server_name": "crm",
      "input": {"who": "x"}}, ["name: find", "server_name: crm", "who: x"], "id:"),
    ({"type": "mcp_tool_result", "tool_use_id": "m", "is_error": False, "content": [
        {"type": "text", "text": "found it"}]}, ["text: found it"], "is_error"),
    ({"type": "tool_search_tool_result", "tool_use_id": "s", "content": {
        "type": "tool_search_tool_search_result", "tool_references": [
            {"type": "tool_reference", "tool_name": "get_x"}]}}, ["tool_name: get_x"], "type")]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("part,lines,absent", HOSTED, ids=range(len(HOSTED)))
def test_what_a_vendors_tool_gave_stays_as_text(face, part, lines, absent):
    messages = [USER, {"role": "assistant", "content": [part, text("so")]}, USER]
    body, notes = translate(face, request(face, messages=messages))
    check_params(body["params"])
    said = at(body, "params.messages.1.content.0.text")
    assert said.startswith("[%s]\n" % part["type"])
    assert set(lines) <= set(said.split("\n")) and absent not in said.partition("]")[2]
    assert notes == ["replaced=%s at messages[1].content[0] by its text" % part["type"]]


def test_a_vendors_long_name_is_not_repeated_with_each_value():
    part = {"type": "mcp_tool_result", "content": [{"x" * 100_000: ["a"] * 10_000}]}
    messages = [USER, {"role": "assistant", "content": [part]}, USER]
    said = at(params_of("messages", request("messages", messages=messages)),
              "messages.1.content.0.text")
    assert len(said) < 1_000_000 and said.count("x: a") == 10_000


def test_a_vendors_part_without_a_word_is_dropped_with_a_note():
    messages = [USER, {"role": "assistant", "content": [
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, text("so")]}, USER]
    body, notes = translate("messages", request("messages", messages=messages))
    assert [part["type"] for part in at(body, "params.messages.1.content")] == ["text"]
    assert notes == ["dropped=web_search_tool_result at messages[1].content[0]"]



# Tools.

SCHEMA = {"type": "object", "properties": {"a": {"type": "number", "exclusiveMinimum": 0}},
          "required": ["a"], "additionalProperties": False}
EMPTY = {"type": "object", "properties": {}}
TOOLS = [       # (entry, what is sent, words of a note)
    ({"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA,
                                       "strict": False}}, ("f", "d", SCHEMA), None),
    ({"type": "function", "name": "f", "description": "d", "parameters": SCHEMA},
     ("f", "d", SCHEMA), None),
    ({"name": "f", "description": "d", "input_schema": SCHEMA}, ("f", "d", SCHEMA), None),
    ({"type": "custom", "name": "f", "input_schema": SCHEMA, "defer_loading": True,
      "eager_input_streaming": True}, ("f", "", SCHEMA), None),
    ({"type": None, "name": "f", "input_schema": SCHEMA}, ("f", "", SCHEMA), None),
    ({"name": "f", "input_schema": {"$schema": "x", **SCHEMA}}, ("f", "", SCHEMA), None),
    ({"name": "f"}, ("f", "", EMPTY), None),
    ({"name": "f", "input_schema": None}, ("f", "", EMPTY), None),
    ({"name": "f", "input_schema": {}}, ("f", "", EMPTY), "tool f: properties added"),
    ({"name": "f", "input_schema": {"properties": {}}}, ("f", "", EMPTY), "tool f: type made"),
    ({"name": "f", "input_schema": {"type": "string"}}, ("f", "", EMPTY), "f"),
    ({"name": "f", "input_schema": [1]}, ("f", "", EMPTY), "f"),
    ({"name": "f", "input_schema": "x"}, ("f", "", EMPTY), "f"),
    ({"name": "f", "description": None, "input_schema": {"type": None}}, ("f", "", EMPTY), "f"),
    ({"type": "web_search_20250305", "name": "web_search", "max_uses": 5}, None, "web_search"),
    ({"type": "web_search"}, None, "web_search"),
    ({"type": "code_execution_20250522", "name": "code_execution"}, None, "code_execution"),
    ({"type": "mcp_toolset", "mcp_server_name": "x"}, None, "mcp_toolset"),
    ({"type": "custom", "custom": {"name": "apply_patch", "format": {}}},
     ("apply_patch", "", ccproxy.RAW_SCHEMA), None)]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("entry,sent,note", TOOLS, ids=range(len(TOOLS)))
def test_tools(face, entry, sent, note):
    body, notes = translate(face, request(face, tools=[entry]))
    expected = [dict(zip(("name", "description", "input_schema"), sent))] if sent else []
    assert at(body, "params.tools") == expected
    assert has_note(notes, note) if note else notes == []


def test_a_second_tool_of_one_name_is_left_out_with_a_note():
    tools = [{"name": "f", "description": "one"}, {"name": "f", "description": "two"}]
    body, notes = translate("messages", request("messages", tools=tools))
    assert [tool["description"] for tool in at(body, "params.tools")] == ["one"]
    assert has_note(notes, "second tool named f")


F = {"name": "f", "input_schema": EMPTY}
CHOICES = [     # (face, tool_choice, sent, tools left)
    ("chat", "auto", {"type": "auto"}, 1), ("chat", "none", None, 0),
    ("chat", "required", {"type": "any"}, 1), ("chat", None, None, 1),
    ("chat", {"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}, 1),
    ("chat", {"type": "function", "name": "f"}, {"type": "tool", "name": "f"}, 1),
    ("chat", {"type": "allowed_tools", "allowed_tools": {}}, {"type": "auto"}, 1),
    ("messages", {"type": "auto"}, {"type": "auto"}, 1),
    ("messages", {"type": "any"}, {"type": "any"}, 1), ("messages", {"type": "none"}, None, 0),
    ("messages", {"type": "tool", "name": "f"}, {"type": "tool", "name": "f"}, 1),
    ("messages", {"type": "any", "disable_parallel_tool_use": True}, {"type": "any"}, 1)]


@pytest.mark.parametrize("face,choice,sent,left", CHOICES, ids=range(len(CHOICES)))
def test_tool_choice(face, choice, sent, left):
    params = params_of(face, request(face, tools=[F], tool_choice=choice))
    assert params.get("tool_choice") == sent and len(params["tools"]) == left


def test_tool_choice_without_tools():
    for choice in ("auto", "none", "required"):
        assert "tool_choice" not in params_of("chat", request("chat", tool_choice=choice))
    _, notes = translate("chat", request("chat", tool_choice="required"))
    assert has_note(notes, "tool_choice")


# Choices of some tools, or of one: (tools, tool_choice, names sent, choice sent, words of a note).

G = {"type": "function", "name": "g", "parameters": EMPTY}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
PREVIEW = {"type": "web_search_preview_2025_03_11"}
SPACE = {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "h"}]}
FREE = {"type": "custom", "name": "free"}
AUTO, ANY = {"type": "auto"}, {"type": "any"}


def one(name):
    return {"type": "tool", "name": name}


def allowed(mode, *tools):
    """Both spellings of allowed_tools."""
    inner = {"mode": mode, "tools": list(tools)}
    return [{"type": "allowed_tools", **inner}, {"type": "allowed_tools", "allowed_tools": inner}]


F_FLAT = {"type": "function", "name": "f"}
F_NESTED = {"type": "function", "function": {"name": "f"}}
SETTLED = [
    *(([F, G], choice, ["f"], AUTO, None) for choice in allowed("auto", F_FLAT)),
    *(([F, G], choice, ["f"], ANY, None) for choice in allowed("required", F_NESTED)),
    *(([G, F], choice, ["g", "f"], ANY, None) for choice in allowed("required", F_FLAT, F_NESTED, {
        "type": "function", "name": "g"})),
    *(([F, SEARCH], choice, ["f"], ANY, "tool_choice web_search")
      for choice in allowed("required", F_FLAT, {"type": "web_search"})),
    *(([F, SEARCH], choice, [], None, "tool_choice web_search")
      for choice in allowed("auto", {"type": "web_search"})),
    *(([F, SEARCH], choice, [], None, "tool_choice without tools")
      for choice in allowed("required", {"type": "web_search"})),
    *(([F, SPACE], choice, ["ns__h"], AUTO, "renamed")
      for choice in allowed("auto", {"type": "function", "name": "h", "namespace": "ns"})),
    *(([F, FREE], choice, ["free"], ANY, None)
      for choice in allowed("required", {"type": "custom", "name": "free"})),
    *(([F, {"type": "shell"}], choice, ["shell"], AUTO, None)
      for choice in allowed("auto", {"type": "shell"})),
    *(([F, G], choice, ["f", "g"], AUTO, "allowed_tools without tools") for choice in [
        {"type": "allowed_tools"}, {"type": "allowed_tools", "allowed_tools": {}},
        *allowed("auto")]),
    ([F, {"type": "shell"}], {"type": "shell"}, ["f", "shell"], one("shell"), None),
    ([F, {"type": "local_shell"}], {"type": "local_shell"}, ["f", "local_shell"],
     one("local_shell"), None),
    ([{"type": "apply_patch"}], {"type": "apply_patch"}, ["apply_patch"], one("apply_patch"), None),
    ([{"type": "computer_use_preview"}], {"type": "computer_use"}, ["computer_use_preview"],
     one("computer_use_preview"), None),
    ([{"type": "bash_20250124", "name": "bash"}], one("bash"), ["bash"], one("bash"), None),
    ([FREE], {"type": "custom", "name": "free"}, ["free"], one("free"), None),
    ([F, FREE], {"type": "custom", "name": "f"}, ["f", "free"], one("f"), None),
    ([SPACE], {"type": "function", "name": "h"}, ["ns__h"], one("ns__h"), "renamed"),
    ([F, SEARCH], one("web_search"), ["f"], AUTO, "tool_choice web_search"),
    ([F, SEARCH], {"type": "web_search"}, ["f"], AUTO, "tool_choice web_search"),
    ([F, PREVIEW], {"type": "web_search_preview"}, ["f"], AUTO, "tool_choice web_search_preview"),
    ([F, {"type": "mcp", "server_label": "s"}], {"type": "mcp", "server_label": "s", "name": "x"},
     ["f"], AUTO, "tool_choice mcp"),
    ([SEARCH], one("web_search"), [], None, "tool_choice web_search"),
    ([SEARCH], "required", [], None, "tool_choice without tools"),
    ([F, SEARCH], "required", ["f"], ANY, "left_out")]


@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
@pytest.mark.parametrize("tools,choice,names,sent,note", SETTLED, ids=range(len(SETTLED)))
def test_choices_are_settled_by_what_is_offered(face, tools, choice, names, sent, note):
    body, notes = translate(face, request(face, tools=tools, tool_choice=choice))
    assert [tool["name"] for tool in at(body, "params.tools")] == names
    assert body["params"].get("tool_choice") == sent
    assert has_note(notes, note) if note else notes == []


REFUSED_CHOICES = [     # (tools, tool_choice, the field, words)
    ([F], one("absent"), "tool_choice", "absent"), ([], one("f"), "tool_choice", "there are none"),
    ([F], F_FLAT | {"namespace": "other"}, "tool_choice", "names the tool f"),
    ([F, G], {"type": "web_search"}, "tool_choice", "web_search, which is not one of tools (f, g)"),
    ([F], {"type": "fun"}, "tool_choice", "fun"), ([F], {"type": ""}, "tool_choice", "a type"),
    ([F], {"type": "function"}, "tool_choice.name", "name a tool"),
    ([F], {"type": "function", "name": 5}, "tool_choice.name", "a string"),
    ([F], "sometimes", "tool_choice", "auto, none"), ([F], 5, "tool_choice", "a word"),
    ([F], allowed("auto", one("g"))[0], "tool_choice", "the tool g"),
    ([F], allowed("auto", 5)[0], "tool_choice.tools[0]", "an object"),
    ([F], allowed("auto", {"type": "auto"})[0], "tool_choice.tools[0]", "name a tool"),
    ([F], allowed("auto", {"type": "function"})[1],
     "tool_choice.allowed_tools.tools[0].name", "name a tool"),
    ([F], allowed("never", F_FLAT)[1], "tool_choice.allowed_tools.mode", "auto or required"),
    ([F], {"type": "allowed_tools", "tools": 5}, "tool_choice.tools", "a list")]


@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
@pytest.mark.parametrize("tools,choice,param,words", REFUSED_CHOICES,
                         ids=range(len(REFUSED_CHOICES)))
def test_choices_that_are_refused(face, tools, choice, param, words):
    error = refusal(face, request(face, tools=tools, tool_choice=choice))
    assert (error.status, error.param) == (400, param) and words in error.message


def test_the_older_function_call_is_a_choice_too():
    body = {"functions": [{"name": "f"}, {"name": "g"}]}
    assert params_of("chat", request("chat", **body, function_call={"name": "g"}))[
        "tool_choice"] == one("g")
    error = refusal("chat", request("chat", **body, function_call={"name": "h"}))
    assert error.status == 400 and "the tool h" in error.message


PARALLEL = [    # (members, whether an answer may hold more than one call)
    ({}, True), ({"parallel_tool_calls": True}, True), ({"parallel_tool_calls": None}, True),
    ({"parallel_tool_calls": False}, False), ({"tool_choice": {"type": "auto"}}, True),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": False}}, True),
    ({"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, False),
    ({"tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}}, False)]


@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
@pytest.mark.parametrize("members,parallel", PARALLEL, ids=range(len(PARALLEL)))
def test_whether_calls_may_be_parallel(face, members, parallel):
    prompt = read_prompt(face, request(face, tools=[F], **members))
    assert prompt.parallel == parallel and prompt.notes == []
    for build in (ccproxy.build_openai, ccproxy.build_anthropic):
        assert (b"parallel" in build(prompt, "s")) is not parallel
    assert b"parallel" not in ccproxy.build_alpha(prompt, "s")      # which knows no such word
    for wrong in ({"parallel_tool_calls": "no"},
                  {"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}}):
        assert refusal(face, request(face, **wrong)).param.endswith(("calls", "tool_use"))


# Lone surrogates.

@pytest.mark.parametrize("face", FACE_NAMES)
def test_lone_surrogates(face):
    for words, sent, noted in (("\ud83d", "\ufffd", True), ("a\ude80b", "a\ufffdb", True),
                               ("\U0001f680", "\U0001f680", False)):
        body, notes = translate(face, request(face, messages=user(text(words)), tools=[
            {"name": "f", "description": words, "input_schema": {**EMPTY, words: 1}}]))
        assert at(body, "params.messages.0.content.0.text") == sent
        assert at(body, "params.tools.0.description") == sent
        assert has_note(notes, "surrogates") == noted


# Wrong types: every used field of a request that uses them all.

WHOLE = {
    "chat": {
        "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5,
        "max_completion_tokens": 5, "temperature": 0.5, "top_p": 0.5, "n": 1, "stop": ["a"],
        "reasoning_effort": "high", "reasoning": {"effort": "low"}, "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d",
                                                    "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "messages": [
            {"role": "system", "content": [text("s", cache_control=CACHE)]},
            {"role": "user", "content": [
                text("a"), {"type": "image_url", "image_url": {"url": PNG}},
                {"type": "file", "file": {"filename": "a.txt",
                                          "file_data": "data:text/plain;base64," + DATA}}]},
            {"role": "assistant", "content": "x", "reasoning_content": "r", "refusal": None,
             "tool_calls": [call()]},
            {"role": "tool", "tool_call_id": "c", "name": "f", "content": "r"},
            {"role": "assistant", "content": None,
             "function_call": {"name": "g", "arguments": "{}"}},
            {"role": "function", "name": "g", "content": "s"}]},
    "messages": {
        "model": "m", "stream": True, "max_tokens": 5, "temperature": 0.5, "top_p": 0.5,
        "stop_sequences": ["a"], "thinking": {"type": "enabled", "budget_tokens": 5000},
        "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
        "metadata": {"user_id": "u"}, "cache_control": CACHE, "top_k": 5,
        "system": [text("s", cache_control=CACHE)],
        "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA},
                  {"type": "web_search_20250305", "name": "web_search"}],
        "tool_choice": {"type": "tool", "name": "f"},
        "messages": [
            {"role": "user", "content": [
                text("a", cache_control=CACHE), {"type": "image", "source": SOURCE},
                {"type": "document", "title": "t", "source": {
                    "type": "base64", "media_type": "text/plain", "data": DATA}},
                {"type": "document", "source": {"type": "text", "data": "x"}},
                {"type": "search_result", "title": "T", "source": "S", "content": [text("c")]}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "r", "signature": "s"}, text("x"),
                {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c", "is_error": False, "content": [
                    text("r"), {"type": "tool_reference", "tool_name": "f"},
                    {"type": "image", "source": SOURCE}]}]},
            {"role": "system", "content": "more"}]}}

NOT_TEXT, NOT_LIST = [5, True, ["x"], {"x": 1}], [5, True, "x", {"x": 1}]
NOT_OBJECT = [5, True, "x"]
NOT_NUMBER, NOT_FLAG = ["5", True, [5], {"x": 5}], ["true", 1, [True], {"x": 1}]
NOT_COUNT = NOT_NUMBER + [0, -1, 1.5]
NOT_LIMIT = NOT_NUMBER + [-2, -1.5, 1.5, 1e13]     # 0 and -1 have a meaning
WRONG = [       # (face, path, wrong values)
    ("chat", "model", NOT_TEXT), ("chat", "stream", NOT_FLAG),
    ("chat", "stream_options", NOT_OBJECT), ("chat", "stream_options.include_usage", NOT_FLAG),
    ("chat", "max_completion_tokens", NOT_LIMIT), ("chat", "temperature", NOT_NUMBER),
    ("chat", "top_p", NOT_NUMBER), ("chat", "n", NOT_COUNT + [2]),
    ("chat", "stop", [5, True, {"x": 1}]), ("chat", "stop[0]", NOT_TEXT),
    ("chat", "reasoning_effort", NOT_TEXT), ("chat", "reasoning", NOT_OBJECT),
    ("chat", "response_format", NOT_OBJECT), ("chat", "response_format.type", NOT_TEXT + ["x"]),
    ("chat", "response_format.json_schema", NOT_OBJECT),
    ("chat", "response_format.json_schema.schema", NOT_OBJECT),
    ("chat", "tools", NOT_LIST), ("chat", "tools[0]", NOT_OBJECT), ("chat", "tools[0].type",
                                                                   NOT_TEXT),
    ("chat", "tools[0].function", NOT_OBJECT), ("chat", "tools[0].function.name", NOT_TEXT + [""]),
    ("chat", "tools[0].function.description", NOT_TEXT),
    ("chat", "tool_choice", [5, True, "x", ["auto"], {"type": 5}, {"type": ["auto"]}]),
    ("chat", "messages", NOT_LIST + [None, []]), ("chat", "messages[0]", NOT_OBJECT + [None]),
    ("chat", "messages[0].role", NOT_TEXT + [None, "x"]),
    ("chat", "messages[0].content", [5, True]), ("chat", "messages[0].content[0]", [5, True, None]),
    ("chat", "messages[0].content[0].type", NOT_TEXT),
    ("chat", "messages[0].content[0].text", NOT_TEXT),
    ("chat", "messages[0].content[0].cache_control", NOT_OBJECT),
    ("chat", "messages[1].content", [5, True]),
    ("chat", "messages[1].content[1].image_url", [5, True, ["x"]]),
    ("chat", "messages[1].content[1].image_url.url", NOT_TEXT),
    ("chat", "messages[1].content[2].file", NOT_OBJECT),
    ("chat", "messages[1].content[2].file.file_data", NOT_TEXT),
    ("chat", "messages[1].content[2].file.filename", NOT_TEXT),
    ("chat", "messages[2].content", [5, True]),
    ("chat", "messages[2].reasoning_content", NOT_TEXT),
    ("chat", "messages[2].tool_calls", NOT_LIST), ("chat", "messages[2].tool_calls[0]",
                                                   NOT_OBJECT + [None]),
    ("chat", "messages[2].tool_calls[0].id", NOT_TEXT),
    ("chat", "messages[2].tool_calls[0].function", NOT_OBJECT),
    ("chat", "messages[2].tool_calls[0].function.name", NOT_TEXT),
    ("chat", "messages[2].tool_calls[0].function.arguments", [5, True, ["x"]]),
    ("chat", "messages[3].tool_call_id", NOT_TEXT), ("chat", "messages[3].content", [5, True]),
    ("chat", "messages[3].name", NOT_TEXT), ("chat", "messages[4].function_call", NOT_OBJECT),
    ("chat", "messages[4].function_call.name", NOT_TEXT),
    ("messages", "model", NOT_TEXT), ("messages", "stream", NOT_FLAG),
    ("messages", "max_tokens", NOT_LIMIT), ("messages", "temperature", NOT_NUMBER),
    ("messages", "top_p", NOT_NUMBER), ("messages", "stop_sequences", [5, True, {"x": 1}]),
    ("messages", "stop_sequences[0]", NOT_TEXT), ("messages", "thinking", NOT_OBJECT),
    ("messages", "thinking.type", NOT_TEXT + ["x"]),
    ("messages", "thinking.budget_tokens", NOT_NUMBER),
    ("messages", "output_config", NOT_OBJECT), ("messages", "output_config.effort", NOT_TEXT),
    ("messages", "output_config.format", NOT_OBJECT),
    ("messages", "output_config.format.type", NOT_TEXT + ["x"]),
    ("messages", "output_config.format.schema", NOT_OBJECT),
    ("messages", "metadata", NOT_OBJECT), ("messages", "metadata.user_id", [5, True, ["x"]]),
    ("messages", "cache_control", NOT_OBJECT), ("messages", "system", [5, True]),
    ("messages", "system[0]", [5, True, None]), ("messages", "system[0].type", NOT_TEXT),
    ("messages", "system[0].text", NOT_TEXT), ("messages", "system[0].cache_control", NOT_OBJECT),
    ("messages", "tools", NOT_LIST), ("messages", "tools[0]", NOT_OBJECT + [None]),
    ("messages", "tools[0].name", NOT_TEXT + [None, ""]), ("messages", "tools[0].description",
                                                           NOT_TEXT),
    ("messages", "tools[1].type", NOT_TEXT), ("messages", "tool_choice", [5, True, "x", ["x"],
                                                                           {"type": 5}]),
    ("messages", "tool_choice.name", NOT_TEXT),
    ("messages", "messages", NOT_LIST + [None, []]), ("messages", "messages[0]", NOT_OBJECT),
    ("messages", "messages[0].role", NOT_TEXT + [None, "x"]),
    ("messages", "messages[0].content", [5, True]),
    ("messages", "messages[0].content[0]", [5, True, None]),
    ("messages", "messages[0].content[0].text", NOT_TEXT),
    ("messages", "messages[0].content[1].source", NOT_OBJECT),
    ("messages", "messages[0].content[1].source.type", [5, True, ["x"]]),
    ("messages", "messages[0].content[1].source.media_type", NOT_TEXT),
    ("messages", "messages[0].content[1].source.data", NOT_TEXT),
    ("messages", "messages[0].content[2].title", NOT_TEXT),
    ("messages", "messages[0].content[2].source", NOT_OBJECT),
    ("messages", "messages[0].content[2].source.type", [5, True, ["x"]]),
    ("messages", "messages[0].content[2].source.media_type", NOT_TEXT),
    ("messages", "messages[0].content[2].source.data", NOT_TEXT),
    ("messages", "messages[0].content[3].source.data", NOT_TEXT),
    ("messages", "messages[0].content[4].title", NOT_TEXT),
    ("messages", "messages[0].content[4].source", NOT_TEXT),
    ("messages", "messages[0].content[4].content", [5, True]),
    ("messages", "messages[1].content[0].thinking", NOT_TEXT),
    ("messages", "messages[1].content[2].id", NOT_TEXT),
    ("messages", "messages[1].content[2].name", NOT_TEXT),
    ("messages", "messages[1].content[2].input", [5, True, ["x"]]),
    ("messages", "messages[2].content[0].tool_use_id", NOT_TEXT),
    ("messages", "messages[2].content[0].is_error", NOT_FLAG),
    ("messages", "messages[2].content[0].content", [5, True]),
    ("messages", "messages[2].content[0].content[1].tool_name", NOT_TEXT),
    ("messages", "messages[3].content", [5, True])]


def steps_of(path):
    return [int(step) if step.isdigit() else step
            for step in path.replace("[", ".").replace("]", "").split(".")]


def with_value(body, steps, value):
    """A copy of a request with this value at a path."""
    body = copy.deepcopy(body)
    holder = body
    for step in steps[:-1]:
        holder = holder[step]
    holder[steps[-1]] = value
    return body


@pytest.mark.parametrize("face", FACE_NAMES)
def test_the_whole_requests_are_good(face):
    check_params(params_of(face, WHOLE[face]))


def wrong_id(row):
    return "%s-%s" % row[:2]


@pytest.mark.parametrize("face,path,values", WRONG, ids=map(wrong_id, WRONG))
def test_a_wrong_type_is_a_400_that_names_the_path(face, path, values):
    for value in values:
        error = refusal(face, with_value(WHOLE[face], steps_of(path), value))
        assert error is not None, "%s: %r was accepted" % (path, value)
        assert error.kind == "invalid" and error.status == 400, (path, value)
        # A value of a type that the field may have is read on: the path may then go deeper.
        assert error.param and (error.param == path or error.param.startswith(
            (path + ".", path + "["))), (path, value, error.param)
        assert error.param in error.message


@pytest.mark.parametrize("face", FACE_NAMES)
def test_a_wrong_type_in_max_tokens_alone(face):
    for value in NOT_LIMIT:
        assert refusal(face, request(face, max_tokens=value)).param == "max_tokens"


# Stop sequences: (value, path that a refusal names, None where the value is good).

STOPS = [(["x"] * 64, None), ("x" * 1024, None), (["x" * 1024] * 64, None), ([""] * 64, None),
         (["x"] * 65, ""), (["y" * 9] * 70_000, ""), ("x" * 1025, ""), (["a", "x" * 1025], "[1]"),
         (["\u00e9" * 1024], None), (["\u00e9" * 1025, "a"], "[0]"),
         ([""] * 3 + ["x" * 300_000], "[3]")]


@pytest.mark.parametrize("face", ["chat", "messages", "responses"])
@pytest.mark.parametrize("name", ["stop", "stop_sequences"])
@pytest.mark.parametrize("value,path", STOPS, ids=range(len(STOPS)))
def test_how_many_and_how_long_stop_sequences_may_be(face, name, value, path):
    error = refusal(face, request(face, **{name: value}))
    assert (error is None) == (path is None)
    if error is not None:
        assert (error.status, error.param) == (400, name + path) and name + path in error.message
        assert ("64" if isinstance(value, list) and len(value) > 64 else "1024") in error.message


NULLABLE = ["model", "stream", "stream_options", "max_tokens", "max_completion_tokens",
            "temperature", "top_p", "n", "stop", "stop_sequences", "reasoning_effort", "reasoning",
            "response_format", "tools", "tool_choice", "thinking", "output_config", "metadata",
            "system", "seed", "functions", "function_call", "cache_control", "thread", "logprobs"]


@pytest.mark.parametrize("face", FACE_NAMES)
def test_null_means_absent(face):
    plain = translate(face, request(face, max_tokens=None))
    for name in NULLABLE:
        assert translate(face, request(face, **{"max_tokens": None, name: None}),
                         "vendor/unknown") == plain, name


OTHERS = [None, True, False, 0, -1, 5, 1.5, 1e30, -1e30, "", "x", "a.b c", "\x00", [], {}, [[]],
          [None], ["x"], [5], {"x": None}, {"type": "text"}, {"type": "text", "text": "x"},
          {"type": 5}, {"type": "tool_use"}, {"type": "tool_result"}, {"type": "image"},
          {"type": "document"}, {"type": "thinking"}, {"role": "user"}, {"role": "assistant"},
          {"function": None}, {"name": "x"}, PNG, "user", "tool", "assistant", "auto", "none"]


def all_paths(value, path=()):
    """The paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else (
        enumerate(value) if isinstance(value, list) else ())
    for step, child in inner:
        yield path + (step,)
        yield from all_paths(child, path + (step,))


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("seed", range(8))
def test_mutations_give_a_good_request_or_a_400(face, seed):
    """Whatever stands anywhere: ProxyError `invalid`, or a body that an upstream can take."""
    rng = random.Random("%s %d" % (face, seed))
    accepted = 0
    for _ in range(250):
        body = copy.deepcopy(WHOLE[face])
        for _ in range(rng.randrange(1, 4)):
            path = rng.choice(list(all_paths(body)))
            body = with_value(body, path, rng.choice(OTHERS))
        try:
            params = params_of(face, body, "vendor/unknown")
        except ccproxy.ProxyError as error:
            assert error.kind == "invalid" and error.status == 400 and error.message, body
            continue
        accepted += 1
        try:
            check_params(params)
        except AssertionError:
            raise AssertionError(json.dumps(body)) from None
    assert 10 < accepted < 240      # else the mutations are too wild, or do not reach anything


@pytest.mark.parametrize("face", FACE_NAMES)
def test_mutations_do_not_break_what_the_shell_asks_of_a_prompt(face):
    rng = random.Random(face)
    for _ in range(150):
        path = rng.choice(list(all_paths(WHOLE[face])))
        try:
            prompt = read_prompt(face, with_value(WHOLE[face], path, rng.choice(OTHERS)))
        except ccproxy.ProxyError:
            continue
        assert ccproxy.estimate_input(prompt) >= 1
        assert isinstance(ccproxy.first_user_text(prompt), str)
        assert isinstance(ccproxy.session_value({}, prompt.user_id), str)
        ccproxy.choose_filters(prompt)


WRONG_PLACES = [    # parts in the role that cannot have them
    ("user", {"type": "tool_use", "id": "c", "name": "f", "input": {}}, "tool_use"),
    ("user", {"type": "thinking", "thinking": "r"}, "thinking"),
    ("assistant", {"type": "image", "source": SOURCE}, "image"),
    ("assistant", {"type": "tool_result", "tool_use_id": "c", "content": "r"}, "tool_result")]


@pytest.mark.parametrize("face", FACE_NAMES)
@pytest.mark.parametrize("role,part,kind", WRONG_PLACES, ids=range(len(WRONG_PLACES)))
def test_parts_in_a_wrong_role(face, role, part, kind):
    """Refused, moved or dropped with a note; but never sent as they are, and never silently."""
    for others in ([], [text("x")]):
        messages = [USER, {"role": role, "content": others + [part]}, USER]
        try:
            body, notes = translate(face, request(face, messages=messages))
        except ccproxy.ProxyError as error:
            assert error.param.startswith("messages[1]")
            continue
        check_params(body["params"])
        assert notes, "dropped without a word"
