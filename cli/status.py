"""`forebay status`: every process, as it registered itself on the blackboard and as its supervisor knows it."""

import asyncio
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli import plan, state
from cli.state import ProcessState, RunState
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from shared.errors import BlackboardLost
from shared.models.store import default_cache

Row = dict[str, Any]
FILE_WIDTH = 130
COLUMNS = ("process", "state", "pid", "address", "epoch", "free/cached/leased/held", "running", "restarts")


def status(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    redis: Annotated[str, typer.Option(metavar="URL", help="Blackboard of a cluster on other machines.")] = "",
) -> None:
    """Show every process of the cluster."""
    run = None if redis else state.find(default_cache())
    if run is None and not redis:
        typer.secho("no cluster runs on this machine; start one with `forebay up`", fg="red", err=True)
        raise typer.Exit(1)
    try:
        registrations = asyncio.run(_registrations(run.redis_url if run else redis))
    except BlackboardLost as fault:
        typer.secho(fault.message, fg="red", err=True)
        registrations = []
        if run is None:
            raise typer.Exit(1) from None
    rows = join(run, registrations)
    if as_json:
        about = run.model_dump(include={"url", "model", "redis_url", "supervisor_pid"}) if run else {"redis_url": redis}
        typer.echo(json.dumps(about | {"processes": rows}, indent=2))
    else:
        console = Console()
        console.width = console.width if console.is_terminal else FILE_WIDTH
        console.print(_table(rows))


def join(run: RunState | None, registrations: list[Registration]) -> list[Row]:
    """One row for each process that is supervised or registered, in the supervisor's order."""
    known = {process.name: process for process in (run.processes if run else [])}
    registered = {entry.name: entry for entry in registrations}
    rows = [_row(name, known.get(name), registered.get(name)) for name in dict.fromkeys([*known, *registered])]
    if run:
        for row in rows:
            if row["role"] == plan.BLACKBOARD:
                row["address"] = run.redis_url.removeprefix("redis://").split("/")[0]
                row["state"] = "serving" if row["pid"] else "down"
    return rows


def _row(name: str, process: ProcessState | None, entry: Registration | None) -> Row:
    current = entry if process is None or (entry and entry.pid == process.pid) else None
    return {
        "role": str(entry.role) if entry else process.role if process else "",
        "name": name,
        "state": _state(process, current),
        "pid": process.pid if process else current and current.pid,
        "rank_pids": list(current.rank_pids) if current else [],
        "address": current and current.address,
        "http_address": (current and current.http_address) or None,
        "metrics_address": (current and current.metrics_address) or None,
        "epoch": current and current.epoch,
        "model": current.card.model if current and current.card else None,
        "pages": current.pages.model_dump() if current and current.card else None,
        "load": current.load.model_dump() if current and current.card else None,
        "num_restarts": process.num_restarts if process else None,
        "last_exit": process.last_exit if process else None,
        "log": process.log if process else None,
    }


def _state(process: ProcessState | None, entry: Registration | None) -> str:
    if entry is not None:
        return "draining" if entry.draining else "serving"
    return "starting" if process and process.pid else "down"


async def _registrations(redis_url: str) -> list[Registration]:
    board = Blackboard(redis_url)
    try:
        return await board.processes(*Role)
    finally:
        await board.close()


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in (
        "process",
        "state",
        "pid",
        "address",
        "epoch",
        "free/cached/leased/held",
        "running",
        "restarts",
    ):
        table.add_column(title)
    for row in rows:
        pages, load = row["pages"], row["load"]
        shown = "/".join(str(pages[key]) for key in ("free", "cached", "leased", "held")) if pages else ""
        address = row["http_address"] or row["address"]
        pids = " ".join(str(pid) for pid in (row["pid"], *row["rank_pids"]) if pid)
        cells = [row["name"], row["state"], pids, address, row["epoch"], shown]
        cells += [load["num_running"] if load else "", row["num_restarts"]]
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    return table
