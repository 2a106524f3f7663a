"""Measure a server that speaks OpenAI's protocol: Forebay, vLLM, llama.cpp …

Prompts are random token ids and every answer has exactly the length asked for, so that two servers do the same work.
"""

import argparse
import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from bench.serve import load, measures, report
from bench.serve.client import Client
from bench.serve.workload import Workload
from services.gateway.api_keys import bearer

DEFAULTS = Workload()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("forebay bench serve", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument(
        "--url",
        default="http://127.0.0.1:8000",
        help="server, without /v1; FOREBAY_API_KEY in the environment is sent to it",
    )
    made.add_argument("--model", default="", help="model to ask for; default: the first that the server lists")
    made.add_argument("--requests", type=int, default=DEFAULTS.num_requests, help="requests to measure")
    made.add_argument("--input-tokens", type=int, default=DEFAULTS.input_tokens, help="length of a prompt")
    made.add_argument("--output-tokens", type=int, default=DEFAULTS.output_tokens, help="length of an answer")
    made.add_argument("--spread", type=float, default=DEFAULTS.spread, help="lengths vary by this share, 0 to 1")
    made.add_argument("--shared-tokens", type=int, default=0, help="first tokens that all prompts have in common")
    made.add_argument("--concurrency", type=int, default=DEFAULTS.concurrency, help="callers, if there is no --rate")
    made.add_argument("--rate", type=float, help="requests per second, Poisson, whether or not the server keeps up")
    made.add_argument("--warmup", type=int, default=DEFAULTS.num_warmup, help="requests before those measured")
    made.add_argument("--seed", type=int, default=0, help="makes prompts, lengths and times repeatable")
    made.add_argument("--token-ids", default="100:10000", help="range that prompts are drawn from")
    made.add_argument("--timeout-s", type=float, default=300.0, help="longest silence of the server")
    made.add_argument("--json", type=Path, help="write all figures to this file")
    return made


def workload(options: argparse.Namespace) -> Workload:
    """Raises ValueError for a token range that is not `FIRST:LAST`."""
    first, last = map(int, options.token_ids.split(":"))
    return Workload(
        num_requests=options.requests,
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        spread=options.spread,
        shared_tokens=options.shared_tokens,
        concurrency=options.concurrency,
        rate=options.rate,
        num_warmup=options.warmup,
        seed=options.seed,
        first_token_id=first,
        last_token_id=last,
    )


async def measure(options: argparse.Namespace, command: str) -> tuple[str, int]:
    """Run, and return what to print and the exit status: 1 if a request failed."""
    plan = workload(options)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(options.timeout_s, connect=10.0)
    headers = bearer(os.environ.get("FOREBAY_API_KEY", ""))
    async with httpx.AsyncClient(
        base_url=options.url, headers=headers, limits=limits, timeout=timeout, trust_env=False
    ) as http:
        model = options.model or await first_model(http)
        figures = measures.figures(await load.run(Client(http, model), plan))
    told = report.circumstances(command, options.url, model, plan)
    printed = report.text(told, figures)
    if options.json:
        options.json.write_text(printed.splitlines()[-1] + "\n")
    return printed, int(figures["num_failed"] > 0)


async def first_model(http: httpx.AsyncClient) -> str:
    response = await http.get("/v1/models")
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])


def main(argv: Sequence[str]) -> int:
    """Measure as `argv` says and print the report; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        printed, status = asyncio.run(measure(options, shlex.join(["forebay", "bench", "serve", *argv])))
    except (httpx.HTTPError, ValueError) as error:
        print(f"{options.url}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(printed)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
