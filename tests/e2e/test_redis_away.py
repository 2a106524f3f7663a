"""Redis that does not answer for longer than registrations last: what runs goes on, what comes is served."""

import asyncio
import signal

from tests.e2e.client import PROMPT, client_of
from tests.e2e.cluster import RunningCluster

# Registrations last 2 s.
AWAY_S = 3.0


async def test_requests_are_served_while_redis_is_away_and_when_it_is_back(slow_cluster: RunningCluster) -> None:
    cluster = slow_cluster
    async with client_of(cluster) as client:
        expected = await client.complete(PROMPT[:200], max_tokens=4)
        running = asyncio.create_task(client.complete([5, *PROMPT[:100]], max_tokens=300))
        cluster.signal("blackboard", signal.SIGSTOP)
        try:
            await asyncio.sleep(AWAY_S)
            assert await client.complete(PROMPT[:200], max_tokens=4) == expected
        finally:
            cluster.signal("blackboard", signal.SIGCONT)
        for _ in range(20):
            assert await client.complete(PROMPT[:200], max_tokens=4) == expected
        assert len(await running) == 300
    await cluster.until_all_serve()
    await cluster.until_pages_are_free()
