"""Drafts by a model's own layer for it (multi-token prediction; DeepSeek-V3 report, section 2.2).

The layer predicts from the model's last state at a position and the token behind it what comes after that token. After
each step it follows the model over what was computed for good, so that its own state covers the same tokens; from the
last of them it then goes on alone, draft by draft.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import torch

from shared.engine.api import NO_ROWS, BatchItem, Chosen, SampledToken
from shared.engine.batch import build
from shared.engine.kv.layout import KvLayout
from shared.engine.models.api import DraftLayer
from shared.engine.pinned import put
from shared.engine.sampling.sampler import Sampler

Tokens = tuple[SampledToken, ...] | None


class MtpDrafter:
    """For one executor, with the sampler that verifies what is proposed here. The host hears of every token and draft;
    where it need not, `late.LateDrafter` does the same."""

    def __init__(self, layer: DraftLayer, sampler: Sampler, layout: KvLayout) -> None:
        self.layer, self._sampler, self._layout = layer, sampler, layout

    def __call__(
        self, items: Sequence[BatchItem], tokens: Sequence[Tokens], states: torch.Tensor, pool: torch.Tensor
    ) -> list[Chosen | None]:
        """Follow a step of `items`, which chose `tokens` (None: a part that is not the last), and propose.

        `states` [T, hidden] are the model's, a row for each token of the step, drafts included.
        """
        followed = [_follow(item, chosen) for item, chosen in zip(items, tokens, strict=True)]
        batch, kept = build(followed, self._layout.page_size), _kept(items, followed)
        if len(kept) < len(states):
            states = states[put(kept, torch.int64, states.device)]
        step = self.layer.extend(batch, states, pool, self._layout)
        runs = {s: _Run(item, tokens[s] or ()) for s, item in enumerate(followed) if item.sample}
        asking, numbers = list(runs), count()
        while asking:
            self._draft(step.logits, [runs[s] for s in asking], next(numbers))
            going_on = [place for place, s in enumerate(asking) if runs[s].is_asking]
            asking = [asking[place] for place in going_on]
            if asking:
                batch = build([runs[s].item() for s in asking], self._layout.page_size)
                step = self.layer.advance(batch, step, going_on, pool, self._layout)
        return [
            None if chosen is None else Chosen(chosen, tuple(runs[s].drafts) if s in runs else ())
            for s, chosen in enumerate(tokens)
        ]

    def _draft(self, logits: torch.Tensor, runs: Sequence["_Run"], number: int) -> None:
        """Choose the `number`-th draft of each."""
        drafts = self._sampler.propose(logits, [run.view() for run in runs], number)
        for run, token_id in zip(runs, drafts, strict=True):
            run.drafts.append(token_id)


class _Run:
    """The drafts of one sequence, whose chosen tokens are known."""

    def __init__(self, followed: BatchItem, chosen: tuple[SampledToken, ...]) -> None:
        self.drafts: list[int] = []
        self._item = followed
        self._end = followed.start + len(followed.token_ids)
        sampling = followed.sampling
        self._sampling = sampling if sampling.num_logprobs is None else replace(sampling, num_logprobs=None)
        # Copying a long history is for those who need it.
        self._history = list(followed.history) if followed.sampling.has_penalties else []
        self._history += [token.token_id for token in chosen] if self._history else []

    @property
    def is_asking(self) -> bool:
        """Whether drafts are still to be proposed."""
        return len(self.drafts) < self._item.num_wanted

    def view(self) -> BatchItem:
        """What the sampler has to know: the next draft is behind the chosen tokens and the drafts so far."""
        position = self._end + 1 + len(self.drafts)
        sampling, history = self._sampling, self._history + self.drafts if self._history else ()
        # A draft that a grammar forbids is refused when it is verified.
        return replace(self._item, token_ids=(0,), start=position - 1, sampling=sampling, history=history, allowed=())

    def item(self) -> BatchItem:
        """The layer's next token, one position on: the last draft."""
        return replace(self._item, token_ids=self.drafts[-1:], start=self._end + len(self.drafts) - 1)


def _follow(item: BatchItem, chosen: Tokens) -> BatchItem:
    """The layer's part of a step: the tokens behind those that were computed for good."""
    if chosen is None and item.following is None:
        raise ValueError(f"{item.request_id}: nothing was chosen, and no token follows")
    known = item.token_ids[1 : len(item.token_ids) - item.num_drafts]
    token_ids = [*known, *([item.following] if chosen is None else (token.token_id for token in chosen))]
    sample = chosen is not None and item.num_wanted > 0
    return replace(item, token_ids=token_ids, sample=sample, num_drafts=0, logprob_rows=NO_ROWS)


def _kept(items: Sequence[BatchItem], followed: Sequence[BatchItem]) -> torch.Tensor:
    """The rows of a step whose tokens are right: all but those of wrong drafts."""
    rows, start = list[int](), 0
    for item, kept in zip(items, followed, strict=True):
        rows += range(start, start + len(kept.token_ids))
        start += len(item.token_ids)
    return torch.tensor(rows, dtype=torch.int64)
