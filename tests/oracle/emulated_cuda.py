"""Our CUDA kernels on the CPU: compiled as C++ with a coroutine for each lane."""

import subprocess
from pathlib import Path

import pytest

from shared.engine.kernels import build

EMULATION = Path(__file__).parent / "cuda_on_cpu"


def compiled(source: str, folder: Path) -> Path:
    """The library of a file of `shared/engine/kernels/cuda`, written to a folder; skips the test without g++."""
    gxx, path = build.compiler(), folder / f"{source}.so"
    if gxx is None:
        pytest.skip("no g++ found")
    folders = ("-I", EMULATION, "-I", build.CUDA_SOURCES)
    # A fortified longjmp, as compilers of some distributions make it, refuses to leave for another stack.
    flags = ("-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-pthread", "-shared", "-fPIC", "-x", "c++")
    subprocess.run([gxx, *flags, *folders, build.CUDA_SOURCES / source, "-o", path], check=True, timeout=120)
    return path
