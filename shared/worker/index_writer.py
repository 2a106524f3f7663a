"""Telling the prefix index which pages are cached here."""

import asyncio
import logging

from shared.blackboard.board import Blackboard
from shared.engine.kv.store import KvStore
from shared.errors import BlackboardLost

log = logging.getLogger(__name__)


class IndexWriter:
    """Writes changes every `interval_ms`, and the whole index whenever Redis has no complete one."""

    def __init__(self, board: Blackboard, kv: KvStore, name: str, epoch: int, interval_ms: int, ttl_ms: int) -> None:
        self._board, self._kv = board, kv
        self._name, self._epoch, self._ttl_ms = name, epoch, ttl_ms
        self._interval_ms = interval_ms
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Write from now on."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write no more."""
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
            await asyncio.sleep(self._interval_ms / 1000)
            try:
                if not await self._update():
                    await self.replace()
            except BlackboardLost as fault:
                log.warning("the prefix index is out of date: %s", fault.message)
                await self._rewrite()

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
            await asyncio.sleep(self._interval_ms / 1000)
            try:
                await self.replace()
            except BlackboardLost:
                continue
            return
