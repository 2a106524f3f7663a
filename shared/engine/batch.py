"""A step as tensors: the parts of all sequences laid end to end, page tables as compressed rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from shared.engine.api import NO_ROWS, BatchItem
from shared.engine.pinned import put

LONG = 64  # so many numbers numpy counts faster than it is told them


@dataclass(frozen=True, slots=True)
class Batch:
    """All tensors int32 [..], on one device, but that token ids may be on that of the model already, as int64 perhaps;
    T tokens in S sequences, R of which are followed by a token that is chosen, the last one of a sequence and the ones
    before its drafts, or whose log-probability is wanted; the rows of both, in order, are called sampled.

    Sequence s computes rows query_starts[s] .. query_starts[s+1] of the T tokens, attends to context_lens[s] tokens
    (its own included), and lives in pages page_ids[page_starts[s] : page_starts[s+1]]. With `moved` its positions are
    moved[s] higher, and `context_lens` are the most that they may be.
    """

    num_tokens: int
    num_sequences: int
    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    query_starts: torch.Tensor  # [S + 1]
    context_lens: torch.Tensor  # [S]
    page_starts: torch.Tensor  # [S + 1]
    page_ids: torch.Tensor  # [all pages]
    sampled_rows: torch.Tensor  # [R], rows of T
    moved: torch.Tensor | None = None  # [S], on a GPU; see `moved_on`

    def to(self, device: torch.device) -> "Batch":
        """The same on another device; itself if it is there."""
        if self.positions.device == device:
            return self
        fields = {name: getattr(self, name) for name in self.__slots__}
        tensors = {name: x for name, x in fields.items() if isinstance(x, torch.Tensor)}
        moved: dict[str, Any] = {n: x if x.device == device else put(x, x.dtype, device) for n, x in tensors.items()}
        return replace(self, **moved)

    def resolved(self, chosen: torch.Tensor) -> "Batch":
        """With the tokens of `chosen` [..], on any device, in the place of those that stand for them (`api.awaited`).
        Nothing waits for that device."""
        stands = self.token_ids < 0
        if not stands.any():
            return self
        places = -1 - self.token_ids  # as `awaited` has it
        if len(places) == len(chosen) and torch.equal(places, torch.arange(len(places), dtype=places.dtype)):
            # As in most steps: all sequences go on, and nobody came. A GPU's are made int32 where they are laid out.
            return replace(self, token_ids=chosen if chosen.is_cuda else chosen.int())
        found = chosen[put(places.clamp(min=0), torch.int64, chosen.device)].int()
        known, stands = (put(each, each.dtype, chosen.device) for each in (self.token_ids, stands))
        return replace(self, token_ids=torch.where(stands, found, known))

    def moved_on(self, by: torch.Tensor, most: Sequence[int]) -> "Batch":
        """With each sequence `by` int64 [S] positions on, at most as many as `most` says. A GPU that knows them does
        not tell the host, and finds positions and pages itself where the step is laid out."""
        if by.is_cuda:
            return replace(self, moved=by, context_lens=self.context_lens + _int32(most))
        rows = by.repeat_interleave(self.query_starts.diff())
        positions, context_lens = self.positions + rows, self.context_lens + by
        return replace(self, positions=positions.int(), context_lens=context_lens.int())


def build(items: Sequence[BatchItem], page_size: int) -> Batch:
    """Lay the items of a step out. Raises ValueError for an item without tokens or without pages for them."""
    lengths = [len(item.token_ids) for item in items]
    ends = [item.start + length for item, length in zip(items, lengths, strict=True)]
    for item, length, end in zip(items, lengths, ends, strict=True):
        most = end + item.num_in_doubt
        if not length or len(item.page_ids) * page_size < most:
            raise ValueError(f"{item.request_id}: {length} tokens to position {most} in {len(item.page_ids)} pages")
    starts = [0, *accumulate(lengths)]
    return Batch(
        num_tokens=starts[-1],
        num_sequences=len(items),
        token_ids=_int32(chain.from_iterable(item.token_ids for item in items)),
        positions=_ranges([item.start for item in items], lengths),
        query_starts=_int32(starts),
        context_lens=_int32(ends),
        page_starts=_int32([0, *accumulate(len(item.page_ids) for item in items)]),
        page_ids=_int32(chain.from_iterable(item.page_ids for item in items)),
        sampled_rows=_int32(
            row
            for item, end in zip(items, starts[1:], strict=True)
            if item.sample or item.logprob_rows
            for row in (_all_rows(item, end) if item.logprob_rows else range(end - 1 - item.num_drafts, end))
        ),
    )


def choosing(step: Batch, items: Sequence[BatchItem]) -> Batch:
    """A step whose sampled rows are those alone behind which tokens are chosen."""
    if not any(item.logprob_rows for item in items):
        return step
    ends = accumulate(len(item.token_ids) for item in items)
    rows = chain.from_iterable(_chosen_rows(item, end) for item, end in zip(items, ends, strict=True))
    return replace(step, sampled_rows=_int32(rows))


def _all_rows(item: BatchItem, end: int) -> Iterable[int]:
    """The sampled rows of an item that ends before row `end`."""
    first = end - len(item.token_ids) - item.start
    return chain((first + position for position in item.logprob_rows), _chosen_rows(item, end))


def _chosen_rows(item: BatchItem, end: int) -> range:
    return range(end - 1 - item.num_drafts, end) if item.sample else NO_ROWS


def _int32(values: Iterable[int]) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(values, np.int32))  # a third of torch.tensor's time


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """As many numbers from each start on as its length says, end to end."""
    if max(lengths, default=0) < LONG:
        return _int32(chain.from_iterable(range(start, start + n) for start, n in zip(starts, lengths, strict=True)))
    parts = (np.arange(start, start + n, dtype=np.int32) for start, n in zip(starts, lengths, strict=True))
    return torch.from_numpy(np.concatenate(list(parts)))
