"""What is done to a cluster: processes are killed, stopped, told to end, and all of them come back."""

import asyncio
import random
import signal
from collections import Counter
from contextlib import suppress

from tests.e2e.cluster import RunningCluster

# Workers are hit more often than what there is one of.
TARGETS = ("decode-0", "decode-1", "prefill-0", "prefill-1") * 3 + ("router-0", "router-1", "blackboard")
STOPPED_S = (0.2, 4.0)
PAUSE_S = (0.5, 2.5)


class Faults:
    """Hits one process after another until cancelled; `restarts` counts what should have been started again."""

    def __init__(self, cluster: RunningCluster, chance: random.Random) -> None:
        self._cluster, self._chance = cluster, chance
        self.done: Counter[str] = Counter()
        self.restarts: Counter[str] = Counter()

    async def run(self) -> None:
        """Hit, wait, hit. A process is left alone until it serves again."""
        while True:
            await asyncio.sleep(self._chance.uniform(*PAUSE_S))
            name = self._chance.choice(TARGETS)
            if self._cluster.pid(name) is None:
                continue
            with suppress(ProcessLookupError):
                await self._hit(name, self._chance.choice(("kill", "kill", "end", "stop")))

    async def _hit(self, name: str, what: str) -> None:
        if what == "stop" and not name.startswith("blackboard"):
            pid = self._cluster.signal(name, signal.SIGSTOP)
            try:
                await asyncio.sleep(self._chance.uniform(*STOPPED_S))
            finally:
                if self._cluster.pid(name) == pid:
                    self._cluster.signal(name, signal.SIGCONT)
        elif what == "end" and not name.startswith("blackboard"):
            self.restarts[name] += 1
            await self._gone(name, self._cluster.signal(name, signal.SIGTERM))
        else:
            self.restarts[name] += 1
            await self._gone(name, self._cluster.kill(name))
        self.done[f"{what} {name.rpartition('-')[0] or name}"] += 1

    async def _gone(self, name: str, pid: int) -> None:
        """Wait until the supervisor has noticed."""
        async with asyncio.timeout(30):
            while self._cluster.pid(name) == pid:  # noqa: ASYNC110 - the supervisor tells by a file
                await asyncio.sleep(0.05)
