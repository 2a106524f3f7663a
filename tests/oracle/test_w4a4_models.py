"""Whole models with products in FP4: each product's input is quantized by the checkpoint's scale, and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from shared.engine.executor import load_executor
from shared.engine.models import registry, tiny
from shared.engine.models.api import Model, Placement
from shared.engine.quantization import w4a4
from shared.engine.stream import all_logits
from shared.errors import Unsupported
from tests.oracle import quantized, tiny_models

PROMPT = [token * 37 % 199 + 3 for token in range(40)]
INPUT_SCALE = torch.tensor(0.01)  # of every matrix that `quantized` writes
FP4 = ("modelopt", "compressed-tensors")


class QuantizedInputs(TorchFunctionMode):
    """Rounds what is multiplied with some matrices to what NVFP4 can say."""

    def __init__(self, wanted: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self._wanted, self.num_products = wanted, 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and self._wanted(args[1]):
            self.num_products += 1
            args = (w4a4.values(*w4a4.quantize(args[0], 1 / INPUT_SCALE)) * INPUT_SCALE, *args[1:])
        return function(*args, **(kwargs or {}))


def load(path: Path, kernels: str) -> Model:
    return registry.load(path, Placement(torch.float32, 1, kernels))


def written(write: Callable[[Path], object], method: str, tmp_path: Path) -> tuple[Path, Path]:
    """A quantized checkpoint, and a plain one of the weights that it means. All matrices have the same largest element:
    what is computed together has one scale, as quantizers see to."""
    write(tmp_path / "plain")
    file, largest = tmp_path / "plain" / "model.safetensors", 0.375
    weights = {name: tensor.clamp(-largest, largest) for name, tensor in load_file(file).items() if tensor.ndim == 2}
    for matrix in weights.values():
        matrix[0, 0] = largest
    save_file(load_file(file) | weights, file)
    quantized.write(tmp_path / "plain", method, tmp_path / "quantized", tmp_path / "meant")
    return tmp_path / "quantized", tmp_path / "meant"


@pytest.mark.parametrize("method", FP4)
@pytest.mark.parametrize("variant", ["llama", "llama-biases", "qwen3"])
def test_a_dense_model(variant: str, method: str, tmp_path: Path) -> None:
    """All matrices but `down`, whose rows of 112 the kernels do not divide, and the head, which is not quantized."""
    made, meant = written(lambda path: tiny_models.write(variant, path), method, tmp_path)
    inputs = QuantizedInputs(lambda matrix: matrix.shape[1] % 32 == 0 and matrix.shape != (211, 96))
    with inputs:
        expected = all_logits(load(meant, "torch"), PROMPT)
    assert inputs.num_products == 3 * 3
    found = all_logits(load(made, "w4a4"), PROMPT)
    _is_same(found, expected)
    assert (found - all_logits(load(made, "torch"), PROMPT)).abs().amax() > 0.1, "quantized inputs are felt"


def test_the_routed_experts_of_a_mixture(tmp_path: Path) -> None:
    """Of few tokens: where tokens are selected, or experts chosen, by a hair, a model soon says something else."""
    prompt = PROMPT[:8]
    made, meant = written(lambda path: tiny.write("glm-5.2-tiles", path), "modelopt", tmp_path)
    inputs = QuantizedInputs(lambda matrix: matrix._base is not None)  # one of many that are stacked
    with inputs:
        expected = all_logits(load(meant, "torch"), prompt)
    assert inputs.num_products >= 4 * 2 * 2, "four layers, of whose experts two at least have been chosen"
    found = all_logits(load(made, "w4a4"), prompt)
    _is_same(found, expected)
    assert (found - all_logits(load(made, "torch"), prompt)).abs().amax() > 0.1, "quantized inputs are felt"


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums are taken in other orders, and where that moves an input over the border of two codes its product differs:
    so nearly all logits are equal to the rounding, and none is far off."""
    errors = (found - expected).abs() / expected.std()
    assert errors.median() < 1e-4
    assert errors.mean() < 0.02


@pytest.mark.parametrize("write", [partial(tiny_models.write, "llama"), partial(tiny.write, "glm-5.2-tiles")])
def test_pages_are_not_exchanged_with_those_who_do_not_round_activations(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    made, _ = written(write, "modelopt", tmp_path)
    rounding, torchs, best = (compatibility(made, kernels) for kernels in ("w4a4", "torch", "auto"))
    assert rounding != torchs
    assert torchs == best


def compatibility(path: Path, kernels: str) -> str:
    made = load_executor(
        path, model_name="m", dtype="float32", page_size=16, num_threads=1, num_pages=1, kernels=kernels
    )
    return made.spec.compatibility_hash


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_a_checkpoint_without_scales_of_activations_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    made, meant = written(lambda path: tiny_models.write("llama", path), "fp8", tmp_path)
    with pytest.raises(Unsupported, match=r"w4a4: no weights of this checkpoint are in NVFP4 .* --calibrate"):
        load(meant if kind == "plain" else made, "w4a4")


def test_on_the_cpu_the_twin_serves_only_who_asks_for_it(tmp_path: Path) -> None:
    made, _ = written(lambda path: tiny_models.write("llama", path), "modelopt", tmp_path)
    as_asked, as_ever = (all_logits(load(made, kernels), PROMPT) for kernels in ("auto", "torch"))
    torch.testing.assert_close(as_asked, as_ever, rtol=1e-3, atol=1e-3)
