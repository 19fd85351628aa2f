"""The bench at tiny sizes: its rows, its exit status, that it sees wrong answers and leaves
nothing behind.  No figure is looked at."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import bench
import pytest
from harness import wait_until

COMMAND = [sys.executable, bench.__file__, "--quick", "--scale", "0.04", "--rounds", "1"]
SPEC = bench.Spec(3)
WRONG_PROXY = '''
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    do_POST = do_GET
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
'''


def run_bench(*arguments):
    return subprocess.run(COMMAND + list(arguments), stdin=subprocess.DEVNULL, timeout=120,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def test_every_row_is_there(tmp_path):
    path = tmp_path / "figures.json"
    done = run_bench("--json", str(path))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    figures = json.loads(path.read_text())
    for row in bench.ROWS:
        assert [line for line in done.stdout.splitlines() if line.startswith(row.title + "  ")]
        if bench.HAS_CPU or not row.proc:
            assert len(figures["rounds"][row.key]["ccproxy"]) == 1, row
    assert figures["rounds"]["merged"]["ccproxy"] == [1.0]
    assert bench.machine_line(figures["machine"]) in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 140


def test_wrong_answers_are_seen(tmp_path):
    program = tmp_path / "wrong.py"
    program.write_text(WRONG_PROXY)
    done = run_bench("--ccproxy", str(program))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG ANSWERS, so this is where it ends: ccproxy: " in done.stdout


def test_what_cannot_start_is_told(tmp_path):
    done = run_bench("--ccproxy", str(tmp_path / "missing.py"))
    assert done.returncode == 2 and "ccproxy did not start" in done.stderr


@pytest.mark.skipif(not bench.HAS_CPU, reason="needs /proc to see who is left")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(number):
    process = subprocess.Popen(COMMAND, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, encoding="utf-8")
    process.stdout.readline()
    wait_until(lambda: len(bench.process_tree(process.pid)) > 3, 20)
    time.sleep(0.1)
    tree = bench.process_tree(process.pid)
    process.send_signal(number)
    said = process.communicate(timeout=20)
    assert (process.returncode, said[1]) == (130, "stopped\n")
    assert [pid for pid in tree if os.path.exists("/proc/%d" % pid)] == []


# The check of answers.


def chat_answer(texts, end="data: [DONE]\n\n"):
    frames = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
    frames.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    data = "".join("data: %s\n\n" % json.dumps(frame) for frame in frames) + end
    return bench.HEAD + bench.chunk(data.encode()) + bench.LAST


TEXTS = [bench.text_of(SPEC, number) for number in range(3)]
RAW = b"".join(bench.pieces_of(SPEC))


@pytest.mark.parametrize("face, answer, expected", [
    ("raw", RAW, (3, "")),
    ("raw", RAW[:-5], (0, "ValueError")),
    ("raw", RAW + b"x", (0, "ValueError: bytes after the end")),
    ("raw", RAW.replace(b"finish\"", b"finite\""), (0, "0 ends")),
    ("raw", RAW.replace(b"200 OK", b"500 No"), (0, "ValueError: answered")),
    ("chat", chat_answer(TEXTS), (3, "")),
    ("chat", chat_answer(["".join(TEXTS)]), (1, "")),
    ("chat", chat_answer(TEXTS[:2]), (0, "the text is wrong from character 48 of 72")),
    ("chat", chat_answer(TEXTS + TEXTS[2:]), (0, "the text is wrong from character 72 of 72")),
    ("chat", chat_answer(TEXTS, ""), (0, "ValueError: does not end in [DONE]")),
    ("chat", chat_answer(TEXTS, "data: [DONE]\n"), (0, "ValueError: ends inside a frame")),
])
def test_an_answer_is_checked(face, answer, expected):
    count, wrong = bench.check_answer(face, True, answer, SPEC)
    assert count == expected[0] and wrong.startswith(expected[1])
    assert bool(wrong) == bool(expected[1])
