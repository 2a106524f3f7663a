"""What a cluster says of itself meanwhile: gateways tell where requests go, workers count pages and bytes."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.cluster import RunningCluster

LOOK_S = 0.5
BYTES, WRONG_PAGES = "forebay_transfer_bytes_total", "forebay_page_faults"


@dataclass(frozen=True)
class Placed:
    """A gateway's word that a choice of a request went to a worker, at a unix time."""

    request: str
    choice: int
    decode: str
    at: float


@dataclass(frozen=True)
class Suspected:
    """A gateway's word that a worker failed a choice of a request."""

    request: str
    choice: int
    decode: str
    fault: str
    at: float


@dataclass
class Watch:
    """Follows a cluster until cancelled. A worker's counters are by its process id: each start counts from zero."""

    cluster: RunningCluster
    placed: list[Placed] = field(default_factory=list)
    suspected: list[Suspected] = field(default_factory=list)
    num_bytes: dict[int, float] = field(default_factory=dict)
    wrong_pages: list[str] = field(default_factory=list)

    async def run(self) -> None:
        """Look twice a second."""
        gateways = [process for process in self.cluster.state().processes if process.role == "gateway"]
        tails = [LogTail(Path(process.log)) for process in gateways]
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=LOOK_S, trust_env=False))
            for tail in tails:
                stack.callback(tail.close)
            while True:
                for tail in tails:
                    self._read(tail)
                await self._count(http)
                await asyncio.sleep(LOOK_S)

    def _read(self, tail: "LogTail") -> None:
        for line in tail.lines():
            if "choice" not in line:
                continue
            at = datetime.strptime(line["time"], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            request, _, choice = line["choice"].rsplit("-", 2)
            if "fault" in line:
                self.suspected.append(Suspected(request, int(choice), line["decode"], line["fault"], at))
            else:
                self.placed.append(Placed(request, int(choice), line["decode"], at))

    async def _count(self, http: httpx.AsyncClient) -> None:
        for name, row in (await self.cluster.status()).items():
            if row["pages"] is None or row["pid"] is None:
                continue
            with suppress(httpx.TransportError):  # it is about to end, or stopped
                metrics = await scrape(http, row["metrics_address"])
                self.num_bytes[row["pid"]] = metrics.get(BYTES, 0.0)
                if metrics[WRONG_PAGES]:
                    self.wrong_pages.append(f"{name}: {metrics}")


async def scrape(http: httpx.AsyncClient, address: str) -> dict[str, float]:
    """Metrics of a process by name, those with a state as NAME.STATE. Raises httpx.TransportError."""
    text = (await http.get(f"http://{address}/metrics")).text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {".".join([s.name, *filter(None, [s.labels.get("state")])]): s.value for s in samples}


class LogTail:
    """Reads what is added to a log, also when a new start of the process begins a new file under its name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._part = ""

    def lines(self) -> Iterator[dict[str, str]]:
        """Whole JSON lines since the last call."""
        yield from self._rest()
        with suppress(FileNotFoundError):
            if self._file is None or not self._path.samefile(f"/proc/self/fd/{self._file.fileno()}"):
                self.close()
                self._file, self._part = self._path.open(), ""
                yield from self._rest()

    def close(self) -> None:
        """Read no more."""
        if self._file is not None:
            self._file.close()

    def _rest(self) -> Iterator[dict[str, str]]:
        if self._file is None:
            return
        *lines, self._part = (self._part + self._file.read()).split("\n")
        for line in lines:
            if line.startswith("{"):
                yield json.loads(line)
