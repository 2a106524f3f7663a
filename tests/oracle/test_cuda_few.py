"""The kernel of a few tokens' mixture beside torch: on the CPU, with a coroutine for each lane, and on a GPU."""

import pytest
import torch

from shared.engine.kernels import build, cuda_few
from shared.engine.kernels.cuda_few import CudaFew
from shared.models.store import default_cache
from tests.oracle.emulated_cuda import compiled
from tests.oracle.test_cuda_experts import CPU, FACTOR, GPU, Layer, seeded


@pytest.fixture(scope="module")
def emulated() -> CudaFew:
    return CudaFew(cuda_few.load(compiled("few.cu")), CPU)


def require(layer: Layer, kernels: CudaFew, num_tokens: int, seed: int, scale: float = 1.0) -> None:
    """That a mixture of random tokens is right, and on a GPU the same when it is computed again."""
    num_experts = len(layer.bias)
    x = seeded(seed, num_tokens, layer.hidden, scale=scale, device=layer.device).half()
    logits = seeded(seed + 1, num_tokens, num_experts, device=layer.device).float()
    wide = torch.cat((torch.full_like(logits, 9.0), logits), dim=1)[:, num_experts:]
    found = kernels(x, wide, layer.bias, FACTOR, layer.experts, layer.shared, normalize=True)
    expected = layer.expected(x, logits)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.005
    if layer.device == GPU:  # where blocks are in no order
        assert torch.equal(found, kernels(x, wide, layer.bias, FACTOR, layer.experts, layer.shared, normalize=True))


def test_mixtures_one_after_the_other_are_those_of_torch(emulated: CudaFew) -> None:
    layer = Layer(33, 8, 2048)
    assert cuda_few.suits(layer.experts, layer.shared, 8)
    require(layer, emulated, 1, 0)
    require(layer, emulated, 1, 2)


def test_a_mixture_of_wider_experts_is_that_of_torch(emulated: CudaFew) -> None:
    layer = Layer(33, 8, 2048, inner=512)
    assert cuda_few.suits(layer.experts, layer.shared, 8)
    require(layer, emulated, 2, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("num_experts", "hidden", "inner"), [(100, 6144, 256), (256, 2048, 256), (60, 6144, 512), (256, 2048, 512)]
)
def test_on_a_gpu_mixtures_of_all_numbers_of_tokens_are_right(num_experts: int, hidden: int, inner: int) -> None:
    path = build.cuda_library(
        default_cache() / "kernels", build.cuda_compiler(), torch.cuda.get_device_capability(), "glm"
    )
    layer, kernels = Layer(num_experts, 8, hidden, GPU, inner), CudaFew(cuda_few.load(path), GPU)
    assert cuda_few.suits(layer.experts, layer.shared, 8)
    for seed, num_tokens in enumerate((1, 2, 3, 4, 4, 3, 1)):
        require(layer, kernels, num_tokens, 2 * seed, 1.0 + 100 * (seed % 3))
