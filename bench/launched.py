"""Steps that are launched one behind another before any has landed, and the same in order."""

from collections.abc import Sequence

import torch

from shared.engine.api import BatchItem, Computed, Executor
from shared.engine.executor import TorchExecutor

HEAD_START_CYCLES = 1_500_000_000  # about 0.8 s


class InOrder:
    """Satisfies `shared.engine.api.Executor`: the same, but each step is waited for before the next is planned."""

    runs_behind = False

    def __init__(self, own: TorchExecutor) -> None:
        self.spec, self.memory, self.recorded, self.proposes = own.spec, own.memory, own.recorded, own.proposes
        self._own = own

    def launch(self, batch: Sequence[BatchItem]) -> Computed:
        return Computed(self._own.forward(batch))


def gpu_ms(executor: Executor, steps: Sequence[Sequence[BatchItem]]) -> float:
    """The time on the GPU of one of these steps, each launched behind the one before it, but for the first; not a
    number if the host was too slow to queue them before the first of them began."""
    executor.launch(steps[0]).chosen()
    _queued(executor, steps)  # memory for so many steps at once is had now, for which the host may wait
    busy_ms, in_time = _queued(executor, steps)
    return busy_ms / (len(steps) - 1) if in_time else float("nan")


def _queued(executor: Executor, steps: Sequence[Sequence[BatchItem]]) -> tuple[float, bool]:
    """The time of all but the first, and whether they were queued before the first of them began."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    launched = [executor.launch(steps[0])]
    start.record()
    launched += [executor.launch(items) for items in steps[1:]]
    end.record()
    in_time = not start.query()
    for step in launched:
        step.chosen()
    return start.elapsed_time(end), in_time
