"""Addresses that gateways keep when they are started again."""

from cli.ports import free_port, is_free


def two_free_ports() -> int:
    """The first of two neighbours, as `forebay up --port` wants them for two gateways."""
    while not is_free("127.0.0.1", (port := free_port("127.0.0.1")) + 1):
        pass
    return port
