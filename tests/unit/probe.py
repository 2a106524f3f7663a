"""A process that says what it finds, and ends or stays as it is told: `python -m tests.unit.probe stay`."""

import atexit
import json
import os
import random
import signal
import sys
import time
import uuid
from pathlib import Path

from shared import gentle_start
from tests.unit.preloaded import IMPORTED_BY


def _facts() -> dict[str, object]:
    handlers = {signal.Signals(number).name: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "arguments": sys.argv[1:],
        "mark": os.environ.get("MARK"),
        "gone": os.environ.get("GONE"),
        "folder": str(Path.cwd()),
        "main": sys.modules["__main__"].__spec__.name,  # type: ignore[union-attr]
        "imported_by": IMPORTED_BY,
        "chance": [random.random(), uuid.uuid4().hex],
        "num_threads": len(list(Path("/proc/self/task").iterdir())),
        "handlers": {name: str(handler) for name, handler in handlers.items()},
        "ignored": Path("/proc/self/status").read_text().split("SigIgn:")[1].split()[0],
        "num_files": len(list(Path("/proc/self/fd").iterdir())),
        "input": str(Path("/proc/self/fd/0").readlink()),
        "share": gentle_start.AUTOGROUP.read_text().rpartition("nice ")[2] if gentle_start.AUTOGROUP.exists() else "",
        "title": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_facts()) + "\n")
    sys.stdout.flush()
    match sys.argv[1]:
        case "stay":
            time.sleep(1000)
        case "exit":
            atexit.register(print, "the last words")  # which are in a buffer when it ends
            sys.exit(3)
        case "fail":
            raise ValueError("a defect")
        case "refuse":
            sys.exit("no such model")
