"""A minute of faults under load: every request ends, no token is wrong, nothing leaks, nobody else is hurt."""

import logging

from tests.chaos.run import Plan, sim

logging.getLogger("httpx").setLevel(logging.WARNING)
log = logging.getLogger(__name__)

SHORT = Plan(
    num_requests=400,
    seconds=22,
    num_clients=8,
    client_pause_s=0.3,
    num_prefill=2,
    num_decode=2,
    other_pause_s=(4.0, 10.0),
    decode_ms=8.0,
)


async def test_faults_under_load_cost_no_token_and_no_page() -> None:
    report = await sim(SHORT)
    log.info("\n%s", report.table())
    assert report.violations({}) == []
    assert report.num_complete > 50
    assert len(report.faults) > 10
