"""PrefillService as its reader sees it, message by message."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from protos.forebay.v1 import generation_pb2, prefill_pb2, prefill_pb2_grpc
from shared import rpc
from shared.errors import StaleEpoch
from tests.services.workers import KEY, LEASE_TTL_MS, Fleet, Running, prompt


def asked(node: Running, num_tokens: int, *, num_held: int = 0, **sampling: Any) -> prefill_pb2.PrefillRequest:
    params = {"max_tokens": 5, "top_p": 1, "repetition_penalty": 1, "ignore_eos": True} | sampling
    return prefill_pb2.PrefillRequest(
        request_id="r",
        model="sim",
        prompt_token_ids=prompt(num_tokens),
        sampling=generation_pb2.SamplingParams(**params),
        hash_key=KEY,
        epoch=node.ref.epoch,
        num_pages_held=num_held,
    )


def stream(world: Fleet, node: Running, request: prefill_pb2.PrefillRequest) -> Any:
    stub: Any = prefill_pb2_grpc.PrefillServiceStub(world.channels.to(node.ref.address))
    return rpc.stream(stub.Prefill, request, 10)


async def answers(
    world: Fleet, node: Running, request: prefill_pb2.PrefillRequest
) -> list[prefill_pb2.PrefillResponse]:
    async with aclosing(stream(world, node, request)) as responses:
        return [response async for response in responses]


def announced(responses: list[prefill_pb2.PrefillResponse]) -> list[prefill_pb2.PagesReady]:
    """All pages, those that came with the first token included."""
    *before, last = responses
    with_token = [last.finished.last_pages] if last.finished.HasField("last_pages") else []
    return [*(each.pages_ready for each in before), *with_token]


async def test_pages_are_announced_in_order_once_and_the_last_with_its_part(world: Fleet, prefill: Running) -> None:
    responses = await answers(world, prefill, asked(prefill, 101))
    manifests = [ready.manifest for ready in announced(responses)]
    assert len(manifests) > 1
    first = 0
    for manifest in manifests:
        assert manifest.first_page == first
        first += len(manifest.page_ids)
    assert first == responses[-1].finished.num_pages == 26
    assert sum(manifest.num_tokens for manifest in manifests) == 101
    assert len({page for manifest in manifests for page in manifest.page_ids}) == 26
    assert len({ready.lease.lease_id for ready in announced(responses)}) == 1


async def test_the_last_pages_come_with_the_first_token(world: Fleet, prefill: Running) -> None:
    [only] = await answers(world, prefill, asked(prefill, 20))
    assert only.finished.tokens.token_ids
    assert only.finished.last_pages.manifest.num_tokens == 20


async def test_nobody_looks_for_readers_until_there_is_something_to_read(world: Fleet, prefill: Running) -> None:
    served: list[float] = []
    prefill.transport.served = served.append
    prefill.gate.close()
    answer = asyncio.create_task(answers(world, prefill, asked(prefill, 20)))
    await prefill.held_up()
    assert prefill.counts.leased + prefill.counts.held > 0
    assert served == []
    prefill.gate.open()
    await answer
    assert served == [LEASE_TTL_MS / 1000]


async def test_pages_that_the_reader_holds_are_not_announced(world: Fleet, prefill: Running) -> None:
    responses = await answers(world, prefill, asked(prefill, 101, num_held=4))
    ready = announced(responses)
    assert ready[0].manifest.first_page == 4
    assert responses[-1].finished.num_pages == sum(len(each.manifest.page_ids) for each in ready) == 22


async def test_a_cached_prompt_is_announced_as_well(world: Fleet, prefill: Running) -> None:
    await answers(world, prefill, asked(prefill, 101))
    responses = await answers(world, prefill, asked(prefill, 101))
    num_pages = sum(len(each.manifest.page_ids) for each in announced(responses))
    assert num_pages == responses[-1].finished.num_pages == 26


async def test_announced_pages_stay_leased_after_the_stream_until_the_lease_ends(
    world: Fleet, prefill: Running
) -> None:
    await answers(world, prefill, asked(prefill, 101))
    counts = prefill.kv.counts()
    assert counts.leased + counts.held == 26
    prefill.clock.ahead_s += LEASE_TTL_MS / 1000
    await prefill.idle()


async def test_a_stream_closed_early_frees_everything_at_once(world: Fleet, prefill: Running) -> None:
    prefill.gate.close()
    async with aclosing(stream(world, prefill, asked(prefill, 101))) as responses:
        first = asyncio.ensure_future(anext(responses))
        await prefill.held_up()
        prefill.gate.let_through()
        await first
    prefill.gate.open()
    await prefill.idle()


async def test_another_epoch_is_refused(world: Fleet, prefill: Running) -> None:
    request = asked(prefill, 20)
    request.epoch += 1
    with pytest.raises(StaleEpoch):
        await answers(world, prefill, request)


async def test_a_stop_token_ends_it_and_is_no_output(world: Fleet, prefill: Running) -> None:
    (*_, first) = await answers(world, prefill, asked(prefill, 20))
    (token,) = first.finished.tokens.token_ids
    (*_, last) = await answers(world, prefill, asked(prefill, 20, stop_token_ids=[token]))
    assert last.finished.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert not last.finished.tokens.token_ids
