"""Which experts compute a token, and with which weights, in one small kernel. The twin is `layers.moe.route`."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.kernels.triton_latent import LINE_BYTES, NUM_FETCHING, fetch


@triton.jit
def _route(
    logits, bias, chosen, weights, next_weight, stride, factor, num_rows, num_lines,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, PDL: tl.constexpr,
    NUM_FETCHING: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= num_rows:
        fetch(next_weight, num_lines, tl.program_id(0) - num_rows, NUM_FETCHING, 32)
        return
    at, place = tl.arange(0, EXPERTS), tl.arange(0, TOP_K)
    own = tl.load(bias + at)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
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
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    factor: float,
    *,
    normalize: bool,
    next_weight: torch.Tensor | None = None,
    pdl: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts int32 [T, top_k] and weights float32 [T, top_k] from logits float32 [T, E], whose rows may be strided.

    `next_weight` is brought into the cache meanwhile.
    """
    num_rows, experts = len(logits), len(bias)
    chosen = torch.empty(num_rows, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_rows, top_k, dtype=torch.float32, device=logits.device)
    fetched = bias if next_weight is None else next_weight
    fetching = 0 if next_weight is None else NUM_FETCHING
    _route[(num_rows + fetching,)](
        logits, bias, chosen, weights, fetched, logits.stride(0), factor, num_rows, fetched.nbytes // LINE_BYTES,
        experts, top_k, normalize, pdl, max(1, fetching), num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return chosen, weights
