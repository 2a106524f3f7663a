"""A prefill worker that dies amid a prompt: the other one goes on, and the decode worker is spared the prompt."""

import asyncio
from typing import Any

from tests.e2e.client import PROMPT, SLOW, Start, client_of

LONG = PROMPT[:1000]


def at_work(rows: dict[str, Any]) -> list[str]:
    return [name for name, row in rows.items() if name.startswith("prefill") and row["pages"]["held"] > 0]


async def test_the_other_prefill_worker_goes_on_with_a_prompt(start_cluster: Start) -> None:
    cluster = start_cluster("--engine", "sim", "--prefill", "2", SLOW)
    async with client_of(cluster) as client:
        running = asyncio.create_task(client.complete(LONG))
        (lost,) = at_work(await cluster.until(lambda rows: len(at_work(rows)) == 1))
        pid = cluster.kill(lost)
        token_ids = await running
        (other,) = {"prefill-0", "prefill-1"} - {lost}
        assert await cluster.measured("decode-0", "forebay_prefill_fallbacks_total") == 1
        assert await cluster.measured(other, "forebay_requests_total") == 1
        await cluster.until_restarted(lost, pid)
        assert await client.complete(LONG) == token_ids
