"""What a decode step of a large dense model is made of on a GPU.

    python -m bench.parts [--shape llama-3.1-8b] [--weights nvfp4] [--sequences 1 8] [--context 1024]

Kernels of a step begin while those before them end, so what a part of it costs shows when it is left out. Each figure
is the median of graphs of a step, replayed one behind the other, so without a host; tokens are not chosen. Products are
those of `kernels.cuda_products`, for 64 sequences at most; beside them all layers at once, where a kernel has them so.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench import provenance, replays, shapes
from shared.engine.kernels import triton_dense, triton_paged, w4a16
from shared.engine.kernels.cuda_layers import Table
from shared.engine.kernels.cuda_products import CudaProducts, Residual
from shared.engine.layers import rope
from shared.engine.layers.cuda_decoder import MAX_FUSED_DENSE, layers_at_once
from shared.engine.models.config import DenseConfig, parse
from shared.engine.models.weights import LayerOf
from shared.engine.parallel.group import Alone
from shared.engine.parallel.partition import Shard

ALL = ("products", "attention", "rotating", "head")
TABLE = {
    "whole": ALL,
    "without attention": ("products", "rotating", "head"),
    "nor rotating": ("products", "head"),
    "nor the head": ("products",),
    "attention alone": ("attention",),
    "none of them": (),
}
AT_ONCE = {"at once": True, "at once, without the head": False}
REPLAYS, REPEATS = 10, 5


@dataclass(frozen=True, slots=True)
class Model:
    """Weights, and KV of every layer [pages, layers, 2, Hkv, page_size, D]."""

    config: DenseConfig
    products: CudaProducts
    embedding: torch.Tensor
    head: w4a16.Weight
    layers: list[LayerOf[w4a16.Weight]]
    kv: torch.Tensor


def made(config: DenseConfig, device: torch.device, packed: bool, num_pages: int) -> Model:
    weights = shapes.RandomWeights(config, device, packed, Shard())
    layers = [weights.packed_layer(index) for index in range(config.num_layers)]
    shape = (num_pages, config.num_layers, 2, config.num_kv_heads, shapes.PAGE_SIZE, config.head_dim)
    kv = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    products = CudaProducts(shapes.library_for(device))
    return Model(config, products, weights.embedding(), weights.packed_head(), layers, kv)


def table(model: Model, num_sequences: int, context: int) -> Table:
    """One new token of each sequence."""
    num_pages, device = -(-context // shapes.PAGE_SIZE), model.kv.device
    ids = torch.arange(num_sequences * num_pages, dtype=torch.int32, device=device)
    starts = (torch.arange(num_sequences + 1, device=device) * num_pages).int()
    lengths = torch.full((num_sequences,), context, dtype=torch.int32, device=device)
    return Table(starts[:-1] * shapes.PAGE_SIZE + lengths - 1, ids, starts, lengths)


def at_once(model: Model, num_sequences: int, context: int, with_head: bool) -> Callable[[], object] | None:
    """As `step`, of everything, but for the head perhaps; None where the kernel does not serve."""
    layers, config = layers_at_once(model.config, model.layers, model.products, Alone()), model.config
    if layers is None or not layers.takes(num_sequences, 1):
        return None
    given, tokens = table(model, num_sequences, context), torch.arange(num_sequences, device=model.kv.device)
    frequencies = rope.inverse_frequencies(config).to(model.kv.device)

    def run() -> object:
        x, angles = F.embedding(tokens, model.embedding), rope.table(frequencies, given.context_lens - 1)
        layers(x, angles, given, model.kv)
        normed = model.products.begun(x, model.layers[0].input_norm, config.rms_norm_eps, model.head)
        return model.products.normed_linear(normed, model.head) if with_head else normed

    return run


def step(model: Model, num_sequences: int, context: int, parts: tuple[str, ...]) -> Callable[[], object]:
    """As `CudaDecoder` computes it; what is left out has its place taken by numbers made beforehand."""
    config, products, device = model.config, model.products, model.kv.device
    where = table(model, num_sequences, context)
    slots, ids, starts, lengths = where.slots, where.page_ids, where.page_starts, where.context_lens
    positions, tokens = lengths - 1, torch.arange(num_sequences, dtype=torch.int32, device=device)
    num_done = triton_paged.counters(num_sequences, config.num_kv_heads, device)
    frequencies, eps, norms = rope.inverse_frequencies(config).to(device), config.rms_norm_eps, (None, None)
    width, heads = config.num_heads * config.head_dim, config.num_heads + 2 * config.num_kv_heads
    given = torch.randn(num_sequences, heads * config.head_dim, dtype=torch.bfloat16, device=device)
    queries = given[:, :width].reshape(num_sequences, config.num_heads, config.head_dim).contiguous()

    def run() -> object:
        x, angles = F.embedding(tokens, model.embedding), rope.table(frequencies, positions)
        normed = products.begun(x, model.layers[0].input_norm, eps, model.layers[0].qkv)
        for index, layer in enumerate(model.layers):
            qkv, q, kv = given, queries, model.kv[:, index]
            if "products" in parts:
                qkv = products.normed_linear(normed, layer.qkv)
            if "rotating" in parts:
                q = triton_dense.rotate_and_append(qkv, angles, norms, eps, slots, kv)
            attended = triton_paged.attend(q, kv, ids, starts, lengths, num_done) if "attention" in parts else q
            if "products" in parts:
                normed = products.added(attended.flatten(1), layer.output, Residual(x, layer.post_norm), eps)
                inner = products.gated(normed, layer.gate_up)
                normed = products.added(inner, layer.down, Residual(x, layer.input_norm), eps)
        if "head" not in parts:
            return normed
        if isinstance(model.head, torch.Tensor) and num_sequences > MAX_FUSED_DENSE:
            return F.linear(triton_dense.add_rms_norm(x, None, model.layers[0].input_norm, eps), model.head)
        return products.normed_linear(normed, model.head)

    return run


def milliseconds(work: Callable[[], object]) -> float:
    """Of one of several replays."""
    return replays.milliseconds(work, replays=REPLAYS, repeats=REPEATS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--weights", default="nvfp4", choices=["bf16", "nvfp4"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    print(provenance.banner("bench.parts"))
    config, device = parse(shapes.SHAPES[args.shape]), torch.device("cuda", 0)
    num_pages = max(args.sequences) * -(-args.context // shapes.PAGE_SIZE)
    model = made(config, device, args.weights == "nvfp4", num_pages)
    print(f"{torch.cuda.get_device_name(0)}, {args.weights}, context {args.context:,}; ms\n")
    print(f"| sequences | {' | '.join((*TABLE, *AT_ONCE))} |\n|{'---|' * (1 + len(TABLE) + len(AT_ONCE))}")
    with torch.inference_mode():
        for size in args.sequences:
            works = [step(model, size, args.context, parts) for parts in TABLE.values()]
            whole = [at_once(model, size, args.context, with_head) for with_head in AT_ONCE.values()]
            times = ["" if work is None else f"{milliseconds(work):.3f}" for work in (*works, *whole)]
            print(f"| {size} | {' | '.join(times)} |", flush=True)


if __name__ == "__main__":
    main()
