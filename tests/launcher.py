"""Processes of tests that run a module of this tree: forked, where that can be, of one that has imported what tests do.

`python -m services.router` spends nearly all of its first second on imports. So each process that runs tests forks a
fork server, as `forebay up` does (decisions/0073), before its first test: then it has no thread yet. What that forks is
a process of its own, and runs what `python -m` runs.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from cli.fork_server import Preload
from cli.forks import ForkServers
from cli.process import ProcessSpec, Running

MAINS = tuple(f"services.{service}.__main__" for service in ("gateway", "router", "prefill", "decode"))
NAME = "tests"


@dataclass(frozen=True, slots=True)
class Done:
    """How a process ended, and all that it said."""

    status: int
    said: str


class Launched:
    """A process that runs, and what it says."""

    def __init__(self, running: Running, said: asyncio.StreamReader) -> None:
        self.said, self._running = said, running
        self._ended = asyncio.ensure_future(running.wait())

    @property
    def pid(self) -> int:
        return self._running.pid

    def send_signal(self, signum: signal.Signals) -> None:
        """To a process that may have ended."""
        if not self._ended.done():
            os.kill(self.pid, signum)

    async def wait(self, timeout_s: float = 60.0) -> int:
        """Its status. Raises TimeoutError, and leaves it running."""
        return await asyncio.wait_for(asyncio.shield(self._ended), timeout_s)


class Launcher:
    """Starts processes. Made while this process has one thread."""

    def __init__(self) -> None:
        try:
            self._servers = ForkServers({NAME: Preload([name for name in MAINS if name in sys.modules])})
        except SystemExit as end:  # this is what was forked
            _end(end.code)

    def end(self) -> None:
        """Start no more."""
        self._servers.end()

    async def start(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Launched:
        """`python -m module arguments`; what it says, output and errors, can be read."""
        said, saying = os.pipe()
        command = (sys.executable, "-m", module, *arguments)
        try:
            running = await self._servers.launch(
                ProcessSpec(module, module, command, environment or {}, fork_server=NAME), saying
            )
        finally:
            os.close(saying)
        reader = asyncio.StreamReader()
        pipe = os.fdopen(said, "rb")
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        return Launched(running, reader)

    async def run(self, module: str, *arguments: str, timeout_s: float = 60.0) -> Done:
        """`start`, and wait for its end. Raises TimeoutError, and then has killed it."""
        process = await self.start(module, *arguments)
        try:
            async with asyncio.timeout(timeout_s):
                said = await process.said.read()
                return Done(await process.wait(), said.decode())
        finally:
            process.send_signal(signal.SIGKILL)


def _end(code: object) -> NoReturn:
    """End as Python would with SystemExit of that code; what the process that was forked would do at its end is not."""
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
