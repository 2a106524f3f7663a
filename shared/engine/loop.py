"""An engine in a thread of its own, for asyncio code.

All methods belong to the event loop that called `start`. The two sides meet in three places only: the thread-safe
methods of the engine, an event that wakes the thread, and one `call_soon_threadsafe` per step with all its events.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count

from shared.engine.api import Engine, EngineRequest, Event, Failed, TokensSampled
from shared.engine.kv.store import PageTable
from shared.engine.wake import Wake
from shared.errors import ContextTooLong, Draining, Fault, Internal, WorkerLost

log = logging.getLogger(__name__)

# Looks at a step before it has stood still for too long. They are counted, and not the time between them: a process
# that was stopped as a whole looks no more than it steps.
NUM_LOOKS = 8
STOP_LOOK_S = 0.1


@dataclass(slots=True, eq=False)
class Waiter:
    """Somebody who waits for pages."""

    page_hashes: Sequence[bytes]
    num_pages: int
    pages: asyncio.Future[PageTable]


class EngineLoop:
    """Steps the engine while there is work, and sleeps while there is none.

    Should the engine die, everybody who waits for it gets a fault, later calls too, and `on_death` is told. So it is if
    a step takes longer than `patience_s`: what holds the thread up then, a driver for one, lets nobody end it.
    """

    def __init__(
        self, engine: Engine, on_death: Callable[[Fault], None] | None = None, patience_s: float | None = None
    ) -> None:
        self.engine = engine
        self._on_death, self._patience_s = on_death, patience_s
        self._watching: asyncio.Task[None] | None = None
        self._at_hand: object | None = None
        """Stands for the step that is being computed; each has one of its own."""
        self._stands_still = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._wake = Wake()
        self._stopping = False
        self._fault: Fault | None = None
        self._streams: dict[str, _Events] = {}
        self._waiters: deque[Waiter] = deque()
        self._numbers = count(1)
        self.on_pages_freed: Callable[[], None] = lambda: None
        """Called in the event loop when pages were freed."""

    def start(self) -> None:
        """Begin to step."""
        self._loop = asyncio.get_running_loop()
        self.engine.kv.on_capacity = self._on_capacity
        self._thread.start()
        if self._patience_s is not None:
            self._watching = asyncio.create_task(self._watch(self._patience_s))

    async def stop(self) -> None:
        """End after the step at hand, if that ends. Streams and waiters that are left get Draining."""
        self._stopping = True
        self._wake.set()
        while self._thread.is_alive() and not self._stands_still:
            await asyncio.to_thread(self._thread.join, STOP_LOOK_S)
        if self._watching is not None:
            self._watching.cancel()
        self.engine.kv.on_capacity = None
        self._end(Draining("the engine was stopped"))

    async def reserve(self, page_hashes: Sequence[bytes], num_pages: int) -> PageTable:
        """As `KvStore.reserve`, but wait for room: first come, first served, and behind the sequences that have begun.

        The caller's deadline is the limit of the wait. Raises ContextTooLong for more pages than there are.
        """
        self._require_alive()
        if num_pages > self.engine.kv.num_pages:
            raise ContextTooLong(f"{num_pages} pages do not fit a pool of {self.engine.kv.num_pages}", param="prompt")
        waiter = Waiter(page_hashes, num_pages, self._loop.create_future())
        self._waiters.append(waiter)
        self._serve()
        try:
            return await waiter.pages
        except asyncio.CancelledError:
            if waiter.pages.done() and not waiter.pages.cancelled() and not waiter.pages.exception():
                self.engine.kv.drop(waiter.pages.result())
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._serve()

    async def generate(self, request: EngineRequest, pages: PageTable | None = None) -> AsyncGenerator[Event, None]:
        """Events of one sequence, to the last one; leaving early cancels it. `pages` are as in `Engine.submit`.

        Raises the fault of a sequence that failed, and what `bursts` raises.
        """
        async with aclosing(self.bursts(request, pages)) as bursts:
            async for events in bursts:
                for event in events:
                    if isinstance(event, Failed):
                        raise event.fault
                    yield event

    async def bursts(self, request: EngineRequest, pages: PageTable | None = None) -> AsyncGenerator[list[Event], None]:
        """As `generate`, but all events at once that have come since the last time: one, unless the caller is slower
        than the engine. The last event may be Failed.

        The engine knows each call under a name of its own, which the events carry: a request may come again while its
        first try is still being cleared away. Pages of a prefill-only sequence stay held until the iterator is left.
        Raises InvalidRequest or ContextTooLong at once, and `pages` stay with the caller then.
        """
        self._require_alive()
        request = replace(request, request_id=f"{request.request_id}#{next(self._numbers)}")
        stream = self._streams[request.request_id] = _Events()
        try:
            if request.sampling.grammar is not None:
                await asyncio.to_thread(self.engine.prepare, request)
            self.engine.submit(request, pages)
            self._wake.set()
            while True:
                events = await stream.take()
                yield events
                if any(_is_last(event, request) for event in events):
                    return
        finally:
            del self._streams[request.request_id]
            self.engine.cancel(request.request_id)
            self._wake.set()

    # In the engine's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                if self.engine.has_work():
                    self._post(self._step())
                # Whoever lacks pages that a lease has, lacks them no longer than that.
                elif not self._wake.wait(self.engine.kv.next_lease_end_s()):
                    self.engine.kv.expire()
        except BaseException as error:
            log.critical("the engine died", exc_info=error)
            internal = Internal(f"the engine died: {type(error).__name__}: {error}")
            fault = error if isinstance(error, Fault) else internal
            self._call(lambda: self._die(fault))

    def _step(self) -> list[Event]:
        self._at_hand = object()
        try:
            return self.engine.step()
        finally:
            self._at_hand = None

    def _post(self, events: list[Event]) -> None:
        if events or self._waiters:
            self._call(lambda: self._deliver(events))

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            self._stopping = True  # the event loop is closed: nobody listens any more

    # In the event loop ------------------------------------------------------------------------------------------------

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if stream := self._streams.get(event.request_id):
                stream.put(event)
        self._serve()

    def _on_capacity(self) -> None:
        """From any thread: pages were freed."""
        self._wake.set()
        self._call(self._on_freed)

    def _on_freed(self) -> None:
        self._serve()
        self.on_pages_freed()

    def _serve(self) -> None:
        """Give pages to those who wait, in order, as far as they go."""
        while self._waiters and not self.engine.is_short():
            first = self._waiters[0]
            if first.pages.done():  # cancelled, and about to leave by itself
                self._waiters.popleft()
                continue
            pages = self.engine.kv.reserve(first.page_hashes, first.num_pages, self.engine.num_running)
            if pages is None:
                break
            self._waiters.popleft()
            first.pages.set_result(pages)
        if self._waiters:
            self._wake.set()  # the thread works out anew when the next lease ends

    async def _watch(self, patience_s: float) -> None:
        seen, num_looks = None, 0
        while num_looks < NUM_LOOKS:
            await asyncio.sleep(patience_s / NUM_LOOKS)
            at_hand = self._at_hand
            num_looks = num_looks + 1 if at_hand is not None and at_hand is seen else 0
            seen = at_hand
        self._stands_still = self._stopping = True
        self._die(WorkerLost(f"the engine stands still: a step took longer than {patience_s:g} s"))

    def _die(self, fault: Fault) -> None:
        self._end(fault)
        if self._on_death is not None:
            self._on_death(fault)

    def _end(self, fault: Fault) -> None:
        self._fault = self._fault or fault
        for request_id, stream in self._streams.items():
            stream.put(Failed(request_id, self._fault))
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.pages.done():
                waiter.pages.set_exception(self._fault)

    def _require_alive(self) -> None:
        if self._fault is not None:
            raise self._fault


class _Events:
    """Those of one sequence, on their way to whoever takes them."""

    def __init__(self) -> None:
        self._came: list[Event] = []
        self._news: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """One more came."""
        self._came.append(event)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    async def take(self) -> list[Event]:
        """All that have come since the last time; at least one."""
        while not self._came:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        came, self._came = self._came, []
        return came


def _is_last(event: Event, request: EngineRequest) -> bool:
    match event:
        case TokensSampled():
            return event.finish_reason is not None or request.prefill_only
        case Failed():
            return True
    return False
