"""Bodies of the Responses API: whole, and as the events of a stream, each with its name and its number."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from services.gateway.output import Delta
from services.gateway.request import Job
from services.gateway.response_items import Event, Items
from services.gateway.rest_errors import body_of, status_of
from services.gateway.usage import num_cached
from shared.errors import Fault


class Responses:
    """Writes the answer to a job whose output comes in parts. `settled` is what it repeats of the request."""

    is_long = False

    def __init__(self, job: Job, settled: Mapping[str, Any]) -> None:
        self._job, self._items = job, Items(job)
        self._num_events = 0
        self._last = Delta(0)
        self._head = {
            "id": f"resp_{job.caller.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            **settled,
        }

    def note(self, delta: Delta) -> None:
        """Count a delta."""
        self._last = delta

    def keep(self, delta: Delta) -> None:
        """Remember a delta for `whole`."""
        for _ in self._events(delta):
            pass

    def whole(self) -> bytes:
        """The body of a request without streaming."""
        return orjson.dumps(self._ended())

    def chunk(self, delta: Delta) -> bytes:
        """The events for one delta, behind those that open the stream."""
        opening = () if self._num_events else self._opening()
        return self._written(opening) + self._written(self._events(delta))

    def last(self) -> bytes:
        """The event that ends a stream."""
        response = self._ended()
        return self._written([{"type": f"response.{response['status']}", "response": response}])

    def broken(self, fault: Fault) -> bytes:
        """The events that end a stream amid which a fault came: what it is, and what there is of the response."""
        told = body_of(fault)["error"]
        code = "rate_limit_exceeded" if status_of(fault) == 429 else "server_error"  # those that this API knows
        about = {"error": {"code": code, "message": fault.message}}
        response = self._response("failed", self._items.so_far()) | about
        error = {"type": "error", "code": told["code"], "message": fault.message, "param": fault.param}
        return self._written([error, {"type": "response.failed", "response": response}])

    def _opening(self) -> Iterator[Event]:
        response = self._response("in_progress", [])
        yield {"type": "response.created", "response": response}
        yield {"type": "response.in_progress", "response": response}

    def _events(self, delta: Delta) -> Iterator[Event]:
        for part in delta.parts:
            yield from self._items.add(part)
        if delta.finish_reason:
            yield from self._items.end("incomplete" if delta.finish_reason == "length" else "completed")

    def _written(self, events: Iterable[Event]) -> bytes:
        written = b""
        for event in events:
            body = event | {"sequence_number": self._num_events}
            written += b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(body))
            self._num_events += 1
        return written

    def _ended(self) -> dict[str, Any]:
        usage = {"usage": self._usage()}
        if self._last.finish_reason == "length":
            details = {"incomplete_details": {"reason": "max_output_tokens"}}
            return self._response("incomplete", self._items.closed) | details | usage
        return self._response("completed", self._items.closed) | {"completed_at": int(time.time())} | usage

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        unknown = dict.fromkeys(("error", "incomplete_details", "completed_at", "usage"))
        return self._head | unknown | {"status": status, "output": output}

    def _usage(self) -> dict[str, Any]:
        num_input, num_output = len(self._job.prompts[0].token_ids), self._last.num_output_tokens
        # Nothing is charged for what is written to a cache, and nothing is told of it.
        cached = {"cached_tokens": num_cached(self._last.usage), "cache_write_tokens": 0}
        return {
            "input_tokens": num_input,
            "input_tokens_details": cached,
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": self._last.num_reasoning_tokens},
            "total_tokens": num_input + num_output,
        }
