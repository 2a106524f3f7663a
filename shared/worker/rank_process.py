"""A rank process as its worker sees it: a follower of its steps, and a transport into its pool."""

import asyncio
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from shared import forking
from shared.engine.api import BatchItem
from shared.engine.transfer.api import Peer, RemotePool
from shared.engine.transfer.layout_plan import Slices
from shared.engine.transfer.pools import Member, RankPool
from shared.errors import Fault, TransferFailed, WorkerLost
from shared.forking import Child, Forked
from shared.worker import rank_wire
from shared.worker.config import WorkerConfig
from shared.worker.rank_wire import HEADER_BYTES, Answer, Call, Cancel, Open, Start

# What a rank may need beyond the time that a call itself was given.
ANSWER_GRACE_S = 10.0
END_S = 5.0
# A pass over as many pages as a chunk has.
CHECKSUMS_TIMEOUT_S = 5.0


class RankProcess:
    """Satisfies `parallel.executor.Follower`. Until `attach`, it belongs to the thread that starts it."""

    def __init__(self, rank: int, siblings: Sequence["RankProcess"] | None = None) -> None:
        """Execute it; or, given those that were forked before it, fork it."""
        self.rank = rank
        self._steps, steps = socket.socketpair()
        self._calls, calls = socket.socketpair()
        with steps, calls:
            self._process = _executed(steps, calls) if siblings is None else self._forked(siblings, steps, calls)

    def _forked(self, siblings: Sequence["RankProcess"], steps: socket.socket, calls: socket.socket) -> Child:
        if not (pid := os.fork()):
            from shared.worker import rank

            for each in (self, *siblings):  # their ends are the worker's alone, with which they close
                each._let_go()
            rank.run(steps, calls)
        return Forked(pid)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def begin(self, start: Start) -> None:
        """Tell it what to load."""
        self._steps.settimeout(start.timeout_s)
        rank_wire.send(self._steps, start)

    def hear(self, expected: type, timeout_s: float) -> Any:
        """Its next word. Raises the fault that it met instead, and WorkerLost if it ended or took too long."""
        patience_s = self._steps.gettimeout()
        self._steps.settimeout(timeout_s)
        try:
            said = rank_wire.receive(self._steps)
        except (EOFError, OSError) as error:
            raise WorkerLost(f"rank {self.rank} did not start: {error or type(error).__name__}") from None
        self._steps.settimeout(patience_s)
        if isinstance(said, Fault):
            raise said
        if not isinstance(said, expected):
            raise WorkerLost(f"rank {self.rank} said {said!r}")
        return said

    def follow(self, batch: Sequence[BatchItem]) -> None:
        """See `Follower.follow`."""
        rank_wire.send(self._steps, batch)

    def is_gone(self) -> bool:
        """See `Follower.is_gone`."""
        return self._process.poll() is not None

    async def attach(self, transport: str, agent_name: str, on_lost: Callable[[Fault], None]) -> Member:
        """Its pool, readable by peers, and the way to read into it. `on_lost` is told if the process ends."""
        remote = RankTransport(self, transport, agent_name, on_lost)
        await remote.start(self._calls)
        return Member(remote, await remote.open())

    def kill(self) -> None:
        """End it at once; its pool is gone, and the worker with it."""
        self._process.kill()

    def close(self) -> None:
        """End it: it does when the sockets close."""
        self._let_go()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
            return
        self._process.kill()
        self._process.wait()

    def _let_go(self) -> None:
        self._steps.close()
        self._calls.close()


def forked(config: WorkerConfig) -> list[RankProcess]:
    """The ranks of a worker but the first, forked of this process. None where that is not possible, or has more threads
    than one: what a fork may not have (decisions/0073) begins later."""
    if config.engine == "sim" or config.tensor_parallel == 1 or not forking.can_wait():
        return []
    from shared.worker import rank  # noqa: F401 - what they are made of, once for all

    made: list[RankProcess] = []
    if forking.has_one_thread():
        gc.freeze()  # to look through it would copy it
        for number in range(1, config.tensor_parallel):
            made.append(RankProcess(number, made))
    return made


def _executed(steps: socket.socket, calls: socket.socket) -> Child:
    command = [sys.executable, "-m", "shared.worker.rank", str(steps.fileno()), str(calls.fileno())]
    return subprocess.Popen(command, pass_fds=(steps.fileno(), calls.fileno()))


class RankPeer:
    """A peer's pool that a rank is connected to."""

    def __init__(self, pool: RemotePool, number: int) -> None:
        self.pool, self.number = pool, number
        self.is_open = True


class RankTransport:
    """Satisfies `Transport` by that of a rank process."""

    def __init__(self, rank: RankProcess, name: str, agent_name: str, on_lost: Callable[[Fault], None]) -> None:
        self.name, self.agent_name = name, agent_name
        self._rank, self._on_lost = rank, on_lost
        self._numbers = count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._peers: dict[int, RankPeer] = {}
        self._metadata = b""
        self._lost: Fault | None = None
        self._closing = False

    async def start(self, channel: socket.socket) -> None:
        """Begin to listen."""
        self._reader, self._writer = await asyncio.open_connection(sock=channel)
        self._listening = asyncio.create_task(self._listen())

    async def open(self) -> RankPool:
        """Have the transport made."""
        wanted = Open(self.name, self.agent_name)
        pool: RankPool = await self._answer(Call(next(self._numbers), "open", (wanted,)), ANSWER_GRACE_S)
        self._metadata = pool.pool.agent_metadata
        return pool

    def metadata(self) -> bytes:
        """See `Transport.metadata`."""
        return self._metadata

    def serve(self, seconds: float) -> None:
        """See `Transport.serve`."""
        self._tell(Call(next(self._numbers), "serve", (seconds,)))

    async def connect(self, pool: RemotePool, timeout_s: float, slices: Slices | None = None) -> RankPeer:
        """See `Transport.connect`."""
        number = next(self._numbers)
        try:
            await self._answer(Call(number, "connect", (pool, timeout_s, slices)), timeout_s)
        except BaseException:
            self._tell(Call(next(self._numbers), "disconnect", (number,)))
            raise
        peer = self._peers[number] = RankPeer(pool, number)
        return peer

    def disconnect(self, peer: Peer) -> None:
        """See `Transport.disconnect`."""
        if isinstance(peer, RankPeer) and peer.number in self._peers:
            del self._peers[peer.number]
            peer.is_open = False
            self._tell(Call(next(self._numbers), "disconnect", (peer.number,)))

    async def checksums(self, page_ids: Sequence[int]) -> list[int]:
        """See `Transport.checksums`."""
        call = Call(next(self._numbers), "checksums", (list(page_ids),))
        found: list[int] = await self._answer(call, CHECKSUMS_TIMEOUT_S)
        return found

    async def read(
        self, peer: Peer, remote: Sequence[int], local: Sequence[int], timeout_s: float, checksums: Sequence[int] = ()
    ) -> int:
        """See `Transport.read`."""
        if not isinstance(peer, RankPeer) or not peer.is_open:
            raise TransferFailed(f"the connection to {peer.pool.agent_name} was closed")
        arguments = (peer.number, list(remote), list(local), timeout_s, list(checksums))
        num_bytes: int = await self._answer(Call(next(self._numbers), "read", arguments), timeout_s)
        return num_bytes

    def close(self) -> None:
        """See `Transport.close`. The rank ends with its transport."""
        self._closing = True
        self._listening.cancel()
        self._writer.close()

    async def _answer(self, call: Call, timeout_s: float) -> Any:
        """What the rank answers. Cancelled, this waits until the rank is done with it; a rank that is late is ended,
        because only then it writes nothing any more."""
        if self._lost is not None:
            raise self._lost
        loop = asyncio.get_running_loop()
        future = self._pending[call.number] = loop.create_future()
        self._tell(call)
        ends_at, cancelled = loop.time() + timeout_s + ANSWER_GRACE_S, False
        while not future.done():
            try:
                _, late = await asyncio.wait([future], timeout=max(0.0, ends_at - loop.time()))
                if late:
                    self._rank.kill()
                    ends_at = loop.time() + ANSWER_GRACE_S
            except asyncio.CancelledError:
                cancelled = True
                self._tell(Cancel(call.number))
        if cancelled:
            future.exception()
            raise asyncio.CancelledError
        return future.result()

    def _tell(self, message: Call | Cancel) -> None:
        if not self._writer.is_closing():
            self._writer.write(rank_wire.encode(message))

    async def _listen(self) -> None:
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(HEADER_BYTES), "little")
                self._take(rank_wire.decode(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            self._lose()

    def _take(self, answer: Answer) -> None:
        for number, peer in self._peers.items():
            peer.is_open = peer.is_open and number in answer.open_peers
        future = self._pending.pop(answer.number, None)
        if future is None or future.done():
            return
        if answer.error is not None:
            future.set_exception(answer.error)
        else:
            future.set_result(answer.result)

    def _lose(self) -> None:
        self._lost = WorkerLost(f"rank {self._rank.rank} (process {self._rank.pid}) ended")
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self._lost)
        self._pending.clear()
        if not self._closing:
            self._on_lost(self._lost)
