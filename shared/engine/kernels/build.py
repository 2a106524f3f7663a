"""Compiles the native CPU kernels on first use: a few seconds, once per source, compiler and processor."""

import hashlib
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-pthread", "-shared", "-fPIC")
TIMEOUT_S = 120


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def library(cache_dir: Path, gxx: str | None) -> Path:
    """The kernels as the compiler `gxx` makes them, taken from `cache_dir` if they are there. Raises BuildError."""
    if gxx is None:
        raise BuildError("no g++ found")
    path = cache_dir / f"decoder-{_key(gxx)}.so"
    if not path.exists():
        _compile(gxx, path)
    return path


def compiler() -> str | None:
    """The compiler, if there is one."""
    return shutil.which("g++")


def _key(gxx: str) -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode() + _run(gxx, "--version") + _processor())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> bytes:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return os.uname().machine.encode()
    return b"\n".join(line for line in lines if line.startswith((b"flags", b"Features", b"model name")))[:8192]


def _compile(gxx: str, path: Path) -> None:
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_suffix(f".{os.getpid()}")  # other workers may be compiling the same; the last rename wins
    _run(gxx, *FLAGS, str(SOURCES / "decoder.cpp"), "-o", str(mine))
    mine.replace(path)
    log.info("compiled the CPU kernels in %.1f s: %s", time.monotonic() - started, path)


def _run(*command: str) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S).stdout
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed: {error.stderr.decode(errors='replace').strip()[:500]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from None
