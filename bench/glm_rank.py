"""One of eight ranks of GLM-5.2 at its full size on one GPU: what a decode step takes, and what it must take.

    python -m bench.glm_rank [--ranks 8] [--layers 78] [--linears bf16|fp8] [--no-pdl] [--no-cuda] [--profile]

The rank holds its share under tensor parallelism with the experts' matrices split too: routed experts of layers 3 to 77
in NVFP4, all else in bfloat16, as in NVIDIA's checkpoint, or with `--linears fp8` those of attention (but kv_b) and of
dense MLPs in e4m3 as in GLM's own FP8 checkpoint; random weights made on the device, experts chosen by the router from
whatever comes out. Collectives are left out and counted. Steps are CUDA graphs; times are of the GPU, by
events around replays in a row. The floor is the time to read once, at the bandwidth that a plain sum over 4 GiB
reaches in the same run, the weights that a step needs and the latents and index keys that it attends to.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench import glm_drafts, provenance, replays
from bench.bandwidth import read_bandwidth
from bench.glm_random import FIELDS, KV_TOKENS, NAMES, PAGE_SIZE, Counted, Rank, rank
from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import Batch, build
from shared.engine.kernels import reference
from shared.engine.kernels.experts import Experts
from shared.engine.layers.cuda_glm import CudaGlm, views
from shared.engine.layers.cuda_glm_weights import Dense, Mixture
from shared.engine.layers.moe import route
from shared.engine.models.glm_config import GlmConfig, parse

Step = tuple[int, int, int]  # batch, tokens of each, context
STEPS = (
    *((1, 1, context) for context in (1024, 8192, 32_768, 131_072)),
    *((1, width, 8192) for width in (2, 3, 4, 6)),
    *((8, 1, context) for context in (1024, 8192, 16_384)),
    (8, 4, 1024),
    (32, 1, 1024),
    (32, 1, 4096),
)
BRIEF = ((1, 1, 1024), (1, 1, 8192), (1, 4, 8192))
REPLAYS, REPEATS = 30, 5
PROFILED = 3  # replays
MEAN_ACCEPTED = {2: 1.834, 4: 2.98}  # docs/LOG.md says whose
ALL_REDUCE_US = (2.0, 4.0, 8.0)  # docs/LOG.md has 2.1 between two GPUs


def batch(size: int, width: int, context: int) -> Batch:
    """So many sequences of a context each (the step's own tokens in it), in scattered pages."""
    room = -(-context // PAGE_SIZE)
    order = torch.randperm(size * room, generator=torch.Generator().manual_seed(size)).tolist()
    items = [
        BatchItem(
            str(s),
            [(7919 * (s * width + place) + 1) % 19_000 for place in range(width)],
            context - width,
            order[s * room : (s + 1) * room],
            True,
            SamplingParams(),
            context,
            num_drafts=width - 1,
        )
        for s in range(size)
    ]
    return build(items, PAGE_SIZE)


def num_distinct(made: Rank[Counted], step: Batch) -> float:
    """Experts that a mixture reads in this step, the mean over layers, by the routers' own choice."""
    config, group, counts = made.decoder.config, made.group, list[int]()
    states = views(made.memory.bytes, made.layout, config, NAMES)
    group.parts, group.num_sums, group.num_bytes = [], 0, 0
    made.decoder.launch(step, states, PAGE_SIZE)
    (x, *parts), group.parts = group.parts, None
    for layer, attended, mixed in zip(made.layers, parts[::2], parts[1::2], strict=True):
        x = x + attended
        if isinstance(layer.mlp, Mixture):
            normed = reference.rms_norm(x, layer.post_norm, config.rms_norm_eps)
            logits = normed.float() @ layer.mlp.router.float().T
            counts.append(len(route(logits, layer.mlp.correction_bias, config)[1].unique()))
        x = x + mixed
    return statistics.mean(counts) if counts else 0.0


def floor_bytes(
    made: Rank[Counted], config: GlmConfig, size: int, width: int, context: int, experts: float
) -> dict[str, float]:
    """What a step has to read, by kind."""
    rows = size * width
    found = {"attention": 0.0, "dense and shared": 0.0, "routed experts": 0.0}
    for layer in made.layers:
        a = layer.attention
        found["attention"] += sum(x.nbytes for x in (a.down, a.query, a.up_key, a.up_value, a.output))
        if isinstance(layer.mlp, Dense):
            found["dense and shared"] += layer.mlp.gate_up.nbytes + layer.mlp.down.nbytes
            continue
        found["dense and shared"] += sum(
            x.nbytes for x in (layer.mlp.router, layer.mlp.shared.gate_up, layer.mlp.shared.down)
        )
        e = layer.mlp.experts
        assert isinstance(e, Experts), "none here multiplies in FP4"
        all_of_them = sum(x.nbytes for x in (e.gate_up, e.down, e.gate_up_scale, e.down_scale) if x is not None)
        found["routed experts"] += all_of_them * experts / config.num_experts
    found["head"] = float(made.decoder.ends.head.nbytes)
    found["latents"] = float(rows * min(context, config.index_topk) * config.latent_dim * 2 * config.num_layers)
    if context > config.index_topk:
        found["index keys"] = float(size * context * config.index_head_dim * 2 * sum(config.full_layers))
    return found


def measure(made: Rank[Counted], config: GlmConfig, rate: float, steps: Sequence[Step]) -> dict[Step, float]:
    """Print a table; median milliseconds by step."""
    print("| batch, tokens each, context | ms (spread) | floor ms | ratio | experts a layer | whole step ms |")
    print("|---|---|---|---|---|---|")
    medians = {}
    for size, width, context in steps:
        step = batch(size, width, context)

        def whole() -> None:
            logits, _ = made.decoder(step, made.memory.bytes, made.layout, NAMES)  # noqa: B023
            logits.argmax(-1).cpu()

        whole()
        walls = []
        for _ in range(10):
            started = time.perf_counter()
            whole()
            walls.append(time.perf_counter() - started)
        times = replays.timed(made.decoder.graph(size, width, context).graph, REPLAYS, REPEATS)
        experts = num_distinct(made, step)
        floor = sum(floor_bytes(made, config, size, width, context, experts).values()) / rate * 1e3
        median = medians[size, width, context] = statistics.median(times)
        spread = f"{min(times):.3f} to {max(times):.3f}"
        print(
            f"| {size}, {width}, {context:,} | {median:.3f} ({spread}) | {floor:.3f} | {median / floor:.2f} "
            f"| {experts:.1f} | {statistics.median(walls) * 1e3:.3f} |",
            flush=True,
        )
    return medians


def project(medians: dict[Step, float], drafts: dict[int, float], num_layers: int) -> None:
    """Tokens a second of one user on all ranks: steps at 8k and the drafts for them, all-reduces of both, accepted
    lengths."""
    print(
        "\n| tokens verified | ms a step, one rank | ms of drafts | accepted | all-reduce us | tokens/s |"
        "\n|---|---|---|---|---|---|"
    )
    for width, accepted in ((1, 1.0), *MEAN_ACCEPTED.items()):
        step = medians.get((1, width, 8192))
        if step is None:
            continue
        drafting = drafts[width - 1] if width > 1 else 0.0
        num_sums = 1 + 2 * num_layers + glm_drafts.ALL_REDUCES * (width - 1)
        for us in ALL_REDUCE_US:
            total = step + drafting + num_sums * us / 1e3
            print(f"| {width} | {step:.3f} | {drafting:.3f} | {accepted} | {us:.0f} | {accepted / total * 1e3:.0f} |")


def profile(made: Rank[Counted], steps: Sequence[Step]) -> None:
    """What the kernels of a step take, each waiting for the one before."""
    decoder = CudaGlm(made.decoder.config, made.decoder.ends, made.layers, made.group, made.decoder.latent, pdl=False)
    for size, width, context in steps:
        decoder(batch(size, width, context), made.memory.bytes, made.layout, NAMES)
        graph = decoder.graph(size, width, context).graph
        graph.replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
            for _ in range(PROFILED):
                graph.replay()
            torch.cuda.synchronize()
        print(
            f"\nbatch {size}, {width} tokens each, context {context:,}:"
            "\n| ms | kernels | us each | kernel |\n|---|---|---|---|"
        )
        found = [event for event in run.key_averages() if event.self_device_time_total > 0]
        for event in sorted(found, key=lambda event: -event.self_device_time_total)[:20]:
            total, count = event.self_device_time_total / PROFILED, event.count / PROFILED
            print(f"| {total / 1e3:.3f} | {count:.0f} | {total / count:.2f} | {event.key[:80]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--layers", type=int, default=78)
    parser.add_argument("--no-pdl", action="store_true", help="kernels start when those in front of them have ended")
    parser.add_argument("--no-cuda", action="store_true", help="without kernels that need nvcc")
    parser.add_argument("--linears", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--brief", action="store_true", help="few steps only")
    args = parser.parse_args()
    print(provenance.banner("bench.glm_rank"))
    print(f"attention's linears, and dense MLPs', in {args.linears}")
    device = torch.device("cuda", 0)
    config = parse(FIELDS)
    config = replace(
        config, num_layers=args.layers, full_layers=config.full_layers[: args.layers],
        moe_layers=config.moe_layers[: args.layers],
    )  # fmt: skip
    rate = read_bandwidth(device)
    torch.cuda.empty_cache()
    started = time.perf_counter()
    with torch.inference_mode():
        how = {"pdl": not args.no_pdl, "cuda": not args.no_cuda, "fp8": args.linears == "fp8"}
        made = rank(config, Counted(args.ranks), device, **how)
        torch.cuda.synchronize()
        print(
            f"{torch.cuda.get_device_name(0)}; plain reads {rate / 1e12:.2f} TB/s; "
            f"{torch.cuda.memory_allocated() / 1e9:.1f} GB"
        )
        print(f"made in {time.perf_counter() - started:.1f} s; room for {KV_TOKENS:,} tokens")
        for kind, num_bytes in floor_bytes(made, config, 1, 1, 8192, config.num_experts_per_token).items():
            print(f"floor of a token at 8k: {kind} {num_bytes / 1e6:,.0f} MB, {num_bytes / rate * 1e3:.3f} ms")
        medians = measure(made, config, rate, BRIEF if args.brief else STEPS)
        sums, num_bytes = made.group.num_sums, made.group.num_bytes
        print(f"\ncollectives left out of the last of these: {sums} sums, {num_bytes / 1e6:.2f} MB; a join of logits")
        project(medians, glm_drafts.measure(made, config, rate), config.num_layers)
        if args.profile:
            profile(made, ((1, 1, 8192), (1, 4, 8192), (32, 1, 1024)))


if __name__ == "__main__":
    main()
