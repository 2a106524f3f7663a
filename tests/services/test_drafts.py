"""Drafts between processes: handed over with the first token, counted in a request's usage and in the metrics."""

from dataclasses import replace

from shared.engine.speculation.speculator import Speculation
from tests.services.workers import MODEL, Fleet, generate, request

PROMPT = [token * 7 % 1000 for token in range(101)]
SURE = replace(MODEL, draft_acceptance=1.0)
FOUR = Speculation(num_drafts=4, adaptive=False)


async def test_the_first_decode_step_verifies_what_the_prefill_worker_proposed(world: Fleet) -> None:
    p = await world.start("p", model=SURE, speculation=FOUR)
    d = await world.start("d", speculation=FOUR)  # itself it proposes nothing
    asked = request(PROMPT, d, p)
    answer = await generate(world, asked)
    assert answer.tokens == await world.expected(asked)
    assert list(answer.usage.num_drafts_by_position) == [1, 1, 1, 1]
    assert list(answer.usage.num_accepted_by_position) == [1, 1, 1, 1]
    assert (answer.usage.num_draft_tokens, answer.usage.num_accepted_tokens) == (4, 4)
    await p.idle()
    await d.idle()


async def test_a_decode_worker_that_uses_no_drafts_passes_over_them(world: Fleet) -> None:
    p, d = await world.start("p", model=SURE, speculation=FOUR), await world.start("d")
    asked = request(PROMPT, d, p)
    answer = await generate(world, asked)
    assert answer.tokens == await world.expected(asked)
    assert answer.usage.num_draft_tokens == 0


async def test_metrics_count_drafts_by_their_position(world: Fleet) -> None:
    alone = await world.start("w", model=SURE, speculation=FOUR)
    await generate(world, request(PROMPT, alone, max_tokens=10))
    assert world.measured("forebay_drafts_verified_total", position="0") == 2
    assert world.measured("forebay_drafts_verified_total", position="3") == 1
    assert world.measured("forebay_drafts_accepted_total", position="3") == 1
    assert world.measured("forebay_mean_accepted_length") == 4.5
