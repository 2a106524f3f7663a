"""A rank of a worker but the first: forked of the worker, or `python -m shared.worker.rank FD FD`, started by it.

It computes the batches that it is sent, and moves pages into its own pool when told to. It ends with its worker: when
the sockets close, at whatever moment.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from shared import telemetry
from shared.engine.executor import TorchExecutor, load_executor
from shared.engine.parallel import distributed
from shared.engine.transfer.api import Peer, Transport
from shared.engine.transfer.pools import RankPool, own_pool
from shared.engine.transfer.registry import transport
from shared.errors import Fault, Internal, TransferFailed
from shared.worker import rank_wire
from shared.worker.rank_wire import HEADER_BYTES, Answer, Call, Cancel, Here, Open, Ready, Result, Start

log = logging.getLogger(__name__)


class Calls:
    """Answers the calls of the worker, in a thread with an event loop of its own."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._executor: TorchExecutor | None = None
        self._transport: Transport | None = None
        self._peers: dict[int, Peer] = {}
        self._running: dict[int, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Listen, and end the process when the worker is gone."""
        threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True).start()

    def move_pages_of(self, executor: TorchExecutor) -> None:
        """From now on there is a pool."""
        self._executor = executor

    async def _run(self) -> None:
        reader, self._writer = await asyncio.open_connection(sock=self._channel)
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                size = int.from_bytes(await reader.readexactly(HEADER_BYTES), "little")
                self._take(rank_wire.decode(await reader.readexactly(size)))
        os._exit(0)  # the worker is gone; whatever is being computed is for nobody

    def _take(self, message: Call | Cancel) -> None:
        match message:
            case Call(number):
                self._running[number] = asyncio.create_task(self._answer(message))
            case Cancel(number) if number in self._running:
                self._running[number].cancel()

    async def _answer(self, call: Call) -> None:
        result: Result = None
        error: Fault | None = None
        try:
            result = await self._do(call)
        except asyncio.CancelledError:
            error = TransferFailed("cancelled")
        except Exception as raised:
            error = raised if isinstance(raised, Fault) else Internal(f"{type(raised).__name__}: {raised}")
        del self._running[call.number]
        usable = frozenset(number for number, peer in self._peers.items() if peer.is_open)
        self._writer.write(rank_wire.encode(Answer(call.number, result, error, usable)))

    async def _do(self, call: Call) -> Result:
        if call.method == "open":
            return self._open(*call.arguments)
        if self._transport is None:
            raise Internal(f"a rank was asked to {call.method} before its transport was opened")
        match call.method, call.arguments:
            case "connect", (pool, timeout_s, slices):
                self._peers[call.number] = await self._transport.connect(pool, timeout_s, slices)
                return call.number
            case "read", (number, remote, local, timeout_s, checksums):
                return await self._transport.read(self._peers[number], remote, local, timeout_s, checksums)
            case "checksums", (page_ids,):
                return await self._transport.checksums(page_ids)
            case "disconnect", (number,):
                if number in self._peers:
                    self._transport.disconnect(self._peers.pop(number))
            case "serve", (seconds,):
                self._transport.serve(seconds)
        return None

    def _open(self, wanted: Open) -> RankPool:
        if self._executor is None:
            raise Internal("a rank was asked for its pool before it had one")
        self._transport = transport(wanted.transport, self._executor.memory, wanted.agent_name)
        return own_pool(self._transport, self._executor.memory, self._executor.layout)


def load(start: Start, steps: socket.socket) -> TorchExecutor:
    """Meet the other ranks, and load this one's share of the model. Raises a Fault if it cannot be loaded."""
    rank_wire.send(steps, Here())
    store = distributed.join_store(start.store_port, start.timeout_s)
    group = distributed.DistributedGroup(store, start.shard.rank, start.shard.num_ranks, start.timeout_s)
    executor = load_executor(**start.settings, shard=start.shard, group=group)
    rank_wire.send(steps, Ready(executor.spec.num_pages))
    return executor


def main(steps: socket.socket, channel: socket.socket) -> None:
    """Compute until the worker is gone, or a step fails: the worker ends then, too."""
    calls = Calls(channel)
    calls.start()
    start: Start = rank_wire.receive(steps)
    telemetry.log_as_json("rank", f"{start.name}/{start.shard.rank}", start.log_level)
    try:
        executor = load(start, steps)
    except Fault as fault:
        rank_wire.send(steps, fault)
        return
    calls.move_pages_of(executor)
    while True:  # nobody here asks what is chosen: on a GPU steps queue up, as many as the first rank lets on their way
        executor.launch(rank_wire.receive(steps))


def run(steps: socket.socket, channel: socket.socket) -> NoReturn:
    """Be a rank, and nothing else any more."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # the worker drains, and ranks compute until it has
            signal.signal(number, signal.SIG_IGN)
        main(steps, channel)
    except EOFError:
        status = 0
    except Exception:
        log.critical("the rank cannot go on", exc_info=True)
    finally:
        os._exit(status)  # without waiting for threads that may be in a collective or a READ


if __name__ == "__main__":
    run(*(socket.socket(fileno=int(argument)) for argument in sys.argv[1:3]))
