"""A supervisor of its own process, since one that forks must have no thread:

    python -m tests.unit.fork_rig FOLDER PRELOAD PATIENCE_S [ARGUMENT ...]

It supervises one probe for each argument, with logs in the folder, and waits so long for its fork server. It says
which process that is (0: none is left) whenever a probe starts or ends, and what ended the first one last.
"""

import asyncio
import os
import sys
from pathlib import Path

from cli.fork_server import Preload
from cli.forks import ForkServers
from cli.process import ProcessSpec, Supervised


async def supervise(servers: ForkServers, folder: Path, arguments: list[str]) -> None:
    del os.environ["GONE"]

    def say() -> None:
        sys.stdout.write(f"{servers.pids.get('rig', 0)} {processes[0].last_exit}\n")
        sys.stdout.flush()

    processes: list[Supervised] = []
    for number, argument in enumerate(arguments):
        command = (sys.executable, "-m", "tests.unit.probe", argument)
        spec = ProcessSpec("probe", f"probe-{number}", command, {"MARK": str(number)}, True, "rig")
        processes.append(Supervised(spec, folder, on_change=say, first_backoff_s=0.01, launch=servers.launch))
        await processes[-1].start()
    await asyncio.sleep(1000)


if __name__ == "__main__":
    os.environ["GONE"] = "taken away before anything is started"
    with ForkServers({"rig": Preload((sys.argv[2],))}, float(sys.argv[3])) as fork_servers:
        asyncio.run(supervise(fork_servers, Path(sys.argv[1]), sys.argv[4:]))
