"""The small operations of a dense decoder on a GPU, fused, in Triton. Their twins are in `kernels.reference`.

Reductions are in float32; results are rounded where the twins round, so that both give the same bits but for the order
of sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SILU_BLOCK = 1024
FEW_ROWS, MANY_HEADS = 64, 16


@triton.jit
def _add_rms_norm(x, delta, weight, out, size, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    # Not from L1, which may hold what was there before: this kernel starts while others still run.
    value = tl.load(x + row + at, inside, 0.0, cache_modifier=".cg")
    if ADD:
        other = tl.load(delta + row + at, inside, 0.0, cache_modifier=".cg")
        added = value.to(tl.float32) + other.to(tl.float32)
        value = added.to(value.dtype)
        tl.store(x + row + at, value, inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    tl.store(out + row + at, (wide * scale).to(value.dtype) * tl.load(weight + at, inside, 0.0), inside)


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * 2 * size + at, inside, 0.0)
    up = tl.load(gate_up + row * 2 * size + size + at, inside, 0.0)
    wide = gate.to(tl.float32)
    tl.store(out + row * size + at, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, inside)


@triton.jit
def _rotate_and_append(
    qkv, cos, sin, q_norm, k_norm, slots, out, kv, page_stride, kind_stride, head_stride, eps,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, PAGE_SIZE: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr, IN_PLACE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, heads = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at, inside = tl.arange(0, HALF)[None, :], heads < NUM_Q + 2 * NUM_KV
    source = qkv + (row * (NUM_Q + 2 * NUM_KV) + heads) * 2 * HALF + at
    # Not from L1, which may hold what was there before: this kernel starts while others still run.
    low = tl.load(source, inside, 0.0, cache_modifier=".cg")
    high = tl.load(source + HALF, inside, 0.0, cache_modifier=".cg")
    is_query, is_value = heads < NUM_Q, heads >= NUM_Q + NUM_KV
    first, second = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        norm = tl.where(is_query, tl.load(q_norm + at), tl.load(k_norm + at))
        high_norm = tl.where(is_query, tl.load(q_norm + HALF + at), tl.load(k_norm + HALF + at))
        squares = tl.sum(first * first, 1, keep_dims=True) + tl.sum(second * second, 1, keep_dims=True)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)
        first = ((first * scale).to(low.dtype) * norm).to(tl.float32)
        second = ((second * scale).to(low.dtype) * high_norm).to(tl.float32)
    c, s = tl.load(cos + row * HALF + at), tl.load(sin + row * HALF + at)
    low = tl.where(is_value, low, (first * c - second * s).to(low.dtype))
    high = tl.where(is_value, high, (second * c + first * s).to(low.dtype))
    if IN_PLACE:
        target, is_told = out + (row * (NUM_Q + 2 * NUM_KV) + heads) * 2 * HALF + at, inside & ~is_value
    else:
        target, is_told = out + (row * NUM_Q + heads) * 2 * HALF + at, is_query
    tl.store(target, low, is_told)
    tl.store(target + HALF, high, is_told)
    slot = tl.load(slots + row).to(tl.int64)
    kind, kv_head = (heads - NUM_Q) // NUM_KV, (heads - NUM_Q) % NUM_KV
    page = kv + (slot // PAGE_SIZE) * page_stride + kind * kind_stride + kv_head * head_stride
    target = page + (slot % PAGE_SIZE) * 2 * HALF + at
    is_kept = inside & (heads >= NUM_Q) & (slot >= 0)
    tl.store(target, low, is_kept)
    tl.store(target + HALF, high, is_kept)


def launch_options(device: torch.device) -> tuple[bool, dict[str, Any]]:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch), and how to ask so."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return early, {"launch_pdl": True} if early else {}


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add `delta` to the residual `x`, in place, and return the RMSNorm of the sum. All [T, N] but weight [N]."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    warps, (pdl, options) = min(16, max(1, block // 512)), launch_options(x.device)
    _add_rms_norm[(x.shape[0],)](
        x, x if delta is None else delta, weight, out, x.shape[1], eps, delta is not None, block, pdl,
        num_warps=warps, **options,
    )  # fmt: skip
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up [T, 2 I], gate first; result [T, I]."""
    size = gate_up.shape[1] // 2
    out = gate_up.new_empty(gate_up.shape[0], size)
    _silu_mul[(gate_up.shape[0], triton.cdiv(size, SILU_BLOCK))](gate_up, out, size, SILU_BLOCK)
    return out


def rotate_and_append(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
    slots: torch.Tensor,
    kv: torch.Tensor,
    *,
    in_place: bool = False,
) -> torch.Tensor:
    """Norm (where there is one) and rotate queries and keys; write keys and values into their pages.

    qkv [T, (H + 2 Hkv) D]; angles cos, sin float32 [T, D/2]; norms of queries and keys [D] or None; slots int32 [T],
    the page times the page size plus the place within it, -1 for a row that belongs to nobody; kv [pages, 2, Hkv,
    page_size, D], one layer's view of the pool. Returns the queries [T, H, D]; or, `in_place`, all heads of `qkv`
    [T, H + 2 Hkv, D], in which they and the keys are what they have become.
    """
    num_kv, page_size, head_dim = kv.shape[2:]
    num_q = qkv.shape[1] // head_dim - 2 * num_kv
    if in_place:
        out = qkv.view(qkv.shape[0], num_q + 2 * num_kv, head_dim)
    else:
        out = qkv.new_empty(qkv.shape[0], num_q, head_dim)
    q_norm, k_norm = norms
    page_stride, kind_stride, head_stride = kv.stride()[:3]
    pdl, options = launch_options(qkv.device)
    # Of few rows, a head each is done soonest; of many, so many blocks are what takes longest.
    heads = 1 if qkv.shape[0] <= FEW_ROWS else MANY_HEADS
    _rotate_and_append[(qkv.shape[0], triton.cdiv(num_q + 2 * num_kv, heads))](
        qkv, *angles, q_norm, k_norm, slots, out, kv, page_stride, kind_stride, head_stride, eps,
        num_q, num_kv, page_size, head_dim // 2, q_norm is not None, heads, in_place, pdl,
        num_warps=min(heads, 4), **options,
    )  # fmt: skip
    return out
