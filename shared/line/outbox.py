"""What waits to be said on a line: all that is said in one turn of the event loop goes into one message, but for what
others wait for (docs/decisions/0060)."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")

# One message of a line is not longer than this, unless a single thing in it is: whoever has more to say, or to read,
# lets others come in between.
MAX_BYTES = 1 << 20
# A thing longer than this fits no message that gRPC takes (`rpc.MAX_MESSAGE_BYTES`).
LONGEST_BYTES = (64 << 20) - (64 << 10)
# On a line that was silent for so long there is nothing to gather, and what others wait for is written at once. A busy
# one gathers: whoever is written to is woken on the writer's own processor, mostly, and takes it.
SILENCE_S = 0.01


def _never(_message: object) -> bool:
    """A way to write that always has to wait."""
    return False


class Outbox(Generic[Message]):
    """Messages in the making. While one is being written the next one gathers what is said meanwhile."""

    def __init__(self, make: Callable[[], Message], clock: Callable[[], float] = time.monotonic) -> None:
        self._make, self._clock = make, clock
        self._spoken_at = -SILENCE_S
        self._waiting: deque[Message] = deque()
        self._num_bytes = 0
        self._num_written = 0
        self._is_writing = False
        self.write_now: Callable[[Message], bool] = _never
        """Writes a message if that takes no waiting, and says whether it did."""
        self._anything, self._progress = asyncio.Event(), asyncio.Event()
        self.last = 0
        """Number of the message that was added to last."""

    def add(self, num_bytes: int, fill: Callable[[Message], object], *, at_once: bool = False) -> None:
        """Have `fill` put something of so many bytes into the next message. That is written with all that is said in
        this turn of the event loop; `at_once`, after a silence and where it takes no waiting, without looking for more
        of it."""
        now = self._clock()
        at_once, self._spoken_at = at_once and now - self._spoken_at >= SILENCE_S, now
        if not self._waiting or self._num_bytes + num_bytes > MAX_BYTES:
            self._waiting.append(self._make())
            self._num_bytes = 0
            self.last += 1
        self._num_bytes += num_bytes
        fill(self._waiting[-1])
        while at_once and self._waiting and not self._is_writing and self.write_now(self._waiting[0]):
            self._waiting.popleft()
            self._note_written()
        if self._waiting:
            self._anything.set()

    async def written(self, number: int) -> None:
        """Wait until the message of this number is written."""
        while self._num_written < number:
            await self._progress.wait()

    async def run(self, write: Callable[[Message], Awaitable[None]]) -> None:
        """Write what is put, until cancelled. Raises what `write` raises."""
        while True:
            await self._anything.wait()
            self._anything.clear()
            while self._waiting:
                self._is_writing = True
                await write(self._waiting.popleft())
                self._is_writing = False
                self._note_written()

    def _note_written(self) -> None:
        self._num_written += 1
        self._progress.set()
        self._progress = asyncio.Event()
