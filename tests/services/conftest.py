"""Fixtures of the service tests: a fleet with a prefill and a decode worker."""

from collections.abc import AsyncGenerator

import pytest

from tests.services.workers import Fleet, Running, fleet


@pytest.fixture
async def world() -> AsyncGenerator[Fleet, None]:
    async with fleet() as made:
        yield made


@pytest.fixture
async def prefill(world: Fleet) -> Running:
    return await world.start("prefill")


@pytest.fixture
async def decode(world: Fleet) -> Running:
    return await world.start("decode")
