"""What is easily got wrong about GLM-5, 5.1 and 5.2, and no comparison of small float32 models would show."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.engine.api import EngineRequest, FinishReason, SamplingParams, TokensSampled
from shared.engine.engine import Engine
from shared.engine.kv.store import KvStore
from shared.engine.layers import rope
from shared.engine.layers.moe import route
from shared.engine.models import glm_config, tiny
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.glm_weights import GlmWeights, MoeWeights
from shared.engine.parallel.partition import Shard
from tests.oracle import driver, quantized
from tests.oracle.test_glm import GOLDEN_PROMPT
from tests.oracle.test_glm_mtp import load, prompt_item, step


@pytest.mark.parametrize("head_dim", [64, 192, 999])
def test_head_dim_says_nothing(head_dim: int) -> None:
    """Each release has another, and none is what the name says."""
    assert glm_config.parse({**tiny.GLM_52, "head_dim": head_dim}) == glm_config.parse(tiny.GLM_52)


def test_a_list_of_selecting_layers_wins_over_a_pattern_and_that_over_a_frequency() -> None:
    types, pattern = ["full", "full", *["shared"] * 5], "FSFSFSF"
    fields: dict[str, Any] = dict(tiny.GLM_52)
    by_frequency = glm_config.parse(fields).full_layers
    by_pattern = glm_config.parse(fields | {"index_topk_pattern": pattern}).full_layers
    by_types = glm_config.parse(fields | {"index_topk_pattern": pattern, "indexer_types": types}).full_layers
    assert by_frequency == (True, True, True, False, False, False, True)
    assert by_pattern == (True, False) * 3 + (True,)
    assert by_types == (True, True) + (False,) * 5


@pytest.mark.parametrize("last", [1_048_575, 202_751, 1])
def test_angles_are_right_up_to_a_million_positions(last: int) -> None:
    """In float32: one position more is one turn more of the first pair. bfloat16 would take 4,096 of them for one."""
    frequencies = rope.frequencies(64, 8e6)
    cos, sin = rope.table(frequencies, torch.tensor([last - 1, last], dtype=torch.int32))
    assert cos.dtype == torch.float32
    exact = torch.tensor([[last - 1.0], [last]], dtype=torch.float64) * frequencies.double()
    # The product's rounding: half a unit in the last place of an angle of a million.
    torch.testing.assert_close(cos.double(), exact.cos(), atol=2**-5 + 1e-6, rtol=0)
    torch.testing.assert_close(sin.double(), exact.sin(), atol=2**-5 + 1e-6, rtol=0)
    torch.testing.assert_close(cos[:, 0].double(), exact[:, 0].cos(), atol=1e-6, rtol=0)


def test_the_correction_bias_stays_in_float32_when_the_weights_do_not(tmp_path: Path) -> None:
    """Its spread around an offset may be less than bfloat16 can tell apart."""
    tiny.write("glm-5.2", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.3.mlp.gate.e_score_correction_bias"
    bias = 8 + torch.arange(8) / 1024
    save_file(load_file(file) | {name: bias}, file)
    config = glm_config.read(tmp_path)
    weights = GlmWeights(Checkpoint(tmp_path, torch.bfloat16), config, Shard(), mtp=False).mlp(3)
    assert isinstance(weights, MoeWeights)
    assert weights.experts.gate_up.dtype == torch.bfloat16
    assert (weights.router.dtype, weights.correction_bias.dtype) == (torch.float32, torch.float32)
    assert torch.equal(weights.correction_bias, bias)
    equal = torch.zeros(1, 8)
    assert sorted(route(equal, weights.correction_bias, config)[1][0].tolist()) == [6, 7]
    rounded = bias.bfloat16().float()
    assert len(set(rounded.tolist())) < len(bias)  # or else nothing would be shown


@pytest.mark.parametrize("stop", [500, 507, 509])
def test_each_of_three_tokens_ends_an_output(stop: int, tmp_path: Path) -> None:
    tiny.write("glm-5.2", tmp_path)
    executor = driver.load(tmp_path)
    engine = Engine(executor, KvStore(64, 16, 10_000), max_step_tokens=64, max_num_sequences=4)
    sampling = SamplingParams(max_tokens=9, min_tokens=3, logit_bias=((stop, 1000.0),))
    engine.submit(EngineRequest("r", (5, 6, 7), sampling))
    sampled = []
    while engine.has_work():
        sampled += [event for event in engine.step() if isinstance(event, TokensSampled)]
    assert (sampled[-1].finish_reason, sampled[-1].stop_token_id) == (FinishReason.STOP, stop)
    assert sum(len(event.tokens) for event in sampled) == 3


@pytest.mark.parametrize("method", quantized.METHODS)
def test_a_drafting_layer_that_was_left_as_it_was_drafts_for_a_quantized_model(method: str, tmp_path: Path) -> None:
    """As in NVIDIA's NVFP4 checkpoints: the routed experts of the model are quantized, and nothing else."""
    tiny.write("glm-5.2", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    stored, meant = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in plain.items():
        stored[name] = meant[name] = tensor
        if ".experts." in name and ".layers.7." not in name and tensor.shape[1] % 16 == 0:
            parts, meant[name] = quantized.METHODS[method](tensor)
            del stored[name]
            stored |= {f"{name.removesuffix('.weight')}.{suffix}": part for suffix, part in parts.items()}
    fields: dict[str, Any] = json.loads((tmp_path / "plain" / "config.json").read_text())
    found = {}
    for kind, tensors in (("stored", stored), ("meant", meant)):
        (tmp_path / kind).mkdir()
        extra = {"quantization_config": {"quant_method": method}} if kind == "stored" else {}
        (tmp_path / kind / "config.json").write_text(json.dumps(fields | extra))
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / kind / "model.safetensors"
        )
        item = replace(prompt_item(GOLDEN_PROMPT), num_wanted=5)
        chosen = step(load(tmp_path / kind), item)
        found[kind] = ([token.token_id for token in chosen.tokens], chosen.drafts)
    assert found["stored"] == found["meant"]
    assert len(found["stored"][1]) == 5
