"""What `logits` does to a row, done to many of them on their device.

Which places are changed is worked out on the host, where the sequences are, and sent along for the rows that ask for
it. A token that is still awaited has its place filled in by the device.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from shared.engine.api import BatchItem, awaited
from shared.engine.pinned import put
from shared.engine.sampling.logits import unpacked


def adjusted(
    logits: torch.Tensor, items: Sequence[BatchItem], forbidden: Sequence[Sequence[int]], before: torch.Tensor | None
) -> torch.Tensor:
    """Logits float32 [R, V] after penalties and bias, without forbidden tokens and those that a grammar does not allow;
    themselves if nothing changes. `before` [..] are the tokens that awaited ones stand for."""
    params = [item.sampling for item in items]
    repeating = [row for row, each in enumerate(params) if each.repetition_penalty != 1]
    counting = [row for row, each in enumerate(params) if each.frequency_penalty or each.presence_penalty]
    biased = [row for row, each in enumerate(params) if each.logit_bias]
    held = {row: item.allowed[0] for row, item in enumerate(items) if any(item.allowed)}
    if not (repeating or counting or biased or held or any(forbidden)):
        return logits
    rows = logits.clone(memory_format=torch.contiguous_format)
    if repeating:
        _repetition(rows, items, repeating, before)
    if counting:
        _frequency(rows, items, counting, before)
    if biased:
        _bias(rows, items, biased)
    if any(forbidden):
        rows.view(-1).index_fill_(0, _places(rows, dict(enumerate(forbidden))), -torch.inf)
    if held:
        _hold(rows, held)
    return rows


def _repetition(rows: torch.Tensor, items: Sequence[BatchItem], which: list[int], before: torch.Tensor | None) -> None:
    places = _places(rows, {row: items[row].history for row in which}, _awaited(items, which), before)
    penalties = put([item.sampling.repetition_penalty for item in items], torch.float32, rows.device)
    logits, penalty = rows.view(-1)[places], penalties[places // rows.shape[1]]
    rows.view(-1)[places] = torch.where(logits > 0, logits / penalty, logits * penalty)  # the same value if twice


def _frequency(rows: torch.Tensor, items: Sequence[BatchItem], which: list[int], before: torch.Tensor | None) -> None:
    asked = [items[row] for row in which]
    counts = rows.new_zeros(len(which), rows.shape[1])
    outputs = {place: item.history[item.output_start :] for place, item in enumerate(asked)}
    places = _places(counts, outputs, _awaited(asked, range(len(asked))), before)
    counts.view(-1).index_add_(0, places, counts.new_ones(()).expand(len(places)))
    penalties = [(item.sampling.frequency_penalty, item.sampling.presence_penalty) for item in asked]
    frequency, presence = put(penalties, torch.float32, rows.device).split(1, dim=1)
    rows.index_add_(0, put(which, torch.int64, rows.device), frequency * counts + presence * (counts > 0), alpha=-1)


def _bias(rows: torch.Tensor, items: Sequence[BatchItem], which: list[int]) -> None:
    known = {row: [pair for pair in items[row].sampling.logit_bias if 0 <= pair[0] < rows.shape[1]] for row in which}
    places = _places(rows, {row: [token_id for token_id, _ in pairs] for row, pairs in known.items()})
    values = [bias for pairs in known.values() for _, bias in pairs]
    rows.view(-1).index_add_(0, places, put(values, torch.float32, rows.device))


def _hold(rows: torch.Tensor, held: dict[int, bytes | None]) -> None:
    packed = torch.frombuffer(bytearray(b"".join(each for each in held.values() if each)), dtype=torch.uint8)
    allowed = unpacked(put(packed, torch.uint8, rows.device).view(len(held), -1))[:, : rows.shape[1]]
    which = put(list(held), torch.int64, rows.device)
    rows[which] = rows[which].masked_fill(~allowed, -torch.inf)


def _awaited(items: Sequence[BatchItem], which: Sequence[int]) -> dict[int, int]:
    """Rows whose last token is awaited, and where it is chosen."""
    last = {row: items[row].token_ids[-1] for row in which}
    return {row: awaited(token_id) for row, token_id in last.items() if token_id < 0}


def _places(
    rows: torch.Tensor,
    token_ids: dict[int, Sequence[int]],
    late: dict[int, int] | None = None,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indexes into the flattened rows: tokens of each row as far as it has a logit for them, and those that `late` says
    are chosen at some place of `before`."""
    num_columns, device = rows.shape[1], rows.device
    ids = np.fromiter(chain.from_iterable(token_ids.values()), np.int64)
    starts = np.repeat(np.array(list(token_ids)) * num_columns, [len(own) for own in token_ids.values()])
    places = put(torch.from_numpy((starts + ids)[(ids >= 0) & (ids < num_columns)]), torch.int64, device)
    if not late:
        return places
    assert before is not None
    row_and_place = put(list(chain(late, late.values())), torch.int64, device).view(2, -1)
    return torch.cat([places, row_and_place[0] * num_columns + before[row_and_place[1]]])
