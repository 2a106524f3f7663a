"""Clusters of real processes. What a test kills or restarts in a shared one comes back and is waited for by the next;
who needs other flags, or processes that know nothing of requests before, takes `start_cluster`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.client import SLOW
from tests.e2e.cluster import HAND_OVER, RunningCluster, running
from tests.e2e.collector import Collector, collecting


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
    """One prefill and one decode worker that compute the default model in float32, a long prompt in several steps."""
    workers = "--worker-flags=--kv-cache-mb 512 --max-step-tokens 64"
    with running("--dtype", "float32", workers, HAND_OVER, executed=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="session")
def guarded_cluster(collector: Collector) -> Iterator[RunningCluster]:
    """Asks for API keys, "secret" or "other" (of tenant "team"), sends its spans to the collector, soon, and takes a
    second for a prompt."""
    gateway = "--gateway-flags=--api-key secret --api-key other=team --traces otlp"
    router = "--router-flags=--remote-prefill-min-tokens 1 --traces otlp"
    worker = "--worker-flags=--sim-prefill-ms-per-token 0.5 --traces otlp"
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("FOREBAY_API_KEY", raising=False)
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
            patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
            cluster = stack.enter_context(running("--engine", "sim", gateway, router, worker))
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
