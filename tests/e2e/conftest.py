"""Clusters of real processes. What a test kills or restarts in a shared one comes back and is waited for by the next;
who needs other flags, or processes that know nothing of requests before, takes `start_cluster`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.client import SLOW
from tests.e2e.cluster import HAND_OVER, RunningCluster, running


@pytest.fixture(scope="session")
def sim_cluster() -> Iterator[RunningCluster]:
    """One prefill and one decode worker that pretend to compute."""
    with running("--engine", "sim") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def _slow_cluster() -> Iterator[RunningCluster]:
    with running("--engine", "sim", "--prefill", "2", "--decode", "2", SLOW, HAND_OVER) as cluster:
        yield cluster


@pytest.fixture
async def slow_cluster(_slow_cluster: RunningCluster) -> RunningCluster:
    """Two prefill and two decode workers that take their time, all of them serving. What they cache they may have."""
    await _slow_cluster.until_all_serve()
    return _slow_cluster


@pytest.fixture(scope="session")
def model_cluster() -> Iterator[RunningCluster]:
    """One prefill and one decode worker that compute the default model in float32."""
    with running("--dtype", "float32", "--worker-flags=--kv-cache-mb 512", HAND_OVER) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GLM-5.2, which selects 8 of the visible tokens, and drafts."""
    from shared.engine.models import tiny

    path = tmp_path_factory.mktemp("model") / "glm"
    tiny.write("glm-5.2", path)
    return path


@pytest.fixture
def start_cluster() -> Iterator[Callable[..., RunningCluster]]:
    """Starts a cluster by the flags of `forebay up`; it is stopped after the test."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(running(*flags))
