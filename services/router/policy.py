"""Where a request goes: pure functions from a request and the workers of its model to a placement.

Filter, score, pick. The score is a time in milliseconds, a sum of named terms:

    computing worker (prefill, or decode if it prefills itself)
      queue      its queued prompt tokens at its measured rate, ours that it has not reported yet included
      prefill    prompt tokens that it has to compute
      pull       reading a prefix from a peer's cache, if that is cheaper than computing it
      stall      running decodes that wait while it computes (decode worker only)
    decode worker
      load       sequences that share its steps
      kv         pages that must be evicted, or waited for
      transfer   reading the last chunk of pages, the only one that no computation hides

The terms of a pair belong to one of its two workers each, so the best pair is the best of each role: choosing costs
O(workers), not O(pairs).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from heapq import merge
from itertools import chain

from services.router.candidate import Candidate, Query, Side, Weights, Worker
from shared.blackboard.records import Role
from shared.errors import ContextTooLong, Fault, NoWorker


@dataclass(frozen=True, slots=True)
class Sides:
    """Workers that may take part, by part; pairs need one of `prefills` and one of `decodes` that can exchange KV."""

    prefills: list[Side]
    decodes: list[Side]
    locals: list[Side]


def longest_prefixes(query: Query, workers: Iterable[Worker]) -> dict[str, Worker]:
    """Who has the most of the prompt in each group, the last by name of several: also workers that are full or
    draining, but none that failed the request, unless by draining."""
    longest: dict[str, Worker] = {}
    for worker in sorted(workers, key=lambda worker: (worker.num_cached_pages, worker.name), reverse=True):
        if worker.num_cached_pages and (worker.name not in query.excluded or worker.registration.draining):
            longest.setdefault(worker.group, worker)
    return longest


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


def only_locally(query: Query, worker: Worker, weights: Weights) -> bool:
    """Whether so little of the prompt is missing on this decode worker that a handoff is not worth it."""
    return query.num_prompt_tokens - cached_tokens(query, worker) <= weights.local_prefill_max_tokens


# Score ----------------------------------------------------------------------------------------------------------------


def cached_tokens(query: Query, worker: Worker) -> int:
    """Prompt tokens that a worker need not compute; at least one is always computed."""
    return min(worker.num_cached_pages * worker.card.page_size, query.num_prompt_tokens - 1)


def transfer_ms(num_tokens: int, worker: Worker, weights: Weights) -> float:
    """Time to read the KV of some tokens from a peer."""
    return weights.handoff_ms + num_tokens * worker.card.kv_bytes_per_token / (weights.transfer_gb_per_s * 1e6)


def compute_side(query: Query, worker: Worker, sources: Mapping[str, Worker], weights: Weights) -> Side:
    """Computing the prompt on this worker."""
    rate = worker.prefill_ms_per_token(weights)
    cached, source, pull_ms = cached_tokens(query, worker), None, 0.0
    if (peer := sources.get(worker.group)) and (gain := cached_tokens(query, peer) - cached) > 0:
        pull_ms = transfer_ms(gain, worker, weights)
        if gain >= weights.min_pull_tokens and pull_ms < gain * rate:
            cached, source = cached + gain, peer
    num_computed = query.num_prompt_tokens - cached
    decoding = worker.num_decoding if worker.role is Role.DECODE else 0
    terms = (
        ("queue", worker.queue_ms),
        ("prefill", num_computed * rate),
        ("pull", pull_ms if source else 0.0),
        ("stall", weights.stall_weight * decoding * num_computed * rate),
    )
    return Side(worker, terms, cached, num_computed, source)


def decode_terms(query: Query, worker: Worker, weights: Weights) -> tuple[tuple[str, float], ...]:
    """Generating the output on this worker."""
    pages = worker.registration.pages
    needed = num_pages(query, worker) - min(worker.num_cached_pages, num_pages(query, worker))
    evictable = max(0, pages.cached - worker.num_cached_pages)
    evicted = min(max(0, needed - pages.free), evictable)
    missing = max(0, needed - pages.free - evictable) if pages.total else 0
    evicted_ms = evicted * worker.card.page_size * worker.prefill_ms_per_token(weights)
    return (
        ("load", weights.load_weight * worker.num_decoding * worker.decode_step_ms(weights)),
        ("kv", weights.eviction_weight * evicted_ms + missing * weights.missing_page_ms),
    )


def remote_decode_side(query: Query, worker: Worker, weights: Weights) -> Side:
    """Generating on this worker what another one prefilled. Its own queued prompts delay the start, too."""
    exposed = min(query.num_prompt_tokens - cached_tokens(query, worker), weights.chunk_tokens)
    transfer = ("transfer", transfer_ms(exposed, worker, weights))
    terms = (*decode_terms(query, worker, weights), ("decode_queue", worker.queue_ms), transfer)
    return Side(worker, terms, 0, 0, None)


def sides(query: Query, workers: Sequence[Worker], weights: Weights) -> Sides:
    """Score every worker that may take part, in each part that it may take."""
    fit = [worker for worker in workers if refusal(query, worker) is None]
    sources = longest_prefixes(query, workers)
    prefills = [compute_side(query, worker, sources, weights) for worker in fit if worker.role is Role.PREFILL]
    groups = {side.worker.group for side in prefills}
    remote, local = [], []
    for worker in fit:
        if worker.role is Role.DECODE:
            if worker.group in groups and not only_locally(query, worker, weights):
                remote.append(remote_decode_side(query, worker, weights))
            else:
                side = compute_side(query, worker, sources, weights)
                local.append(side.plus(decode_terms(query, worker, weights)))
    return Sides(prefills, remote, local)


# Pick -----------------------------------------------------------------------------------------------------------------


def rank(query: Query, workers: Sequence[Worker], weights: Weights) -> Iterator[Candidate]:
    """Every placement, the cheapest first, whether there is room for it or not. Raises NoWorker or ContextTooLong."""
    scored = sides(query, workers, weights)
    locals_ = _in_order(query, scored.locals, weights)
    heads, others = [Candidate.local(side) for side in locals_[:1]], [map(Candidate.local, by_cost(locals_))]
    for group in sorted({side.worker.group for side in scored.decodes}):
        prefills = _in_order(query, (side for side in scored.prefills if side.worker.group == group), weights)
        decodes = _in_order(query, (side for side in scored.decodes if side.worker.group == group), weights)
        heads.append(Candidate.pair(prefills[0], decodes[0]))
        # Made only as far as somebody asks for them.
        others += [map(partial(Candidate.pair, prefill), by_cost(decodes)) for prefill in prefills]
    if not heads:
        raise nobody(query, workers)
    first = min(heads, key=_cost)
    in_order = chain([first], (other for other in merge(*others, key=_cost) if other.names != first.names))
    return (replace(each, second_prefill=_second_prefill(scored, each)) for each in in_order)


def _second_prefill(scored: Sides, chosen: Candidate) -> Worker | None:
    """Who would compute the prompt the cheapest should the chosen prefill worker fail."""
    if chosen.prefill is None:
        return None
    group, first = chosen.prefill.group, chosen.prefill
    others = [side for side in scored.prefills if side.worker.group == group and side.worker is not first]
    return min(others, key=lambda side: (side.cost_ms, side.worker.name)).worker if others else None


def _cost(candidate: Candidate) -> tuple[float, tuple[str, str]]:
    return candidate.cost_ms, candidate.names


def place(query: Query, workers: Sequence[Worker], weights: Weights) -> Candidate:
    """The cheapest placement. Raises NoWorker or ContextTooLong."""
    return next(rank(query, workers, weights))


def by_cost(sides: Iterable[Side]) -> list[Side]:
    """The cheapest first."""
    return sorted(sides, key=lambda side: side.cost_ms)


def _in_order(query: Query, among: Iterable[Side], weights: Weights) -> list[Side]:
    """By cost. Costs within `tie_ms` of the lowest are equal; a rendezvous hash of the prompt's first page spreads
    them, so that routers agree and prompts that begin alike meet on one worker."""
    all_sides = by_cost(among)
    tied = [side for side in all_sides if side.cost_ms <= all_sides[0].cost_ms + weights.tie_ms]
    return sorted(tied, key=lambda side: rendezvous(query.affinity, side.worker.name)) + all_sides[len(tied) :]


def rendezvous(affinity: bytes, name: str) -> bytes:
    """Rank of a worker for a prompt: removing a worker moves only its own prompts (Thaler and Ravishankar, 1998)."""
    return blake2b(affinity + name.encode(), digest_size=8).digest()


def nobody(query: Query, workers: Sequence[Worker]) -> Fault:
    """The fault that says why no worker can take the request."""
    decodes = [worker for worker in workers if worker.role is Role.DECODE]
    refusals = {worker.name: refusal(query, worker) for worker in decodes}
    reasons = "; ".join(f"{name}: {fault.message}" for name, fault in sorted(refusals.items()) if fault)
    message = f"no decode worker for model {query.model!r} ({reasons or 'none is registered'})"
    if any(isinstance(fault, ContextTooLong) for fault in refusals.values()):
        return ContextTooLong(message)
    return NoWorker(message)


# Explain --------------------------------------------------------------------------------------------------------------


def explain(query: Query, workers: Sequence[Worker], weights: Weights) -> list[Candidate]:
    """Every candidate with its terms: what `rank` puts first, then the cheapest, the rejected ones last."""
    scored = sides(query, workers, weights)
    possible = [Candidate.local(side) for side in scored.locals]
    possible += [
        Candidate.pair(p, d) for p in scored.prefills for d in scored.decodes if p.worker.group == d.worker.group
    ]
    if possible:
        chosen = place(query, workers, weights)
        possible.sort(key=lambda candidate: (candidate.names != chosen.names, candidate.cost_ms, candidate.names))
        possible[0] = chosen
    return possible + list(_rejected(query, workers, weights, scored))


def _rejected(query: Query, workers: Sequence[Worker], weights: Weights, scored: Sides) -> Iterator[Candidate]:
    for worker in workers:
        if fault := refusal(query, worker):
            yield Candidate.rejected(worker, fault.message)
    sources = longest_prefixes(query, workers)
    for side in scored.decodes:
        local = compute_side(query, side.worker, sources, weights).plus(decode_terms(query, side.worker, weights))
        reason = f"{local.num_computed_tokens} tokens to compute: over local_prefill_max_tokens"
        yield Candidate.local(local, reason)
    for prefill in scored.prefills:
        for side in scored.locals:
            yield Candidate.pair(prefill, side, _why_no_pair(prefill, side, only_locally(query, side.worker, weights)))


def _why_no_pair(prefill: Side, decode: Side, short: bool) -> str:
    if prefill.worker.group != decode.worker.group:
        return "compatibility hashes differ"
    return "little to compute: prefilled on the decode worker" if short else "no handoff"
