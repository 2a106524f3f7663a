"""`make chaos`: the long run. Prints a table; ends with 1 if something happened that must not."""

import argparse
import asyncio
import logging
import sys

from bench.provenance import banner
from tests.chaos.faults import KILL, STOP
from tests.chaos.run import Plan, sim

# Of the 99th percentile; docs/recovery.md derives them.
STALL_LIMITS_S = {KILL: 0.25, STOP: 2.0}


def main() -> int:
    """Run once as the command line says."""
    options = _options()
    sys.stdout.write(f"{banner('chaos')}\n")
    report = asyncio.run(sim(Plan(seed=options.seed, num_requests=options.requests, seconds=options.minutes * 60)))
    violations = report.violations(STALL_LIMITS_S)
    sys.stdout.write("\n".join(["", report.table(), "", *(violations or ["nothing happened that must not"]), ""]))
    return 1 if violations else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of requests and faults")
    parser.add_argument("--requests", type=int, default=Plan.num_requests, help="end after so many")
    parser.add_argument("--minutes", type=float, default=Plan.seconds / 60, help="end then at the latest")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
