"""What is asked, and when: decided before the first request, from a seed."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` prompts of `input_tokens` random token ids; the first `shared_tokens` are the same in all.

    Lengths vary evenly within ± `spread` (a share of 1). Requests come at `rate` per second, Poisson, or, without a
    rate, whenever one of `concurrency` callers is free.
    """

    num_requests: int = 32
    input_tokens: int = 512
    output_tokens: int = 64
    spread: float = 0.0
    shared_tokens: int = 0
    concurrency: int = 8
    rate: float | None = None
    num_warmup: int = 2
    seed: int = 0
    first_token_id: int = 100
    last_token_id: int = 10_000


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; `at_s` counts from the start and is 0 where callers come whenever they are free."""

    at_s: float
    prompt_token_ids: tuple[int, ...]
    output_tokens: int


def asks(workload: Workload) -> list[Ask]:
    """The requests to measure. Raises ValueError for a workload that makes no sense."""
    _check(workload)
    return _draw(workload, workload.num_requests, random.Random(f"measured {workload.seed}"))


def warmup(workload: Workload) -> list[Ask]:
    """Requests that are sent first and not measured: the shared prefix, if there is one, is cached after them."""
    return _draw(workload, workload.num_warmup, random.Random(f"warmup {workload.seed}"))


def _check(workload: Workload) -> None:
    if min(workload.num_requests, workload.input_tokens, workload.output_tokens, workload.concurrency) < 1:
        raise ValueError("requests, lengths and concurrency begin at 1")
    if workload.shared_tokens > workload.input_tokens:
        raise ValueError("the shared prefix is longer than the prompt")
    if not 0 <= workload.spread < 1 or (workload.rate is not None and workload.rate <= 0):
        raise ValueError("spread lies in [0, 1), and a rate above 0")
    if not 0 <= workload.first_token_id < workload.last_token_id:
        raise ValueError("token ids run from the first to the last")


def _draw(workload: Workload, count: int, chance: random.Random) -> list[Ask]:
    shared = _ids(workload, workload.shared_tokens, random.Random(f"shared {workload.seed}"))
    at_s, drawn = 0.0, []
    for _ in range(count):
        at_s += chance.expovariate(workload.rate) if workload.rate else 0.0
        length = max(len(shared), _length(workload.input_tokens, workload, chance))
        prompt = shared + _ids(workload, length - len(shared), chance)
        drawn.append(Ask(at_s, prompt, _length(workload.output_tokens, workload, chance)))
    return drawn


def _length(middle: int, workload: Workload, chance: random.Random) -> int:
    return max(1, round(middle * chance.uniform(1 - workload.spread, 1 + workload.spread)))


def _ids(workload: Workload, count: int, chance: random.Random) -> tuple[int, ...]:
    return tuple(chance.choices(range(workload.first_token_id, workload.last_token_id + 1), k=count))
