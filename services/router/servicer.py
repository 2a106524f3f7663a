"""RouterService: reads the request, looks prefixes up in the mirror, asks the policy, and answers."""

import math
import time

from grpc.aio import ServicerContext

from protos.forebay.v1 import decode_pb2, kv_pb2, router_pb2, router_pb2_grpc
from services.router import policy
from services.router.admission import Admission
from services.router.candidate import Candidate, Query, Weights, Worker
from services.router.doubts import Doubts
from services.router.fleet import Fleet
from services.router.mirror import Mirror
from services.router.placements import Placements
from services.router.table import Table
from shared import rpc
from shared.blackboard.admission import Account
from shared.errors import BlackboardLost, DeadlineExceeded, Fault, InvalidRequest, ModelNotFound, NoWorker
from shared.page_hash import HASH_BYTES
from shared.telemetry import Telemetry

RouteContext = ServicerContext[router_pb2.RouteRequest, router_pb2.RouteResponse]
WithdrawContext = ServicerContext[router_pb2.WithdrawRequest, router_pb2.WithdrawResponse]
ExplainContext = ServicerContext[router_pb2.ExplainRequest, router_pb2.ExplainResponse]


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Places requests on the workers of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        mirror: Mirror,
        placements: Placements,
        doubts: Doubts,
        admission: Admission,
        weights: Weights,
        telemetry: Telemetry,
        no_worker_wait_ms: int = 0,
    ) -> None:
        self._fleet, self._mirror, self._placements, self._doubts = fleet, mirror, placements, doubts
        self._admission, self._weights = admission, weights
        self._no_worker_wait_s = no_worker_wait_ms / 1000
        self._routes = telemetry.meter.create_counter("forebay_routes", description="Routes by outcome")
        self._seconds = telemetry.meter.create_histogram(
            "forebay_route_seconds", description="Time to decide on a route, waiting for room included"
        )

    async def Route(self, request: router_pb2.RouteRequest, context: RouteContext) -> router_pb2.RouteResponse:  # noqa: ARG002
        """Place a request."""
        outcome, expected = "ok", list[tuple[Candidate, router_pb2.RouteResponse]]()

        def expect(chosen: Candidate) -> None:
            """While the blackboard thinks about it."""
            self._placements.record(page_hashes, chosen)
            expected.append((chosen, _answer(chosen)))

        try:
            query = parse(request, page_hashes := request.page_hashes)
            self._doubts.hear(request.lost)
            if request.HasField("withdrawn"):
                await self._admission.give_back(query.request_id, query.model, request.withdrawn)
            chosen = await self._admission.place(
                request,
                query,
                lambda: self._rank(page_hashes, query),
                expect,
                can_reserve=self._fleet.is_current,
            )
        except Fault as fault:
            outcome = fault.reason
            raise
        finally:
            self._routes.add(1, {"outcome": outcome})
        return next((answer for each, answer in reversed(expected) if each is chosen), None) or _answer(chosen)

    async def Explain(self, request: router_pb2.ExplainRequest, context: ExplainContext) -> router_pb2.ExplainResponse:  # noqa: ARG002
        """Say what Route would answer, and why."""
        query = parse(request.request, page_hashes := request.request.page_hashes)
        table = self._survey(page_hashes, query)
        candidates = policy.explain(query, table, self._weights)
        if not candidates or candidates[0].rejection:
            summary = str(policy.nobody(query, table))
        else:
            summary = summarize(query, candidates[0], len(candidates))
        num_queued = await self._admission.num_queued(query.model)
        if num_queued:
            summary += f"; {num_queued} {'request waits' if num_queued == 1 else 'requests wait'} in the queue"
        shown = [_candidate(candidate) for candidate in candidates]
        accounts = await self._admission.accounts(self._fleet.roster(query.model).incarnations)
        rooms = [_room(name, account) for name, account in accounts.items()]
        return router_pb2.ExplainResponse(candidates=shown, summary=summary, num_queued=num_queued, rooms=rooms)

    async def Withdraw(
        self,
        request: router_pb2.WithdrawRequest,
        context: WithdrawContext,  # noqa: ARG002
    ) -> router_pb2.WithdrawResponse:
        """Give back what Route reserved for a request that does not come."""
        await self._admission.give_back(request.request_id, request.model, request.placement)
        return router_pb2.WithdrawResponse()

    async def _rank(self, page_hashes: bytes, query: Query) -> policy.Ranked:
        """Placements, the best first. While no worker is there at all, one may be about to come."""
        give_up = time.monotonic() + self._no_worker_wait_s
        while True:
            started = time.perf_counter()
            try:
                ranked = policy.rank(query, self._survey(page_hashes, query), self._weights)
            except (NoWorker, BlackboardLost):
                left = min(give_up - time.monotonic(), rpc.time_remaining() or math.inf)
                if query.excluded or left <= 0:
                    raise
                await self._fleet.changed(left)
            else:
                self._seconds.record(time.perf_counter() - started)
                return ranked

    def _survey(self, page_hashes: bytes, query: Query) -> Table:
        """The workers of the query's model with what they have of its prompt."""
        remaining = rpc.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the request could be placed")
        if not self._fleet.is_known:
            raise BlackboardLost("the router has not seen the fleet yet: Redis cannot be reached")
        roster = self._fleet.roster(query.model)
        if not roster.incarnations:
            kind = NoWorker if self._fleet.knows(query.model) else ModelNotFound
            raise kind(f"no worker serves the model {query.model!r}", param="model")
        stored = self._mirror.runs(page_hashes, roster.incarnations)
        return self._fleet.table(roster, stored, self._placements.expected(roster, page_hashes, stored))


def parse(request: router_pb2.RouteRequest, page_hashes: bytes) -> Query:
    """What the policy needs of a request; its page hashes come with it, for whoever reads them there makes a copy.
    Raises InvalidRequest."""
    if not request.model:
        raise InvalidRequest("model is empty", param="model")
    if not request.num_prompt_tokens:
        raise InvalidRequest("num_prompt_tokens is 0", param="num_prompt_tokens")
    num_hashes, broken = divmod(len(page_hashes), HASH_BYTES)
    if broken:
        raise InvalidRequest(f"{len(page_hashes)} bytes are not whole page hashes of {HASH_BYTES}", param="page_hashes")
    if num_hashes > request.num_prompt_tokens:
        raise InvalidRequest(
            f"{num_hashes} page hashes for {request.num_prompt_tokens} prompt tokens", param="page_hashes"
        )
    return Query(
        request.request_id,
        request.model,
        request.num_prompt_tokens,
        affinity=page_hashes[:HASH_BYTES] or request.request_id.encode(),
        excluded=frozenset(request.excluded_worker_ids),
        max_tokens=request.max_tokens,
    )


def summarize(query: Query, chosen: Candidate, num_candidates: int) -> str:
    """A decision in one line."""
    decode, prefill = chosen.names
    where = f"prefill on {prefill}, decode on {decode}" if prefill else f"prefill and decode on {decode}"
    source = f", prefix pulled from {chosen.source.name}" if chosen.source else ""
    dearest = max(chosen.terms, key=lambda term: term[1])
    return (
        f"{where}{source}: {chosen.cost_ms:.1f} ms, most of it {dearest[0]} ({dearest[1]:.1f} ms); "
        f"{chosen.num_cached_tokens} of {query.num_prompt_tokens} prompt tokens cached; {num_candidates} candidates"
    )


def _answer(chosen: Candidate) -> router_pb2.RouteResponse:
    return router_pb2.RouteResponse(placement=_placement(chosen), num_cached_tokens=chosen.num_cached_tokens)


def _placement(candidate: Candidate) -> decode_pb2.Placement:
    return decode_pb2.Placement(
        decode=_ref(candidate.decode),
        prefill=_ref(candidate.prefill),
        kv_source=_ref(candidate.source),
        second_prefill=_ref(candidate.second_prefill),
        expected_ms=candidate.expected_ms,
    )


def _ref(worker: Worker | None) -> kv_pb2.WorkerRef | None:
    if worker is None:
        return None
    return kv_pb2.WorkerRef(worker_id=worker.name, epoch=worker.registration.epoch, address=worker.registration.address)


def _room(name: str, account: Account) -> router_pb2.WorkerRoom:
    limits, used, promised = (
        router_pb2.Amounts(**room.model_dump()) for room in (account.limits, account.used, account.promised)
    )
    return router_pb2.WorkerRoom(worker_id=name, limits=limits, used=used, promised=promised)


def _candidate(candidate: Candidate) -> router_pb2.Candidate:
    return router_pb2.Candidate(
        placement=_placement(candidate),
        terms=[router_pb2.CostTerm(name=name, cost_ms=cost) for name, cost in candidate.terms],
        cost_ms=candidate.cost_ms,
        num_cached_tokens=candidate.num_cached_tokens,
        rejection=candidate.rejection,
    )
