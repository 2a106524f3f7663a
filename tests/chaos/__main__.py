"""`make chaos`: the long run. Prints a table; ends with 1 if something happened that must not."""

import argparse
import asyncio
import logging
import sys
from dataclasses import replace

from bench.provenance import banner
from tests.chaos.faults import END, KILL, STOP
from tests.chaos.run import Plan, model, sim

# Of the 99th percentile, on the sim engine; docs/recovery.md derives them.
STALL_LIMITS_S = {KILL: 0.25, STOP: 2.0}
ROLES = ("decode", "prefill", "gateway", "router", "blackboard")
SIM = Plan()
# Computing on two cores: everything takes longer, so everything comes more slowly.
MODEL = Plan(
    seconds=210.0,
    num_clients=4,
    client_pause_s=0.2,
    num_prefill=1,
    num_decode=2,
    worker_pause_s=(4.0, 10.0),
    other_pause_s=(10.0, 30.0),
    prefill_ms_per_token=1.0,
)


def main() -> int:
    """Run once as the command line says."""
    options = _options()
    sys.stdout.write(f"{banner('tests.chaos')}\n")
    run, base, limits = (sim, SIM, STALL_LIMITS_S) if options.engine == "sim" else (model, MODEL, {})
    num_requests, seconds = options.requests or base.num_requests, options.minutes * 60 or base.seconds
    plan = replace(base, seed=options.seed, num_requests=num_requests, seconds=seconds, only=options.only)
    plan = replace(plan, worker_pause_s=options.every or plan.worker_pause_s)
    report = asyncio.run(run(plan))
    violations = report.violations(limits)
    phases = [line for kind in STALL_LIMITS_S for line in (report.phases(kind), "")]
    said = violations or ["nothing happened that must not"]
    sys.stdout.write("\n".join(["", report.table(), "", *phases, *said, ""]))
    return 1 if violations else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of requests and faults")
    parser.add_argument("--engine", choices=("sim", "torch"), default="sim", help="torch computes the default model")
    parser.add_argument("--requests", type=int, default=0, help="end after so many; 0 takes what suits the engine")
    parser.add_argument("--minutes", type=float, default=0.0, help="end then at the latest; 0: the same")
    parser.add_argument("--only", type=_fault, metavar="'KIND ROLE'", help="do this alone, such as 'kill decode'")
    parser.add_argument("--every", type=_pause, metavar="'FROM TO'", help="seconds between two of it, or of workers")
    return parser.parse_args()


def _fault(text: str) -> tuple[str, str]:
    kind, _, role = text.partition(" ")
    if kind not in (KILL, END, STOP) or role not in ROLES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {KILL}, {END}, {STOP} and one of {', '.join(ROLES)}")
    return kind, role


def _pause(text: str) -> tuple[float, float]:
    shortest, longest = map(float, text.split())
    return shortest, longest


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
