"""Runs tests in several processes that are forked when all tests are known (decisions/0079): a plugin of pytest.

    pytest --processes 3

So tests are imported and collected once, and what that takes of memory is shared. Processes take pieces of work, which
`tests/sharing.py` cuts, from a pipe that holds their numbers; whoever has done one takes the next. What happens in a
test they report to the first process, which tells pytest as if it had happened there.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import pytest

from tests import sharing
from tests.launcher import Launcher

LAUNCHER = pytest.StashKey[Launcher]()
NUMBER_BYTES = 4
TASKS = Path("/proc/self/task")
# Each process has the cores with others. Libraries look when they are loaded, and the conftest of a folder that pytest
# is given may load them before there are options. CUDA is not asked whether there are GPUs, for no fork could make use
# of it then; NVML is.
if any(argument.startswith("--processes") for argument in sys.argv):
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "run tests in so many processes; auto: as many as this machine's cores suggest"
    parser.addoption("--processes", default="1", metavar="N", help=about)


def num_processes(config: pytest.Config) -> int:
    """As it is asked for; one where processes cannot be forked safely."""
    asked = config.getoption("--processes")
    if sys.platform != "linux":
        return 1
    return sharing.num_processes() if asked == "auto" else int(asked)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if num_processes(config) > 1:
        items.sort(key=lambda item: sharing.place(item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run all tests, unless pytest itself is to."""
    number = num_processes(session.config)
    if session.testsfailed or session.config.option.collectonly:
        return None
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if number > 1 and (num_threads := len(list(TASKS.iterdir()))) > 1:
        reporter.write_line(
            f"one process runs all: to import tests began {num_threads - 1} threads, so no fork is safe"
        )
        number = 1
    if number == 1:
        session.config.stash[LAUNCHER] = Launcher()
        return None
    reporter.showfspath = False  # files take turns
    First(session, number).run()
    return True


@pytest.fixture
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """Starts processes that run modules of this tree."""
    return request.config.stash[LAUNCHER]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if launcher := session.config.stash.get(LAUNCHER, None):
        launcher.end()


@dataclass
class Process:
    """One that runs tests, as the first process sees it: what it says, what it has to do, and what it is doing."""

    pid: int
    reports: Connection
    left: list[int] = field(default_factory=list)
    running: str = ""


class First:
    """The process that has collected tests, forks others, and hears of what they do."""

    def __init__(self, session: pytest.Session, number: int) -> None:
        self._session, self._number = session, number
        works: dict[str, list[int]] = {}
        for place, item in enumerate(session.items):
            works.setdefault(sharing.work(item.nodeid), []).append(place)
        self._works = list(works.values())
        self._processes: dict[Connection, Process] = {}

    def run(self) -> None:
        """Have all tests run. Raises what pytest wants raised when they are not to go on."""
        self._queue, numbers = os.pipe()
        os.write(numbers, b"".join(number.to_bytes(NUMBER_BYTES) for number in range(len(self._works))))
        os.close(numbers)
        try:
            for _ in range(min(self._number, len(self._works))):
                self._fork([])
            while self._processes:
                ready = wait(list(self._processes))
                for process in [each for reports, each in self._processes.items() if reports in ready]:
                    self._hear(process)
        finally:
            self._end()

    def _fork(self, left: list[int]) -> None:
        """A process that runs the tests that are `left` of another one's work, and then takes its own."""
        ours, theirs = Pipe(duplex=False)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        pid = os.fork()
        if not pid:
            for each in (ours, *self._processes):
                each.close()
            _run(Other(self._session, theirs, self._queue, self._works), left)
        theirs.close()
        self._processes[ours] = Process(pid, ours, left)

    def _hear(self, process: Process) -> None:
        try:
            kind, *said = process.reports.recv()
        except EOFError:
            self._over(process)
            return
        hook = self._session.config.hook
        if kind == "took":
            process.left += self._works[said[0]]
        elif kind == "start":
            process.running = said[0]
            del process.left[0]
            hook.pytest_runtest_logstart(nodeid=said[0], location=said[1])
        elif kind == "finish":
            process.running = ""
            hook.pytest_runtest_logfinish(nodeid=said[0], location=said[1])
        else:
            hook.pytest_runtest_logreport(
                report=hook.pytest_report_from_serializable(config=self._session.config, data=said[0])
            )
        if self._session.shouldfail:
            raise self._session.Failed(self._session.shouldfail)
        if self._session.shouldstop:
            raise self._session.Interrupted(self._session.shouldstop)

    def _over(self, process: Process) -> None:
        """It has ended. If that was in a test the test has failed, and another process does what it had to do."""
        process.reports.close()
        del self._processes[process.reports]
        status = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
        if name := process.running:
            place = (name.partition("::")[0], None, name)
            why = f"its process ended with {status}"
            report = pytest.TestReport(name, place, {}, "failed", why, "call")
            self._session.config.hook.pytest_runtest_logreport(report=report)
        elif status:
            raise pytest.UsageError(f"a process ended with {status} between two tests")
        if process.left:
            self._fork(process.left)

    def _end(self) -> None:
        """Nothing more is to be run."""
        os.close(self._queue)
        for process in self._processes.values():
            os.kill(process.pid, signal.SIGINT)
        for process in self._processes.values():
            process.reports.close()
            os.waitpid(process.pid, 0)


class Other:
    """A forked process: it runs tests."""

    def __init__(self, session: pytest.Session, reports: Connection, queue: int, works: Sequence[list[int]]) -> None:
        self.session, self._reports, self._queue, self._works = session, reports, queue, works

    def run(self, left: Sequence[int]) -> None:
        """Run tests until there are none."""
        self._begin()
        self._run(left)
        while number := os.read(self._queue, NUMBER_BYTES):
            self._reports.send(("took", int.from_bytes(number)))
            self._run(self._works[int.from_bytes(number)])
        self.end()

    def end(self) -> None:
        """Undo what was made for tests."""
        self.session._setupstate.teardown_exact(None)
        self.session.config.stash[LAUNCHER].end()

    def _begin(self) -> None:
        """Output is caught apart from that of others, and reported instead of shown."""
        plugins: Any = self.session.config.pluginmanager
        capturing, terminal = plugins.get_plugin("capturemanager"), plugins.get_plugin("terminalreporter")
        capturing.stop_global_capturing()
        capturing.start_global_capturing()
        capturing.suspend_global_capture()
        plugins.unregister(terminal)
        plugins.register(Writer(terminal), "terminalreporter")
        plugins.register(self)
        self.session.config.stash[LAUNCHER] = Launcher()

    def _run(self, places: Sequence[int]) -> None:
        items = [self.session.items[place] for place in places]
        for item, following in zip(items, [*items[1:], Unknown(self.session)], strict=False):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._reports.send(("start", nodeid, location))

    def pytest_runtest_logfinish(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._reports.send(("finish", nodeid, location))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        config = self.session.config
        self._reports.send(("report", config.hook.pytest_report_to_serializable(config=config, report=report)))


class Writer:
    """What is left of pytest's reporter in a process that reports to another one: where stacks are written."""

    def __init__(self, terminal: Any) -> None:
        self._tw = terminal._tw


class Unknown:
    """Stands for the next test while nobody knows which one it is: what the session has is kept for it."""

    def __init__(self, session: pytest.Session) -> None:
        self._session = session

    def listchain(self) -> list[pytest.Session]:
        return [self._session]


def _run(process: Other, left: Sequence[int]) -> None:
    """Be this process to its end."""
    status = 1
    try:
        process.run(left)
        status = 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's comes twice, by way of the first process, too
        process.end()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
