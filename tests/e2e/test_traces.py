"""One request is one trace through all four services, as an OpenTelemetry collector receives it."""

import httpx

from tests.e2e.cluster import RunningCluster
from tests.e2e.collector import Collector

ANSWERED, LATE = "0af7651916cd43dd8448eb211c80319c", "5b8aa5a2d2c872e8321cf37308d69df2"
CALLER = "b7ad6b7169203331"
ONE_REQUEST = (
    "POST /v1/completions",
    "forebay.v1.RouterService/Route",
    "forebay.v1.DecodeService/Generate",
    "forebay.v1.PrefillService/Prefill",
)


def ask(cluster: RunningCluster, trace_id: str, first: int, **headers: str) -> httpx.Response:
    """A prompt that is worth a prefill worker, cached by nobody."""
    body = {"prompt": [first, *range(2_000)], "max_tokens": 4, "ignore_eos": True}
    trace = {"traceparent": f"00-{trace_id}-{CALLER}-01", "Authorization": "Bearer secret"}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, headers=trace | headers, timeout=60)


def test_a_request_is_one_trace_that_continues_its_callers(
    collector: Collector, guarded_cluster: RunningCluster
) -> None:
    assert ask(guarded_cluster, ANSWERED, first=1, **{"X-Request-Id": "trace-me"}).status_code == 200
    spans = collector.until(ANSWERED, lambda found: {span.name for span in found} >= set(ONE_REQUEST))
    by_name = {span.name: span for span in spans}
    rest, route, generate, prefill = (by_name[name] for name in ONE_REQUEST)
    services = ["forebay-gateway", "forebay-router", "forebay-decode", "forebay-prefill"]
    assert [span.service for span in (rest, route, generate, prefill)] == services
    assert (rest.parent, route.parent, generate.parent) == (CALLER, rest.span_id, rest.span_id)
    assert prefill.parent == generate.span_id
    assert rest.attributes["forebay.request_id"] == "trace-me"
    assert not any(span.is_error for span in spans)


def test_a_request_that_fails_has_a_span_that_says_why(collector: Collector, guarded_cluster: RunningCluster) -> None:
    assert ask(guarded_cluster, LATE, first=2, **{"X-Forebay-Timeout-Ms": "300"}).status_code == 504
    spans = collector.until(LATE, lambda found: any(span.name == ONE_REQUEST[0] for span in found))
    [rest] = [span for span in spans if span.name == ONE_REQUEST[0]]
    assert (rest.is_error, rest.attributes["forebay.fault"]) == (True, "DEADLINE")
