"""Metrics as Prometheus' conventions have them: base units, counters that end in _total, an explanation of each."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric

from services.gateway.config import GatewayConfig
from services.gateway.meters import Meters
from services.router.admission import Admission, Limits
from services.router.config import RouterConfig
from shared.blackboard.board import Blackboard
from shared.telemetry import Telemetry
from shared.worker.config import WorkerConfig
from shared.worker.measures import Measures
from tests.unit.engine_rig import Rig

LIMITS = Limits(max_queued=1)
NO_BASE_UNIT = ("_ms", "_milliseconds", "_mb", "_kb", "_percent", "_minutes")


@pytest.fixture
def metrics() -> Iterator[list[Metric]]:
    """All that gateways and workers measure, and a router's admission, each measured once."""
    telemetry, board = Telemetry("all", "all-0"), Blackboard("redis://127.0.0.1:1/0")
    gateway, worker = Meters(telemetry.meter), Measures(telemetry.meter, Rig().engine)
    Admission(board.admission, "router-0", LIMITS, telemetry.meter)
    gateway.responded("/v1/models", 200)
    gateway.recovered("WORKER_LOST", 0.0)
    worker.transferred(1, 0.1)
    worker.requests.add(1)
    worker.first_token.record(0.1)
    yield [metric for metric in telemetry.registry.collect() if metric.name.startswith("forebay_")]
    telemetry.close()


def test_names_have_base_units_and_counters_end_in_total(metrics: list[Metric]) -> None:
    assert len(metrics) > 15
    for metric in metrics:
        assert not metric.name.endswith(NO_BASE_UNIT), metric.name
        if metric.type == "counter":
            assert all(sample.name.endswith("_total") for sample in metric.samples), metric.name
        if metric.type == "histogram":
            assert metric.name.endswith("_seconds"), metric.name


def test_each_says_in_words_what_it_is(metrics: list[Metric]) -> None:
    for metric in metrics:
        assert len(metric.documentation.split()) >= 2, metric.name
        assert "_" not in metric.documentation, metric.name


ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def test_every_metric_that_operators_are_told_of_exists() -> None:
    sources = "".join(path.read_text() for room in ("services", "shared") for path in (ROOT / room).rglob("*.py"))
    told = set(re.findall(r"\bforebay_[a-z_]+", OPERATIONS))
    for name in told:
        base = re.sub(r"(_bucket|_sum|_count|_total)$", "", name)
        names = {base, base.removesuffix("_seconds"), re.sub("(verified|accepted)$", "{name}", base)}
        facts = base.removeprefix("forebay_")
        assert any(f'"{known}"' in sources for known in names | {facts}), name
    assert len(told) > 20


def test_every_flag_that_operators_are_told_of_exists() -> None:
    settings = {name for kind in (GatewayConfig, RouterConfig, WorkerConfig) for name in kind.model_fields}
    known = {f"--{name.replace('_', '-')}" for name in settings} | {"--help", "--redis", "--json", "--url"}
    told = set(re.findall(r"(?<!\w)--[a-z][a-z-]+", OPERATIONS)) - {"--gpus", "--gpu-memory"}
    assert told - known == set()
