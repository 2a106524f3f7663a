"""A whole fleet is restarted under load, one process of each kind after the other, and no client notices."""

import asyncio
import json
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from tests.chaos.answers import COMPLETE, NOT_TAKEN, Answer
from tests.chaos.load import Clients
from tests.chaos.requests import asks
from tests.chaos.twin import SimTwin, write_tokenizer, wrong
from tests.e2e.client import SLOW, Start, client_of
from tests.e2e.cluster import DEADLINE_S, RunningCluster

ROLES = ("gateway", "router", "prefill", "decode")
NUM_CLIENTS = 2
START_DEADLINE_S = 60.0  # of four processes at once, beside load


@asynccontextmanager
async def load(cluster: RunningCluster) -> AsyncGenerator[list[Answer], None]:
    """Clients that stay to the end of their answers; all answers are there once it is left."""
    patient = (ask.patient(deadline_s=30.0) for ask in asks(seed=1))
    clients = Clients(cluster.urls(2), cluster.model, patient, pause_s=0.1)
    stop = asyncio.Event()
    running = [asyncio.create_task(clients.run(number, lambda: not stop.is_set())) for number in range(NUM_CLIENTS)]
    try:
        yield clients.answers
    finally:
        stop.set()
        await asyncio.gather(*running)


async def restart(cluster: RunningCluster, number: int) -> None:
    """SIGTERM to one process of each kind; wait until they serve again."""
    names = [f"{role}-{number}" for role in ROLES]
    old = {name: cluster.signal(name, signal.SIGTERM) for name in names}
    await cluster.until(
        lambda rows: all(rows[name]["state"] == "serving" and rows[name]["pid"] != old[name] for name in names),
        START_DEADLINE_S,
    )


async def test_a_fleet_restarted_under_load_costs_no_client_an_error(start_cluster: Start, tmp_path: Path) -> None:
    text = write_tokenizer(tmp_path)
    both = (argument for role in ROLES for argument in (f"--{role}s" if role in ROLES[:2] else f"--{role}", "2"))
    cluster = start_cluster("--engine", "sim", *both, f"--gateway-flags=--tokenizer sim={text}")
    async with load(cluster) as answers:
        for number in range(2):
            await restart(cluster, number)
    assert {answer.end for answer in answers} <= {COMPLETE, NOT_TAKEN}
    assert wrong(answers, SimTwin()) == []
    assert sum(answer.end == COMPLETE for answer in answers) > NUM_CLIENTS
    async with httpx.AsyncClient() as client:
        for url in cluster.urls(2):  # where they were
            assert (await client.get(f"{url}/health")).is_success
    await cluster.until_pages_are_free()


async def placement(cluster: RunningCluster, number: int) -> str:
    """The decode worker that the gateway chose for its `number`-th request. It says so a little later."""
    async with asyncio.timeout(DEADLINE_S):
        while len(placed := [line for line in cluster.log("gateway-0").splitlines() if '"placed"' in line]) < number:  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.01)
    return str(json.loads(placed[number - 1])["decode"])


async def test_what_outlasts_the_drain_of_its_worker_is_handed_over(start_cluster: Start) -> None:
    cluster = start_cluster("--engine", "sim", "--decode", "2", "--grace", "0.5", SLOW)
    token_ids: list[int] = []
    async with client_of(cluster) as client:
        expected = await client.complete([5, 6, 7], max_tokens=200)
        async for chunk in client.stream([5, 6, 7], max_tokens=200):
            assert "error" not in chunk, chunk
            if not token_ids:
                cluster.signal(await placement(cluster, 2), signal.SIGTERM)
            token_ids += chunk["choices"][0]["token_ids"]
    assert token_ids == expected
    assert '"fault": "DRAINING"' in cluster.log("gateway-0"), "it was not handed over"
