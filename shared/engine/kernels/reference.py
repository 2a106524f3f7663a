"""What every kernel computes, in plain torch: the twin that oracle tests hold faster kernels against, and what runs
where none of those does. Reductions are in float32, results in the dtype of the input."""

import torch
import torch.nn.functional as F

from shared.engine.batch import Batch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019, equation 4). x [..., N], weight [N]."""
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves paired (Su et al. 2021). x [T, H, D]; cos, sin [T, D/2] float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate_up [T, 2 I], gate first; result [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def append_kv(kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
    """Write the keys and values of the step's tokens into their pages.

    kv [pages, 2, H, page_size, D], one layer's view of the pool; k, v [T, H, D].
    """
    page_size = kv.shape[3]
    sequence = torch.repeat_interleave(batch.query_starts.diff())
    pages = batch.page_ids[batch.page_starts[sequence] + batch.positions // page_size].long()
    offsets = (batch.positions % page_size).long()
    kv[pages, 0, :, offsets] = k
    kv[pages, 1, :, offsets] = v


def paged_attention(q: torch.Tensor, kv: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Causal attention of the step's tokens over their sequences' pages. q [T, H, D] -> [T, H, D].

    kv as in `append_kv`, which has run for these tokens. Query heads share KV heads in order (GQA).
    """
    queries, pages = batch.query_starts.tolist(), batch.page_starts.tolist()
    out = torch.empty_like(q)
    for s, context in enumerate(batch.context_lens.tolist()):
        rows = slice(queries[s], queries[s + 1])
        k, v = gather_kv(kv, batch.page_ids[pages[s] : pages[s + 1]], context)
        positions = batch.positions[rows]
        mask = torch.arange(context, dtype=torch.int32, device=q.device)[None] <= positions[:, None]
        attended = F.scaled_dot_product_attention(q[rows].transpose(0, 1), k, v, attn_mask=mask, enable_gqa=True)
        out[rows] = attended.transpose(0, 1)
    return out


def gather_kv(kv: torch.Tensor, page_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [H, num_tokens, D] of a sequence, out of its pages."""
    num_heads, page_size, head_dim = kv.shape[2:]
    pages = kv[page_ids[: -(-num_tokens // page_size)].long()].permute(1, 2, 0, 3, 4)
    k, v = pages.reshape(2, num_heads, -1, head_dim)[:, :, :num_tokens]
    return k, v
