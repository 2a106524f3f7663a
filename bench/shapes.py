"""How fast steps of a large dense model are on a GPU: its true shapes, with random weights made on the device.

    python -m bench.shapes [--shape llama-3.1-8b] [--kernels cuda] [--profile]

Prints the median and the spread of whole steps of the executor, host work and the choice of tokens included: decoding
at several batch sizes and contexts, verification of drafts, prefill; beside the time that reading the weights once
takes at the bandwidth that a plain sum over 4 GiB reaches in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from bench import provenance
from shared.engine.api import BatchItem, EngineSpec, SamplingParams
from shared.engine.executor import TorchExecutor
from shared.engine.kv.view import DeviceMemory
from shared.engine.layers.cuda_decoder import CudaDecoder
from shared.engine.models import dense_shapes
from shared.engine.models import weights as dense
from shared.engine.models.config import DenseConfig, parse
from shared.engine.models.llama import Llama
from shared.engine.parallel.partition import Shard

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
    """Weights of a shape that no checkpoint holds."""

    def __init__(self, config: DenseConfig, device: torch.device) -> None:
        self.config, self._shapes = config, dense_shapes.shapes(config)
        self._chance = torch.Generator(device).manual_seed(0)

    def embedding(self) -> torch.Tensor:
        return self._random(dense_shapes.EMBEDDING)

    def head(self) -> torch.Tensor:
        return self._random(dense_shapes.HEAD)

    def final_norm(self) -> torch.Tensor:
        return self._random(dense_shapes.FINAL_NORM)

    def layer(self, index: int) -> dense.LayerWeights:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return dense.LayerWeights(
            input_norm=self._random(prefix + "input_layernorm.weight"),
            qkv=torch.cat([self._random(f"{attention}{name}_proj.weight") for name in "qkv"]),
            qkv_bias=None,
            q_norm=None,
            k_norm=None,
            output=self._random(attention + "o_proj.weight"),
            output_bias=None,
            post_norm=self._random(prefix + "post_attention_layernorm.weight"),
            gate_up=torch.cat([self._random(f"{mlp}{name}_proj.weight") for name in ("gate", "up")]),
            gate_up_bias=None,
            down=self._random(mlp + "down_proj.weight"),
            down_bias=None,
        )

    def _random(self, name: str) -> torch.Tensor:
        shape, device = self._shapes[name], self._chance.device
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        values = torch.randn(shape, generator=self._chance, dtype=torch.bfloat16, device=device)
        return values.mul_(float(shape[1]) ** -0.5)


def executor(config: DenseConfig, device: torch.device, num_pages: int) -> TorchExecutor:
    model = Llama(config, torch.bfloat16, CudaDecoder(config, RandomWeights(config, device), 1), Shard())
    layout = model.layout(PAGE_SIZE)
    spec = EngineSpec("bench", config.vocab_size, config.max_position, (), layout, num_pages, "")
    return TorchExecutor(model, spec, DeviceMemory(num_pages, layout.page_bytes, device))


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


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a plain sum over 4 GiB."""
    data = torch.ones(1 << 30, dtype=torch.float32, device=device)

    def work() -> None:
        data.sum()
        torch.cuda.synchronize()

    return data.numel() * 4 / min(seconds(work, 10))


def row(label: str, times: Sequence[float], num_tokens: int, note: str = "") -> None:
    median = statistics.median(times)
    spread = f"{min(times) * 1e3:.2f} to {max(times) * 1e3:.2f}"
    print(f"| {label} | {median * 1e3:.2f} ({spread}) | {num_tokens / median:,.0f} | {note} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--profile", action="store_true", help="kernels of a decode step at batch 1, by their time")
    args = parser.parse_args()
    print(provenance.banner("bench.shapes"))
    device = torch.device("cuda", 0)
    config = parse(SHAPES[args.shape])
    room = 8192 // PAGE_SIZE + 1
    started = time.perf_counter()
    engine = executor(config, device, 64 * room // 4)
    torch.cuda.synchronize()
    rate = read_bandwidth(device)
    read = (
        sum(_product(shape) for name, shape in dense_shapes.shapes(config).items() if name != dense_shapes.EMBEDDING)
        * 2
    )
    print(f"{torch.cuda.get_device_name(0)}; weights made in {time.perf_counter() - started:.1f} s")
    print(f"reading {read / 1e9:.2f} GB of weights at {rate / 1e12:.2f} TB/s takes {read / rate * 1e3:.2f} ms\n")
    print("| step | ms, median (spread) | tokens/s | of the time to read the weights |\n|---|---|---|---|")
    for size, context in DECODES:
        pages = context // PAGE_SIZE + 1
        items = [item(sequence, context - 1, 1, pages) for sequence in range(size)]
        times = seconds(lambda items=items: engine.forward(items), 50)  # type: ignore[misc]
        row(f"decode, batch {size}, context {context}", times, size, f"{statistics.median(times) * rate / read:.2f}")
    for width in WIDTHS:
        items = [item(0, 1024, width, 1024 // PAGE_SIZE + 1)]
        times = seconds(lambda items=items: engine.forward(items), 50)  # type: ignore[misc]
        row(f"verify {width} tokens, context 1024", times, width, f"{statistics.median(times) * rate / read:.2f}")
    for length in PREFILLS:
        items = [item(0, 0, length, room)]
        times = seconds(lambda items=items: engine.forward(items), 5)  # type: ignore[misc]
        row(f"prefill {length}", times, length)
    if args.profile:
        profile(engine, [item(0, 1023, 1, 65)])


def profile(engine: TorchExecutor, items: list[BatchItem]) -> None:
    """Print what the GPU does in 20 steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as run:
        for _ in range(20):
            engine.forward(items)
    print(run.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=60))


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


if __name__ == "__main__":
    main()
