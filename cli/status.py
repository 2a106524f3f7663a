"""`forebay status`: every process, as it registered itself on the blackboard and as its supervisor knows it."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli import plan, state
from cli.state import ProcessState, RunState
from cli.target import RedisUrl
from shared.blackboard.admission import Account
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from shared.errors import BlackboardLost
from shared.models.store import default_cache

Row = dict[str, Any]
FILE_WIDTH = 130
COLUMNS = (
    "process",
    "state",
    "pid",
    "address",
    "epoch",
    "free/cached/leased/held",
    "running",
    "waiting",
    "promised",
    "report s",
    "restarts",
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the blackboard shows: processes, how old their reports are and what room workers have by name, and lengths
    of queues by model."""

    registrations: list[Registration]
    ages_ms: dict[str, float]
    rooms: dict[str, Account]
    queues: dict[str, int]


def status(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    redis: RedisUrl = "",
) -> None:
    """Show every process of the cluster: where it listens, what it works on, how often it was started again.

    Pages of KV are free, cached (kept for their hashes), leased (being read by a peer) or held by sequences; "report"
    is the age of a process's last registration.
    """
    run = None if redis else state.find(default_cache())
    if run is None and not redis:
        typer.secho("no cluster runs on this machine; start one with `forebay up`", fg="red", err=True)
        raise typer.Exit(1)
    try:
        seen = asyncio.run(_look(run.redis_url if run else redis))
    except BlackboardLost as fault:
        typer.secho(fault.message, fg="red", err=True)
        seen = Seen([], {}, {}, {})
        if run is None:
            raise typer.Exit(1) from None
    rows = join(run, seen.registrations, seen.ages_ms, seen.rooms)
    if as_json:
        about = run.model_dump(include={"url", "model", "redis_url", "supervisor_pid"}) if run else {"redis_url": redis}
        typer.echo(json.dumps(about | {"queues": seen.queues, "processes": rows}, indent=2))
    else:
        console = Console()
        console.width = console.width if console.is_terminal else FILE_WIDTH
        if run:
            console.print(_headline(run), soft_wrap=True, highlight=False)
        console.print(_table(rows))
        for model, length in seen.queues.items():
            console.print(f"{length} requests wait for room on workers of {model}")


def _headline(run: RunState) -> str:
    serves = f"{run.url} serves {run.model}" if run.url else f"{run.model} is being started"
    others = [other for other in state.running(default_cache()) if other.supervisor_pid != run.supervisor_pid]
    known = [f"{other.url or other.model} (--redis {other.redis_url})" for other in others]
    return f"{serves}; forebay up is process {run.supervisor_pid}" + "".join(f"\nalso here: {one}" for one in known)


def join(
    run: RunState | None,
    registrations: list[Registration],
    ages_ms: Mapping[str, float] = MappingProxyType({}),
    rooms: Mapping[str, Account] = MappingProxyType({}),
) -> list[Row]:
    """One row for each process that is supervised or registered, in the supervisor's order."""
    known = {process.name: process for process in (run.processes if run else [])}
    registered = {entry.name: entry for entry in registrations}
    names = dict.fromkeys([*known, *registered])
    rows = [_row(name, known.get(name), registered.get(name), ages_ms.get(name)) for name in names]
    for row in rows:
        room = rooms.get(row["name"]) if row["epoch"] else None
        row["room"] = room and {kind: amounts.model_dump() for kind, amounts in asdict(room).items()}
    if run:
        for row in rows:
            if row["role"] == plan.BLACKBOARD:
                row["address"] = run.redis_url.removeprefix("redis://").split("/")[0]
                row["state"] = "serving" if row["pid"] else "down"
    return rows


def _row(name: str, process: ProcessState | None, entry: Registration | None, age_ms: float | None) -> Row:
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
        "report_age_ms": age_ms if current else None,
        "num_restarts": process.num_restarts if process else None,
        "last_exit": process.last_exit if process else None,
        "log": process.log if process else None,
    }


def _state(process: ProcessState | None, entry: Registration | None) -> str:
    if entry is not None:
        return "draining" if entry.draining else "serving"
    return "starting" if process and process.pid else "down"


async def _look(redis_url: str) -> Seen:
    board = Blackboard(redis_url)
    try:
        registrations = await board.processes(*Role)
        models = sorted({entry.card.model for entry in registrations if entry.card})
        lengths = await board.admission.num_queued(models)
        workers = [(entry.name, entry.epoch) for entry in registrations if entry.card]
        accounts = await board.admission.accounts(workers)
        rooms = {name: account for (name, _), account in zip(workers, accounts, strict=True)}
        return Seen(registrations, await board.ages_ms(*Role), rooms, dict(zip(models, lengths, strict=True)))
    finally:
        await board.close()


def _table(rows: list[Row]) -> Table:
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in rows:
        pages, load, age_ms = row["pages"], row["load"], row["report_age_ms"]
        shown = "/".join(str(pages[key]) for key in ("free", "cached", "leased", "held")) if pages else ""
        address = row["http_address"] or row["address"]
        pids = " ".join(str(pid) for pid in (row["pid"], *row["rank_pids"]) if pid)
        cells = [row["name"], row["state"], pids, address, row["epoch"], shown]
        cells += [load["num_running"], load["num_waiting"]] if load else ["", ""]
        cells += [row["room"]["promised"]["sequences"] if row["room"] else ""]
        cells += ["" if age_ms is None else f"{age_ms / 1000:.1f}", row["num_restarts"]]
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    return table
