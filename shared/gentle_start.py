"""A process that is started beside others takes what they leave of the processor until it serves.

To start costs a second or more of a core, for which the clients of the others would wait. So whoever starts a process
may lower the share of its session first, on Linux by the nice value of its autogroup, which no privilege is needed to
raise again; the process does that when it serves. Elsewhere, and in containers with a share of their own, this changes
nothing.
"""

import asyncio
import os
from contextlib import suppress
from pathlib import Path

AUTOGROUP = Path("/proc/self/autogroup")
NICE = 10
# The kernel takes one change in 100 ms from the unprivileged, of all sessions together.
RETRY_S = 0.11
NUM_TRIES = 50


def begin() -> None:
    """Lower the share of this process's session, which it leads."""
    with suppress(OSError):
        AUTOGROUP.write_text(str(NICE))


async def over() -> None:
    """This process serves: give it its full share, if it leads a session whose share was lowered."""
    if os.getsid(0) != os.getpid():
        return
    with suppress(OSError):
        for _ in range(NUM_TRIES):
            if _restore():
                return
            await asyncio.sleep(RETRY_S)


def _restore() -> bool:
    """Whether the share is as it should be now. Raises OSError where there are no shares."""
    if AUTOGROUP.read_text().endswith(f" nice {NICE}\n"):
        with suppress(BlockingIOError):
            AUTOGROUP.write_text("0")
            return True
        return False
    return True
