"""A client that costs little: HTTP written out, and only those events parsed that must be; the others are counted."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bench.serve.client import Answer

TIMEOUT_S = 120.0
# An event at the beginning of a line. Within a JSON string there is no end of a line, nor a quote without a backslash.
EVENT, MARKS = b"\ndata: {", (b'"error"', b'"prompt_tokens"')


@dataclass(frozen=True, slots=True)
class Reply:
    """Times and usage, and the answer's tokens if they were asked for."""

    answer: Answer
    token_ids: tuple[int, ...]


class Client:
    """Asks one server for completions."""

    def __init__(self, url: str, model: str) -> None:
        address = urlsplit(url)
        self._host, self._port, self._model = address.hostname or "", address.port or 80, model

    async def ask(self, prompt: Sequence[int] | str, output_tokens: int, tenant: str = "", ids: bool = True) -> Reply:
        """Send one request and read its stream to the end. Faults are noted, not raised.

        Without `ids` the events are counted, not parsed, and the answer has no tokens.
        """
        content = self._body(prompt, output_tokens, ids)
        answer, tokens = Answer(len(prompt), output_tokens, time.perf_counter()), list[int]()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._exchange(self._head(len(content), tenant) + content, _Reading(answer, tokens, ids))
        except (OSError, TimeoutError, ValueError) as error:
            answer.fault = f"{type(error).__name__}: {error}"
        if answer.fault is None and answer.num_reported != output_tokens:
            answer.fault = f"{answer.num_reported} tokens came, not {output_tokens}"
        return Reply(answer, tuple(tokens))

    async def _exchange(self, request: bytes, reading: "_Reading") -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: reading, self._host, self._port)
        try:
            reading.answer.sent_s = time.perf_counter()
            transport.write(request)
            await reading.over
        finally:
            transport.close()

    def _head(self, length: int, tenant: str) -> bytes:
        lines = [
            "POST /v1/completions HTTP/1.1",
            "Host: bench",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {length}",
        ]
        return "\r\n".join([*lines, *([f"X-Forebay-Tenant: {tenant}"] if tenant else []), "", ""]).encode()

    def _body(self, prompt: Sequence[int] | str, output_tokens: int, ids: bool) -> bytes:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": ids,
        }
        return json.dumps(body).encode()


class _Reading(asyncio.Protocol):
    """The client's end of one connection. `over` is done when the server has closed it: a client that reads lines from
    a stream instead costs twice as much, and the services that it asks have the same processors."""

    def __init__(self, answer: Answer, tokens: list[int], ids: bool) -> None:
        self.answer, self._tokens, self._ids = answer, tokens, ids
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rest = bytearray()

    def data_received(self, data: bytes) -> None:
        """Take the events that are complete: all of them by their number, those that must be read one by one."""
        now = time.perf_counter()
        self._rest += data
        if (end := self._rest.rfind(b"\n\n")) < 0:
            return
        events = bytes(self._rest[:end])
        del self._rest[: end + 1]  # the second end of a line begins what follows
        if self._ids or any(mark in events for mark in MARKS):
            try:
                for line in events.split(b"\n"):
                    if line.startswith(EVENT[1:]):
                        self._read(line, now)
            except ValueError as error:
                self._end(error)
        elif num_events := events.count(EVENT):
            self.answer.arrivals.append((now, num_events))

    def _read(self, line: bytes, now: float) -> None:
        if self._ids or any(mark in line for mark in MARKS):
            _note(json.loads(line[6:]), now, self.answer, self._tokens)
        else:
            self.answer.arrivals.append((now, 1))

    def connection_lost(self, error: Exception | None) -> None:
        """Nothing more comes."""
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self.over.done():
            return
        if error is None:
            self.over.set_result(None)
        else:
            self.over.set_exception(error)


def _note(event: Mapping[str, Any], now: float, answer: Answer, tokens: list[int]) -> None:
    if "error" in event:
        answer.fault = str(event["error"].get("message"))
    for choice in event.get("choices") or ():
        if came := choice.get("token_ids"):
            tokens += came
            answer.arrivals.append((now, len(came)))
    if usage := event.get("usage"):
        answer.num_input, answer.num_reported = usage["prompt_tokens"], usage["completion_tokens"]
        answer.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
