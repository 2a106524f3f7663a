"""Who is inside a worker, and what they take of it."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shared.blackboard.records import Room
from shared.errors import Draining


class Stay:
    """One request inside: prompt tokens that are to be computed for it, and pages of its own that it has or needs."""

    def __init__(self, request_id: str, num_tokens: int, num_pages: int, on_freed: Callable[[], None]) -> None:
        self.request_id, self.num_tokens, self.num_pages = request_id, num_tokens, num_pages
        self._on_freed = on_freed

    def cached(self, num_tokens: int, num_pages: int) -> None:
        """So much of it came out of the cache."""
        self.num_tokens = max(0, self.num_tokens - num_tokens)
        self.num_pages = max(0, self.num_pages - num_pages)

    def computed(self) -> None:
        """Its prompt needs no more computing."""
        if self.num_tokens:
            self.num_tokens = 0
            self._on_freed()


class Admission:
    """Counts the requests inside, and lets none in while draining."""

    def __init__(self) -> None:
        self.draining = False
        self.arrived: dict[str, tuple[int, int]] = {}
        """Requests that came since somebody last took these, with the prompt tokens and pages that they took."""
        self.on_freed: Callable[[], None] = lambda: None
        """Called whenever a request takes less, or leaves."""
        self.num_requests = 0
        """All that ever came."""
        self._inside: set[Stay] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_active(self) -> int:
        """Requests inside."""
        return len(self._inside)

    @contextmanager
    def request(self, request_id: str, num_tokens: int = 0, num_pages: int = 0) -> Iterator[Stay]:
        """The stay of one request. Raises Draining."""
        if self.draining:
            raise Draining("this worker is draining")
        stay = Stay(request_id, num_tokens, num_pages, self._freed)
        self.arrived[request_id] = num_tokens, num_pages
        self._inside.add(stay)
        self.num_requests += 1
        self._idle.clear()
        try:
            yield stay
        finally:
            self._inside.remove(stay)
            self._freed()
            if not self._inside:
                self._idle.set()

    def taken(self) -> Room:
        """What all that are inside take together."""
        return Room(
            sequences=len(self._inside),
            tokens=sum(stay.num_tokens for stay in self._inside),
            pages=sum(stay.num_pages for stay in self._inside),
        )

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False if that takes too long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _freed(self) -> None:
        self.on_freed()
