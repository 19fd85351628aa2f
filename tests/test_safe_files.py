"""SAFE FILES: changed at once or not at all, one change at a time, nothing lost."""
from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time

import pytest
from harness import PROGRAM, ccproxy

needs_modes = pytest.mark.skipif(os.name != "posix", reason="modes and links are those of Unix")


def names_in(folder):
    return sorted(os.listdir(str(folder)))


def test_a_change_keeps_the_previous_file_and_the_mode(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("one")
    os.chmod(str(path), 0o640)
    ccproxy.change_file(str(path), lambda old: old + b"two")
    assert path.read_text() == "onetwo" and (tmp_path / ".x.json.previous").read_text() == "one"
    assert names_in(tmp_path) == [".x.json.previous", "x.json"]
    if os.name == "posix":
        assert {stat.S_IMODE(os.stat(str(tmp_path / name)).st_mode) for name in names_in(tmp_path)} == {0o640}


@needs_modes
@pytest.mark.parametrize("old,new,mode", [
    ('{"port": 1}', '{"port": 2}', 0o664), ('{"port": 1}', '{"adminKey": "a"}', 0o660),
    ('{"clientKey": "a"}', "{}", 0o660), ('{"alertWebhookUrl": "a"}', '{"alertWebhookUrl": "b"}', 0o660)])
def test_other_accounts_read_no_secret_option(tmp_path, old, new, mode):
    """Neither in the file nor in the previous one, whoever could read it before."""
    path = tmp_path / "config.json"
    path.write_text(old)
    os.chmod(str(path), 0o664)
    ccproxy.change_file(str(path), lambda data: new.encode())
    assert {stat.S_IMODE(os.stat(str(tmp_path / name)).st_mode) for name in names_in(tmp_path)} == {mode}


@needs_modes
def test_the_folders_owner_cannot_turn_mode_and_owner_to_another_file(tmp_path, monkeypatch):
    """Root changes a file in a person's folder, where the new file's name can be made a link."""
    path, victim, given = tmp_path / "x", tmp_path / "victim", []
    path.write_text("one")
    victim.write_text("v")
    os.chmod(str(path), 0o640)
    os.chmod(str(victim), 0o600)

    def exchange(number):
        fresh = [name for name in names_in(tmp_path) if name.startswith(".x.")]
        os.unlink(str(tmp_path / fresh[0]))
        os.symlink(str(victim), str(tmp_path / fresh[0]))

    monkeypatch.setattr(os, "fsync", exchange)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name in ("chown", "fchown"):
        monkeypatch.setattr(os, name, lambda target, *who: given.append(target))
    ccproxy.replace_file(str(path), b"two", os.stat(str(path)), 0o640)
    assert [type(target) for target in given] == [int]
    assert stat.S_IMODE(os.stat(str(victim)).st_mode) == 0o600


@needs_modes
def test_a_new_file_is_private(tmp_path):
    ccproxy.change_file(str(tmp_path / "x"), lambda old: b"new" + old)
    assert (tmp_path / "x").read_text() == "new" and names_in(tmp_path) == ["x"]
    assert stat.S_IMODE(os.stat(str(tmp_path / "x")).st_mode) == 0o600


@needs_modes
def test_secrets_get_a_mode_of_their_own_and_leave_no_copy(tmp_path):
    path = tmp_path / "x"
    path.write_text("one")
    os.chmod(str(path), 0o644)
    ccproxy.change_file(str(path), lambda old: b"two", 0o600)
    assert stat.S_IMODE(os.stat(str(path)).st_mode) == 0o600 and names_in(tmp_path) == ["x"]


@needs_modes
def test_a_link_stays_one(tmp_path):
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "real").write_text("one")
    os.symlink(str(place / "real"), str(tmp_path / "link"))
    ccproxy.change_file(str(tmp_path / "link"), lambda old: b"two")
    assert os.path.islink(str(tmp_path / "link")) and (place / "real").read_text() == "two"
    assert names_in(place) == [".real.previous", "real"] and names_in(tmp_path) == ["elsewhere", "link"]


def test_what_does_not_change_is_not_written(tmp_path):
    path = tmp_path / "x"
    path.write_text("one")
    before = os.stat(str(path)).st_mtime_ns
    ccproxy.change_file(str(path), lambda old: old)
    assert names_in(tmp_path) == ["x"] and os.stat(str(path)).st_mtime_ns == before


def test_a_refusal_changes_nothing(tmp_path):
    path = tmp_path / "x"
    path.write_text("one")

    def refuse(old):
        raise ccproxy.ProxyError("invalid", "no")
    with pytest.raises(ccproxy.ProxyError):
        ccproxy.change_file(str(path), refuse)
    assert path.read_text() == "one" and names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["replace", "fsync", "open"])
def test_a_disk_that_refuses(tmp_path, monkeypatch, name):
    path = tmp_path / "x"
    path.write_text("one")
    real = getattr(os, name)

    def full(*given, **known):
        if name == "open" and not given[1] & os.O_CREAT:
            return real(*given, **known)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ccproxy.os, name, full)
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.change_file(str(path), lambda old: b"two")
    assert caught.value.status == 409 and "No space left on device" in caught.value.message
    assert path.read_text() == "one" and names_in(tmp_path) == ["x"]


def test_a_folder_that_is_not_there(tmp_path):
    path = str(tmp_path / "no" / "x")
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.change_file(path, lambda old: b"two")
    assert caught.value.status == 409 and not ccproxy.is_writable(path)


WRITER = """
import sys
sys.path.insert(0, %r)
import ccproxy
for _ in range(25):
    ccproxy.change_file(%r, lambda old: b"%%d" %% (int(old or b"0") + 1))
"""


@needs_modes
def test_processes_and_threads_take_turns(tmp_path):
    path = str(tmp_path / "x")
    words = WRITER % (os.path.dirname(PROGRAM), path)
    others = [subprocess.Popen([sys.executable, "-c", words]) for _ in range(2)]
    threads = [threading.Thread(target=exec, args=(words, {})) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait(30) for other in others] == [0, 0]
    with open(path) as file:
        assert file.read() == "100"


@needs_modes
def test_a_change_that_does_not_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ccproxy, "LOCK_SECONDS", 0.05)
    lock = ccproxy.lock_folder(str(tmp_path))
    try:
        with pytest.raises(ccproxy.ProxyError) as caught:
            ccproxy.change_file(str(tmp_path / "x"), lambda old: b"two")
    finally:
        os.close(lock)
    assert caught.value.status == 409 and "another change" in caught.value.message


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, seen = tmp_path / "x", set()
    path.write_bytes(b"a" * 100_000)
    done = threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())
    reader = threading.Thread(target=read)
    reader.start()
    for letter in b"bcdefgh":
        ccproxy.change_file(str(path), lambda old: bytes([letter]) * 100_000)
        time.sleep(0.005)
    done.set()
    reader.join()
    assert all(len(data) == 100_000 and len(set(data)) == 1 for data in seen)
