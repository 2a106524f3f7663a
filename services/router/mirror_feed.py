"""Keeps the mirror equal to the prefix index in Redis: follows its stream of changes, and reads sets that are in doubt.

While Redis is away the mirror stays as it is. When it is back every set is read again: changes may have been missed.
"""

import asyncio
import logging
import time

from services.router.fleet import Fleet
from services.router.mirror import Mirror
from shared.blackboard.index import MAX_WAIT_MS, IndexEvent, PrefixIndex
from shared.errors import BlackboardLost

log = logging.getLogger(__name__)

# Changes are taken together that come within this time: each worker writes twenty times a second at most.
GATHER_S = 0.02
RETRY_S = 0.5
AUDIT_S = 2.0


class MirrorFeed:
    """Belongs to one event loop; `ready` is set for good once every set has been read."""

    def __init__(self, index: PrefixIndex, fleet: Fleet, mirror: Mirror, *, audit_s: float = AUDIT_S) -> None:
        self._index, self._fleet, self._mirror = index, fleet, mirror
        self._position = b"0-0"
        self._audit_s, self._audit_at = audit_s, 0.0
        self._reading: asyncio.Task[tuple[list[IndexEvent], bytes]] | None = None
        self.ready = asyncio.Event()
        self.is_current = False
        """Whether the mirror follows the index at this moment."""

    async def run(self) -> None:
        """Feed until cancelled."""
        while True:
            try:
                self._position = await self._index.position()
                self._mirror.doubt()
                while True:
                    await self._feed()
            except BlackboardLost as fault:
                self.is_current = False
                log.warning("the mirror of the prefix index is not refreshed: %s", fault.message)
                await asyncio.sleep(RETRY_S)
            finally:
                await self._stop_reading()

    async def _feed(self) -> None:
        change = self._fleet.next_change
        self._mirror.track(self._fleet.incarnations())
        wanted = self._mirror.wanted()
        self._mirror.apply(await self._read(None if wanted else change))
        self._mirror.tidy()
        if wanted:
            name, epoch, cursor = wanted
            self._mirror.take((name, epoch), cursor, await self._index.part(name, epoch, cursor))
        else:
            self.is_current = True
            if self._fleet.is_known:
                self.ready.set()
            await self._audit()
            await asyncio.sleep(GATHER_S)

    async def _read(self, change: asyncio.Event | None) -> list[IndexEvent]:
        """Changes of the index that have come. If there are none they are waited for, unless something else is to be
        done: until the fleet has changed, too, which `change` tells, or it is time for another look at both."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._index.events(self._position, MAX_WAIT_MS))
        if change is None or not self._mirror.is_tidy:
            await asyncio.sleep(0)
        else:
            changed = asyncio.create_task(change.wait())
            await asyncio.wait({self._reading, changed}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        if not self._reading.done():
            return []
        reading, self._reading = self._reading, None
        events, self._position = reading.result()
        return events

    async def _stop_reading(self) -> None:
        if self._reading is not None:
            reading, self._reading = self._reading, None
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _audit(self) -> None:
        if time.monotonic() >= self._audit_at:
            self._audit_at = time.monotonic() + self._audit_s
            workers = self._fleet.incarnations()
            self._mirror.audit(dict(zip(workers, await self._index.numbers(workers), strict=True)))
