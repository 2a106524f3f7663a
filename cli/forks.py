"""The fork servers of a supervisor, and the processes that they fork for it.

They are forks themselves, of a supervisor that has neither a thread nor an event loop yet, so what it has imported they
need not. One that ends, or does not answer, is not missed: what it would have forked is executed. If it has served, one
that is executed takes its place, once: that two ended so will have a reason.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Self

from cli import fork_server, kin
from cli.fork_server import PID_BYTES, Order, Preload
from cli.process import ROOT, ProcessSpec, Running, execute
from shared import forking
from shared.forking import Child

# What a fork server may take to answer. Its first answer comes when it has imported everything.
FIRST_ANSWER_S = 120.0
ANSWER_S = 10.0


class ForkServers:
    """Starts processes: forks them where it can. Made before the event loop within which it `launch`es."""

    def __init__(self, preloads: Mapping[str, Preload], answer_s: float = ANSWER_S) -> None:
        """Start a fork server for each, if there can be any here; `answer_s` is what one may take that has answered
        before. Does not return in what they fork, which ends by SystemExit."""
        self._adoption = kin.Adoption()
        self._servers: dict[str, ForkServer] = {}
        self._spare, self._answer_s = dict(preloads), answer_s
        for name, preload in preloads.items() if _can_fork() else ():
            self._servers[name] = ForkServer.forked(preload, list(self._servers.values()), answer_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pids(self) -> dict[str, int]:
        """Of those that are left."""
        return {name: server.pid for name, server in self._servers.items()}

    async def launch(self, spec: ProcessSpec, output: int) -> Running:
        """Start a process whose output goes to the file `output`. Raises OSError."""
        if server := self._servers.get(spec.fork_server):
            with self._adoption:
                pid = await server.fork(spec, output)
            if pid:
                return Forked(pid)
            self._servers.pop(spec.fork_server, server).end()
            process = await execute(spec, output)
            if server.has_served:
                asyncio.get_running_loop().call_soon(self._replace, spec.fork_server)
            return process
        return await execute(spec, output)

    def _replace(self, name: str) -> None:
        if preload := self._spare.pop(name, None):
            with suppress(OSError):
                self._servers[name] = ForkServer.executed(preload, self._answer_s)

    def end(self) -> None:
        """End them. What they forked lives on."""
        self._spare.clear()
        while self._servers:
            self._servers.popitem()[1].end()


class ForkServer:
    """One fork server, a child of this process."""

    def __init__(self, channel: socket.socket, process: Child, answer_s: float) -> None:
        self.has_served = False
        """Whether it has answered an order."""
        self._patience_s, self._answer_s, self._has_ended = FIRST_ANSWER_S, answer_s, False
        self._turn = asyncio.Lock()
        self._channel, self._process = channel, process
        self._channel.setblocking(False)

    @classmethod
    def forked(cls, preload: Preload, others: Sequence["ForkServer"], answer_s: float) -> "ForkServer":
        """A fork of this process, which has no thread, and has forked the others before."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        supervisor = os.getpid()
        if not (pid := os.fork()):
            for channel in (ours, *(each._channel for each in others)):
                channel.close()
            fork_server.serve(theirs, preload, ROOT, supervisor)
        theirs.close()
        return cls(ours, forking.Forked(pid), answer_s)

    @classmethod
    def executed(cls, preload: Preload, answer_s: float) -> "ForkServer":
        """One that imports everything itself. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            return cls(ours, preload.execute(theirs), answer_s)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def fork(self, spec: ProcessSpec, output: int) -> int:
        """The id of a process that runs what `spec` says and is now a child of this one; 0 if there is none. Not to be
        cancelled: there may be one."""
        _, _, module, *arguments = spec.command
        order = Order(module, arguments, os.environ | spec.environment, spec.starts_gently)
        async with self._turn:
            try:
                socket.send_fds(self._channel, [order.encode()], [output])
                return int.from_bytes(await self._answer(), sys.byteorder)
            except OSError:  # it is gone, or the order is too long
                return 0

    async def _answer(self) -> bytes:
        answer = asyncio.create_task(asyncio.get_running_loop().sock_recv(self._channel, PID_BYTES))
        _, late = await asyncio.wait([answer], timeout=self._patience_s)
        if late:
            self._process.kill()  # what it has forked and not told of ends then
        said = await answer
        self._patience_s, self.has_served = self._answer_s, bool(said)
        return said

    def end(self) -> None:
        """End it. An order that it has not answered is not followed."""
        if not self._has_ended:
            self._has_ended = True
            self._process.kill()
            self._process.wait()
        if not self._turn.locked():
            self._channel.close()


class Forked:
    """A child of this process that a fork server made."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """Its exit status, or the signal that ended it as a negative number, once somebody has waited for it."""
        self._handle = os.pidfd_open(pid)

    async def wait(self) -> int:
        """Its `returncode`. To be called once."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._handle, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._handle)
            os.close(self._handle)
        _, status = os.waitpid(self.pid, 0)  # noqa: ASYNC222 - it has ended
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _can_fork() -> bool:
    """Whether this process may be forked as it is, and children can be waited for whoever made them."""
    if not forking.can_wait() or len(list(forking.TASKS.iterdir())) > 1:
        return False
    try:
        with kin.Adoption():
            return True
    except OSError:
        return False
