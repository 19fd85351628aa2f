"""RELOADING: every option that needs no start has its effect without one."""
from __future__ import annotations

import json
import os
import signal

import pytest
from harness import CHAT, ccproxy, wait_until

ADMIN = "the-admin-key"
BEARER = {"authorization": "Bearer " + ADMIN}
needs_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")

# Another valid value for each option; by kind, where it is not told by name.
OTHER = {"cliVersion": "9.8.7", "models": [{"id": "glm", "enabled": False}], "modelAliases": {"mine": "kimi"},
         "allowedModels": ["glm"], "adminKey": "another-admin-key", "clientKey": "word",
         "corsOrigin": "https://page.example", "credentialsFile": "", "apiBase": "https://other.example",
         "alertWebhookUrl": "https://hook.example/x", "host": "127.0.0.2", "usageDb": "auto",
         "backends": ["openai"], "vendorBases": {"openai": "http://127.0.0.1:9/v1"},
         "vendors": {"a": {"base": "https://h", "format": "openai", "key": "k"}}}


def other_value(option, tmp_path):
    if option.name == "credentialsFile":
        (tmp_path / "keys.json").write_text('["user_key1111"]')
        return str(tmp_path / "keys.json")
    if option.name == "logFile":
        return str(tmp_path / "a.log")
    by_kind = {"bool": lambda: not option.default, "choice": lambda: next(
        one for one in option.choices if one != option.default), "str": lambda: "thing",
        "secret": lambda: "thing"}
    if option.name in OTHER:
        return OTHER[option.name]
    return by_kind.get(option.kind, lambda: option.choices[0] + 17)()


@pytest.fixture
def place(make_proxy, tmp_path, monkeypatch, upstream):
    """A proxy with a config file that changes: (proxy, change)."""
    for name in [*ccproxy.CREDENTIAL_VARIABLES, *(
            name for option in ccproxy.OPTIONS for name in ccproxy.environment_names(option))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ccproxy, "CLI_FILES", ())
    path = tmp_path / "config.json"
    entries = {"adminKey": ADMIN, "useProviderModels": False, "port": 0, "apiBase": upstream.base}
    path.write_text(json.dumps(entries))
    proxy = make_proxy(**entries)
    proxy.app.settings = ccproxy.read_settings({}, str(path))
    fields = dict(BEARER)

    def change(**changes):
        answer = proxy.request("PUT", "/admin/config", changes, fields, None)
        assert answer.status == 200, answer.body
        if "adminKey" in changes:
            fields["authorization"] = "Bearer " + changes["adminKey"]
        return answer.json
    return proxy, change


@pytest.mark.parametrize("option", ccproxy.OPTIONS, ids=lambda option: option.name)
def test_every_option_is_applied_or_waits(place, tmp_path, option):
    proxy, change = place
    name, value = ccproxy.snake_case(option.name), other_value(option, tmp_path)
    if option.name in ("useProviderModels", "port"):
        value = {"useProviderModels": True, "port": 4321}[option.name]
    before = getattr(proxy.app.config, name)
    assert value != before
    report = change(**{option.name: value})
    wanted = {"applied": [], "restart_needed": [], "overridden": {}}
    wanted["restart_needed" if option.at_start else "applied"].append(option.name)
    assert report == wanted
    assert getattr(proxy.app.config, name) == (before if option.at_start else value)
    assert getattr(proxy.app.settings.config, name) == value
    assert proxy.request("GET", "/health").status == 200


# What follows from an option, and is not looked up in the configuration at each request.

def lent_key(proxy):
    answer = proxy.post(CHAT, {"authorization": "Bearer word"})
    return answer.fields.get("x-ccproxy-key")


EFFECTS = {
    "maxConnections": (7, lambda proxy: proxy.app.max_clients, 7),
    "cliVersion": ("9.8.7", lambda proxy: proxy.app.cli_version, "9.8.7"),
    "logLevel": ("error", lambda proxy: proxy.app.log.level, 40),
    "modelAliases": ({"mine": "kimi"}, lambda proxy: "mine" in [
        one["id"] for one in proxy.request("GET", "/v1/models").json["data"]], True),
    "allowedModels": (["glm"], lambda proxy: proxy.post(CHAT, model="kimi").status, 404),
    "allowUnknownModels": (False, lambda proxy: proxy.post(CHAT, model="new/x").status, 404),
    "models": ([{"id": "kimi", "enabled": False}], lambda proxy: proxy.post(CHAT, model="kimi").status, 404),
    "defaultModel": ("no such model", lambda proxy: proxy.post(CHAT).status, 400),
    "maxBodyBytes": (1024, lambda proxy: proxy.post(CHAT, messages="x" * 2000).status, 413),
    "rateLimitMax": (1, lambda proxy: [proxy.post(CHAT).status for _ in range(2)], [200, 429]),
    "corsOrigin": ("*", lambda proxy: proxy.request("GET", "/health", None, {"origin": "http://a.example"})
                   .fields.get("access-control-allow-origin"), "*"),
    "adminKey": ("another", lambda proxy: proxy.request("PUT", "/admin/config", {}, BEARER, None).status, 401),
    "projectSlug": ("mine", lambda proxy: (proxy.post(CHAT).status, proxy.upstream.requests[-1].field(
        "x-project-slug"))[1], "mine"),
    "operatorKeys": ("loopback", lambda proxy: proxy.app.operator.loopback, True),
    "routingPolicy": ("drain_first", lambda proxy: proxy.request("GET", "/health").json["routing_policy"],
                      "drain_first"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_its_effect(place, upstream, name):
    proxy, change = place
    proxy.upstream = upstream
    value, look, expected = EFFECTS[name]
    assert look(proxy) != expected
    if name == "rateLimitMax":
        proxy.app.rates.clear()
    change(**{name: value})
    assert look(proxy) == expected


def test_operator_keys_follow(place, tmp_path):
    proxy, change = place
    keys = tmp_path / "keys.json"
    keys.write_text('["user_key1111"]')
    assert lent_key(proxy) is None
    change(credentialsFile=str(keys), clientKey="word")
    assert lent_key(proxy) == ccproxy.key_name("user_key1111")
    change(clientKey="other")
    assert lent_key(proxy) is None


def test_cli_version_to_auto_and_back(place, monkeypatch):
    async def npm(app):
        return "5.5.5"
    monkeypatch.setattr(ccproxy, "ask_npm", npm)
    proxy, change = place
    change(cliVersion="auto")
    wait_until(lambda: proxy.app.cli_version == "5.5.5")
    task = proxy.app.version_task
    change(cliVersion="6.6.6")
    assert proxy.app.cli_version == "6.6.6" and proxy.app.version_task is None
    wait_until(task.done)


def test_the_list_of_models_follows(place, upstream):
    proxy, change = place
    change(useProviderModels=True)
    proxy.request("GET", "/v1/models")
    assert upstream.side_requests
    change(useProviderModels=False)
    assert proxy.app.home.models == ccproxy.builtin_models()


def test_keys_are_never_lent_to_the_network_meanwhile(place, tmp_path):
    """A host that waits for the next start does not count yet."""
    proxy, _ = place
    (tmp_path / "keys.json").write_text('["user_key1111"]')
    proxy.app.config = proxy.app.config._replace(host="0.0.0.0")
    answer = proxy.request("PUT", "/admin/config", {
        "host": "127.0.0.1", "credentialsFile": str(tmp_path / "keys.json")}, BEARER, None)
    assert answer.status == 400 and "0.0.0.0 is reachable" in answer.json["error"]["message"]


# SIGHUP.

@needs_hangup
def test_a_signal_reads_the_file_again(start_program, tmp_path):
    """What is wrong is one line, and changes nothing."""
    path, keys = tmp_path / "config.json", tmp_path / "keys.json"

    def write(**entries):
        path.write_text(json.dumps({"adminKey": ADMIN, "useProviderModels": False, "clientKey": "word",
                                    "credentialsFile": str(keys), **entries}))
    keys.write_text('["user_5ecr3t1111"]')
    os.chmod(str(keys), 0o600)
    write()
    program = start_program("--config", str(path))

    def asked():
        return program.post(CHAT, model="mine").status

    def operators():
        return program.request("GET", "/health").json["operator_keys"]
    assert asked() == 200
    write(allowedModels=["glm"], logFile=str(tmp_path / "other.log"))
    keys.write_text('["user_5ecr3t1111", "user_5ecr3t2222"]')
    program.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "changed allowedModels; 2 operator's keys; restart for logFile" in program.log)
    assert (asked(), operators()) == (404, 2)
    write(logLevel="loud")
    program.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "the configuration stays as it is" in program.log)
    assert "logLevel must be one of" in program.log
    keys.write_text('["user_5ecr3t1111", "user_5ecr3t2222", "nonsense 5ecr3t"]')
    write()
    program.process.send_signal(signal.SIGHUP)
    wait_until(lambda: program.log.count("the configuration stays as it is") == 2)
    assert (asked(), operators()) == (404, 2)
    code, words = program.stop()
    assert code == 0 and "5ecr3t" not in words and "Traceback" not in words


@needs_hangup
@pytest.mark.parametrize("signalled", [False, True])
def test_a_log_file_that_was_moved_is_opened_anew(start_program, tmp_path, signalled):
    """As logrotate moves it, with SIGHUP or without."""
    log, moved = tmp_path / "proxy.log", tmp_path / "proxy.log.1"
    program = start_program("--log-file", str(log))
    assert program.post(CHAT).status == 200
    wait_until(lambda: " 200 " in log.read_text())      # its line follows the answer
    os.rename(str(log), str(moved))
    if signalled:
        program.process.send_signal(signal.SIGHUP)
        wait_until(lambda: log.exists() and "configuration read again" in log.read_text())
    assert program.post(CHAT).status == 200
    wait_until(lambda: log.exists() and " 200 " in log.read_text())
    assert moved.read_text().count(" 200 ") == 1 and log.read_text().count(" 200 ") == 1


@needs_hangup
def test_a_removed_option_that_is_read_again_is_one_warning(start_program, tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    program = start_program("--config", str(path))
    path.write_text('{"workers": 2, "defaultModel": "glm"}')
    program.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "changed defaultModel" in program.log)
    code, words = program.stop()
    assert code == 0 and words.count("WARNING workers was removed") == words.count("workers") == 1


@needs_hangup
def test_a_terminal_that_is_closed_ends_the_program(upstream):
    """As ever: SIGHUP is then a goodbye, not a wish to read files again."""
    import pty
    import subprocess
    from harness import PROGRAM, clean_environment, command_of
    master, slave = pty.openpty()
    process = subprocess.Popen([*command_of(PROGRAM), "--port", "0", "--api-base", upstream.base],
                               stdin=slave, stdout=slave, stderr=slave,
                               env=clean_environment(), start_new_session=True)
    os.close(slave)
    screen = b""
    while b"note" not in screen:
        screen += os.read(master, 4096)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
