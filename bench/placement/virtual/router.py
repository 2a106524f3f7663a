"""Routers in virtual time: the real fleet, mirror, expectations and policy, and a channel between them that is no
Redis."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import cast

from bench.placement.virtual.loop import now_s
from bench.placement.virtual.worker import EPOCH, MODEL
from services.router import policy
from services.router.candidate import Candidate, Query
from services.router.config import RouterConfig
from services.router.fleet import Fleet
from services.router.mirror import Mirror
from services.router.placements import Placements
from shared.blackboard.board import Blackboard
from shared.blackboard.index import IndexEvent, IndexPart
from shared.blackboard.placements import Placement, PlacementBoard
from shared.blackboard.records import Registration

NO_BOARD = cast("Blackboard", None)
MAX_PAGES = 1_000_000


class VirtualRouter:
    """One router; `run` must run for it to see reports and other routers' placements."""

    def __init__(self, config: RouterConfig, name: str, channel: "Channel") -> None:
        self._config, self._weights, self._mirror = config, config.weights(), Mirror(MAX_PAGES)
        heartbeat_ms, ttl_ms = config.heartbeat_ms, config.registration_ttl_ms
        self._fleet = Fleet(NO_BOARD, self._weights, heartbeat_ms=heartbeat_ms, ttl_ms=ttl_ms, clock=now_s)
        self._placements = Placements(self._fleet, cast("PlacementBoard", channel), name, now_s)

    def begin(self, reports: Iterable[Registration]) -> None:
        """See workers for the first time, with nothing cached."""
        self._fleet.observe(reports)
        workers = self._fleet.incarnations()
        self._mirror.track(workers)
        for worker in workers:
            self._mirror.take(worker, 0, IndexPart(complete=True, number=0, cursor=0, hashes=b""))

    async def run(self, reports: Mapping[str, Registration], phase: float) -> None:
        """Look at reports again and again, first after this part of a heartbeat; tell others and hear them."""
        hearing = asyncio.create_task(self._placements.run())
        try:
            await asyncio.sleep(phase * self._config.heartbeat_ms / 1000)
            while True:
                self._fleet.observe(reports.values())
                await asyncio.sleep(self._config.heartbeat_ms / 1000)
        finally:
            hearing.cancel()
            with suppress(asyncio.CancelledError):
                await hearing

    def apply(self, name: str, number: int, stored: bytes, removed: bytes) -> None:
        """The `number`-th change of what a worker has cached."""
        self._mirror.apply([IndexEvent(name, EPOCH, number, stored, removed)])
        self._mirror.tidy()

    def rank(self, query: Query, page_hashes: bytes) -> policy.Ranked:
        """Placements, the best first."""
        roster = self._fleet.roster(MODEL)
        stored = self._mirror.runs(page_hashes, roster.incarnations)
        expected = self._placements.expected(roster, page_hashes, stored)
        return policy.rank(query, self._fleet.table(roster, stored, expected), self._weights)

    def record(self, page_hashes: bytes, chosen: Candidate) -> None:
        """This one was chosen."""
        self._placements.record(page_hashes, chosen)


class Channel:
    """In the place of `PlacementBoard`, between routers of one process."""

    def __init__(self) -> None:
        self._ears: dict[str, asyncio.Queue[Sequence[Placement]]] = {}

    async def announce(self, router: str, placed: Sequence[Placement]) -> int:
        """Tell all others."""
        for name, ear in self._ears.items():
            if name != router:
                ear.put_nowait(placed)
        return len(self._ears)

    @asynccontextmanager
    async def listen(self, router: str) -> AsyncIterator["Heard"]:
        """Hear what others tell from now on."""
        self._ears[router] = asyncio.Queue()
        try:
            yield Heard(self._ears[router])
        finally:
            del self._ears[router]


class Heard:
    """What others tell, as it comes."""

    def __init__(self, ear: asyncio.Queue[Sequence[Placement]]) -> None:
        self._ear = ear

    async def wait(self, timeout_s: float) -> Sequence[Placement] | None:
        """What is told next; None if nothing is in time."""
        try:
            return await asyncio.wait_for(self._ear.get(), timeout_s)
        except TimeoutError:
            return None
