"""Asks an OpenAI-protocol server for completions of token ids and notes when each token came."""

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx

from bench.serve.workload import Ask


@dataclass(slots=True)
class Answer:
    """How a request went. `arrivals` are (time in s, number of tokens); `fault` says why it failed, if it did."""

    num_input: int
    num_output: int
    sent_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    num_cached: int = 0
    num_reported: int | None = None
    fault: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that came, by the server's own count where it has one: not every server tells ids."""
        return self.num_seen if self.num_reported is None else self.num_reported

    @property
    def num_seen(self) -> int:
        """Tokens in the stream."""
        return sum(count for _, count in self.arrivals)


class Client:
    """One server and model; `clock` returns seconds."""

    def __init__(self, http: httpx.AsyncClient, model: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._http = http
        self._model = model
        self._clock = clock

    async def ask(self, ask: Ask) -> Answer:
        """Send one request and read its stream to the end. Faults are noted, not raised."""
        answer = Answer(len(ask.prompt_token_ids), ask.output_tokens, self._clock())
        try:
            async with self._http.stream("POST", "/v1/completions", json=self._body(ask)) as response:
                if response.status_code == 200:
                    await self._read(_events(response), answer)
                else:
                    text = (await response.aread())[:200].decode(errors="replace")
                    answer.fault = f"HTTP {response.status_code}: {text}"
        except (httpx.HTTPError, ValueError) as error:
            answer.fault = f"{type(error).__name__}: {error}"
        answer.fault = answer.fault or _shortfall(answer)
        return answer

    def _body(self, ask: Ask) -> dict[str, object]:
        return {
            "model": self._model,
            "prompt": list(ask.prompt_token_ids),
            "max_tokens": ask.output_tokens,
            "min_tokens": ask.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }

    async def _read(self, events: AsyncIterator[str], answer: Answer) -> None:
        async for event in events:
            now, content = self._clock(), json.loads(event)
            if "error" in content:
                answer.fault = str(content["error"].get("message"))
            for choice in content.get("choices") or ():
                ids = choice.get("token_ids")
                count = len(ids) if ids is not None else int(bool(choice.get("text")))
                if count:
                    answer.arrivals.append((now, count))
            if usage := content.get("usage"):
                answer.num_reported = usage.get("completion_tokens")
                details = usage.get("prompt_tokens_details") or {}
                answer.num_cached = details.get("cached_tokens") or 0


def _shortfall(answer: Answer) -> str | None:
    """What is wrong with an answer that came without a fault."""
    if not answer.arrivals:
        return "no tokens came"
    if answer.num_tokens != answer.num_output:
        return f"{answer.num_tokens} tokens came, not {answer.num_output}"
    return None


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of server-sent events, up to OpenAI's end mark."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield data
