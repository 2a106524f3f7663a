"""How a thread sleeps until others wake it."""

import signal
import threading
from collections.abc import Iterator

import pytest

from shared.engine.wake import Wake

LONG_S = 30.0


@pytest.fixture
def interrupting() -> Iterator[None]:
    """SIGUSR1 interrupts what a thread waits for, and does nothing else."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_whoever_was_woken_before_it_slept_does_not_sleep() -> None:
    wake = Wake()
    wake.set()
    wake.set()
    assert wake.wait(None)
    assert not wake.wait(0.001)  # however often it was woken


def test_it_may_sleep_once_that_is_forgotten() -> None:
    wake = Wake()
    wake.clear()
    wake.set()
    wake.clear()
    assert not wake.wait(0.0)


def test_another_thread_wakes_it() -> None:
    wake = Wake()
    other = threading.Timer(0.01, wake.set)
    other.start()
    assert wake.wait(LONG_S)
    other.join()


@pytest.mark.usefixtures("interrupting")
def test_a_sleep_ends_in_time_although_it_is_interrupted_and_looked_at_too_late() -> None:
    """This thread interrupts it and keeps the interpreter meanwhile, so that its time is over when it looks again."""
    wake = Wake()

    def sleep_often() -> None:
        for _ in range(100):
            assert not wake.wait(0.001)

    sleeper = threading.Thread(target=sleep_often, daemon=True)
    sleeper.start()
    for _ in range(3_000_000):
        if not sleeper.is_alive():
            break
        assert sleeper.ident is not None
        signal.pthread_kill(sleeper.ident, signal.SIGUSR1)
    sleeper.join(LONG_S)
    assert not sleeper.is_alive()
