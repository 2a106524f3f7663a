"""Who proposes drafts from the tokens alone. A model with a layer for it proposes in its own step instead."""

from collections.abc import Sequence
from typing import Protocol


class Proposer(Protocol):
    """Serves one sequence."""

    def propose(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        """At most `num_drafts` tokens that may follow `tokens`, which have only grown since the last call."""
