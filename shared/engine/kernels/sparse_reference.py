"""Latent attention over a sparse selection (MLA with DSA), in plain torch: the twin of faster kernels, and CPU path.

A selection says for each token of the step which tokens of its sequence it attends to: one int64 tensor [rows, K] per
sequence, holding positions in rising order, -1 where fewer than K are visible. Work goes over blocks of rows, so that
what is needed besides the pages grows with the step and not with the context.
"""

import torch

from shared.engine.batch import Batch

Selection = list[torch.Tensor]
BLOCK_VALUES = 1 << 22


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, neighbours paired (Su et al. 2021, equation 34). x [T, H, D]; cos, sin [T, D/2] float32."""
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def append_state(state: torch.Tensor, values: torch.Tensor, batch: Batch) -> None:
    """Write one row per token of the step into its page. state [pages, page_size, D], values [T, D]."""
    page_size = state.shape[1]
    sequence = torch.repeat_interleave(batch.query_starts.diff())
    pages = batch.page_ids[batch.page_starts[sequence] + batch.positions // page_size].long()
    state[pages, (batch.positions % page_size).long()] = values


def select(q: torch.Tensor, head_weights: torch.Tensor, keys: torch.Tensor, batch: Batch, top_k: int) -> Selection:
    """The `top_k` visible tokens with the highest index scores (DeepSeek-V3.2 report, equation 1):

        I[s, t] = sum over heads h of w[s, h] * relu(q[s, h] . k[t]) * D^-0.5,  t <= position of s, in float32

    q [T, H, D], head_weights [T, H] float32, keys [pages, page_size, D] of this layer, with this step's keys in it.
    """
    queries, pages, selection = batch.query_starts.tolist(), batch.page_starts.tolist(), []
    for s, context in enumerate(batch.context_lens.tolist()):
        rows = slice(queries[s], queries[s + 1])
        positions = batch.positions[rows].long()
        if context <= top_k:
            selection.append(_visible(torch.arange(context).expand(len(positions), -1), positions))
            continue
        own = batch.page_ids[pages[s] : pages[s] + -(-context // keys.shape[1])].long()
        k = keys[own].flatten(0, 1)[:context].float()
        size = max(1, BLOCK_VALUES // (q.shape[1] * context))
        blocks = (slice(at, min(at + size, rows.stop)) for at in range(rows.start, rows.stop, size))
        chosen = [_top(q[block], head_weights[block], batch.positions[block], k, top_k) for block in blocks]
        selection.append(torch.cat(chosen))
    return selection


def _top(
    q: torch.Tensor, head_weights: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The selection of a block of rows: q [r, H, D], head_weights [r, H], positions [r], k [context, D]."""
    scores = torch.einsum("rh,rht->rt", head_weights, torch.relu(q.float() @ k.T)) * k.shape[1] ** -0.5
    scores.masked_fill_(torch.arange(len(k)) > positions[:, None], -torch.inf)
    return _visible(scores.topk(top_k, dim=-1).indices, positions)


def _visible(chosen: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`chosen` [r, K] in rising order, -1 for positions that are not visible."""
    return torch.where(chosen > positions[:, None], -1, chosen).sort(dim=-1).values


def sparse_attention(
    q: torch.Tensor, latents: torch.Tensor, selection: Selection, batch: Batch, value_dim: int, scale: float
) -> torch.Tensor:
    """Absorbed latent attention: every head of a token attends to the same selected latents.

    q [T, H, D], latents [pages, page_size, D] of this layer -> [T, H, value_dim]; values are the first `value_dim`
    of a latent. Softmax in float32.
    """
    queries, pages, out = batch.query_starts.tolist(), batch.page_starts.tolist(), []
    for s, chosen in enumerate(selection):
        own = batch.page_ids[pages[s] : pages[s + 1]].long()
        size = max(1, BLOCK_VALUES // (chosen.shape[1] * latents.shape[2]))
        for at in range(0, len(chosen), size):
            rows = q[queries[s] + at : min(queries[s] + at + size, queries[s + 1])]
            out.append(_attend(rows, latents, own, chosen[at : at + size], value_dim, scale))
    return torch.cat(out)


def _attend(
    q: torch.Tensor, latents: torch.Tensor, own: torch.Tensor, chosen: torch.Tensor, value_dim: int, scale: float
) -> torch.Tensor:
    page_size, at = latents.shape[1], chosen.clamp_min(0)
    k = latents[own[at // page_size], at % page_size]
    scores = (q @ k.transpose(1, 2)).float() * scale
    scores.masked_fill_((chosen < 0)[:, None], -torch.inf)
    return scores.softmax(dim=-1).to(q.dtype) @ k[..., :value_dim]
