"""How long clients waited when the decode worker behind their stream was hit: from what they saw and gateways said."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.chaos.answers import Answer, Output
from tests.chaos.faults import STOP, Done
from tests.chaos.watch import Placed

# What was hit this long before may still be on its way back.
BEFORE_S = 1.0


@dataclass(frozen=True)
class Stall:
    """The longest gap between chunks that a fault can have caused, and the time that computing anew may take.

    `alone` says that nothing else was stopped or killed while it lasted.
    """

    fault: Done
    request: str
    gap_s: float
    recompute_s: float
    alone: bool

    @property
    def beyond_s(self) -> float:
        return max(0.0, self.gap_s - self.recompute_s)


def stalls(
    answers: Sequence[Answer], faults: Sequence[Done], placed: Sequence[Placed], prefill_s_per_token: float
) -> Iterator[Stall]:
    """One for each stream that had begun on a decode worker, and had not ended, when that worker was hit."""
    placements: dict[tuple[str, int], list[Placed]] = defaultdict(list)
    for place in sorted(placed, key=lambda place: place.at):
        placements[place.request, place.choice].append(place)
    hits = [fault for fault in faults if fault.role == "decode"]
    for answer in (answer for answer in answers if answer.ask.body["stream"]):
        for index, output in answer.outputs.items():
            mine = [p for p in placements[answer.ask.name, index] if answer.started <= p.at <= answer.ended]
            for fault in hits:
                if gap := _gap(fault, mine, output, answer.ended):
                    recompute_s = (answer.ask.num_prompt_tokens + len(output.token_ids)) * prefill_s_per_token
                    alone = not any(f is not fault and f.at < gap[1] and f.until > gap[0] - BEFORE_S for f in faults)
                    yield Stall(fault, answer.ask.name, gap[1] - gap[0], recompute_s, alone)


def _gap(fault: Done, placed: Sequence[Placed], output: Output, ended: float) -> tuple[float, float] | None:
    """From when to when; None if the stream was elsewhere, had not begun, or had ended."""
    before = [place for place in placed if place.at <= fault.at]
    if not before or before[-1].decode != fault.name or not output.arrivals[0] < fault.at < ended:
        return None
    after = next((place.at for place in placed if place.at > fault.at), None)
    end = fault.until if fault.kind == STOP else after
    if end is None:  # it had all it needed
        return None
    times = output.arrivals if output.finish_reason else [*output.arrivals, ended]
    gaps = [(a, b) for a, b in pairwise(times) if a <= max(end, after or 0.0) and b >= fault.at]
    return max(gaps, key=lambda gap: gap[1] - gap[0], default=None)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)] if ordered else 0.0
