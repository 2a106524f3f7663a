"""Warming up: every kind of step is computed before anybody waits for one.

What is made at first use (kernels compiled, graphs recorded, libraries built) takes seconds, which the first requests
would wait for, and rates that are measured meanwhile say nothing of the steps that follow. So a worker computes its own
kinds of steps before it can be found: as sequences of an engine like its own, over the same executor and pages, which
is thrown away with its books. What stays is what was made, and the rates of a second, warm round.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from shared.engine.api import EngineRequest, EngineSpec, Failed, Recorded, SamplingParams
from shared.engine.engine import Engine
from shared.engine.intake import limits
from shared.engine.kv.store import KvStore
from shared.engine.meter import Meter
from shared.errors import Internal

log = logging.getLogger(__name__)

# A prompt of so many full steps shows what a token costs that has many before it. Where nothing is made at first use
# there is only a rate to find, and few tokens do for that.
NUM_CHUNKS = 4
FEW_TOKENS, FEW_SEQUENCES = 64, 4
# Other prompts are this long, twice as long and so on, and one token more: kernels are compiled anew for numbers that
# sixteen divides.
LEAST_PROMPT = 16
# Graphs that only fit longer contexts are made at first use: to come there takes long.
MOST_CONTEXT = 8192 + 64
# What sequences generate in the first round, and in the second, where the one that is alone counts most.
FEW, MANY = 2, 16
PAGES_OF_EACH = 3
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
    {"temperature": 0.8, "presence_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": ((1, 0.5),)},
    {"num_logprobs": 5},
)
SAY_AGAIN_S = 5.0
LEASE_TTL_MS = 10_000


@dataclass(frozen=True, slots=True)
class Scope:
    """What a worker will compute: steps of an executor with these facts, in an engine with these limits. One that does
    not generate computes prompts for others."""

    spec: EngineSpec
    recorded: Recorded | None
    max_step_tokens: int
    max_num_sequences: int
    max_drafts: int = 0
    generates: bool = True

    @property
    def most_tokens(self) -> int:
        """Of a prompt, so that what is generated here has room behind it."""
        room = limits(self.spec).max_len - self.max_drafts - MANY - 1
        return max(1, min(room, (self.spec.num_pages - PAGES_OF_EACH) * self.spec.layout.page_size))

    def most_sequences(self, num_tokens: int) -> int:
        """That fit the pool when they have a prompt of so many tokens in common."""
        num_own = self.spec.num_pages - self.spec.layout.num_pages(num_tokens)
        return max(1, min(self.max_num_sequences, num_own // PAGES_OF_EACH))


@dataclass(frozen=True, slots=True)
class Kind:
    """Sequences alike: prompts of `num_tokens` tokens, begun like all others that are `common` (which are found cached
    once the longest was computed), that have `num_outputs` tokens generated. At first `num_drafts` drafts are verified,
    right or not."""

    num_tokens: int
    num_sequences: int = 1
    common: bool = False
    num_outputs: int = 1
    num_drafts: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)


def least(scope: Scope) -> list[Kind]:
    """A long prompt, and a sequence that generates alone: what rates cannot do without."""
    num_tokens = NUM_CHUNKS * scope.max_step_tokens if scope.recorded else min(scope.max_step_tokens, FEW_TOKENS)
    prompt = Kind(min(scope.most_tokens, num_tokens), common=True)
    alone = Kind(_behind_pages(scope, 1), 1, True, MANY if scope.recorded else FEW)
    return [prompt, alone] if scope.generates else [prompt]


def kinds(scope: Scope) -> Iterator[Kind]:
    """Those of the first round besides: whatever makes something that is not there yet."""
    page_size, most = scope.spec.layout.page_size, scope.most_tokens
    if scope.recorded is None:
        return
    if scope.recorded.rooms:
        yield Kind(min(most, MOST_CONTEXT), common=True)
    num_tokens, budget = LEAST_PROMPT, min(scope.max_step_tokens, most)
    while num_tokens < budget:
        yield from (Kind(num_tokens), Kind(num_tokens + 1))
        num_tokens *= 2
    if scope.generates:
        yield from _generating(scope, scope.recorded)
    for rest in range(1, scope.recorded.max_width + 1):  # behind what is cached little may be left
        if page_size + rest <= most:
            yield Kind(page_size + rest, common=True)


def _generating(scope: Scope, recorded: Recorded) -> Iterator[Kind]:
    """All that is recorded, the largest first, and every way to choose tokens."""
    contexts = [1, *(room + 1 for room in recorded.rooms[:-1])]
    for num_tokens in [_behind_pages(scope, context) for context in contexts]:
        if num_tokens > min(scope.most_tokens, MOST_CONTEXT):
            continue
        for size in _sizes(scope, recorded.sizes, num_tokens):
            most_drafts = min(scope.max_drafts, recorded.max_width - 1, scope.max_step_tokens // size - 1)
            for num_drafts in range(most_drafts, -1, -1):
                yield Kind(num_tokens, size, True, max(FEW, num_drafts + 1), num_drafts)
    for params in SAMPLED:
        for size in sorted({1, min(FEW_SEQUENCES, scope.max_num_sequences)}):
            yield Kind(_behind_pages(scope, 1), size, True, FEW, sampling=SamplingParams(**params))


def measured(scope: Scope) -> list[Kind]:
    """Those of the second round, which tell how fast prompts and generation are. What comes last counts most."""
    prompt, *alone = least(scope)
    sizes = scope.recorded.sizes if scope.recorded else (FEW_SEQUENCES,)
    more = [size for size in _sizes(scope, sizes, alone[0].num_tokens) if size > 1] if alone else []
    return [prompt, *(replace(alone[0], num_sequences=size, num_outputs=FEW) for size in more), *alone]


def _sizes(scope: Scope, sizes: tuple[int, ...], num_tokens: int) -> list[int]:
    """How many sequences take a graph each, or show what one more costs; falling."""
    most = scope.most_sequences(num_tokens)
    return sorted({min(size, most) for size in sizes}, reverse=True)


def _behind_pages(scope: Scope, num_tokens: int) -> int:
    """The length of a prompt from so many tokens on of which all but the last can be cached."""
    page_size = scope.spec.layout.page_size
    return min(max(page_size, -(-(num_tokens - 1) // page_size) * page_size) + 1, scope.most_tokens)


class Rehearsal:
    """A round of steps. `make_engine` makes the engine that computes them."""

    def __init__(self, scope: Scope, make_engine: Callable[[KvStore, Meter], Engine]) -> None:
        self.meter = Meter()
        self._scope, self._chance = scope, random.Random("warm-up")
        kv = KvStore(scope.spec.num_pages, scope.spec.layout.page_size, LEASE_TTL_MS)
        self._engine = make_engine(kv, self.meter)
        self._common: list[int] = []

    def run(self, kind: Kind) -> None:
        """Compute the sequences to their end. Raises Internal for a step that fails, and WorkerLost."""
        requests = [self._request(kind, number) for number in range(kind.num_sequences)]
        for request in requests:
            self._engine.submit(request)
        for _ in range(2):  # prompts for others keep their pages until they are let go of
            while self._engine.has_work():
                for event in self._engine.step():
                    if isinstance(event, Failed):
                        raise Internal(f"warming up failed: {event.fault.message}")
            for request in requests:
                self._engine.cancel(request.request_id)

    def _request(self, kind: Kind, number: int) -> EngineRequest:
        while len(self._common) < kind.num_tokens and kind.common:
            self._common.append(self._token())
        prompt = self._common[: kind.num_tokens] if kind.common else [self._token() for _ in range(kind.num_tokens)]
        sampling = replace(kind.sampling, max_tokens=kind.num_outputs, ignore_eos=True, seed=number)
        drafts = tuple(self._token() for _ in range(kind.num_drafts))
        return EngineRequest(
            f"warm-up {number}", tuple(prompt), sampling, prefill_only=not self._scope.generates, draft_token_ids=drafts
        )

    def _token(self) -> int:
        return self._chance.randrange(self._scope.spec.vocab_size)


def warm_up(
    scope: Scope,
    make_engine: Callable[[KvStore, Meter], Engine],
    budget_s: float,
    is_wanted: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.monotonic,
) -> Meter:
    """Compute steps of every kind; the rates of the warm ones. After `budget_s` only the least is computed, and nothing
    once it `is_wanted` no longer. Raises Internal for a step that fails, as it would for a client, and WorkerLost."""
    started, first, more = clock(), least(scope), list(kinds(scope))
    log.info("warming up: %d kinds of steps, for %.0f s or so", len(first) + len(more), budget_s)
    made, told, rehearsal = 0, started, Rehearsal(scope, make_engine)
    for kind in (*first, *more):
        if not is_wanted() or (made >= len(first) and clock() - started > budget_s):
            break
        rehearsal.run(kind)
        made += 1
        if clock() - told > SAY_AGAIN_S:
            told = clock()
            log.info("warming up: %d of %d kinds of steps after %.0f s", made, len(first) + len(more), told - started)
    in_time = made == len(first) + len(more)
    if not in_time:
        log.warning("time was up: %d kinds of steps are made ready at first use", len(first) + len(more) - made)
    rehearsal = Rehearsal(scope, make_engine)
    for kind in measured(scope) if in_time else first:
        if is_wanted():
            rehearsal.run(kind)
    rates = rehearsal.meter
    rates.num_steps = 0  # nobody asked for these
    log.info(
        "warmed up in %.1f s: a prompt takes %.3f ms a token, a step that generates %.2f ms",
        clock() - started, rates.prefill_ms_per_token, rates.decode_step_ms,
    )  # fmt: skip
    return rates
