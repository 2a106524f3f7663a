"""Products in FP4: our layouts and calls against what FlashInfer demands and reads, and the twin against both."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shared.engine.kernels import w4a4
from shared.engine.kernels.flashinfer_w4a4 import FlashInferProducts, capability_obstacle
from shared.engine.quantization import nvfp4, w4a4_proof
from shared.engine.quantization import w4a4 as twin
from shared.engine.quantization.w4a4 import Calibrated, TorchProducts
from tests.oracle import flashinfer_double as double

CPU = torch.device("cpu")


def matrix(rows: int, columns: int, *, scale: float = 1.0, seed: int = 0) -> Calibrated:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale * columns**-0.5
    return Calibrated(nvfp4.quantize(values), torch.tensor(0.0019))


def inputs(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).bfloat16()


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (1, 1), (300, 10), (129, 36)])
def test_scales_lie_where_the_kernels_look_for_them(rows: int, columns: int) -> None:
    scales = torch.randint(1, 255, (2, rows, columns), dtype=torch.uint8)
    made = w4a4.swizzled(scales)
    for one, its in zip(made, scales, strict=True):
        assert torch.equal(double.scale_at(one.flatten(), rows, columns), its)
    assert made.count_nonzero() == scales.numel(), "what fills up is zero"
    assert torch.equal(w4a4.unswizzled(made, rows, columns), scales)


@pytest.mark.parametrize("encode", [1 / 0.0019, 64.0, 3.0])
def test_activations_are_quantized_as_the_kernel_does(encode: float) -> None:
    x = inputs(130, 160)
    x[3, 16:32] = 0  # a group without a largest element
    x[4] *= 1000  # beyond what the scale was measured for: saturates
    x[5] *= 1e-4  # scales that round to zero
    factor = torch.tensor([encode])
    codes, scales = twin.quantize(x, factor)
    expected, swizzled = double.fp4_quantize(x, factor)
    assert torch.equal(w4a4.swizzled(scales.view(torch.uint8)), swizzled)
    seen = (scales.float() > 0).repeat_interleave(8, dim=1)  # behind a scale of zero any code is zero
    assert torch.equal(codes[seen], expected[seen])


def test_an_element_between_two_codes_takes_the_even_one() -> None:
    magnitudes = torch.tensor(
        [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 0]
    )
    codes, scale = twin.quantize(magnitudes[None].bfloat16(), torch.tensor([1.0]))
    assert scale.float().item() == 1
    assert nvfp4.unpack(codes).tolist() == [[7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 0]]


def test_a_product_is_that_of_the_quantized_input_with_the_stored_weight() -> None:
    made = matrix(64, 96)
    weight = twin.joined([made])
    assert weight is not None
    x = inputs(5, 96)
    codes, scale = twin.quantize(x, weight.encode)
    meant = nvfp4.dequantize(nvfp4.Nvfp4Tensor(codes, scale, made.input_scale), torch.float64)
    expected = meant @ nvfp4.dequantize(made.weight, torch.float64).T
    torch.testing.assert_close(twin.Linear(weight)(x).double(), expected, rtol=2**-8, atol=1e-3)
    assert (meant - x.double()).abs().amax() > 0.05, "four bits are felt"


@pytest.mark.parametrize("rows", [1, 130])
@pytest.mark.parametrize("with_bias", [False, True])
def test_flashinfer_is_given_what_the_twin_computes(rows: int, with_bias: bool) -> None:
    parts = [matrix(96, 224, seed=seed) for seed in (1, 2)]
    parts = [Calibrated(parts[0].weight, part.input_scale) for part in parts]
    weight = twin.joined(parts)
    assert weight is not None
    x, bias = inputs(rows, 224), inputs(1, 192)[0] if with_bias else None
    found = FlashInferProducts(double.FUNCTIONS).linear(x, weight, bias)
    torch.testing.assert_close(found, TorchProducts().linear(x, weight, bias), rtol=2**-7, atol=2**-7)


def test_flashinfer_is_given_the_experts_that_the_twin_computes() -> None:
    up_gates = [matrix(2 * 64, 128, scale=1 + seed / 4, seed=seed) for seed in range(4)]
    downs = [matrix(128, 64, seed=10 + seed) for seed in range(4)]
    downs = [Calibrated(each.weight, each.input_scale * (1 + place)) for place, each in enumerate(downs)]
    experts = twin.stacked(up_gates, downs)
    assert experts is not None
    x, weights = inputs(9, 128), torch.rand(9, 2)
    chosen = torch.rand(9, 4).topk(2).indices.int()
    found = FlashInferProducts(double.FUNCTIONS).experts(x, experts, chosen, weights)
    expected = TorchProducts().experts(x, experts, chosen, weights)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.float().abs().amax()))


def test_the_first_half_of_an_expert_is_up_and_the_second_gate() -> None:
    """Where gates are zero so is what comes out, however large up is."""
    up, gate = matrix(64, 128), matrix(64, 128, scale=0.0)
    parts = (up.weight, gate.weight)
    joined = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
    up_gate = nvfp4.Nvfp4Tensor(*joined, up.weight.scale_2)
    experts = twin.stacked([Calibrated(up_gate, up.input_scale)], [matrix(128, 64)])
    assert experts is not None
    arguments = inputs(3, 128), experts, torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    for products in (TorchProducts(), FlashInferProducts(double.FUNCTIONS)):
        assert not products.experts(*arguments).any()


def test_matrices_of_different_scales_are_not_joined() -> None:
    assert twin.joined([matrix(32, 64, scale=1.0), matrix(32, 64, scale=2.0)]) is None


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (64, 48)])
def test_a_matrix_that_the_kernels_do_not_divide_is_left_to_others(rows: int, columns: int) -> None:
    assert twin.joined([matrix(rows, columns)]) is None


def test_the_larger_scale_of_one_input_holds() -> None:
    one = matrix(32, 64)
    weight = twin.joined([one, Calibrated(one.weight, one.input_scale * 2)])
    assert weight is not None
    assert weight.encode.item() == pytest.approx(1 / (2 * 0.0019))
    assert weight.alpha.item() == pytest.approx(2 * 0.0019 * one.weight.scale_2.item())


def test_kernels_that_are_right_may_serve() -> None:
    assert w4a4_proof.obstacle(FlashInferProducts(double.FUNCTIONS), CPU, experts=True) is None


class Mistaken(FlashInferProducts):
    """Reads scales of weights as if they were not swizzled, or swaps gate and up."""

    def __init__(self, which: str) -> None:
        super().__init__(double.FUNCTIONS)
        self._which = which

    def linear(self, x: torch.Tensor, weight: w4a4.Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._which == "scales":
            weight = w4a4.Weight(weight.codes, weight.scales.flip(0), weight.alpha, weight.encode)
        return super().linear(x, weight, bias)

    def experts(
        self, x: torch.Tensor, experts: w4a4.Experts, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if self._which == "broken":
            raise RuntimeError("no kernel image is available")
        return super().experts(x, experts, chosen.flip(1), weights)


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("scales", "a product on this GPU is off"),
        ("order", "a mixture on this GPU is off"),
        ("broken", "no kernel image"),
    ],
)
def test_kernels_that_are_wrong_or_fail_may_not_serve_and_it_is_said_why(which: str, said: str) -> None:
    found = w4a4_proof.obstacle(Mistaken(which), CPU, experts=True)
    assert found is not None
    assert said in found


@pytest.mark.parametrize(
    ("capability", "serves"), [((9, 0), False), ((10, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_only_gpus_with_these_tensor_cores_are_asked(capability: tuple[int, int], serves: bool) -> None:
    assert (capability_obstacle(capability) is None) == serves


def installed(name: str) -> Callable[..., Any]:
    """FlashInfer's own function. Importing it needs no GPU: pip install --no-deps flashinfer-python==0.7.2.post1, and
    apache-tvm-ffi, nvidia-ml-py."""
    flashinfer = pytest.importorskip("flashinfer")
    found: Callable[..., Any] = getattr(flashinfer, name, None) or getattr(flashinfer.fused_moe, name)
    return found


@pytest.mark.parametrize("name", ["fp4_quantize", "mm_fp4", "cutlass_fused_moe"])
def test_the_installed_flashinfer_takes_what_its_double_takes(name: str) -> None:
    """So each of our calls, which the double's signature binds, binds to FlashInfer's too."""
    theirs = inspect.signature(installed(name)).parameters.values()
    ours = inspect.signature(getattr(double, name)).parameters.values()
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    plain = (bool, int, str, type(None), torch.dtype)
    differing = {
        o.name for o, t in zip(ours, theirs, strict=True) if o.default != t.default and type(t.default) in plain
    }
    assert differing == set()
