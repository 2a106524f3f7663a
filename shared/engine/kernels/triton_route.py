"""Which experts compute a token, and with which weights, in one small kernel. The twin is `layers.moe.route`."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from shared.engine.kernels.triton_early import wait


@triton.jit
def _route(
    logits, bias, chosen, weights, stride, factor,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at, place = tl.arange(0, EXPERTS), tl.arange(0, TOP_K)
    own = tl.load(bias + at)
    if PDL:
        gdc_launch_dependents()
        wait(logits)
    row = tl.program_id(0).to(tl.int64)
    choice = tl.sigmoid(tl.load(logits + row * stride + at)) + own
    bits = choice.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers are compared in one instruction of a warp
    experts = tl.zeros([TOP_K], tl.int32)
    for turn in tl.static_range(TOP_K):
        best = tl.min(tl.where(order == tl.max(order, 0), at, EXPERTS), 0)  # of equal ones the first
        experts = tl.where(place == turn, best, experts)
        order = tl.where(at == best, -(1 << 31), order)
    scores = tl.sigmoid(tl.load(logits + row * stride + experts))
    if NORMALIZE:
        scores = scores / (tl.sum(scores, 0) + 1e-20)
    tl.store(chosen + row * TOP_K + place, experts)
    tl.store(weights + row * TOP_K + place, scores * factor)


def route(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, factor: float, *, normalize: bool, pdl: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts int32 [T, top_k] and weights float32 [T, top_k] from logits float32 [T, E], whose rows may be strided."""
    num_rows, experts = len(logits), len(bias)
    chosen = torch.empty(num_rows, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_rows, top_k, dtype=torch.float32, device=logits.device)
    _route[(num_rows,)](
        logits, bias, chosen, weights, logits.stride(0), factor, experts, top_k, normalize, pdl,
        num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return chosen, weights
