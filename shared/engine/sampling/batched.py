"""Choosing tokens where the logits are, for all rows at once and without waiting for the device.

What `Sampler` does row by row, and its twin: both choose the same tokens (see `draws`). Where there is a kernel for it
(`cuda_choice`), it draws; what torch does here is its twin.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from shared.engine.api import BatchItem, SampledToken
from shared.engine.kernels.cuda_choice import Asked, CudaChoice
from shared.engine.pinned import Fetched, put
from shared.engine.sampling import draws, gumbel
from shared.engine.sampling.adjusted import adjusted
from shared.engine.sampling.sampler import MIN_TEMPERATURE, Sampler
from shared.engine.speculation.verify import up_to, verified

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
        flat = [each.flatten() for each in numbers]  # with log probabilities all as float64, which holds them exactly
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
        self._on_gpu: Any = None

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
        each = _each_row(moved, items) if moved is not None and any(map(is_drawn, items)) else None
        tokens = self._decided(self._adjusted(logits, asked, before), items, asked, before, each)
        counts = {row: item.sampling.num_logprobs for row, item in enumerate(asked)}
        wanted = {row: count for row, count in counts.items() if count is not None}
        return Choice(items, tokens, Logprobs(logits, tokens, wanted) if wanted else None)

    def draft(
        self, rows: torch.Tensor, items: Sequence[BatchItem], _number: int, moved: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `propose`, int64 [items] on the device; `moved` as in `launch`."""
        return self.launch(rows, items, None, moved).tokens

    def _adjusted(self, logits: torch.Tensor, asked: Sequence[BatchItem], before: torch.Tensor | None) -> torch.Tensor:
        return adjusted(logits, asked, [self._stops_forbidden(item) for item in asked], before)

    def _decided(
        self,
        logits: torch.Tensor,
        _items: Sequence[BatchItem],
        asked: Sequence[BatchItem],
        _before: torch.Tensor | None,
        moved: torch.Tensor | None,
    ) -> torch.Tensor:
        """A token for each row of adjusted logits, of which each has an item of its own in `asked`."""
        return self._chosen(logits, asked, moved)

    def _chosen(self, logits: torch.Tensor, asked: Sequence[BatchItem], moved: torch.Tensor | None) -> torch.Tensor:
        drawing = [row for row, item in enumerate(asked) if is_drawn(item)]
        if self._kernel is not None and drawing:
            in_doubt = None if moved is None else (draws.candidates(asked, in_doubt=True), moved)
            return self._kernel(logits, [_drawn(item) for item in asked], in_doubt)
        tokens = self._likeliest(logits)
        if drawing and len(drawing) == len(asked):
            tokens = _draw(logits, tokens, asked, moved)
        elif drawing:
            chosen, of = put(drawing, torch.int64, tokens.device), [asked[row] for row in drawing]
            tokens[chosen] = _draw(logits[chosen], tokens[chosen], of, None if moved is None else moved[chosen])
        return tokens

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor:
        """Of equals the first, which has the lowest id."""
        if logits.is_cuda and self._on_gpu is None:
            from shared.engine.kernels.triton_likeliest import Likeliest  # without Triton there is no GPU to choose on

            self._on_gpu = Likeliest(logits.device)
        if self._on_gpu is None or not self._on_gpu.takes(logits):
            return logits.argmax(dim=-1)
        found: torch.Tensor = self._on_gpu(logits)
        return found


def _asked(items: Sequence[BatchItem]) -> list[BatchItem]:
    """An item for each row."""
    return [up_to(item, number) for item in items for number in range(1 + item.num_drafts)]


def is_drawn(item: BatchItem) -> bool:
    """Whether its token is drawn, and not simply the likeliest."""
    return item.sampling.temperature >= MIN_TEMPERATURE


def _drawn(item: BatchItem) -> Asked:
    params = item.sampling
    if not is_drawn(item):
        return LIKELIEST
    begin = gumbel.start(params.seed, item.position)
    return Asked(params.temperature, params.min_p, params.top_p, params.top_k, begin)


def _each_row(moved: torch.Tensor, items: Sequence[BatchItem]) -> torch.Tensor:
    """`moved` [items] for each row."""
    if not any(item.num_drafts for item in items):
        return moved
    if len(items) == 1:
        return moved.expand(1 + items[0].num_drafts)
    owners = [place for place, item in enumerate(items) for _ in range(1 + item.num_drafts)]
    return moved[put(owners, torch.int64, moved.device)]


def _draw(
    logits: torch.Tensor, best: torch.Tensor, asked: Sequence[BatchItem], moved: torch.Tensor | None
) -> torch.Tensor:
    """A token for each of [D, V]. Where the largest logit, at `best` [D], is not finite, it is the answer."""
    begins, steps = draws.begins(asked, moved, logits.device), draws.steps(logits.shape[1], logits.device)
    largest = logits.gather(1, best[:, None])
    picked = [
        draws.pick(draws.weights(logits[rows], largest[rows], asked[rows]), begins[rows], steps)
        for rows in draws.parts(*logits.shape)
    ]
    return torch.where(largest[:, 0].isfinite(), torch.cat(picked), best)
