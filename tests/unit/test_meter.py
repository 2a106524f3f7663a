"""Rates that an engine measures of itself."""

import pytest

from shared.engine.meter import PromptCost


def fed(per_token: float, per_pair: float, *starts: int) -> PromptCost:
    cost = PromptCost(memory=1e9)
    for start in starts:
        pairs = ((start + 512) ** 2 - start**2) / 2
        cost.add(512, pairs, 512 * per_token + pairs * per_pair)
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
    cost.add(512, 131_072, 500.0)
    cost.add(512, 4_000_000, 10.0)
    assert cost.ms_per_pair >= 0
    assert cost.ms_per_token >= 0


def test_where_pairs_explain_all_of_it_rounding_makes_no_rate_negative() -> None:
    """Such a rate would say that to compute more takes less time than to compute nothing."""
    for num_tokens in range(1, 200):
        cost = PromptCost(memory=1e9)
        for start, ms in ((0, 0.1), (num_tokens, num_tokens / 3), (7 * num_tokens, 3.0 * num_tokens)):
            cost.add(num_tokens, ((start + num_tokens) ** 2 - start**2) / 2, ms)
        assert 0 <= cost.ms_per_token < 1e-9


def test_nothing_is_known_before_the_first_prompt() -> None:
    assert (PromptCost(memory=1.0).ms_per_token, PromptCost(memory=1.0).ms_per_pair) == (0.0, 0.0)
