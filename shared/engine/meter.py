"""Measured rates of an engine: what the router predicts with."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.engine.scheduler import Part


@dataclass(slots=True)
class Rate:
    """Time per unit, old measurements fading: after `memory` units one counts a third (1/e)."""

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


class Meter:
    """Prefill time per token, and the time of a step that only decodes.

    In a mixed step prompts are charged with what the step took longer than a decode step does.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._prefill = Rate(memory=8192)
        self._decode = Rate(memory=64)

    @property
    def prefill_ms_per_token(self) -> float:
        """Milliseconds that a token of a prompt takes."""
        return self._prefill.ms

    @property
    def decode_step_ms(self) -> float:
        """Milliseconds from one token of a running sequence to its next."""
        return self._decode.ms

    def record(self, parts: Sequence[Part], elapsed_ms: float) -> None:
        """A step with these parts took so long."""
        self.num_steps += 1
        num_prompt_tokens = sum(part.num_tokens for part in parts if part.num_tokens > 1)
        if not num_prompt_tokens:
            self._decode.add(elapsed_ms, 1)
        else:
            decodes = any(part.num_tokens == 1 for part in parts)
            self._prefill.add(max(0.0, elapsed_ms - decodes * self._decode.ms), num_prompt_tokens)
