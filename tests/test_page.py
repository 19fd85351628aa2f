"""PAGE: the dashboard's parts, its words, its policy (test_dashboard.py drives it in a browser)."""
from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re

import pytest
from harness import ccproxy

PAGE = ccproxy.build_page()
TEXT = PAGE.body.decode()
STYLE = re.search(r"<style>(.*?)</style>", TEXT, re.S)[1]
SCRIPT = re.search(r"<script>(.*?)</script>", TEXT, re.S)[1]
WORDS = ccproxy.page_words(ccproxy.PAGE_WORDS)
SOURCES = "".join(ccproxy.PAGE_PARTS)
FIELDS = dict(PAGE.fields)
MOST_BYTES = 120_000


class Elements(html.parser.HTMLParser):
    """Every (name, attributes) of a page."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements(TEXT).found


# Words.

def test_every_language_has_the_same_keys():
    assert len(WORDS["en"]) > 150
    assert set(WORDS) == {"en", "ko", "zh"}
    assert set(WORDS["en"]) == set(WORDS["ko"]) == set(WORDS["zh"])


def test_every_language_fills_in_the_same_names():
    holes = {language: {key: sorted(re.findall(r"\{(\w+)\}", text)) for key, text in words.items()}
             for language, words in WORDS.items()}
    assert holes["en"] == holes["ko"] == holes["zh"]


@pytest.mark.parametrize("language,letters", [("ko", "[가-힣]"), ("zh", "[一-鿿]")])
def test_a_language_is_in_its_own_letters(language, letters):
    same = {key for key, text in WORDS[language].items() if not re.search(letters, text)}
    assert same == {key for key in same if WORDS["en"][key] == WORDS[language][key]} | (
        same & {"shown"})
    assert len(same) < 15


# Fields of a record that are told in the words of the tables.
PLAIN_FIELDS = {"api", "client", "model", "key", "status", "cached"}
# Keys that are put together when the page runs: the beginning, and what follows it.
COMPOSED = {
    "link_": ("waiting", "live", "ok", "draining", "lost", "asleep"),
    "theme_": ("auto", "light", "dark"), "status_": ("ok", "failed", "left"),
    "phase_": ("reading", "waiting", "thinking", "answering"),
    "field_": tuple(one for one in ccproxy.Record._fields if one not in PLAIN_FIELDS), "alert_": tuple(ccproxy.ALERT_RULES),
    "state_": ("usable", "refused", "skipped", "unknown"), "window_": ("five_hour", "weekly"),
    "credit_": ("monthly", "free", "purchased")}


def used_keys():
    given = set(re.findall(r'data-(?:word|hint|label-word)="(\w+)"', ccproxy.PAGE_MARKUP))
    given |= set(re.findall(r'\b(?:say|empty)\(\s*"(\w+)"', SOURCES))
    given |= {key for pair in re.findall(r'\bsay\([^()]*? \? "(\w+)" : "(\w+)"', SOURCES)
              for key in pair}
    given |= set(re.findall(r'\{ key: "(\w+)"', SOURCES))           # columns
    given |= set(re.findall(r'name: "(\w+)", show:', SOURCES))      # charts
    given |= set(re.findall(r'\["(\w+)", "(?:first|second|bad)", ', SOURCES))
    given |= set(re.findall(r'", "(to_\w+)", \(', SOURCES))         # snippets
    given |= set(ccproxy.UNFIT_WORDS.values()) | {"switched_on", "still_off", "switched_off"}
    given |= {"nothing_fits", "nothing_yet"} | PLAIN_FIELDS
    return {key for key in given if not key.endswith("_")} | {
        head + tail for head, tails in COMPOSED.items() for tail in tails}


def test_every_key_that_is_used_has_words_and_every_other_one_is_gone():
    for head in COMPOSED:
        assert '"%s" + ' % head in SOURCES
    assert used_keys() - set(WORDS["en"]) == set()
    assert set(WORDS["en"]) - used_keys() == set()


def test_every_reason_of_an_unfit_key_has_words():
    assert "say(entry.reason)" in ccproxy.PAGE_KEYS
    assert set(ccproxy.UNFIT_WORDS.values()) <= set(WORDS["en"])


@pytest.mark.parametrize("row", ["a: one | two", "a: one | two | three | four", "a: one |  | three",
                                 "a: one | two | three\na: one | two | three", "a"])
def test_an_odd_row_of_words_is_refused(row):
    with pytest.raises(ValueError):
        ccproxy.page_words(row)


def test_a_row_goes_on_where_it_is_indented():
    assert ccproxy.page_words("a: one\n  more | two\n  | three\nb: x | y | z") == {
        "en": {"a": "one more", "b": "x"}, "ko": {"a": "two", "b": "y"},
        "zh": {"a": "three", "b": "z"}}


def test_rows_may_share_a_line():
    assert ccproxy.page_words("a: one | two | three || b: x |\n  y | z") == {
        "en": {"a": "one", "b": "x"}, "ko": {"a": "two", "b": "y"}, "zh": {"a": "three", "b": "z"}}


# Policy.

def hash_of(text):
    return "'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_policy_allows_this_style_and_this_script_alone():
    rules = dict(rule.split(" ", 1) for rule in FIELDS["content-security-policy"].split("; "))
    assert rules == {
        "default-src": "'none'", "script-src": hash_of(SCRIPT), "style-src": hash_of(STYLE),
        "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'", "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'"}
    assert len(re.findall("<style|<script", TEXT)) == 2


def test_the_other_fields():
    assert FIELDS["x-content-type-options"] == "nosniff"
    assert FIELDS["referrer-policy"] == "no-referrer"
    assert FIELDS["cache-control"] == "no-store"
    assert FIELDS["content-type"] == "text/html; charset=utf-8"


def test_nothing_comes_from_elsewhere():
    urls = set(re.findall(r"""[a-z]+://[^\s"'`)]+""", TEXT))
    assert urls <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""(src|href|url|action)\s*[=(]\s*["']?//""", TEXT)
    links = {(tag, name, value) for tag, given in ELEMENTS for name, value in given.items()
             if name in ("src", "href", "action", "srcset", "data", "formaction")}
    assert {value for tag, _, value in links if tag != "link"} == {
        "#main", "#overview", "#requests", "#models", "#keys", "#connect", "#settings"}
    assert all(value.startswith("data:image/svg+xml,") for tag, _, value in links if tag == "link")


@pytest.mark.parametrize("word", [
    "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function",
    "DOMParser", "setHTML", "javascript:", "import(", "sessionStorage", "indexedDB",
    "document.cookie", "createContextualFragment", "srcdoc"])
def test_the_script_does_without(word):
    assert word not in SOURCES + ccproxy.PAGE_MARKUP


def test_storage_holds_language_and_theme_alone():
    assert SOURCES.count("localStorage") == 2
    assert set(re.findall(r'\bremember\("(\w+)"', SOURCES)) == {"language", "theme"}


def test_there_are_no_inline_styles_and_handlers():
    names = {name for _, given in ELEMENTS for name in given}
    assert "style" not in names and not [name for name in names if name.startswith("on")]
    # `style:` is a word of Intl.NumberFormat too.
    assert set(re.findall(r'\bstyle"?: ?("\w+")?', SOURCES)) == {
        '"percent"', '"currency"', '"unit"'}
    assert '"style"' not in SOURCES and ".style." not in SOURCES


def test_words_cannot_end_the_script():
    assert "</" not in SCRIPT


# Form.

def test_ids_are_unique_and_labels_are_there():
    ids = [given["id"] for _, given in ELEMENTS if "id" in given]
    assert len(ids) == len(set(ids))
    assert {"main", "nav", "header"} <= {tag for tag, _ in ELEMENTS}
    for name in set(re.findall(r'\$\("([\w-]+)"\)', SOURCES)):
        assert name in ids, name


def test_the_page_is_small_and_made_once():
    assert len(PAGE.body) < MOST_BYTES
    assert ccproxy.build_page() == PAGE


def test_the_words_reach_the_script():
    found = re.search(r"const WORDS = (\{.*?\});", SCRIPT)
    assert json.loads(found[1]) == WORDS


@pytest.mark.parametrize("path", ["/dashboard", "/admin", "/v1/dashboard", "/admin/"])
def test_it_is_served(proxy, path):
    answer = proxy.request("GET", path, key=None)
    assert (answer.status, answer.body) == (200, PAGE.body)
    assert {name: answer.fields[name] for name in FIELDS} == FIELDS


def test_a_stranger_gets_the_shell_which_holds_nothing(make_proxy):
    proxy = make_proxy(adminKey="adminword", clientKey="clientword")
    answer = proxy.request("GET", "/dashboard", key=None, fields={"x-forwarded-for": "10.0.0.9"})
    assert answer.body == PAGE.body
    assert proxy.request("POST", "/dashboard", {}, key=None).status == 405


def test_claude_code_is_led_with_every_family_of_models():
    families = re.findall(r"ANTHROPIC_DEFAULT_(\w+)_MODEL", " ".join(ccproxy.CLAUDE_NAMES))
    assert families and all('"%s"' % one in ccproxy.PAGE_CLIENTS for one in families)
