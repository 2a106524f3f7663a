"""One request is one trace through all four services, as an OpenTelemetry collector receives it."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.e2e.client import Start
from tests.e2e.cluster import RunningCluster

TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ONE_REQUEST = (
    "POST /v1/completions",
    "forebay.v1.RouterService/Route",
    "forebay.v1.DecodeService/Generate",
    "forebay.v1.PrefillService/Prefill",
)
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Span:
    """One that was received; `parent` is a span id."""

    service: str
    name: str
    span_id: str
    parent: str
    trace_id: str
    is_error: bool
    attributes: dict[str, str]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    spans: list[Span] = field(default_factory=list)

    def Export(self, request: Any, _context: Any) -> Any:
        for group in request.resource_spans:
            about = _plain(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [_span(about["service.name"], sent) for sent in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def until(self, condition: Callable[[list[Span]], object]) -> list[Span]:
        """Wait for spans of the test's trace that meet a condition."""
        end = time.monotonic() + DEADLINE_S
        while not condition(found := [span for span in self.spans if span.trace_id == TRACE_ID]):
            assert time.monotonic() < end, f"not in {DEADLINE_S} s; last: {found}"
            time.sleep(0.05)
        return found


def _plain(attributes: Any) -> dict[str, str]:
    return {entry.key: entry.value.string_value for entry in attributes}


def _span(service: str, sent: Any) -> Span:
    ids = sent.span_id.hex(), sent.parent_span_id.hex(), sent.trace_id.hex()
    return Span(service, sent.name, *ids, sent.status.code == Status.STATUS_CODE_ERROR, _plain(sent.attributes))


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Listens where processes that are started meanwhile send their spans, which they do soon."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield collector
    server.stop(None).wait()


def ask(cluster: RunningCluster, **headers: str) -> httpx.Response:
    """A prompt that is worth a prefill worker."""
    body = {"prompt": list(range(2_000)), "max_tokens": 4, "ignore_eos": True}
    trace = {"traceparent": f"00-{TRACE_ID}-{CALLER}-01"}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=trace | headers, timeout=60)


def test_a_request_is_one_trace_that_continues_its_callers(collector: Collector, start_cluster: Start) -> None:
    router = "--router-flags=--remote-prefill-min-tokens 1 --traces otlp"
    cluster = start_cluster(
        "--engine", "sim", router, *(f"--{role}-flags=--traces otlp" for role in ("gateway", "worker"))
    )
    assert ask(cluster, **{"X-Request-Id": "trace-me"}).status_code == 200
    spans = collector.until(lambda found: {span.name for span in found} >= set(ONE_REQUEST))
    by_name = {span.name: span for span in spans}
    rest, route, generate, prefill = (by_name[name] for name in ONE_REQUEST)
    services = ["forebay-gateway", "forebay-router", "forebay-decode", "forebay-prefill"]
    assert [span.service for span in (rest, route, generate, prefill)] == services
    assert (rest.parent, route.parent, generate.parent) == (CALLER, rest.span_id, rest.span_id)
    assert prefill.parent == generate.span_id
    assert rest.attributes["forebay.request_id"] == "trace-me"
    assert not any(span.is_error for span in spans)


def test_a_request_that_fails_has_a_span_that_says_why(collector: Collector, start_cluster: Start) -> None:
    cluster = start_cluster(
        "--engine", "sim", "--worker-flags=--sim-prefill-ms-per-token 5", "--gateway-flags=--traces otlp"
    )
    assert ask(cluster, **{"X-Forebay-Timeout-Ms": "300"}).status_code == 504
    [rest] = collector.until(len)
    assert (rest.is_error, rest.attributes["forebay.fault"]) == (True, "DEADLINE")
