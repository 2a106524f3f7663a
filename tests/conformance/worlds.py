"""What the transport tests run in: a reader with a pool of its own, and owners to read from, for each transport."""

import base64
import json
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import count

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
    shares_owners = True  # those that other tests have only read from; a test that stops its owner wants its own

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
        self.made_of = (seed, num_pages, page_bytes, env)
        self.was_only_read = True
        said = json.loads(next(line for line in self.process.stdout if line.startswith("{")))
        metadata = base64.b64decode(said["metadata"])
        self.pool = _pool(agent_name, metadata, said["address"], num_pages, page_bytes)

    def kill(self) -> None:
        self.was_only_read = False
        self.process.kill()
        self.process.communicate()

    def stop(self) -> None:
        self.was_only_read = False
        standstill.stop(self.process.pid)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def is_alive(self) -> bool:
        return self.process.poll() is None


class NixlOwners:
    """Processes that own pools. One that was only read from goes to the next world that wants its like: starting one
    takes longer than most tests do."""

    def __init__(self) -> None:
        self._idle: list[NixlOwner] = []
        self._numbers = count(1)

    def take(self, agent_name: str, seed: int, num_pages: int, page_bytes: int, env: Mapping[str, str]) -> NixlOwner:
        for owner in self._idle:
            if owner.made_of == (seed, num_pages, page_bytes, env):
                self._idle.remove(owner)
                return owner
        return self.new(agent_name, seed, num_pages, page_bytes, env)

    def new(self, agent_name: str, seed: int, num_pages: int, page_bytes: int, env: Mapping[str, str]) -> NixlOwner:
        return NixlOwner(f"{agent_name}-{next(self._numbers)}", seed, num_pages, page_bytes, env)

    def give_back(self, owner: NixlOwner) -> None:
        if owner.is_alive():
            self._idle.append(owner)
        else:
            owner.kill()

    def close(self) -> None:
        for owner in self._idle:
            owner.kill()


class NixlWorld(World):
    """NIXL as it comes, or bound to the UCX transports `tls`."""

    numbers = count(1)

    def __init__(self, owners: NixlOwners, tls: str = "") -> None:
        self.reads_need_owner = tls == "tcp"
        self._env = {"UCX_TLS": tls} if tls else {}
        self._shared = owners
        self._taken: list[NixlOwner] = []
        memory = HostMemory(NUM_PAGES, PAGE_BYTES)
        super().__init__(NixlTransport(memory, f"reader-{os.getpid()}-{next(self.numbers)}"), memory)

    def new_owner(self, agent_name: str, seed: int, num_pages: int, page_bytes: int) -> Owner:
        make = self._shared.take if self.shares_owners else self._shared.new
        self._taken.append(make(agent_name, seed, num_pages, page_bytes, self._env))
        return self._taken[-1]

    def close(self) -> None:
        for owner in self._taken:
            if not owner.was_only_read:
                owner.kill()
        self.reader.close()
        for owner in self._taken:
            if owner.was_only_read:
                self._shared.give_back(owner)


def _pool(agent_name: str, metadata: bytes, address: int, num_pages: int, page_bytes: int) -> RemotePool:
    return RemotePool(agent_name, metadata, address, num_pages, page_bytes, "DRAM", 0)
