"""A headless Chromium, driven over a pipe by the DevTools protocol: standard library only.

`--remote-debugging-pipe` makes the browser read commands from descriptor 3 and write answers and
events to 4, each a JSON text that ends with a zero byte.
"""
from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from typing import Any, Dict, List, Optional

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
         "--disable-extensions", "--disable-background-networking", "--disable-component-update",
         "--disable-default-apps", "--no-default-browser-check", "--mute-audio", "--lang=en-US",
         "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-proxy-server",
         "--host-resolver-rules=MAP ccproxy.test 127.0.0.1, EXCLUDE 127.0.0.1")


def find_chromium() -> Optional[str]:
    """The program, or None: tests then skip."""
    if os.name == "nt":         # descriptors are passed on in another way there
        return None
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Chromium:
    """A browser with pages; close it."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="ccproxy-chromium-")
        command_read, self.command = os.pipe()
        self.answers, answer_write = os.pipe()
        # Both ends are put beyond 4 first, so that one does not close the other on the way.
        source, target = (self.beyond(one) for one in (command_read, answer_write))

        def place() -> None:
            os.dup2(source, 3)
            os.dup2(target, 4)
        self.process = subprocess.Popen(
            [program, *FLAGS, "--user-data-dir=" + self.folder, "about:blank"],
            preexec_fn=place, close_fds=False, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": self.folder})
        os.close(source)
        os.close(target)
        self.number = 0
        self.waiting: Dict[int, "queue.Queue[Any]"] = {}
        self.pages: Dict[str, "Page"] = {}
        self.idle: List["Page"] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    @staticmethod
    def beyond(descriptor: int) -> int:
        import fcntl
        moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
        os.close(descriptor)
        return moved

    def read(self) -> None:
        """Hand answers to who waits and events to their page."""
        rest = b""
        while True:
            data = os.read(self.answers, 1 << 20)
            if not data:
                return
            *whole, rest = (rest + data).split(b"\0")
            for one in whole:
                message = json.loads(one)
                if "id" in message:
                    self.waiting.pop(message["id"]).put(message)
                elif message.get("sessionId") in self.pages:
                    self.pages[message["sessionId"]].take(message["method"], message["params"])

    def send(self, method: str, session: str = "", **params: Any) -> Any:
        """A command and its result."""
        self.number += 1
        message: Dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        answer = self.waiting[self.number] = queue.Queue()
        os.write(self.command, json.dumps(message).encode() + b"\0")
        given = answer.get(timeout=20)
        assert "error" not in given, (method, given["error"])
        return given["result"]

    def open(self, **view: Any) -> "Page":
        """A page as new: empty storage, no history.  One that was closed is taken again, for a new
        one takes half a second."""
        if self.idle:
            page = self.idle.pop()
            page.said, page.urls = [], []
            page.view(**view)
            return page
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank",
                           browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, context)
        for domain in ("Page", "Runtime", "Network", "Log", "Audits"):
            page.send(domain + ".enable")
        page.view(**view)
        return page

    def close(self) -> None:
        """Let it end by itself: its processes would go on writing where it is killed."""
        try:
            self.send("Browser.close")
            self.process.wait(10)
        except (OSError, AssertionError, queue.Empty, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait(10)
        self.reader.join(10)
        os.close(self.command)
        os.close(self.answers)
        shutil.rmtree(self.folder, ignore_errors=True)


class Page:
    """One page, and all that it said and asked for."""

    def __init__(self, browser: Chromium, session: str, context: str) -> None:
        self.browser, self.session, self.context = browser, session, context
        self.said: List[str] = []           # errors, warnings, issues: there should be none
        self.urls: List[str] = []           # of every request

    def take(self, method: str, params: Any) -> None:
        if method == "Network.requestWillBeSent":
            self.urls.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.said.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.said.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            entry = params["entry"]
            self.said.append("%s %s" % (entry["text"], entry.get("url", "")))
        elif method == "Audits.issueAdded":
            issue = params["issue"]
            if issue["code"] == "ContentSecurityPolicyIssue":
                self.said.append(json.dumps(issue["details"]))

    def send(self, method: str, **params: Any) -> Any:
        return self.browser.send(method, self.session, **params)

    def view(self, width: int = 1280, height: int = 900, dark: Optional[bool] = None,
             language: str = "en-US") -> None:
        """How large, which scheme and language the person wants."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 700)
        features = [] if dark is None else [{"name": "prefers-color-scheme",
                                             "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)
        agent = self.browser.send("Browser.getVersion")["userAgent"]
        self.send("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)

    def go(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression; promises are awaited."""
        given = self.send("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in given, (script, given["exceptionDetails"])
        return given["result"].get("value")

    def wait(self, script: str, seconds: float = 10.0) -> None:
        """Wait until an expression is true; the assertion tells which was not."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.run("Boolean(%s)" % script)
            if value:
                return
            assert time.monotonic() < deadline, (script, self.said, self.text()[:2000])
            time.sleep(0.02)

    def text(self) -> str:
        """What a person reads."""
        return self.run("document.body.innerText")

    def html(self) -> str:
        return self.run("document.documentElement.outerHTML")

    def click(self, selector: str) -> None:
        """A real press of the mouse in the middle of an element, once it is there."""
        self.wait("document.querySelector(%s)" % json.dumps(selector))
        place = self.run("""(() => { const node = document.querySelector(%s);
            node.scrollIntoView({block: "center", behavior: "instant"});
            const box = node.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; })()""" % json.dumps(selector))
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1],
                      button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Put text into a field as a person does."""
        self.wait("document.querySelector(%s)" % json.dumps(selector))
        self.run("(() => { const node = document.querySelector(%s); node.focus(); node.select(); "
                 "})()" % json.dumps(selector))
        self.send("Input.insertText", text=text)

    def choose(self, selector: str, value: str) -> None:
        self.run("(() => { const node = document.querySelector(%s); node.value = %s; "
                 "for (const kind of ['input', 'change']) "
                 "node.dispatchEvent(new Event(kind, {bubbles: true})); })()"
                 % (json.dumps(selector), json.dumps(value)))

    def press(self, key: str) -> None:
        number = {"Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=number, nativeVirtualKeyCode=number)

    def picture(self, path: str, whole: bool = True) -> None:
        """A screenshot as a PNG file."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        with open(path, "wb") as file:
            file.write(base64.b64decode(data["data"]))

    def close(self) -> None:
        """Leave nothing behind; the next one who opens a page takes it."""
        self.run("localStorage.clear(), sessionStorage.clear()")
        self.send("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.send("Page.resetNavigationHistory")
        self.send("Network.clearBrowserCache")
        self.browser.send("Browser.resetPermissions", browserContextId=self.context)
        self.browser.idle.append(self)
