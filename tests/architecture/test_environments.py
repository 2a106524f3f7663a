"""The gateway and the router run where torch is not installed: shown by really installing only their extras."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared import healthcheck
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from tests.architecture.tree import ROOT

DEADLINE_S = 60.0
HEALTH_TIMEOUT_MS = 10_000


@pytest.fixture(scope="module", params=["router", "gateway"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A service and the Python of an environment that has only its extra."""
    venv = tmp_path_factory.mktemp(request.param) / "venv"
    install = [str(ROOT / "deploy" / "install"), sys.executable, str(venv), request.param]
    # What is not imported is not compiled.
    environment = os.environ | {"PIP_NO_COMPILE": "1"}
    done = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return request.param, venv / "bin" / "python"


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
