"""The engine: sequences in, events out, one step at a time. What computes is an Executor."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from shared.engine.api import (
    BatchItem,
    Chosen,
    DraftCounts,
    EngineLoad,
    EngineRequest,
    Event,
    Executor,
    Failed,
    PagesComputed,
    PromptLogprobs,
    TokensSampled,
)
from shared.engine.flight import Flight, Landed
from shared.engine.grammars import Grammars, Matcher
from shared.engine.intake import limits, require_runnable
from shared.engine.kv.store import KvStore, PageTable
from shared.engine.meter import Meter
from shared.engine.scheduler import Part, Scheduler
from shared.engine.sequence import Ending, Sequence
from shared.engine.speculation.speculator import Speculation, Speculator
from shared.errors import Fault, Internal, InvalidRequest, Unsupported

log = logging.getLogger(__name__)

# A request of the next higher priority counts as one that came so much earlier; one that is resumed, too. Ranks are
# therefore fixed, and nobody, however low, waits for ever.
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
        speculation: Speculation | None = None,
        meter: Meter | None = None,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A `meter` has rates that were measured before. Without `grammars` no output can be held to one."""
        self.spec = executor.spec
        self.memory = executor.memory
        self.kv = kv
        speculation = speculation or Speculation()
        ridge = executor.spec.ridge_tokens
        self._scheduler = Scheduler(kv, max_step_tokens, max_num_sequences, speculation.num_ahead, ridge)
        self._limits = limits(executor.spec)
        self._meter = meter or Meter()
        self._grammars = grammars
        self._speculator = Speculator(speculation, self._meter)
        self._clock = clock
        drafts_here = executor.proposes and speculation.make_proposer is None
        self._flight = Flight(executor, kv, clock, drafts_here=drafts_here)
        self._numbers = count()
        self._load = self._measured()
        self._draft_counts = DraftCounts()
        self._lock = threading.Lock()  # guards what follows; everything else belongs to the engine's thread
        self._known: dict[str, Sequence] = {}
        self._arrived: list[Sequence] = []
        self._cancelled: list[Sequence] = []

    # From any thread --------------------------------------------------------------------------------------------------

    def prepare(self, request: EngineRequest) -> None:
        """Have the request's grammar compiled. Raises InvalidRequest, Unsupported."""
        if (grammar := request.sampling.grammar) is not None:
            self._required_grammars().compile(grammar)

    def submit(self, request: EngineRequest, pages: PageTable | None = None) -> None:
        """Queue a sequence. `pages` pass into its ownership (the caller's table is empty then); their first
        `pages.num_tokens` tokens are already computed. Raises InvalidRequest, ContextTooLong or Unsupported, and then
        leaves `pages` with the caller."""
        require_runnable(request, self.spec)
        matcher = self._matcher(request)
        priority = max(-MAX_PRIORITY, min(request.priority, MAX_PRIORITY)) + request.resumed
        rank = (self._clock() - priority * PRIORITY_S, next(self._numbers))
        sequence = Sequence(request, self._limits, rank, PageTable(), matcher=matcher)
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

    def draft_counts(self) -> DraftCounts:
        """How drafts have fared, as of the last step."""
        with self._lock:
            return self._draft_counts

    @property
    def num_running(self) -> int:
        """As of the last step."""
        return self._load.num_running

    def is_short(self) -> bool:
        """Whether a sequence of this engine waits for pages."""
        return self._scheduler.is_short

    def _matcher(self, request: EngineRequest) -> Matcher | None:
        grammar = request.sampling.grammar
        return None if grammar is None else self._required_grammars().begin(grammar, request.output_token_ids)

    def _required_grammars(self) -> Grammars:
        if self._grammars is None:
            raise Unsupported(f"outputs of {self.spec.model} cannot be held to a grammar", param="response_format")
        return self._grammars

    # From the engine's thread -----------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        with self._lock:
            news = bool(self._arrived or self._cancelled)
        return news or len(self._flight) > 0 or self._scheduler.has_work()

    def step(self) -> list[Event]:
        """Schedule, launch, absorb, emit. What is absorbed may be the step before: see `flight`."""
        self._admit()
        events: list[Event] = []
        if planned := self._plan():
            self._flight.launch(*planned)
        while self._flight.is_due(planned=planned is not None):
            events += self._land(self._flight.land())
        self._note_load()
        return events

    def _admit(self) -> None:
        """Take in what other threads left: new sequences, and the wish to end some."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
        for sequence in arrived:
            self._speculator.begin(sequence)
            self._scheduler.add(sequence)
        for sequence in cancelled:
            self._retire(sequence)

    def _plan(self) -> tuple[list[Part], list[BatchItem]] | None:
        """The next step, if there is one to be launched now. What needs the host is planned anew when the flight has
        landed."""
        parts = self._scheduler.schedule(ahead=len(self._flight) > 0)
        items = self._items(parts)
        return (parts, items) if parts and self._flight.takes(items) else None

    def _items(self, parts: list[Part]) -> list[BatchItem]:
        num_generating, items = sum(part.is_last for part in parts), []
        for part in parts:
            drafts = part.is_last and not self._scheduler.is_pressed
            num_wanted = self._speculator.num_wanted(part.sequence, num_generating) if drafts else 0
            items.append(part.sequence.part(part.start, part.num_tokens, part.num_drafts, num_wanted))
        return items

    def _land(self, landed: Landed) -> list[Event]:
        if landed.error is not None:
            return self._fail(landed.parts, landed.error)
        num_chosen = sum(len(choice.tokens) for choice in landed.chosen if choice is not None)
        self._meter.record(landed.parts, num_chosen, landed.elapsed_ms, self._clock())
        events: list[Event] = []
        for part, item, choice in zip(landed.parts, landed.items, landed.chosen, strict=True):
            if not (part.sequence.cancelled or part.sequence.ended):
                events += self._absorb(part, item, choice)
        return events

    def _absorb(self, part: Part, item: BatchItem, chosen: Chosen | None) -> list[Event]:
        """Note what a part computed, and say what came of it."""
        sequence, events = part.sequence, list[Event]()
        num_computed = len(sequence.tokens) if item.sample else part.end  # known now, if it was in doubt when planned
        if chosen is not None and chosen.prompt_logprobs:
            events.append(self._tell(sequence, item, chosen))
        if sequence.request.prefill_only:
            first_page, page_ids = sequence.unannounced(num_computed)
            if page_ids:
                events.append(PagesComputed(sequence.request.request_id, first_page, tuple(page_ids), num_computed))
        sampled, ending = None, None
        if item.sample and chosen is not None:
            sampled, ending = self._take(sequence, item, chosen)
            num_computed += min(sampled.num_accepted, len(sampled.tokens))
            if sequence.matcher is not None and sequence.matcher.error:
                return [*events, self._fail_one(sequence, _lost_its_way(sequence.matcher))]
            events.append(sampled)
        first_page, page_hashes = sequence.unpublished(num_computed)
        if page_hashes:
            self.kv.publish(sequence.table, first_page, page_hashes)
        if ending or (sampled and sequence.request.prefill_only):
            self._finish(sequence)
        return events

    def _tell(self, sequence: Sequence, item: BatchItem, chosen: Chosen) -> PromptLogprobs:
        first, sequence.num_told = item.logprob_rows.start + 1, item.logprob_rows.stop + 1
        return PromptLogprobs(sequence.request.request_id, first, chosen.prompt_logprobs)

    def _take(self, sequence: Sequence, item: BatchItem, chosen: Chosen) -> tuple[TokensSampled, Ending | None]:
        """Put chosen tokens into their sequence. Those that were drafts are computed already."""
        num_accepted = len(chosen.tokens) - 1
        tokens, ending = sequence.append(chosen.tokens)
        sequence.table.num_tokens += min(num_accepted, len(tokens))
        self._speculator.absorb(sequence, item.num_drafts, chosen, item.num_wanted)
        event = TokensSampled(
            request_id=sequence.request.request_id,
            tokens=tuple(tokens),
            finish_reason=ending.reason if ending else None,
            stop_token=ending.stop_token if ending else None,
            num_cached_tokens=sequence.num_cached_tokens,
            num_drafts=item.num_drafts,
            num_accepted=num_accepted,
            draft_token_ids=tuple(sequence.drafts) if sequence.request.prefill_only else (),
        )
        return event, ending

    def _fail(self, parts: list[Part], error: Exception) -> list[Event]:
        """A step broke: its sequences cannot go on, the engine can."""
        log.error("a step of %d sequences failed", len(parts), exc_info=error)
        fault = Internal(f"the step that computed this request failed: {type(error).__name__}: {error}")
        failed = [part.sequence for part in parts if not (part.sequence.cancelled or part.sequence.ended)]
        return [self._fail_one(sequence, fault) for sequence in failed]

    def _fail_one(self, sequence: Sequence, fault: Fault) -> Failed:
        self._retire(sequence)
        return Failed(sequence.request.request_id, fault)

    def _finish(self, sequence: Sequence) -> None:
        """Pages of a prefill-only sequence stay held until it is cancelled: whoever asked for them needs time to lease
        them."""
        if sequence.request.prefill_only:
            self._scheduler.remove(sequence)
        else:
            self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._flight.drop(sequence)
        sequence.ended = True
        with self._lock:
            self._known.pop(sequence.request.request_id, None)

    def _note_load(self) -> None:
        running, waiting = self._scheduler.running, self._scheduler.waiting
        num_queued_tokens = sum(num for each in (*running, *waiting) if (num := each.num_uncomputed) > 1)
        load = self._measured(len(running), len(waiting), num_queued_tokens)
        with self._lock:
            self._load, self._draft_counts = load, self._speculator.counts()

    def _measured(self, num_running: int = 0, num_waiting: int = 0, num_queued_tokens: int = 0) -> EngineLoad:
        """So much is to be done, and what the meter says."""
        return EngineLoad(
            num_running=num_running,
            num_waiting=num_waiting,
            num_queued_tokens=num_queued_tokens,
            num_preemptions=self._scheduler.num_preemptions,
            prefill_ms_per_token=self._meter.prefill_ms_per_token,
            prefill_ms_per_pair=self._meter.prefill_ms_per_pair,
            num_prompt_tokens=self._meter.prompts.num_tokens,
            prompts_measured_at_s=self._meter.prompts.measured_at_s,
            prompts_steady_s=self._meter.prompts.steady_s,
            decode_step_ms=self._meter.decode_step_ms,
            decode_ms_per_sequence=self._meter.draft_ms,
            num_steps=self._meter.num_steps,
        )


def _lost_its_way(matcher: Matcher) -> Fault:
    return InvalidRequest(f"the output cannot be held to its grammar: {matcher.error}", param="response_format")
