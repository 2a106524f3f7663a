"""Simpler policies, to compare with: each puts the possible placements in order by one thing alone.

All prefer a pair to prefill on the decode worker wherever the cost allows both, as a fleet that always disaggregates
does; where prefill workers are absent or full, placements are on one worker.
"""

from collections.abc import Callable

import numpy as np

from services.router.candidate import Query
from services.router.cost import Costs
from services.router.page_index import Ints
from services.router.table import Floats, Table, hash64

Key = Callable[[Query, Table, Costs], Floats]
"""What a policy thinks of each worker [workers]: the lowest is best."""


def rival_order(name: str, query: Query, table: Table, scored: Costs, totals: Floats) -> Ints:
    """Numbers of the possible placements by the policy of this name, a key of RIVALS; `totals` is inf for those that
    cannot be. Workers alone come behind all pairs: for when no prefill worker has room."""
    facts, possible = table.facts, np.flatnonzero(np.isfinite(totals))
    liking = RIVALS[name](query, table, scored)
    prefill, decode = np.divmod(possible, len(facts.decodes) or 1)
    of_prefills = np.append(np.inf, liking[facts.of_prefills])
    return possible[np.lexsort((liking[facts.of_decodes][decode], of_prefills[prefill]))]


def at_random(query: Query, table: Table, scored: Costs) -> Floats:  # noqa: ARG001 - all policies are called alike
    """By a hash of the request: no state, and every router agrees."""
    return np.random.default_rng(hash64(query.request_id.encode())).random(len(table.facts.workers))


def round_robin(query: Query, table: Table, scored: Costs) -> Floats:  # noqa: ARG001
    """Who was given a request longest ago."""
    return table.last_placed.astype(np.float64)


def least_loaded(query: Query, table: Table, scored: Costs) -> Floats:  # noqa: ARG001
    """Who has least to do: prompts queued, then sequences that run."""
    return table.queue_ms + table.num_decoding * table.facts.step_ms


def longest_prefix(query: Query, table: Table, scored: Costs) -> Floats:
    """Who has most of the prompt, whatever else it has to do; where nobody has any, as the request's hash says."""
    return at_random(query, table, scored) - table.num_cached_tokens(query)


RIVALS: dict[str, Key] = {
    "random": at_random,
    "round-robin": round_robin,
    "least-loaded": least_loaded,
    "prefix": longest_prefix,
}
