"""Drafts of a model's own layer, as `mtp` has them, verified and proposed without the host, which hears of both when
all is computed.

How many drafts were right is found where tokens are chosen, and moves on whatever comes behind them: positions of the
next drafts, and so their pages and their noise. No row is left out for being wrong, as the host does not know which:
the layer follows the model over wrong drafts, too. What it writes there lies behind the sequence's end, where nobody
looks before it is written over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from shared.engine.api import NO_ROWS, BatchItem, Chosen, awaited
from shared.engine.batch import Batch, build
from shared.engine.kv.layout import KvLayout
from shared.engine.models.api import DraftLayer
from shared.engine.pinned import put, some
from shared.engine.sampling.batched import BatchedSampler, Choice
from shared.engine.sampling.prompt_logprobs import PromptLogprobs, joined


class LateDrafter:
    """For one executor, with the sampler that verifies what is proposed here; not for an item that `needs_host`."""

    def __init__(self, layer: DraftLayer, sampler: BatchedSampler, layout: KvLayout) -> None:
        self.layer, self.sampler, self._layout = layer, sampler, layout

    def __call__(
        self,
        items: Sequence[BatchItem],
        step: Batch,
        tokens: torch.Tensor,
        moved: torch.Tensor | None,
        states: torch.Tensor,
        pool: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Follow a `step` of `items`, N of which choose, and propose: how many drafts of each were right, int64 [N],
        and what comes behind these, int64 [(1 + D) * N]: the last token chosen for each, then the first draft of each,
        and so on. Where a sequence wants fewer there is some token.

        `tokens` int64 [R] were chosen in all rows, `states` [T, hidden] are the model's, and the items that choose are
        `moved` int64 [N] on.
        """
        asked = [item for item in items if item.sample]
        verified = verify(tokens, step, [item.num_drafts for item in asked], moved)
        num_right, last, by = verified.num_right, verified.last, verified.by
        asking, behind = [place for place, item in enumerate(asked) if item.num_wanted], [last]
        batch = replace(step, token_ids=_followed(items), sampled_rows=_last_right(step, asked, verified, asking))
        left = self.layer.extend(batch.resolved(tokens), states, pool, self._layout)
        while asking:
            number, own = len(behind) - 1, some(by, asking)
            drafts = self.sampler.draft(left.logits, [_view(asked[s], number) for s in asking], number, own)
            behind.append(drafts if len(asking) == len(asked) else _spread(drafts, asking, last))
            going_on = [place for place, s in enumerate(asking) if asked[s].num_wanted > number + 1]
            asking = [asking[place] for place in going_on]
            if asking:
                following = [_next(asked[s], number, place) for s, place in zip(asking, going_on, strict=True)]
                batch = build(following, self._layout.page_size).resolved(drafts)
                batch = batch.moved_on(some(by, asking), [item.num_in_doubt for item in following])
                left = self.layer.advance(batch, left, going_on, pool, self._layout)
        return num_right, torch.cat(behind)


@dataclass(frozen=True, slots=True)
class DraftedStep:
    """A step on its way whose drafts were verified without the host; satisfies `Step`. With `choice` was sent what the
    drafter found."""

    batch: list[BatchItem]
    choice: Choice
    told: PromptLogprobs | None = None

    def is_done(self) -> bool:
        """Whether `chosen` returns at once."""
        return self.choice.is_done()

    def chosen(self) -> list[Chosen | None]:
        """Wait for tokens and drafts."""
        rows, numbers = self.choice.hear()
        asked = [item for item in self.batch if item.sample]
        starts = [0, *accumulate(1 + item.num_drafts for item in asked)]
        drafts, found = [*map(int, numbers[2 * len(asked) :])], list[Chosen]()
        for place, item in enumerate(asked):
            tokens = rows[starts[place] : starts[place] + 1 + int(numbers[place])]
            found.append(Chosen(tuple(tokens), tuple(drafts[place :: len(asked)][: item.num_wanted])))
        each = iter(found)
        chosen = [next(each) if item.sample else None for item in self.batch]
        return joined(chosen, self.batch, self.told)


@dataclass(frozen=True, slots=True)
class Verified:
    """Of N sequences, int64 [N]: how many drafts were right, the token chosen behind them, by how much the sequence is
    further on than the host knows, and, where it was found with the rest, the row of the step from which it goes on."""

    num_right: torch.Tensor
    last: torch.Tensor
    by: torch.Tensor
    rows: torch.Tensor | None = None


def verify(tokens: torch.Tensor, step: Batch, num_drafts: Sequence[int], moved: torch.Tensor | None = None) -> Verified:
    """How many drafts of each of N sequences are what was chosen, and the token chosen behind them.

    `tokens` [R] were chosen in the sampled rows of the step: of each sequence in one more than it has drafts. Sequences
    were `moved` [N] on already.
    """
    most, num = max(num_drafts, default=0), len(num_drafts)
    all_rows, alike = len(step.sampled_rows) == step.num_tokens, min(num_drafts, default=0) == most
    if most and alike and all_rows and step.token_ids.is_cuda:
        from shared.engine.kernels import triton_verified  # without Triton there is no GPU to be verified on

        return Verified(*triton_verified.verify(tokens, step.token_ids, moved, most).unbind())
    if not most:
        num_right, last = torch.zeros_like(tokens), tokens
    else:
        num_right, last = _verified(tokens, step, num_drafts, most, num)
    return Verified(num_right, last, num_right if moved is None else num_right + moved)


def _verified(
    tokens: torch.Tensor, step: Batch, num_drafts: Sequence[int], most: int, num: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = step.sampled_rows if len(step.sampled_rows) < step.num_tokens else slice(None)
    if step.token_ids.is_cuda and not isinstance(rows, slice):
        rows = put(rows, torch.int64, tokens.device)
    given = put(step.token_ids[rows], torch.int64, tokens.device)
    if min(num_drafts) == most:
        chosen, given = tokens.view(num, -1), given.view(num, -1)
        right = chosen[:, :-1] == given[:, 1:]
    else:
        starts = [0, *accumulate(1 + each for each in num_drafts)]
        at = torch.tensor(starts[:-1])[:, None] + torch.arange(1 + most)
        at = put(at.clamp(max=len(tokens) - 1), torch.int64, tokens.device)
        is_draft = put(torch.arange(most) < torch.tensor(num_drafts)[:, None], torch.bool, tokens.device)
        chosen = tokens[at]
        right = (chosen[:, :-1] == given[at][:, 1:]) & is_draft
    num_right = right.long().cumprod(dim=1).sum(dim=1)
    return num_right, chosen.gather(1, num_right[:, None])[:, 0]


def _followed(items: Sequence[BatchItem]) -> torch.Tensor:
    """The token behind each row of a step, int32 [T]; that of a row with a choice is awaited."""
    token_ids, num_rows = list[int](), 0
    for item in items:
        token_ids += item.token_ids[1 : len(item.token_ids) - item.num_drafts]
        if item.sample:
            token_ids += map(awaited, range(num_rows, num_rows + 1 + item.num_drafts))
            num_rows += 1 + item.num_drafts
        elif item.following is None:
            raise ValueError(f"{item.request_id}: nothing is chosen, and no token follows")
        else:
            token_ids.append(item.following)
    return torch.tensor(token_ids, dtype=torch.int32)


def _last_right(step: Batch, asked: Sequence[BatchItem], verified: Verified, asking: Sequence[int]) -> torch.Tensor:
    """The rows of a step from which the sequences `asking` go on."""
    if verified.rows is not None:
        return some(verified.rows, asking)
    num_right = verified.num_right
    starts = [0, *accumulate(1 + item.num_drafts for item in asked)]
    rows = put(step.sampled_rows[[starts[place] for place in asking]], torch.int64, num_right.device)
    return rows + some(num_right, asking)


def _spread(values: torch.Tensor, places: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Values at `places`, and zeros elsewhere."""
    return torch.zeros_like(like).index_copy_(0, put(places, torch.int64, like.device), values)


def _view(item: BatchItem, number: int) -> BatchItem:
    """What the sampler has to know to choose the draft of this number, from 0, if no draft was right before it."""
    sampling = item.sampling if item.sampling.num_logprobs is None else replace(item.sampling, num_logprobs=None)
    return replace(_next(item, number, 0), sampling=sampling, history=())


def _next(item: BatchItem, number: int, place: int) -> BatchItem:
    """The layer's next token: the draft of this number, which stands at `place` of those chosen with it."""
    in_doubt, start = item.num_in_doubt + item.num_drafts, item.position + number
    own = replace(item, token_ids=(awaited(place),), start=start, num_drafts=0, num_in_doubt=in_doubt)
    return replace(own, logprob_rows=NO_ROWS) if item.logprob_rows else own
