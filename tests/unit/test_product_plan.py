"""How products are cut up for a GPU that has wide ones."""

import pytest

from shared.engine.kernels.product_plan import MAX_BLOCKS, MIN_WIDE, planned, planned_wide

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128, 128), (200, 336)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [MIN_WIDE, 32, 33, 64])
def test_blocks_of_a_wide_product_that_share_out_columns_all_find_a_place(tokens: int, rows: int, columns: int) -> None:
    plan = planned_wide(True, tokens, rows, columns)
    assert plan.is_wide
    assert tokens <= plan.eights * 8
    assert plan.cluster == 1 or plan.num_blocks(rows) <= MAX_BLOCKS
    assert plan.num_squares(rows) == plan.num_blocks(rows) // plan.cluster


@pytest.mark.parametrize(("packed", "tokens", "rows"), [(False, 64, 4096), (True, MIN_WIDE - 1, 4096), (True, 64, 100)])
def test_bf16_few_tokens_and_rows_that_are_no_whole_eights_are_not_multiplied_wide(
    packed: bool, tokens: int, rows: int
) -> None:
    assert planned_wide(packed, tokens, rows, 4096) == planned(packed, tokens, rows, 4096)
