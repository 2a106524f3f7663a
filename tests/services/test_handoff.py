"""Prefill on one worker, decode on another: equal tokens, nothing leaked, whatever goes wrong on the way."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from protos.forebay.v1 import kv_pb2, kv_pb2_grpc, prefill_pb2
from shared import page_hash, rpc
from shared.engine.sim import SimModel
from shared.errors import DeadlineExceeded, Draining, Fault, Incompatible, InvalidRequest, ModelNotFound, StaleEpoch
from shared.worker import manifests
from shared.worker.manifests import MIN_LEASE_TTL_MS
from shared.worker.puller import LEAST_PATIENCE_MS
from tests.services.workers import LEASE_TTL_MS, Fleet, generate, request, stream

PROMPT = [token * 7 % 1000 for token in range(101)]


async def alone(world: Fleet, prompt: list[int], **sampling: Any) -> list[int]:
    """What a worker generates without any help."""
    running = await world.start("alone", is_alone=True)
    answer = await generate(world, request(prompt, running, **sampling))
    await world.stop(running)
    return answer.tokens


@pytest.mark.parametrize("length", [1, 3, 4, 5, 31, 32, 33, 101])
async def test_a_handoff_changes_no_token(length: int, world: Fleet) -> None:
    prompt = PROMPT[:length]
    expected = await alone(world, prompt)
    p, d = await world.start("p"), await world.start("d")
    answer = await generate(world, request(prompt, d, p))
    assert answer.tokens == expected
    assert (answer.usage.num_prompt_tokens, answer.usage.num_output_tokens) == (length, 12)
    assert p.worker.engine.load().num_steps > 0
    await p.idle()
    await d.idle()


@pytest.mark.parametrize("max_tokens", [1, 2])
async def test_a_request_may_end_with_its_first_token(max_tokens: int, world: Fleet) -> None:
    expected = await alone(world, PROMPT, max_tokens=max_tokens)
    p, d = await world.start("p"), await world.start("d")
    assert (await generate(world, request(PROMPT, d, p, max_tokens=max_tokens))).tokens == expected
    await p.idle()
    await d.idle()


async def test_pages_are_not_read_for_an_output_that_ends_with_its_first_token(world: Fleet) -> None:
    p, d = await world.start("p"), await world.start("d")
    read: list[int] = []
    d.transport.arrived = read.extend
    one_step = PROMPT[:20]
    await generate(world, request(one_step, d, p, max_tokens=1))
    await p.idle()
    assert (await d.idle()).cached == 0
    assert read == []
    await generate(world, request(one_step, d, p, max_tokens=2))
    assert len(read) == 5


async def test_a_stop_token_ends_a_request_on_either_side(world: Fleet) -> None:
    tokens = await alone(world, PROMPT)
    p, d = await world.start("p"), await world.start("d")
    for place in (0, 1, 5):
        answer = await generate(world, request(PROMPT, d, p, stop_token_ids=[tokens[place]]))
        assert answer.tokens == tokens[:place]
        assert answer.finished is not None
        assert answer.finished.stop_token_id == tokens[place]
    await p.idle()
    await d.idle()


async def test_pages_that_the_decode_worker_has_are_not_moved_again(world: Fleet) -> None:
    p, d = await world.start("p"), await world.start("d")
    first = await generate(world, request(PROMPT, d, p))
    longer = [*PROMPT, *first.tokens, *range(40)]
    expected = await alone(world, longer)
    answer = await generate(world, request(longer, d, p))
    assert answer.tokens == expected
    assert answer.usage.num_cached_remote == 100
    await p.idle()
    await d.idle()


async def test_a_prompt_computed_where_it_is_cached_counts_as_local(world: Fleet) -> None:
    d = await world.start("d")
    await generate(world, request(PROMPT, d))
    assert (await generate(world, request(PROMPT, d))).usage.num_cached_local == 100


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_of_prompts_that_come_at_once_those_that_wait_count_what_the_first_computed(
    remote: bool, world: Fleet
) -> None:
    expected = await alone(world, PROMPT)
    p, d = await world.start("p"), await world.start("d")
    asked = [request(PROMPT, d, p if remote else None) for _ in range(3)]
    for number, each in enumerate(asked):
        each.request_id = f"r{number}"
    answers = await asyncio.gather(*(generate(world, each) for each in asked))
    assert [answer.tokens for answer in answers] == [expected] * 3
    cached = [answer.usage.num_cached_remote if remote else answer.usage.num_cached_local for answer in answers]
    assert min(cached) == 0
    assert max(cached) > 0
    for worker in (p, d):
        await worker.idle()


async def test_a_prefix_is_pulled_from_the_peer_that_has_it(world: Fleet) -> None:
    expected = await alone(world, PROMPT)
    q, p, d = [await world.start(name) for name in "qpd"]
    await generate(world, request(PROMPT, q))
    answer = await generate(world, request(PROMPT, d, p, q))
    assert answer.tokens == expected
    assert answer.usage.num_cached_transferred == 100
    local = await generate(world, request(PROMPT[:90], d, None, q))
    assert local.usage.num_cached_local == 88
    for running in (q, p, d):
        await running.idle()


async def test_a_short_prefix_is_computed_rather_than_waiting_for_a_first_connection(world: Fleet) -> None:
    expected = await alone(world, PROMPT)
    q, d = await world.start("q"), await world.start("d", connect_ms=1e6)
    await generate(world, request(PROMPT, q))
    first = await generate(world, request(PROMPT[:60], d, None, q))
    assert (first.usage.num_cached_transferred, first.usage.num_cached_local) == (0, 0)
    await d.comes_true(lambda: d.worker.puller.is_connected(q.ref))  # of itself, a little later
    second = await generate(world, request(PROMPT, d, None, q))
    assert second.tokens == expected
    assert second.usage.num_cached_transferred == 100 - 60
    for running in (q, d):
        await running.idle()


async def test_a_peer_that_does_not_answer_is_waited_for_no_longer_than_computing_takes(
    world: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    expected = await alone(world, PROMPT)
    q, d = await world.start("q"), await world.start("d", patience_ms=LEAST_PATIENCE_MS)
    await generate(world, request(PROMPT, q))
    q.peer.is_silent = True
    answer = await generate(world, request(PROMPT, d, None, q))
    assert answer.tokens == expected
    assert "cannot pull a prefix from q: DEADLINE q did not answer for 0.25 s" in caplog.text
    for running in (q, d):
        await running.idle()


async def test_a_continued_request_emits_only_what_is_new(world: Fleet) -> None:
    expected = await alone(world, PROMPT)
    p, d = await world.start("p"), await world.start("d")
    for num_emitted in (1, 7, 11):
        message = request(PROMPT, d, p)
        message.output_token_ids.extend(expected[:num_emitted])
        assert (await generate(world, message)).tokens == expected[num_emitted:]


async def test_a_dead_prefill_worker_is_replaced_by_computing_here(world: Fleet) -> None:
    expected = await alone(world, PROMPT)
    p, d = await world.start("p"), await world.start("d")
    message = request(PROMPT, d, p)
    await world.stop(p)
    assert (await generate(world, message)).tokens == expected
    await d.idle()


async def test_a_prefill_worker_that_dies_amid_a_prompt_costs_no_token(world: Fleet) -> None:
    slow = SimModel(page_size=4, prefill_ms_per_token=4.0, decode_ms=1.0)
    expected = await alone(world, PROMPT)
    p, d = await world.start("p", model=slow), await world.start("d")
    answer = asyncio.create_task(generate(world, request(PROMPT, d, p)))
    await p.comes_true(lambda: p.worker.engine.load().num_steps >= 2)
    await world.stop(p)
    assert (await answer).tokens == expected
    await d.idle()


async def test_pages_read_under_a_lease_that_lapsed_are_not_used(world: Fleet) -> None:
    expected = await alone(world, PROMPT)
    p, d = await world.start("p"), await world.start("d")
    p.worker.engine.kv.release = lambda lease_id, read=(): False  # type: ignore[method-assign]
    stale = d.worker.engine.load().num_steps
    assert (await generate(world, request(PROMPT, d, p))).tokens == expected
    assert d.worker.engine.load().num_steps > stale
    await d.idle()


async def test_a_lease_is_renewed_for_as_long_as_its_pages_are_being_read(world: Fleet) -> None:
    """A READ that takes twice the life of the lease."""
    expected = await alone(world, PROMPT)
    p, d = await world.start("p"), await world.start("d")
    p.prefill.tamper = short_lived
    p.transport.answer(True, num_pages=10)
    answer = asyncio.create_task(generate(world, request(PROMPT, d, p)))
    await p.comes_true(lambda: bool(p.counts.leased) and not p.worker.admission.num_active)
    for _ in range(3):
        p.clock.ahead_s += 0.7 * LEASE_TTL_MS / 1000
        await p.comes_true(lambda: (p.kv.next_lease_end_s() or 0.0) > 0.9 * LEASE_TTL_MS / 1000)
    p.transport.answer(True)
    assert (await answer).tokens == expected
    assert not world.measured("forebay_prefill_fallbacks_total", reason="BAD_MANIFEST")
    await p.idle()


def short_lived(response: prefill_pb2.PrefillResponse) -> prefill_pb2.PrefillResponse:
    """Says of a lease that it must be renewed every few milliseconds."""
    for ready in (response.pages_ready, response.finished.last_pages):
        if ready.HasField("lease"):
            ready.lease.ttl_ms = MIN_LEASE_TTL_MS
    return response


async def test_a_reader_that_stopped_answering_holds_pages_no_longer_than_its_lease(world: Fleet) -> None:
    p, d = await world.start("p", lease_ttl_ms=300), await world.start("d")
    p.transport.answer(False)
    answer = asyncio.create_task(generate(world, request(PROMPT, d, p)))
    await p.comes_true(lambda: bool(p.counts.leased))
    await world.stop(d)
    with pytest.raises(Fault):
        await answer
    await p.idle()


async def test_cancelling_frees_every_page_on_both_sides(world: Fleet) -> None:
    p, d = await world.start("p"), await world.start("d")
    for after in (0, 1, 3):
        seen = 0
        message = request(PROMPT[after:], d, p, max_tokens=500)
        async with aclosing(stream(world, message)) as responses:
            async for _ in responses:
                seen += 1
                if seen > after:
                    break
        await p.idle()
        await d.idle()


async def test_a_deadline_frees_every_page_on_both_sides(world: Fleet) -> None:
    slow = SimModel(page_size=4, prefill_ms_per_token=10.0)
    p, d = await world.start("p", model=slow), await world.start("d")
    with rpc.deadline(0.2), pytest.raises(DeadlineExceeded):
        await generate(world, request(PROMPT, d, p))
    await p.idle()
    await d.idle()


async def test_many_requests_share_two_small_pools(world: Fleet) -> None:
    prompts = [[seed, *PROMPT[: 20 + seed]] for seed in range(24)]
    expected = [await alone(world, prompt) for prompt in prompts[::6]]
    p, d = await world.start("p", num_pages=64), await world.start("d", num_pages=64)
    answers = await asyncio.gather(*(generate(world, request(prompt, d, p)) for prompt in prompts))
    assert [answer.tokens for answer in answers[::6]] == expected
    await p.idle()
    await d.idle()


async def test_an_earlier_incarnation_is_not_talked_to(world: Fleet) -> None:
    d = await world.start("d", epoch=7)
    message = request(PROMPT, d)
    message.placement.decode.epoch = 6
    with pytest.raises(StaleEpoch):
        await generate(world, message)


async def test_a_restarted_prefill_worker_is_connected_anew(world: Fleet) -> None:
    expected = await alone(world, PROMPT)
    d, p = await world.start("d"), await world.start("p", epoch=1)
    await generate(world, request(PROMPT[:50], d, p))
    await world.stop(p)
    again = await world.start("p", epoch=2)
    assert (await generate(world, request(PROMPT, d, again))).tokens == expected
    assert again.worker.engine.load().num_steps > 0
    await again.idle()
    await d.idle()


async def test_a_draining_worker_takes_nothing_new(world: Fleet) -> None:
    d = await world.start("d")
    d.worker.admission.draining = True
    with pytest.raises(Draining):
        await generate(world, request(PROMPT, d))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"prompt_token_ids": []}, InvalidRequest),
        ({"prompt_token_ids": [40_000]}, InvalidRequest),
        ({"model": "other"}, ModelNotFound),
    ],
)
async def test_what_cannot_be_run_is_refused_and_leaves_nothing(
    changes: dict[str, Any], fault: type[Fault], world: Fleet
) -> None:
    p, d = await world.start("p"), await world.start("d")
    for prefill in (None, p):
        message = request(PROMPT, d, prefill)
        for name, value in changes.items():
            message.ClearField(name)  # type: ignore[arg-type]
            if value:
                message.MergeFrom(type(message)(**{name: value}))
        with pytest.raises(fault):
            await generate(world, message)
        await p.idle()
        await d.idle()


async def test_workers_that_lay_pages_out_differently_are_not_connected(world: Fleet) -> None:
    p = await world.start("p", model=SimModel(page_size=8))
    d = await world.start("d")
    stub: Any = kv_pb2_grpc.KvServiceStub(world.channels.to(p.ref.address))
    ours = d.worker.engine.spec.compatibility_hash
    with pytest.raises(Incompatible):
        await rpc.call(stub.Connect, kv_pb2.ConnectRequest(compatibility_hash=ours, epoch=1))


async def test_only_a_lease_that_held_all_along_is_released_as_valid(world: Fleet) -> None:
    p = await world.start("p")
    await generate(world, request(PROMPT, p))
    stub: Any = kv_pb2_grpc.KvServiceStub(world.channels.to(p.ref.address))
    hashes = page_hash.join(page_hash.chain(b"tenant", PROMPT, 4))
    got = await rpc.call(stub.Acquire, kv_pb2.AcquireRequest(epoch=1, page_hashes=hashes))
    manifests.check(got.manifest, p.worker.engine.spec.layout, 0)
    statuses = []
    for epoch in (2, 1, 1):
        release = kv_pb2.ReleaseRequest(lease_id=got.lease.lease_id, epoch=epoch)
        statuses.append((await rpc.call(stub.Release, release)).status)
    assert statuses == [kv_pb2.RELEASE_STATUS_STALE, kv_pb2.RELEASE_STATUS_VALID, kv_pb2.RELEASE_STATUS_STALE]
    with pytest.raises(StaleEpoch):
        await rpc.call(stub.Renew, kv_pb2.RenewRequest(lease_id=got.lease.lease_id, epoch=1))


async def test_broken_page_hashes_are_refused(world: Fleet) -> None:
    p = await world.start("p")
    stub: Any = kv_pb2_grpc.KvServiceStub(world.channels.to(p.ref.address))
    with pytest.raises(InvalidRequest):
        await rpc.call(stub.Acquire, kv_pb2.AcquireRequest(epoch=1, page_hashes=b"seventeen bytes!!"))
