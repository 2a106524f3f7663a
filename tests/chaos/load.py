"""Clients that know what every answer must be, by a fault-free twin: the sim engine in this process."""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from shared.engine.api import EngineRequest, SamplingParams
from shared.engine.sim import SimExecutor, SimModel
from tests.law.worker import Worker

DEADLINE_S = 30.0
# What a client may be told when its request could not be answered: reasons, never a broken connection.
REASONS = {"no_worker", "overloaded", "worker_lost", "deadline", "draining", "blackboard_lost"}
SHARED = [[tenant * 1000 + token for token in range(400)] for tenant in range(1, 6)]


@dataclass
class Tally:
    """How requests ended, and what should never have happened."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_tokens: int = 0
    longest_gap_s: float = 0.0


class Clients:
    """Each sends one request after another: most wait for the answer, some go away in the middle."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        self._url, self._model, self._seed = url, model, seed
        self._twin = Worker(SimExecutor(SimModel(), 64, sleep=lambda seconds: None))
        self._num_requests = 0
        self.tally = Tally()

    async def run(self, number: int, until: float) -> None:
        """Be one client until the time is up."""
        chance = random.Random(self._seed * 1000 + number)
        async with httpx.AsyncClient(base_url=self._url, timeout=DEADLINE_S + 1) as http:
            while time.monotonic() < until:
                await self._one(http, chance)

    async def _one(self, http: httpx.AsyncClient, chance: random.Random) -> None:
        prompt = chance.choice(SHARED)[: chance.randrange(1, 400)] + chance.choices(range(10, 30_000), k=8)
        sampling = {"max_tokens": chance.randrange(1, 60), "seed": chance.randrange(1000)}
        temperature = chance.choice((0.0, 1.0))
        leaves_after = chance.randrange(1, 30) if chance.random() < 0.15 else None
        expected = self._expected(prompt, temperature, **sampling)
        body = {"model": self._model, "prompt": prompt, "stream": True, "ignore_eos": True, "return_token_ids": True}
        try:
            got, ended = await self._ask(http, body | sampling | {"temperature": temperature}, leaves_after)
        except (httpx.HTTPError, TimeoutError) as error:
            self.tally.wrong.append(f"no answer: {type(error).__name__} {error}")
            return
        self.tally.ended[ended] += 1
        self.tally.num_tokens += len(got)
        whole = ended == "complete"
        if got != (expected if whole else expected[: len(got)]):
            self.tally.wrong.append(f"{ended} after {len(got)} of {len(expected)} tokens: {got} is not {expected}")

    def _expected(self, prompt: list[int], temperature: float, max_tokens: int, seed: int) -> list[int]:
        self._num_requests += 1
        params = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=max_tokens, seed=seed)
        return self._twin.run(EngineRequest(f"twin-{self._num_requests}", tuple(prompt), params))

    async def _ask(
        self, http: httpx.AsyncClient, body: dict[str, Any], leaves_after: int | None
    ) -> tuple[list[int], str]:
        """Tokens, and how the request ended."""
        got: list[int] = []
        last = time.monotonic()
        async with asyncio.timeout(DEADLINE_S + 1), http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                return got, self._reason(json.loads(await response.aread()))
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return got, self._reason(chunk)
                for choice in chunk["choices"]:
                    got += choice.get("token_ids") or []
                now = time.monotonic()
                self.tally.longest_gap_s = max(self.tally.longest_gap_s, now - last)
                last = now
                if leaves_after is not None and len(got) >= leaves_after:
                    return got, "left"
        return got, "complete"

    def _reason(self, answer: dict[str, Any]) -> str:
        reason = str(answer["error"]["code"])
        if reason.lower() not in REASONS:
            self.tally.wrong.append(f"refused without a good reason: {answer}")
        return reason
