"""Who runs which tests where several processes share them out (`make test`, decisions/0050 and 0079)."""

import os
from pathlib import PurePosixPath

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
MOST_PROCESSES = 8


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


def _file(nodeid: str) -> PurePosixPath:
    """Below `tests`."""
    return PurePosixPath(nodeid.partition("::")[0]).relative_to("tests")
