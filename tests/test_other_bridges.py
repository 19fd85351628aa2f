"""OTHER BRIDGES: commandcode-bridge's credentials file, other bridges' variables, `.env` files."""
from __future__ import annotations

import json

import pytest
from harness import ccproxy

SECRET = "5ecr3tPartOfAKey0123"
KEY = "user_" + SECRET


def entries_of(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return ccproxy.file_entries(text, "keys.json")


# The credentials file.

EXAMPLE = {
    "server": {"host": "127.0.0.1", "port": 9992},
    "routing": {"policy": "balance_priority", "fallbackPolicy": "drain_first",
                "maxInFlightPerCredential": 3, "maxTotalInFlight": 12},
    "models": [{"id": "deepseek/deepseek-v4-flash", "enabled": True},
               {"id": "anthropic/claude-opus-4.7", "enabled": False, "label": "Opus", "notes": ""}],
    "credentials": [{"id": "primary", "apiKey": KEY, "weight": 1, "enabled": True}]}


def test_the_whole_file():
    assert entries_of(EXAMPLE) == ({
        "host": "127.0.0.1", "port": 9992, "routingPolicy": "balance_priority",
        "fallbackPolicy": "drain_first", "maxInFlightPerKey": 3, "maxTotalInFlight": 12,
        "models": [{"id": "deepseek/deepseek-v4-flash", "enabled": True},
                   {"id": "anthropic/claude-opus-4.7", "enabled": False}]}, [])


@pytest.mark.parametrize("value, entries", [
    ({"server": {"port": "8080"}}, {"port": 8080}),
    ({"server": {"host": None, "port": None}}, {}),
    ({"routing": {"maxTotalInFlight": None}}, {}),
    ({"routing": {"billingRefreshMs": 60000, "credentialCooldownMs": 1500}},
     {"accountRefreshSeconds": 60, "keyCooldownSeconds": 1.5}),
    ({"bridgeApiKey": "c1ient"}, {"clientKey": "c1ient"}),
    ({"models": []}, {}), ({"models": None}, {}),
    ({"models": [{"id": "M", "enabled": True}, {"id": "m", "enabled": False}]},
     {"models": [{"id": "m", "enabled": False}]}),      # the last one counts
    ({"credentials": [{"api_key": KEY, "name": "a", "allowed_models": [], "max_in_flight": 1}]},
     {}),
    ({"apiKeys": [KEY]}, {}), ([KEY], {}), (KEY, {}), ("a=%s,b=%s" % (KEY, KEY), {}), ("", {}),
    ("{}", {}), ("\ufeff {}", {}),
    ({"apiKey": KEY, "userId": "u", "userName": "me"}, {}),         # the vendor's CLI's own
    ({"userId": "u", "credentials": [KEY]}, {}),
    ({"apiKey": KEY, "server": {"port": 3}}, {"port": 3})])
def test_what_is_understood(value, entries):
    assert entries_of(value) == (entries, [])


@pytest.mark.parametrize("value, named", [
    ({"surprise": 1}, "surprise is not understood"),
    ({"server": {"hots": "h"}}, "server.hots is not understood"),
    ({"server": "x"}, "server is not understood"), ({"routing": [1]}, "routing is not understood"),
    ({"tuning": {"depth": 3}}, "tuning.depth is not understood"),
    ({"credentials": [{"apiKey": KEY, "note": "x"}]}, "credentials.note is not understood"),
    ({"models": [{"id": "m", "enabled": True, "colour": 1}]}, "models.colour is not understood"),
    ({"models": [{"id": "m"}]}, "models entry 1 must have an id and enabled"),
    ({"models": ["m"]}, "models entry 1"), ({"models": "m"}, "models entry 1"),
    ({"server": {"port": "x"}}, "server.port must be a number"),
    ({"server": {"port": True}}, "server.port must be a number"),
    ({"server": {"host": ["h"]}}, "server.host must be a string"),
    ({"routing": {"policy": "random"}}, "routing.policy must be one of: daily_burn_priority"),
    ({"routing": {"fallbackPolicy": "balance_priority"}}, "routing.fallbackPolicy must be one of"),
    ({"routing": {"billingRefreshMs": "soon"}}, "routing.billingRefreshMs must be"),
    ({"routing": {"billingRefreshMs": 10 ** 400}}, "routing.billingRefreshMs must be"),
    ({"routing": {"credentialCooldownMs": True}}, "routing.credentialCooldownMs must be"),
    ({"routing": {"maxTotalInFlightMultiplier": 3}}, "set maxTotalInFlight"),
    ({"bridgeApiKey": "a b"}, "bridgeApiKey must be of visible ASCII"),
    ({"\u2603\n": 1}, "\\u2603? is not understood")])
def test_what_is_not_understood_is_named(value, named):
    entries, (warning,) = entries_of(value)
    known = [name for name in entries if name != "models" or entries[name] != [
        {"id": "m", "enabled": True}]]
    assert known == [] and warning.startswith("keys.json: ") and named in warning
    assert "\n" not in warning and warning.isascii()


def test_what_is_well_counts_beside_what_is_not():
    entries, warnings = entries_of({**EXAMPLE, "surprise": 1, "models": EXAMPLE["models"] + ["x"]})
    assert entries == entries_of(EXAMPLE)[0] and len(warnings) == 2


def test_warnings_are_bounded_and_each_is_told_once():
    _, warnings = entries_of({"credentials": [{"apiKey": KEY, "note": "x"}] * 50})
    assert len(warnings) == 1
    _, warnings = entries_of({"m%d" % number: number for number in range(5000)})
    assert len(warnings) == ccproxy.MAX_WARNINGS + 1 and "4992 more" in warnings[-1]
    entries, warnings = entries_of({"models": [
        {"id": "m%d" % number, "enabled": False} for number in range(20_000)]})
    assert len(entries["models"]) == 20_000 and warnings == []


@pytest.mark.parametrize("value", [
    {KEY: 1}, {"server": {KEY: 1}}, {"bridgeApiKey": SECRET + " x"}, {"server": {"port": KEY}},
    {"routing": {"policy": KEY}}, {"models": [{"id": KEY}]}, {"credentials": [{KEY: 1}]}])
def test_no_key_is_shown(value):
    _, (warning,) = entries_of(value)
    assert SECRET not in warning


# Variables.

@pytest.mark.parametrize("name, instead", [
    ("COMMANDCODE_ROUTER_BACKENDS", "HAProxy or nginx"), ("COMMANDCODE_ROUTER_API_KEY", "HAProxy"),
    ("PROXY_API_KEY", "clientKey"), ("CC_API_KEY", "COMMANDCODE_API_KEY"),
    ("COMMANDCODE_VERSION", "cliVersion"), ("ROTATION_MODE", "routingPolicy"),
    ("CC_STREAM_IDLE_MS", "upstreamIdleSeconds"), ("CC_MAX_INFLIGHT", "maxTotalInFlight"),
    ("CC_MAX_BODY_MB", "maxBodyBytes"), ("CC_UPSTREAM_PROXY", "HTTPS_PROXY"),
    ("CORS_ALLOW_ORIGIN", "corsOrigin"), ("BRIDGE_ENV_FILE", "--env-file"),
    ("BRIDGE_BASE_URL", "--url"), ("CMD_ZDR", "never")])
def test_a_variable_that_is_not_read_here(name, instead):
    (warning, names), = ccproxy.other_variables({name: "s3cret", "PATH": "x"}).items()
    assert names == [name] and name in warning and instead in warning and "s3cret" not in warning


def test_one_line_for_all_of_a_kind():
    names = ["COMMANDCODE_ROUTER_%d" % number for number in range(9)]
    (warning, found), = ccproxy.other_variables(dict.fromkeys(names, "x")).items()
    assert found == names and warning.count("COMMANDCODE_ROUTER_") == 4 and "..." in warning
    assert ccproxy.other_variables({names[0]: "", "COMMANDCODE_API_KEY": "x"}) == {}


def test_no_variable_stands_in_both_tables():
    read = {name for option in ccproxy.OPTIONS for name in ccproxy.environment_names(option)}
    assert ccproxy.other_variables(dict.fromkeys(read.union(ccproxy.CREDENTIAL_VARIABLES), "x")) == {}


# `.env` files.

@pytest.mark.parametrize("line, value", [
    ("A=b", "b"), ("  A = b  ", "b"), ("export A=b", "b"), ("export\tA=b", "b"), ("A=", ""),
    ("A=b c", "b c"), ("A=b # c", "b"), ("A=b#c", "b#c"), ("A=#c", "#c"), ("A= # c", ""),
    ("A='b # c'", "b # c"), ("A='b\\n'", "b\\n"), ("A='b' # c", "b"), ("A=''", ""),
    ('A="b # c"', "b # c"), (r'A="b\n\t\"\\\$c"', 'b\n\t"\\$c'), (r'A="\d"', r"\d"),
    ('A="b"  # "c"', "b"), ('A=""', ""), ("A=b=c", "b=c"), ("A=it's", "it's"), ("A=\u4e16", "\u4e16"),
    ('A={"a": "b"}', '{"a": "b"}'), ("A=$HOME", "$HOME"), ("A=b\r", "b"), ("A=1\nA=2", "2"),
    ("\n# A=c\n\nA=b\n", "b"), ("\ufeffA=b", "b")])
def test_lines_of_a_file(line, value):
    assert ccproxy.parse_env_file(line, ".env") == {"A": value}


@pytest.mark.parametrize("text", ["", "\n\n", "# A=b", "   # x", "\r\n#\r\n"])
def test_files_without_variables(text):
    assert ccproxy.parse_env_file(text, ".env") == {}


@pytest.mark.parametrize("line", [
    SECRET, "=" + SECRET, "1A=" + SECRET, "A-B=" + SECRET, "A B=" + SECRET, "A='" + SECRET,
    'A="' + SECRET, 'A="' + SECRET + '\\"', "A='%s'x" % SECRET, '"A"=' + SECRET, "A: " + SECRET,
    "A=\0" + SECRET, "export " + SECRET])
def test_what_is_wrong_is_told_by_its_line_alone(line):
    with pytest.raises(ccproxy.ProxyError) as caught:
        ccproxy.parse_env_file("B=1\n\n%s\nC=2" % line, "my.env")
    assert caught.value.kind == "config" and caught.value.message.startswith("my.env, line 3: ")
    assert SECRET not in caught.value.message
