"""Redis that does not answer for longer than registrations last: what runs goes on, what comes is served."""

import asyncio
import signal

from tests.e2e.client import PROMPT, Start, client_of

# Registrations last 2 s.
AWAY_S = 3.0


async def test_requests_are_served_while_redis_is_away_and_when_it_is_back(start_cluster: Start) -> None:
    cluster = start_cluster("--engine", "sim", "--decode", "2")
    async with client_of(cluster) as client:
        expected = await client.complete(PROMPT[:200])
        running = asyncio.create_task(client.complete([5, *PROMPT[:100]], max_tokens=300))
        cluster.signal("blackboard", signal.SIGSTOP)
        try:
            await asyncio.sleep(AWAY_S)
            assert await client.complete(PROMPT[:200]) == expected
        finally:
            cluster.signal("blackboard", signal.SIGCONT)
        for _ in range(20):
            assert await client.complete(PROMPT[:200]) == expected
        assert len(await running) == 300
    await cluster.until(lambda rows: all(row["state"] == "serving" for row in rows.values()))
    await cluster.until_pages_are_free()
