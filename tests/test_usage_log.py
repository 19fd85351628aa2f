"""USAGE LOG: records go into SQLite, off the loop, and nothing that happens to the file harms."""
from __future__ import annotations

import os
import sqlite3
import stat
import sys
import time

import pytest
from fake_upstream import ndjson, stream
from harness import CHAT, FAST, KEY, MESSAGES, ccproxy, run_program, wait_until

QUICK = FAST._replace(usage_batch=0.02, usage_retry=0.05, usage_busy=0.05, usage_end=2.0)
COSTED = ndjson({"type": "text-delta", "text": "Hi"}, {
    "type": "finish", "finishReason": "stop", "totalUsage": {"inputTokens": 100, "outputTokens": 7}})


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "state" / "usage.db")


@pytest.fixture
def make_logged(make_proxy, path):
    """Proxies that keep their records there."""
    return lambda **options: make_proxy(limits=options.pop("limits", QUICK), usageDb=path, **options)


def rows_in(path, columns="*"):
    """What another program reads there; [] while there is no table."""
    db = sqlite3.connect(path, timeout=5)
    try:
        return db.execute("SELECT %s FROM requests ORDER BY at" % columns).fetchall()
    except sqlite3.OperationalError as error:
        assert "no such table" in str(error)
        return []
    finally:
        db.close()


def wait_for_rows(path, number):
    wait_until(lambda: os.path.exists(path) and len(rows_in(path)) >= number)
    assert len(rows_in(path)) == number


def said(proxy, words):
    return proxy.log.getvalue().count(words)


def test_every_record_is_written(make_logged, upstream, path):
    proxy = make_logged()
    upstream.default = stream(COSTED)
    for route, streaming in ((CHAT, True), (CHAT, False), (MESSAGES, True), (MESSAGES, False)):
        proxy.post(route, model="kimi", stream=streaming)
    proxy.post(CHAT, key=None)
    wait_for_rows(path, 5)
    assert rows_in(path) == [tuple(record) for record in sorted(proxy.app.recent)]
    assert rows_in(path, "api, key, status, input, error")[0] == (
        "chat", ccproxy.key_name(KEY), 200, 100, "")
    assert "usageDb" in proxy.log.getvalue() and not said(proxy, "ERROR")


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
def test_nobody_else_can_read_it(make_logged, path):
    """Whatever the mask of the process is, also the two files beside it and one that was there."""
    os.makedirs(os.path.dirname(path), 0o700)
    with open(path, "wb"):
        os.chmod(path, 0o644)
    proxy = make_logged()
    proxy.post(CHAT)
    wait_for_rows(path, 1)
    db = sqlite3.connect(path)
    modes = {name: stat.S_IMODE(os.stat(os.path.join(os.path.dirname(path), name)).st_mode)
             for name in os.listdir(os.path.dirname(path))}
    db.close()
    assert modes == {"usage.db": 0o600, "usage.db-wal": 0o600, "usage.db-shm": 0o600}


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
@pytest.mark.parametrize("foreign", ["text", "database"])
def test_a_file_of_another_program_stays_as_it_is(make_logged, path, foreign):
    os.makedirs(os.path.dirname(path), 0o700)
    if foreign == "text":
        with open(path, "w") as file:
            file.write("alias ll='ls -l'\n" * 100)
    else:
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE theirs (x)")
        db.close()
    os.chmod(path, 0o644)
    with open(path, "rb") as file:
        before = file.read()
    proxy = make_logged()
    wait_until(lambda: said(proxy, "ERROR"))
    with open(path, "rb") as file:
        assert file.read() == before
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
def test_its_folder_is_made_private(make_logged, path):
    proxy = make_logged()
    proxy.post(CHAT)
    wait_for_rows(path, 1)
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_what_is_left_is_written_at_the_end(make_logged, path):
    proxy = make_logged(limits=QUICK._replace(usage_batch=60.0))
    for _ in range(3):
        proxy.post(CHAT)
    proxy.wait_quiet()
    assert rows_in(path) == []
    proxy.close(hurry=False)
    assert len(rows_in(path)) == 3
    assert os.listdir(os.path.dirname(path)) == ["usage.db"]


def test_a_full_batch_does_not_wait(make_logged, path):
    proxy = make_logged(limits=QUICK._replace(usage_batch=60.0))
    proxy.post(CHAT)
    wait_until(lambda: proxy.app.recent)
    for _ in range(ccproxy.USAGE_BATCH - 1):
        proxy.app.usage.add(proxy.app.recent[0])
    wait_for_rows(path, ccproxy.USAGE_BATCH)


@pytest.mark.parametrize("change", [
    {"input": 10 ** 40}, {"output": -1}, {"cost": float("inf")}, {"total": float("nan")},
    {"asked": "\ud800"}, {"notes": "\0"}, {"model": "x" * 100_000}, {"trace": "'; DROP TABLE requests"}])
def test_no_record_spoils_the_others(make_logged, path, change):
    proxy = make_logged()
    proxy.post(CHAT)
    wait_until(lambda: proxy.app.recent)
    record = proxy.app.recent[0]
    for one in (record._replace(**change), record):
        proxy.loop.call_soon_threadsafe(proxy.app.usage.add, one)
    wait_for_rows(path, 3)
    assert not said(proxy, "ERROR")


def test_old_rows_go(make_logged, path):
    os.makedirs(os.path.dirname(path))
    db = ccproxy.open_usage(path, 1.0)
    now, day = time.time(), 86_400
    for age in (0, 29, 31, 400):
        db.execute("INSERT INTO requests (at, model) VALUES (?, ?)", (now - age * day, str(age)))
    db.executemany("INSERT INTO requests (at, model) VALUES (?, 'x')",
                   [(now - 99 * day,)] * (ccproxy.USAGE_CLEANING_ROWS + 1))
    db.close()
    proxy = make_logged(usageDays=30)
    proxy.post(CHAT)
    wait_until(lambda: proxy.app.usage.cleaned or not proxy.post(CHAT))
    proxy.close(hurry=False)
    kept = [model for model, in rows_in(path, "model")]
    assert kept[:2] == ["29", "0"] and not {"31", "400", "x"} & set(kept)


# What can be wrong with the file.


def make_corrupt(path):
    with open(path, "wb") as file:
        file.write(b"This is no database. " * 500)


def make_foreign(path):
    db = sqlite3.connect(path)
    db.executescript("CREATE TABLE recipes (name TEXT); INSERT INTO recipes VALUES ('soup');")
    db.close()


def make_newer(path):
    db = ccproxy.open_usage(path, 1.0)
    db.execute("PRAGMA user_version = %d" % (len(ccproxy.USAGE_VERSIONS) + 1))
    db.close()


def make_folder(path):
    os.mkdir(path)


BROKEN = {"corrupt": (make_corrupt, "not a database"),
          "another program's": (make_foreign, "another program"),
          "newer": (make_newer, "newer ccproxy"), "a folder": (make_folder, "unable to open")}


def content_of(path):
    if os.path.isdir(path):
        return os.listdir(path)
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_used_costs_one_line(make_logged, path, name):
    """It is left as it was; when it is gone, what waited is written."""
    make, words = BROKEN[name]
    os.makedirs(os.path.dirname(path))
    make(path)
    before = content_of(path)
    proxy = make_logged()
    assert [proxy.post(CHAT).status for _ in range(3)] == [200] * 3
    wait_until(lambda: said(proxy, words))
    time.sleep(0.2)             # several more attempts
    assert said(proxy, "ERROR") == 1 and content_of(path) == before
    os.rename(path, path + ".away")
    wait_for_rows(path, 3)
    wait_until(lambda: said(proxy, "works again; 0 records lost"))
    assert said(proxy, "ERROR") == 1


def test_a_locked_file(make_logged, path):
    proxy = make_logged()
    proxy.post(CHAT)
    wait_for_rows(path, 1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert [proxy.post(CHAT).status for _ in range(5)] == [200] * 5
    wait_until(lambda: said(proxy, "locked"))
    time.sleep(0.2)
    assert said(proxy, "ERROR") == 1 and len(rows_in(path)) == 1
    other.execute("COMMIT")
    other.close()
    wait_for_rows(path, 6)
    wait_until(lambda: said(proxy, "works again; 0 records lost"))


def test_a_lock_that_stays_does_not_hold_up_the_end(make_logged, path):
    proxy = make_logged(limits=QUICK._replace(usage_busy=30.0, usage_end=0.2))
    proxy.post(CHAT)
    wait_for_rows(path, 1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    proxy.post(CHAT)
    proxy.close(hurry=False)
    other.execute("COMMIT")
    other.close()
    assert said(proxy, "1 record lost") == 1
    proxy.app.usage.thread.join(10)


def test_what_waits_is_bounded_and_what_is_lost_is_told(make_logged, path, monkeypatch):
    monkeypatch.setattr(ccproxy, "MAX_UNWRITTEN", 10)
    os.makedirs(os.path.dirname(path))
    make_corrupt(path)
    proxy = make_logged()
    wait_until(lambda: said(proxy, "not a database"))
    for _ in range(14):
        assert proxy.post(CHAT).status == 200
    wait_until(lambda: len(proxy.app.recent) == 14)
    assert len(proxy.app.usage.queue) == 10
    metrics = proxy.request("GET", "/metrics", key=None).body
    assert b"ccproxy_usage_records_lost_total 4\n" in metrics
    os.unlink(path)
    wait_for_rows(path, 10)
    wait_until(lambda: said(proxy, "works again; 4 records lost"))
    assert said(proxy, "ERROR") == 1


def test_what_cannot_be_cleaned_is_not_written_twice(make_logged, path):
    """A row was written, whatever becomes of the old ones."""
    os.makedirs(os.path.dirname(path))
    db = ccproxy.open_usage(path, 1.0)
    db.execute("INSERT INTO requests (at) VALUES (1)")
    db.execute("CREATE TRIGGER kept BEFORE DELETE ON requests "
               "BEGIN SELECT RAISE(ABORT, 'rows are kept'); END")
    db.close()
    proxy = make_logged()
    for number in range(1, 4):
        proxy.post(CHAT)
        wait_until(lambda: len(rows_in(path)) > number and not proxy.app.usage.queue)
    assert len(rows_in(path)) == 4 and said(proxy, "rows are kept") == 1


def test_a_file_that_was_taken_away_is_made_anew(make_logged, path):
    proxy = make_logged()
    proxy.post(CHAT)
    wait_for_rows(path, 1)
    for name in os.listdir(os.path.dirname(path)):
        os.unlink(os.path.join(os.path.dirname(path), name))
    proxy.post(CHAT)
    wait_for_rows(path, 1)
    assert not said(proxy, "ERROR")


def test_a_folder_that_cannot_be_made(make_proxy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    proxy = make_proxy(limits=QUICK, usageDb=str(tmp_path / "file" / "usage.db"))
    assert proxy.post(CHAT).status == 200
    wait_until(lambda: said(proxy, "usageDb"))
    assert said(proxy, "ERROR") == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs modes that hold")
def test_a_read_only_folder(make_logged, path):
    os.makedirs(os.path.dirname(path), 0o500)
    proxy = make_logged()
    assert proxy.post(CHAT).status == 200
    wait_until(lambda: said(proxy, "ERROR"))
    os.chmod(os.path.dirname(path), 0o700)
    wait_for_rows(path, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prlimit")
def test_a_full_disk(start_program, tmp_path):
    """The process may not make files grow: requests go on, one line tells, later all is there."""
    import resource
    path = str(tmp_path / "usage.db")
    program = start_program("--usage-db", path, "--log-level", "error")
    assert program.post(CHAT).status == 200
    wait_for_rows(path, 1)
    resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (
        os.path.getsize(path + "-wal"), resource.RLIM_INFINITY))
    for _ in range(3):
        assert program.post(CHAT).status == 200
    wait_until(lambda: "records wait" in program.log, 10)
    for _ in range(3):
        assert program.post(CHAT).status == 200
    resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (
        resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert program.stop()[0] == 0
    assert len(rows_in(path)) == 7 and program.log.count("usageDb") == 1


# Several writers, and none.


def test_several_processes_share_it(make_logged, upstream, path):
    """None steps on another's toes, also where all of them make the file at once."""
    patient = QUICK._replace(usage_busy=ccproxy.Limits().usage_busy)
    proxies = [make_logged(limits=patient) for _ in range(4)]
    for _ in range(5):
        for proxy in proxies:
            assert proxy.post(CHAT).status == 200
    for proxy in proxies:
        proxy.close(hurry=False)
        assert not said(proxy, "ERROR"), proxy.log.getvalue()
    assert len(rows_in(path)) == 20


def test_without_usage_db_nothing_is_kept(proxy, tmp_path, monkeypatch):
    proxy.post(CHAT)
    assert proxy.app.usage is None


def test_check_creates_nothing(tmp_path):
    done = run_program("--check", "--usage-db", str(tmp_path / "deep" / "usage.db"))
    assert done.returncode == 0 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("platform, environment, expected", [
    ("linux", {"XDG_STATE_HOME": "/s"}, "/s/ccproxy/usage.db"),
    ("linux", {"XDG_STATE_HOME": "relative"}, "/home/me/.local/state/ccproxy/usage.db"),
    ("linux", {}, "/home/me/.local/state/ccproxy/usage.db"),
    ("darwin", {"XDG_STATE_HOME": "/s"},
     "/home/me/Library/Application Support/ccproxy/usage.db"),
    ("win32", {"LOCALAPPDATA": "/local"}, "/local/ccproxy/usage.db")])
def test_the_state_folder(monkeypatch, platform, environment, expected):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    for name, value in {"HOME": "/home/me", "USERPROFILE": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    config = ccproxy.read_config({}, {}, {"usageDb": "auto"}, "test")[0]
    assert ccproxy.usage_path(config).replace(os.sep, "/") == expected


@pytest.mark.parametrize("given, expected", [
    ("", ""), ("~/u.db", os.path.expanduser("~/u.db")), ("u.db", os.path.abspath("u.db"))])
def test_other_paths(given, expected):
    assert ccproxy.usage_path(ccproxy.read_config({}, {}, {"usageDb": given}, "t")[0]) == expected
