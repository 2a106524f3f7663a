"""What an output says, part by part in the order in which it says it, each part with the tokens of its text.

A fold over pieces, as the message is: where a chunk of tokens ends makes no difference but to how long parts are.
"""

from dataclasses import dataclass, field
from typing import Literal

from protos.forebay.v1 import generation_pb2
from services.gateway.parsers.api import Parsed

Kind = Literal["reasoning", "content", "call"]
Logprobs = generation_pb2.TokenLogprobs


@dataclass(slots=True)
class Part:
    """More of what is said. Of call `index` the first part has the name, and `text` is of its arguments. Tokens and
    log-probabilities are those of content, if they are wanted."""

    kind: Kind
    text: str = ""
    index: int = 0
    name: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)


class Parts:
    """Takes what one piece after the other adds to a message."""

    def __init__(self) -> None:
        self._new: list[Part] = []
        self._token_ids: list[int] = []  # of content that is to come
        self._logprobs: list[Logprobs] = []

    def token(self, token_id: int, logprobs: Logprobs) -> None:
        """A token within content, whose text may come later: or never, if it turns out to be a tag."""
        self._token_ids.append(token_id)
        self._logprobs.append(logprobs)

    def add(self, said: Parsed) -> None:
        """What a piece said, which is of one kind."""
        if said.reasoning:
            self._append(Part("reasoning", said.reasoning))
        if said.content:
            self._append(self._content(said.content))
        for call in said.calls:
            self._append(Part("call", call.arguments, call.index, call.name))

    def end(self) -> None:
        """The output ends: tokens whose text a stop string has cut off are told of without it."""
        if self._token_ids:
            self._append(self._content(""))

    def take(self) -> list[Part]:
        """What is new since the last time."""
        new, self._new = self._new, []
        return new

    def _content(self, text: str) -> Part:
        if not self._token_ids:
            return Part("content", text)
        part = Part("content", text, token_ids=self._token_ids, logprobs=self._logprobs)
        self._forget()
        return part

    def _forget(self) -> None:
        self._token_ids, self._logprobs = [], []

    def _append(self, part: Part) -> None:
        if part.kind != "content":
            self._forget()
        last = self._new[-1] if self._new else None
        if last is None or last.kind != part.kind or part.name is not None:
            self._new.append(part)
            return
        last.text += part.text
        last.token_ids += part.token_ids
        last.logprobs += part.logprobs
