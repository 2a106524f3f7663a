"""What it costs to hand pages over between workers of different numbers of ranks.

    [UCX_TLS=tcp] python -m bench.layouts [--total-mib 32]

One rank reads from one other, over NIXL on this host: whole pages (equal ranks), half of each page's heads as slices,
and the same staged. Prints the median of a few READs in ms per MiB wanted, and how much longer than whole pages.
"""

import argparse
import asyncio
import statistics
import time
from dataclasses import replace

from bench import provenance
from bench.transfer import start_owner
from shared.engine.kv.layout import KvLayout, pack
from shared.engine.kv.memory import HostMemory
from shared.engine.transfer.layout_plan import SHARED_MEMORY, Costs, Reader, Slices, plan
from shared.engine.transfer.nixl import NixlTransport

REPEATS = 7
PAGE_SIZE = 16
# Layers, KV heads of a page, and bytes of a head's 16 tokens.
SHAPES = {
    "30 layers, 4 heads of 2 KiB": (30, 4, 2048),
    "32 layers, 8 heads of 4 KiB": (32, 8, 4096),
    "80 layers, 2 heads of 4 KiB": (80, 2, 4096),
    "30 layers, 2 heads of 1 KiB": (30, 2, 1024),
}
SLICED, STAGED = (replace(SHARED_MEMORY, descriptor_us=cost) for cost in (0.0, 1e6))


def layout(num_layers: int, heads: range, head_bytes: int) -> KvLayout:
    size = num_layers * 2 * len(heads) * head_bytes
    return pack(PAGE_SIZE, {"kv": (num_layers, "bfloat16", size)}, heads={"kv": heads})


def slices(name: str, costs: Costs) -> Slices | None:
    """Half of the heads."""
    num_layers, num_heads, head_bytes = SHAPES[name]
    ours, theirs = (layout(num_layers, range(count), head_bytes) for count in (num_heads // 2, num_heads))
    return plan(ours, [theirs], Reader(0, 2), costs)[0].slices


async def ms_per_mib(page_bytes: int, own_bytes: int, num_pages: int, wanted: Slices | None) -> float:
    owner, pool = start_owner(page_bytes, num_pages)
    reader = NixlTransport(HostMemory(num_pages, own_bytes), f"bench-layouts-{page_bytes}-{own_bytes}-{wanted}"[:60])
    pages, times = list(range(num_pages)), []
    try:
        peer = await reader.connect(pool, 30.0, wanted)
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            await reader.read(peer, pages, pages, 60.0)
            times.append(time.perf_counter() - start)
    finally:
        reader.close()
        owner.kill()
        owner.communicate()
    return statistics.median(times[1:]) * 1e3 / (num_pages * own_bytes / 2**20)


async def measure(name: str, total_mib: int) -> str:
    num_layers, num_heads, head_bytes = SHAPES[name]
    half = layout(num_layers, range(num_heads // 2), head_bytes).page_bytes
    num_pages = max(1, (total_mib << 20) // half)
    whole = await ms_per_mib(half, half, num_pages, None)
    cells = [name, str(half >> 10), f"{whole:.3f}"]
    for costs in (SLICED, STAGED):
        cost = await ms_per_mib(2 * half, half, num_pages, slices(name, costs))
        cells.append(f"{cost:.3f} ({cost / whole:.2f}x)")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-mib", type=int, default=32, help="MiB wanted per READ")
    args = parser.parse_args()
    print(provenance.banner("bench.layouts"))
    print("| pages | KiB wanted of each | whole, ms/MiB | slices | staged |\n|---|---|---|---|---|")
    for name in SHAPES:
        print(asyncio.run(measure(name, args.total_mib)), flush=True)


if __name__ == "__main__":
    main()
