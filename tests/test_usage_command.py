"""USAGE COMMAND: `ccproxy.py usage` adds up what the database holds."""
from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import sqlite3
import time
from unittest import mock

import pytest
from fake_upstream import ndjson, stream
from harness import CHAT, call_program, ccproxy, clean_environment, run_program, wait_until

NOW = time.time()
RECORD = ccproxy.Record(NOW - 60, "chat", "codex", "kimi", "moonshotai/Kimi-K3", "key:123456", 200,
                        True, 1000, 50, 600, 3, 0.25, 0.5, 2.5, 0, "", "", "")
RECORDS = [
    *[RECORD._replace(first=0.1 * one, total=1.0 * one) for one in range(1, 21)],
    RECORD._replace(model="gpt-5.5", client="curl", key="key:abcdef", cost=None, cached=None),
    RECORD._replace(model="gpt-5.5", client="curl", status=402, error="billing: none", input=None,
                    output=None, cached=None, cost=None, first=None, total=0.01),
    RECORD._replace(model="gpt-5.5", client="curl", status=499, error="the client left"),
    RECORD._replace(model="gpt-5.5", error="upstream: cut in the middle"),
    RECORD._replace(at=NOW - 3 * 86_400, model="old/One", key=""),
    RECORD._replace(at=NOW - 30 * 86_400, model="older/One"),
    RECORD._replace(model="=HYPERLINK(\"http://evil.example\")", client="other"),
    RECORD._replace(model="\x1b[2J<script>", client="other")]


def write_records(path, records):
    db = ccproxy.open_usage(path, 1.0)
    db.executemany("INSERT INTO requests VALUES (%s)" % ", ".join("?" * len(RECORD)), records)
    db.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("usage") / "of me?#%" / "usage.db")
    write_records(path, RECORDS)
    return path


def run_here(*arguments):
    """(exit status, standard output, standard error) of the command, run in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, clean_environment(), clear=True), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = ccproxy.main(["usage", *arguments])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), errors.getvalue()


def usage(path, *arguments):
    status, text, errors = run_here("--usage-db", path, *arguments)
    assert (status, errors) == (0, "")
    return text


def groups(path, by, since="7d"):
    found = json.loads(usage(path, "--by", by, "--since", since, "--json"))
    assert found["by"] == by
    return {group.pop(by): group for group in found["groups"]}, found["total"]


def test_by_model(path):
    found, total = groups(path, "model")
    assert found["moonshotai/Kimi-K3"] == {
        "requests": 20, "errors": 0, "input_tokens": 20_000, "output_tokens": 1000,
        "cached_tokens": 12_000, "cached_share": 0.6, "cost_usd": 5.0, "first_p50": 1.0,
        "first_p95": 1.9, "total_p50": 10.0, "total_p95": 19.0}
    assert found["gpt-5.5"] == {
        "requests": 4, "errors": 2, "input_tokens": 3000, "output_tokens": 150,
        "cached_tokens": 1200, "cached_share": 0.4, "cost_usd": 0.5, "first_p50": 0.5,
        "first_p95": 0.5, "total_p50": 2.5, "total_p95": 2.5}
    assert list(found)[:2] == ["moonshotai/Kimi-K3", "gpt-5.5"]
    assert total["requests"] == sum(one["requests"] for one in found.values()) == 27


@pytest.mark.parametrize("by, expected", [
    ("key", {"key:123456": 25, "key:abcdef": 1, "": 1}),
    ("client", {"codex": 22, "curl": 3, "other": 2}), ("status", {"200": 25, "402": 1, "499": 1})])
def test_by_other_things(path, by, expected):
    found, total = groups(path, by)
    assert {name: figures["requests"] for name, figures in found.items()} == expected


def test_by_day(path):
    found, _ = groups(path, "day", "12w")
    days = [time.strftime("%Y-%m-%d", time.localtime(NOW - age)) for age in (
        30 * 86_400, 3 * 86_400, 60)]
    assert list(found) == days
    assert [figures["requests"] for figures in found.values()] == [1, 1, 26]


@pytest.mark.parametrize("since, requests", [
    ("30m", 26), ("12h", 26), ("1d", 26), ("7d", 27), ("4w", 27), ("52w", 28),
    (time.strftime("%Y-%m-%d", time.localtime(NOW - 5 * 86_400)), 27), ("2020-01-01", 28),
    ("0m", 0)])
def test_since(path, since, requests):
    assert groups(path, "model", since)[1]["requests"] == requests


@pytest.mark.parametrize("given", ["", "7", "d", "-7d", "7 d", "7y", "2026-13-01", "yesterday",
                                   "999999999d", "\u0667d", "user_secret1234567890"])
def test_a_bad_since(path, given):
    status, _, errors = run_here("--usage-db", path, "--since=" + given)
    assert status == 2 and len(errors.splitlines()) == 1
    assert "--since must be like 30m" in errors and "secret" not in errors


def test_the_three_forms_tell_the_same(path):
    found, total = groups(path, "model")
    rows = list(csv.DictReader(usage(path, "--csv").splitlines()))
    assert [row["model"].lstrip("'") for row in rows] == list(found)
    for row, figures in zip(rows, found.values()):
        del row["model"]
        assert {name: float(value) if value else None for name, value in row.items()} == figures
    lines = usage(path).splitlines()
    assert lines[0].split() == ["model", "requests", "errors", "in", "out", "cached", "share",
                                "cost", "$", "first", "p50", "p95", "total", "p50", "p95"]
    assert lines[1].split() == ["moonshotai/Kimi-K3", "20", "0", "20k", "1k", "12k", "60%",
                                "5.0000", "1.00s", "1.90s", "10.0s", "19.0s"]
    assert lines[-2].split()[:3] == ["total", "27", "2"] and path in lines[-1]


def test_no_cell_is_a_formula_and_no_line_moves_the_cursor(path):
    for form in ((), ("--csv",), ("--json",)):
        text = usage(path, *form)
        assert "HYPERLINK" in text and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    for row in csv.reader(usage(path, "--csv").splitlines()):
        assert not any(cell[:1] in tuple("=+-@\t\r") for cell in row)


@pytest.mark.parametrize("width", [0, 40, 60, 80, 100, 200])
def test_the_table_fits(width):
    names = [name for name, *_ in ccproxy.USAGE_FIGURES]
    figures = dict(zip(names, (12345, 67, 10 ** 9, 10 ** 8, 10 ** 8, 0.1, 1.5, None, None, None,
                               None)))
    lines = ccproxy.usage_table("model", [("a/very-long-name-of-a-model" * 2, figures),
                                          ("total", figures)], width)
    assert not width or max(map(len, lines)) <= width
    assert lines[0].split()[1] == "requests" and lines[-1].split()[1] == "12345"
    assert ("p95" in lines[0]) == (width in (0, 100, 200))
    assert "share" in lines[0] or width < 80


def test_many_models_are_cut_but_in_csv(tmp_path):
    path = str(tmp_path / "many.db")
    write_records(path, [RECORD._replace(model="m%d" % one) for one in range(500)])
    assert len(usage(path, "--csv").splitlines()) == 501
    text = usage(path)
    assert len(text.splitlines()) == ccproxy.MAX_USAGE_LINES + 4 and "(300 more: " in text
    assert " 500 " in text.splitlines()[-2]


# Where there is nothing to read.


@pytest.mark.parametrize("arguments, words", [
    ([], "usageDb is not set"), (["--usage-db", "nowhere/usage.db"], "there is no file"),
    (["--usage-db", "."], "there is no file"), (["--usage-db", "text"], "not a database"),
    (["--usage-db", "newer.db"], "newer ccproxy"), (["--usage-db", "other.db"], "another program"),
    (["--usage-db", "text", "--json", "--csv"], "not both"),
    (["--usage-db", "text", "--by", "prompt"], "invalid choice")])
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no database " * 100)
    write_records(str(tmp_path / "newer.db"), [])
    for name, statement in (("newer.db", "PRAGMA user_version = 99"),
                            ("other.db", "CREATE TABLE recipes (name TEXT)")):
        db = sqlite3.connect(str(tmp_path / name))
        db.execute(statement)
        db.close()
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    done = call_program("usage", *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert words in done.stderr and done.stdout == ""
    after = set(os.listdir(tmp_path)) - {"newer.db-wal", "newer.db-shm"}    # SQLite's own
    assert {name: (tmp_path / name).read_bytes() for name in after} == before


@pytest.mark.parametrize("records", [[], [RECORD._replace(at=NOW - 30 * 86_400)]])
def test_no_requests(tmp_path, records):
    path = str(tmp_path / "usage.db")
    write_records(path, records)
    assert usage(path).startswith("no requests since ")
    assert json.loads(usage(path, "--json"))["groups"] == []
    assert len(usage(path, "--csv").splitlines()) == 1


def test_what_is_not_known_is_left_out(tmp_path):
    path = str(tmp_path / "usage.db")
    nothing = RECORD._replace(input=None, output=None, cached=None, reasoning=None, cost=None,
                              first=None, total=None)
    write_records(path, [nothing])
    found, total = groups(path, "model")
    assert found["moonshotai/Kimi-K3"] == total == {
        "requests": 1, "errors": 0, "input_tokens": 0, "output_tokens": 0, "cached_tokens": 0,
        "cached_share": None, "cost_usd": None, "first_p50": None, "first_p95": None,
        "total_p50": None, "total_p95": None}
    assert usage(path).splitlines()[1].split()[6:] == ["-"] * 6
    assert usage(path, "--csv").splitlines()[1] == "moonshotai/Kimi-K3,1,0,0,0,0,,,,,,"


def test_while_the_proxy_writes(start_program, upstream, tmp_path):
    """The whole way: a proxy, requests, the command, and nothing is changed by reading."""
    path = str(tmp_path / "usage.db")
    upstream.default = stream(ndjson({"type": "text-delta", "text": "Hi"}, {
        "type": "finish", "finishReason": "stop", "totalUsage": {"inputTokens": 100,
                                                                 "outputTokens": 7}}))
    program = start_program("--usage-db", path)
    for _ in range(3):
        assert program.post(CHAT, model="kimi").status == 200
    wait_until(lambda: groups(path, "model")[1]["requests"] == 3, 10)
    found, _ = groups(path, "model")
    assert found["moonshotai/Kimi-K3"]["output_tokens"] == 21
    done = run_program("usage", "--usage-db", path)
    assert done.returncode == 0 and "moonshotai/Kimi-K3" in done.stdout
    assert program.stop()[0] == 0


def test_help_has_an_example():
    done = call_program("usage", "--help")
    assert done.returncode == 0 and "Example: python3 ccproxy.py usage" in \
        " ".join(done.stdout.split())


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
def test_in_a_folder_that_nobody_may_write_to(tmp_path, monkeypatch):
    """SQLite would make two files beside it; root may, so it is told that it may not."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    write_records(str(folder / "usage.db"), [RECORD])
    os.chmod(folder, 0o500)
    monkeypatch.setattr(os, "access", lambda *_: False)
    try:
        found = ccproxy.read_usage_file(str(folder / "usage.db"), "model", 0.0)
    finally:
        os.chmod(folder, 0o700)
    assert [(name, figures["requests"]) for name, figures in found] == [
        ("moonshotai/Kimi-K3", 1), ("total", 1)]
    assert os.listdir(folder) == ["usage.db"]
