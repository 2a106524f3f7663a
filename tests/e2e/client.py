"""A client of a cluster, by token ids, and what most tests ask: prompts, a slow engine."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.e2e.cluster import RunningCluster

PROMPT = [token * 7 % 30_000 + 10 for token in range(2000)]
SLOW = "--worker-flags=--sim-prefill-ms-per-token 2 --sim-decode-ms 20"
Start = Callable[..., RunningCluster]


class Client:
    """Speaks to one cluster."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self._http, self._model = http, model

    def body(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        asked = {"prompt": prompt, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
        return {"model": self._model, "temperature": 0} | asked | fields

    async def complete(self, prompt: list[int], **fields: Any) -> list[int]:
        response = await self._http.post("/v1/completions", json=self.body(prompt, **fields))
        assert response.status_code == 200, response.text
        token_ids: list[int] = response.json()["choices"][0]["token_ids"]
        return token_ids

    async def stream(self, prompt: list[int], **fields: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks, and an error as the last one if there is any."""
        async with self._http.stream(
            "POST", "/v1/completions", json=self.body(prompt, stream=True, **fields)
        ) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


@asynccontextmanager
async def client_of(cluster: RunningCluster) -> AsyncGenerator[Client, None]:
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
        yield Client(http, cluster.model)
