"""Keeping one process registered for as long as it lives."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration
from shared.errors import BlackboardLost, StaleEpoch

log = logging.getLogger(__name__)


async def await_epoch(board: Blackboard, name: str, interval_ms: int, stop: asyncio.Event) -> int | None:
    """The epoch of a process that starts; waits for Redis as long as it takes, and says so in the log.

    None once `stop` is set: a process that is told to end before it has begun does not wait.
    """
    while not stop.is_set():
        try:
            return await board.next_epoch(name)
        except BlackboardLost as fault:
            log.warning("waiting for the blackboard: %s", fault.message)
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_ms / 1000):
                await stop.wait()
    return None


class Heartbeat:
    """Registers a process every `interval_ms`, from `start` to `stop`.

    `describe` gives the registration of the moment. `on_index_lost` (workers) is awaited whenever Redis has no complete
    index of this incarnation, at first and after Redis lost its data: it writes the whole index. `on_replaced` is
    called if a newer incarnation of the same name has registered; the process should end then.
    """

    def __init__(
        self,
        board: Blackboard,
        describe: Callable[[], Registration],
        *,
        interval_ms: int,
        ttl_ms: int,
        on_replaced: Callable[[], None],
        on_index_lost: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._board, self._describe = board, describe
        self._interval_ms, self._ttl_ms = interval_ms, ttl_ms
        self._on_replaced, self._on_index_lost = on_replaced, on_index_lost
        self._wake = asyncio.Event()
        self._announce = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Register now and from now on."""
        self.announce()
        self._task = asyncio.create_task(self._run())

    def announce(self) -> None:
        """Register at once and tell everybody: the registration changed in a way that others must know (draining)."""
        self._announce = True
        self._wake.set()

    async def stop(self) -> None:
        """Register no more and remove the registration. Never raises for Redis: the registration expires anyway."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        with suppress(BlackboardLost):
            await self._board.deregister(self._describe())

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            announce, self._announce = self._announce, False
            try:
                await self._beat(announce)
            except BlackboardLost as fault:
                log.warning("could not register: %s", fault.message)
                self._announce |= announce
            except StaleEpoch as fault:
                log.error("%s", fault.message)
                self._on_replaced()
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_ms / 1000):
                    await self._wake.wait()

    async def _beat(self, announce: bool) -> None:
        complete = await self._board.register(self._describe(), self._ttl_ms, announce=announce)
        if not complete and self._on_index_lost is not None:
            await self._on_index_lost()
