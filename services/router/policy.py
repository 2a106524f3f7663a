"""Where a request goes: pure functions from a request and the workers of its model to a placement.

Filter, score, pick. What a placement costs is in `services/router/cost.py`; here the cheapest are put in order. Costs
within `tie_ms` of the lowest are equal; a rendezvous hash of the prompt's first page spreads them, so that routers
agree and prompts that begin alike meet on one worker before any index says so.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np

from services.router.candidate import Candidate, Query, Weights, Worker
from services.router.cost import Costs, costs
from services.router.page_index import Ints
from services.router.rivals import rival_order
from services.router.table import NOBODY, Floats, Table, hash64
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

    def __init__(self, scored: Costs, first: Ints, num_possible: int, rest: Callable[[], Ints]) -> None:
        self.scored = scored
        self._order, self._num_possible, self._rest = first, num_possible, rest

    def __len__(self) -> int:
        return self._num_possible

    def numbers(self, stop: int) -> Ints:
        """Numbers of the first placements, at most `stop`: those on one worker by its place among decode workers, then
        the pairs, prefill workers outside."""
        if len(self._order) < min(stop, self._num_possible):
            self._order = np.concatenate((self._order, self._rest()))
        return self._order[:stop]

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> "Sequence[Candidate]": ...
    def __getitem__(self, place: int | slice) -> "Candidate | Sequence[Candidate]":
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return candidate(self.scored, int(self.numbers(place + 1)[place]))


def rank(query: Query, table: Table, weights: Weights) -> Ranked:
    """Every placement, the best first, whether there is room for it or not. Raises NoWorker or ContextTooLong."""
    scored = costs(query, table, weights)
    totals = np.concatenate((scored.local, scored.remote.reshape(-1)))
    if weights.policy == "cost":
        ranked = by_cost(query, scored, totals, weights.tie_ms)
    else:
        order = rival_order(weights.policy, query, table, scored, totals)
        ranked = Ranked(scored, order, len(order), lambda: order[:0])
    if not len(ranked):
        raise nobody(query, table)
    return ranked


def place(query: Query, table: Table, weights: Weights) -> Candidate:
    """The best placement. Raises as `rank`."""
    return rank(query, table, weights)[0]


def by_cost(query: Query, scored: Costs, totals: Floats, tie_ms: float) -> Ranked:
    """The cheapest first. Those that may be chosen at once, and a few more, are put in order at once."""
    num_possible = int(np.count_nonzero(totals < np.inf))
    num_tied = int(np.count_nonzero(totals <= totals.min() + tie_ms)) if num_possible else 0
    count = min(max(FEW, num_tied), num_possible)
    few = np.argpartition(totals, count - 1)[:count] if 0 < count < num_possible else np.arange(len(totals))
    few.sort()
    first = few.take(totals.take(few).argsort(kind="stable")[:count])
    if num_tied > 1:
        first[:num_tied] = spread(query, scored.table, first[:num_tied])

    def rest() -> Ints:
        others = np.ones(len(totals), np.bool_)
        others[first] = False  # equal ones are on both sides
        order = np.argsort(totals, kind="stable")[:num_possible]
        return order[others[order]]

    return Ranked(scored, first, num_possible, rest)


def spread(query: Query, table: Table, tied: Ints) -> Ints:
    """Placements in the order of a rendezvous hash of prompt and worker: removing a worker moves only its own prompts
    (Thaler and Ravishankar, 1998). Prefill workers first, so that a prompt stays with one whoever decodes."""
    facts = table.facts
    prefill, decode = np.divmod(tied, len(facts.decodes))
    ranks = _mixed(facts.salts ^ np.uint64(hash64(query.affinity)))
    ranks[NOBODY] = 0  # those on one worker are equal in their prefill worker
    return tied[np.lexsort((ranks.take(facts.decodes.take(decode)), ranks.take(facts.prefill_of.take(prefill))))]


def _mixed(
    words: "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def candidate(scored: Costs, number: int) -> Candidate:
    """Placement `number`, as `Ranked.numbers` counts them."""
    table, facts, computing = scored.table, scored.table.facts, scored.computing
    prefill, decode = divmod(number, len(facts.decodes))
    row = int(facts.prefills[prefill - 1] if prefill else facts.decodes[decode])
    source = int(computing.source[row])
    return Candidate(
        decode=table.worker(int(facts.decodes[decode])),
        prefill=table.worker(row) if prefill else None,
        source=None if source == NOBODY else table.worker(source),
        terms=scored.remote_terms(prefill - 1, decode) if prefill else scored.local_terms(decode),
        num_cached_tokens=int(computing.num_cached[row]),
        num_computed_tokens=int(computing.num_computed[row]),
        second_prefill=_second_prefill(scored, prefill - 1, decode) if prefill else None,
        expected_ms=scored.expected_ms(row),
    )


def _second_prefill(scored: Costs, first: int, decode: int) -> Worker | None:
    """Who would compute the prompt the cheapest should the chosen prefill worker fail."""
    others = scored.remote[:, decode].copy()
    others[first] = np.inf
    second = int(others.argmin())
    return scored.table.worker(int(scored.table.facts.prefills[second])) if np.isfinite(others[second]) else None


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
        possible = list(rank(query, table, weights))
    except Fault:
        possible = []
    return possible + list(_rejected(query, table, weights))


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
            yield Candidate(decode, None, None, (), rejection="over remote_prefill_min_tokens: prefilled elsewhere")
        for prefill in (worker for worker in fit if worker.role is Role.PREFILL):
            if np.isinf(scored.remote[prefills[prefill.name], at]):
                reason = "compatibility hashes differ" if prefill.group != decode.group else "little to compute"
                yield Candidate(decode, prefill, None, (), rejection=reason)
