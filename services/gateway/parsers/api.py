"""What parsers of model output are made of: tags and text go in, parts of a message come out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Tag:
    """A mark of structure. `certain`: it was a token of its own; else it is text that looks like one."""

    text: str
    certain: bool = True


Piece = str | Tag

# Tools by name, as the client described them: {"name", "description", "parameters": JSON schema}.
Tools = Mapping[str, Mapping[str, Any]]


@dataclass(slots=True)
class CallPart:
    """What is new of tool call `index`. The first part has the name; `arguments` concatenate to a JSON object."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Parsed:
    """What is new of a message."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)


class CallParser(ABC):
    """Reads one tool call, from after its opening tag.

    `name` is None until it is certain; a call that ends without one was none. What `feed`, `close` and `cut` return
    is further text of the arguments. `complete` tells, at the end, whether they are a whole JSON object.
    """

    name: str | None = None
    complete: bool = False

    @abstractmethod
    def ends_at(self, tag: Tag) -> bool:
        """Whether this tag closes the call; if not it is part of it."""

    @abstractmethod
    def feed(self, piece: Piece) -> str:
        """Take a piece of the call."""

    @abstractmethod
    def close(self) -> str:
        """The closing tag."""

    @abstractmethod
    def cut(self) -> str:
        """The model ended its turn without the closing tag. Only what cannot have lost anything is completed."""
