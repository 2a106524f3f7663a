"""Runs of the quantizer. What is killed in one is a process of its own, which imports no more than this."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.engine.quantizer import job
from shared.engine.quantizer.crew import Progress

SHARD_BYTES = 250_000  # the embedding takes 229,376


class Bar:
    """Calls `at` with what has been read so far."""

    def __init__(self, at: Callable[[int], None]) -> None:
        self._at, self._done = at, 0

    def update(self, n: int, /) -> None:
        self._done += n
        self._at(self._done)


def progress(at: Callable[[int], None] = lambda _: None) -> Progress:
    @contextmanager
    def bar(_: int) -> Iterator[Bar]:
        yield Bar(at)

    return bar


OPTIONS = job.Options(shard_bytes=SHARD_BYTES)


def run(source: Path, directory: Path, options: job.Options = OPTIONS, **more: Any) -> job.Result:
    return job.run(source, directory, options, **{"progress": progress()} | more)


def killed(source: Path, directory: Path, point: int) -> None:
    """A run whose process is killed when it has read so much."""

    def at(done: int) -> None:
        if done > point:
            os.kill(os.getpid(), signal.SIGKILL)

    run(source, directory, progress=progress(at))
