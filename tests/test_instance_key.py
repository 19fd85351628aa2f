"""INSTANCE KEY: the proof of /health?nonce=, and the file that it is made with."""
from __future__ import annotations

import hashlib
import hmac
import os
import stat
import subprocess
import sys
import threading

import pytest
from harness import Proxy, ccproxy, clean_environment

NONCE = "00112233445566778899aabbccddeeff"
POSIX = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX here")


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The path of a key that is not made yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path / "ccproxy" / "instance.key"


def health(proxy, query):
    return proxy.request("GET", "/health" + query, key=None)


def proof_of(path, nonce, port):
    asked = ("%s:%d" % (nonce, port)).encode()
    return hmac.new(path.read_bytes(), asked, hashlib.sha256).hexdigest()


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("nonce", [NONCE, "A1" * 64, "0" * 33])
def test_a_nonce_is_answered_with_a_proof(state, upstream, nonce, bare):
    proxy = Proxy(apiBase=upstream.base, bare=bare)
    try:
        answer = health(proxy, "?nonce=" + nonce)
        assert answer.status == 200 and answer.json["status"] == "ok"
        assert answer.json["proof"] == proof_of(state, nonce, proxy.port)
        assert "proof" not in health(proxy, "").json and "proof" not in health(proxy, "?a=b").json
    finally:
        proxy.close()


@pytest.mark.parametrize("nonce", ["", "0" * 31, "0" * 129, "g" * 32, NONCE + "%20", "0x" + NONCE])
def test_a_nonce_of_another_form_is_refused(state, proxy, nonce):
    answer = health(proxy, "?nonce=" + nonce)
    assert (answer.status, answer.json["error"]["param"]) == (400, "nonce")
    assert "32 to 128 hex digits" in answer.json["error"]["message"] and not state.exists()


def test_a_draining_proxy_proves_itself_too(state, proxy):
    proxy.app.leaving = True
    answer = health(proxy, "?nonce=" + NONCE)
    assert answer.status == 503 and answer.json["proof"] == proof_of(state, NONCE, proxy.port)


@POSIX
def test_the_key_is_made_once_and_for_its_owner_alone(state):
    known = os.umask(0)
    try:
        key = ccproxy.read_instance_key()
    finally:
        os.umask(known)
    assert len(key) == 32 and key == state.read_bytes() == ccproxy.read_instance_key()
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    assert os.listdir(state.parent) == ["instance.key"]


def test_of_many_that_start_at_once_all_have_the_same(state):
    code = ("import sys; sys.path[0] = %r; import ccproxy; "
            "print(ccproxy.read_instance_key().hex())" % os.path.dirname(ccproxy.__file__))
    started = [subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE,
                                env=clean_environment(XDG_STATE_HOME=str(state.parent.parent)))
               for _ in range(6)]
    keys = {one.communicate(timeout=60)[0] for one in started}
    assert keys == {state.read_bytes().hex().encode() + b"\n"}
    assert os.listdir(state.parent) == ["instance.key"]


def test_another_process_that_is_faster_wins(state, monkeypatch):
    take = ccproxy.take_lock

    def late(*given):
        state.write_bytes(b"f" * 32)
        state.chmod(0o600)
        return take(*given)

    monkeypatch.setattr(ccproxy, "take_lock", late)
    assert ccproxy.read_instance_key() == b"f" * 32
    assert os.listdir(state.parent) == ["instance.key"]


def spoil(state, how):
    """Make the key one that is not to be trusted, or not to be had."""
    if how == "no folder":
        state.parent.write_bytes(b"")
        return
    state.parent.mkdir()
    state.write_bytes(b"x" * (31 if how == "short" else 33 if how == "long" else 32))
    state.chmod({"group": 0o640, "others": 0o604}.get(how, 0o600))


@POSIX
@pytest.mark.parametrize("how, told", [
    ("group", "other accounts"), ("others", "other accounts"), ("owner", "other accounts"),
    ("short", "32 bytes"), ("long", "32 bytes"), ("no folder", "File exists")])
def test_without_a_key_that_can_be_trusted_there_is_no_proof(state, proxy, monkeypatch, how, told):
    spoil(state, how)
    if how == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: os.stat(state).st_uid + 1)
    answer = health(proxy, "?nonce=" + NONCE)
    assert answer.status == 200 and "proof" not in answer.json
    assert "WARNING no instance key" in proxy.log.getvalue() and told in proxy.log.getvalue()
    assert ccproxy.read_proven_health(proxy.base)[1] is False


def test_other_requests_do_not_wait_for_a_key_that_is_being_made(state, proxy, monkeypatch):
    """By a process that holds its lock: the nonce is answered when that ends."""
    state.parent.mkdir()
    lock = str(state.parent / ".instance.key.lock")
    number = ccproxy.take_lock(lock, str(state))
    waits, take = threading.Event(), ccproxy.take_lock
    monkeypatch.setattr(ccproxy, "take_lock", lambda *given: waits.set() or take(*given))
    asked = threading.Thread(target=health, args=(proxy, "?nonce=" + NONCE))
    asked.start()
    waits.wait()
    assert health(proxy, "").status == 200 and asked.is_alive() and not state.exists()
    ccproxy.drop_lock(number, lock)
    asked.join()
    assert state.exists() and os.listdir(state.parent) == ["instance.key"]


def test_an_account_without_a_home_has_no_key(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ccproxy, "state_folder", lambda: "~/.local/state/ccproxy")
    with pytest.raises(ValueError, match="no home folder"):
        ccproxy.read_instance_key()
    assert os.listdir(tmp_path) == []


def test_a_program_makes_the_key_when_it_starts(start_program, tmp_path):
    program = start_program("--demo", until="curl", environment={"XDG_STATE_HOME": str(tmp_path)})
    path = tmp_path / "ccproxy" / "instance.key"
    assert health(program, "").status == 200 and path.exists()
    assert health(program, "?nonce=" + NONCE).json["proof"] == proof_of(path, NONCE, program.port)


@POSIX
def test_a_program_that_may_write_nowhere_serves_all_the_same(start_program, tmp_path):
    (tmp_path / "ccproxy").write_text("")
    program = start_program("--demo", until="curl", environment={"XDG_STATE_HOME": str(tmp_path)})
    assert "proof" not in health(program, "?nonce=" + NONCE).json
    assert "no instance key (`run` and `top` need --url)" in program.log
