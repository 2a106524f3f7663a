"""Unix sockets beside TCP, for processes of one host.

A process that is given a directory also listens on HOST:PORT.sock there, named by the address that it registers. Who
calls that address and is given the same directory tries the socket, too. Where nobody answers on it (another host, a
process that is not given the directory, a file left behind by one that was killed) there is TCP as ever, so nothing has
to be agreed on. The directory is one user's and closed to all others: nobody else can answer in a process's place.
"""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)

Protocol = TypeVar("Protocol", bound=asyncio.Protocol)

# What a kernel takes (sun_path, unix(7)), less the zero at the end.
MAX_PATH_BYTES = 107
# Who is there is connected to at once, also if it is busy, unless very many want to be.
DIAL_S = 0.5


def checked_directory(directory: str) -> str:
    """The directory as given, empty for none. Raises ValueError unless it is this user's alone."""
    if not directory:
        return directory
    try:
        found = Path(directory).stat()
    except OSError as error:
        raise ValueError(f"must be a directory ({error.strerror})") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ValueError("must be a directory of this user's, closed to all others (mode 0700)")
    return str(Path(directory).absolute())


def fits(path: Path) -> bool:
    """Whether a socket can have this path."""
    return len(os.fsencode(path)) <= MAX_PATH_BYTES


class LocalSockets:
    """Those of one directory; none if it is empty."""

    def __init__(self, directory: str = "") -> None:
        self._directory = Path(directory) if directory else None

    async def dial(self, address: str, make: Callable[[], Protocol]) -> Protocol | None:
        """Connect to the process that listens at host:port, if it does so here, too."""
        if (path := self._path(address)) is None:
            return None
        try:
            async with asyncio.timeout(DIAL_S):
                return (await asyncio.get_running_loop().create_unix_connection(make, str(path)))[1]
        except OSError:  # a TimeoutError, too
            return None

    async def listen(self, address: str, make: Callable[[], asyncio.Protocol]) -> "Listener | None":
        """Listen here, too, as a process that does so at host:port; None if that cannot be.

        It cannot where somebody answers already, who has the same address in another network.
        """
        path = self._path(address)
        if path is None:
            return None
        if _answers(path):
            log.warning("another process listens at %s: others reach this one by TCP alone", path)
            return None
        try:
            path.unlink(missing_ok=True)  # one that was killed had it
            return Listener(path, await asyncio.get_running_loop().create_unix_server(make, str(path)))
        except OSError as error:
            log.warning("cannot listen at %s, others reach this process by TCP alone: %s", path, error)
            return None

    def _path(self, address: str) -> Path | None:
        if self._directory is None or "/" in address:
            return None
        path = self._directory / f"{address}.sock"
        return path if fits(path) else None


class Listener:
    """A socket that somebody listens at."""

    def __init__(self, path: Path, server: asyncio.AbstractServer) -> None:
        self._path, self._server = path, server

    def close(self) -> None:
        """Take no new connections; those that are open stay."""
        self._server.close()
        self._path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # somebody listens whose queue is full
            return True
        except OSError:
            return False
    return True
