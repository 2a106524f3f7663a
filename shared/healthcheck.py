"""Ask a process whether it serves, as container health checks do.

    python -m shared.healthcheck HOST:PORT [--timeout-ms N]      a service, by the gRPC health protocol
    python -m shared.healthcheck redis://HOST:PORT               the blackboard, by PING (or rediss://, unix://)

Exit status 0: it does.
"""

import argparse
import asyncio
import sys

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared import rpc
from shared.blackboard.connection import connect, faults
from shared.errors import Fault, WorkerLost


async def check(target: str, timeout_ms: int) -> None:
    """Return if the process at `target` serves; otherwise raises a Fault that says why not."""
    if target.startswith(("redis", "unix://")):
        await _check_redis(target, timeout_ms)
    else:
        await _check_service(target, timeout_ms)


async def _check_service(address: str, timeout_ms: int) -> None:
    async with grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS) as channel:
        method = health_pb2_grpc.HealthStub(channel).Check
        answer = await rpc.call(method, health_pb2.HealthCheckRequest(), timeout_ms / 1000)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise WorkerLost(f"{address} answers {name}")


async def _check_redis(url: str, timeout_ms: int) -> None:
    client = connect(url, timeout_ms)
    try:
        with faults():
            await client.execute_command("PING")  # type: ignore[no-untyped-call]
    finally:
        await client.aclose()


def main() -> int:
    """Check once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--timeout-ms", type=int, default=2_000)
    arguments = parser.parse_args()
    try:
        asyncio.run(check(arguments.target, arguments.timeout_ms))
    except Fault as fault:
        sys.stderr.write(f"{fault.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
