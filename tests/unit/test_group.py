"""What ranks say to each other within a step."""

import pytest
import torch

from shared.engine.parallel.distributed import DistributedGroup, host_store, shared_out
from shared.engine.parallel.group import ordered_sum
from tests.law.ranks import Ranks


def test_sums_and_joins_are_equal_on_all_ranks_and_in_their_order() -> None:
    ranks = Ranks(3)
    sums = ranks.all(lambda rank: ranks.groups[rank].sum(torch.full((2, 2), 10.0**rank)))
    joined = ranks.all(lambda rank: ranks.groups[rank].join(torch.full((2, 1), float(rank))))
    ranks.close()
    assert all(total.tolist() == [[111.0, 111.0]] * 2 for total in sums)
    assert all(parts.tolist() == [[0.0, 1.0, 2.0]] * 2 for parts in joined)


def test_a_sum_of_many_rows_is_the_sums_of_each() -> None:
    parts = [torch.randn(64, 33, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    rows = [ordered_sum([part[row : row + 1] for part in parts]) for row in range(64)]
    assert torch.equal(ordered_sum(parts), torch.cat(rows))


def test_parts_in_bfloat16_are_added_in_float32() -> None:
    parts = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    assert ordered_sum(parts).item() == 258.0


def test_a_sum_that_ranks_share_out_is_that_of_one_that_adds_up_alone() -> None:
    ranks = Ranks(3)
    parts = [torch.randn(8, 33, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def sum_of(rank: int) -> torch.Tensor:
        group = ranks.groups[rank]
        assert isinstance(group, DistributedGroup)
        return shared_out(group._gloo, parts[rank], 3, lambda shares: ordered_sum(shares.unbind()))

    sums = ranks.all(sum_of)
    ranks.close()
    assert all(torch.equal(total, ordered_sum(parts)) for total in sums)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensors_of_a_gpu_go_by_nccl() -> None:
    group = DistributedGroup(host_store(20.0), 0, 1, 20.0)
    part = torch.randn(3, 5, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(group.sum(part), part)
    assert torch.equal(group.join(part), part)
