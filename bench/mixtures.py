"""A mixture of GLM-5.2's rank in each way that suits it, in one run: tokens of the same expert together, all of it in
one kernel, each choice by itself.

    python -m bench.mixtures [--ranks 8] [--tokens 1 2 4 8 32]

From the residual's sum to the experts'. Random weights as in `bench.glm_random`; microseconds of a mixture in a graph
of many, one behind the other, each of weights that the ones before have driven from the cache; median of groups of
replays (least to most). The floor is the time to read the router, the shared expert and the experts that were chosen
at the bandwidth of a plain sum. The first ways are compared with the last one: one less the cosine of their results.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bench import provenance
from bench.bandwidth import read_bandwidth
from bench.glm_random import FIELDS, RandomLayers, compiled
from shared.engine.kernels import cuda_experts, cuda_few, gluon_experts, gluon_rows, triton_dense, triton_route
from shared.engine.kernels.cuda_experts import CudaExperts
from shared.engine.kernels.cuda_few import CudaFew
from shared.engine.kernels.experts import Experts
from shared.engine.kernels.gluon_rows import MAX_ROWS
from shared.engine.kernels.inputs import Norm
from shared.engine.layers import captured
from shared.engine.layers.cuda_glm_weights import Mixture
from shared.engine.models.glm_config import GlmConfig, parse

SETS, ROUNDS = 3, 8
Pair = tuple[torch.Tensor, torch.Tensor]
Compute = Callable[[torch.Tensor, torch.Tensor, Mixture], Pair]


def mixed(
    x: torch.Tensor,
    delta: torch.Tensor,
    weights: Mixture,
    gain: torch.Tensor,
    config: GlmConfig,
    kernels: CudaExperts | CudaFew | None,
) -> Pair:
    """x + delta and the mixture of its norm, as a layer computes it by `kernels`."""
    norm, dtype = Norm(gain, config.rms_norm_eps, delta), torch.float16
    if len(x) <= MAX_ROWS:
        logits, total, normed = gluon_rows.linear_keeping(x, weights.router, norm, kept=dtype)
    else:
        total = x.clone()
        rounded = triton_dense.add_rms_norm(total, delta, gain, norm.eps)
        logits, normed = torch.mm(rounded, weights.router.T, out_dtype=torch.float32), rounded.to(dtype)
    assert isinstance(weights.experts, Experts), "made so"
    how = weights.correction_bias, config.num_experts_per_token, config.routed_scaling_factor
    if isinstance(kernels, CudaFew):
        bias, _, factor = how
        found = kernels(
            normed, logits, bias, factor, weights.experts, weights.shared, normalize=config.normalize_top_k
        )  # fmt: skip
        return total, found
    if kernels is not None:
        choice = kernels.route(logits, *how, normalize=config.normalize_top_k)
        return total, kernels(normed, choice, weights.experts, weights.shared)
    chosen, factors = triton_route.route(logits, *how, normalize=config.normalize_top_k)
    return total, gluon_experts.mixture(normed, chosen, factors, weights.experts, weights.shared)


def microseconds(compute: Compute, x: torch.Tensor, delta: torch.Tensor, sets: list[Mixture]) -> list[float]:
    """Of a mixture, by groups of replays."""

    def chain() -> Pair:
        pair = x, delta
        for weights in sets * ROUNDS:
            pair = compute(*pair, weights)
        return pair

    graph, _ = captured.Recorder(x.device).record(chain)
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (10 * len(sets) * ROUNDS))
    return times[1:]


def floor_us(x: torch.Tensor, weights: Mixture, gain: torch.Tensor, config: GlmConfig, rate: float) -> float:
    """With the experts that the tokens of x choose."""
    normed = triton_dense.add_rms_norm(x.clone(), None, gain, config.rms_norm_eps)
    logits = torch.mm(normed, weights.router.T, out_dtype=torch.float32)
    chosen, _ = triton_route.route(logits, weights.correction_bias, config.num_experts_per_token, 1.0, normalize=True)
    experts = weights.experts
    assert isinstance(experts, Experts), "made so"
    parts = (experts.gate_up, experts.down, experts.gate_up_scale, experts.down_scale)
    routed = sum(part.nbytes for part in parts if part is not None) * len(chosen.unique()) / config.num_experts
    fixed = weights.router.nbytes + weights.shared.gate_up.nbytes + weights.shared.down.nbytes
    return (routed + fixed) / rate * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 16, 32, 64])
    args = parser.parse_args()
    print(provenance.banner("bench.mixtures"))
    device, config = torch.device("cuda", 0), parse(FIELDS)
    rate = read_bandwidth(device)
    made = RandomLayers(config, args.ranks, device)
    layers = [made.layer(config.num_layers - 1) for _ in range(SETS)]
    sets = [layer.mlp for layer in layers if isinstance(layer.mlp, Mixture)]
    groups, _, _, few = compiled(device)
    ways: dict[str, tuple[Compute, int]] = {
        name: (partial(mixed, gain=layers[0].post_norm, config=config, kernels=kernels), most)
        for name, kernels, most in (
            ("by groups", groups, cuda_experts.MAX_TOKENS), ("in one kernel", few, cuda_few.MAX_TOKENS),
            ("by choices", None, gluon_experts.MAX_TOKENS),
        )
        if kernels is None or suits(kernels, sets[0], config)
    }  # fmt: skip
    *others, last = ways
    print(f"{torch.cuda.get_device_name(0)}; plain reads {rate / 1e12:.2f} TB/s")
    print(f"\n| tokens | {', us | '.join(ways)}, us | to read, us | 1 - cosine |\n|{'---|' * (3 + len(ways))}")
    with torch.inference_mode():
        for tokens in args.tokens:
            x, delta = (torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16, device=device) for _ in range(2))
            total, theirs = ways[last][0](x, delta, sets[0])
            able = [name for name in ways if tokens <= ways[name][1]]
            found = {name: ways[name][0](x, delta, sets[0]) for name in others if name in able}
            assert all(torch.equal(total, own) for own, _ in found.values())
            apart = [
                float(1 - F.cosine_similarity(own.float(), theirs.float(), dim=1).min()) for _, own in found.values()
            ]
            times = {name: microseconds(ways[name][0], x, delta, sets) for name in able}
            row = [f"{statistics.median(t):.2f} ({min(t):.2f} to {max(t):.2f})" for t in times.values()]
            row = [row[able.index(name)] if name in able else "" for name in ways]
            floor = floor_us(x + delta, sets[0], layers[0].post_norm, config, rate)
            print(f"| {tokens} | {' | '.join(row)} | {floor:.2f} | {max(apart, default=0):.6f} |", flush=True)


def suits(kernels: CudaExperts | CudaFew, weights: Mixture, config: GlmConfig) -> bool:
    """Whether they are made for such a mixture."""
    assert isinstance(weights.experts, Experts), "made so"
    if isinstance(kernels, CudaFew):
        return cuda_few.suits(weights.experts, weights.shared, config.num_experts_per_token)
    return cuda_experts.suits(weights.experts, weights.shared, config.num_experts_per_token)


if __name__ == "__main__":
    main()
