"""What was placed and no report shows yet: remembered here, and told to the other routers, whose prompts go to the same
workers. They are told every few milliseconds of all at once, by messages that may be lost: reports of the workers will
say the same a heartbeat later.

Where no other router listens nobody is told. Who begins to listen says so, and is told from then on; should that have
been missed, a look from time to time finds it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from services.router.candidate import Candidate, Worker
from services.router.fleet import Fleet, Incarnation, Roster
from services.router.page_index import Ints
from services.router.predictions import Predictions, marks
from shared.blackboard.placements import Placement, PlacementBoard
from shared.errors import BlackboardLost
from shared.page_hash import split

log = logging.getLogger(__name__)

# Placements within this time go out together.
GATHER_S = 0.02
RETRY_S = 0.5
# Whether anybody else listens is looked up so often, at most.
ALONE_S = 1.0
LISTEN_S = 10.0
# So many wait to be told at most; those beyond are not told.
MAX_UNTOLD = 1_000
Untold = tuple[Incarnation, Incarnation, float, list[bytes]]
"""What a `Placement` says: made one when others are told, behind the answer to the request."""


class Placements:
    """Belongs to one event loop. Others hear of placements and are heard while `run` runs."""

    def __init__(
        self, fleet: Fleet, board: PlacementBoard, router: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fleet, self._board, self._router, self._clock = fleet, board, router, clock
        self._predictions = Predictions()
        self._untold: list[Untold] = []
        self._any_untold, self._is_heard = asyncio.Event(), asyncio.Event()

    def expected(self, roster: Roster, page_hashes: bytes, num_stored_pages: Ints) -> Ints:
        """Leading pages that each worker will have when its turn comes to compute: what it has, or more."""
        return self._predictions.raise_runs(num_stored_pages, page_hashes, roster.row_of, self._clock())

    def record(self, page_hashes: bytes, chosen: Candidate) -> None:
        """Remember a placement of ours."""
        if chosen.computing is None or chosen.decode is None:
            return
        computing, decode = _incarnation(chosen.computing), _incarnation(chosen.decode)
        placed = computing, decode, chosen.prefill_ms, marks(page_hashes)
        self._note(*placed)
        if len(self._untold) < MAX_UNTOLD:
            self._untold.append(placed)
            self._any_untold.set()

    def hear(self, placed: Placement) -> None:
        """Remember a placement of another router."""
        self._note(placed.computing, placed.decode, placed.prefill_ms, split(bytes.fromhex(placed.marks)))

    def _note(self, computing: Incarnation, decode: Incarnation, prefill_ms: float, marked: list[bytes]) -> None:
        now = self._clock()
        computed_at = self._fleet.note(computing, decode, prefill_ms)
        # Who computes does so in order, and will have the pages when the next prompt's turn comes; who only decodes
        # does not wait for them.
        self._predictions.add(marked, {decode: computed_at, computing: now}, computed_at, now)

    # Between routers --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tell and hear until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell())
            group.create_task(self._listen())

    async def _tell(self) -> None:
        while True:
            await self._any_untold.wait()
            try:
                if is_anybody_there := await self._is_anybody_there():
                    await asyncio.sleep(GATHER_S)
                untold, self._untold = self._untold, []
                self._any_untold.clear()
                if is_anybody_there:
                    await self._say([_as_told(*placed) for placed in untold])
            except BlackboardLost:
                await asyncio.sleep(RETRY_S)

    async def _is_anybody_there(self) -> bool:
        """Whether another router listens, as far as was heard; if not so, as it is in a moment."""
        if not self._is_heard.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(ALONE_S):
                    await self._is_heard.wait()
        if not self._is_heard.is_set():
            await self._say([])
        return self._is_heard.is_set()

    async def _say(self, placed: Sequence[Placement]) -> None:
        self._is_heard.clear()  # who is heard meanwhile sets it
        if await self._board.announce(self._router, placed) > 1:
            self._is_heard.set()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._board.listen(self._router) as heard:
                    await self._say([])
                    while True:
                        if (told := await heard.wait(LISTEN_S)) is None:
                            continue
                        self._is_heard.set()
                        for placed in told:
                            self.hear(placed)
            except ValueError as error:
                log.warning("another router says what cannot be understood: %s", error)
            except BlackboardLost as fault:
                log.warning("other routers are not heard: %s", fault.message)
                await asyncio.sleep(RETRY_S)


def _incarnation(worker: Worker) -> Incarnation:
    return worker.registration.name, worker.registration.epoch


def _as_told(computing: Incarnation, decode: Incarnation, prefill_ms: float, marked: list[bytes]) -> Placement:
    return Placement.model_construct(
        computing=computing, decode=decode, prefill_ms=prefill_ms, marks=b"".join(marked).hex()
    )
