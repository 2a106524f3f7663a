"""What is done to a cluster: processes are killed, stopped, told to end, and all of them come back."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cli.state import ProcessState
from tests.e2e.cluster import RunningCluster

KILL, END, STOP = "kill", "end", "stop"
STOPPED_S = (0.2, 4.0)
SERVES_AGAIN_S = 60.0


@dataclass(frozen=True)
class Done:
    """A fault. `until` is when a stopped process went on; for the others it is `at`. Both are unix times."""

    kind: str
    name: str
    at: float
    until: float

    @property
    def role(self) -> str:
        return self.name.rpartition("-")[0] or self.name


class Faults:
    """`done` is what was done; `restarts` counts what should have been started again."""

    def __init__(self, cluster: RunningCluster, chance: random.Random) -> None:
        self._cluster, self._chance = cluster, chance
        self.done: list[Done] = []
        self.restarts: Counter[str] = Counter()
        self.enough = asyncio.Event()
        self._at_work: set[str] = set()

    async def run(self, names: Sequence[str], kinds: Sequence[str], pause_s: tuple[float, float]) -> None:
        """Hit one process after another until it is `enough`. One that does not serve again yet is left alone."""
        while not await self._enough_after(self._chance.uniform(*pause_s)):
            name, kind = self._chance.choice(names), self._chance.choice(kinds)
            if name not in self._at_work and await self._serves(name):
                with suppress(ProcessLookupError):
                    await self.hit(name, kind)

    async def _enough_after(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.enough.wait(), seconds)
        return self.enough.is_set()

    async def hit(self, name: str, kind: str) -> None:
        """Do one thing to one process, and wait until it is done. Nobody else does anything to it meanwhile."""
        self._at_work.add(name)
        try:
            await self._hit(name, kind)
        finally:
            self._at_work.discard(name)

    async def _hit(self, name: str, kind: str) -> None:
        at = time.time()
        if kind == STOP:
            await self._stop(name)
        else:
            pid = self._cluster.signal(name, signal.SIGKILL if kind == KILL else signal.SIGTERM)
            self.restarts[name] += 1
            await self._gone(name, pid)
        self.done.append(Done(kind, name, at, time.time() if kind == STOP else at))

    async def _stop(self, name: str) -> None:
        pid = self._cluster.signal(name, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._chance.uniform(*STOPPED_S))
        finally:
            if self._cluster.pid(name) == pid:
                self._cluster.signal(name, signal.SIGCONT)

    async def _gone(self, name: str, pid: int) -> None:
        """Wait until the supervisor has noticed."""
        async with asyncio.timeout(SERVES_AGAIN_S):
            while self._cluster.pid(name) == pid:  # noqa: ASYNC110 - the supervisor tells by a file
                await asyncio.sleep(0.05)

    def bystanders(self) -> list[str]:
        """Processes that were started again more or less often than they were made to end, with what they said last."""
        return [
            f"{process.name}: {process.num_restarts} restarts, not {self.restarts[process.name]}; {_said(process)}"
            for process in self._cluster.state().processes
            if process.num_restarts != self.restarts[process.name]
        ]

    async def _serves(self, name: str) -> bool:
        return bool((await self._cluster.status())[name]["state"] == "serving")


def _said(process: ProcessState) -> str:
    """The last lines of every start of which there is a log."""
    logs = sorted(Path(process.log).parent.glob(f"{process.name}*.log"))
    return "\n".join([process.last_exit, *(f"{log.name}: {log.read_text()[-600:]}" for log in logs)])
