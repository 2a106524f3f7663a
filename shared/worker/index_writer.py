"""Telling the prefix index which pages are cached here."""

import asyncio
import logging
from contextlib import suppress

from shared.blackboard.board import Blackboard
from shared.engine.kv.store import KvStore
from shared.errors import BlackboardLost

log = logging.getLogger(__name__)


class IndexWriter:
    """Writes changes, at most every `interval_ms`, and the whole index whenever Redis has no complete one.

    The first change after a pause is written half of that time later, with those that come behind it: it would only be
    in the way of the token that was chosen in the same step.
    """

    def __init__(self, board: Blackboard, kv: KvStore, name: str, epoch: int, interval_ms: int, ttl_ms: int) -> None:
        self._board, self._kv = board, kv
        self._name, self._epoch, self._ttl_ms = name, epoch, ttl_ms
        self._half_s = interval_ms / 2000
        self._changed = asyncio.Event()
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Write from now on, also what has changed before."""
        loop = asyncio.get_running_loop()
        self._changed.set()
        self._kv.on_events = lambda: _tell(loop, self._changed)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write no more."""
        self._kv.on_events = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def replace(self) -> None:
        """Write the whole index. Raises BlackboardLost."""
        async with self._lock:
            self._kv.drain_events()
            await self._board.index.replace(self._name, self._epoch, self._kv.hashes(), self._ttl_ms)

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.sleep(self._half_s)
            try:
                if not await self._update():
                    await self.replace()
            except BlackboardLost as fault:
                log.warning("the prefix index is out of date: %s", fault.message)
                await self._rewrite()
            await asyncio.sleep(self._half_s)

    async def _update(self) -> bool:
        async with self._lock:
            events = self._kv.drain_events()
            if not events:
                return True
            stored = [event.page_hash for event in events if event.stored]
            removed = [event.page_hash for event in events if not event.stored]
            return await self._board.index.update(self._name, self._epoch, stored, removed, self._ttl_ms)

    async def _rewrite(self) -> None:
        """Changes were lost on the way: try until the whole index is written."""
        while True:
            await asyncio.sleep(2 * self._half_s)
            try:
                await self.replace()
            except BlackboardLost:
                continue
            return


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop from any thread; a loop that is closed has nobody who waits."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)
