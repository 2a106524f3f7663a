"""The workers of a model as arrays, one row each: what the cost is computed from, for all of them at once."""

from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.router.candidate import Query, Weights, Worker
from services.router.page_index import Ints
from shared.blackboard.records import Load, Role

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MAX_CALIBRATION = 2.0
# From here on, of 1, a worker knows its rates; below this it knows nothing.
KNOWN, UNKNOWN = 0.5, 0.01


class Output(NamedTuple):
    """Generating an output on each worker [workers]: its tokens, the time that they take on a worker that is idle, and
    what they take longer for, or take from, each sequence that runs there."""

    num_tokens: Floats
    decode_ms: Floats
    share_ms: Floats


class Scalars:
    """Those weights that costs are reckoned with, as arrays without dimensions: numpy takes 0.3 us to multiply 64
    numbers with one, and 0.5 with a number of Python's, which it has to convert."""

    def __init__(self, weights: Weights) -> None:
        self.local_prefill_max_tokens = np.array(float(weights.local_prefill_max_tokens))
        self.min_pull_tokens = np.array(float(weights.min_pull_tokens))
        self.chunk_tokens = np.array(float(weights.chunk_tokens))
        self.chunks_per_token = np.array(1 / weights.chunk_tokens)
        self.handoff_ms = np.array(weights.handoff_ms)
        self.min_stalled = np.array(weights.min_stalled)
        self.stall_weight = np.array(weights.stall_weight)
        self.half_step = np.array(0.5)


class Facts:
    """What workers reported [workers]: the same for every request until the next heartbeat."""

    def __init__(self, workers: Sequence[Worker], weights: Weights) -> None:
        self.workers = tuple(workers)
        self._weights, self._scalars = weights, Scalars(weights)
        loads, pages = [w.registration.load for w in workers], [w.registration.pages for w in workers]
        cards, groups = [w.card for w in workers], sorted({w.group for w in workers})
        self.num_groups = len(groups)
        self.group: Ints = np.array([groups.index(w.group) for w in workers], np.int64)
        self.rows_of_group: list[Ints] = [np.flatnonzero(self.group == group) for group in range(len(groups))]
        self.is_decode: Bools = np.array([w.role is Role.DECODE for w in workers], np.bool_)
        self.decodes, self.prefills = np.flatnonzero(self.is_decode).tolist(), np.flatnonzero(~self.is_decode).tolist()
        """Their rows, in the order in which placements count them."""
        self.of_decodes, self.of_prefills = _rows(self.decodes), _rows(self.prefills)
        """The same, to take their part of a column."""
        self.prefill_of: Ints = np.array([len(workers), *self.prefills], np.int64)
        """Rows of prefill workers as placements count them: first nobody, in the row behind all workers."""
        match = self.group[self.of_prefills][:, None] == self.group[self.of_decodes][None, :]
        self.match: Bools | None = match if self.num_groups > 1 else None
        """Who can exchange pages [prefills, decodes]; None: all of them."""
        self.drains: Bools = np.array([w.registration.draining for w in workers], np.bool_)
        self.page_size = _column([card.page_size for card in cards])
        self.free_pages, self.cached_pages = _column([p.free for p in pages]), _column([p.cached for p in pages])
        pool_pages = _column([p.total or np.inf for p in pages])
        self.has_pool: Bools = np.isfinite(pool_pages)
        self.free_pages[~self.has_pool] = np.inf
        most = np.minimum(_column([card.max_model_len for card in cards]), pool_pages * self.page_size) - 1
        self.max_tokens = np.where(self.drains, -1.0, most)
        """The longest prompt that each takes now, and has pages for, its first token included."""
        self.least_max_tokens = self.max_tokens.min(initial=np.inf)
        self.room_tokens = float(((self.free_pages - 2) * self.page_size).min(initial=np.inf))
        """Of so many, everybody has free pages for prompt and output: two may be partly filled."""
        self._weigh_prompts(loads, weights)
        self._weigh_steps(loads, weights)
        rates = _column([load.transfer_bytes_per_ms or weights.transfer_gb_per_s * 1e6 for load in loads])
        self.read_ms = _column([card.kv_bytes_per_token for card in cards]) / rates
        self.output_tokens = _column([load.output_tokens or weights.output_tokens for load in loads])
        self.most_output = float(self.output_tokens.max(initial=0.0))
        self._load_weight = weights.load_weight
        self._outputs: dict[int, Output] = {}
        self.zeros = np.zeros(len(workers))
        self.zeros.flags.writeable = False

    def _weigh_prompts(self, loads: Sequence[Load], weights: Weights) -> None:
        """What prompts take."""
        measured = _column([load.prefill_ms_per_token for load in loads])
        known = np.where(measured > 0, 1 - _column([load.prefill_doubt for load in loads]), 0.0)
        self.has_rate: Bools = known >= KNOWN
        """Who has measured what prompts take; of the others that is a guess, or little more."""
        trust = self._trust(known)
        self.prompt_ratio = _column([calibration(load) for load in loads]) ** (known * trust)
        believed = self._believed(measured, trust, weights.default_prefill_ms_per_token)
        self.prefill_ms = believed * self.prompt_ratio
        pairs = self._filled(_column([load.prefill_ms_per_pair for load in loads]), measured > 0, 0.0)
        self.attention_ms = pairs * self.prompt_ratio * np.where(measured > 0, believed / np.maximum(measured, 1e-9), 1)
        self.knows_attention = bool(self.attention_ms.any())

    def _weigh_steps(self, loads: Sequence[Load], weights: Weights) -> None:
        """What generating takes, and what it takes from prompts."""
        steps = _column([load.decode_step_ms for load in loads])
        self.step_ms = self._filled(steps, steps > 0, weights.default_decode_step_ms)
        self.sequence_ms = np.maximum(
            _column([load.decode_ms_per_sequence for load in loads]), weights.min_sequence_share * self.step_ms
        )
        self.token_ms = self.step_ms + self.sequence_ms
        self.shared_ms = np.where(self.is_decode, self.step_ms * self.prompt_ratio, 0.0)
        """A step that prompts share with those who generate: nobody does on prefill workers."""

    def beside_ms(self, num_decoding: Floats) -> Floats:
        """What a chunk takes beside so many sequences [workers]: none, or the step of some."""
        shared: Floats = np.minimum(num_decoding, 1.0) * self.shared_ms
        return shared

    def scalars(self, weights: Weights) -> Scalars:
        """These weights, which are mostly those that the facts were made with."""
        return self._scalars if weights is self._weights else Scalars(weights)

    def output(self, max_tokens: int) -> Output:
        """An output of at most so many tokens; 0: as many as usual. Few numbers are asked for within a heartbeat."""
        if (found := self._outputs.get(max_tokens)) is None:
            num_tokens = np.minimum(self.output_tokens, max_tokens or np.inf)
            share_ms = self._load_weight * num_tokens * self.sequence_ms
            found = self._outputs[max_tokens] = Output(num_tokens, num_tokens * self.token_ms, share_ms)
        return found

    def _trust(self, known: Floats) -> Floats:
        """How much each worker's rates of prompts are believed, from 0 to 1: wholly where nobody it can exchange pages
        with knows more, not at all where somebody knows twice as much. What each knows [workers], from 0 to 1."""
        trust = np.ones_like(known)
        for rows in self.rows_of_group:
            if (most := known[rows].max()) > UNKNOWN:
                trust[rows] = np.maximum(0.0, 2 * known[rows] / most - 1)
        return trust

    def _believed(self, measured: Floats, trust: Floats, default: float) -> Floats:
        """What a token of a prompt takes on each: as measured with a `trust` [workers] of 1; with none as on peers who
        know more; and by the geometric mean in between. A rate that is found wanting draws no prompts, and would stay
        as it is, while its peers get to know theirs better: it comes near those, and has its chance. Peers of its own
        role say more than others: rests of prompts, which decode workers compute, take longer for each token."""
        believed = self._filled(measured, measured > 0, default)
        sure = (trust > 0) & (measured > 0)
        for rows in self.rows_of_group:
            if not (known := rows[sure[rows]]).size:
                continue
            for kin in (rows[self.is_decode[rows]], rows[~self.is_decode[rows]]):
                like = kin[sure[kin]]
                typical = np.full(len(kin), np.median(measured[known]))
                if like.size:  # who is the only one of a role that is sure is no peer of itself
                    typical[(like.size > 1) | ~sure[kin]] = np.median(measured[like])
                believed[kin] *= (typical / believed[kin]) ** (1 - trust[kin])
        return believed

    def _filled(self, values: Floats, known: Bools, default: float) -> Floats:
        """A worker that has not measured a rate is taken to be like its peers that have, else like nobody in
        particular: a default that flatters it would draw every request to the one worker that knows nothing."""
        filled = np.where(known, values, default)
        for group in range(self.num_groups):
            peers = self.group == group
            if (peers & known).any():
                filled[peers & ~known] = np.median(values[peers & known])
        return filled

    @cached_property
    def salts(self) -> NDArray[np.uint64]:
        """A number for each name, and one for nobody, who comes last."""
        return np.array([*(hash64(worker.name.encode()) for worker in self.workers), 0], np.uint64)

    def rows_of(self, names: frozenset[str]) -> list[int]:
        """Rows of these workers."""
        return [row for row, worker in enumerate(self.workers) if worker.name in names]


class Table(NamedTuple):
    """Workers at one moment, for one request: facts, and [workers] of what changes between reports."""

    facts: Facts
    num_cached_pages: Ints
    """Of the prompt, when it is its turn there."""
    num_stored_pages: Ints
    """At this moment: what a peer can read."""
    queue_ms: Floats
    num_decoding: Floats
    """The roster's own array, as is `last_placed`: true until the next placement."""
    beside_ms: Floats
    """What each chunk of a prompt takes besides its own time: a step of those who generate there, if anybody does."""
    stale_ms: Floats
    """How much older than they should be the facts are; the facts' own zeros if none is."""
    last_placed: Ints
    """Which of the router's placements was the last on it."""

    @staticmethod
    def of(workers: Sequence[Worker], weights: Weights) -> "Table":
        """A table of workers as they say of themselves."""
        facts = Facts(workers, weights)
        pages = np.array([worker.num_cached_pages for worker in workers], np.int64)
        num_decoding = _column([worker.num_decoding for worker in workers])
        return Table(
            facts,
            pages,
            pages,
            _column([worker.queue_ms for worker in workers]),
            num_decoding,
            facts.beside_ms(num_decoding),
            _column([worker.stale_ms for worker in workers]),
            np.zeros(len(workers), np.int64),
        )

    def worker(self, row: int) -> Worker:
        """A row as an object."""
        worker = self.facts.workers[row]
        return Worker(
            worker.registration,
            worker.card,
            num_cached_pages=int(self.num_cached_pages[row]),
            queue_ms=float(self.queue_ms[row]),
            num_decoding=int(self.num_decoding[row]),
            stale_ms=float(self.stale_ms[row]),
        )

    def workers(self) -> list[Worker]:
        """All rows."""
        return [self.worker(row) for row in range(len(self.facts.workers))]

    def num_cached_tokens(self, query: Query) -> Floats:
        """Tokens of the prompt that need not be computed; the last one always must, for its logits."""
        return self._num_tokens(query, self.num_cached_pages)

    def num_stored_tokens(self, query: Query) -> Floats:
        """Those of them that a peer can read now."""
        return self._num_tokens(query, self.num_stored_pages)

    def _num_tokens(self, query: Query, num_pages: Ints) -> Floats:
        tokens: Floats = np.minimum(num_pages * self.facts.page_size, query.num_prompt_tokens - 1.0)
        return tokens

    def fit(self, query: Query) -> Bools:
        """Who may take part."""
        fit: Bools = self.facts.max_tokens >= query.num_prompt_tokens
        if query.excluded:
            fit[self.facts.rows_of(query.excluded)] = False
        return fit


def calibration(load: Load) -> float:
    """What to multiply a worker's rates with: what prompts really took there, over what the rates say. Steps
    that prompts share with decodes, or a machine that others use too, make them slower than any rate says."""
    return min(max(load.prompt_ratio, 1 / MAX_CALIBRATION), MAX_CALIBRATION) if load.prompt_ratio else 1.0


def hash64(data: bytes) -> int:
    """64 bits that depend on every bit of the data."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _column(values: Sequence[float]) -> Floats:
    return np.array(values, np.float64)


def _rows(rows: Sequence[int]) -> slice | Ints:
    """An index for these rows; a slice where they stand together, which takes a tenth of the time."""
    together = slice(rows[0], rows[-1] + 1) if rows else slice(0)
    return together if len(range(together.stop)[together]) == len(rows) else np.array(rows, np.int64)
