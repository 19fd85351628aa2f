"""A short run of the fuzzer with fixed seeds, and that it finds what it is meant to find."""
from __future__ import annotations

import random

import fuzz
import pytest
from harness import ccproxy
from pure import refusal

CASES = 60              # of each target and seed; `python3 tests/fuzz.py --minutes N` goes on
TARGETS = {target.name: target for target in fuzz.all_targets()}
SEEDS = ["short", "run"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_a_proxy_error_is_raised(name, seed):
    for number in range(CASES):
        case = "%s:%s:%d" % (name, seed, number)
        data, _, trace = fuzz.run_case(TARGETS[name], case)
        assert trace is None, "%s\npython3 tests/fuzz.py --case '%s'" % (trace, case)
        assert len(data) <= fuzz.MOST_BYTES + max(map(len, fuzz.LINE_WORDS))


@pytest.mark.parametrize("name", TARGETS)
def test_a_case_is_the_same_again(name):
    target = TARGETS[name]
    made = [target.make(random.Random(name + ":same:7"), target.seeds) for _ in range(2)]
    assert made[0] == made[1]


def test_the_seeds_themselves_are_good():
    """Else every mutation of them would be refused at the door and test nothing."""
    for data in fuzz.HEADS:
        assert ccproxy.find_head_end(data, 0, ccproxy.client_fault) == len(data)
        ccproxy.parse_request_head(data)
    for data in fuzz.RESPONSE_HEADS:
        ccproxy.parse_response_head(data)
    for data in fuzz.CHUNKS:
        assert fuzz.unchunk(data, None) == fuzz.unchunk(data, "bytewise")
    for face, bodies in fuzz.REQUESTS.items():
        for body in bodies:
            assert refusal(face, body) is None, body


@pytest.mark.parametrize("fault", [ValueError, RecursionError, AssertionError])
def test_a_finding_is_told_with_its_case(monkeypatch, capsys, fault):
    def fail(rng, data):
        raise fault("found")
    monkeypatch.setattr(fuzz, "all_targets", lambda: [
        fuzz.Target("bad", fuzz.CHUNKS, fuzz.make_wire, fail)])
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--minutes", "0.0001", "--seed", "s"])
    assert fuzz.main() == 1
    screen = capsys.readouterr().out
    assert "FOUND bad:s:" in screen and "--case 'bad:s:" in screen and fault.__name__ in screen
