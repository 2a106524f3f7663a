"""Pools of workers of several ranks: what each rank vouches for, and what each rank of a reader compares."""

from collections.abc import Sequence

import pytest

from shared.engine.kv.layout import KvLayout
from shared.engine.kv.memory import HostMemory
from shared.engine.transfer.local import LocalTransport
from shared.engine.transfer.pools import Member, PeerPools, Pools, own_pool
from shared.errors import BadManifest, CorruptPages
from tests.unit.test_layout_plan import layouts, page

LONG_S = 10.0
NUM_PAGES = 6
PAGES = [4, 1, 3]
RANKS = [(1, 1), (2, 2), (1, 2), (2, 1), (2, 4), (4, 2)]


class Worker:
    """A worker of so many ranks in this process; every page of an `owner` is as `page` of its layout says."""

    def __init__(self, name: str, num_ranks: int, hub: dict[str, LocalTransport], *, owner: bool) -> None:
        self.layouts: list[KvLayout] = layouts(num_ranks)
        self.memories = [HostMemory(NUM_PAGES, layout.page_bytes) for layout in self.layouts]
        members = []
        for rank, (layout, memory) in enumerate(zip(self.layouts, self.memories, strict=True)):
            for page_id in range(NUM_PAGES if owner else 0):
                memory.page(page_id)[:] = page(layout)
            transport = LocalTransport(memory, f"{name}-{rank}", hub)
            members.append(Member(transport, own_pool(transport, memory, layout)))
        self.pools = Pools(members)


class Pair:
    """A reader that is connected to an owner that gives checksums."""

    def __init__(self, num_ours: int, num_theirs: int) -> None:
        hub: dict[str, LocalTransport] = {}
        self.owner = Worker("owner", num_theirs, hub, owner=True)
        self.reader = Worker("reader", num_ours, hub, owner=False)

    async def connect(self) -> PeerPools:
        return await self.reader.pools.connect(self.owner.pools.describe(), LONG_S, checksums=True)

    async def read(self, checksums: Sequence[int]) -> None:
        await self.reader.pools.read(await self.connect(), PAGES, [0, 1, 2], LONG_S, checksums)


@pytest.mark.parametrize(("num_ours", "num_theirs"), RANKS)
async def test_pages_that_arrive_as_they_left_pass_in_every_rank(num_ours: int, num_theirs: int) -> None:
    pair = Pair(num_ours, num_theirs)
    checksums = await pair.owner.pools.checksums(PAGES)
    assert len(checksums) == len(PAGES) * num_theirs
    await pair.read(checksums)
    for memory, layout in zip(pair.reader.memories, pair.reader.layouts, strict=True):
        assert [memory.page(page_id) for page_id in range(3)] == [page(layout)] * 3


@pytest.mark.parametrize(("num_ours", "num_theirs"), RANKS)
async def test_a_bit_that_changed_in_any_rank_of_the_owner_is_found(num_ours: int, num_theirs: int) -> None:
    for memory_of in range(num_theirs):
        pair = Pair(num_ours, num_theirs)
        checksums = await pair.owner.pools.checksums(PAGES)
        pair.owner.memories[memory_of].page(PAGES[1])[-1] ^= 1
        with pytest.raises(CorruptPages, match="1 of 3"):
            await pair.read(checksums)


async def test_checksums_of_too_few_ranks_are_refused() -> None:
    pair = Pair(2, 2)
    with pytest.raises(BadManifest, match="3 checksums for 3 pages of 2 ranks"):
        await pair.read([1, 2, 3])
