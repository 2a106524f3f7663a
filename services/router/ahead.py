"""Requests that are answered ahead of their reservation, where there is plenty of room (docs/decisions/0063).

Their workers are less than half full by what they reported last, so the blackboard would give the room in any case: it
is told behind the answer, and says whether they are less than half full still. Where one is not, or anybody waits in
the queue, all requests of the model ask first, until reports show it. A worker that other routers have filled since its
report may get one more of ours, which waits there, as all do while Redis is away.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from services.router.candidate import Candidate, Query, Worker
from services.router.offer import offer
from services.router.policy import Ranked
from shared.blackboard.admission import ASSUMED_OUTPUT_TOKENS, AdmissionBoard
from shared.errors import BlackboardLost

# A reservation is written so long after the answer: by then a first token is out, or kernels compute it. Sooner it
# would take a processor from whoever has the request meanwhile, which costs it half of what it gains.
BEHIND_S = 0.01
# A worker says what it has once in a heartbeat, and a router reads as often.
REPORTED_HEARTBEATS = 2


class Ahead:
    """Belongs to one event loop. `spawn` makes a task, `on_lost` is told of a reservation that could not be written."""

    def __init__(
        self,
        board: AdmissionBoard,
        heartbeat_ms: int,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        on_lost: Callable[[BlackboardLost], None],
    ) -> None:
        self._board, self._spawn, self._on_lost = board, spawn, on_lost
        self._tight_s = REPORTED_HEARTBEATS * heartbeat_ms / 1000
        self._tight_until: dict[str, float] = {}
        self._unwritten: tuple[Query, Ranked] | None = None
        self._is_any = False
        """Whether a request is ahead of its reservation: one at a time. Where more come in the time that it takes,
        workers do better with what the waiting gathers."""

    def send(self, query: Query, ranked: Ranked) -> bool:
        """Whether a request may go to the best of these now; that is written down when its answer is out."""
        if self._is_any or time.monotonic() < self._tight_until.get(query.model, 0.0):
            return False
        if not _has_plenty(query, ranked[0]):
            return False
        self._is_any, self._unwritten = True, (query, ranked)
        asyncio.get_running_loop().call_later(BEHIND_S, self.write)
        return True

    def write(self) -> None:
        """Write down what is not yet: now, since the blackboard is about to be asked for something else."""
        if self._unwritten is None:
            return
        (query, ranked), self._unwritten = self._unwritten, None
        needs, pairs = offer(query, ranked, 1)
        promised = self._board.promise(query.request_id, query.model, needs, pairs[0])
        self._spawn(self._written(query.model, promised))

    async def _written(self, model: str, promised: Coroutine[Any, Any, bool]) -> None:
        try:
            self.heard(model, is_plenty=await promised)
        except BlackboardLost as fault:
            self.heard(model, is_plenty=False)
            self._on_lost(fault)
        finally:
            self._is_any = False

    def heard(self, model: str, *, is_plenty: bool) -> None:
        """The blackboard says of workers of this model whether they, and its queue, have plenty of room."""
        if not is_plenty:
            self._tight_until[model] = time.monotonic() + self._tight_s


def _has_plenty(query: Query, best: Candidate) -> bool:
    """Whether all workers of a placement would be less than half full with it, as if nothing of it were cached."""
    decode, prefill, num_tokens = best.decode, best.prefill, query.num_prompt_tokens
    num_decoded = num_tokens + min(query.max_tokens, ASSUMED_OUTPUT_TOKENS)
    if decode is None or not _is_roomy(decode, num_decoded, 0 if prefill else num_tokens):
        return False
    return prefill is None or _is_roomy(prefill, num_tokens, num_tokens)


def _is_roomy(worker: Worker, num_tokens: int, num_computed: int) -> bool:
    """Whether a worker that keeps so many tokens more, and computes so many, would be less than half full."""
    limits, used = worker.registration.limits, worker.registration.used
    num_pages = -(-num_tokens // worker.card.page_size)
    return (
        2 * (used.sequences + 1) <= limits.sequences
        and 2 * (used.tokens + num_computed) <= limits.tokens
        and 2 * (used.pages + num_pages) <= limits.pages
    )
