"""The kernel that merges splits beside torch: on the CPU as C++ with a coroutine for each lane, and on a GPU."""

import pytest
import torch

from shared.engine.kernels import build, cuda_latent
from shared.engine.kernels.cuda_latent import CudaLatent
from shared.engine.kernels.splits import Parts
from shared.models.store import default_cache
from tests.oracle.emulated_cuda import compiled

LATENT, VALUE = 512, 256
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def require(kernels: CudaLatent, num_tokens: int, heads: int, splits: int, device: torch.device) -> None:
    """That splits are merged by their log-sum-exp; those that nothing fell to have whatever was in memory."""
    torch.manual_seed(num_tokens)
    means = torch.randn(num_tokens, heads, splits, LATENT, device=device)
    maxima, sums = torch.randn(num_tokens, heads, splits, device=device) * 4, torch.rand_like(means[..., 0]) + 1
    up_value = (torch.randn(heads, VALUE, LATENT, device=device) * LATENT**-0.5).bfloat16()
    assert cuda_latent.suits(up_value)
    empty = torch.arange(splits, device=device) >= torch.randint(1, splits + 1, (num_tokens, 1, 1), device=device)
    maxima, sums = torch.where(empty, -torch.inf, maxima), torch.where(empty, 0.0, sums)
    weights = torch.exp2(maxima - maxima.amax(-1, keepdim=True))
    total = (weights * sums).sum(-1, keepdim=True)
    mean = ((means * weights[..., None]).sum(2) / total).bfloat16().float()
    expected = torch.einsum("thc,hvc->thv", mean, up_value.float()).flatten(1)
    means = torch.where(empty[..., None], torch.nan, means)
    found = kernels.merge(Parts(means, maxima, sums), up_value).float()
    assert float((found - expected).norm() / expected.norm()) < 0.005


def test_splits_are_merged_as_torch_merges_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    emulated = CudaLatent(cuda_latent.load(compiled("latent.cu", tmp_path_factory.mktemp("cuda"))))
    for num_tokens, heads, splits in ((1, 2, 64), (2, 1, 4)):
        require(emulated, num_tokens, heads, splits, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_splits_are_merged_as_torch_merges_them() -> None:
    capability = torch.cuda.get_device_capability()
    path = build.cuda_library(default_cache() / "kernels", build.cuda_compiler(), capability, "glm")
    kernels = CudaLatent(cuda_latent.load(path))
    for num_tokens, heads, splits in ((1, 8, 64), (4, 8, 64), (16, 8, 16), (3, 64, 1)):
        require(kernels, num_tokens, heads, splits, GPU)
