"""DecodeService: generates tokens, behind a prefill of its own or of another worker."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from protos.forebay.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    generation_pb2,
    kv_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
)
from services.decode.handoff import Handoff
from shared import rpc
from shared.blackboard.admission import ASSUMED_OUTPUT_TOKENS
from shared.engine.api import EngineRequest, Failed, PromptLogprobs, TokensSampled
from shared.engine.kv.store import PageTable
from shared.errors import BadManifest, DeadlineExceeded, Fault, Internal, InvalidRequest
from shared.worker import wire
from shared.worker.admission import Stay
from shared.worker.worker import Worker

log = logging.getLogger(__name__)

Source = kv_pb2.WorkerRef | None
Responses = AsyncGenerator[decode_pb2.GenerateResponse, None]
# A deadline that is this near has passed: clocks of two processes do not end it at the same moment.
NO_TIME_S = 0.05
# A rest of a prompt as short as this is computed here: another handoff would cost about as much.
REST_TOKENS = 128
# A first token is this far ahead of the READ of the last pages, which copies in memory for some 10 ms: whoever is to
# pass the token on is woken on the processor of who sent it, and would come behind the READ there.
TOKEN_AHEAD_S = 0.001


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """See protos/forebay/v1/decode.proto."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Generate(self, request: decode_pb2.GenerateRequest, _context: Any) -> Responses:
        """Generate the output of one request; see the protocol."""
        worker = self._worker
        worker.identity.require(request.placement.decode.epoch, request.model)
        with worker.admission.request(request.request_id, *_takes(worker, request)) as stay:
            worker.measures.requests.add(1)
            generation = Generation(worker, request, stay)
            async with aclosing(generation.run()) as responses:
                async for response in responses:
                    yield response


class Generation:
    """One request on its way through this worker."""

    def __init__(self, worker: Worker, request: decode_pb2.GenerateRequest, stay: Stay) -> None:
        self._worker, self._request, self._stay = worker, request, stay
        self._token_ids = (*request.prompt_token_ids, *request.output_token_ids)
        self._usage = generation_pb2.Usage(
            num_prompt_tokens=len(request.prompt_token_ids), num_output_tokens=len(request.output_token_ids)
        )
        self._started = time.monotonic()
        self._emitted = self._over = False
        self._num_cached_here = 0
        self._got_pages = self._started
        self._first: Sequence[int] = ()
        self._drafts: Sequence[int] = ()
        self._num_told = 0
        """Tokens of the prompt whose log-probabilities went out from here."""

    async def run(self) -> Responses:
        """Prefill where the placement says, then decode here."""
        worker, key = self._worker, self._request.hash_key
        hashes, num_pages = worker.pages_for(key, self._token_ids)
        table = await worker.loop.reserve(self._reusable(hashes), num_pages)
        self._got_pages = time.monotonic()
        self._stay.cached(table.num_tokens, table.num_tokens // worker.engine.spec.layout.page_size)
        try:
            if self._request.placement.HasField("prefill"):
                run = self._behind_remote_prefill(hashes, table)
            else:
                await self._pull(hashes, table)
                job = wire.engine_request(self._request, page_hashes=hashes)
                run = self._decode(job, table, is_cached=True)
            async with aclosing(run) as responses:
                async for response in responses:
                    yield response
        finally:
            worker.engine.kv.drop(table)  # empty, unless the engine never took it

    async def _pull(self, hashes: Sequence[bytes], table: PageTable) -> None:
        self._usage.num_cached_local = table.num_tokens
        if self._request.placement.HasField("kv_source"):
            source, request_id = self._request.placement.kv_source, self._request.request_id
            pull = self._worker.puller.pull_prefix(source, request_id, self._reusable(hashes), table)
            self._usage.num_cached_transferred = await pull

    def _reusable(self, hashes: Sequence[bytes]) -> Sequence[bytes]:
        return wire.reusable(self._request, hashes, self._worker.engine.spec.layout.page_size)

    async def _behind_remote_prefill(self, hashes: Sequence[bytes], table: PageTable) -> Responses:
        """The first token goes out as soon as it is known, while the last pages are still being read.

        Whatever goes wrong over there, the rest of the prompt is computed by the second choice or here instead; tokens
        that are out already are kept.
        """
        self._num_cached_here = table.num_tokens
        for prefill, source in self._choices(hashes, table):
            async with aclosing(self._take_over(prefill, source, hashes, table)) as responses:
                async for response in responses:
                    yield response
        if not self._over:
            job = wire.engine_request(
                self._request,
                page_hashes=hashes,
                more_output=self._first,
                drafts=self._drafts,
                more_told=self._num_told,
            )
            async with aclosing(self._decode(job, table)) as responses:
                async for response in responses:
                    yield response

    def _choices(self, hashes: Sequence[bytes], table: PageTable) -> Iterator[tuple[kv_pb2.WorkerRef, Source]]:
        """Who is to compute the prompt, and whom to pull a prefix from: the second choice only if the first one left
        more to do than is worth a handoff. It may pull from here what was kept."""
        placement, layout = self._request.placement, self._worker.engine.spec.layout
        source = placement.kv_source if placement.HasField("kv_source") else None
        yield placement.prefill, source
        num_left = len(self._token_ids) - table.num_tokens
        if self._over or self._first or num_left <= REST_TOKENS or not placement.HasField("second_prefill"):
            return
        if table.num_tokens > self._num_cached_here:
            self._worker.engine.kv.publish(table, 0, hashes[: table.num_tokens // layout.page_size])
            source = placement.decode
        yield placement.second_prefill, source

    async def _take_over(
        self, prefill: kv_pb2.WorkerRef, source: Source, hashes: Sequence[bytes], table: PageTable
    ) -> Responses:
        layout = self._worker.engine.spec.layout
        num_held = table.num_tokens // layout.page_size
        handoff = Handoff(self._worker.puller, layout, prefill, table, num_held)
        try:
            # The handoff ends before the stream does: closing the stream early ends the lease.
            async with aclosing(self._prefill_events(prefill, source, num_held)) as events, handoff:
                finished: prefill_pb2.PrefillFinished | None = None
                async for event in events:
                    if event.HasField("prompt_logprobs"):
                        yield self._tell(event.prompt_logprobs)
                    if (finished := _announce(event, handoff)) is not None:
                        break
                if finished is None:
                    raise BadManifest("the prefill worker ended its stream without a token")
                self._take_usage(finished.usage, source)
                if finished.HasField("tokens"):
                    self._first, self._drafts = finished.tokens.token_ids, finished.draft_token_ids
                    yield self._tokens(finished.tokens)
                if finished.finish_reason:
                    self._over = True
                    yield self._finished(finished.finish_reason, *_stop_token(finished))
                    return
                if finished.HasField("last_pages"):
                    await asyncio.sleep(TOKEN_AHEAD_S)
                    handoff.read(finished.last_pages)
                await handoff.complete(finished.num_pages, len(self._token_ids))
                # Before its turn in a step comes: others with this prompt may be in that step, too.
                self._worker.engine.kv.publish(table, 0, hashes)
        except Fault as fault:
            if _is_ours(fault):
                raise
            self._note_fallback(prefill, fault, handoff.num_kept)

    def _prefill_events(self, prefill: kv_pb2.WorkerRef, source: Source, num_held: int) -> Any:
        stub = self._worker.channels.stub(prefill_pb2_grpc.PrefillServiceStub, prefill.address)
        placement = self._request.placement
        request = prefill_pb2.PrefillRequest(
            request_id=self._request.request_id,
            model=self._request.model,
            prompt_token_ids=self._request.prompt_token_ids,
            output_token_ids=self._request.output_token_ids,
            sampling=self._request.sampling,
            hash_key=self._request.hash_key,
            num_prompt_logprobs_held=wire.num_held(self._request) + self._num_told,
            num_pages_held=num_held,
            epoch=prefill.epoch,
            kv_source=source,
            priority=self._request.priority,
            expected_ms=placement.expected_ms if prefill == placement.prefill else 0.0,
        )
        return rpc.stream(stub.Prefill, request)

    async def _decode(self, job: EngineRequest, table: PageTable, *, is_cached: bool = False) -> Responses:
        """Computing and generating here. What the engine chose while the message before was on its way goes into one.
        `is_cached`: what the engine finds computed was so before this request."""
        async with aclosing(self._worker.loop.bursts(job, table)) as bursts:
            async for events in bursts:
                for event in events:
                    if isinstance(event, PromptLogprobs):
                        yield self._tell(wire.prompt_logprobs(event))
                sampled = [event for event in events if isinstance(event, TokensSampled)]
                drafted = any(event.num_drafts for event in sampled)
                for event in sampled:
                    if is_cached:
                        local = event.num_cached_tokens - self._usage.num_cached_transferred
                        self._usage.num_cached_local = max(0, local)
                    if event.num_drafts:
                        wire.count_drafts(self._usage, event.num_drafts, event.num_accepted)
                if tokens := [token for event in sampled for token in event.tokens]:
                    yield self._tokens(wire.token_chunk(tokens), counts=drafted)
                match events[-1]:
                    case TokensSampled(finish_reason=reason, stop_token=stop) if reason is not None:
                        stop_id = None if stop is None else stop.token_id
                        yield self._finished(wire.finish_reason(reason), stop_id, wire.token_logprobs(stop))
                        return
                    case Failed(fault=fault):
                        raise fault
        raise Internal("the engine ended a sequence without a reason")

    def _tell(self, told: generation_pb2.PromptLogprobs) -> decode_pb2.GenerateResponse:
        """A message with log-probabilities of the prompt; with token counts in the first one."""
        if not self._num_told:
            told.usage.CopyFrom(self._usage)
        self._num_told += len(told.logprobs)
        return decode_pb2.GenerateResponse(prompt_logprobs=told)

    def _tokens(self, chunk: generation_pb2.TokenChunk, *, counts: bool = False) -> decode_pb2.GenerateResponse:
        """A message with tokens; with token counts in the first one, and where they say something new of drafts."""
        measures = self._worker.measures
        measures.output_tokens.add(len(chunk.token_ids))
        self._usage.num_output_tokens += len(chunk.token_ids)
        self._stay.computed()
        if not self._emitted:
            self._emitted = True
            took_s = time.monotonic() - self._started
            measures.first_token.record(took_s)
            if not self._request.placement.HasField("prefill"):
                measures.computed(self._request.placement.expected_ms, took_s * 1000)
            if self._request.output_token_ids:
                self._log_resumed()
            counts = True
        if counts:
            chunk.usage.CopyFrom(self._usage)
        return decode_pb2.GenerateResponse(tokens=chunk)

    def _log_resumed(self) -> None:
        """An output that another worker began goes on here: what its client waits for."""
        said: dict[str, Any] = {
            "choice": self._request.request_id,
            "pages_s": self._got_pages - self._started,
            "first_s": time.monotonic() - self._started,
            "num_tokens": len(self._token_ids),
            "num_cached": _num_cached(self._usage),
        }
        log.info("took over", extra=said)

    def _finished(
        self,
        reason: generation_pb2.FinishReason.ValueType,
        stop_token_id: int | None,
        stop_logprobs: generation_pb2.TokenLogprobs | None,
    ) -> decode_pb2.GenerateResponse:
        usage = self._usage
        self._worker.measures.cached_tokens.add(_num_cached(usage))
        self._worker.measures.finished(usage.num_output_tokens)
        finished = decode_pb2.GenerateFinished(
            reason=reason, usage=usage, stop_token_id=stop_token_id, stop_logprobs=stop_logprobs
        )
        return decode_pb2.GenerateResponse(finished=finished)

    def _take_usage(self, usage: generation_pb2.Usage, source: Source) -> None:
        """What a prefill worker pulled from here was cached only as far as it was here before this request came."""
        pulled = usage.num_cached_transferred
        if source is not None and source.worker_id == self._worker.identity.name:
            pulled = min(pulled, max(0, self._num_cached_here - usage.num_cached_remote))
        self._usage.num_cached_local = 0
        self._usage.num_cached_remote, self._usage.num_cached_transferred = usage.num_cached_remote, pulled

    def _note_fallback(self, prefill: kv_pb2.WorkerRef, fault: Fault, num_kept: int) -> None:
        measures = self._worker.measures
        log.warning(
            "prefill on %s failed: %s %s; %d tokens of it are kept",
            *(prefill.worker_id, fault.reason, fault.message, num_kept),
        )
        measures.prefill_fallbacks.add(1, {"reason": fault.reason})
        measures.kept_tokens.add(num_kept)
        if not self._emitted:
            self._usage.num_cached_local = self._num_cached_here
            self._usage.ClearField("num_cached_remote")
            self._usage.ClearField("num_cached_transferred")


def _announce(event: prefill_pb2.PrefillResponse, handoff: Handoff) -> prefill_pb2.PrefillFinished | None:
    """Pass on what the prefill worker says of pages. Its last message is returned: the end of its stream says nothing
    more. The pages in that message are left for when the token beside them is out."""
    finished = event.finished
    if event.HasField("pages_ready"):
        handoff.announce(event.pages_ready)
    elif finished.HasField("last_pages"):
        handoff.accept(finished.last_pages)
    return finished if event.HasField("finished") else None


def _takes(worker: Worker, request: decode_pb2.GenerateRequest) -> tuple[int, int]:
    """Prompt tokens that are to be computed here, and pages, as the router reserved them."""
    num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
    num_output = min(request.sampling.max_tokens, ASSUMED_OUTPUT_TOKENS)
    num_computed = 0 if request.placement.HasField("prefill") else num_tokens
    return num_computed, worker.engine.spec.layout.num_pages(num_tokens + num_output)


def _num_cached(usage: generation_pb2.Usage) -> int:
    return usage.num_cached_local + usage.num_cached_remote + usage.num_cached_transferred


def _is_ours(fault: Fault) -> bool:
    """Whether the request would fail here for the same reason.

    A call to the prefill worker that took too long is no such reason while the client has time left.
    """
    left = rpc.time_remaining()
    out_of_time = left is not None and left < NO_TIME_S
    return isinstance(fault, InvalidRequest) or (isinstance(fault, DeadlineExceeded) and out_of_time)


def _stop_token(finished: prefill_pb2.PrefillFinished) -> tuple[int | None, generation_pb2.TokenLogprobs | None]:
    return (
        finished.stop_token_id if finished.HasField("stop_token_id") else None,
        finished.stop_logprobs if finished.HasField("stop_logprobs") else None,
    )
