"""What the clients of a chaos run ask for: a pure function of a seed, with every option among it."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

SHARED = [[tenant * 1000 + token for token in range(400)] for tenant in range(1, 6)]
TOPICS = ("rivers", "the moon", "prime numbers", "bread", "a lighthouse", "old maps", "glass", "whales")


@dataclass(frozen=True)
class Kind:
    """What suits an engine. `stops` are strings that its text has now and then."""

    prompt: Callable[[random.Random], list[int] | str]
    stops: tuple[str, ...]
    deadline_s: float
    shortest_s: float


def _numbers(chance: random.Random) -> list[int]:
    """Token ids, many of which begin alike."""
    return chance.choice(SHARED)[: chance.randrange(1, 400)] + chance.choices(range(10, 30_000), k=8)


def _sentences(chance: random.Random) -> str:
    """A text, long for one in two."""
    facts = " ".join(f"Fact {i} is about {chance.choice(TOPICS)}." for i in range(chance.choice((2, 25))))
    return f"{facts} Write about {chance.choice(TOPICS)} and {chance.choice(TOPICS)}:"


# In the sim's text every token is its own number: stops are found within a word, across two words, or never.
SIM = Kind(_numbers, ("99", "7 1", "2 2", "never"), deadline_s=30.0, shortest_s=0.1)
MODEL = Kind(_sentences, (".", " the", ", and", "never"), deadline_s=90.0, shortest_s=0.5)


@dataclass(frozen=True)
class Ask:
    """One request. `body` is complete but for the model; `leaves_after` is when its client goes away, in chunks."""

    name: str
    body: dict[str, Any]
    deadline_s: float
    leaves_after: int | None = None
    options: tuple[str, ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """Of a text, about as many as there are."""
        prompt: list[int] | str = self.body["prompt"]
        return len(prompt) // (4 if isinstance(prompt, str) else 1)

    def patient(self, deadline_s: float) -> "Ask":
        """The same from a client that waits for its answer to the end."""
        return replace(self, deadline_s=deadline_s, leaves_after=None)


def asks(seed: int, kind: Kind = SIM) -> Iterator[Ask]:
    """Requests without end. One in ten has a deadline that is too short for some."""
    chance = random.Random(seed)
    for number in range(1 << 62):
        prompt, options = kind.prompt(chance), _options(chance, kind.stops)
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": chance.randrange(1, 60),
            "seed": chance.randrange(1 << 40),
        }
        body |= {"ignore_eos": True, "return_token_ids": True, "temperature": chance.choice((0.0, 0.7, 1.0))}
        body["stream"] = chance.random() < 0.9
        for option in options.values():
            body |= option
        yield Ask(
            name=f"chaos-{seed}-{number}",
            body=body,
            deadline_s=chance.uniform(1, 10) * kind.shortest_s if chance.random() < 0.1 else kind.deadline_s,
            leaves_after=chance.randrange(1, 30) if body["stream"] and chance.random() < 0.12 else None,
            options=tuple(options),
        )


def repeated(todo: Sequence[Ask]) -> Iterator[Ask]:
    """The same requests in the same order, without end, each time under another name."""
    return (replace(ask, name=f"{ask.name}-{turn}") for turn in count() for ask in todo)


def _options(chance: random.Random, stops: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Some of the options, each in its share of the requests."""
    choices: tuple[tuple[str, float, dict[str, Any]], ...] = (
        ("penalties", 0.2, {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}),
        ("logprobs", 0.2, {"logprobs": chance.randrange(4)}),
        ("echo", 0.1, {"echo": True, "logprobs": 1}),
        ("stop", 0.3, {"stop": [chance.choice(stops), "never ever"]}),
        ("n", 0.1, {"n": chance.randrange(2, 4)}),
        ("min_tokens", 0.1, {"min_tokens": 1}),
        ("top_p", 0.2, {"top_p": 0.9, "top_k": 40}),
    )
    return {name: option for name, share, option in choices if chance.random() < share}
