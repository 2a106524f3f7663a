"""What a worker tells routers of itself, beyond what its engine measures."""

import math
from collections.abc import Iterator

import pytest

from shared.engine.meter import LASTS_S
from shared.telemetry import Telemetry
from shared.worker.admission import Admission
from shared.worker.measures import KNOWN_BY_TOKENS, MAX_RATIO, READ_KNOWN_FOR_S, Measures, doubt
from tests.unit.engine_rig import Rig


@pytest.fixture
def measures() -> Iterator[Measures]:
    telemetry = Telemetry("worker", "w")
    yield Measures(telemetry.meter, Rig().engine)
    telemetry.close()


def ratio(measures: Measures) -> float:
    return measures.load(0, 0).prompt_ratio


def test_before_any_prompt_nothing_is_said_of_expectations(measures: Measures) -> None:
    assert ratio(measures) == 0
    measures.computed(0.0, 50.0)  # the router did not say what it expected
    assert ratio(measures) == 0


def test_prompts_count_by_what_was_expected_of_them(measures: Measures) -> None:
    measures.computed(100.0, 200.0)
    measures.computed(300.0, 300.0)
    assert ratio(measures) == pytest.approx(500 / 400, rel=0.02)


def test_one_prompt_that_went_wrong_says_little(measures: Measures) -> None:
    for _ in range(20):
        measures.computed(500.0, 500.0)
    measures.computed(500.0, 1e9)
    assert 1 < ratio(measures) < 1 + MAX_RATIO / 15


def test_a_worker_that_recovers_is_believed_again(measures: Measures) -> None:
    for _ in range(50):
        measures.computed(500.0, 1_500.0)
    for _ in range(100):
        measures.computed(500.0, 500.0)
    assert ratio(measures) == pytest.approx(1, abs=0.05)


def test_rates_of_prompts_are_in_doubt_after_few_tokens_and_after_a_while() -> None:
    telemetry, rig = Telemetry("worker", "w"), Rig()
    measures = Measures(telemetry.meter, rig.engine, lambda: rig.now)
    assert measures.load(0, 0).prefill_doubt == 1
    rig.submit("a", 64)
    rig.finish()
    assert measures.load(0, 0).prefill_doubt == pytest.approx(1 - 64 / KNOWN_BY_TOKENS, abs=1e-3)
    for number in range(10):
        rig.submit(f"more {number}", 128)
        rig.finish()
        known = measures.load(0, 0)
    assert known.prefill_doubt == 0
    rig.now += LASTS_S[0]
    assert measures.load(0, 0).prefill_doubt == pytest.approx(1 - 1 / math.e, abs=1e-3)
    telemetry.close()


@pytest.mark.parametrize(("steady_s", "lasts_s"), [(0.0, LASTS_S[0]), (30.0, 30.0), (1e6, LASTS_S[1])])
def test_rates_of_prompts_are_known_for_as_long_as_they_were_the_same(steady_s: float, lasts_s: float) -> None:
    assert doubt(4_096, lasts_s, steady_s) == pytest.approx(1 - 1 / math.e, abs=1e-3)


def test_a_rate_of_reading_is_forgotten_when_nothing_was_read_for_long() -> None:
    telemetry, now = Telemetry("worker", "w"), [0.0]
    measures = Measures(telemetry.meter, Rig().engine, lambda: now[0])
    assert measures.load(0, 0).transfer_bytes_per_ms == 0
    measures.transferred(1_000, 1.0)
    assert measures.load(0, 0).transfer_bytes_per_ms == pytest.approx(1)
    now[0] += READ_KNOWN_FOR_S
    assert measures.load(0, 0).transfer_bytes_per_ms == 0
    measures.transferred(1_000_000_000, 1.0)
    assert measures.load(0, 0).transfer_bytes_per_ms > 100_000
    telemetry.close()


def test_requests_are_counted_while_inside_and_for_ever() -> None:
    admission = Admission()
    for _ in range(3):
        with admission.request("r"):
            assert admission.num_active == 1
    assert (admission.num_active, admission.num_requests) == (0, 3)
