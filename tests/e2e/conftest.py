"""Clusters of real processes. Tests that kill or restart something take `start_cluster` and a cluster of their own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.cluster import HAND_OVER, RunningCluster, running


@pytest.fixture(scope="module")
def sim_cluster() -> Iterator[RunningCluster]:
    """One prefill and one decode worker that pretend to compute."""
    with running("--engine", "sim") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def model_cluster() -> Iterator[RunningCluster]:
    """One prefill and one decode worker that compute the default model in float32."""
    with running("--dtype", "float32", "--worker-flags=--kv-cache-mb 512", HAND_OVER) as cluster:
        yield cluster


@pytest.fixture
def start_cluster() -> Iterator[Callable[..., RunningCluster]]:
    """Starts a cluster by the flags of `forebay up`; it is stopped after the test."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(running(*flags))
