"""How long a GPU has nothing to do between verifications of GLM-5.2 on one of eight ranks, whose MTP layer drafts: in
order, and with the next step launched before the host hears how many drafts were right.

    python -m bench.glm_gaps [--layers 78] [--linears bf16|fp8] [--drafts 3] [--sizes 1] [--context 8192] [--steps 60]

As `bench.gaps`, with the rank and its pages of `bench.glm_rank`. A step verifies so many drafts of each sequence,
follows the model by what was chosen, and proposes as many again; drafts are right as random weights have it.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from bench import launched, provenance
from bench.glm_random import FIELDS, NAMES, PAGE_SIZE, Counted, Rank, rank
from bench.launched import InOrder
from shared.engine.api import (
    BatchItem,
    EngineRequest,
    EngineSpec,
    Executor,
    Recorded,
    SamplingParams,
    TokensSampled,
    awaited,
)
from shared.engine.batch import Batch
from shared.engine.engine import Engine
from shared.engine.executor import TorchExecutor
from shared.engine.kernels import cuda_choice
from shared.engine.kv.layout import KvLayout
from shared.engine.kv.store import KvStore
from shared.engine.layers import cuda_glm
from shared.engine.models.api import DraftLayer
from shared.engine.models.glm_config import parse
from shared.engine.speculation.speculator import Speculation
from shared.models.store import default_cache

WAYS = {
    "greedy": SamplingParams(),
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 1, top_p 0.95": SamplingParams(temperature=1.0, top_p=0.95),
}
NUM_QUEUED = 2  # steps, of some hundred launches each


class RankModel:
    """Satisfies `shared.engine.models.api.Model` by a rank, whose own layer drafts or is not there."""

    def __init__(self, made: Rank[Any], vocab_size: int, *, drafting: bool) -> None:
        self.vocab_size, self.max_position = vocab_size, made.memory.num_pages * PAGE_SIZE
        self.eos_token_ids: tuple[int, ...] = ()
        self.num_torch_threads, self.arithmetic = 1, "bfloat16"
        self.recorded: Recorded | None = cuda_glm.recorded(self.max_position)
        self.draft_layer: DraftLayer | None = made.drafts if drafting else None
        self._layout, self._made = made.layout, made

    def layout(self, page_size: int) -> KvLayout:
        """That of the rank's pages."""
        assert page_size == PAGE_SIZE
        return self._layout

    def rank_layout(self, page_size: int) -> KvLayout:
        """The same."""
        return self.layout(page_size)

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
        """See `Model.forward`."""
        logits, _ = self._made.decoder(batch, pool, layout, NAMES)
        return logits if not len(logits) else self._made.group.join(logits)


def on_rank(made: Rank[Any], vocab_size: int, *, drafting: bool = True) -> TorchExecutor:
    """An executor of a rank whose group joins so many logits."""
    model = RankModel(made, vocab_size, drafting=drafting)
    spec = EngineSpec("glm", vocab_size, model.max_position, (), made.layout, made.memory.num_pages, "", 256)
    choice = cuda_choice.find(made.decoder.device, default_cache() / "kernels", vocab_size)
    return TorchExecutor(model, spec, made.memory, choice=choice)


def gpu_ms(executor: Executor, size: int, context: int, num_drafts: int, params: SamplingParams) -> float:
    """A step's time on the GPU; see `launched.gpu_ms`."""
    room = -(-(context + (2 + NUM_QUEUED) * (1 + num_drafts) + num_drafts) // PAGE_SIZE)
    items = [
        BatchItem(
            str(place), range(5, 6 + num_drafts), context, range(place * room, (place + 1) * room), True,
            replace(params, seed=place), 0, (), num_drafts, num_drafts,
        )
        for place in range(size)
    ]  # fmt: skip
    behind = (
        [_behind(item, place, size, number) for place, item in enumerate(items)] for number in range(1, 1 + NUM_QUEUED)
    )
    return launched.gpu_ms(executor, [items, *behind])


def _behind(item: BatchItem, place: int, num_places: int, number: int) -> BatchItem:
    """The `number`-th step behind one that verifies `item`, as if that were known to have started with all right."""
    token_ids = [awaited(place + each * num_places) for each in range(1 + item.num_drafts)]
    start = item.start + number + (number - 1) * item.num_drafts
    return replace(item, token_ids=token_ids, start=start, num_in_doubt=item.num_drafts)


@contextmanager
def begun(
    executor: Executor, size: int, context: int, num_drafts: int, params: SamplingParams, num_steps: int
) -> Iterator[Engine]:
    """An engine whose sequences have so much context, and so many steps before them."""
    kv = KvStore(executor.spec.num_pages, PAGE_SIZE, 10_000)
    speculation = Speculation(num_drafts, adaptive=False)
    engine = Engine(executor, kv, max_step_tokens=8192, max_num_sequences=size, speculation=speculation)
    most = (num_steps + 10) * (1 + num_drafts)
    for number in range(size):
        prompt = tuple((number * 31 + place) % 1000 + 3 for place in range(context))
        pages = kv.reserve([], -(-context // PAGE_SIZE))
        assert pages is not None
        pages.num_tokens = context - 1  # of noise
        asked = replace(params, seed=number, max_tokens=most, ignore_eos=True)
        engine.submit(EngineRequest(str(number), prompt, asked), pages)
    for _ in range(5):
        engine.step()
    yield engine
    for number in range(size):
        engine.cancel(str(number))
    while engine.has_work():
        engine.step()


def wall_ms(
    executor: Executor, size: int, context: int, num_drafts: int, params: SamplingParams, num_steps: int
) -> tuple[float, float, float]:
    """A step's time as an engine takes it, everything included, that of the longest, and how many tokens a step yields
    for a sequence."""
    with begun(executor, size, context, num_drafts, params, num_steps) as engine:
        ends_s, num_tokens = [time.perf_counter()], 0
        for _ in range(num_steps):
            num_tokens += sum(len(event.tokens) for event in engine.step() if isinstance(event, TokensSampled))
            ends_s.append(time.perf_counter())
    elapsed_s, longest_s = ends_s[-1] - ends_s[0], max(end - start for start, end in pairwise(ends_s))
    return elapsed_s / num_steps * 1000, longest_s * 1000, num_tokens / num_steps / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=78)
    parser.add_argument("--linears", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--drafts", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    print(provenance.banner("bench.glm_gaps"))
    config, device = parse(FIELDS), torch.device("cuda", 0)
    config = replace(
        config, num_layers=args.layers, full_layers=config.full_layers[: args.layers],
        moe_layers=config.moe_layers[: args.layers],
    )  # fmt: skip
    with torch.inference_mode():
        made = rank(config, Counted(8), device, pdl=True, cuda=True, fp8=args.linears == "fp8")
        executor = on_rank(made, len(made.decoder.ends.head))
    gc.freeze()  # as a worker does: a full collection takes as long as some steps
    print(f"{torch.cuda.get_device_name(0)}; attention's linears, and dense MLPs', in {args.linears}")
    print(
        "| verification | ms on the GPU | ms in order (idle; longest) | ms launched ahead | tokens a step, each way |"
    )
    print("|---|---|---|---|---|")
    for size in args.sizes:
        for name, params in WAYS.items():
            busy = gpu_ms(executor, size, args.context, args.drafts, params)
            found = [
                wall_ms(kind, size, args.context, args.drafts, params, args.steps)
                for kind in (InOrder(executor), executor)
            ]
            cells = [f"{wall:.2f} ({1 - busy / wall:.1%}; {longest:.2f})" for wall, longest, _ in found]
            tokens = ", ".join(f"{each:.2f}" for *_, each in found)
            print(f"| batch {size}, {args.drafts} drafts, {name} | {busy:.2f} | {' | '.join(cells)} | {tokens} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
