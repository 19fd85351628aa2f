#!/usr/bin/env python3
"""Drive the real clients, in pinned versions, through ccproxy to a scripted upstream.

    python3 tests/clients/run.py [--scratch DIR] [--only TEXT] [--list] [name ...]

Without names every client is tried.  Each is installed by pip or npm into a folder of its own
below the scratch folder (default: `ccproxy-clients` in the temporary folder), which is kept and
used again by the next run.  Nothing leaves the machine but the installation: keys are made up,
and the upstream is tests/fake_upstream.py.

Printed is a line per client, API and feature: ✓, or ✗ with what was seen instead, or - with the
reason when it does not apply; a client that cannot be installed is skipped with the reason.
Exit status: 0 when nothing failed, else 1.
"""
from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import agents  # noqa: E402
from bed import HERE, Bed, NotApplicable, client_environment  # noqa: E402
from sdks import CHECKS, Driver, Sdk  # noqa: E402


class Client(NamedTuple):
    """How a client is installed, and by what it is driven."""

    tool: str                       # pip or npm
    packages: Tuple[str, ...]
    apis: Tuple[str, ...] = ()      # of an SDK: its driver's names for them
    checks: Optional[Dict[str, Callable[..., None]]] = None     # of a program


CLIENTS = {
    "openai-py": Client("pip", ("openai==3.52.0",), ("chat", "responses")),
    "anthropic-py": Client("pip", ("anthropic==2.11.0",), ("messages",)),
    "openai-agents": Client("pip", ("openai-agents==0.24.0", "openai==3.57.0"), ("agents",)),
    "openai-js": Client("npm", ("openai@7.55.0",), ("chat", "responses")),
    "anthropic-js": Client("npm", ("@anthropic-ai/sdk@1.11.0",), ("messages",)),
    "ai-sdk": Client("npm", (
        "ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "@ai-sdk/anthropic@4.0.105",
        "@ai-sdk/openai@4.0.118"), ("compatible", "anthropic", "openai")),
    "langchain": Client("pip", ("langchain-openai==1.7.3", "langchain-anthropic==1.7.7"),
                        ("chat", "responses", "messages")),
    "litellm": Client("pip", ("litellm==1.83.0",), ("chat", "messages", "responses")),
    "llm": Client("pip", ("llm==0.36",), ("chat", "responses")),
    "claude-code": Client("npm", ("@anthropic-ai/claude-code@2.1.329",),
                          checks=agents.CLAUDE_CODE),
    "codex": Client("npm", ("@openai/codex@0.169.0",), checks=agents.CODEX),
    "opencode": Client("npm", ("opencode-ai@1.18.33",), checks=agents.OPENCODE),
    "pi": Client("npm", ("@mariozechner/pi-coding-agent@0.73.1",), checks=agents.PI),
    "aider": Client("pip", ("aider-chat==0.86.2",), checks=agents.AIDER),
}
INSTALL_SECONDS = 900


def install(client: Client, folder: str) -> str:
    """Install into this folder unless that was done; the reason when it cannot be, else ''."""
    mark = os.path.join(folder, "installed")
    wanted = "\n".join(client.packages)
    if os.path.exists(mark):
        with open(mark, encoding="utf-8") as file:
            if file.read() == wanted:
                return ""
        shutil.rmtree(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        if client.tool == "npm":
            with open(os.path.join(folder, "package.json"), "w", encoding="utf-8") as file:
                file.write('{"private": true}\n')
            run_tool(["npm", "install", "--no-audit", "--no-fund", *client.packages], folder)
        else:
            run_tool([sys.executable, "-m", "venv", folder], folder)
            run_tool([python_of(folder), "-m", "pip", "install", "-q", *client.packages], folder)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stdout", "") or ""
        told = [line for line in output.splitlines()
                if "error" in line.lower() and "code " not in line]
        return ("%s: %s" % (told[0] if told else "", error))[:400]
    with open(mark, "w", encoding="utf-8") as file:
        file.write(wanted)
    return ""


def run_tool(command: List[str], folder: str) -> None:
    subprocess.run(command, cwd=folder, check=True, timeout=INSTALL_SECONDS, encoding="utf-8",
                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def python_of(folder: str) -> str:
    return os.path.join(folder, "bin", "python")


def place_of(error: BaseException) -> str:
    """The line of the check that was not met."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if os.path.basename(frame.filename) in ("sdks.py", "agents.py")]
    return "%s:%s: %s" % (os.path.basename(frames[-1].filename), frames[-1].lineno,
                          frames[-1].line) if frames else "?"


class Tally:
    """What was found, printed as it is found."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    def check(self, name: str, feature: str, run: Callable[[], Any]) -> None:
        started = time.monotonic()
        try:
            run()
        except NotApplicable as reason:
            print("  - %s: %s: does not apply: %s" % (name, feature, reason), flush=True)
        except (AssertionError, OSError, KeyError, ValueError, IndexError, TypeError, queue.Empty,
                subprocess.SubprocessError) as error:
            self.failed += 1
            print("  ✗ %s: %s: %s: %s (%s)" % (name, feature, type(error).__name__,
                                               str(error)[:1500], place_of(error)), flush=True)
        else:
            self.passed += 1
            print("  ✓ %s: %s (%.1f s)" % (name, feature, time.monotonic() - started), flush=True)

    def skip(self, name: str, reason: str) -> None:
        self.skipped += 1
        print("  - %s: skipped: %s" % (name, reason), flush=True)


def drive_sdk(tally: Tally, name: str, client: Client, folder: str, bed: Bed,
              only: Optional[str]) -> None:
    """Every check for every API of an SDK."""
    if client.tool == "npm":
        script = shutil.copy(os.path.join(HERE, "sdk_driver.mjs"), folder)
        command = ["node", script]
    else:
        command = [python_of(folder), os.path.join(HERE, "sdk_driver.py"), name]
    for api in client.apis:
        driver = Driver(command, client_environment(bed.scratch), bed.scratch)
        sdk = Sdk(bed, driver, name, api)
        for feature, check in CHECKS.items():
            if only and only not in feature:
                continue
            if driver.process.poll() is not None:
                driver = sdk.driver = Driver(command, client_environment(bed.scratch), bed.scratch)
            bed.reset()
            tally.check("%s (%s)" % (name, api), feature, lambda: check(bed, sdk))
        driver.close()


def drive_program(tally: Tally, name: str, client: Client, folder: str, bed: Bed,
                  only: Optional[str]) -> None:
    """Every check of a program; each has a home and a working folder of its own."""
    for feature, check in (client.checks or {}).items():
        if only and only not in feature:
            continue
        with tempfile.TemporaryDirectory(dir=bed.scratch) as room:
            bed.reset()
            tally.check(name, feature, lambda: check(agents.Agent(bed, folder, room)))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help="of: " + ", ".join(CLIENTS))
    parser.add_argument("--scratch", metavar="DIR", help="folder for installed clients",
                        default=os.path.join(tempfile.gettempdir(), "ccproxy-clients"))
    parser.add_argument("--only", metavar="TEXT", help="only features whose name holds this")
    parser.add_argument("--list", action="store_true", help="print clients and versions")
    options = parser.parse_args()
    for name in options.names:
        if name not in CLIENTS:
            parser.error("no client %r; there are %s" % (name, ", ".join(CLIENTS)))
    return options


def main() -> int:
    options = read_arguments()
    names = options.names or list(CLIENTS)
    if options.list:
        for name in names:
            print("%-14s %s" % (name, " ".join(CLIENTS[name].packages)))
        return 0
    os.makedirs(options.scratch, exist_ok=True)
    tally = Tally()
    for name in names:
        client, folder = CLIENTS[name], os.path.join(os.path.abspath(options.scratch), name)
        print("%s: %s" % (name, " ".join(client.packages)), flush=True)
        reason = install(client, folder)
        if reason:
            tally.skip(name, reason)
            continue
        with tempfile.TemporaryDirectory() as work:
            bed = Bed(work)
            try:
                drive = drive_program if client.checks else drive_sdk
                drive(tally, name, client, folder, bed, options.only)
            finally:
                bed.close()
    print("%d passed, %d failed, %d skipped" % (tally.passed, tally.failed, tally.skipped))
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
