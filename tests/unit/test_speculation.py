"""Drafts: who proposes them, how they are verified, how many are worth it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shared.engine.api import BatchItem, DraftCounts, SampledToken, SamplingParams
from shared.engine.meter import Slope
from shared.engine.sim import SimExecutor, SimModel
from shared.engine.speculation.acceptance import OF_A_LAYER, OF_THE_TEXT, Acceptance, num_worthwhile
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.verify import up_to, verified

# The text so far -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([], []),
        ([5], []),
        ([5, 6, 7, 8], []),
        ([1, 2, 3, 4, 9, 9, 1, 2], [3, 4, 9]),
        ([1, 2, 7, 1, 2, 8, 0, 1, 2], [8, 0, 1]),  # of equals the latest
        ([4, 1, 2, 7, 3, 1, 2, 8, 4, 1, 2], [7, 3, 1]),  # the longer match wins
        ([1, 2, 1, 2, 1, 2], [1, 2, 1]),
        ([6, 6, 6], [6, 6, 6]),
    ],
)
def test_the_text_goes_on_as_it_did_before(tokens: list[int], drafts: list[int]) -> None:
    assert NgramProposer().propose(tokens, 3) == drafts


def test_a_period_goes_on_beyond_the_end_of_the_text() -> None:
    assert NgramProposer().propose([3, 4, 5, 3, 4], 8) == [5, 3, 4, 5, 3, 4, 5, 3]


def test_bytes_that_lie_across_tokens_are_no_match() -> None:
    ones = 0x01010101
    assert NgramProposer().propose([0x01010100, ones, 0x00000001, 9, ones, ones], 1) == []


def test_a_proposer_reads_on_from_where_it_was() -> None:
    proposer, tokens = NgramProposer(), [1, 2, 3]
    assert proposer.propose(tokens, 2) == []
    tokens += [9, 1, 2]
    assert proposer.propose(tokens, 2) == [3, 9]


# Verification ---------------------------------------------------------------------------------------------------------

ITEM = BatchItem("r", [3, 10, 11, 12], 5, [0], True, SamplingParams(), 0, [0, 0, 0, 0, 0, 3], num_drafts=3)


def says(tokens: Sequence[int], asked: list[int]) -> tuple[SampledToken, ...]:
    def choose(row: int, item: BatchItem) -> SampledToken:
        asked.append(item.position)
        return SampledToken(tokens[row])

    return verified(ITEM, choose)


@pytest.mark.parametrize(
    ("tokens", "num_chosen"), [([7, 11, 12, 1], 1), ([10, 7, 12, 1], 2), ([10, 11, 7, 1], 3), ([10, 11, 12, 1], 4)]
)
def test_what_the_model_says_counts_up_to_the_first_wrong_draft(tokens: list[int], num_chosen: int) -> None:
    asked: list[int] = []
    assert [token.token_id for token in says(tokens, asked)] == tokens[:num_chosen]
    assert asked == [6, 7, 8, 9][:num_chosen]


def test_behind_a_draft_the_history_has_it_where_penalties_ask_for_it() -> None:
    penalized = replace(ITEM, sampling=SamplingParams(presence_penalty=0.1))
    assert list(up_to(penalized, 2).history) == [0, 0, 0, 0, 0, 3, 10, 11]
    assert up_to(ITEM, 2).history is ITEM.history
    assert (up_to(ITEM, 2).token_ids, up_to(ITEM, 0).token_ids) == ([3, 10, 11], [3])


# How many -------------------------------------------------------------------------------------------------------------


def test_drafts_are_worth_it_as_long_as_their_chance_exceeds_their_cost() -> None:
    assert [num_worthwhile(0.5, cost, 10) for cost in (0.6, 0.5, 0.3, 0.2)] == [0, 0, 1, 2]
    assert num_worthwhile(0.99, 0.1, 7) == 7


def test_a_draft_that_is_free_still_needs_a_chance() -> None:
    assert num_worthwhile(0.01, 0.0, 5) == 0


def test_the_chance_follows_what_is_verified_and_only_up_to_the_first_wrong_draft() -> None:
    lucky, unlucky = Acceptance(), Acceptance()
    for _ in range(50):
        lucky.note(4, 4)
        unlucky.note(4, 0)
    assert lucky.chance > 0.95
    assert 0.05 < unlucky.chance < 0.25
    assert unlucky.tried < 10.1


def test_drafts_of_the_text_have_to_prove_themselves_more_than_those_of_a_layer() -> None:
    """In prose most of them are wrong."""
    assert num_worthwhile(Acceptance(OF_A_LAYER).chance, 0.3, 5) == 3
    assert num_worthwhile(Acceptance(OF_THE_TEXT).chance, 0.3, 5) == 1


def test_an_unlucky_sequence_gets_another_try() -> None:
    acceptance = Acceptance()
    for _ in range(50):
        acceptance.note(4, 0)
    cost = acceptance.chance + 0.01
    assert num_worthwhile(acceptance.chance, cost, 4) == 0
    for _ in range(50):
        acceptance.note(0, 0)
    assert num_worthwhile(acceptance.chance, cost, 4) > 0


def test_the_mean_accepted_length_counts_the_token_that_needs_no_draft() -> None:
    assert DraftCounts((10, 8), (8, 4)).mean_accepted_length == pytest.approx(2.2)
    assert DraftCounts().mean_accepted_length == 0


def test_the_cost_of_a_row_is_the_slope_of_the_times_of_steps() -> None:
    slope = Slope(memory=256)
    assert slope.ms == 0
    for rows in (1, 4, 6, 2, 8):
        slope.add(rows, 10 + 0.5 * rows)
    assert slope.ms == pytest.approx(0.5)


def test_steps_of_one_size_say_nothing_of_the_cost_of_a_row() -> None:
    slope = Slope(memory=256)
    for ms in (10, 11, 9):
        slope.add(6, ms)
    assert slope.ms == 0


# Simulated ------------------------------------------------------------------------------------------------------------


def test_the_sim_proposes_drafts_of_which_a_given_part_is_right() -> None:
    executor = SimExecutor(SimModel(draft_acceptance=0.7), num_pages=8, sleep=lambda seconds: None)
    tokens, verdicts = list(range(3, 13)), []
    item = BatchItem("r", tokens, 0, list(range(8)), True, SamplingParams(), 10, tokens, num_wanted=1)
    while len(tokens) < 110:
        (chosen,) = executor.forward([item])
        assert chosen is not None
        verdicts.append(len(chosen.tokens) == 2)
        tokens += [token.token_id for token in chosen.tokens]
        drafted = [tokens[-1], *chosen.drafts]
        item = replace(item, token_ids=drafted, start=len(tokens) - 1, history=list(tokens), num_drafts=1)
    assert 0.5 < sum(verdicts) / len(verdicts) < 0.9


def test_the_sim_takes_its_time_for_drafts() -> None:
    model = SimModel(prefill_ms_per_token=2, decode_ms=10, decode_ms_per_sequence=1)
    assert model.step_ms([ITEM]) == 10 + 1 + 3 * 2
