"""Ranks of one model as threads of one process, in turns, or over the process group that processes would use."""

import ctypes
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import torch

from shared.engine.api import BatchItem, Executor
from shared.engine.executor import TorchExecutor
from shared.engine.kv.layout import Span
from shared.engine.parallel import distributed
from shared.engine.parallel.executor import ParallelExecutor, RankedStep
from shared.engine.parallel.group import Group, added, ordered_sum
from shared.engine.parallel.partition import ExpertSplit, Shard
from shared.engine.speculation.speculator import Speculation
from shared.engine.transfer.layout_plan import Reader, plan
from tests.law.conftest import another, load_tiny
from tests.law.worker import Worker

TIMEOUT_S = 30.0


class Turns:
    """Ranks that compute in turns: each from one exchange to the next, then the next rank, and the first again.

    At once they would hold each other up at every operation of torch, which lets go of the interpreter and wants it
    back: over gloo four take more than six times as long as one, in turns four times (docs/LOG.md). Nobody comes to an
    exchange before all have read what there was in the last but one, so there is room for two.
    """

    def __init__(self, num_ranks: int) -> None:
        self._turns = [threading.Semaphore(0) for _ in range(num_ranks)]
        self._parts: list[list[torch.Tensor]] = [[], []]

    def exchange(self, rank: int, number: int, part: torch.Tensor) -> list[torch.Tensor]:
        """What every rank deposited in its exchange of this number."""
        parts = self._parts[number % 2]
        if rank == 0:
            parts.clear()
        parts.append(part)
        self.end(rank)
        self.begin(rank)
        return parts

    def begin(self, rank: int) -> None:
        """Wait for this rank's turn."""
        if not self._turns[rank].acquire(timeout=TIMEOUT_S):
            raise RuntimeError(f"rank {rank} waited too long for its turn")

    def end(self, rank: int) -> None:
        """Let the next rank go on."""
        self._turns[(rank + 1) % len(self._turns)].release()


class InTurns:
    """Satisfies `Group`; a twin of `DistributedGroup` in host memory."""

    def __init__(self, turns: Turns, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._turns, self._number = turns, count()

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return ordered_sum(self._all(part))

    def add(self, part: torch.Tensor, stream: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return added(self.sum(part), stream, gain)

    def join(self, part: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._all(part), dim=-1)

    def _all(self, part: torch.Tensor) -> list[torch.Tensor]:
        return self._turns.exchange(self.rank, next(self._number), part)


class Thread:
    """Satisfies `Follower`."""

    def __init__(self, executor: Executor, rank: int, turns: Turns | None) -> None:
        self._batches: queue.Queue[Sequence[BatchItem] | None] = queue.Queue()
        self._executor, self._rank, self._turns = executor, rank, turns
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
            if self._turns:
                self._turns.begin(self._rank)
            self._executor.launch(batch).chosen()
            if self._turns:
                self._turns.end(self._rank)


class Ranks:
    """A group of ranks that may have one model after another."""

    def __init__(self, num_ranks: int, timeout_s: float = TIMEOUT_S, *, in_turns: bool = False) -> None:
        """Over gloo, unless they compute `in_turns`."""
        self.num_ranks = num_ranks
        self._turns = Turns(num_ranks) if in_turns else None
        self._together = ThreadPoolExecutor(num_ranks)
        self.groups = self._in_turns(self._turns) if self._turns else self._over_gloo(timeout_s)
        self._threads: list[Thread] = []
        self._loaded: dict[tuple[Path, ExpertSplit], list[TorchExecutor]] = {}

    def _in_turns(self, turns: Turns) -> list[Group]:
        return [InTurns(turns, rank, self.num_ranks) for rank in range(self.num_ranks)]

    def _over_gloo(self, timeout_s: float) -> list[Group]:
        store = distributed.host_store(TIMEOUT_S)
        return self.all(
            lambda rank: distributed.DistributedGroup(
                store if rank == 0 else distributed.join_store(store.port, TIMEOUT_S), rank, self.num_ranks, timeout_s
            )
        )

    def all(self, work: Callable[[int], object]) -> list:  # type: ignore[type-arg]
        """What each rank makes of its number, all at once."""
        return list(self._together.map(work, range(self.num_ranks)))

    def executor(
        self, model_dir: Path, num_pages: int, split: ExpertSplit = "experts", *, rejection: bool = False
    ) -> "RankedExecutor":
        """Executors that share the weights with those before."""
        if (model_dir, split) not in self._loaded:
            self._loaded[model_dir, split] = self.all(
                lambda rank: load_tiny(model_dir, shard=Shard(rank, self.num_ranks, split), group=self.groups[rank])
            )
        executors = [another(rank, num_pages, rejection=rejection) for rank in self._loaded[model_dir, split]]
        followers = [Thread(executor, rank, self._turns) for rank, executor in enumerate(executors) if rank]
        self._threads += followers
        return RankedExecutor(executors, followers, self._turns)

    def close(self) -> None:
        for thread in self._threads:
            thread.close()
        self._together.shutdown()


class RankedExecutor(ParallelExecutor):
    """Also knows the ranks' pools and how they are laid out."""

    def __init__(self, executors: list[TorchExecutor], followers: Sequence[Thread], turns: Turns | None) -> None:
        super().__init__(executors[0], followers, TIMEOUT_S)
        self.executors, self._turns = executors, turns

    def launch(self, batch: Sequence[BatchItem]) -> RankedStep:
        step = super().launch(batch)
        if self._turns:  # the others end theirs, too
            self._turns.end(0)
            self._turns.begin(0)
        return step


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
