"""One supervised process: started, watched, started again when it dies, ended; its output goes to a log file."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shared import gentle_start

# Ends the process when its supervisor dies, however it dies (prctl PR_SET_PDEATHSIG, on Linux). A launcher,
# because code between fork and exec is unsafe in a process with threads.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the supervisor is gone")
if sys.argv[2] != "0":
    try:
        with open("/proc/self/autogroup", "w") as autogroup:
            autogroup.write(sys.argv[2])
    except OSError:
        pass
os.execvp(sys.argv[3], sys.argv[3:])
"""

# Long enough for those that relied on a process to have gone on elsewhere, for which they need the processor.
FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 10.0
# Where `python -m services.NAME` finds the services, installed or not.
ROOT = Path(__file__).resolve().parents[1]
# A process that ran this long was well: its next failure counts as the first. One that was made to end, and did not
# fail by itself, has shown sooner that it can run.
WELL_AFTER_S = 30.0
WELL_UNTIL_ENDED_S = 5.0
MADE_TO_END = (0, -signal.SIGTERM, -signal.SIGKILL)
# Logs of this many earlier starts are kept beside the current one.
NUM_OLD_LOGS = 4


@dataclass(frozen=True)
class ProcessSpec:
    """What to run. `name` is unique in a cluster. One that `starts_gently` ends that itself (`shared.gentle_start`).
    With a `fork_server` the command is that of a module (`python -m`), and that one forks it where it can."""

    role: str
    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    starts_gently: bool = False
    fork_server: str = ""


class Running(Protocol):
    """A child of this process. `returncode` is None while it runs; then its exit status or, negative, a signal."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def returncode(self) -> int | None:
        """See above."""

    async def wait(self) -> int:
        """Its `returncode`, when it has ended."""


# Starts a process whose output goes to a file; raises OSError.
Launch = Callable[[ProcessSpec, int], Awaitable[Running]]


async def execute(spec: ProcessSpec, output: int) -> Running:
    """Start a process whose output goes to the file `output`. Raises OSError if the command cannot be run."""
    return await asyncio.create_subprocess_exec(
        *bound_to_me(spec.command, gentle_start.NICE if spec.starts_gently else 0),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | spec.environment,
        cwd=ROOT,
        start_new_session=True,  # Ctrl-C reaches the supervisor alone, which then stops all in order
    )


class Supervised:
    """Runs one process until told to stop. `on_change` is called after each start and each end.

    `echo`, if given, gets each line of the output as well. Use it within one event loop.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        folder: Path,
        *,
        on_change: Callable[[], None] = lambda: None,
        echo: Callable[[str, str], None] | None = None,
        first_backoff_s: float = FIRST_BACKOFF_S,
        launch: Launch = execute,
    ) -> None:
        self.spec = spec
        self.num_starts = 0
        self.last_exit = ""
        self.died = asyncio.Event()
        """Set when the process has ended without being told to, at least once."""
        self._folder, self._on_change, self._echo = folder, on_change, echo
        self._first_backoff_s, self._launch = first_backoff_s, launch
        self._process: Running | None = None
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def num_restarts(self) -> int:
        """How often it was started again."""
        return max(0, self.num_starts - 1)

    @property
    def log_path(self) -> Path:
        """Output of the current start."""
        return self._folder / f"{self.spec.name}.log"

    async def start(self) -> None:
        """Start it, and keep it running from now on. Raises OSError if the command cannot be run."""
        starting = asyncio.create_task(self._spawn())
        self._task = asyncio.create_task(self._keep_running(starting))
        await asyncio.shield(starting)  # what has been started has to be known, if only to be stopped

    def signal(self, number: int) -> None:
        """Send a signal to it and, except for SIGTERM, to whatever it started."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                (os.kill if number == signal.SIGTERM else os.killpg)(self.pid, number)

    async def stop(self, grace_s: float) -> None:
        """End it by SIGTERM, or by SIGKILL after `grace_s`."""
        self._stopping.set()
        self.signal(signal.SIGTERM)
        if self._task is not None:
            _, late = await asyncio.wait([self._task], timeout=grace_s)
            if late:
                self.signal(signal.SIGKILL)
            await self._task

    def last_lines(self, number: int = 15) -> list[str]:
        """The end of its output."""
        with suppress(OSError):
            return self.log_path.read_text(errors="replace").splitlines()[-number:]
        return []

    async def _keep_running(self, starting: asyncio.Task[asyncio.Task[int]]) -> None:
        try:
            ended = await starting
        except OSError:  # which `start` tells
            return
        backoff_s = 0.0
        while True:
            started = time.monotonic()
            if self._stopping.is_set():  # while it was being started
                self.signal(signal.SIGTERM)
            self.last_exit = _describe(code := await ended)
            self._on_change()
            if self._stopping.is_set():
                return
            self.died.set()
            backoff_s = next_backoff(backoff_s, self._first_backoff_s, time.monotonic() - started, code)
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._stopping.wait()
                return
            ended = await self._spawn()

    async def _spawn(self) -> asyncio.Task[int]:
        rotate(self.log_path, NUM_OLD_LOGS)
        with ExitStack() as stack:
            log = stack.enter_context(self.log_path.open("wb"))
            lines, output = await _pipe(stack) if self._echo else (None, log.fileno())
            process = self._process = await self._launch(self.spec, output)
        self.num_starts += 1
        self._on_change()
        return asyncio.create_task(self._watch(process, lines))

    async def _watch(self, process: Running, lines: asyncio.StreamReader | None) -> int:
        if lines is not None and self._echo is not None:
            with self.log_path.open("ab") as log:
                async for line in lines:
                    log.write(line)
                    log.flush()
                    self._echo(self.spec.name, line.decode(errors="replace").rstrip())
        code = await process.wait()
        with suppress(ProcessLookupError, PermissionError):  # what it may have started and left
            os.killpg(process.pid, signal.SIGKILL)
        return code


async def _pipe(stack: ExitStack) -> tuple[asyncio.StreamReader, int]:
    """What reads lines from a pipe, and the end to write to, which is closed with `stack`."""
    read_end, write_end = os.pipe()
    stack.callback(os.close, write_end)
    reader = asyncio.StreamReader()
    pipe = os.fdopen(read_end, "rb", 0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader, write_end


def next_backoff(last_s: float, first_s: float, lived_s: float, code: int) -> float:
    """The wait, behind a wait of `last_s`, before a process is started again that lived so long and ended so."""
    was_well = lived_s > (WELL_UNTIL_ENDED_S if code in MADE_TO_END else WELL_AFTER_S)
    return first_s if was_well else min(max(first_s, 2 * last_s), LONGEST_BACKOFF_S)


def bound_to_me(command: Sequence[str], nice: int = 0) -> list[str]:
    """The command line that runs `command` and ends it (SIGTERM) when this process dies, however it dies. With a `nice`
    value, which is for the whole session, it must lead one of its own."""
    return [sys.executable, "-ISc", _LAUNCHER, str(os.getpid()), str(nice), *command]


def rotate(path: Path, num_kept: int) -> None:
    """Rename NAME.log to NAME.1.log, NAME.1.log to NAME.2.log and so on; the oldest is dropped."""
    for age in range(num_kept, 0, -1):
        older = path.with_suffix(f".{age}{path.suffix}")
        newer = path.with_suffix(f".{age - 1}{path.suffix}") if age > 1 else path
        if newer.exists():
            newer.replace(older)


def _describe(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"
