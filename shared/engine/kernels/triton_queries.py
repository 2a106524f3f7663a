"""Queries on their way to latent attention, in Triton: rotated, and their other part taken into latent space.

For few rows both are one kernel, whose programs have roles. It asks for all its weights, waits for the kernel before
it and only then lets the next one start, so that this may read what that one wrote before it waits itself. The twins
are in `layers.mla` and `sparse_reference.rotate_interleaved`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from shared.engine.kernels.inputs import Queries, Rows
from shared.engine.kernels.triton_early import wait

ABSORB_ROWS = 16
INDEX_ROLES = 4  # programs that share out the index queries of a row


@dataclass(frozen=True, slots=True)
class Dims:
    """Of a rank's attention. Without an indexer `index_heads` is 0."""

    heads: int
    q_lora: int
    latent: int
    nope: int
    rope: int
    index_heads: int
    index_dim: int

    @property
    def head(self) -> int:
        """Of a query head."""
        return self.nope + self.rope


@triton.jit
def _absorb(
    q, up_key, q_latent, q_stride, num_rows, place,
    LATENT: tl.constexpr, NOPE: tl.constexpr, HEAD: tl.constexpr, NUM_HEADS: tl.constexpr,
    ROWS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some latent dimensions of one head: the part of its queries without position, NOPE of ROOM values, times its
    matrix."""
    head, c = place // (LATENT // TILE), (place % (LATENT // TILE)) * TILE + tl.arange(0, TILE)
    n, row = tl.arange(0, ROOM), tl.arange(0, ROWS)
    used, within = (row < num_rows)[:, None], n < NOPE
    matrix = tl.load(up_key + head * NOPE * LATENT + n[:, None] * LATENT + c[None], within[:, None], 0.0)
    if PDL:
        wait(q)
        gdc_launch_dependents()
    values = tl.load(q + row[:, None] * q_stride + head * HEAD + n[None], used & within[None], 0.0)
    total = tl.dot(values.to(matrix.dtype), matrix)
    target = q_latent + (row[:, None] * NUM_HEADS + head) * LATENT + c[None]
    tl.store(target, total.to(q_latent.dtype.element_ty), used)


@triton.jit
def _rotate(
    source, target, c, s, source_stride, NUM: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """NUM heads of pairs; c and s [PAIRS]."""
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, 2 * PAIRS)[None]
    value = tl.load(source + head * source_stride + at, head < NUM, 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [HEADS, PAIRS, 2]))
    turned = tl.join(even * c[None] - odd * s[None], odd * c[None] + even * s[None])
    turned = tl.reshape(turned, [HEADS, 2 * PAIRS]).to(target.dtype.element_ty)
    tl.store(target + head * 2 * PAIRS + at, turned, head < NUM)


@triton.jit
def _prepare(
    q, up_key, cos, sin, q_latent, q_rope, q_index, q_stride, num_rows,
    LATENT: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr,
    INDEX_HEADS: tl.constexpr, INDEX_DIM: tl.constexpr, NUM_ROLES: tl.constexpr, ROWS: tl.constexpr,
    ROOM: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    HEAD: tl.constexpr = NOPE + 2 * HALF
    SOME_HEADS: tl.constexpr = INDEX_HEADS // (NUM_ROLES - 1) if INDEX_HEADS > 0 else 1
    if program >= num_rows * NUM_ROLES:
        place = program - num_rows * NUM_ROLES
        _absorb(q, up_key, q_latent, q_stride, num_rows, place, LATENT, NOPE, HEAD, NUM_HEADS, ROWS, ROOM, TILE, PDL)
    else:
        if PDL:
            wait(q)
            gdc_launch_dependents()
        row, role = (program // NUM_ROLES).to(tl.int64), program % NUM_ROLES
        if role == 0:
            pair = tl.arange(0, HALF)
            c, s = tl.load(cos + row * HALF + pair), tl.load(sin + row * HALF + pair)
            target = q_rope + row * NUM_HEADS * 2 * HALF
            _rotate(q + row * q_stride + NOPE, target, c, s, HEAD, NUM_HEADS, HEADS, HALF)
        elif INDEX_HEADS > 0:
            all_pairs = tl.arange(0, INDEX_DIM // 2)  # those behind the first HALF carry no position
            all_c = tl.load(cos + row * HALF + all_pairs, all_pairs < HALF, 1.0)
            all_s = tl.load(sin + row * HALF + all_pairs, all_pairs < HALF, 0.0)
            first = (role - 1) * SOME_HEADS
            source = q + row * q_stride + NUM_HEADS * HEAD + first * INDEX_DIM
            target = q_index + (row * INDEX_HEADS + first) * INDEX_DIM
            _rotate(source, target, all_c, all_s, INDEX_DIM, SOME_HEADS, SOME_HEADS, INDEX_DIM // 2)


def prepare(
    q: torch.Tensor,
    rows: Rows,
    dims: Dims,
    up_key: torch.Tensor,
    *,
    full: bool,
    absorbed: bool = True,
    pdl: bool = True,
) -> Queries:
    """Rotate queries and take them into latent space, if they shall be `absorbed`; where the layer is `full` rotate
    those of the index.

    q [T, ...]: the heads, and with an index its own; rows may be strided. up_key [H, nope, latent].
    """
    num_rows, heads = len(q), dims.heads
    new = up_key.new_empty
    made = Queries(
        new(num_rows if absorbed else 0, heads, dims.latent),
        new(num_rows, heads, dims.rope),
        new(num_rows, dims.index_heads, dims.index_dim) if full else None,
    )
    absorbing, roles, tile = absorbed and num_rows <= ABSORB_ROWS, 1 + INDEX_ROLES if full else 1, min(64, dims.latent)
    num_programs = num_rows * roles + (heads * (dims.latent // tile) if absorbing else 0)
    _prepare[(num_programs,)](
        q, up_key, rows.cos, rows.sin, made.latent, made.rope, made.latent if made.index is None else made.index,
        q.stride(0), num_rows,
        dims.latent, dims.nope, dims.rope // 2, heads, triton.next_power_of_2(heads),
        dims.index_heads if full else 0, dims.index_dim if full else 2, roles,
        ABSORB_ROWS, triton.next_power_of_2(dims.nope), tile, pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    if absorbed and not absorbing:
        nope = q[:, : heads * dims.head].view(num_rows, heads, dims.head)[..., : dims.nope]
        made.latent.copy_(torch.bmm(nope.transpose(0, 1).to(up_key.dtype), up_key).transpose(0, 1))
    return made
