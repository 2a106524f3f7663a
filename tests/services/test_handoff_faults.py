"""A handoff that goes wrong costs time, never a wrong token and never a page."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from protos.forebay.v1 import decode_pb2, kv_pb2, prefill_pb2
from shared.errors import Cancelled, DeadlineExceeded, Draining, Fault, InvalidRequest
from tests.services.workers import LEASE_TTL_MS, MODEL, Fleet, Running, generate, prompt, request, stream

LONG = 201


async def assert_right_and_clean(world: Fleet, decode: Running, *others: Running, num_tokens: int = LONG) -> None:
    """The output is what a single worker makes, computed on the decode worker, and every page is back."""
    asked = request(prompt(num_tokens), decode, *others[:1])
    output = await generate(world, asked)
    assert output.tokens == await world.expected(asked)
    for node in (decode, *others):
        await node.idle()


async def test_a_prefill_worker_that_dies_in_the_middle_is_done_without(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill)
    prefill.gate.close()
    running = asyncio.ensure_future(generate(world, asked))
    for _ in range(3):
        await prefill.held_up()
        prefill.gate.let_through()
    await prefill.held_up()
    prefill.transport.close()
    await prefill.server.stop(0)
    assert (await running).tokens == await world.expected(asked)
    await decode.idle()
    prefill.gate.open()
    await prefill.idle()


async def test_a_prefill_worker_that_dies_before_its_pages_are_read_is_done_without(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill)
    prefill.transport.answer(False)
    async with aclosing(stream(world, asked)) as responses:
        tokens = list((await anext(responses)).tokens.token_ids)
        prefill.transport.close()
        prefill.transport.answer(True)
        await prefill.server.stop(0)
        async for response in responses:
            tokens += response.tokens.token_ids
    assert tokens == await world.expected(asked)
    await decode.idle()


async def test_a_restarted_prefill_worker_is_not_mistaken_for_its_predecessor(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill)
    asked.placement.prefill.epoch -= 1
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert prefill.num_steps == 0
    await decode.idle()


async def test_a_draining_prefill_worker_is_done_without(world: Fleet, prefill: Running, decode: Running) -> None:
    prefill.worker.admission.draining = True
    await assert_right_and_clean(world, decode, prefill)
    assert prefill.num_steps == 0


async def test_pages_of_another_layout_are_never_read(world: Fleet, decode: Running) -> None:
    other = await world.start("other", model=replace(MODEL, words_per_token=4))
    await assert_right_and_clean(world, decode, other)


async def test_pages_whose_lease_ended_before_they_were_read_are_never_used(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    asked = request(prompt(LONG), decode, prefill)
    prefill.transport.answer(False)
    async with aclosing(stream(world, asked)) as responses:
        tokens = list((await anext(responses)).tokens.token_ids)
        await prefill.comes_true(lambda: prefill.kv.counts().held == 0)
        prefill.clock.ahead_s += LEASE_TTL_MS / 1000
        prefill.kv.expire()
        prefill.overwrite()
        prefill.transport.answer(True)
        async for response in responses:
            tokens += response.tokens.token_ids
    assert tokens == await world.expected(asked)
    await decode.idle()


Tamper = Callable[[prefill_pb2.PrefillResponse], prefill_pb2.PrefillResponse | None]


def without_a_state_class(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    del response.pages_ready.manifest.state_classes[:]
    return response


def with_too_few_bytes(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    response.pages_ready.manifest.state_classes[0].num_bytes -= 1
    return response


def with_a_gap(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    response.pages_ready.manifest.first_page += 1
    return response


def with_a_page_id_outside_the_pool(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    response.pages_ready.manifest.page_ids[0] = 1_000_000
    return response


def with_a_page_twice(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    response.pages_ready.manifest.page_ids[1] = response.pages_ready.manifest.page_ids[0]
    return response


def with_somebody_elses_page(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    """One that is in the pool, but not under the lease."""
    response.pages_ready.manifest.page_ids[0] = 200
    return response


def with_a_lease_that_ends_at_once(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    response.pages_ready.lease.ttl_ms = 0
    return response


def with_a_token_too_many(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    response.pages_ready.manifest.num_tokens += 17
    return response


def with_another_epoch(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    response.pages_ready.lease.epoch += 1
    return response


def with_a_lease_that_never_was(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    response.pages_ready.lease.lease_id += 1_000
    return response


def without_pages(response: prefill_pb2.PrefillResponse) -> None:
    return None


@pytest.mark.parametrize(
    "tamper",
    [
        without_a_state_class,
        with_too_few_bytes,
        with_a_gap,
        with_a_page_id_outside_the_pool,
        with_a_page_twice,
        with_somebody_elses_page,
        with_a_lease_that_ends_at_once,
        with_a_token_too_many,
        with_another_epoch,
        with_a_lease_that_never_was,
        without_pages,
    ],
)
@pytest.mark.parametrize("with_token", [False, True])
async def test_an_incomplete_or_impossible_handoff_is_refused(
    world: Fleet, prefill: Running, decode: Running, tamper: Tamper, with_token: bool
) -> None:
    prefill.prefill.tamper = in_last_pages(tamper) if with_token else in_pages_ready(tamper)
    asked = request(prompt(40), decode, prefill)
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    # 11 steps would follow a handoff of 40 tokens. Computing them here, in steps of at most 32, takes one more.
    assert decode.num_steps >= 12
    await decode.idle()
    prefill.clock.ahead_s += LEASE_TTL_MS / 1000
    await prefill.idle()


def in_pages_ready(tamper: Tamper) -> Tamper:
    return lambda response: tamper(response) if response.HasField("pages_ready") else response


def in_last_pages(tamper: Tamper) -> Tamper:
    """Do it to the pages that come with the first token."""

    def tamper_with(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
        if response.HasField("finished"):
            told = tamper(prefill_pb2.PrefillResponse(pages_ready=response.finished.last_pages))
            response.finished.ClearField("last_pages")
            if told is not None:
                response.finished.last_pages.CopyFrom(told.pages_ready)
        return response

    return tamper_with


async def test_a_handoff_that_ends_without_a_token_is_refused(world: Fleet, prefill: Running, decode: Running) -> None:
    prefill.prefill.tamper = lambda response: response if response.HasField("pages_ready") else None
    await assert_right_and_clean_after_leases(world, prefill, decode)


async def test_a_wrong_number_of_pages_is_refused(world: Fleet, prefill: Running, decode: Running) -> None:
    def tamper(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
        if response.HasField("finished"):
            response.finished.num_pages += 1
        return response

    prefill.prefill.tamper = tamper
    await assert_right_and_clean_after_leases(world, prefill, decode)


async def assert_right_and_clean_after_leases(world: Fleet, prefill: Running, decode: Running) -> None:
    asked = request(prompt(40), decode, prefill)
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert decode.num_steps >= 12
    await decode.idle()
    prefill.clock.ahead_s += LEASE_TTL_MS / 1000
    await prefill.idle()


async def test_a_prefill_that_its_worker_cancels_is_computed_here(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    """As a worker does at the end of its drain's grace."""

    def cancel(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
        raise Cancelled("the grace is over")

    prefill.prefill.tamper = cancel
    await assert_right_and_clean_after_leases(world, prefill, decode)


async def test_a_prefill_worker_that_answers_but_cannot_be_read_is_done_without(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    """What takes too long over there is not the end of the client's own time."""
    prefill.transport.answer(False)
    await assert_right_and_clean_after_leases(world, prefill, decode)


async def test_a_prompt_too_long_for_the_prefill_worker_is_computed_here(world: Fleet, decode: Running) -> None:
    small = await world.start("small", num_pages=8)
    await assert_right_and_clean(world, decode, small)


async def test_a_source_that_is_gone_is_done_without(world: Fleet, prefill: Running, decode: Running) -> None:
    source = await world.start("source")
    await generate(world, request(prompt(80), source))
    asked = request(prompt(120), decode, prefill, source)
    await world.stop(source)
    output = await generate(world, asked)
    assert output.usage.num_cached_transferred == 0
    assert output.tokens == await world.expected(asked)
    for node in (prefill, decode):
        await node.idle()


async def test_a_source_that_has_nothing_is_done_without(world: Fleet, decode: Running) -> None:
    source = await world.start("source")
    asked = request(prompt(120), decode, source=source)
    output = await generate(world, asked)
    assert output.usage.num_cached_transferred == 0
    assert output.tokens == await world.expected(asked)


# Going away and running out of time -----------------------------------------------------------------------------------


async def cancelled(world: Fleet, asked: decode_pb2.GenerateRequest, when: Callable[[], Awaitable[None]]) -> None:
    running = asyncio.ensure_future(generate(world, asked))
    await when()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


async def test_going_away_during_a_remote_prefill_frees_every_page(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    prefill.gate.close()
    await cancelled(world, request(prompt(LONG), decode, prefill), prefill.held_up)
    prefill.gate.open()
    await decode.idle()
    await prefill.idle()
    assert prefill.worker.admission.num_active == decode.worker.admission.num_active == 0


async def test_going_away_while_pages_are_read_frees_every_page(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    prefill.transport.answer(False)
    async with aclosing(stream(world, request(prompt(LONG), decode, prefill))) as responses:
        await anext(responses)
    await decode.idle()
    await prefill.idle()


async def test_going_away_during_decode_frees_every_page(world: Fleet, prefill: Running, decode: Running) -> None:
    decode.gate.close()
    await cancelled(world, request(prompt(LONG), decode, prefill, max_tokens=100), decode.held_up)
    decode.gate.open()
    await decode.idle()
    await prefill.idle()


async def test_going_away_while_waiting_for_room_frees_every_page(world: Fleet, decode: Running) -> None:
    small = await world.start("small", num_pages=64)
    decode_small = await world.start("small-decode", num_pages=64)
    small.gate.close()
    first = asyncio.ensure_future(generate(world, request(prompt(LONG), decode_small, small)))
    await small.held_up()
    second = asyncio.ensure_future(generate(world, request(prompt(LONG, 900), decode_small, small)))
    await decode_small.comes_true(lambda: decode_small.worker.admission.num_active == 2)
    second.cancel()
    small.gate.open()
    assert (await first).tokens == await world.expected(request(prompt(LONG), decode_small, small))
    await decode_small.idle()
    await small.idle()


async def test_the_deadline_ends_a_remote_prefill_that_hangs(world: Fleet, prefill: Running, decode: Running) -> None:
    prefill.gate.close()
    with pytest.raises(DeadlineExceeded):
        await generate(world, request(prompt(LONG), decode, prefill), timeout_s=0.2)
    prefill.gate.open()
    await decode.idle()
    await prefill.idle()


async def test_the_deadline_ends_a_read_that_hangs(world: Fleet, prefill: Running, decode: Running) -> None:
    prefill.transport.answer(False)
    with pytest.raises(DeadlineExceeded):
        await generate(world, request(prompt(LONG), decode, prefill), timeout_s=0.3)
    await decode.idle()
    prefill.transport.answer(True)
    await prefill.idle()


# Refusals -------------------------------------------------------------------------------------------------------------


async def test_a_bad_request_is_refused_with_its_reason_and_holds_no_page(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    for placed in (request(prompt(10), decode), request(prompt(10), decode, prefill)):
        placed.sampling.top_p = 7
        await assert_refused(world, placed, InvalidRequest)
        empty = request(prompt(0), decode)
        empty.placement.CopyFrom(placed.placement)
        await assert_refused(world, empty, InvalidRequest)
    await decode.idle()
    await prefill.idle()


async def test_a_draining_worker_finishes_what_it_has_and_takes_no_more(world: Fleet, decode: Running) -> None:
    asked = request(prompt(10), decode)
    decode.gate.close()
    running = asyncio.ensure_future(generate(world, asked))
    await decode.held_up()
    decode.worker.admission.draining = True
    await assert_refused(world, request(prompt(10), decode), Draining)
    assert not await decode.worker.admission.drained(0.01)
    decode.gate.open()
    assert (await running).tokens == await world.expected(asked)
    assert await decode.worker.admission.drained(5)


async def assert_refused(world: Fleet, asked: decode_pb2.GenerateRequest, kind: type[Fault]) -> None:
    with pytest.raises(kind):
        await generate(world, asked)


def test_the_tampering_hits_what_it_means_to() -> None:
    manifest = kv_pb2.Manifest(page_ids=[1], num_tokens=16, state_classes=[kv_pb2.StateClassBytes(name="words")])
    told = prefill_pb2.PrefillResponse(pages_ready=prefill_pb2.PagesReady(manifest=manifest))
    assert not without_a_state_class(told).pages_ready.manifest.state_classes
