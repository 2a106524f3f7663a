"""Admission on the blackboard: room that workers report, promises of it, and the queue of those who wait for it.

The steps themselves are in `room.lua` and `admission.lua`, each of them atomic and one round trip.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from shared.blackboard import keys
from shared.blackboard.connection import faults
from shared.blackboard.records import Room
from shared.blackboard.together import Together
from shared.errors import BlackboardLost

_SCRIPT = "".join(Path(__file__).with_name(name).read_text() for name in ("room.lua", "admission.lua"))
# Classes are numbered from the highest priority; 0 is kept for those whose clients already have output.
MAX_PRIORITY = 100
# A promise that no worker took up lapses after this time; a router that gave no sign of life for that is passed over.
PROMISE_MS = 5_000
# Pages are kept for at most so many tokens of an output that has not begun.
ASSUMED_OUTPUT_TOKENS = 256
LEASE_MS = 2_000
# Before the names of a room's fields: of limits, of what is used, and of promises.
_KINDS = ("max_", "", "promised_")


class Need(NamedTuple):
    """What a request takes of one worker, besides a sequence: prompt tokens, if it is computed there, and pages."""

    name: str
    epoch: int
    tokens: int
    pages: int


class Pair(NamedTuple):
    """One way to serve a request: places of two workers in the list of needs. Without `prefill` the decode worker
    computes the prompt."""

    decode: int
    prefill: int | None = None


class Ask(NamedTuple):
    """A request that wants room. `cost` (tokens) is what its tenant's share pays for it; `remaining_ms` is None without
    a deadline; a `resumed` one, whose client has output already, goes before all others."""

    request_id: str
    model: str
    tenant: str = ""
    priority: int = 0
    cost: int = 1
    remaining_ms: int | None = None
    resumed: bool = False

    @property
    def klass(self) -> int:
        """Rank of its class, 0 first."""
        return 0 if self.resumed else 1 + MAX_PRIORITY - max(-MAX_PRIORITY, min(self.priority, MAX_PRIORITY))


@dataclass(frozen=True, slots=True)
class Placed:
    """Pair number `index` is reserved. `is_plenty`: its workers are less than half full even so, and nobody waits."""

    index: int
    is_plenty: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Parked:
    """The request waits in the queue; its router is told when there may be room."""

    position: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The queue is full (OVERLOADED), or longer than the request has time (DEADLINE)."""

    reason: str
    retry_ms: int


@dataclass(frozen=True, slots=True)
class NoneFits:
    """No pair of a partial list has room; nothing was changed."""


Verdict = Placed | Parked | Refused | NoneFits


@dataclass(frozen=True, slots=True)
class Account:
    """What a worker can have at once and what it has, as it reports, and what was promised to requests that are on
    their way to it. Zeros before the first report."""

    limits: Room
    used: Room
    promised: Room


class AdmissionBoard:
    """All methods are one round trip each, reservations of one moment one for all, and raise BlackboardLost."""

    def __init__(self, redis: Redis, timeout_s: float) -> None:
        self._redis = redis
        script = _SCRIPT.replace("'WAITER'", f"'{keys.WAITER}'").replace("'WAKE'", f"'{keys.WAKE}'")
        self._runs = Together(redis, script, timeout_s)

    async def close(self) -> None:
        """Close the connection of the script."""
        await self._runs.close()

    def reserve(
        self,
        ask: Ask,
        needs: Sequence[Need],
        pairs: Sequence[Pair],
        *,
        router: str,
        max_queued: int,
        is_partial: bool = False,
    ) -> Coroutine[Any, Any, Verdict]:
        """Reserve the first pair that has room on both workers, if it is this request's turn; else park it. Asked for
        at once, and before any withdrawal that is asked for later; to be awaited is the verdict.

        A request that is parked already keeps its place, also if another router has parked it. `is_partial`: there are
        more pairs; nothing is done if it is the request's turn and none of these has room.
        """
        remaining = -1 if ask.remaining_ms is None else max(0, ask.remaining_ms)
        args: list[str | int] = [
            "reserve",
            ask.request_id,
            router,
            ask.klass,
            ask.tenant,
            max(1, ask.cost),
            remaining,
            max_queued,
            LEASE_MS,
            PROMISE_MS,
            int(is_partial),
            " ".join([f"{need.tokens} {need.pages}" for need in needs]),
            " ".join([f"{decode + 1} {0 if prefill is None else prefill + 1}" for decode, prefill in pairs]),
        ]
        workers = [(need.name, need.epoch) for need in needs]
        return _judged(self._runs.run(_keys(ask.model, workers), args))

    def promise(self, request_id: str, model: str, needs: Sequence[Need], pair: Pair) -> Coroutine[Any, Any, bool]:
        """Write down what a request takes that is on its way to this pair already, whether there is room or not. If
        another router has parked it, it is served. Asked for at once, as a reservation is.

        To be awaited is whether its workers are less than half full even so, and nobody waits.
        """
        decode = needs[pair.decode]
        given = [decode] if pair.prefill is None else [decode._replace(tokens=0), needs[pair.prefill]]
        takes = " ".join([f"{need.tokens} {need.pages}" for need in given])
        workers = [(need.name, need.epoch) for need in given]
        return _told(self._runs.run(_keys(model, workers), ["promise", request_id, PROMISE_MS, takes]))

    async def withdraw(self, ask: Ask, router: str, workers: Iterable[tuple[str, int]]) -> None:
        """Take a request out of the queue, unless another router has it now, and back what these workers (name, epoch)
        were promised of it."""
        with faults():
            await self._runs.run(_keys(ask.model, workers), ["withdraw", ask.request_id, router])

    async def give_back(self, request_id: str, model: str, workers: Iterable[tuple[str, int]]) -> None:
        """End the promises of these workers (name, epoch) to a request that will not come to them."""
        await self.withdraw(Ask(request_id, model), "", workers)

    async def report(
        self, model: str, name: str, epoch: int, *, limits: Room, used: Room, arrived: Iterable[str], ttl_ms: int
    ) -> int:
        """A worker's own account, which takes the place of the last one. Requests in `arrived` are promised no longer:
        they are part of `used`, or over. Wakes the queue if there is more room. Returns the queue's length."""
        amounts = [limits.sequences, limits.tokens, limits.pages, used.sequences, used.tokens, used.pages]
        with faults():
            worker = [(name, epoch)]
            return int(await self._runs.run(_keys(model, worker), ["report", *amounts, ttl_ms, *arrived]))

    async def tend(self, model: str, router: str) -> None:
        """A sign of life of a router that has requests in this queue; wakes the first of the queue."""
        with faults():
            await self._runs.run(_keys(model, ()), ["tend", router, LEASE_MS])

    async def num_queued(self, models: Sequence[str]) -> list[int]:
        """Lengths of these models' queues."""
        pipeline = self._redis.pipeline(transaction=False)
        for model in models:
            pipeline.zcard(keys.queue(model))
        with faults():
            return [int(length) for length in await pipeline.execute()]

    async def accounts(self, workers: Iterable[tuple[str, int]]) -> list[Account]:
        """Room on each of these workers (name, epoch), with promises that lapsed a moment ago perhaps."""
        pipeline = self._redis.pipeline(transaction=False)
        for name, epoch in workers:
            pipeline.hmget(keys.room(name, epoch), [kind + amount for kind in _KINDS for amount in Room.model_fields])
        with faults():
            found = await pipeline.execute()
        return [_account([int(amount or 0) for amount in amounts]) for amounts in found]

    @asynccontextmanager
    async def wakes(self, router: str) -> AsyncIterator["Wakes"]:
        """Listen for requests of a router that may have room now, while inside."""
        pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            with faults():
                await pubsub.subscribe(keys.WAKE + router)
                await pubsub.get_message(timeout=None)  # its confirmation: from here on nothing is missed
            yield Wakes(pubsub)
        finally:
            # A fault here would take the place of a cancellation, and the task that was cancelled would go on.
            with suppress(BlackboardLost), faults():
                await pubsub.aclose()  # type: ignore[no-untyped-call]


class Wakes:
    """Requests of one router, as they are woken."""

    def __init__(self, pubsub: PubSub) -> None:
        self._pubsub = pubsub

    async def wait(self, timeout_s: float) -> str | None:
        """The next request id; None if there was none in time. Raises BlackboardLost."""
        end = time.monotonic() + timeout_s
        with faults():
            while (left := end - time.monotonic()) > 0:
                if message := await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=left):
                    return bytes(message["data"]).decode()
        return None


def _keys(model: str, workers: Iterable[tuple[str, int]]) -> list[str]:
    named = keys.admission(model)
    for name, epoch in workers:
        named += (keys.room(name, epoch), keys.promises(name, epoch))
    return named


def _account(amounts: Sequence[int]) -> Account:
    size = len(Room.model_fields)
    limits, used, promised = (_room(amounts[at : at + size]) for at in range(0, len(amounts), size))
    return Account(limits, used, promised)


def _room(amounts: Sequence[int]) -> Room:
    return Room(**dict(zip(Room.model_fields, amounts, strict=True)))


async def _judged(answer: Awaitable[Sequence[bytes | int]]) -> Verdict:
    with faults():
        return _verdict(await answer)


async def _told(answer: Awaitable[int]) -> bool:
    with faults():
        return bool(await answer)


def _verdict(answer: Sequence[bytes | int]) -> Verdict:
    kind, *rest = answer
    match kind:
        case b"placed":
            return Placed(int(rest[0]), bool(rest[1]))
        case b"parked":
            return Parked(int(rest[0]))
        case b"refused":
            return Refused(bytes(rest[0]).decode(), int(rest[1]))
        case _:
            return NoneFits()
