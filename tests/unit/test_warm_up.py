"""What a worker computes before it can be found, and what that leaves behind."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shared.engine.api import BatchItem, Chosen, Recorded
from shared.engine.engine import Engine
from shared.engine.kv.store import KvStore
from shared.engine.meter import Meter
from shared.engine.sim import SimExecutor, SimModel
from shared.engine.speculation.speculator import Speculation
from shared.engine.warm_up import Scope, warm_up
from shared.errors import Internal
from tests.unit.behind import Behind

MODEL = SimModel(max_model_len=4000, prefill_ms_per_token=0.5, decode_ms=7.0, decode_ms_per_sequence=2.0)
RECORDED = Recorded((1, 2, 4, 8), max_width=4)
MAX_TOKENS, MAX_SEQUENCES, MAX_DRAFTS = 64, 8, 3


class Recording(SimExecutor):
    """Computes nothing for some time, which passes on a clock of its own; notes what is asked of it. If it records
    steps, the first one of each kind takes a second longer."""

    def __init__(self, model: SimModel, num_pages: int, recorded: Recorded | None = RECORDED) -> None:
        self.now, self.recorded = 0.0, recorded
        self.shapes: list[tuple[int, ...]] = []
        self.drafts: list[tuple[int, ...]] = []
        self.starts: list[tuple[int, ...]] = []
        self.broken_from = 10**9
        super().__init__(model, num_pages, sleep=self._pass, clock=lambda: self.now)

    def _pass(self, seconds: float) -> None:
        self.now += seconds

    def forward(self, batch: Sequence[BatchItem]) -> list[Chosen | None]:
        shape = tuple(len(item.token_ids) for item in batch)
        self.now += self.recorded is not None and shape not in self.shapes
        self.shapes.append(shape)
        self.drafts.append(tuple(item.num_drafts for item in batch))
        self.starts.append(tuple(item.start for item in batch))
        if len(self.shapes) >= self.broken_from:
            raise ValueError("no kernel for this")
        return super().forward(batch)


class Rig:
    def __init__(self, executor: Recording, *, behind: bool = False, **scope: object) -> None:
        self.executor, self.own = executor, Behind(executor) if behind else executor
        self.stores: list[KvStore] = []
        self.scope = replace(
            Scope(executor.spec, executor.recorded, MAX_TOKENS, MAX_SEQUENCES, MAX_DRAFTS),
            **scope,  # type: ignore[arg-type]
        )

    def engine(self, kv: KvStore, meter: Meter) -> Engine:
        self.stores.append(kv)
        return Engine(
            self.own,
            kv,
            max_step_tokens=self.scope.max_step_tokens,
            max_num_sequences=self.scope.max_num_sequences,
            speculation=Speculation(self.scope.max_drafts) if self.scope.max_drafts else None,
            meter=meter,
            clock=lambda: self.executor.now,
        )

    def warm_up(self, budget_s: float = 1e6) -> Meter:
        return warm_up(self.scope, self.engine, budget_s, clock=lambda: self.executor.now)


@pytest.mark.parametrize("behind", [False, True], ids=["in order", "behind"])
def test_every_recorded_number_of_sequences_generates_and_verifies_as_many_drafts_as_fit(behind: bool) -> None:
    executor = Recording(MODEL, 256)
    Rig(executor, behind=behind).warm_up()
    shapes = set(executor.shapes)
    for size in RECORDED.sizes:
        for width in range(1, 1 + MAX_DRAFTS + 1):
            assert (width,) * size in shapes
    assert {(number,) * 8 for number in range(MAX_DRAFTS + 1)} <= set(executor.drafts)


def test_prompts_of_every_magnitude_are_computed_and_one_of_several_full_steps() -> None:
    executor = Recording(MODEL, 256)
    Rig(executor).warm_up()
    alone = {shape[0] for shape in executor.shapes if len(shape) == 1}
    assert {16, 17, 32, 33, MAX_TOKENS, *range(1, 1 + RECORDED.max_width)} <= alone
    assert executor.shapes[:4] == [(MAX_TOKENS,)] * 4


def test_rates_are_those_of_warm_steps() -> None:
    rates = Rig(Recording(MODEL, 256), max_drafts=0).warm_up()
    assert rates.prefill_ms_per_token == pytest.approx(MODEL.prefill_ms_per_token, rel=0.05)
    assert rates.draft_ms == pytest.approx(MODEL.decode_ms_per_sequence, rel=0.05)
    alone = MODEL.decode_ms + MODEL.decode_ms_per_sequence
    assert alone <= rates.decode_step_ms < 1.5 * alone
    assert rates.num_steps == 0


def test_nothing_is_left_in_the_books() -> None:
    rig = Rig(Recording(MODEL, 256))
    meter = rig.warm_up()
    engine = rig.engine(KvStore(256, 16, 10_000), meter)
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.num_steps, load.num_preemptions) == (0, 0, 0, 0)
    assert load.prefill_ms_per_token > 0
    assert engine.draft_counts().verified == ()
    assert engine.kv.counts().free == 256
    assert all(kv.counts().held == 0 and kv.check() == [] for kv in rig.stores)


def test_a_worker_that_computes_prompts_for_others_generates_nothing() -> None:
    executor = Recording(MODEL, 256)
    Rig(executor, generates=False).warm_up()
    assert {len(shape) for shape in executor.shapes} == {1}
    assert Rig(executor, generates=False).warm_up().prefill_ms_per_token > 0


def test_where_nothing_is_made_at_first_use_a_few_steps_give_the_rates() -> None:
    executor = Recording(MODEL, 256, recorded=None)
    rates = Rig(executor, max_drafts=0).warm_up()
    assert len(executor.shapes) < 20
    assert rates.prefill_ms_per_token == pytest.approx(MODEL.prefill_ms_per_token, rel=0.05)


@pytest.mark.parametrize("num_pages", [1, 2, 4, 9])
@pytest.mark.parametrize("recorded", [RECORDED, Recorded((1, 4), 4, (2048, 8192)), None], ids=str)
def test_a_pool_with_little_room_is_warmed_up_as_far_as_it_goes(num_pages: int, recorded: Recorded | None) -> None:
    executor = Recording(MODEL, num_pages, recorded)
    rig = Rig(executor)
    rig.warm_up()
    assert executor.shapes
    assert all(kv.check() == [] for kv in rig.stores)


def test_graphs_for_longer_contexts_are_recorded_too() -> None:
    executor = Recording(replace(MODEL, max_model_len=9000), 1024, Recorded((1, 2), 1, (2048, 8192, 32768)))
    Rig(executor, max_drafts=0).warm_up()
    depths = {(len(starts), starts[0] // 2048) for starts in executor.starts}
    assert {(2, 0), (2, 1), (2, 4), (1, 4)} <= depths


@pytest.mark.parametrize("budget_s", [0.1, 5.0])
def test_it_ends_when_its_time_is_up_and_still_gives_rates_of_warm_steps(budget_s: float) -> None:
    executor, whole = Recording(MODEL, 256), Recording(MODEL, 256)
    rates = Rig(executor, max_drafts=0).warm_up(budget_s)
    Rig(whole, max_drafts=0).warm_up()
    assert executor.now < budget_s + 6.0 < whole.now
    assert rates.prefill_ms_per_token == pytest.approx(MODEL.prefill_ms_per_token, rel=0.05)
    assert rates.decode_step_ms == pytest.approx(MODEL.decode_ms + MODEL.decode_ms_per_sequence)


def test_it_ends_at_once_where_it_is_not_wanted_any_more() -> None:
    rig = Rig(Recording(MODEL, 256))
    rates = warm_up(rig.scope, rig.engine, 1e6, is_wanted=lambda: False)
    assert rig.executor.shapes == []
    assert rates.prefill_ms_per_token == 0


def test_a_kind_of_step_that_fails_is_told_at_once() -> None:
    executor = Recording(MODEL, 256)
    executor.broken_from = 7
    with pytest.raises(Internal, match="no kernel for this"):
        Rig(executor).warm_up()
