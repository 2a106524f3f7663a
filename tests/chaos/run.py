"""One chaos run: a cluster, clients, faults; what became of it."""

import asyncio
import random
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.chaos.faults import END, KILL, STOP, Faults
from tests.chaos.load import Clients
from tests.chaos.ports import two_free_ports
from tests.chaos.reclaim import clients_leave, readers_die
from tests.chaos.report import Report
from tests.chaos.requests import asks
from tests.chaos.stalls import stalls
from tests.chaos.twin import SimTwin, Twin, write_tokenizer, wrong
from tests.chaos.watch import Watch
from tests.e2e.cluster import RunningCluster, running

LEASE_S = 10.0
PREFILL_MS_PER_TOKEN = 0.2


@dataclass(frozen=True)
class Plan:
    """How much of everything. The run ends after `num_requests` or `seconds`, whichever comes first."""

    seed: int = 5
    num_requests: int = 10_000
    seconds: float = 1_200.0
    num_clients: int = 16
    client_pause_s: float = 0.5
    num_each: int = 3
    worker_pause_s: tuple[float, float] = (1.0, 4.0)
    other_pause_s: tuple[float, float] = (6.0, 20.0)


def flags(plan: Plan, port: int, text: Path) -> list[str]:
    """Of `forebay up`."""
    return [
        *("--engine", "sim", "--prefill", str(plan.num_each), "--decode", str(plan.num_each)),
        *("--gateways", "2", "--routers", "2", "--port", str(port)),
        f"--worker-flags=--sim-prefill-ms-per-token {PREFILL_MS_PER_TOKEN} --sim-decode-ms 8 --kv-cache-mb 64",
        "--router-flags=--local-prefill-max-tokens 32",
        f"--gateway-flags=--request-timeout-ms 30000 --model sim={text}",
    ]


async def sim(plan: Plan) -> Report:
    """The run on the sim engine."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        port = two_free_ports()
        cluster = stack.enter_context(running(*flags(plan, port, write_tokenizer(Path(folder)))))
        urls = [f"http://127.0.0.1:{port + i}" for i in range(2)]
        clients = Clients(urls, cluster.model, asks(plan.seed), plan.client_pause_s)
        return await run(plan, cluster, clients, SimTwin())


async def run(plan: Plan, cluster: RunningCluster, clients: Clients, twin: Twin) -> Report:
    """Load and faults at once; then the books."""
    faults, watch = Faults(cluster, random.Random(plan.seed)), Watch(cluster)
    began = time.monotonic()

    def more() -> bool:
        return time.monotonic() - began < plan.seconds and clients.num_requests < plan.num_requests

    meanwhile = [asyncio.create_task(work) for work in (*_hitting(plan, faults), watch.run())]
    await asyncio.gather(*(clients.run(number, more) for number in range(plan.num_clients)))
    seconds = time.monotonic() - began
    for task in meanwhile[:-1]:
        assert not task.done(), task.exception()
        task.cancel()
    await asyncio.wait(meanwhile[:-1])
    await cluster.until(lambda rows: all(row["state"] == "serving" for row in rows.values()), 60)
    await cluster.until_pages_are_free(LEASE_S + 5)
    reclaim_s = {
        "after clients left": await clients_leave(cluster, clients.urls[0], LEASE_S + 5),
        "after decode workers were killed": await readers_die(cluster, clients.urls[0], faults, LEASE_S + 5),
    }
    await cluster.until(lambda rows: all(row["state"] == "serving" for row in rows.values()), 60)
    assert not meanwhile[-1].done(), meanwhile[-1].exception()
    meanwhile[-1].cancel()
    rows = await cluster.status()
    return Report(
        answers=clients.answers,
        faults=faults.done,
        stalls=list(stalls(clients.answers, faults.done, watch.placed, PREFILL_MS_PER_TOKEN / 1000)),
        suspected=watch.suspected,
        wrong=wrong(clients.answers, twin),
        defects=[*clients.defects, *watch.wrong_pages],
        num_bytes=sum(watch.num_bytes.values()),
        num_leaked_pages=sum(row["pages"]["held"] + row["pages"]["leased"] for row in rows.values() if row["pages"]),
        num_bystanders=sum(abs(row["num_restarts"] - faults.restarts[name]) for name, row in rows.items()),
        reclaim_s=reclaim_s,
        seconds=seconds,
    )


def _hitting(plan: Plan, faults: Faults) -> list[Coroutine[None, None, None]]:
    """Workers are hit all the time and in every way; what others need is hit now and then."""
    workers = [f"{role}-{i}" for role in ("decode", "prefill") for i in range(plan.num_each)]
    others = ["gateway-0", "gateway-1", "router-0", "router-1", "blackboard"]
    return [
        faults.run(workers, (KILL, KILL, END, STOP), plan.worker_pause_s),
        faults.run(others, (KILL,), plan.other_pause_s),
        faults.run(others[:-1], (END,), plan.other_pause_s),
        faults.run(others[2:-1], (STOP,), plan.other_pause_s),
    ]
