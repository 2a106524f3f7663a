"""A supervised process: restarts, log files, and ends that nothing survives."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cli.process import LONGEST_BACKOFF_S, ProcessSpec, Running, Supervised, execute, next_backoff, rotate
from shared import gentle_start

DEADLINE_S = 20.0
WAIT_FOR_EVER = "import time; print('up', flush=True); time.sleep(1000)"
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + WAIT_FOR_EVER
WITH_A_CHILD = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']);"
    "print(child.pid, flush=True); child.wait()"
)

Make = Callable[[str], Supervised]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Supervised] = []

    def make(code: str) -> Supervised:
        spec = ProcessSpec("test", "test-0", (sys.executable, "-c", code))
        made.append(Supervised(spec, tmp_path, first_backoff_s=0.01))
        return made[-1]

    yield make
    for process in made:
        await process.stop(0)


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - another process cannot set an event
            await asyncio.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return True


async def test_a_process_that_is_killed_is_started_again(make: Make) -> None:
    process = make(WAIT_FOR_EVER)
    await process.start()
    first = process.pid
    process.signal(signal.SIGKILL)
    await _until(lambda: process.num_restarts == 1 and process.pid is not None)
    assert process.pid != first
    assert process.last_exit == "killed by SIGKILL"


async def test_a_process_that_ends_by_itself_is_known_to_have_died(make: Make) -> None:
    process = make("import sys; print('no such model'); sys.exit(3)")
    await process.start()
    await asyncio.wait_for(process.died.wait(), DEADLINE_S)
    assert process.last_exit == "exit status 3"


async def test_stopping_ends_a_process_that_ignores_sigterm(make: Make) -> None:
    process = make(IGNORE_SIGTERM)
    await process.start()
    await _until(lambda: process.last_lines() == ["up"])
    await process.stop(grace_s=0.05)
    assert process.pid is None
    assert process.last_exit == "killed by SIGKILL"


async def test_a_stopped_process_is_not_started_again(make: Make) -> None:
    process = make(WAIT_FOR_EVER)
    await process.start()
    await process.stop(DEADLINE_S)
    assert process.num_starts == 1
    assert not process.died.is_set()


async def test_stopping_between_two_starts_starts_nothing(tmp_path: Path) -> None:
    spec = ProcessSpec("test", "test-0", (sys.executable, "-c", ""))
    process = Supervised(spec, tmp_path, first_backoff_s=1000)
    await process.start()
    await asyncio.wait_for(process.died.wait(), DEADLINE_S)
    await asyncio.wait_for(process.stop(1), DEADLINE_S)
    assert process.num_starts == 1


async def test_a_start_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    asked, go_on, started = asyncio.Event(), asyncio.Event(), list[Running]()

    async def slowly(spec: ProcessSpec, output: int) -> Running:
        asked.set()
        await go_on.wait()
        started.append(await execute(spec, output))
        return started[-1]

    spec = ProcessSpec("test", "test-0", (sys.executable, "-c", WAIT_FOR_EVER))
    process = Supervised(spec, tmp_path, launch=slowly)
    starting = asyncio.create_task(process.start())
    await asked.wait()
    starting.cancel()
    stopping = asyncio.create_task(process.stop(DEADLINE_S))
    await asyncio.gather(starting, return_exceptions=True)
    go_on.set()
    await asyncio.wait_for(stopping, 2 * DEADLINE_S)
    assert [each.returncode for each in started] == [-signal.SIGTERM]


def test_who_fails_again_and_again_is_started_ever_more_slowly() -> None:
    waits = [0.0]
    for _ in range(9):
        waits.append(next_backoff(waits[-1], 0.1, lived_s=20.0, code=1))
    assert waits[1:5] == [0.1, 0.2, 0.4, 0.8]
    assert waits[-1] == LONGEST_BACKOFF_S


@pytest.mark.parametrize(("lived_s", "code"), [(31.0, 1), (6.0, -signal.SIGKILL), (6.0, -signal.SIGTERM), (6.0, 0)])
def test_who_ran_well_until_it_ended_is_started_at_once(lived_s: float, code: int) -> None:
    assert next_backoff(3.2, 0.1, lived_s, code) == 0.1


@pytest.mark.parametrize(("lived_s", "code"), [(6.0, 1), (6.0, -signal.SIGSEGV), (4.0, -signal.SIGKILL)])
def test_who_did_not_is_waited_for(lived_s: float, code: int) -> None:
    assert next_backoff(3.2, 0.1, lived_s, code) == 6.4


async def test_a_process_takes_its_children_along(make: Make) -> None:
    process = make(WITH_A_CHILD)
    await process.start()
    await _until(process.last_lines)
    child = int(process.last_lines()[0])
    await process.stop(DEADLINE_S)
    await _until(lambda: not _lives(child))


async def test_a_process_does_not_outlive_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, sys
from pathlib import Path
from cli.process import ProcessSpec, Supervised
async def main():
    process = Supervised(ProcessSpec("test", "t", (sys.executable, "-c", {WAIT_FOR_EVER!r})), Path({str(tmp_path)!r}))
    await process.start()
    while process.last_lines() != ["up"]:
        await asyncio.sleep(0.01)
    print(process.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    supervisor = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert supervisor.stdout is not None
    pid = int(await asyncio.wait_for(supervisor.stdout.readline(), DEADLINE_S))
    assert _lives(pid)
    supervisor.kill()
    await supervisor.communicate()
    await _until(lambda: not _lives(pid))


async def test_each_start_has_a_log_of_its_own(make: Make, tmp_path: Path) -> None:
    process = make("import os; print(os.getpid(), flush=True); import time; time.sleep(1000)")
    await process.start()
    await _until(process.last_lines)
    first = process.last_lines()
    process.signal(signal.SIGKILL)
    await _until(lambda: process.num_restarts == 1 and process.last_lines())
    assert (tmp_path / "test-0.1.log").read_text().splitlines() == first
    assert process.last_lines() != first


async def test_echoed_output_is_in_the_log_too(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    spec = ProcessSpec("test", "test-0", (sys.executable, "-c", WAIT_FOR_EVER))
    process = Supervised(spec, tmp_path, echo=lambda name, line: seen.append((name, line)))
    await process.start()
    await _until(lambda: seen)
    await process.stop(DEADLINE_S)
    assert seen == [("test-0", "up")]
    assert process.last_lines() == ["up"]


def test_rotation_keeps_the_newest_logs_in_order(tmp_path: Path) -> None:
    log = tmp_path / "p.log"
    for number in range(5):
        rotate(log, 2)
        log.write_text(str(number))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "p.log": "4",
        "p.1.log": "3",
        "p.2.log": "2",
    }


@pytest.mark.skipif(not gentle_start.AUTOGROUP.exists(), reason="this kernel gives sessions no shares")
async def test_a_process_has_a_small_share_of_the_processor_until_it_serves(tmp_path: Path) -> None:
    serve = "import asyncio, time; from shared import gentle_start; print(gentle_start.AUTOGROUP.read_text(), end='');"
    serve += "asyncio.run(gentle_start.over()); print(gentle_start.AUTOGROUP.read_text(), flush=True); time.sleep(1000)"
    spec = ProcessSpec("test", "test-0", (sys.executable, "-c", serve), starts_gently=True)
    process, ours = Supervised(spec, tmp_path), gentle_start.AUTOGROUP.read_text()
    await process.start()
    await _until(lambda: len(process.last_lines()) == 3)
    await process.stop(0)
    assert [line.rpartition("nice ")[2] for line in process.last_lines()] == ["10", "0", ""]
    assert gentle_start.AUTOGROUP.read_text() == ours
