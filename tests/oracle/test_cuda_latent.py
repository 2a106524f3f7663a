"""Sparse latent attention by our CUDA kernels beside torch: on the CPU as C++ with a coroutine for each lane, and on a
GPU."""

import pytest
import torch

from shared.engine.kernels import build, cuda_latent
from shared.engine.kernels.cuda_latent import CudaLatent
from shared.engine.kernels.inputs import Queries, Rows, Selected
from shared.engine.kernels.splits import Parts
from shared.models.store import default_cache
from tests.oracle.emulated_cuda import compiled

LATENT, ROPE, VALUE, PAGE_SIZE = 512, 64, 256, 16
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def emulated() -> CudaLatent:
    return CudaLatent(cuda_latent.load(compiled("latent.cu")))


@pytest.fixture(scope="module")
def on_gpu() -> CudaLatent:
    capability = torch.cuda.get_device_capability()
    path = build.cuda_library(default_cache() / "kernels", build.cuda_compiler(), capability, "glm")
    return CudaLatent(cuda_latent.load(path))


def require_merged(kernels: CudaLatent, num_tokens: int, heads: int, splits: int, device: torch.device) -> None:
    """That splits are merged by their log-sum-exp; those that nothing fell to have whatever was in memory."""
    torch.manual_seed(num_tokens)
    means = torch.randn(num_tokens, heads, splits, LATENT, device=device)
    maxima, sums = torch.randn(num_tokens, heads, splits, device=device) * 4, torch.rand_like(means[..., 0]) + 1
    up_value = (torch.randn(heads, VALUE, LATENT, device=device) * LATENT**-0.5).bfloat16()
    empty = torch.arange(splits, device=device) >= torch.randint(1, splits + 1, (num_tokens, 1, 1), device=device)
    maxima, sums = torch.where(empty, -torch.inf, maxima), torch.where(empty, 0.0, sums)
    weights = torch.exp2(maxima - maxima.amax(-1, keepdim=True))
    total = (weights * sums).sum(-1, keepdim=True)
    mean = ((means * weights[..., None]).sum(2) / total).bfloat16().float()
    expected = torch.einsum("thc,hvc->thv", mean, up_value.float()).flatten(1)
    means = torch.where(empty[..., None], torch.nan, means)
    found = kernels.merge(Parts(means, maxima, sums), up_value).float()
    assert float((found - expected).norm() / expected.norm()) < 0.005


def require_attended(
    kernels: CudaLatent, counts: list[int], heads: int, top_k: int, splits: int, device: torch.device
) -> None:
    """That each row attends to what it has selected and to nothing else, of pages that lie apart."""
    torch.manual_seed(heads)
    num_rows, pages = len(counts), -(-top_k // PAGE_SIZE) + 2
    latents = torch.randn(pages, 3, PAGE_SIZE, LATENT + ROPE, device=device).bfloat16()[:, 1]
    q = torch.randn(num_rows, heads, LATENT + ROPE, device=device).bfloat16()
    queries = Queries(q[..., :LATENT].contiguous(), q[..., LATENT:].contiguous(), None)
    slots = torch.stack([torch.randperm(pages * PAGE_SIZE)[:top_k] for _ in counts]).int().to(device)
    selected = Selected(slots, torch.tensor(counts, dtype=torch.int32, device=device))
    up_value = torch.empty(heads, VALUE, LATENT, dtype=torch.bfloat16, device=device)
    assert cuda_latent.suits(queries, latents, up_value)
    scale = 0.04
    parts = kernels.attend(queries, latents, selected, scale, splits=splits)
    assert splits in (0, parts.means.shape[2])
    weights = torch.exp2(parts.maxima - parts.maxima.amax(-1, keepdim=True))
    used = parts.maxima[..., None] > -torch.inf
    total = (weights * parts.sums).sum(-1)[..., None]
    found = (torch.where(used, parts.means, 0.0) * weights[..., None]).sum(2) / total
    for row, count in enumerate(counts):
        own = slots[row, :count].long()
        keys = latents[own // PAGE_SIZE, own % PAGE_SIZE].float()
        expected = (q[row].float() @ keys.T * scale).softmax(-1) @ keys[:, :LATENT]
        assert float((found[row] - expected).norm() / expected.norm()) < 0.005


def require_selected(
    kernels: CudaLatent, scores: torch.Tensor, positions: list[int], top_k: int, *, first: bool = True
) -> None:
    """That slots are those of the highest scores, of equal ones the first, in the order of positions; where `first` is
    not set, a row that sees no more than that many tokens keeps what it has."""
    num_rows, capacity = scores.shape
    device = scores.device
    torch.manual_seed(capacity)
    each = -(-capacity // PAGE_SIZE)
    page_ids = torch.randperm(num_rows * each).int().to(device)
    starts = torch.arange(0, num_rows * each, each, dtype=torch.int32, device=device)
    at, nothing = torch.tensor(positions, dtype=torch.int32, device=device), torch.empty(0, device=device)
    rows = Rows(at, at, starts, page_ids, nothing, nothing)
    selected = Selected(
        torch.full((num_rows, top_k), -7, dtype=torch.int32, device=device),
        torch.full((num_rows,), -7, dtype=torch.int32, device=device),
    )
    kernels.select(scores, rows, selected, PAGE_SIZE, first=first)
    for row, position in enumerate(positions):
        visible = position + 1
        if visible <= top_k and not first:
            assert int(selected.counts[row]) == -7
            continue
        own = scores[row, :visible].cpu()
        own = torch.where(own > -torch.inf, own, -torch.inf)
        best = own.sort(descending=True, stable=True).indices[:top_k].sort().values
        table = page_ids[row * each :].cpu()
        expected = table[best // PAGE_SIZE] * PAGE_SIZE + best % PAGE_SIZE
        assert int(selected.counts[row]) == len(best)
        assert selected.slots[row, : len(best)].tolist() == expected.tolist()


def scores_of(num_rows: int, capacity: int, device: torch.device, kind: str) -> torch.Tensor:
    torch.manual_seed(num_rows)
    scores = torch.randn(num_rows, capacity) * 3
    if kind == "ties":
        scores = scores.round()
    elif kind == "equal":
        scores = torch.zeros_like(scores)
        scores[:, ::3] = -0.0
    elif kind == "nonsense":
        scores[:, ::5], scores[:, 1::7], scores[:, 2::11] = torch.nan, -torch.inf, torch.inf
    return scores.to(device)


KINDS = ("different", "ties", "equal", "nonsense")


@pytest.mark.parametrize("heads", [8, 16, 64])
@pytest.mark.parametrize("top_k", [64, 2048])
def test_splits_are_small_enough_for_their_blocks(heads: int, top_k: int) -> None:
    for num_rows in range(1, cuda_latent.MOST_ROWS + 1):
        splits = cuda_latent.num_splits(num_rows, heads, top_k)
        assert splits & (splits - 1) == 0
        assert -(-top_k // (splits * cuda_latent.BLOCKS)) <= cuda_latent.MOST_TOKENS


def test_splits_are_merged_as_torch_merges_them(emulated: CudaLatent) -> None:
    for num_tokens, heads, splits in ((1, 2, 64), (2, 1, 8), (2, 1, 4), (1, 2, 2), (1, 1, 1)):
        require_merged(emulated, num_tokens, heads, splits, CPU)


def test_a_block_merges_a_head_of_two_tokens(emulated: CudaLatent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_latent, "MOST_MERGING", 0)
    require_merged(emulated, 3, 2, 2, CPU)


def test_rows_attend_to_what_they_have_selected(emulated: CudaLatent) -> None:
    require_attended(emulated, [300, 1], 8, 512, 1, CPU)
    require_attended(emulated, [90], 11, 96, 2, CPU)
    require_attended(emulated, [90, 17], 11, 96, 1, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_scores_are_selected(emulated: CudaLatent, kind: str) -> None:
    require_selected(emulated, scores_of(2, 700, CPU, kind), [699, 150], 64)


def test_rows_that_see_few_tokens_select_all_of_them_once(emulated: CudaLatent) -> None:
    scores = scores_of(3, 200, CPU, "different")
    require_selected(emulated, scores, [63, 0, 64], 64)
    require_selected(emulated, scores, [63, 0, 64], 64, first=False)


def test_scores_that_fit_nowhere_are_read_again(emulated: CudaLatent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_latent, "MOST_HELD", 16)
    require_selected(emulated, scores_of(1, 300, CPU, "ties"), [290], 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_splits_are_merged_as_torch_merges_them(on_gpu: CudaLatent) -> None:
    for num_tokens, heads, splits in (
        *((1, 8, 64), (4, 8, 64), (16, 8, 16), (3, 64, 1)),
        *((1, 8, 4), (4, 8, 2), (2, 8, 8), (4, 16, 4), (3, 16, 2)),
    ):
        require_merged(on_gpu, num_tokens, heads, splits, GPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("splits", [0, 2, 4, 8])
def test_on_a_gpu_rows_attend_to_what_they_have_selected(on_gpu: CudaLatent, splits: int) -> None:
    require_attended(on_gpu, [2048], 8, 2048, splits, GPU)
    require_attended(on_gpu, [2048, 1, 700, 129], 8, 2048, splits, GPU)
    require_attended(on_gpu, [2048, 2047, 1, 1100], 16, 2048, splits, GPU)
    require_attended(on_gpu, [100 * n + 1 for n in range(16)], 64, 2048, splits, GPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_the_highest_scores_are_selected(on_gpu: CudaLatent, kind: str) -> None:
    require_selected(on_gpu, scores_of(1, 8192, GPU, kind), [8191], 2048)
    require_selected(on_gpu, scores_of(4, 32_768, GPU, kind), [32_767, 20_000, 2048, 2047], 2048)
    require_selected(on_gpu, scores_of(2, 500_000, GPU, kind), [499_999, 131_071], 2048)
    require_selected(on_gpu, scores_of(64, 3000, GPU, kind), list(range(2900, 2964)), 64)
