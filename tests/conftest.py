"""Fixtures: a fake upstream and a proxy in front of it."""
from __future__ import annotations

import gc
import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from fake_upstream import FakeUpstream  # noqa: E402
from harness import PROXY_NAMES, Program, Proxy  # noqa: E402
from side_by_side import pytest_runtestloop  # noqa: E402,F401


def pytest_collection_finish():
    """Thousands of tests are no garbage: nothing that collects it has to look at them each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch):
    """Proxies and authorities of the machine that runs the tests must not matter."""
    for name in list(os.environ):
        if name.lower() in PROXY_NAMES or name == "SSL_CERT_FILE":
            monkeypatch.delenv(name)


@pytest.fixture
def upstream():
    fake = FakeUpstream()
    yield fake
    fake.close()


@pytest.fixture
def make_proxy(upstream):
    """Proxies with options of their own in front of the fake upstream."""
    started = []

    def make(**options):
        options.setdefault("apiBase", upstream.base)
        proxy = Proxy(**options)
        started.append(proxy)
        return proxy
    yield make
    for proxy in started:
        proxy.close()
        assert "never retrieved" not in proxy.log.getvalue()
        assert "Traceback" not in proxy.log.getvalue(), proxy.log.getvalue()


@pytest.fixture
def proxy(make_proxy):
    return make_proxy()


@pytest.fixture
def start_program(upstream):
    """Whole programs in processes of their own, in front of the fake upstream."""
    started = []

    def start(*arguments, **options):
        if "--api-base" not in arguments:
            arguments = ("--api-base", upstream.base) + arguments
        program = Program(*arguments, **options)
        started.append(program)
        return program
    yield start
    for program in started:
        program.close()
