"""Which router is asked: one after the other until one answers."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from protos.forebay.v1 import router_pb2_grpc
from services.gateway.directory import Directory
from shared import rpc
from shared.blackboard.records import Registration
from shared.errors import BlackboardLost, Cancelled, Draining, Fault, WorkerLost

log = logging.getLogger(__name__)

# Of a router: another one may do better, or this one in a moment. Cancelled is what a server tells that closes while it
# answers.
ROUTER_FAULTS = (WorkerLost, Draining, Cancelled, BlackboardLost)
# Streams of one worker come within this time, also where processors are short.
HERD_S = 0.05


class Routers:
    """Asks the routers of a directory."""

    def __init__(self, directory: Directory, channels: rpc.Channels) -> None:
        self._directory, self._channels = directory, channels
        self._turn = 0
        self._num_asked: Counter[str] = Counter()
        self._herds: dict[str, tuple[str, float]] = {}

    async def ask(self, method: Callable[[Any], Any], request: object, left: str = "") -> Any:
        """Raises the fault of the last one if none answers, and what is the request's own fault.

        The one with the fewest calls of ours to answer comes first, of equals a different one each time: one that has
        stopped holds up those who asked it before that shows, and nobody else.

        Streams that a worker has `left` alone come at the same moment, and all go to one router, of equals the same one
        for every gateway: it places each in view of the others, and reserves for all at once.
        """
        fault: Fault = WorkerLost("none is registered")
        for router in self._in_turn(left):
            stub = self._channels.stub(router_pb2_grpc.RouterServiceStub, router.address)
            self._num_asked[router.address] += 1
            if left:
                self._herds.setdefault(left, (router.address, time.monotonic()))
            try:
                return await rpc.call(method(stub), request)
            except ROUTER_FAULTS as error:
                log.info("router %s does not answer: %s", router.name, error.message)
                fault = error
            finally:
                self._num_asked[router.address] -= 1
                if not self._num_asked[router.address]:
                    del self._num_asked[router.address]
                self._herds.pop(left, None)
        raise fault

    def _in_turn(self, left: str) -> Sequence[Registration]:
        """All of them, the first to ask first."""
        routers = self._directory.routers
        if left:
            asked, since = self._herds.get(left, ("", 0.0))
            herd = asked if time.monotonic() - since < HERD_S else ""
            return sorted(routers, key=lambda r: (r.address != herd, self._num_asked[r.address], _draw(left, r.name)))
        self._turn = (self._turn + 1) % max(1, len(routers))
        in_turn = [*routers[self._turn :], *routers[: self._turn]]
        return sorted(in_turn, key=lambda router: self._num_asked[router.address])


def _draw(left: str, router: str) -> bytes:
    """A rendezvous hash (Thaler and Ravishankar, 1998): gateways agree without a word."""
    return blake2b(f"{left} {router}".encode(), digest_size=8).digest()
