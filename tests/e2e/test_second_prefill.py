"""A prefill worker that dies amid a prompt: the other one goes on, and the decode worker is spared the prompt."""

import asyncio
from typing import Any

from tests.e2e.client import PROMPT, client_of
from tests.e2e.cluster import RunningCluster

LONG = [11, *PROMPT[:1000]]  # of no other test, so cached by nobody
PREFILL = ("prefill-0", "prefill-1")


def at_work(rows: dict[str, Any]) -> list[str]:
    return [name for name, row in rows.items() if name.startswith("prefill") and row["pages"]["held"] > 0]


async def num_fallbacks(cluster: RunningCluster) -> float:
    """Remote prefills that failed, by decode workers' count."""
    return sum([await cluster.measured(f"decode-{i}", "forebay_prefill_fallbacks_total") for i in range(2)])


async def test_the_other_prefill_worker_goes_on_with_a_prompt(slow_cluster: RunningCluster) -> None:
    cluster, failed = slow_cluster, await num_fallbacks(slow_cluster)
    taken = {name: await cluster.measured(name, "forebay_requests_total") for name in PREFILL}
    async with client_of(cluster) as client:
        running = asyncio.create_task(client.complete(LONG))
        (lost,) = at_work(await cluster.until(lambda rows: len(at_work(rows)) == 1))
        pid = cluster.kill(lost)
        token_ids = await running
        (other,) = set(PREFILL) - {lost}
        assert await num_fallbacks(cluster) - failed == 1
        assert await cluster.measured(other, "forebay_requests_total") - taken[other] == 1
        await cluster.until_restarted(lost, pid)
        assert await client.complete(LONG) == token_ids
