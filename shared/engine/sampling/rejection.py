"""Verification by rejection sampling (Leviathan, Kalman, Matias 2023; Chen et al. 2023, algorithm 2).

A draft x that was drawn from q becomes the token with a probability of min(1, p(x) / q(x)), and else a token drawn from
max(0, p - q) does; so the token has the distribution p, and is the draft as often as can be: 1 - TV(p, q). Both p and q
are what tokens are drawn from: after penalties, bias, temperature and cuts.

That asks for independent noise at every position: of the draft, of the verdict, and of the token instead. So each has a
purpose of its own. A draft's also counts which draft of its step it is: one that nobody looked at, behind a wrong one,
has nothing in common with the next draft of the same position (docs/decisions/0028).

A draft that is no draw from a q that is known here (from the text so far, or handed over with a prompt) stands for
itself: q(x) = 1. Then p(x) is the chance to accept it, and p without x what is left. One draw from p does both: it hits
x with p(x), and given that it does not, it is a draw from p without x. So there the position's own noise chooses, as
without drafts, and the token does not depend on them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.engine.api import BatchItem, SampledToken
from shared.engine.sampling import gumbel
from shared.engine.sampling.gumbel import Floats, Weights
from shared.engine.sampling.sampler import Sampler

# What noise is for; the j-th draft of a step, from 0, takes DRAFT + j.
VERDICT, REST, DRAFT = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Draft:
    """A token that was proposed for a position, and the weights [V] that it was drawn from."""

    position: int
    token_id: int
    weight: Weights


class RejectionSampler(Sampler):
    """For an executor whose own layer proposes drafts. Remembers what it drew them from, for a step."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        super().__init__(vocab_size, eos_token_ids)
        self._proposed: dict[str, list[Draft]] = {}
        self._verified: dict[tuple[str, int], Draft] = {}

    def __call__(self, rows: torch.Tensor, items: Sequence[BatchItem], /) -> list[tuple[SampledToken, ...]]:
        """As of `Sampler`, but that drafts which were proposed here in the step before are verified by rejection."""
        proposed, self._proposed = self._proposed, {}
        drafts = ((item, draft) for item in items for draft in _known(item, proposed.get(item.request_id, ())))
        self._verified = {(item.request_id, draft.position): draft for item, draft in drafts}
        return super().__call__(rows, items)

    def propose(self, rows: torch.Tensor, items: Sequence[BatchItem], number: int, /) -> list[int]:
        """As of `Sampler`, but drawn with noise that nothing else has; those for another worker, which does not know
        what they were drawn from, are of `Sampler`."""
        rows, drafts = rows[:, : self._vocab_size], list[int]()
        for row, largest, item in zip(rows, rows.argmax(dim=-1).tolist(), items, strict=True):
            token_id, weight = self._weigh(row, largest, item)
            if weight is not None and item.hands_over:
                token_id = super()._draw(weight, item)
            elif weight is not None:
                token_id = gumbel.pick(weight, gumbel.start(item.sampling.seed, item.position, DRAFT + number))
                self._proposed.setdefault(item.request_id, []).append(Draft(item.position, token_id, weight))
            drafts.append(token_id)
        return drafts

    def _draw(self, weight: Weights, item: BatchItem) -> int:
        draft = self._verified.get((item.request_id, item.position))
        if draft is None:
            return super()._draw(weight, item)
        seed, position, q = item.sampling.seed, item.position, draft.weight
        if accepts(weight, q, draft.token_id, uniform(gumbel.start(seed, position, VERDICT))):
            return draft.token_id
        return gumbel.pick(rest(weight, q), gumbel.start(seed, position, REST))


def accepts(p: Weights, q: Weights, token_id: int, chance: float) -> bool:
    """Whether a draft from `q` becomes the token where `p` is to be drawn from; neither need sum to 1."""
    return chance * float(q[token_id]) * _total(p) < float(p[token_id]) * _total(q)


def rest(p: Weights, q: Weights) -> Weights:
    """Weights of what is drawn instead of a draft that was refused: max(0, p - q), the largest 1.

    A draft that was refused has none itself. Where `p` and `q` differ by rounding alone, nothing may be left: `p` is as
    good then.
    """
    left: Floats = np.maximum(p.astype(np.float64) / _total(p) - q.astype(np.float64) / _total(q), 0)
    most = left.max()
    return (left / most).astype(np.float32) if most > 0 else p


def uniform(begin: int) -> float:
    """A number in (0, 1)."""
    return gumbel.noise_of(begin, 0)


def _total(weight: Weights) -> float:
    return float(weight.sum(dtype=np.float64))


def _known(item: BatchItem, proposed: Sequence[Draft]) -> Iterable[Draft]:
    """Those that the item verifies. They must follow the token that they were proposed behind, or they are others."""
    expected = [(draft.position, draft.token_id) for draft in proposed[: item.num_drafts]]
    return proposed[: item.num_drafts] if expected == list(enumerate(item.drafts, item.position)) else ()
