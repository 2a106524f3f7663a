"""One chaos run: a cluster, clients, faults; what became of it."""

import asyncio
import random
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.chaos.faults import END, KILL, STOP, Faults
from tests.chaos.load import Clients
from tests.chaos.reclaim import clients_leave, readers_die
from tests.chaos.report import Report
from tests.chaos.requests import MODEL, asks, repeated
from tests.chaos.stalls import stalls
from tests.chaos.twin import RecordedTwin, SimTwin, Twin, write_tokenizer, wrong
from tests.chaos.watch import Watch
from tests.e2e.cluster import RunningCluster, running

LEASE_S = 10.0
START_S = 60.0
NUM_GATEWAYS = 2
# What the default model is asked, again and again: each answer has to be computed once before, while nothing is wrong.
NUM_RECORDED = 40


@dataclass(frozen=True)
class Plan:
    """How much of everything. The run ends after `num_requests` or `seconds`, whichever comes first. `only` is a fault
    and a role: then nothing else is done, and to nobody else."""

    seed: int = 5
    num_requests: int = 10_000
    seconds: float = 1_200.0
    num_clients: int = 20
    client_pause_s: float = 0.5
    num_prefill: int = 3
    num_decode: int = 3
    worker_pause_s: tuple[float, float] = (1.0, 4.0)
    other_pause_s: tuple[float, float] = (10.0, 30.0)
    prefill_ms_per_token: float = 0.2
    decode_ms: float = 25.0
    only: tuple[str, str] | None = None

    def flags(self) -> list[str]:
        """Of `forebay up`."""
        workers = [*("--prefill", str(self.num_prefill)), *("--decode", str(self.num_decode))]
        return [*workers, *("--gateways", str(NUM_GATEWAYS)), *("--routers", "2")]


async def sim(plan: Plan) -> Report:
    """The run on the sim engine, whose answers are known."""
    worker_flags = (
        f"--sim-prefill-ms-per-token {plan.prefill_ms_per_token} --sim-decode-ms {plan.decode_ms} --kv-cache-mb 64"
    )
    with TemporaryDirectory() as folder, ExitStack() as stack:
        text = write_tokenizer(Path(folder))
        engine = ["--engine", "sim", f"--worker-flags={worker_flags}", f"--gateway-flags=--tokenizer sim={text}"]
        cluster = stack.enter_context(running(*engine, *plan.flags()))
        clients = Clients(cluster.urls(NUM_GATEWAYS), cluster.model, asks(plan.seed), plan.client_pause_s)
        report, faults = await run(plan, cluster, clients, SimTwin())
        report.reclaim_s["after clients left"] = await clients_leave(cluster, clients.urls[0], LEASE_S + 5)
        killed = await readers_die(cluster, clients.urls[0], faults, LEASE_S + 5)
        report.reclaim_s["after decode workers were killed"] = killed
        return report


async def model(plan: Plan) -> Report:
    """The run on the default model in float32. What an answer must be is asked first, while nothing is wrong."""
    with ExitStack() as stack:
        flags = ["--dtype", "float32", "--worker-flags=--kv-cache-mb 256", *plan.flags()]
        cluster = stack.enter_context(running(*flags))
        todo = list(islice(asks(plan.seed, MODEL), NUM_RECORDED))
        patient = iter([ask.patient(deadline_s=300.0) for ask in todo])
        before = Clients(cluster.urls(NUM_GATEWAYS), cluster.model, patient)
        await asyncio.gather(*(before.run(number, lambda: True) for number in range(plan.num_clients)))
        clients = Clients(cluster.urls(NUM_GATEWAYS), cluster.model, repeated(todo), plan.client_pause_s)
        return (await run(plan, cluster, clients, RecordedTwin(before.answers)))[0]


async def run(plan: Plan, cluster: RunningCluster, clients: Clients, twin: Twin) -> tuple[Report, Faults]:
    """Load and faults at once; then the books."""
    faults, watch = Faults(cluster, random.Random(plan.seed)), Watch(cluster)
    began = time.monotonic()

    def more() -> bool:
        return time.monotonic() - began < plan.seconds and clients.num_requests < plan.num_requests

    watching = asyncio.create_task(watch.run())
    hitting = asyncio.gather(*_hitting(plan, faults))
    await asyncio.gather(*(clients.run(number, more) for number in range(plan.num_clients)))
    seconds = time.monotonic() - began
    faults.enough.set()
    await hitting
    await cluster.until_all_serve(START_S)
    began = time.monotonic()
    await cluster.until_pages_are_free(LEASE_S + 5)
    reclaim_s = {"after the last request": time.monotonic() - began}
    assert not watching.done(), watching.exception()
    assert watch.num_looks, "no worker told of its pages"
    watching.cancel()
    rows = await cluster.status()
    report = Report(
        answers=clients.answers,
        faults=faults.done,
        stalls=list(stalls(clients.answers, faults.done, watch.said, plan.prefill_ms_per_token / 1000)),
        said=watch.said,
        wrong=wrong(clients.answers, twin),
        defects=[*clients.defects, *watch.wrong_pages],
        num_bytes=sum(watch.num_bytes.values()),
        num_leaked_pages=sum(row["pages"]["held"] + row["pages"]["leased"] for row in rows.values() if row["pages"]),
        bystanders=faults.bystanders(),
        reclaim_s=reclaim_s,
        seconds=seconds,
    )
    return report, faults


def _hitting(plan: Plan, faults: Faults) -> list[Coroutine[None, None, None]]:
    """Workers are hit all the time and in every way; what others need is hit now and then; or one thing `only`."""
    decode, prefill = (
        [f"{r}-{i}" for i in range(n)] for r, n in (("decode", plan.num_decode), ("prefill", plan.num_prefill))
    )
    workers = [*decode, *decode, *prefill]
    others = ["gateway-0", "gateway-1", "router-0", "router-1", "blackboard"]
    if plan.only is not None:
        kind, role = plan.only
        names = [name for name in (*decode, *prefill, *others) if name.startswith(role)]
        return [faults.run(names, (kind,), plan.worker_pause_s)]
    return [
        faults.run(workers, (KILL, KILL, END, STOP), plan.worker_pause_s),
        faults.run(others, (KILL,), plan.other_pause_s),
        faults.run(others[:-1], (END,), plan.other_pause_s),
        faults.run(others[2:-1], (STOP,), plan.other_pause_s),
    ]
