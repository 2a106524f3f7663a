"""Clients of a cluster with several gateways: each sends one request after another, some go away in the middle."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx

from tests.chaos.answers import COMPLETE, GATEWAY_LOST, LATE, LEFT, NOT_TAKEN, Answer, Output
from tests.chaos.requests import Ask

# A client's own patience beyond the deadline that it gave the gateway.
PATIENCE_S = 1.0
RETRY_S = 0.05
# What a client may be told when its request could not be answered: reasons, never a broken connection.
REASONS = {"no_worker", "overloaded", "worker_lost", "deadline", "draining", "blackboard_lost"}


class Clients:
    """`answers` has every try of every request; `defects` what no client should ever see."""

    def __init__(self, urls: Sequence[str], model: str, asks: Iterator[Ask], pause_s: float = 0.0) -> None:
        self.urls, self._model, self._asks, self._pause_s = urls, model, asks, pause_s
        self.answers: list[Answer] = []
        self.num_requests = 0
        self.defects: list[str] = []

    async def run(self, number: int, more: Callable[[], bool]) -> None:
        """Be one client for as long as there is `more` to do, and to ask for."""
        chance = random.Random(number)
        async with AsyncExitStack() as stack:
            made = [httpx.AsyncClient(base_url=url, trust_env=False, verify=False) for url in self.urls]
            https = [await stack.enter_async_context(http) for http in made]
            while more() and (ask := next(self._asks, None)):
                await self.one(https, ask, chance.randrange(len(https)))
                await asyncio.sleep(chance.uniform(0, 2 * self._pause_s))

    async def one(self, https: Sequence[httpx.AsyncClient], ask: Ask, first: int) -> None:
        """Send a request to one gateway after another until one begins to answer, for as long as its deadline allows.

        So do clients behind a load balancer: a gateway that drains, or is gone before it has said a word, costs a try.
        """
        give_up = time.time() + ask.deadline_s
        for turn in range(first, 1 << 62):
            answer = Answer(ask, turn % len(https), time.time(), give_up)
            answer.end = await self._try(https[answer.gateway], answer)
            answer.ended = time.time()
            self.answers.append(answer)
            if answer.end == NOT_TAKEN and time.time() + RETRY_S > give_up:
                answer.end = "refused: no gateway"
            if answer.end != NOT_TAKEN:
                self.num_requests += 1
                return
            await asyncio.sleep(RETRY_S)

    async def _try(self, http: httpx.AsyncClient, answer: Answer) -> str:
        try:
            async with asyncio.timeout(answer.give_up - time.time() + PATIENCE_S):
                return await self._read(http, answer)
        except httpx.TransportError:
            return GATEWAY_LOST if answer.begun else NOT_TAKEN
        except TimeoutError:
            return LATE

    async def _read(self, http: httpx.AsyncClient, answer: Answer) -> str:
        ask, left_ms = answer.ask, max(1, round((answer.give_up - time.time()) * 1000))
        headers = {"X-Request-Id": ask.name, "X-Forebay-Timeout-Ms": str(left_ms)}
        body = {"model": self._model} | ask.body
        request = http.build_request("POST", "/v1/completions", json=body, headers=headers, timeout=None)
        response = await http.send(request, stream=True)
        answer.begun = True
        try:
            if response.status_code != 200:
                return self._refusal(json.loads(await response.aread()))
            num_chunks = 0
            async for event in _events(response):
                if "error" in event:
                    return self._refusal(event)
                for choice in event["choices"]:
                    answer.outputs.setdefault(choice["index"], Output()).take(choice, time.time())
                num_chunks += 1
                if num_chunks == ask.leaves_after:
                    return LEFT
            return COMPLETE
        finally:
            await response.aclose()

    def _refusal(self, body: dict[str, Any]) -> str:
        reason = str(body["error"]["code"]).lower()
        if reason not in REASONS:
            self.defects.append(f"refused without a good reason: {body}")
        return NOT_TAKEN if reason == "draining" else f"refused: {reason}"


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Those of a stream; else the whole answer as one."""
    if response.headers["content-type"].startswith("application/json"):
        yield json.loads(await response.aread())
        return
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
