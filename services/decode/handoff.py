"""Taking over a prompt that another worker computes: pages are read while the next chunk is computed."""

import asyncio
from collections.abc import Sequence

from protos.forebay.v1 import kv_pb2, prefill_pb2
from shared.engine.kv.layout import KvLayout
from shared.engine.kv.store import PageTable
from shared.errors import BadManifest
from shared.worker import manifests
from shared.worker.puller import Puller

FINISH_S = 1.0


class Handoff:
    """Reads the pages of one prompt into `table`, whose leading `num_held` pages we have already.

    The table must stay held until `complete` or `abandon` has returned: only then is no byte written any more.
    """

    def __init__(
        self, puller: Puller, layout: KvLayout, prefill: kv_pb2.WorkerRef, table: PageTable, num_held: int
    ) -> None:
        self._puller, self._layout = puller, layout
        self._prefill, self._table = prefill, table
        self._next_page = self._first_page = num_held
        self._announced: asyncio.Queue[prefill_pb2.PagesReady | None] = asyncio.Queue()
        self._lease: kv_pb2.Lease | None = None
        self._reader = asyncio.create_task(self._read_all())

    def announce(self, ready: prefill_pb2.PagesReady) -> None:
        """Pages that can be read. Raises BadManifest if they are not the next ones, complete, under the one lease."""
        manifests.check(ready.manifest, self._layout, self._next_page)
        if self._lease is not None and self._lease.lease_id != ready.lease.lease_id:
            raise BadManifest("the prefill worker changed its lease within a prompt")
        if ready.lease.epoch != self._prefill.epoch:
            raise BadManifest(f"the lease is of epoch {ready.lease.epoch}, not {self._prefill.epoch}")
        self._lease = ready.lease
        self._next_page += len(ready.manifest.page_ids)
        if self._next_page > len(self._table.page_ids):
            raise BadManifest(f"the prompt has {len(self._table.page_ids)} pages, not {self._next_page}")
        self._announced.put_nowait(ready)

    async def complete(self, num_pages: int, num_tokens: int) -> None:
        """Finish reading and make the first `num_tokens` tokens of the table count.

        `num_pages` is what the prefill worker says it handed over. Raises the fault that keeps the pages from being
        used, after which nothing is written any more; a lease that had lapsed is a BadManifest.
        """
        try:
            if self._next_page - self._first_page != num_pages:
                raise BadManifest(f"{self._next_page - self._first_page} of {num_pages} pages were announced")
            if self._next_page != self._layout.num_pages(num_tokens):
                raise BadManifest(f"{self._next_page} pages do not hold {num_tokens} tokens")
            self._announced.put_nowait(None)
            await self._reader
            await self._release()
        except BaseException:
            await self.abandon()
            raise
        self._table.num_tokens = num_tokens

    async def _release(self) -> None:
        if self._lease is None:
            return
        valid = await self._puller.release(self._prefill, self._lease)
        self._lease = None
        if not valid:
            raise BadManifest("the lease on the pages had ended before they were read (STALE)")

    async def abandon(self) -> None:
        """Stop reading, wait until nothing is written any more, and have the lease given back. May be called again."""
        while not self._announced.empty():
            self._announced.get_nowait()
        self._announced.put_nowait(None)
        # Cancelling a READ can cost the connection, and with it the READs of others: one that runs may finish.
        _, running = await asyncio.wait([self._reader], timeout=FINISH_S)
        if running:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        if not self._reader.cancelled():
            self._reader.exception()  # known to whoever awaited `complete`, or of no interest any more
        if self._lease is not None:
            self._puller.give_up(self._prefill, self._lease)
            self._lease = None

    async def _read_all(self) -> None:
        source = await self._puller.source(self._prefill)
        while (ready := await self._announced.get()) is not None:
            async with self._puller.renewed(self._prefill, ready.lease):
                await self._puller.read(source, ready.manifest.page_ids, self._local(ready.manifest))

    def _local(self, manifest: kv_pb2.Manifest) -> Sequence[int]:
        return self._table.page_ids[manifest.first_page : manifest.first_page + len(manifest.page_ids)]
