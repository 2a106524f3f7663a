"""How fast steps of a large dense model are on a GPU: its true shapes, with random weights made on the device.

    python -m bench.shapes [--shape llama-3.1-8b] [--weights bf16 nvfp4] [--skip prefill] [--profile]

Prints the median and the spread of whole steps of the executor, host work and the choice of tokens included: decoding
at several batch sizes and contexts, verification of drafts, prefill. Steps of decoding and prefill are also launched
while the one before runs, as an engine does. Beside them is the time that reading the weights once takes at the
bandwidth that a plain sum over 4 GiB reaches in the same run.
"""

import argparse
import ctypes
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from bench import provenance
from bench.bandwidth import read_bandwidth
from shared.engine.api import BatchItem, EngineSpec, SamplingParams
from shared.engine.executor import TorchExecutor
from shared.engine.kernels import build, cuda_choice, cuda_products, w4a16
from shared.engine.kernels.cuda_products import CudaProducts
from shared.engine.kv.view import DeviceMemory
from shared.engine.layers.cuda_decoder import CudaDecoder
from shared.engine.models import dense_shapes
from shared.engine.models import weights as dense
from shared.engine.models.config import DenseConfig, parse
from shared.engine.models.llama import Llama
from shared.engine.parallel.group import Alone, Group
from shared.engine.parallel.partition import Shard, of_dense
from shared.models.store import default_cache

PAGE_SIZE = 16
SHAPES = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 131_072,
    },
}
DECODES = ((1, 1024), (1, 8192), (8, 1024), (32, 1024), (64, 1024))
WIDTHS = (2, 4, 6)
PREFILLS = (1024, 4096, 8192)


class RandomWeights(dense.DenseWeights):
    """Weights of a shape that no checkpoint holds, or a rank's share of the same."""

    def __init__(self, config: DenseConfig, device: torch.device, packed: bool, shard: Shard) -> None:
        self.config, self._part_of = of_dense(config, shard)
        self._shapes, self._is_packed = dense_shapes.shapes(config), packed
        self._chance = torch.Generator(device).manual_seed(0)

    def embedding(self) -> torch.Tensor:
        return self._random(dense_shapes.EMBEDDING)

    def head(self) -> torch.Tensor:
        return self._random(dense_shapes.HEAD)

    def final_norm(self) -> torch.Tensor:
        return self._random(dense_shapes.FINAL_NORM)

    def packed_head(self) -> w4a16.Weight:
        return self.head()

    def packed_layer(self, index: int) -> dense.LayerOf[w4a16.Weight]:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return dense.LayerOf(
            input_norm=self._random(prefix + "input_layernorm.weight"),
            qkv=self._matrix(*(f"{attention}{name}_proj.weight" for name in "qkv")),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            output=self._matrix(attention + "o_proj.weight"),
            output_bias=None,
            post_norm=self._random(prefix + "post_attention_layernorm.weight"),
            gate_up=self._matrix(*(f"{mlp}{name}_proj.weight" for name in ("gate", "up")), gated=True),
            gate_up_bias=None,
            down=self._matrix(mlp + "down_proj.weight"),
            down_bias=None,
        )

    def _matrix(self, *names: str, gated: bool = False) -> w4a16.Weight:
        if not self._is_packed:
            return torch.cat([self._random(name) for name in names])
        sizes = [list(self._shapes[name]) for name in names]
        for size, part in zip(sizes, map(self._part_of, names), strict=True):
            if part is not None:
                size[part.dim] = part.length
        return random_packed(sum(rows for rows, _ in sizes), sizes[0][1], self._chance.device, gated)

    def _random(self, name: str) -> torch.Tensor:
        shape, device = self._shapes[name], self._chance.device
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        values = torch.randn(shape, generator=self._chance, dtype=torch.bfloat16, device=device)
        part = self._part_of(name)
        own = values if part is None else values.narrow(part.dim, part.start, part.length).clone()
        return own.mul_(float(shape[1]) ** -0.5)


def random_packed(rows: int, columns: int, device: torch.device, gated: bool = False) -> w4a16.PackedWeight:
    """Weights with a standard deviation of about columns ** -0.5."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(rows, columns // w4a16.GROUP, device=device) + 0.5).to(torch.float8_e4m3fn)
    return w4a16.pack(codes, scale, torch.tensor(0.37 * columns**-0.5, device=device), gated=gated)


def library_for(device: torch.device) -> ctypes.CDLL:
    capability = torch.cuda.get_device_capability(device)
    return cuda_products.load(build.cuda_library(default_cache() / "kernels", build.cuda_compiler(), capability))


def decoder_and_executor(
    config: DenseConfig,
    device: torch.device,
    num_pages: int,
    packed: bool,
    group: Group | None = None,
    dequantized_bytes: int = 0,
) -> tuple[CudaDecoder, TorchExecutor]:
    """Of one rank of a group, or alone, what records steps, and who has them computed; `dequantized_bytes` as in
    `load_executor`."""
    group = group or Alone()
    shard = Shard(group.rank, group.num_ranks)
    weights = RandomWeights(config, device, packed, shard)
    products = CudaProducts(library_for(device))
    decoder = CudaDecoder(weights.config, weights, 1, products, group, dequantized_bytes=dequantized_bytes)
    model = Llama(config, torch.bfloat16, decoder, shard)
    spec = EngineSpec("bench", config.vocab_size, config.max_position, (), model.layout(PAGE_SIZE), num_pages, "")
    memory = DeviceMemory(num_pages, model.rank_layout(PAGE_SIZE).page_bytes, device)
    choice = cuda_choice.find(device, default_cache() / "kernels", config.vocab_size)
    return decoder, TorchExecutor(model, spec, memory, choice=choice)


def item(sequence: int, start: int, num_tokens: int, room: int) -> BatchItem:
    pages = range(sequence * room, (sequence + 1) * room)
    tokens = [(start + place) % 1000 + 3 for place in range(num_tokens)]
    return BatchItem(str(sequence), tokens, start, pages, True, SamplingParams(), start + num_tokens)


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    work()
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def seconds_ahead(engine: TorchExecutor, items: list[BatchItem], repeats: int) -> list[float]:
    """From the end of one step to that of the next, which was launched while it ran."""
    flight, times, ended = engine.launch(items), [], 0.0
    for _ in range(repeats + 2):
        following = engine.launch(items)
        flight.chosen()
        before, ended = ended, time.perf_counter()
        times.append(ended - before)
        flight = following
    flight.chosen()
    return times[2:]


def row(label: str, times: Sequence[float], num_tokens: int, note: str = "") -> None:
    median = statistics.median(times)
    spread = f"{min(times) * 1e3:.2f} to {max(times) * 1e3:.2f}"
    print(f"| {label} | {median * 1e3:.2f} ({spread}) | {num_tokens / median:,.0f} | {note} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--weights", nargs="+", default=["bf16", "nvfp4"], choices=["bf16", "nvfp4"])
    parser.add_argument("--skip", nargs="*", default=[], choices=["decode", "verify", "prefill"])
    parser.add_argument("--dequantized-mb", type=int, default=0, help="as a worker's flag of that name")
    parser.add_argument("--profile", action="store_true", help="kernels of some steps, by their time, and the gaps")
    args = parser.parse_args()
    print(provenance.banner("bench.shapes"))
    device = torch.device("cuda", 0)
    rate = read_bandwidth(device)
    print(f"{torch.cuda.get_device_name(0)}, reads at {rate / 1e12:.2f} TB/s")
    for kind in args.weights:
        measure(parse(SHAPES[args.shape]), device, kind == "nvfp4", rate, args)
        torch.cuda.empty_cache()


def measure(config: DenseConfig, device: torch.device, packed: bool, rate: float, args: argparse.Namespace) -> None:
    room = 8192 // PAGE_SIZE + 1
    started = time.perf_counter()
    kept_bytes = args.dequantized_mb << 20
    _, engine = decoder_and_executor(config, device, 64 * room // 4, packed, dequantized_bytes=kept_bytes)
    torch.cuda.synchronize()
    read = weight_bytes(config, packed)
    print(f"\n{'NVFP4' if packed else 'bf16'} weights, made in {time.perf_counter() - started:.1f} s")
    print(f"reading {read / 1e9:.2f} GB of weights takes {read / rate * 1e3:.2f} ms\n")
    print("| step | ms, median (spread) | tokens/s | of the time to read the weights |\n|---|---|---|---|")
    for size, context in DECODES if "decode" not in args.skip else ():
        pages = context // PAGE_SIZE + 1
        items = [item(sequence, context - 1, 1, pages) for sequence in range(size)]
        times = seconds(lambda items=items: engine.forward(items), 50)  # type: ignore[misc]
        row(f"decode, batch {size}, context {context}", times, size, f"{statistics.median(times) * rate / read:.2f}")
        row(f"decode, batch {size}, context {context}, launched ahead", seconds_ahead(engine, items, 50), size)
    for width in WIDTHS if "verify" not in args.skip else ():
        items = [item(0, 1024, width, 1024 // PAGE_SIZE + 1)]
        times = seconds(lambda items=items: engine.forward(items), 50)  # type: ignore[misc]
        row(f"verify {width} tokens, context 1024", times, width, f"{statistics.median(times) * rate / read:.2f}")
    for length in PREFILLS if "prefill" not in args.skip else ():
        items = [item(0, 0, length, room)]
        times = seconds(lambda items=items: engine.forward(items), 5)  # type: ignore[misc]
        row(f"prefill {length}", times, length)
        row(f"prefill {length}, launched ahead", seconds_ahead(engine, items, 5), length)
    for size in (1, 32, 64) if args.profile and "decode" not in args.skip else ():
        profile(engine, [item(sequence, 1023, 1, 65) for sequence in range(size)], 20)
    if args.profile and "prefill" not in args.skip:
        profile(engine, [item(0, 0, 4096, room)], 4)


def weight_bytes(config: DenseConfig, packed: bool) -> float:
    """What a step reads: all but the embedding; packed ones are all but the head and the norms."""
    total = 0.0
    for name, shape in dense_shapes.shapes(config).items():
        if name != dense_shapes.EMBEDDING:
            is_packed = packed and len(shape) == 2 and name != dense_shapes.HEAD
            total += _product(shape) * (0.5 + 1 / w4a16.GROUP if is_packed else 2)
    return total


def profile(engine: TorchExecutor, items: list[BatchItem], steps: int) -> None:
    """Print what the GPU does in so many steps, kernel by kernel, and how much of the time it does nothing."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as run:
        for _ in range(steps):
            engine.forward(items)
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in run.events()
        if event.device_type.name == "CUDA"
    )
    totals: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    busy_us, end = 0.0, kernels[0][0]
    for first, last, name in kernels:
        totals[name] += last - first
        numbers[name] += 1
        busy_us += max(0.0, last - max(first, end))
        end = max(end, last)
    whole_us = end - kernels[0][0]
    num_tokens = sum(len(item.token_ids) for item in items)
    print(f"\n{len(items)} sequences, {num_tokens} tokens", end=": ")
    print(f"{whole_us / steps / 1e3:.3f} ms a step, {1 - busy_us / whole_us:.1%} of it idle")
    print("| us a step | number | kernel |\n|---|---|---|")
    for name, total_us in totals.most_common(12):
        print(f"| {total_us / steps:.0f} | {numbers[name] / steps:g} | {name[:90]} |", flush=True)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


if __name__ == "__main__":
    main()
