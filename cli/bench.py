"""`forebay bench NAME`: the benchmarks of `bench/`, against a cluster."""

from contextlib import ExitStack

import typer

from bench.serve import main as serving
from cli import background, state
from cli.cluster import StartFailed
from cli.target import fail
from shared.models.store import default_cache

app = typer.Typer(no_args_is_help=True, help="Measure a cluster.")
# Its own parser reads the flags, so that `python -m bench.serve.main` has the same ones.
_AS_THEY_ARE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_AS_THEY_ARE)
def serve(context: typer.Context) -> None:
    """Time to first token, time per token and throughput; --help lists its flags.

    Without --url: of the cluster on this machine, or of one that is started for the purpose.
    """
    argv = list(context.args)
    with ExitStack() as stack:
        if not any(flag.startswith(("--url", "--help", "-h")) for flag in argv):
            argv = ["--url", _url(stack), *argv]
        status = serving.main(argv)
    raise typer.Exit(status)


def _url(stack: ExitStack) -> str:
    run = state.find(default_cache())
    if run is not None and run.url:
        return run.url
    typer.echo("no cluster runs on this machine: starting one", err=True)
    try:
        return stack.enter_context(background.cluster()).run.url
    except StartFailed as error:
        fail(str(error))
