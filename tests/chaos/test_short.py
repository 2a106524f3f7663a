"""A minute of faults under load: every request ends, no token is wrong, nothing leaks, nobody else is hurt."""

import asyncio
import logging
import random
import time

from tests.chaos.faults import Faults
from tests.chaos.load import Clients
from tests.e2e.cluster import running

log = logging.getLogger(__name__)

SEED, NUM_CLIENTS, SECONDS = 5, 12, 45.0
LEASE_S = 10.0
FLAGS = (
    *("--engine", "sim", "--prefill", "2", "--decode", "2", "--routers", "2"),
    "--worker-flags=--sim-prefill-ms-per-token 0.5 --sim-decode-ms 8",
    "--router-flags=--local-prefill-max-tokens 32",
    "--gateway-flags=--request-timeout-ms 30000",
)


async def test_faults_under_load_cost_no_token_and_no_page() -> None:
    with running(*FLAGS) as cluster:
        clients = Clients(cluster.url, cluster.model, SEED)
        faults = Faults(cluster, random.Random(SEED))
        hitting = asyncio.create_task(faults.run())
        until = time.monotonic() + SECONDS
        await asyncio.gather(*(clients.run(number, until) for number in range(NUM_CLIENTS)))
        assert not hitting.done(), hitting.exception()
        hitting.cancel()
        await asyncio.wait([hitting])
        await cluster.until(lambda rows: all(row["state"] == "serving" for row in rows.values()))
        await cluster.until_pages_are_free(LEASE_S + 5)
        rows = await cluster.status()
    tally = clients.tally
    log.info("requests by end: %s; faults: %s", dict(tally.ended), dict(faults.done))
    log.info("%d tokens; longest gap between two: %.2f s", tally.num_tokens, tally.longest_gap_s)
    assert tally.wrong == [], tally
    assert tally.ended["complete"] > 100
    assert sum(faults.done.values()) > 10
    assert {name: row["num_restarts"] for name, row in rows.items()} == {name: faults.restarts[name] for name in rows}
