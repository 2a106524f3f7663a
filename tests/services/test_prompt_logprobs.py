"""Log-probabilities of a prompt, computed where the placement says: the same everywhere, and each told once."""

from collections.abc import Sequence
from typing import Any

import pytest

from protos.forebay.v1 import decode_pb2, generation_pb2
from tests.services.test_handoff_kept import NUM_KEPT, amid_a_prompt
from tests.services.workers import Answer, Fleet, Running, answered_alone, generate, prompt, request

LONG, NUM_TOP = 201, 2
Told = list[tuple[float, int, tuple[int, ...]]]


def asked(tokens: Sequence[int], *workers: Running, held: int = 0, **fields: Any) -> decode_pb2.GenerateRequest:
    """A request for log-probabilities of the prompt, to a decode worker and, if there is one, a prefill worker."""
    made = request(tokens, *workers, num_prompt_logprobs=NUM_TOP, **fields)
    made.num_prompt_logprobs_held = held
    return made


def told(answer: Answer) -> Told:
    return [(each.logprob, each.rank, tuple(each.top_token_ids)) for each in answer.told]


@pytest.mark.parametrize("max_tokens", [0, 1, 12])
@pytest.mark.parametrize("length", [1, 2, 4, 33, LONG])
async def test_computed_here_or_there(
    length: int, max_tokens: int, world: Fleet, prefill: Running, decode: Running
) -> None:
    here = await generate(world, asked(prompt(length), decode, max_tokens=max_tokens))
    there = await generate(world, asked(prompt(length), decode, prefill, max_tokens=max_tokens))
    alone = await answered_alone(world, asked(prompt(length), decode, max_tokens=max_tokens))
    assert told(here) == told(there) == told(alone)
    assert len(here.told) == length - 1
    assert here.tokens == there.tokens
    assert len(here.tokens) == max_tokens
    assert here.finished is not None
    assert there.finished is not None
    assert here.finished.reason == there.finished.reason == generation_pb2.FINISH_REASON_LENGTH
    await prefill.idle()
    await decode.idle()


async def test_what_is_cached_is_not_used_nor_pulled_but_kept_for_others(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    expected = await generate(world, request(prompt(LONG), decode))
    for workers in [(decode,), (decode, prefill), (decode, prefill, decode)]:
        again = await generate(world, asked(prompt(LONG), *workers))
        assert told(again) == told(await answered_alone(world, asked(prompt(LONG), decode)))
        assert again.tokens == expected.tokens
        usage = again.usage
        assert usage.num_cached_local == usage.num_cached_remote == usage.num_cached_transferred == 0
    later = await generate(world, request(prompt(LONG), decode, prefill))
    assert later.usage.num_cached_remote == LONG - 1


async def test_of_a_request_that_is_continued_only_the_rest_is_told(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    whole = await generate(world, asked(prompt(LONG), decode))
    for workers in [(decode,), (decode, prefill)]:
        rest = await generate(world, asked(prompt(LONG), *workers, held=150))
        assert told(rest) == told(whole)[149:]
        assert rest.tokens == whole.tokens
        message = asked(prompt(LONG), *workers, held=LONG)
        message.output_token_ids.extend(whole.tokens[:5])
        last = await generate(world, message)
        assert (last.told, last.tokens) == ([], whole.tokens[5:])


async def test_a_prefill_that_fails_midway_is_told_on_from_where_it_was(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    whole = await answered_alone(world, asked(prompt(LONG), decode))
    running = await amid_a_prompt(world, asked(prompt(LONG), decode, prefill), prefill)
    prefill.transport.close()
    prefill.gate.open()
    answer = await running
    assert (told(answer), answer.tokens) == (told(whole), whole.tokens)
    assert world.measured("forebay_kept_tokens_total") == NUM_KEPT
    await decode.idle()


async def test_a_prefill_worker_that_is_killed_midway_is_told_on_from_where_it_was(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    whole = await answered_alone(world, asked(prompt(LONG), decode))
    running = await amid_a_prompt(world, asked(prompt(LONG), decode, prefill), prefill)
    await world.stop(prefill)
    answer = await running
    assert (told(answer), answer.tokens) == (told(whole), whole.tokens)
    await decode.idle()


async def test_a_token_that_ends_an_output_has_log_probabilities(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    tokens = (await generate(world, request(prompt(LONG), decode))).tokens
    for place in (0, 3):
        for workers in [(decode,), (decode, prefill)]:
            stops: dict[str, Any] = {"stop_token_ids": [tokens[place]], "num_logprobs": 2}
            answer = await generate(world, request(prompt(LONG), *workers, **stops))
            assert answer.finished is not None
            assert answer.finished.stop_token_id == answer.finished.stop_logprobs.top_token_ids[0] == tokens[place]
            plain = await generate(world, request(prompt(LONG), *workers, stop_token_ids=[tokens[place]]))
            assert plain.finished is not None
            assert not plain.finished.HasField("stop_logprobs")
