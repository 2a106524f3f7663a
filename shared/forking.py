"""Children that are forked and not executed: whether this process may have any, and how to wait for one.

Of several threads a fork leaves one, and the locks of the others as they were. So who forks has one thread. Those that
numpy's BLAS begins with do not count: it ends them at a fork, and begins them anew when it needs them.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

TASKS = Path("/proc/self/task")
# Threads that ended are listed for a moment.
LOOKS, LOOK_AGAIN_S = 100, 0.01


class Child(Protocol):
    """A child of this process, forked or executed: that part of `subprocess.Popen` which does not tell them apart."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """None while it runs; then its exit status, or the signal that ended it as a negative number."""

    def wait(self, timeout: float | None = None) -> int:
        """The same once it has ended. Raises subprocess.TimeoutExpired after `timeout` seconds."""

    def send_signal(self, sig: int) -> None:
        """Unless it has ended."""

    def terminate(self) -> None:
        """SIGTERM."""

    def kill(self) -> None:
        """SIGKILL."""


class Forked:
    """Satisfies `Child` by a process id. Any thread may call it."""

    def __init__(self, pid: int) -> None:
        """Raises OSError where the system has no handles of processes."""
        self.pid = pid
        self.returncode: int | None = None
        self._handle = os.pidfd_open(pid)
        self._lock = threading.Lock()  # for a process id means another process once it has been waited for

    def poll(self) -> int | None:
        """See `Child.poll`."""
        with self._lock:
            if self.returncode is None:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if ended:
                    os.close(self._handle)
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """See `Child.wait`."""
        if (code := self.poll()) is not None:
            return code
        handle = os.dup(self._handle)  # another thread may learn of the end first, and close it
        try:
            waiting = select.poll()
            waiting.register(handle, select.POLLIN)
            if not waiting.poll(None if timeout is None else 1000 * timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        finally:
            os.close(handle)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, sig: int) -> None:
        """See `Child.send_signal`."""
        with self._lock:
            if self.returncode is None:
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        """See `Child.terminate`."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Child.kill`."""
        self.send_signal(signal.SIGKILL)


def can_wait() -> bool:
    """Whether there are handles of processes here, as `Forked` needs them."""
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def has_one_thread() -> bool:
    """Whether this process has one thread once it has forked. Linux."""
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    for _ in range(LOOKS):
        if len(list(TASKS.iterdir())) == 1:
            return True
        time.sleep(LOOK_AGAIN_S)
    return False
