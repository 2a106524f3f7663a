"""What a GPU does between two replays of a model's graph, how long it has nothing to do there, and how far ahead of it
the host is: of steps that are traced while they run.

Tracing slows a replay down, each of its kernels by about a microsecond, and so gives the host more time than it has;
what lies between two replays is launched by itself and takes as long as ever.
"""

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
BY_HOST = ("cuda_runtime", "cuda_driver")
NAME_LENGTH = 60


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that a GPU did, from and until microseconds of the trace: a kernel or copy that was launched by itself,
    or a graph, of so many kernels, and when the host began to launch it and for how long."""

    name: str
    start: float
    end: float
    num_kernels: int
    launched: float
    launching: float


@dataclass(frozen=True, slots=True)
class Between:
    """The end of one replay to the start of the next: its length, the part in which nothing ran, and what ran."""

    length: float
    idle: float
    replay: Piece
    pieces: list[Piece]


def traced(run: Callable[[], object]) -> list[Piece]:
    """What the GPU does, in order, while `run` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profile.export_chrome_trace(str(path))
        return pieces(json.loads(path.read_text())["traceEvents"])


def pieces(events: Iterable[dict[str, Any]]) -> list[Piece]:
    """Of a trace's events. What has been launched by the same call is one piece."""
    launches, found = dict[int, dict[str, Any]](), defaultdict[int, list[dict[str, Any]]](list)
    for event in events:
        call = event.get("args", {}).get("correlation")
        if call is None:
            continue
        if event.get("cat") in BY_HOST:
            launches[call] = event
        elif event.get("cat") in ON_GPU:
            found[call].append(event)
    each = [_piece(parts, launches.get(call)) for call, parts in found.items()]
    return sorted(each, key=lambda piece: piece.start)


def _piece(parts: Sequence[dict[str, Any]], launch: dict[str, Any] | None) -> Piece:
    start, end = min(part["ts"] for part in parts), max(part["ts"] + part["dur"] for part in parts)
    name = str(parts[0]["name"]) if len(parts) == 1 else f"a graph of {len(parts)}"
    launched, launching = (launch["ts"], launch["dur"]) if launch else (start, 0.0)
    return Piece(name[:NAME_LENGTH], start, end, len(parts), launched, launching)


def gaps(found: Sequence[Piece]) -> list[Between]:
    """What lies between the replays of the largest graph there is, or of those nearly as large."""
    most = max(piece.num_kernels for piece in found)
    replays = [place for place, piece in enumerate(found) if 2 * piece.num_kernels > most]
    between = []
    for first, second in pairwise(replays):
        inside, idle, until = found[first + 1 : second], 0.0, found[first].end
        for piece in (*inside, found[second]):
            idle += max(0.0, piece.start - until)
            until = max(until, piece.end)
        between.append(Between(found[second].start - found[first].end, idle, found[second], list(inside)))
    return between


def report(title: str, found: Sequence[Piece]) -> None:
    """Print a table of the step in the middle, by the time that it has between its replays."""
    between = sorted(gaps(found), key=lambda each: each.length)
    middle, lengths = between[len(between) // 2], [each.length for each in between]
    ahead = statistics.median(each.replay.start - each.replay.launched for each in between)
    launching = statistics.median(each.replay.launching for each in between)
    idle = statistics.median(each.idle for each in between)
    print(
        f"\n{title}: {statistics.median(lengths):.0f} us between replays ({lengths[0]:.0f} to {lengths[-1]:.0f}), "
        f"nothing to do for {idle:.0f}; the host launches a replay {ahead:.0f} us before it starts, in {launching:.0f}"
    )
    print("\n| at, us | for | idle before | ahead by | what |\n|---|---|---|---|---|")
    begin = until = middle.replay.start - middle.length
    for piece in (*middle.pieces, middle.replay):
        cells = (
            piece.start - begin,
            piece.end - piece.start,
            max(0.0, piece.start - until),
            piece.start - piece.launched,
        )
        print(f"| {' | '.join(f'{cell:.1f}' for cell in cells)} | {piece.name} |", flush=True)
        until = max(until, piece.end)
