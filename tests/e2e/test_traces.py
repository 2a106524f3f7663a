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

from tests.e2e.cluster import RunningCluster, running

ANSWERED, LATE = "0af7651916cd43dd8448eb211c80319c", "5b8aa5a2d2c872e8321cf37308d69df2"
CALLER = "b7ad6b7169203331"
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
    """Keeps what it is sent, at `port`."""

    port: int = 0
    spans: list[Span] = field(default_factory=list)

    def Export(self, request: Any, _context: Any) -> Any:
        for group in request.resource_spans:
            about = _plain(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [_span(about["service.name"], sent) for sent in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def until(self, trace_id: str, condition: Callable[[list[Span]], object]) -> list[Span]:
        """Wait for spans of a trace that meet a condition."""
        end = time.monotonic() + DEADLINE_S
        while not condition(found := [span for span in self.spans if span.trace_id == trace_id]):
            assert time.monotonic() < end, f"not in {DEADLINE_S} s; last: {found}"
            time.sleep(0.05)
        return found


def _plain(attributes: Any) -> dict[str, str]:
    return {entry.key: entry.value.string_value for entry in attributes}


def _span(service: str, sent: Any) -> Span:
    ids = sent.span_id.hex(), sent.parent_span_id.hex(), sent.trace_id.hex()
    return Span(service, sent.name, *ids, sent.status.code == Status.STATUS_CODE_ERROR, _plain(sent.attributes))


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector
    server.stop(None).wait()


@pytest.fixture(scope="module")
def cluster(collector: Collector) -> Iterator[RunningCluster]:
    """Sends its spans to the collector, soon, and takes a second for a prompt."""
    router = "--router-flags=--remote-prefill-min-tokens 1 --traces otlp"
    worker = "--worker-flags=--sim-prefill-ms-per-token 0.5 --traces otlp"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.port}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running("--engine", "sim", router, worker, "--gateway-flags=--traces otlp") as cluster:
            yield cluster


def ask(cluster: RunningCluster, trace_id: str, first: int, **headers: str) -> httpx.Response:
    """A prompt that is worth a prefill worker, cached by nobody."""
    body = {"prompt": [first, *range(2_000)], "max_tokens": 4, "ignore_eos": True}
    trace = {"traceparent": f"00-{trace_id}-{CALLER}-01"}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=trace | headers, timeout=60)


def test_a_request_is_one_trace_that_continues_its_callers(collector: Collector, cluster: RunningCluster) -> None:
    assert ask(cluster, ANSWERED, first=1, **{"X-Request-Id": "trace-me"}).status_code == 200
    spans = collector.until(ANSWERED, lambda found: {span.name for span in found} >= set(ONE_REQUEST))
    by_name = {span.name: span for span in spans}
    rest, route, generate, prefill = (by_name[name] for name in ONE_REQUEST)
    services = ["forebay-gateway", "forebay-router", "forebay-decode", "forebay-prefill"]
    assert [span.service for span in (rest, route, generate, prefill)] == services
    assert (rest.parent, route.parent, generate.parent) == (CALLER, rest.span_id, rest.span_id)
    assert prefill.parent == generate.span_id
    assert rest.attributes["forebay.request_id"] == "trace-me"
    assert not any(span.is_error for span in spans)


def test_a_request_that_fails_has_a_span_that_says_why(collector: Collector, cluster: RunningCluster) -> None:
    assert ask(cluster, LATE, first=2, **{"X-Forebay-Timeout-Ms": "300"}).status_code == 504
    spans = collector.until(LATE, lambda found: any(span.name == ONE_REQUEST[0] for span in found))
    [rest] = [span for span in spans if span.name == ONE_REQUEST[0]]
    assert (rest.is_error, rest.attributes["forebay.fault"]) == (True, "DEADLINE")
