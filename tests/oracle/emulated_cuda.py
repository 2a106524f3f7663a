"""Our CUDA kernels on the CPU: compiled as C++ with a coroutine for each lane."""

from pathlib import Path

import pytest

from shared.engine.kernels import build
from shared.models.store import default_cache

EMULATION = Path(__file__).parent / "cuda_on_cpu"
# The same numbers as without -march, which knows fp16: no product and sum as one. A fortified longjmp, as compilers of
# some distributions make it, refuses to leave for another stack.
FLAGS = (
    "-std=c++20",
    "-O1",
    "-march=native",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-shared",
    "-fPIC",
    "-x",
    "c++",
)


def compiled(source: str) -> Path:
    """The library of a file of `shared/engine/kernels/cuda`; skips the test without g++."""
    gxx = build.compiler()
    if gxx is None:
        pytest.skip("no g++ found")
    name, folders = f"emulated-{source.removesuffix('.cu')}", [EMULATION, build.CUDA_SOURCES]
    files = [build.CUDA_SOURCES / source]
    return build.kept(default_cache() / "kernels", name, (gxx, *FLAGS), files, folders, build.processor())
