"""What placements cost, in milliseconds: for all of them at once. The derivation is in docs/placement.md.

computing worker c (prefill worker p, or decode worker d itself)
  queue         prompts queued there before ours
  prefill       tokens that nobody has cached
  steps         steps of those who generate there: half of the one at hand, and those that our chunks share
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

from typing import NamedTuple

import numpy as np

from services.router.candidate import Query, Terms, Weights
from services.router.page_index import Ints
from services.router.table import Bools, Facts, Floats, Scalars, Table


class Computing(NamedTuple):
    """Computing the prompt on each worker [workers]."""

    queue: Floats
    prefill: Floats
    steps: Floats
    pull: Floats
    num_computed: Floats
    pulls: Bools | None
    """Who pulls a prefix from a peer; None: nobody does."""
    sources: Ints
    """The peer's row [workers], or one for all [1]."""

    def source(self, row: int) -> int | None:
        """The peer from which a worker pulls."""
        if self.pulls is None or not self.pulls.item(row):
            return None
        return self.sources.item(row if len(self.sources) > 1 else 0)


class Costs(NamedTuple):
    """Every placement of a request, inf where it cannot be: `totals` [1 + prefills, decodes], first those on one
    worker, in the order of the facts' rows of these roles. Terms are [workers], but `exposed` [prefills, decodes]."""

    num_tokens: int
    table: Table
    computing: Computing
    prompt_kv: Floats
    decode: Floats
    load: Floats
    kv: Floats
    stall: Floats
    exposed: Floats
    handoff_ms: float
    chunk_tokens: int
    totals: Floats

    @property
    def local(self) -> Floats:
        """Placements on one worker [decodes]."""
        alone: Floats = self.totals[0]
        return alone

    @property
    def remote(self) -> Floats:
        """Pairs [prefills, decodes]."""
        return self.totals[1:]

    def local_terms(self, decode: int) -> Terms:
        """Parts of the cost of prefill and decode on one worker, the one that has number `decode` of those."""
        row = self.table.facts.decodes[decode]
        held = (("steps", float(self.computing.steps[row])), ("stall", float(self.stall[row])))
        return (*self._computing_terms(row), *held, *self._decode_terms(row))

    def remote_terms(self, prefill: int, decode: int) -> Terms:
        """Parts of the cost of a pair."""
        first, second = self.table.facts.prefills[prefill], self.table.facts.decodes[decode]
        behind = (
            ("decode_queue", float(self.table.queue_ms[second])),
            ("transfer", float(self.exposed[prefill, decode]) + self.handoff_ms),
        )
        before = (*self._computing_terms(first), self._stale(first), ("kv", float(self.prompt_kv[first])))
        return _sum((*before, *self._decode_terms(second), *behind))

    def expected_ms(self, row: int) -> float:
        """Until a worker has computed the prompt, by its rates as measured; 0 if it has measured none: how wrong a
        guess was says nothing of rates that are known by then."""
        if not self.table.facts.has_rate.item(row):
            return 0.0
        computing, ratio = self.computing, self.table.facts.prompt_ratio.item(row)
        takes = computing.queue.item(row) + computing.prefill.item(row) + computing.steps.item(row)
        return takes / ratio + computing.pull.item(row)

    def taken_ms(self, row: int) -> float:
        """What computing the prompt takes of a worker's time: its part of the steps that it shares included, for
        other prompts of the same step have theirs, but not the wait for the step at hand."""
        num_chunks = self.computing.num_computed.item(row) / self.chunk_tokens
        return self.computing.prefill.item(row) + num_chunks * self.table.beside_ms.item(row)

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
    facts, running, num_tokens = table.facts, table.num_decoding, query.num_prompt_tokens
    scalars = facts.scalars(weights)
    cached = table.num_cached_tokens(query)
    uncached = float(num_tokens) - cached
    computing = _computing(query, table, cached, uncached, scalars)
    output = facts.output(query.max_tokens)
    prompt_kv = kv = facts.zeros
    if num_tokens + facts.most_output > facts.room_tokens:
        prompt_kv = _pressure(table, cached, num_tokens, weights)
        kv = _pressure(table, cached, num_tokens + output.num_tokens, weights)
    load = output.share_ms * running
    stall = np.maximum(running, scalars.min_stalled)
    stall *= computing.prefill
    stall *= scalars.stall_weight
    compute, generate = computing.queue + computing.prefill, output.decode_ms + load
    if computing.pulls is not None:
        compute += computing.pull
    if kv is not facts.zeros:
        generate += kv
    if table.stale_ms is not facts.zeros:
        generate += table.stale_ms
    totals = np.empty((1 + len(facts.prefills), len(facts.decodes)))
    alone = compute + computing.steps
    alone += stall
    alone += generate
    totals[0] = alone[facts.of_decodes]
    compute += scalars.handoff_ms
    if prompt_kv is not facts.zeros:
        compute += prompt_kv
    if table.stale_ms is not facts.zeros:
        compute += table.stale_ms
    generate += table.queue_ms
    exposed = _exposed(query, table, computing, uncached, scalars)
    remote = np.add(exposed, compute[facts.of_prefills, None], totals[1:])
    remote += generate[facts.of_decodes]
    _bar(query, table, uncached[facts.of_decodes], totals, scalars, weights.remote_prefill_min_tokens)
    terms = (prompt_kv, output.decode_ms, load, kv, stall, exposed)
    return Costs(num_tokens, table, computing, *terms, weights.handoff_ms, weights.chunk_tokens, totals)


def _bar(
    query: Query, table: Table, uncached: Floats, totals: Floats, scalars: Scalars, remote_prefill_min_tokens: int
) -> None:
    """Make placements that may not be infinitely dear. What is `uncached` on decode workers [decodes]."""
    facts, local, remote = table.facts, totals[0], totals[1:]
    if query.excluded or query.num_prompt_tokens > facts.least_max_tokens:
        fit = table.fit(query)
        totals[:, ~fit[facts.of_decodes]] = np.inf
        remote[~fit[facts.of_prefills]] = np.inf
    if facts.match is not None:
        remote[~facts.match] = np.inf
    short = uncached <= scalars.local_prefill_max_tokens
    if np.count_nonzero(short):
        remote[:, short] = np.inf
    if remote_prefill_min_tokens:
        long = uncached >= remote_prefill_min_tokens
        local[long & np.isfinite(remote).any(axis=0)] = np.inf


def _computing(query: Query, table: Table, cached: Floats, uncached: Floats, scalars: Scalars) -> Computing:
    """Computing the prompt on each worker, with a prefix pulled from a peer where that is cheaper.

    The longest prefix of all is the only one worth a look: reading a token costs the same wherever it is.
    """
    facts, num_tokens = table.facts, float(query.num_prompt_tokens)
    alone = prefill_ms(facts, uncached, num_tokens)
    sources, longest = _longest(query, table, cached)
    gain = longest - cached
    pulls = gain >= scalars.min_pull_tokens
    if not np.count_nonzero(pulls):
        steps = _steps(table, uncached, scalars)
        return Computing(table.queue_ms, alone, steps, facts.zeros, uncached, None, sources)
    rest = num_tokens - longest
    pull, helped = gain * facts.read_ms, prefill_ms(facts, rest, num_tokens)
    pull += scalars.handoff_ms
    pulls &= pull + helped < alone
    pull *= pulls
    computed = uncached.copy()
    np.copyto(computed, rest, where=pulls)
    np.copyto(alone, helped, where=pulls)
    return Computing(table.queue_ms, alone, _steps(table, computed, scalars), pull, computed, pulls, sources)


def _steps(table: Table, num_computed: Floats, scalars: Scalars) -> Floats:
    """Where somebody generates, a prompt waits for half a step on average, and each of its chunks is computed in a step
    that takes as long as it would without."""
    num_steps: Floats = num_computed * scalars.chunks_per_token
    np.ceil(num_steps, num_steps)
    num_steps += scalars.half_step
    num_steps *= table.beside_ms
    return num_steps


def prefill_ms(facts: Facts, num_tokens: Floats, end: float) -> Floats:
    """Time to compute the last `num_tokens` before token `end`: each costs its own time, and a little for every token
    before it."""
    taken: Floats = num_tokens * facts.prefill_ms
    if facts.knows_attention:
        taken += num_tokens * facts.attention_ms * (end - 0.5 * num_tokens)
    return taken


def _longest(query: Query, table: Table, cached: Floats) -> tuple[Ints, Floats]:
    """For each worker the peer that has most of the prompt, and how much, or one of both for all: also one that is full
    or draining, but none that failed the request, unless by draining."""
    facts = table.facts
    stored = cached if table.num_stored_pages is table.num_cached_pages else table.num_stored_tokens(query)
    if query.excluded:
        stored = stored.copy()
        stored[[row for row in facts.rows_of(query.excluded) if not facts.drains[row]]] = -1
    if facts.num_groups == 1:
        best: Ints = stored.argmax(axis=0, keepdims=True)
        return best, stored.take(best)
    bests = np.array([rows[stored.take(rows).argmax()] for rows in facts.rows_of_group], np.int64)
    sources = bests.take(facts.group)
    return sources, stored.take(sources)


def _exposed(query: Query, table: Table, computing: Computing, uncached: Floats, scalars: Scalars) -> Floats:
    """Time for which reading pages [prefills, decodes] goes on with nothing left to compute.

    Pages of a chunk are read while the next one is computed: exposed is the reading of the last chunk, or all that
    takes longer than computing the chunks before the last.
    """
    facts, prefills = table.facts, table.facts.of_prefills
    last = np.minimum(computing.num_computed, scalars.chunk_tokens)
    hidden_ms = computing.prefill - prefill_ms(facts, last, float(query.num_prompt_tokens))
    read_ms = facts.read_ms[facts.of_decodes]
    reading_ms = uncached[facts.of_decodes] * read_ms
    exposed: Floats = last[prefills, None] * read_ms
    np.minimum(exposed, reading_ms, out=exposed)
    return np.maximum(exposed, reading_ms - hidden_ms[prefills, None], out=exposed)


def _pressure(table: Table, cached: Floats, num_tokens: Floats | int, weights: Weights) -> Floats:
    """What it costs others to make room for so many tokens, of which some are cached: to compute again what is evicted,
    if it is asked for again, and to wait for what cannot be."""
    facts = table.facts
    most = (num_tokens - cached) / facts.page_size + 2  # partly filled pages at both ends
    if not np.count_nonzero(most > facts.free_pages):
        return facts.zeros
    held = cached // facts.page_size
    lacking = np.maximum(0.0, num_tokens // facts.page_size + 1 - held - facts.free_pages)
    evicted = np.minimum(lacking, np.maximum(0.0, facts.cached_pages - held))
    again_ms = weights.eviction_weight * evicted * facts.page_size * facts.prefill_ms
    pressure: Floats = again_ms + (lacking - evicted) * weights.missing_page_ms
    return pressure


def _sum(terms: Terms) -> Terms:
    """Terms of one name added up."""
    total: dict[str, float] = {}
    for name, cost in terms:
        total[name] = total.get(name, 0.0) + cost
    return tuple(total.items())
