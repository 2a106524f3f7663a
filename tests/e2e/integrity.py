"""Every worker's books, read after every cluster that a test ran: no page lost, none in two states, none kept."""

import asyncio
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

STATES = ("free", "cached", "leased", "held")
# A reader that died amid a READ keeps pages for one lease.
DEADLINE_S = 10.0 + 20.0


async def settled(cluster: Any) -> None:
    """Wait until every registered worker is idle and its books are right; fails with what is wrong."""
    end = time.monotonic() + DEADLINE_S
    while wrong := await _wrong(await cluster.status()):
        assert time.monotonic() < end, wrong
        await asyncio.sleep(0.1)


async def _wrong(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    workers = {name: row for name, row in rows.items() if row["pages"]}
    found = [await asyncio.to_thread(_faults, name, row) for name, row in workers.items()]
    return [fault for faults in found for fault in faults] if workers else ["no worker is registered"]


def _faults(name: str, row: Mapping[str, Any]) -> list[str]:
    try:
        measured = measures_at(row["metrics_address"])
        return [f"{name}: {fault}" for fault in faults(measured, row["pages"]["total"])]
    except (OSError, KeyError) as error:  # it ended and is registered still, or starts
        return [f"{name} does not answer, or not yet: {error!r}"]


def measures_at(address: str) -> dict[str, float]:
    """What Prometheus would read at host:port. Raises OSError."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
        lines = (line.rsplit(" ", 1) for line in page.read().decode().splitlines() if not line.startswith("#"))
        return {measure: float(value) for measure, value in lines}


def faults(measured: Mapping[str, float], num_pages: int) -> list[str]:
    """What is wrong with a worker that ought to be idle."""
    pages = {state: measured[f'forebay_pages{{state="{state}"}}'] for state in STATES}
    statements = {
        f"pages in no state or in two: {measured['forebay_page_faults']}": measured["forebay_page_faults"] != 0,
        f"{pages} are not {num_pages} pages": sum(pages.values()) != num_pages,
        f"pages in use while idle: {pages}": bool(pages["leased"] or pages["held"]),
        f"live leases while idle: {measured['forebay_live_leases']}": measured["forebay_live_leases"] != 0,
    }
    return [statement for statement, is_wrong in statements.items() if is_wrong]
