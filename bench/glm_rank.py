"""One of eight ranks of GLM-5.2 at its full size on one GPU: what a decode step takes, and what it must take.

    python -m bench.glm_rank [--ranks 8] [--layers 78] [--no-pdl] [--profile]

The rank holds its share under tensor parallelism with the experts' matrices split too: routed experts of layers 3 to 77
in NVFP4, all else in bfloat16, as in NVIDIA's checkpoint; random weights made on the device, experts chosen by the router
from whatever comes out. Collectives are left out and counted. Steps are CUDA graphs; times are of the GPU, by events
around replays in a row. The floor is the time to read once, at the bandwidth that a plain sum over 4 GiB reaches in the
same run, the weights that a step needs and the latents and index keys that it attends to.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench import provenance
from bench.bandwidth import read_bandwidth
from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import Batch, build
from shared.engine.kernels.experts import FACTOR, Experts, SharedExpert
from shared.engine.kernels.gluon_state import KeyNorm
from shared.engine.kv.view import DeviceMemory
from shared.engine.kernels import reference
from shared.engine.kv.layout import KvLayout
from shared.engine.layers.cuda_glm import CudaGlm, Ends, Graph, views
from shared.engine.layers.cuda_glm_layer import Attention, Layer, Mixture
from shared.engine.layers.moe import route
from shared.engine.models import glm_layout
from shared.engine.models.glm_config import GlmConfig, parse
from shared.engine.models.glm_weights import MlpWeights
from shared.engine.parallel.partition import Shard, of_glm

FIELDS = {
    "vocab_size": 154_880,
    "hidden_size": 6144,
    "intermediate_size": 12_288,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 8e6},
    "max_position_embeddings": 1_048_576,
    "eos_token_id": [154_820],
}
PAGE_SIZE = 64
NAMES = glm_layout.LATENTS, glm_layout.INDEX_KEYS
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
KV_TOKENS = 140_000
PROFILED = 3  # replays
RANKED_MEAN_ACCEPTED = {2: 1.834, 4: 2.98}  # docs/LOG.md says whose
ALL_REDUCE_US = (6.0, 8.0, 10.0)


class Counted:
    """A group whose collectives do nothing but count."""

    def __init__(self, num_ranks: int) -> None:
        self.rank, self.num_ranks = 0, num_ranks
        self.num_sums = self.num_bytes = 0
        self.parts: list[torch.Tensor] | None = None

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The part."""
        self.num_sums += 1
        self.num_bytes += part.nbytes
        if self.parts is not None:
            self.parts.append(part)
        return part

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """The part."""
        return part


class RandomLayers:
    """A rank's weights, made on the device."""

    def __init__(self, config: GlmConfig, num_ranks: int, device: torch.device) -> None:
        shard = Shard(0, num_ranks, "matrices")
        self.config, self._device = of_glm(config, shard)[0], device
        self._inner = len(shard.share(config.moe_intermediate_size))
        self._chance = torch.Generator(device).manual_seed(0)
        self.vocabulary = len(shard.share(config.vocab_size))

    def ends(self) -> Ends:
        hidden = self.config.hidden_size
        table = self._matrix(self.vocabulary, hidden)
        return Ends(table * hidden**0.5, 0, self._gain(hidden), self._matrix(self.vocabulary, hidden))

    def layer(self, index: int) -> Layer:
        moe, hidden = self.config.moe_layers[index], self.config.hidden_size
        return Layer(
            self._gain(hidden),
            self._gain(hidden),
            self._attention(full=self.config.full_layers[index]),
            self._mixture() if moe else self._mlp(self.config.intermediate_size),
        )

    def _attention(self, *, full: bool) -> Attention:
        c = self.config
        index_rows = c.index_head_dim + c.index_num_heads if full else 0
        index_queries = c.index_num_heads * c.index_head_dim if full else 0
        ones = torch.ones(c.index_head_dim, device=self._device)
        return Attention(
            down=self._matrix(c.q_lora_rank + c.latent_dim + index_rows, c.hidden_size),
            query_norm=self._gain(c.q_lora_rank),
            query=self._matrix(c.num_heads * c.qk_head_dim + index_queries, c.q_lora_rank),
            latent_norm=self._gain(c.kv_lora_rank),
            up_key=self._matrix(c.num_heads * c.qk_nope_head_dim, c.kv_lora_rank).unflatten(0, (c.num_heads, -1)),
            up_value=self._matrix(c.num_heads * c.v_head_dim, c.kv_lora_rank).unflatten(0, (c.num_heads, -1)),
            output=self._matrix(c.hidden_size, c.num_heads * c.v_head_dim),
            key_norm=KeyNorm(ones, 0 * ones, 1e-6) if full else None,
        )

    def _mlp(self, inner: int) -> MlpWeights:
        hidden = self.config.hidden_size
        return MlpWeights(self._matrix(2 * inner, hidden), self._matrix(hidden, inner))

    def _mixture(self) -> Mixture:
        c, inner = self.config, self._inner
        bias = torch.randn(c.num_experts, generator=self._chance, device=self._device) * 0.02
        sizes = torch.tensor([c.hidden_size, inner], device=self._device)
        factors = (FACTOR / 3 * sizes**-0.5).expand(c.num_experts, 2).contiguous()  # codes are 2.9 in the mean square
        gate_up, gate_up_scale = self._packed(2 * inner, c.hidden_size)
        down, down_scale = self._packed(c.hidden_size, inner)
        experts = Experts(gate_up, down, gate_up_scale, down_scale, factors)
        shared = SharedExpert(self._matrix(2 * inner, c.hidden_size), self._matrix(c.hidden_size, inner))
        return Mixture(self._matrix(c.num_experts, c.hidden_size), bias, experts, shared)

    def _packed(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        num = self.config.num_experts
        return self._bytes(0, 256, num, rows, columns // 2), self._bytes(0x30, 0x40, num, rows, columns // 16)

    def _bytes(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self._chance, dtype=torch.uint8, device=self._device)

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=self._chance, dtype=torch.bfloat16, device=self._device)
        return values.mul_(float(columns) ** -0.5)

    def _gain(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16, device=self._device)


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank, its pages filled with noise, and how its collectives are counted."""

    decoder: CudaGlm
    layers: Sequence[Layer]
    memory: DeviceMemory
    layout: KvLayout
    group: Counted


def rank(config: GlmConfig, num_ranks: int, device: torch.device, *, pdl: bool) -> Rank:
    """Make one."""
    weights, group = RandomLayers(config, num_ranks, device), Counted(num_ranks)
    layers = [weights.layer(index) for index in range(config.num_layers)]
    layout = glm_layout.layout(config, "bfloat16", PAGE_SIZE)
    memory = DeviceMemory(KV_TOKENS // PAGE_SIZE, layout.page_bytes, device)
    for part in memory.bytes.view(torch.bfloat16).split(256):
        part.normal_(generator=torch.Generator(device).manual_seed(1))
    return Rank(CudaGlm(weights.config, weights.ends(), layers, group, pdl=pdl), layers, memory, layout, group)


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


def num_distinct(made: Rank, step: Batch) -> float:
    """Experts that a mixture reads in this step, the mean over layers, by the routers' own choice."""
    config, group, counts = made.decoder.config, made.group, list[int]()
    states = views(made.memory.bytes, made.layout, config, NAMES)
    group.parts = []
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


def floor_bytes(made: Rank, config: GlmConfig, size: int, width: int, context: int, experts: float) -> dict[str, float]:
    """What a step has to read, by kind."""
    rows = size * width
    found = {"attention": 0.0, "dense and shared": 0.0, "routed experts": 0.0}
    for layer in made.layers:
        a = layer.attention
        found["attention"] += sum(x.nbytes for x in (a.down, a.query, a.up_key, a.up_value, a.output))
        if isinstance(layer.mlp, MlpWeights):
            found["dense and shared"] += layer.mlp.gate_up.nbytes + layer.mlp.down.nbytes
            continue
        found["dense and shared"] += sum(
            x.nbytes for x in (layer.mlp.router, layer.mlp.shared.gate_up, layer.mlp.shared.down)
        )
        e = layer.mlp.experts
        all_of_them = sum(x.nbytes for x in (e.gate_up, e.down, e.gate_up_scale, e.down_scale) if x is not None)
        found["routed experts"] += all_of_them * experts / config.num_experts
    found["head"] = float(made.decoder.ends.head.nbytes)
    found["latents"] = float(rows * min(context, config.index_topk) * config.latent_dim * 2 * config.num_layers)
    if context > config.index_topk:
        found["index keys"] = float(size * context * config.index_head_dim * 2 * sum(config.full_layers))
    return found


def milliseconds(graph: Graph, repeats: int = 30, groups: int = 5) -> list[float]:
    """Of a replay, in groups of `repeats` in a row."""
    graph.graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(groups):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return times


def measure(made: Rank, config: GlmConfig, rate: float, steps: Sequence[Step]) -> dict[Step, float]:
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
        times = milliseconds(made.decoder.graph(size, width, context))
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


def project(medians: dict[Step, float], num_layers: int) -> None:
    """Tokens a second of one user on all ranks, from steps at 8k, all-reduces at a stated time each, and accepted lengths."""
    print("\n| tokens verified | ms a step, one rank | accepted | all-reduce us | tokens/s |\n|---|---|---|---|---|")
    for width, accepted in ((1, 1.0), *RANKED_MEAN_ACCEPTED.items()):
        step = medians.get((1, width, 8192))
        if step is None:
            continue
        for us in ALL_REDUCE_US:
            total = step + 2 * num_layers * us / 1e3
            print(f"| {width} | {step:.3f} | {accepted} | {us:.0f} | {accepted / total * 1e3:.0f} |")


def compare_fetching(made: Rank, steps: Sequence[Step]) -> None:
    """Steps with the next large matrix brought into the cache by a kernel aside, and without."""
    decoder = CudaGlm(made.decoder.config, made.decoder.ends, made.layers, made.group, fetch_ahead=True)
    for step in steps:
        decoder(batch(*step), made.memory.bytes, made.layout, NAMES)
        plain, fetching = (milliseconds(each.graph(*step)) for each in (made.decoder, decoder))
        medians = f"{statistics.median(plain):.3f} ms, fetching ahead {statistics.median(fetching):.3f} ms"
        print(f"batch {step[0]}, {step[1]} tokens each, context {step[2]:,}: {medians}", flush=True)


def profile(made: Rank, steps: Sequence[Step]) -> None:
    """What the kernels of a step take, each waiting for the one before."""
    decoder = CudaGlm(made.decoder.config, made.decoder.ends, made.layers, made.group, pdl=False)
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
            f"\nbatch {size}, {width} tokens each, context {context:,}:\n| ms | kernels | us each | kernel |\n|---|---|---|---|"
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
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--brief", action="store_true", help="few steps only")
    args = parser.parse_args()
    print(provenance.banner("bench.glm_rank"))
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
        made = rank(config, args.ranks, device, pdl=not args.no_pdl)
        torch.cuda.synchronize()
        print(
            f"{torch.cuda.get_device_name(0)}; plain reads {rate / 1e12:.2f} TB/s; {torch.cuda.memory_allocated() / 1e9:.1f} GB"
        )
        print(f"made in {time.perf_counter() - started:.1f} s; room for {KV_TOKENS:,} tokens")
        for kind, num_bytes in floor_bytes(made, config, 1, 1, 8192, config.num_experts_per_token).items():
            print(f"floor of a token at 8k: {kind} {num_bytes / 1e6:,.0f} MB, {num_bytes / rate * 1e3:.3f} ms")
        medians = measure(made, config, rate, BRIEF if args.brief else STEPS)
        project(medians, config.num_layers)
        compare_fetching(made, ((1, 1, 8192), (1, 4, 8192)))
        if args.profile:
            profile(made, ((1, 1, 8192), (1, 4, 8192), (32, 1, 1024)))


if __name__ == "__main__":
    main()
