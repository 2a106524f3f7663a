"""A gateway for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.gateway import glm
from tests.unit.gateway.tiny_tokenizers import byte_level
from tests.unit.gateway.world import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path / "tiny", tokenizer=byte_level())
    await world.start()
    yield world
    await world.close()


@pytest.fixture
async def textless(tmp_path: Path) -> AsyncIterator[World]:
    """A gateway whose model has no tokenizer."""
    world = World(tmp_path / "tiny")
    await world.start()
    yield world
    await world.close()


@pytest.fixture
async def glm_world(tmp_path: Path) -> AsyncIterator[World]:
    """A gateway whose model writes as GLM-5.2 does."""
    world = World(tmp_path / "glm", tokenizer=glm.small_tokenizer(), template=glm.TEMPLATE, max_model_len=2_000)
    await world.start()
    yield world
    await world.close()
