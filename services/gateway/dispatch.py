"""From a choice to its tokens: ask a router for workers, stream from the decode worker, go on elsewhere if it is lost.

Going on is without a seam: the next worker gets the tokens that the client has, and equal sequences get equal tokens
everywhere, because every random choice depends on seed and position alone. Workers that verify drafts by rejection
sampling give equally likely ones (docs/decisions/0028).
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress

from protos.forebay.v1 import decode_pb2, decode_pb2_grpc, generation_pb2, router_pb2
from services.gateway.directory import Directory
from services.gateway.losses import Losses
from services.gateway.meters import Meters
from services.gateway.request import Choice
from services.gateway.routers import ROUTER_FAULTS, Routers
from services.gateway.usage import add_drafts
from shared import page_hash, rpc
from shared.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    Fault,
    Internal,
    ModelNotFound,
    NoWorker,
    Overloaded,
    StaleEpoch,
    WorkerLost,
)

log = logging.getLogger(__name__)

# A worker may be at fault for these; another one may do better. Cancelled is what a server tells that closes while it
# answers: a stream that we leave ourselves raises nothing.
_WORKER_FAULTS = (WorkerLost, StaleEpoch, Draining, Overloaded, Cancelled)
# These pass when the worker is back; one that is full will not be emptier in a moment.
_PASSING_FAULTS = (WorkerLost, StaleEpoch, Draining, Cancelled)
# Without a token in between.
MAX_ATTEMPTS = 4
# While no router answers: time between two tries, unless the blackboard announces one earlier.
ROUTER_RETRY_S = 0.25
# A log line is written when the call that it tells of has been heard by all that it concerns.
LOG_LATER_S = 0.01
WITHDRAW_S = 1.0
_CACHED = ("num_cached_local", "num_cached_remote", "num_cached_transferred")


class Dispatcher:
    """Sends choices to workers. Calls end by the deadline of the work at hand (`rpc.deadline`)."""

    def __init__(self, directory: Directory, channels: rpc.Channels, meters: Meters, recovery_wait_ms: int) -> None:
        self._directory, self._channels, self._meters = directory, channels, meters
        self._routers, self._losses = Routers(directory, channels), Losses()
        self._recovery_wait_s = recovery_wait_ms / 1000
        self._clearing: set[asyncio.Task[None]] = set()

    async def generate(self, choice: Choice) -> AsyncGenerator[decode_pb2.GenerateResponse, None]:
        """What the decode worker sends, up to and with GenerateFinished. Raises any Fault.

        Leaving the iterator early cancels the request everywhere.
        """
        attempt = _Attempt(choice, self._recovery_wait_s)
        try:
            while True:
                attempt.place(await self._route(attempt))
                try:
                    async with aclosing(self._stream(attempt)) as responses:
                        async for response in responses:
                            if attempt.failed is not None:
                                self._meters.recovered(*attempt.failed)
                                attempt.log("goes on")
                            attempt.note(response)
                            yield response
                    if attempt.finished:
                        return
                    raise WorkerLost("the stream ended without its last message")
                except _WORKER_FAULTS as fault:
                    if isinstance(fault, WorkerLost):
                        self._losses.note(attempt.request.placement.decode)
                    attempt.fail(fault)
                    if attempt.complete:
                        yield attempt.end()
                        return
                    if isinstance(fault, StaleEpoch):  # the router will hear of the worker's new epoch any moment
                        await self._directory.changed(ROUTER_RETRY_S)
        finally:
            if attempt.unclaimed is not None:
                self._clearing.add(task := asyncio.create_task(self._withdraw(attempt.route, attempt.unclaimed)))
                task.add_done_callback(self._clearing.discard)

    async def _withdraw(self, route: router_pb2.RouteRequest, placement: decode_pb2.Placement) -> None:
        """Have given back what was reserved for a request that its workers may never have seen."""
        about = router_pb2.WithdrawRequest(request_id=route.request_id, model=route.model, placement=placement)
        with suppress(Fault), rpc.no_deadline(), rpc.deadline(WITHDRAW_S):  # else it lapses
            await self._routers.ask(lambda router: router.Withdraw, about)

    async def settled(self) -> None:
        """Wait until what requests left behind is cleared up, for a moment at most."""
        if self._clearing:
            await asyncio.wait(set(self._clearing))

    def _stream(self, attempt: "_Attempt") -> AsyncGenerator[decode_pb2.GenerateResponse, None]:
        stub = self._channels.stub(decode_pb2_grpc.DecodeServiceStub, attempt.request.placement.decode.address)
        return rpc.stream(stub.Generate, attempt.request)

    async def _route(self, attempt: "_Attempt") -> router_pb2.RouteResponse:
        give_up = time.monotonic() + self._recovery_wait_s
        while True:
            del attempt.route.lost[:]
            attempt.route.lost.extend(self._losses.recent())
            try:
                response: router_pb2.RouteResponse = await self._routers.ask(
                    lambda router: router.Route, attempt.route, attempt.left
                )
            except (NoWorker, ModelNotFound) as fault:  # a router that has just started knows of no model
                if not attempt.may_recover:
                    raise (attempt.fault or NoWorker(fault.message, param=fault.param)) from None
                attempt.forgive()
                left = ROUTER_RETRY_S
            except ROUTER_FAULTS as fault:
                left = give_up - time.monotonic()
                if left <= 0:
                    raise NoWorker(f"no router answers: {fault.message}") from None
            else:
                return response
            await self._directory.changed(min(left, ROUTER_RETRY_S, _time_remaining(left)))


def _time_remaining(otherwise: float) -> float:
    """Seconds until the deadline of the work at hand. Raises DeadlineExceeded."""
    left = rpc.time_remaining()
    if left is not None and left <= 0:
        raise DeadlineExceeded("the deadline passed before a router answered")
    return otherwise if left is None else left


def _write_log(what: str, about: Mapping[str, str], at_s: float) -> None:
    line = log.makeRecord(log.name, logging.INFO, __file__, 0, what, (), None, extra=about)
    line.created = at_s
    log.handle(line)


class _Attempt:
    """Where a choice stands: the workers that failed it, and in the request the tokens that the client has."""

    def __init__(self, choice: Choice, recovery_wait_s: float) -> None:
        self.route, self.request = router_pb2.RouteRequest(), decode_pb2.GenerateRequest()
        self.route.CopyFrom(choice.route)
        self.request.CopyFrom(choice.generate)
        self._token_ids: list[int] = []
        self._page_size, self._prompt_hashes = choice.page_size, choice.route.page_hashes
        self._cached: dict[str, int] | None = None
        self._used_before, self._used_here = generation_pb2.Usage(), generation_pb2.Usage()
        self.finished = False
        self.unclaimed: decode_pb2.Placement | None = None
        """Where it was sent last, until a message came from there: something may be reserved for it yet."""
        self.fault: Fault | None = None
        self.left = ""
        """The incarnation of a worker that failed it last."""
        self.failed: tuple[str, float] | None = None
        """Reason and time of the first fault since the last message; None if there was none."""
        self._passes = True
        self._num_failures = 0
        self._recovery_wait_s, self._recover_by = recovery_wait_s, time.monotonic() + recovery_wait_s

    def place(self, response: router_pb2.RouteResponse) -> None:
        """Take the router's decision."""
        self.request.placement.CopyFrom(response.placement)
        self.unclaimed = response.placement
        self.log("placed", prefill=response.placement.prefill.worker_id)

    def log(self, what: str, **more: str) -> None:
        """Tell what became of the choice, and at which decode worker.

        Writing a line takes as long as a hop: the call at hand goes before. The line has the time of now.
        """
        if log.isEnabledFor(logging.INFO):
            placed = {"choice": self.route.request_id, "decode": self.request.placement.decode.worker_id}
            asyncio.get_running_loop().call_later(LOG_LATER_S, _write_log, what, placed | more, time.time())

    def note(self, response: decode_pb2.GenerateResponse) -> None:
        """Remember what the client gets. Raises Internal if that lacks what it asked for."""
        self._num_failures, self.failed, self.unclaimed = 0, None, None
        self.finished = response.HasField("finished")
        told = response.HasField("prompt_logprobs")
        said = response.prompt_logprobs if told else response.finished if self.finished else response.tokens
        self._token_ids.extend(response.tokens.token_ids)
        if told:
            self.request.num_prompt_logprobs_held = self._num_held + len(response.prompt_logprobs.logprobs)
        elif not self._is_told:
            worker = self.request.placement.decode.worker_id
            raise Internal(f"decode worker {worker} answers without log-probabilities of the prompt")
        if said.HasField("usage"):
            self._used_here.CopyFrom(said.usage)
            self._add_up(said.usage)

    def _add_up(self, usage: generation_pb2.Usage) -> None:
        """Make what one worker counted what the request used: drafts of earlier workers count, too."""
        self._keep_cached(usage)
        add_drafts(usage, self._used_before)

    def _keep_cached(self, usage: generation_pb2.Usage) -> None:
        """What was cached is what the first worker that answered found: whoever goes on finds this request's own pages,
        too (docs/decisions/0015)."""
        if self._cached is None:
            self._cached = {name: getattr(usage, name) for name in _CACHED}
        for name, num_tokens in self._cached.items():
            setattr(usage, name, num_tokens)

    def fail(self, fault: Fault) -> None:
        """Go on without the worker that failed, unless it only restarted. Raises the fault if there is no going on."""
        worker = self.request.placement.decode.worker_id
        failed = {"choice": self.route.request_id, "decode": worker, "fault": fault.reason}
        log.warning("worker %s failed: %s", worker, fault.message, extra=failed)
        self.fault = self._lost(worker, fault) if self._token_ids else fault
        add_drafts(self._used_before, self._used_here)
        self._used_here.Clear()
        self._num_failures += 1
        self.left = f"{worker} {self.request.placement.decode.epoch}"
        self.failed = self.failed or (fault.reason, time.monotonic())
        if self._num_failures == 1:
            self._recover_by = time.monotonic() + self._recovery_wait_s
        self._passes = isinstance(fault, _PASSING_FAULTS)
        if self._num_failures >= MAX_ATTEMPTS and not self.may_recover:
            raise self.fault from None
        self.request.output_token_ids[:] = self._token_ids
        self.route.resumed = bool(self._token_ids)
        self.route.ClearField("withdrawn")
        if self.unclaimed is not None:
            self.route.withdrawn.CopyFrom(self.unclaimed)
        self.route.num_prompt_tokens = len(self.request.prompt_token_ids) + len(self._token_ids)
        self.route.page_hashes = self._page_hashes()
        if not isinstance(fault, StaleEpoch):
            self.route.excluded_worker_ids.append(worker)

    def _page_hashes(self) -> bytes:
        """Those of the prompt, which are known, and of the output behind it: a worker that drains has those, too. No
        cache has logits: as long as the prompt is told of, those alone before what is to be told."""
        hashes, key, page_size = self._prompt_hashes, self.request.hash_key, self._page_size
        first = len(hashes) // page_hash.HASH_BYTES * page_size
        rest = [*self.request.prompt_token_ids[first:], *self._token_ids]
        hashes += page_hash.join(page_hash.chain(key, rest, page_size, parent=hashes[-page_hash.HASH_BYTES :]))
        return hashes if self._is_told else hashes[: (self._num_held - 1) // page_size * page_hash.HASH_BYTES]

    @property
    def _num_held(self) -> int:
        """Leading tokens of the prompt whose log-probabilities the client has; of the first one there are none."""
        return max(1, self.request.num_prompt_logprobs_held)

    @property
    def _is_told(self) -> bool:
        """Whether the client has all log-probabilities of the prompt that it wants."""
        wants = self.request.sampling.HasField("num_prompt_logprobs")
        return not wants or self._num_held == len(self.request.prompt_token_ids)

    @property
    def may_recover(self) -> bool:
        """Whether waiting is worth while: workers were lost, not long ago, and may come back."""
        return self._passes and time.monotonic() < self._recover_by

    def forgive(self) -> None:
        """Let every worker have another try: those that failed may be all there is, and well again in a moment."""
        del self.route.excluded_worker_ids[:]

    @property
    def complete(self) -> bool:
        """Whether only the last message was lost."""
        return self._is_told and len(self._token_ids) >= self.request.sampling.max_tokens

    def end(self) -> decode_pb2.GenerateResponse:
        """The last message of a complete output."""
        usage = generation_pb2.Usage(
            num_prompt_tokens=len(self.request.prompt_token_ids), num_output_tokens=len(self._token_ids)
        )
        self._add_up(usage)
        reason = generation_pb2.FINISH_REASON_LENGTH
        return decode_pb2.GenerateResponse(finished=decode_pb2.GenerateFinished(reason=reason, usage=usage))

    def _lost(self, worker: str, fault: Fault) -> WorkerLost:
        num_tokens = len(self._token_ids)
        return WorkerLost(
            f"decode worker {worker} was lost after {num_tokens} tokens: {fault.message}",
            metadata={"worker": worker, "num_tokens": str(num_tokens)},
        )
