"""Measured rates of an engine: what the router predicts with."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.engine.scheduler import Part


@dataclass(slots=True)
class Rate:
    """Time (or anything else) per unit, old measurements fading: after `memory` units one counts a third (1/e)."""

    memory: float
    _ms: float = 0.0
    _units: float = 0.0

    def add(self, ms: float, units: float) -> None:
        """Something of so many units took so long."""
        keep = max(0.0, 1 - units / self.memory)
        self._ms = self._ms * keep + ms
        self._units = self._units * keep + units

    @property
    def ms(self) -> float:
        """Milliseconds per unit; 0 before the first measurement."""
        return self._ms / self._units if self._units else 0.0


@dataclass(slots=True)
class Slope:
    """What one row more adds to the time of a step: the line of least squares through the steps so far, old ones
    fading."""

    memory: float
    _steps: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def add(self, rows: float, ms: float) -> None:
        """A step of so many rows took so long."""
        keep = 1 - 1 / self.memory
        self._steps = self._steps * keep + 1
        self._x, self._y = self._x * keep + rows, self._y * keep + ms
        self._xx, self._xy = self._xx * keep + rows * rows, self._xy * keep + rows * ms

    @property
    def ms(self) -> float:
        """Milliseconds per row, not below 0 nor above the mean; 0 before steps of different sizes were seen."""
        spread = self._xx * self._steps - self._x * self._x
        if spread <= 1e-3 * self._steps * self._steps:
            return 0.0
        slope = (self._xy * self._steps - self._x * self._y) / spread
        return min(max(0.0, slope), self._y / self._x)


class Meter:
    """Prefill time per token, and what steps take that only decode.

    In a mixed step prompts are charged with what the step took longer than a decode step does.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._prefill = Rate(memory=8192)
        self._step = Rate(memory=64)
        self._tokens = Rate(memory=64)
        self._row = Slope(memory=256)

    @property
    def prefill_ms_per_token(self) -> float:
        """Milliseconds that a token of a prompt takes."""
        return self._prefill.ms

    @property
    def decode_step_ms(self) -> float:
        """Milliseconds from one token of a running sequence to its next, on average over accepted drafts too."""
        return self._step.ms / (self._tokens.ms or 1.0)

    @property
    def draft_ms(self) -> float:
        """Milliseconds that verifying one draft more takes; 0 before it is known."""
        return self._row.ms

    def record(self, parts: Sequence[Part], num_chosen: int, elapsed_ms: float) -> None:
        """A step with these parts chose so many tokens and took so long."""
        self.num_steps += 1
        num_prompt_tokens = sum(part.num_tokens for part in parts if not part.is_decode)
        if not num_prompt_tokens:
            self._step.add(elapsed_ms, 1)
            self._tokens.add(num_chosen / len(parts), 1)
            self._row.add(sum(1 + part.num_drafts for part in parts), elapsed_ms)
        else:
            decodes = any(part.is_decode for part in parts)
            self._prefill.add(max(0.0, elapsed_ms - decodes * self._step.ms), num_prompt_tokens)
