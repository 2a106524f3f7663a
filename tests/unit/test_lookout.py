"""How often an owner looks for READs of its peers."""

from shared.engine.transfer.lookout import BUSY_LOOK_S, DELAY_S, QUIET_DELAY_S, Lookout
from tests.unit.clock import Clock


def pauses(lookout: Lookout, clock: Clock, seconds: float, *, busy: bool = False) -> list[float]:
    """What it waits between looks for so long, each of them with or without something to do."""
    found, end = list[float](), clock() + seconds
    while clock() < end and (pause := lookout.pause_s()) is not None:
        found.append(pause)
        clock.now += pause
        lookout.looked(2 * BUSY_LOOK_S if busy else 0.0)
    return found


def test_who_serves_nobody_does_not_look() -> None:
    clock = Clock()
    lookout = Lookout(clock)
    assert lookout.pause_s() is None
    lookout.serve(clock() + 1, expects=True)
    assert lookout.pause_s() is not None
    clock.now += 1
    assert lookout.pause_s() is None


def test_looks_become_rare_while_nobody_comes() -> None:
    clock = Clock()
    lookout = Lookout(clock)
    lookout.serve(clock() + 10, expects=True)
    quiet = pauses(lookout, clock, 10)
    assert quiet[0] == DELAY_S
    assert quiet == sorted(quiet)
    assert quiet[-1] == QUIET_DELAY_S
    assert len(quiet) < 600


def test_looks_stay_frequent_while_there_is_something_to_do() -> None:
    clock = Clock()
    lookout = Lookout(clock)
    lookout.serve(clock() + 10, expects=True)
    assert set(pauses(lookout, clock, 1, busy=True)) == {DELAY_S}


def test_whoever_comes_after_a_quiet_time_is_met_with_frequent_looks_again() -> None:
    clock = Clock()
    lookout = Lookout(clock)
    lookout.serve(clock() + 10, expects=True)
    pauses(lookout, clock, 1)
    lookout.looked(2 * BUSY_LOOK_S)
    assert lookout.pause_s() == DELAY_S


def test_pages_that_are_announced_are_expected_to_be_read_at_once_and_a_release_expects_nothing() -> None:
    clock = Clock()
    lookout = Lookout(clock)
    lookout.serve(clock() + 10, expects=True)
    pauses(lookout, clock, 1)
    lookout.serve(clock() + 5, expects=False)
    assert lookout.pause_s() == QUIET_DELAY_S
    lookout.serve(clock() + 10, expects=True)
    assert lookout.pause_s() == DELAY_S
