"""A process that has imported what services are made of, and becomes one as often as it is asked to.

`python -m services.decode` spends its first second or two on imports, and has the memory that they take to itself. A
fork of a process that has done them begins at once, and shares what neither of the two changes.

    forebay up ──fork──► fork server ──fork──► (ends at once) ──fork──► service

The service has lost its parent before it begins, and `forebay up` has taken it in (`forks.py`). So who starts it, ends
it, waits for it and takes it along is the same as of one that was executed, and a fork server may end at any time.

It is itself a fork of `forebay up`, or executed: `python -m cli.fork_server FD SUPERVISOR PRELOAD`.

Where there are threads a fork is not safe: locks of theirs stay taken. So a fork server has one thread, or does not
serve. Whatever has threads, an event loop, CUDA or NIXL begins in the service. decisions/0073 says more.
"""

import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from setproctitle import setproctitle

from cli import kin
from cli.process import ROOT
from shared import forking, gentle_start

MAX_ORDER_BYTES = 1 << 20
PID_BYTES = 4
GO = b"\1"
RUN = (".__main__", ".main")


@dataclass(frozen=True)
class Preload:
    """What a fork server imports, and what it adds to its environment first: some libraries look when they are loaded.

    Of a service that is its `__main__`, of the command line its `main`; they do nothing when they are imported.
    """

    modules: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def execute(self, channel: socket.socket) -> "subprocess.Popen[bytes]":
        """Start a fork server that serves this process over the channel, the other end of which stays here. Raises
        OSError."""
        command = [sys.executable, "-m", "cli.fork_server", str(channel.fileno()), str(os.getpid())]
        command.append(json.dumps(asdict(self)))
        environment = os.environ | self.environment
        return subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[channel.fileno()])


@dataclass(frozen=True)
class Order:
    """What to become: `python -m MODULE ARGUMENTS` in this environment, and whether with a small share of the processor
    at first (`shared.gentle_start`)."""

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    starts_gently: bool

    def encode(self) -> bytes:
        """As it is sent to a fork server, together with the file for its output."""
        return json.dumps(asdict(self)).encode()


def serve(channel: socket.socket, preload: Preload, root: Path, supervisor: int) -> NoReturn:
    """Be a fork server, and in what it forks, the service. It answers each order with a process id, 0 if there is none,
    and ends with the channel or with the supervisor."""
    setproctitle(f"forebay fork server: {' '.join(preload.modules)}")
    os.setsid()  # Ctrl-C is for the supervisor
    kin.end_with(supervisor)
    os.environ.update(preload.environment)
    os.chdir(root)
    sys.path.insert(0, str(root))
    if not prepare(preload.modules):
        os._exit(1)
    order, output = _next_order(channel, supervisor)
    _become(order, output)


def prepare(modules: Sequence[str]) -> bool:
    """Import them; whether this process can be forked then."""
    gc.disable()  # what is imported stays
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError:  # whoever needs it says so, when it is executed
        return False
    for name in modules:
        if name.endswith(RUN):
            del sys.modules[name]  # it is run, not imported, later
    gc.freeze()  # and is not looked through by those who are forked, which would copy it
    gc.enable()
    if forking.has_one_thread():
        return True
    sys.stderr.write("forebay starts its processes the slow way: what they import begins threads\n")
    return False


def _next_order(channel: socket.socket, supervisor: int) -> tuple[Order, int]:
    """Fork whatever is ordered. Returns in what was forked, with its order and the file for its output."""
    while True:
        said, files, _, _ = socket.recv_fds(channel, MAX_ORDER_BYTES, 1)
        if not said:
            os._exit(0)
        if _forked(channel):
            kin.end_with(supervisor)
            return Order(**json.loads(said)), files[0]
        os.close(files[0])


def _forked(channel: socket.socket) -> bool:
    """Fork twice, and say who was born; whether this is that one, which leads a session and is the supervisor's child.

    It goes on when the supervisor has been told of it, and ends if this process does not live to do so.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if not (middle := os.fork()):
            ours.close()
            channel.close()
            return _born(theirs)
        theirs.close()
        pid = ours.recv(PID_BYTES)
        os.waitpid(middle, 0)  # from now on the supervisor is its parent
        channel.send(pid or bytes(PID_BYTES))
        if pid:
            ours.send(GO)
    return False


def _born(parent: socket.socket) -> bool:
    try:
        if os.fork():
            os._exit(0)
    except OSError:
        os._exit(1)
    os.setsid()
    parent.send(os.getpid().to_bytes(PID_BYTES, sys.byteorder))
    if parent.recv(len(GO)) != GO:
        os._exit(1)
    return True


def _become(order: Order, output: int) -> NoReturn:
    """Run the service, and end as it does."""
    with open(os.devnull) as nothing:  # noqa: PTH123 - as the system has it, not as text
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(order.environment)
    setproctitle(f"python -m {order.module} {' '.join(order.arguments)}")
    if order.starts_gently:
        gentle_start.begin()
    sys.argv[1:] = order.arguments
    try:
        runpy.run_module(order.module, run_name="__main__", alter_sys=True)
    except SystemExit:
        raise
    except BaseException:  # without the frames of who forked it
        traceback.print_exc()
        sys.exit(1)
    sys.exit()


if __name__ == "__main__":
    file, number, said = sys.argv[1:]
    serve(socket.socket(fileno=int(file)), Preload(**json.loads(said)), ROOT, int(number))
