"""Latent attention over a sparse selection (MLA with DSA), in plain torch: the twin of faster kernels, and CPU path.

A selection says for each token of the step which tokens of its sequence it attends to: int64 [T, K], positions in
rising order, -1 in front of them where fewer than K are visible. Work goes over blocks of rows, so that what is needed
besides the pages grows with the step and not with the context.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from shared.engine.batch import Batch

Selection = torch.Tensor
BLOCK_VALUES = 1 << 22
# Keys that are scored at a time, and the first ones. Independent of the step, so that it makes no difference how a
# prompt is cut.
BLOCK_KEYS, FIRST_KEYS = 4096, 256
# Scores of single heads that are computed at a time: about what a core's cache holds.
BLOCK_SCORES = 1 << 19


class Rows(Protocol):
    """What is cached of one layer, one row [D] per token, in pages. What is read of a row may differ from what was
    written, but depends on that alone."""

    def write(self, pages: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor) -> None:
        """Keep rows [T, D], any float, at `offsets` [T] of `pages` [T], both int64."""

    def read(self, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Rows [..., D], a float that depends on how they are kept, at `offsets` [...] of `pages` [...]."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A step's rows and where they are, worked out once for all layers. int64: `positions` [T], `page_ids` as a Batch
    has them, for each row which of those is the first of its sequence, `first_pages` [T], and its own page and offset.
    Sequence s has the rows from starts[s] to starts[s + 1], and contexts[s] tokens."""

    starts: list[int]
    contexts: list[int]
    positions: torch.Tensor
    page_ids: torch.Tensor
    first_pages: torch.Tensor
    own: tuple[torch.Tensor, torch.Tensor]
    page_size: int

    @classmethod
    def of(cls, batch: Batch, page_size: int) -> "Placed":
        """The rows of a batch whose pages have so many tokens."""
        sequence = torch.repeat_interleave(batch.query_starts.diff())
        first_pages = batch.page_starts[sequence].long()
        positions, page_ids = batch.positions.long(), batch.page_ids.long()
        own = page_ids[first_pages + positions // page_size], positions % page_size
        starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
        return cls(starts, contexts, positions, page_ids, first_pages, own, page_size)

    def find(self, rows: slice | torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and offsets of the positions `at` int64 [r, n] in the sequences of so many rows; or [n] in one's."""
        first_pages = self.first_pages[rows]
        first = first_pages[:, None] if at.dim() > 1 else first_pages
        return self.page_ids[first + at // self.page_size], at % self.page_size


# As `select`: (q, head_weights, keys, step, top_k) -> selection.
Select = Callable[[torch.Tensor, torch.Tensor, Rows, Placed, int], Selection]


def rotate_interleaved(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, neighbours paired (Su et al. 2021, equation 34). x [T, H, D]; turns complex64 [T, D/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)


def select(q: torch.Tensor, head_weights: torch.Tensor, keys: Rows, step: Placed, top_k: int) -> Selection:
    """The `top_k` visible tokens with the highest index scores (DeepSeek-V3.2 report, equation 1):

        I[s, t] = sum over heads h of w[s, h] * relu(q[s, h] . k[t]) * D^-0.5,  t <= position of s, in float32

    Of equal scores the earlier token is taken; one that is not a number is none. q [T, H, D], head_weights [T, H]
    float32; `keys` are this layer's, with this step's in them. A sequence that is no longer than `top_k` has all.
    """
    width = min(top_k, max(step.contexts))
    chosen = (step.positions[:, None] - torch.arange(width - 1, -1, -1)).clamp_min_(-1)
    short = [s for s, context in enumerate(step.contexts) if top_k < context <= FIRST_KEYS]
    if short:
        _choose_in_short(chosen, q, head_weights, keys, step, short)
    for s, context in enumerate(step.contexts):
        if context > max(top_k, FIRST_KEYS):
            _choose_in_long(chosen, q, head_weights, keys, step, s)
    return chosen


def _choose_in_short(
    chosen: torch.Tensor, q: torch.Tensor, head_weights: torch.Tensor, keys: Rows, step: Placed, short: Sequence[int]
) -> None:
    """Choose for the rows of sequences whose scores are few enough to be sorted, all at once."""
    contexts = [step.contexts[s] for s in short]
    rows = [row for s in short for row in range(step.starts[s], step.starts[s + 1])]
    firsts = torch.tensor([step.starts[s] for s in short])
    at = torch.arange(max(contexts)).expand(len(short), -1).minimum(torch.tensor(contexts)[:, None] - 1)
    k = keys.read(*step.find(firsts, at)).float()
    q, head_weights = q.float(), head_weights * q.shape[2] ** -0.5
    if len(rows) == len(short):
        scores = _scores(q[rows], head_weights[rows], k)
    else:
        scores, row = torch.zeros(len(rows), k.shape[1]), 0
        for s, context, own in zip(short, contexts, k, strict=True):
            its = slice(step.starts[s], step.starts[s + 1])
            num = its.stop - its.start
            scores[row : row + num, :context] = _scores(q[its], head_weights[its], own[:context])
            row += num
    scores.masked_fill_(torch.arange(k.shape[1]) > step.positions[rows, None], -torch.inf)
    falling, order = scores.nan_to_num_(-torch.inf, torch.inf, -torch.inf).sort(dim=1, descending=True, stable=True)
    top_k = chosen.shape[1]
    found = order[:, :top_k].masked_fill_(falling[:, :top_k] == -torch.inf, -1)
    chosen[rows] = found.sort(dim=1).values


def _choose_in_long(
    chosen: torch.Tensor, q: torch.Tensor, head_weights: torch.Tensor, keys: Rows, step: Placed, s: int
) -> None:
    """Choose for the rows of sequence s. Each block of keys is read once, and scored for one block of rows after
    another."""
    own = slice(step.starts[s], step.starts[s + 1])
    positions, chosen = step.positions[own], chosen[own].fill_(-1)
    q, head_weights = q[own], head_weights[own] * q.shape[2] ** -0.5
    best = torch.full(chosen.shape, -torch.inf)
    size = max(1, BLOCK_SCORES // (q.shape[1] * BLOCK_KEYS))
    for start, end in _blocks(int(positions[-1]) + 1):
        at = torch.arange(start, end)
        k = keys.read(*step.find(slice(own.start, own.start + 1), at)).float()
        first = int(torch.searchsorted(positions, start))  # rows before it see nothing of this block
        for row in range(first, len(q), size):
            rows = slice(row, row + size)
            scores = _scores(q[rows].float(), head_weights[rows], k)
            if at[-1] > positions[row]:
                scores.masked_fill_(at > positions[rows, None], -torch.inf)
            _keep_highest(best[rows], chosen[rows], scores, start)


def _blocks(num_keys: int) -> Iterator[tuple[int, int]]:
    """Begins and ends of blocks of keys. They grow, so that of no block but the first many keys are higher than the
    highest before it."""
    start = 0
    while start < num_keys:
        end = min(num_keys, start + BLOCK_KEYS, max(2 * start, FIRST_KEYS))
        yield start, end
        start = end


def _scores(q: torch.Tensor, head_weights: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Index scores [r, n] of q [r, H, D] and k [n, D], or [r, n, D], with head_weights [r, H] that are scaled."""
    products = (q @ k.transpose(-1, -2)).relu_()
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
    q: torch.Tensor, latents: Rows, selection: Selection, step: Placed, value_dim: int, scale: float
) -> torch.Tensor:
    """Absorbed latent attention: every head of a token attends to the same selected latents.

    q [T, H, D] -> [T, H, value_dim]; values are the first `value_dim` of a latent. Softmax in float32.
    """
    size = max(1, BLOCK_VALUES // (selection.shape[1] * q.shape[2]))
    if len(q) <= size:
        return _attend(q, latents, selection, step, slice(None), value_dim, scale)
    blocks = (slice(at, at + size) for at in range(0, len(q), size))
    return torch.cat([_attend(q, latents, selection, step, rows, value_dim, scale) for rows in blocks])


def _attend(
    q: torch.Tensor, latents: Rows, selection: Selection, step: Placed, rows: slice, value_dim: int, scale: float
) -> torch.Tensor:
    chosen = selection[rows]
    k = latents.read(*step.find(rows, chosen.clamp_min(0))).to(q.dtype)
    scores = (q[rows] @ k.transpose(1, 2)).float() * scale
    scores.masked_fill_((chosen < 0)[:, None], -torch.inf)
    return scores.softmax(dim=-1).to(q.dtype) @ k[..., :value_dim]
