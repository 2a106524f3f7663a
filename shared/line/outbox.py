"""What waits to be said on a line: all that is said in one turn of the event loop goes into one message."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")

# One message of a line is not longer than this, unless a single thing in it is: whoever has more to say, or to read,
# lets others come in between.
MAX_BYTES = 1 << 20
# A thing longer than this fits no message that gRPC takes (`rpc.MAX_MESSAGE_BYTES`).
LONGEST_BYTES = (64 << 20) - (64 << 10)


class Outbox(Generic[Message]):
    """Messages in the making. While one is being written the next one gathers what is said meanwhile."""

    def __init__(self, make: Callable[[], Message]) -> None:
        self._make = make
        self._waiting: deque[Message] = deque()
        self._num_bytes = 0
        self._num_written = 0
        self._anything, self._progress = asyncio.Event(), asyncio.Event()
        self.last = 0
        """Number of the message that `put` named last."""

    def put(self, num_bytes: int) -> Message:
        """The message that something of so many bytes is to be added to."""
        if not self._waiting or self._num_bytes + num_bytes > MAX_BYTES:
            self._waiting.append(self._make())
            self._num_bytes = 0
            self.last += 1
            self._anything.set()
        self._num_bytes += num_bytes
        return self._waiting[-1]

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
                await write(self._waiting.popleft())
                self._num_written += 1
                self._progress.set()
                self._progress = asyncio.Event()
