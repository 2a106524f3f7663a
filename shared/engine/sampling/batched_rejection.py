"""Verification by rejection sampling where the logits are, for all rows at once and without waiting for the device.

What `rejection` does row by row, and its twin. Noise is the same to the bit; sums of weights, in float64 in both, may
differ in their last digits, as each adds in an order of its own.

The host knows which drafts are to be verified, and where it is kept what each was drawn from. Whether they follow the
tokens that they were proposed behind is found on the device: of a step launched behind another the host has heard of
neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from shared.engine.api import BatchItem
from shared.engine.kernels.cuda_choice import CudaChoice
from shared.engine.pinned import put, some
from shared.engine.sampling import draws
from shared.engine.sampling.batched import BatchedSampler, is_drawn
from shared.engine.sampling.rejection import DRAFT, REST, VERDICT

NONE = -1  # in place of a draft that was no draw


@dataclass(frozen=True, slots=True)
class Drawn:
    """The drafts of one number, N of which were drawn here: each sequence's place, and on the device its position and
    token, int64 [N], and the weights float32 [N, V] that it was drawn from."""

    places: dict[str, int]
    positions: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class Verified:
    """Rows of a step that verify what was drawn here: which, int64 [K], an item for each as if it ended there, and the
    number of its sequence; and on the device what was drawn, and the tokens that are given as drafts, all [K, ..]."""

    rows: torch.Tensor
    asked: list[BatchItem]
    sequences: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor
    given: torch.Tensor


class BatchedRejectionSampler(BatchedSampler):
    """For an executor whose own layer proposes drafts, as `RejectionSampler`. Remembers for a step what it drew them
    from, on the device."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], kernel: CudaChoice | None = None) -> None:
        super().__init__(vocab_size, eos_token_ids, kernel)
        self._proposed: list[Drawn] = []

    def propose(self, rows: torch.Tensor, items: Sequence[BatchItem], number: int, /) -> list[int]:
        """As of `RejectionSampler`."""
        return [*map(int, self.draft(rows, items, number).tolist())]

    def draft(
        self, rows: torch.Tensor, items: Sequence[BatchItem], number: int, moved: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As of `BatchedSampler`, but drawn with noise that nothing else has; those for another worker, which does not
        know what they were drawn from, are of `BatchedSampler`."""
        logits = self._adjusted(rows[:, : self._vocab_size], items, None)
        own = [row for row, item in enumerate(items) if is_drawn(item) and not item.hands_over]
        tokens = self._chosen(logits, items, moved) if len(own) < len(items) else logits.argmax(dim=-1)
        if not own:
            return tokens
        asked, drawing = [items[row] for row in own], put(own, torch.int64, logits.device)
        by = None if moved is None else moved[drawing]
        begins = draws.begins(asked, by, logits.device, [DRAFT + number] * len(own))
        largest = logits[drawing].amax(dim=1)
        weight = torch.empty(len(own), logits.shape[1], device=logits.device)
        drawn, steps = torch.empty_like(begins), draws.steps(logits.shape[1], logits.device)
        for part in draws.parts(*weight.shape):
            weight[part] = draws.weights(logits[drawing[part]], largest[part, None], asked[part])
            drawn[part] = draws.pick(weight[part], begins[part], steps)
        is_draw = largest.isfinite()
        places = {item.request_id: place for place, item in enumerate(asked)}
        self._proposed.append(
            Drawn(places, _positions(asked, by, logits.device), torch.where(is_draw, drawn, NONE), weight)
        )
        return tokens.index_copy(0, drawing, torch.where(is_draw, drawn, tokens[drawing]))

    def _decided(
        self,
        logits: torch.Tensor,
        items: Sequence[BatchItem],
        asked: Sequence[BatchItem],
        before: torch.Tensor | None,
        moved: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens = self._chosen(logits, asked, moved)
        proposed, self._proposed = self._proposed, []
        verified = _verified(proposed, items, asked, before, logits.device)
        if verified is None:
            return tokens
        by, largest = None if moved is None else moved[verified.rows], logits[verified.rows].amax(dim=1)
        judged = _judged(logits, largest, verified, by)
        is_ours = (verified.given == verified.tokens) & (
            _positions(verified.asked, by, logits.device) == verified.positions
        )
        # Drafts of which one is not are others, all of them.
        num_others = torch.zeros(len(items), device=logits.device).index_add(0, verified.sequences, (~is_ours).float())
        is_judged = (num_others[verified.sequences] == 0) & largest.isfinite()
        return tokens.index_copy(0, verified.rows, torch.where(is_judged, judged, tokens[verified.rows]))


def _judged(
    logits: torch.Tensor, largest: torch.Tensor, verified: Verified, moved: torch.Tensor | None
) -> torch.Tensor:
    """The draft, or what comes instead of it, for each row that is `verified`, int64 [K]."""
    num_rows, device = len(verified.asked), logits.device
    verdicts, rests = (draws.begins(verified.asked, moved, device, [each] * num_rows) for each in (VERDICT, REST))
    steps, judged = draws.steps(logits.shape[1], device), torch.empty_like(verified.given)
    for part in draws.parts(num_rows, logits.shape[1]):
        p = draws.weights(logits[verified.rows[part]], largest[part, None], verified.asked[part])
        q, drafts = verified.weight[part], verified.tokens[part].clamp(min=0)
        accepted = accepts(p, q, drafts, draws.noise(verdicts[part], steps[:1])[:, 0])
        judged[part] = torch.where(accepted, drafts, draws.pick(rest(p, q), rests[part], steps))
    return judged


def accepts(p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """As `rejection.accepts` for each of [K, V]: bool [K]; drafts int64, chances float64 [K]."""
    likely, proposed = (each.gather(1, drafts[:, None])[:, 0].double() for each in (p, q))
    return chances * proposed * _totals(p)[:, 0] < likely * _totals(q)[:, 0]


def rest(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """As `rejection.rest` for each of [K, V]."""
    left = (p.double() / _totals(p) - q.double() / _totals(q)).clamp(min=0)
    most = left.amax(dim=1, keepdim=True)
    return torch.where(most > 0, (left / most).float(), p)


def _totals(weight: torch.Tensor) -> torch.Tensor:
    return weight.sum(dim=1, keepdim=True, dtype=torch.float64)


def _positions(asked: Sequence[BatchItem], moved: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    positions = put([item.position for item in asked], torch.int64, device)
    return positions if moved is None else positions + moved


def _verified(
    proposed: Sequence[Drawn],
    items: Sequence[BatchItem],
    asked: Sequence[BatchItem],
    before: torch.Tensor | None,
    device: torch.device,
) -> Verified | None:
    """All that may be of the drafts that were `proposed` in the step before, those of one number together."""
    starts = [0, *accumulate(1 + item.num_drafts for item in items)]
    theirs = [
        s for s, item in enumerate(items)
        if is_drawn(item) and item.num_drafts <= len(proposed)
        and all(item.request_id in drawn.places for drawn in proposed[: item.num_drafts])
    ]  # fmt: skip
    pairs = [(number, s) for number in range(len(proposed)) for s in theirs if items[s].num_drafts > number]
    if not pairs:
        return None
    found: list[tuple[torch.Tensor, ...]] = []
    for number, drawn in enumerate(proposed):
        places = [drawn.places[items[s].request_id] for of, s in pairs if of == number]
        found.append(tuple(some(each, places) for each in (drawn.positions, drawn.tokens, drawn.weight)))
    positions, tokens, weight = map(torch.cat, zip(*found, strict=True))
    rows, given = [starts[s] + number for number, s in pairs], [items[s].drafts[number] for number, s in pairs]
    own, sequences = put(rows, torch.int64, device), put([s for _, s in pairs], torch.int64, device)
    given_here = _given(given, before, device)
    return Verified(own, [asked[row] for row in rows], sequences, positions, tokens, weight, given_here)


def _given(token_ids: Sequence[int], before: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Tokens int64 [K] on the device, of which some may be among those `before`."""
    known = put(token_ids, torch.int64, device)
    if before is None or min(token_ids) >= 0:
        return known
    return torch.where(known < 0, before[(-1 - known).clamp(min=0)], known)  # as `awaited` has it
