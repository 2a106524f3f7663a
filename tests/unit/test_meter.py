"""Rates that an engine measures of itself."""

import pytest

from shared.engine.meter import LASTS_S, PromptCost, lasts_s


def fed(per_token: float, per_pair: float, *starts: int) -> PromptCost:
    cost = PromptCost(memory=1e9)
    for start in starts:
        pairs = ((start + 512) ** 2 - start**2) / 2
        cost.add(512, pairs, 512 * per_token + pairs * per_pair, at_s=0.0)
    return cost


def test_prompts_at_different_depths_tell_a_token_from_what_is_before_it() -> None:
    cost = fed(0.2, 1e-5, 0, 4_096, 16_384, 65_536)
    assert cost.ms_per_token == pytest.approx(0.2)
    assert cost.ms_per_pair == pytest.approx(1e-5)


def test_prompts_at_one_depth_give_a_time_for_each_token() -> None:
    cost = fed(0.2, 1e-5, 0, 0, 0)
    assert cost.ms_per_pair == 0
    assert cost.ms_per_token == pytest.approx(0.2 + 256e-5)


def test_noise_makes_no_rate_negative() -> None:
    cost = PromptCost(memory=1e9)
    cost.add(512, 131_072, 500.0, at_s=0.0)
    cost.add(512, 4_000_000, 10.0, at_s=0.0)
    assert cost.ms_per_pair >= 0
    assert cost.ms_per_token >= 0


def test_where_pairs_explain_all_of_it_rounding_makes_no_rate_negative() -> None:
    """Such a rate would say that to compute more takes less time than to compute nothing."""
    for num_tokens in range(1, 200):
        cost = PromptCost(memory=1e9)
        for start, ms in ((0, 0.1), (num_tokens, num_tokens / 3), (7 * num_tokens, 3.0 * num_tokens)):
            cost.add(num_tokens, ((start + num_tokens) ** 2 - start**2) / 2, ms, at_s=0.0)
        assert 0 <= cost.ms_per_token < 1e-9


def test_nothing_is_known_before_the_first_prompt() -> None:
    assert (PromptCost(memory=1.0).ms_per_token, PromptCost(memory=1.0).ms_per_pair) == (0.0, 0.0)


class Steps:
    """Steps of 400 prompt tokens, one a second."""

    def __init__(self) -> None:
        self.cost, self.now_s = PromptCost(memory=8192), 1_000.0

    def take(self, *ms_per_token: float, beside_ms: float = 0.0) -> float:
        """Steps at these speeds, beside others that take so long in each; what a token is believed to take then."""
        for each in ms_per_token:
            self.now_s += 1.0
            self.cost.add(400, 80_000, 400 * each, self.now_s, 400 * each + beside_ms)
        return self.cost.ms_per_token


@pytest.mark.parametrize("slowed", [1.7, 10.0])
def test_two_steps_in_a_row_at_the_true_speed_make_up_for_any_bad_moment(slowed: float) -> None:
    steps = Steps()
    steps.take(*[1.0] * 10, *[slowed] * 40)
    assert steps.take(1.0) > (1 + slowed) / 2
    assert steps.take(1.0) == pytest.approx(1.0)


def test_one_step_that_seems_to_have_taken_no_time_proves_nothing() -> None:
    """Who looks late at two steps that are over finds that the second took none."""
    steps = Steps()
    steps.take(*[1.0] * 20)
    assert steps.take(2.0, 0.0, 2.0, 0.0) == pytest.approx(1.0, abs=0.1)


def test_what_a_prompt_took_beside_others_proves_it_faster_only_by_the_whole_step() -> None:
    """For what the others took of it is a guess."""
    steps = Steps()
    steps.take(*[1.0] * 20)
    assert steps.take(0.1, 0.1, beside_ms=250.0) > 0.7
    assert steps.take(0.1, 0.1, beside_ms=10.0) == pytest.approx(0.1)


def test_slow_steps_count_by_their_share_and_are_no_proof() -> None:
    steps = Steps()
    steps.take(*[1.0] * 20)
    assert 1.1 < steps.take(3.0) < 1.5


def test_a_rate_lasts_for_as_long_as_it_was_the_same() -> None:
    steps, (least, most) = Steps(), LASTS_S
    steps.take(1.0)
    assert (steps.cost.steady_s, lasts_s(steps.cost.steady_s)) == (0, least)
    steps.take(*[1.1, 0.9] * 10)
    assert lasts_s(steps.cost.steady_s) == steps.cost.steady_s == 20
    steps.take(*[1.0] * 100)
    assert lasts_s(steps.cost.steady_s) == most
    steps.take(*[4.0] * 8)
    assert lasts_s(steps.cost.steady_s) < 8
