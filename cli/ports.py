"""Ports of this machine."""

import socket
import sys


class Reserved:
    """A port, any unless one is named, that nobody is given by chance until it is closed: neither who asks for any port
    nor who connects, before its server has begun to listen and while that is started again. A server sets SO_REUSEADDR.

    Raises OSError if it is taken or `host` is not this machine's.
    """

    def __init__(self, host: str, number: int = 0) -> None:
        self._socket = socket.socket()
        try:
            self._socket.bind((host, number))
        except OSError as error:
            self.close()
            raise OSError(f"cannot listen on {host}: {error.strerror}") from error
        self.number = int(self._socket.getsockname()[1])
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # now, so that nobody has reserved it, too
        if sys.platform != "linux":  # where a port that is bound cannot be listened on by another
            self.close()

    def close(self) -> None:
        """Leave it to whoever comes."""
        self._socket.close()


def in_a_row(host: str, count: int) -> list[Reserved]:
    """So many neighbours, one at least, wherever there are as many. Raises OSError if `host` is not this machine's."""
    while True:
        ports = [Reserved(host)]
        try:
            while len(ports) < count:
                ports.append(Reserved(host, ports[-1].number + 1))
        except (OSError, OverflowError):  # taken, or behind the last of all
            for port in ports:
                port.close()
        else:
            return ports


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
