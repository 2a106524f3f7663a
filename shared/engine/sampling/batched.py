"""Choosing tokens where the logits are, for all rows at once and without waiting for the device.

What `Sampler` does row by row, and its twin: the noise is the same to the bit, floats go through the same operations in
the same order and precision, and so both choose the same tokens. `Sampler` looks at few tokens; a device would have to
tell the host how many those are, and looks at all of them instead. Where there is a kernel for it (`cuda_choice`), it
draws; what torch does here is its twin.
"""

from collections.abc import Sequence
from functools import partial

import torch

from shared.engine.api import BatchItem, SampledToken
from shared.engine.kernels.cuda_choice import Asked, CudaChoice
from shared.engine.pinned import Fetched, put
from shared.engine.sampling import gumbel
from shared.engine.sampling.adjusted import adjusted
from shared.engine.sampling.distribution import units
from shared.engine.sampling.sampler import MIN_TEMPERATURE, Sampler
from shared.engine.speculation.verify import up_to, verified
from shared.engine.splitmix import FACTORS, GOLDEN, SHIFTS

# Rows are drawn together as far as they have so many numbers: it takes some fifty bytes for each meanwhile.
MOST_NUMBERS = 1 << 22
LIKELIEST = Asked(temperature=0.0, min_p=0.0, top_p=1.0, top_k=0, begin=0)


class Choice:
    """What was chosen for the rows of a step, R in all. `tokens` is int64 [R] on the device; the host hears of them
    once they are sent."""

    def __init__(self, items: Sequence[BatchItem], tokens: torch.Tensor, logprobs: "Logprobs | None") -> None:
        self.tokens = tokens
        self._items, self._logprobs = items, logprobs
        self._fetched: Fetched | None = None

    def send(self, *others: torch.Tensor) -> "Choice":
        """Begin to tell the host, and numbers [..] of the device with them."""
        numbers = [self.tokens, *(self._logprobs.numbers if self._logprobs else ()), *others]
        flat = [each.double().flatten() for each in numbers]  # float64 holds all of them exactly
        self._fetched = Fetched(torch.cat(flat) if len(flat) > 1 else self.tokens)
        return self

    def is_done(self) -> bool:
        """Whether `collect` and `hear` return at once."""
        return self._fetched is not None and self._fetched.is_done()

    def collect(self) -> list[tuple[SampledToken, ...]]:
        """Wait; what is chosen for each item: see `verify.verified`."""
        (sampled, _), chosen, start = self.hear(), [], 0
        for item in self._items:
            own = sampled[start : start + 1 + item.num_drafts]
            chosen.append(verified(item, partial(_given, own)))
            start += len(own)
        return chosen

    def hear(self) -> tuple[list[SampledToken], list[float]]:
        """Wait; what is chosen for each row, and the numbers that were sent with it."""
        assert self._fetched is not None, "nothing was sent"
        numbers: list[float] = self._fetched.wait().tolist()
        sampled = [SampledToken(int(token_id)) for token_id in numbers[: len(self.tokens)]]
        others = len(self.tokens)
        if self._logprobs is not None:
            self._logprobs.add(sampled, numbers[others:])
            others += sum(map(torch.numel, self._logprobs.numbers))
        return sampled, numbers[others:]


def _given(own: Sequence[SampledToken], row: int, _item: BatchItem) -> SampledToken:
    return own[row]


class Logprobs:
    """Log probabilities of chosen tokens and of the most likely ones, for the rows where they were asked for."""

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, asked: dict[int, int]) -> None:
        """`logits` [R, V] and `tokens` [R] of all rows; `asked` says how many of which row."""
        self._asked, self._most = asked, min(max(asked.values()), logits.shape[1])
        rows = put(list(asked), torch.int64, logits.device)
        logprobs = torch.log_softmax(logits[rows], dim=-1)
        values, ids = torch.sort(logprobs, dim=-1, descending=True, stable=True)
        self.numbers = [
            each.double()
            for each in (logprobs.gather(1, tokens[rows, None]), ids[:, : self._most], values[:, : self._most])
        ]

    def add(self, sampled: list[SampledToken], numbers: list[float]) -> None:
        """Put them to the tokens of their rows."""
        first, size = len(self._asked), len(self._asked) * self._most
        for place, (row, count) in enumerate(self._asked.items()):
            start = first + place * self._most
            ids = map(int, numbers[start : start + min(count, self._most)])
            top = tuple(zip(ids, numbers[start + size : start + size + self._most], strict=False))
            sampled[row] = SampledToken(sampled[row].token_id, numbers[place], top)


class BatchedSampler(Sampler):
    """For logits on any device; with `kernel`, which takes such a vocabulary, drawn by that."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], kernel: CudaChoice | None = None) -> None:
        super().__init__(vocab_size, eos_token_ids)
        self._kernel = kernel

    def __call__(self, rows: torch.Tensor, items: Sequence[BatchItem], /) -> list[tuple[SampledToken, ...]]:
        """As of `Sampler`."""
        return self.launch(rows, items).send().collect()

    def launch(
        self,
        rows: torch.Tensor,
        items: Sequence[BatchItem],
        before: torch.Tensor | None = None,
        moved: torch.Tensor | None = None,
    ) -> Choice:
        """Begin to choose. `before` [..] are the tokens on the device that awaited ones stand for, and `moved` int64
        [items] says by how much more than it seems each item is on, at most its `num_in_doubt`."""
        logits, asked = rows[:, : self._vocab_size], _asked(items)
        tokens = self._chosen(logits, asked, before, None if moved is None else _each_row(moved, items))
        counts = {row: item.sampling.num_logprobs for row, item in enumerate(asked)}
        wanted = {row: count for row, count in counts.items() if count is not None}
        return Choice(items, tokens, Logprobs(logits, tokens, wanted) if wanted else None)

    def _chosen(
        self,
        logits: torch.Tensor,
        asked: Sequence[BatchItem],
        before: torch.Tensor | None,
        moved: torch.Tensor | None,
    ) -> torch.Tensor:
        changed = adjusted(logits, asked, [self._stops_forbidden(item) for item in asked], before)
        drawing = [row for row, item in enumerate(asked) if item.sampling.temperature >= MIN_TEMPERATURE]
        if self._kernel is not None and drawing:
            begins = None if moved is None else _begins(asked, moved, logits.device)
            return self._kernel(changed, [_drawn(item) for item in asked], begins)
        tokens = changed.argmax(dim=-1)  # of equals the first, which has the lowest id
        if drawing and len(drawing) == len(asked):
            tokens = _draw(changed, tokens, asked, moved)
        elif drawing:
            chosen, of = put(drawing, torch.int64, tokens.device), [asked[row] for row in drawing]
            tokens[chosen] = _draw(changed[chosen], tokens[chosen], of, None if moved is None else moved[chosen])
        return tokens


def _asked(items: Sequence[BatchItem]) -> list[BatchItem]:
    """An item for each row."""
    return [up_to(item, number) for item in items for number in range(1 + item.num_drafts)]


def _drawn(item: BatchItem) -> Asked:
    params = item.sampling
    if params.temperature < MIN_TEMPERATURE:
        return LIKELIEST
    begin = gumbel.start(params.seed, item.position)
    return Asked(params.temperature, params.min_p, params.top_p, params.top_k, begin)


def _each_row(moved: torch.Tensor, items: Sequence[BatchItem]) -> torch.Tensor:
    """`moved` [items] for each row."""
    if not any(item.num_drafts for item in items):
        return moved
    owners = [place for place, item in enumerate(items) for _ in range(1 + item.num_drafts)]
    return moved[put(owners, torch.int64, moved.device)]


def _draw(
    logits: torch.Tensor, best: torch.Tensor, asked: Sequence[BatchItem], moved: torch.Tensor | None
) -> torch.Tensor:
    """A token for each of [D, V]. Where the largest logit, at `best` [D], is not finite, it is the answer."""
    begins = _begins(asked, moved, logits.device)
    steps = torch.arange(1, logits.shape[1] + 1, device=logits.device) * _signed(GOLDEN)
    largest, num_together = logits.gather(1, best[:, None]), max(1, MOST_NUMBERS // logits.shape[1])
    picked = []
    for first in range(0, len(asked), num_together):
        rows = slice(first, first + num_together)
        picked.append(pick(_weights(logits[rows], largest[rows], asked[rows]), begins[rows], steps))
    return torch.where(largest[:, 0].isfinite(), torch.cat(picked), best)


def _begins(asked: Sequence[BatchItem], moved: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Where the noise of each begins, int64 [D]: of all positions that it may be at, the one where it is."""
    most = 0 if moved is None else max(item.num_in_doubt for item in asked)
    starts = [gumbel.start(item.sampling.seed, item.position + by) for item in asked for by in range(most + 1)]
    begins = put([_signed(start) for start in starts], torch.int64, device)
    return begins if moved is None else begins.view(-1, most + 1).gather(1, moved[:, None])[:, 0]


def _weights(logits: torch.Tensor, largest: torch.Tensor, asked: Sequence[BatchItem]) -> torch.Tensor:
    """As `distribution.weights`, float32 [D, V]."""
    params, vocab_size = [item.sampling for item in asked], logits.shape[1]
    top_k = [each.top_k if each.top_k < vocab_size else 0 for each in params]
    numbers = [(each.temperature, each.min_p, each.top_p, k) for each, k in zip(params, top_k, strict=True)]
    columns = put(numbers, torch.float64, logits.device)
    temperature, min_p = columns[:, :2].float().split(1, dim=1)
    weight = torch.exp((logits - largest) / temperature)
    if any(each.min_p > 0 for each in params):
        weight = torch.where(weight >= min_p, weight, 0)
    if any(top_k):
        weight = _largest(weight, columns[:, 3:].long(), max(top_k))
    if any(each.top_p < 1 for each in params):
        weight = _nucleus(weight, columns[:, 2:3])
    return weight


def _largest(weight: torch.Tensor, k: torch.Tensor, most: int) -> torch.Tensor:
    """Keep the `k` [D, 1] largest of [D, V], at most `most`; all where it is 0."""
    smallest = torch.topk(weight, most).values.gather(1, (k - 1).clamp(min=0))
    above, level = weight > smallest, weight == smallest
    kept = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True))) | (k == 0)
    return torch.where(kept, weight, 0)


def _nucleus(weight: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep the fewest of the largest of [D, V] whose share of the sum reaches `p` [D, 1]; all where it is 1. As
    `distribution.top_p`."""
    falling, order = torch.sort(weight, dim=1, descending=True, stable=True)
    each = units(falling)
    total = each.sum(dim=1, keepdim=True)
    wanted = (p * total.double()).ceil().long().clamp(min=1).minimum(total)
    kept = (each.cumsum(1) - each < wanted) | (p >= 1)
    return torch.zeros_like(weight).scatter_(1, order, torch.where(kept, falling, 0))


def pick(weight: torch.Tensor, begins: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """As `gumbel.pick` for each of [D, V]: the tokens that arrive first, int64 [D]. `begins` [D] and `steps` [V], token
    by token a GOLDEN more, are words of 64 bits as int64."""
    words = begins[:, None] + steps
    for factor, shift in zip((*FACTORS, 1), SHIFTS, strict=True):
        words ^= (words >> shift) & (2 ** (64 - shift) - 1)  # the shift is of signed numbers: it draws the sign in
        if factor != 1:
            words *= _signed(factor)
    uniform = ((words >> gumbel.UNUSED_BITS) & (2**52 - 1)).double().add_(0.5).mul_(gumbel.UNIT)
    return uniform.neg_().log1p_().neg_().div_(weight).argmin(dim=1)


def _signed(word: int) -> int:
    """A word of 64 bits as int64 has it."""
    return word - (word >> 63 << 64)
