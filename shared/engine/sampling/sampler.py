"""Chooses the next token of every sequence in a step."""

from collections.abc import Sequence
from functools import partial
from math import isfinite

import torch

from shared.engine.api import BatchItem, SampledToken, SamplingParams
from shared.engine.sampling import distribution, gumbel, logits
from shared.engine.speculation.verify import verified

# A smaller temperature is none: dividing by it would only overflow.
MIN_TEMPERATURE = 1e-5


class Sampler:
    """Chooses for one model; everything it depends on comes with the call."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)

    def __call__(self, rows: torch.Tensor, items: Sequence[BatchItem], /) -> list[tuple[SampledToken, ...]]:
        """What is chosen for each item: see `verify.verified`. `rows` are logits float32 [R, vocab_size or, padded,
        more]: for each item one, and one for each of its drafts. What is padding is never chosen."""
        rows = rows[:, : self._vocab_size]
        plain = rows.argmax(dim=-1).tolist()  # of equals the first, which has the lowest id
        chosen, start = [], 0
        for item in items:
            chosen.append(verified(item, partial(self._pick, rows[start:], plain[start:])))
            start += 1 + item.num_drafts
        return chosen

    def propose(self, rows: torch.Tensor, items: Sequence[BatchItem], _number: int, /) -> list[int]:
        """A draft for each item, which has none yet: the `number`-th that its sequence gets in this step, from 0.
        Drawn as the model will draw: where both are of one mind the draft is right, at any temperature."""
        return [token.token_id for (token,) in self(rows, items)]

    def _pick(self, rows: torch.Tensor, plain: list[int], row: int, item: BatchItem) -> SampledToken:
        return SampledToken(plain[row]) if self._is_plain(item) else self._choose(rows[row], plain[row], item)

    def _is_plain(self, item: BatchItem) -> bool:
        """Whether the largest logit is the answer, and all of it."""
        params = item.sampling
        return (
            params.temperature < MIN_TEMPERATURE
            and params.num_logprobs is None
            and not params.logit_bias
            and not params.has_penalties
            and not any(item.allowed)
            and not self._stops_forbidden(item)
        )

    def _choose(self, row: torch.Tensor, largest: int, item: BatchItem) -> SampledToken:
        best, weight = self._weigh(row, largest, item)
        token_id = best if weight is None else self._draw(weight, item)
        return _with_logprobs(token_id, row, item.sampling)

    def _weigh(self, row: torch.Tensor, largest: int, item: BatchItem) -> tuple[int, gumbel.Weights | None]:
        """The most likely token, and the weights float32 [V] to draw from unless that token is the answer."""
        adjusted = self._adjust(row, item)
        best = largest if adjusted is row else int(adjusted.argmax())
        if item.sampling.temperature < MIN_TEMPERATURE or not isfinite(adjusted[best]):
            return best, None  # not finite: all tokens are forbidden, or the model computes nonsense; one comes anyway
        return best, distribution.weights(adjusted, item.sampling).cpu().numpy()

    def _draw(self, weight: gumbel.Weights, item: BatchItem) -> int:
        """The item's token."""
        return gumbel.pick(weight, gumbel.start(item.sampling.seed, item.position))

    def _adjust(self, row: torch.Tensor, item: BatchItem) -> torch.Tensor:
        params = item.sampling
        if params.has_penalties:
            row = logits.penalized(row, params, item.history, item.output_start)
        if params.logit_bias:
            row = logits.biased(row, params.logit_bias)
        if forbidden := self._stops_forbidden(item):
            row = logits.without(row, forbidden)
        allowed = item.allowed[0] if item.allowed else None
        return row if allowed is None else logits.only(row, allowed)

    def _stops_forbidden(self, item: BatchItem) -> tuple[int, ...]:
        """The tokens that would end the sequence before its least length."""
        params = item.sampling
        if item.position - item.output_start >= params.min_tokens:
            return ()
        return params.stop_token_ids + (() if params.ignore_eos else self._eos_token_ids)


def _with_logprobs(token_id: int, row: torch.Tensor, params: SamplingParams) -> SampledToken:
    """Report `token_id` by the model's own distribution, before penalties and temperature."""
    if params.num_logprobs is None:
        return SampledToken(token_id)
    logprobs = torch.log_softmax(row, dim=-1)
    return SampledToken(token_id, float(logprobs[token_id]), distribution.most_likely(logprobs, params.num_logprobs))
