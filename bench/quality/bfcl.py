"""The Berkeley Function Calling Leaderboard (BFCL) against a gateway, with the suite's own data and checkers.

The package `bfcl-eval` pins versions of its own (numpy 1.26, six vendors' clients, torch), so it is no dependency of
ours: it runs in an environment of its own, as a process that this starts and reads the scores of. One of the clients
needs soundfile and does not say so.

    python3 -m venv bfcl && bfcl/bin/pip install bfcl-eval soundfile
"""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.gateway.api_keys import first_key
from shared.errors import InvalidRequest, Unsupported, WorkerLost

DRIVER = Path(__file__).with_name("bfcl_driver.py")
# Single turns that are checked by their syntax tree: no network, no accounts.
CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance")
INSTALL = "python3 -m venv bfcl && bfcl/bin/pip install bfcl-eval soundfile, then --python bfcl/bin/python"


@dataclass(frozen=True, slots=True)
class Settings:
    """Where, which model, and of each category at most `limit` cases (0: all). An answer has at most `max_tokens`.
    `native` gives the model tools as such, else it is told of them in the suite's own words. `api_key` is for a gateway
    that asks for one."""

    url: str
    model: str
    python: Path
    directory: Path
    categories: tuple[str, ...] = CATEGORIES
    limit: int = 0
    num_threads: int = 8
    native: bool = True
    max_tokens: int = 1024
    api_key: str = field(default="", repr=False)
    timeout_s: float = 24 * 3600


def run(settings: Settings) -> dict[str, Any]:
    """For each category the number of cases and the share that was right. What was said, and judged, is below the
    directory. Raises Unsupported without the package, WorkerLost if the suite fails, InvalidRequest if the gateway
    refused every question of a category."""
    _require_package(settings.python)
    settings.directory.mkdir(parents=True, exist_ok=True)
    scores = settings.directory / "scores.json"
    scores.unlink(missing_ok=True)
    wanted = {
        "model": settings.model,
        "categories": settings.categories,
        "limit": settings.limit,
        "max_tokens": settings.max_tokens,
        "num_threads": settings.num_threads,
        "native": settings.native,
        "scores": str(scores.resolve()),
    }
    environment = {
        **os.environ,
        "BFCL_PROJECT_ROOT": str(settings.directory.resolve()),
        "OPENAI_BASE_URL": f"{settings.url}/v1",
        "OPENAI_API_KEY": first_key(settings.api_key) or "none",  # without any the client does not start
    }
    command = [str(settings.python), str(DRIVER), json.dumps(wanted)]
    try:
        done = subprocess.run(command, env=environment, stdout=2, timeout=settings.timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise WorkerLost(f"the suite was not done after {settings.timeout_s:g} s") from None
    if done.returncode or not scores.exists():
        raise WorkerLost(f"the suite ended with {done.returncode} and no scores; what it said is above")
    found: dict[str, Any] = json.loads(scores.read_text(encoding="utf-8"))
    for category, score in found.items():
        if score["num_refused"] == score["num_cases"]:
            raise InvalidRequest(f"every question of {category} was refused: {score['refusal']}")
    return found


def _require_package(python: Path) -> None:
    check = "import importlib.util as u, sys; sys.exit(u.find_spec('bfcl_eval') is None)"
    try:
        found = subprocess.run([str(python), "-c", check], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise Unsupported(f"{python} cannot be run: {error.strerror}; {INSTALL}") from None
    if not found:
        raise Unsupported(f"{python} has no package bfcl-eval: {INSTALL}")
