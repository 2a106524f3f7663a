"""Admission: a request gets room on workers before it is told to go there, or waits its turn, or is refused.

The blackboard decides (`shared/blackboard/admission.py`); here a request waits for the decision. It is woken when room
may have come free and then asks again, with placements ranked anew. Whatever ends a call while it waits (the client
goes away, its deadline passes) takes the request out of the queue at once.

Where there is plenty of room the blackboard is told instead of asked (`services/router/ahead.py`). While Redis is away
nothing can be reserved: requests are placed as if there were room, and workers queue them.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.metrics import CallbackOptions, Observation

from protos.forebay.v1 import decode_pb2, router_pb2
from services.router.ahead import Ahead
from services.router.candidate import Candidate, Query
from services.router.offer import offer
from services.router.policy import Ranked
from shared import rpc
from shared.blackboard.admission import (
    ASSUMED_OUTPUT_TOKENS,
    LEASE_MS,
    Account,
    AdmissionBoard,
    Ask,
    Need,
    NoneFits,
    Placed,
    Refused,
    Verdict,
)
from shared.errors import BlackboardLost, DeadlineExceeded, Draining, Fault, Overloaded
from shared.instruments import Meter

log = logging.getLogger(__name__)

Rank = Callable[[], Awaitable[Ranked]]
Record = Callable[[Candidate], None]
# Placements offered at first; the others follow only if none of these has room.
FIRST_PAIRS = 6
# A waiting router gives a sign of life this often, and is woken then at the latest should a promise have lapsed.
TEND_S = LEASE_MS / 4000
# A request in the queue waits this long for Redis to come back, before it is placed without.
LOST_WAIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What admission is told by configuration; each field is described in `services/router/config.py`."""

    max_queued: int = 1_024
    heartbeat_ms: int = 500


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request on its way to a verdict."""

    ask: Ask
    needs: Sequence[Need] = ()
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    may_hold: bool = False
    """Whether the blackboard may have a promise or a place in the queue for it."""
    parked_at: float | None = None


class Admission:
    """One router's side of admission. `run` must be running for parked requests to be woken."""

    def __init__(self, board: AdmissionBoard, router: str, limits: Limits, meter: Meter) -> None:
        self._board, self._router, self._limits = board, router, limits
        self._waiters: dict[str, _Waiter] = {}
        self._clearing: set[asyncio.Task[None]] = set()
        self._num_parked: Counter[str] = Counter()
        self._num_asking: Counter[str] = Counter()
        self._draining = False
        self._ahead = Ahead(board, limits.heartbeat_ms, self._spawn, self._note_unreserved)
        self._refusals = meter.create_counter("forebay_refusals", description="Requests refused, by reason")
        self._unreserved = meter.create_counter(
            "forebay_unreserved_routes", description="Requests placed without a reservation, because Redis was away"
        )
        self._waits = meter.create_histogram(
            "forebay_queue_wait_seconds", description="Time that placed requests spent in the queue"
        )
        meter.create_observable_gauge(
            "forebay_queued_requests",
            [self._num_waiting],
            description="Requests that wait here for room, by priority",
        )

    async def place(
        self, request: router_pb2.RouteRequest, query: Query, rank: Rank, record: Record, *, can_reserve: bool = True
    ) -> Candidate:
        """Wait for room on the best of the ranked placements that has any, reserve it, and `record` it. With plenty of
        room on the best of all, that is reserved behind the answer.

        While nobody waits here the best one is recorded before the blackboard has answered: it will almost certainly
        be chosen, and requests of a burst must see each other.
        Raises Overloaded (with retry_after_ms), DeadlineExceeded, and what `rank` raises. Whoever leaves by an
        exception leaves nothing behind on the blackboard.
        """
        ranked = await rank()
        others = self._num_parked[query.model] or self._num_asking[query.model]
        if can_reserve and not others and self._ahead.send(query, ranked):
            record(best := ranked[0])
            return best
        ask = self._ask(request)
        waiter = self._waiters[ask.request_id] = _Waiter(ask)
        try:
            return await self._placed(waiter, query, ranked, rank, record, can_reserve)
        except Draining:
            raise  # its place is kept for the next router
        except BaseException:
            if waiter.may_hold:
                self._spawn(self._withdraw(waiter))
            raise
        finally:
            if waiter.parked_at is not None:
                self._num_parked[ask.model] -= 1
            if self._waiters.get(ask.request_id) is waiter:
                del self._waiters[ask.request_id]

    async def _placed(
        self, waiter: _Waiter, query: Query, ranked: Ranked, rank: Rank, record: Record, can_reserve: bool
    ) -> Candidate:
        ask = waiter.ask
        ends = None if ask.remaining_ms is None else time.monotonic() + ask.remaining_ms / 1000
        while True:
            waiter.woken.clear()
            if waiter.parked_at is not None:
                ranked = await rank()  # anew: much may have changed meanwhile
            is_tried = can_reserve or waiter.parked_at is not None
            asked = self._reserve(waiter, query, ranked, FIRST_PAIRS) if is_tried else None
            # While the blackboard thinks about it.
            best = ranked[0]
            if is_expected := not self._num_parked[ask.model]:
                record(best)
            if asked is None:
                self._unreserved.add(1)
                return best
            try:
                verdict = await asked
                if isinstance(verdict, NoneFits):
                    verdict = await self._reserve(waiter, query, ranked, None)
            except BlackboardLost as fault:
                if waiter.parked_at is None or not await _wait(waiter.woken, LOST_WAIT_S):
                    self._note_unreserved(fault)
                    return best
                continue
            if isinstance(verdict, Placed):
                chosen = ranked[verdict.index] if verdict.index else best
                if verdict.index or not is_expected:
                    record(chosen)
                self._note_placed(waiter)
                return chosen
            if isinstance(verdict, Refused):
                waiter.may_hold = False
                raise self._refusal(ask, verdict)
            if self._draining:
                raise Draining("this router is shutting down; the request keeps its place in the queue")
            self._park(waiter)
            if not await _wait(waiter.woken, None if ends is None else ends - time.monotonic()):
                self._refusals.add(1, {"reason": DeadlineExceeded.reason})
                raise DeadlineExceeded("the deadline passed while the request waited for room on a worker")

    def _park(self, waiter: _Waiter) -> None:
        if waiter.parked_at is None:
            waiter.parked_at = time.monotonic()
            self._num_parked[waiter.ask.model] += 1

    def _ask(self, request: router_pb2.RouteRequest) -> Ask:
        """A tenant's share pays for the tokens it sends and those it will probably get."""
        remaining = rpc.time_remaining()
        output = min(request.max_tokens, ASSUMED_OUTPUT_TOKENS)
        return Ask(
            request.request_id,
            request.model,
            request.tenant,
            request.priority,
            cost=request.num_prompt_tokens + output,
            remaining_ms=None if remaining is None else int(remaining * 1000),
            resumed=request.resumed,
        )

    def _reserve(
        self, waiter: _Waiter, query: Query, ranked: Ranked, count: int | None
    ) -> Coroutine[Any, Any, Verdict]:
        """Ask the blackboard now for the first placements, or for all if none of those has room."""
        self._ahead.write()
        waiter.needs, pairs = offer(query, ranked, count)
        waiter.may_hold = True
        asked = self._board.reserve(
            waiter.ask,
            waiter.needs,
            pairs,
            router=self._router,
            max_queued=self._limits.max_queued,
            is_partial=count is not None and len(ranked.numbers(count + 1)) > count,
        )
        self._num_asking[query.model] += 1
        return self._heard(query.model, asked)

    async def _heard(self, model: str, asked: Coroutine[Any, Any, Verdict]) -> Verdict:
        try:
            verdict = await asked
        finally:
            self._num_asking[model] -= 1
        self._ahead.heard(model, is_plenty=isinstance(verdict, Placed) and verdict.is_plenty)
        return verdict

    async def _withdraw(self, waiter: _Waiter) -> None:
        if waiter.ask.request_id in self._waiters:
            return  # it has come again meanwhile
        with suppress(BlackboardLost):  # then the promise lapses, and the queue is gone or passes over a router's
            await self._board.withdraw(waiter.ask, self._router, {(need.name, need.epoch) for need in waiter.needs})

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._clearing.add(task)
        task.add_done_callback(self._clearing.discard)

    async def give_back(self, request_id: str, model: str, placement: decode_pb2.Placement) -> None:
        """Free at once what was reserved for a request that does not come. While Redis is away that lapses instead."""
        refs = [placement.decode, *([placement.prefill] if placement.HasField("prefill") else [])]
        try:
            await self._board.give_back(request_id, model, {(ref.worker_id, ref.epoch) for ref in refs})
        except BlackboardLost as fault:
            log.warning("a reservation has to lapse: %s", fault.message)

    async def settled(self) -> None:
        """Wait until what calls left behind is written and cleared up."""
        self._ahead.write()
        if self._clearing:
            await asyncio.wait(set(self._clearing))

    def drain(self) -> None:
        """Send away whoever is in the queue, now and later: another router will take over."""
        self._draining = True
        for waiter in self._waiters.values():
            waiter.woken.set()

    # Waking -----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Wake parked requests until cancelled."""
        while True:
            try:
                async with self._board.wakes(self._router) as wakes:
                    for waiter in self._waiters.values():
                        waiter.woken.set()  # something may have been missed
                    due = 0.0
                    while True:
                        if time.monotonic() >= due:
                            await self._tend()
                            due = time.monotonic() + TEND_S
                        if request_id := await wakes.wait(max(0.0, due - time.monotonic())):
                            self._wake(request_id)
            except BlackboardLost as fault:
                log.warning("nobody is woken: %s", fault.message)
                await asyncio.sleep(TEND_S)

    async def _tend(self) -> None:
        for model in [model for model, number in self._num_parked.items() if number]:
            await self._board.tend(model, self._router)

    def _wake(self, request_id: str) -> None:
        if waiter := self._waiters.get(request_id):
            waiter.woken.set()

    async def num_queued(self, model: str) -> int:
        """Length of a model's queue, of all routers; 0 while Redis is away."""
        try:
            return (await self._board.num_queued([model]))[0]
        except BlackboardLost:
            return 0

    async def accounts(self, workers: Sequence[tuple[str, int]]) -> dict[str, Account]:
        """Room on workers (name, epoch) by name; none while Redis is away."""
        try:
            accounts = await self._board.accounts(workers)
        except BlackboardLost:
            return {}
        return {name: account for (name, _), account in zip(workers, accounts, strict=True)}

    # Reporting --------------------------------------------------------------------------------------------------------

    def _note_unreserved(self, fault: BlackboardLost) -> None:
        log.warning("placed without a reservation: %s", fault.message)
        self._unreserved.add(1)

    def _note_placed(self, waiter: _Waiter) -> None:
        if waiter.parked_at is not None:
            self._waits.record(time.monotonic() - waiter.parked_at)

    def _refusal(self, ask: Ask, verdict: Refused) -> Fault:
        self._refusals.add(1, {"reason": verdict.reason})
        retry = {"retry_after_ms": str(verdict.retry_ms)}
        if verdict.reason == DeadlineExceeded.reason:
            message = f"the queue takes about {verdict.retry_ms} ms, and the request has {ask.remaining_ms} ms left"
            return DeadlineExceeded(message, metadata=retry)
        return Overloaded(f"all workers of model {ask.model!r} are full, and so is the queue", metadata=retry)

    def _num_waiting(self, _: CallbackOptions) -> Iterable[Observation]:
        parked = Counter(waiter.ask.priority for waiter in self._waiters.values() if waiter.parked_at is not None)
        for priority, number in parked.items() or ((0, 0),):
            yield Observation(number, {"priority": str(priority)})


async def _wait(event: asyncio.Event, timeout_s: float | None) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
