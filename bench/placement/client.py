"""A client that costs little: HTTP written out, and only those events parsed that must be."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from bench.serve.client import Answer

TIMEOUT_S = 120.0
# The first event repeats the prompt's ids.
LINE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Reply:
    """Times and usage, and the answer's tokens if they were asked for."""

    answer: Answer
    token_ids: tuple[int, ...]


class Client:
    """Asks one server for completions."""

    def __init__(self, url: str, model: str) -> None:
        self._address, self._model = urlsplit(url), model

    async def ask(self, prompt: Sequence[int] | str, output_tokens: int, tenant: str = "", ids: bool = True) -> Reply:
        """Send one request and read its stream to the end. Faults are noted, not raised.

        Without `ids` the events are counted, not parsed, and the answer has no tokens.
        """
        content = self._body(prompt, output_tokens, ids)
        answer, tokens = Answer(len(prompt), output_tokens, time.perf_counter()), list[int]()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._exchange(self._head(len(content), tenant) + content, answer, tokens, ids)
        except (OSError, TimeoutError, ValueError) as error:
            answer.fault = f"{type(error).__name__}: {error}"
        if answer.fault is None and answer.num_reported != output_tokens:
            answer.fault = f"{answer.num_reported} tokens came, not {output_tokens}"
        return Reply(answer, tuple(tokens))

    async def _exchange(self, request: bytes, answer: Answer, tokens: list[int], ids: bool) -> None:
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port, limit=LINE_BYTES)
        try:
            answer.sent_s = time.perf_counter()
            writer.write(request)
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                if ids or b'"error"' in line or b'"prompt_tokens"' in line:
                    _note(json.loads(line[6:]), now, answer, tokens)
                else:
                    answer.arrivals.append((now, 1))
        finally:
            writer.close()

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
