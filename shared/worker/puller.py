"""Reading other workers' pages: connect, acquire, read, release."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from protos.forebay.v1 import kv_pb2, kv_pb2_grpc
from shared import page_hash, rpc
from shared.engine.api import Engine
from shared.engine.kv.layout import KvLayout
from shared.engine.kv.store import PageTable
from shared.engine.transfer.api import RemotePool
from shared.engine.transfer.pools import PeerPools, Pools, RankPool
from shared.errors import BadManifest, CorruptPages, DeadlineExceeded, Fault, Incompatible, StaleEpoch, TransferFailed
from shared.worker import manifests
from shared.worker.measures import Measures

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 2.0
# The life of a lease by default: what takes longer would hold a request up for a peer that is stuck.
READ_TIMEOUT_S = 10.0
# Connecting to a peer takes 40 ms alone, and 100 to 450 ms where processors are short.
CONNECT_MS = 250.0
# One that nobody waits for is made a little later: it takes tens of ms of a processor, and whoever wants a prefix now
# is often one of a herd whose worker died.
CONNECT_LATER_S = 0.5
# What a token takes is not known before one was computed.
GUESSED_MS_PER_TOKEN = 0.5
# A peer that is well answers within this time even where it has to wait for a processor.
LEAST_PATIENCE_MS = 250.0
# The reason why a prefix is computed and not pulled, where that is no fault.
NOT_CONNECTED = "NOT_CONNECTED"


@dataclass(frozen=True, slots=True)
class Source:
    """A connected worker. Only its epoch can be read from."""

    worker_id: str
    epoch: int
    peer: PeerPools


class Puller:
    """Connections to the workers that this one reads from, made when first needed, which is taken to last
    `connect_ms`, or `connect_later_s` after that if nobody waits for it. For a peer's answer one waits for at least
    `least_patience_ms`."""

    def __init__(
        self,
        channels: rpc.Channels,
        pools: Pools,
        engine: Engine,
        measures: Measures,
        connect_ms: float = CONNECT_MS,
        connect_later_s: float = CONNECT_LATER_S,
        least_patience_ms: float = LEAST_PATIENCE_MS,
    ) -> None:
        self._channels, self._pools = channels, pools
        self._engine, self._spec, self._measures = engine, engine.spec, measures
        self._connect_ms, self._connect_later_s = connect_ms, connect_later_s
        self._least_patience_ms = least_patience_ms
        self._sources: dict[str, asyncio.Task[Source]] = {}
        self._later: dict[str, asyncio.TimerHandle] = {}
        self._farewells: set[asyncio.Task[None]] = set()

    async def source(self, ref: kv_pb2.WorkerRef) -> Source:
        """The connection to one incarnation of a worker; everybody who asks meanwhile shares the attempt.

        Raises StaleEpoch, Incompatible, WorkerLost, TransferFailed or DeadlineExceeded.
        """
        source = await asyncio.shield(self._attempt(ref))
        if source.epoch != ref.epoch:
            raise TransferFailed(f"{ref.worker_id} is connected at epoch {source.epoch}, not {ref.epoch}")
        return source

    def _attempt(self, ref: kv_pb2.WorkerRef) -> asyncio.Task[Source]:
        """The connection to a worker, made or being made; begun if there is none."""
        task = self._sources.get(ref.worker_id)
        if task is not None and task.done() and not (_connected(task) and task.result().epoch >= ref.epoch):
            self.forget(ref.worker_id)
            task = None
        if task is None:
            task = self._sources[ref.worker_id] = asyncio.create_task(self._connect(ref))
            task.add_done_callback(_connected)  # so that a failure is nobody's surprise if nobody waits any more
        return task

    def is_connected(self, ref: kv_pb2.WorkerRef) -> bool:
        """Whether pages of a worker can be read at once."""
        task = self._sources.get(ref.worker_id)
        return task is not None and _connected(task) and task.result().epoch >= ref.epoch

    def _connect_later(self, ref: kv_pb2.WorkerRef) -> None:
        def connect() -> None:
            del self._later[ref.worker_id]
            self._attempt(ref)

        if ref.worker_id not in self._later:
            self._later[ref.worker_id] = asyncio.get_running_loop().call_later(self._connect_later_s, connect)

    async def _connect(self, ref: kv_pb2.WorkerRef) -> Source:
        request = kv_pb2.ConnectRequest(compatibility_hash=self._spec.compatibility_hash, epoch=ref.epoch)
        with rpc.no_deadline():  # others may be waiting for this, with later deadlines
            answer: kv_pb2.ConnectResponse = await rpc.call(self._stub(ref).Connect, request, CONNECT_TIMEOUT_S)
        if answer.epoch != ref.epoch:
            raise StaleEpoch(f"{ref.worker_id} is at epoch {answer.epoch}, not {ref.epoch}")
        theirs = self._theirs(answer)
        peer = await self._pools.connect(theirs, CONNECT_TIMEOUT_S, checksums=answer.checksums)
        return Source(ref.worker_id, ref.epoch, peer)

    def _stub(self, ref: kv_pb2.WorkerRef) -> Any:
        return self._channels.stub(kv_pb2_grpc.KvServiceStub, ref.address)

    def _theirs(self, answer: kv_pb2.ConnectResponse) -> list[RankPool]:
        """The pools of the peer's ranks, if they are of our model. Raises Incompatible."""
        if answer.compatibility_hash != self._spec.compatibility_hash:
            raise Incompatible("the peer's pages are not ours")
        if [shard.rank for shard in answer.shards] != list(range(len(answer.shards))):
            raise Incompatible("the peer's ranks are not numbered from 0")
        if others := {shard.transport for shard in answer.shards} - {self._pools.name}:
            raise Incompatible(f"the peer moves pages by {', '.join(sorted(others))}, we by {self._pools.name}")
        return [RankPool(_pool(shard), manifests.layout(shard.layout)) for shard in answer.shards]

    def forget(self, worker_id: str, source: Source | None = None) -> None:
        """Disconnect a worker, or only this connection to it; the next read connects anew."""
        task = self._sources.get(worker_id)
        if task is None or (source is not None and not (_connected(task) and task.result() is source)):
            return
        del self._sources[worker_id]
        if not task.done():
            task.cancel()
        elif _connected(task):
            self._pools.disconnect(task.result().peer)

    async def read(
        self, source: Source, remote: Sequence[int], local: Sequence[int], checksums: Sequence[int] = ()
    ) -> None:
        """Read pages, and compare them with the owner's checksums if it gave any. A source whose read failed is
        disconnected. Raises as `Pools.read`.
        """
        started = asyncio.get_running_loop().time()
        timeout_s = min(READ_TIMEOUT_S, rpc.time_remaining() or READ_TIMEOUT_S)
        try:
            num_bytes = await self._pools.read(source.peer, remote, local, timeout_s, checksums)
        except CorruptPages as fault:
            raise self._corrupt(source, len(local), fault) from None
        finally:
            if not source.peer.is_open:
                self.forget(source.worker_id, source)
        self._measures.transferred(num_bytes, asyncio.get_running_loop().time() - started)
        if checksums:
            self._measures.checked(len(local), 0, source.worker_id)

    def _corrupt(self, source: Source, num_pages: int, found: CorruptPages) -> CorruptPages:
        num_corrupt = int(found.metadata.get("num_corrupt", num_pages))
        self._measures.checked(num_pages, num_corrupt, source.worker_id)
        fault = CorruptPages(
            f"{num_corrupt} of {num_pages} pages of {source.worker_id}, epoch {source.epoch}, arrived corrupt",
            metadata={"worker": source.worker_id, "epoch": str(source.epoch)},
        )
        log.error("%s", fault.message)
        return fault

    async def release(
        self, ref: kv_pb2.WorkerRef, lease: kv_pb2.Lease, read: Sequence[int], timeout_s: float = CALL_TIMEOUT_S
    ) -> bool:
        """Give a lease back; whether the owner's pages `read` under it may be used. Raises what the call raises."""
        answer = await self._release(ref, lease, read, timeout_s)
        valid = answer.status == kv_pb2.RELEASE_STATUS_VALID
        if not valid:
            self._measures.stale_releases.add(1)
        return valid

    async def _release(
        self, ref: kv_pb2.WorkerRef, lease: kv_pb2.Lease, read: Sequence[int] = (), timeout_s: float = CALL_TIMEOUT_S
    ) -> kv_pb2.ReleaseResponse:
        request = kv_pb2.ReleaseRequest(lease_id=lease.lease_id, epoch=lease.epoch, page_ids=read)
        answer: kv_pb2.ReleaseResponse = await rpc.call(self._stub(ref).Release, request, timeout_s)
        return answer

    def give_up(self, ref: kv_pb2.WorkerRef, lease: kv_pb2.Lease) -> None:
        """Have a lease given back whose pages are not wanted any more; waits for nothing.

        If the owner cannot be told, the lease lapses.
        """
        task = asyncio.create_task(self._give_up(ref, lease))
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _give_up(self, ref: kv_pb2.WorkerRef, lease: kv_pb2.Lease) -> None:
        with suppress(Fault), rpc.no_deadline():
            await self._release(ref, lease)

    @asynccontextmanager
    async def renewed(self, ref: kv_pb2.WorkerRef, lease: kv_pb2.Lease) -> AsyncIterator[None]:
        """Keep a lease alive while inside."""
        task = asyncio.create_task(self._renew(ref, lease))
        try:
            yield
        finally:
            task.cancel()

    async def _renew(self, ref: kv_pb2.WorkerRef, lease: kv_pb2.Lease) -> None:
        request = kv_pb2.RenewRequest(lease_id=lease.lease_id, epoch=lease.epoch)
        with suppress(Fault):  # a lease that cannot be renewed shows at its release
            while True:
                await asyncio.sleep(lease.ttl_ms / 3000)
                await rpc.call(self._stub(ref).Renew, request, CALL_TIMEOUT_S)

    async def pull_prefix(
        self, ref: kv_pb2.WorkerRef, request_id: str, page_hashes: Sequence[bytes], table: PageTable
    ) -> int:
        """Read what a peer has cached of a prefix behind what `table` has, into the table's pages.

        Returns the tokens gained, which `table.num_tokens` then counts; 0 if the peer has nothing more, or anything
        went wrong: a prefix that cannot be pulled is computed. Returns only when no byte is written any more.

        Nobody waits longer than computing takes for a peer that does not answer, as one that has stopped. A short
        prefix does not wait for a first connection, which takes longer than computing it: the connection is made when
        that is done, and is there the next time.
        """
        num_wanted = len(page_hashes) * self._spec.layout.page_size - table.num_tokens
        if not self.is_connected(ref) and self._computing_ms(num_wanted) < self._connect_ms:
            self._connect_later(ref)
            self._measures.failed_pulls.add(1, {"reason": NOT_CONNECTED})
            return 0
        try:
            num_tokens = await self._pull(ref, request_id, page_hashes, table)
        except Fault as fault:
            log.warning("cannot pull a prefix from %s: %s %s", ref.worker_id, fault.reason, fault.message)
            self._measures.failed_pulls.add(1, {"reason": fault.reason})
            return 0
        gained = max(0, num_tokens - table.num_tokens)
        table.num_tokens += gained
        return gained

    def _computing_ms(self, num_tokens: int) -> float:
        return num_tokens * (self._engine.load().prefill_ms_per_token or GUESSED_MS_PER_TOKEN)

    async def _acquire(
        self, ref: kv_pb2.WorkerRef, wanted: kv_pb2.AcquireRequest, patience_s: float
    ) -> tuple[Source, kv_pb2.AcquireResponse]:
        """The connection to a peer, and its lease. Raises what both raise, DeadlineExceeded if they take too long."""
        try:
            async with asyncio.timeout(patience_s):
                return await self.source(ref), await rpc.call(self._stub(ref).Acquire, wanted, CALL_TIMEOUT_S)
        except TimeoutError:
            raise DeadlineExceeded(f"{ref.worker_id} did not answer for {patience_s:.2f} s") from None

    async def _pull(
        self, ref: kv_pb2.WorkerRef, request_id: str, page_hashes: Sequence[bytes], table: PageTable
    ) -> int:
        wanted = kv_pb2.AcquireRequest(request_id=request_id, epoch=ref.epoch, page_hashes=page_hash.join(page_hashes))
        num_wanted = len(page_hashes) * self._spec.layout.page_size - table.num_tokens
        patience_s = max(self._least_patience_ms, self._connect_ms, self._computing_ms(num_wanted)) / 1000
        source, answer = await self._acquire(ref, wanted, patience_s)
        if not answer.HasField("lease"):
            return 0
        try:
            manifests.check_lease(answer.lease, ref)
            _check(answer, self._spec.layout, len(page_hashes))
            first = table.num_tokens // self._spec.layout.page_size
            remote = answer.manifest.page_ids[first:]
            num_ranks = len(answer.manifest.page_checksums) // max(1, len(answer.manifest.page_ids))
            checksums = answer.manifest.page_checksums[first * num_ranks :]
            async with self.renewed(ref, answer.lease):
                await self.read(source, remote, table.page_ids[first : first + len(remote)], checksums)
        except BaseException:
            self.give_up(ref, answer.lease)
            raise
        if not await self.release(ref, answer.lease, remote):
            raise BadManifest("the lease on the pages had ended before they were read (STALE)")
        return answer.manifest.num_tokens

    def close(self) -> None:
        """Disconnect all."""
        for timer in self._later.values():
            timer.cancel()
        for worker_id in list(self._sources):
            self.forget(worker_id)


def _pool(shard: kv_pb2.PoolShard) -> RemotePool:
    return RemotePool(
        agent_name=shard.agent_name,
        agent_metadata=shard.agent_metadata,
        base_address=shard.base_address,
        num_pages=shard.num_pages,
        page_bytes=shard.layout.page_bytes,
        memory_kind=shard.memory_kind,
        device_id=shard.device_id,
    )


def _check(answer: kv_pb2.AcquireResponse, layout: KvLayout, num_wanted: int) -> None:
    """Raise BadManifest unless these are whole pages, and no more than were asked for."""
    manifests.check(answer.manifest, layout, 0)
    num_pages = len(answer.manifest.page_ids)
    if num_pages > num_wanted or answer.manifest.num_tokens != num_pages * layout.page_size:
        raise BadManifest(f"{num_pages} pages of {answer.manifest.num_tokens} tokens answer a wish for {num_wanted}")


def _connected(task: asyncio.Task[Source]) -> bool:
    """Whether an attempt has succeeded; its failure has been noticed then, too."""
    return task.done() and not task.cancelled() and task.exception() is None
