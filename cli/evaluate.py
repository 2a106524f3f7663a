"""`forebay eval`: how good a model is, and what quantizing it cost."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.target import ApiKey, GatewayUrl, client, fail, model_names, url_of
from shared.errors import Fault

app = typer.Typer(no_args_is_help=True, help="Measure the quality of models.")
FILE_WIDTH = 110
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def quant(  # noqa: PLR0913, PLR0917 - a flag each
    base: Annotated[str, typer.Argument(help="The model that was quantized: directory or name.")],
    quantized: Annotated[str, typer.Argument(metavar="QUANT", help="What was made of it.")],
    text: Annotated[Path | None, typer.Option(help="A text to predict; default: a small one of our own.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts to go on from, one a line.")] = None,
    context: Annotated[int, typer.Option(min=16, help="Tokens of the text that are read as one.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to say to each prompt.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal intervals.")] = 0,
    kernels: Annotated[str, typer.Option(help="Of QUANT: w4a4 quantizes activations too, as Blackwell does.")] = "auto",
    calls: Annotated[bool, typer.Option(help="Also ask for function calls, of a cluster for each model.")] = True,
    as_json: AsJson = False,
) -> None:
    """Perplexity, KL divergence, agreement and function calls of a quantized model beside the original."""
    from bench.quality import compare
    from shared.models import store

    settings = compare.Settings(text or compare.TEXT, prompts or compare.PROMPTS, context, tokens, dtype, seed, kernels)
    try:
        serve = (lambda path, kernels: _cluster(path, dtype, kernels)) if calls else None
        found = compare.run(store.resolve(base), store.resolve(quantized), settings, serve)
    except Fault as fault:
        fail(fault.message)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(_figures(found))


@app.command()
def bfcl(  # noqa: PLR0913, PLR0917 - a flag each
    url: GatewayUrl = "",
    api_key: ApiKey = "",
    model: Annotated[str, typer.Option(help="Model; default: the first that is served.")] = "",
    python: Annotated[Path, typer.Option(help="Python of an environment that has bfcl-eval.")] = Path(sys.executable),
    out: Annotated[Path, typer.Option(help="Where answers and scores are kept.")] = Path("bfcl-run"),
    categories: Annotated[str, typer.Option(help="The suite's names, with commas; default: single turns.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Cases of each category; 0: all.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 8,
    native: Annotated[bool, typer.Option(help="Give tools as such; else in the suite's own words.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """The Berkeley Function Calling Leaderboard through a gateway, by the package bfcl-eval in its own environment."""
    from bench.quality import bfcl as suite

    with client(url_of(url), 10.0, api_key) as http:
        names = model_names(http)  # also of a model that is named: a key that is refused shows here, not in each answer
    if not names:
        fail("the cluster serves no model yet")
    wanted = tuple(name.strip() for name in categories.split(",") if name.strip()) or suite.CATEGORIES
    settings = suite.Settings(
        url_of(url), model or names[0], python, out, wanted, limit, threads, native, max_tokens, api_key
    )
    try:
        found = suite.run(settings)
    except Fault as fault:
        fail(fault.message)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(_scores(found))


@contextmanager
def _cluster(path: Path, dtype: str, kernels: str) -> Iterator[tuple[str, str, str]]:
    from cli import background
    from cli.cluster import StartFailed

    try:
        with background.cluster(
            "--model", str(path), "--dtype", dtype, "--worker-flags", f"--kernels {kernels}"
        ) as running:
            # Its gateway reads the environment, too.
            yield running.run.url, running.run.model, os.environ.get("FOREBAY_API_KEY", "")
    except StartFailed as error:
        fail(str(error))


def _show(table: Table) -> None:
    console = Console()
    console.width = console.width if console.is_terminal else FILE_WIDTH
    console.print(table)


def _figures(found: dict[str, Any]) -> Table:
    about = f"{found['num_tokens']:,} tokens in {found['num_windows']} windows, {found['num_prompts']} prompts"
    if found["calls"]:
        asked = "tools given as such" if found["calls"]["native"] else "tools told of in words"
        about += f", {len(found['calls']['base'])} function calls, {asked}"
    table = Table(box=None, pad_edge=False, caption=about, caption_justify="left")
    for number, title in enumerate(("figure", "value", "95 % from", "to")):
        table.add_column(title, justify="right" if number else "left")
    for name, interval in found["figures"].items():
        table.add_row(name, *(f"{interval[key]:.4g}" for key in ("value", "low", "high")))
    return table


def _scores(found: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(("category", "cases", "refused", "right", "accuracy")):
        table.add_column(title, justify="right" if number else "left")
    for category, score in found.items():
        numbers = (*(str(score[key]) for key in ("num_cases", "num_refused", "num_right")), f"{score['accuracy']:.1%}")
        table.add_row(category, *numbers)
    return table
