"""How far a quantized model's predictions are from those of the model it was made of, token by token.

One model is in memory at a time. What the first one predicts, all of it, lies in a file meanwhile: 4 bytes for each
token of the text and each word of the vocabulary.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.quality.intervals import Values
from shared.engine import stream
from shared.engine.models.api import Model
from shared.errors import InvalidRequest

# Columns of what is measured of each token: nats of surprise for each model, nats of divergence, 1 where both hold the
# same token most likely.
BASE, QUANT, DIVERGENCE, AGREES = range(4)


class Predictions:
    """Logarithms of probabilities, float32 [tokens, vocab_size], in a file that lives as long as the context.

    Raises InvalidRequest if there is no room for it.
    """

    def __init__(self, model: Model, windows: Sequence[Sequence[int]], directory: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by __exit__
        self.vocab_size = model.vocab_size
        try:
            for part in _log_probabilities(model, windows):
                part.numpy().tofile(self._file)
            self._file.seek(0)
        except OSError as error:
            self._file.close()
            raise InvalidRequest(f"predictions could not be kept, TMPDIR names another place: {error}") from None

    def __enter__(self) -> "Predictions":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, num_tokens: int) -> torch.Tensor:
        """The next tokens'."""
        found = np.fromfile(self._file, np.float32, num_tokens * self.vocab_size)
        return torch.from_numpy(found).view(num_tokens, self.vocab_size)


def compare(base: Predictions, quant: Model, windows: Sequence[Sequence[int]]) -> list[Values]:
    """For each window float64 [tokens, 4], a row for each token but the first. Raises InvalidRequest for models of
    different vocabularies."""
    if quant.vocab_size != base.vocab_size:
        raise InvalidRequest(f"the models have {base.vocab_size} and {quant.vocab_size} words: they cannot be compared")
    return [np.concatenate([_measure(base.take(len(q)), q, t) for q, t in _parts(quant, w)]) for w in windows]


def _measure(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> Values:
    """p, q [N, vocab_size]: logarithms of what each model predicts; tokens [N]: what came."""
    rows = torch.arange(len(tokens))
    # Sums over a vocabulary lose digits in float32, and the divergence is a small difference.
    divergence = (p.double().exp() * (p.double() - q.double())).sum(-1)
    agrees = p.argmax(-1) == q.argmax(-1)
    return torch.stack([-p[rows, tokens].double(), -q[rows, tokens].double(), divergence, agrees.double()], 1).numpy()


def _log_probabilities(model: Model, windows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    for window in windows:
        yield from (part for part, _ in _parts(model, window))


def _parts(model: Model, window: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logarithms of what is predicted, and the tokens that came, a part of the window at a time."""
    followers = torch.tensor(window[1:])
    for logits in stream.logits(model, window[:-1]):
        yield logits.log_softmax(-1), followers[: len(logits)]
        followers = followers[len(logits) :]


def windows(tokens: Sequence[int], context: int) -> list[list[int]]:
    """Consecutive stretches of `context` tokens; a rest that is shorter than half of one is left out."""
    parts = [list(tokens[start : start + context]) for start in range(0, len(tokens), context)]
    return [part for part in parts if len(part) >= max(2, context // 2)]


def greedy(model: Model, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """What a model says to each prompt."""
    shown = tqdm(prompts, "answering", unit=" prompts", disable=None)
    return [stream.greedy(model, prompt, num_tokens) for prompt in shown]


def agreed_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens until two answers first differ."""
    differing = (index for index, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    return next(differing, len(first))
