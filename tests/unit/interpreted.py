"""Scripts that launch kernels in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

TIMEOUT_S = 120
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def assert_says(expected: str, script: str) -> None:
    """Run a script in a process of its own, and hold what it prints to that."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert run.stdout == expected, run.stderr
