"""Following the blackboard, through outages of Redis."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.gateway.directory import Directory, follow
from shared.blackboard.records import Registration, Role
from shared.errors import BlackboardLost

ROUTER = Registration(role=Role.ROUTER, name="router-0", epoch=1, pid=1, address="127.0.0.1:1")
Listing = Sequence[Registration] | BlackboardLost


class Board:
    """A blackboard that lists what a test says, one listing after the other, the last one for ever."""

    def __init__(self, *listings: Listing) -> None:
        self._listings = list(listings)
        self.exhausted = asyncio.Event()

    async def processes(self, *roles: Role) -> list[Registration]:
        listing = self._listings.pop(0) if len(self._listings) > 1 else self._listings[0]
        if len(self._listings) == 1:
            self.exhausted.set()
        if isinstance(listing, BlackboardLost):
            raise listing
        return list(listing)

    @asynccontextmanager
    async def changes(self) -> AsyncIterator["Board"]:
        yield self

    async def wait(self, timeout_s: float) -> bool:
        await asyncio.sleep(0.001)
        return True


@asynccontextmanager
async def following(directory: Directory, board: Any, ttl_ms: int) -> AsyncIterator[None]:
    task = asyncio.create_task(follow(board, directory, interval_ms=1, ttl_ms=ttl_ms))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_redis_that_lost_its_data_does_not_make_everybody_vanish() -> None:
    directory, board = Directory({}), Board([ROUTER], BlackboardLost("restarting"), [], [], [])
    async with following(directory, board, ttl_ms=60_000):
        await board.exhausted.wait()
        await asyncio.sleep(0.01)
        assert [router.name for router in directory.routers] == ["router-0"]


@pytest.mark.parametrize("listings", [([ROUTER], []), ([ROUTER], BlackboardLost("restarting"), [])])
async def test_who_does_not_register_again_is_gone(listings: tuple[Listing, ...]) -> None:
    directory = Directory({})
    async with following(directory, Board(*listings), ttl_ms=5), asyncio.timeout(10):
        await directory.changed(5)
        while directory.routers:
            await directory.changed(5)
