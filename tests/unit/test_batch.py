from dataclasses import replace

import pytest

from shared.engine import batch
from shared.engine.api import BatchItem, SamplingParams


def item(token_ids: list[int], start: int, page_ids: list[int], sample: bool) -> BatchItem:
    return BatchItem("r", token_ids, start, page_ids, sample, SamplingParams(), 0)


def test_the_parts_of_sequences_lie_end_to_end() -> None:
    built = batch.build([item([7, 8, 9], 4, [5, 2], True), item([6], 0, [1], False), item([3], 2, [0], True)], 4)
    assert (built.num_tokens, built.num_sequences) == (5, 3)
    assert built.token_ids.tolist() == [7, 8, 9, 6, 3]
    assert built.positions.tolist() == [4, 5, 6, 0, 2]
    assert built.query_starts.tolist() == [0, 3, 4, 5]
    assert built.context_lens.tolist() == [7, 1, 3]
    assert built.page_starts.tolist() == [0, 2, 3, 4]
    assert built.page_ids.tolist() == [5, 2, 1, 0]
    assert built.sampled_rows.tolist() == [2, 4]


def test_a_token_is_chosen_behind_each_draft_and_before_the_first() -> None:
    drafted = replace(item([7, 8, 9], 4, [5, 2], True), num_drafts=2)
    built = batch.build([item([1, 2], 0, [0], True), drafted], 4)
    assert built.sampled_rows.tolist() == [1, 2, 3, 4]


def test_rows_that_are_told_of_come_before_those_that_choose() -> None:
    """The first has all but its last row told of, and chooses; the second a part of its rows, and does not."""
    items = [
        replace(item([1, 2, 3], 4, [0, 1], True), logprob_rows=range(4, 6)),
        replace(item([4, 5, 6], 0, [2], False), logprob_rows=range(1, 3), following=7),
        replace(item([8, 9], 0, [3], True), num_drafts=1),
    ]
    built = batch.build(items, 4)
    assert built.sampled_rows.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert [list(each.told) for each in items[:2]] == [[2, 3], [6, 7]]
    assert batch.choosing(built, items).sampled_rows.tolist() == [2, 6, 7]
    assert batch.choosing(built, items[2:]) is built


@pytest.mark.parametrize("broken", [item([], 0, [1], True), item([1, 2], 3, [1], True)])
def test_a_part_without_tokens_or_pages_for_them_is_refused(broken: BatchItem) -> None:
    with pytest.raises(ValueError, match="pages"):
        batch.build([broken], 4)
