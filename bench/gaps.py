"""How long a GPU has nothing to do between two steps of decoding: in order, and with the next step launched ahead.

    python -m bench.gaps [--shape llama-3.1-8b] [--weights nvfp4] [--steps 200]

A step's time on the GPU is measured by CUDA events around steps that are all queued before the first of them begins, so
that none waits for the host. The rest of a step's time, as a whole engine takes it on the clock, is idle.
"""

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench import launched, provenance, shapes
from bench.launched import InOrder
from shared.engine.api import BatchItem, EngineRequest, Executor, SamplingParams, TokensSampled, awaited
from shared.engine.engine import Engine
from shared.engine.executor import TorchExecutor
from shared.engine.kv.store import KvStore
from shared.engine.models.config import parse

CASES = ((1, 1024), (1, 8192), (8, 1024), (32, 1024), (64, 1024))
WAYS = {
    "greedy": SamplingParams(),
    "temperature 0.8": SamplingParams(temperature=0.8),
    "temperature 0.8, top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "and a presence penalty": SamplingParams(temperature=0.8, top_p=0.95, presence_penalty=0.5),
}
NUM_QUEUED = 8  # a driver holds about a thousand launches, and a step with every sampling parameter is near a hundred


def gpu_ms(executor: TorchExecutor, size: int, context: int, params: SamplingParams) -> float:
    """A step's time on the GPU; see `launched.gpu_ms`."""
    room = -(-(context + 4 * NUM_QUEUED) // shapes.PAGE_SIZE)
    items = [
        replace(shapes.item(place, context, 1, room), sampling=params, history=[5] * context) for place in range(size)
    ]
    return launched.gpu_ms(executor, [items, *(_following(items, number) for number in range(1, 1 + NUM_QUEUED))])


def _following(items: Sequence[BatchItem], number: int) -> list[BatchItem]:
    """Of a step behind others, whose tokens nobody on the host has seen."""
    return [replace(item, token_ids=[awaited(place)], start=item.start + number) for place, item in enumerate(items)]


def wall_ms(executor: Executor, size: int, context: int, params: SamplingParams, num_steps: int) -> float:
    """A step's time as an engine takes it, everything included."""
    kv = KvStore(executor.spec.num_pages, shapes.PAGE_SIZE, 10_000)
    engine = Engine(executor, kv, max_step_tokens=8192, max_num_sequences=size)
    asked = replace(params, max_tokens=num_steps + size * context // 8192 + 20, ignore_eos=True)
    for number in range(size):
        prompt = tuple((number * 31 + place) % 1000 + 3 for place in range(context))
        engine.submit(EngineRequest(str(number), prompt, replace(asked, seed=number)))
    begun: set[str] = set()
    while len(begun) < size:
        begun |= {event.request_id for event in engine.step() if isinstance(event, TokensSampled)}
    for _ in range(3):
        engine.step()
    started = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    elapsed_s = time.perf_counter() - started
    for number in range(size):
        engine.cancel(str(number))
    while engine.has_work():
        engine.step()
    return elapsed_s / num_steps * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--weights", default="bf16", choices=["bf16", "nvfp4"])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    print(provenance.banner("bench.gaps"))
    config, packed = parse(shapes.SHAPES[args.shape]), args.weights == "nvfp4"
    _, executor = shapes.decoder_and_executor(config, torch.device("cuda", 0), 64 * 90, packed)
    gc.freeze()  # as a worker does: a full collection takes as long as some steps
    print(torch.cuda.get_device_name(0))
    print("| decode | ms on the GPU | ms in order (idle) | ms launched ahead (idle) |\n|---|---|---|---|")
    for size, context in CASES:
        for name, params in WAYS.items() if context == CASES[0][1] else [("greedy", WAYS["greedy"])]:
            busy = gpu_ms(executor, size, context, params)
            times = [wall_ms(kind, size, context, params, args.steps) for kind in (InOrder(executor), executor)]
            cells = [f"{wall:.2f} ({1 - busy / wall:.1%})" for wall in times]
            print(f"| batch {size}, context {context:,}, {name} | {busy:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
