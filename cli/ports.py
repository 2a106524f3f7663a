"""Ports of this machine."""

import socket


def free_port(host: str) -> int:
    """A port that nobody listens on now. Raises OSError if `host` is not this machine's."""
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise OSError(f"cannot listen on {host}: {error.strerror}") from error
        return int(probe.getsockname()[1])


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
