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


# A rate is taken to hold for as long as it held so far: at least for the first time, for twice a worker's reports and
# routers' looks at them have to pass before anybody could act on it, and at most for the second.
LASTS_S = (2.0, 60.0)
# A rate is another one if it is so many times higher or lower.
OTHER = 1.5


@dataclass(slots=True)
class PromptCost:
    """What a token of a prompt takes, and what each token before it adds: least squares through the steps so far, old
    ones fading after `memory` tokens. A step of tokens start … end has (end² - start²) / 2 pairs.

    Whatever else a machine does makes steps slower and never faster. So two steps in a row that are faster than the
    rate by a factor of `OTHER` show that it came of a bad moment, and what was measured before them is forgotten."""

    memory: float
    num_tokens: float = 0.0
    """That it is measured by, the faded ones in part."""
    measured_at_s: float = 0.0
    steady_s: float = 0.0
    """For how long the rate had been the same when it was last measured."""
    _tt: float = 0.0
    _tp: float = 0.0
    _pp: float = 0.0
    _tm: float = 0.0
    _pm: float = 0.0
    _steady_ms: float = 0.0
    _faster: tuple[float, float, float] | None = None
    """The last step, if it was."""

    def add(self, num_tokens: float, num_pairs: float, ms: float, at_s: float, step_ms: float | None = None) -> None:
        """Prompt tokens with so many pairs took so long at this time, in a step that took `step_ms` in all."""
        taken = num_tokens, num_pairs, ms
        expected_ms = num_tokens * self.ms_per_token + num_pairs * self.ms_per_pair
        is_faster = (ms if step_ms is None else step_ms) * OTHER < expected_ms
        if is_faster and self._faster:
            self._keep(0.0)
            self._take(*self._faster)
        else:
            self._keep(max(0.0, 1 - num_tokens / self.memory))
        self._take(*taken)
        self._faster = taken if is_faster else None
        self.steady_s, self.measured_at_s = self.steady_s + at_s - self.measured_at_s, at_s
        if not self._steady_ms / OTHER < self.ms_per_token < self._steady_ms * OTHER:
            self._steady_ms, self.steady_s = self.ms_per_token, 0.0

    def _keep(self, share: float) -> None:
        self.num_tokens *= share
        self._tt, self._tp, self._pp = self._tt * share, self._tp * share, self._pp * share
        self._tm, self._pm = self._tm * share, self._pm * share

    def _take(self, num_tokens: float, num_pairs: float, ms: float) -> None:
        self.num_tokens += num_tokens
        self._tt, self._tm = self._tt + num_tokens * num_tokens, self._tm + num_tokens * ms
        self._tp, self._pp = self._tp + num_tokens * num_pairs, self._pp + num_pairs * num_pairs
        self._pm += num_pairs * ms

    @property
    def ms_per_pair(self) -> float:
        """What a pair adds, neither less than nothing nor more than would leave nothing for the token itself; 0 before
        steps at different depths were seen."""
        spread = self._tt * self._pp - self._tp * self._tp
        if spread <= 1e-2 * self._tt * self._pp:
            return 0.0
        per_pair = (self._tt * self._pm - self._tp * self._tm) / spread
        return min(max(0.0, per_pair), self._tm / self._tp)

    @property
    def ms_per_token(self) -> float:
        """What a token takes by itself."""
        # Where pairs explain all of it, what is left may be less than nothing by a rounding.
        return max(0.0, self._tm - self.ms_per_pair * self._tp) / self._tt if self._tt else 0.0


def lasts_s(steady_s: float) -> float:
    """For how long a rate that has been the same for so long is taken to be so: after that a third (1/e) of it is."""
    least, most = LASTS_S
    return min(max(steady_s, least), most)


class Meter:
    """Prefill time per token, and what steps take that only decode.

    In a mixed step prompts are charged with what the step took longer than a decode step does.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._prefill = PromptCost(memory=8192)
        self._step = Rate(memory=64)
        self._tokens = Rate(memory=64)
        self._row = Slope(memory=256)

    @property
    def prefill_ms_per_token(self) -> float:
        """Milliseconds that a token of a prompt takes, but for what tokens before it add."""
        return self._prefill.ms_per_token

    @property
    def prefill_ms_per_pair(self) -> float:
        """Milliseconds that each token before it adds."""
        return self._prefill.ms_per_pair

    @property
    def prompts(self) -> PromptCost:
        """How these two were measured."""
        return self._prefill

    @property
    def decode_step_ms(self) -> float:
        """Milliseconds from one token of a running sequence to its next, on average over accepted drafts too."""
        return self._step.ms / (self._tokens.ms or 1.0)

    @property
    def draft_ms(self) -> float:
        """Milliseconds that verifying one draft more takes; 0 before it is known."""
        return self._row.ms

    def record(self, parts: Sequence[Part], num_chosen: int, elapsed_ms: float, at_s: float) -> None:
        """A step with these parts chose so many tokens and took so long; it ended at this time."""
        self.num_steps += 1
        num_prompt_tokens = sum(part.num_tokens for part in parts if not part.is_decode)
        if not num_prompt_tokens:
            self._step.add(elapsed_ms, 1)
            self._tokens.add(num_chosen / len(parts), 1)
            self._row.add(sum(1 + part.num_drafts for part in parts), elapsed_ms)
        else:
            decodes = any(part.is_decode for part in parts)
            pairs = sum((part.end * part.end - part.start * part.start) / 2 for part in parts if not part.is_decode)
            own_ms = max(0.0, elapsed_ms - decodes * self._step.ms)
            self._prefill.add(num_prompt_tokens, pairs, own_ms, at_s, elapsed_ms)
