"""What placements cost, in milliseconds: for all of them at once. The derivation is in docs/placement.md.

computing worker c (prefill worker p, or decode worker d itself)
  queue         prompts queued there before ours
  prefill       tokens that nobody has cached
  pull          reading a prefix from the peer that has most of it
  kv            pages that must be evicted or waited for, on either worker
decode worker d
  decode        our own tokens, as fast as d generates with us in its batch
  load          what our sequence adds to the steps of those that run there
  stall         what a local prefill takes from those that run there
  decode_queue  prompts queued on d that its decode steps have to share with
pair
  transfer      reading pages, as far as no computation hides it
either
  stale         how much older the reports are than they should be
"""

from dataclasses import dataclass

import numpy as np

from services.router.candidate import Query, Terms, Weights
from services.router.page_index import Ints
from services.router.table import Bools, Floats, Table

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Computing:
    """Computing the prompt on each worker [workers]."""

    queue: Floats
    prefill: Floats
    pull: Floats
    source: Ints
    num_cached: Floats
    num_computed: Floats


@dataclass(frozen=True, slots=True)
class Costs:
    """Every placement of a request. `local` [workers] has inf for those that cannot, `remote` [workers, workers] too:
    its first axis is the prefill worker."""

    table: Table
    computing: Computing
    prompt_kv: Floats
    decode: Floats
    load: Floats
    kv: Floats
    stall: Floats
    transfer: Floats
    local: Floats
    remote: Floats

    def local_terms(self, row: int) -> Terms:
        """Parts of the cost of prefill and decode on one worker."""
        return (*self._computing_terms(row), ("stall", float(self.stall[row])), *self._decode_terms(row))

    def remote_terms(self, prefill: int, decode: int) -> Terms:
        """Parts of the cost of a pair."""
        first = (*self._computing_terms(prefill), self._stale(prefill))
        behind = (
            ("decode_queue", float(self.table.queue_ms[decode])),
            ("transfer", float(self.transfer[prefill, decode])),
        )
        return _sum((*first, ("kv", float(self.prompt_kv[prefill])), *self._decode_terms(decode), *behind))

    def _computing_terms(self, row: int) -> Terms:
        computing = self.computing
        queue, prefill, pull = computing.queue[row], computing.prefill[row], computing.pull[row]
        return (("queue", float(queue)), ("prefill", float(prefill)), ("pull", float(pull)))

    def _decode_terms(self, row: int) -> Terms:
        named = (("decode", self.decode), ("load", self.load), ("kv", self.kv))
        return (*((name, float(term[row])) for name, term in named), self._stale(row))

    def _stale(self, row: int) -> tuple[str, float]:
        return "stale", float(self.table.stale_ms[row])


def costs(query: Query, table: Table, weights: Weights) -> Costs:
    """Every placement's cost."""
    facts, fit, cached = table.facts, table.fit(query), table.num_cached_tokens(query)
    computing = _computing(query, table, cached, weights)
    running = table.num_decoding
    output = np.minimum(facts.output_tokens, query.max_tokens or np.inf)
    decode = output * (facts.step_ms + facts.sequence_ms)
    load = weights.load_weight * output * facts.sequence_ms * running
    needed = (query.num_prompt_tokens + output) // facts.page_size + 1
    kv, prompt_kv = (
        _pressure(table, cached, pages, weights) for pages in (needed, query.num_prompt_tokens // facts.page_size + 1)
    )
    stall = weights.stall_weight * np.maximum(running, weights.min_stalled) * computing.prefill
    transfer = _transfer(query, table, computing, cached, weights)
    compute = computing.queue + computing.prefill + computing.pull
    generate = decode + load + kv + table.stale_ms
    may_local, may_remote = _allowed(query, table, fit, cached, weights)
    local = np.where(may_local, compute + stall + generate, np.inf)
    pairs = (compute + prompt_kv + table.stale_ms)[:, None] + (generate + table.queue_ms)[None, :] + transfer
    remote = np.where(may_remote, pairs, np.inf)
    return Costs(table, computing, prompt_kv, decode, load, kv, stall, transfer, local, remote)


def _allowed(query: Query, table: Table, fit: Bools, cached: Floats, weights: Weights) -> tuple[Bools, Bools]:
    """Which placements may be: alone [workers], and as a pair [workers, workers]."""
    facts, uncached = table.facts, query.num_prompt_tokens - cached
    decodes, prefills = fit & facts.is_decode, fit & ~facts.is_decode
    pairs: Bools = prefills[:, None] & (decodes & (uncached > weights.local_prefill_max_tokens))[None, :]
    if facts.num_groups > 1:
        pairs &= facts.group[:, None] == facts.group[None, :]
    alone = decodes
    if weights.remote_prefill_min_tokens:
        alone = decodes & ~((uncached >= weights.remote_prefill_min_tokens) & pairs.any(axis=0))
    return alone, pairs


def prefill_ms(table: Table, start: Floats, end: float) -> Floats:
    """Time to compute tokens start … end: each costs its own time, and a little for every token before it."""
    per_token, per_pair = table.facts.prefill_ms, table.facts.attention_ms
    return (end - start) * per_token + per_pair * (end * end - start * start) / 2


def _computing(query: Query, table: Table, cached: Floats, weights: Weights) -> Computing:
    """Computing the prompt on each worker, with a prefix pulled from a peer where that is cheaper.

    The longest prefix of all is the only one worth a look: reading a token costs the same wherever it is.
    """
    facts, num_tokens = table.facts, float(query.num_prompt_tokens)
    alone = prefill_ms(table, cached, num_tokens)
    sources = _longest(query, table, cached)
    gain = np.where(sources == NOBODY, 0.0, cached[sources] - cached)
    if not (gain >= weights.min_pull_tokens).any():
        nobody = np.full(len(cached), NOBODY)
        return Computing(table.queue_ms, alone, np.zeros_like(alone), nobody, cached, num_tokens - cached)
    pull = weights.handoff_ms + gain * facts.token_bytes / facts.transfer_bytes_per_ms
    helped = prefill_ms(table, cached + gain, num_tokens)
    pulls = (gain >= weights.min_pull_tokens) & (pull + helped < alone)
    reached = np.where(pulls, cached + gain, cached)
    return Computing(
        table.queue_ms,
        np.where(pulls, helped, alone),
        np.where(pulls, pull, 0.0),
        np.where(pulls, sources, NOBODY),
        reached,
        num_tokens - reached,
    )


def _longest(query: Query, table: Table, cached: Floats) -> Ints:
    """For each worker the peer that has most of the prompt: also one that is full or draining, but none that failed the
    request, unless by draining."""
    facts = table.facts
    if query.excluded:
        cached = cached.copy()
        cached[[row for row in facts.rows_of(query.excluded) if not facts.drains[row]]] = -1
    best = np.full(facts.num_groups, NOBODY)
    for group in range(facts.num_groups):
        theirs = np.where(facts.group == group, cached, -1)
        if theirs.max() > 0:
            best[group] = theirs.argmax()
    return best[facts.group]


def _transfer(query: Query, table: Table, computing: Computing, cached: Floats, weights: Weights) -> Floats:
    """Time for which reading pages [prefill, decode] goes on with nothing left to compute.

    Pages of a chunk are read while the next one is computed: exposed is the reading of the last chunk, or all that
    takes longer than computing the chunks before the last.
    """
    facts = table.facts
    read_ms = facts.token_bytes / facts.transfer_bytes_per_ms
    lacking = query.num_prompt_tokens - cached
    last = np.minimum(computing.num_computed, weights.chunk_tokens)
    num_tokens = float(query.num_prompt_tokens)
    hidden_ms = computing.prefill - prefill_ms(table, num_tokens - last, num_tokens)
    last_ms = np.minimum(lacking[None, :], last[:, None]) * read_ms[None, :]
    exposed: Floats = np.maximum(last_ms, (lacking * read_ms)[None, :] - hidden_ms[:, None])
    return weights.handoff_ms + exposed


def _pressure(table: Table, cached: Floats, num_pages: Floats, weights: Weights) -> Floats:
    """What it costs others to make room for so many pages: to compute again what is evicted, if it is asked for again,
    and to wait for what cannot be."""
    facts = table.facts
    held = np.minimum(cached // facts.page_size, num_pages)
    lacking = np.maximum(0.0, num_pages - held - facts.free_pages)
    evictable = np.maximum(0.0, facts.cached_pages - held)
    evicted = np.minimum(lacking, evictable)
    missing = np.where(np.isfinite(facts.pool_pages), lacking - evicted, 0.0)
    evicted = np.where(np.isfinite(facts.pool_pages), evicted, 0.0)
    again_ms = weights.eviction_weight * evicted * facts.page_size * facts.prefill_ms
    return np.asarray(again_ms + missing * weights.missing_page_ms, np.float64)


def _sum(terms: Terms) -> Terms:
    """Terms of one name added up."""
    total: dict[str, float] = {}
    for name, cost in terms:
        total[name] = total.get(name, 0.0) + cost
    return tuple(total.items())
