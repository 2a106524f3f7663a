"""Virtual environments made of links to what is installed here."""

import venv
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path


def make(environment: Path, brought: Iterable[Distribution]) -> None:
    """One that has these distributions, without their scripts."""
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    for each in brought:
        _link(each, packages)


def _link(installed: Distribution, packages: Path) -> None:
    for file in installed.files or ():
        if ".." not in file.parts:
            path = packages / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(Path(str(installed.locate_file(file))))
