"""Steps with drafts of the executor's own, planned and launched while it is not known how many of the last ones were
right."""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from shared.engine.api import Event, TokensSampled
from shared.engine.speculation.speculator import Speculation
from shared.page_hash import chain
from tests.unit.engine_rig import MODEL, Rig, order_of_ends, output, request
from tests.unit.test_engine_overlap import MANY_ENDS, POOLS, num_rows, run_any, tokens_of

DRAFTING = replace(MODEL, draft_acceptance=0.7)


def drafting(num_pages: int = 32) -> Rig:
    return Rig(num_pages, model=DRAFTING, speculation=Speculation(3, adaptive=False), behind=True)


def test_drafts_are_verified_behind_the_step_that_proposes_them() -> None:
    rig = drafting()
    rig.submit("r", max_tokens=40)
    assert output(rig.finish(), "r") == tokens_of("r", max_tokens=40)
    num_steps = len(rig.batches)
    assert rig.behind.log == ["launch", *["launch", "land"] * (num_steps - 1), "land"]
    counts = rig.engine.draft_counts()
    assert 0 < rig.behind.num_moved <= sum(counts.accepted) < sum(counts.verified)
    assert rig.kv.counts().held == 0


def test_what_is_verified_behind_the_last_token_is_passed_over() -> None:
    """All drafts are right, so that the output is at its end a step before it could be known ahead."""
    rig = Rig(model=replace(MODEL, draft_acceptance=1.0), speculation=Speculation(3, adaptive=False), behind=True)
    rig.submit("r", max_tokens=9)
    events = rig.finish()
    assert output(events, "r") == tokens_of("r", max_tokens=9)
    assert num_rows(rig) == 20 + 4 + 4 + 3
    assert rig.kv.counts().held == 0


def cut(log: list[str], *places: int) -> list[list[str]]:
    return [log[start:end] for start, end in pairwise([0, *places, len(log)])]


@pytest.mark.parametrize("params", [{"presence_penalty": 0.5}, {"min_tokens": 12}], ids=str)
def test_drafts_that_need_the_host_are_verified_in_order(params: dict[str, Any]) -> None:
    rig = drafting()
    rig.submit("other", max_tokens=100)
    events = [event for _ in range(5) for event in rig.engine.step()]
    rig.submit("r", max_tokens=12, **params)
    meanwhile = len(rig.behind.log)
    for _ in range(100):
        events += [] if order_of_ends(events) else rig.engine.step()
    until, told = len(rig.behind.log), [event for event in events if isinstance(event, TokensSampled)]
    events += rig.finish()
    assert [output(events, name) for name in ("r", "other")] == [
        tokens_of("r", max_tokens=12, **params), tokens_of("other", max_tokens=100),
    ]  # fmt: skip
    assert any(event.num_accepted for event in told if event.request_id == "r")
    before, then, behind = (" ".join(part) for part in cut(rig.behind.log, meanwhile, until))
    assert "launch launch" in before
    assert "launch launch" not in then
    assert "launch launch" in behind


@pytest.mark.parametrize("num_tokens", range(180, 200))
def test_nothing_is_written_beyond_the_context(num_tokens: int) -> None:
    rig = drafting()
    rig.submit("r", num_tokens, max_tokens=100)
    events = rig.finish()
    assert output(events, "r") == tokens_of("r", num_tokens=num_tokens, max_tokens=100)
    assert len(output(events, "r")) == MODEL.max_model_len - num_tokens


@pytest.mark.parametrize("num_tokens", range(10, 26))
def test_who_lacks_a_page_should_all_drafts_be_right_waits_until_it_is_known(num_tokens: int) -> None:
    rig = drafting()
    others = rig.kv.reserve([], 30)
    assert others is not None
    rig.submit("r", num_tokens, max_tokens=30)
    events = rig.finish()
    assert num_tokens + len(output(events, "r")) == 33
    rig.kv.drop(others)
    events += rig.finish()
    assert output(events, "r") == tokens_of("r", num_tokens=num_tokens, max_tokens=30)


@pytest.mark.parametrize("num_tokens", [5, 13, 21])
def test_pages_are_findable_as_soon_as_their_tokens_are_known(num_tokens: int) -> None:
    rig, told = drafting(), list[Event]()
    rig.submit("r", num_tokens, max_tokens=60)
    said = tokens_of("r", num_tokens=num_tokens, max_tokens=60)
    hashes = chain(b"", [*request("r", num_tokens).prompt_token_ids, *said], 16)
    while rig.engine.has_work():
        told += rig.engine.step()
        known = num_tokens + len(output(told, "r"))
        assert not told or rig.kv.match(hashes) == (known - 1) // 16


@pytest.mark.parametrize("num_steps", range(2, 12))
def test_a_sequence_may_be_cancelled_while_it_is_not_known_where_it_is(num_steps: int) -> None:
    rig = drafting()
    rig.submit("a", max_tokens=30)
    rig.submit("b", 30, max_tokens=30)
    events = [event for _ in range(num_steps) for event in rig.engine.step()]
    rig.engine.cancel("a")
    told = output(events, "a")
    events += rig.finish()
    assert output(events, "a") == told == tokens_of("a", max_tokens=30)[: len(told)]
    assert output(events, "b") == tokens_of("b", num_tokens=30, max_tokens=30)
    assert rig.kv.counts().held == 0


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("pool", POOLS)
def test_so_it_does_with_drafts_that_are_verified_behind_the_step_that_proposes_them(pool: str, seed: int) -> None:
    chance = random.Random(f"{pool} {seed}")
    model = replace(MANY_ENDS, draft_acceptance=chance.choice([0.3, 0.7, 1.0]))
    speculation = Speculation(chance.choice([1, 3, 4]), adaptive=chance.random() < 0.3)
    rig = Rig(POOLS[pool], chance.choice([5, 24, 64]), 5, model, speculation, behind=True)
    run_any(chance, rig)
