"""Processes that tests start, forked of one that has imported what they run: to import is most of what they would do.

They are what `python -m MODULE` would make, children of the test's process, as `forebay up` has its services
(`cli.fork_server`); only that process has threads, so that what it forks them of is executed, once for each kind. Who
tests what it takes to be executed executes it. Where nothing can be forked, all are.
"""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from typing import IO

from cli import kin, plan
from cli.fork_server import PID_BYTES, Order, Preload
from cli.plan import ClusterOptions
from cli.process import ROOT, bound_to_me
from shared import forking
from shared.forking import Child, Forked

# What it may take to import everything on a busy machine.
ANSWER_S = 120.0


class Nursery:
    """What processes are forked of; it ends with this one."""

    def __init__(self, preload: Preload) -> None:
        self._turn, self._adoption = threading.Lock(), kin.Adoption()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(ANSWER_S)
        with theirs:
            self._process = preload.execute(theirs)
        atexit.register(self._end)

    def fork(self, order: Order, output: int) -> Child:
        """A child of this process that follows the order. Raises OSError."""
        with self._turn, self._adoption:
            socket.send_fds(self._channel, [order.encode()], [output])
            pid = int.from_bytes(self._channel.recv(PID_BYTES), sys.byteorder)
        if not pid:
            raise ChildProcessError(f"nothing was forked for {order}")
        return Forked(pid)

    def _end(self) -> None:
        self._channel.close()
        self._process.wait()


def start(engine: str, command: Sequence[str], output: "IO[bytes] | int") -> Child:
    """Start `python -m MODULE ARGUMENTS`, a service or the command line, for what computes by an engine. Its output
    goes to a file. It ends with this process. Raises OSError."""
    _, _, module, *arguments = command
    file = output if isinstance(output, int) else output.fileno()
    if forking.can_wait():
        return _nursery(engine).fork(Order(module, arguments, dict(os.environ), starts_gently=False), file)
    return subprocess.Popen(bound_to_me(command), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def run(engine: str, module: str, *arguments: str, timeout_s: float = 60.0) -> tuple[int, str]:
    """`start`, and wait for its end: its status, and all that it said. Raises subprocess.TimeoutExpired, and then has
    killed it."""
    with tempfile.TemporaryFile() as output:
        child = start(engine, [sys.executable, "-m", module, *arguments], output)
        try:
            status = child.wait(timeout_s)
        finally:
            child.kill()
        output.seek(0)
        return status, output.read().decode()


@cache
def _nursery(engine: str) -> Nursery:
    """That of the sim engine has no torch. In that of the other gateways and routers find it imported, too."""
    found = plan.preloads(ClusterOptions("", engine=engine)).values()
    environment = {name: value for preload in found for name, value in preload.environment.items()}
    return Nursery(Preload([*(name for preload in found for name in preload.modules), "cli.main"], environment))
