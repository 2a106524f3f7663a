"""One output of a request: what is counted of it so far, and all that it said."""

from dataclasses import dataclass, field

from protos.forebay.v1 import generation_pb2
from services.gateway.output import Delta
from services.gateway.parsers.api import CallPart


@dataclass(slots=True)
class Progress:
    """One choice so far."""

    num_tokens: int = 0
    num_reasoning: int = 0
    num_chars: int = 0
    prompt_logprobs: list[generation_pb2.TokenLogprobs] = field(default_factory=list)
    begun: bool = False
    usage: generation_pb2.Usage | None = None
    around_text: tuple[bytes, bytes] | None = None


@dataclass(slots=True)
class Total:
    """One choice, all of it."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprobs] = field(default_factory=list)
    end: Delta | None = None

    def add(self, delta: Delta) -> None:
        """Take what is new."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        for part in delta.calls:
            if part.name is not None:
                self.calls.append(CallPart(part.index, part.name))
            self.calls[part.index].arguments += part.arguments
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.finish_reason:
            self.end = delta
