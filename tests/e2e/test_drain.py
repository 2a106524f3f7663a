"""A gateway that is told to stop finishes what it has begun."""

import signal

from tests.e2e.client import PROMPT, client_of
from tests.e2e.cluster import RunningCluster


async def test_a_stream_outlives_the_sigterm_of_its_gateway(slow_cluster: RunningCluster) -> None:
    token_ids: list[int] = []
    async with client_of(slow_cluster) as client:
        async for chunk in client.stream(PROMPT[:50], max_tokens=50):
            if not token_ids:
                pid = slow_cluster.signal("gateway-0", signal.SIGTERM)
            token_ids += chunk["choices"][0]["token_ids"]
    assert len(token_ids) == 50
    await slow_cluster.until_restarted("gateway-0", pid)  # it did end
