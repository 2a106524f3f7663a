"""The fleet: an in-memory view of all workers, refreshed by heartbeats and at once when one comes, goes or drains.

Redis may be away: the last view is used then, and for one registration lifetime after it is back, because workers need
a moment to register again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from services.router.candidate import Weights, Worker
from services.router.page_index import Ints
from services.router.table import Facts, Table, calibration
from shared.blackboard.board import Blackboard
from shared.blackboard.records import ModelCard, Registration, Role
from shared.errors import BlackboardLost

log = logging.getLogger(__name__)

Incarnation = tuple[str, int]
"""Name and epoch of a worker."""

# A placed sequence counts as running until the worker reports that it came; no longer than this many heartbeats.
UNREPORTED_HEARTBEATS = 2
# A report may be so old: a worker writes once in a heartbeat, and the router reads as often.
FRESH_HEARTBEATS = 2


@dataclass(slots=True)
class Member:
    """One incarnation of a worker. `busy_until` is a virtual clock: when, as far as reports and placements tell, its
    queued prompts will be computed. Placing a prompt moves it on, time catches up with it, and a report of a longer
    queue moves it further; so a burst does not herd before load reports arrive, and nothing has to be taken back.

    `num_unreported` sequences were placed and are in no report yet; of `num_arrived` more the time is not up, but a
    report says that they came. Nothing is placed on one that is `doubted`."""

    registration: Registration
    card: ModelCard
    reported_at: float
    busy_until: float = 0.0
    num_unreported: int = 0
    num_arrived: int = 0
    last_placed: int = 0
    doubted: bool = False


class Roster:
    """The workers of one model between two reports, and as arrays what changes meanwhile."""

    def __init__(self, members: Sequence[Member], weights: Weights) -> None:
        self.incarnations = [(member.registration.name, member.registration.epoch) for member in members]
        self.facts = Facts([Worker(member.registration, member.card) for member in members], weights)
        self.row_of = {incarnation: row for row, incarnation in enumerate(self.incarnations)}
        self.reported_at = np.array([member.reported_at for member in members])
        self.oldest_report = min((member.reported_at for member in members), default=0.0)
        self.busy_until_ms = np.array([1000 * member.busy_until for member in members])
        self.last_placed = np.array([member.last_placed for member in members], np.int64)
        loads = [member.registration.load for member in members]
        running = [max(load.num_inside, load.num_running + load.num_waiting) for load in loads]
        unreported = [member.num_unreported for member in members]
        self.num_decoding = np.array(running, np.float64) + np.array(unreported, np.float64)
        self.beside_ms = self.facts.beside_ms(self.num_decoding)

    def changed(self, member: Member, num_decoding: int) -> None:
        """A member's clock and order have changed, and it has so many sequences more."""
        if (row := self.row_of.get((member.registration.name, member.registration.epoch))) is None:
            return  # it is doubted
        self.busy_until_ms[row], self.last_placed[row] = 1000 * member.busy_until, member.last_placed
        if num_decoding:
            self.num_decoding[row] += num_decoding
            self.beside_ms[row] = min(self.num_decoding.item(row), 1.0) * self.facts.shared_ms.item(row)


class Fleet:
    """Everything the router knows of workers. Belongs to one event loop; only `run` waits."""

    def __init__(
        self,
        board: Blackboard,
        weights: Weights,
        *,
        heartbeat_ms: int,
        ttl_ms: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._weights, self._clock = board, weights, clock
        self._heartbeat_s, self._ttl_s = heartbeat_ms / 1000, ttl_ms / 1000
        self._members: dict[tuple[Role, str], Member] = {}
        self._incarnations: dict[Incarnation, Member] = {}
        self._rosters: dict[str, Roster] = {}
        self._num_placed = 0
        self._unreported: deque[tuple[float, Member]] = deque()
        self._models: set[str] = set()
        self._keep_missing_until = 0.0
        self._changed = asyncio.Event()
        self.is_known = False
        """Whether the blackboard was ever read."""
        self.is_current = False
        """Whether the blackboard could be read last time."""

    async def run(self) -> None:
        """Keep the view up to date until cancelled."""
        while True:
            try:
                async with self._board.changes() as changes:
                    while True:
                        self.observe(await self._board.processes(Role.PREFILL, Role.DECODE))
                        await changes.wait(self._heartbeat_s)
            except BlackboardLost as fault:
                self.lose(fault.message)
                await asyncio.sleep(self._heartbeat_s)

    def lose(self, why: str) -> None:
        """The blackboard cannot be read: keep the view."""
        if self.is_current or not self.is_known:
            log.warning("the fleet is not refreshed: %s", why)
        self.is_current = False

    def observe(self, registrations: Iterable[Registration]) -> None:
        """Make the view equal to what the blackboard lists."""
        now = self._clock()
        was_known = self.is_known
        if was_known and not self.is_current:
            self._keep_missing_until = now + self._ttl_s
        self.is_known = self.is_current = True
        members = {(r.role, r.name): self._member(r, r.card, now) for r in registrations if r.card is not None}
        if now < self._keep_missing_until:
            members = self._members | members
        self._log_changes(members)
        changed = not was_known or _available(members) != _available(self._members)
        asked_for, self._members, self._rosters = self._rosters.keys(), members, {}
        self._incarnations = {(one.registration.name, one.registration.epoch): one for one in members.values()}
        for model in asked_for & {member.card.model for member in members.values()}:
            self.roster(model)  # here, lest the next request waits for it
        self._models |= {member.card.model for member in members.values()}
        if changed:
            self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def next_change(self) -> asyncio.Event:
        """Set when workers come, go, begin to drain or are trusted again; each such change has its own."""
        return self._changed

    async def changed(self, timeout_s: float) -> None:
        """Wait until workers come, go, begin to drain or are trusted again, or for the time given."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _member(self, registration: Registration, card: ModelCard, now: float) -> Member:
        load = registration.load
        reported = now + load.num_queued_tokens * self._token_ms(registration) / 1000
        old = self._members.get((registration.role, registration.name))
        if old is None or old.registration.epoch != registration.epoch:
            return Member(registration, card, now, reported)
        reported_at = old.reported_at if old.registration.num_beats == registration.num_beats > 0 else now
        num_arrived = min(old.num_unreported, load.num_requests - old.registration.load.num_requests)
        if num_arrived > 0:
            old.num_unreported -= num_arrived
            old.num_arrived += num_arrived
        if old.registration.load == load:
            reported = 0.0  # nothing new: do not start its queue over again
        busy_until = max(old.busy_until, reported)
        old.registration, old.card, old.reported_at, old.busy_until = registration, card, reported_at, busy_until
        return old

    def _token_ms(self, registration: Registration) -> float:
        """What a token of a queued prompt takes, in steps that it shares if anybody generates there."""
        load, weights = registration.load, self._weights
        rate = load.prefill_ms_per_token or weights.default_prefill_ms_per_token
        if registration.role is Role.DECODE and load.num_running > 1:
            rate += (load.decode_step_ms or weights.default_decode_step_ms) / weights.chunk_tokens
        return rate * calibration(load)

    def _log_changes(self, members: dict[tuple[Role, str], Member]) -> None:
        before = {(key, member.registration.epoch) for key, member in self._members.items()}
        after = {(key, member.registration.epoch) for key, member in members.items()}
        for (role, name), epoch in sorted(after - before):
            log.info("%s worker %s, epoch %d, joined the fleet", role, name, epoch)
        for (role, name), epoch in sorted(before - after):
            log.info("%s worker %s, epoch %d, left the fleet", role, name, epoch)

    def incarnations(self) -> list[Incarnation]:
        """Name and epoch of every worker."""
        return list(self._incarnations)

    def address(self, worker: Incarnation) -> str | None:
        """host:port of a worker's gRPC server; None if it has gone."""
        member = self._incarnations.get(worker)
        return member.registration.address if member else None

    def doubt(self, worker: Incarnation) -> bool:
        """Place nothing on a worker until it is trusted again; False if it has gone or is doubted already."""
        return self._believe(worker, doubted=True)

    def trust(self, worker: Incarnation) -> bool:
        """Place requests on a worker again; False if it has gone or was not doubted."""
        return self._believe(worker, doubted=False)

    def _believe(self, worker: Incarnation, *, doubted: bool) -> bool:
        member = self._incarnations.get(worker)
        if member is None or member.doubted is doubted:
            return False
        member.doubted = doubted
        self._rosters.pop(member.card.model, None)
        self._announce()
        return True

    def knows(self, model: str) -> bool:
        """Whether any worker ever served this model; nobody can tell before the first worker came."""
        return model in self._models or not self._models

    def members(self, model: str) -> list[Member]:
        """Workers of a model that may be asked, by role and name."""
        members = (member for _, member in sorted(self._members.items()) if not member.doubted)
        return [member for member in members if member.card.model == model]

    def roster(self, model: str) -> Roster:
        """Workers of a model, by role and name, with what they last reported."""
        if (roster := self._rosters.get(model)) is None:
            roster = self._rosters[model] = Roster(self.members(model), self._weights)
        return roster

    def table(self, roster: Roster, num_stored_pages: Ints, num_expected_pages: Ints | None = None) -> Table:
        """What the policy may know of a roster at this moment. Leading pages that its workers have, and will have when
        their turn comes, in the same order."""
        now = self._clock()
        while self._unreported and self._unreported[0][0] <= now:
            member = self._unreported.popleft()[1]
            if member.num_arrived:
                member.num_arrived -= 1
            elif member.num_unreported:
                self._changes(member, -1)
        fresh_since = now - FRESH_HEARTBEATS * self._heartbeat_s
        stale_ms, queue_ms = roster.facts.zeros, roster.busy_until_ms - 1000 * now
        if roster.oldest_report < fresh_since:
            stale_ms = np.maximum(0.0, 1000 * (fresh_since - roster.reported_at))
        return Table(
            roster.facts,
            num_stored_pages if num_expected_pages is None else num_expected_pages,
            num_stored_pages,
            queue_ms=np.maximum(queue_ms, 0.0, out=queue_ms),
            num_decoding=roster.num_decoding,
            beside_ms=roster.beside_ms,
            stale_ms=stale_ms,
            last_placed=roster.last_placed,
        )

    def note(self, computing: Incarnation, decode: Incarnation, prefill_ms: float) -> float:
        """Remember a placement that no report shows yet; when its prompt will be computed."""
        now = self._clock()
        computed_at = now + prefill_ms / 1000
        self._num_placed += 1
        if member := self._incarnations.get(computing):
            computed_at = member.busy_until = max(now, member.busy_until) + prefill_ms / 1000
            member.last_placed = self._num_placed
            self._changes(member, 0)
        if member := self._incarnations.get(decode):
            self._unreported.append((now + UNREPORTED_HEARTBEATS * self._heartbeat_s, member))
            member.last_placed = self._num_placed
            self._changes(member, 1)
        return computed_at

    def _changes(self, member: Member, num_decoding: int) -> None:
        member.num_unreported += num_decoding
        incarnation = member.registration.name, member.registration.epoch
        if self._incarnations.get(incarnation) is member and (roster := self._rosters.get(member.card.model)):
            roster.changed(member, num_decoding)


def _available(members: Mapping[tuple[Role, str], Member]) -> set[tuple[str, int]]:
    entries = (member.registration for member in members.values())
    return {(entry.name, entry.epoch) for entry in entries if not entry.draining}
