"""Processes that die, stop or restart under a client, on the sim engine, whose pages are checked byte by byte."""

import asyncio
import signal
from collections.abc import Iterator

import pytest

from tests.e2e.client import PROMPT, SLOW, client_of
from tests.e2e.cluster import HAND_OVER, RunningCluster, running


@pytest.fixture(scope="module")
def one_prefill_worker() -> Iterator[RunningCluster]:
    """That takes its time, and a decode worker."""
    with running("--engine", "sim", SLOW, HAND_OVER) as cluster:
        yield cluster


async def test_a_prefill_worker_killed_amid_a_prompt_costs_no_token(one_prefill_worker: RunningCluster) -> None:
    cluster = one_prefill_worker
    async with client_of(cluster) as client:
        expected = await client.complete(PROMPT[:1500])
        asked = asyncio.create_task(client.complete([5, *PROMPT[:1500]]))
        await cluster.until(lambda rows: rows["prefill-0"]["pages"]["held"] > 0)
        pid = cluster.kill("prefill-0")
        interrupted = await asked
        await cluster.until_restarted("prefill-0", pid)
        assert await client.complete([5, *PROMPT[:1500]]) == interrupted
        assert await client.complete(PROMPT[:1500]) == expected
    await cluster.until_pages_are_free()


async def test_a_prefill_worker_that_stops_answering_costs_no_token(one_prefill_worker: RunningCluster) -> None:
    cluster, prompt = one_prefill_worker, [6, *PROMPT[:1500]]
    async with client_of(cluster) as client:
        asked = asyncio.create_task(client.complete(prompt))
        await cluster.until(lambda rows: rows["prefill-0"]["pages"]["held"] > 0)
        pid = cluster.signal("prefill-0", signal.SIGSTOP)
        try:
            interrupted = await asked
        finally:
            cluster.signal("prefill-0", signal.SIGCONT)
        assert cluster.pid("prefill-0") == pid
        assert await client.complete(prompt) == interrupted
    await cluster.until_pages_are_free()


@pytest.mark.parametrize("name", ["router-0", "blackboard"])
async def test_service_resumes_when_it_is_restarted(name: str, sim_cluster: RunningCluster) -> None:
    cluster = sim_cluster
    async with client_of(cluster) as client:
        expected = await client.complete(PROMPT[:300])
        asked = asyncio.create_task(client.complete(PROMPT[:100], max_tokens=200))
        pid = cluster.kill(name)
        assert len(await asked) == 200
        await cluster.until(
            lambda rows: all(row["state"] == "serving" for row in rows.values()) and rows[name]["pid"] != pid
        )
        assert await client.complete(PROMPT[:300]) == expected
    await cluster.until_pages_are_free()


async def test_a_request_that_finds_no_router_waits_for_its_restart(sim_cluster: RunningCluster) -> None:
    cluster = sim_cluster
    async with client_of(cluster) as client:
        expected = await client.complete(PROMPT[:300])
        pid = cluster.kill("router-0")
        assert await client.complete(PROMPT[:300]) == expected
        assert cluster.pid("router-0") not in (None, pid)


async def test_a_restarted_decode_worker_serves_again_under_a_higher_epoch(sim_cluster: RunningCluster) -> None:
    cluster = sim_cluster
    async with client_of(cluster) as client:
        expected = await client.complete(PROMPT[:300])
        epoch = (await cluster.status())["decode-0"]["epoch"]
        await cluster.until_restarted("decode-0", cluster.kill("decode-0"))
        assert (await cluster.status())["decode-0"]["epoch"] > epoch
        assert await client.complete(PROMPT[:300]) == expected


async def test_many_requests_at_once_get_what_each_gets_alone(slow_cluster: RunningCluster) -> None:
    prompts = [[seed, *PROMPT[: 10 * seed]] for seed in range(20, 52)]
    async with client_of(slow_cluster) as client:
        together = await asyncio.gather(*(client.complete(prompt) for prompt in prompts))
        alone = [await client.complete(prompt) for prompt in prompts[::8]]
    assert together[::8] == alone
    await slow_cluster.until_pages_are_free()
