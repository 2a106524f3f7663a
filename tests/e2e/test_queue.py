"""More requests than the workers have room for: they wait their turn, whichever router they wait at."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from shared.blackboard.board import Blackboard
from tests.e2e.client import client_of
from tests.e2e.cluster import RunningCluster, running

WORKERS = "--worker-flags=--max-num-sequences 2 --sim-decode-ms 20"
NUM_REQUESTS, MAX_QUEUED = 10, 16


async def ask_all(cluster: RunningCluster, num_tokens: int = 30) -> list[list[int]]:
    async with client_of(cluster) as client:
        asked = (client.complete([number, 6, 7], max_tokens=num_tokens) for number in range(NUM_REQUESTS))
        return await asyncio.gather(*asked)


async def until_queued(cluster: RunningCluster, num_requests: int, most: float = math.inf) -> None:
    board = Blackboard(cluster.redis_url)
    try:
        async with asyncio.timeout(20):
            while not num_requests <= (await board.admission.num_queued([cluster.model]))[0] <= most:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
    finally:
        await board.close()


@pytest.fixture(scope="module")
def narrow() -> Iterator[RunningCluster]:
    routers = f"--router-flags=--max-queued {MAX_QUEUED}"
    with running("--engine", "sim", "--routers", "2", WORKERS, routers) as cluster:
        yield cluster


async def test_what_workers_have_no_room_for_waits_and_is_served(narrow: RunningCluster) -> None:
    cluster = narrow
    answers = asyncio.create_task(ask_all(cluster))
    await until_queued(cluster, 4)
    assert [len(token_ids) for token_ids in await answers] == [30] * NUM_REQUESTS
    await cluster.until_pages_are_free()


async def test_clients_that_go_away_leave_the_queue_before_their_turn_has_come(narrow: RunningCluster) -> None:
    """Those who run would be at work for minutes."""
    cluster = narrow
    asked = asyncio.create_task(ask_all(cluster, 10_000))
    await until_queued(cluster, 4)
    asked.cancel()
    await until_queued(cluster, 0, most=0)
    await cluster.until_pages_are_free()
    assert len((await ask_all(cluster))[0]) == 30


async def test_requests_that_wait_at_a_router_that_dies_are_served(narrow: RunningCluster) -> None:
    cluster = narrow
    expected = await ask_all(cluster)
    answers = asyncio.create_task(ask_all(cluster, 30))
    await until_queued(cluster, 4)
    cluster.kill("router-0")
    assert await answers == expected


async def test_a_full_queue_refuses_and_says_when_to_come_back(narrow: RunningCluster) -> None:
    num_requests = 2 * MAX_QUEUED
    async with httpx.AsyncClient(base_url=narrow.url, timeout=60) as http:

        async def ask(number: int) -> httpx.Response:
            body: dict[str, Any] = {"model": narrow.model, "prompt": [number, 6, 7], "max_tokens": 30}
            return await http.post("/v1/completions", json=body | {"ignore_eos": True})

        responses = await asyncio.gather(*(ask(number) for number in range(num_requests)))
    refused = [response for response in responses if response.status_code != 200]
    assert 0 < len(refused) < num_requests
    for response in refused:
        assert response.status_code == 429, response.text
        assert int(response.headers["retry-after"]) >= 1
