"""NVFP4 between us and the library of vLLM's and llm-compressor's checkpoints: it converts what `forebay quantize`
makes, both sides read the same weights in the result, and what it quantizes itself we read as it does."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import NVFP4
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

from shared.engine.models.checkpoint import Checkpoint
from shared.engine.quantizer import job
from shared.engine.quantizer.calibration import Prompts
from tests.oracle import tiny_models
from tests.oracle.test_quantizer import silent

TARGET = r"re:.*_proj$"
SCHEME = QuantizationScheme(**NVFP4, targets=[TARGET], format="nvfp4-pack-quantized")


def theirs(model_dir: Path) -> dict[str, torch.Tensor]:
    """The weights of every packed linear, float32, as the library unpacks and scales them."""
    stored, found = load_file(model_dir / "model.safetensors"), dict[str, torch.Tensor]()
    for name, packed in stored.items():
        linear, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
            scale, factor = (stored[f"{linear}.{part}"].float() for part in ("weight_scale", "weight_global_scale"))
            found[f"{linear}.weight"] = dequantize(codes, scale, args=SCHEME.weights, global_scale=factor)
    return found


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What we made of a tiny model, and what the library made of that."""
    path = tmp_path_factory.mktemp("converted")
    tiny_models.write("llama", path / "source")
    prompts = Prompts(path / "source", (tuple(range(5, 40)),))
    job.run(path / "source", path / "made", job.Options(), progress=silent, calibrate=prompts.measure)
    ignored = json.loads((path / "made" / "config.json").read_text())["quantization_config"]["ignore"]
    converter = ModelOptNvfp4Converter(ignore=ignored, targets=[TARGET])
    convert_checkpoint(path / "made", path / "converted", converter, max_workers=1, device="cpu")
    (file,) = (path / "converted").glob("*.safetensors")
    file.rename(path / "converted" / "model.safetensors")
    (path / "converted" / "model.safetensors.index.json").unlink(missing_ok=True)
    return path / "made", path / "converted"


def test_the_library_converts_what_we_made_and_means_the_same_weights(directories: tuple[Path, Path]) -> None:
    made, converted = directories
    ours, again = (Checkpoint(path, torch.float32) for path in (made, converted))
    decompressed = theirs(converted)
    assert len(decompressed) == 3 * 7
    for name, weight in decompressed.items():
        torch.testing.assert_close(ours.read(name), weight, rtol=1e-6, atol=0)
        torch.testing.assert_close(again.read(name), weight, rtol=1e-6, atol=0)
        scale, converted_scale = ours.input_scale(name), again.input_scale(name)
        assert scale is not None
        assert converted_scale is not None
        torch.testing.assert_close(converted_scale, scale, rtol=1e-6, atol=0)


def test_what_the_library_quantized_is_read_as_it_reads_it(tmp_path: Path) -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    groups = weight.unflatten(-1, (-1, 16))
    global_scale = generate_gparam(weight.min(), weight.max())
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), SCHEME.weights, global_scale=global_scale)
    parts = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    stored = NVFP4PackedCompressor.compress(parts, SCHEME)
    save_file({f"q_proj.{name}": part.contiguous() for name, part in stored.items()}, tmp_path / "model.safetensors")
    (expected,) = theirs(tmp_path).values()
    found = Checkpoint(tmp_path, torch.float32).read("q_proj.weight")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (found - weight).norm() / weight.norm() < 0.12
