"""`forebay up`: a cluster in the foreground, from the first process to the last file removed."""

import asyncio
import os
import shlex
import signal
import sys
from dataclasses import replace
from typing import Annotated, Literal

import typer

from cli import plan
from cli.cluster import START_DEADLINE_S, Cluster, StartFailed
from cli.forks import ForkServers
from cli.plan import ClusterOptions
from cli.state import RunDirectory
from cli.target import as_redis
from shared.errors import Fault
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL

SIM = "sim"


def up(  # noqa: PLR0913, PLR0917 - one argument a flag
    model: Annotated[str, typer.Option(help="Model directory, .gguf file, or name in the catalogue.")] = DEFAULT_MODEL,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers; with 0, decode workers prefill.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 1,
    gateways: Annotated[int, typer.Option(min=1, help="Gateways, on consecutive ports.")] = 1,
    routers: Annotated[int, typer.Option(min=1, help="Routers.")] = 1,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the first gateway; 0: any.")] = 8000,
    host: Annotated[str, typer.Option(help="Interface that everything listens on.")] = "127.0.0.1",
    engine: Annotated[Literal["torch", "sim"], typer.Option(help="torch computes; sim only pretends to.")] = "torch",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of weights and activations.")] = "bfloat16",
    kv_dtype: Annotated[
        Literal["auto", "bfloat16", "float32", "fp8"], typer.Option(help="Form of KV; auto takes dtype's.")
    ] = "auto",
    tp: Annotated[int, typer.Option(min=1, help="Ranks (processes) of each worker, which share the model out.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="Share out so many GPUs to the workers' ranks in turn.")] = 0,
    redis: Annotated[
        str, typer.Option(metavar="URL", callback=as_redis, help="Redis to use instead of an embedded Valkey.")
    ] = "",
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running requests have to end at Ctrl-C.")] = 10.0,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds to come up in.")] = START_DEADLINE_S,
    local_sockets: Annotated[
        bool, typer.Option(help="Processes talk over Unix sockets in the run's directory; without, over TCP alone.")
    ] = True,
    gateway_flags: Annotated[str, typer.Option(help="More flags for gateways, in one string.")] = "",
    router_flags: Annotated[str, typer.Option(help="More flags for routers, in one string.")] = "",
    worker_flags: Annotated[str, typer.Option(help="More flags for workers, in one string.")] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what all processes log.")] = False,
) -> None:
    """Start a cluster on this machine and run it until Ctrl-C.

    A process that dies is started again. The flags of each service, which --gateway-flags, --router-flags and
    --worker-flags pass on, are listed by `python -m services.gateway --help`, and so for router, prefill and decode.
    """
    if 0 < gpus < tp:
        raise typer.BadParameter(f"{tp} ranks need a GPU each, and there are to be {gpus}", param_hint="--gpus")
    options = ClusterOptions(
        model=SIM if engine == SIM else model,
        served_model_name=SIM if engine == SIM else store.served_name(model),
        redis_url=redis,
        num_gateways=gateways,
        num_routers=routers,
        num_prefill=prefill,
        num_decode=decode,
        engine=engine,
        dtype=dtype,
        kv_dtype=kv_dtype,
        tensor_parallel=tp,
        num_gpus=gpus,
        host=host,
        port=port,
        grace_ms=int(grace * 1000),
        local_sockets=local_sockets,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gateway_flags=shlex.split(gateway_flags),
        router_flags=shlex.split(router_flags),
        worker_flags=shlex.split(worker_flags),
    )
    with ForkServers(plan.preloads(options)) as fork_servers:
        try:
            asyncio.run(run(_with_model(options), fork_servers, deadline, verbose))
        except (Fault, StartFailed, OSError) as error:
            typer.secho(f"Forebay did not start: {error}", fg="red", err=True)
            raise typer.Exit(1) from None


async def run(options: ClusterOptions, fork_servers: ForkServers, deadline_s: float, verbose: bool) -> None:
    """Run a cluster until SIGINT or SIGTERM; a second one ends it at once. Raises StartFailed."""
    directory = RunDirectory.create(store.default_cache())
    cluster = Cluster(options, directory, fork_servers, _echo if verbose else None)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    typer.echo(f"starting {_census(options)}; their logs are in {directory.path}", err=True)
    try:
        starting = asyncio.create_task(cluster.start(os.getpid(), deadline_s))
        if await _first(starting, stop):
            typer.echo(welcome(cluster.state.url, cluster.state.model))
            await stop.wait()
        typer.echo("stopping; Ctrl-C again ends everything at once", err=True)
    finally:
        stop.set()
        await _stop(cluster, options.grace_ms / 1000, hurry)
        directory.remove()


async def _first(work: asyncio.Task[None], event: asyncio.Event) -> bool:
    """Whether the work was done before the event; it is cancelled otherwise."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if work.done():
        work.result()
        return True
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return False


async def _stop(cluster: Cluster, grace_s: float, hurry: asyncio.Event) -> None:
    stopping = asyncio.create_task(cluster.stop(grace_s))
    waiting = asyncio.create_task(hurry.wait())
    await asyncio.wait([stopping, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not stopping.done():
        cluster.kill()
    await stopping


def _with_model(options: ClusterOptions) -> ClusterOptions:
    """The options with the model as a directory on this machine, fetched if need be; the sim engine needs none."""
    if options.engine == SIM:
        return options
    return replace(options, model=str(store.resolve(options.model)))


def _census(options: ClusterOptions) -> str:
    counts = {"gateways": options.num_gateways, "routers": options.num_routers}
    counts |= {"prefill workers": options.num_prefill, "decode workers": options.num_decode}
    return ", ".join(f"{number} {role if number > 1 else role[:-1]}" for role, number in counts.items() if number)


def _echo(name: str, line: str) -> None:
    sys.stderr.write(f"{name:<12} {line}\n")


def welcome(url: str, model: str) -> str:
    """What the user is told once the model is served: where, what to try, how to stop."""
    path = "chat/completions"
    asked = '"temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]'
    body = f'{{"model": "{model}", {asked}}}'
    if model == SIM:  # it has no tokenizer
        path, body = "completions", f'{{"model": "{model}", "prompt": [1, 2, 3]}}'
    return f"""
Forebay serves {model} at {url}

  curl {url}/v1/{path} -H 'Content-Type: application/json' -d '{body}'

  forebay chat      talk to it
  forebay status    see every process
  Ctrl-C            stop everything
"""
