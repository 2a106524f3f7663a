"""Conversations: what is said in them and when they begin, decided from a seed before the first request."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

FIRST_TOKEN_ID, LAST_TOKEN_ID = 100, 30_000


@dataclass(frozen=True, slots=True)
class Turn:
    """What a client adds to its conversation `pause_s` after the last answer, and how long an answer it wants."""

    token_ids: tuple[int, ...]
    output_tokens: int
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """The prompt of each turn is all that was said before, answers included, and what the turn adds."""

    starts_s: float
    turns: tuple[Turn, ...]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Agents:
    """Tenants whose agents begin with the tenant's own system prompt and go on for some turns.

    Tenant k (from 1) is asked in proportion to k to the power of -`zipf`. Conversations begin at `rate` per second on
    average, Poisson, `burst` times as often in the first quarter of every 20 s as in the rest of it.
    """

    rate: float = 3.0
    duration_s: float = 60.0
    num_tenants: int = 24
    zipf: float = 1.1
    burst: float = 3.0
    system_tokens: int = 768
    turn_tokens: int = 96
    output_tokens: int = 24
    max_turns: int = 6
    pause_s: float = 1.5
    seed: int = 0


BURST_PERIOD_S = 20.0


def agents(shape: Agents) -> list[Conversation]:
    """Conversations in the order of their starts."""
    chance = random.Random(f"agents {shape.seed}")
    systems = [token_ids(chance, shape.system_tokens) for _ in range(shape.num_tenants)]
    popularity = [rank**-shape.zipf for rank in range(1, shape.num_tenants + 1)]
    made = []
    for starts_s in _starts(shape, chance):
        tenant = chance.choices(range(shape.num_tenants), popularity)[0]
        turns = [_turn(shape, chance) for _ in range(chance.randint(1, shape.max_turns))]
        turns[0] = replace(turns[0], token_ids=systems[tenant] + turns[0].token_ids, pause_s=0.0)
        made.append(Conversation(starts_s, tuple(turns), f"tenant-{tenant}"))
    return made


def _starts(shape: Agents, chance: random.Random) -> Iterable[float]:
    """A Poisson process of changing rate, thinned out of one of the highest rate (Lewis and Shedler, 1979)."""
    low = shape.rate * 4 / (shape.burst + 3)
    at_s = chance.expovariate(low * shape.burst)
    while at_s < shape.duration_s:
        in_burst = at_s % BURST_PERIOD_S < BURST_PERIOD_S / 4
        if in_burst or chance.random() < 1 / shape.burst:
            yield at_s
        at_s += chance.expovariate(low * shape.burst)


def _turn(shape: Agents, chance: random.Random) -> Turn:
    length = round(shape.turn_tokens * chance.uniform(0.5, 1.5))
    output = max(2, round(shape.output_tokens * chance.uniform(0.5, 1.5)))
    return Turn(token_ids(chance, length), output, chance.expovariate(1 / shape.pause_s))


def singles(rate: float, duration_s: float, input_tokens: int, output_tokens: int, seed: int) -> list[Conversation]:
    """Conversations of one turn, nothing of them shared, lengths within a quarter of the middle, Poisson."""
    chance, at_s, made = random.Random(f"singles {seed}"), 0.0, []
    while (at_s := at_s + chance.expovariate(rate)) < duration_s:
        prompt = token_ids(chance, round(input_tokens * chance.uniform(0.75, 1.25)))
        output = max(2, round(output_tokens * chance.uniform(0.75, 1.25)))
        made.append(Conversation(at_s, (Turn(prompt, output),)))
    return made


def token_ids(chance: random.Random, count: int) -> tuple[int, ...]:
    """Random ones."""
    return tuple(chance.choices(range(FIRST_TOKEN_ID, LAST_TOKEN_ID + 1), k=count))
