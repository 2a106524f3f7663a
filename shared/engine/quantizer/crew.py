"""The processes that write the shards of a quantized checkpoint."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Protocol

import torch

from shared.engine.models.checkpoint import Checkpoint
from shared.engine.quantizer import shard as shard_file
from shared.engine.quantizer.plan import Shard
from shared.errors import WorkerLost

POLL_S = 0.2
STOP = -1


class Bar(Protocol):
    """A progress bar, as tqdm's."""

    def update(self, n: int, /) -> None:
        """`n` more."""


# A bar for so many bytes of the source.
Progress = Callable[[int], AbstractContextManager[Bar]]


def write_all(shards: Sequence[Shard], source: Path, directory: Path, num_processes: int, progress: Progress) -> None:
    """Write `shards`, as `shard.write`, in this process or in several.

    Each computes with one thread: work this fine, shared out to threads, waits for whichever of them has lost its core.
    Raises WorkerLost if a process was killed from outside (by the system, for its memory, most likely).
    """
    with progress(sum(shard.source_bytes for shard in shards)) as bar:
        if num_processes == 1:
            checkpoint = Checkpoint(source, torch.bfloat16)
            with _one_thread():
                for shard in shards:
                    shard_file.write(shard, checkpoint, directory, bar.update)
        elif shards:
            _write_together(shards, source, directory, num_processes, bar)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_together(shards: Sequence[Shard], source: Path, directory: Path, num_processes: int, bar: Bar) -> None:
    context = processes()
    done: Synchronized[int] = context.Value("q", 0)
    with ProcessPoolExecutor(num_processes, context, _Member.begin, (source, directory, done)) as pool:
        try:
            _follow([pool.submit(_Member.write, shard) for shard in shards], done, bar)
        except BrokenProcessPool:
            raise WorkerLost("a process that wrote a shard was killed; the same command goes on from there") from None
        finally:
            done.value = STOP
            pool.shutdown(cancel_futures=True)


def processes() -> ForkServerContext:
    """What begins processes that have imported this module: one that has, torch included, makes all the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _follow(futures: list[Future[None]], done: "Synchronized[int]", bar: Bar) -> None:
    """Show progress until all are written. Raises what the first that fails raises."""
    shown, left = 0, set(futures)
    while left:
        finished, left = wait(left, POLL_S, FIRST_EXCEPTION)
        for future in finished:
            future.result()
        now = done.value
        bar.update(now - shown)
        shown = now


class _Stopped(Exception):
    """Another process has failed."""


class _Member:
    """What a process of the crew has; there is one of it in each."""

    checkpoint: Checkpoint
    directory: Path
    done: "Synchronized[int]"

    @classmethod
    def begin(cls, source: Path, directory: Path, done: "Synchronized[int]") -> None:
        """First in every process. Ctrl-C is for the one that leads."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
        cls.checkpoint, cls.directory, cls.done = Checkpoint(source, torch.bfloat16), directory, done

    @classmethod
    def write(cls, shard: Shard) -> None:
        """Write one shard."""
        shard_file.write(shard, cls.checkpoint, cls.directory, cls._note)

    @classmethod
    def _note(cls, num_bytes: int) -> None:
        with cls.done.get_lock():
            if cls.done.value == STOP:
                raise _Stopped
            cls.done.value += num_bytes
