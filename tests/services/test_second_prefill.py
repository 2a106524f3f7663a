"""When the prefill worker fails, the second choice computes the rest of the prompt and pulls from us what was kept."""

import pytest

from tests.services.test_handoff_kept import NUM_KEPT, amid_a_prompt
from tests.services.workers import MAX_STEP_TOKENS, Fleet, Running, generate, prompt, request

LONG = 401
PREFILL_STEPS = -(-LONG // MAX_STEP_TOKENS)
DECODE_STEPS = 11


@pytest.fixture
async def second(world: Fleet) -> Running:
    return await world.start("second")


async def test_the_second_choice_computes_the_prompt_of_one_that_is_gone(
    world: Fleet, prefill: Running, second: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill, second=second)
    await world.stop(prefill)
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert (second.num_steps, decode.num_steps) == (PREFILL_STEPS, DECODE_STEPS)
    for node in (second, decode):
        await node.idle()


async def test_the_second_choice_computes_only_what_the_first_one_left(
    world: Fleet, prefill: Running, second: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill, second=second)
    running = await amid_a_prompt(world, asked, prefill)
    prefill.transport.close()
    prefill.gate.open()
    answer = await running
    assert answer.tokens == await world.expected(asked)
    assert (second.num_steps, decode.num_steps) == (PREFILL_STEPS - NUM_KEPT // MAX_STEP_TOKENS, DECODE_STEPS)
    assert answer.usage.num_cached_transferred == answer.usage.num_cached_remote == answer.usage.num_cached_local == 0
    for node in (prefill, second, decode):
        await node.idle()


async def test_of_what_is_pulled_from_here_only_what_was_here_before_counts_as_cached(
    world: Fleet, prefill: Running, second: Running, decode: Running
) -> None:
    await generate(world, request(prompt(MAX_STEP_TOKENS), decode, max_tokens=1))
    asked = request(prompt(LONG), decode, prefill, second=second)
    prefill.gate.close()
    running = await amid_a_prompt(world, asked, prefill, num_held=MAX_STEP_TOKENS)
    prefill.transport.close()
    prefill.gate.open()
    answer = await running
    assert answer.tokens == await world.expected(asked)
    assert answer.usage.num_cached_transferred == MAX_STEP_TOKENS
    assert answer.usage.num_cached_remote == answer.usage.num_cached_local == 0


async def test_if_the_second_choice_fails_too_the_prompt_is_computed_here(
    world: Fleet, prefill: Running, second: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill, second=second)
    await world.stop(prefill)
    await world.stop(second)
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert decode.num_steps == PREFILL_STEPS + DECODE_STEPS
    assert world.measured("forebay_prefill_fallbacks_total", reason="WORKER_LOST") == 2
    await decode.idle()


async def test_a_short_rest_is_computed_here(world: Fleet, prefill: Running, second: Running, decode: Running) -> None:
    asked = request(prompt(NUM_KEPT + 100), decode, prefill, second=second)
    running = await amid_a_prompt(world, asked, prefill)
    prefill.transport.close()
    prefill.gate.open()
    assert (await running).tokens == await world.expected(asked)
    assert second.num_steps == 0


async def test_a_first_token_that_is_out_is_not_asked_for_again(
    world: Fleet, prefill: Running, second: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill, second=second)
    prefill.kv.release = lambda lease_id, read=(): False  # type: ignore[method-assign]
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert second.num_steps == 0
