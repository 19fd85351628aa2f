"""The README's quick starts in Korean and Chinese: their commands run as they are written."""
from __future__ import annotations

import re
import shlex

import pytest
from harness import CHAT, ccproxy
from test_house import readme

TITLES = {"Korean": "한국어 빠른 시작", "Chinese": "中文快速入门"}
in_each = pytest.mark.parametrize("title", TITLES.values(), ids=TITLES)


def part(title):
    return readme().partition("\n## %s\n" % title)[2].partition("\n## ")[0]


def commands(title):
    """Every command line in it, in order."""
    text = part(title)
    blocks = "".join(re.findall(r"(?ms)^```sh\n(.*?)^```", text)).replace("\\\n", "")
    return blocks.splitlines() + re.findall(r"^\| `(.+?)` \|", text, re.M)


@in_each
def test_they_stand_before_the_changes_and_are_linked(title):
    headings = re.findall(r"(?m)^## (.+)$", readme())
    assert headings[-3:] == [*TITLES.values(), "Changes"]
    anchor = re.sub(r"\s", "-", title)
    assert "(#%s)" % anchor in readme().partition("\n## ")[0]


def test_they_name_the_same_commands():
    korean, chinese = (["-d" if "content" in line else line for line in commands(title)]
                       for title in TITLES.values())
    assert korean == chinese and len(korean) == 9


@in_each
def test_the_commands_are_understood(title, monkeypatch):
    """Each names a command and flags that exist."""
    understood = 0
    for line in commands(title):
        words = shlex.split(line)
        if words[0] == "python3" and "--help" not in words:
            assert words[1] == "ccproxy.py"
            name, flags, given, _ = ccproxy.read_arguments_of(words[2:])
            assert name == (words[2] if words[2:] and words[2][0] != "-" else "")
            understood += 1
    assert understood == 6


@in_each
def test_the_request_is_answered(title, proxy, upstream):
    (line,) = [one for one in commands(title) if one.startswith("curl ")]
    words = shlex.split(line)
    assert words[1] == "http://127.0.0.1:3000" + CHAT
    pairs = list(zip(words, words[1:]))
    fields = dict(value.replace("$COMMANDCODE_KEY", "user_a").split(": ", 1)
                  for flag, value in pairs if flag == "-H")
    (body,) = [value for flag, value in pairs if flag == "-d"]
    answer = proxy.request("POST", CHAT, body.encode(), fields, key=None)
    assert answer.json["choices"][0]["message"]["content"] == "Hello there"
