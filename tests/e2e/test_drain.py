"""A gateway that is told to stop finishes what it has begun."""

import signal

from tests.e2e.client import PROMPT, SLOW, Start, client_of


async def test_a_stream_outlives_the_sigterm_of_its_gateway(start_cluster: Start) -> None:
    cluster = start_cluster("--engine", "sim", SLOW)
    token_ids: list[int] = []
    async with client_of(cluster) as client:
        async for chunk in client.stream(PROMPT[:50], max_tokens=50):
            if not token_ids:
                cluster.signal("gateway-0", signal.SIGTERM)
            token_ids += chunk["choices"][0]["token_ids"]
    assert len(token_ids) == 50
