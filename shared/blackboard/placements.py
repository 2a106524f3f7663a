"""What routers tell each other of: where they have just placed prompts. Hints, which may be lost; nothing is stored."""

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from shared.blackboard import keys
from shared.blackboard.connection import faults
from shared.blackboard.records import Record
from shared.errors import BlackboardLost

log = logging.getLogger(__name__)


class Placement(Record):
    """One prompt. `computing` and `decode` are names and epochs of workers; `marks` are page hashes here and there in
    it, as the router chooses them, in hex. It takes `prefill_ms` to compute, from when it is its turn."""

    computing: tuple[str, int]
    decode: tuple[str, int]
    prefill_ms: float
    marks: str = ""


class Announcement(Record):
    """Placements of one router, in order. None of them: it has just begun to listen."""

    router: str
    placed: tuple[Placement, ...]


class PlacementBoard:
    """All methods raise BlackboardLost."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def announce(self, router: str, placed: Sequence[Placement]) -> int:
        """Tell whoever listens; how many do, routers themselves among them."""
        with faults():
            said = Announcement.model_construct(router=router, placed=tuple(placed))
            return int(await self._redis.publish(keys.PLACEMENTS, said.model_dump_json()))

    @asynccontextmanager
    async def listen(self, router: str) -> AsyncIterator["Heard"]:
        """Hear other routers while inside."""
        pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            with faults():
                await pubsub.subscribe(keys.PLACEMENTS)
                await pubsub.get_message(timeout=None)  # its confirmation: from here on nothing is missed
            yield Heard(pubsub, router)
        finally:
            # A fault here would take the place of a cancellation, and the task that was cancelled would go on.
            with suppress(BlackboardLost), faults():
                await pubsub.aclose()  # type: ignore[no-untyped-call]


class Heard:
    """What other routers say."""

    def __init__(self, pubsub: PubSub, router: str) -> None:
        self._pubsub, self._router = pubsub, router

    async def wait(self, timeout_s: float) -> Sequence[Placement] | None:
        """What another router placed, or nothing if it only said that it is there; None if none spoke in time. Raises
        BlackboardLost."""
        end = time.monotonic() + timeout_s
        with faults():
            while (left := end - time.monotonic()) > 0:
                if message := await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=left):
                    said = _parse(message["data"])
                    if said and said.router != self._router:
                        return said.placed
        return None


def _parse(raw: bytes) -> Announcement | None:
    try:
        return Announcement.model_validate_json(raw)
    except ValidationError as error:
        log.warning("an announcement of placements is malformed: %s", error)
        return None
