"""What a handoff saves: nothing is computed twice, and nobody waits for what can happen meanwhile."""

import asyncio
from contextlib import aclosing

from shared import page_hash
from tests.services.workers import KEY, MODEL, Fleet, Running, generate, prompt, request, stream


async def test_a_sampled_request_gets_the_tokens_of_a_single_worker(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    asked = request(prompt(50), decode, prefill, temperature=1.0, seed=5)
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert await world.expected(asked) != await world.expected(request(prompt(50), decode))


async def test_no_prompt_is_computed_twice(world: Fleet, prefill: Running, decode: Running) -> None:
    await generate(world, request(prompt(201), decode, prefill, max_tokens=2))
    # 201 tokens are seven steps of 32; the decode worker had only the second token to compute.
    assert (prefill.num_steps, decode.num_steps) == (7, 1)


async def test_the_first_token_does_not_wait_for_the_pages(world: Fleet, prefill: Running, decode: Running) -> None:
    asked = request(prompt(100), decode, prefill)
    prefill.transport.answer(False)
    async with aclosing(stream(world, asked)) as responses:
        first = await anext(responses)
        assert len(first.tokens.token_ids) == 1
        assert decode.num_steps == 0
        prefill.transport.answer(True)
        tokens = list(first.tokens.token_ids)
        async for response in responses:
            tokens += response.tokens.token_ids
    assert tokens == await world.expected(asked)


async def test_pages_are_read_while_the_next_chunk_is_computed(world: Fleet, prefill: Running, decode: Running) -> None:
    prefill.gate.close()
    running = asyncio.ensure_future(generate(world, request(prompt(64), decode, prefill)))
    await prefill.held_up()
    prefill.gate.let_through()
    await prefill.held_up()  # the second chunk
    page = next(page for page in prefill.pages if any(page))
    await decode.comes_true(lambda: page in decode.pages)
    prefill.gate.open()
    await running


async def test_pages_that_were_handed_over_can_be_found_on_the_decode_worker(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    await generate(world, request(prompt(101), decode, prefill))
    again = await generate(world, request(prompt(101), decode))
    assert again.usage.num_cached_local == 100
    assert again.tokens == await world.expected(request(prompt(101), decode))


async def test_they_can_be_found_before_their_first_step_there(world: Fleet, prefill: Running, decode: Running) -> None:
    decode.gate.close()
    others = asyncio.ensure_future(generate(world, request([3] * 9, decode)))
    await decode.held_up()
    handed_over = asyncio.ensure_future(generate(world, request(prompt(101), decode, prefill)))
    hashes = page_hash.chain(KEY, prompt(101), MODEL.page_size)
    await decode.comes_true(lambda: decode.worker.engine.kv.match(hashes) == 25)
    decode.gate.open()
    await asyncio.gather(others, handed_over)


async def test_the_second_turn_of_a_conversation_is_pulled_from_who_generated_the_first(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    first = await generate(world, request(prompt(41), decode, prefill, max_tokens=40))
    asked = request([*prompt(41), *first.tokens, *range(30)], decode, prefill, decode)
    answer = await generate(world, asked)
    assert answer.usage.num_cached_transferred == 40  # up to 80: what it computed of the first turn it had itself
    assert answer.tokens == await world.expected(asked)
    for running in (prefill, decode):
        await running.idle()
