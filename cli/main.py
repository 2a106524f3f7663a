"""The command line: `forebay COMMAND`."""

from typing import Annotated

import typer

from cli import bench, evaluate
from cli.chat import chat
from cli.explain import explain
from cli.inspect import inspect
from cli.make_tiny import make_tiny
from cli.models import models
from cli.quantize import quantize
from cli.status import status
from cli.up import up
from shared.version import version

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=lambda wanted: wanted and _show_version(), help="Show it and exit.")
    ] = False,
) -> None:
    """Forebay serves large language models through separate prefill and decode workers."""


def _show_version() -> None:
    typer.echo(f"forebay {version()}")
    raise typer.Exit


for command in (up, status, chat, models, explain, inspect, make_tiny, quantize):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(evaluate.app, name="eval")

if __name__ == "__main__":
    app()
