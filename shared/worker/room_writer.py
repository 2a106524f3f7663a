"""Telling the blackboard what room this worker has."""

import asyncio
import logging
from contextlib import suppress

from shared.blackboard.admission import AdmissionBoard
from shared.blackboard.records import Room
from shared.engine.kv.store import KvStore
from shared.errors import BlackboardLost
from shared.worker.admission import Admission
from shared.worker.identity import Identity

log = logging.getLogger(__name__)


class RoomWriter:
    """Reports every `interval_ms`, and at once when room comes free that somebody may be waiting for.

    Nobody waits for a worker that, as far as the blackboard knows, is less than half full: then a report can wait, and
    costs nothing per request. What the blackboard knows is the last report and promises to all that have come since.
    """

    def __init__(
        self,
        board: AdmissionBoard,
        admission: Admission,
        kv: KvStore,
        identity: Identity,
        limits: Room,
        interval_ms: int,
        ttl_ms: int,
    ) -> None:
        self._board, self._admission, self._kv, self._identity = board, admission, kv, identity
        self._limits, self._interval_ms, self._ttl_ms = limits, interval_ms, ttl_ms
        self._reported = Room()
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Report from now on."""
        self._admission.on_freed = self.freed
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Report no more."""
        self._admission.on_freed = lambda: None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def freed(self) -> None:
        """Room came free here."""
        if self._may_look_full():
            self._woken.set()

    def _may_look_full(self) -> bool:
        known, arrived = self._reported, self._admission.arrived.values()
        return (
            2 * (known.sequences + len(arrived)) >= self._limits.sequences
            or 2 * (known.tokens + sum(num_tokens for num_tokens, _ in arrived)) >= self._limits.tokens
            or 2 * (known.pages + sum(num_pages for _, num_pages in arrived)) >= self._limits.pages
        )

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                await self._report()
            except BlackboardLost as fault:
                log.warning("room could not be reported: %s", fault.message)
                await asyncio.sleep(self._interval_ms / 1000)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_ms / 1000):
                    await self._woken.wait()

    async def _report(self) -> None:
        arrived, self._admission.arrived = self._admission.arrived, {}
        used = in_use(self._admission, self._kv)
        try:
            await self._board.report(
                self._identity.model,
                self._identity.name,
                self._identity.epoch,
                limits=self._limits,
                used=used,
                arrived=arrived,
                ttl_ms=self._ttl_ms,
            )
        except BlackboardLost:
            self._admission.arrived = arrived | self._admission.arrived
            raise
        self._reported = used


def in_use(admission: Admission, kv: KvStore) -> Room:
    """What a worker has at this moment. Outputs grow beyond what was reserved for them, and pages stay leased when who
    computed them has left."""
    taken, counts = admission.taken(), kv.counts()
    return taken.model_copy(update={"pages": max(taken.pages, counts.held + counts.leased)})
