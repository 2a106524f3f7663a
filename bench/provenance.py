"""What a benchmark's figures depend on: command, commit, hardware, and what else the machine does."""

import os
import platform
import subprocess
import sys
from pathlib import Path


def banner(module: str) -> str:
    """The lines that every benchmark prints first; `module` is its name for `python -m`."""
    return (
        f"command: {' '.join(['python -m', module, *sys.argv[1:]])}\n"
        f"commit: {commit()}; hardware: {hardware()}\n"
        f"load before: {os.getloadavg()[0]:.2f} (other work on the machine makes medians worse)\n"
    )


def commit() -> str:
    """The commit of the code that runs, with a + if it was changed since; empty where it is not from a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return found.stdout.strip() + ("+" if changes.stdout.strip() else "")


def hardware() -> str:
    """Processor, cores and system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
