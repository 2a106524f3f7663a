"""Workers that a gateway could not reach: nothing is placed on them until they answer.

A worker that dies stays registered for two seconds. Whatever is placed on it meanwhile costs a refused connection and
another question to a router, and streams that have no other worker to go to would try it again and again. So a gateway
that asks again says whom it lost, and the router asks that worker itself: one that answers is trusted at once. Who is
wrong, cut off or lying takes nobody out for longer than a call takes, and is not listened to again for a while.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from protos.forebay.v1 import kv_pb2
from services.router.fleet import Fleet, Incarnation
from shared import healthcheck
from shared.errors import Fault

log = logging.getLogger(__name__)

Check = Callable[[str, int], Awaitable[None]]
"""Returns if the process at host:port serves, within milliseconds; else raises a Fault."""

CHECK_MS = 1_000
RETRY_S = 0.25
# One that is registered for so long after a doubt is alive, though it cannot be reached from here.
REGISTERED_S = 5.0
# One that is trusted again was doubted wrongly: what gateways say of it is not listened to for so long.
DEAF_S = 10.0


class Doubts:
    """Belongs to one event loop. Workers are asked while `run` runs."""

    def __init__(
        self,
        fleet: Fleet,
        check: Check = healthcheck.check,
        clock: Callable[[], float] = time.monotonic,
        retry_s: float = RETRY_S,
    ) -> None:
        self._fleet, self._check, self._clock, self._retry_s = fleet, check, clock, retry_s
        self._doubted: asyncio.Queue[Incarnation] = asyncio.Queue()
        self._deaf_until: dict[Incarnation, float] = {}

    def hear(self, lost: Iterable[kv_pb2.WorkerRef]) -> None:
        """A gateway's word on workers to which its connection broke or was refused."""
        for ref in lost:
            worker = ref.worker_id, ref.epoch
            if self._clock() >= self._deaf_until.get(worker, 0.0) and self._fleet.doubt(worker):
                log.info("%s, epoch %d, is doubted: a gateway lost it", *worker)
                self._doubted.put_nowait(worker)

    async def run(self) -> None:
        """Settle doubts until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(self._settle(await self._doubted.get()))

    async def _settle(self, worker: Incarnation) -> None:
        """Ask a worker, where it registered and not where the gateway says, until it answers or has gone."""
        give_up = self._clock() + REGISTERED_S
        while (address := self._fleet.address(worker)) and self._clock() < give_up:
            try:
                await self._check(address, CHECK_MS)
            except Fault:
                await asyncio.sleep(self._retry_s)
            else:
                break
        if self._fleet.trust(worker):
            now = self._clock()
            self._deaf_until = {other: until for other, until in self._deaf_until.items() if until > now}
            self._deaf_until[worker] = now + DEAF_S
            log.info("%s, epoch %d, is trusted again", *worker)
