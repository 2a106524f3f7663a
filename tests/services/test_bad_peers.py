"""Peers that say what is not so: each gets a fault with its reason; nobody crashes, and all pages come back."""

from collections.abc import Callable
from typing import Any

import pytest

from protos.forebay.v1 import kv_pb2, kv_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from shared import rpc
from shared.errors import DeadlineExceeded
from tests.services.workers import KEY, LEASE_TTL_MS, MODEL, Fleet, Running, generate, prompt, request

Lie = Callable[[Any], None]


# What a peer says of its pool -----------------------------------------------------------------------------------------


def an_agent_that_is_not_there(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].agent_name = "nobody"


def garbage_metadata(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].agent_metadata = b"\xff garbage"


def no_metadata(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].agent_metadata = b""


def memory_that_is_not_its_own(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].base_address -= 1 << 20


def memory_of_another_kind(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].memory_kind = "VRAM"


def more_pages_than_it_has(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].num_pages *= 2


def absurdly_many_pages(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].num_pages = 1 << 40


def another_compatibility_hash(answer: kv_pb2.ConnectResponse) -> None:
    answer.compatibility_hash = "0" * 32


def a_layout_without_a_state_class(answer: kv_pb2.ConnectResponse) -> None:
    del answer.shards[0].layout.state_classes[:]


def a_layout_with_shorter_pages(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].layout.page_bytes //= 2


def another_transport(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards[0].transport = "pigeons"


def no_pool(answer: kv_pb2.ConnectResponse) -> None:
    del answer.shards[:]


def a_pool_too_many(answer: kv_pb2.ConnectResponse) -> None:
    answer.shards.add().CopyFrom(answer.shards[0])


def another_epoch(answer: kv_pb2.ConnectResponse) -> None:
    answer.epoch += 1


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (an_agent_that_is_not_there, "TRANSFER_FAILED"),
        (garbage_metadata, "TRANSFER_FAILED"),
        (no_metadata, "TRANSFER_FAILED"),
        (memory_that_is_not_its_own, "TRANSFER_FAILED"),
        (memory_of_another_kind, "TRANSFER_FAILED"),
        (more_pages_than_it_has, "TRANSFER_FAILED"),
        (absurdly_many_pages, "INCOMPATIBLE"),
        (another_compatibility_hash, "INCOMPATIBLE"),
        (a_layout_without_a_state_class, "INCOMPATIBLE"),
        (a_layout_with_shorter_pages, "INCOMPATIBLE"),
        (another_transport, "INCOMPATIBLE"),
        (no_pool, "INCOMPATIBLE"),
        (a_pool_too_many, "INCOMPATIBLE"),
        (another_epoch, "STALE_EPOCH"),
    ],
)
async def test_a_pool_that_cannot_be_is_not_read(
    world: Fleet, prefill: Running, decode: Running, lie: Lie, reason: str
) -> None:
    prefill.peer.tamper_connect = lie
    asked = request(prompt(40), decode, prefill)
    assert (await generate(world, asked)).tokens == await world.expected(asked)
    assert world.measured("forebay_prefill_fallbacks_total", reason=reason) == 1
    for node in (prefill, decode):
        await node.idle()


# What a peer says of the pages it leases ------------------------------------------------------------------------------


def without_a_state_class(answer: kv_pb2.AcquireResponse) -> None:
    del answer.manifest.state_classes[:]


def with_too_few_bytes(answer: kv_pb2.AcquireResponse) -> None:
    answer.manifest.state_classes[0].num_bytes -= 1


def from_the_middle(answer: kv_pb2.AcquireResponse) -> None:
    answer.manifest.first_page = 1


def with_a_page_id_outside_the_pool(answer: kv_pb2.AcquireResponse) -> None:
    answer.manifest.page_ids[3] = 1_000_000


def with_a_page_twice(answer: kv_pb2.AcquireResponse) -> None:
    answer.manifest.page_ids[3] = answer.manifest.page_ids[2]


def with_somebody_elses_page(answer: kv_pb2.AcquireResponse) -> None:
    answer.manifest.page_ids[3] = 200


def with_a_page_that_was_not_asked_for(answer: kv_pb2.AcquireResponse) -> None:
    manifest, num_pages = answer.manifest, len(answer.manifest.page_ids)
    manifest.page_ids.extend(range(201, 251))
    manifest.num_tokens += 50 * MODEL.page_size
    for state in manifest.state_classes:
        state.num_bytes += 50 * state.num_bytes // num_pages


def with_a_page_that_is_not_full(answer: kv_pb2.AcquireResponse) -> None:
    answer.manifest.num_tokens -= 1


def under_another_epoch(answer: kv_pb2.AcquireResponse) -> None:
    answer.lease.epoch += 1


def under_a_lease_that_never_was(answer: kv_pb2.AcquireResponse) -> None:
    answer.lease.lease_id += 1_000


def under_a_lease_that_ends_at_once(answer: kv_pb2.AcquireResponse) -> None:
    answer.lease.ttl_ms = 0


@pytest.mark.parametrize(
    "lie",
    [
        without_a_state_class,
        with_too_few_bytes,
        from_the_middle,
        with_a_page_id_outside_the_pool,
        with_a_page_twice,
        with_somebody_elses_page,
        with_a_page_that_was_not_asked_for,
        with_a_page_that_is_not_full,
        under_another_epoch,
        under_a_lease_that_never_was,
        under_a_lease_that_ends_at_once,
    ],
)
async def test_a_prefix_whose_manifest_or_lease_cannot_be_is_computed(world: Fleet, decode: Running, lie: Lie) -> None:
    source = await world.start("source")
    await generate(world, request(prompt(80), source))
    source.peer.tamper_acquire = lie
    asked = request(prompt(120), decode, source=source)
    output = await generate(world, asked)
    assert (output.tokens, output.usage.num_cached_transferred) == (await world.expected(asked), 0)
    assert world.measured("forebay_failed_pulls_total", reason="BAD_MANIFEST") == 1
    await decode.idle()
    source.clock.ahead_s += LEASE_TTL_MS / 1000
    await source.idle()


# A peer that stops amid a transfer ------------------------------------------------------------------------------------


async def test_an_owner_that_stops_amid_a_read_costs_no_more_than_the_deadline(
    world: Fleet, prefill: Running, decode: Running
) -> None:
    """It stops when two pages of the second chunk are there."""
    asked = request(prompt(80), decode, prefill)
    prefill.transport.answer(True, num_pages=10)
    with pytest.raises(DeadlineExceeded):
        await generate(world, asked, timeout_s=1.0)
    assert not prefill.transport.is_answering
    await decode.idle()
    prefill.transport.answer(True)
    await prefill.idle()
    assert (await generate(world, asked)).tokens == await world.expected(asked)


# Readers that ask for what is not theirs ------------------------------------------------------------------------------


async def test_a_reader_that_holds_more_pages_than_there_are_gets_none(world: Fleet, prefill: Running) -> None:
    stub: Any = prefill_pb2_grpc.PrefillServiceStub(world.channels.to(prefill.ref.address))
    asked = request(prompt(40), prefill)
    sent = prefill_pb2.PrefillRequest(
        request_id="r",
        model=MODEL.name,
        prompt_token_ids=asked.prompt_token_ids,
        sampling=asked.sampling,
        hash_key=KEY,
        epoch=prefill.ref.epoch,
        num_pages_held=1_000_000,
    )
    (last,) = [answer async for answer in rpc.stream(stub.Prefill, sent, 10.0)]
    assert last.finished.num_pages == 0
    prefill.clock.ahead_s += LEASE_TTL_MS / 1000
    await prefill.idle()


async def test_a_release_that_names_pages_of_nobody_is_stale(world: Fleet, prefill: Running) -> None:
    lease_id = prefill.kv.grant()
    stub: Any = kv_pb2_grpc.KvServiceStub(world.channels.to(prefill.ref.address))
    asked = kv_pb2.ReleaseRequest(lease_id=lease_id, epoch=prefill.ref.epoch, page_ids=[0, 4_294_967_295])
    assert (await rpc.call(stub.Release, asked)).status == kv_pb2.RELEASE_STATUS_STALE
    await prefill.idle()
