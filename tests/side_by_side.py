"""Runs the test files side by side, in as many processes as there are processors, four at most.

Each process is a fork of the one that collected the tests.  It runs file after file and hands
the reports back, and they are given to pytest a file at a time, as if there were one process.
In a row as ever run few tests, those under a debugger or with uncaptured output, and all those
on other systems than Linux.
"""
from __future__ import annotations

import itertools
import os
import traceback
import warnings
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Dict, List, Tuple

import pytest

FEWEST = 200            # tests: fewer are not worth a fork, and what failed is tried again alone
MOST = 4                # processes: a container may see more processors than it may use

File = List[pytest.Item]
Told = List[Tuple[str, Any]]            # what a process reported of a file, in order


class Reporter:
    """Sends what a process has to report, in place of printing it."""

    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self.config, self.connection = config, connection
        self._tw = config.get_terminal_writer()         # assertions look here for their colours

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.connection.send(("report", self.config.hook.pytest_report_to_serializable(
            config=self.config, report=report)))

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str,
                                nodeid: str) -> None:
        if when == "runtest":           # those of the collection have been told of
            self.connection.send(("warning", (nodeid, (
                str(warning_message.message), warning_message.category, warning_message.filename,
                warning_message.lineno))))


class Process:
    """A fork, the file that it is running, and what it has told of that."""

    def __init__(self, session: pytest.Session, files: List[File],
                 others: List[Process]) -> None:
        self.connection, theirs = Pipe()
        self.file: File = []
        self.told: Told = []
        self.number = os.fork()
        if self.number:
            theirs.close()
            return
        for process in (self, *others):         # their ends show in those alone that hold them
            process.connection.close()
        try:
            run_files(session, files, theirs)
        except (EOFError, ConnectionError, KeyboardInterrupt):      # nobody waits for the rest
            os._exit(0)
        except BaseException:           # which test it was, the other side says
            traceback.print_exc()
        finally:
            os._exit(1)

    def run(self, files: List[File], index: int) -> None:
        self.file, self.told = files[index], []
        self.connection.send(index)

    def end(self) -> int:
        """Its wait status, after it has put away what its last test had set up."""
        self.connection.close()
        return os.waitpid(self.number, 0)[1]


def run_files(session: pytest.Session, files: List[File], connection: Connection) -> None:
    """What a fork does: the files whose indices come in, until no more do."""
    plugins = session.config.pluginmanager
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()             # those files are shared with the other forks
    capture.start_global_capturing()
    capture.suspend_global_capture()
    reporter = Reporter(session.config, connection)
    plugins.unregister(name="terminalreporter")
    plugins.register(reporter, "terminalreporter")
    try:
        while True:
            items = files[connection.recv()]
            for item, following in itertools.zip_longest(items, items[1:]):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            connection.send(("end", None))
    finally:
        session._setupstate.teardown_exact(None)


def pass_on(session: pytest.Session, told: Told) -> None:
    """Give pytest what was told of a file."""
    config, hook = session.config, session.config.hook
    for kind, data in told:
        if kind == "warning":
            hook.pytest_warning_recorded.call_historic(kwargs={
                "warning_message": warnings.WarningMessage(*data[1]), "when": "runtest",
                "nodeid": data[0], "location": None})
            continue
        report = hook.pytest_report_from_serializable(config=config, data=data)
        if report.when == "setup":
            hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def fail_the_rest(session: pytest.Session, process: Process, status: int) -> None:
    """The process died: the test that it was running failed, and those behind it did not run."""
    reports = [data for kind, data in process.told if kind == "report"]
    done = {data["nodeid"] for data in reports if data["when"] == "teardown"}
    left = [item for item in process.file if item.nodeid not in done] or process.file[-1:]
    pass_on(session, [(kind, data) for kind, data in process.told
                      if kind == "warning" or data["nodeid"] in done])
    for item in left:
        why = "the process that ran it died, wait status %d" % status if item is left[0] else \
            "not run: the process died before"
        session.config.hook.pytest_runtest_logreport(report=pytest.TestReport(
            item.nodeid, item.location, {}, "failed", why, "call"))


def is_side_by_side(session: pytest.Session) -> bool:
    option = session.config.option
    return (hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1
            and len(session.items) >= FEWEST and not session.testsfailed
            and option.capture == "fd" and not (option.collectonly or option.usepdb
                                                or option.setupshow)
            and not session.config.pluginmanager.hasplugin("xdist"))


def pytest_runtestloop(session: pytest.Session) -> Any:
    if not is_side_by_side(session):
        return None
    by_path: Dict[str, File] = {}
    for item in session.items:
        by_path.setdefault(str(item.path), []).append(item)
    files = list(by_path.values())
    session.config._tmp_path_factory.getbasetemp()      # one for all, that is put away at the end
    waiting = list(range(len(files)))[::-1]
    processes: List[Process] = []

    def start() -> None:
        processes.append(Process(session, files, processes))
        processes[-1].run(files, waiting.pop())
    try:
        for _ in range(min(len(os.sched_getaffinity(0)), len(files), MOST)):
            start()
        while processes:
            ready = wait([process.connection for process in processes])
            for process in [process for process in processes if process.connection in ready]:
                try:
                    kind, data = process.connection.recv()
                except (EOFError, ConnectionResetError):
                    processes.remove(process)
                    fail_the_rest(session, process, process.end())
                    if waiting:
                        start()
                    continue
                if kind != "end":
                    process.told.append((kind, data))
                    continue
                pass_on(session, process.told)
                if waiting:
                    process.run(files, waiting.pop())
                else:
                    processes.remove(process)
                    process.end()
    finally:
        for process in processes:
            process.end()
    return True
