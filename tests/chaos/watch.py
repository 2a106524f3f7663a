"""What a cluster says of itself meanwhile: gateways tell where requests go, workers count pages and bytes."""

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.chaos.sayings import LogTail, Sayings
from tests.e2e.cluster import RunningCluster

LOOK_S = 0.5
HEARD = ("gateway", "decode", "prefill")
BYTES, WRONG_PAGES = "forebay_transfer_bytes_total", "forebay_page_faults"


@dataclass
class Watch:
    """Follows a cluster until cancelled. A worker's counters are by its process id: each start counts from zero."""

    cluster: RunningCluster
    said: Sayings = field(default_factory=Sayings)
    num_bytes: dict[int, float] = field(default_factory=dict)
    wrong_pages: list[str] = field(default_factory=list)
    num_looks: int = 0  # at workers that told of their pages

    async def run(self) -> None:
        """Look twice a second."""
        heard = [process for process in self.cluster.state().processes if process.role in HEARD]
        tails = [LogTail(Path(process.log)) for process in heard]
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=LOOK_S, trust_env=False))
            for tail in tails:
                stack.callback(tail.close)
            while True:
                for line in chain.from_iterable(tail.lines() for tail in tails):
                    self.said.hear(line)
                await self._count(http)
                await asyncio.sleep(LOOK_S)

    async def _count(self, http: httpx.AsyncClient) -> None:
        for name, row in (await self.cluster.status()).items():
            if row["pages"] is None or row["pid"] is None:
                continue
            with suppress(httpx.TransportError):  # it is about to end, or stopped
                metrics = await scrape(http, row["metrics_address"])
                if WRONG_PAGES not in metrics:  # the port of one that has ended is another process' by now
                    continue
                self.num_looks += 1
                self.num_bytes[row["pid"]] = metrics.get(BYTES, 0.0)
                if metrics[WRONG_PAGES]:
                    self.wrong_pages.append(f"{name}: {metrics}")


async def scrape(http: httpx.AsyncClient, address: str) -> dict[str, float]:
    """Metrics of a process by name, those with a state as NAME.STATE. Raises httpx.TransportError."""
    text = (await http.get(f"http://{address}/metrics")).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {".".join([s.name, *filter(None, [s.labels.get("state")])]): s.value for s in samples}
