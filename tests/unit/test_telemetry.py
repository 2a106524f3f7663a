"""Measurements that are taken in later, and spans that are made only where somebody reads them."""

import asyncio
from typing import Any

import pytest
from opentelemetry import context, trace

from shared import rpc
from shared.instruments import Meter
from shared.telemetry import TRACE_PARENT, Telemetry

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


async def test_every_value_of_a_distribution_is_recorded() -> None:
    recorded = Recorded()
    meter_ = meter(recorded)
    histogram = meter_.create_histogram("h", unit="s", description="")
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
