"""Decode workers that this gateway lost a moment ago. Every question to a router says so: whichever router it is, it
places nothing there then, long before the worker's registration lapses."""

import time
from collections.abc import Callable, Sequence

from protos.forebay.v1 import kv_pb2

# As long as a registration lasts: afterwards nobody lists a dead worker any more.
RECENT_S = 2.0


class Losses:
    """Belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[tuple[str, int], tuple[float, kv_pb2.WorkerRef]] = {}

    def note(self, worker: kv_pb2.WorkerRef) -> None:
        """The connection to a worker broke, or was refused."""
        kept = kv_pb2.WorkerRef()
        kept.CopyFrom(worker)
        self._until[worker.worker_id, worker.epoch] = self._clock() + RECENT_S, kept

    def recent(self) -> Sequence[kv_pb2.WorkerRef]:
        """Those lost lately."""
        if self._until:
            now = self._clock()
            self._until = {key: lost for key, lost in self._until.items() if lost[0] > now}
        return [worker for _, worker in self._until.values()]
