"""Wheels made here, of files if they are to have any, and a build backend (PEP 517) that makes one of the file METADATA
beside it."""

import re
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from pathlib import Path

ABOUT = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def metadata(name: str, version: str, requires: Iterable[str] = (), extras: Iterable[str] = ()) -> str:
    """What a distribution says of itself."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {required}" for required in requires]
    return "\n".join(lines) + "\n"


def write(folder: Path, said: str, files: Mapping[str, Path] | None = None) -> str:
    """Put the wheel of a METADATA into a folder, with files by their places; returns its name."""
    fields = HeaderParser().parsestr(said)
    stem = re.sub("[-_.]+", "_", fields["Name"]) + "-" + fields["Version"]
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file, text in (("METADATA", said), ("WHEEL", ABOUT), ("RECORD", "")):
            wheel.writestr(f"{stem}.dist-info/{file}", text)
        for place, path in (files or {}).items():
            wheel.write(path, place)
    return f"{stem}-py3-none-any.whl"


def build_editable(directory: str, config_settings: object = None, metadata_directory: object = None) -> str:
    """As pip calls it, in the project's folder."""
    return write(Path(directory), Path("METADATA").read_text())


build_wheel = build_editable
