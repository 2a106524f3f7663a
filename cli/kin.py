"""Who ends with whom, and who takes orphans in (prctl(2), Linux)."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def end_with(parent: int) -> None:
    """End this process (SIGTERM) when its parent does, however it ends. Ends it now if that has happened."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the supervisor is gone")


class Adoption:
    """While any code is in it, descendants of this process whose parent ends become its children. Raises OSError."""

    def __init__(self) -> None:
        self._num_inside = 0

    def __enter__(self) -> None:
        self._num_inside += 1
        _prctl(PR_SET_CHILD_SUBREAPER, 1)

    def __exit__(self, *_: object) -> None:
        self._num_inside -= 1
        if not self._num_inside:
            _prctl(PR_SET_CHILD_SUBREAPER, 0)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
