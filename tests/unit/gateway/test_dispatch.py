"""Finding workers: routers come and go, workers fail before and after the first token."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from protos.forebay.v1 import decode_pb2, kv_pb2
from services.gateway.core import Core
from services.gateway.losses import Losses
from services.gateway.output import Delta
from services.gateway.request import Caller, Job
from shared import page_hash, rpc
from shared.blackboard.records import Role
from shared.errors import (
    BlackboardLost,
    Cancelled,
    DeadlineExceeded,
    Draining,
    Fault,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    Overloaded,
    StaleEpoch,
    WorkerLost,
)
from tests.unit.gateway.world import MODEL, FakeRouter, Response, World, finished, tokens

CALLER = Caller("r", "", 30.0)


async def complete(core: Core) -> str:
    job = await core.complete({"model": MODEL, "prompt": "hello", "max_tokens": 50}, CALLER)
    return "".join([delta.text async for delta in core.run(job)])


async def collect(core: Core, job: Job) -> list[Delta]:
    return [delta async for delta in core.run(job)]


def failing(fault: Fault, *before: Response) -> object:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        for response in before:
            yield response
        raise fault

    return script


@pytest.mark.parametrize("fault", [WorkerLost("gone"), Draining("soon gone"), Overloaded("full"), Cancelled("closing")])
async def test_a_worker_that_fails_before_the_first_token_is_replaced(world: World, fault: Fault) -> None:
    await world.start_decode("decode-1")
    world.decode.script = failing(fault)  # type: ignore[assignment]
    assert await complete(world.core) == "hello world"
    assert list(world.router.requests[1].excluded_worker_ids) == ["decode-0"]


async def test_a_request_whose_client_has_output_goes_before_all_others(world: World) -> None:
    await world.start_decode("decode-1")
    world.decode.script = failing(WorkerLost("gone"), tokens(40))  # type: ignore[assignment]
    await complete(world.core)
    assert [request.resumed for request in world.router.requests] == [False, True]


async def test_a_router_is_told_of_workers_that_were_lost_and_of_no_others(world: World) -> None:
    for name in ("decode-1", "decode-2"):
        await world.start_decode(name)
    world.decode.script = failing(WorkerLost("gone"), tokens(40))  # type: ignore[assignment]
    world.decodes["decode-1"].script = failing(Draining("soon gone"), tokens(41))  # type: ignore[assignment]
    for _ in range(2):
        await complete(world.core)
    lost = [[(ref.worker_id, ref.epoch) for ref in request.lost] for request in world.router.requests]
    assert lost[:4] == [[], *[[("decode-0", 1)]] * 3]  # the last of them is another request's


async def test_a_loss_is_told_for_as_long_as_the_worker_may_be_registered() -> None:
    now = 0.0
    losses = Losses(lambda: now)
    worker = kv_pb2.WorkerRef(worker_id="decode-0", epoch=1, address="a")
    losses.note(worker)
    worker.Clear()
    now = 1.9
    assert [ref.worker_id for ref in losses.recent()] == ["decode-0"]
    now = 2.1
    assert not losses.recent()


async def test_a_line_has_the_time_of_what_it_tells_though_it_is_written_later(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    came: list[float] = []

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        came.append(time.time())
        yield tokens(40)
        yield finished()

    world.decode.script = script
    caplog.set_level("INFO", "services.gateway.dispatch")
    await complete(world.core)
    async with asyncio.timeout(10):
        while not (lines := [r for r in caplog.records if r.message == "placed"]):  # noqa: ASYNC110 - a log has no event
            await asyncio.sleep(0.001)
    assert lines[0].created <= came[0]


async def test_a_worker_that_is_gone_is_replaced(world: World) -> None:
    await world.start_decode("decode-1")
    await world.stop("decode-0")
    assert await complete(world.core) == "hello world"


async def test_a_worker_that_restarted_is_asked_again(world: World) -> None:
    faults = iter([StaleEpoch("I am new")])

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        for fault in faults:
            raise fault
        yield tokens(*await world.tokenizer.encode("hello", special=False))
        yield finished()

    world.decode.script = script
    assert await complete(world.core) == "hello"
    assert not world.router.requests[1].excluded_worker_ids


async def test_the_fault_of_the_last_worker_is_told_when_none_is_left(world: World) -> None:
    world.decode.script = failing(Overloaded("full"))  # type: ignore[assignment]
    with pytest.raises(Overloaded, match="full"):
        await complete(world.core)


async def test_a_fault_of_the_request_is_not_tried_elsewhere(world: World) -> None:
    await world.start_decode("decode-1")
    world.decode.script = failing(InvalidRequest("nonsense"))  # type: ignore[assignment]
    with pytest.raises(InvalidRequest):
        await complete(world.core)
    assert len(world.router.requests) == 1


async def test_a_stream_that_just_ends_is_a_lost_worker(world: World) -> None:
    world.steps = [tokens(40)]
    world.dispatcher._recovery_wait_s = 0.0
    with pytest.raises(WorkerLost, match="after 1 tokens: the stream ended"):
        await complete(world.core)


async def test_a_worker_that_is_lost_amid_an_output_is_replaced_without_a_seam(world: World) -> None:
    ids = await world.says("hello \U0001f600 the world!")

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        for token_id in ids[len(request.output_token_ids) :][:4]:
            yield tokens(token_id)
        if len(request.output_token_ids) + 4 < len(ids):
            raise WorkerLost("gone")
        yield finished()

    for name in ("decode-1", "decode-2"):
        await world.start_decode(name)
    for decode in world.decodes.values():
        decode.script = script
    assert await complete(world.core) == "hello \U0001f600 the world!"
    sent = [list(d.requests[0].output_token_ids) for d in world.decodes.values() if d.requests]
    assert sent == [ids[:end] for end in range(0, len(ids), 4)]
    assert [request.num_prompt_tokens for request in world.router.requests] == [1 + len(part) for part in sent]
    assert len({d.requests[0].sampling.seed for d in world.decodes.values() if d.requests}) == 1


async def test_what_was_cached_is_what_the_first_worker_said(world: World) -> None:
    """The second one finds what the first one computed; to the client that was never cached."""
    ids = await world.says("hello world")

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        is_first = not request.output_token_ids
        first, rest = tokens(ids[0]), tokens(*ids[1:])
        first.tokens.usage.num_cached_local = 3
        rest.tokens.usage.num_cached_remote = 5
        yield first if is_first else rest
        if is_first:
            raise WorkerLost("gone")
        last = finished()
        last.finished.usage.num_cached_remote = 5
        yield last

    await world.start_decode("decode-1")
    for decode in world.decodes.values():
        decode.script = script
    job = await world.core.complete({"model": MODEL, "prompt": "hello", "max_tokens": 50}, CALLER)
    usages = [delta.usage async for delta in world.core.run(job) if delta.usage]
    assert {(usage.num_cached_local, usage.num_cached_remote) for usage in usages} == {(3, 0)}


async def test_what_was_reserved_for_a_client_that_left_before_its_worker_answered_is_given_back(world: World) -> None:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        await asyncio.sleep(30)
        yield finished()

    world.decode.script = script
    asked = asyncio.create_task(complete(world.core))
    await asyncio.wait_for(world.decode.busy.wait(), 5)
    asked.cancel()
    await asyncio.wait([asked])
    await world.dispatcher.settled()
    (withdrawn,) = world.router.withdrawn
    (routed,) = world.router.requests
    assert (withdrawn.request_id, withdrawn.model) == (routed.request_id, routed.model)
    assert withdrawn.placement.decode == world.router.workers[0]


async def test_what_was_reserved_at_a_worker_that_refused_is_given_back_with_the_next_question(world: World) -> None:
    await world.start_decode("decode-1")
    world.decode.script = failing(Draining("not here"))  # type: ignore[assignment]
    await complete(world.core)
    await world.dispatcher.settled()
    first, second = world.router.requests
    assert not first.HasField("withdrawn")
    assert second.withdrawn.decode == world.router.workers[0]
    assert not world.router.withdrawn


async def test_what_was_reserved_for_a_request_that_failed_is_given_back(world: World) -> None:
    world.decode.script = failing(InvalidRequest("nonsense"))  # type: ignore[assignment]
    with pytest.raises(InvalidRequest):
        await complete(world.core)
    await world.dispatcher.settled()
    assert [each.placement.decode for each in world.router.withdrawn] == world.router.workers


async def test_a_request_that_had_a_token_has_nothing_to_give_back(world: World) -> None:
    await world.start_decode("decode-1")
    world.decode.script = failing(WorkerLost("gone"), tokens(40))  # type: ignore[assignment]
    await complete(world.core)
    await world.dispatcher.settled()
    assert not any(request.HasField("withdrawn") for request in world.router.requests)
    assert not world.router.withdrawn


async def test_the_router_is_told_of_the_pages_that_an_output_has_filled(world: World) -> None:
    prompt, output = [7] * 10, [9] * 30

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        if not request.output_token_ids:
            yield tokens(*output)
            raise Draining("goodbye")
        yield finished()

    await world.start_decode("decode-1")
    for decode in world.decodes.values():
        decode.script = script
    job = await world.core.complete({"prompt": prompt, "max_tokens": 50}, CALLER)
    assert [delta async for delta in world.core.run(job)]
    key, page_size = job.choices[0].generate.hash_key, job.model.card.page_size
    whole = page_hash.join(page_hash.chain(key, prompt + output, page_size))
    assert [request.page_hashes for request in world.router.requests] == [whole[: 10 // page_size * 16], whole]


async def test_a_recovery_is_counted_by_the_fault_that_it_is_from(world: World) -> None:
    await world.start_decode("decode-1")
    ids = await world.says("hello world")
    world.decode.script = failing(Draining("soon gone"), tokens(ids[0]))  # type: ignore[assignment]
    await complete(world.core)
    metrics = (await world.http.get("/metrics")).text
    assert 'forebay_gateway_recovery_seconds_count{fault="DRAINING"} 1.0' in metrics


async def test_the_only_worker_is_waited_for_until_it_is_back(world: World) -> None:
    ids = await world.says("hello world")
    faults = iter([WorkerLost("gone"), WorkerLost("still gone"), WorkerLost("and still"), WorkerLost("nearly back")])

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        if not request.output_token_ids:
            yield tokens(ids[0])
        for fault in faults:
            raise fault
        yield tokens(*ids[1:])
        yield finished()

    world.decode.script = script
    assert await complete(world.core) == "hello world"


async def test_a_worker_that_is_lost_after_the_last_token_is_not_replaced(world: World) -> None:
    world.steps = [tokens(40, 41)]
    job = await world.core.complete({"prompt": "hello", "max_tokens": 2}, CALLER)
    *_, last = [delta async for delta in world.core.run(job)]
    assert (last.finish_reason, last.num_output_tokens) == ("length", 2)
    assert len(world.router.requests) == 1


async def test_another_router_is_asked_when_one_is_gone(world: World) -> None:
    await world.start_router("router-1")
    await world.directory.update(world.registrations)
    await world.servers["router-0"].stop(0)
    for _ in range(3):
        assert await complete(world.core) == "hello world"


async def test_a_router_that_stops_answering_holds_up_nobody_who_comes_later(world: World) -> None:
    stopped = FakeRouter()
    stopped.workers = world.router.workers
    stopped.answers.clear()
    await world.start_router("router-1", stopped)
    await world.directory.update(world.registrations)
    first = [asyncio.create_task(complete(world.core)) for _ in range(2)]
    await asyncio.wait_for(stopped.asked.wait(), 10)
    await asyncio.wait(first, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    for _ in range(6):
        assert await asyncio.wait_for(complete(world.core), 10) == "hello world"
    stopped.answers.set()
    assert await asyncio.gather(*first) == ["hello world"] * 2


async def test_streams_of_a_lost_worker_are_placed_together_by_one_router(world: World) -> None:
    other, lost = FakeRouter(), asyncio.Event()
    other.workers = world.router.workers
    await world.start_router("router-1", other)
    await world.start_decode("decode-1")
    await world.directory.update(world.registrations)

    async def until_lost(_: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(40)
        await lost.wait()
        raise WorkerLost("gone")

    world.decode.script = until_lost
    streams = [asyncio.create_task(complete(world.core)) for _ in range(6)]
    async with asyncio.timeout(10):
        while world.decode.num_running < len(streams):  # noqa: ASYNC110 - each of them says it, together they do not
            await asyncio.sleep(0.01)
    asked = [len(router.requests) for router in (world.router, other)]
    lost.set()
    await asyncio.gather(*streams)
    more = [len(router.requests) - before for router, before in zip((world.router, other), asked, strict=True)]
    assert asked == [3, 3]
    assert sorted(more) == [0, 6]


async def test_a_request_waits_for_a_router_to_come_back(world: World) -> None:
    await world.stop("router-0")
    await world.directory.update(world.registrations)
    waiting = asyncio.create_task(complete(world.core))
    await asyncio.sleep(0)
    await world.start_router("router-1")
    await world.directory.update(world.registrations)
    assert await waiting == "hello world"


async def test_without_a_router_the_wait_ends_with_a_reason(world: World) -> None:
    await world.stop("router-0")
    await world.directory.update(world.registrations)
    world.dispatcher._recovery_wait_s = 0.0
    with pytest.raises(NoWorker, match="no router answers: none is registered"):
        await complete(world.core)


async def test_the_wait_for_a_router_ends_with_the_deadline(world: World) -> None:
    await world.stop("router-0")
    await world.directory.update(world.registrations)
    with rpc.deadline(0.05), pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(complete(world.core), 4)


async def test_a_router_that_closes_while_it_answers_is_asked_no_more(world: World) -> None:
    closing = FakeRouter()
    closing.fault = Cancelled("closing")
    await world.start_router("router-1", closing)
    await world.directory.update(world.registrations)
    for _ in range(3):
        assert await complete(world.core) == "hello world"


async def test_a_known_model_whose_workers_are_away_is_not_an_unknown_one(world: World) -> None:
    assert world.directory.model("").name == MODEL
    await world.directory.update([r for r in world.registrations if r.role is Role.ROUTER])
    assert world.directory.model(MODEL).name == world.directory.model("").name == MODEL
    with pytest.raises(NoWorker):
        world.directory.model("other")
    await world.directory.update(world.registrations)
    with pytest.raises(ModelNotFound):
        world.directory.model("other")


@pytest.mark.parametrize("fault", [NoWorker("away"), ModelNotFound("never heard of it"), BlackboardLost("no Redis")])
async def test_a_request_waits_for_workers_that_are_away(world: World, fault: Fault) -> None:
    world.router.fault = fault
    waiting = asyncio.create_task(complete(world.core))
    await world.router.asked.wait()
    world.router.fault = None
    assert await waiting == "hello world"


async def test_the_wait_for_workers_ends_with_a_reason(world: World) -> None:
    world.router.fault = ModelNotFound("never heard of it")
    world.dispatcher._recovery_wait_s = 0.0
    with pytest.raises(NoWorker, match="never heard of it"):
        await complete(world.core)


async def test_leaving_the_outputs_early_cancels_all_of_them(world: World) -> None:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(40)
        await asyncio.sleep(30)

    world.decode.script = script
    job = await world.core.complete({"prompt": "hello", "n": 3}, CALLER)
    outputs = world.core.run(job)
    for _ in range(3):
        await anext(outputs)
    assert world.decode.num_running == 3
    await outputs.aclose()
    await asyncio.wait_for(world.decode.idle.wait(), 5)


async def test_a_fault_of_one_output_cancels_the_others(world: World) -> None:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        if request.request_id.endswith("-1"):
            raise InvalidRequest("not this one")
        yield tokens(40)
        await asyncio.sleep(30)

    world.decode.script = script
    job = await world.core.complete({"prompt": "hello", "n": 3}, CALLER)
    with pytest.raises(InvalidRequest):
        async for _ in world.core.run(job):
            pass
    await asyncio.wait_for(world.decode.idle.wait(), 5)


async def test_outputs_of_one_prompt_start_when_the_first_has_its_prompt_computed(world: World) -> None:
    begin = asyncio.Event()

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        if request.request_id.endswith("-0"):
            await begin.wait()
        yield tokens(40)
        yield finished()

    world.decode.script = script
    job = await world.core.complete({"prompt": list(range(40, 49)), "n": 3}, CALLER)
    running = asyncio.create_task(collect(world.core, job))
    await asyncio.wait_for(world.decode.busy.wait(), 5)
    assert len(world.router.requests) == 1  # the others are not even routed, so that the router sees the pages
    begin.set()
    deltas = await asyncio.wait_for(running, 5)
    assert sorted(delta.index for delta in deltas if delta.finish_reason) == [0, 1, 2]
    assert len(world.router.requests) == 3


async def test_a_first_output_that_fails_leaves_nobody_waiting(world: World) -> None:
    world.decode.script = failing(InvalidRequest("not this one"))  # type: ignore[assignment]
    job = await world.core.complete({"prompt": list(range(40, 49)), "n": 3}, CALLER)
    with pytest.raises(InvalidRequest):
        await asyncio.wait_for(collect(world.core, job), 5)


async def test_outputs_of_a_prompt_without_a_whole_page_start_together(world: World) -> None:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        if world.decode.num_running == 3:
            everybody.set()
        await everybody.wait()
        yield tokens(40)
        yield finished()

    everybody = asyncio.Event()
    world.decode.script = script
    job = await world.core.complete({"prompt": [40], "n": 3}, CALLER)
    assert len(await asyncio.wait_for(collect(world.core, job), 5)) == 6
