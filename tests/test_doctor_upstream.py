"""DOCTOR UPSTREAM and DOCTOR: the way to the upstream, keys, figures and models."""
from __future__ import annotations

import os
import ssl
import time

import pytest
from doctoring import CERTS, Clinic, bare, examine, scene_of, settings_of, tls_of  # noqa: F401
from fake_upstream import FakeProxy, raw, reset, stall
from harness import ccproxy, full_listener

pytestmark = pytest.mark.usefixtures("bare")
SECRET = "5ecr3tPartOfAKey0123456789"
AUTHORITY, INSPECTOR = (os.path.join(CERTS, name) for name in ("ca.pem", "inspector.pem"))


@pytest.fixture
def clinic():
    started = []

    def start(**known):
        started.append(Clinic(**known))
        return started[-1]
    yield start
    for fake in started:
        fake.close()


def works(found):
    """{check: [whether each finding is well]}."""
    return {name: [one.works for one in findings] for name, findings in found.items()}


def test_all_is_well(clinic, tmp_path, monkeypatch):
    fake = clinic(known=("user_good", "user_other"))
    monkeypatch.setenv("COMMANDCODE_KEY", "work=user_good,user_other")
    sound, found = examine(settings_of(tmp_path, apiBase=fake.base, port=0))
    assert sound and works(found) == {
        "python": [True], "configuration": [True], "operator keys": [None], "port": [None],
        "proxy": [True], "authorities": [None], "network": [None], "names": [True], "tls": [None],
        "upstream": [True], "clock": [True], "keys": [True, True], "plan": [True, True],
        "windows": [True, True], "models": [True], "clients": [None], "client settings": [None]}
    name = ccproxy.key_name("user_good")
    assert found["keys"][0].words == name + " (work) is accepted"
    assert found["plan"][0].words == name + " (work): individual-go, active, 8.54 USD left"
    assert "5-hour 0.02 of 3.00 USD; weekly 1.45 of 6.00 USD" in found["windows"][1].words
    assert found["models"][0].words == "2; defaultModel is deepseek/deepseek-v4-flash"
    assert not fake.requests        # nothing was generated
    assert {request.line.split(" ")[1] for request in fake.side_requests} == {
        "/provider/v1/models", *ccproxy.ACCOUNT_PATHS}
    assert all((request.field("authorization") is None) is ("/models" in request.line)
               for request in fake.side_requests)


def test_keys_that_are_refused(clinic, tmp_path, monkeypatch):
    fake = clinic()
    monkeypatch.setenv("COMMANDCODE_KEY", "user_bad")
    monkeypatch.setenv("COMMANDCODE_API_KEYS", "home=user_good,user_bad")
    sound, found = examine(settings_of(tmp_path, apiBase=fake.base, port=0))
    assert not sound and works(found)["keys"] == [False, True]      # each once
    assert "refused (401)" in found["keys"][0].words and found["keys"][0].advice
    assert works(found)["plan"] == [True]
    assert "user_" not in repr(found).replace("user_...", "")


@pytest.mark.parametrize("answer, words, works", [
    # what the upstream says of the key: what the doctor says, and whether all is well
    (401, "is refused (401)", False), (403, "is unknown: the upstream answers 403", False),
    (503, "is unknown: the upstream answers 503", False), (200, "is accepted", True),
    (b"<html>", "is unknown: Expecting value", False)])
def test_how_a_key_is(clinic, tmp_path, answer, words, works):
    body = answer if isinstance(answer, bytes) else b"{}"
    fake = clinic()
    fake.side_script = raw(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (
        200 if isinstance(answer, bytes) else answer, len(body), body))
    key = ccproxy.new_ring_key("user_good", name="home")
    finding = ccproxy.key_finding(ccproxy.ask_about(
        scene_of(settings_of(tmp_path, apiBase=fake.base)), key))
    assert finding.words.startswith("%s (home) %s" % (key.shown, words)), finding
    assert finding.works is works and bool(finding.advice) is not works


def test_a_key_whose_window_is_full_is_accepted_but(clinic, tmp_path):
    fake = clinic()
    fake.credits = {"credits": {"monthlyCredits": 5}, "windowLimits": {
        "weekly": {"used": 6, "cap": 6, "resetAt": (time.time() + 900) * 1000}}}
    finding = ccproxy.key_finding(ccproxy.ask_about(
        scene_of(settings_of(tmp_path, apiBase=fake.base)), ccproxy.new_ring_key("user_good")))
    assert finding.words.endswith(" is accepted, but it is over its usage window")


@pytest.mark.parametrize("value, word", [("user_a,user_b;nonsense", "COMMANDCODE_KEY, entry 2"),
                                         ("a=user_a,a=user_b", "one name to two keys")])
def test_a_ring_that_is_malformed(clinic, tmp_path, monkeypatch, value, word):
    monkeypatch.setenv("COMMANDCODE_KEY", value)
    _, found = examine(settings_of(tmp_path, apiBase=clinic().base, port=0))
    assert works(found)["keys"] == [False] and word in found["keys"][0].words


def test_what_is_no_key_in_a_ring_is_told(clinic, tmp_path, monkeypatch):
    monkeypatch.setenv("COMMANDCODE_KEY", "user_good, sk-other")
    _, found = examine(settings_of(tmp_path, apiBase=clinic().base, port=0))
    assert works(found)["keys"] == [True, None]
    assert "COMMANDCODE_KEY, entry 2" in found["keys"][1].words


def test_figures_that_are_bad(clinic, tmp_path, monkeypatch):
    fake = clinic()
    fake.plan = {"data": {"planId": "individual-go", "status": "canceled"}}
    fake.credits = {"credits": {"monthlyCredits": 0}, "windowLimits": {
        "limited": True, "weekly": {"used": 6, "cap": 6, "resetAt": (time.time() + 7200) * 1000}}}
    monkeypatch.setenv("COMMANDCODE_KEY", "user_good")
    _, found = examine(settings_of(tmp_path, apiBase=fake.base, port=0))
    assert works(found)["keys"] == [True]
    assert works(found)["plan"] == works(found)["windows"] == [False]
    assert "resets in 1h59m" in found["windows"][0].words


@pytest.mark.parametrize("skew, fine", [(0, True), (-50, True), (300, False), (-4000, False)])
def test_the_clock(clinic, tmp_path, skew, fine):
    _, found = examine(settings_of(tmp_path, apiBase=clinic(skew=skew).base, port=0))
    assert works(found)["clock"] == [fine]
    assert ("behind" if skew > 0 else "ahead") in found["clock"][0].words or fine


@pytest.mark.parametrize("known, word", [
    ({"defaultModel": "vendor/new-MODEL"}, ""),
    ({"defaultModel": "vendor/newer-model"}, "vendor/New-Model"),
    ({"defaultModel": "gpt-5.5"}, "Choose another"),
    ({"allowedModels": ["vendor/New-Model"]}, "not allowed"),
    ({"models": [{"id": "deepseek/deepseek-v4-flash", "enabled": False}]}, "switched off")])
def test_the_default_model(clinic, tmp_path, known, word):
    _, found = examine(settings_of(tmp_path, apiBase=clinic().base, port=0, **known))
    assert works(found)["models"] == [not word]
    assert word in found["models"][0].words + found["models"][0].advice


@pytest.mark.parametrize("answer, word", [
    (raw(b"HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n"), "answers 503"),
    (raw(b"HTTP/1.1 302 X\r\nlocation: /login\r\ncontent-length: 0\r\n\r\n"), "answers 302"),
    (raw(b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\n{}"), "not with its list"),
    (raw(b"HTTP/1.1 200 X\r\ncontent-length: 6\r\n\r\n<html>"), "not with its list"),
    (raw(b"SSH-2.0\r\n", close=True), "malformed"), (reset(), "reset")],
    ids=["503", "302", "no list", "a page", "no HTTP", "a reset"])
def test_an_upstream_that_is_none(clinic, tmp_path, monkeypatch, answer, word):
    """One cross; what needs the upstream is not tried."""
    fake = clinic()
    fake.side_script = answer
    monkeypatch.setenv("COMMANDCODE_KEY", "user_good")
    _, found = examine(settings_of(tmp_path, apiBase=fake.base, port=0))
    assert works(found)["upstream"] == [False] and word in found["upstream"][0].words
    for name in ("keys", "plan", "windows"):
        assert found[name] == [(None, "not tried: see upstream", "")]
    assert works(found)["clock"] == [None] and works(found)["models"] == [True]


def test_a_slow_upstream(clinic, tmp_path, monkeypatch):
    monkeypatch.setattr(ccproxy, "DOCTOR_CHECKS", tuple(
        check._replace(seconds=0.3 if check.name == "upstream" else check.seconds)
        for check in ccproxy.DOCTOR_CHECKS))
    fake = clinic()
    fake.side_script = stall(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
    sound, found = examine(settings_of(tmp_path, apiBase=fake.base, port=0))
    assert not sound and found["upstream"][0].words == "no answer within 0.3 seconds"
    assert works(found)["keys"] == [None]


def test_a_refused_connection(tmp_path):
    _, found = examine(settings_of(tmp_path, apiBase="http://127.0.0.1:1", port=0))
    assert works(found)["upstream"] == [False] and "refused" in found["upstream"][0].words.lower()


# Names and networks.


def test_no_dns(tmp_path):
    sound, found = examine(settings_of(tmp_path, apiBase="https://a.ccproxy.invalid", port=0))
    crosses = [name for name, row in works(found).items() if False in row]
    assert not sound and crosses in (["names"], ["network"], ["authorities", "names"],
                                     ["authorities", "network"])
    if crosses[-1] == "names":
        assert "no network, or none whose DNS knows a.ccproxy.invalid" in found["names"][0].words
    for name in ("tls", "upstream", "keys", "plan", "windows"):
        assert found[name][0][:2] == (None, "not tried: see " + crosses[-1])


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(ccproxy, "has_route", lambda: False)
    _, found = examine(settings_of(tmp_path, apiBase="https://api.example", port=0))
    assert found["network"][0].words == "there is no network: this machine has no way to any other"
    for name in ("names", "tls", "upstream", "keys", "plan", "windows"):
        assert found[name] == [(None, "not tried: see network", "")]


# TLS and authorities.

TLS = [     # the upstream's certificate, the trusted authorities, works, words
    ("server.pem", AUTHORITY, True, "issued by ccproxy tests authority, "),
    ("inspected.pem", INSPECTOR, True, "this is an inspection in between"),
    ("inspected.pem", AUTHORITY, False, "issued by Zscaler Root CA (ccproxy tests)"),
    ("server.pem", INSPECTOR, False, "issued by ccproxy tests authority"),
    ("other.pem", AUTHORITY, False, "mismatch"), ("expired.pem", INSPECTOR, False, "expired")]


@pytest.mark.parametrize("certificate, authority, fine, words", TLS,
                         ids=["good", "inspected", "inspected and untrusted", "untrusted",
                              "another name", "expired"])
def test_tls(clinic, tmp_path, monkeypatch, certificate, authority, fine, words):
    monkeypatch.setenv("SSL_CERT_FILE", authority)
    fake = clinic(tls=tls_of(certificate))
    base = "https://localhost:%d" % fake.port
    _, found = examine(settings_of(tmp_path, apiBase=base, port=0))
    (finding,) = found["tls"]
    assert finding.works is fine and words in finding.words, finding
    assert bool(finding.advice) is not fine
    assert found["authorities"] == [(True, "1 of SSL_CERT_FILE", "")]
    assert works(found)["upstream"] == [True if fine else None]


@pytest.mark.parametrize("certificate, authority, word", [
    ("inspected.pem", AUTHORITY, "SSL_CERT_FILE"), ("other.pem", AUTHORITY, "apiBase"),
    ("expired.pem", INSPECTOR, "clock")])
def test_what_to_do_about_a_certificate(clinic, tmp_path, monkeypatch, certificate, authority, word):
    monkeypatch.setenv("SSL_CERT_FILE", authority)
    fake = clinic(tls=tls_of(certificate))
    scene = scene_of(settings_of(tmp_path, apiBase="https://localhost:%d" % fake.port, port=0))
    assert word in ccproxy.check_tls(scene)[0].advice


def test_no_tls_where_it_is_expected(clinic, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", AUTHORITY)
    fake = clinic()
    _, found = examine(settings_of(tmp_path, apiBase="https://127.0.0.1:%d" % fake.port,
                                   port=0, upstreamConnectSeconds=0.3))
    assert works(found)["tls"] == [False] and works(found)["upstream"] == [None]


def test_a_port_that_answers_no_connection(tmp_path, monkeypatch):
    with full_listener() as (host, port):
        settings = settings_of(tmp_path, apiBase="https://%s:%d" % (host, port), port=0,
                               upstreamConnectSeconds=0.2)
        (finding,) = ccproxy.check_tls(scene_of(settings))
    assert finding.works is False and "timed out" in finding.words


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_authorities_that_are_not_there(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, str(tmp_path / "nothing"))
    (finding,) = ccproxy.check_authorities(scene_of(settings_of(tmp_path)))
    assert finding.works is False and name in finding.words


def test_no_tls_without_authorities(clinic, tmp_path, monkeypatch):
    """One cause, one cross."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing"))
    base = "https://localhost:%d" % clinic(tls=tls_of("server.pem")).port
    _, found = examine(settings_of(tmp_path, apiBase=base, port=0))
    assert [name for name, row in works(found).items() if False in row] == ["authorities"]
    assert found["tls"] == found["keys"] == [(None, "not tried: see authorities", "")]


def test_authorities_that_are_no_certificates(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", __file__)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    (finding,) = ccproxy.check_authorities(scene_of(settings_of(tmp_path)))
    assert finding.works is False and "SSL_CERT_FILE" in finding.words + finding.advice


def test_an_empty_store(tmp_path, monkeypatch):
    monkeypatch.setattr(ssl, "create_default_context", lambda: ssl.SSLContext(
        ssl.PROTOCOL_TLS_CLIENT))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: ssl.DefaultVerifyPaths(
        None, None, "", "", "", ""))
    (finding,) = ccproxy.check_authorities(scene_of(settings_of(tmp_path)))
    assert finding.works is False and "no certificate authorities of the system" in finding.words


# Proxies.


def test_through_a_proxy(clinic, tmp_path, monkeypatch):
    proxy = FakeProxy()
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//me:%s@" % SECRET))
    monkeypatch.setenv("SSL_CERT_FILE", AUTHORITY)
    fake = clinic(tls=tls_of("server.pem"))
    base = "https://localhost:%d" % fake.port
    _, found = examine(settings_of(tmp_path, apiBase=base, port=0))
    assert found["proxy"] == [(True, "127.0.0.1:%d (HTTPS_PROXY)" % proxy.port, "")]
    assert works(found)["tls"] == works(found)["upstream"] == [True]
    assert len(proxy.heads) == 2 and all(b"CONNECT localhost" in head for head in proxy.heads)
    assert SECRET not in repr(found)
    monkeypatch.setenv("NO_PROXY", "localhost")
    _, found = examine(settings_of(tmp_path, apiBase=base, port=0))
    assert found["proxy"] == [(True, "none is used (HTTPS_PROXY, NO_PROXY)", "")]
    assert works(found)["upstream"] == [True] and len(proxy.heads) == 2
    proxy.close()


def test_a_proxy_that_refuses(clinic, tmp_path, monkeypatch):
    proxy = FakeProxy(b"HTTP/1.1 407 Auth %s\r\n\r\n" % b"x")
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    base = "https://localhost:%d" % clinic(tls=tls_of("server.pem")).port
    _, found = examine(settings_of(tmp_path, apiBase=base, port=0))
    assert works(found)["tls"] == [False] and "407" in found["tls"][0].words
    proxy.close()


def test_a_proxy_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "socks5://me:%s@127.0.0.1:1" % SECRET)
    _, found = examine(settings_of(tmp_path, apiBase="https://localhost:1", port=0))
    assert works(found)["proxy"] == [False] and works(found)["network"] == [None]
    assert "NO_PROXY" in found["proxy"][0].advice and SECRET not in repr(found)
