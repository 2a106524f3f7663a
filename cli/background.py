"""`forebay up` in a process of its own, for as long as something else needs a cluster: a benchmark, a test."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cli import state
from cli.cluster import START_DEADLINE_S, StartFailed
from cli.process import ROOT, bound_to_me
from cli.state import RunState
from shared.forking import Child
from shared.models.store import default_cache

STOP_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Background:
    """A running cluster and its supervisor. `run` is the state when it became ready."""

    supervisor: Child
    run: RunState


# Starts a command in the checkout at a path, with its output in a file; it ends with this process.
Begin = Callable[[Sequence[str], Path, IO[bytes]], Child]


def execute(command: Sequence[str], root: Path, output: IO[bytes]) -> Child:
    """See `Begin`."""
    return subprocess.Popen(bound_to_me(command), cwd=root, stdout=output, stderr=subprocess.STDOUT)


@contextmanager
def cluster(
    *flags: str, start_deadline_s: float = START_DEADLINE_S, root: Path = ROOT, begin: Begin = execute
) -> Iterator[Background]:
    """A cluster started by `forebay up FLAGS` on ports of its own; stopped as by Ctrl-C afterwards. Its code is that of
    the checkout at `root`.

    Raises StartFailed if it does not come up, RuntimeError if it did not end well.
    """
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", "cli.main", "up", "--port", "0", *flags]
        supervisor = begin(command, root, output)
        try:
            yield Background(supervisor, _wait_until_ready(supervisor, output, start_deadline_s))
        finally:
            supervisor.send_signal(signal.SIGINT)
            try:
                code = supervisor.wait(STOP_DEADLINE_S)
            finally:
                supervisor.kill()
        if code != 0:
            raise RuntimeError(f"forebay up ended with {code}:\n{_text(output)}")


def cpu_s(running: Background) -> dict[str, float]:
    """CPU time by role so far, user and system (proc(5), fields 14 and 15 of stat)."""
    spent: dict[str, float] = {}
    for process in running.run.processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        spent[process.role] = spent.get(process.role, 0.0) + seconds
    return spent


def _wait_until_ready(supervisor: Child, output: IO[bytes], deadline_s: float) -> RunState:
    end = time.monotonic() + deadline_s
    while True:
        run = state.read(default_cache(), supervisor.pid)
        if run is not None and run.url:
            return run
        if supervisor.poll() is not None:
            raise StartFailed(_text(output))
        if time.monotonic() > end:
            raise StartFailed(f"not ready after {deadline_s:g} s:\n{_text(output)}")
        time.sleep(0.05)


def _text(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace").strip()
