"""READ between the pools of two processes on one GPU. Needs an NVIDIA GPU."""

import asyncio
import base64
import json
import subprocess
import sys

import pytest
import torch

from shared.engine.kv.layout import Span
from shared.engine.transfer.api import RemotePool
from shared.engine.transfer.layout_plan import Slices
from shared.engine.transfer.nixl import NixlTransport
from tests.conformance.nixl_peer import pool_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NUM_PAGES, PAGE_BYTES, SEED = 32, 65_536, 7


SPANS = (Span(100, 8, 1000), Span(5_000, 3_000, 200))
SLICES = [None, Slices(SPANS, staged=False), Slices(SPANS, staged=True)]


@pytest.mark.parametrize("slices", SLICES, ids=["whole", "sliced", "staged"])
def test_pages_on_a_gpu_arrive_on_a_gpu(slices: Slices | None) -> None:
    ours = pool_memory(NUM_PAGES, PAGE_BYTES, "cuda")
    arguments = ["owner", str(NUM_PAGES), str(PAGE_BYTES), str(SEED), "cuda"]
    command = [sys.executable, "-m", "tests.conformance.nixl_peer", *arguments]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        told = json.loads(next(line for line in owner.stdout if line.startswith("{")))
        metadata = base64.b64decode(told["metadata"])
        pool = RemotePool("owner", metadata, told["address"], NUM_PAGES, PAGE_BYTES, told["kind"], 0)
        asyncio.run(_read(NixlTransport(ours, "reader"), pool, slices))
    finally:
        owner.kill()
        owner.communicate()
    theirs = pool_memory(NUM_PAGES, PAGE_BYTES, seed=SEED)
    for local, remote in ((4, 9), (5, 2)):
        expected = bytearray(PAGE_BYTES)
        for span in slices.spans if slices else (Span(0, 0, PAGE_BYTES),):
            came = theirs.page(remote)[span.remote : span.remote + span.num_bytes]
            expected[span.local : span.local + span.num_bytes] = came
        assert bytes(ours.page(local)) == expected
    assert not any(ours.page(6))


async def _read(reader: NixlTransport, pool: RemotePool, slices: Slices | None) -> None:
    try:
        peer = await reader.connect(pool, 30.0, slices)
        await reader.read(peer, [9, 2], [4, 5], 30.0)
    finally:
        reader.close()
