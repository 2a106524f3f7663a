"""A prefill worker that was killed under load is handed prompts as soon as it is back, though it knows no rates."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

from protos.forebay.v1 import router_pb2
from tests.e2e.client import PROMPT, SLOW, Client, Start, client_of
from tests.e2e.cluster import DEADLINE_S, RunningCluster

NUM_TOKENS = 400


def prompt(number: int) -> list[int]:
    """One that has no page in common with the others."""
    return [token + number + 1 for token in PROMPT[:NUM_TOKENS]]


@asynccontextmanager
async def somebody_who_generates(client: Client) -> AsyncGenerator[None]:
    """A stream on the decode worker, which prompts that are computed there would hold up."""
    begun = asyncio.Event()

    async def read() -> None:
        async with aclosing(client.stream([5, 6, 7], max_tokens=100_000)) as chunks:
            async for chunk in chunks:
                assert "error" not in chunk, chunk
                begun.set()

    reading = asyncio.create_task(read())
    try:
        await asyncio.wait_for(begun.wait(), DEADLINE_S)
        yield
    finally:
        assert not reading.done(), "the stream has ended"
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading


async def until_placed_on(cluster: RunningCluster, name: str, epoch: int) -> None:
    """Wait until the router knows this incarnation of a worker."""
    route = router_pb2.RouteRequest(model=cluster.model, num_prompt_tokens=NUM_TOKENS)

    def is_there(candidates: Sequence[router_pb2.Candidate]) -> bool:
        refs = [each.placement.prefill for each in candidates]
        return any((ref.worker_id, ref.epoch) == (name, epoch) for ref in refs)

    await cluster.until_explained(route, is_there)


async def test_a_restarted_prefill_worker_is_handed_the_first_prompt_and_the_next_ones(start_cluster: Start) -> None:
    cluster = start_cluster("--engine", "sim", SLOW)
    async with client_of(cluster) as client, somebody_who_generates(client):
        await client.complete(prompt(0), max_tokens=2)
        pid = cluster.kill("prefill-0")
        await cluster.until(lambda rows: rows["prefill-0"]["state"] != "serving" or rows["prefill-0"]["pid"] != pid)
        for number in range(1, 4):  # the decode worker learns its own rates meanwhile
            await client.complete(prompt(number), max_tokens=2)
        await cluster.until_restarted("prefill-0", pid)
        await until_placed_on(cluster, "prefill-0", (await cluster.status())["prefill-0"]["epoch"])
        before = await cluster.measured("prefill-0", "forebay_requests_total")
        for number in range(4, 8):
            await client.complete(prompt(number), max_tokens=2)
        assert await cluster.measured("prefill-0", "forebay_requests_total") - before == 4
