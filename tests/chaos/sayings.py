"""What processes say in their logs: gateways where requests go, workers what they take over, and when they serve."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Placed:
    """A gateway's word that a choice of a request went to a worker, at a unix time, and who was to compute its prompt
    if not that worker."""

    request: str
    choice: int
    decode: str
    at: float
    prefill: str = ""

    @property
    def computing(self) -> str:
        """Who was to compute the prompt."""
        return self.prefill or self.decode


@dataclass(frozen=True)
class Suspected:
    """A gateway's word that a worker failed a choice of a request."""

    request: str
    choice: int
    decode: str
    fault: str
    at: float


@dataclass(frozen=True)
class WentOn:
    """A gateway's word that a choice has a token from the worker that took over."""

    request: str
    choice: int
    decode: str
    at: float


@dataclass(frozen=True)
class TookOver:
    """A worker's word that it goes on with a choice: how long that waited here for pages, and from its arrival for a
    token; tokens that it has, and of these, those that came out of a cache."""

    request: str
    choice: int
    decode: str
    at: float
    pages_s: float
    first_s: float
    num_tokens: int
    num_cached: int

    @property
    def num_computed(self) -> int:
        """Tokens that were computed before the first one could be chosen."""
        return self.num_tokens - self.num_cached


@dataclass(frozen=True)
class Served:
    """A worker's word that it serves, after a start."""

    name: str
    at: float


@dataclass
class Sayings:
    """What processes said of requests and of themselves."""

    placed: list[Placed] = field(default_factory=list)
    suspected: list[Suspected] = field(default_factory=list)
    took_over: list[TookOver] = field(default_factory=list)
    went_on: list[WentOn] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)

    def hear(self, line: dict[str, Any]) -> None:
        """Take one line of a log."""
        at = datetime.fromisoformat(line["time"]).timestamp()
        if " serves " in line["message"] and "choice" not in line:
            self.served.append(Served(line["process"], at))
        if "choice" not in line:
            return
        request, _, choice = line["choice"].rsplit("-", 2)
        if "fault" in line:
            self.suspected.append(Suspected(request, int(choice), line["decode"], line["fault"], at))
        elif line["message"] == "placed":
            self.placed.append(Placed(request, int(choice), line["decode"], at, line["prefill"]))
        elif line["message"] == "goes on":
            self.went_on.append(WentOn(request, int(choice), line["decode"], at))
        elif line["message"] == "took over":
            about = {name: line[name] for name in ("pages_s", "first_s", "num_tokens", "num_cached")}
            self.took_over.append(TookOver(request, int(choice), line["process"], at, **about))


class LogTail:
    """Reads what is added to a log, also when a new start of the process begins a new file under its name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._part = ""

    def lines(self) -> Iterator[dict[str, Any]]:
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

    def _rest(self) -> Iterator[dict[str, Any]]:
        if self._file is None:
            return
        *lines, self._part = (self._part + self._file.read()).split("\n")
        for line in lines:
            if line.startswith("{"):
                yield json.loads(line)
