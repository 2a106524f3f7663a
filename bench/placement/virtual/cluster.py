"""A cluster in virtual time: the routers' own fleet, mirror, expectations and policy, and workers that step.

Told again in a few lines is what lies between: the gateway and its calls are a constant, reports and changes of the
prefix index come as late as they do in reality, room is promised by what workers have at the moment, and the queue is
first come, first served. So waits, hits, evictions and what the router knows are as in a cluster of processes, and
what Python, gRPC and two shared cores add is not.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import count

from bench.placement.client import Reply
from bench.placement.harness import Fleet as Shape
from bench.placement.harness import Run, Sample, hold_all
from bench.placement.virtual.loop import now_s
from bench.placement.virtual.loop import run as run_virtually
from bench.placement.virtual.router import Channel, VirtualRouter
from bench.placement.virtual.worker import MODEL, PEER_S, Job, VirtualWorker
from bench.placement.workloads import Conversation
from bench.serve.client import Answer
from services.router import policy
from services.router.candidate import Candidate, Query
from services.router.config import RouterConfig
from services.router.offer import offer
from shared import page_hash
from shared.blackboard.admission import Need
from shared.blackboard.records import Role, Room
from shared.engine.kv.store import PageTable
from shared.worker.config import WorkerConfig

# From a client to a worker, and back; until a change of a worker's index is in the mirror, once it was written.
TO_WORKER_S, BACK_S, INDEX_S = 0.008, 0.002, 0.03
SAMPLE_S = 0.5


def run(shape: Shape, conversations: Sequence[Conversation]) -> Run:
    """Hold the conversations with such a fleet."""
    return run_virtually(_run(shape, conversations))


async def _run(shape: Shape, conversations: Sequence[Conversation]) -> Run:
    cluster = VirtualCluster(shape)
    async with cluster.running():
        sent = await hold_all(cluster.ask, conversations, now_s)
    return Run(tuple(sent), tuple(cluster.samples))


class VirtualCluster:
    """Routers and workers."""

    def __init__(self, shape: Shape) -> None:
        config, channel = RouterConfig.load(shape.router_flags.split()), Channel()
        self._routers = [VirtualRouter(config, f"router-{number}", channel) for number in range(shape.num_routers)]
        self._config = WorkerConfig.load(["--num-pages", str(shape.num_pages), *shape.worker_flags.split()])
        names = [(Role.PREFILL, f"prefill-{number}") for number in range(shape.num_prefill)]
        names += [(Role.DECODE, f"decode-{number}") for number in range(shape.num_decode)]
        self.workers = {name: VirtualWorker(name, role, self._config) for role, name in names}
        self._reports = {name: worker.registration() for name, worker in self.workers.items()}
        self._promised: dict[str, dict[str, Need]] = {name: {} for name in self.workers}
        self._parked: deque[asyncio.Event] = deque()
        self._numbers = count()
        self.samples: list[Sample] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Workers step and report, and the router looks, while inside."""
        works = [self._watch()]
        for number, router in enumerate(self._routers, 1):
            router.begin(self._reports.values())
            works.append(router.run(self._reports, number / len(self._routers)))
        for number, worker in enumerate(self.workers.values()):
            works += [worker.run(), self._report(worker, number / len(self.workers)), self._write_index(worker)]
            worker.admission.on_freed = self._wake
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
        for failed in found:
            if isinstance(failed, Exception):
                raise failed

    # What routers see -------------------------------------------------------------------------------------------------

    async def _report(self, worker: VirtualWorker, phase: float) -> None:
        await asyncio.sleep(phase * self._config.heartbeat_ms / 1000)
        while True:
            self._reports[worker.name] = worker.registration()
            await asyncio.sleep(self._config.heartbeat_ms / 1000)

    async def _write_index(self, worker: VirtualWorker) -> None:
        numbers = count(1)
        while True:
            await asyncio.sleep(self._config.index_interval_ms / 1000)
            if changes := worker.kv.drain_events():
                await asyncio.sleep(INDEX_S)
                stored, removed = (
                    page_hash.join([change.page_hash for change in changes if change.stored is wanted])
                    for wanted in (True, False)
                )
                number = next(numbers)
                for router in self._routers:
                    router.apply(worker.name, number, stored, removed)

    async def _watch(self) -> None:
        while True:
            loads = [(name, worker.load()) for name, worker in self.workers.items()]
            self.samples.append(Sample(now_s(), {name: load.num_running + load.num_waiting for name, load in loads}))
            await asyncio.sleep(SAMPLE_S)

    # Placing ----------------------------------------------------------------------------------------------------------

    async def _place(self, job: Job) -> Candidate:
        """The first placement with room, when it is the request's turn. Requests go to routers in turns."""
        router = self._routers[int(job.request_id) % len(self._routers)]
        page_hashes = page_hash.join(page_hash.chain(job.hash_key, job.tokens, self._config.page_size))
        query = Query(
            job.request_id, MODEL, len(job.tokens), page_hashes[: page_hash.HASH_BYTES], max_tokens=job.num_output
        )
        turn, parked = asyncio.Event(), False
        while True:
            turn.clear()
            if not self._parked or (parked and self._parked[0] is turn):
                ranked = router.rank(query, page_hashes)
                if (place := self._promise(job, query, ranked)) is not None:
                    chosen = ranked[place]
                    router.record(page_hashes, chosen)
                    if parked:
                        self._parked.popleft()
                    self._wake()
                    return chosen
            if not parked:
                self._parked.append(turn)
                parked = True
            await turn.wait()

    def _promise(self, job: Job, query: Query, ranked: policy.Ranked) -> int | None:
        needs, pairs = offer(query, ranked)
        for place, pair in enumerate(pairs):
            named = [needs[pair.decode]]
            if pair.prefill is not None:
                named = [needs[pair.decode]._replace(tokens=0), needs[pair.prefill]]
            if all(self._fits(need) for need in named):
                for need in named:
                    self._promised[need.name][job.request_id] = need
                return place
        return None

    def _fits(self, need: Need) -> bool:
        worker, promised = self.workers[need.name], self._promised[need.name].values()
        used, limits = worker.used(), worker.limits
        room = Room(
            sequences=used.sequences + len(promised),
            tokens=used.tokens + sum(each.tokens for each in promised),
            pages=used.pages + sum(each.pages for each in promised),
        )
        return room.sequences == 0 or (
            room.sequences < limits.sequences
            and (not need.tokens or not room.tokens or room.tokens + need.tokens <= limits.tokens)
            and room.pages + need.pages <= limits.pages
        )

    def _wake(self) -> None:
        if self._parked:
            self._parked[0].set()

    # Serving ----------------------------------------------------------------------------------------------------------

    async def ask(self, prompt: Sequence[int], num_output: int, tenant: str) -> Reply:
        """One request, from the client's side."""
        job = Job(str(next(self._numbers)), tuple(prompt), num_output, page_hash.tenant_key(tenant))
        answer, tokens = Answer(len(prompt), num_output, now_s()), list[int]()
        chosen = await self._place(job)
        await asyncio.sleep(TO_WORKER_S)
        async with aclosing(self._generate(job, chosen, answer)) as generated:
            async for token in generated:
                tokens.append(token)
                answer.arrivals.append((now_s() + BACK_S, 1))
        await asyncio.sleep(BACK_S)
        answer.num_reported = len(tokens)
        return Reply(answer, tuple(tokens))

    async def _generate(self, job: Job, chosen: Candidate, answer: Answer) -> AsyncGenerator[int, None]:
        decode, prefill = (self.workers[name] if name else None for name in chosen.names)
        source = self.workers[chosen.source.name] if chosen.source else None
        assert decode is not None
        self._promised[decode.name].pop(job.request_id, None)
        started = now_s()
        with decode.stay(job, 0 if prefill else len(job.tokens), job.num_output) as stay:
            table = await decode.reserve(job, stay)
            request = job.engine_request()
            if prefill:
                first, answer.num_cached = await self._prefill(job, prefill, source, chosen.expected_ms)
                yield first
                await asyncio.sleep(PEER_S)
                await decode.read(min(len(job.tokens) - table.num_tokens, self._config.max_step_tokens))
                table.num_tokens = len(job.tokens)
                request = job.engine_request(first)
            elif source:
                await decode.pull(source, job, table)
            async with aclosing(decode.generate(request, table)) as generated:
                awaits_first = not prefill
                async for token, sequence in generated:
                    if awaits_first:
                        awaits_first = False
                        stay.computed()
                        decode.rates.computed(chosen.expected_ms, (now_s() - started) * 1000)
                        answer.num_cached = sequence.num_cached_tokens
                    yield token
            decode.rates.output.add(job.num_output, 1)

    async def _prefill(
        self, job: Job, prefill: VirtualWorker, source: VirtualWorker | None, expected_ms: float
    ) -> tuple[int, int]:
        """The first token, and how much of the prompt was found cached."""
        await asyncio.sleep(PEER_S / 2)
        self._promised[prefill.name].pop(job.request_id, None)
        started = now_s()
        with prefill.stay(job, len(job.tokens), 0) as stay:
            table: PageTable = await prefill.reserve(job, stay)
            if source:
                await prefill.pull(source, job, table)
            async with aclosing(prefill.generate(job.engine_request(prefill_only=True), table)) as generated:
                async for token, sequence in generated:
                    stay.computed()
                    prefill.rates.computed(expected_ms, (now_s() - started) * 1000)
                    return token, sequence.num_cached_tokens
        raise AssertionError("a prompt without a token")
