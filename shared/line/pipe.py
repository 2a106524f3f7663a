"""A Unix socket that carries what is said on a line between two processes of one host (docs/decisions/0053).

The line's stream stays open beside it, says nothing, and is what the line lives by: pings on it notice a peer that has
stopped, and draining is as ever. The socket carries the messages that the stream would, each behind its length in four
bytes, lowest first. The first thing that its caller says there is a name, which the stream has in its metadata.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from shared.line.outbox import LONGEST_BYTES

log = logging.getLogger(__name__)

# Metadata of the stream: the name, in hexadecimal.
KEY = "x-forebay-pipe"
NAME_BYTES = 16
LENGTH_BYTES = 4
# The longest thing fits, with what is around it.
MAX_BYTES = LONGEST_BYTES + (64 << 10)


class Pipe(asyncio.Protocol):
    """One end. `ended` is done when nothing comes any more."""

    def __init__(self, on_name: "Callable[[Pipe, str], None] | None" = None) -> None:
        """`on_name` is for the end that is called: it is told the name."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_name = on_name
        self._hear: Callable[[bytes], None] | None = None
        self._unheard: list[bytes] = []
        self._came = bytearray()
        self._transport: Any = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    def listen(self, hear: Callable[[bytes], None]) -> None:
        """From now on call this with each message, at first with those that have come."""
        self._hear = hear
        unheard, self._unheard = self._unheard, []
        self._pass_on(unheard)

    def introduce(self) -> str:
        """Say a name, the first thing that a caller does, and return it."""
        name = secrets.token_bytes(NAME_BYTES)
        self._say(name)
        return name.hex()

    async def write(self, message: Message) -> None:
        """Send one message, when the other side is not behind; nothing if there is no other side any more."""
        await self._may_write.wait()
        self._say(message.SerializeToString())

    def write_now(self, message: Message) -> bool:
        """As `write` if the other side is not behind; whether it is not."""
        if not self._may_write.is_set():
            return False
        self._say(message.SerializeToString())
        return True

    def close(self) -> None:
        """End it, behind what was written."""
        self._transport.close()

    def _say(self, message: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(len(message).to_bytes(LENGTH_BYTES, "little") + message)

    def _pass_on(self, messages: Iterable[bytes]) -> None:
        """A peer that says what nobody can read is left, which ends the line."""
        try:
            for message in messages:
                self._take(message)
        except DecodeError as error:
            log.warning("what came over a pipe cannot be read: %s", error)
            self._transport.abort()

    def _take(self, message: bytes) -> None:
        if self._on_name is not None:
            on_name, self._on_name = self._on_name, None
            on_name(self, message.hex())
        elif self._hear is None:
            self._unheard.append(message)
        else:
            self._hear(message)

    # What the event loop calls --------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """It is open."""
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        """It is not any more."""
        self._may_write.set()
        if not self.ended.done():
            self.ended.set_result(None)

    def pause_writing(self) -> None:
        """The other side is behind."""
        self._may_write.clear()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        """Pass on what is complete."""
        self._came += data
        self._pass_on(self._complete())

    def _complete(self) -> Iterator[bytes]:
        at = 0
        while (begin := at + LENGTH_BYTES) <= len(self._came):
            end = begin + int.from_bytes(self._came[at:begin], "little")
            if end - begin > MAX_BYTES:
                raise DecodeError(f"a message of {end - begin} bytes")
            if end > len(self._came):
                break
            yield bytes(self._came[begin:end])
            at = end
        del self._came[:at]


class Pipes:
    """Those that other processes have opened to this one, each until its line claims it."""

    def __init__(self) -> None:
        self._named: dict[str, asyncio.Future[Pipe]] = {}

    def accept(self) -> Pipe:
        """The end of one that is being opened."""
        return Pipe(self._came)

    def _came(self, pipe: Pipe, name: str) -> None:
        future = self._future(name)
        if future.done():
            pipe.close()
            return
        future.set_result(pipe)
        pipe.ended.add_done_callback(lambda _ended: self._named.pop(name, None))

    async def claim(self, name: str, timeout_s: float) -> Pipe:
        """The pipe of this name; its caller opens it before the line. Raises TimeoutError."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._future(name)
        finally:
            self._named.pop(name, None)

    def close(self) -> None:
        """End those that nobody has claimed."""
        for future in list(self._named.values()):
            if future.done() and not future.cancelled():
                future.result().close()

    def _future(self, name: str) -> asyncio.Future[Pipe]:
        if name not in self._named:
            self._named[name] = asyncio.get_running_loop().create_future()
        return self._named[name]
