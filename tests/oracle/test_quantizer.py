"""A quantized checkpoint is ModelOpt's to the bit, means what the recipe says, and computes as its weights mean."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.engine.models import registry, tiny
from shared.engine.models.api import Placement
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.quantization import fp8_block, nvfp4
from shared.engine.quantizer import job
from shared.engine.quantizer.calibration import Prompts
from shared.engine.quantizer.choice import Modules
from shared.engine.stream import all_logits
from tests.oracle import modelopt, quantized

PROMPT = [token * 37 % 499 for token in range(60)]


class Silent:
    def update(self, n: int, /) -> None: ...


@contextmanager
def silent(_: int) -> Iterator[Silent]:
    yield Silent()


def quantize(source: Path, directory: Path, modules: Modules | None = None) -> dict[str, torch.Tensor]:
    job.run(source, directory, job.Options(modules), progress=silent)
    return tensors(directory)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    modelopt.write(tmp_path / "source")
    return tmp_path / "source"


def test_every_tensor_is_modelopts_to_the_bit(golden: Path, tmp_path: Path) -> None:
    made = quantize(golden, tmp_path / "made")
    theirs = {name: tensor for name, tensor in modelopt.result().items() if not name.endswith("input_scale")}
    assert made.keys() == theirs.keys()
    assert [name for name in made if bits(made[name]) != bits(theirs[name])] == []


def test_scales_of_activations_are_modelopts_but_for_its_bfloat16(golden: Path, tmp_path: Path) -> None:
    prompts = Prompts(golden, (tuple(modelopt.PROMPT),))
    options = job.Options(prompts=prompts.identity)
    job.run(golden, tmp_path / "made", options, progress=silent, calibrate=prompts.measure)
    made, theirs = tensors(tmp_path / "made"), modelopt.result()
    assert made.keys() == theirs.keys()
    for name in (name for name in theirs if name.endswith("input_scale")):
        torch.testing.assert_close(made[name], theirs[name], rtol=0.02, atol=0)
    algorithm = json.loads((tmp_path / "made" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]
    assert algorithm == "NVFP4"


# The recipe again, stated otherwise: every value that a format has is tried, and the nearest taken.
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy().astype(np.float64)
E2M1 = np.array(nvfp4.MAGNITUDES)


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the nearest in a rising grid, the even one of two that are equally near."""
    distance = np.abs(values[..., None].astype(np.float64) - grid)
    best = distance.min(-1, keepdims=True)
    index = np.arange(len(grid))
    found: np.ndarray = np.where(distance == best, index + (index % 2) * 1000, 10_000).min(-1) % 1000
    return found


def recipe(weight: np.ndarray, amax: np.float32) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes [N, K], scales [N, K / 16] as e4m3 bytes, and the matrix's scale, of float32 weights."""
    scale_2 = amax / np.float32(6 * 448)
    blocks = weight.reshape(len(weight), -1, 16)
    wanted = np.abs(blocks).max(-1) / (np.float32(6) * scale_2)
    wanted = np.where(wanted == 0, np.float32(1), wanted)
    scale = np.maximum(nearest(wanted, E4M3), 1)  # never zero: the smallest subnormal is 2^-9
    scaled = blocks / (E4M3[scale].astype(np.float32) * scale_2)[..., None]
    codes = nearest(np.abs(scaled), E2M1) + 8 * (scaled < 0)
    return codes.reshape(weight.shape), scale, scale_2


def test_codes_and_scales_are_the_nearest_there_are() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 64) * torch.logspace(-6, 0, 40)[:, None]
    weight[3], weight[5, ::2] = 0, -0.0
    # Ties, from both sides: scale 1 exactly, since the block's largest is 6 and the matrix's 6 * 448.
    weight[0, :16] = torch.tensor(
        [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 0]
    )
    weight[1, 0] = 6 * 448
    made = nvfp4.quantize(weight)
    codes, scale, scale_2 = recipe(weight.numpy(), np.float32(6 * 448))
    assert made.scale_2.item() == scale_2
    assert made.scale.view(torch.uint8).numpy().tolist() == scale.tolist()
    assert nvfp4.unpack(made.codes).numpy().tolist() == codes.tolist()


@pytest.mark.parametrize("modules", Modules)
def test_logits_are_those_of_the_dequantized_weights(modules: Modules, tmp_path: Path) -> None:
    tiny.write("glm-5.2-even", tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "made", modules)
    dequantize(tmp_path / "made", tmp_path / "meant")
    found = logits(tmp_path / "made")
    assert torch.equal(found, logits(tmp_path / "meant"))
    assert not torch.equal(found, logits(tmp_path / "source"))


def dequantize(quantized_dir: Path, meant_dir: Path) -> None:
    """A plain checkpoint of the weights that a quantized one means."""
    checkpoint = Checkpoint(quantized_dir, torch.float32)
    meant_dir.mkdir()
    save_file({name: checkpoint.read(name) for name in checkpoint.inventory.names()}, meant_dir / "model.safetensors")
    fields = json.loads((quantized_dir / "config.json").read_text())
    del fields["quantization_config"]
    (meant_dir / "config.json").write_text(json.dumps(fields))


def logits(path: Path) -> torch.Tensor:
    return all_logits(registry.load(path, Placement(torch.float32, 1, "torch")), PROMPT)


def test_a_source_in_fp8_is_dequantized_first(tmp_path: Path) -> None:
    """Ragged blocks and all; what is not quantized again is left in bfloat16."""
    tiny.write("glm-5.2-even", tmp_path / "plain")
    quantized.write(tmp_path / "plain", "fp8", tmp_path / "fp8", tmp_path / "meant")
    made, source = quantize(tmp_path / "fp8", tmp_path / "made"), load_file(tmp_path / "fp8" / "model.safetensors")

    def read(linear: str) -> torch.Tensor:
        return fp8_block.dequantize(source[f"{linear}.weight"], source[f"{linear}.weight_scale_inv"])

    expert = "model.layers.3.mlp.experts.1."
    scale_2 = nvfp4.matrix_scale(read(expert + "gate_proj"), read(expert + "up_proj"))
    expected = nvfp4.quantize(read(expert + "up_proj"), scale_2)
    assert bits(made[expert + "up_proj.weight"]) == bits(expected.codes)
    assert bits(made[expert + "up_proj.weight_scale"]) == bits(expected.scale)
    assert bits(made[expert + "up_proj.weight_scale_2"]) == bits(expected.scale_2)
    attention = "model.layers.3.self_attn.o_proj"
    assert bits(made[attention + ".weight"]) == bits(read(attention))
    assert not any(name.endswith("weight_scale_inv") for name in made)


def test_a_source_in_fp8_keeps_what_is_not_quantized_if_asked(tmp_path: Path) -> None:
    """Weights and scales to the bit; the configuration says which layers have which form, and what is read is what they
    mean."""
    tiny.write("glm-5.2-even", tmp_path / "plain")
    quantized.write(tmp_path / "plain", "fp8", tmp_path / "fp8", tmp_path / "meant")
    job.run(tmp_path / "fp8", tmp_path / "made", job.Options(keep_fp8=True), progress=silent)
    made, source = tensors(tmp_path / "made"), load_file(tmp_path / "fp8" / "model.safetensors")
    experts = {name.rpartition(".")[0] for name in made if name.endswith("weight_scale_2")}
    assert all(".mlp.experts." in name for name in experts)
    others = [name for name in made if name.rpartition(".")[0] not in experts]
    assert [name for name in others if bits(made[name]) != bits(source[name])] == []
    assert "model.layers.3.self_attn.o_proj.weight_scale_inv" in made
    for about in (
        json.loads((tmp_path / "made" / "hf_quant_config.json").read_text())["quantization"],
        json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"],
    ):
        assert about["quant_algo"] == "MIXED_PRECISION"
        layers = about["quantized_layers"]
        assert layers["model.layers.3.mlp.experts"] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        assert layers["model.layers.3.self_attn.o_proj"] == {"quant_algo": "FP8_PB_WO", "group_size": 128}
    dequantize(tmp_path / "made", tmp_path / "dequantized")
    assert torch.equal(logits(tmp_path / "made"), logits(tmp_path / "dequantized"))


def test_an_expert_that_saw_no_token_gets_the_scale_of_its_like(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.write("glm-5.2-even", tmp_path / "source")
    names = [f"model.layers.3.mlp.experts.{expert}.down_proj.weight" for expert in range(8)]
    scales = Prompts(tmp_path / "source", ((7,),)).measure(names)
    assert len(set(scales.values())) == 2  # two experts saw the token, the other six have the larger one's
    assert sorted(scales.values()).count(max(scales.values())) == 7
    assert "6 of 8 layers saw no token" in caplog.text
