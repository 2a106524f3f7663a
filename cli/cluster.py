"""A cluster on this machine: started, waited for until it serves, stopped in order."""

import asyncio
import json
import signal
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cli import plan
from cli.forks import ForkServers
from cli.plan import ClusterOptions
from cli.ports import Reserved, in_a_row, is_free
from cli.process import ProcessSpec, Supervised
from cli.state import ProcessState, RunDirectory, RunState, now_ms
from shared import healthcheck, local_sockets
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from shared.errors import BlackboardLost, Fault

START_DEADLINE_S = 300.0  # kernels may have to be compiled
HEALTH_TIMEOUT_MS = 2_000
# A process that has drained may need this long to close its connections.
CLOSE_S = 3.0
# Announcements on the blackboard may be lost: it is read this often all the same.
LOOK_AGAIN_S = 0.2


class StartFailed(Exception):
    """The cluster did not come up; the message says which process is to blame and ends with its last output."""


class Cluster:
    """The processes of one cluster. `start`, then `stop`, within one event loop."""

    def __init__(
        self,
        options: ClusterOptions,
        directory: RunDirectory,
        fork_servers: ForkServers,
        echo: Callable[[str, str], None] | None = None,
    ) -> None:
        self._options, self._directory, self._echo = options, directory, echo
        self._fork_servers = fork_servers
        self._processes: list[Supervised] = []
        self._awaited: Sequence[str] = ()
        self._port = None if options.redis_url else Reserved(options.host)
        self._reserved = [self._port] if self._port else []
        if not options.port:  # a gateway that is started again is where clients know it to be
            gateways = in_a_row(options.host, options.num_gateways)
            self._options = replace(options, port=gateways[0].number)
            self._reserved += gateways
        self._sockets = directory.sockets if options.local_sockets else None
        self._socket = self._socket_of_blackboard()
        self._embedded = plan.blackboard(options.host, self._port.number, self._socket) if self._port else None
        redis_url = f"redis://{options.host}:{self._port.number}/0" if self._port else options.redis_url
        self.state = RunState(supervisor_pid=0, started_unix_ms=now_ms(), redis_url=redis_url)

    async def start(self, supervisor_pid: int, deadline_s: float) -> None:
        """Start all and return when the gateway lists the model. Raises StartFailed."""
        model = self._options.served_model_name
        self.state = self.state.model_copy(update={"supervisor_pid": supervisor_pid, "model": model})
        _refuse_taken_ports(self._options)
        board = Blackboard(self.state.redis_url)
        try:
            if self._embedded is not None:
                await self._start(self._embedded)
            await self._until(self._blackboard_answers(), deadline_s)
            board_url = f"unix://{quote(str(self._socket))}?db=0" if self._socket else self.state.redis_url
            for spec in plan.services(self._options, board_url, str(self._sockets or "")):
                await self._start(spec)
            url = await self._until(self._serving(board), deadline_s)
        finally:
            await board.close()
        self.state = self.state.model_copy(update={"url": url})
        self._write()

    def _socket_of_blackboard(self) -> Path | None:
        """Where the services reach the embedded Valkey; others do by its URL."""
        if self._port is None or self._sockets is None:
            return None
        path = self._sockets / "blackboard.sock"
        return path if local_sockets.fits(path) else None

    async def stop(self, grace_s: float) -> None:
        """Stop all: gateways first, so that running requests end, the blackboard last."""
        self._fork_servers.end()
        by_role: dict[str, list[Supervised]] = {}
        for process in self._processes:
            by_role.setdefault(process.spec.role, []).append(process)
        blackboard = by_role.pop(plan.BLACKBOARD, [])
        for group in [*by_role.values(), blackboard]:
            await asyncio.gather(*(process.stop(grace_s + CLOSE_S) for process in group))
        for port in self._reserved:
            port.close()

    def kill(self) -> None:
        """End all at once; `stop` then returns soon."""
        for process in self._processes:
            process.signal(signal.SIGKILL)

    async def _start(self, spec: ProcessSpec) -> None:
        launch = self._fork_servers.launch
        process = Supervised(spec, self._directory.path, on_change=self._write, echo=self._echo, launch=launch)
        self._processes.append(process)
        await process.start()

    async def _blackboard_answers(self) -> None:
        while True:
            try:
                return await healthcheck.check(self.state.redis_url, HEALTH_TIMEOUT_MS)
            except BlackboardLost as fault:
                if self._embedded is None:
                    raise StartFailed(f"no Redis at {self.state.redis_url}: {fault.message}") from None
                await asyncio.sleep(0.02)

    async def _until(self, work: Coroutine[Any, Any, Any], deadline_s: float) -> Any:
        """Do the work, unless a process dies meanwhile or the deadline passes."""
        doing = asyncio.create_task(work)
        deaths = [asyncio.create_task(process.died.wait()) for process in self._processes]
        try:
            await asyncio.wait([doing, *deaths], timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                return doing.result()
            raise StartFailed(self._blame(deadline_s))
        finally:
            for task in (doing, *deaths):
                task.cancel()
            await asyncio.gather(doing, *deaths, return_exceptions=True)

    def _blame(self, deadline_s: float) -> str:
        dead = [process for process in self._processes if process.died.is_set()]
        if dead:
            return "\n".join(_report(process, f"ended at once: {process.last_exit}") for process in dead)
        late = [process for process in self._processes if process.spec.name in self._awaited]
        reason = f"does not serve after {deadline_s:g} s"
        return "\n".join(_report(process, reason) for process in late) or f"the cluster {reason}"

    async def _serving(self, board: Blackboard) -> str:
        """Wait until every process is registered and healthy and the first gateway lists the model; return its URL."""
        async with board.changes() as changes:
            while True:
                registrations = await board.processes(*Role)
                ready = await self._healthy(registrations)
                self._awaited = [name for name in self._service_pids() if name not in ready]
                if not self._awaited:
                    address = self._http_address(registrations)
                    if await _lists_a_model(address):
                        return f"http://{address}"
                    self._awaited = ["gateway-0"]
                await changes.wait(LOOK_AGAIN_S)

    async def _healthy(self, registrations: list[Registration]) -> set[str]:
        pids = self._service_pids()
        ours = [entry for entry in registrations if pids.get(entry.name) == entry.pid]
        answers = await asyncio.gather(
            *(healthcheck.check(entry.address, HEALTH_TIMEOUT_MS) for entry in ours), return_exceptions=True
        )
        defects = [answer for answer in answers if answer is not None and not isinstance(answer, Fault)]
        if defects:
            raise defects[0]
        return {entry.name for entry, answer in zip(ours, answers, strict=True) if answer is None}

    def _service_pids(self) -> dict[str, int | None]:
        return {process.spec.name: process.pid for process in self._processes if process.spec.role != plan.BLACKBOARD}

    def _http_address(self, registrations: list[Registration]) -> str:
        return next(entry.http_address for entry in registrations if entry.name == "gateway-0")

    def _write(self) -> None:
        processes = [
            ProcessState(
                role=process.spec.role,
                name=process.spec.name,
                pid=process.pid,
                num_restarts=process.num_restarts,
                last_exit=process.last_exit,
                log=str(process.log_path),
            )
            for process in self._processes
        ]
        self.state = self.state.model_copy(update={"processes": processes})
        self._directory.write(self.state)


def _refuse_taken_ports(options: ClusterOptions) -> None:
    for port in range(options.port, options.port + options.num_gateways):
        if not is_free(options.host, port):
            raise StartFailed(f"port {port} is taken; choose another with --port, or --port 0 for any")


async def _lists_a_model(address: str) -> bool:
    """What a gateway says at /health, which asks for no API key."""
    return await asyncio.to_thread(_has_models, address)


def _has_models(address: str) -> bool:
    connection = HTTPConnection(address, timeout=HEALTH_TIMEOUT_MS / 1000)  # one question: no client of 0.3 s for it
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status == HTTPStatus.OK and bool(json.loads(answer.read())["models"])
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _report(process: Supervised, reason: str) -> str:
    return "\n".join([f"{process.spec.name} {reason}", *(f"  | {line}" for line in process.last_lines())])
