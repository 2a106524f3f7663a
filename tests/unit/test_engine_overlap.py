"""Steps that are planned and launched while the one before is computed: the same tokens, and nothing said or given away
too early."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest

from shared.engine.api import EngineRequest, Event, Failed, PagesComputed, TokensSampled
from shared.engine.sim import SimModel
from shared.engine.speculation.speculator import Speculation
from shared.page_hash import chain
from tests.unit.engine_rig import MODEL, Rig, last, order_of_ends, output, request


@pytest.fixture
def rig() -> Rig:
    return Rig(behind=True)


@cache
def in_order(asked: EngineRequest, model: SimModel = MODEL) -> list[Event]:
    """What becomes of a request that has an engine to itself, which computes at once."""
    rig = Rig(model=model)
    rig.engine.submit(asked)
    return rig.finish()


def tokens_of(name: str, **fields: Any) -> list[int]:
    return output(in_order(request(name, **fields)), name)


def num_rows(rig: Rig) -> int:
    return sum(sum(batch.values()) for batch in rig.batches)


# What is in flight ----------------------------------------------------------------------------------------------------


def test_a_step_is_launched_before_the_one_before_it_lands(rig: Rig) -> None:
    rig.submit("r", max_tokens=4)
    events = rig.finish()
    assert rig.behind.log == ["launch", *["launch", "land"] * 3, "land"]
    assert output(events, "r") == tokens_of("r", max_tokens=4)


def test_a_step_that_chooses_the_last_token_is_followed_by_none(rig: Rig) -> None:
    """What ends by its length is known ahead, and no row is wasted on it."""
    rig.submit("one", 20, max_tokens=1)
    rig.submit("five", 20, max_tokens=5)
    rig.submit("context", 195, max_tokens=50)
    rig.submit("prefill", 20, prefill_only=True)
    events = rig.finish()
    assert num_rows(rig) == 20 + 24 + 199 + 20
    assert [len(output(events, name)) for name in ("one", "five", "context", "prefill")] == [1, 5, 5, 1]


def test_what_is_computed_behind_a_stop_token_is_passed_over(rig: Rig) -> None:
    tokens = tokens_of("r", num_tokens=28, max_tokens=10)
    rig.submit("r", 28, max_tokens=10, stop_token_ids=(tokens[4],))
    events = rig.finish()
    assert output(events, "r") == tokens[:4]
    assert last(events, "r").stop_token_id == tokens[4]
    assert num_rows(rig) == 28 + 4 + 1
    assert rig.kv.counts().held == 0
    assert rig.kv.match(chain(b"", [*request("r", 28).prompt_token_ids, *tokens], 16)) == 2


def test_a_page_is_findable_only_when_its_last_token_is_computed(rig: Rig) -> None:
    rig.submit("r", 30, max_tokens=6)
    hashes = chain(b"", [*request("r", 30).prompt_token_ids, *tokens_of("r", num_tokens=30, max_tokens=6)], 16)
    found, computed = [], []
    while rig.engine.has_work():
        rig.engine.step()
        found.append(rig.kv.match(hashes))
        computed.append(num_rows(rig) // 16)
    assert found == computed


def test_pages_of_a_prompt_are_announced_when_they_are_computed(rig: Rig) -> None:
    rig.submit("r", 150, prefill_only=True)
    told: list[tuple[int, int]] = []
    while rig.engine.has_work():
        events = rig.engine.step()
        told += [(each.num_tokens, num_rows(rig)) for each in events if isinstance(each, PagesComputed)]
    assert told == [(64, 64), (128, 128), (150, 150)]
    assert rig.behind.log == ["launch", *["launch", "land"] * 2, "land"]


class Knows:
    """Proposes what request `r` will say, from its fifth token to its tenth."""

    def propose(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        told = [*request("r").prompt_token_ids, *tokens_of("r", max_tokens=20)]
        return told[len(tokens) : len(tokens) + num_drafts] if 25 <= len(tokens) < 30 else []


def test_steps_are_launched_ahead_until_there_are_drafts_to_verify() -> None:
    rig = Rig(behind=True, speculation=Speculation(2, adaptive=False, make_proposer=Knows))
    rig.submit("r", max_tokens=20)
    assert output(rig.finish(), "r") == tokens_of("r", max_tokens=20)
    assert rig.engine.draft_counts().accepted == rig.engine.draft_counts().verified == (2, 2)
    ahead, verifying = ["launch", *["launch", "land"] * 5, "land"], ["launch", "land"] * 2
    assert rig.behind.log == [*ahead, *verifying, "launch", *["launch", "land"] * 7, "land"]


@pytest.mark.parametrize("params", [{"presence_penalty": 0.5}, {"min_tokens": 12}], ids=str)
def test_so_they_are_for_whom_the_executors_own_drafts_would_need_the_host(params: dict[str, Any]) -> None:
    rig = Rig(behind=True, speculation=Speculation(2, adaptive=False, make_proposer=lambda: Guesses(random.Random(3))))
    rig.submit("r", max_tokens=12, **params)
    assert output(rig.finish(), "r") == tokens_of("r", max_tokens=12, **params)
    assert "launch launch land" in " ".join(rig.behind.log)


def test_drafts_that_came_with_a_request_are_verified_behind_its_prompt(rig: Rig) -> None:
    rig.submit("r", 100, max_tokens=6, draft_token_ids=(7, 8, 9))
    assert output(rig.finish(), "r") == tokens_of("r", num_tokens=100, max_tokens=6)


def test_the_time_of_a_step_is_counted_from_when_the_one_before_landed(rig: Rig) -> None:
    def take_time() -> None:
        rig.now += 0.01

    rig.behind.before_computing = take_time
    rig.submit("r", 1, max_tokens=20)
    rig.finish()
    assert rig.engine.load().decode_step_ms == pytest.approx(10.0)


# Ends amid a flight ---------------------------------------------------------------------------------------------------


def test_pages_of_a_cancelled_sequence_are_held_until_the_step_that_writes_to_them_lands(rig: Rig) -> None:
    rig.submit("r", max_tokens=50)
    rig.engine.step()
    rig.engine.step()
    rig.engine.cancel("r")
    held: list[int] = []
    rig.behind.before_computing = lambda: held.append(rig.kv.counts().held)
    assert rig.engine.has_work()
    assert rig.engine.step() == []
    assert (held, rig.kv.counts().held, rig.engine.has_work()) == ([2], 0, False)


@pytest.mark.parametrize("num_steps", range(12))
def test_a_sequence_may_be_cancelled_at_any_point(num_steps: int, rig: Rig) -> None:
    rig.submit("a", 100, max_tokens=6)
    rig.submit("b", 30, max_tokens=8)
    events = [event for _ in range(num_steps) for event in rig.engine.step()]
    rig.engine.cancel("a")
    told = output(events, "a")
    events += rig.finish()
    assert output(events, "a") == told == tokens_of("a", num_tokens=100, max_tokens=6)[: len(told)]
    assert output(events, "b") == tokens_of("b", num_tokens=30, max_tokens=8)
    assert rig.kv.counts().held == 0


def test_pages_that_are_needed_are_taken_from_nobody_in_flight() -> None:
    rig = Rig(num_pages=6, behind=True)
    rig.submit("old", 30, max_tokens=40)
    rig.submit("young", 30, max_tokens=40)
    events = rig.finish()
    assert rig.engine.load().num_preemptions > 0
    assert order_of_ends(events) == ["old", "young"]
    assert [output(events, name) for name in ("old", "young")] == [
        tokens_of(name, num_tokens=30, max_tokens=40) for name in ("old", "young")
    ]


def test_a_sequence_without_room_sleeps_until_pages_are_freed(rig: Rig) -> None:
    others = rig.kv.reserve([], 31)
    assert others is not None
    rig.submit("r", 15, max_tokens=5)
    rig.finish()
    assert not rig.engine.has_work()
    rig.kv.drop(others)
    assert order_of_ends(rig.finish()) == ["r"]


@pytest.mark.parametrize("at", [0, 1])
def test_a_step_that_fails_takes_its_sequences_along_and_no_others(
    at: int, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """`at` 0: the first of two in flight; 1: the one behind it, which has another sequence besides."""
    failing = iter([*[None] * at, RuntimeError("out of luck")])

    def fail() -> None:
        if error := next(failing, None):
            raise error

    rig.submit("a", max_tokens=9)
    rig.engine.step()
    rig.submit("b", max_tokens=9)
    rig.behind.before_computing = fail
    events = rig.finish()
    failed = [event.request_id for event in events if isinstance(event, Failed)]
    assert failed == ["a", "b"][: 1 + at]
    assert rig.kv.counts().held == 0
    assert output(events, "b") == ([] if at else tokens_of("b", max_tokens=9))
    assert output(events, "a") == tokens_of("a", max_tokens=9)[:at]
    assert "failed" in caplog.text


def test_a_step_that_cannot_be_launched_fails_behind_the_one_in_flight(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.submit("r", max_tokens=9)
    rig.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(rig.behind, "launch", lambda batch: 1 / 0)
        sampled, failed = rig.engine.step()
    assert isinstance(sampled, TokensSampled)
    assert isinstance(failed, Failed)
    assert (rig.finish(), rig.kv.counts().held) == ([], 0)


# Any schedule ---------------------------------------------------------------------------------------------------------


@dataclass
class Schedule:
    """Requests that come, go on and are cancelled at random, in an engine that runs behind."""

    chance: random.Random
    rig: Rig
    asked: dict[str, EngineRequest] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)

    def run(self, num_requests: int) -> None:
        while len(self.asked) < num_requests or self.rig.engine.has_work():
            if len(self.asked) < num_requests and self.chance.random() < 0.4:
                self.submit()
            if self.asked and self.chance.random() < 0.1:
                self.cancel(self.chance.choice(list(self.asked)))
            if self.chance.random() < 0.9:
                self.step()

    def submit(self) -> None:
        name, chance = f"r{len(self.asked)}", self.chance
        kin = chance.choice(["", *self.asked])  # prompts that begin alike find pages cached
        fields: dict[str, Any] = {
            "max_tokens": chance.choice([1, 2, 5, 17, 30]),
            "ignore_eos": chance.random() < 0.5,
            "temperature": chance.choice([0.0, 1.0]),
            "seed": chance.randrange(3),
            "min_tokens": chance.randrange(2),
            "num_logprobs": chance.choice([None, 2]),
            "prefill_only": chance.random() < 0.15,
            "priority": chance.randrange(2),
            "presence_penalty": chance.choice([0.0, 0.0, 0.0, 0.5]),  # of which the simulation knows nothing
        }
        asked = request(name, chance.choice([1, 15, 16, 17, 31, 32, 40, 70]), **fields)
        if kin:
            asked = replace(asked, prompt_token_ids=self.asked[kin].prompt_token_ids + asked.prompt_token_ids[:9])
        if len(asked.prompt_token_ids) < 80:
            self.asked[name] = asked
            self.rig.now += 0.001
            self.rig.engine.submit(asked)

    def cancel(self, name: str) -> None:
        self.cancelled.add(name)
        self.rig.engine.cancel(name)

    def step(self) -> None:
        new = self.rig.engine.step()
        assert self.rig.kv.check() == []
        for event in new:
            assert event.request_id not in self.cancelled
            if self.asked[event.request_id].prefill_only and isinstance(event, TokensSampled):
                self.cancel(event.request_id)  # somebody has leased its pages
        self.events += new


def comparable(events: Sequence[Event], name: str) -> list[tuple[object, ...]]:
    """All that is said of a request, but for what the cache had, and how many steps it took."""
    found = list[tuple[object, ...]]()
    for event in events:
        if event.request_id == name and not isinstance(event, PagesComputed):
            assert isinstance(event, TokensSampled)
            found += [(token,) for token in event.tokens]
            found += [(event.finish_reason, event.stop_token_id)] * (event.finish_reason is not None)
    return found


@dataclass
class Guesses:
    """Proposes now and then, and hardly ever what is right."""

    chance: random.Random

    def propose(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        return [] if self.chance.random() < 0.7 else self.chance.choices(tokens, k=num_drafts)


MANY_ENDS = replace(MODEL, eos_token_ids=tuple(range(0, 500, 12)))
POOLS = {"roomy": 200, "tight": 12, "as small as can be": 7}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("pool", POOLS)
def test_any_schedule_yields_what_each_request_would_have_alone_and_in_order(pool: str, seed: int) -> None:
    chance = random.Random(f"{pool} {seed}")
    speculation = Speculation(3, make_proposer=lambda: Guesses(chance)) if seed % 3 == 0 else None
    run_any(chance, Rig(POOLS[pool], chance.choice([5, 24, 64]), 5, MANY_ENDS, speculation, behind=True))


def run_any(chance: random.Random, rig: Rig) -> None:
    schedule = Schedule(chance, rig)
    schedule.run(25)
    for name, asked in schedule.asked.items():
        alone, here = comparable(in_order(asked, MANY_ENDS), name), comparable(schedule.events, name)
        assert here == alone if name not in schedule.cancelled else here == alone[: len(here)]
    assert rig.kv.counts().held == 0
    assert "launch launch land" in " ".join(rig.behind.log)
