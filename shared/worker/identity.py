"""Who a worker is, and whether it takes work."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.errors import Draining, ModelNotFound, StaleEpoch


@dataclass(frozen=True, slots=True)
class Identity:
    """One incarnation of a worker."""

    name: str
    epoch: int
    model: str

    def require(self, epoch: int, model: str | None = None) -> None:
        """Raises StaleEpoch or ModelNotFound unless the caller means this incarnation and its model."""
        if epoch != self.epoch:
            raise StaleEpoch(f"{self.name} is at epoch {self.epoch}; the call was for epoch {epoch}")
        if model is not None and model != self.model:
            raise ModelNotFound(f"{self.name} serves {self.model!r}, not {model!r}", param="model")


class Admission:
    """Counts the requests inside, and lets none in while draining."""

    def __init__(self) -> None:
        self.draining = False
        self.num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """The stay of one request. Raises Draining."""
        if self.draining:
            raise Draining("this worker is draining")
        self.num_active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_active -= 1
            if not self.num_active:
                self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False if that takes too long."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
