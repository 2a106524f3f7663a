"""What the clients of a chaos run ask for: a pure function of a seed, with every option among it."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

DEADLINE_S = 30.0
SHARED = [[tenant * 1000 + token for token in range(400)] for tenant in range(1, 6)]
# Of the sim's text, in which every token is its own number: found within a word, across two words, or never.
STOPS = ("99", "7 1", "2 2", "never")


@dataclass(frozen=True)
class Ask:
    """One request. `body` is complete but for the model; `leaves_after` is when its client goes away, in chunks."""

    name: str
    body: dict[str, Any]
    deadline_s: float = DEADLINE_S
    leaves_after: int | None = None
    options: tuple[str, ...] = field(default=())

    @property
    def prompt(self) -> list[int]:
        prompt: list[int] = self.body["prompt"]
        return prompt


def asks(seed: int, shortest_s: float = 0.1) -> Iterator[Ask]:
    """Requests without end. One in ten has a deadline too short for some, from `shortest_s`."""
    chance = random.Random(seed)
    for number in range(1 << 62):
        prompt = chance.choice(SHARED)[: chance.randrange(1, 400)] + chance.choices(range(10, 30_000), k=8)
        options = _options(chance)
        body = {"prompt": prompt, "max_tokens": chance.randrange(1, 60), "seed": chance.randrange(1 << 40)}
        body |= {"ignore_eos": True, "return_token_ids": True, "temperature": chance.choice((0.0, 0.7, 1.0))}
        body["stream"] = chance.random() < 0.9
        for option in options.values():
            body |= option
        yield Ask(
            name=f"chaos-{seed}-{number}",
            body=body,
            deadline_s=chance.uniform(shortest_s, 1.0) if chance.random() < 0.1 else DEADLINE_S,
            leaves_after=chance.randrange(1, 30) if body["stream"] and chance.random() < 0.12 else None,
            options=tuple(options),
        )


def _options(chance: random.Random) -> dict[str, dict[str, Any]]:
    """Some of the options, each in its share of the requests."""
    choices: tuple[tuple[str, float, dict[str, Any]], ...] = (
        ("penalties", 0.2, {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}),
        ("logprobs", 0.2, {"logprobs": chance.randrange(4)}),
        ("stop", 0.3, {"stop": [chance.choice(STOPS), "never ever"]}),
        ("n", 0.1, {"n": chance.randrange(2, 4)}),
        ("min_tokens", 0.1, {"min_tokens": 1}),
        ("top_p", 0.2, {"top_p": 0.9, "top_k": 40}),
    )
    return {name: option for name, share, option in choices if chance.random() < share}
