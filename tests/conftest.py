"""Fixtures for all tests, and what several processes that share them out are told."""

import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.valkey import ValkeyProcess

IS_SHARED_OUT = "PYTEST_XDIST_WORKER" in os.environ

gc.disable()  # until all tests are known: what is imported and collected is there to stay

if IS_SHARED_OUT:  # known before torch is imported: the cores are for all
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    from tests import sharing

    return sharing.num_processes()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from tests import sharing

    return sharing.Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    if IS_SHARED_OUT:
        from tests import sharing

        sharing.import_tests(session.config.args, *sharing.place_among_processes(os.environ))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IS_SHARED_OUT:
        from tests import sharing

        items.sort(key=lambda item: sharing.place(item.nodeid))


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
