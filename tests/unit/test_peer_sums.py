"""Sums and joins over ranks by one kernel each, between processes whose memory stands for that of GPUs. Needs Triton,
whose interpreter computes them on the CPU."""

import ctypes
import multiprocessing
import os
from multiprocessing.shared_memory import SharedMemory

import pytest
import torch

from shared.engine.parallel.group import added, ordered_sum
from tests.unit.interpreted import needs_triton

pytestmark = needs_triton

# Rows, columns: whole pieces, several in a row, and rows that end amid one.
SHAPES = ((1, 128), (2, 256), (3, 180))
JOINED = ((2, 700), (1, 512))
MOST_BYTES = 1 << 16


def bytes_of(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None
    return memory.buf


def add_up(rank: int, names: list[str]) -> None:
    """Several calls of several sizes: what is kept in turns is written over."""
    os.environ["TRITON_INTERPRET"] = "1"
    from shared.engine.kernels.triton_peers import JOIN_BYTES, SUM_BYTES, Exchange, buffer_bytes

    memories = [SharedMemory(name) for name in names]
    views = [ctypes.c_char.from_buffer(bytes_of(memory)) for memory in memories]
    places = [ctypes.addressof(view) for view in views]
    exchange = Exchange(places, rank, SUM_BYTES, MOST_BYTES, torch.device("cpu"))
    behind = [place + buffer_bytes(MOST_BYTES, len(names)) for place in places]
    joins = Exchange(behind, rank, JOIN_BYTES, MOST_BYTES, torch.device("cpu"))
    for call in range(5):
        for shape in SHAPES:
            chance = torch.Generator().manual_seed(call)
            *parts, stream, gains = (torch.randn(shape, generator=chance) for _ in range(len(names) + 2))
            twin_stream = stream.clone()
            begun, squares = added(ordered_sum(parts), twin_stream, gains[0])
            assert torch.equal(exchange.sum(parts[rank]), ordered_sum(parts))
            own_begun, own_squares = exchange.add(parts[rank], stream, gains[0])
            assert torch.equal(stream, twin_stream)
            torch.testing.assert_close(own_begun, begun)
            torch.testing.assert_close(own_squares.sum(1), squares.sum(1))
        for shape in JOINED:
            parts = [torch.randn(shape, generator=chance) for _ in names]
            assert torch.equal(joins.join(parts[rank]), torch.cat(parts, dim=1))
        narrow = [part[0].bfloat16() for part in parts]
        assert torch.equal(joins.join(narrow[rank]), torch.cat(narrow))
    for dtype in (torch.float32, torch.bfloat16):  # among them the one that stands for what is not there yet
        parts[rank] = torch.full((1, 1024), -1, dtype=torch.int8).view(dtype)
        assert exchange.sum(parts[rank]).isnan().all()
        assert joins.join(parts[rank]).isnan().all()
    assert exchange.takes(torch.empty(16, 1024))
    assert not exchange.takes(torch.empty(17, 1024))
    os._exit(0)  # views of the memory are left


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sums_and_joins_equal_their_twins_call_after_call(num_ranks: int) -> None:
    from shared.engine.kernels.triton_peers import buffer_bytes

    memories = [SharedMemory(create=True, size=2 * buffer_bytes(MOST_BYTES, num_ranks)) for _ in range(num_ranks)]
    try:
        for memory in memories:
            bytes_of(memory)[:] = bytes(memory.size)
        context, names = multiprocessing.get_context("spawn"), [memory.name for memory in memories]
        ranks = [context.Process(target=add_up, args=(rank, names), daemon=True) for rank in range(num_ranks)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0] * num_ranks
    finally:
        for memory in memories:
            memory.unlink()
