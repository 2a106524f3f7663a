"""Models from FP8 and NVFP4 checkpoints compute with exactly the weights that the checkpoint means."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.engine.models import registry, tiny
from shared.engine.models.api import Placement
from shared.engine.stream import all_logits
from shared.errors import Unsupported
from tests.oracle import quantized, tiny_models

PROMPT = [token * 37 % 199 + 3 for token in range(60)]
SOURCES: dict[str, Callable[[Path], object]] = {
    "glm-5.2": lambda path: tiny.write("glm-5.2", path),
    "llama": lambda path: tiny_models.write("llama", path),
}


def logits(path: Path) -> torch.Tensor:
    return all_logits(registry.load(path, Placement(torch.float32, 1, "torch")), PROMPT)


@pytest.mark.parametrize("method", quantized.METHODS)
@pytest.mark.parametrize("source", SOURCES)
def test_logits_are_those_of_the_dequantized_weights(source: str, method: str, tmp_path: Path) -> None:
    SOURCES[source](tmp_path / "plain")
    quantized.write(tmp_path / "plain", method, tmp_path / "quantized", tmp_path / "meant")
    found = logits(tmp_path / "quantized")
    assert torch.equal(found, logits(tmp_path / "meant"))
    assert not torch.equal(found, logits(tmp_path / "plain"))


def test_a_scale_that_does_not_fit_is_named(tmp_path: Path) -> None:
    SOURCES["llama"](tmp_path / "plain")
    quantized.write(tmp_path / "plain", "fp8", tmp_path / "quantized", tmp_path / "meant")
    file = tmp_path / "quantized" / "model.safetensors"
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    save_file(load_file(file) | {name: torch.ones(7, 7)}, file)
    with pytest.raises(Unsupported, match=r"model\.layers\.0\.mlp\.down_proj"):
        logits(tmp_path / "quantized")


def test_a_quantized_matrix_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    SOURCES["llama"](tmp_path / "plain")
    quantized.write(tmp_path / "plain", "modelopt", tmp_path / "quantized", tmp_path / "meant")
    config = tmp_path / "quantized" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(Unsupported, match=r"mlp\.down_proj\.weight is \[96, 112\], not \[96, 128\]"):
        logits(tmp_path / "quantized")
