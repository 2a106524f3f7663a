"""Compiles kernels on first use: seconds, once per source, compiler and processor (of the GPU: its capability)."""

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-pthread", "-shared", "-fPIC")
CUDA_SOURCES = Path(__file__).parent / "cuda"
CUDA_FLAGS = ("-std=c++20", "-O3", "-t=2", "-shared", "-Xcompiler", "-fPIC", "-cudart=static")
CUDA_LIBRARIES = {
    "products": ("products.cu", "layers.cu", "wide.cu"),
    "glm": ("experts.cu", "few.cu", "latent.cu", "fp8.cu"),
    "choice": ("choose.cu",),
}
MIN_CAPABILITY = (8, 0)  # the first with bf16 on its tensor cores
LAYERS_CAPABILITY = (9, 0)  # the first with copies that complete a signal in shared memory
CHOICE_CAPABILITY = (9, 0)  # the first with clusters of blocks that read each other's shared memory
WIDE_CAPABILITY = (9, 0)  # the only one whose warps multiply four together
ARCH_SPECIFIC = 9  # capabilities from here on have instructions of their own
TIMEOUT_S = 300


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def library(cache_dir: Path, gxx: str | None) -> Path:
    """The kernels as the compiler `gxx` makes them, taken from `cache_dir` if they are there. Raises BuildError."""
    if gxx is None:
        raise BuildError("no g++ found")
    return kept(cache_dir, "native", (gxx, *FLAGS), sorted(SOURCES.glob("*.cpp")), [SOURCES], processor())


def cuda_library(cache_dir: Path, nvcc: str | None, capability: tuple[int, int], name: str = "products") -> Path:
    """The CUDA kernels called `name`, as `nvcc` makes them for GPUs of one compute capability, as `library`: those of
    dense models, "products", of "glm", or for the "choice" of tokens. Raises BuildError."""
    if nvcc is None:
        raise BuildError("no nvcc found (on PATH or in CUDA_HOME)")
    if capability < MIN_CAPABILITY:
        raise BuildError(f"the GPU's compute capability is {capability[0]}.{capability[1]}, and 8.0 is needed")
    arch = f"{capability[0]}{capability[1]}{'a' * (capability[0] >= ARCH_SPECIFIC)}"
    flags = (*CUDA_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}")
    sources = cuda_sources(name, capability)
    if not sources:
        raise BuildError(f"the GPU's compute capability is {capability[0]}.{capability[1]}, and 9.0 is needed")
    files = [CUDA_SOURCES / source for source in sources]
    return kept(cache_dir, f"{name}-{arch}", (nvcc, *flags), files, [CUDA_SOURCES])


def kept(
    cache_dir: Path,
    name: str,
    command: Sequence[str],
    sources: Sequence[Path],
    folders: Sequence[Path],
    processor: bytes = b"",
) -> Path:
    """The library `name` as a compiler and its flags make it of `sources`, which include from `folders`; taken from
    `cache_dir` if it is there, made of the same content, wherever that lies. Raises BuildError."""
    path = cache_dir / f"{name}-{_key(command, folders, processor)}.so"
    if not path.exists():
        _compile((*command, *(f"-I{folder}" for folder in folders), *map(str, sources)), path)
    return path


def cuda_sources(name: str, capability: tuple[int, int]) -> list[str]:
    """What a library is made of for GPUs of one compute capability; nothing where they lack what it needs."""
    return [source for source in CUDA_LIBRARIES[name] if _suits(source, capability)]


def compiler() -> str | None:
    """The compiler for the CPU, if there is one."""
    return shutil.which("g++")


def cuda_compiler() -> str | None:
    """The compiler for GPUs, if there is one."""
    return shutil.which("nvcc") or shutil.which(
        "nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    )


def _suits(source: str, capability: tuple[int, int]) -> bool:
    if source == "wide.cu":
        return capability == WIDE_CAPABILITY
    if source == "choose.cu":
        return capability >= CHOICE_CAPABILITY
    return source not in ("layers.cu", "few.cu", "latent.cu", "fp8.cu") or capability >= LAYERS_CAPABILITY


def _key(command: Sequence[str], folders: Sequence[Path], processor: bytes) -> str:
    digest = hashlib.sha256(" ".join(command[1:]).encode() + _run(command[0], "--version") + processor)
    for folder in folders:
        for source in sorted(folder.iterdir()):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def processor() -> bytes:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return os.uname().machine.encode()
    return b"\n".join(line for line in lines if line.startswith((b"flags", b"Features", b"model name")))[:8192]


def _compile(command: Sequence[str], path: Path) -> None:
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other workers may be compiling the same, in containers that share the cache too, where all have one pid: each into
    # a folder of its own, and the last rename wins.
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as mine:
        made = Path(mine) / path.name
        _run(*command, "-o", str(made))
        made.replace(path)
    log.info("compiled kernels in %.1f s: %s", time.monotonic() - started, path)


def _run(*command: str) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S).stdout
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed: {error.stderr.decode(errors='replace').strip()[:500]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from None
