"""Which processes a cluster consists of, and with which flags: a pure function of what the user asked for."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cli import valkey
from cli.fork_server import Preload
from cli.process import ProcessSpec

BLACKBOARD = "blackboard"
WORKERS = ("prefill", "decode")
# Fork servers. Who needs no torch is not forked of what has it.
LIGHT, TORCH = "light", "torch"
# A thread that waits must not keep another worker's thread from its core.
WORKERS_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class ClusterOptions:
    """What `forebay up` was asked for. `model` is a path or the name of a model in the cache, `served_model_name` what
    clients call it; `redis_url` empty means an embedded Valkey. Workers take the first `num_gpus` GPUs in turn, one for
    each rank; 0 leaves it to them. Extra flags go to every process of a role."""

    model: str
    served_model_name: str = ""
    redis_url: str = ""
    num_gateways: int = 1
    num_routers: int = 1
    num_prefill: int = 1
    num_decode: int = 1
    engine: str = "torch"
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    tensor_parallel: int = 1
    num_gpus: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    grace_ms: int = 10_000
    local_sockets: bool = True
    log_level: str = "INFO"
    num_cores: int = 1
    gateway_flags: Sequence[str] = ()
    router_flags: Sequence[str] = ()
    worker_flags: Sequence[str] = ()


def threads_per_worker(num_cores: int, num_workers: int) -> int:
    """Compute threads of each worker, one at least.

    Twice as many threads as cores in all: prefill and decode seldom compute at the same moment, and one that computes
    alone should have the machine.
    """
    return max(1, min(num_cores, 2 * num_cores // max(1, num_workers)))


def blackboard(host: str, port: int, socket: Path | None = None) -> ProcessSpec:
    """The embedded Valkey."""
    return ProcessSpec(BLACKBOARD, BLACKBOARD, valkey.command(host, port, socket))


def services(options: ClusterOptions, redis_url: str, local_sockets: str = "") -> list[ProcessSpec]:
    """All processes but the blackboard, in the order in which they are to be stopped: who takes requests first.
    `local_sockets` is the directory in which they find each other's Unix sockets; empty: none have any."""
    common = [
        *("--host", options.host, "--redis-url", redis_url, "--local-sockets", local_sockets),
        *("--drain-grace-ms", str(options.grace_ms), "--log-level", options.log_level),
    ]
    gateways = [
        _service("gateway", number, [*common, "--http-port", str(options.port + number), *options.gateway_flags])
        for number in range(options.num_gateways)
    ]
    routers = [_service("router", number, [*common, *options.router_flags]) for number in range(options.num_routers)]
    return gateways + routers + _workers(options, common)


def preloads(options: ClusterOptions) -> dict[str, Preload]:
    """What fork servers have, by name."""
    front, workers = _mains("gateway", "router"), _mains("decode", "prefill")
    if options.engine == "sim":
        return {LIGHT: Preload((*front, *workers, "shared.engine.sim"))}
    return {LIGHT: Preload(front), TORCH: Preload((*workers, "shared.worker.rank"), WORKERS_ENVIRONMENT)}


def _mains(*roles: str) -> tuple[str, ...]:
    return tuple(f"services.{role}.__main__" for role in roles)


def _workers(options: ClusterOptions, common: list[str]) -> list[ProcessSpec]:
    threads = threads_per_worker(options.num_cores, options.num_prefill + options.num_decode)
    flags = [*common, "--model", options.model, "--served-model-name", options.served_model_name]
    flags += ["--engine", options.engine, "--dtype", options.dtype, "--kv-dtype", options.kv_dtype]
    flags += ["--num-threads", str(threads), "--tensor-parallel", str(options.tensor_parallel)]
    flags += options.worker_flags
    fork_server = LIGHT if options.engine == "sim" else TORCH
    names = [("decode", number) for number in range(options.num_decode)]
    names += [("prefill", number) for number in range(options.num_prefill)]
    return [
        _service(role, number, [*flags, *_device(options, place)], WORKERS_ENVIRONMENT, fork_server)
        for place, (role, number) in enumerate(names)
    ]


def _device(options: ClusterOptions, place: int) -> list[str]:
    """The GPUs of a worker, of which it is told the first."""
    num_shares = options.num_gpus // options.tensor_parallel
    return ["--device", f"cuda:{place % num_shares * options.tensor_parallel}"] if num_shares else []


def _service(
    role: str, number: int, flags: list[str], environment: Mapping[str, str] | None = None, fork_server: str = LIGHT
) -> ProcessSpec:
    name = f"{role}-{number}"
    command = (sys.executable, "-m", f"services.{role}", "--name", name, *flags)
    return ProcessSpec(role, name, command, environment or {}, starts_gently=role in WORKERS, fork_server=fork_server)
