"""Latent attention over a sparse selection (MLA with DSA), in plain torch: the twin of faster kernels, and CPU path.

A selection says for each token of the step which tokens of its sequence it attends to: one int64 tensor [rows, K] per
sequence, holding positions in rising order, -1 where fewer than K are visible. Work goes over blocks of rows, so that
what is needed besides the pages grows with the step and not with the context.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from shared.engine.batch import Batch

Selection = list[torch.Tensor]
BLOCK_VALUES = 1 << 22
# Keys that are scored at a time, and the first ones. Independent of the step, so that it makes no difference how a
# prompt is cut.
BLOCK_KEYS, FIRST_KEYS = 4096, 256
# Scores of single heads that are computed at a time: about what a core's cache holds.
BLOCK_SCORES = 1 << 19


class Rows(Protocol):
    """What is cached of one layer, one row [D] per token, in pages. What is read of a row may differ from what was
    written, but depends on that alone."""

    page_size: int

    def write(self, pages: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep rows [T, D], any float, at `offsets` [T] of `pages` [T], both int64."""

    def read(self, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Rows [..., D], a float that depends on how they are kept, at `offsets` [...] of `pages` [...]."""


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, neighbours paired (Su et al. 2021, equation 34). x [T, H, D]; cos, sin [T, D/2] float32."""
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def append_state(state: Rows, values: torch.Tensor, batch: Batch) -> None:
    """Write one row per token of the step into its page. values [T, D]."""
    sequence = torch.repeat_interleave(batch.query_starts.diff())
    pages = batch.page_ids[batch.page_starts[sequence] + batch.positions // state.page_size].long()
    state.write(pages, (batch.positions % state.page_size).long(), values)


def select(q: torch.Tensor, head_weights: torch.Tensor, keys: Rows, batch: Batch, top_k: int) -> Selection:
    """The `top_k` visible tokens with the highest index scores (DeepSeek-V3.2 report, equation 1):

        I[s, t] = sum over heads h of w[s, h] * relu(q[s, h] . k[t]) * D^-0.5,  t <= position of s, in float32

    Of equal scores the earlier token is taken; one that is not a number is none. q [T, H, D], head_weights [T, H]
    float32; `keys` are this layer's, with this step's in them.
    """
    queries, pages, selection = batch.query_starts.tolist(), batch.page_starts.tolist(), []
    for s, context in enumerate(batch.context_lens.tolist()):
        rows = slice(queries[s], queries[s + 1])
        positions = batch.positions[rows].long()
        if context <= top_k:
            visible = torch.arange(context).expand(len(positions), -1)
            selection.append(torch.where(visible > positions[:, None], -1, visible).sort(dim=-1).values)
        else:
            own = batch.page_ids[pages[s] : pages[s + 1]].long()
            selection.append(_highest_scored(q[rows], head_weights[rows], positions, keys, own, top_k))
    return selection


def _highest_scored(
    q: torch.Tensor, head_weights: torch.Tensor, positions: torch.Tensor, keys: Rows, own: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The selection [T, top_k] of a sequence in the pages `own`: q [T, H, D], head_weights [T, H], positions [T] in
    rising order. Each block of keys is read once, and scored for one block of rows after another."""
    head_weights = head_weights * q.shape[2] ** -0.5
    best = torch.full((len(q), top_k), -torch.inf)
    chosen = torch.full((len(q), top_k), -1)
    size = max(1, BLOCK_SCORES // (q.shape[1] * BLOCK_KEYS))
    for start, end in _blocks(int(positions[-1]) + 1):
        at = torch.arange(start, end)
        k = keys.read(own[at // keys.page_size], at % keys.page_size).float()
        first = int(torch.searchsorted(positions, start))  # rows before it see nothing of this block
        for row in range(first, len(q), size):
            rows = slice(row, row + size)
            scores = _scores(q[rows].float(), head_weights[rows], k)
            if at[-1] > positions[row]:
                scores.masked_fill_(at > positions[rows, None], -torch.inf)
            _keep_highest(best[rows], chosen[rows], scores, start)
    return chosen


def _blocks(num_keys: int) -> Iterator[tuple[int, int]]:
    """Begins and ends of blocks of keys. They grow, so that of no block but the first many keys are higher than the
    highest before it."""
    start = 0
    while start < num_keys:
        end = min(num_keys, start + BLOCK_KEYS, max(2 * start, FIRST_KEYS))
        yield start, end
        start = end


def _scores(q: torch.Tensor, head_weights: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Index scores [r, n] of q [r, H, D] and k [n, D], with head_weights [r, H] that are scaled."""
    products = (q.flatten(0, 1) @ k.T).relu_().view(len(q), -1, len(k))
    return torch.bmm(head_weights[:, None], products)[:, 0]


def _keep_highest(best: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor, start: int) -> None:
    """Put into `best` [r, K] and `chosen`, scores and positions so far, what is higher in `scores` [r, n], those of
    the positions from `start` on. Few are, behind the first blocks, so only they are looked at twice."""
    top_k = best.shape[1]
    better = scores.numpy() > best.amin(dim=1, keepdim=True).numpy()
    found = torch.from_numpy(np.flatnonzero(better))  # both in less than half the time of torch's
    if not len(found):
        return
    rows, columns = found // scores.shape[1], found % scores.shape[1]
    num = torch.bincount(rows, minlength=len(best))
    places = top_k + torch.arange(len(rows)) - (num.cumsum(0) - num)[rows]
    scored = F.pad(best, (0, int(num.max())), value=-torch.inf)
    positions = F.pad(chosen, (0, int(num.max())), value=-1)
    scored[rows, places], positions[rows, places] = scores[rows, columns], start + columns
    kept = _highest(scored, top_k)
    best.copy_(scored[kept].view_as(best))
    chosen.copy_(positions[kept].view_as(chosen))


def _highest(scores: torch.Tensor, num: int) -> torch.Tensor:
    """Which of scores [r, n] are the `num` highest of their row, of equal ones the first: bool [r, n]."""
    least = scores.topk(num, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    missing = num - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= missing))


def sparse_attention(
    q: torch.Tensor, latents: Rows, selection: Selection, batch: Batch, value_dim: int, scale: float
) -> torch.Tensor:
    """Absorbed latent attention: every head of a token attends to the same selected latents.

    q [T, H, D] -> [T, H, value_dim]; values are the first `value_dim` of a latent. Softmax in float32.
    """
    queries, pages, out = batch.query_starts.tolist(), batch.page_starts.tolist(), []
    for s, chosen in enumerate(selection):
        own = batch.page_ids[pages[s] : pages[s + 1]].long()
        size = max(1, BLOCK_VALUES // (chosen.shape[1] * q.shape[2]))
        for at in range(0, len(chosen), size):
            rows = q[queries[s] + at : min(queries[s] + at + size, queries[s + 1])]
            out.append(_attend(rows, latents, own, chosen[at : at + size], value_dim, scale))
    return torch.cat(out)


def _attend(
    q: torch.Tensor, latents: Rows, own: torch.Tensor, chosen: torch.Tensor, value_dim: int, scale: float
) -> torch.Tensor:
    at = chosen.clamp_min(0)
    k = latents.read(own[at // latents.page_size], at % latents.page_size).to(q.dtype)
    scores = (q @ k.transpose(1, 2)).float() * scale
    scores.masked_fill_((chosen < 0)[:, None], -torch.inf)
    return scores.softmax(dim=-1).to(q.dtype) @ k[..., :value_dim]
