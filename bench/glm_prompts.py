"""Prompts on one of eight ranks of GLM-5.2 at its full size: what a layer of each kind takes, and what the whole would.

    python -m bench.glm_prompts [--ranks 8] [--linears bf16|fp8] [--prompts 1024 4096 8192]
                                [--chunk 2048 --behind 30000 100000] [--steps 512 2048] [--no-cuda] [--profile]

The rank is that of `bench.glm_rank`, with its first seven layers, in which each kind is there: dense MLPs whose
attention selects, mixtures that select, and mixtures that share a selection. A kind's time is of the GPU, by events
around its layers in a row; `launched` is of all seven as a worker launches them, until the GPU has ended, and `host`
until the host has. The whole model is the sum over its 78 layers, and the sums over ranks that are left out here at the
bandwidth that is said. The floor is the longest of what its products take at the rate of cuBLAS, and what reading the
weights once takes; attention counts with the tokens that are selected, in latent space or out of it, as is less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench import provenance
from bench.bandwidth import read_bandwidth
from bench.glm_random import FIELDS, NAMES, PAGE_SIZE, Counted, Rank, rank
from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import Batch, build
from shared.engine.kernels import triton_index
from shared.engine.layers import cuda_glm, cuda_glm_layer, cuda_glm_weights
from shared.engine.layers.cuda_glm_layer import Step
from shared.engine.layers.cuda_glm_weights import Mixture
from shared.engine.models.glm_config import GlmConfig, parse

LAYERS = 7  # dense and selecting, three; mixtures that share a selection, three; one that selects
KINDS = {"dense, selects": 1, "mixture, shares": 4, "mixture, selects": 6}
PRODUCT_FLOPS = 6e14  # a second; cuBLAS' in bfloat16 on an H100, for what is large enough
SUM_BYTES = 2.5e11  # a second; of a tensor that is summed over eight GPUs by NVLink
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to be computed, behind those that are cached."""

    num_tokens: int
    behind: int = 0

    @property
    def context(self) -> int:
        """All of them."""
        return self.behind + self.num_tokens

    def batch(self) -> Batch:
        """A step of it, in scattered pages."""
        order = torch.randperm(-(-self.context // PAGE_SIZE), generator=torch.Generator().manual_seed(1)).tolist()
        tokens = [(7919 * place + 1) % 19_000 for place in range(self.num_tokens)]
        return build([BatchItem("prompt", tokens, self.behind, order, True, SamplingParams(), self.context)], PAGE_SIZE)

    def pairs(self, most: int) -> float:
        """Of a row and a token that it sees, of which each row counts no more than `most`."""
        positions = torch.arange(self.behind, self.context, dtype=torch.float64)
        return float((positions + 1).clamp(max=most).sum())


def layer_flops(config: GlmConfig, prompt: Prompt, kind: str, num_ranks: int) -> dict[str, float]:
    """Of a layer of a rank, whose config this is."""
    c, rows = config, prompt.num_tokens
    selects = "selects" in kind
    index = (
        c.index_head_dim + c.index_num_heads
    ) * c.hidden_size + c.q_lora_rank * c.index_num_heads * c.index_head_dim
    linears = (c.q_lora_rank + c.latent_dim) * c.hidden_size + c.num_heads * (
        c.qk_head_dim * c.q_lora_rank + c.v_head_dim * c.hidden_size
    )
    plain, latent = c.qk_head_dim + c.v_head_dim, c.latent_dim + c.kv_lora_rank
    raised = c.num_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    pairs = 2 * c.num_heads * prompt.pairs(c.index_topk)
    found = {
        "linears": 2.0 * rows * (linears + index * selects),
        "attention": min(pairs * latent + 2 * rows * raised, pairs * plain + 2 * prompt.context * raised),
    }
    if selects and prompt.context > c.index_topk:
        found["index"] = 2 * c.index_num_heads * c.index_head_dim * prompt.pairs(prompt.context)
    chosen = (c.num_experts_per_token + 1) * c.moe_intermediate_size // num_ranks
    inner = c.intermediate_size if "dense" in kind else chosen
    return found | {"mlp": 6.0 * rows * inner * c.hidden_size}


def num_bytes(made: Rank[Counted], kind: str) -> int:
    """Of a layer's weights."""
    layer = made.layers[KINDS[kind]]
    a, mlp = layer.attention, layer.mlp
    found = sum(x.nbytes for x in (a.down, a.query, a.up_key, a.up_value, a.output))
    if not isinstance(mlp, Mixture):
        return found + mlp.gate_up.nbytes + mlp.down.nbytes
    e = mlp.experts
    assert not isinstance(e, cuda_glm_weights.Fp4Experts), "none here multiplies in FP4"
    parts = (e.gate_up, e.down, e.gate_up_scale, e.down_scale, mlp.router, mlp.shared.gate_up, mlp.shared.down)
    return found + sum(x.nbytes for x in parts if x is not None)


def layer_ms(made: Rank[Counted], prompt: Prompt, kind: str) -> float:
    """Of the GPU, the median; the host is ahead of it."""
    decoder, config = made.decoder, made.decoder.config
    states = cuda_glm.views(made.memory.bytes, made.layout, config, NAMES)
    batch, index = prompt.batch(), KINDS[kind]
    inputs = cuda_glm.on_device(batch, PAGE_SIZE, decoder.device)
    x, rows = cuda_glm.begun(inputs, batch.num_tokens, decoder.ends, decoder.frequencies, made.group)
    selected = triton_index.empty(batch.num_tokens, config.index_topk, decoder.device)
    together = cuda_glm.spans(batch, rows.page_ids, len(states[0].latents), config)
    step = Step(config, made.group, rows, selected, prompt.context, latent=decoder.latent, spans=together)
    x, delta = cuda_glm_layer.forward(x, None, made.layers[0], states[0], step)  # selects

    def work() -> object:
        return cuda_glm_layer.forward(x, delta, made.layers[index], states[index], step)  # adds to x

    return on_gpu(work)


def on_gpu(work: Callable[[], object]) -> float:
    """Milliseconds of it, by events; the median."""
    work()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # so that the host is ahead
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


def launched_ms(made: Rank[Counted], prompt: Prompt) -> tuple[float, float]:
    """Of all layers here and the head, until the GPU has ended and until the host has; medians."""
    batch, walls, hosts = prompt.batch(), [], []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        made.decoder(batch, made.memory.bytes, made.layout, NAMES)
        hosts.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - started)
    return 1e3 * statistics.median(walls[1:]), 1e3 * statistics.median(hosts[1:])


def counted(whole: GlmConfig) -> dict[str, int]:
    """How many layers of each kind the whole model has."""
    counts = dict.fromkeys(KINDS, 0)
    for full, moe in zip(whole.full_layers[: whole.num_layers], whole.moe_layers, strict=True):
        counts[f"{'mixture' if moe else 'dense'}, {'selects' if full else 'shares'}"] += 1
    return counts


def floor_ms(made: Rank[Counted], counts: dict[str, int], prompt: Prompt, rate: float) -> float:
    """Of the whole model."""
    seconds = 0.0
    for kind, number in counts.items():
        flops = layer_flops(made.decoder.config, prompt, kind, made.group.num_ranks)
        seconds += number * max(sum(flops.values()) / PRODUCT_FLOPS, num_bytes(made, kind) / rate)
    return 1e3 * seconds


def sums_ms(whole: GlmConfig, num_tokens: int) -> float:
    """Of the sums over ranks, as assumed."""
    return (1 + 2 * whole.num_layers) * num_tokens * whole.hidden_size * 2 / SUM_BYTES * 1e3


def measure(made: Rank[Counted], whole: GlmConfig, rate: float, prompts: list[Prompt]) -> None:
    """Print a table."""
    counts = counted(whole)
    print("| tokens, behind | a layer, ms: " + " | ".join(KINDS) + " | launched, ms (host) | 78 layers, ms | floor, ms "
          "| sums, ms | first token, ms |\n|---|" + "---|" * (len(KINDS) + 5))  # fmt: skip
    for prompt in prompts:
        wall, host = launched_ms(made, prompt)
        times = {kind: layer_ms(made, prompt, kind) for kind in KINDS}
        total = sum(counts[kind] * times[kind] for kind in KINDS)
        floor, sums = floor_ms(made, counts, prompt, rate), sums_ms(whole, prompt.num_tokens)
        cells = " | ".join(f"{times[kind]:.3f}" for kind in KINDS)
        print(
            f"| {prompt.num_tokens:,}, {prompt.behind:,} | {cells} | {wall:.2f} ({host:.2f}) | {total:.1f} "
            f"| {floor:.1f} | {sums:.1f} | {total + sums:.0f} |",
            flush=True,
        )


def compare(made: Rank[Counted], whole: GlmConfig, num_tokens: int, steps: list[int]) -> None:
    """Print what a prompt takes in steps of so many tokens."""
    counts = counted(whole)
    print(f"\n| {num_tokens:,} tokens in steps of | 78 layers, ms | the longest step, ms |\n|---|---|---|")
    for most in steps:
        each = [
            sum(n * layer_ms(made, Prompt(min(most, num_tokens - at), at), kind) for kind, n in counts.items())
            for at in range(0, num_tokens, most)
        ]
        print(f"| {most:,} | {sum(each):.0f} | {max(each):.0f} |", flush=True)


def profile(made: Rank[Counted], prompt: Prompt) -> None:
    """What the kernels of a launch take."""
    batch = prompt.batch()
    made.decoder(batch, made.memory.bytes, made.layout, NAMES)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        made.decoder(batch, made.memory.bytes, made.layout, NAMES)
        torch.cuda.synchronize()
    print(f"\n{prompt.num_tokens:,} tokens behind {prompt.behind:,}, {LAYERS} layers:")
    print("| ms | kernels | us each | kernel |\n|---|---|---|---|")
    found = [event for event in run.key_averages() if event.self_device_time_total > 0]
    for event in sorted(found, key=lambda event: -event.self_device_time_total)[:24]:
        total, count = event.self_device_time_total, event.count
        print(f"| {total / 1e3:.3f} | {count} | {total / count:.1f} | {event.key[:90]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--linears", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--prompts", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--behind", type=int, nargs="*", default=[30_000, 100_000])
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="budgets, for the longest of the prompts")
    parser.add_argument("--no-cuda", action="store_true", help="without kernels that need nvcc")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print(provenance.banner("bench.glm_prompts"))
    print(f"attention's linears, and dense MLPs', in {args.linears}; one of {args.ranks} ranks")
    whole, device = parse(FIELDS), torch.device("cuda", 0)
    config = replace(
        whole, num_layers=LAYERS, full_layers=whole.full_layers[:LAYERS], moe_layers=whole.moe_layers[:LAYERS]
    )
    rate = read_bandwidth(device)
    torch.cuda.empty_cache()
    with torch.inference_mode():
        made = rank(config, Counted(args.ranks), device, pdl=True, cuda=not args.no_cuda, fp8=args.linears == "fp8")
        torch.cuda.synchronize()
        gigabytes = torch.cuda.memory_allocated() / 1e9
        print(f"{torch.cuda.get_device_name(0)}; plain reads {rate / 1e12:.2f} TB/s; {gigabytes:.1f} GB")
        prompts = [Prompt(n) for n in args.prompts] + [Prompt(args.chunk, n) for n in args.behind]
        measure(made, whole, rate, prompts)
        if args.steps:
            compare(made, whole, max(args.prompts), args.steps)
        for prompt in prompts if args.profile else ():
            profile(made, prompt)


if __name__ == "__main__":
    main()
