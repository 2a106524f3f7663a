"""How fast products of few tokens are on a GPU, for every way of cutting them up.

    python -m bench.products [--weights nvfp4 bf16] [--tokens 1 8 16 32 64] [--shapes 4096x4096 ...] [--seconds 100]

Each time is the median of graph replays over more weights than the GPU's cache holds, beside the bandwidth that a plain
sum over 4 GiB reaches, and torch's product with bf16 weights. The best cuts belong in `product_plan`.
"""

import argparse
import ctypes
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from bench import provenance, replays
from bench.bandwidth import read_bandwidth
from bench.shapes import library_for, random_packed
from shared.engine.kernels import product_plan, w4a16
from shared.engine.kernels.cuda_products import CudaProducts
from shared.engine.kernels.product_plan import Plan

SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")
ROTATED_BYTES = 320 << 20
EIGHTS = (1, 2, 4, 8)
REPEATS = 7


def microseconds(works: Sequence[Callable[[], object]]) -> float:
    """Of one of them, captured one behind the other."""
    return replays.milliseconds(lambda: [work() for work in works], replays=1, repeats=REPEATS) * 1e3 / len(works)


def plans(num_tokens: int, rows: int, has_wide: bool) -> Iterator[Plan]:
    eights = next(eights for eights in EIGHTS if num_tokens <= 8 * eights)
    for row_tiles, warps_rows, cluster in itertools.product((1, 2), (1, 2, 4, 8), (1, 2)):
        plan = Plan(eights, row_tiles, warps_rows, cluster)
        num_blocks = plan.num_blocks(rows)
        if (eights, row_tiles) != (8, 1) and num_blocks >= 64 and (cluster == 1 or num_blocks <= 600):
            yield plan
    for cluster in range(1, 9) if has_wide and num_tokens > 8 else ():
        yield Plan(eights, 1, product_plan.WARPS, cluster, is_wide=True)


def try_shape(library: ctypes.CDLL, kind: str, shape: str, num_tokens: int, rate: float, device: torch.device) -> None:
    rows, columns = map(int, shape.split("x"))
    make: Callable[[], w4a16.Weight] = (
        (lambda: random_packed(rows, columns, device))
        if kind == "nvfp4"
        else (lambda: torch.randn(rows, columns, dtype=torch.bfloat16, device=device) * columns**-0.5)
    )
    first = make()
    num_bytes = first.num_bytes if isinstance(first, w4a16.PackedWeight) else first.nbytes
    weights = [first] + [make() for _ in range(ROTATED_BYTES // num_bytes)]
    dense = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    x = torch.randn(num_tokens, columns, dtype=torch.bfloat16, device=device)
    expected = x @ (w4a16.unpack(first, torch.bfloat16)[0] if isinstance(first, w4a16.PackedWeight) else first).T
    found = []
    has_wide = kind == "nvfp4" and hasattr(library, "forebay_product_wide")
    for each in plans(num_tokens, rows, has_wide):
        products = CudaProducts(library, partial(_given, each))
        error = (products.linear(x, first) - expected).norm() / expected.norm()
        if not error < 0.01:
            print(f"WRONG {kind} {shape} M={num_tokens} {each}: {error}", flush=True)
            continue
        given = products.arranged(x, first)
        works = [partial(products.linear, given, weight) for weight in weights]
        found.append((microseconds(works), each))
    found.sort(key=lambda pair: pair[0])
    plan = product_plan.planned_wide if has_wide else product_plan.planned
    planned = plan(kind == "nvfp4", num_tokens, rows, columns)
    ours = [time_us for time_us, each in found if each == planned]
    best = "; ".join(f"{time_us:.1f} {_short(each)}" for time_us, each in found[:4])
    share = num_bytes / rate * 1e6 / found[0][0]
    own = f"{_short(planned)}: {ours[0] if ours else 0:.1f}"
    row = f"| {kind} | {shape} | {num_tokens} | {share:.0%} | {best} | {own} |"
    if dense:
        row += f" torch {microseconds([partial(F.linear, x, weight) for weight in dense]):.1f} |"
    print(row, flush=True)


def _given(plan: Plan, *_: object) -> Plan:
    return plan


def _short(plan: Plan) -> str:
    return f"wide/{plan.cluster}" if plan.is_wide else f"{plan.row_tiles}/{plan.warps_rows}/{plan.cluster}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["nvfp4", "bf16"], choices=["nvfp4", "bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=100, help="what is not begun by then is left out")
    args = parser.parse_args()
    print(provenance.banner("bench.products"))
    device = torch.device("cuda", 0)
    started = time.monotonic()
    library, rate = library_for(device), read_bandwidth(device)
    set_up_s = time.monotonic() - started
    print(f"{torch.cuda.get_device_name(0)}; reads at {rate / 1e12:.2f} TB/s; set up in {set_up_s:.1f} s\n")
    print("| weights | shape | M | of read bandwidth | us, best tiles of a warp/warps with rows/cluster | planned |")
    print("|---|---|---|---|---|---|")
    for num_tokens, kind, shape in itertools.product(args.tokens, args.weights, args.shapes):
        if time.monotonic() - started < args.seconds:
            try_shape(library, kind, shape, num_tokens, rate, device)


if __name__ == "__main__":
    main()
