"""The items of a response, and the events by which a stream tells of them: one fold, so that both say the same.

An item is open while the output is within it, and at most one is. Events have no sequence numbers yet.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, Literal

import orjson

from services.gateway import logprobs
from services.gateway.logprobs import TokenNames
from services.gateway.parts import Kind, Part
from services.gateway.request import Job

Status = Literal["in_progress", "completed", "incomplete"]
Event = dict[str, Any]


class _Item(ABC):
    """One item. `place` is what its events say of where they belong."""

    prefix: str

    def __init__(self, name: str, index: int) -> None:
        self.id = f"{self.prefix}_{name}{index:02x}"
        self.place = {"item_id": self.id, "output_index": index}

    @abstractmethod
    def object(self, status: Status) -> dict[str, Any]:
        """The item as it is now."""

    def opened(self) -> Iterator[Event]:
        """Before it says anything."""
        yield from ()

    @abstractmethod
    def say(self, part: Part) -> Iterator[Event]:
        """It says more."""

    @abstractmethod
    def closed(self) -> Iterator[Event]:
        """It says no more."""

    @property
    def is_whole(self) -> bool:
        """Whether it is of use as it is, if the model ended it."""
        return True


class _Spoken(_Item):
    """An item with one part of content, a text."""

    event: str  # what its events are called

    def __init__(self, name: str, index: int) -> None:
        super().__init__(name, index)
        self.place |= {"content_index": 0}
        self.text = ""

    @abstractmethod
    def part(self) -> dict[str, Any]:
        """Its content as it is now."""

    def _content(self, status: Status) -> list[dict[str, Any]]:
        """None is there before it has said anything."""
        return [] if status == "in_progress" else [self.part()]

    def opened(self) -> Iterator[Event]:
        yield {"type": "response.content_part.added", **self.place, "part": self.part()}

    def say(self, part: Part) -> Iterator[Event]:
        self.text += part.text
        yield {"type": f"response.{self.event}.delta", **self.place, "delta": part.text}

    def closed(self) -> Iterator[Event]:
        yield {"type": f"response.{self.event}.done", **self.place, "text": self.text}
        yield {"type": "response.content_part.done", **self.place, "part": self.part()}


class _Reasoning(_Spoken):
    """What the model thought, as it is: there is no summary of it."""

    prefix, event = "rs", "reasoning_text"

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def object(self, status: Status) -> dict[str, Any]:
        reasoning = {"id": self.id, "type": "reasoning", "summary": [], "status": status}
        return reasoning | {"content": self._content(status)}


class _Message(_Spoken):
    """What the model says."""

    prefix, event = "msg", "output_text"

    def __init__(self, name: str, index: int, names: TokenNames) -> None:
        super().__init__(name, index)
        self._names, self._logprobs = names, list[dict[str, Any]]()

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._logprobs)}

    def object(self, status: Status) -> dict[str, Any]:
        message = {"id": self.id, "type": "message", "role": "assistant", "status": status}
        return message | {"content": self._content(status)}

    def say(self, part: Part) -> Iterator[Event]:
        (event,) = super().say(part)
        yield event | {"logprobs": self._told(part) if part.token_ids else []}

    def _told(self, part: Part) -> list[dict[str, Any]]:
        """The log-probabilities of a part, which are those of the whole from now on."""
        found: list[dict[str, Any]] = logprobs.for_chat(self._names, part.token_ids, part.logprobs)["content"]
        self._logprobs += found
        return found

    def closed(self) -> Iterator[Event]:
        text, part = super().closed()
        yield text | {"logprobs": self._logprobs}
        yield part


class _Call(_Item):
    """A function that the model wants called."""

    prefix = "fc"

    def __init__(self, name: str, index: int, call_id: str, function: str) -> None:
        super().__init__(name, index)
        self._call_id, self._function, self._arguments = call_id, function, ""

    def object(self, status: Status) -> dict[str, Any]:
        call = {"id": self.id, "type": "function_call", "call_id": self._call_id, "name": self._function}
        return call | {"arguments": self._arguments, "status": status}

    def say(self, part: Part) -> Iterator[Event]:
        self._arguments += part.text
        if part.text:
            yield {"type": "response.function_call_arguments.delta", **self.place, "delta": part.text}

    def closed(self) -> Iterator[Event]:
        whole = {"name": self._function, "arguments": self._arguments}
        yield {"type": "response.function_call_arguments.done", **self.place, **whole}

    @property
    def is_whole(self) -> bool:
        """A call that broke off is not closed for the model: its arguments are no JSON object then."""
        try:
            return isinstance(orjson.loads(self._arguments), dict)
        except orjson.JSONDecodeError:
            return False


class Items:
    """The items of one output. Those that are closed are in `closed`."""

    def __init__(self, job: Job) -> None:
        self.closed: list[dict[str, Any]] = []
        self._job, self._names = job, TokenNames(job.model.text.tokenizer, as_ids=False)
        self._name = blake2b(job.choices[0].generate.request_id.encode(), digest_size=12).hexdigest()
        self._open: _Item | None = None

    def add(self, part: Part) -> Iterator[Event]:
        """The events of what is new."""
        if not isinstance(self._open, _KINDS[part.kind]) or part.name is not None:
            if part.kind == "content" and not part.text:
                return  # the tokens of a text that was cut off whole
            yield from self._close("completed")
            yield from self._begin(part)
        assert self._open is not None
        yield from self._open.say(part)

    def end(self, status: Status) -> Iterator[Event]:
        """The events of the end. A response that the model ended has a message or a call, as a chat's has."""
        yield from self._close(status)
        if status == "completed" and all(item["type"] == "reasoning" for item in self.closed):
            yield from self._begin(Part("content"))
            yield from self._close(status)

    def so_far(self) -> list[dict[str, Any]]:
        """All items; one that is open will not become whole."""
        return [*self.closed, *([self._open.object("incomplete")] if self._open else [])]

    def _begin(self, part: Part) -> Iterator[Event]:
        self._open = item = self._item(part, len(self.closed))
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.closed),
            "item": item.object("in_progress"),
        }
        yield from item.opened()

    def _item(self, part: Part, index: int) -> _Item:
        match part.kind:
            case "reasoning":
                return _Reasoning(self._name, index)
            case "content":
                return _Message(self._name, index, self._names)
            case "call":
                return _Call(self._name, index, self._job.call_id(0, part.index), part.name or "")

    def _close(self, status: Status) -> Iterator[Event]:
        item, self._open = self._open, None
        if item is None:
            return
        yield from item.closed()
        done = item.object(status if item.is_whole else "incomplete")
        yield {"type": "response.output_item.done", "output_index": len(self.closed), "item": done}
        self.closed.append(done)


_KINDS: Mapping[Kind, type[_Item]] = {"reasoning": _Reasoning, "content": _Message, "call": _Call}
