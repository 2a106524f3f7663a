"""What every transport must do. `local` is the in-process twin; `nixl-tcp` is NIXL without shared memory."""

import asyncio
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from shared.engine.kv.layout import Span
from shared.engine.transfer.api import Peer
from shared.engine.transfer.layout_plan import Slices
from shared.errors import BadManifest, CorruptPages, DeadlineExceeded, Incompatible, TransferFailed
from tests.conformance.worlds import NUM_PAGES, PAGE_BYTES, LocalWorld, NixlOwners, NixlWorld, Owner, World, page_byte

LONG_S = 20.0
SHORT_S = 0.3


@pytest.fixture(scope="module")
def owners() -> Iterator[NixlOwners]:
    made = NixlOwners()
    yield made
    made.close()


@pytest.fixture(params=["local", "nixl", "nixl-tcp"])
def world(request: pytest.FixtureRequest, owners: NixlOwners, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    if request.param == "nixl-tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    tls = "tcp" if request.param == "nixl-tcp" else ""
    made: World = LocalWorld() if request.param == "local" else NixlWorld(owners, tls)
    yield made
    made.close()


@pytest.fixture
def own_owners(world: World) -> None:
    """None that has been read from before: what UCX still has to do with readers that are gone may hold it up."""
    world.shares_owners = False


async def connected(world: World, seed: int = 1) -> tuple[Owner, Peer]:
    owner = world.owner(f"owner-{seed}", seed)
    return owner, await world.reader.connect(owner.pool, LONG_S)


async def test_pages_arrive_whole_and_in_order(world: World) -> None:
    _, peer = await connected(world)
    for remote, local in (
        ([5], [0]),
        ([1, 2, 3], [4, 5, 6]),
        ([9, 8, 7], [1, 2, 3]),
        ([0, 23, 11, 12, 2], [23, 0, 7, 8, 9]),
        ([3, 3], [10, 12]),
        (list(range(NUM_PAGES)), list(reversed(range(NUM_PAGES)))),
    ):
        assert await world.reader.read(peer, remote, local, LONG_S) == len(remote) * PAGE_BYTES
        assert [world.bytes_of(page) for page in local] == [{page_byte(1, page)} for page in remote]


async def test_pages_that_were_not_asked_for_stay_as_they_were(world: World) -> None:
    _, peer = await connected(world)
    await world.reader.read(peer, [2, 4], [11, 13], LONG_S)
    assert all(world.bytes_of(page) == {0} for page in range(NUM_PAGES) if page not in (11, 13))


async def test_reading_nothing_reads_nothing(world: World) -> None:
    _, peer = await connected(world)
    assert await world.reader.read(peer, [], [], LONG_S) == 0


@pytest.mark.parametrize("staged", [False, True])
async def test_slices_of_larger_pages_arrive_in_their_places(staged: bool, world: World) -> None:
    slices = Slices((Span(100, 7, 1000), Span(5_000, 3_000, 200)), staged)
    owner = world.owner("owner", 1, 3, 9 << 20)  # staged, fewer of them than are read fit the buffer
    peer = await world.reader.connect(owner.pool, LONG_S, slices)
    assert await world.reader.read(peer, [2, 0, 1], [5, 4, 9], LONG_S) >= 3 * 1200
    for remote, local in ((2, 5), (0, 4), (1, 9)):
        expected = bytearray(PAGE_BYTES)
        for start, size in ((7, 1000), (3_000, 200)):
            expected[start : start + size] = bytes([page_byte(1, remote)]) * size
        assert world.memory.page(local) == expected
    assert all(world.bytes_of(page) == {0} for page in range(NUM_PAGES) if page not in (5, 4, 9))


def checksums(seed: int, remote: list[int], page_bytes: int = PAGE_BYTES) -> list[int]:
    """Those of an owner's pages, as it would give them."""
    return [xxhash.xxh3_64_intdigest(bytes([page_byte(seed, page)]) * page_bytes) for page in remote]


async def test_a_transport_says_what_its_own_pages_are(world: World) -> None:
    world.memory.page(2)[:] = bytes([page_byte(1, 5)]) * PAGE_BYTES
    assert await world.reader.checksums([2]) == checksums(1, [5])


async def test_pages_that_are_not_what_their_owner_vouched_for_are_found(world: World) -> None:
    _, peer = await connected(world)
    right = checksums(1, [5, 6, 7])
    assert await world.reader.read(peer, [5, 6, 7], [0, 1, 2], LONG_S, right) == 3 * PAGE_BYTES
    with pytest.raises(CorruptPages) as caught:
        await world.reader.read(peer, [5, 6, 7], [0, 1, 2], LONG_S, [right[0], 1, 2])
    assert caught.value.metadata["num_corrupt"] == "2"
    assert peer.is_open  # it is the bytes that are wrong, not the connection


async def test_staged_slices_are_compared_as_the_whole_pages_that_they_are_of(world: World) -> None:
    size = 9 << 20  # fewer of them than are read fit the buffer
    owner = world.owner("owner", 1, 3, size)
    peer = await world.reader.connect(owner.pool, LONG_S, Slices((Span(100, 7, 1000),), staged=True))
    right = checksums(1, [2, 0, 1], size)
    await world.reader.read(peer, [2, 0, 1], [5, 4, 9], LONG_S, right)
    assert bytes(world.memory.page(9)[7:1007]) == bytes([page_byte(1, 1)]) * 1000
    with pytest.raises(CorruptPages):
        await world.reader.read(peer, [2, 0, 1], [5, 4, 10], LONG_S, [*right[:2], 0])
    assert world.bytes_of(10) == {0}  # a page that is wrong is not copied out of the buffer


async def test_slices_that_are_read_alone_cannot_be_compared(world: World) -> None:
    owner = world.owner("owner")
    peer = await world.reader.connect(owner.pool, LONG_S, Slices((Span(100, 7, 1000),), staged=False))
    with pytest.raises(Incompatible, match="checksums are of whole pages"):
        await world.reader.read(peer, [5], [5], LONG_S, checksums(1, [5]))


async def test_many_reads_at_once_do_not_mix(world: World) -> None:
    _, one = await connected(world, seed=1)
    _, two = await connected(world, seed=2)
    reads = [world.reader.read((one, two)[i % 2], [i + 3], [i], LONG_S) for i in range(16)]
    await asyncio.gather(*reads)
    assert [world.bytes_of(i) for i in range(16)] == [{page_byte(1 + i % 2, i + 3)} for i in range(16)]


async def test_page_ids_outside_a_pool_are_refused(world: World) -> None:
    _, peer = await connected(world)
    n = NUM_PAGES
    for remote, local in (([-1], [0]), ([n], [0]), ([0], [-1]), ([0], [n]), ([0, 1], [0]), ([], [3])):
        with pytest.raises(BadManifest):
            await world.reader.read(peer, remote, local, LONG_S)


async def test_garbage_metadata_are_refused(world: World) -> None:
    owner = world.owner("owner")
    for metadata in (b"", b"garbage", owner.pool.agent_metadata[:-3], bytes(400)):
        with pytest.raises(TransferFailed):
            await world.reader.connect(replace(owner.pool, agent_metadata=metadata), LONG_S)


async def test_metadata_of_another_agent_are_refused(world: World) -> None:
    owner = world.owner("owner")
    with pytest.raises(TransferFailed):
        await world.reader.connect(replace(owner.pool, agent_name="somebody"), LONG_S)


async def test_pages_of_another_size_are_refused(world: World) -> None:
    owner = world.owner("owner", num_pages=3, page_bytes=PAGE_BYTES // 2)
    with pytest.raises(Incompatible):
        await world.reader.connect(owner.pool, LONG_S)


@pytest.mark.parametrize(
    "lie",
    [
        {"num_pages": NUM_PAGES + 1},
        {"num_pages": 10 * NUM_PAGES},
        {"base_address": 4096},
        {"memory_kind": "VRAM"},
        {"memory_kind": "cheese"},
        {"device_id": 7},
    ],
    ids=str,
)
async def test_memory_that_its_owner_has_not_registered_is_never_read(world: World, lie: dict[str, Any]) -> None:
    owner = world.owner("owner")
    with pytest.raises(TransferFailed):
        await world.reader.connect(replace(owner.pool, **lie), LONG_S)
    peer = await world.reader.connect(owner.pool, LONG_S)
    await world.reader.read(peer, [3], [3], LONG_S)
    assert owner.is_alive()


@pytest.mark.parametrize("num_pages", [0, 1 << 31, 1 << 60])
async def test_a_pool_of_an_absurd_size_is_refused(world: World, num_pages: int) -> None:
    owner = world.owner("owner")
    with pytest.raises(Incompatible):
        await world.reader.connect(replace(owner.pool, num_pages=num_pages), LONG_S)


async def test_a_killed_owner_fails_a_read(world: World) -> None:
    owner, peer = await connected(world)
    owner.kill()
    with pytest.raises(TransferFailed):
        await world.reader.read(peer, list(range(NUM_PAGES)), list(range(NUM_PAGES)), LONG_S)


async def test_a_dead_owner_cannot_be_connected_to(world: World) -> None:
    owner = world.owner("owner")
    owner.kill()
    with pytest.raises(TransferFailed):
        await world.reader.connect(owner.pool, LONG_S)


@pytest.mark.usefixtures("own_owners")
async def test_a_stopped_owner_cannot_hold_up_a_connect_past_its_time(world: World) -> None:
    owner = world.owner("owner")
    owner.stop()
    with pytest.raises(DeadlineExceeded):
        await world.reader.connect(owner.pool, SHORT_S)
    owner.resume()
    peer = await world.reader.connect(owner.pool, LONG_S)
    assert await world.reader.read(peer, [1], [1], LONG_S) == PAGE_BYTES


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.usefixtures("own_owners")
async def test_what_was_given_up_while_an_owner_was_stopped_goes_once_it_answers_and_does_not_end_it(
    world: World,
) -> None:
    owner, peer = await connected(world)
    gc.collect()  # pipes of owners of other tests
    num_open = num_open_files()
    owner.stop()
    for _ in range(2):
        with pytest.raises(DeadlineExceeded):
            await world.reader.connect(owner.pool, SHORT_S)
    owner.resume()
    async with asyncio.timeout(LONG_S):
        while True:
            await world.reader.read(peer, [1], [1], LONG_S)
            if num_open_files() <= num_open:
                break
            await asyncio.sleep(0.05)
    await world.reader.read(peer, [2], [2], LONG_S)
    assert owner.is_alive()


@pytest.mark.usefixtures("own_owners")
async def test_a_stopped_owner_cannot_hold_up_a_read_past_its_time(world: World) -> None:
    owner, peer = await connected(world)
    if not world.reads_need_owner:
        pytest.skip("shared memory can be read without its owner")
    owner.stop()
    with pytest.raises(DeadlineExceeded):
        await world.reader.read(peer, [1, 2], [1, 2], SHORT_S)
    await assert_it_reads_or_is_closed(world, owner, peer)


async def assert_it_reads_or_is_closed(world: World, owner: Owner, peer: Peer) -> None:
    owner.resume()
    if peer.is_open:
        await world.reader.read(peer, [1], [1], LONG_S)
    else:
        with pytest.raises(TransferFailed):
            await world.reader.read(peer, [1], [1], LONG_S)


async def test_a_cancelled_read_of_a_living_owner_leaves_it_readable(world: World) -> None:
    _, peer = await connected(world)
    pages = list(range(NUM_PAGES))
    read = asyncio.ensure_future(world.reader.read(peer, pages, pages, LONG_S))
    await asyncio.sleep(0)
    read.cancel()
    with pytest.raises(asyncio.CancelledError):
        await read
    assert peer.is_open
    await world.reader.read(peer, [5], [6], LONG_S)
    assert world.bytes_of(6) == {page_byte(1, 5)}


@pytest.mark.usefixtures("own_owners")
async def test_a_read_that_timed_out_writes_nothing_later(world: World) -> None:
    await assert_nothing_is_written_after(world, cancel=False)


@pytest.mark.usefixtures("own_owners")
async def test_a_cancelled_read_writes_nothing_later(world: World) -> None:
    await assert_nothing_is_written_after(world, cancel=True)


async def assert_nothing_is_written_after(world: World, cancel: bool) -> None:
    owner, peer = await connected(world)
    _, other = await connected(world, seed=2)
    owner.stop()
    pages = list(range(NUM_PAGES))
    read = asyncio.ensure_future(world.reader.read(peer, pages, pages, LONG_S if cancel else SHORT_S))
    await asyncio.sleep(0.05)
    if cancel:
        read.cancel()
    await asyncio.wait([read], timeout=LONG_S)
    assert read.done()
    assert read.cancelled() or read.exception() is not None or not world.reads_need_owner
    for page in pages:
        world.memory.page(page)[:] = bytes([255]) * PAGE_BYTES
    owner.resume()
    # The reader goes on working, which would also finish whatever was left in flight.
    for _ in range(20):
        await world.reader.read(other, [0], [0], LONG_S)
        await asyncio.sleep(0.01)
    assert all(world.bytes_of(page) == {255} for page in pages[1:])
    assert owner.is_alive()


@pytest.mark.usefixtures("own_owners")
async def test_an_owner_can_be_connected_to_again_after_it_failed_a_read(world: World) -> None:
    """Through shared memory it hardly ever fails one: only while UCX still has something to settle with it."""
    owner, peer = await connected(world)
    owner.stop()
    (found,) = await asyncio.gather(world.reader.read(peer, [1], [1], SHORT_S), return_exceptions=True)
    assert isinstance(found, DeadlineExceeded) or (found == PAGE_BYTES and not world.reads_need_owner)
    world.reader.disconnect(peer)
    owner.resume()
    again = await world.reader.connect(owner.pool, LONG_S)
    await world.reader.read(again, [7], [7], LONG_S)
    assert world.bytes_of(7) == {page_byte(1, 7)}
    await world.reader.read(again, [8], [8], LONG_S)
    assert owner.is_alive()


async def test_a_restarted_owner_is_read_with_its_new_metadata(world: World) -> None:
    owner, peer = await connected(world)
    owner.kill()
    world.reader.disconnect(peer)
    successor = world.owner("owner-1-reborn", seed=9)
    again = await world.reader.connect(successor.pool, LONG_S)
    await world.reader.read(again, [4], [4], LONG_S)
    assert world.bytes_of(4) == {page_byte(9, 4)}


async def test_a_disconnected_owner_cannot_be_read(world: World) -> None:
    _, peer = await connected(world)
    assert peer.is_open
    world.reader.disconnect(peer)
    world.reader.disconnect(peer)
    with pytest.raises(TransferFailed):
        await world.reader.read(peer, [1], [1], LONG_S)


async def test_two_connections_to_one_owner_live_apart(world: World) -> None:
    owner, one = await connected(world)
    two = await world.reader.connect(owner.pool, LONG_S)
    world.reader.disconnect(one)
    await world.reader.read(two, [6], [6], LONG_S)
    assert world.bytes_of(6) == {page_byte(1, 6)}
