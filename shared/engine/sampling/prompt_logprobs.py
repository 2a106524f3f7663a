"""Log-probabilities of a prompt's tokens, where the logits are and without waiting for the device.

Each row is looked at alone, so that nothing depends on the batch, or on how a prompt was cut into chunks. Of equally
likely tokens the lower id comes first, as in `distribution`; their rank is the same.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch

from shared.engine.api import BatchItem, Chosen, TokenLogprobs
from shared.engine.pinned import Fetched, put

# So many rows are looked at together. Each takes some 20 bytes for each token of the vocabulary meanwhile: few stay in
# a processor's cache (docs/LOG.md), many take a GPU fewer launches.
ROWS_TOGETHER = 8


class PromptLogprobs:
    """What a step found of them, on its way to the host: for each of N rows the log-probability and the rank of the
    token that follows, and the K most likely ones."""

    def __init__(self, logits: torch.Tensor, places: Sequence[int], items: Sequence[BatchItem]) -> None:
        """`places` are the rows of `logits` [R, V] for all `logprob_rows` of `items`, in their order."""
        num_tokens = logits.shape[1]
        self._counts = [
            min(item.sampling.num_prompt_logprobs or 0, num_tokens) for item in items for _ in item.logprob_rows
        ]
        self._most = max(self._counts)
        rows = put(places, torch.int64, logits.device)
        tokens = put([token_id for item in items for token_id in item.told], torch.int64, logits.device)
        parts = [
            _of_rows(logits[some], following, self._most)
            for some, following in zip(rows.split(ROWS_TOGETHER), tokens.split(ROWS_TOGETHER), strict=True)
        ]
        self._fetched = Fetched(torch.cat(parts))

    def collect(self) -> Iterator[TokenLogprobs]:
        """Wait; those of all rows in order."""
        most = self._most
        for count, row in zip(self._counts, self._fetched.wait().tolist(), strict=True):
            top = zip(map(int, row[2 : 2 + count]), row[2 + most : 2 + most + count], strict=True)
            yield TokenLogprobs(row[0], int(row[1]), tuple(top))


def apart(
    logits: torch.Tensor, items: Sequence[BatchItem], num_tokens: int
) -> tuple[torch.Tensor, PromptLogprobs | None]:
    """Of the logits [R, V or, padded, more] of a step those behind which tokens are chosen, and what is asked of the
    others: an item's `logprob_rows` come before the rows of its choices. The first `num_tokens` columns are tokens."""
    telling = [item for item in items if item.logprob_rows]
    if not telling:
        return logits, None
    told, chosen, place = list[int](), list[int](), 0
    for item in items:
        first = place + len(item.logprob_rows)
        told += range(place, first)
        place = first + item.sample * (1 + item.num_drafts)
        chosen += range(first, place)
    return logits[put(chosen, torch.int64, logits.device)], PromptLogprobs(logits[:, :num_tokens], told, telling)


def joined(
    chosen: Iterable[Chosen | None], items: Iterable[BatchItem], found: PromptLogprobs | None
) -> list[Chosen | None]:
    """What a step chose, with what it found of prompts."""
    if found is None:
        return list(chosen)
    told = found.collect()
    return [
        replace(choice or Chosen(()), prompt_logprobs=tuple(islice(told, len(item.logprob_rows))))
        if item.logprob_rows
        else choice
        for choice, item in zip(chosen, items, strict=True)
    ]


def _of_rows(logits: torch.Tensor, tokens: torch.Tensor, most: int) -> torch.Tensor:
    """float64 [N, 2 + 2 K], which holds all of it exactly: log-probability and rank of `tokens` [N], then ids and
    log-probabilities of the K most likely."""
    logprobs, num_tokens = torch.log_softmax(logits, dim=-1), logits.shape[1]
    is_padding = tokens[:, None] >= num_tokens  # a prompt may have it, and no model says it
    own = logprobs.gather(1, tokens[:, None].clamp(max=num_tokens - 1)).masked_fill(is_padding, -torch.inf)
    rank = 1 + (logprobs > own).sum(dim=1, keepdim=True)
    best = _most_likely(logprobs, most)
    return torch.cat([column.double() for column in (own, rank, best, logprobs.gather(1, best))], dim=1)


def _most_likely(logprobs: torch.Tensor, most: int) -> torch.Tensor:
    """Ids int64 [N, K] of the largest of [N, V], which are not above 0. Of equals the first are taken, in order:
    they are made different by less than neighbours among floats are, which is a share of 2**-24 at least."""
    if most <= 1:
        return logprobs.argmax(dim=1, keepdim=True)[:, :most]
    ids = torch.arange(logprobs.shape[1], dtype=torch.float64, device=logprobs.device)
    return (logprobs * (1 + ids * 2.0**-45)).topk(most, dim=1).indices
