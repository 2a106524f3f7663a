"""The kernel of a whole mixture beside torch: on the CPU, compiled as C++ with a thread for each lane, and on a GPU."""

import ctypes
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from shared.engine.kernels import build, cuda_mixture, reference
from shared.engine.kernels.cuda_mixture import CudaMixtures, Routing
from shared.engine.kernels.experts import Experts, SharedExpert, plain_down, plain_gate_up
from shared.engine.quantization import nvfp4
from shared.engine.quantization.packed_experts import packed
from shared.models.store import default_cache

EMULATION = Path(__file__).parent / "cuda_on_cpu"
HIDDEN, INNER, EPS = 2048, 256, 1e-5
ANY_BYTES = 1 << 30
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    gxx, path = build.compiler(), tmp_path_factory.mktemp("cuda") / "mixture.so"
    if gxx is None:
        pytest.skip("no g++ found")
    folders = ("-I", EMULATION, "-I", build.CUDA_SOURCES)
    flags = ("-std=c++20", "-O1", "-pthread", "-shared", "-fPIC", "-x", "c++")
    subprocess.run([gxx, *flags, *folders, build.CUDA_SOURCES / "mixture.cu", "-o", path], check=True, timeout=120)
    return cuda_mixture.load(path)


def seeded(seed: int, *shape: int, scale: float = 1.0, device: torch.device = CPU) -> torch.Tensor:
    chance = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=chance, device=device) * scale).bfloat16()


class Layer:
    """Random weights, of rows as different in size as quantizing to FP4 must bear."""

    def __init__(self, num_experts: int, num_chosen: int, hidden: int = HIDDEN, device: torch.device = CPU) -> None:
        random = partial(seeded, device=device)
        spread = torch.logspace(-2, 0, 2 * INNER, device=device)[:, None]
        gate_up = random(1, num_experts, 2 * INNER, hidden, scale=hidden**-0.5) * spread
        down = random(2, num_experts, hidden, INNER, scale=INNER**-0.5)
        self.experts: Experts = packed(*([nvfp4.quantize(one.bfloat16()) for one in part] for part in (gate_up, down)))
        gate_up, down = random(3, 2 * INNER, hidden, scale=hidden**-0.5), random(4, hidden, INNER, scale=INNER**-0.5)
        self.shared = SharedExpert(gate_up, down)
        bias = random(5, num_experts, scale=0.1).float()
        self.routing = Routing(random(6, num_experts, hidden, scale=hidden**-0.5), bias, num_chosen, 2.5, True)
        self.gain = 1 + random(7, hidden, scale=0.1)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """The mixture of the norm of x, rounded where kernels round, float32 [T, hidden]."""
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS) * self.gain).bfloat16().float()
        scores = (normed @ self.routing.router.float().T).sigmoid()
        chosen = (scores + self.routing.bias).topk(self.routing.num_chosen, dim=1).indices
        weights = scores.gather(1, chosen)
        weights = weights / weights.sum(1, keepdim=True) * self.routing.factor
        gate_up, down = (part.float() for part in (plain_gate_up(self.experts), plain_down(self.experts)))
        inner = reference.silu_mul(F.linear(normed, self.shared.gate_up.float())).bfloat16().float()
        found = F.linear(inner, self.shared.down.float())
        for token, experts in enumerate(chosen.tolist()):
            for place, expert in enumerate(experts):
                inner = reference.silu_mul(F.linear(normed[token], gate_up[expert])).bfloat16().float()
                found[token] += weights[token, place] * F.linear(inner, down[expert])
        return found


def require(layer: Layer, mix: CudaMixtures, num_tokens: int, seed: int, scale: float) -> None:
    """That a mixture of random tokens is right."""
    device, hidden = layer.gain.device, len(layer.gain)
    x, delta = (seeded(seed + part, num_tokens, hidden, scale=scale, device=device) for part in range(2))
    total, found = mix(x, delta, layer.gain, EPS, layer.routing, layer.experts, layer.shared)
    assert torch.equal(total, x + delta)
    expected = layer.expected(x + delta)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.005


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_chosen"), [(1, 4, 2), (3, 5, 2)])
def test_a_mixture_is_that_of_torch_time_after_time(
    library: ctypes.CDLL, num_tokens: int, num_experts: int, num_chosen: int
) -> None:
    layer, mix = Layer(num_experts, num_chosen), CudaMixtures(library, CPU, 2, ANY_BYTES)
    assert cuda_mixture.suits(layer.routing, layer.experts, layer.shared)
    for seed, scale in ((10, 1.0), (20, 3000.0)):
        require(layer, mix, num_tokens, seed, scale)


def test_it_says_when_a_mixture_does_not_fit(library: ctypes.CDLL) -> None:
    layer, mix = Layer(4, 2), CudaMixtures(library, CPU, 2, 1000)
    with pytest.raises(RuntimeError, match="forebay_mixture"):
        mix(seeded(1, 1, HIDDEN), seeded(2, 1, HIDDEN), layer.gain, EPS, layer.routing, layer.experts, layer.shared)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_each_of_many_launches_is_right() -> None:
    compiled = build.cuda_library(default_cache() / "kernels", build.cuda_compiler(), torch.cuda.get_device_capability(), "mixture")
    layer, mix = Layer(40, 8, 6144, GPU), cuda_mixture.on(GPU, cuda_mixture.load(compiled))
    for seed in range(40):
        require(layer, mix, 1 + seed % cuda_mixture.MAX_TOKENS, 2 * seed, 1.0 + 100 * (seed % 3))
