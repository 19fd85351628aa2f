"""The tests of the tests: run side by side they tell what they would tell in a row."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
import side_by_side
from harness import wait_until

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="side by side on Linux with several processors")

CONFTEST = '''
import os, sys
sys.path.insert(0, %r)
import side_by_side
from side_by_side import pytest_runtestloop
side_by_side.FEWEST = 8
''' % os.path.dirname(os.path.abspath(side_by_side.__file__))
ORDINARY = '''
import os, warnings, pytest
@pytest.mark.parametrize("number", range(5))
def test_number(number, tmp_path):
    assert number != 3, "three is wrong"
    print("printed", os.getpid())
def test_warning():
    warnings.warn("mind the gap", UserWarning)
def test_skipped():
    pytest.skip("not today")
@pytest.fixture(scope="module")
def broken():
    yield
    raise OSError("at its end")
def test_teardown(broken):
    pass
'''
DEADLY = '''
import os
def test_before(): pass
def test_deadly(): os.kill(os.getpid(), 9)
def test_behind(): pass
'''
SLOW = '''
import pathlib, time, pytest
@pytest.fixture
def thing():
    pathlib.Path("set-up").write_text("")
    yield
    pathlib.Path("put-away").write_text("")
def test_slow(thing):
    time.sleep(60)
'''


def start(folder, files, *options):
    for name, text in {"conftest.py": CONFTEST, **files}.items():
        (folder / name).write_text(text)
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)],
        cwd=str(folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", start_new_session=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1",
             "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})


def run(folder, files, *options):
    """(exit status, what it printed, without times and process numbers)"""
    process = start(folder, files, *options)
    output, _ = process.communicate(timeout=60)
    return process.returncode, re.sub(r" in [0-9.]+s|printed [0-9]+", "", output)


@pytest.mark.parametrize("options", [("-q",), ("-v", "-rA")])
def test_the_same_as_in_a_row(tmp_path, options):
    files = {"test_%d.py" % number: ORDINARY for number in range(2)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    status, output = run(tmp_path / "a", files, *options)
    in_a_row = run(tmp_path / "b", files, "-s", *options)
    assert status == 1
    for text in ("2 failed, 12 passed, 2 skipped, 2 warnings, 2 errors", "mind the gap",
                 "three is wrong", "at its end"):
        assert output.count(text) == in_a_row[1].count(text) > 0


def test_a_process_that_dies_fails_its_test_and_those_behind(tmp_path):
    status, output = run(tmp_path, {"test_1.py": ORDINARY, "test_2.py": DEADLY,
                                    "test_3.py": ORDINARY}, "-q")
    assert status == 1 and "4 failed, 13 passed" in output
    assert "the process that ran it died, wait status 9" in output
    assert "FAILED test_2.py::test_behind" in output and "not run: the process died" in output


@pytest.mark.parametrize("deed, told", [
    ("pytest.exit('enough')", "enough"), ("raise MemoryError('outside of any test')", "outside")])
def test_what_ends_a_process_is_told(tmp_path, deed, told):
    """Also what no test itself raises."""
    (tmp_path / "beside.py").write_text(
        "import pytest\ndef pytest_runtest_protocol(item):\n"
        "    if 'deadly' in item.nodeid: %s\n" % deed)
    status, output = run(tmp_path, {"test_1.py": ORDINARY, "test_2.py": DEADLY,
                                    "test_3.py": ORDINARY}, "-q", "-p", "beside")
    assert status == 1 and "4 failed, 13 passed" in output and "wait status 256" in output
    assert told in output and "Traceback" in output


def test_ctrl_c_puts_everything_away(tmp_path):
    process = start(tmp_path, {"test_1.py": ORDINARY, "test_2.py": SLOW})
    try:
        wait_until((tmp_path / "set-up").exists, 20)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 2 and "KeyboardInterrupt" in output
    assert (tmp_path / "put-away").exists()


def test_few_are_run_in_a_row(tmp_path):
    names = "import os\ndef test_name(): open('%s', 'w').write(str(os.getpid()))\n"
    assert run(tmp_path, {"test_1.py": names % "one", "test_2.py": names % "two"})[0] == 0
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()
