"""The router on a real Redis and behind real gRPC: its view of the fleet, Route and Explain."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.forebay.v1 import kv_pb2, router_pb2
from services.router.__main__ import SERVICE
from shared import rpc
from shared.blackboard.records import Room
from shared.errors import (
    BlackboardLost,
    ContextTooLong,
    DeadlineExceeded,
    Fault,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
)
from tests.unit.fleets import registration
from tests.unit.router_rig import HASHES, TTL_MS, Router, request
from tests.valkey import ValkeyProcess

NO_CONTEXT = cast("Any", None)


@pytest.fixture
async def router(valkey_url: str) -> AsyncIterator[Router]:
    router = Router(valkey_url)
    await router.start()
    yield router
    await router.stop()


# The view -------------------------------------------------------------------------------------------------------------


async def test_a_new_worker_is_seen_long_before_the_next_refresh(valkey_url: str) -> None:
    router = Router(valkey_url, heartbeat_ms=3_600_000)
    await router.start()
    await router.until(lambda seen: seen == [])
    await router.join("d1")
    await router.until(lambda seen: seen == [("d1", 1)])
    await router.stop()


async def test_a_worker_that_stops_registering_leaves(router: Router) -> None:
    await router.fleet_of("d1", "d2")
    await router.board.register(registration("d1"), ttl_ms=30)
    await router.until(lambda seen: seen == [("d2", 1)])


async def test_a_restarted_worker_is_seen_as_its_new_epoch_without_its_old_pages(router: Router) -> None:
    await router.fleet_of("d1")
    await router.cache("d1", HASHES)
    assert (await router.route()).num_cached_tokens == 992
    await router.join("d1", epoch=2)
    await router.until(lambda seen: seen == [("d1", 2)])
    placed = await router.route()
    assert (placed.placement.decode.epoch, placed.num_cached_tokens) == (2, 0)


async def test_a_draining_worker_gets_nothing_more(router: Router) -> None:
    await router.fleet_of("d1", "d2")
    await router.join("d1", draining=True)
    await router.until(lambda _: any(member.registration.draining for member in router.fleet.members("m")))
    for number in range(10):
        assert (await router.route(page_hashes=bytes([number]) * 16)).placement.decode.worker_id == "d2"


async def test_a_worker_that_one_gateway_lost_gets_nothing_more_from_anybody(router: Router) -> None:
    await router.fleet_of("d1", "d2")
    lost = [kv_pb2.WorkerRef(worker_id="d1", epoch=1)]
    for number in range(10):
        placed = await router.route(page_hashes=bytes([number]) * 16, lost=[] if number else lost)
        assert placed.placement.decode.worker_id == "d2"


async def test_the_view_is_kept_while_redis_is_away_and_rebuilt_when_it_is_back(valkey: ValkeyProcess) -> None:
    now_s = [0.0]
    router = Router(valkey.url, clock=lambda: now_s[0])
    await router.start()
    await router.fleet_of("d1", "d2")
    valkey.stop()
    async with asyncio.timeout(10):
        while router.fleet.is_current:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (await router.route()).placement.decode.worker_id
    valkey.start()
    await router.until(lambda seen: len(seen) == 2)
    await router.join("d2")
    now_s[0] += TTL_MS / 1000
    await router.until(lambda seen: seen == [("d2", 1)])
    await router.stop()


async def test_before_the_fleet_was_ever_seen_the_fault_names_redis(valkey: ValkeyProcess) -> None:
    valkey.stop()
    router = Router(valkey.url)
    await router.start()
    with pytest.raises(BlackboardLost):
        await router.route()
    valkey.start()
    await router.fleet_of("d1")
    assert (await router.route()).placement.decode.worker_id == "d1"
    await router.stop()


# Route ----------------------------------------------------------------------------------------------------------------


async def test_a_placement_names_address_and_epoch(router: Router) -> None:
    await router.fleet_of("p1", "d1", epoch=7)
    placement = (await router.route()).placement
    assert (placement.decode.worker_id, placement.decode.epoch) == ("d1", 7)
    assert placement.decode.address == registration("d1").address
    assert (placement.prefill.worker_id, placement.prefill.epoch) == ("p1", 7)
    assert not placement.HasField("kv_source")


async def test_the_prefix_index_decides_among_idle_workers(router: Router) -> None:
    await router.fleet_of("p1", "p2", "d1")
    for name in ("p1", "p2"):
        await router.cache(name, HASHES[: 40 if name == "p2" else 2])
    placed = await router.route()
    assert (placed.placement.prefill.worker_id, placed.num_cached_tokens) == ("p2", 640)


async def test_a_prefix_of_a_peer_is_named_as_source(router: Router) -> None:
    await router.fleet_of("p1", "d1")
    await router.cache("d1", HASHES[:30])
    placement = (await router.route()).placement
    assert (placement.prefill.worker_id, placement.kv_source.worker_id) == ("p1", "d1")


async def test_a_burst_of_equal_prompts_does_not_herd(valkey_url: str) -> None:
    router = Router(valkey_url, clock=lambda: 0.0)
    await router.start()
    await router.fleet_of("p1", "p2", "d1", "d2")
    answers = await asyncio.gather(*(router.route() for _ in range(20)))
    computing = [answer.placement.prefill.worker_id or answer.placement.decode.worker_id for answer in answers]
    decoding = [answer.placement.decode.worker_id for answer in answers]
    assert max(map(computing.count, ("p1", "p2"))) - min(map(computing.count, ("p1", "p2"))) <= 1
    assert sorted(map(decoding.count, set(decoding))) == [10, 10]
    await router.stop()


async def test_while_all_prefill_workers_are_full_a_decode_worker_with_room_prefills(router: Router) -> None:
    await router.fleet_of("p1", "d1")
    await router.board.admission.report(
        "m", "p1", 1, limits=Room(sequences=1), used=Room(sequences=1), arrived=[], ttl_ms=TTL_MS
    )
    placement = (await router.route()).placement
    assert (placement.decode.worker_id, placement.HasField("prefill")) == ("d1", False)


@pytest.mark.parametrize("leaves", [True, False], ids=["its client leaves", "its deadline passes"])
async def test_a_request_that_ends_while_it_waits_leaves_the_queue_at_once(router: Router, leaves: bool) -> None:
    await router.fleet_of("d1")
    full = Room(sequences=1)
    await router.board.admission.report("m", "d1", 1, limits=full, used=full, arrived=[], ttl_ms=TTL_MS)
    waiting = asyncio.create_task(rpc.call(router.stub.Route, request(), 60 if leaves else 1))
    await router.until_queued(1)
    if leaves:
        waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled() or isinstance(waiting.exception(), DeadlineExceeded)
    await router.until_queued(0)


async def test_what_was_reserved_for_a_request_that_will_not_come_is_free_at_once(router: Router) -> None:
    await router.fleet_of("p1", "d1")
    placement = (await router.route()).placement
    assert [await router.num_promised(name) for name in ("p1", "d1")] == [1, 1]
    asked = router_pb2.WithdrawRequest(request_id="r", model="m", placement=placement)
    for _ in range(2):  # asked again it finds nothing, and harms nothing
        await rpc.call(router.stub.Withdraw, asked, 10)
        assert [await router.num_promised(name) for name in ("p1", "d1")] == [0, 0]


async def test_a_request_that_its_worker_refused_has_room_at_the_next_one_alone(router: Router) -> None:
    await router.fleet_of("p1", "d1", "d2")
    first = (await router.route()).placement
    refused = first.decode.worker_id
    second = (await router.route(withdrawn=first, excluded_worker_ids=[refused])).placement
    assert {refused, second.decode.worker_id} == {"d1", "d2"}
    assert [await router.num_promised(name) for name in (refused, second.decode.worker_id)] == [0, 1]
    assert await router.num_promised("p1") == int(second.HasField("prefill"))


async def test_two_routers_agree(router: Router, valkey_url: str) -> None:
    other = Router(valkey_url)
    await other.start()
    await router.fleet_of("p1", "p2", "p3", "d1", "d2", "d3")
    await other.until(lambda seen: len(seen) == 6)
    for number in range(10):
        asked = {"page_hashes": os.urandom(16), "request_id": str(number)}
        mine, theirs = await router.explain(**asked), await other.explain(**asked)
        assert mine.candidates[0].placement == theirs.candidates[0].placement
    await other.stop()


@pytest.mark.parametrize(
    ("changes", "fault", "param"),
    [
        ({"page_hashes": b"x" * 17}, InvalidRequest, "page_hashes"),
        ({"page_hashes": b"x" * 32, "num_prompt_tokens": 1}, InvalidRequest, "page_hashes"),
        ({"num_prompt_tokens": 0}, InvalidRequest, "num_prompt_tokens"),
        ({"model": ""}, InvalidRequest, "model"),
        ({"model": "nobody's"}, ModelNotFound, "model"),
        ({"num_prompt_tokens": 9_000}, ContextTooLong, None),
        ({"excluded_worker_ids": ["d1"]}, NoWorker, None),
    ],
    ids=["broken hash", "too many hashes", "no tokens", "no model", "unknown model", "too long", "all excluded"],
)
async def test_a_request_that_cannot_be_placed_is_told_why(
    router: Router, changes: dict[str, Any], fault: type[Fault], param: str | None
) -> None:
    await router.fleet_of("d1")
    with pytest.raises(fault) as caught:
        await router.route(**changes)
    assert caught.value.param == param


async def test_a_model_whose_workers_are_gone_is_unavailable_and_not_unknown(router: Router) -> None:
    await router.fleet_of("d1")
    await router.board.deregister(registration("d1"))
    await router.until(lambda seen: seen == [])
    with pytest.raises(NoWorker):
        await router.route()


async def test_a_passed_deadline_is_a_fault(router: Router) -> None:
    await router.fleet_of("d1")
    with rpc.deadline(-1.0), pytest.raises(DeadlineExceeded):
        await router.servicer.Route(request(), NO_CONTEXT)


# Explain --------------------------------------------------------------------------------------------------------------


async def test_explaining_reserves_nothing_and_says_what_route_then_answers(router: Router) -> None:
    await router.fleet_of("p1", "p2", "d1", "d2")
    first, second = await router.explain(), await router.explain()
    assert first == second
    assert (await router.route()).placement == first.candidates[0].placement


async def test_costs_are_the_sums_of_their_terms_and_the_summary_names_the_choice(router: Router) -> None:
    await router.fleet_of("p1", "d1", "d2")
    answer = await router.explain()
    for candidate in answer.candidates:
        assert candidate.cost_ms == pytest.approx(sum(term.cost_ms for term in candidate.terms))
    assert answer.candidates[0].placement.decode.worker_id in answer.summary
    assert "prefill on p1" in answer.summary


async def test_explaining_a_refusal_gives_the_reasons_instead_of_a_fault(router: Router) -> None:
    await router.fleet_of("d1", draining=True)
    answer = await router.explain()
    assert [candidate.rejection for candidate in answer.candidates] == ["draining"]
    assert "d1: draining" in answer.summary


async def test_reflection_shows_the_router(router: Router) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(router.channel)

    async def requests() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)

    async for answer in stub.ServerReflectionInfo(requests()):
        assert answer.file_descriptor_response.file_descriptor_proto
