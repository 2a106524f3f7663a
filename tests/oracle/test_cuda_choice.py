"""The kernel that chooses tokens beside torch: on the CPU as C++ with a coroutine for each lane, and on a GPU."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.engine.api import BatchItem
from shared.engine.kernels import build, cuda_choice
from shared.engine.kernels.cuda_choice import CudaChoice
from shared.engine.sampling.batched import BatchedSampler
from shared.models.store import default_cache
from tests.oracle.emulated_cuda import compiled
from tests.unit.drawing import CUTS, VOCAB, item, rows

GPU = torch.device("cuda", 0)
WAYS = [*CUTS, {"temperature": 0.0}, {"top_k": 30, "top_p": 0.6}, {"min_p": 0.01, "top_p": 0.95}, {"top_p": 1e-9}]


@pytest.fixture(scope="module")
def emulated() -> CudaChoice:
    return CudaChoice(cuda_choice.load(compiled("choose.cu")))


def asking(count: int, ways: Sequence[dict[str, Any]]) -> list[BatchItem]:
    return [item([0] * (1 + n), 1, **({"temperature": 1.0, "seed": n} | ways[n % len(ways)])) for n in range(count)]


def require_twins_tokens(kernel: CudaChoice, logits: torch.Tensor, items: list[BatchItem]) -> None:
    vocab = logits.shape[1]
    ours, twin = BatchedSampler(vocab, (), kernel), BatchedSampler(vocab, ())
    assert ours.launch(logits, items).tokens.tolist() == twin.launch(logits, items).tokens.tolist()


def tied(count: int, vocab: int) -> torch.Tensor:
    """Logits of few values, which many tokens share: some threshold is always one of them."""
    return rows(count, vocab, seed=3).round()


def with_nonsense(count: int, vocab: int) -> torch.Tensor:
    """Tokens that are forbidden, and rows that a model made which computes nonsense."""
    made = rows(count, vocab, seed=4, scale=8.0)
    made[:, ::7] = -torch.inf
    made[1], made[2, 5], made[3, 6], made[4] = -torch.inf, torch.nan, torch.inf, 0.0
    made[5, 1:] = -1e30
    return made


def test_tokens_are_the_twins(emulated: CudaChoice) -> None:
    count = 2 * len(WAYS)
    for logits in (rows(count), tied(count, VOCAB), with_nonsense(count, VOCAB)):
        require_twins_tokens(emulated, logits, asking(count, WAYS))


def test_of_ties_at_a_threshold_the_first_are_kept(emulated: CudaChoice) -> None:
    """All tokens weigh the same, so that each of those that a cut keeps comes up, and no other."""
    ways: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.04}, {"top_k": 50, "top_p": 0.05}]
    found = BatchedSampler(VOCAB, (), emulated).launch(torch.zeros(45, VOCAB), asking(45, ways)).tokens
    assert [set(found[way::3].tolist()) for way in range(3)] == [{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2}]


def test_rows_may_lie_apart(emulated: CudaChoice) -> None:
    padded = torch.full((4, VOCAB + 30), 99.0)
    padded[:, :VOCAB] = rows(4)
    require_twins_tokens(emulated, padded[:, :VOCAB], asking(4, WAYS))


def test_noise_may_begin_where_only_the_device_knows(emulated: CudaChoice) -> None:
    """Behind drafts in doubt: the positions are `moved` on."""
    items, moved = asking(len(WAYS), WAYS), torch.arange(len(WAYS)) % 3
    in_doubt = [replace(each, num_in_doubt=2) for each in items]
    there = [replace(each, start=each.start + by) for each, by in zip(items, moved.tolist(), strict=True)]
    logits = rows(len(WAYS))
    found = BatchedSampler(VOCAB, (), emulated).launch(logits, in_doubt, None, moved).tokens
    assert found.tolist() == BatchedSampler(VOCAB, ()).launch(logits, there).tokens.tolist()
    assert found.tolist() != BatchedSampler(VOCAB, ()).launch(logits, items).tokens.tolist()


def test_a_larger_vocabulary_is_shared_out_to_more_warps(emulated: CudaChoice) -> None:
    require_twins_tokens(emulated, tied(1, 5_000), asking(1, [{"top_k": 400, "top_p": 0.8}]))


def on_a_gpu(vocab: int) -> CudaChoice:
    kernel = cuda_choice.find(GPU, default_cache() / "kernels", vocab)
    assert kernel is not None
    return kernel


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocab", [VOCAB, 512, 5_003, 49_152, 128_256, 154_880, 262_144])
def test_on_a_gpu_tokens_are_the_twins(vocab: int) -> None:
    kernel, count = on_a_gpu(vocab), 4 * len(WAYS)
    for logits in (rows(count, vocab), rows(count, vocab, scale=0.5), tied(count, vocab), with_nonsense(count, vocab)):
        require_twins_tokens(kernel, logits.to(GPU), asking(count, WAYS))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_one_row_is_drawn_as_among_many() -> None:
    chance, kernel, logits = random.Random(2), on_a_gpu(49_152), rows(64, 49_152).to(GPU)
    items = asking(64, [chance.choice(WAYS) for _ in range(64)])
    sampler = BatchedSampler(49_152, (), kernel)
    together = sampler.launch(logits, items).tokens.tolist()
    assert [int(sampler.launch(logits[n : n + 1], items[n : n + 1]).tokens) for n in range(64)] == together


def test_a_gpu_without_clusters_is_an_obstacle_with_a_name(tmp_path: Any) -> None:
    with pytest.raises(build.BuildError, match=r"capability is 8\.9, and 9\.0 is needed"):
        build.cuda_library(tmp_path, "/bin/true", (8, 9), "choice")
