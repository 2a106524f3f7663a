"""Scripts that launch kernels in Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

TIMEOUT_S = 120
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
# The interpreter of Triton 3.6 takes a number for a loop's end from an array in a way that numpy 2.4 refuses.
LOOPS = """
from triton.runtime import interpreter

def patched(tensor, scope, patch=interpreter._patch_lang_tensor):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

interpreter._patch_lang_tensor = patched
"""


def assert_says(expected: str, script: str) -> None:
    """Run a script in a process of its own, and hold what it prints to that."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert run.stdout == expected, run.stderr
