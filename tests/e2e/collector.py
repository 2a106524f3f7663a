"""An OpenTelemetry collector, in the process of its test."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Status

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


@contextmanager
def collecting() -> Iterator[Collector]:
    """One that listens."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
