"""The engine: sequences in, events out, one step at a time. What computes is an Executor."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from shared.engine.api import (
    EngineLoad,
    EngineRequest,
    Event,
    Executor,
    Failed,
    PagesComputed,
    SampledToken,
    TokensSampled,
)
from shared.engine.intake import limits, require_runnable
from shared.engine.kv.store import KvStore, PageTable
from shared.engine.meter import Meter
from shared.engine.scheduler import Part, Scheduler
from shared.engine.sequence import Sequence
from shared.errors import Internal, InvalidRequest, WorkerLost

log = logging.getLogger(__name__)

# A request of the next higher priority counts as one that came so much earlier. Ranks are therefore fixed, and nobody,
# however low, waits for ever.
PRIORITY_S = 10.0
MAX_PRIORITY = 100


class Engine:
    """Satisfies `shared.engine.api.Engine`."""

    def __init__(
        self,
        executor: Executor,
        kv: KvStore,
        *,
        max_step_tokens: int,
        max_num_sequences: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = executor.spec
        self.memory = executor.memory
        self.kv = kv
        self._executor = executor
        self._scheduler = Scheduler(kv, max_step_tokens, max_num_sequences)
        self._limits = limits(executor.spec)
        self._meter = Meter()
        self._clock = clock
        self._numbers = count()
        self._load = EngineLoad()
        self._lock = threading.Lock()  # guards what follows; everything else belongs to the engine's thread
        self._known: dict[str, Sequence] = {}
        self._arrived: list[Sequence] = []
        self._cancelled: list[Sequence] = []

    # From any thread --------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest, pages: PageTable | None = None) -> None:
        """Queue a sequence. `pages` pass into its ownership (the caller's table is empty then); their first
        `pages.num_tokens` tokens are already computed. Raises InvalidRequest or ContextTooLong, and then leaves `pages`
        with the caller."""
        require_runnable(request, self.spec)
        priority = max(-MAX_PRIORITY, min(request.priority, MAX_PRIORITY))
        rank = (self._clock() - priority * PRIORITY_S, next(self._numbers))
        sequence = Sequence(request, self._limits, rank, PageTable())
        with self._lock:
            if request.request_id in self._known:
                raise InvalidRequest(f"request {request.request_id!r} is running already", param="request_id")
            self._known[request.request_id] = sequence
            self._arrived.append(sequence)
            if pages is not None:
                sequence.table = pages.move()

    def cancel(self, request_id: str) -> None:
        """End a sequence and free its pages, after the step that may be writing to them; no event follows. Unknown ids
        are ignored."""
        with self._lock:
            sequence = self._known.get(request_id)
            if sequence is not None and not sequence.cancelled:
                sequence.cancelled = True
                self._cancelled.append(sequence)

    def load(self) -> EngineLoad:
        """Facts as of the last step, and what has arrived since."""
        with self._lock:
            load, arrived = self._load, list(self._arrived)
        return replace(
            load,
            num_waiting=load.num_waiting + len(arrived),
            num_queued_tokens=load.num_queued_tokens + sum(each.num_uncomputed for each in arrived),
        )

    def is_short(self) -> bool:
        """Whether a sequence of this engine waits for pages."""
        return self._scheduler.is_short

    # From the engine's thread -----------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        with self._lock:
            news = bool(self._arrived or self._cancelled)
        return news or self._scheduler.has_work()

    def step(self) -> list[Event]:
        """Schedule, forward, absorb, emit."""
        self._admit()
        events: list[Event] = []
        if parts := self._scheduler.schedule():
            try:
                chosen = self._forward(parts)
            except WorkerLost:
                raise
            except Exception as error:
                events = self._fail(parts, error)
            else:
                for part, token in zip(parts, chosen, strict=True):
                    events += self._absorb(part, token)
        self._note_load()
        return events

    def _admit(self) -> None:
        """Take in what other threads left: new sequences, and the wish to end some."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
        for sequence in arrived:
            self._scheduler.add(sequence)
        for sequence in cancelled:
            self._retire(sequence)

    def _forward(self, parts: list[Part]) -> list[SampledToken | None]:
        started = self._clock()
        chosen = self._executor.forward([part.sequence.part(part.start, part.num_tokens) for part in parts])
        if len(chosen) != len(parts):
            raise Internal(f"the executor answered {len(chosen)} of {len(parts)} sequences")
        self._meter.record(parts, (self._clock() - started) * 1000)
        return chosen

    def _absorb(self, part: Part, token: SampledToken | None) -> list[Event]:
        """Note what a part computed, and say what came of it."""
        sequence, events = part.sequence, list[Event]()
        if sequence.cancelled:
            return events
        sequence.table.num_tokens = part.start + part.num_tokens
        first_page, page_hashes = sequence.unpublished()
        if page_hashes:
            self.kv.publish(sequence.table, first_page, page_hashes)
        if sequence.request.prefill_only:
            first_page, page_ids = sequence.unannounced()
            if page_ids:
                events.append(
                    PagesComputed(sequence.request.request_id, first_page, tuple(page_ids), sequence.num_computed)
                )
        if token is not None:
            events.append(self._emit(sequence, [token]))
        return events

    def _emit(self, sequence: Sequence, chosen: list[SampledToken]) -> TokensSampled:
        tokens, ending = sequence.append(chosen)
        if ending or sequence.request.prefill_only:
            self._finish(sequence)
        return TokensSampled(
            request_id=sequence.request.request_id,
            tokens=tuple(tokens),
            finish_reason=ending.reason if ending else None,
            stop_token_id=ending.stop_token_id if ending else None,
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def _fail(self, parts: list[Part], error: Exception) -> list[Event]:
        """A step broke: its sequences cannot go on, the engine can."""
        log.error("a step of %d sequences failed", len(parts), exc_info=error)
        fault = Internal(f"the step that computed this request failed: {type(error).__name__}: {error}")
        failed = [part.sequence for part in parts if not part.sequence.cancelled]
        for sequence in failed:
            self._retire(sequence)
        return [Failed(sequence.request.request_id, fault) for sequence in failed]

    def _finish(self, sequence: Sequence) -> None:
        """Pages of a prefill-only sequence stay held until it is cancelled: whoever asked for them needs time to lease
        them."""
        if sequence.request.prefill_only:
            self._scheduler.remove(sequence)
        else:
            self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self.kv.drop(sequence.table)
        with self._lock:
            self._known.pop(sequence.request.request_id, None)

    def _note_load(self) -> None:
        running, waiting = self._scheduler.running, self._scheduler.waiting
        load = EngineLoad(
            num_running=len(running),
            num_waiting=len(waiting),
            num_queued_tokens=sum(each.num_uncomputed for each in (*running, *waiting) if each.num_uncomputed > 1),
            prefill_ms_per_token=self._meter.prefill_ms_per_token,
            decode_step_ms=self._meter.decode_step_ms,
            num_steps=self._meter.num_steps,
            num_preemptions=self._scheduler.num_preemptions,
        )
        with self._lock:
            self._load = load
