"""HTTP connections on which the head of an answer goes out with what follows it.

uvicorn writes the one and then the other, and uvloop sends each at once: a client would be woken for the head, and then
again for the first token.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Connection(HttpToolsProtocol):
    """One client's."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(Joining(transport))


class Joining(asyncio.Transport):
    """A transport that keeps the head of an answer until something follows it, or until the turn of the event loop is
    over."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport, self._head = transport, b""

    def write(self, data: Any) -> None:
        """See `asyncio.WriteTransport`."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            asyncio.get_running_loop().call_soon(self._flush)
            return
        self._transport.write(data)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        """See `asyncio.BaseTransport`."""
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """See `asyncio.BaseTransport`."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See `asyncio.BaseTransport`."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """See `asyncio.ReadTransport`."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """See `asyncio.ReadTransport`."""
        self._transport.resume_reading()
