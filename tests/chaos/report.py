"""What a chaos run showed, as a table, and what of it must not be."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.chaos.answers import COMPLETE, GATEWAY_LOST, LATE, NOT_TAKEN, Answer
from tests.chaos.faults import END, KILL, STOP, Done
from tests.chaos.phases import PHASES, phases
from tests.chaos.sayings import Sayings, Suspected
from tests.chaos.stalls import Stall, back, percentile

# What an end may come after its deadline.
GRACE_S = 1.0
# Streams that were stopped for less may just have waited.
LONG_STOP_S = 2.0
# A worker that was hit may be suspected for this long afterwards, until everybody has heard of its next incarnation.
AFTERMATH_S = 10.0
# A worker that is told to end takes nothing more after this time.
STOPS_TAKING_S = 1.0
SUSPICIOUS = {"WORKER_LOST", "STALE_EPOCH"}


@dataclass
class Report:
    """Everything that was seen. `reclaim_s` is by what happened; restarts are by process name."""

    answers: Sequence[Answer]
    faults: Sequence[Done]
    stalls: Sequence[Stall]
    said: Sayings
    wrong: Sequence[str]
    defects: Sequence[str]
    num_bytes: float
    num_leaked_pages: int
    bystanders: Sequence[str]
    reclaim_s: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def stalls_after(self, kind: str, alone: bool = True) -> list[Stall]:
        """By a kind of fault that came alone, or at the same time as others; of stops, only long ones. Streams that no
        other decode worker was there for are in neither."""
        found = [s for s in self.stalls if s.fault.kind == kind and s.alone is alone and s.elsewhere]
        return [s for s in found if s.fault.until - s.fault.at >= LONG_STOP_S] if kind == STOP else found

    def failovers_without_a_fault(self) -> list[Suspected]:
        """Workers that were given up though nothing had been done to them."""
        return [
            s for s in self.said.suspected if s.fault in SUSPICIOUS and not any(_explains(f, s) for f in self.faults)
        ]

    def taken_while_ending(self) -> list[str]:
        """Requests that a decode worker took more than a moment after it was told to end. Only of those that came to
        their end is it known that nobody refused them."""
        ended = {answer.ask.name for answer in self.answers if answer.end == COMPLETE}
        refused = {(s.request, s.choice, s.decode) for s in self.said.suspected}
        return [
            f"{place.request} was taken by {place.decode} {place.at - end.at:.2f} s after it was told to end"
            for end in self.faults
            if end.kind == END
            for place in self.said.placed
            if place.decode == end.name
            and place.request in ended
            and end.at + STOPS_TAKING_S < place.at < back(end, self.said)
            and (place.request, place.choice, place.decode) not in refused
        ]

    def violations(self, stall_limits_s: dict[str, float]) -> list[str]:
        """What must not be. `stall_limits_s`: 99th percentiles by kind of fault."""
        found = [*self.wrong[:10], *self.defects[:10]]
        late = (a for a in self.answers if a.end == LATE or a.overrun_s > GRACE_S)
        found += [f"{a.ask.name}: {a.end}, {a.overrun_s:+.2f} s from its deadline" for a in late]
        cut = (a for a in self.answers if a.end == GATEWAY_LOST and not self._killed(a))
        found += [f"{a.ask.name}: gateway-{a.gateway} broke the connection, unbidden" for a in cut]
        found += [*self.bystanders, *self.taken_while_ending()]
        if self.num_leaked_pages:
            found.append(f"{self.num_leaked_pages} pages leaked")
        for kind, limit_s in stall_limits_s.items():
            if (stall_s := percentile([_seconds(stall) for stall in self.stalls_after(kind)], 0.99)) > limit_s:
                found.append(f"stall after {kind}: {stall_s:.3f} s is more than {limit_s} s")
        return found

    def _killed(self, answer: Answer) -> bool:
        name = f"gateway-{answer.gateway}"
        return any(f.kind == KILL and f.name == name and answer.started <= f.at <= answer.ended for f in self.faults)

    def table(self) -> str:
        """Markdown."""
        requests = [answer for answer in self.answers if answer.end != NOT_TAKEN]
        ends = Counter(answer.end for answer in requests)
        options = Counter(option for answer in requests for option in answer.ask.options)
        faults = Counter(f"{fault.kind} {fault.role}" for fault in self.faults)
        longest = max((b.overrun_s for b in self.answers), default=0.0)
        rows = {
            "requests": f"{len(requests):,} in {self.seconds:.0f} s: {_counts(ends)}",
            "tries at a gateway that was ending or away": len(self.answers) - len(requests),
            "with options": _counts(options),
            "faults": f"{len(self.faults)}: {_counts(faults)}",
            f"wrong answers, of {sum(a.num_tokens for a in self.answers):,} tokens compared with a fault-free twin": (
                len(self.wrong)
            ),
            "latest end of a request, from its deadline": f"{longest:+.2f} s",
            "pages leaked, one lease later": self.num_leaked_pages,
            "processes that ended unbidden": len(self.bystanders),
            f"requests taken by a worker {STOPS_TAKING_S:.0f} s after it was told to end": len(
                self.taken_while_ending()
            ),
            "workers given up without a fault": len(self.failovers_without_a_fault()),
            "stall, decode worker killed, beyond recomputing": _spread(map(_seconds, self.stalls_after(KILL))),
            "the same with recomputing": _spread(stall.gap_s for stall in self.stalls_after(KILL)),
            "the same beyond recomputing all streams of that worker": _spread(
                stall.beyond_all_s for stall in self.stalls_after(KILL)
            ),
            "the pause behind the first chunk from the next worker": _spread(
                stall.next_s for stall in self.stalls_after(KILL)
            ),
            f"stall, decode worker stopped for {LONG_STOP_S:.0f} s or longer": _spread(
                stall.gap_s for stall in self.stalls_after(STOP)
            ),
            "the three with another fault at the same time": "; ".join(
                (
                    _spread(map(_seconds, self.stalls_after(KILL, alone=False))),
                    _spread(stall.gap_s for stall in self.stalls_after(KILL, alone=False)),
                    _spread(stall.gap_s for stall in self.stalls_after(STOP, alone=False)),
                )
            ),
            "the first and the third while no other decode worker served": "; ".join(
                _spread(stall.gap_s for stall in self.stalls if stall.fault.kind == kind and not stall.elsewhere)
                for kind in (KILL, STOP)
            ),
            "stall, decode worker drained": _spread(stall.gap_s for stall in self.stalls_after(END)),
            "time to reclaim all pages": ", ".join(f"{what} {s:.2f} s" for what, s in self.reclaim_s.items()),
            "KV read from peers": f"{self.num_bytes / 1e6:,.0f} MB at least",
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    def phases(self, kind: str, num_worst: int = 5) -> str:
        """Markdown: where the time of stalls after a kind of fault alone went, all in all and in the longest."""
        found = [(stall, parts) for stall in self.stalls_after(kind) if (parts := phases(stall, self.said))]
        lines = [f"| phase of a stall after a {kind}, ms | median | p99 | longest |", "|---|---|---|---|"]
        for name, what in PHASES.items():
            times = [percentile([parts[name] for _, parts in found], share) for share in (0.5, 0.99, 1.0)]
            lines.append(f"| {name}: {what} | {' | '.join(f'{s * 1000:.0f}' for s in times)} |")
        lines += ["", f"longest of {len(found)}, in ms:"]
        for stall, parts in sorted(found, key=lambda each: -_seconds(each[0]))[:num_worst]:
            each = ", ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in parts.items())
            took = f"recomputing {stall.recompute_s * 1000:.0f}, of other streams {stall.others_s * 1000:.0f}"
            whole = f"{stall.beyond_s * 1000:.0f} of {stall.gap_s * 1000:.0f}"
            lines.append(f"- {whole} ({stall.request}-{stall.choice}; {took}): {each}")
        return "\n".join(lines)

    @property
    def num_complete(self) -> int:
        return sum(answer.end == COMPLETE for answer in self.answers)


def _explains(fault: Done, suspected: Suspected) -> bool:
    return fault.name == suspected.decode and fault.at - 0.1 <= suspected.at <= fault.until + AFTERMATH_S


def _seconds(stall: Stall) -> float:
    """What a bound is for: after a kill, what is left when computing the sequence anew is taken off."""
    return stall.beyond_s if stall.fault.kind == KILL else stall.gap_s


def _spread(seconds: Iterable[float]) -> str:
    values = list(seconds)
    median, high, most = (percentile(values, share) * 1000 for share in (0.5, 0.99, 1.0))
    return f"median {median:.0f} ms, p99 {high:.0f} ms, longest {most:.0f} ms ({len(values)} streams)"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in counter.most_common())
