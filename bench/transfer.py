"""How fast pages move between two processes of this host, by page size.

    python -m bench.transfer [--transport-tls tcp] [--total-mib 64] [--device cuda]

Prints, for each page size, the median and best of a few READs of pages that lie in a row and of pages that do not. On a
GPU both pools are in its memory, beside the rate of a plain copy there.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import statistics
import subprocess
import sys
import time

from bench import provenance
from shared.engine.transfer.api import Peer, RemotePool
from shared.engine.transfer.nixl import NixlTransport
from tests.conformance.nixl_peer import pool_memory

PAGE_KIB = (16, 64, 256, 360, 1024, 4096)
REPEATS = 7


async def read_gb_s(reader: NixlTransport, peer: Peer, remote: list[int], local: list[int]) -> tuple[float, float]:
    """Median and best rate in GB/s; the first READ, which touches new memory, does not count."""
    rates = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        num_bytes = await reader.read(peer, remote, local, 30.0)
        rates.append(num_bytes / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates[1:]), max(rates[1:])


def start_owner(page_bytes: int, num_pages: int, device: str = "cpu") -> tuple["subprocess.Popen[str]", RemotePool]:
    name = f"bench-{page_bytes}"
    command = [sys.executable, "-m", "tests.conformance.nixl_peer", name, str(num_pages), str(page_bytes), "1", device]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    said = json.loads(next(line for line in owner.stdout if line.startswith("{")))
    metadata = base64.b64decode(said["metadata"])
    return owner, RemotePool(name, metadata, said["address"], num_pages, page_bytes, said["kind"], 0)


async def measure(page_bytes: int, num_pages: int, device: str) -> str:
    owner, pool = start_owner(page_bytes, num_pages, device)
    reader = NixlTransport(pool_memory(num_pages, page_bytes, device), f"bench-reader-{page_bytes}")
    try:
        start = time.perf_counter()
        peer = await reader.connect(pool, 30.0)
        connect_ms = (time.perf_counter() - start) * 1e3
        pages = list(range(num_pages))
        shuffled = random.Random(0).sample(pages, num_pages)
        row, row_best = await read_gb_s(reader, peer, pages, pages)
        apart, apart_best = await read_gb_s(reader, peer, shuffled, pages)
    finally:
        reader.close()
        owner.kill()
        owner.communicate()
    cells = (page_bytes >> 10, num_pages, f"{row:.2f} ({row_best:.2f})", f"{apart:.2f} ({apart_best:.2f})", connect_ms)
    return "| {} | {} | {} | {} | {:.0f} |".format(*cells)


def copy_gb_s(num_bytes: int, device: str) -> float:
    """Best rate of copying that much from one place of a GPU's memory to another."""
    import torch

    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        rates.append(num_bytes / (time.perf_counter() - start) / 1e9)
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport-tls", default="", help="UCX transports to allow, for example tcp; empty: all")
    parser.add_argument("--total-mib", type=int, default=64, help="MiB moved per READ")
    parser.add_argument("--device", default="cpu", help="where the pools are: cpu or cuda")
    args = parser.parse_args()
    if args.transport_tls:
        os.environ["UCX_TLS"] = args.transport_tls
    print(provenance.banner("bench.transfer"))
    if args.device != "cpu":
        print(f"a plain copy on the device: {copy_gb_s(args.total_mib << 20, args.device):.0f} GB/s\n")
    print("| page KiB | pages | in a row, GB/s (best) | scattered, GB/s (best) | connect, ms |\n|---|---|---|---|---|")
    for kib in PAGE_KIB:
        print(asyncio.run(measure(kib << 10, max(1, args.total_mib * 1024 // kib), args.device)))


if __name__ == "__main__":
    main()
