"""Kernels by capability: each candidate says what keeps it from serving, and the first without an obstacle does."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from shared.errors import Unsupported

log = logging.getLogger(__name__)
Built = TypeVar("Built")


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Built]):
    """A way to compute something. `obstacle` says why it cannot be taken here (`built` then means nothing); None: it
    can."""

    name: str
    obstacle: str | None
    built: Built


def choose(candidates: Sequence[Candidate[Built]], wanted: str) -> Candidate[Built]:
    """The candidate called `wanted`, or for "auto" the first that can be taken. Raises Unsupported."""
    named = [candidate for candidate in candidates if wanted in ("auto", candidate.name)]
    if not named:
        known = ", ".join(candidate.name for candidate in candidates)
        raise Unsupported(f"there are no kernels {wanted!r}; known are auto, {known}")
    obstacles = [f"{candidate.name}: {candidate.obstacle}" for candidate in named if candidate.obstacle is not None]
    for candidate in named:
        if candidate.obstacle is None:
            log.info(
                "computing with the %s kernels%s", candidate.name, f" (not {'; '.join(obstacles)})" * bool(obstacles)
            )
            return candidate
    raise Unsupported(f"no kernels can serve this model ({'; '.join(obstacles)})")
