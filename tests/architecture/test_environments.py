"""The gateway and the router run without torch: shown where there is nothing but what their extras bring.

Each service runs in an environment of links to what is installed here, chosen as pip chooses: by what each distribution
says it requires. That pip does choose so is seen once, where `deploy/install` installs both extras from an index of
distributions that say the same and hold nothing: the real ones would say nothing more for five times as much computing,
and are what `make` has installed here.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared import healthcheck
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from tests.architecture import linked, wheels
from tests.architecture.machine import Machine
from tests.architecture.tree import ROOT

DEADLINE_S = 60.0
HEALTH_TIMEOUT_MS = 10_000


@pytest.fixture(scope="module", params=["router", "gateway"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A service and the Python of an environment that has only its extra."""
    environment = tmp_path_factory.mktemp(request.param) / "venv"
    linked.make(environment, brought("forebay", request.param))
    return request.param, environment / "bin" / "python"


def brought(name: str, extra: str) -> Iterator[Distribution]:
    """What installing `name[extra]` brings: itself, what it requires, what that requires, and so on."""
    found: set[tuple[str, str]] = set()
    waiting = [(name, ""), (name, extra)]
    while waiting:
        name, extra = each = waiting.pop()
        if each in found:
            continue
        found.add(each)
        about = distribution(name)
        if not extra:
            yield about
        for required in map(Requirement, about.requires or ()):
            if required.marker is None or required.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(required.name), more) for more in ("", *required.extras)]


def test_what_is_installed_is_what_is_linked_and_no_torch(tmp_path: Path) -> None:
    own = distribution("forebay")
    extras = own.metadata.get_all("Provides-Extra") or []
    machine = Machine(tmp_path, tmp_path / "venv", wheels.metadata("forebay", "1", own.requires or (), extras))
    for each in distributions():
        machine.offers("pip", each.name, each.version, *(each.requires or ()))
    assert not machine.venv.exists()
    installed = machine.install("gateway,router").keys()
    machine.leave()
    assert installed == names(brought("forebay", "gateway")) | names(brought("forebay", "router"))
    assert not installed & {"torch", "nixl-cu13", "safetensors"}


def names(found: Iterable[Distribution]) -> set[str]:
    return {canonicalize_name(each.name) for each in found}


def test_the_environment_of_a_service_holds_no_torch(service: tuple[str, Path]) -> None:
    _, python = service
    code = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ['torch', 'nixl_cu13', 'safetensors'])))"
    assert subprocess.run([python, "-c", code], cwd=ROOT, check=False).returncode == 0


async def test_a_service_serves_and_drains_with_its_own_extra_alone(service: tuple[str, Path], valkey_url: str) -> None:
    role, python = service
    command = [str(python), "-m", f"services.{role}", "--redis-url", valkey_url, "--name", "alone"]
    environment = {**os.environ, "FOREBAY_HTTP_PORT": "0"}
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    try:
        registration = await _registered(valkey_url, Role(role), process)
        await healthcheck.check(registration.address, HEALTH_TIMEOUT_MS)
        process.send_signal(signal.SIGTERM)
        _, log = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == 0, log.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def _registered(redis_url: str, role: Role, process: asyncio.subprocess.Process) -> Registration:
    board = Blackboard(redis_url)
    ended = asyncio.create_task(process.wait())
    try:
        async with asyncio.timeout(DEADLINE_S), board.changes() as changes:
            while not (found := await board.processes(role)):
                assert not ended.done(), f"it ended with {process.returncode}"
                await changes.wait(0.2)
            return found[0]
    finally:
        ended.cancel()
        await board.close()
