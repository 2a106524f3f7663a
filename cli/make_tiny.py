"""`forebay make-tiny`: a model with random weights, to try an architecture without its weights."""

from pathlib import Path
from typing import Annotated

import typer

from shared.errors import Fault
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL


def make_tiny(
    kind: Annotated[
        str, typer.Argument(help="glm-5.2; glm-5.2-even, which can be quantized; glm-5.2-tiles, whose experts fit FP4.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 0,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Take the tokenizer and chat template of this model, a name or a directory "
            f"({DEFAULT_MODEL}, for one), so that it takes text and chats."
        ),
    ] = "",
) -> None:
    """Write a small model directory with random weights. Without --tokenizer it is served by token ids alone."""
    from shared.engine.models import tiny

    try:
        tiny.write(kind, out, seed, store.resolve(tokenizer) if tokenizer else None)
    except Fault as fault:
        typer.echo(fault.message, err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{out}: serve it by `forebay up --model {out}`")
