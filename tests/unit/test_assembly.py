"""A worker's configuration reaches its engine."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.engine.api import EngineRequest, SamplingParams, TokensSampled
from shared.engine.engine import Engine
from shared.engine.models import tiny
from shared.worker.assembly import assemble
from shared.worker.config import WorkerConfig

# Drafts are proposed whatever they cost here.
FIELDS = {"dtype": "float32", "num_threads": 1, "adaptive_drafts": False}
FEW_TOKENS = tuple((token_id, 200.0) for token_id in (5, 6, 7))


def tokens(engine: Engine, temperature: float) -> list[int]:
    """What a drafted request gets."""
    sampling = SamplingParams(temperature, max_tokens=16, ignore_eos=True, logit_bias=FEW_TOKENS)
    engine.submit(EngineRequest("r", (7, 8, 9), sampling))
    events = []
    while engine.has_work():
        events += [event for event in engine.step() if isinstance(event, TokensSampled)]
    assert sum(event.num_drafts for event in events) > 0
    return [token.token_id for event in events for token in event.tokens]


def test_the_way_to_verify_drafts_changes_which_tokens_are_drawn_and_no_greedy_one(tmp_path: Path) -> None:
    tiny.write("glm-5.2", tmp_path / "glm")
    found = {}
    for verification in ("coupled", "rejection"):
        fields = FIELDS | {"model": str(tmp_path / "glm"), "num_pages": 8}
        engine = assemble(WorkerConfig.model_validate(fields | {"verification": verification})).engine
        found[verification] = [tokens(engine, temperature) for temperature in (0.0, 2.0)]
    (greedy, sampled), (greedy_too, others) = found["coupled"], found["rejection"]
    assert greedy == greedy_too
    assert sampled != others


def test_a_worker_knows_its_rates_from_the_start_and_has_all_its_pages(tmp_path: Path) -> None:
    tiny.write("glm-5.2", tmp_path)
    fields = FIELDS | {"model": str(tmp_path), "num_pages": 64}
    warm, cold, other = (
        assemble(WorkerConfig.model_validate(fields | more), generates=generates).engine
        for more, generates in (({}, True), ({"warm_up_s": 0}, True), ({}, False))
    )
    assert warm.load().prefill_ms_per_token > 0
    assert warm.load().decode_step_ms > 0
    assert (warm.load().num_steps, warm.kv.counts().free) == (0, 64)
    assert cold.load().prefill_ms_per_token == cold.load().decode_step_ms == 0
    assert other.load().prefill_ms_per_token > 0 == other.load().decode_step_ms
    assert tokens(warm, 0.0) == tokens(cold, 0.0)


def test_there_is_no_third_way() -> None:
    with pytest.raises(ValidationError, match="verification"):
        WorkerConfig.model_validate({"verification": "typical"})
