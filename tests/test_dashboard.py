"""DASHBOARD: the page in a real headless Chromium (skipped where there is none)."""
from __future__ import annotations

import json
import re
import threading
import time

import pytest
from chromium import Chromium, find_chromium
from fake_upstream import CHUNKED_HEAD, chunked, status, stream, text_answer
from harness import CHAT, KEY, MESSAGES, ccproxy, read_until, wait_until

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome is installed")

ADMIN, CLIENT = "the-admin-key-5ecr3t", "the-client-key-5ecr3t"
OWN, ONE, TWO = ("user_%s5ecr3t0123456789" % name for name in ("own", "one", "two"))
SECRETS = (KEY, ADMIN, CLIENT, OWN, ONE, TWO)
PAGES = ("overview", "requests", "models", "keys", "connect", "settings")
LABELS = {"en": "Overview", "ko": "개요", "zh": "概览"}
READY = "!document.querySelector('#page-overview').hidden && " \
    "document.querySelector('#link').dataset.link === 'live'"
# All that a key could stand in besides the script's own variables.
PLACES = """JSON.stringify([document.documentElement.outerHTML, location.href, document.title,
    [...document.querySelectorAll('input,textarea,select')].map(node => node.value),
    {...localStorage}, {...sessionStorage}, document.cookie, history.state])"""
MARKUP = "<img src=x onerror=alert(1)>"
SOON = int(time.time() + 7200) * 1000
BILLING = {"credits": {"monthlyCredits": 8.5, "purchasedCredits": 0, "freeCredits": 1.5},
           "windowLimits": {"limited": True, "exceeded": None, "fiveHour": {
               "used": 1.5, "cap": 3, "exceeded": False, "resetAt": SOON},
               "weekly": {"used": 6, "cap": 6, "exceeded": True, "resetAt": SOON}}}
PLAN = {"success": True, "data": {"id": "s", "status": "active", "planId": "individual-go",
                                  "orgId": None, "currentPeriodEnd": "2096-09-10T12:00:00.000Z"}}


def tell_account(sock, request):
    path = request.line.split(" ")[1]
    answers = {"/alpha/whoami": {"org": None}, "/alpha/billing/credits": BILLING,
               "/alpha/billing/subscriptions": PLAN}
    status(200, answers.get(path, {"object": "list", "data": []}),
           "content-type: application/json\r\n")(sock, request)


@pytest.fixture(scope="module")
def browser():
    running = Chromium(PROGRAM)
    yield running
    running.close()


@pytest.fixture
def open_page(browser):
    """Pages that say nothing, ask nobody else and hold no key.  `said` may be expected: refusals
    that the browser notes by itself."""
    opened = []

    def start(proxy, name="overview", expected=None, host="127.0.0.1", **view):
        page = browser.open(**view)
        opened.append((page, expected))
        page.base = "http://%s:%d" % (host, proxy.port)
        page.go(page.base + "/dashboard#" + name)
        return page
    yield start
    for page, expected in opened:
        held = page.run(PLACES)
        assert [secret for secret in SECRETS if secret in held] == []
        assert [line for line in page.said if not (expected and re.search(expected, line))] == []
        strange = [url for url in page.urls if not url.startswith((page.base + "/", "data:"))]
        assert strange == [] and not [url for url in page.urls if "5ecr3t" in url]
        page.close()


@pytest.fixture
def place(make_proxy, tmp_path, monkeypatch):
    """A proxy with a config file and operator's keys: (proxy, config file, keys file)."""
    for option in ccproxy.OPTIONS:
        for name in ccproxy.environment_names(option):
            monkeypatch.delenv(name, raising=False)
    config, keys = tmp_path / "config.json", tmp_path / "keys.json"
    options = {"adminKey": ADMIN, "clientKey": CLIENT, "credentialsFile": str(keys)}
    config.write_text(json.dumps(options))
    keys.write_text(json.dumps([{"id": "one", "apiKey": ONE}]))
    proxy = make_proxy(**options)
    proxy.app.operator = ccproxy.read_operator(proxy.app.config)
    proxy.app.settings = ccproxy.read_settings({}, str(config))
    return proxy, config, keys


def held(go):
    """An answer that stops after its first word until `go` is set."""
    data = text_answer("Hello", " there")
    at = data.rindex(b"\n", 0, data.index(b" there")) + 1

    def run(sock, request):
        sock.sendall(CHUNKED_HEAD + chunked(data[:at]))
        go.wait(10)
        sock.sendall(chunked(data[at:]) + b"0\r\n\r\n")
    return run


def rows(page, place):
    return page.run("[...document.querySelectorAll('#%s tbody tr')].map(row => row.innerText)"
                    % place)


def unlock(page, key=ADMIN):
    page.wait("document.querySelector('dialog input[name=key]')")
    page.type("dialog input[name=key]", key)
    page.click("dialog button.first")


# What runs.

def test_the_page_follows_a_stream(proxy, upstream, open_page):
    go = threading.Event()
    upstream.default = held(go)
    page = open_page(proxy)
    page.wait(READY)
    assert "Nothing is running" in page.text()
    with proxy.send_post(CHAT, {"user-agent": "codex_cli_rs/1"}, model="kimi", stream=True) as sock:
        page.wait("document.querySelector('#live tbody tr')")
        page.wait("document.querySelector('#live').innerText.includes('answering')")
        assert "moonshotai/Kimi-K3" in rows(page, "live")[0] and "codex · chat" in rows(
            page, "live")[0]
        ticked = "document.querySelector('#live td:last-child').textContent"
        before = page.run(ticked)
        page.wait("%s !== %s" % (ticked, json.dumps(before)))
        go.set()
        page.wait("document.querySelectorAll('#latest tbody tr').length === 1")
        page.wait("!document.querySelector('#live tbody tr')")
        read_until(sock, b"[DONE]")
    assert "200" in rows(page, "latest")[0] and "7 → 3" in rows(page, "latest")[0]
    assert page.run("document.querySelector('#tiles dd').firstChild.textContent") == "1"
    assert page.run("document.querySelectorAll('#chart-requests rect').length") == 1
    assert "1" in page.run("document.querySelector('#chart-requests .plot').ariaLabel")


def test_charts_can_be_read(proxy, open_page):
    now = time.time()
    for ago in reversed(range(5)):      # as they come
        known = dict.fromkeys(ccproxy.Record._fields, "")
        known.update(at=now - 60 * ago, status=200 if ago else 502, stream=True, input=100 * ago,
                     output=10, cached=50 * ago, reasoning=0, cost=None, first=0.25 * ago,
                     total=2.0, retries=0, model="m", asked="m", api="chat", client="c", key="k")
        record = ccproxy.Record(**known)
        proxy.loop.call_soon_threadsafe(ccproxy.publish_record, proxy.app, record)
    page = open_page(proxy)
    page.wait("document.querySelectorAll('#chart-requests rect').length === 6")
    page.run("document.querySelector('#chart-tokens .plot').focus()")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    told = page.run("document.querySelector('#chart-tokens .readout').textContent")
    assert re.fullmatch(r"\d\d:\d\d · Tokens in \d00 · Tokens out 10", told)
    assert page.run("document.querySelectorAll('#chart-tokens .cross').length") == 1
    page.click("#chart-cache_share .plot")
    assert re.match(r"\d\d:\d\d · From cache ", page.run(
        "document.querySelector('#chart-cache_share .readout').textContent"))
    page.click("#chart-first_event summary")
    page.wait("document.querySelectorAll('#chart-first_event tbody tr').length === 5")
    assert page.run("document.querySelectorAll('.plot[role=img][aria-label]').length") == 4


def test_requests_are_filtered_and_shown_whole(proxy, upstream, open_page):
    upstream.scripts = [stream(text_answer("Hi")), status(402, {"error": {"message": "no credit"}})]
    proxy.post(CHAT, {"user-agent": "curl/8"}, model="kimi", seed=1)
    proxy.post(MESSAGES, {"user-agent": "claude-cli/2"}, model="glm")
    page = open_page(proxy, "requests")
    page.wait("document.querySelectorAll('#recent tbody tr').length === 2")
    count = "document.querySelectorAll('#recent tbody tr').length"
    for field, value, left in (("status", "failed", 1), ("status", "", 2), ("api", "chat", 1),
                               ("api", "", 2), ("client", "claude-code", 1), ("client", "", 2),
                               ("model", "moonshotai/Kimi-K3", 1), ("model", "", 2)):
        page.choose("#filter-" + field, value)
        page.wait("%s === %d" % (count, left))
    page.type("#filter-text", "no credit")
    page.wait(count + " === 1")
    page.type("#filter-text", "nowhere")
    page.wait("document.querySelector('#recent').innerText.includes('No request fits')")
    page.type("#filter-text", "curl")
    page.wait(count + " === 1")
    page.click("#recent tbody button")
    shown = page.run("document.querySelector('#record').innerText")
    assert "ignored=seed" in shown and "0123456789abcdef0123456789abcdef" in shown
    assert page.run("document.querySelectorAll('#record dt').length") == len(
        ccproxy.Record._fields)
    page.press("Escape")
    page.wait("!document.querySelector('#record')")


# Whoever looks.

def test_three_languages(proxy, open_page):
    page = open_page(proxy, language="ko-KR")
    page.wait(READY)
    for language in ("ko", "zh", "en"):
        page.choose("#language", language)
        page.wait("document.querySelector('nav a').innerText.trim() === '%s'" % LABELS[language])
        for name in PAGES:
            page.run("location.hash = '%s'" % name)
            page.wait("!document.querySelector('#page-%s').hidden" % name)
        assert page.run("document.documentElement.lang").startswith(language)
    page.choose("#language", "zh")
    page.go(proxy.base + "/admin")
    page.wait(READY)
    assert page.run("document.querySelector('nav a').innerText.trim()") == LABELS["zh"]
    assert page.run("JSON.stringify(localStorage)") == '{"ccproxy.language":"zh"}'
    assert page.run("document.querySelectorAll('[data-word]:empty').length") == 0


@pytest.mark.parametrize("given,language", [("ko-KR", "ko"), ("zh-CN", "zh"), ("fr-FR,zh-TW", "zh"),
                                            ("fr-FR", "en")])
def test_the_browsers_language_counts_first(proxy, open_page, given, language):
    page = open_page(proxy, language=given)
    page.wait("document.querySelector('nav a').innerText.trim() === '%s'" % LABELS[language])


def test_a_narrow_page_never_scrolls_sideways(place, open_page, upstream):
    proxy = place[0]
    upstream.default = status(502, {"error": {"message": "x" * 300}})
    proxy.post(CHAT, model="m" * 150)
    upstream.default = stream(text_answer("Hi"))
    proxy.post(CHAT, model="kimi")
    for language in LABELS:
        page = open_page(proxy, width=360, height=740, language=language)
        page.wait(READY)
        for name in PAGES:
            page.run("location.hash = '%s'" % name)
            page.wait("!document.querySelector('#page-%s').hidden" % name)
            page.wait("document.querySelector('#page-%s').innerText.length > 60" % name)
            assert page.run("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
            wide = page.run("""[...document.querySelectorAll('main *')].filter(node =>
                node.getBoundingClientRect().right > 361 && !node.closest('pre, .scroll, .away'))
                .map(node => node.outerHTML.slice(0, 200))""")
            assert wide == []


BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def test_light_and_dark(proxy, open_page):
    page = open_page(proxy, dark=False)
    page.wait(READY)
    light = page.run(BACKGROUND)
    page.view(dark=True)
    dark = page.run(BACKGROUND)
    assert (light, dark) == ("rgb(245, 246, 248)", "rgb(14, 16, 20)")
    page.click("#theme")            # from the system's (dark) to light
    assert page.run(BACKGROUND) == light
    page.go(proxy.base + "/admin")
    page.wait(READY)
    assert page.run(BACKGROUND) == light
    page.click("#theme")
    page.view(dark=False)
    assert page.run(BACKGROUND) == dark
    page.click("#theme")
    assert page.run(BACKGROUND) == light


CONTRAST = """(() => {
    const bright = (color) => { const parts = color.match(/[0-9.]+/g).slice(0, 3).map((one) => {
        const part = one / 255;
        return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]; };
    const ground = (node) => { for (; node; node = node.parentElement) {
        const color = getComputedStyle(node).backgroundColor;
        if (!/, 0\\)$/.test(color)) return color; } };
    return [...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()
        && !node.closest(':disabled, svg, .away, .skip') && [...node.childNodes].some((one) =>
            one.nodeType === 3 && one.data.trim())).map((node) => {
        const pair = [getComputedStyle(node).color, ground(node)].map(bright).sort();
        return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), node.outerHTML.slice(0, 90)];
    }).filter(([ratio]) => ratio < 4.5); })()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(place, upstream, open_page, dark):
    proxy = place[0]
    upstream.scripts = [status(402, {"error": {"message": "no credit"}})]
    proxy.post(CHAT)
    proxy.post(CHAT, model="kimi")
    page = open_page(proxy, dark=dark)
    page.wait(READY)
    for name in PAGES:
        page.run("location.hash = '%s'" % name)
        page.wait("document.querySelector('#page-%s').innerText.length > 60" % name)
        assert page.run(CONTRAST) == []


# Clients.

def test_every_snippet_has_the_address_and_the_model(place, open_page):
    proxy = place[0]
    proxy.request("GET", "/v1/models")      # so that the upstream's list is there
    page = open_page(proxy, "connect")
    page.wait("document.querySelectorAll('#pick-model option').length > 1")
    page.choose("#pick-model", "vendor/New-Model")
    names = page.run("[...document.querySelectorAll('#snippets h3')].map(one => one.innerText)")
    for wanted in ("Claude Code", "Codex", "opencode", "Cursor", "aider", "llm",
                   "OpenAI SDK (Python)", "Anthropic SDK (Python)"):
        assert wanted in names
    for shell in ("sh", "ps"):
        page.choose("#shell", shell)
        texts = page.run("[...document.querySelectorAll('#snippets pre')].map(one => one.innerText)")
        assert len(texts) == len(names)
        for name, text in zip(names, texts):
            assert proxy.base in text and "vendor/New-Model" in text, name
            assert "$COMMANDCODE_KEY" in text or "COMMANDCODE_KEY" in text or "user_..." in text
        assert ("export" in texts[0]) == (shell == "sh")
    page.type("#address", "https://elsewhere.example/")
    assert "https://elsewhere.example/v1" in page.run("document.querySelector('pre').parentNode"
                                                      ".parentNode.innerText")
    page.browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite",
                      "clipboardSanitizedWrite"], browserContextId=page.context)
    page.click("#snippets article button")
    page.wait("document.querySelector('#toast').innerText === 'Copied'")
    assert page.run("navigator.clipboard.readText()") == page.run(
        "document.querySelector('#snippets pre').innerText")


def test_the_python_snippets_work(place, open_page, upstream):
    page = open_page(place[0], "connect")
    page.wait("document.querySelectorAll('#pick-model option').length > 1")
    for name in ("OpenAI", "Anthropic"):
        text = page.run("document.querySelector('article[aria-label=\"%s SDK (Python)\"] pre')"
                        ".innerText" % name)
        compile(text, name, "exec")
    codex = page.run("document.querySelector('article[aria-label=Codex] pre').innerText")
    assert 'wire_api = "responses"' in codex
    json.loads(page.run("document.querySelector('article[aria-label=opencode] pre').innerText"))


# Keys.

@pytest.mark.parametrize("code, word, colour", [
    (401, "refused", "bad"), (404, "unknown", "")])
def test_a_key_that_was_not_accepted_is_never_shown_as_usable(proxy, upstream, open_page, code,
                                                              word, colour):
    upstream.side_script = status(code, {}, "connection: close\r\n")
    page = open_page(proxy, "keys")
    page.wait("document.querySelector('#own-key')")
    page.type("#own-key", "user_%d" % code + OWN[5:])
    page.click("#usage-form button.first")
    page.wait("document.querySelector('#usage article')")
    chip = "document.querySelector('#usage article .chip')"
    assert page.run(chip + ".innerText") == word
    assert page.run(chip + ".className").split() == ["chip", *colour.split()]
    assert not re.search(r"\b(fit|usable)\b", page.run(
        "document.querySelector('#usage').innerText"))


def test_a_pasted_key_stays_in_the_tab(proxy, upstream, open_page):
    upstream.side_script = tell_account
    page = open_page(proxy, "keys")
    page.wait("document.querySelector('#own-key')")
    page.type("#own-key", OWN)
    page.click("#usage-form button.first")
    page.wait("document.querySelector('#usage article')")
    shown = page.run("document.querySelector('#usage').innerText")
    for words in ("individual-go", "$10.00", "$1.50 / $3.00", "50%", "100%",
                  ccproxy.key_name(OWN), "a day", "skipped",
                  "It is over its usage window.", "Resets", "in 1h"):
        assert words in shown, shown
    assert page.run("document.querySelectorAll('#usage .meter').length") == 2
    held = page.run(PLACES)
    assert OWN not in held and "{}" in held
    page.click("#forget")
    page.wait("!document.querySelector('#usage article')")
    page.type("#own-key", OWN)
    page.click("#usage-form button.first")
    page.wait("document.querySelector('#usage article')")
    page.go(proxy.base + "/admin#keys")
    page.wait("document.querySelector('#own-key')")
    assert page.run("document.querySelector('#own-key').value") == ""
    assert not page.run("document.querySelector('#usage').innerText")
    assert OWN not in page.run(PLACES)


def test_a_key_that_is_none_is_refused(proxy, open_page):
    page = open_page(proxy, "keys", expected="401")
    for given, words in (("not-a-key", "key"), ("유저", "ASCII")):
        page.wait("document.querySelector('#own-key')")
        page.type("#own-key", given)
        page.click("#usage-form button.first")
        page.wait("document.querySelector('#usage .banner.bad')")
        assert words in page.run("document.querySelector('#usage').innerText")


def test_the_operators_keys_are_added_changed_and_deleted(place, upstream, open_page):
    proxy, _, keys = place
    upstream.side_script = tell_account
    page = open_page(proxy, "keys")
    page.wait("document.querySelectorAll('#operator article').length === 1")
    page.click("#add-key")
    page.wait("document.querySelector('dialog input[name=apiKey]')")
    page.type("dialog input[name=id]", "two")
    page.type("dialog input[name=apiKey]", TWO)
    page.type("dialog input[name=weight]", "2.5")
    page.click("dialog button.first")
    unlock(page)
    page.wait("document.querySelectorAll('#operator article').length === 2")
    stored = json.loads(keys.read_text())[1]
    assert (stored["id"], stored["apiKey"], stored["weight"]) == ("two", TWO, 2.5)
    second = "#operator article[aria-label=two] "
    page.click(second + "button")
    page.wait("document.querySelector('dialog input[name=id]')")
    page.type("dialog input[name=id]", "home")
    page.type("dialog input[name=weight]", "4")
    page.click("dialog button.first")
    second = "#operator article[aria-label=home] "
    page.wait("document.querySelector('%s')" % second)
    page.click(second + "input.switch")
    page.wait("document.querySelector('%s').innerText.includes('off')" % second)
    stored = json.loads(keys.read_text())[1]
    assert (stored["id"], stored["weight"], stored["enabled"]) == ("home", 4, False)
    page.click(second + "button.danger")
    page.wait("document.querySelector('dialog button.danger')")
    page.click("dialog button[type=button]")        # not yet
    page.wait("!document.querySelector('dialog')")
    assert len(json.loads(keys.read_text())) == 2
    page.click(second + "button.danger")
    page.wait("document.querySelector('dialog button.danger')")
    page.click("dialog button.danger")
    page.wait("document.querySelectorAll('#operator article').length === 1")
    assert [row["id"] for row in json.loads(keys.read_text())] == ["one"]


def test_without_a_file_of_keys_none_can_be_added(make_proxy, open_page):
    page = open_page(make_proxy(adminKey=ADMIN), "keys")
    page.wait("document.querySelector('#operator').innerText.includes('credentialsFile')")
    assert page.run("document.querySelector('#add-key').disabled")


# Changes.

def test_a_model_is_switched_off_and_on(place, open_page):
    proxy, config, _ = place
    proxy.request("GET", "/v1/models")
    page = open_page(proxy, "models")
    toggle = "input[aria-label='vendor/New-Model']"
    page.wait("document.querySelector(%s)" % json.dumps(toggle))
    page.click(toggle)
    unlock(page)
    page.wait("document.querySelector('tr.off')")
    assert json.loads(config.read_text())["models"] == [
        {"id": "vendor/New-Model", "enabled": False}]
    assert proxy.post(CHAT, model="vendor/New-Model").status == 404
    page.click(toggle)
    page.wait("document.querySelector('#model-list tr') && !document.querySelector('tr.off')")
    assert json.loads(config.read_text())["models"] == []
    page.wait("document.querySelector('#toast').innerText === 'vendor/New-Model is on.'")
    proxy.request("PUT", "/admin/config", {"models": [{"id": "deepseek-v4-flash", "enabled": False}]},
                  {"authorization": "Bearer " + ADMIN}, None)       # by another of its names
    page.run("location.hash = 'overview'")
    page.run("location.hash = 'models'")
    page.wait("document.querySelector('tr.off')")
    page.click("tr.off input")
    page.wait("document.querySelector('#toast').innerText.includes('is still off')")
    page.type("#model-search", "deepseek")
    page.wait("document.querySelectorAll('#model-list tbody tr').length === 1")


def test_configuration_is_saved_whole_with_the_admin_key(place, open_page):
    proxy, config, _ = place
    before = json.loads(config.read_text())
    page = open_page(proxy, "settings", expected="40[01]")
    page.wait("document.querySelector('#option-drainSeconds')")
    page.type("#option-drainSeconds", "45")
    page.type("#option-modelAliases", '{"mine": "kimi"}')
    page.choose("#option-logLevel", "debug")
    page.type("#option-rateLimitMax", "lots")
    assert "4 to save" in page.run("document.querySelector('#changes').innerText")
    page.click("#savebar button.first")
    unlock(page, "another-key")
    page.wait("document.querySelector('dialog .fault')")
    unlock(page)
    page.wait("document.querySelector('#row-rateLimitMax .fault')")
    assert page.run("document.activeElement.id") == "option-rateLimitMax"
    assert json.loads(config.read_text()) == before
    page.type("#option-rateLimitMax", "1000")
    page.type("#option-logFile", str(config.parent / "log"))
    page.click("#savebar button.first")
    page.wait("document.querySelector('#config-notes .good')")
    assert json.loads(config.read_text()) == {
        **before, "drainSeconds": 45, "modelAliases": {"mine": "kimi"}, "logLevel": "debug",
        "rateLimitMax": 1000, "logFile": str(config.parent / "log")}
    told = page.run("document.querySelector('#config-notes').innerText")
    assert "after a restart: logFile" in told and "drainSeconds" in told
    assert proxy.app.config.drain_seconds == 45
    page.click("#row-drainSeconds button")
    page.click("#savebar button.first")
    page.wait("document.querySelector('#changes').innerText === ''")
    assert "drainSeconds" not in json.loads(config.read_text())


def test_without_the_admin_key_nothing_is_changed(place, open_page):
    proxy, config, _ = place
    before = config.read_text()
    page = open_page(proxy, "settings")
    page.wait("document.querySelector('#option-drainSeconds')")
    page.type("#option-drainSeconds", "45")
    page.click("#savebar button.first")
    page.wait("document.querySelector('dialog')")
    page.press("Escape")
    page.wait("document.querySelector('#config-notes .bad')")
    assert config.read_text() == before and proxy.app.config.drain_seconds == 30


def test_where_no_admin_key_is_set_the_page_says_so(proxy, open_page):
    page = open_page(proxy, "settings")
    page.wait("document.querySelector('#config-notes').innerText.includes('CC_ADMIN_KEY')")
    assert page.run("document.querySelector('#option-drainSeconds').disabled")
    assert page.run("document.querySelector('#restart').disabled")
    page.run("location.hash = 'models'")
    page.wait("document.querySelector('#model-list input')")
    assert page.run("document.querySelector('#model-list input').disabled")


def test_from_elsewhere_the_page_asks_for_the_key(place, open_page):
    proxy = place[0]
    page = open_page(proxy, host="ccproxy.test", expected="401")
    unlock(page, "another-key")
    page.wait("document.querySelector('dialog .fault')")
    unlock(page)
    page.wait(READY)
    page.run("location.hash = 'connect'")
    page.wait("document.querySelectorAll('#pick-model option').length > 1")
    assert page.base in page.run("document.querySelector('#snippets pre').innerText")
    page.click("#lock")
    page.wait("document.querySelector('#lock').ariaPressed === 'false'")


def test_who_has_no_admin_key_is_asked_once_and_can_still_connect(place, open_page, upstream):
    upstream.side_script = tell_account
    page = open_page(place[0], host="ccproxy.test", expected="401")
    page.wait("document.querySelector('dialog')")
    page.press("Escape")
    page.wait("document.querySelector('#banners').innerText.includes('adminKey')")
    page.run("location.hash = 'connect'")
    page.wait("document.querySelectorAll('#snippets pre').length > 8")
    page.run("location.hash = 'keys'")
    page.type("#own-key", OWN)
    page.click("#usage-form button.first")
    page.wait("document.querySelector('#usage article')")
    assert not page.run("document.querySelectorAll('dialog').length")
    page.click("#lock")
    unlock(page)
    page.wait("document.querySelector('#link').dataset.link === 'live'")


# Alerts.

@pytest.mark.parametrize("language, words", [
    ("en", ["home: balance $1.00 is below $5.00", "95% of a usage window is used, 90% or more",
            "home: the upstream refused the key", "None of the operator's accounts is usable",
            "62.5% of requests fail, 50% or more"]),
    ("ko", ["업스트림이 키를 거부했습니다", "62.5%"]), ("zh", ["上游拒绝了此密钥", "62.5%"])])
def test_alerts_stand_on_the_overview(proxy, open_page, language, words):
    proxy.app.alerts = [
        {"key": "key:1", "name": "home" if key else None, "kind": kind, "value": value,
         "limit": limit, "since": 1e9} for kind, key, value, limit in (
            ("minCurrentBalance", 1, 1.0, 5.0), ("windowAlert", 1, 95.0, 90.0),
            ("accountRefused", 1, 1.0, 1.0), ("accountsUnusable", 0, 100.0, 100.0),
            ("errorRateAlert", 0, 62.5, 50.0))]
    page = open_page(proxy)
    page.wait("document.querySelectorAll('#banners .warn').length === 5")
    page.choose("#language", language)
    shown = "document.querySelector('#banners').innerText"
    page.wait("%s.includes(%r)" % (shown, words[0]))
    text = page.run(shown)
    assert all(one in text for one in words) and "undefined" not in text and "{" not in text


# Hostile words, broken lines.

def test_markup_stays_text(proxy, upstream, open_page):
    go, tag = threading.Event(), MARKUP.replace(" ", "/")      # a model's id has no spaces
    upstream.scripts = [status(400, {"error": {"message": MARKUP, "code": MARKUP}}), held(go)]
    fields = {"user-agent": MARKUP}
    proxy.post(CHAT, fields, model=MARKUP)
    proxy.post(CHAT, fields, model=tag)
    worst = proxy.app.recent[0]._replace(**dict.fromkeys(
        ("api", "client", "asked", "model", "key", "notes", "error", "trace"), MARKUP))
    proxy.loop.call_soon_threadsafe(ccproxy.publish_record, proxy.app, worst)
    proxy.app.alerts.append({"key": MARKUP, "name": MARKUP, "kind": "minCurrentBalance",
                             "value": 1, "limit": 2, "since": 1e9})
    page = open_page(proxy)
    with proxy.send_post(CHAT, fields, model=tag, stream=True) as sock:
        page.wait("document.querySelector('#live').innerText.includes(%r)" % tag)
        page.wait("document.querySelectorAll('#latest tbody tr').length === 3")
        page.wait("document.querySelector('#banners').innerText.includes(%r)" % MARKUP)
        page.click("#latest tbody button")
        page.wait("document.querySelector('#record').innerText.split(%r).length === 10" % MARKUP)
        page.press("Escape")
        go.set()
        read_until(sock, b"[DONE]")
    page.run("location.hash = 'requests'")
    page.wait("document.querySelectorAll('#recent tbody tr').length === 4")
    assert "invalid: <img" in page.run(
        "[...document.querySelectorAll('#recent .chip')].map(one => one.title).join()")
    for field in ("model", "client", "api"):
        page.wait("[...document.querySelectorAll('#filter-%s option')].some(one => one.text === %r)"
                  % (field, MARKUP))
    page.choose("#filter-model", MARKUP)
    page.wait("document.querySelectorAll('#recent tbody tr').length === 1")
    assert page.run("document.querySelectorAll('img, main script').length") == 0


def test_a_lost_connection_is_shown_and_taken_up_again(upstream, make_proxy, open_page):
    proxy = make_proxy()
    page = open_page(proxy, expected="ERR_CONNECTION_REFUSED|ERR_INCOMPLETE|ERR_EMPTY")
    page.wait(READY)
    proxy.close()
    page.wait("document.querySelector('#link').dataset.link === 'lost'")
    page.wait("document.querySelector('#banners').innerText.includes('Connection lost')")
    again = make_proxy(port=proxy.port)
    page.wait(READY)
    page.wait("!document.querySelector('#banners').innerText")
    again.post(CHAT)
    page.wait("document.querySelectorAll('#latest tbody tr').length === 1")


@pytest.mark.skipif(not hasattr(ccproxy, "serve_restart"), reason="no restart over HTTP")
def test_a_restart_is_survived(start_program, tmp_path, open_page):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"adminKey": ADMIN, "useProviderModels": False}))
    program = start_program("--config", str(config))
    page = open_page(program, "settings", expected="ERR_")
    page.wait("document.querySelector('#option-usageDb')")
    began = time.monotonic()
    page.click("#restart")
    page.wait("document.querySelector('dialog button.danger')")
    page.click("dialog button.danger")
    unlock(page)
    page.wait("document.querySelector('#toast').innerText.includes('Restarting')")
    page.wait("document.querySelector('#link').dataset.link !== 'live'")
    page.wait(READY.replace("overview", "settings"))
    assert program.request("GET", "/admin/state").json["uptime_seconds"] < (
        time.monotonic() - began)
    program.post(CHAT)
    page.run("location.hash = 'overview'")
    page.wait("document.querySelectorAll('#latest tbody tr').length === 1")


def test_a_hidden_tab_lets_go(proxy, open_page, browser):
    page = browser.open()
    script = page.send("Page.addScriptToEvaluateOnNewDocument", source="""
        const later = window.setTimeout;
        window.setTimeout = (work, wait) => later(work, wait === 60000 ? 20 : wait);
        window.hide = (value) => { Object.defineProperty(document, 'hidden', {configurable: true,
            get: () => value}); document.dispatchEvent(new Event('visibilitychange')); };""")
    page.go(proxy.base + "/dashboard")
    page.wait(READY)
    assert len(proxy.app.followers) == 1
    page.run("hide(true)")
    wait_until(lambda: not proxy.app.followers)
    page.wait("document.querySelector('#link').dataset.link === 'asleep'")
    page.run("hide(false)")
    page.wait(READY)
    wait_until(lambda: len(proxy.app.followers) == 1)
    assert page.said == []
    page.send("Page.removeScriptToEvaluateOnNewDocument", **script)
    page.close()
