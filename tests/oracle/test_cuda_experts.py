"""The kernels of a mixture beside torch: on the CPU, compiled as C++ with a coroutine for each lane, and on a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from shared.engine.kernels import build, cuda_experts, reference
from shared.engine.kernels.cuda_experts import CudaExperts
from shared.engine.kernels.experts import Experts, SharedExpert, plain_down, plain_gate_up
from shared.engine.quantization import nvfp4
from shared.engine.quantization.packed_experts import packed
from shared.models.store import default_cache
from tests.oracle.emulated_cuda import compiled

INNER, FACTOR = 256, 2.5
PARTS = ("gate_up", "down", "gate_up_scale", "down_scale", "factors")
QUANTIZED = 4  # experts
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def emulated() -> CudaExperts:
    return CudaExperts(cuda_experts.load(compiled("experts.cu")))


def seeded(seed: int, *shape: int, scale: float = 1.0, device: torch.device = CPU) -> torch.Tensor:
    chance = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=chance, device=device) * scale).bfloat16()


def several(part: torch.Tensor, num_experts: int) -> torch.Tensor:
    """More experts, all different, of a few: their rows in another place, which takes less than to quantize others."""
    return torch.stack([part[i % len(part)].roll(i // len(part), dims=0) for i in range(num_experts)])


class Layer:
    """Random weights, of rows as different in size as quantizing to FP4 must bear."""

    def __init__(
        self, num_experts: int, num_chosen: int, hidden: int, device: torch.device = CPU, inner: int = INNER
    ) -> None:
        random = partial(seeded, device=device)
        spread, made = torch.logspace(-2, 0, 2 * inner, device=device)[:, None], min(num_experts, QUANTIZED)
        gate_up = random(1, made, 2 * inner, hidden, scale=hidden**-0.5) * spread
        down = random(2, made, hidden, inner, scale=inner**-0.5)
        some = packed(*([nvfp4.quantize(one.bfloat16()) for one in part] for part in (gate_up, down)))
        self.experts = Experts(**{name: several(getattr(some, name), num_experts) for name in PARTS})
        gate_up, down = random(3, 2 * inner, hidden, scale=hidden**-0.5), random(4, hidden, inner, scale=inner**-0.5)
        self.shared = SharedExpert(gate_up, down)
        self.bias = random(5, num_experts, scale=0.1).float()
        self.num_chosen, self.hidden, self.device = num_chosen, hidden, device

    def expected(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """float32 [T, hidden]."""
        scores, x = logits.sigmoid(), x.float()
        chosen = (scores + self.bias).topk(self.num_chosen, dim=1).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True) * FACTOR
        used, which = chosen.unique(return_inverse=True)
        own = Experts(**{name: getattr(self.experts, name)[used] for name in PARTS})
        gate_up, down = (part.float() for part in (plain_gate_up(own), plain_down(own)))
        inner = reference.silu_mul(F.linear(x, self.shared.gate_up.float()))
        found = F.linear(inner, self.shared.down.float())
        for token, experts in enumerate(which.tolist()):
            for place, expert in enumerate(experts):
                inner = reference.silu_mul(F.linear(x[token], gate_up[expert]))
                found[token] += weights[token, place] * F.linear(inner, down[expert])
        return found


def require(layer: Layer, kernels: CudaExperts, num_tokens: int, seed: int, scale: float = 1.0) -> None:
    """That a mixture of random tokens is right."""
    num_experts = len(layer.bias)
    x = seeded(seed, num_tokens, layer.hidden, scale=scale, device=layer.device).half()
    logits = seeded(seed + 1, num_tokens, num_experts, device=layer.device).float()
    logits[1::3] = logits[:1]  # tokens that choose the same experts, and so more than eight of one
    wide = torch.cat((torch.full_like(logits, 9.0), logits), dim=1)[:, num_experts:]
    choice = kernels.route(wide, layer.bias, layer.num_chosen, FACTOR, normalize=True)
    found = kernels(x, choice, layer.experts, layer.shared).float()
    expected = layer.expected(x, logits)
    assert float((found - expected).norm() / expected.norm()) < 0.005


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(3, 33, 3), (10, 1, 1)])
def test_a_mixture_is_that_of_torch(emulated: CudaExperts, num_tokens: int, num_experts: int, num_chosen: int) -> None:
    layer = Layer(num_experts, num_chosen, 1024)
    assert cuda_experts.suits(layer.experts, layer.shared, num_chosen)
    require(layer, emulated, num_tokens, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("num_experts", "num_chosen", "hidden"), [(100, 8, 6144), (16, 4, 1024), (256, 8, 2048)])
def test_on_a_gpu_mixtures_of_few_and_many_tokens_are_right(num_experts: int, num_chosen: int, hidden: int) -> None:
    path = build.cuda_library(
        default_cache() / "kernels", build.cuda_compiler(), torch.cuda.get_device_capability(), "glm"
    )
    layer, kernels = Layer(num_experts, num_chosen, hidden, GPU), CudaExperts(cuda_experts.load(path))
    for seed, num_tokens in enumerate((1, 2, 3, 4, 5, 8, 9, 16, 33, 64)):
        require(layer, kernels, num_tokens, 2 * seed, 1.0 + 100 * (seed % 3))
