"""Measurements that are taken in later, and spans that are made only where somebody reads them."""

import asyncio
import json
import logging
import time
from datetime import datetime, timedelta
from typing import Any

import pytest
from opentelemetry import context, trace

from shared import rpc
from shared.instruments import MANY, Meter
from shared.telemetry import TRACE_PARENT, Telemetry, log_as_json
from shared.version import version

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Recorded:
    """OpenTelemetry's meter and all its instruments."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, dict[str, str]]] = []

    def create_counter(self, _name: str, **_about: Any) -> "Recorded":
        return self

    create_histogram = create_counter

    def add(self, amount: float, labels: dict[str, str]) -> None:
        self.seen.append((amount, labels))

    record = add


def meter(recorded: Any) -> Meter:
    return Meter(recorded)


async def test_a_sum_is_taken_in_a_moment_later_and_once_for_each_label() -> None:
    recorded = Recorded()
    counter = meter(recorded).create_counter("c", description="")
    for amount, fault in ((1, "a"), (2, "b"), (3, "a")):
        counter.add(amount, {"fault": fault})
    assert recorded.seen == []
    async with asyncio.timeout(20):
        while not recorded.seen:  # noqa: ASYNC110 - a timer of the event loop tells nobody
            await asyncio.sleep(0.01)
    assert recorded.seen == [(4, {"fault": "a"}), (2, {"fault": "b"})]


async def test_where_there_are_many_they_are_taken_in_a_turn_later() -> None:
    recorded = Recorded()
    counter = meter(recorded).create_counter("c", description="")
    for _ in range(MANY + 1):
        counter.add(1)
    assert recorded.seen == []
    await asyncio.sleep(0)
    assert recorded.seen == [(MANY + 1, {})]


async def test_every_value_of_a_distribution_is_recorded() -> None:
    recorded = Recorded()
    meter_ = meter(recorded)
    histogram = meter_.create_histogram("h", description="")
    histogram.record(0.5)
    histogram.record(0.5)
    meter_.take_in()
    assert recorded.seen == [(0.5, {}), (0.5, {})]


def test_where_no_event_loop_runs_nothing_is_put_off() -> None:
    recorded = Recorded()
    meter(recorded).create_counter("c", description="").add(1)
    assert recorded.seen == [(1, {})]


async def test_what_is_read_is_complete() -> None:
    telemetry = Telemetry("router", "router-0")
    counter = telemetry.meter.create_counter("forebay_things", description="Things")
    for expected in (1, 2):
        counter.add(1)
        assert telemetry.registry.get_sample_value("forebay_things_total") == expected
    telemetry.close()


def test_what_takes_time_is_told_apart_from_half_a_millisecond_to_minutes() -> None:
    telemetry = Telemetry("router", "router-0")
    histogram = telemetry.meter.create_histogram("forebay_waits", description="Waits")
    for seconds in (0.0007, 0.03, 45):
        histogram.record(seconds)
    below = [
        telemetry.registry.get_sample_value("forebay_waits_seconds_bucket", {"le": bound})
        for bound in ("0.0005", "0.001", "0.05", "10.0", "60.0")
    ]
    assert below == [0, 1, 2, 2, 3]
    telemetry.close()


def test_a_process_tells_its_memory_and_version() -> None:
    telemetry = Telemetry("router", "router-0")
    assert (telemetry.registry.get_sample_value("process_resident_memory_bytes") or 0) > 1 << 20
    telemetry.meter.create_counter("forebay_things", description="Things").add(1)
    samples = [sample for metric in telemetry.registry.collect() for sample in metric.samples]
    [target] = [sample for sample in samples if sample.name == "target_info"]
    assert target.labels["service_version"] == version()
    telemetry.close()


def test_a_log_line_tells_the_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    log_as_json("router", "router-0", "INFO")
    logging.getLogger("test").info("hello")
    root.handlers[:], _ = before
    root.setLevel(before[1])
    line = json.loads(capsys.readouterr().err)
    assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
    assert abs(datetime.fromisoformat(line["time"]).timestamp() - time.time()) < 60
    assert (line["role"], line["process"], line["level"], line["message"]) == ("router", "router-0", "INFO", "hello")


@pytest.fixture
def bare_context() -> Any:
    token = context.attach(context.Context())
    yield
    context.detach(token)


@pytest.mark.usefixtures("bare_context")
def test_no_span_is_made_where_nobody_reads_it() -> None:
    telemetry = Telemetry("router", "router-0")
    assert telemetry.begin("Route", {}) is trace.INVALID_SPAN
    assert rpc.outgoing() == ()
    telemetry.close()


@pytest.mark.usefixtures("bare_context")
def test_a_callers_trace_is_passed_on_as_it_came() -> None:
    telemetry = Telemetry("router", "router-0")
    telemetry.begin("Route", {TRACE_PARENT: PARENT})
    assert rpc.outgoing() == ((TRACE_PARENT, PARENT),)
    telemetry.close()


@pytest.mark.usefixtures("bare_context")
def test_a_span_that_is_read_continues_its_callers_trace(capfd: pytest.CaptureFixture[str]) -> None:
    telemetry = Telemetry("router", "router-0", "console")
    span = telemetry.begin("Route", {TRACE_PARENT: PARENT})
    [(_, sent)] = rpc.outgoing()
    span.end()
    telemetry.close()
    _, trace_id, span_id, _ = sent.split("-")
    assert trace_id == TRACE_ID
    assert span_id == trace.format_span_id(span.get_span_context().span_id)
    assert f'"trace_id": "0x{TRACE_ID}"' in capfd.readouterr().err
