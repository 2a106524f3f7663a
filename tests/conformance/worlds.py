"""What the transport tests run in: a reader with a pool of its own, and owners to read from, for each transport."""

import base64
import json
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping

from shared.engine.kv.memory import HostMemory
from shared.engine.transfer.api import RemotePool, Transport
from shared.engine.transfer.local import LocalTransport
from shared.engine.transfer.nixl import NixlTransport
from tests import standstill

NUM_PAGES, PAGE_BYTES = 24, 200_000


def fill(memory: HostMemory, seed: int) -> None:
    """Fill each page with a byte of its own."""
    for page_id in range(memory.num_pages):
        memory.page(page_id)[:] = bytes([page_byte(seed, page_id)]) * memory.page_bytes


def page_byte(seed: int, page_id: int) -> int:
    return (seed * 31 + page_id * 7) % 250 + 1


class Owner(ABC):
    """A process, or a stand-in for one, with a pool that is filled by `fill`."""

    pool: RemotePool

    @abstractmethod
    def kill(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def resume(self) -> None: ...

    @abstractmethod
    def is_alive(self) -> bool: ...


class World(ABC):
    """`reads_need_owner`: whether an owner that is stopped can hold up a read from it."""

    reads_need_owner = True

    def __init__(self, reader: Transport, memory: HostMemory) -> None:
        self.reader, self.memory = reader, memory
        self.owners: list[Owner] = []

    @abstractmethod
    def new_owner(self, agent_name: str, seed: int, num_pages: int, page_bytes: int) -> Owner: ...

    def owner(self, agent_name: str, seed: int = 1, num_pages: int = NUM_PAGES, page_bytes: int = PAGE_BYTES) -> Owner:
        self.owners.append(self.new_owner(agent_name, seed, num_pages, page_bytes))
        return self.owners[-1]

    def bytes_of(self, page_id: int) -> set[int]:
        """The different bytes in one of the reader's pages."""
        return set(bytes(self.memory.page(page_id)))

    def close(self) -> None:
        for owner in self.owners:
            owner.kill()
        self.reader.close()


class LocalOwner(Owner):
    def __init__(self, agent_name: str, memory: HostMemory, hub: dict[str, LocalTransport]) -> None:
        self.memory = memory
        self.transport = LocalTransport(memory, agent_name, hub)
        self.pool = _pool(agent_name, self.transport.metadata(), memory.address, memory.num_pages, memory.page_bytes)

    def kill(self) -> None:
        self.transport.close()

    def stop(self) -> None:
        self.transport.answer(False)

    def resume(self) -> None:
        self.transport.answer(True)

    def is_alive(self) -> bool:
        return True


class LocalWorld(World):
    def __init__(self) -> None:
        memory = HostMemory(NUM_PAGES, PAGE_BYTES)
        self.hub: dict[str, LocalTransport] = {}
        super().__init__(LocalTransport(memory, "reader", self.hub), memory)

    def new_owner(self, agent_name: str, seed: int, num_pages: int, page_bytes: int) -> Owner:
        memory = HostMemory(num_pages, page_bytes)
        fill(memory, seed)
        return LocalOwner(agent_name, memory, self.hub)


class NixlOwner(Owner):
    def __init__(self, agent_name: str, seed: int, num_pages: int, page_bytes: int, env: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "tests.conformance.nixl_peer", agent_name]
        self.process = subprocess.Popen(
            [*command, str(num_pages), str(page_bytes), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        assert self.process.stdout is not None
        said = json.loads(next(line for line in self.process.stdout if line.startswith("{")))
        metadata = base64.b64decode(said["metadata"])
        self.pool = _pool(agent_name, metadata, said["address"], num_pages, page_bytes)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> None:
        standstill.stop(self.process.pid)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def is_alive(self) -> bool:
        return self.process.poll() is None


class NixlWorld(World):
    """NIXL as it comes, or bound to the UCX transports `tls`."""

    def __init__(self, tls: str = "") -> None:
        self.reads_need_owner = tls == "tcp"
        self.env = {"UCX_TLS": tls} if tls else {}
        memory = HostMemory(NUM_PAGES, PAGE_BYTES)
        super().__init__(NixlTransport(memory, f"reader-{os.getpid()}"), memory)

    def new_owner(self, agent_name: str, seed: int, num_pages: int, page_bytes: int) -> Owner:
        return NixlOwner(agent_name, seed, num_pages, page_bytes, self.env)


def _pool(agent_name: str, metadata: bytes, address: int, num_pages: int, page_bytes: int) -> RemotePool:
    return RemotePool(agent_name, metadata, address, num_pages, page_bytes, "DRAM", 0)
