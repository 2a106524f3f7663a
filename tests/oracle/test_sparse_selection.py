"""The selection block by block against all scores at once, with ties, over several blocks of keys and of rows."""

import pytest
import torch

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build
from shared.engine.kernels import sparse_reference
from shared.engine.kernels.sparse_reference import BLOCK_KEYS, Placed
from shared.engine.quantization.rows import FloatRows

PAGE_SIZE, NUM_HEADS, DIM = 16, 4, 4


def whole(q: torch.Tensor, head_weights: torch.Tensor, keys: torch.Tensor, start: int, top_k: int) -> torch.Tensor:
    """The first of the highest, by a stable sort of every score: -1 in front where fewer are visible."""
    scores = torch.einsum("sh,sht->st", head_weights, torch.relu(torch.einsum("shd,td->sht", q, keys)))
    chosen = torch.full((len(q), top_k), -1)
    for row, own in enumerate(scores):
        visible = own[: start + row + 1]
        found = visible.argsort(descending=True, stable=True)[:top_k].sort().values
        found = found[~visible[found].isnan()]
        chosen[row, top_k - len(found) :] = found
    return chosen


def integers(*shape: int, seed: int, most: int = 3) -> torch.Tensor:
    """Small enough that scores are exact in any order of addition, and often equal."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("top_k", [1, 8, 100])
@pytest.mark.parametrize(
    "parts", [[(0, 150)], [(0, 101), (300, 3)], [(BLOCK_KEYS - 20, 50)], [(2 * BLOCK_KEYS + 7, 1), (BLOCK_KEYS, 40)]]
)
def test_the_selection_is_that_of_all_scores(parts: list[tuple[int, int]], top_k: int) -> None:
    sizes = [-(-(start + num) // PAGE_SIZE) for start, num in parts]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(5)).tolist()
    items, first = [], 0
    for (start, num), size in zip(parts, sizes, strict=True):
        items.append(BatchItem("r", [0] * num, start, order[first : first + size], True, SamplingParams(), 0))
        first += size
    keys = integers(sum(sizes), PAGE_SIZE, DIM, seed=1)
    num_rows = sum(num for _, num in parts)
    q, head_weights = integers(num_rows, NUM_HEADS, DIM, seed=2), integers(num_rows, NUM_HEADS, seed=3, most=1)
    step = Placed.of(build(items, PAGE_SIZE), PAGE_SIZE)
    found, row = sparse_reference.select(q, head_weights, FloatRows(keys), step, top_k), 0
    for item in items:
        end, rows = item.start + len(item.token_ids), slice(row, row := row + len(item.token_ids))
        own_keys = keys[item.page_ids].flatten(0, 1)[:end]
        expected = whole(q[rows], head_weights[rows], own_keys, item.start, top_k)
        assert torch.equal(found[rows], expected)


def test_a_score_that_is_no_number_is_not_chosen() -> None:
    keys = integers(4, PAGE_SIZE, DIM, seed=1)
    keys[1, 3] = torch.nan
    q, head_weights = integers(1, NUM_HEADS, DIM, seed=2), integers(1, NUM_HEADS, seed=3, most=1)
    batch = build([BatchItem("r", [0], 63, [0, 1, 2, 3], True, SamplingParams(), 0)], PAGE_SIZE)
    found = sparse_reference.select(q, head_weights, FloatRows(keys), Placed.of(batch, PAGE_SIZE), 63)
    assert found.tolist() == [[at for at in range(64) if at != PAGE_SIZE + 3]]
