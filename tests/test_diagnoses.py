"""DIAGNOSES: what the doctor says of certificates, clocks, accounts and clients' settings."""
from __future__ import annotations

import os
import ssl

import pytest
from harness import ccproxy, make_config

CERTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "certs")
SECRET = "5ecr3tPartOfAKey0123456789"
NOW = 1_800_000_000.0
CONFIG = make_config(clientKey="team-secret")


def der_of(name):
    with open(os.path.join(CERTS, name), encoding="ascii") as file:
        text = file.read()
    marks = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return ssl.PEM_cert_to_DER_cert(
        marks[0] + text.partition(marks[0])[2].partition(marks[1])[0] + marks[1])


@pytest.mark.parametrize("name, issuer, until", [
    ("server.pem", "ccproxy tests authority", 4733510400.0),
    ("inspected.pem", "Zscaler Root CA (ccproxy tests), Zscaler Inc.", 4733510400.0),
    ("expired.pem", "Zscaler Root CA (ccproxy tests), Zscaler Inc.", 1609459200.0)])
def test_certificates(name, issuer, until):
    """Both forms of time: up to 2049, and after it."""
    assert ccproxy.read_certificate(der_of(name)) == (issuer, until)


def test_what_is_no_certificate_is_nobody():
    whole = der_of("server.pem")
    for cut in range(len(whole)):
        assert ccproxy.read_certificate(whole[:cut]).issuer == "somebody unknown"
        broken = whole[:cut] + bytes([whole[cut] ^ 0xff]) + whole[cut + 1:]
        assert isinstance(ccproxy.read_certificate(broken).issuer, str)
    assert ccproxy.read_certificate(b"").issuer == "somebody unknown"


@pytest.mark.parametrize("issuer, told", [
    ("R11, Let's Encrypt", False), ("WE1, Google Trust Services", False),
    ("Zscaler Root CA, Zscaler Inc.", True), ("mitmproxy", True), ("DigiCert Inc", False),
    ("ESET SSL Filter CA, ESET, spol. s r. o.", True), ("Sectigo RSA", False)])
def test_inspections_are_named(issuer, told):
    finding = ccproxy.certificate_finding(ccproxy.Certificate(issuer, NOW + 86400 * 3.5), NOW)
    assert finding.works is True and issuer in finding.words and "3 days" in finding.words
    assert ("inspection in between" in finding.words) is told


@pytest.mark.parametrize("skew, works, words", [
    (0, True, "right"), (1.5, True, "right"), (30, True, "30.0s ahead"), (-30, True, "30.0s behind"),
    (60, True, "60.0s ahead"), (61, False, "61.0s ahead"), (-3600, False, "1h00m behind")])
def test_clocks(skew, works, words):
    date = "Fri, 15 Jan 2027 08:00:00 GMT"
    finding = ccproxy.clock_finding(date, NOW + skew)
    assert finding.works is works and words in finding.words and bool(finding.advice) is not works


@pytest.mark.parametrize("date", ["", "soon", "Fri, 99 Jan 2027 08:00:00 GMT", "1800000000"])
def test_dates_that_are_none(date):
    assert ccproxy.clock_finding(date, NOW).works is None


def figures(**known):
    return ccproxy.Figures(NOW, **known)


@pytest.mark.parametrize("given, works, words", [
    (figures(monthly=8.54, plan="individual-go", status="active", period_end=NOW + 86_400),
     True, "key:1 (a): individual-go, active, 8.54 USD left, period ends in 1d00h"),
    (figures(monthly=0.0, plan="individual-go", status="past_due"), False, "past_due, 0.00 USD"),
    (figures(plan="individual-go", status="canceled"), False, "canceled"),
    (figures(purchased=3.0), True, "no subscription, 3.00 USD left")])
def test_plans(given, works, words):
    finding = ccproxy.plan_finding("key:1 (a)", given, NOW)
    assert finding.works is works and words in finding.words
    assert bool(finding.advice) is not works


def test_windows():
    five = ccproxy.Window(0.02, 3.0, False, NOW + 3600)
    week = ccproxy.Window(6.0, 6.0, True, NOW + 86_400 * 2)
    assert ccproxy.window_finding("k", figures(five_hour=five), NOW) == (
        True, "k: 5-hour 0.02 of 3.00 USD, resets in 1h00m", "")
    finding = ccproxy.window_finding("k", figures(five_hour=five, weekly=week), NOW)
    assert finding.works is False and "weekly 6.00 of 6.00 USD, resets in 2d00h" in finding.words
    assert finding.advice == "Used up: wait (weekly window, resets in 2d00h), or use another key"
    assert ccproxy.window_finding("k", figures(), NOW).works is None


def leads_here(url):
    return ccproxy.points_here(url, CONFIG)


HERE = "http://127.0.0.1:3000"
ENVIRONMENTS = [    # variables, [(works, words)]
    ({}, []),
    ({"ANTHROPIC_BASE_URL": HERE}, [(True, "points here")]),
    ({"OPENAI_BASE_URL": "http://localhost:3000/v1/"}, [(True, "points here")]),
    ({"OPENAI_BASE_URL": "http://[::1]:3000"}, [(True, "points here")]),
    ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:3001"}, [(False, "is http://127.0.0.1:3001")]),
    ({"OPENAI_API_BASE": "https://api.openai.com/v1"}, [(False, "is https://api.openai.com")]),
    ({"OPENAI_BASE_URL": "nonsense"}, [(False, "no http(s) address")]),
    ({"OPENAI_BASE_URL": "http://x:%s@h/" % SECRET}, [(False, "no http(s) address")]),
    ({"OPENAI_BASE_URL": "http://h:99999/?key=" + SECRET}, [(False, "no http(s) address")]),
    ({"OPENAI_BASE_URL": "http://h/" + SECRET}, [(False, "is http://h")]),
    ({"ANTHROPIC_BASE_URL": HERE, "ANTHROPIC_API_KEY": "user_" + SECRET}, [(True, "points here")]),
    ({"ANTHROPIC_BASE_URL": HERE, "ANTHROPIC_API_KEY": "team-secret"}, [(True, "points here")]),
    ({"ANTHROPIC_BASE_URL": HERE, "ANTHROPIC_AUTH_TOKEN": "sk-ant-" + SECRET},
     [(False, "ANTHROPIC_AUTH_TOKEN in the environment is no Command Code key")]),
    ({"ANTHROPIC_API_KEY": "sk-ant-" + SECRET}, []),
    ({"ANTHROPIC_API_KEY": "user_a", "ANTHROPIC_AUTH_TOKEN": "user_b"},
     [(False, "contradict")]),
    ({"OPENAI_BASE_URL": HERE, "AIDER_OPENAI_API_BASE": "http://127.0.0.1:9"},
     [(True, "OPENAI_BASE_URL"), (False, "AIDER_OPENAI_API_BASE")]),
]


@pytest.mark.parametrize("environment, expected", ENVIRONMENTS, ids=range(len(ENVIRONMENTS)))
def test_environments_of_clients(environment, expected):
    found = ccproxy.environment_findings(environment, "the environment", CONFIG, leads_here)
    assert [one.works for one in found] == [works for works, _ in expected]
    for one, (works, words) in zip(found, expected):
        assert words in one.words and bool(one.advice) is not works
    assert SECRET not in repr(found)


CODEX = '''
model = "gpt-5.3-codex"   # a comment
model_provider = '%s'
[model_providers.ccproxy]
base_url = "%s"
env_key = "COMMANDCODE_KEY"
[model_providers."other one"]
base_url = "https://other.example/v1"
[[things]]
base_url = "http://127.0.0.1:1"
'''


@pytest.mark.parametrize("provider, base, environment, works, words", [
    ("ccproxy", HERE + "/v1", {"COMMANDCODE_KEY": "user_a"}, True, "points here"),
    ("ccproxy", HERE + "/v1", {}, False, "env_key COMMANDCODE_KEY is not set"),
    ("ccproxy", "http://127.0.0.1:3999/v1", {}, False, "at http://127.0.0.1:3999"),
    ("ccproxy", "https://far.example/v1?" + SECRET, {}, None, "at no http(s) address"),
    ("other one", HERE, {}, None, "other one, at https://other.example"),
    ("openai", HERE, {}, None, "its provider openai"), ("", HERE, {}, None, "its provider ")])
def test_codex(provider, base, environment, works, words):
    finding = ccproxy.codex_finding(CODEX % (provider, base), environment, CONFIG, leads_here)
    assert finding.works is works and words in finding.words and SECRET not in repr(finding)


@pytest.mark.parametrize("text", ["", "model_provider = 3", "x = '''\nmodel_provider='y'\n'''",
                                  'model_provider="x"\n[model_providers.x]\nbase_url="http://["'])
def test_codex_files_that_say_nothing(text):
    assert ccproxy.codex_finding(text, {}, CONFIG, leads_here).works is None


@pytest.mark.parametrize("text", ["[broken\nbase_url=", "\x00\ufffd", "a = 'open"])
def test_codex_files_that_are_no_toml(text):
    finding = ccproxy.codex_finding("b = 1\n" + text, {}, CONFIG, leads_here)
    assert finding.works is False and "config.toml: is not TOML: line 2" in finding.words


@pytest.mark.parametrize("options, address", [
    ({}, HERE), ({"host": "0.0.0.0", "port": 80}, "http://127.0.0.1:80"),
    ({"host": "::1"}, "http://[::1]:3000"), ({"host": "10.0.0.5"}, "http://10.0.0.5:3000")])
def test_own_address(options, address):
    config = make_config(**options)
    assert ccproxy.local_address(config.host, config.port) == address
    assert ccproxy.points_here(address, config)


def test_an_address_that_nobody_knows_yet():
    assert ccproxy.local_address("127.0.0.1", 0) == "http://127.0.0.1:PORT"
