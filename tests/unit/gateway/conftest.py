"""A gateway for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.gateway.world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path / "tiny")
    await world.start()
    yield world
    await world.close()


@pytest.fixture
async def textless(tmp_path: Path) -> AsyncIterator[World]:
    """A gateway whose model has no tokenizer."""
    world = World(tmp_path / "tiny", tokenizer=False)
    await world.start()
    yield world
    await world.close()
