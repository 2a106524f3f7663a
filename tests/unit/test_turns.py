"""Comparing two ways of doing the same thing, in turns."""

from random import Random

import pytest

from bench import turns


def test_a_difference_shows_through_noise_that_both_have() -> None:
    chance = Random(1)
    noise = [chance.uniform(0, 100) for _ in range(40)]
    second = [value + 5 + chance.uniform(-1, 1) for value in noise]
    found = turns.difference(noise, second)
    assert found.low <= 5 <= found.high
    assert found.high - found.low < 2
    assert found.low <= found.median <= found.high


def test_no_difference_is_told_apart_from_none() -> None:
    chance = Random(2)
    first = [chance.gauss(100, 10) for _ in range(40)]
    second = [chance.gauss(100, 10) for _ in range(40)]
    found = turns.difference(first, second)
    assert found.low < 0 < found.high


def test_a_pair_that_something_came_between_moves_nothing() -> None:
    found = turns.difference([10.0] * 21, [12.0] * 20 + [500.0])
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
    assert str(found) == "+2.0 (+2.0 to +2.0)"


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_what_is_no_pairs_is_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        turns.difference(first, second)


async def test_each_way_is_gone_once_a_turn_and_none_is_always_first() -> None:
    gone: list[str] = []

    async def go(name: str) -> None:
        gone.append(name)

    chance = Random(3)
    for _ in range(20):
        await turns.in_turns({"a": lambda: go("a"), "b": lambda: go("b")}, chance)
    assert all(set(gone[at : at + 2]) == {"a", "b"} for at in range(0, 40, 2))
    assert set(gone[::2]) == {"a", "b"}


def test_a_difference_is_shown_to_a_tenth_or_as_it_is_wanted() -> None:
    found = turns.Difference(1.25, -0.5, 3.0)
    assert f"{found}" == str(found) == "+1.2 (-0.5 to +3.0)"
    assert f"{found:+.2f}" == "+1.25 (-0.50 to +3.00)"
