"""Starting the ranks of a worker: this process is the first, each other one a process of its own."""

from collections.abc import Sequence
from typing import Any

from shared.engine.executor import TorchExecutor, load_executor
from shared.engine.models import registry
from shared.engine.parallel import distributed
from shared.engine.parallel.partition import ExpertSplit, Shard
from shared.errors import Internal
from shared.worker.rank_process import RankProcess
from shared.worker.rank_wire import Here, Ready, Start

# Time in which a process comes up, and in which a share of a model is loaded, however large.
HERE_TIMEOUT_S = 120.0
LOAD_TIMEOUT_S = 3600.0


class Ranks:
    """The ranks of one worker. Close it, or they end with this process."""

    def __init__(
        self,
        settings: dict[str, Any],
        num_ranks: int,
        split: ExpertSplit,
        timeout_s: float,
        log: tuple[str, str],
        forked: Sequence[RankProcess] = (),
    ) -> None:
        """Load a model, with the arguments `settings` of `load_executor`, on `num_ranks` ranks that wait `timeout_s`
        for each other; `log` is their name and level there. Those but the first are `forked`, or executed now. Raises
        a Fault if that is not possible."""
        self.others = list(forked)
        try:
            registry.require_shares(settings["model_dir"], Shard(0, num_ranks, split))
            self.others = self.others or [RankProcess(rank) for rank in range(1, num_ranks)]
            self.executor = self._load(settings, Shard(0, num_ranks, split), timeout_s, log)
        except BaseException:
            self.close()
            raise

    def _load(self, settings: dict[str, Any], shard: Shard, timeout_s: float, log: tuple[str, str]) -> TorchExecutor:
        store = distributed.host_store(timeout_s)
        for other in self.others:
            place = Shard(other.rank, shard.num_ranks, shard.expert_split)
            other.begin(Start(settings, place, store.port, timeout_s, *log))
        for other in self.others:
            other.hear(Here, HERE_TIMEOUT_S)
        group = distributed.DistributedGroup(store, 0, shard.num_ranks, timeout_s)
        executor = load_executor(**settings, shard=shard, group=group)
        num_pages = {executor.spec.num_pages, *(other.hear(Ready, LOAD_TIMEOUT_S).num_pages for other in self.others)}
        if len(num_pages) > 1:
            raise Internal(f"the ranks' pools have different numbers of pages: {sorted(num_pages)}")
        return executor

    def close(self) -> None:
        """End the other ranks."""
        for other in self.others:
            other.close()
