import threading
from dataclasses import replace
from typing import Any

import pytest

from shared.engine.api import Failed, FinishReason, PagesComputed, TokensSampled
from shared.errors import ContextTooLong, Fault, Internal, InvalidRequest
from tests.unit.engine_rig import MODEL, Rig, last, order_of_ends, output, request


@pytest.fixture
def rig() -> Rig:
    return Rig()


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


def test_a_prompt_is_charged_with_what_its_step_took_longer_than_a_step_that_only_generates(rig: Rig) -> None:
    def take_time() -> None:
        rig.now += 0.01 + 0.001 * sum(num_tokens for num_tokens in rig.batches[-1].values() if num_tokens > 1)

    rig.executor.during = take_time
    rig.submit("a", 1, max_tokens=20)
    rig.engine.step()
    rig.submit("b", 50)
    rig.engine.step()
    assert rig.engine.load().prefill_ms_per_token == pytest.approx(1.0)
