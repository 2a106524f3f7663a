"""Which version runs."""

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """As it was installed; "0" where the tree is run without that."""
    try:
        return metadata.version("forebay")
    except metadata.PackageNotFoundError:
        return "0"
