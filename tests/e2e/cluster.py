"""A real cluster for tests: `forebay up` in a process of its own, as a user runs it but for its imports (`nursery`)."""

import asyncio
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from cli import background, state
from cli.state import RunState
from cli.status import join
from protos.forebay.v1 import router_pb2, router_pb2_grpc
from shared import rpc
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Role
from shared.errors import BlackboardLost
from shared.forking import Child
from shared.models.store import default_cache
from tests import nursery
from tests.e2e import integrity

DEADLINE_S = 30.0
# Of clusters that compute: long prompts go to a prefill worker, whatever rates were measured while they started.
HAND_OVER = "--router-flags=--remote-prefill-min-tokens 128"
Row = dict[str, Any]


class RunningCluster:
    """What a test may know of a cluster and do to it. `run` is its state as of the start; `state()` as of now."""

    def __init__(self, supervisor: Child, run: RunState) -> None:
        self.supervisor, self.run = supervisor, run

    @property
    def url(self) -> str:
        """Of the first gateway's REST interface."""
        return self.run.url

    def urls(self, number: int) -> list[str]:
        """Of the first so many gateways' REST interfaces, whose ports are neighbours."""
        host, _, port = self.url.rpartition(":")
        return [f"{host}:{int(port) + offset}" for offset in range(number)]

    @property
    def model(self) -> str:
        """Name of the served model."""
        return self.run.model

    @property
    def redis_url(self) -> str:
        """Of the blackboard."""
        return self.run.redis_url

    def state(self) -> RunState:
        """What the supervisor knows now."""
        current = state.read(default_cache(), self.supervisor.pid)
        assert current is not None, "the supervisor is gone"
        return current

    def pid(self, name: str) -> int | None:
        """Process id of decode-0, router-0, blackboard …; None while it does not run."""
        return next(process.pid for process in self.state().processes if process.name == name)

    def log(self, name: str) -> str:
        """Output of the current start of a process."""
        return Path(next(process.log for process in self.state().processes if process.name == name)).read_text()

    def signal(self, name: str, number: int) -> int:
        """Send a signal to a process; return the process id it had."""
        pid = self.pid(name)
        assert pid is not None, f"{name} does not run"
        os.kill(pid, number)
        return pid

    def kill(self, name: str) -> int:
        """SIGKILL; the supervisor starts the process again."""
        return self.signal(name, signal.SIGKILL)

    async def status(self) -> dict[str, Row]:
        """What `forebay status --json` says of each process, by name; while Redis is away nobody is registered."""
        board, registered = Blackboard(self.redis_url), []
        try:
            with suppress(BlackboardLost):
                registered = await board.processes(*Role)
            return {row["name"]: row for row in join(self.state(), registered)}
        finally:
            await board.close()

    async def address(self, name: str) -> str:
        """host:port of a process' gRPC server."""
        return str((await self.status())[name]["address"])

    async def measured(self, name: str, measure: str) -> float:
        """A number from a process' metrics; the sum if there are several that begin so."""
        found = await asyncio.to_thread(integrity.measures_at, (await self.status())[name]["metrics_address"])
        return sum(value for key, value in found.items() if key.startswith(measure))

    async def until_measured(self, name: str, measure: str, condition: Callable[[float], object]) -> None:
        """Wait until a number from a process' metrics is as the condition wants it: a request is counted behind its
        last token. Fails with what the number is."""
        end = time.monotonic() + DEADLINE_S
        while not condition(value := await self.measured(name, measure)):
            assert time.monotonic() < end, f"{measure} of {name} is {value}"
            await asyncio.sleep(0.05)

    async def until_explained(
        self, route: router_pb2.RouteRequest, condition: Callable[[Sequence[router_pb2.Candidate]], object]
    ) -> None:
        """Wait until the first router's placements of a request are as the condition wants them."""
        channels = rpc.Channels()
        stub: Any = router_pb2_grpc.RouterServiceStub(channels.to(await self.address("router-0")))
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    shown = await rpc.call(stub.Explain, router_pb2.ExplainRequest(request=route), DEADLINE_S)
                    if condition(shown.candidates):
                        return
                    await asyncio.sleep(0.05)
        finally:
            await channels.close()

    async def until(
        self, condition: Callable[[dict[str, Row]], object], deadline_s: float = DEADLINE_S
    ) -> dict[str, Row]:
        """Wait until the status is as the condition wants it, and return it; fails with the last status."""
        end = time.monotonic() + deadline_s
        while not condition(rows := await self.status()):
            assert time.monotonic() < end, f"not in {deadline_s} s; last: {rows}"
            await asyncio.sleep(0.05)
        return rows

    async def until_all_serve(self, deadline_s: float = DEADLINE_S) -> None:
        """Wait until every process serves, whatever a test has done to it."""
        await self.until(lambda rows: all(row["state"] == "serving" for row in rows.values()), deadline_s)

    async def until_restarted(self, name: str, old_pid: int, deadline_s: float = DEADLINE_S) -> None:
        """Wait until a process serves again after it was killed."""
        await self.until(lambda rows: rows[name]["state"] == "serving" and rows[name]["pid"] != old_pid, deadline_s)

    async def until_pages_are_free(self, deadline_s: float = DEADLINE_S) -> None:
        """Wait until no page of any worker is held by a sequence or leased."""
        await self.until(lambda rows: not any(map(_num_pages_in_use, rows.values())), deadline_s)


def begin(flags: Sequence[str]) -> background.Begin:
    """What starts `forebay up FLAGS` with nothing left to import."""
    engine = "sim" if "sim" in flags else "torch"
    return lambda command, _, output: nursery.start(engine, command, output)


@contextmanager
def running(*flags: str, executed: bool = False) -> Iterator[RunningCluster]:
    """A cluster started by `forebay up FLAGS`, stopped by Ctrl-C afterwards. `executed`: as a user does it, whatever
    that takes.

    Fails if it does not come up, does not end in time and in order, or if a worker's books are wrong at the end.
    """
    with background.cluster("--grace", "5", *flags, begin=background.execute if executed else begin(flags)) as started:
        cluster = RunningCluster(started.supervisor, started.run)
        yield cluster
        if started.supervisor.poll() is None:
            with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop
                thread.submit(asyncio.run, integrity.settled(cluster)).result()


def _num_pages_in_use(row: Row) -> int:
    return int(row["pages"]["held"] + row["pages"]["leased"]) if row["pages"] else 0


def as_curl_does(line: str) -> httpx.Response:
    """What a line that calls curl gets; not every machine has it."""
    _, url, _, header, _, body = shlex.split(line)
    name, value = header.split(": ")
    response = httpx.post(url, content=body, headers={name: value}, timeout=DEADLINE_S)
    assert response.status_code == 200, response.text
    return response
