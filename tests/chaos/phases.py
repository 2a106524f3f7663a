"""Where the time of a stall went: what happened between two chunks of a stream, one after the other."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from tests.chaos.sayings import Placed, Sayings, Suspected, TookOver, WentOn
from tests.chaos.stalls import Stall

Saying = TypeVar("Saying", Placed, Suspected, TookOver, WentOn)
# Logs cut times off below a millisecond.
LOG_S = 0.001
PHASES = {
    "the step that was lost": "from the last chunk to the fault",
    "notice": "until the gateway's connection broke",
    "route": "until a router had chosen, for the last time if the choice failed",
    "arrive": "until the next worker had the request",
    "pages": "until it had pages for it",
    "compute": "until its first token: the step that it had begun, others that came with it, its own prompt",
    "return": "until the gateway had that token",
    "client": "until the client had it",
}


def phases(stall: Stall, said: Sayings) -> dict[str, float] | None:
    """Seconds by phase, which add up to the stall; None if a process did not live to tell of it."""
    suspected = _first(stall, said.suspected, stall.fault.at - LOG_S)
    went_on = _first(stall, said.went_on, suspected.at) if suspected else None
    if suspected is None or went_on is None:
        return None
    placed = _last(stall, said.placed, went_on.at)
    took_over = _last(stall, said.took_over, went_on.at + LOG_S)
    if placed is None or took_over is None or took_over.decode != placed.decode:
        return None
    arrived = took_over.at - took_over.first_s
    ends = [stall.fault.at, suspected.at, placed.at, arrived, arrived + took_over.pages_s]
    ends += [took_over.at, went_on.at, stall.ended]
    begins = [stall.began, *ends[:-1]]
    return dict(zip(PHASES, (end - begin for begin, end in zip(begins, ends, strict=True)), strict=True))


def _first(stall: Stall, said: Sequence[Saying], since: float) -> Saying | None:
    return min(_of(stall, said, since, stall.ended), key=lambda saying: saying.at, default=None)


def _last(stall: Stall, said: Sequence[Saying], until: float) -> Saying | None:
    return max(_of(stall, said, stall.fault.at, until), key=lambda saying: saying.at, default=None)


def _of(stall: Stall, said: Sequence[Saying], since: float, until: float) -> Iterable[Saying]:
    wanted = (stall.request, stall.choice)
    return (saying for saying in said if (saying.request, saying.choice) == wanted and since <= saying.at <= until)
