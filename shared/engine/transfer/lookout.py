"""When an owner looks for READs of its peers: often while there is something to do, ever less often while not.

NIXL tells nobody that a peer came; the owner has to look. But most of a lease's life nobody reads, through shared
memory READs after the first are done without the owner anyway, and each look takes 10 to 40 us from what the process
computes.
"""

import time
from collections.abc import Callable

# Looks are so far apart, and with nothing to do by a part of the time since there was, up to the last.
DELAY_S, QUIET_PART, QUIET_DELAY_S = 1e-3, 0.1, 20e-3
# A look that finds nothing takes up to 40 us of the processor, with all caches cold, and seldom more than this; one
# that moves bytes or sets up a connection takes more.
BUSY_LOOK_S = 60e-6


class Lookout:
    """Belongs to one thread. `clock` is of the kind of time.monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s = self._busy_at_s = clock()

    def serve(self, until_s: float, *, expects: bool) -> None:
        """Look until a time of the clock; somebody may come at any moment if one `expects` that."""
        self._until_s = until_s
        if expects:
            self._busy_at_s = self._clock()

    def pause_s(self) -> float | None:
        """How long to wait before the next look; None if there is to be none."""
        now_s = self._clock()
        if now_s >= self._until_s:
            return None
        return min(max(DELAY_S, (now_s - self._busy_at_s) * QUIET_PART), QUIET_DELAY_S)

    def looked(self, cpu_s: float) -> None:
        """A look took so much of the processor."""
        if cpu_s > BUSY_LOOK_S:
            self._busy_at_s = self._clock()
