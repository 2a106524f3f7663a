"""Products of GLM-5.2's rank in bfloat16 and in e4m3, norm and all, in one run.

    python -m bench.glm_products [--tokens 1 2 4 8 16 32 64] [--cuts]

Random weights; microseconds of a product in a graph of many, one behind the other, over so many matrices that none is
in the cache when its turn comes; median of groups of replays. In bfloat16 Gluon serves up to four tokens, norm and all,
and cuBLAS more, of which the norm is left out. "made bfloat16" is what many tokens take of a matrix in e4m3, for cuBLAS
to multiply. To read: the weights at the bandwidth of a plain sum. With `--cuts` each way to cut a product up.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from bench import provenance, replays
from bench.bandwidth import read_bandwidth
from bench.glm_random import compiled
from shared.engine.kernels import gluon_rows, w8a16
from shared.engine.kernels.cuda_fp8 import CudaFp8, Cut
from shared.engine.kernels.inputs import Norm
from shared.engine.kernels.w8a16 import Weight

TOTAL_BYTES = 240 << 20  # of matrices that take turns: several times the cache
GROUPS, REPLAYS = 5, 10
CUTS = tuple((cluster, depth) for cluster in (2, 4, 8) for depth in (3, 4, 6))
# Name, rows, rows behind them in 16 bits, columns, and what goes in: the residual and what is added to it, a low query
# in float32, both behind a norm, or something as it is.
SHAPES = (
    ("q_a, kv_a", 2624, 0, 6144, "residual"),
    ("q_a, kv_a, the indexer's", 2752, 32, 6144, "residual"),
    ("q_b", 2048, 0, 2048, "low"),
    ("q_b, the indexer's", 6144, 0, 2048, "low"),
    ("o", 6144, 0, 2048, "plain"),
    ("dense gate, up", 3072, 0, 6144, "residual"),
    ("dense down", 6144, 0, 1536, "plain"),
)


def matrices(num_rows: int, num_others: int, num_columns: int) -> tuple[list[torch.Tensor], list[Weight]]:
    """In both forms, as many of each as make up TOTAL_BYTES."""
    shape = num_rows + num_others, num_columns
    wide = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") * num_columns**-0.5]
    codes, scales = w8a16.quantize(wide[0][:num_rows])
    narrow = [w8a16.join([w8a16.of_blocks(codes, scales)], wide[0][num_rows:])]
    wide += [wide[0].clone() for _ in range(TOTAL_BYTES // wide[0].nbytes)]
    first = narrow[0]
    narrow += [Weight(first.codes.clone(), first.scales.clone(), first.others.clone())
               for _ in range(TOTAL_BYTES // first.nbytes)]  # fmt: skip
    return wide, narrow


def in_bfloat16(x: torch.Tensor, norm: Norm | None, kind: str) -> Callable[[torch.Tensor], object]:
    """How a product is computed of so many tokens."""
    if len(x) > gluon_rows.MAX_ROWS:
        return lambda weight: F.linear(x.to(weight.dtype), weight)
    if kind == "residual" and norm is not None:
        return lambda weight: gluon_rows.linear_keeping(x, weight, norm)
    return lambda weight: gluon_rows.linear(x, weight, norm, torch.float32 if norm else torch.bfloat16)


def in_fp8(
    kernels: CudaFp8, x: torch.Tensor, norm: Norm | None, kind: str, cut: Cut | None
) -> Callable[[Weight], object]:
    """The same in e4m3."""
    if kind == "residual" and norm is not None:
        return lambda weight: kernels.linear_keeping(x, weight, norm, cut=cut)
    return lambda weight: kernels.linear(x, weight, norm, torch.float32 if norm else torch.bfloat16, cut=cut)


def microseconds(compute: Callable[..., object], weights: Sequence[object]) -> float:
    """Of one product."""

    def all_of_them() -> object:
        return [compute(weight) for weight in weights][-1]

    return replays.milliseconds(all_of_them, replays=REPLAYS, repeats=GROUPS) / len(weights) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--cuts", action="store_true")
    args = parser.parse_args()
    print(provenance.banner("bench.glm_products"))
    rate = read_bandwidth(torch.device("cuda", 0))
    kernels = compiled(torch.device("cuda", 0))[2]
    cuts = [Cut(*cut) for cut in CUTS] if args.cuts else []
    titles = ("product", "tokens", "bf16 us", "to read", "e4m3 us", "to read", *(str(cut) for cut in CUTS if cuts))
    print(f"{torch.cuda.get_device_name(0)}; plain reads {rate / 1e12:.2f} TB/s")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, *shape, kind in SHAPES:
        wide, narrow = matrices(*shape)
        floors = [weights[0].nbytes / rate * 1e6 for weights in (wide, narrow)]
        with torch.inference_mode():
            for tokens in args.tokens:
                dtype = torch.float32 if kind == "low" else torch.bfloat16
                x, delta = (torch.randn(tokens, shape[2], dtype=dtype, device="cuda") for _ in range(2))
                gain = torch.ones(shape[2], dtype=torch.bfloat16, device="cuda")
                norm = None if kind == "plain" else Norm(gain, 1e-5, delta if kind == "residual" else None)
                times = [microseconds(in_bfloat16(x, norm, kind), wide)]
                possible = [cut for cut in cuts if shape[2] // w8a16.COLUMNS % cut.cluster == 0]
                timed = {cut: microseconds(in_fp8(kernels, x, norm, kind, cut), narrow) for cut in (None, *possible)}
                times.append(timed[None])
                cells = [f"{times[0]:.2f}", f"{floors[0]:.2f}", f"{times[1]:.2f}", f"{floors[1]:.2f}"]
                cells += [f"{timed[cut]:.2f}" if cut in timed else "-" for cut in cuts]
                print(f"| {' | '.join((name, str(tokens), *cells))} |", flush=True)
            made = microseconds(kernels.plain, narrow)
            print(f"| {name} made bfloat16 | any |  |  | {made:.2f} | {floors[1] + floors[0]:.2f} |", flush=True)
        del wide, narrow


if __name__ == "__main__":
    main()
