"""A process that is stopped from outside, and has stopped when the test goes on."""

import os
import signal
import time
from pathlib import Path

DEADLINE_S = 10.0


def stop(pid: int) -> None:
    """SIGSTOP. The signal alone is only sent by then: on a busy machine a thread may still do something."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + DEADLINE_S
    while not all(map(_stands_still, Path(f"/proc/{pid}/task").iterdir())):
        assert time.monotonic() < end, f"{pid} does not stop"
        time.sleep(0.001)


def _stands_still(thread: Path) -> bool:
    """By its state (proc(5), field 3 of stat); one that has ended meanwhile does."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return True
