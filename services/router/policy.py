"""Where a request goes: pure functions from a request and the workers of its model to a placement.

Filter, score, pick. What a placement costs is in `services/router/cost.py`; here the cheapest are put in order. Costs
within `tie_ms` of the lowest are equal; a rendezvous hash of the prompt's first page spreads them, so that routers
agree and prompts that begin alike meet on one worker before any index says so.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import overload

import numpy as np

from services.router.candidate import Candidate, Query, Weights, Worker
from services.router.cost import Costs, costs
from services.router.page_index import Ints
from services.router.rivals import rival_order
from services.router.table import Floats, Table, hash64
from shared.blackboard.records import Role
from shared.errors import ContextTooLong, Fault, NoWorker

# Filter ---------------------------------------------------------------------------------------------------------------


def refusal(query: Query, worker: Worker) -> Fault | None:
    """Why a worker cannot take a request now; None if it can."""
    card, pages = worker.card, worker.registration.pages
    if worker.name in query.excluded:
        return NoWorker("already failed this request")
    if worker.registration.draining:
        return NoWorker("draining")
    if query.num_prompt_tokens >= card.max_model_len:
        return ContextTooLong(f"{query.num_prompt_tokens} prompt tokens, context of {card.max_model_len}")
    if pages.total and num_pages(query, worker) > pages.total:
        return ContextTooLong(f"{num_pages(query, worker)} pages needed, pool of {pages.total}")
    return None


def num_pages(query: Query, worker: Worker) -> int:
    """Pages that the prompt and the first token take."""
    return query.num_prompt_tokens // worker.card.page_size + 1


# Placements that are put in order whether somebody wants to see them or not.
FEW = 16

# Pick -----------------------------------------------------------------------------------------------------------------


class Ranked(Sequence[Candidate]):
    """Placements in order, the best first; each is made an object when it is looked at, and those behind the first few
    are put in order when somebody wants them."""

    def __init__(self, scored: Costs, first: list[int], rest: Callable[[], list[int]] | None = None) -> None:
        self.scored = scored
        self._order, self._rest = first, rest

    def __len__(self) -> int:
        return len(self.numbers())

    def numbers(self, stop: int | None = None) -> list[int]:
        """Numbers of all placements, or of the first `stop`: those on one worker by its place among decode workers,
        then the pairs, prefill workers outside."""
        if self._rest and (stop is None or stop > len(self._order)):
            self._order, self._rest = self._order + self._rest(), None
        return self._order[:stop]

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> "Sequence[Candidate]": ...
    def __getitem__(self, place: int | slice) -> "Candidate | Sequence[Candidate]":
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(numbers := self.numbers(place + 1)):
            raise IndexError(place)
        return candidate(self.scored, numbers[place])


def rank(query: Query, table: Table, weights: Weights) -> Ranked:
    """Every placement, the best first, whether there is room for it or not. Raises NoWorker or ContextTooLong."""
    scored = costs(query, table, weights)
    if weights.policy == "cost":
        ranked = by_cost(query, scored, weights)
    else:
        order = rival_order(weights.policy, query, table, scored, scored.totals.reshape(-1))
        ranked = Ranked(scored, order.tolist())
    if not ranked.numbers(1):
        raise nobody(query, table)
    return ranked


def place(query: Query, table: Table, weights: Weights) -> Candidate:
    """The best placement. Raises as `rank`."""
    return rank(query, table, weights)[0]


def by_cost(query: Query, scored: Costs, weights: Weights) -> Ranked:
    """The cheapest first, and none that is a longer detour than may be made. Those that may be chosen at once, and a
    few more, are put in order at once."""
    totals = scored.totals.reshape(-1)
    lowest, likely = _bounds(scored.totals)
    highest = min(lowest + weights.max_detour_ms, sys.float_info.max)
    tied = min(lowest + weights.tie_ms, highest)
    few = (totals <= min(max(likely, tied), highest)).nonzero()[0]
    costs_ms = totals.take(few)
    first = few.take(costs_ms.argsort(kind="stable"))
    num_tied = np.count_nonzero(costs_ms <= tied)
    if num_tied > 1:
        first[:num_tied] = spread(query, scored.table, first[:num_tied])

    def rest() -> list[int]:
        others = totals <= highest
        others[first] = False  # equal ones are on both sides
        order = np.argsort(totals, kind="stable")
        in_order: list[int] = order[others[order]].tolist()
        return in_order

    return Ranked(scored, first.tolist(), rest)


def _bounds(totals: Floats) -> tuple[float, float]:
    """The lowest cost of all, and one that a few placements do not exceed: of columns, or of rows if those are too few,
    the lowest of each is one of them."""
    if totals.size <= FEW * FEW:
        return float(totals.min(initial=np.inf)), np.inf
    lowest = np.minimum.reduce(totals, int(totals.shape[1] < FEW))
    lowest.sort()
    return lowest.item(0), lowest.item(FEW - 1)


def spread(query: Query, table: Table, tied: Ints) -> Ints:
    """Placements in the order of a rendezvous hash of prompt and worker: removing a worker moves only its own prompts
    (Thaler and Ravishankar, 1998). Prefill workers first, so that a prompt stays with one whoever decodes."""
    facts = table.facts
    prefill, decode = np.divmod(tied, len(facts.decodes))
    ranks = _mixed(facts.salts ^ np.uint64(hash64(query.affinity)))
    ranks[-1] = 0  # those on one worker are equal in their prefill worker
    return tied[np.lexsort((ranks[facts.of_decodes][decode], ranks.take(facts.prefill_of.take(prefill))))]


def _mixed(
    words: "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def candidate(scored: Costs, number: int) -> Candidate:
    """Placement `number`, as `Ranked.numbers` counts them."""
    facts, computing = scored.table.facts, scored.computing
    prefill, decode = divmod(number, len(facts.decodes))
    row = facts.prefills[prefill - 1] if prefill else facts.decodes[decode]
    source = computing.source(row)
    return Candidate(
        decode=facts.workers[facts.decodes[decode]],
        prefill=facts.workers[row] if prefill else None,
        source=None if source is None else facts.workers[source],
        explained=partial(scored.remote_terms, prefill - 1, decode) if prefill else partial(scored.local_terms, decode),
        num_cached_tokens=scored.num_tokens - int(computing.num_computed.item(row)),
        prefill_ms=scored.taken_ms(row),
        second_prefill=_second_prefill(scored, prefill - 1, decode) if prefill else None,
        expected_ms=scored.expected_ms(row),
    )


def _second_prefill(scored: Costs, first: int, decode: int) -> Worker | None:
    """Who would compute the prompt the cheapest should the chosen prefill worker fail."""
    others, facts = scored.remote[:, decode].copy(), scored.table.facts
    others[first] = np.inf
    second = int(others.argmin())
    return facts.workers[facts.prefills[second]] if others.item(second) < math.inf else None


def nobody(query: Query, table: Table) -> Fault:
    """The fault that says why no worker can take the request."""
    decodes = [worker for worker in table.workers() if worker.role is Role.DECODE]
    refusals = {worker.name: refusal(query, worker) for worker in decodes}
    reasons = "; ".join(f"{name}: {fault.message}" for name, fault in sorted(refusals.items()) if fault)
    message = f"no decode worker for model {query.model!r} ({reasons or 'none is registered'})"
    if any(isinstance(fault, ContextTooLong) for fault in refusals.values()):
        return ContextTooLong(message)
    return NoWorker(message)


# Explain --------------------------------------------------------------------------------------------------------------


def explain(query: Query, table: Table, weights: Weights) -> list[Candidate]:
    """Every candidate with its terms: what `place` would choose first, then the others in order, the rejected ones
    last."""
    try:
        possible = list(rank(query, table, replace(weights, max_detour_ms=math.inf)))
    except Fault:
        possible = []
    highest = min((one.cost_ms for one in possible), default=math.inf)
    highest += weights.max_detour_ms if weights.policy == "cost" else math.inf
    detour = f"over max_detour_ms: rather than take this the request waits for {highest:.1f} ms or less"
    offered = [one if one.cost_ms <= highest else replace(one, rejection=detour) for one in possible]
    return offered + list(_rejected(query, table, weights))


def _rejected(query: Query, table: Table, weights: Weights) -> Iterator[Candidate]:
    workers = table.workers()
    fit = []
    for worker in workers:
        if fault := refusal(query, worker):
            yield Candidate.rejected(worker, fault.message)
        else:
            fit.append(worker)
    scored = costs(query, table, weights)
    facts = table.facts
    decodes, prefills = (
        {workers[row].name: at for at, row in enumerate(rows)} for rows in (facts.decodes, facts.prefills)
    )
    for decode in (worker for worker in fit if worker.role is Role.DECODE):
        at = decodes[decode.name]
        if np.isinf(scored.local[at]):
            yield Candidate(decode, None, None, rejection="over remote_prefill_min_tokens: prefilled elsewhere")
        for prefill in (worker for worker in fit if worker.role is Role.PREFILL):
            if np.isinf(scored.remote[prefills[prefill.name], at]):
                reason = "compatibility hashes differ" if prefill.group != decode.group else "little to compute"
                yield Candidate(decode, prefill, None, rejection=reason)
