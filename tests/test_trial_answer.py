"""TRIAL ANSWER: `doctor --generate`, by way of a running proxy or one of its own."""
from __future__ import annotations

import json
import re

import pytest
from doctoring import Clinic
from fake_upstream import raw, reset, status, stall, stream, text_answer
from harness import Proxy, call_program, ccproxy, run_program
from test_doctor import bare_machine

SECRET = "5ecr3tPartOfAKey0123456789"
GOOD = "user_" + SECRET
WHOLE = (r"200 from %s, model deepseek/deepseek-v4-flash, 7 tokens in, 3 out, first token after "
         r"[0-9.]+m?s, all after [0-9.]+m?s")


@pytest.fixture
def clinic():
    fake = Clinic(known=(GOOD,))
    yield fake
    fake.close()


@pytest.fixture
def proxy(clinic):
    """One that runs already, with the settings of `doctor`."""
    proxy = Proxy(apiBase=clinic.base)
    yield proxy
    proxy.close()


def doctor(clinic, tmp_path, *arguments, port=0, run=call_program, **environment):
    """(exit status, the check `answer` or None, standard error)."""
    done = run("doctor", "--json", "--port", str(port), "--api-base", clinic.base, *arguments,
               environment={**bare_machine(tmp_path), **environment})
    rows = json.loads(done.stdout)["checks"] if done.stdout else []
    assert SECRET not in done.stdout + done.stderr
    return done.returncode, next((row for row in rows if row["check"] == "answer"), None), done.stderr


def test_nothing_is_asked_for_unless_it_is_wanted(clinic, tmp_path):
    assert doctor(clinic, tmp_path, COMMANDCODE_KEY=GOOD,
                  SMOKE_ACCEPT_UPSTREAM_ERRORS="1")[1] is None
    assert clinic.requests == []


def test_through_the_proxy_that_runs(clinic, proxy, tmp_path):
    code, row, errors = doctor(clinic, tmp_path, "--generate", port=proxy.port, COMMANDCODE_KEY=GOOD)
    assert (code, row["works"], row["advice"], errors) == (0, True, "", "")
    assert re.fullmatch(WHOLE % ("http://127.0.0.1:%d" % proxy.port), row["words"])
    (request,) = clinic.requests        # once, with the key at hand, and for little
    assert request.field("authorization") == "Bearer " + GOOD
    assert json.loads(request.body)["params"]["max_tokens"] <= 512


def test_through_one_of_its_own(clinic, tmp_path):
    code, row, errors = doctor(clinic, tmp_path, "--generate", run=run_program, COMMANDCODE_KEY=GOOD)
    assert (code, row["works"], errors) == (0, True, "") and len(clinic.requests) == 1
    assert re.fullmatch(WHOLE % r"http://127\.0\.0\.1:\d+", row["words"])


def test_in_the_demo_without_a_key_or_an_account(clinic, tmp_path):
    code, row, _ = doctor(clinic, tmp_path, "--generate", "--demo", run=run_program)
    assert (code, row["works"]) == (0, True) and "tokens in" in row["words"]
    assert clinic.requests == []


def test_without_a_key_it_says_what_is_missing(clinic, tmp_path):
    code, row, errors = doctor(clinic, tmp_path, "--generate")
    assert (code, row) == (2, None) and "COMMANDCODE_KEY" in errors and clinic.requests == []


def test_a_proxy_that_does_not_start_is_told(clinic, tmp_path):
    code, _, errors = doctor(clinic, tmp_path, "--generate", "--log-file", "/nonexistent/x/y",
                             COMMANDCODE_KEY=GOOD)
    assert code == 1 and "the proxy did not start" in errors


def test_with_a_wrong_configuration_the_doctor_tells_that_alone(clinic, proxy, tmp_path):
    """What would hold without the config file might lead the key elsewhere."""
    (tmp_path / "wrong.json").write_text('{"logLevel": "x"}')
    code, row, errors = doctor(clinic, tmp_path, "--generate", "--config",
                               str(tmp_path / "wrong.json"), COMMANDCODE_KEY=GOOD)
    assert (code, row, errors) == (1, None, "")


UPSTREAM_ERRORS = [
    (status(402, {"error": {"message": "no credit"}}), 402, "no credit"),
    (status(403, {"error": {"message": "MODEL_NOT_IN_PLAN"}}), 403, "MODEL_NOT_IN_PLAN"),
    (status(500, "boom " + GOOD), 502, "boom"),
    (status(401, {"error": {"message": "bad key"}}), 401, "bad key"),
    (stream(b'{"type":"start"}\n{"type":"text-delta","id":"0","text":"O"}\n'
            b'{"type":"error","error":{"message":"it broke"}}\n'), 200, "it broke"),
    (raw(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), 502, "empty"), (reset(), 502, "closed")]


@pytest.mark.parametrize("script, code, words", UPSTREAM_ERRORS, ids=[
    "402", "403", "500", "401", "event", "empty", "reset"])
@pytest.mark.parametrize("tolerant", [
    (), ("--accept-upstream-errors",), ("--generate", "--accept-upstream-errors")], ids=len)
def test_an_upstreams_error(clinic, proxy, tmp_path, script, code, words, tolerant):
    clinic.default = script
    proxy.app.limits = proxy.app.limits._replace(backoff=())
    ended, row, _ = doctor(clinic, tmp_path, *(tolerant or ("--generate",)), port=proxy.port,
                           COMMANDCODE_KEY=GOOD)
    assert (ended, row["works"]) == ((0, True) if tolerant else (1, False))
    assert row["words"].startswith("%d from " % code) and words in row["words"]
    assert bool(row["advice"]) is not bool(tolerant)


@pytest.mark.parametrize("word, passed", [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_variable_does_the_same(clinic, proxy, tmp_path, word, passed):
    clinic.default = UPSTREAM_ERRORS[0][0]
    ended, row, _ = doctor(clinic, tmp_path, "--generate", port=proxy.port, COMMANDCODE_KEY=GOOD,
                           SMOKE_ACCEPT_UPSTREAM_ERRORS=word)
    assert (ended, row["works"]) == ((0, True) if passed else (1, False))


def test_what_the_proxy_refuses_or_does_not_hear_is_no_upstreams_error(clinic, proxy, tmp_path):
    """A model that is not served here, an upstream that is silent, one that is not there."""
    def ask():
        ended, row, _ = doctor(clinic, tmp_path, "--accept-upstream-errors", port=proxy.port,
                               COMMANDCODE_KEY=GOOD)
        assert (ended, row["works"]) == (1, False)
        return row["words"]

    proxy.app.config = proxy.app.config._replace(allowed_models=["kimi"])
    assert ask().startswith("404 from ") and clinic.requests == []
    proxy.app.config = proxy.app.config._replace(allowed_models=[], upstream_idle_seconds=0.3)
    clinic.default = stall()
    assert ask().startswith("504 from ")
    assert len(clinic.requests) == 1
    proxy.app.home.origin = proxy.app.home.origin._replace(port=1)
    proxy.app.home.pool.prune(float("inf"))
    proxy.app.limits = proxy.app.limits._replace(backoff=())
    assert "No connection" in ask()


def test_an_answer_in_the_form_of_thinking_counts_as_its_first_token():
    lines = [b'data: {"choices":[{"delta":{"reasoning_content":"x"},"finish_reason":null}]}\n', b"\n",
             b": note x\n", b'data: {"model":"m","choices":[{"delta":{},"finish_reason":"stop"}]}\n',
             b"data: [DONE]\n"]
    seen = ccproxy.read_stream(lines, 0.0)
    assert seen["first"] > 0 and seen["model"] == "m" and "error" not in seen
    assert "before its end" in ccproxy.read_stream(lines[:2], 0.0)["error"]["message"]
    assert "before its end" in ccproxy.read_stream([], 0.0)["error"]["message"]


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{",
    b"nonsense\r\n\r\n", b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"])
def test_whatever_answers_there_is_a_finding(clinic, answer):
    """Not a ccproxy at all, or one behind something that speaks for it."""
    clinic.default = raw(answer, close=True)
    scene = None
    with pytest.raises((OSError, ValueError)):
        ccproxy.try_answer(clinic.base, GOOD, True, scene)


def test_the_whole_line(clinic, proxy, tmp_path):
    clinic.default = stream(text_answer("OK"))
    done = call_program("doctor", "--generate", "--port", str(proxy.port), "--api-base", clinic.base,
                        environment={**bare_machine(tmp_path), "COMMANDCODE_KEY": GOOD})
    (line,) = [line for line in done.stdout.splitlines() if line[2:].startswith("answer")]
    assert line.startswith("\u2713 answer          200 from http://127.0.0.1:") and done.returncode == 0


def test_a_proxy_that_cannot_prove_whose_it_is_gets_no_key(clinic, proxy, tmp_path, monkeypatch):
    """One of its own is asked instead, unless --url names that one."""
    monkeypatch.setattr(ccproxy, "proof_entry", lambda app, nonce, port: {})
    base = "http://127.0.0.1:%d" % proxy.port
    code, row, errors = doctor(clinic, tmp_path, "--generate", port=proxy.port, run=run_program,
                               COMMANDCODE_KEY=GOOD)
    assert code == 0 and row["works"] and base not in row["words"]
    assert "gets no key" in errors and "--url " + base in errors
    code, row, errors = doctor(clinic, tmp_path, "--generate", "--url", base + "/v1",
                               COMMANDCODE_KEY=GOOD)
    assert (code, errors) == (0, "") and row["words"].startswith("200 from %s, model" % base)


@pytest.mark.parametrize("key, words", [("user_...", "placeholder"), ("sk-" + SECRET, "OpenAI")])
def test_a_mistaken_key_is_called_what_it_is(clinic, proxy, tmp_path, key, words):
    code, row, errors = doctor(clinic, tmp_path, "--generate", port=proxy.port, COMMANDCODE_KEY=key)
    assert (code, row) == (2, None) and words in errors and clinic.requests == []


def test_an_upstream_that_refuses_everything_is_no_fault_of_the_proxys(clinic, proxy, tmp_path):
    """With the key refused and the list of models too."""
    clinic.default = UPSTREAM_ERRORS[3][0]
    clinic.known = ()
    for flag, ended in (("--generate", 1), ("--accept-upstream-errors", 0)):
        assert doctor(clinic, tmp_path, flag, port=proxy.port, COMMANDCODE_KEY=GOOD)[0] == ended
