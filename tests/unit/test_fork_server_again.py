"""A fork server that has served and ends is replaced, once, by one that is executed."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.unit.test_fork_servers import Facts, Rig, rig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all processes are executed")


async def killed(supervisor: Rig, facts: Facts) -> Facts:
    """What the probe finds that takes the place of one that is killed."""
    os.kill(facts["pid"], signal.SIGKILL)
    return await supervisor.facts(old_pid=facts["pid"])


async def test_a_fork_server_that_has_served_and_ends_is_replaced_once(tmp_path: Path) -> None:
    async with rig(tmp_path, "stay") as supervisor:
        first, _ = await supervisor.said()
        forked = await supervisor.facts()
        os.kill(first, signal.SIGKILL)
        executed = await killed(supervisor, forked)
        again = await killed(supervisor, executed)
        second, _ = await supervisor.until(lambda server, _: server not in {0, first})
        assert forked["imported_by"] == first
        assert executed["imported_by"] == executed["pid"]
        assert again["imported_by"] == second
        assert {name: again[name] for name in again if name not in {"pid", "session", "imported_by", "chance"}} == {
            name: forked[name] for name in forked if name not in {"pid", "session", "imported_by", "chance"}
        }
        os.kill(second, signal.SIGKILL)
        for _ in range(2):
            again = await killed(supervisor, again)
            assert again["imported_by"] == again["pid"]


async def test_a_fork_server_that_has_never_served_is_not_replaced(tmp_path: Path) -> None:
    async with rig(tmp_path, "stay", preload="there.is.none") as supervisor:
        facts = await supervisor.facts()
        for _ in range(2):
            facts = await killed(supervisor, facts)
            assert facts["imported_by"] == facts["pid"]
            assert (await supervisor.said())[0] == 0
