import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from shared.engine.api import (
    BatchItem,
    EngineRequest,
    Event,
    Failed,
    FinishReason,
    PagesComputed,
    SampledToken,
    SamplingParams,
    TokensSampled,
)
from shared.engine.engine import Engine
from shared.engine.kv.store import KvStore, PageTable
from shared.engine.sim import SimExecutor, SimModel
from shared.errors import ContextTooLong, Fault, Internal, InvalidRequest

MODEL = SimModel(vocab_size=500, max_model_len=200, eos_token_ids=(2,))


class Spy(SimExecutor):
    """Records every batch; can be told to do something in the middle of a step."""

    def __init__(self, model: SimModel, num_pages: int) -> None:
        super().__init__(model, num_pages, sleep=lambda seconds: None)
        self.batches: list[dict[str, int]] = []
        self.during: Callable[[], None] = lambda: None

    def forward(self, batch: Sequence[BatchItem]) -> list[SampledToken | None]:
        self.batches.append({item.request_id: len(item.token_ids) for item in batch})
        self.during()
        return super().forward(batch)


class Rig:
    def __init__(
        self, num_pages: int = 32, max_step_tokens: int = 64, max_num_sequences: int = 8, model: SimModel = MODEL
    ) -> None:
        self.now = 0.0
        self.executor = Spy(model, num_pages)
        self.kv = KvStore(num_pages, 16, 10_000, clock=lambda: self.now)
        self.engine = Engine(
            self.executor,
            self.kv,
            max_step_tokens=max_step_tokens,
            max_num_sequences=max_num_sequences,
            clock=lambda: self.now,
        )

    def submit(self, name: str, num_tokens: int = 20, pages: PageTable | None = None, **fields: Any) -> None:
        self.now += 0.001
        self.engine.submit(request(name, num_tokens, **fields), pages)

    def finish(self, max_steps: int = 1000) -> list[Event]:
        events: list[Event] = []
        for _ in range(max_steps):
            if not self.engine.has_work():
                return events
            events += self.engine.step()
            assert self.kv.check() == []
        raise AssertionError("the engine does not come to an end")

    @property
    def batches(self) -> list[dict[str, int]]:
        return self.executor.batches


def request(name: str, num_tokens: int = 20, **fields: Any) -> EngineRequest:
    own = {field: fields.pop(field) for field in ("output_token_ids", "prefill_only", "priority") if field in fields}
    prompt = tuple(3 + (sum(map(ord, name)) + index) % 400 for index in range(num_tokens))
    return EngineRequest(name, prompt, SamplingParams(**{"max_tokens": 4, "ignore_eos": True} | fields), **own)


def output(events: list[Event], name: str) -> list[int]:
    return [
        token.token_id
        for event in events
        if isinstance(event, TokensSampled) and event.request_id == name
        for token in event.tokens
    ]


def last(events: list[Event], name: str) -> TokensSampled:
    event = [event for event in events if event.request_id == name][-1]
    assert isinstance(event, TokensSampled)
    return event


def order_of_ends(events: list[Event]) -> list[str]:
    return [event.request_id for event in events if isinstance(event, TokensSampled) and event.finish_reason]


@pytest.fixture
def rig() -> Rig:
    return Rig()


# Steps ----------------------------------------------------------------------------------------------------------------


def test_a_step_serves_those_that_generate_first_and_then_prompts_in_order_of_arrival(rig: Rig) -> None:
    rig.submit("a", 10)
    rig.engine.step()
    rig.submit("b", 100)
    rig.submit("c", 30)
    rig.engine.step()
    rig.engine.step()
    assert rig.batches[1:] == [{"a": 1, "b": 63}, {"a": 1, "b": 37, "c": 26}]


def test_no_step_exceeds_its_budget(rig: Rig) -> None:
    for index in range(12):
        rig.submit(f"r{index}", 5 + 13 * index)
    rig.finish()
    assert max(sum(batch.values()) for batch in rig.batches) <= 64


def test_no_more_sequences_run_than_are_allowed() -> None:
    rig = Rig(max_num_sequences=2)
    for name in "abcde":
        rig.submit(name, 5)
    events = rig.finish()
    assert max(map(len, rig.batches)) == 2
    assert order_of_ends(events) == list("abcde")


def test_a_higher_priority_goes_first() -> None:
    rig = Rig(max_num_sequences=1)
    rig.submit("running")
    rig.engine.step()
    rig.submit("low", priority=-1)
    rig.submit("usual")
    rig.submit("high", priority=1)
    assert order_of_ends(rig.finish()) == ["running", "high", "usual", "low"]


def test_a_low_priority_is_not_starved_by_those_that_come_much_later() -> None:
    rig = Rig(max_num_sequences=1)
    rig.submit("low", priority=-1)
    rig.now += 11.0
    rig.submit("late")
    assert order_of_ends(rig.finish()) == ["low", "late"]


def test_a_long_prompt_is_not_overtaken_by_short_ones_while_it_waits_for_pages() -> None:
    rig = Rig(num_pages=8)
    rig.submit("running", 60, max_tokens=20)
    rig.engine.step()
    rig.submit("long", 90)
    rig.submit("short", 5)
    assert order_of_ends(rig.finish())[:2] == ["running", "long"]


# Ends -----------------------------------------------------------------------------------------------------------------


def test_a_sequence_ends_after_its_most_tokens(rig: Rig) -> None:
    rig.submit("r", max_tokens=3)
    events = rig.finish()
    assert (len(output(events, "r")), last(events, "r").finish_reason) == (3, FinishReason.LENGTH)
    assert rig.kv.counts().held == 0


def test_earlier_output_counts_and_is_not_emitted_again(rig: Rig) -> None:
    rig.submit("r", max_tokens=5)
    tokens = output(rig.finish(), "r")
    rig.submit("again", max_tokens=5)
    rig.engine.cancel("again")
    rig.engine.submit(replace(request("r", max_tokens=5), output_token_ids=tuple(tokens[:3])))
    assert output(rig.finish(), "r") == tokens[3:]


@pytest.mark.parametrize("by_the_model", [True, False])
def test_a_stop_token_ends_a_sequence_and_is_not_emitted(by_the_model: bool, rig: Rig) -> None:
    rig.submit("r", max_tokens=10)
    tokens = output(rig.finish(), "r")
    stopping = Rig(model=replace(MODEL, eos_token_ids=(tokens[4],) if by_the_model else ()))
    stopping.submit("r", max_tokens=10, stop_token_ids=() if by_the_model else (tokens[4],), ignore_eos=False)
    events = stopping.finish()
    assert output(events, "r") == tokens[:4]
    assert (last(events, "r").finish_reason, last(events, "r").stop_token_id) == (FinishReason.STOP, tokens[4])


def test_a_sequence_ends_where_the_context_ends(rig: Rig) -> None:
    rig.submit("r", 195, max_tokens=50)
    events = rig.finish()
    assert (len(output(events, "r")), last(events, "r").finish_reason) == (5, FinishReason.LENGTH)


def test_a_sequence_ends_where_the_pool_ends() -> None:
    rig = Rig(num_pages=3)
    rig.submit("r", 40, max_tokens=50)
    events = rig.finish()
    assert (len(output(events, "r")), last(events, "r").finish_reason) == (8, FinishReason.LENGTH)


# Cancelling -----------------------------------------------------------------------------------------------------------


def test_a_cancelled_sequence_is_heard_of_no_more_and_its_pages_are_free(rig: Rig) -> None:
    rig.submit("r", max_tokens=100)
    rig.engine.step()
    rig.engine.cancel("r")
    assert rig.finish() == []
    assert rig.kv.counts().held == 0


def test_pages_of_a_sequence_cancelled_during_a_step_are_held_until_the_step_is_over(rig: Rig) -> None:
    held: list[int] = []

    def cancel() -> None:
        rig.engine.cancel("r")
        held.append(rig.kv.counts().held)

    rig.executor.during = cancel
    rig.submit("r")
    assert rig.engine.step() == []
    rig.finish()
    assert (held, rig.kv.counts().held) == ([2], 0)


def test_a_sequence_cancelled_before_its_first_step_never_runs(rig: Rig) -> None:
    rig.submit("r")
    rig.engine.cancel("r")
    rig.engine.cancel("unknown")
    assert rig.finish() == []
    assert rig.batches == []


def test_a_sequence_may_be_submitted_and_cancelled_while_a_step_runs(rig: Rig) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(10)

    rig.executor.during = hold
    rig.submit("a")
    thread = threading.Thread(target=rig.engine.step)
    thread.start()
    assert inside.wait(10)
    rig.submit("b")
    rig.engine.cancel("a")
    assert rig.engine.load().num_waiting == 1
    go_on.set()
    thread.join()
    rig.executor.during = lambda: None
    assert order_of_ends(rig.finish()) == ["b"]


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_broken_step_fails_its_own_sequences_only(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def break_down() -> None:
        rig.executor.during = lambda: None
        raise RuntimeError("out of luck")

    rig.executor.during = break_down
    rig.submit("a")
    (event,) = rig.engine.step()
    assert isinstance(event, Failed)
    assert isinstance(event.fault, Internal)
    assert "out of luck" in event.fault.message
    assert rig.kv.counts().free == 32
    rig.submit("a")
    assert order_of_ends(rig.finish()) == ["a"]
    assert "failed" in caplog.text


@pytest.mark.parametrize(
    ("fields", "fault", "message"),
    [
        ({"num_tokens": 0}, InvalidRequest, "prompt is empty"),
        ({"num_tokens": 200}, ContextTooLong, "at most 200"),
        ({"num_tokens": 190, "output_token_ids": (5,) * 10, "max_tokens": 20}, ContextTooLong, "at most 200"),
        ({"output_token_ids": (5,) * 4}, InvalidRequest, "nothing to generate"),
        ({"output_token_ids": (500,)}, InvalidRequest, "outside the vocabulary"),
        ({"output_token_ids": (-1,)}, InvalidRequest, "outside the vocabulary"),
        ({"temperature": -1.0}, InvalidRequest, "temperature is -1.0"),
        ({"temperature": float("nan")}, InvalidRequest, "temperature is nan"),
        ({"top_p": 0.0}, InvalidRequest, "top_p"),
        ({"top_k": -1}, InvalidRequest, "top_k"),
        ({"min_p": 1.5}, InvalidRequest, "min_p"),
        ({"repetition_penalty": 0.0}, InvalidRequest, "repetition_penalty"),
        ({"logit_bias": ((500, 1.0),)}, InvalidRequest, "logit_bias"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"min_tokens": 5}, InvalidRequest, "min_tokens"),
        ({"num_logprobs": -1}, InvalidRequest, "num_logprobs"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_leaves_pages_with_the_caller(
    fields: dict[str, Any], fault: type[Fault], message: str, rig: Rig
) -> None:
    pages = rig.kv.reserve([], 2)
    assert pages is not None
    with pytest.raises(fault, match=message):
        rig.submit("r", pages=pages, **fields)
    assert len(pages.page_ids) == 2
    assert not rig.engine.has_work()


def test_a_sequence_that_the_pool_can_never_hold_is_refused() -> None:
    with pytest.raises(ContextTooLong, match="at most 48 tokens"):
        Rig(num_pages=3).submit("r", 48)


def test_two_sequences_of_one_name_are_refused(rig: Rig) -> None:
    rig.submit("r")
    with pytest.raises(InvalidRequest, match="running already"):
        rig.submit("r")


# Pages ----------------------------------------------------------------------------------------------------------------


def test_a_sequence_grows_page_by_page(rig: Rig) -> None:
    held = []
    rig.submit("r", 15, max_tokens=20)
    while rig.engine.has_work():
        rig.engine.step()
        held.append(rig.kv.counts().held)
    assert held == [1] * 2 + [2] * 16 + [3] + [0]


def test_the_youngest_gives_its_pages_to_the_oldest() -> None:
    rig = Rig(num_pages=6)
    rig.submit("old", 30, max_tokens=40)
    rig.submit("young", 30, max_tokens=40)
    events = rig.finish()
    assert rig.engine.load().num_preemptions > 0
    assert order_of_ends(events) == ["old", "young"]
    assert [len(output(events, name)) for name in ("old", "young")] == [40, 40]


def test_a_prefill_only_sequence_is_never_preempted() -> None:
    rig = Rig(num_pages=9, max_step_tokens=3, max_num_sequences=2)
    rig.submit("growing", 62, max_tokens=60)
    rig.submit("prefill", 60, prefill_only=True)
    events = rig.finish()
    computed = [event.num_tokens for event in events if isinstance(event, PagesComputed)]
    assert computed[-1] == 60
    assert rig.kv.counts().free + rig.kv.counts().cached == 0
    rig.engine.cancel("prefill")
    events += rig.finish()
    assert len(output(events, "growing")) == 60
    assert rig.engine.load().num_preemptions == 0


def test_a_sequence_without_room_sleeps_until_pages_are_freed(rig: Rig) -> None:
    others = rig.kv.reserve([], 31)
    assert others is not None
    rig.submit("r", 40)
    rig.engine.step()
    assert not rig.engine.has_work()
    assert rig.engine.is_short()
    rig.kv.drop(others)
    assert rig.engine.has_work()
    assert order_of_ends(rig.finish()) == ["r"]
    assert not rig.engine.is_short()


def test_a_sequence_without_room_gets_the_pages_of_a_lease_that_lapsed(rig: Rig) -> None:
    others = rig.kv.reserve([], 31)
    assert others is not None
    rig.kv.grant(others.page_ids)
    rig.kv.drop(others)
    rig.submit("r", 40)
    assert rig.finish() == []
    rig.now += 10.0
    assert order_of_ends(rig.finish()) == ["r"]


def test_sequences_that_wait_with_pages_never_lock_each_other_out() -> None:
    rig = Rig(num_pages=8)
    rig.submit("first", 70)
    for name in ("b", "c"):
        pages = rig.kv.reserve([], 3)
        assert pages is not None
        rig.submit(name, 60, pages=pages)
    assert sorted(order_of_ends(rig.finish())) == ["b", "c", "first"]


def test_a_handed_over_table_is_empty_for_the_one_who_handed_it_over(rig: Rig) -> None:
    pages = rig.kv.reserve([], 2)
    assert pages is not None
    rig.submit("r", pages=pages)
    rig.kv.drop(pages)
    assert rig.kv.counts().held == 2
    assert order_of_ends(rig.finish()) == ["r"]


# Prefill for others ---------------------------------------------------------------------------------------------------


def test_a_prefill_announces_pages_chunk_by_chunk_and_the_partly_filled_one_with_the_token(rig: Rig) -> None:
    rig.submit("r", 100, prefill_only=True)
    first, second, third = rig.finish()
    assert isinstance(first, PagesComputed)
    assert (first.first_page, len(first.page_ids), first.num_tokens) == (0, 4, 64)
    assert isinstance(second, PagesComputed)
    assert (second.first_page, len(second.page_ids), second.num_tokens) == (4, 3, 100)
    assert isinstance(third, TokensSampled)
    assert (len(third.tokens), third.finish_reason) == (1, None)


def test_a_prefill_announces_cached_pages_too(rig: Rig) -> None:
    rig.submit("r", 100)
    rig.finish()
    rig.submit("r", 100, prefill_only=True)
    pages, tokens = rig.finish()
    assert isinstance(pages, PagesComputed)
    assert (pages.first_page, len(pages.page_ids)) == (0, 7)
    assert isinstance(tokens, TokensSampled)
    assert tokens.num_cached_tokens == 96


def test_a_prefill_says_when_its_only_token_was_the_last(rig: Rig) -> None:
    rig.submit("r", max_tokens=1, prefill_only=True)
    assert last(rig.finish(), "r").finish_reason is FinishReason.LENGTH


def test_pages_of_a_finished_prefill_are_held_until_they_had_a_chance_to_be_leased(rig: Rig) -> None:
    rig.submit("r", 40, prefill_only=True)
    pages = rig.finish()[0]
    assert isinstance(pages, PagesComputed)
    assert rig.kv.counts().held == 3
    lease_id = rig.kv.grant(pages.page_ids)
    rig.engine.cancel("r")
    rig.finish()
    assert (rig.kv.counts().held, rig.kv.counts().leased) == (0, 3)
    assert rig.kv.release(lease_id)


# Load -----------------------------------------------------------------------------------------------------------------


def test_the_load_is_measured_by_the_engine_itself(rig: Rig) -> None:
    def take_time() -> None:
        rig.now += 0.1 if "a" in rig.batches[-1] and rig.batches[-1]["a"] > 1 else 0.01

    rig.executor.during = take_time
    rig.submit("a", 50)
    assert (rig.engine.load().num_waiting, rig.engine.load().num_queued_tokens) == (1, 50)
    rig.finish()
    load = rig.engine.load()
    assert (load.num_running, load.num_waiting, load.num_queued_tokens, load.num_steps) == (0, 0, 0, 4)
    assert load.prefill_ms_per_token == pytest.approx(2.0)
    assert load.decode_step_ms == pytest.approx(10.0)


def test_a_budget_that_is_too_small_for_its_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot share"):
        Rig(max_step_tokens=4, max_num_sequences=8)
