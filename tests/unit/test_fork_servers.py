"""What a fork server forks is what would have been executed, only sooner; and nobody depends on it."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 60.0
PRELOADED = "tests.unit.preloaded"
Facts = dict[str, Any]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all processes are executed")


@dataclass
class Rig:
    """A supervisor in a process of its own."""

    process: asyncio.subprocess.Process
    folder: Path

    async def said(self) -> tuple[int, str]:
        """Its next words: its fork server (0: none), and how the first probe ended last."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), DEADLINE_S)
        server, _, ended = line.decode().rstrip("\n").partition(" ")
        return int(server), ended

    async def until(self, condition: Callable[[int, str], bool]) -> tuple[int, str]:
        """Its first words that are so."""
        while not condition(*(words := await self.said())):
            pass
        return words

    async def facts(self, number: int = 0, old_pid: int = 0) -> Facts:
        """What a probe found; not the one that had this pid."""
        log = self.folder / f"probe-{number}.log"
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with suppress(FileNotFoundError, ValueError, IndexError):
                    found: Facts = json.loads(log.read_text().splitlines()[0])
                    if found["pid"] != old_pid:
                        return found
                await asyncio.sleep(0.01)


@asynccontextmanager
async def rig(
    folder: Path, *arguments: str, preload: str = PRELOADED, patience_s: float = DEADLINE_S
) -> AsyncIterator[Rig]:
    command = [sys.executable, "-m", "tests.unit.fork_rig", str(folder), preload, str(patience_s), *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        yield Rig(process, folder)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def _oldest_log(folder: Path) -> str:
    return min(folder.glob("probe-0*.log"), key=lambda log: log.stat().st_mtime_ns).read_text()


def _lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


async def _until_gone(*pids: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while any(map(_lives, pids)):  # noqa: ASYNC110 - they are not our children
            await asyncio.sleep(0.01)


async def test_a_forked_process_finds_what_an_executed_one_does(tmp_path: Path) -> None:
    found: list[Facts] = []
    for preload in (PRELOADED, "there.is.none"):
        folder = tmp_path / preload
        folder.mkdir()
        async with rig(folder, "stay", preload=preload) as supervisor:
            server, _ = await supervisor.said()
            facts = await supervisor.facts()
            assert facts.pop("imported_by") == (server or facts["pid"])
            assert bool(server) == (preload == PRELOADED)
            assert facts.pop("session") == facts.pop("pid")
            assert facts.pop("parent") == supervisor.process.pid
            assert facts.pop("title").endswith(" -m tests.unit.probe stay")
            del facts["chance"]
            found.append(facts)
    assert found[0] == found[1]
    assert found[0]["mark"] == "0"
    assert found[0]["num_threads"] == 1


async def test_forked_processes_share_no_chance(tmp_path: Path) -> None:
    async with rig(tmp_path, "stay", "stay") as supervisor:
        both = [await supervisor.facts(number) for number in (0, 1)]
    assert both[0]["imported_by"] == both[1]["imported_by"]
    assert not set(both[0]["chance"]) & set(both[1]["chance"])


async def test_a_killed_process_is_forked_again(tmp_path: Path) -> None:
    async with rig(tmp_path, "stay") as supervisor:
        first = await supervisor.facts()
        os.kill(first["pid"], signal.SIGKILL)
        second = await supervisor.facts(old_pid=first["pid"])
        assert second["imported_by"] == first["imported_by"]
        assert (await supervisor.until(lambda _, ended: bool(ended)))[1] == "killed by SIGKILL"


@pytest.mark.parametrize(("number", "patience_s"), [(signal.SIGKILL, DEADLINE_S), (signal.SIGSTOP, 0.1)])
async def test_nobody_misses_a_fork_server_that_is_killed_or_stopped(
    tmp_path: Path, number: int, patience_s: float
) -> None:
    async with rig(tmp_path, "stay", patience_s=patience_s) as supervisor:
        server, _ = await supervisor.said()
        first = await supervisor.facts()
        os.kill(server, number)
        os.kill(first["pid"], signal.SIGKILL)
        second = await supervisor.facts(old_pid=first["pid"])
        assert second["imported_by"] == second["pid"] != first["pid"]
        assert (await supervisor.until(lambda server, _: not server))[1] == "killed by SIGKILL"
        await _until_gone(server)


async def test_what_is_forked_lives_on_when_its_fork_server_ends(tmp_path: Path) -> None:
    async with rig(tmp_path, "stay") as supervisor:
        server, _ = await supervisor.said()
        facts = await supervisor.facts()
        os.kill(server, signal.SIGKILL)
        await _until_gone(server)
        assert _lives(facts["pid"])


async def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    async with rig(tmp_path, "stay", "stay") as supervisor:
        server, _ = await supervisor.said()
        pids = [(await supervisor.facts(number))["pid"] for number in (0, 1)]
        supervisor.process.kill()
        await _until_gone(server, *pids)


@pytest.mark.parametrize(
    ("argument", "ended", "last"),
    [
        ("exit", "exit status 3", "the last words"),
        ("refuse", "exit status 1", "no such model"),
        ("fail", "exit status 1", "ValueError: a defect"),
    ],
)
async def test_how_it_ends_and_its_last_words_are_its_own(tmp_path: Path, argument: str, ended: str, last: str) -> None:
    async with rig(tmp_path, argument) as supervisor:
        assert (await supervisor.until(lambda server, ended: bool(server and ended)))[1] == ended
    assert _oldest_log(tmp_path).splitlines()[-1] == last


async def test_what_begins_threads_when_it_is_imported_is_not_forked(tmp_path: Path) -> None:
    async with rig(tmp_path, "stay", preload="tests.unit.threaded") as supervisor:
        assert (await supervisor.said())[0] == 0
        facts = await supervisor.facts()
        assert facts["imported_by"] == facts["pid"]
