"""Pages that somebody still has are fetched and not computed again: after a loss, and from a worker that drains."""

import asyncio
import itertools
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from protos.forebay.v1 import router_pb2
from shared import page_hash
from tests.e2e.client import PROMPT, SLOW, Client, Start, client_of
from tests.e2e.cluster import Row, RunningCluster
from tests.e2e.test_failover import busy

LONG, PAGE = [13, *PROMPT[1:1000]], 16  # of no other test, so cached by nobody
NUM_WHOLE = len(LONG) // PAGE * PAGE
TOKEN_BYTES = 64  # of the sim engine
MOST_PROMPTS = 40
USAGE = {"include_usage": True}


async def until_found_at(cluster: RunningCluster, *names: str) -> None:
    """Wait until the router knows that one of these workers has all of LONG."""
    hashes = page_hash.join(page_hash.chain(page_hash.tenant_key(""), LONG, PAGE))
    route = router_pb2.RouteRequest(model=cluster.model, page_hashes=hashes, num_prompt_tokens=len(LONG))

    def is_found(candidates: Sequence[router_pb2.Candidate]) -> bool:
        return any(holders(each) & set(names) and each.num_cached_tokens >= NUM_WHOLE for each in candidates)

    await cluster.until_explained(route, is_found)


async def until_rates_known(cluster: RunningCluster, client: Client, *names: str) -> None:
    """Have prompts computed until these workers know what a token takes them: they wait for a peer's pages as long as
    computing them would take, and a guess of that is too short where processors are."""

    def are_known(rows: dict[str, Row]) -> bool:
        return all(rows[name]["load"] and rows[name]["load"]["prefill_ms_per_token"] for name in names)

    for first in itertools.count(20):
        prompts = [[first, number, *PROMPT[:60]] for number in range(4)]
        await asyncio.gather(*(client.complete(prompt, max_tokens=8) for prompt in prompts))
        if are_known(await cluster.status()):
            return
        assert first < MOST_PROMPTS, "some worker computes no prompt"


def holders(candidate: router_pb2.Candidate) -> set[str]:
    """Where what is cached of a prompt would come from."""
    at = candidate.placement
    return {at.prefill.worker_id or at.decode.worker_id, at.kv_source.worker_id}


async def texts(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[list[int], None]:
    """Token ids of each chunk; no error, and nothing cached, in any."""
    async for chunk in chunks:
        assert "error" not in chunk, chunk
        if chunk["choices"]:
            yield chunk["choices"][0]["token_ids"]
        else:
            cached = chunk["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == 0, "what the request itself computed before the loss was not cached"


async def test_after_a_loss_the_prompt_comes_from_the_prefill_worker_that_computed_it(
    slow_cluster: RunningCluster,
) -> None:
    cluster, token_ids = slow_cluster, list[int]()
    workers = ("decode-0", "decode-1")
    async with client_of(cluster) as client:
        await until_rates_known(cluster, client, *workers)
        before = {each: await cluster.measured(each, "forebay_cached_tokens_total") for each in workers}
        async for some in texts(client.stream(LONG, max_tokens=500, stream_options=USAGE)):
            if not token_ids:
                (lost,) = busy(await cluster.until(lambda rows: len(busy(rows)) == 1))
                await until_found_at(cluster, "prefill-0", "prefill-1")
                cluster.kill(lost)
            token_ids += some
    assert len(token_ids) == 500
    (survivor,) = set(workers) - {lost}
    fetched = before[survivor] + NUM_WHOLE
    await cluster.until_measured(survivor, "forebay_cached_tokens_total", lambda num: num >= fetched)
    assert await cluster.measured(survivor, "forebay_transfer_bytes_total") > 0


async def test_a_worker_that_drains_gives_its_pages_to_the_next_turn(start_cluster: Start) -> None:
    cluster = start_cluster("--engine", "sim", "--prefill", "0", "--decode", "2", "--grace", "60", SLOW)
    async with client_of(cluster) as client:
        await until_rates_known(cluster, client, "decode-0", "decode-1")
        async with aclosing(client.stream(LONG, max_tokens=4000)) as first_turn:
            await anext(first_turn)
            (draining,) = busy(await cluster.until(lambda rows: len(busy(rows)) == 1))
            await until_found_at(cluster, draining)
            pid = cluster.signal(draining, signal.SIGTERM)
            await cluster.until(lambda rows: rows[draining]["state"] == "draining")
            second = await client.complete([*LONG, 7, 8, 9])
        (other,) = {"decode-0", "decode-1"} - {draining}
        await cluster.until_measured(other, "forebay_cached_tokens_total", lambda num: num == NUM_WHOLE)
        await cluster.until_restarted(draining, pid)
        assert await client.complete([*LONG, 7, 8, 9]) == second


async def test_a_sequence_that_outlasts_a_drain_is_handed_over_with_its_pages(start_cluster: Start) -> None:
    cluster = start_cluster("--engine", "sim", "--prefill", "0", "--decode", "2", "--grace", "1", SLOW)
    async with client_of(cluster) as client:
        await until_rates_known(cluster, client, "decode-0", "decode-1")
        async with aclosing(client.stream(LONG, max_tokens=4000)) as stream:
            await anext(stream)
            (draining,) = busy(await cluster.until(lambda rows: len(busy(rows)) == 1))
            (other,) = {"decode-0", "decode-1"} - {draining}
            await until_found_at(cluster, draining)
            cluster.signal(draining, signal.SIGTERM)
            await cluster.until(lambda rows: other in busy(rows) and rows[other]["load"]["num_running"] == 1)
            num_bytes = NUM_WHOLE * TOKEN_BYTES
            await cluster.until_measured(other, "forebay_transfer_bytes_total", lambda num: num >= num_bytes)
            assert await cluster.measured(other, "forebay_failed_pulls_total") == 0
