"""What a rank's GPU has of what joins an MTP layer to its model, and what drafts are chosen by. Needs Triton."""

from typing import Any, cast

import pytest
import torch

from shared.engine.kernels import w8a16
from shared.engine.kernels.cuda_fp8 import CudaFp8, Fp8Matrix
from tests.unit.interpreted import needs_triton

pytestmark = needs_triton


class OneOf:
    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_shares_of_what_joins_the_layer_make_the_whole(num_ranks: int) -> None:
    from shared.engine.models.glm_mtp_cuda import own_rows

    join = torch.randn(8, 16)
    shares = [own_rows(join, cast("Any", OneOf(rank, num_ranks))) for rank in range(num_ranks)]
    assert torch.equal(torch.cat(shares), join)


def test_what_cannot_be_shared_out_is_whole_on_each() -> None:
    from shared.engine.models.glm_mtp_cuda import own_rows

    join = torch.randn(8, 16)
    assert torch.equal(own_rows(join, cast("Any", OneOf(1, 3))), join)


def layer_with(output: object) -> Any:
    class Some:
        pass

    layer, layer_attention = Some(), Some()
    setattr(layer_attention, "output", output)  # noqa: B010
    setattr(layer, "attention", layer_attention)  # noqa: B010
    return layer


def in_e4m3() -> Fp8Matrix:
    codes, scales = w8a16.quantize(torch.randn(128, 128))
    return Fp8Matrix(w8a16.of_blocks(codes, scales), cast("CudaFp8", None))


def test_drafts_are_chosen_by_a_head_in_e4m3_where_the_layer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.engine.models import glm_mtp_cuda

    monkeypatch.setattr(glm_mtp_cuda, "QUANTIZED_ROWS", 128)
    head = torch.randn(304, 256)  # two blocks and less than half of one
    found = glm_mtp_cuda.draft_head(head, layer_with(in_e4m3()))
    assert isinstance(found, Fp8Matrix)
    assert found.weight.shape == (304, 256)
    assert float((w8a16.unpack(found.weight) - head).norm() / head.norm()) < 0.04


def test_and_by_the_models_own_elsewhere() -> None:
    from shared.engine.models.glm_mtp_cuda import draft_head

    head = torch.randn(304, 256)
    assert draft_head(head, layer_with(torch.randn(8, 8))) is head
    uneven = head[:300]
    assert draft_head(uneven, layer_with(in_e4m3())) is uneven
