"""Ranks of one model as threads of one process, over the process group that processes would use."""

import ctypes
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shared.engine.api import BatchItem, Executor
from shared.engine.executor import TorchExecutor, load_executor
from shared.engine.kv.layout import Span
from shared.engine.parallel import distributed
from shared.engine.parallel.executor import ParallelExecutor
from shared.engine.parallel.group import Group
from shared.engine.parallel.partition import ExpertSplit, Shard
from shared.engine.speculation.speculator import Speculation
from shared.engine.transfer.layout_plan import Reader, plan
from tests.law.worker import Worker

TIMEOUT_S = 30.0


class Thread:
    """Satisfies `Follower`."""

    def __init__(self, executor: Executor) -> None:
        self._batches: queue.Queue[Sequence[BatchItem] | None] = queue.Queue()
        self._executor = executor
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def follow(self, batch: Sequence[BatchItem]) -> None:
        self._batches.put(batch)

    def is_gone(self) -> bool:
        return not self._thread.is_alive()

    def close(self) -> None:
        self._batches.put(None)
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            self._executor.launch(batch).chosen()


class Ranks:
    """A group of ranks that may load one model after another."""

    def __init__(self, num_ranks: int, timeout_s: float = TIMEOUT_S) -> None:
        self.num_ranks = num_ranks
        self._together = ThreadPoolExecutor(num_ranks)
        store = distributed.host_store(TIMEOUT_S)
        self.groups: list[Group] = self.all(
            lambda rank: distributed.DistributedGroup(
                store if rank == 0 else distributed.join_store(store.port, TIMEOUT_S), rank, num_ranks, timeout_s
            )
        )
        self._threads: list[Thread] = []

    def all(self, work: Callable[[int], object]) -> list:  # type: ignore[type-arg]
        """What each rank makes of its number, all at once."""
        return list(self._together.map(work, range(self.num_ranks)))

    def load(
        self, model_dir: Path, num_pages: int, split: ExpertSplit = "experts", *, rejection: bool = False
    ) -> "RankedExecutor":
        executors: list[TorchExecutor] = self.all(
            lambda rank: load_executor(
                model_dir,
                model_name="tiny",
                dtype="float32",
                page_size=16,
                num_threads=1,
                num_pages=num_pages,
                shard=Shard(rank, self.num_ranks, split),
                group=self.groups[rank],
                mtp=True,
                rejection=rejection,
            )
        )
        followers = [Thread(executor) for executor in executors[1:]]
        self._threads += followers
        return RankedExecutor(executors, followers)

    def close(self) -> None:
        for thread in self._threads:
            thread.close()
        self._together.shutdown()


class RankedExecutor(ParallelExecutor):
    """Also knows the ranks' pools and how they are laid out."""

    def __init__(self, executors: list[TorchExecutor], followers: Sequence[Thread]) -> None:
        super().__init__(executors[0], followers, TIMEOUT_S)
        self.executors = executors


class RankedWorker(Worker):
    """Reads pages as its ranks' transports would."""

    def __init__(self, executor: RankedExecutor, speculation: Speculation | None = None) -> None:
        super().__init__(executor, speculation=speculation)
        self.executors: Sequence[TorchExecutor] = executor.executors

    def read(self, peer: Worker, remote: Sequence[int], local: Sequence[int]) -> None:
        assert isinstance(peer, RankedWorker)
        theirs = [each.layout for each in peer.executors]
        for rank, own in enumerate(self.executors):
            for take in plan(own.layout, theirs, Reader(rank, len(self.executors))):
                spans = take.slices.spans if take.slices else (Span(0, 0, own.layout.page_bytes),)
                _copy(peer.executors[take.rank], remote, own, local, spans)


class AloneWorker(RankedWorker):
    """The same with one rank."""

    def __init__(self, executor: Executor, speculation: Speculation | None = None) -> None:
        assert isinstance(executor, TorchExecutor)
        Worker.__init__(self, executor, speculation=speculation)
        self.executors = [executor]


def _copy(
    source: TorchExecutor, remote: Sequence[int], target: TorchExecutor, local: Sequence[int], spans: Sequence[Span]
) -> None:
    for theirs, ours in zip(remote, local, strict=False):
        at = source.memory.address + theirs * source.memory.page_bytes
        to = target.memory.address + ours * target.memory.page_bytes
        for span in spans:
            ctypes.memmove(to + span.local, at + span.remote, span.num_bytes)
