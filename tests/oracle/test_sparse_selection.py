"""The selection block by block against all scores at once, with ties, over several blocks of keys and of rows: in torch
and by our own C++, which is held to it in every form that keys are kept in."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build
from shared.engine.kernels import build as kernels
from shared.engine.kernels import native, sparse_reference
from shared.engine.kernels.sparse_reference import BLOCK_KEYS, Placed, Rows, Select
from shared.engine.layers.native_indexer import Chooser
from shared.engine.quantization.rows import FloatRows, Fp8IndexKeys
from shared.models.store import default_cache

PAGE_SIZE, NUM_HEADS, DIM = 16, 4, 4
PARTS = [
    [(0, 150)],
    [(0, 101), (300, 3)],
    [(BLOCK_KEYS - 20, 50)],
    [(2 * BLOCK_KEYS + 7, 1), (BLOCK_KEYS, 40)],
    [(5, 1), (0, 1), (70, 1)],
]
needs_compiler = pytest.mark.skipif(kernels.compiler() is None, reason="needs g++")


def native_select(num_threads: int) -> Select:
    library = native.load(kernels.library(default_cache() / "kernels", kernels.compiler()))
    return Chooser(library, num_threads)


@pytest.fixture(
    scope="module",
    params=[0, pytest.param(1, marks=needs_compiler), pytest.param(3, marks=needs_compiler)],
    ids=lambda num_threads: f"native on {num_threads}" if num_threads else "torch",
)
def select(request: pytest.FixtureRequest) -> Select:
    return native_select(request.param) if request.param else sparse_reference.select


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


class Prompts:
    """Parts of sequences (start, num tokens), whose pages are anywhere among those of a pool."""

    def __init__(self, parts: list[tuple[int, int]]) -> None:
        sizes = [-(-(start + num) // PAGE_SIZE) for start, num in parts]
        self.num_pages, self.num_rows = sum(sizes), sum(num for _, num in parts)
        order = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(5)).tolist()
        self.items, first = [], 0
        for (start, num), size in zip(parts, sizes, strict=True):
            pages = order[first : first + size]
            self.items.append(BatchItem("r", [0] * num, start, pages, True, SamplingParams(), 0))
            first += size

    def placed(self) -> Placed:
        return Placed.of(build(self.items, PAGE_SIZE), PAGE_SIZE)

    def expected(
        self, q: torch.Tensor, head_weights: torch.Tensor, keys: torch.Tensor, top_k: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows of each sequence, and what is chosen for them; `keys` [pages, page_size, D]."""
        row = 0
        for item in self.items:
            end, rows = item.start + len(item.token_ids), slice(row, row := row + len(item.token_ids))
            own_keys = keys[item.page_ids].flatten(0, 1)[:end]
            yield rows, whole(q[rows], head_weights[rows], own_keys, item.start, top_k)


@pytest.mark.parametrize("top_k", [1, 8, 100])
@pytest.mark.parametrize("parts", PARTS)
def test_the_selection_is_that_of_all_scores(parts: list[tuple[int, int]], top_k: int, select: Select) -> None:
    prompts = Prompts(parts)
    keys = integers(prompts.num_pages, PAGE_SIZE, DIM, seed=1)
    q = integers(prompts.num_rows, NUM_HEADS, DIM, seed=2)
    head_weights = integers(prompts.num_rows, NUM_HEADS, seed=3, most=1)
    found = select(q, head_weights, FloatRows(keys), prompts.placed(), top_k)
    for rows, expected in prompts.expected(q, head_weights, keys, top_k):
        assert torch.equal(found[rows, -top_k:], expected[:, -found.shape[1] :])
        assert (expected[:, : -found.shape[1]] == -1).all()


@needs_compiler
@pytest.mark.parametrize("dim", [1, 4, 36, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
def test_keys_are_chosen_in_whatever_form_they_are_kept(form: str, dtype: torch.dtype, dim: int) -> None:
    """Pages have other state beside them, and no number behind the last token."""
    prompts, select = Prompts([(0, 75), (650, 20)]), native_select(2)
    keys, placed = integers(prompts.num_pages, PAGE_SIZE, dim, seed=1, most=1), prompts.placed()
    rows = kept(form, prompts.num_pages, dim)
    for item in prompts.items:
        at = torch.arange(item.start + len(item.token_ids))
        pages, offsets = torch.tensor(item.page_ids)[at // PAGE_SIZE], at % PAGE_SIZE
        rows.write(pages, offsets, keys[pages, offsets])
    q = integers(prompts.num_rows, NUM_HEADS, dim, seed=2, most=1).to(dtype)
    head_weights = integers(prompts.num_rows, NUM_HEADS, seed=3, most=1)
    scaled = head_weights * dim**0.5  # and back, so that scores are whole
    found = select(q, scaled, rows, placed, 8)
    assert torch.equal(found, sparse_reference.select(q, scaled, rows, placed, 8))
    for own, expected in prompts.expected(q.float(), head_weights, keys, 8):
        assert torch.equal(found[own], expected)


@needs_compiler
@pytest.mark.parametrize("top_k", [1, 50, 127, 200])
def test_every_code_of_an_fp8_key_is_what_it_is_to_torch(top_k: int) -> None:
    """Those of what is no number included; pages have scales of their own."""
    pool = torch.zeros(256 // PAGE_SIZE, PAGE_SIZE * 5, dtype=torch.uint8)
    rows = Fp8IndexKeys(pool, PAGE_SIZE, 1)
    rows.values[:] = torch.arange(256, dtype=torch.uint8).view(rows.values.shape)
    rows.scales[:] = (2.0 ** (torch.arange(256.0) % 3)).view(-1, PAGE_SIZE, 1).view(torch.uint8)
    q, head_weights = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[1.0, -1.0]])
    item = BatchItem("r", [0], 255, list(range(len(pool))), True, SamplingParams(), 0)
    placed = Placed.of(build([item], PAGE_SIZE), PAGE_SIZE)
    expected = sparse_reference.select(q, head_weights, rows, placed, top_k)
    assert torch.equal(native_select(1)(q, head_weights, rows, placed, top_k), expected)


def kept(form: str, num_pages: int, dim: int) -> Rows:
    """An empty layer's keys in pages that have as much of another in front of them."""
    if form == "fp8":
        row_bytes = dim + 4
        pool = torch.full((num_pages, 2 * PAGE_SIZE * row_bytes), 0xFF, dtype=torch.uint8)
        return Fp8IndexKeys(pool[:, PAGE_SIZE * row_bytes :], PAGE_SIZE, dim)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[form]
    return FloatRows(torch.full((num_pages, 2, PAGE_SIZE, dim), torch.nan, dtype=dtype)[:, 1])


def test_a_score_that_is_no_number_is_not_chosen(select: Select) -> None:
    keys = integers(4, PAGE_SIZE, DIM, seed=1)
    keys[1, 3] = torch.nan
    q, head_weights = integers(1, NUM_HEADS, DIM, seed=2), integers(1, NUM_HEADS, seed=3, most=1)
    batch = build([BatchItem("r", [0], 63, [0, 1, 2, 3], True, SamplingParams(), 0)], PAGE_SIZE)
    found = select(q, head_weights, FloatRows(keys), Placed.of(batch, PAGE_SIZE), 63)
    assert found.tolist() == [[at for at in range(64) if at != PAGE_SIZE + 3]]


def test_scores_that_rise_and_fall_and_have_no_end_are_chosen_by_their_size(select: Select) -> None:
    """Each higher than all before it, then ever lower ones, below and above nothing."""
    num, top_k = 2000, 7
    sizes = torch.cat((torch.arange(num / 2), torch.arange(num / 2).flip(0) - num / 4 + 0.5))
    sizes[[3, 500, 1999]] = torch.inf
    q, head_weights = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[1.0, -1.0]])
    batch = build([BatchItem("r", [0], num - 1, list(range(num // PAGE_SIZE)), True, SamplingParams(), 0)], PAGE_SIZE)
    found = select(q, head_weights, FloatRows(sizes.view(-1, PAGE_SIZE, 1)), Placed.of(batch, PAGE_SIZE), top_k)
    assert found.tolist() == [sizes.argsort(descending=True, stable=True)[:top_k].sort().values.tolist()]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_choice_is_the_same_however_a_prompt_is_cut_and_on_however_many_threads(dtype: torch.dtype) -> None:
    """Of scores that are rounded, in keys that are nearly those of others."""
    num, dim, top_k, noise = 9000, 64, 50, torch.Generator().manual_seed(4)
    keys = torch.randn(50, dim, generator=noise)[torch.arange(num) % 50] + 1e-6 * torch.randn(num, dim, generator=noise)
    rows = FloatRows(torch.nn.functional.pad(keys, (0, 0, 0, -num % PAGE_SIZE)).to(dtype).view(-1, PAGE_SIZE, dim))
    first = num - 200
    q = torch.randn(num - first, NUM_HEADS, dim, generator=noise).to(dtype)
    head_weights = torch.randn(num - first, NUM_HEADS, generator=noise)

    def chosen(select: Select, cuts: list[int]) -> torch.Tensor:
        found = []
        for start, end in pairwise(cuts):
            pages = list(range(-(-end // PAGE_SIZE)))
            item = BatchItem("r", [0] * (end - start), start, pages, True, SamplingParams(), 0)
            own = slice(start - first, end - first)
            placed = Placed.of(build([item], PAGE_SIZE), PAGE_SIZE)
            found.append(select(q[own], head_weights[own], rows, placed, top_k))
        return torch.cat(found)

    at_once = chosen(native_select(1), [first, num])
    assert torch.equal(chosen(native_select(1), [first, first + 1, first + 62, first + 197, num]), at_once)
    assert torch.equal(chosen(native_select(5), [first, first + 7, num]), at_once)
