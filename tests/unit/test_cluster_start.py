"""A cluster that does not come up says who is to blame, and at once."""

import os
import sys
from pathlib import Path

import pytest

from cli import valkey
from cli.cluster import Cluster, StartFailed
from cli.forks import ForkServers
from cli.plan import ClusterOptions
from cli.state import RunDirectory

DEADLINE_S = 600.0  # longer than a test may take


async def test_a_blackboard_that_ends_is_named_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = (sys.executable, "-c", "import sys; sys.exit('no room')")
    monkeypatch.setattr(valkey, "command", lambda *_: ends)
    with ForkServers({}) as fork_servers:
        cluster = Cluster(ClusterOptions("sim", engine="sim", port=0), RunDirectory.create(tmp_path), fork_servers)
        try:
            with pytest.raises(StartFailed, match=r"blackboard ended at once: exit status 1\n.*no room"):
                await cluster.start(os.getpid(), DEADLINE_S)
        finally:
            await cluster.stop(0.0)
