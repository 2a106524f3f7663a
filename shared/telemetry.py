"""Logs, traces and metrics of a process.

Logs are one JSON object a line with the request and trace ids of the work at hand. Traces are OpenTelemetry spans,
carried through every hop as W3C trace context. Metrics are OpenTelemetry instruments, read by Prometheus.
"""

import logging
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Protocol
from wsgiref.simple_server import WSGIRequestHandler, make_server

from opentelemetry import context, propagate, trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider, sampling
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, Tracer
from prometheus_client import CollectorRegistry, Metric, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from pythonjsonlogger.json import JsonFormatter

from shared.errors import Fault
from shared.instruments import Meter
from shared.version import version

TRACE_PARENT = "traceparent"
DAY_S = 86_400.0

request_id: ContextVar[str] = ContextVar("request_id", default="")


class TelemetryConfig(Protocol):
    """The fields of ServiceConfig that telemetry reads."""

    @property
    def host(self) -> str:
        """Interface of the metrics endpoint."""

    @property
    def metrics_port(self) -> int:
        """Port of the metrics endpoint; 0 takes a free one."""

    @property
    def log_level(self) -> str:
        """Least severe level that is logged."""

    @property
    def traces(self) -> str:
        """none, console or otlp."""


class Telemetry:
    """The tracer, the meter and the metrics registry of one process."""

    def __init__(self, role: str, name: str, traces: str = "none") -> None:
        about = {"service.name": f"forebay-{role}", "service.instance.id": name, "service.version": version()}
        resource = Resource.create(about)
        exporter = _exporter(traces)
        self._records = exporter is not None
        sampler = sampling.ALWAYS_OFF if exporter is None else sampling.DEFAULT_ON
        self._tracers = TracerProvider(sampler, resource)
        if exporter is not None:
            self._tracers.add_span_processor(BatchSpanProcessor(exporter))
        self.registry = _Registry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        reader = PrometheusMetricReader(scope_info_enabled=False, registry=self.registry)
        self._meters = MeterProvider(resource=resource, metric_readers=[reader], shutdown_on_exit=False)
        self.tracer: Tracer = self._tracers.get_tracer("forebay")
        self.meter = self.registry.meter = Meter(self._meters.get_meter("forebay"))

    def begin(self, name: str, headers: Mapping[str, str], attributes: Mapping[str, str] | None = None) -> Span:
        """The span of a call that came with these headers, for its task to work in; the caller ends it.

        Where nobody reads spans there is none, and a caller's trace is passed on as it came.
        """
        if not self._records and TRACE_PARENT not in headers:
            return trace.INVALID_SPAN
        parent = propagate.extract(headers)
        span = trace.get_current_span(parent)
        if self._records:
            about = {"forebay.request_id": request_id.get()} | dict(attributes or {})
            span = self.tracer.start_span(name, parent, SpanKind.SERVER, about)
        context.attach(trace.set_span_in_context(span, parent))
        return span

    def serve_metrics(self, host: str, port: int) -> int:
        """Answer Prometheus at http://host:port/metrics from a thread; return the port. Raises OSError."""
        server_class = _Ipv6Server if ":" in host else ThreadingWSGIServer
        try:
            server = make_server(host, port, make_wsgi_app(self.registry), server_class, _SilentHandler)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} for metrics: {error.strerror}") from error
        # prometheus_client's own thread wakes twice a second, to see whether it is to end; this one ends with its
        # process.
        threading.Thread(target=server.serve_forever, args=(DAY_S,), name="metrics", daemon=True).start()
        return int(server.server_port)

    def close(self) -> None:
        """Send what is left of the spans."""
        self.meter.take_in()
        self._tracers.shutdown()
        self._meters.shutdown()


class _Ipv6Server(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each reading."""


class _Registry(CollectorRegistry):
    """What Prometheus reads, complete at that moment."""

    meter: Meter

    def collect(self) -> Iterable[Metric]:
        """All metrics, with the last measurements."""
        self.meter.take_in()
        return super().collect()


def failed(fault: Fault) -> None:
    """The span at hand ends in a fault."""
    span = trace.get_current_span()
    span.set_status(trace.StatusCode.ERROR, fault.message)
    span.set_attribute("forebay.fault", fault.reason)


def start(role: str, name: str, config: TelemetryConfig) -> tuple[Telemetry, int]:
    """Set up logging and telemetry of a process; return it and the port of its metrics endpoint."""
    log_as_json(role, name, config.log_level)
    telemetry = Telemetry(role, name, config.traces)
    return telemetry, telemetry.serve_metrics(config.host, config.metrics_port)


def log_as_json(role: str, name: str, level: str) -> None:
    """Make the root logger write JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "{levelname}{name}{message}",
            style="{",
            rename_fields={"levelname": "level", "name": "logger"},
            static_fields={"role": role, "process": name},
            timestamp="time",  # in UTC, as ISO 8601 has it
        )
    )
    handler.addFilter(_add_ids)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # it tells a terminal, in colours, what we say ourselves


def _add_ids(record: logging.LogRecord) -> bool:
    if (current := request_id.get()) and not hasattr(record, "request_id"):
        record.request_id = current
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        record.trace_id = trace.format_trace_id(span.trace_id)
    return True


def _exporter(traces: str) -> SpanExporter | None:
    if traces == "console":
        return ConsoleSpanExporter(out=sys.stderr)
    if traces == "otlp":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    return None
