"""A decode worker that dies amid an output: another goes on, and nobody can tell from the tokens."""

from typing import Any

import pytest

from tests.e2e.client import PROMPT, client_of
from tests.e2e.cluster import RunningCluster


def busy(rows: dict[str, Any]) -> list[str]:
    """Decode workers that run something; one registers it within a heartbeat. One that has just ended has no pages."""
    decode = {name: row["pages"] for name, row in rows.items() if name.startswith("decode")}
    return [name for name, pages in decode.items() if pages and pages["held"] > 0]


async def kill_the_busy_worker(cluster: RunningCluster) -> None:
    (name,) = busy(await cluster.until(lambda rows: len(busy(rows)) == 1))
    cluster.kill(name)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 11}])
async def test_a_decode_worker_killed_amid_an_output_costs_no_token(
    sampling: dict[str, float], slow_cluster: RunningCluster
) -> None:
    async with client_of(slow_cluster) as client:
        expected = await client.complete(PROMPT[:200], max_tokens=200, **sampling)
        token_ids: list[int] = []
        async for chunk in client.stream(PROMPT[:200], max_tokens=200, **sampling):
            assert "error" not in chunk, chunk
            if len(token_ids) < 10 <= len(token_ids) + len(chunk["choices"][0]["token_ids"]):
                await kill_the_busy_worker(slow_cluster)
            token_ids += chunk["choices"][0]["token_ids"]
    assert token_ids == expected
    assert len(expected) == 200
