"""`forebay inspect`: what a checkpoint is and what it needs, from its configuration and the headers of its files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shared.engine.models import accounting, tensor_list
from shared.engine.models.tensor_list import ModelTensors
from shared.errors import Fault, InvalidRequest
from shared.models import store

FILE_WIDTH = 130
Facts = dict[str, Any]


def inspect(
    model: Annotated[str, typer.Argument(metavar="PATH|NAME", help="A model directory, a config.json, or a name.")],
    gpus: Annotated[int, typer.Option(help="GPUs that share the model out; with --gpu-memory.")] = 0,
    gpu_memory: Annotated[float, typer.Option(metavar="GB", help="Memory of each, in 10^9 bytes.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what a checkpoint is, its size by class of module and what fits on GPUs, without loading it."""
    try:
        found = facts(tensor_list.read(_path(model)), gpus, gpu_memory)
    except Fault as fault:
        typer.secho(fault.message, fg="red", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    console.width = console.width if console.is_terminal else FILE_WIDTH
    for part in (_summary(found), _classes(found), _kv(found), *([_fits(found)] if found["fits"] else [])):
        console.print(part)
        console.print()


def facts(model: ModelTensors, num_gpus: int = 0, gpu_memory_gb: float = 0.0) -> Facts:
    """All there is to say. `fits` is empty if no GPUs were named. Raises InvalidRequest, Unsupported."""
    if bool(num_gpus) != bool(gpu_memory_gb):
        raise InvalidRequest("--gpus and --gpu-memory are given together or not at all")
    return {
        "architecture": model.architecture,
        "source": "headers of weight files" if model.from_headers else "configuration alone",
        "max_position": model.config.max_position,
        "num_layers": model.config.num_layers,
        "has_mtp": model.has_mtp,
        "num_tensors": model.num_stored,
        "num_bytes": sum(tensor.num_bytes for tensor in model.tensors.values()),
        "parameters": asdict(accounting.parameters(model)),
        "modules": [asdict(entry) for entry in accounting.module_classes(model)],
        "kv_bytes_per_token": accounting.kv_bytes_per_token(model),
        "kv_bytes_per_token_with_mtp": accounting.kv_bytes_per_token(model, mtp=True) if model.has_mtp else None,
        "fits": [asdict(fit) for fit in accounting.fits(model, num_gpus, round(gpu_memory_gb * 1e9))]
        if num_gpus
        else [],
    }


def _path(model: str) -> Path:
    path = Path(model).expanduser()
    return path if path.is_dir() or path.suffix == ".json" else store.resolve(model)


def _summary(found: Facts) -> Table:
    table, counts = Table(box=None, pad_edge=False, show_header=False), found["parameters"]
    table.add_row("architecture", f"{found['architecture']}, {found['num_layers']} layers")
    table.add_row("told by", found["source"])
    table.add_row("parameters", f"{counts['total']:,}" + (f", MTP {counts['mtp']:,} of them" if counts["mtp"] else ""))
    table.add_row("active per token", f"{counts['active']:,}; with the embedding {counts['active_with_embedding']:,}")
    table.add_row("stored", f"{found['num_bytes']:,} bytes in {found['num_tensors']:,} tensors")
    table.add_row("context", f"{found['max_position']:,} tokens")
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < 2 else "right")
    return table


def _classes(found: Facts) -> Table:
    table = _table("modules", "format", "tensors", "parameters", "bytes")
    for entry in found["modules"]:
        numbers = (entry[key] for key in ("num_tensors", "num_parameters", "num_bytes"))
        table.add_row(entry["name"], entry["form"], *(f"{number:,}" for number in numbers))
    return table


def _kv(found: Facts) -> Table:
    drafts = found["kv_bytes_per_token_with_mtp"]
    table = _table("KV", "", "bytes per token", *(["with MTP"] if drafts else []))
    for dtype, num_bytes in found["kv_bytes_per_token"].items():
        table.add_row(dtype, "", f"{num_bytes:,}", *([f"{drafts[dtype]:,}"] if drafts else []))
    return table


def _fits(found: Facts) -> Table:
    table = _table("weights", "KV", "GB per GPU", "GB left for KV", "KV bytes per token and GPU", "tokens that fit")
    for fit in found["fits"]:
        room = fit["room_bytes"]
        left = f"{room / 1e9:,.2f}" if room >= 0 else f"{-room / 1e9:,.2f} too few"
        numbers = (
            f"{fit['weight_bytes'] / 1e9:,.2f}",
            left,
            f"{fit['kv_bytes_per_token']:,}",
            f"{fit['num_tokens']:,}",
        )
        table.add_row(fit["weights"], fit["kv_dtype"], *numbers)
    return table
