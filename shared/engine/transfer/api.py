"""Moving pages between processes by one-sided READ. `nixl.py` and `local.py` are twins behind this protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.engine.kv.memory import PoolMemory


@dataclass(frozen=True, slots=True)
class RemotePool:
    """A peer's pool as the peer described it (PoolShard on the wire)."""

    agent_name: str
    agent_metadata: bytes
    base_address: int
    num_pages: int
    page_bytes: int
    memory_kind: str
    device_id: int


class Peer(Protocol):
    """A connected remote pool."""

    pool: RemotePool


class Transport(Protocol):
    """One agent of this process, with this process's pool registered for its whole life."""

    name: str
    agent_name: str

    def metadata(self) -> bytes:
        """What a peer needs in order to connect."""

    def connect(self, pool: RemotePool) -> Peer:
        """Make a peer's pool readable. Raises TransferFailed (garbage metadata, unreachable) or Incompatible."""

    def disconnect(self, peer: Peer) -> None:
        """Forget a peer; unknown peers are ignored."""

    async def read(self, peer: Peer, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> int:
        """Read the peer's pages `remote` into our pages `local`, in order; return bytes moved.

        When this returns or raises, cancellation included, no byte will be written to the local pages any more: that
        is what makes it safe to free them. Raises BadManifest for a page id outside either pool, TransferFailed if
        the peer is gone, DeadlineExceeded after `timeout_s`.
        """

    def close(self) -> None:
        """End the agent. The pool stays where it is."""


def transport(name: str, memory: PoolMemory, agent_name: str) -> Transport:
    """The transport called `name` ("nixl" or "local") over `memory`."""
    if name == "nixl":
        from shared.engine.transfer.nixl import NixlTransport

        return NixlTransport(memory, agent_name)
    from shared.engine.transfer.local import LocalTransport

    return LocalTransport(memory, agent_name)
