"""An executor that runs behind without a GPU: it computes a step as late as it may, when somebody waits for it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from shared.engine.api import BatchItem, Chosen, EngineSpec, Executor, Recorded, SampledToken, Step, awaited
from shared.engine.kv.memory import PoolMemory
from shared.engine.kv.store import KvStore, PageTable

# What a device goes on to compute from what a failed step left.
NONSENSE = Chosen((SampledToken(0),))


class Behind:
    """Satisfies `shared.engine.api.Executor` by one that computes at once. Like a GPU it looks at nothing of a batch
    after `launch`, and knows what a step chose only when that is computed; unlike one, it minds when rules are broken.
    """

    runs_behind = True

    def __init__(self, own: Executor) -> None:
        self.spec: EngineSpec = own.spec
        self.memory: PoolMemory = own.memory
        self.recorded: Recorded | None = own.recorded
        self.own = own
        self.log: list[str] = []
        self.in_flight: list[LateStep] = []
        self.before_computing: Callable[[], None] = lambda: None
        self.num_moved = 0
        """Tokens by which parts started further on than it seemed when they were launched."""
        self._last: LateStep | None = None

    @property
    def proposes(self) -> bool:
        return self.own.proposes

    def launch(self, batch: Sequence[BatchItem]) -> Step:
        self.log.append("launch")
        assert len(self.in_flight) < 2
        if self.in_flight:
            before = self.in_flight[-1].items
            drafts = [item for item in before if item.num_drafts or (self.proposes and item.num_wanted)]
            assert not drafts or self.proposes
            assert not any(item.needs_host for item in (*before, *batch) if self.proposes)
        items = [replace(item, page_ids=tuple(item.page_ids), history=tuple(item.history)) for item in batch]
        size, most = self.spec.layout.page_size, self.spec.max_model_len
        assert all(_end(item) <= min(most, len(item.page_ids) * size) for item in items), "written where no room is"
        self._last = LateStep(self, items, self._last if self.in_flight else None)
        self.in_flight.append(self._last)
        return self._last

    def is_to_write(self, page_id: int) -> bool:
        """Whether a step in flight writes to a page."""
        return any(page_id in step.pages() for step in self.in_flight)


class LateStep:
    """Satisfies `Step`."""

    def __init__(self, executor: Behind, items: list[BatchItem], before: "LateStep | None") -> None:
        self.items = items
        self.choices: list[Chosen] | None = None
        self._executor, self._before = executor, before

    def is_done(self) -> bool:
        return True

    def chosen(self) -> list[Chosen | None]:
        executor = self._executor
        executor.log.append("land")
        assert executor.in_flight[0] is self, "steps are waited for in order"
        try:
            executor.before_computing()
            resolved = [self._resolved(item) for item in self.items]
            pairs = zip(resolved, self.items, strict=True)
            executor.num_moved += sum(item.start - own.start for item, own in pairs if item is not None)
            computed = iter(executor.own.launch([item for item in resolved if item is not None]).chosen())
        finally:
            executor.in_flight.remove(self)
        choices = [NONSENSE if item is None else next(computed) for item in resolved]
        asked = zip(choices, self.items, strict=True)
        self.choices = [choice for choice, item in asked if choice is not None and item.sample]
        return choices

    def _resolved(self, item: BatchItem) -> BatchItem | None:
        """With what the step before chose in the place of what stood for it; None behind a step that failed."""
        if min(item.token_ids) >= 0:
            return item
        assert self._before is not None
        assert len(item.history) == item.start
        if self._before.choices is None:
            return None
        place, num_places = awaited(item.token_ids[0]), len(self._before.choices)
        assert list(item.token_ids[1:]) == [awaited(place + (1 + n) * num_places) for n in range(item.num_drafts)]
        chosen = self._before.choices[place]
        tokens, drafts = [token.token_id for token in chosen.tokens], chosen.drafts[: item.num_drafts]
        assert len(drafts) == item.num_drafts
        assert len(tokens) - 1 <= item.num_in_doubt
        return replace(
            item,
            token_ids=(tokens[-1], *drafts),
            start=item.start + len(tokens) - 1,
            history=(*item.history, *tokens),
            num_in_doubt=0,
        )

    def pages(self) -> set[int]:
        """Those that it writes to."""
        size, known = self._executor.spec.layout.page_size, self._before is None or self._before.choices is not None
        items = [self._resolved(item) if known else item for item in self.items]
        return {
            page_id
            for item in items
            if item is not None
            for page_id in item.page_ids[item.start // size : (_end(item) - 1) // size + 1]
        }


def _end(item: BatchItem) -> int:
    return item.start + len(item.token_ids) + item.num_in_doubt


class WatchedStore(KvStore):
    """Minds when pages are named or given away that a step in flight writes to."""

    def __init__(self, executor: Executor, num_pages: int, page_size: int, clock: Callable[[], float]) -> None:
        super().__init__(num_pages, page_size, 10_000, clock)
        self.is_to_write = executor.is_to_write if isinstance(executor, Behind) else lambda page_id: False

    def publish(self, table: PageTable, first_page: int, page_hashes: Sequence[bytes]) -> None:
        assert not any(map(self.is_to_write, table.page_ids[first_page : first_page + len(page_hashes)]))
        super().publish(table, first_page, page_hashes)

    def drop(self, table: PageTable) -> None:
        assert not any(map(self.is_to_write, table.page_ids))
        super().drop(table)
