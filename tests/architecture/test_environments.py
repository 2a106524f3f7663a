"""The gateway and the router run without torch: shown where there is nothing but what their extras bring.

`deploy/install` installs both extras, from an index of all that is installed here: what these bring with its files, the
rest without. Either service runs there; and each by itself in an environment of links to the same files, chosen by what
each distribution says it requires.
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """What `deploy/install` makes of both extras."""
    own, root = distribution("forebay"), tmp_path_factory.mktemp("both")
    extras = own.metadata.get_all("Provides-Extra") or []
    machine = Machine(root, root / "venv", wheels.metadata("forebay", "1", own.requires or (), extras))
    wanted = names([*brought("forebay", "gateway"), *brought("forebay", "router")])
    for each in distributions():
        files = linked.files(each) if canonicalize_name(each.name) in wanted else {}
        machine.offers("pip", each.name, each.version, *(each.requires or ()), files=files)
    assert not machine.venv.exists()
    machine.install("gateway,router")
    machine.close()
    return machine


@pytest.fixture(scope="module", params=["router", "gateway"])
def role(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module", params=["its own extra", "both extras, installed"])
def python(
    role: str, request: pytest.FixtureRequest, installed: Machine, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """That of an environment which has only what a service's extra brings, or both."""
    environment = installed.venv
    if request.param == "its own extra":
        environment = tmp_path_factory.mktemp(role) / "venv"
        linked.make(environment, brought("forebay", role))
    return environment / "bin" / "python"


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


def test_what_is_installed_is_what_is_linked_and_no_torch(installed: Machine) -> None:
    found = {canonicalize_name(each.name) for each in installed.installed()}
    assert found == names(brought("forebay", "gateway")) | names(brought("forebay", "router"))
    assert not found & {"torch", "nixl-cu13", "safetensors"}


def names(found: Iterable[Distribution]) -> set[str]:
    return {canonicalize_name(each.name) for each in found}


def test_the_environment_of_a_service_holds_no_torch(python: Path) -> None:
    code = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ['torch', 'nixl_cu13', 'safetensors'])))"
    assert subprocess.run([python, "-c", code], cwd=ROOT, check=False).returncode == 0


async def test_a_service_serves_and_drains_there(role: str, python: Path, valkey_url: str) -> None:
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
