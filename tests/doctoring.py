"""What the doctor's tests share: an examination in this process, and an upstream with accounts."""
from __future__ import annotations

import json
import os
import ssl
import time
from email.utils import formatdate

import pytest
from fake_upstream import MODELS, FakeUpstream
from harness import ccproxy

CERTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "certs")
CREDITS = {"credits": {"monthlyCredits": 8.54, "purchasedCredits": 0, "freeCredits": 0},
           "windowLimits": {"limited": True, "fiveHour": {"used": 0.02, "cap": 3, "resetAt": 0},
                            "weekly": {"used": 1.45, "cap": 6, "resetAt": 0}}}
PLAN = {"data": {"planId": "individual-go", "status": "active"}}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with nothing on it: no clients, keys, proxies or authorities; its home and its
    programs are a folder `home`."""
    for name in list(os.environ):
        if name.startswith(("CC_", "COMMANDCODE_", "ANTHROPIC_", "OPENAI_", "AIDER_", "CODEX_",
                            "CLAUDE_", "BRIDGE_", "SSL_CERT")):
            monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE", "PATH"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def settings_of(tmp_path, **entries):
    """Settings as the program reads them, with a config file of these entries."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(entries))
    os.chmod(path, 0o600)
    return ccproxy.read_what_holds({}, str(path))


def scene_of(settings):
    return ccproxy.Scene(settings, ccproxy.parse_origin(settings.config.api_base))


def examine(settings):
    """(whether all is well, {check: [finding]}) of all checks."""
    found = {}
    for check, finding in ccproxy.run_checks(scene_of(settings)):
        found.setdefault(check.name, []).append(finding)
    return not any(one.works is False for row in found.values() for one in row), found


def tls_of(name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(CERTS, name))
    return context


class Clinic(FakeUpstream):
    """An upstream that knows the keys `known`, whose answers tell a Date."""

    def __init__(self, known=("user_good",), skew=0.0, pause=0.0, tls=None):
        super().__init__(tls)
        self.known, self.skew, self.pause = known, skew, pause
        self.credits, self.plan, self.status = CREDITS, PLAN, 200
        self.side_script = self.tell

    def tell(self, sock, request):
        path = request.line.split(" ")[1].partition("?")[0]
        key = (request.field("authorization") or "").replace("Bearer ", "")
        time.sleep(self.pause)
        answers = {"/provider/v1/models": MODELS, "/alpha/whoami": {"user": {"id": "u"}},
                   "/alpha/billing/credits": self.credits,
                   "/alpha/billing/subscriptions": self.plan}
        status = self.status if path == "/provider/v1/models" or key in self.known else 401
        body = json.dumps(answers[path] if status == 200 else {"error": "no " + key}).encode()
        sock.sendall(("HTTP/1.1 %d X\r\ndate: %s\r\ncontent-length: %d\r\n\r\n" % (
            status, formatdate(time.time() + self.skew, usegmt=True), len(body))).encode() + body)
