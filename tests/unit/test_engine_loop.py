import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import pytest

from shared.engine.api import (
    BatchItem,
    Chosen,
    EngineRequest,
    Event,
    Failed,
    PagesComputed,
    SamplingParams,
    TokensSampled,
)
from shared.engine.engine import Engine
from shared.engine.kv.store import KvStore
from shared.engine.loop import EngineLoop
from shared.engine.sim import SimExecutor, SimModel
from shared.errors import ContextTooLong, Draining, Fault, Internal, InvalidRequest, WorkerLost

NUM_PAGES = 16
PATIENCE_S = 20.0


class Gate(SimExecutor):
    """Computes a step only when it is let; a fault set here is raised instead."""

    def __init__(self) -> None:
        super().__init__(SimModel(), NUM_PAGES, sleep=lambda seconds: None)
        self.open = threading.Event()
        self.open.set()
        self.error: BaseException | None = None

    def forward(self, batch: Sequence[BatchItem]) -> list[Chosen | None]:
        assert self.open.wait(2 * PATIENCE_S)
        if self.error is not None:
            raise self.error
        return super().forward(batch)


class Rig:
    def __init__(self, lease_ttl_ms: int = 10_000, patience_s: float | None = None) -> None:
        self.executor = Gate()
        self.kv = KvStore(NUM_PAGES, 16, lease_ttl_ms)
        self.engine = Engine(self.executor, self.kv, max_step_tokens=64, max_num_sequences=8)
        self.deaths: list[Fault] = []
        self.loop = EngineLoop(self.engine, self.deaths.append, patience_s)

    async def until(self, true: Callable[[], bool]) -> None:
        """Let the engine's thread get to a state in which it stays."""
        async with asyncio.timeout(PATIENCE_S):
            while not true():  # noqa: ASYNC110 - nothing tells of a state seen from outside
                await asyncio.sleep(0.001)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    rig.loop.start()
    yield rig
    rig.executor.open.set()
    await rig.loop.stop()
    assert rig.kv.check() == []


def request(name: str = "r", num_tokens: int = 20, max_tokens: int = 4, prefill_only: bool = False) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(name, tuple(range(3, 3 + num_tokens)), params, prefill_only=prefill_only)


async def collect(rig: Rig, request: EngineRequest) -> list[Event]:
    return [event async for event in rig.loop.generate(request)]


# Streams --------------------------------------------------------------------------------------------------------------


async def test_a_stream_ends_after_its_last_token(rig: Rig) -> None:
    events = await collect(rig, request())
    assert len(events) == 4
    assert all(isinstance(event, TokensSampled) for event in events)


async def test_streams_run_together_and_each_gets_its_own_events(rig: Rig) -> None:
    requests = [request(num_tokens=length) for length in (5, 20, 33)]
    together = await asyncio.gather(*(collect(rig, each) for each in requests))
    for each, events in zip(requests, together, strict=True):
        again = await collect(rig, each)
        assert [event.tokens for event in again if isinstance(event, TokensSampled)] == [
            event.tokens for event in events if isinstance(event, TokensSampled)
        ]


async def test_leaving_a_stream_early_frees_its_pages(rig: Rig) -> None:
    async with aclosing(rig.loop.generate(request(max_tokens=200))) as stream:
        async for _ in stream:
            break
    await rig.until(lambda: rig.kv.counts().held == 0)


async def test_a_cancelled_task_frees_the_pages_of_its_stream(rig: Rig) -> None:
    rig.executor.open.clear()
    task = asyncio.create_task(collect(rig, request()))
    await rig.until(lambda: rig.kv.counts().held > 0)
    task.cancel()
    rig.executor.open.set()
    await rig.until(lambda: rig.kv.counts().held == 0)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_request_may_come_again_while_its_first_try_is_still_in_a_step(rig: Rig) -> None:
    rig.executor.open.clear()
    first = asyncio.create_task(collect(rig, request()))
    await rig.until(lambda: rig.kv.counts().held > 0)
    first.cancel()
    second = asyncio.create_task(collect(rig, request()))
    await asyncio.sleep(0)
    rig.executor.open.set()
    assert len(await second) == 4


async def test_pages_of_a_prefill_can_be_leased_as_long_as_the_stream_is_not_left(rig: Rig) -> None:
    lease_id = rig.kv.grant()
    async for event in rig.loop.generate(request(num_tokens=100, prefill_only=True)):
        if isinstance(event, PagesComputed):
            await rig.until(lambda: not rig.engine.has_work())
            assert rig.kv.widen(lease_id, event.page_ids)
    await rig.until(lambda: rig.kv.counts().held == 0)
    assert rig.kv.counts().leased == 7


async def test_a_bad_request_is_refused_at_once(rig: Rig) -> None:
    with pytest.raises(InvalidRequest):
        await collect(rig, request(num_tokens=0))


async def test_a_broken_step_is_a_fault_of_its_streams_and_the_engine_goes_on(rig: Rig) -> None:
    rig.executor.error = RuntimeError("out of luck")
    with pytest.raises(Internal, match="out of luck"):
        await collect(rig, request())
    rig.executor.error = None
    assert len(await collect(rig, request())) == 4
    assert rig.deaths == []


# Room -----------------------------------------------------------------------------------------------------------------


async def test_room_is_given_at_once_where_there_is_some(rig: Rig) -> None:
    pages = await rig.loop.reserve([], 3)
    assert len(pages.page_ids) == 3


async def test_room_is_given_first_come_first_served(rig: Rig) -> None:
    pages = await rig.loop.reserve([], NUM_PAGES)
    order: list[str] = []

    async def wait(name: str, num_pages: int) -> None:
        await rig.loop.reserve([], num_pages)
        order.append(name)

    tasks = [asyncio.create_task(wait(name, num)) for name, num in (("large", 10), ("small", 1))]
    await asyncio.sleep(0)
    rig.kv.shrink(pages, 8 * 16)
    await asyncio.sleep(0.01)
    assert order == []
    rig.kv.drop(pages)
    await asyncio.gather(*tasks)
    assert order == ["large", "small"]


async def test_one_who_gives_up_lets_the_next_one_in(rig: Rig) -> None:
    await rig.loop.reserve([], 10)
    large = asyncio.create_task(rig.loop.reserve([], 10))
    small = asyncio.create_task(rig.loop.reserve([], 1))
    await asyncio.sleep(0)
    large.cancel()
    assert len((await small).page_ids) == 1
    assert rig.kv.counts().held == 11


async def test_room_that_was_given_to_one_who_gave_up_meanwhile_is_not_lost(rig: Rig) -> None:
    pages = await rig.loop.reserve([], NUM_PAGES)
    task = asyncio.create_task(rig.loop.reserve([], 1))
    await asyncio.sleep(0)
    rig.kv.drop(pages)
    await asyncio.sleep(0)  # the room is given, but the task has not run since
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.kv.counts().free == NUM_PAGES


async def test_room_that_comes_just_after_somebody_gave_up_is_not_lost(rig: Rig) -> None:
    pages = await rig.loop.reserve([], NUM_PAGES)
    task = asyncio.create_task(rig.loop.reserve([], 1))
    await asyncio.sleep(0)
    rig.kv.drop(pages)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await rig.loop.reserve([], NUM_PAGES)).page_ids) == NUM_PAGES


async def test_room_comes_with_the_end_of_a_lease() -> None:
    rig = Rig(lease_ttl_ms=20)
    rig.loop.start()
    pages = await rig.loop.reserve([], NUM_PAGES)
    rig.kv.grant(pages.page_ids)
    rig.kv.drop(pages)
    async with asyncio.timeout(10):
        assert len((await rig.loop.reserve([], 1)).page_ids) == 1
    await rig.loop.stop()


async def test_room_comes_with_the_end_of_a_sequence(rig: Rig) -> None:
    held = await rig.loop.reserve([], 10)
    rig.executor.open.clear()
    stream = asyncio.create_task(collect(rig, request(num_tokens=60, max_tokens=20)))
    await rig.until(lambda: rig.kv.counts().held > 10)
    newcomer = asyncio.create_task(rig.loop.reserve([], 6))
    await asyncio.sleep(0)
    assert not newcomer.done()
    rig.executor.open.set()
    assert len((await newcomer).page_ids) == 6
    assert len(await stream) == 20
    rig.kv.drop(held)


async def test_those_who_wait_for_room_stand_behind_sequences_that_lack_pages(rig: Rig) -> None:
    held = await rig.loop.reserve([], 14)
    stream = asyncio.create_task(collect(rig, request(num_tokens=60)))
    await rig.until(rig.engine.is_short)
    newcomer = asyncio.create_task(rig.loop.reserve([], 1))
    await asyncio.sleep(0.01)
    assert not newcomer.done()
    rig.kv.drop(held)
    assert len(await stream) == 4
    assert len((await newcomer).page_ids) == 1


async def test_those_who_wait_for_room_move_up_when_a_sequence_that_lacks_pages_is_cancelled(rig: Rig) -> None:
    await rig.loop.reserve([], 14)
    stream = asyncio.create_task(collect(rig, request(num_tokens=60)))
    await rig.until(rig.engine.is_short)
    newcomer = asyncio.create_task(rig.loop.reserve([], 1))
    await asyncio.sleep(0)
    stream.cancel()
    assert len((await newcomer).page_ids) == 1


async def test_more_room_than_there_can_be_is_refused(rig: Rig) -> None:
    with pytest.raises(ContextTooLong, match="17 pages do not fit a pool of 16"):
        await rig.loop.reserve([], 17)


# Ends -----------------------------------------------------------------------------------------------------------------


async def test_when_the_engine_dies_everybody_is_told(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    held = await rig.loop.reserve([], 10)
    rig.executor.open.clear()
    stream = asyncio.create_task(collect(rig, request()))
    waiter = asyncio.create_task(rig.loop.reserve([], 10))
    await rig.until(lambda: rig.kv.counts().held > 10)
    rig.executor.error = SystemExit("gone")
    rig.executor.open.set()
    for task in (stream, waiter):
        with pytest.raises(Internal, match="the engine died"):
            await task
    with pytest.raises(Internal, match="the engine died"):
        await collect(rig, request())
    assert [fault.message for fault in rig.deaths] == ["the engine died: SystemExit: gone"]
    assert "the engine died" in caplog.text
    rig.kv.drop(held)


async def test_a_step_that_does_not_end_ends_everybody_who_waits_for_it() -> None:
    rig = Rig(patience_s=0.05)
    rig.loop.start()
    rig.executor.open.clear()
    try:
        with pytest.raises(WorkerLost, match=r"stands still: a step took longer than 0\.05 s"):
            await collect(rig, request())
        assert len(rig.deaths) == 1
        with pytest.raises(WorkerLost, match="stands still"):
            await rig.loop.reserve([], 1)
        await rig.loop.stop()  # and does not wait for the step
    finally:
        rig.executor.open.set()


async def test_many_steps_that_end_are_no_step_that_does_not() -> None:
    rig = Rig(patience_s=0.2)
    rig.loop.start()
    events = await collect(rig, request(max_tokens=200))
    await asyncio.sleep(0.3)  # nor is having nothing to do
    await rig.loop.stop()
    assert rig.deaths == []
    assert len(events) == 200


async def test_stopping_ends_streams_and_waiters_with_a_fault() -> None:
    rig = Rig()
    rig.loop.start()
    await rig.loop.reserve([], 10)
    waiter = asyncio.create_task(rig.loop.reserve([], 10))
    rig.executor.open.clear()
    stream = asyncio.create_task(collect(rig, request(max_tokens=80)))
    await rig.until(lambda: rig.kv.counts().held > 10)
    stop = asyncio.create_task(rig.loop.stop())
    await asyncio.sleep(0)
    rig.executor.open.set()
    await stop
    for task in (stream, waiter):
        with pytest.raises(Draining, match="stopped"):
            await task


async def test_what_the_engine_says_while_the_caller_is_busy_comes_at_once(rig: Rig) -> None:
    async with aclosing(rig.loop.bursts(request(max_tokens=200))) as stream, asyncio.timeout(PATIENCE_S):
        bursts = [await anext(stream)]
        await rig.until(lambda: not rig.engine.has_work())
        bursts += [burst async for burst in stream]
    assert sum(len(burst) for burst in bursts) == 200
    assert len(bursts) <= 3  # the last step's events may come apart


async def test_a_burst_ends_with_the_fault_of_its_sequence(rig: Rig) -> None:
    rig.executor.error = ValueError("no")
    async with aclosing(rig.loop.bursts(request())) as bursts:
        [events] = [events async for events in bursts]
    assert isinstance(events[-1], Failed)
