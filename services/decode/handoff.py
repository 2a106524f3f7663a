"""Taking over a prompt that another worker computes: pages are read while the next chunk is computed."""

import asyncio
from collections.abc import Sequence

from protos.forebay.v1 import kv_pb2, prefill_pb2
from shared.engine.kv.layout import KvLayout
from shared.engine.kv.store import PageTable
from shared.errors import BadManifest, Cancelled, DeadlineExceeded, Draining, Fault, TransferFailed, WorkerLost
from shared.worker import manifests
from shared.worker.puller import CALL_TIMEOUT_S, Puller

FINISH_S = 1.0
# A worker that went away without a word rarely answers.
KEEP_TIMEOUT_S = 0.5
# Of a peer that went away or was cut off. One that contradicted itself is not believed in what it said before either.
CUT_OFF = (WorkerLost, Draining, Cancelled, DeadlineExceeded, TransferFailed)


class Handoff:
    """Reads the pages of one prompt into `table`, whose leading `num_held` pages we have already.

    The table must stay held until the handoff, a context, was left: only then is no byte written any more. What a fault
    inside leaves usable counts afterwards, and `num_kept` says how many tokens that are.
    """

    def __init__(
        self, puller: Puller, layout: KvLayout, prefill: kv_pb2.WorkerRef, table: PageTable, num_held: int
    ) -> None:
        self._puller, self._layout = puller, layout
        self._prefill, self._table = prefill, table
        self._next_page = self._first_page = num_held
        self._announced: asyncio.Queue[prefill_pb2.PagesReady | None] = asyncio.Queue()
        self._lease: kv_pb2.Lease | None = None
        self._page_ids: set[int] = set()
        self._read: list[kv_pb2.Manifest] = []
        self.num_kept = 0
        self._reader = asyncio.create_task(self._read_all())

    async def __aenter__(self) -> "Handoff":
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            await self._stop()
            if isinstance(error, CUT_OFF) and self._read and await self._is_vouched_for():
                self._keep()
        finally:
            if self._lease is not None:
                self._puller.give_up(self._prefill, self._lease)

    def announce(self, ready: prefill_pb2.PagesReady) -> None:
        """Pages that can be read, and are. Raises as `accept`."""
        self.accept(ready)
        self.read(ready)

    def read(self, ready: prefill_pb2.PagesReady) -> None:
        """Begin to read pages that were accepted."""
        self._announced.put_nowait(ready)

    def accept(self, ready: prefill_pb2.PagesReady) -> None:
        """Pages that can be read. Raises BadManifest if they are not the next ones, complete, under the one lease, and
        the fault that ended the reading of earlier ones.
        """
        if self._lease is None:
            self._lease = ready.lease  # to be given back, whatever is wrong
        if self._reader.done():
            self._reader.result()
        manifests.check(ready.manifest, self._layout, self._next_page)
        manifests.check_lease(ready.lease, self._prefill)
        if self._lease.lease_id != ready.lease.lease_id:
            raise BadManifest("the prefill worker changed its lease within a prompt")
        if not self._page_ids.isdisjoint(ready.manifest.page_ids):
            raise BadManifest("the prefill worker hands a page over twice")
        self._next_page += len(ready.manifest.page_ids)
        self._page_ids.update(ready.manifest.page_ids)
        if self._next_page > len(self._table.page_ids):
            raise BadManifest(f"the prompt has {len(self._table.page_ids)} pages, not {self._next_page}")

    async def complete(self, num_pages: int, num_tokens: int) -> None:
        """Finish reading and make the first `num_tokens` tokens of the table count.

        `num_pages` is what the prefill worker says it handed over. Raises the fault that keeps the pages from being
        used; a lease that had lapsed is a BadManifest.
        """
        if self._next_page - self._first_page != num_pages:
            raise BadManifest(f"{self._next_page - self._first_page} of {num_pages} pages were announced")
        if self._next_page != self._layout.num_pages(num_tokens):
            raise BadManifest(f"{self._next_page} pages do not hold {num_tokens} tokens")
        self._announced.put_nowait(None)
        await self._reader
        if not await self._release():
            raise BadManifest("the lease on the pages had ended before they were read (STALE)")
        self._table.num_tokens = num_tokens

    def _keep(self) -> None:
        last, before = self._read[-1], self._table.num_tokens
        self._table.num_tokens = last.first_page * self._layout.page_size + last.num_tokens
        self.num_kept = self._table.num_tokens - before

    async def _is_vouched_for(self) -> bool:
        """Whether what was read may be used: the peer says that its lease held or, where it cannot be asked any more,
        it gave checksums, with which every page was compared (docs/decisions/0010).
        """
        try:
            return await self._release(KEEP_TIMEOUT_S)
        except Fault:
            return all(manifest.page_checksums for manifest in self._read)

    async def _release(self, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        if self._lease is None:
            return True
        read = [page_id for manifest in self._read for page_id in manifest.page_ids]
        valid = await self._puller.release(self._prefill, self._lease, read, timeout_s)
        self._lease = None
        return valid

    async def _stop(self) -> None:
        """Read no more, and return only when nothing is written any more, even if cancelled meanwhile."""
        while not self._announced.empty():
            self._announced.get_nowait()
        self._announced.put_nowait(None)
        cancelled = False
        # Cancelling a READ can cost the connection, and with it the READs of others: one that runs may finish.
        timeout_s: float | None = FINISH_S
        while not self._reader.done():
            try:
                await asyncio.wait([self._reader], timeout=timeout_s)
            except asyncio.CancelledError:
                cancelled = True
            self._reader.cancel()
            timeout_s = None
        if not self._reader.cancelled():
            self._reader.exception()  # known to whoever awaited `complete`, or of no interest any more
        if cancelled:
            raise asyncio.CancelledError

    async def _read_all(self) -> None:
        source = await self._puller.source(self._prefill)
        while (ready := await self._announced.get()) is not None:
            manifest = ready.manifest
            async with self._puller.renewed(self._prefill, ready.lease):
                await self._puller.read(source, manifest.page_ids, self._local(manifest), manifest.page_checksums)
            self._read.append(manifest)

    def _local(self, manifest: kv_pb2.Manifest) -> Sequence[int]:
        return self._table.page_ids[manifest.first_page : manifest.first_page + len(manifest.page_ids)]
