"""Fixtures for all tests."""

import gc
import logging
from collections.abc import Iterator

import pytest

from tests.valkey import ValkeyProcess

pytest_plugins = ("tests.processes",)

gc.disable()  # until all tests are known: what is imported and collected is there to stay


def pytest_collection_finish() -> None:
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True  # else pytest attaches to each, six times a test, and torch alone has forty
    gc.freeze()  # to look through it was a third of collecting, and took each full collection longer
    gc.enable()


@pytest.fixture(scope="session")
def _session_valkey() -> Iterator[ValkeyProcess]:
    server = ValkeyProcess()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def valkey_url(_session_valkey: ValkeyProcess) -> str:
    """An empty Redis; each test has it for itself."""
    import redis

    with redis.Redis.from_url(_session_valkey.url) as client:
        client.flushall()
    return _session_valkey.url


@pytest.fixture
def valkey() -> Iterator[ValkeyProcess]:
    """A Redis that the test may stop and start."""
    server = ValkeyProcess()
    server.start()
    yield server
    server.stop()
