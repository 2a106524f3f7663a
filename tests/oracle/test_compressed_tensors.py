"""NVFP4 between us and the library of vLLM's and llm-compressor's checkpoints: it converts what `forebay quantize`
makes, both sides read the same weights in the result, and what it quantizes itself we read as it does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.engine.models.checkpoint import Checkpoint
from shared.engine.quantizer import job
from shared.engine.quantizer.calibration import Prompts
from tests.oracle import tiny_models
from tests.oracle.test_quantizer import silent


@pytest.fixture(scope="module")
def library() -> Any:
    from tests.oracle import nvfp4_library

    return nvfp4_library


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, library: Any) -> tuple[Path, Path]:
    """What we made of a tiny model, and what the library made of that."""
    path = tmp_path_factory.mktemp("converted")
    tiny_models.write("llama", path / "source")
    prompts = Prompts(path / "source", (tuple(range(5, 40)),))
    job.run(path / "source", path / "made", job.Options(), progress=silent, calibrate=prompts.measure)
    ignored = json.loads((path / "made" / "config.json").read_text())["quantization_config"]["ignore"]
    library.convert(path / "made", path / "converted", ignored)
    (file,) = (path / "converted").glob("*.safetensors")
    file.rename(path / "converted" / "model.safetensors")
    (path / "converted" / "model.safetensors.index.json").unlink(missing_ok=True)
    return path / "made", path / "converted"


def test_the_library_converts_what_we_made_and_means_the_same_weights(
    directories: tuple[Path, Path], library: Any
) -> None:
    made, converted = directories
    ours, again = (Checkpoint(path, torch.float32) for path in (made, converted))
    decompressed = library.weights(converted)
    assert len(decompressed) == 3 * 7
    for name, weight in decompressed.items():
        torch.testing.assert_close(ours.read(name), weight, rtol=1e-6, atol=0)
        torch.testing.assert_close(again.read(name), weight, rtol=1e-6, atol=0)
        scale, converted_scale = ours.input_scale(name), again.input_scale(name)
        assert scale is not None
        assert converted_scale is not None
        torch.testing.assert_close(converted_scale, scale, rtol=1e-6, atol=0)


def test_what_the_library_quantized_is_read_as_it_reads_it(tmp_path: Path, library: Any) -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(3))
    stored = library.quantized(weight)
    save_file({f"q_proj.{name}": part.contiguous() for name, part in stored.items()}, tmp_path / "model.safetensors")
    (expected,) = library.weights(tmp_path).values()
    found = Checkpoint(tmp_path, torch.float32).read("q_proj.weight")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (found - weight).norm() / weight.norm() < 0.12
