"""The steps that were launched and have not landed: what they compute, and the pages that they may still write to.

A step of an executor that computes at once lands before the next one is planned. Of one that runs behind, a GPU, one
step stays in flight while the next is planned and launched; then it lands. So the device finds its next step waiting,
and the host has the time of a step to plan, and to say what the last one chose.

Drafts that the executor proposes, it also verifies behind the step that does: how many of them are right, and so where
the next step goes on, it knows before the host does, which plans for all of them.

The next step is not launched before this one has landed where the host needs to know what this one chooses: drafts
from the text are looked for in it; an output is held to a grammar; and see `BatchItem.needs_host`. What a sequence
computes behind its end is passed over when it lands.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.engine.api import BatchItem, Chosen, Executor, Step
from shared.engine.kv.store import KvStore, PageTable
from shared.engine.scheduler import Part
from shared.engine.sequence import Sequence
from shared.errors import Internal, WorkerLost


@dataclass(frozen=True, slots=True)
class Launched:
    """A step in flight. `left` are pages of sequences that ended meanwhile."""

    parts: list[Part]
    items: list[BatchItem]
    step: Step
    at_s: float
    left: list[PageTable] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that is computed, and took `elapsed_ms` of the device; or that failed."""

    parts: list[Part]
    items: list[BatchItem]
    chosen: list[Chosen | None]
    elapsed_ms: float
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """A step that could not be launched; satisfies `Step`."""

    error: Exception

    def is_done(self) -> bool:
        """It never was begun."""
        return True

    def chosen(self) -> list[Chosen | None]:
        """Raises what went wrong."""
        raise self.error


class Flight:
    """Between two calls of the engine's step, at most one step is in flight, and another may be launched behind it.
    With `drafts_here` drafts are those that the executor proposes."""

    def __init__(
        self, executor: Executor, kv: KvStore, clock: Callable[[], float], *, drafts_here: bool = False
    ) -> None:
        self._executor, self._kv, self._clock, self._drafts_here = executor, kv, clock, drafts_here
        self._steps: deque[Launched] = deque()
        self._landed_at_s = clock()

    def __len__(self) -> int:
        """Steps in flight."""
        return len(self._steps)

    def takes(self, items: list[BatchItem]) -> bool:
        """Whether a step of these may be launched now."""
        return not (self._steps and self._executor.proposes and any(item.needs_host for item in items))

    def launch(self, parts: list[Part], items: list[BatchItem]) -> None:
        """Have a step computed. Raises WorkerLost; what else goes wrong comes when the step lands."""
        at_s = self._clock()
        try:
            step = self._executor.launch(items)
        except WorkerLost:
            raise
        except Exception as error:
            step = Broken(error)
        self._steps.append(Launched(parts, items, step, at_s))
        place, num_places = 0, sum(item.sample for item in items)
        for part, item in zip(parts, items, strict=True):
            part.sequence.launch(part.end, item, place, num_places, item.num_wanted if self._drafts_here else 0)
            place += item.sample

    def is_due(self, *, planned: bool) -> bool:
        """Whether a step should land now, after one was `planned` or none was: one that was just launched stays in
        flight if another may be launched behind it."""
        return len(self._steps) > 1 or (len(self._steps) == 1 and not (planned and self._may_be_followed()))

    def land(self) -> Landed:
        """Wait for the first step. Raises WorkerLost."""
        first = self._steps[0]
        chosen, error = list[Chosen | None](), None
        try:
            chosen = first.step.chosen()
            if len(chosen) != len(first.items):
                raise Internal(f"the executor answered {len(chosen)} of {len(first.items)} sequences")
        except WorkerLost:
            raise
        except Exception as failure:
            error = failure
        self._steps.popleft()
        started_s, self._landed_at_s = max(first.at_s, self._landed_at_s), self._clock()
        for table in first.left:
            self._kv.drop(table)
        return Landed(first.parts, first.items, chosen, (self._landed_at_s - started_s) * 1000, error)

    def drop(self, sequence: Sequence) -> None:
        """Let the pages of a sequence go as soon as no step may write to them."""
        for launched in reversed(self._steps):
            if any(part.sequence is sequence for part in launched.parts):
                launched.left.append(sequence.table.move())
                return
        self._kv.drop(sequence.table)

    def _may_be_followed(self) -> bool:
        last, proposes = self._steps[-1], self._executor.proposes
        if not self._executor.runs_behind or isinstance(last.step, Broken):
            return False
        if self._drafts_here:
            return not any(item.needs_host for item in last.items)
        return not any(item.num_drafts or item.allowed or (proposes and item.num_wanted) for item in last.items)
