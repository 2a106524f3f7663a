"""PrefillService: computes prompts and hands their pages over, chunk by chunk."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from protos.forebay.v1 import generation_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc
from shared.engine.api import EngineRequest, Failed, PagesComputed, PromptLogprobs, TokensSampled
from shared.engine.kv.store import PageTable
from shared.errors import Fault, Internal
from shared.worker import manifests, wire
from shared.worker.worker import Worker


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """See protos/forebay/v1/prefill.proto.

    A page comes under the lease while the sequence still holds it (the engine holds a prefill-only sequence's pages
    until its iterator is left), so it cannot become somebody else's before the reader's READ.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, _context: Any
    ) -> AsyncGenerator[prefill_pb2.PrefillResponse, None]:
        """Compute a prompt; see the protocol."""
        worker, started = self._worker, time.monotonic()
        worker.identity.require(request.epoch, request.model)
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        with worker.admission.request(
            request.request_id, num_tokens, worker.engine.spec.layout.num_pages(num_tokens)
        ) as stay:
            worker.measures.requests.add(1)
            job, table, usage = await self._reserve(request)
            stay.cached(table.num_tokens, table.num_tokens // worker.engine.spec.layout.page_size)
            with self._lease(request.num_pages_held, table) as handed:
                async with aclosing(self._compute(job, table, handed, usage)) as responses:
                    async for response in responses:
                        if response.HasField("finished"):
                            worker.measures.computed(request.expected_ms, (time.monotonic() - started) * 1000)
                        yield response

    async def _reserve(
        self, request: prefill_pb2.PrefillRequest
    ) -> tuple[EngineRequest, PageTable, generation_pb2.Usage]:
        """Pages for the whole prompt, with what is cached here, or can be pulled from a peer, in them."""
        token_ids = (*request.prompt_token_ids, *request.output_token_ids)
        hashes, num_pages = self._worker.pages_for(request.hash_key, token_ids)
        reusable = wire.reusable(request, hashes, self._worker.engine.spec.layout.page_size)
        table = await self._worker.loop.reserve(reusable, num_pages)
        usage = generation_pb2.Usage(
            num_prompt_tokens=len(request.prompt_token_ids), num_output_tokens=1, num_cached_remote=table.num_tokens
        )
        try:
            if request.HasField("kv_source"):
                pull = self._worker.puller.pull_prefix(request.kv_source, request.request_id, reusable, table)
                usage.num_cached_transferred = await pull
            job = wire.engine_request(request, page_hashes=hashes, prefill_only=True)
        except BaseException:
            self._worker.engine.kv.drop(table)
            raise
        return job, table, usage

    @contextmanager
    def _lease(self, num_pages_held: int, table: PageTable) -> Iterator["_Handover"]:
        """A lease for the pages that the reader lacks, kept alive while inside; ended early if the reader goes away."""
        worker = self._worker
        lease_id = worker.engine.kv.grant()
        handed = _Handover(worker.kv_servicer.lease(lease_id), num_pages_held)
        renewal = asyncio.create_task(self._renew(lease_id))
        try:
            yield handed
        except Fault:
            handed.stays = handed.num_pages > 0  # the reader is there, and may want what it has read so far
            raise
        finally:
            renewal.cancel()
            if handed.stays:
                worker.engine.kv.renew(lease_id)
            else:
                worker.engine.kv.release(lease_id)
            worker.engine.kv.drop(table)  # empty, unless the engine never took it

    async def _renew(self, lease_id: int) -> None:
        """Begins a while after the grant: a young lease needs none, and nobody reads before pages are announced."""
        while True:
            await asyncio.sleep(self._worker.engine.kv.lease_ttl_ms / 3000)
            if not self._worker.engine.kv.renew(lease_id):
                return
            self._worker.kv_servicer.serve()

    async def _compute(
        self, job: EngineRequest, table: PageTable, handed: "_Handover", usage: generation_pb2.Usage
    ) -> AsyncGenerator[prefill_pb2.PrefillResponse, None]:
        """The last pages go with the first token, which would otherwise wait for a message to be written and read.

        Whoever looks for readers is woken when they have been told: it would take the interpreter from the telling.
        """
        async with aclosing(self._worker.loop.bursts(job, table)) as bursts:
            async for events in bursts:
                ready: prefill_pb2.PagesReady | None = None
                for event in events:
                    if ready is not None and not isinstance(event, TokensSampled):
                        yield prefill_pb2.PrefillResponse(pages_ready=ready)
                        self._worker.kv_servicer.serve()
                        ready = None
                    match event:
                        case PromptLogprobs():
                            yield prefill_pb2.PrefillResponse(prompt_logprobs=wire.prompt_logprobs(event))
                        case PagesComputed():
                            ready = await self._ready(handed, event)
                        case TokensSampled():
                            handed.stays = True
                            usage.num_cached_remote = max(0, event.num_cached_tokens - usage.num_cached_transferred)
                            yield prefill_pb2.PrefillResponse(finished=handed.finished(event, usage, ready))
                            self._worker.kv_servicer.serve()
                            return
                        case Failed():
                            raise event.fault
                if ready is not None:
                    yield prefill_pb2.PrefillResponse(pages_ready=ready)
                    self._worker.kv_servicer.serve()
        raise Internal("the engine ended a prompt without a token")

    async def _ready(self, handed: "_Handover", event: PagesComputed) -> prefill_pb2.PagesReady | None:
        """The pages of an event that the reader lacks, under the lease."""
        if ready := handed.ready(self._worker.engine.spec.layout, event):
            self._worker.engine.kv.widen(ready.lease.lease_id, ready.manifest.page_ids)
            await self._worker.kv_servicer.seal(ready.manifest)
        return ready


class _Handover:
    """What has been handed over so far of one prompt, and under which lease."""

    def __init__(self, lease: kv_pb2.Lease, num_pages_held: int) -> None:
        self.stays = False
        self._lease = lease
        self._next_page = self._first_page = num_pages_held

    @property
    def num_pages(self) -> int:
        """Pages handed over."""
        return self._next_page - self._first_page

    def ready(self, layout: Any, event: PagesComputed) -> prefill_pb2.PagesReady | None:
        """The pages of an event that the reader lacks."""
        skipped = max(0, self._next_page - event.first_page)
        page_ids = event.page_ids[skipped:]
        if not page_ids:
            return None
        # A chunk may end within a page that is announced only when it is full, or is the last.
        num_tokens = min(event.num_tokens - self._next_page * layout.page_size, len(page_ids) * layout.page_size)
        manifest = manifests.manifest(layout, self._next_page, page_ids, num_tokens)
        self._next_page += len(page_ids)
        return prefill_pb2.PagesReady(lease=self._lease, manifest=manifest)

    def finished(
        self, event: TokensSampled, usage: generation_pb2.Usage, last_pages: prefill_pb2.PagesReady | None
    ) -> prefill_pb2.PrefillFinished:
        """The last message."""
        message = prefill_pb2.PrefillFinished(
            finish_reason=wire.finish_reason(event.finish_reason),
            num_pages=self.num_pages,
            usage=usage,
            stop_token_id=event.stop_token_id,
            stop_logprobs=wire.token_logprobs(event.stop_token),
            draft_token_ids=event.draft_token_ids,
            last_pages=last_pages,
        )
        if event.tokens:
            message.tokens.CopyFrom(wire.token_chunk(event.tokens))
        return message
