"""SAFE FILES: changed at once or not at all, one change at a time, nothing lost."""
from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from harness import PROGRAM, ccproxy

if os.name == "posix":
    import fcntl

needs_modes = pytest.mark.skipif(os.name != "posix", reason="modes and links are those of Unix")


def names_in(folder):
    return sorted(os.listdir(str(folder)))


def test_a_change_keeps_the_previous_file_and_the_mode(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("one")
    os.chmod(str(path), 0o640)
    assert ccproxy.change_file(str(path), lambda old: old + b"two", previous=True) == b"one"
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
    ccproxy.change_file(str(path), lambda data: new.encode(), previous=True)
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
    ccproxy.change_file(str(tmp_path / "x"), lambda old: b"new" if old is None else None)
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
    ccproxy.change_file(str(tmp_path / "link"), lambda old: b"two", previous=True)
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


def test_two_processes_lose_no_change(tmp_path):
    """Each changes the file 100 times, through a link or not; no lock is left."""
    path, link = tmp_path / "x", tmp_path / "link"
    path.write_text("0")
    if os.name == "posix":
        link.symlink_to(path)
    places = (str(path), str(link if os.name == "posix" else path))
    writers = [subprocess.Popen([sys.executable, "-c", (WRITER % (
        os.path.dirname(PROGRAM), place)).replace("(25)", "(100)")]) for place in places]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert path.read_text() == "200" and ".x.lock" not in names_in(tmp_path)


HOLDER = """
import sys, time
sys.path.insert(0, %r)
import ccproxy
def hold(old):
    print("held", flush=True)
    time.sleep(60)
ccproxy.change_file(%r, hold)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is in the midst of changing x."""
    words = HOLDER % (os.path.dirname(PROGRAM), str(tmp_path / "x"))
    with subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"held"
        yield process
        process.kill()


def test_a_killed_holder_holds_nobody_up(tmp_path, holder):
    lock = tmp_path / ".x.lock"
    assert lock.exists() and (os.name != "posix" or stat.S_IMODE(lock.stat().st_mode) == 0o600)
    holder.kill()
    holder.wait()
    assert lock.exists()
    ccproxy.change_file(str(tmp_path / "x"), lambda old: b"two")
    assert names_in(tmp_path) == ["x"]


def test_a_change_that_does_not_end_is_told(tmp_path, monkeypatch, holder):
    monkeypatch.setattr(ccproxy, "LOCK_SECONDS", 0.05)
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.change_file(str(tmp_path / "x"), lambda old: b"two")
    lock = str(tmp_path / ".x.lock")
    assert caught.value.status == 409 and names_in(tmp_path) == [".x.lock"]
    assert caught.value.message == (
        "%s cannot be changed: another change has held the lock file %s for 0.05 s: end the "
        "process that makes it; where there is none, delete the lock file." % (lock.replace(
            ".x.lock", "x"), lock))


def test_a_change_waits_for_the_one_before(tmp_path, holder):
    threading.Timer(0.2, holder.kill).start()
    ccproxy.change_file(str(tmp_path / "x"), lambda old: b"two")
    assert holder.wait() and names_in(tmp_path) == ["x"]


@needs_modes
@pytest.mark.parametrize("kind", ["link", "folder", "dangling"])
def test_what_is_no_lock_file_is_not_followed(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(ccproxy, "LOCK_SECONDS", 0.05)
    lock, victim = tmp_path / ".x.lock", tmp_path / "victim"
    if kind == "link":
        victim.write_text("v")
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim)
    with pytest.raises(ccproxy.ProxyError, match="delete the lock file"):
        ccproxy.change_file(str(tmp_path / "x"), lambda old: b"two")
    assert not (tmp_path / "x").exists() and victim.exists() == (kind == "link")


@needs_modes
def test_roots_lock_is_the_files_owners(tmp_path, monkeypatch):
    """Else one that root's process leaves, when it is killed, would stop its owner for good."""
    given, path = [], tmp_path / "x"
    path.write_text("one")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "fchown", lambda target, *who: given.append((target, who)))
    lock = str(tmp_path / ".x.lock")
    number = ccproxy.take_lock(lock, str(path))
    owner = (os.stat(str(path)).st_uid, os.stat(str(path)).st_gid)
    assert given == [(number, owner)]
    ccproxy.drop_lock(number, lock)
    open(lock, "w").close()     # one that was there may be a hard link to anything
    ccproxy.drop_lock(ccproxy.take_lock(lock, str(path)), lock)
    assert given == [(number, owner)] and names_in(tmp_path) == ["x"]


@needs_modes
@pytest.mark.parametrize("number", ["EACCES", "EROFS"])
def test_a_folder_that_cannot_be_written_is_as_without_locks(tmp_path, monkeypatch, number):
    """What does not change is no error there, and what does is told at once."""
    path = tmp_path / "x"
    path.write_text("one")
    real, fault = os.open, getattr(errno, number)

    def refuse(name, flags, *more, **known):
        if flags & os.O_CREAT:
            raise OSError(fault, os.strerror(fault), name)
        return real(name, flags, *more, **known)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda name, mode: False)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    assert ccproxy.change_file(str(path), lambda old: old) == b"one"
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.change_file(str(path), lambda old: b"two")
    assert os.strerror(fault) in caught.value.message and path.read_text() == "one"


@needs_modes
def test_a_file_system_without_locks_is_as_before(tmp_path, monkeypatch):
    def refuse(number, how):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    ccproxy.change_file(str(tmp_path / "x"), lambda old: b"two")
    assert (tmp_path / "x").read_text() == "two" and names_in(tmp_path) == ["x"]


@needs_modes
def test_a_lock_that_was_removed_meanwhile_is_not_taken_for_one(tmp_path):
    """Whoever waited for a lock that its holder removed takes the next one."""
    lock = str(tmp_path / ".x.lock")
    first = ccproxy.take_lock(lock, "")
    late = os.open(lock, os.O_RDWR)
    ccproxy.drop_lock(first, lock)
    assert not ccproxy.try_lock(late, lock)
    second = ccproxy.take_lock(lock, "")
    assert not ccproxy.try_lock(late, lock)
    os.close(late)
    ccproxy.drop_lock(second, lock)
    assert names_in(tmp_path) == []


def test_windows_locks_a_byte_and_closes_before_it_removes(tmp_path, monkeypatch):
    """With a msvcrt of our own: it refuses the first time, as the real one does, with EACCES."""
    asked, path, lock = [], str(tmp_path / "x"), str(tmp_path / ".x.lock")

    def locking(number, how, size):
        asked.append((how, size))
        if len(asked) == 1:
            raise PermissionError(errno.EACCES, "Permission denied")

    def unlink(name):
        with pytest.raises(OSError):
            os.fstat(number)
        remove(name)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    number, remove = ccproxy.take_lock(lock, path), os.unlink
    assert asked == [(2, 1), (2, 1)] and os.path.exists(lock)
    monkeypatch.setattr(os, "unlink", unlink)
    ccproxy.drop_lock(number, lock)
    assert not os.path.exists(lock)


def test_a_file_is_removed_and_what_comes_after_is_done_under_the_lock(tmp_path):
    path, seen = tmp_path / "x", []
    path.write_text("one")
    ccproxy.change_file(str(path), lambda old: None, after=lambda: seen.extend(names_in(tmp_path)))
    assert seen == [".x.lock"] and names_in(tmp_path) == []
    assert ccproxy.change_file(str(path), lambda old: None) is None and names_in(tmp_path) == []


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
