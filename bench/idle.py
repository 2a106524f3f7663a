"""What a cluster takes of a machine while nobody asks it for anything, beside other checkouts at the same time.

    python -m bench.idle [--seconds 20] [--beside CHECKOUT ...] [-- FLAGS OF `forebay up`]

Printed are milliseconds of a processor, and how often a thread woke up, in a second: each process, and of it what its
first thread (the event loop's) and all others (gRPC's, mostly) take. By schedstat and the voluntary switches of each
thread (proc(5)); what is ready again at once has not slept and does not count.
"""

import argparse
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from bench import provenance
from cli import background
from cli.background import Background
from cli.process import ROOT

# What starting left to be done is done after so long.
SETTLE_S = 8.0
ALL = "all"


class Taken(NamedTuple):
    """Of threads that live: milliseconds of a processor, and voluntary switches."""

    cpu_ms: float = 0.0
    num_wakes: float = 0.0

    def plus(self, other: "Taken", factor: float = 1.0) -> "Taken":
        """Both together, `other` so many times."""
        return Taken(self.cpu_ms + factor * other.cpu_ms, self.num_wakes + factor * other.num_wakes)

    def __str__(self) -> str:
        return f"{self.cpu_ms:.1f} ms, {self.num_wakes:.1f}"


@dataclass(frozen=True)
class Process:
    """First thread and others, each since it began or in a second."""

    loop: Taken
    others: Taken

    @classmethod
    def now(cls, pid: int) -> Self:
        """Of a process that runs."""
        of = {int(task.name): _of_thread(task) for task in Path(f"/proc/{pid}/task").iterdir()}
        others = Taken()
        for thread, taken in of.items():
            others = others if thread == pid else others.plus(taken)
        return cls(of[pid], others)

    def since(self, before: Self, seconds: float) -> "Process":
        """What was taken in each of the seconds since."""
        loop, others = (Taken().plus(now, 1 / seconds).plus(then, -1 / seconds) for now, then in self._with(before))
        return Process(loop, others)

    @property
    def whole(self) -> Taken:
        """All threads."""
        return self.loop.plus(self.others)

    def _with(self, before: Self) -> tuple[tuple[Taken, Taken], tuple[Taken, Taken]]:
        return (self.loop, before.loop), (self.others, before.others)


def _of_thread(task: Path) -> Taken:
    try:
        cpu_ns, status = (task / "schedstat").read_text().split()[0], (task / "status").read_text()
    except FileNotFoundError:  # it has ended
        return Taken()
    (switches,) = (line.split()[1] for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
    return Taken(int(cpu_ns) / 1e6, int(switches))


def measure(clusters: dict[str, Background], seconds: float) -> dict[str, dict[str, Process]]:
    """What each role of each cluster takes in a second, and all of them."""

    def now() -> dict[tuple[str, str], Process]:
        pids = {(name, "supervisor"): running.supervisor.pid for name, running in clusters.items()}
        for name, running in clusters.items():
            pids |= {(name, f"{one.role} {one.pid}"): one.pid for one in running.run.processes if one.pid}
        return {who: Process.now(pid) for who, pid in pids.items()}

    before, started_s = now(), time.monotonic()
    time.sleep(seconds)
    after, took_s = now(), time.monotonic() - started_s
    found: dict[str, dict[str, Process]] = defaultdict(dict)
    for (name, process), taken in after.items():
        role, each = process.split()[0], taken.since(before[name, process], took_s)
        for row in (role, ALL):
            known = found[row].get(name, Process(Taken(), Taken()))
            found[row][name] = Process(known.loop.plus(each.loop), known.others.plus(each.others))
    return {role: found[role] for role in sorted(found, key=lambda role: role == ALL)}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--beside", action="append", default=[], help="another checkout, whose cluster idles beside")
    parser.add_argument("flags", nargs="*", help="of the clusters; those of the default model without any")
    args = parser.parse_args()
    print(provenance.banner("bench.idle"), flush=True)
    checkouts = {"here": ROOT} | {Path(path).resolve().name: Path(path).resolve() for path in args.beside}
    with ExitStack() as stack:
        clusters = {
            name: stack.enter_context(background.cluster(*args.flags, root=at)) for name, at in checkouts.items()
        }
        time.sleep(SETTLE_S)
        found = measure(clusters, args.seconds)
    titles = [f"{name}: in a second, wakes | event loop | other threads" for name in clusters]
    print(f"| process | {' | '.join(titles)} |\n{'|---' * (1 + 3 * len(titles))}|")
    for role, by_name in found.items():
        cells = [f"{one.whole} | {one.loop} | {one.others}" for one in (by_name[name] for name in clusters)]
        print(f"| {role} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
