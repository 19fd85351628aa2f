"""CONFIG: one table of options; flags, environment and file as dicts."""
from __future__ import annotations

import re

import pytest
from harness import ccproxy, make_config

NAMES = [option.name for option in ccproxy.OPTIONS]


def read(flags=None, environment=None, entries=None):
    return ccproxy.read_config(flags or {}, environment or {}, entries or {}, "the file")


def value_of(name, given):
    """An option's value when the file gives this."""
    return getattr(make_config(**{name: given}), ccproxy.snake_case(name))


# The table.

@pytest.mark.parametrize("name, flag, environment, default", [
    # Names that people have in their scripts already: none of them may go away.
    ("port", "--port", {"CC_PORT", "PORT"}, 3000),
    ("host", "--host", {"CC_HOST", "HOST"}, "127.0.0.1"),
    ("apiBase", "--api-base", {"CC_API_BASE", "COMMANDCODE_API_BASE"},
     "https://api.commandcode.ai"),
    ("projectSlug", "--project-slug", {"CC_PROJECT_SLUG", "PROJECT_SLUG"}, None),
    ("logFile", "--log-file", {"CC_LOG_FILE", "LOG_FILE"}, ""),
    ("logLevel", "--log-level", {"CC_LOG_LEVEL", "LOG_LEVEL"}, "info"),
    ("useProviderModels", "--use-provider-models", {"CC_USE_PROVIDER_MODELS"}, True),
    ("modelRefreshIntervalMs", "--model-refresh-interval-ms", {"CC_MODEL_REFRESH_INTERVAL_MS"},
     None),
    ("cliVersion", "--cli-version", {"CC_CLI_VERSION", "COMMANDCODE_CLI_VERSION"}, None),
    ("defaultModel", "--default-model", {"CC_DEFAULT_MODEL", "COMMANDCODE_DEFAULT_MODEL"}, None),
    ("modelAliases", "--model-aliases", {"CC_MODEL_ALIASES"}, {}),
    ("includeReasoning", "--include-reasoning", {"CC_INCLUDE_REASONING", "INCLUDE_REASONING"},
     None),
    ("emptyResponsePolicy", "--empty-response-policy",
     {"CC_EMPTY_RESPONSE_POLICY", "COMMANDCODE_EMPTY_VISIBLE_RESPONSE_POLICY"},
     "error_on_length"),
    ("corsOrigin", "--cors-origin", {"CC_CORS_ORIGIN", "CORS_ORIGIN"}, ""),
    ("maxBodyBytes", "--max-body-bytes", {"CC_MAX_BODY_BYTES", "REQUEST_BODY_LIMIT_BYTES"},
     64 * 1024 * 1024),
    ("upstreamConnectSeconds", "--upstream-connect-seconds", {"CC_UPSTREAM_CONNECT_SECONDS"}, 10),
    ("upstreamIdleSeconds", "--upstream-idle-seconds", {"CC_UPSTREAM_IDLE_SECONDS",
                                                       "COMMANDCODE_TIMEOUT_MS"}, 300),
    ("allowedModels", "--allowed-models", {"CC_ALLOWED_MODELS", "COMMANDCODE_ALLOWED_MODELS"}, []),
    ("allowUnknownModels", "--allow-unknown-models",
     {"CC_ALLOW_UNKNOWN_MODELS", "COMMANDCODE_ALLOW_UNKNOWN_MODELS"}, True),
])
def test_promised_names(name, flag, environment, default):
    option = next(option for option in ccproxy.OPTIONS if option.name == name)
    assert ccproxy.flag_name(option) == flag
    assert set(ccproxy.environment_names(option)) == environment
    if default is not None:
        assert option.default == default


def test_no_name_is_given_twice():
    assert len(NAMES) == len(set(NAMES))
    flags = [ccproxy.flag_name(option) for option in ccproxy.OPTIONS]
    assert len(flags) == len(set(flags))
    assert not {"--config", "--check", "--version", "--help"} & set(flags)
    names = [name for option in ccproxy.OPTIONS for name in ccproxy.environment_names(option)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("option", ccproxy.OPTIONS, ids=lambda option: option.name)
def test_every_row_is_whole(option):
    assert re.fullmatch(r"[a-z]+([A-Z][a-z]+)*", option.name)
    assert option.kind in ccproxy.VALUE_READERS
    assert option.help and not option.help.endswith(".")
    assert ccproxy.environment_names(option)[0] == "CC_" + ccproxy.snake_case(option.name).upper()
    assert ccproxy.read_value(option, option.default, "default") == option.default
    assert len(option.choices) == 2 or option.kind not in ("int", "seconds", "number")


@pytest.mark.parametrize("name, snake", [
    ("port", "port"), ("apiBase", "api_base"),
    ("modelRefreshIntervalMs", "model_refresh_interval_ms")])
def test_snake_case(name, snake):
    assert ccproxy.snake_case(name) == snake


# Order of the sources.

def test_defaults_are_safe_on_a_laptop():
    config, sources = read()
    assert config.host == "127.0.0.1"
    assert (config.log_file, config.cors_origin) == ("", "")
    assert set(sources) == set(NAMES)
    assert set(sources.values()) == {"default"}


@pytest.mark.parametrize("flags, environment, entries, value, source", [
    ({"port": "1"}, {"CC_PORT": "2", "PORT": "3"}, {"port": 4}, 1, "--port"),
    ({}, {"CC_PORT": "2", "PORT": "3"}, {"port": 4}, 2, "environment CC_PORT"),
    ({}, {"PORT": "3"}, {"port": 4}, 3, "environment PORT"),
    ({}, {}, {"port": 4}, 4, "the file"),
    ({}, {"CC_PORT": "", "PORT": ""}, {"port": 4}, 4, "the file"),      # empty counts as unset
    ({}, {"CC_PORT": "", "PORT": "3"}, {}, 3, "environment PORT"),
    ({"port": "0"}, {"PORT": "3"}, {}, 0, "--port"),
    ({}, {"port": "5", "Port": "6", "OTHER": "7"}, {}, 3000, "default"),
])
def test_flags_win_over_environment_over_file_over_defaults(flags, environment, entries, value,
                                                            source):
    config, sources = read(flags, environment, entries)
    assert (config.port, sources["port"]) == (value, source)


@pytest.mark.parametrize("option", ccproxy.OPTIONS, ids=lambda option: option.name)
def test_every_option_can_come_from_every_source(option):
    text = {"int": "2000", "seconds": "7.5", "bool": "false", "str": "thing", "host": "::1", "list": "a,b",
            "map": "a=b", "url": "http://h:1/x", "choice": "x", "secret": "word",
            "number": "2.5", "models": "kimi=off",
            "vendors": '{"a": {"base": "https://h", "format": "openai", "key": "k"}}'}[option.kind]
    text = {"cliVersion": "9.8.7", "accountRefreshSeconds": "17",
            "alertIntervalSeconds": "17", "alertWebhookUrl": "https://h/x?y=1"}.get(
                option.name, text)
    if option.kind == "choice":
        text = option.choices[-1]
    attribute = ccproxy.snake_case(option.name)
    by_flag = getattr(read(flags={option.name: text})[0], attribute)
    assert by_flag != option.default
    for name in ccproxy.environment_names(option):
        told = "%g" % (1000 * float(text)) if option.kind == "seconds" and name.endswith("_MS") \
            else text
        assert getattr(read(environment={name: told})[0], attribute) == by_flag
    config, sources = read(entries={option.name: by_flag})
    assert getattr(config, attribute) == by_flag
    assert sources[option.name] == "the file"


# Variables of other bridges.

ALERT = "COMMANDCODE_BALANCE_ALERT_"


@pytest.mark.parametrize("environment, name, value, source", [
    ({"COMMANDCODE_BILLING_REFRESH_MS": "300000"}, "accountRefreshSeconds", 300,
     "COMMANDCODE_BILLING_REFRESH_MS"),
    ({"COMMANDCODE_BILLING_TIMEOUT_MS": "1500"}, "accountTimeoutSeconds", 1.5,
     "COMMANDCODE_BILLING_TIMEOUT_MS"),
    ({"COMMANDCODE_CREDENTIAL_COOLDOWN_MS": "60000"}, "keyCooldownSeconds", 60,
     "COMMANDCODE_CREDENTIAL_COOLDOWN_MS"),
    ({"COMMANDCODE_TIMEOUT_MS": "120000"}, "upstreamIdleSeconds", 120, "COMMANDCODE_TIMEOUT_MS"),
    ({"COMMANDCODE_TIMEOUT_MS": "120000", "CC_UPSTREAM_IDLE_SECONDS": "7"}, "upstreamIdleSeconds",
     7, "CC_UPSTREAM_IDLE_SECONDS"),                    # our own name counts in seconds, and first
    ({"COMMANDCODE_TIMEOUT_MS": "2 minutes"}, "upstreamIdleSeconds", 120, "COMMANDCODE_TIMEOUT_MS"),
    ({ALERT + "INTERVAL_MS": "60000"}, "alertIntervalSeconds", 60, ALERT + "INTERVAL_MS"),
    ({ALERT + "REPEAT_MS": "3600000"}, "alertRepeatSeconds", 3600, ALERT + "REPEAT_MS"),
    ({ALERT + "WEBHOOK_URL": "https://h/x"}, "alertWebhookUrl", "https://h/x",
     ALERT + "WEBHOOK_URL"),
    ({ALERT + "WEBHOOK_BEARER": "word"}, "alertWebhookToken", "word", ALERT + "WEBHOOK_BEARER"),
    ({ALERT + "ENABLED": "true"}, "minCurrentBalance", 1, ALERT + "ENABLED"),
    ({ALERT + "ENABLED": "1", ALERT + "MIN_CURRENT_BALANCE": "5"}, "minCurrentBalance", 5,
     ALERT + "MIN_CURRENT_BALANCE"),
    ({ALERT + "ENABLED": "1", ALERT + "MIN_CURRENT_BALANCE": "0"}, "minCurrentBalance", 0,
     ALERT + "MIN_CURRENT_BALANCE"),
    ({ALERT + "ENABLED": "on", "CC_MIN_CURRENT_BALANCE": "3"}, "minCurrentBalance", 3,
     "CC_MIN_CURRENT_BALANCE"),
    ({ALERT + "ENABLED": "false", ALERT + "MIN_CURRENT_BALANCE": "1"}, "minCurrentBalance", 0, ""),
    ({ALERT + "ENABLED": "False", ALERT + "MIN_EXPIRING_BALANCE": "1"}, "minExpiringBalance", 0, ""),
    ({ALERT + "ENABLED": "0", ALERT + "MAX_REQUIRED_DAILY_BURN": "1"}, "maxRequiredDailyBurn", 0,
     ""),
    ({ALERT + "ENABLED": "off", ALERT + "WEBHOOK_URL": "https://h/x"}, "alertWebhookUrl", "", ""),
    ({ALERT + "MAX_REQUIRED_DAILY_BURN": "2.5"}, "maxRequiredDailyBurn", 2.5,
     ALERT + "MAX_REQUIRED_DAILY_BURN"),
    ({"RATE_LIMIT_WINDOW": "1 minute"}, "rateLimitWindow", 60, "RATE_LIMIT_WINDOW"),
    ({"RATE_LIMIT_WINDOW": "60"}, "rateLimitWindow", 60, "RATE_LIMIT_WINDOW"),
    ({"RATE_LIMIT_WINDOW": "1.5 Hours"}, "rateLimitWindow", 5400, "RATE_LIMIT_WINDOW"),
    ({"RATE_LIMIT_WINDOW": "90s"}, "rateLimitWindow", 90, "RATE_LIMIT_WINDOW"),
    ({"RATE_LIMIT_WINDOW": "2000 ms"}, "rateLimitWindow", 2, "RATE_LIMIT_WINDOW"),
    ({"RATE_LIMIT_WINDOW": "10 mins"}, "rateLimitWindow", 600, "RATE_LIMIT_WINDOW"),
    ({"RATE_LIMIT_WINDOW": "1 day"}, "rateLimitWindow", 86_400, "RATE_LIMIT_WINDOW"),
    ({"LOG_LEVEL": "warn"}, "logLevel", "warning", "LOG_LEVEL"),
    ({"LOG_LEVEL": "trace"}, "logLevel", "debug", "LOG_LEVEL"),
    ({"LOG_LEVEL": "FATAL"}, "logLevel", "error", "LOG_LEVEL"),
    ({"LOG_LEVEL": "silent"}, "logLevel", "silent", "LOG_LEVEL")])
def test_variables_of_another_bridge(environment, name, value, source):
    config, sources = read(environment=environment)
    assert getattr(config, ccproxy.snake_case(name)) == value
    assert sources[name] == ("environment " + source if source else "default")


@pytest.mark.parametrize("name, text", [
    ("COMMANDCODE_TIMEOUT_MS", "soon"), ("COMMANDCODE_TIMEOUT_MS", "-1"),
    ("COMMANDCODE_TIMEOUT_MS", "1e3"), ("COMMANDCODE_TIMEOUT_MS", "9" * 400),
    ("COMMANDCODE_BILLING_REFRESH_MS", "300"), ("COMMANDCODE_BALANCE_ALERT_ENABLED", "perhaps"),
    ("RATE_LIMIT_WINDOW", "a minute"), ("RATE_LIMIT_WINDOW", "500 ms"), ("LOG_LEVEL", "loud")])
def test_bad_variables_of_another_bridge_name_themselves(name, text):
    with pytest.raises(ccproxy.ProxyError) as caught:
        read(environment={name: text})
    assert caught.value.message.startswith("environment %s: " % name)


# The option `models`.

@pytest.mark.parametrize("given, value", [
    ("", []), ("[]", []), ("kimi=off", [("kimi", False)]), ("a=on, b = OFF,", [("a", True), ("b", False)]),
    ("x:free=off", [("x:free", False)]), ("a=b=off", [("a=b", False)]),
    ('[{"id": "v/M", "enabled": false}]', [("v/M", False)]),
    ([{"enabled": True, "id": "m"}], [("m", True)])])
def test_models_that_are_switched(given, value):
    config = read(flags={"models": given} if isinstance(given, str) else None,
                  entries={"models": given} if isinstance(given, list) else None)[0]
    assert [(row["id"], row["enabled"]) for row in config.models] == value


@pytest.mark.parametrize("given, words", [
    ("kimi", "entry 1 must have an id and enabled"), ("kimi=maybe", "entry 1"), ("=off", "an id of 1"),
    ("[", "must be a JSON list"), ("a=off,A=on", "entry 2 names a model a second time"),
    ({"kimi": False}, "must be a list like"), (["kimi"], "must be a list like"), (5, "must be a list like"),
    ([{"id": "a"}], "no more"), ([{"id": "a", "enabled": 1}], "no more"),
    ([{"id": "a", "enabled": True, "x": 1}], "no more"), ([{"id": 5, "enabled": True}], "an id of 1"),
    ([{"id": "a b", "enabled": True}], "an id of 1")])
def test_models_that_make_no_sense(given, words):
    with pytest.raises(ccproxy.ProxyError) as caught:
        read(entries={"models": given})
    assert words in caught.value.message and caught.value.param == "models"
    assert caught.value.message.startswith("the file: models ")


# Values.

@pytest.mark.parametrize("name, given, value", [
    ("port", 0, 0), ("port", 65535, 65535), ("port", "8080", 8080), ("port", 80.0, 80),
    ("port", "080", 80),
    ("upstreamIdleSeconds", 1, 1.0), ("upstreamIdleSeconds", 0.5, 0.5),
    ("upstreamIdleSeconds", "2.5", 2.5), ("upstreamIdleSeconds", "86400", 86400.0),
    ("allowUnknownModels", True, True), ("allowUnknownModels", False, False),
    ("allowUnknownModels", "TRUE", True), ("allowUnknownModels", "0", False),
    ("allowUnknownModels", "off", False), ("allowUnknownModels", "Yes", True),
    ("host", " ::1 ", "::1"), ("host", "0.0.0.0", "0.0.0.0"), ("projectSlug", "caf\xe9", "caf\xe9"),
    ("logLevel", "DEBUG", "debug"), ("emptyResponsePolicy", "allow", "allow"),
    ("apiBase", "http://127.0.0.1:9/", "http://127.0.0.1:9"),
    ("apiBase", "https://h.example/base//", "https://h.example/base"),
    ("apiBase", " https://h ", "https://h"), ("apiBase", "http://[::1]:80", "http://[::1]:80"),
    ("allowedModels", "a, b ,,c", ["a", "b", "c"]), ("allowedModels", ["a ", ""], ["a"]),
    ("allowedModels", "", []),
    ("modelAliases", {"a": "b"}, {"a": "b"}),
    ("modelAliases", "a=b, c = d ,", {"a": "b", "c": "d"}),
    ("modelAliases", ' {"claude-*": "x"}', {"claude-*": "x"}), ("modelAliases", "", {}),
    ("modelAliases", "a=b=c", {"a": "b=c"}),
    ("cliVersion", "auto", "auto"), ("cliVersion", "1.2", "1.2"), ("cliVersion", "1.2.3-beta.4",
                                                                  "1.2.3-beta.4"),
])
def test_good_values(name, given, value):
    found = value_of(name, given)
    assert (found, type(found)) == (value, type(value))


INFINITY, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("name, given", [
    ("port", -1), ("port", 65536), ("port", 1.5), ("port", "1.5"), ("port", "x"), ("port", " 80 "),
    ("port", "+80"), ("port", "8_0"), ("port", "0x50"), ("port", "\u0663\u0660"), ("port", True),
    ("port", []), ("port", {}), ("port", ""), ("port", NAN),
    ("port", INFINITY), ("port", -INFINITY),
    ("port", "9" * 400), ("port", "9" * 5000), ("port", 10 ** 400),
    ("upstreamIdleSeconds", 0), ("upstreamIdleSeconds", -5), ("upstreamIdleSeconds", "1e3"),
    ("upstreamIdleSeconds", NAN), ("upstreamIdleSeconds", INFINITY), ("upstreamIdleSeconds", "inf"),
    ("upstreamIdleSeconds", "9" * 400), ("upstreamIdleSeconds", 10 ** 400),
    ("upstreamIdleSeconds", False), ("maxBodyBytes", 10), ("maxBodyBytes", "64M"),
    ("allowUnknownModels", 1), ("allowUnknownModels", "maybe"), ("allowUnknownModels", "\u0131"),
    ("allowUnknownModels", []),
    ("host", 5), ("host", "a\nb"), ("host", "a\x00"), ("host", ["h"]), ("projectSlug", "a\r\nb: c"),
    ("corsOrigin", "a\x7f"),
    ("logLevel", "loud"), ("logLevel", 3), ("emptyResponsePolicy", ""),
    ("apiBase", ""), ("apiBase", "h"), ("apiBase", "h:80"), ("apiBase", "ftp://h"),
    ("apiBase", "https://"), ("apiBase", "https:///x"), ("apiBase", "http://h:port"),
    ("apiBase", "http://h:99999"), ("apiBase", "http://[::1"), ("apiBase", "http://h?x=1"),
    ("apiBase", "http://h#x"), ("apiBase", "http://u:p@h"), ("apiBase", "http://u@h"),
    ("apiBase", "http://:p@h"), ("apiBase", "http://h/a b"), ("apiBase", "http://h/\xe9"),
    ("apiBase", 5),
    ("allowedModels", 5), ("allowedModels", [1]), ("allowedModels", {"a": "b"}),
    ("modelAliases", []), ("modelAliases", {"a": 1}), ("modelAliases", {"a": ""}),
    ("modelAliases", {"": "a"}), ("modelAliases", "a"), ("modelAliases", "=b"),
    ("modelAliases", "{"), ("modelAliases", '{"a": 1}'), ("modelAliases", '{"a":' * 100000),
    ("minCurrentBalance", -1), ("minCurrentBalance", "5 USD"), ("maxRequiredDailyBurn", NAN),
    ("alertIntervalSeconds", 1), ("alertWebhookUrl", "hooks.example"),
    ("alertWebhookUrl", "ftp://h/"), ("alertWebhookUrl", "file:///x"),
    ("alertWebhookUrl", "https://"), ("alertWebhookUrl", "http://h:port/"),
    ("alertWebhookUrl", "http://[::1/"), ("alertWebhookUrl", "http://u:p@h/"),
    ("alertWebhookUrl", "http://h/a b"), ("alertWebhookUrl", 5),
    ("alertWebhookToken", "a\r\nb: c"), ("alertWebhookToken", "caf\xe9"),
    ("cliVersion", ""), ("cliVersion", "1"), ("cliVersion", "latest"), ("cliVersion", "1.2.3\n"),
    ("cliVersion", "1.2 3"), ("cliVersion", 1.64),
], ids=lambda value: repr(value)[:30])
def test_bad_values_are_one_clear_line(name, given):
    with pytest.raises(ccproxy.ProxyError) as caught:
        make_config(**{name: given})
    error = caught.value
    assert error.kind == "config"
    assert name in error.message
    assert "test" in error.message              # the source that gave it
    assert "\n" not in error.message
    assert len(error.message) < 400


def test_a_bad_secret_is_not_repeated():
    with pytest.raises(ccproxy.ProxyError) as caught:
        make_config(alertWebhookUrl="hooks.example/services/5ecret")
    assert "5ecret" not in caught.value.message


@pytest.mark.parametrize("flags, environment, source", [
    ({"port": "x"}, {}, "--port"), ({}, {"PORT": "x"}, "environment PORT"),
    ({}, {"CC_PORT": "x", "PORT": "1"}, "environment CC_PORT")])
def test_a_bad_value_names_its_source(flags, environment, source):
    with pytest.raises(ccproxy.ProxyError) as caught:
        read(flags, environment)
    assert source in caught.value.message


@pytest.mark.parametrize("name", ["nonsense", "Port", "api_base", "api-base", "CC_PORT", ""])
def test_unknown_names_in_the_file_are_errors(name):
    with pytest.raises(ccproxy.ProxyError) as caught:
        read(entries={name: 1, "port": 1})
    assert caught.value.kind == "config"
    assert name in caught.value.message
    assert "the file" in caught.value.message


# Options that were removed.

@pytest.mark.parametrize("flags, environment, entries, told", [
    ({}, {}, {}, 0), ({}, {"CC_WORKERS": ""}, {}, 0), ({}, {"WORKERS": "2"}, {"port": 1}, 0),
    ({"workers": "4"}, {}, {}, 1), ({"workers": ""}, {}, {}, 1), ({}, {"CC_WORKERS": "many"}, {}, 1),
    ({}, {}, {"workers": 4}, 1), ({}, {}, {"workers": None}, 1), ({}, {}, {"workers": {"a": []}}, 1),
    ({"workers": "4"}, {"CC_WORKERS": "3"}, {"workers": 2}, 1)])
def test_a_removed_option_is_one_warning(flags, environment, entries, told):
    assert ccproxy.removed_warnings(flags, environment, entries) == (
        "workers was removed: see README, several processes",) * told
    config, sources = read({}, environment, entries)
    assert "workers" not in sources and not hasattr(config, "workers")


@pytest.mark.parametrize("option", ccproxy.REMOVED_OPTIONS, ids=lambda option: option.name)
def test_a_removed_option_is_no_option(option):
    assert option.name not in NAMES and option.help
    with pytest.raises(ccproxy.ProxyError, match="unknown option prot - did you mean port. .--he"):
        ccproxy.check_entries({"prot": 1}, "x")
    with pytest.raises(ccproxy.ProxyError, match="unknown option nonsense .--help-all"):
        read(entries={option.name: 1, "nonsense": 1})


# Origins.

@pytest.mark.parametrize("url, origin, authority", [
    ("https://api.example", ("https", "api.example", 443, ""), "api.example"),
    ("http://api.example/", ("http", "api.example", 80, ""), "api.example"),
    ("HTTPS://API.Example:443/a/b/", ("https", "api.example", 443, "/a/b"), "api.example"),
    ("http://h:443", ("http", "h", 443, ""), "h:443"),
    ("https://h:80", ("https", "h", 80, ""), "h:80"),
    ("http://127.0.0.1:3000/x", ("http", "127.0.0.1", 3000, "/x"), "127.0.0.1:3000"),
    ("http://[::1]:8080", ("http", "::1", 8080, ""), "[::1]:8080"),
    ("https://[2001:db8::1]", ("https", "2001:db8::1", 443, ""), "[2001:db8::1]"),
])
def test_origins(url, origin, authority):
    found = ccproxy.parse_origin(url)
    assert tuple(found) == origin
    assert found.authority == authority
