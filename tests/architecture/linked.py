"""Virtual environments made of links to what is installed here."""

import sys
import venv
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path


def make(environment: Path, brought: Iterable[Distribution]) -> None:
    """One that has these distributions, without their scripts."""
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    for each in brought:
        _link(each, packages)


def files(installed: Distribution) -> dict[str, Path]:
    """Those of a distribution, but for what it says of itself, what Python compiled, and scripts: by their places."""
    found = {str(file): Path(str(installed.locate_file(file))) for file in installed.files or () if _is_own(file.parts)}
    return {place: path for place, path in found.items() if path.exists()}


def _is_own(parts: Sequence[str]) -> bool:
    return not {"..", "__pycache__"} & set(parts) and not parts[0].endswith(".dist-info")


def _link(installed: Distribution, packages: Path) -> None:
    for file in installed.files or ():
        if ".." not in file.parts:
            path = packages / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(Path(str(installed.locate_file(file))))


def make_with_pip(environment: Path) -> None:
    """One that has pip alone, as `python -m venv` makes it."""
    make(environment, [distribution("pip")])
    (environment / "bin" / "pip").touch(mode=0o755)  # by which `deploy/install` knows


if __name__ == "__main__":
    make_with_pip(Path(sys.argv[1]))
