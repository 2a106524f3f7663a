"""What counts as cached, on every path that a prompt can take: the three counts are disjoint, and what is computed for
a request is in none of them."""

import asyncio
from dataclasses import replace

from protos.forebay.v1 import generation_pb2
from shared.engine.speculation.speculator import Speculation
from tests.services.workers import MODEL, Fleet, Running, generate, prompt, request

LENGTH, SHORT = 101, 41
ALL, SOME = 100, 40  # whole pages, without the last token
Counts = tuple[int, int, int]
SURE = replace(MODEL, draft_acceptance=1.0)


def counts(usage: generation_pb2.Usage) -> Counts:
    """Local, remote, transferred."""
    return usage.num_cached_local, usage.num_cached_remote, usage.num_cached_transferred


async def cached(
    world: Fleet, decode: Running, prefill: Running | None = None, source: Running | None = None
) -> Counts:
    return counts((await generate(world, request(prompt(LENGTH), decode, prefill, source))).usage)


async def warm(world: Fleet, worker: Running, length: int = LENGTH) -> None:
    """Let a worker compute a prompt, so that its pages are cached there."""
    await generate(world, request(prompt(length), worker, max_tokens=1))


async def test_a_prompt_that_nobody_has_is_not_cached(world: Fleet) -> None:
    p, d = await world.start("p"), await world.start("d")
    assert await cached(world, d, p) == (0, 0, 0)
    assert await cached(world, await world.start("other")) == (0, 0, 0)


async def test_where_it_is_computed_and_decoded_it_is_local(world: Fleet) -> None:
    d = await world.start("d")
    await warm(world, d, SHORT)
    assert await cached(world, d) == (SOME, 0, 0)
    assert await cached(world, d) == (ALL, 0, 0)


async def test_on_the_prefill_worker_it_is_remote_whatever_the_decode_worker_has(world: Fleet) -> None:
    p, d = await world.start("p"), await world.start("d")
    await warm(world, p, SHORT)
    await warm(world, d)
    assert await cached(world, d, p) == (0, SOME, 0)


async def test_what_is_pulled_counts_beside_what_was_there(world: Fleet) -> None:
    q, p, d = [await world.start(name) for name in "qpd"]
    await warm(world, q)
    await warm(world, p, SHORT)
    await warm(world, d, SHORT)
    assert await cached(world, d, None, q) == (SOME, 0, ALL - SOME)
    assert await cached(world, await world.start("e"), p, q) == (0, SOME, ALL - SOME)


async def test_a_pull_that_fails_transfers_nothing(world: Fleet) -> None:
    q, d = await world.start("q"), await world.start("d")
    await warm(world, q)
    await warm(world, d, SHORT)
    asked = request(prompt(LENGTH), d, None, q)
    await world.stop(q)
    assert counts((await generate(world, asked)).usage) == (SOME, 0, 0)


async def test_when_the_prefill_worker_is_gone_what_is_here_is_local(world: Fleet) -> None:
    p, d = await world.start("p"), await world.start("d")
    await warm(world, p)
    await warm(world, d, SHORT)
    asked = request(prompt(LENGTH), d, p)
    await world.stop(p)
    assert counts((await generate(world, asked)).usage) == (SOME, 0, 0)


def num_sequences(worker: Running) -> int:
    load = worker.worker.engine.load()
    return load.num_running + load.num_waiting


async def test_who_is_preempted_finds_its_own_pages_again_and_has_paid_for_them(world: Fleet) -> None:
    small = await world.start("small", num_pages=40)
    asked = [request(prompt(60, first), small, max_tokens=40) for first in (100, 300)]
    for number, each in enumerate(asked):
        each.request_id = f"r{number}"
    small.gate.close()
    running = [asyncio.ensure_future(generate(world, each)) for each in asked]
    await small.comes_true(lambda: small.worker.admission.num_active == 2)
    while num_sequences(small) < 2:  # whoever came first must not be through before the other has begun
        await small.held_up()
        small.gate.let_through()
    small.gate.open()
    answers = await asyncio.gather(*running)
    assert small.worker.engine.load().num_preemptions > 0
    assert [counts(answer.usage) for answer in answers] == [(0, 0, 0)] * 2
    await small.idle()


async def test_drafts_change_nothing(world: Fleet) -> None:
    p = await world.start("p", model=SURE, speculation=Speculation(num_drafts=4, adaptive=False))
    d = await world.start("d", speculation=Speculation(num_drafts=4, adaptive=False))
    await warm(world, p, SHORT)
    usage = (await generate(world, request(prompt(LENGTH), d, p))).usage
    assert usage.num_accepted_tokens > 0
    assert counts(usage) == (0, SOME, 0)
