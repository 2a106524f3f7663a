"""Drafts in the engine's steps: what they may use, and what becomes of their pages."""

from dataclasses import replace

import pytest

from shared.engine.api import TokensSampled
from shared.engine.speculation.speculator import Speculation
from shared.page_hash import chain
from tests.unit.engine_rig import MODEL, Rig, last, output

SURE = replace(MODEL, draft_acceptance=1.0)
FIXED = Speculation(num_drafts=4, adaptive=False)


def tokens_of(max_tokens: int) -> list[int]:
    rig = Rig()
    rig.submit("r", max_tokens=max_tokens)
    return output(rig.finish(), "r")


def test_right_drafts_save_steps() -> None:
    rig = Rig(model=SURE, speculation=FIXED)
    rig.submit("r", max_tokens=11)
    assert output(rig.finish(), "r") == tokens_of(11)
    assert rig.batches == [{"r": 20}, {"r": 5}, {"r": 5}]


def test_no_drafts_are_verified_beyond_the_last_token() -> None:
    rig = Rig(model=SURE, speculation=FIXED)
    rig.submit("r", max_tokens=3)
    assert output(rig.finish(), "r") == tokens_of(3)
    assert rig.batches == [{"r": 20}, {"r": 2}]


def test_no_drafts_are_verified_beyond_the_context() -> None:
    rig = Rig(model=SURE, speculation=FIXED)
    rig.submit("r", 197, max_tokens=50)
    assert len(output(rig.finish(), "r")) == 3
    assert rig.batches[-1] == {"r": 2}


@pytest.mark.parametrize(("num_free", "num_drafts"), [(2, 3), (4, 4)])
def test_no_more_drafts_are_wanted_than_pages_have_room_for(num_free: int, num_drafts: int) -> None:
    """The last one is not computed in the step that proposes it."""
    rig = Rig(model=SURE, speculation=FIXED)
    others = rig.kv.reserve([], 32 - num_free)
    assert others is not None
    rig.submit("r", 30, prefill_only=True)
    assert len(last(rig.finish(), "r").draft_token_ids) == num_drafts


def test_a_stop_token_among_the_drafts_ends_the_sequence_there() -> None:
    tokens = tokens_of(8)
    rig = Rig(model=SURE, speculation=FIXED)
    rig.submit("r", max_tokens=8, stop_token_ids=(tokens[3],))
    events = rig.finish()
    assert output(events, "r") == tokens[:3]
    assert last(events, "r").stop_token_id == tokens[3]


def test_events_say_how_drafts_fared() -> None:
    rig = Rig(model=replace(MODEL, draft_acceptance=0.5), speculation=FIXED)
    rig.submit("r", max_tokens=60)
    events = [event for event in rig.finish() if isinstance(event, TokensSampled)]
    assert all(len(event.tokens) == 1 + event.num_accepted for event in events)
    counts = rig.engine.draft_counts()
    assert sum(counts.verified) == sum(event.num_drafts for event in events)
    assert sum(counts.accepted) == sum(event.num_accepted for event in events)
    assert counts.verified[0] > counts.accepted[0] > counts.accepted[1] > 0


def test_prompts_go_before_drafts() -> None:
    rig = Rig(model=SURE, speculation=FIXED, max_step_tokens=32)
    rig.submit("a", 20, max_tokens=40)
    rig.engine.step()
    rig.submit("b", 60)
    rig.engine.step()
    rig.engine.step()
    assert rig.batches[1:] == [{"a": 1, "b": 31}, {"a": 3, "b": 29}]


def test_no_drafts_while_somebody_waits() -> None:
    rig = Rig(model=SURE, speculation=FIXED, max_num_sequences=1)
    rig.submit("a", 20, max_tokens=20)
    rig.submit("b", 20, max_tokens=20)
    rig.finish()
    assert {batch["a"] for batch in rig.batches[1:] if "a" in batch} == {1}
    assert max(batch["b"] for batch in rig.batches[-3:]) == 5


def test_drafts_take_no_page_that_another_sequence_may_need_next() -> None:
    rig = Rig(model=SURE, speculation=FIXED, num_pages=5)
    rig.submit("a", 28, max_tokens=6)
    rig.submit("b", 31, max_tokens=6)
    rig.finish()
    assert rig.engine.load().num_preemptions == 0


def test_pages_are_named_by_accepted_tokens_alone() -> None:
    rig = Rig(model=replace(MODEL, draft_acceptance=0.4), speculation=FIXED)
    rig.submit("r", 20, max_tokens=60)
    tokens = output(rig.finish(), "r")
    prompt = [3 + (ord("r") + index) % 400 for index in range(20)]
    assert set(rig.kv.hashes()) == set(chain(b"", [*prompt, *tokens][:79], 16))


def test_fewer_drafts_are_proposed_while_they_turn_out_wrong() -> None:
    rig = Rig(model=replace(MODEL, draft_acceptance=0.02), speculation=replace(FIXED, adaptive=True))
    rig.submit("r", max_tokens=100)
    rig.finish()
    sizes = [batch["r"] for batch in rig.batches[1:]]
    assert sizes[0] == 5
    assert sum(sizes[20:]) / len(sizes[20:]) < 3


def test_who_uses_no_drafts_passes_over_those_that_came_with_a_request() -> None:
    rig = Rig()
    rig.submit("r", draft_token_ids=(5, 6, 7))
    rig.finish()
    assert rig.batches[0] == {"r": 20}
    assert rig.engine.draft_counts().verified == ()


@pytest.mark.parametrize("draft", [-1, 500])
def test_a_draft_outside_the_vocabulary_is_refused(draft: int) -> None:
    from shared.errors import InvalidRequest

    with pytest.raises(InvalidRequest, match="vocabulary"):
        Rig(speculation=FIXED).submit("r", draft_token_ids=(draft,))
