"""What changes a row of logits before a token is chosen from it. A row is float32 [V], and is never changed in place.

Token ids outside [0, V) have no logit and are passed over.
"""

from collections.abc import Iterable, Sequence

import torch

from shared.engine.api import SamplingParams


def penalized(row: torch.Tensor, params: SamplingParams, history: Sequence[int], output_start: int) -> torch.Tensor:
    """Make tokens of `history` less likely. Repetition counts prompt and output (Keskar et al. 2019, section 4.1),
    frequency and presence the output, `history[output_start:]`, alone (OpenAI's API reference)."""
    row = row.clone()
    if params.repetition_penalty != 1.0:
        seen = _known(history, row)  # a token twice is written twice, with the same value
        logits = row[seen]
        row[seen] = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = torch.bincount(_known(history[output_start:], row), minlength=row.shape[0])
        row -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    return row


def biased(row: torch.Tensor, logit_bias: Iterable[tuple[int, float]]) -> torch.Tensor:
    """Add to single logits: to all of them at once, as there may be hundreds."""
    known = [pair for pair in logit_bias if 0 <= pair[0] < row.shape[0]]
    ids = torch.tensor([token_id for token_id, _ in known], dtype=torch.int64, device=row.device)
    return row.index_add(0, ids, row.new_tensor([bias for _, bias in known]))


def without(row: torch.Tensor, token_ids: Iterable[int]) -> torch.Tensor:
    """Make tokens impossible."""
    row = row.clone()
    row[_known(list(token_ids), row)] = -torch.inf
    return row


def only(row: torch.Tensor, allowed: bytes) -> torch.Tensor:
    """Make all tokens impossible but those whose bit is set, the first in the lowest bit of the first byte."""
    kept = unpacked(torch.frombuffer(bytearray(allowed), dtype=torch.uint8))
    return row.masked_fill(~kept[: row.shape[0]], -torch.inf)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Bits of uint8 [.., N] as bool [.., 8 N], each byte's lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 1).flatten(-2).bool()


def _known(token_ids: Sequence[int], row: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor(token_ids, dtype=torch.int64, device=row.device)
    return ids[(ids >= 0) & (ids < row.shape[0])]
