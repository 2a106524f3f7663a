"""A forked child is waited for, asked and ended as an executed one is."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from shared import forking
from shared.forking import Child, Forked

pytestmark = pytest.mark.skipif(not forking.can_wait(), reason="no handles of processes here")
WAITS = "import sys; sys.exit(int(sys.stdin.read()))"
DEADLINE_S = 60.0


def executed(arguments: list[str], stdin: int) -> Child:
    return subprocess.Popen(arguments, stdin=stdin)


def forked(arguments: list[str], stdin: int) -> Child:
    """A child of which nothing is known but its process id."""
    return Forked(os.posix_spawn(arguments[0], arguments, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)]))


@pytest.mark.parametrize("begin", [executed, forked])
@pytest.mark.parametrize("ends", [3, signal.SIGTERM, signal.SIGKILL], ids=["by itself", "terminated", "killed"])
def test_a_child_runs_until_it_ends_and_says_how(begin: Callable[[list[str], int], Child], ends: int) -> None:
    reads, writes = os.pipe()
    child = begin([sys.executable, "-c", WAITS], reads)
    os.close(reads)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    if isinstance(ends, signal.Signals):
        {signal.SIGTERM: child.terminate, signal.SIGKILL: child.kill}[ends]()
    else:
        os.write(writes, str(ends).encode())
    os.close(writes)
    status = -ends if isinstance(ends, signal.Signals) else ends
    assert child.wait(DEADLINE_S) == child.poll() == child.wait() == status
    child.kill()  # nobody else


def test_threads_that_wait_for_one_child_all_learn_of_its_end() -> None:
    reads, writes = os.pipe()
    child = forked([sys.executable, "-c", WAITS], reads)
    found: list[int] = []
    waiting = [threading.Thread(target=lambda: found.append(child.wait(DEADLINE_S))) for _ in range(5)]
    for thread in waiting:
        thread.start()
    os.write(writes, b"4")
    for end in (reads, writes):
        os.close(end)
    for thread in waiting:
        thread.join()
    assert found == [4] * 5


def test_a_process_of_two_threads_is_found_out() -> None:
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait)
    thread.start()
    try:
        assert not forking.has_one_thread()
    finally:
        may_end.set()
        thread.join()
