"""What it costs to hand pages over between workers of different numbers of ranks.

    [UCX_TLS=tcp] python -m bench.layouts [--total-mib 32] [--device cuda] [--ranks 2]

One rank of so many reads from a peer of one, over NIXL on this host: whole pages (equal ranks), its part of each page's
heads, and the same staged, as pages with checksums are, in host memory or on a GPU; and the same part as it would be
with the heads of a layer side by side: a span for each layer and kind. Pages do not lie in a row. Prints the median of
a few READs in ms per MiB wanted, and how much longer than whole pages.
"""

import argparse
import asyncio
import random
import statistics
import time

from bench import provenance
from bench.transfer import start_owner
from shared.engine.kv.layout import KvLayout, Span, pack
from shared.engine.transfer.layout_plan import Reader, Slices, plan
from shared.engine.transfer.nixl import NixlTransport
from tests.conformance.nixl_peer import pool_memory

REPEATS = 7
PAGE_SIZE = 16
# Layers, KV heads of a page, and bytes of a head's 16 tokens.
SHAPES = {
    "30 layers, 4 heads of 2 KiB": (30, 4, 2048),
    "32 layers, 8 heads of 4 KiB": (32, 8, 4096),
    "80 layers, 2 heads of 4 KiB": (80, 2, 4096),
    "30 layers, 2 heads of 1 KiB": (30, 2, 1024),
}


def layout(num_layers: int, heads: range, head_bytes: int) -> KvLayout:
    size = num_layers * 2 * len(heads) * head_bytes
    return pack(PAGE_SIZE, {"kv": (num_layers, "bfloat16", size)}, heads={"kv": heads})


def slices(name: str, num_ranks: int, *, staged: bool) -> Slices:
    """The heads of the first rank of so many."""
    num_layers, num_heads, head_bytes = SHAPES[name]
    ours, theirs = (layout(num_layers, range(count), head_bytes) for count in (num_heads // num_ranks, num_heads))
    found = plan(ours, [theirs], Reader(0, num_ranks, must_stage=staged))[0].slices
    assert found is not None
    return found


def scattered(name: str, num_ranks: int) -> Slices:
    """The same if pages were laid out layer by layer."""
    num_layers, num_heads, head_bytes = SHAPES[name]
    size = num_heads // num_ranks * head_bytes
    rows = range(num_layers * 2)
    return Slices(tuple(Span(row * num_heads * head_bytes, row * size, size) for row in rows), staged=False)


async def ms_per_mib(page_bytes: int, own_bytes: int, num_pages: int, device: str, wanted: Slices | None) -> float:
    owner, pool = start_owner(page_bytes, num_pages, device)
    memory = pool_memory(num_pages, own_bytes, device)
    reader = NixlTransport(memory, f"bench-layouts-{page_bytes}-{own_bytes}-{wanted}"[:60])
    pages, times = random.Random(0).sample(range(num_pages), num_pages), []
    try:
        peer = await reader.connect(pool, 30.0, wanted)
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            await reader.read(peer, pages, range(num_pages), 60.0)
            times.append(time.perf_counter() - start)
    finally:
        reader.close()
        owner.kill()
        owner.communicate()
    return statistics.median(times[1:]) * 1e3 / (num_pages * own_bytes / 2**20)


async def measure(name: str, total_mib: int, num_ranks: int, device: str) -> str:
    num_layers, num_heads, head_bytes = SHAPES[name]
    own = layout(num_layers, range(num_heads // num_ranks), head_bytes).page_bytes
    num_pages = max(1, (total_mib << 20) // own)
    whole = await ms_per_mib(own, own, num_pages, device, None)
    cells = [name, str(own >> 10), f"{whole:.3f}"]
    ways = *(slices(name, num_ranks, staged=staged) for staged in (False, True)), scattered(name, num_ranks)
    for wanted in ways:
        cost = await ms_per_mib(num_ranks * own, own, num_pages, device, wanted)
        cells.append(f"{cost:.3f} ({cost / whole:.2f}x)")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total-mib", type=int, default=32, help="MiB wanted per READ")
    parser.add_argument("--device", default="cpu", help="where the pools are: cpu or cuda")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the reader; as many heads at least")
    args = parser.parse_args()
    print(provenance.banner("bench.layouts"))
    print("| pages | KiB wanted of each | whole, ms/MiB | heads | staged | layer by layer |\n|---|---|---|---|---|---|")
    for name, (_, num_heads, _) in SHAPES.items():
        if num_heads >= args.ranks:
            print(asyncio.run(measure(name, args.total_mib, args.ranks, args.device)), flush=True)


if __name__ == "__main__":
    main()
