"""Addresses that gateways keep when they are started again."""

from collections.abc import Iterator
from contextlib import contextmanager

from cli.ports import Reserved


@contextmanager
def two_ports() -> Iterator[int]:
    """The first of two neighbours, as `forebay up --port` wants them for two gateways; nobody else gets them."""
    first, second = _neighbours()
    try:
        yield first.number
    finally:
        first.close()
        second.close()


def _neighbours() -> tuple[Reserved, Reserved]:
    while True:
        first = Reserved("127.0.0.1")
        try:
            return first, Reserved("127.0.0.1", first.number + 1)
        except OSError:
            first.close()
