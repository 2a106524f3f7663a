"""What recorded steps take: time and memory of a dense shape's graphs, which share their memory, and of graphs apart.

    python -m bench.graphs [--shape llama-3.1-8b] [--widths 4 1]

Every size that is recorded, at each width, the largest first, as a worker's warm-up does it. Then all are replayed in
another order, and must choose what they chose before. Needs an NVIDIA GPU. On a bare machine the first time has the
compiling of kernels in it, some seconds for each width.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import provenance, shapes
from shared.engine.executor import TorchExecutor
from shared.engine.layers.captured import Found, Recorder
from shared.engine.layers.cuda_decoder import GRAPH_SIZES
from shared.engine.models.config import parse

CONTEXT, MIB = 1024, 1 << 20
Kind = tuple[int, int]


class Apart(Recorder):
    """Gives each graph memory of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._each = device

    def record(self, compute: Callable[[], Found]) -> tuple[torch.cuda.CUDAGraph, Found]:
        """See `Recorder.record`."""
        return Recorder(self._each).record(compute)


@dataclass(frozen=True, slots=True)
class Recording:
    """What it took to record all kinds of steps, and what they chose."""

    seconds: float
    num_bytes: int
    chosen: dict[Kind, list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--widths", nargs="+", type=int, default=[4, 1])
    args = parser.parse_args()
    print(provenance.banner("bench.graphs"), flush=True)
    kinds = [(size, width) for size in reversed(GRAPH_SIZES) for width in args.widths]
    print(f"{torch.cuda.get_device_name()}: {len(kinds)} graphs of {args.shape}, widths {args.widths}", flush=True)
    for name, make in (("sharing memory", Recorder), ("apart", Apart)):
        found = measured(args.shape, make, kinds)
        print(f"{name}: {found.num_bytes / MIB:.0f} MiB, recorded in {found.seconds:.1f} s", flush=True)


def measured(shape: str, make: Callable[[torch.device], Recorder], kinds: list[Kind]) -> Recording:
    """Record steps of a random model. Raises AssertionError if one that is replayed says something else."""
    device, room = torch.device("cuda", torch.cuda.current_device()), CONTEXT // shapes.PAGE_SIZE + 1
    decoder, engine = shapes.decoder_and_executor(parse(shapes.SHAPES[shape]), device, GRAPH_SIZES[-1] * room, False)
    decoder.recorder = make(device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, started = torch.cuda.memory_reserved(), time.perf_counter()
    chosen = {kind: _chosen(engine, kind, room) for kind in kinds}
    seconds = time.perf_counter() - started
    torch.cuda.empty_cache()
    num_bytes = torch.cuda.memory_reserved() - before
    for kind in sorted(kinds, key=lambda kind: (kind[0] % 16, kind[1])):
        assert _chosen(engine, kind, room) == chosen[kind], f"{kind} said something else when it was replayed"
    return Recording(seconds, num_bytes, chosen)


def _chosen(engine: TorchExecutor, kind: Kind, room: int) -> list[int]:
    size, width = kind
    items = [shapes.item(sequence, CONTEXT - width, width, room) for sequence in range(size)]
    return [choice.tokens[0].token_id for choice in engine.forward(items) if choice is not None]


if __name__ == "__main__":
    main()
