"""How long clients waited when the decode worker behind their stream was hit: from what they saw and processes said."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.chaos.answers import Answer, Output
from tests.chaos.faults import STOP, Done
from tests.chaos.sayings import Placed, Sayings, TookOver

# What was hit this long before may still be on its way back.
BEFORE_S = 1.0
# Logs cut times off below a millisecond, and those of one step are written one after the other.
LOG_S = 0.005


@dataclass(frozen=True)
class Stall:
    """The longest gap between chunks that a fault can have caused, from when to when (unix times).

    `recompute_s` is the time that computing takes what the next worker had to compute of the sequence: nothing that it
    found in a cache or fetched, and nothing of other sequences. `others_s` is what other streams of the lost worker
    took of whoever computed this one, before its turn was over. `next_s` is the pause behind the first chunk from
    there. `alone` says that nothing else was stopped or killed while it lasted, `elsewhere` that another decode worker
    served all the while.
    """

    fault: Done
    request: str
    choice: int
    began: float
    ended: float
    recompute_s: float
    alone: bool
    elsewhere: bool
    others_s: float = 0.0
    next_s: float = 0.0

    @property
    def gap_s(self) -> float:
        return self.ended - self.began

    @property
    def beyond_s(self) -> float:
        return max(0.0, self.gap_s - self.recompute_s)

    @property
    def beyond_all_s(self) -> float:
        """Beyond what had to be computed of all streams of the lost worker."""
        return max(0.0, self.beyond_s - self.others_s)


def stalls(
    answers: Sequence[Answer], faults: Sequence[Done], said: Sayings, prefill_s_per_token: float
) -> Iterator[Stall]:
    """One for each stream that had begun on a decode worker, and had not ended, when that worker was hit."""
    placements: dict[tuple[str, int], list[Placed]] = defaultdict(list)
    for place in sorted(said.placed, key=lambda place: place.at):
        placements[place.request, place.choice].append(place)
    hits = [fault for fault in faults if fault.role == "decode"]
    away = _Away(hits, said)
    for answer in (answer for answer in answers if answer.ask.body["stream"]):
        for index, output in answer.outputs.items():
            mine = [p for p in placements[answer.ask.name, index] if answer.started <= p.at <= answer.ended]
            for fault in hits:
                if gap := _gap(fault, mine, output, answer.ended):
                    alone = not any(f is not fault and f.at < gap[1] and f.until > gap[0] - BEFORE_S for f in faults)
                    mine_s, others_s = (
                        num_tokens * prefill_s_per_token
                        for num_tokens in _num_computed((answer.ask.name, index), gap, placements, said.took_over)
                    )
                    next_s = next((at - gap[1] for at in output.arrivals if at > gap[1]), 0.0)
                    elsewhere = away.leaves_some(fault.name, *gap)
                    where = (fault, answer.ask.name, index)
                    yield Stall(*where, *gap, mine_s, alone, elsewhere, others_s, next_s)


def _gap(fault: Done, placed: Sequence[Placed], output: Output, ended: float) -> tuple[float, float] | None:
    """From when to when; None if the stream was elsewhere, had not begun, or had ended."""
    before = [place for place in placed if place.at <= fault.at]
    if not before or before[-1].decode != fault.name or not output.arrivals[0] < fault.at < ended:
        return None
    after = next((place.at for place in placed if place.at > fault.at), None)
    end = fault.until if fault.kind == STOP else after
    if end is None:
        if output.finish_reason:  # it had all it needed
            return None
        end = ended  # it never went on
    times = output.arrivals if output.finish_reason else [*output.arrivals, ended]
    gaps = [(a, b) for a, b in pairwise(times) if a <= max(end, after or 0.0) and b >= fault.at]
    return max(gaps, key=lambda gap: gap[1] - gap[0], default=None)


def _num_computed(
    stream: tuple[str, int],
    gap: tuple[float, float],
    placements: Mapping[tuple[str, int], Sequence[Placed]],
    took_over: Sequence[TookOver],
) -> tuple[int, int]:
    """Tokens that whoever went on had to compute, 0 if it did not say; and those of other streams that were resumed
    where this one was computed, came before it had its first token, and had theirs no later."""
    meanwhile = [took for took in took_over if gap[0] <= took.at <= gap[1]]
    mine = next((took for took in meanwhile if (took.request, took.choice) == stream), None)
    if mine is None:
        return 0, 0
    where, began = _computing(mine, placements), mine.at - mine.first_s
    num_others = sum(
        took.num_computed
        for took in meanwhile
        if took is not mine and began < took.at <= mine.at + LOG_S and _computing(took, placements) == where
    )
    return mine.num_computed, num_others


def _computing(took: TookOver, placements: Mapping[tuple[str, int], Sequence[Placed]]) -> str:
    before = [place for place in placements[took.request, took.choice] if place.at <= took.at + LOG_S]
    return before[-1].computing if before else took.decode


class _Away:
    """When decode workers were not there: stopped, or from the end of one start until the next one serves."""

    def __init__(self, hits: Sequence[Done], said: Sayings) -> None:
        self._names = {place.decode for place in said.placed}
        self._spans = [(hit.name, hit.at, hit.until if hit.kind == STOP else back(hit, said)) for hit in hits]

    def leaves_some(self, lost: str, began: float, ended: float) -> bool:
        """Whether a worker other than the lost one was there from the beginning to the end."""
        gone = {name for name, at, until in self._spans if at < ended and until > began}
        return bool(self._names - gone - {lost})


def back(hit: Done, said: Sayings) -> float:
    """When a worker that was killed or told to end served again."""
    return min((s.at for s in said.served if s.name == hit.name and s.at > hit.at), default=float("inf"))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0
