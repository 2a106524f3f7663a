"""A prefill that fails midway: what had arrived and is vouched for is kept, and only the rest is computed."""

import asyncio

from protos.forebay.v1 import decode_pb2, prefill_pb2
from tests.services.workers import LEASE_TTL_MS, MAX_STEP_TOKENS, Answer, Fleet, Running, generate, prompt, request

LONG = 201
NUM_STEPS = -(-LONG // MAX_STEP_TOKENS) + 11  # of a worker that computes it all, with the 12 tokens of the output
NUM_KEPT = 3 * MAX_STEP_TOKENS


async def amid_a_prompt(
    world: Fleet, asked: decode_pb2.GenerateRequest, prefill: Running, num_held: int = 0
) -> "asyncio.Task[Answer]":
    """A request of which three chunks were computed and, but for what the decode worker had, read; the fourth is being
    held.
    """
    prefill.gate.close()
    running = asyncio.ensure_future(generate(world, asked))
    for _ in range(3):
        await prefill.held_up()
        prefill.gate.let_through()
    await prefill.held_up()
    await prefill.comes_true(lambda: num_tokens_read(world, prefill) == NUM_KEPT - num_held)
    return running


def num_tokens_read(world: Fleet, owner: Running) -> int:
    layout = owner.worker.engine.spec.layout
    return int(world.measured("forebay_transfer_bytes_total")) // layout.page_bytes * layout.page_size


async def assert_kept(world: Fleet, decode: Running, running: "asyncio.Task[Answer]", num_kept: int) -> None:
    """The answer is right, and so many tokens were not computed again."""
    answer = await running
    assert answer.tokens == await world.expected(request(prompt(LONG), decode))
    assert world.measured("forebay_kept_tokens_total") == num_kept
    num_steps = NUM_STEPS - num_kept // MAX_STEP_TOKENS
    # The prefill worker's own token may have gone out just before the prefill was given up.
    assert decode.num_steps in (num_steps, num_steps - 1)
    assert answer.usage.num_cached_remote == answer.usage.num_cached_local == 0
    await decode.idle()


async def test_what_was_read_before_a_prefill_was_given_up_is_kept(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    """As the engine of a worker that drains gives its sequences up, while the worker itself is still there."""
    running = await amid_a_prompt(world, request(prompt(LONG), decode, prefill), prefill)
    prefill.gate.open()
    await prefill.worker.loop.stop()
    await asyncio.wait([running])
    num_read = num_tokens_read(world, prefill)  # the fourth chunk may just have been read, too
    await assert_kept(world, decode, running, num_read)
    assert prefill.kv.lease_counts().live == 0


async def test_what_was_read_before_a_read_failed_is_kept(world: Fleet, prefill: Running, decode: Running) -> None:
    running = await amid_a_prompt(world, request(prompt(LONG), decode, prefill), prefill)
    prefill.transport.close()
    prefill.gate.open()
    await assert_kept(world, decode, running, NUM_KEPT)
    await prefill.idle()


async def test_what_was_read_under_a_lease_that_ended_is_not_kept(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    running = await amid_a_prompt(world, request(prompt(LONG), decode, prefill), prefill)
    prefill.clock.ahead_s += LEASE_TTL_MS / 1000
    prefill.kv.expire()
    prefill.transport.close()
    prefill.gate.open()
    await assert_kept(world, decode, running, 0)
    await prefill.idle()


async def test_what_a_killed_worker_handed_over_is_not_kept(world: Fleet, prefill: Running, decode: Running) -> None:
    running = await amid_a_prompt(world, request(prompt(LONG), decode, prefill), prefill)
    prefill.transport.close()
    await prefill.server.stop(0)
    await assert_kept(world, decode, running, 0)


async def test_what_a_killed_worker_handed_over_with_checksums_is_kept(world: Fleet, decode: Running) -> None:
    prefill = await world.start("prefill", checksums=True)
    running = await amid_a_prompt(world, request(prompt(LONG), decode, prefill), prefill)
    prefill.transport.close()
    await prefill.server.stop(0)
    await assert_kept(world, decode, running, NUM_KEPT)


async def test_nothing_is_kept_of_a_worker_that_contradicted_itself(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    running = await amid_a_prompt(world, request(prompt(LONG), decode, prefill), prefill)

    def tamper(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
        if response.HasField("pages_ready"):
            response.pages_ready.manifest.first_page += 1
        return response

    prefill.prefill.tamper = tamper
    prefill.gate.open()
    await assert_kept(world, decode, running, 0)
    await prefill.idle()
