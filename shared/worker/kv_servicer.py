"""KvService: lets peers read this worker's pages under leases."""

from typing import Any

from protos.forebay.v1 import kv_pb2, kv_pb2_grpc
from shared import page_hash
from shared.engine.api import Engine
from shared.engine.transfer.pools import Pools
from shared.errors import Incompatible, InvalidRequest, StaleEpoch
from shared.worker import manifests
from shared.worker.identity import Identity


class KvServicer(kv_pb2_grpc.KvServiceServicer):
    """See protos/forebay/v1/kv.proto. Nothing here waits for the engine."""

    def __init__(self, identity: Identity, engine: Engine, pools: Pools, *, checksums: bool = False) -> None:
        self._identity, self._checksums = identity, checksums
        self._spec, self._kv = engine.spec, engine.kv
        self._pools = pools

    async def Connect(self, request: kv_pb2.ConnectRequest, _context: Any) -> kv_pb2.ConnectResponse:
        """Describe the pool of each rank."""
        self._identity.require(request.epoch)
        ours = self._spec.compatibility_hash
        if request.compatibility_hash != ours:
            raise Incompatible(f"compatibility hash {request.compatibility_hash} is not {ours}")
        self.serve()
        response = kv_pb2.ConnectResponse(epoch=self._identity.epoch, compatibility_hash=ours)
        response.checksums = self._checksums
        for rank, (pool, layout) in enumerate((own.pool, own.layout) for own in self._pools.describe()):
            response.shards.add(
                rank=rank,
                transport=self._pools.name,
                agent_name=pool.agent_name,
                agent_metadata=pool.agent_metadata,
                base_address=pool.base_address,
                num_pages=pool.num_pages,
                memory_kind=pool.memory_kind,
                device_id=pool.device_id,
                layout=manifests.wire_layout(layout),
            )
        return response

    async def Acquire(self, request: kv_pb2.AcquireRequest, _context: Any) -> kv_pb2.AcquireResponse:
        """Lease cached pages."""
        self._identity.require(request.epoch)
        try:
            hashes = page_hash.split(request.page_hashes)
        except ValueError as error:
            raise InvalidRequest(str(error), param="page_hashes") from None
        if (found := self._kv.acquire(hashes)) is None:
            return kv_pb2.AcquireResponse()
        lease_id, page_ids = found
        layout = self._spec.layout
        manifest = manifests.manifest(layout, 0, page_ids, len(page_ids) * layout.page_size)
        try:
            await self.seal(manifest)
        except BaseException:
            self._kv.release(lease_id)
            raise
        self.serve()
        return kv_pb2.AcquireResponse(lease=self.lease(lease_id), manifest=manifest)

    async def Renew(self, request: kv_pb2.RenewRequest, _context: Any) -> kv_pb2.RenewResponse:
        """Extend a lease."""
        self._identity.require(request.epoch)
        if not self._kv.renew(request.lease_id):
            raise StaleEpoch(f"lease {request.lease_id} has ended")
        self.serve()
        return kv_pb2.RenewResponse(lease=self.lease(request.lease_id))

    async def Release(self, request: kv_pb2.ReleaseRequest, _context: Any) -> kv_pb2.ReleaseResponse:
        """End a lease; VALID only if it held all along, in this epoch, on all that was read."""
        valid = request.epoch == self._identity.epoch and self._kv.release(request.lease_id, request.page_ids)
        if self._kv.next_lease_end_s() is None:
            self._pools.serve(0)
        status = kv_pb2.RELEASE_STATUS_VALID if valid else kv_pb2.RELEASE_STATUS_STALE
        return kv_pb2.ReleaseResponse(status=status)

    def lease(self, lease_id: int) -> kv_pb2.Lease:
        """A lease that was just given or renewed, as a message."""
        return kv_pb2.Lease(lease_id=lease_id, epoch=self._identity.epoch, ttl_ms=self._kv.lease_ttl_ms)

    async def seal(self, manifest: kv_pb2.Manifest) -> None:
        """Add the checksums of pages that a lease has, if this worker gives any."""
        if self._checksums:
            manifest.page_checksums.extend(await self._pools.checksums(manifest.page_ids))

    def serve(self) -> None:
        """Answer READs, of which one may come at any moment, for as long as a lease given now would last."""
        self._pools.serve(self._kv.lease_ttl_ms / 1000)
