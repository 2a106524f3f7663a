"""Matrices that stay packed are those that the checkpoint means, whoever wrote it; others come as they always do."""

from pathlib import Path

import pytest
import torch

from shared.engine.kernels import w4a16
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.config import read
from shared.engine.models.weights import DenseWeights
from shared.engine.parallel.partition import Part, Shard
from tests.oracle import quantized, tiny_models

MATRICES = ("qkv", "output", "gate_up", "down")


def checkpoint(tmp_path: Path, method: str) -> Path:
    tiny_models.write("llama", tmp_path / "plain")
    quantized.write(tmp_path / "plain", method, tmp_path / "quantized", tmp_path / "meant")
    return tmp_path / "quantized"


def weights(path: Path) -> DenseWeights:
    return DenseWeights(Checkpoint(path, torch.float32), read(path), Shard())


@pytest.mark.parametrize(("method", "is_packed"), [("modelopt", True), ("compressed-tensors", True), ("fp8", False)])
def test_packed_layers_mean_what_plain_ones_do(method: str, is_packed: bool, tmp_path: Path) -> None:
    made = weights(checkpoint(tmp_path, method))
    packed, plain = made.packed_layer(1), made.layer(1)
    for name in MATRICES:
        found, expected = getattr(packed, name), getattr(plain, name)
        assert isinstance(found, w4a16.PackedWeight) == is_packed, name
        dense = w4a16.unpack(found)[0] if isinstance(found, w4a16.PackedWeight) else found
        torch.testing.assert_close(dense, expected, rtol=1e-6, atol=0)
    assert torch.equal(packed.input_norm, plain.input_norm)


def test_a_head_that_is_not_quantized_stays_as_it_is(tmp_path: Path) -> None:
    made = weights(checkpoint(tmp_path, "modelopt"))
    head = made.packed_head()
    assert isinstance(head, torch.Tensor)
    assert torch.equal(head, made.head())


@pytest.mark.parametrize(("dim", "start", "length"), [(0, 8, 16), (1, 16, 32)])
def test_a_part_of_a_matrix_stays_packed(dim: int, start: int, length: int, tmp_path: Path) -> None:
    found = Checkpoint(checkpoint(tmp_path, "modelopt"), torch.float32)
    name, part = "model.layers.0.mlp.down_proj.weight", Part(dim, start, length)
    tensor = found.nvfp4(name, part)
    assert tensor is not None
    dense = w4a16.unpack(w4a16.pack(tensor.codes, tensor.scale, tensor.scale_2))[0]
    torch.testing.assert_close(dense, found.read(name, part=part), rtol=1e-6, atol=0)


def test_a_part_that_cuts_a_group_is_not_packed(tmp_path: Path) -> None:
    found = Checkpoint(checkpoint(tmp_path, "modelopt"), torch.float32)
    assert found.nvfp4("model.layers.0.mlp.down_proj.weight", Part(1, 8, 16)) is None
