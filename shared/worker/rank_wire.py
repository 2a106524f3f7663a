"""What a worker and its rank processes say to each other, over two pairs of sockets that only they hold.

One carries batches, in order; the other calls of a rank's transport, many at a time. Messages are pickled: both ends
are one program, and nobody else has the sockets.
"""

import pickle
import socket
from dataclasses import dataclass, field
from typing import Any

from shared.engine.parallel.partition import Shard
from shared.engine.transfer.pools import RankPool

HEADER_BYTES = 8
Result = int | RankPool | list[int] | None


@dataclass(frozen=True, slots=True)
class Start:
    """What a rank is told first: the arguments of `load_executor`, where the ranks meet, and how patient they are."""

    settings: dict[str, Any]
    shard: Shard
    store_port: int
    timeout_s: float
    name: str
    log_level: str


@dataclass(frozen=True, slots=True)
class Here:
    """A rank is about to meet the others."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A rank has loaded its share of the model, and has so many pages."""

    num_pages: int


@dataclass(frozen=True, slots=True)
class Open:
    """Make a transport called `transport` over the rank's pool; answered by a RankPool."""

    transport: str
    agent_name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A method of the rank's transport, its peers given as numbers."""

    number: int
    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for a call's result any more; it is answered all the same."""

    number: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned, or raised. `open_peers` are the connections that can be read from then on."""

    number: int
    result: Result = None
    error: Exception | None = None
    open_peers: frozenset[int] = field(default_factory=frozenset)


def send(channel: socket.socket, message: object) -> None:
    """Send one message. Raises OSError if the other end is gone, or does not take it within the socket's timeout."""
    channel.sendall(encode(message))


def encode(message: object) -> bytes:
    """A message as bytes: its length, and itself."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def receive(channel: socket.socket) -> Any:
    """The next message. Raises EOFError if the other end is gone, TimeoutError after the socket's timeout."""
    return decode(_exactly(channel, int.from_bytes(_exactly(channel, HEADER_BYTES), "little")))


def decode(body: bytes) -> Any:
    """The message in what follows its length."""
    return pickle.loads(body)


def _exactly(channel: socket.socket, num_bytes: int) -> bytes:
    parts, missing = [], num_bytes
    while missing:
        part = channel.recv(min(missing, 1 << 20))
        if not part:
            raise EOFError("the other end is gone")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
