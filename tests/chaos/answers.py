"""What clients got, chunk by chunk, and whether it is what they should have got."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.requests import Ask

COMPLETE, LEFT = "complete", "left by the client"
# Not one byte of an answer, or only that the gateway drains: the client asks another gateway.
NOT_TAKEN = "not taken by a gateway that ends"
# The connection broke amid an answer.
GATEWAY_LOST = "lost with a killed gateway"
LATE = "no end within deadline + 1 s"


@dataclass
class Output:
    """One choice of an answer. `told` are the log-probabilities of a prompt that it repeats, which come all at once,
    and `arrivals` the unix times of its chunks."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_logprobs: int = 0
    finish_reason: str | None = None
    arrivals: list[float] = field(default_factory=list)
    told: list[float | None] = field(default_factory=list)

    def take(self, choice: dict[str, Any], now: float) -> None:
        """Add a chunk, or a whole choice."""
        token_ids, found = choice.get("token_ids") or [], (choice.get("logprobs") or {}).get("token_logprobs", [])
        self.token_ids += token_ids
        self.text += choice["text"]
        self.told += found[: max(0, len(found) - len(token_ids))]
        self.num_logprobs += min(len(found), len(token_ids))
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        self.arrivals.append(now)

    def difference(self, twin: "Output", whole: bool) -> str | None:
        """Where this is not what the twin got, or cannot become it."""
        num_tokens, num_chars = len(self.token_ids), len(self.text)
        pairs = {
            "token_ids": (self.token_ids, twin.token_ids if whole else twin.token_ids[:num_tokens]),
            "text": (self.text, twin.text if whole else twin.text[:num_chars]),
            "num_logprobs": (self.num_logprobs, twin.num_logprobs if whole else min(num_tokens, twin.num_logprobs)),
            "told": (self.told, twin.told if whole or self.told else []),
            "finish_reason": (self.finish_reason, twin.finish_reason if whole else self.finish_reason),
        }
        wrong = (f"{name}: {mine!r} is not {theirs!r}" for name, (mine, theirs) in pairs.items() if mine != theirs)
        return next(wrong, None)


@dataclass
class Answer:
    """One try of a request at one gateway. Times are unix times. `end` is one of the above or "refused: REASON"."""

    ask: Ask
    gateway: int
    started: float
    give_up: float
    begun: bool = False
    end: str = ""
    ended: float = 0.0
    outputs: dict[int, Output] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs.values())

    @property
    def overrun_s(self) -> float:
        """Time that it lasted beyond its deadline; negative if it ended before."""
        return self.ended - self.give_up

    def difference(self, twin: Sequence[Output]) -> str | None:
        """Where this is not what the twin got; a wrong number of choices included."""
        if self.end == COMPLETE and sorted(self.outputs) != list(range(len(twin))):
            return f"choices {sorted(self.outputs)} of {len(twin)}"
        found = (output.difference(twin[i], self.end == COMPLETE) for i, output in self.outputs.items())
        return next((problem for problem in found if problem), None)
