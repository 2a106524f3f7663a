"""Where a running cluster keeps its logs and says what it consists of, so that other commands find it.

    CACHE/run/PID/        PID is the supervisor's
    ├── state.json        a RunState
    ├── sockets/          Unix sockets of its processes (`shared/local_sockets.py`)
    └── NAME.log          output of each process, earlier starts as NAME.1.log and so on

The directory goes when the cluster is stopped.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError


class ProcessState(BaseModel):
    """What the supervisor knows of one process. `pid` is None while it does not run."""

    role: str
    name: str
    pid: int | None
    num_restarts: int
    last_exit: str
    log: str


class RunState(BaseModel):
    """What the supervisor knows of its cluster. `url` is empty until the cluster is ready."""

    supervisor_pid: int
    started_unix_ms: int
    redis_url: str
    url: str = ""
    model: str = ""
    processes: list[ProcessState] = []


class RunDirectory:
    """The directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, cache: Path) -> "RunDirectory":
        """The directory of a cluster that this process starts. Those of supervisors that are gone are removed."""
        for other in _runs(cache):
            if not _lives(int(other.name)):
                shutil.rmtree(other, ignore_errors=True)
        path = cache / "run" / str(os.getpid())
        path.mkdir(parents=True, mode=0o700)
        return cls(path)

    @property
    def sockets(self) -> Path:
        """Where the cluster's processes have their Unix sockets; this user's alone."""
        path = self.path / "sockets"
        path.mkdir(exist_ok=True, mode=0o700)
        return path

    def write(self, state: RunState) -> None:
        """Replace the state; a reader sees the old one or the new one."""
        new = self.path / "state.json.new"
        new.write_text(state.model_dump_json(indent=2))
        new.replace(self.path / "state.json")

    def remove(self) -> None:
        """Remove it with all logs, and the directory of runs if no other is left."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self.path.parent.rmdir()


def find(cache: Path) -> RunState | None:
    """The cluster that runs on this machine, the newest if there are several; None if there is none."""
    return max(running(cache), key=lambda state: state.started_unix_ms, default=None)


def running(cache: Path) -> list[RunState]:
    """All clusters of this machine."""
    states = [read(cache, int(path.name)) for path in _runs(cache)]
    return [state for state in states if state and _lives(state.supervisor_pid)]


def read(cache: Path, supervisor_pid: int) -> RunState | None:
    """The cluster of one supervisor; None while it has not written its state."""
    try:
        return RunState.model_validate_json((cache / "run" / str(supervisor_pid) / "state.json").read_text())
    except (OSError, ValidationError):
        return None


def now_ms() -> int:
    """Unix time."""
    return time.time_ns() // 1_000_000


def _runs(cache: Path) -> list[Path]:
    return [path for path in (cache / "run").glob("*") if path.name.isdecimal()]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
