"""How often drafts are right, and how many are therefore worth verifying."""

from dataclasses import dataclass

# Belief before the first draft, as so many drafts of which this share was right. Drafts of the text so far are as good
# as a layer's where a text repeats itself, and mostly wrong in prose (`bench/drafting.py`).
PRIOR_TRIED = 2.0
OF_A_LAYER, OF_THE_TEXT = 0.7, 0.5
# What a verification leaves of the ones before it.
KEEP = 0.9
# What a step without drafts leaves of what is believed against the prior: an unlucky sequence gets another try.
FORGET = 0.98
# A draft that is hardly ever right is never worth the bookkeeping.
LEAST_CHANCE = 0.05


@dataclass(slots=True)
class Acceptance:
    """The chance that a draft of one sequence is right if those before it were; old steps fade. `prior` is what is
    believed first."""

    prior: float = OF_A_LAYER
    right: float = 0.0
    tried: float = 0.0

    @property
    def chance(self) -> float:
        """Between 0 and 1."""
        return (self.right + self.prior * PRIOR_TRIED) / (self.tried + PRIOR_TRIED)

    def note(self, num_drafts: int, num_accepted: int) -> None:
        """A step verified so many drafts. Behind the first wrong one nothing was tried."""
        keep = KEEP if num_drafts else FORGET
        self.right = self.right * keep + num_accepted
        self.tried = self.tried * keep + min(num_drafts, num_accepted + 1)


def num_worthwhile(chance: float, cost: float, most: int) -> int:
    """How many drafts to verify: the j-th yields a token with a probability of chance^j, and is worth it while that is
    more than the tokens which the engine would make in the time that it costs."""
    num, reached = 0, chance
    while num < most and reached > max(cost, LEAST_CHANCE):
        num, reached = num + 1, reached * chance
    return num
