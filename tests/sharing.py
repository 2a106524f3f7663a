"""Who runs which tests where several processes share them out (`make test`, decisions/0050)."""

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
# The order in which tests begin. Clusters first, for they wait more than they compute; short files fill the end.
ROOMS = ("chaos", "e2e", "law", "oracle", "services", "conformance", "architecture", "unit")
# One cluster at a time is enough for two cores where processes die, stop and miss deadlines: these rooms are one
# process' work, but for files whose clusters compute all the time, which are another's.
CLUSTERS = ("chaos", "e2e")
COMPUTING = ("e2e/test_long_context.py", "e2e/test_ranks.py")
# What the default model and transformers say to its oracles is asked for once.
DEFAULT_MODEL = ("oracle/test_smollm2.py", "oracle/test_prompt_logprobs.py", "oracle/test_gguf_import.py")
# All files of the tree are parsed once.
PARSED = ("architecture/test_sizes.py", "architecture/test_style.py")
MOST_PROCESSES = 8  # each imports torch and transformers for itself


def place(nodeid: str) -> tuple[int, bool]:
    """Sorts tests: by rooms, and clusters that compute, which is for long, before the others."""
    file = _file(nodeid)
    return ROOMS.index(file.parts[0]), str(file) not in COMPUTING


def work(nodeid: str) -> str:
    """Tests of which this is the same are run by one process: those of a file, so that its fixtures are made once."""
    file = _file(nodeid)
    if str(file) in DEFAULT_MODEL:
        return "oracles of the default model"
    if str(file) in PARSED:
        return "style"
    if file.parts[0] not in CLUSTERS:
        return str(file)
    return "clusters that compute" if str(file) in COMPUTING else "clusters"


def num_processes() -> int:
    """One more than there are cores: it waits for its clusters."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores + 1, MOST_PROCESSES)


def place_among_processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """The number of this process and how many there are, as pytest-xdist says it."""
    number = environment["PYTEST_XDIST_WORKER"].removeprefix("gw")
    return int(number), int(environment["PYTEST_XDIST_WORKER_COUNT"])


def from_another_on(files: Sequence[Path], number: int, num_processes: int) -> list[Path]:
    """All of them, in each process from another one on."""
    first = len(files) * number // num_processes
    return [*files[first:], *files[:first]]


def import_tests(arguments: Iterable[str], number: int, num_processes: int) -> None:
    """Import the test files below pytest's arguments, each process from another one on. The first to import a file has
    its assertions rewritten and keeps that for the others, who begin together: in one order all would rewrite all."""
    given = [Path(argument.partition("::")[0]).resolve() for argument in arguments]
    files = sorted({file for path in given for file in ([path] if path.is_file() else path.rglob("test_*.py"))})
    for file in from_another_on(files, number, num_processes):
        with suppress(Exception, pytest.skip.Exception):  # pytest imports it again, and says so
            importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))


def _file(nodeid: str) -> PurePosixPath:
    """Below `tests`."""
    return PurePosixPath(nodeid.partition("::")[0]).relative_to("tests")


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Each process takes the next work when it has nearly done its own."""

    def __init__(self, config: Any, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return work(nodeid)
