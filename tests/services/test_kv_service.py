"""KvService: who may read what, and until when."""

from typing import Any

import pytest

from protos.forebay.v1 import kv_pb2, kv_pb2_grpc
from shared import page_hash, rpc
from shared.errors import Incompatible, InvalidRequest, StaleEpoch
from tests.services.workers import KEY, LEASE_TTL_MS, Fleet, Running, generate, prompt, request

HASHES = page_hash.chain(KEY, prompt(20), 4)


class Reader:
    """A client of one node's KvService."""

    def __init__(self, node: Running, channels: rpc.Channels) -> None:
        self.node, self.epoch = node, node.ref.epoch
        self.stub: Any = kv_pb2_grpc.KvServiceStub(channels.to(node.ref.address))

    async def connect(self, compatibility_hash: str = "", epoch: int = 0) -> kv_pb2.ConnectResponse:
        asked = kv_pb2.ConnectRequest(
            compatibility_hash=compatibility_hash or self.node.worker.engine.spec.compatibility_hash,
            epoch=epoch or self.epoch,
        )
        answer: kv_pb2.ConnectResponse = await rpc.call(self.stub.Connect, asked)
        return answer

    async def acquire(self, hashes: bytes, epoch: int | None = None) -> kv_pb2.AcquireResponse:
        asked = kv_pb2.AcquireRequest(request_id="r", epoch=epoch or self.epoch, page_hashes=hashes)
        answer: kv_pb2.AcquireResponse = await rpc.call(self.stub.Acquire, asked)
        return answer

    async def renew(self, lease_id: int) -> kv_pb2.Lease:
        answer: kv_pb2.RenewResponse = await rpc.call(
            self.stub.Renew, kv_pb2.RenewRequest(lease_id=lease_id, epoch=self.epoch)
        )
        return answer.lease

    async def release(self, lease_id: int, epoch: int | None = None) -> bool:
        asked = kv_pb2.ReleaseRequest(lease_id=lease_id, epoch=epoch or self.epoch)
        answer: kv_pb2.ReleaseResponse = await rpc.call(self.stub.Release, asked)
        return answer.status == kv_pb2.RELEASE_STATUS_VALID


@pytest.fixture
async def owner(world: Fleet) -> Running:
    """Has the five pages of HASHES cached."""
    owner = await world.start("owner", num_pages=12)
    await generate(world, request(prompt(20), owner, max_tokens=2))
    await owner.idle()
    return owner


@pytest.fixture
async def reader(world: Fleet, owner: Running) -> Reader:
    return Reader(owner, world.channels)


async def test_connect_describes_the_pool(owner: Running, reader: Reader) -> None:
    answer = await reader.connect()
    (shard,) = answer.shards
    layout = owner.worker.engine.spec.layout
    assert (shard.transport, shard.agent_name, shard.num_pages) == ("local", "owner-1", 12)
    assert (shard.layout.page_size, shard.layout.page_bytes) == (layout.page_size, layout.page_bytes)
    assert [state.name for state in shard.layout.state_classes] == [state.name for state in layout.state_classes]


async def test_connect_refuses_another_model_or_layout(reader: Reader) -> None:
    with pytest.raises(Incompatible):
        await reader.connect(compatibility_hash="0" * 32)


async def test_every_call_for_another_epoch_is_refused(reader: Reader) -> None:
    with pytest.raises(StaleEpoch):
        await reader.connect(epoch=reader.epoch + 1)
    with pytest.raises(StaleEpoch):
        await reader.acquire(page_hash.join(HASHES), reader.epoch + 1)


async def test_acquire_leases_the_longest_cached_run_with_every_state_class(owner: Running, reader: Reader) -> None:
    answer = await reader.acquire(page_hash.join([*HASHES, bytes(16)]))
    manifest, layout = answer.manifest, owner.worker.engine.spec.layout
    assert (len(manifest.page_ids), manifest.first_page, manifest.num_tokens) == (5, 0, 20)
    assert {s.name: s.num_bytes for s in manifest.state_classes} == {
        state.name: state.size_bytes * 5 for state in layout.state_classes
    }
    assert (answer.lease.epoch, answer.lease.ttl_ms) == (reader.epoch, LEASE_TTL_MS)
    assert owner.kv.counts().leased == 5


async def test_acquire_of_unknown_pages_gives_no_lease(owner: Running, reader: Reader) -> None:
    answer = await reader.acquire(page_hash.join([bytes(16), *HASHES]))
    assert not answer.HasField("lease")
    assert owner.kv.counts().leased == 0


async def test_broken_page_hashes_are_refused(reader: Reader) -> None:
    with pytest.raises(InvalidRequest):
        await reader.acquire(page_hash.join(HASHES)[:-1])


async def test_a_leased_page_outlives_every_other_use_of_the_pool(world: Fleet, owner: Running, reader: Reader) -> None:
    answer = await reader.acquire(page_hash.join(HASHES))
    before = [bytes(owner.pages[page_id]) for page_id in answer.manifest.page_ids]
    for first in range(1000, 6000, 1000):
        await generate(world, request(prompt(20, first), owner, max_tokens=2))
    assert [bytes(owner.pages[page_id]) for page_id in answer.manifest.page_ids] == before
    assert await reader.release(answer.lease.lease_id)


async def test_a_release_in_time_is_valid_once(owner: Running, reader: Reader) -> None:
    lease = (await reader.acquire(page_hash.join(HASHES))).lease
    assert await reader.release(lease.lease_id)
    assert not await reader.release(lease.lease_id)
    assert owner.kv.counts().leased == 0


async def test_a_release_after_the_lease_ended_is_stale(owner: Running, reader: Reader) -> None:
    lease = (await reader.acquire(page_hash.join(HASHES))).lease
    owner.clock.ahead_s += LEASE_TTL_MS / 1000 + 1
    assert not await reader.release(lease.lease_id)


async def test_a_renewed_lease_has_its_full_time_again(owner: Running, reader: Reader) -> None:
    lease = (await reader.acquire(page_hash.join(HASHES))).lease
    for _ in range(3):
        owner.clock.ahead_s += LEASE_TTL_MS / 1000 - 1
        assert (await reader.renew(lease.lease_id)).ttl_ms == LEASE_TTL_MS
    assert await reader.release(lease.lease_id)


async def test_a_lease_that_ended_cannot_be_renewed(owner: Running, reader: Reader) -> None:
    lease = (await reader.acquire(page_hash.join(HASHES))).lease
    owner.clock.ahead_s += LEASE_TTL_MS / 1000 + 1
    with pytest.raises(StaleEpoch):
        await reader.renew(lease.lease_id)


async def test_a_release_for_another_epoch_is_stale_and_leaves_the_lease(owner: Running, reader: Reader) -> None:
    lease = (await reader.acquire(page_hash.join(HASHES))).lease
    assert not await reader.release(lease.lease_id, reader.epoch + 1)
    assert owner.kv.counts().leased == 5
    assert await reader.release(lease.lease_id)


async def test_pages_of_a_reader_that_vanished_come_back_with_its_lease(owner: Running, reader: Reader) -> None:
    await reader.acquire(page_hash.join(HASHES))
    owner.clock.ahead_s += LEASE_TTL_MS / 1000 + 1
    assert owner.kv.counts().leased == 0
    assert owner.kv.check() == []


async def test_every_lease_is_counted_once_with_what_became_of_it(owner: Running, reader: Reader) -> None:
    before = owner.kv.lease_counts()
    released, lapsed, _ = [(await reader.acquire(page_hash.join(HASHES))).lease for _ in range(3)]
    assert await reader.release(released.lease_id)
    owner.clock.ahead_s += LEASE_TTL_MS / 2000
    await reader.renew(lapsed.lease_id)
    owner.clock.ahead_s += LEASE_TTL_MS / 1500
    counts = owner.kv.lease_counts()
    assert (counts.granted - before.granted, counts.lapsed - before.lapsed, counts.live) == (3, 1, 1)
    owner.clock.ahead_s += LEASE_TTL_MS / 1000
    assert owner.kv.lease_counts().lapsed - before.lapsed == 2
