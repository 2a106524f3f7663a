"""How commands find the cluster that runs on this machine, and what they say of it."""

import os
import subprocess
import sys
from pathlib import Path

from cli import state
from cli.state import ProcessState, RunDirectory, RunState
from cli.status import join
from shared.blackboard.admission import Account
from shared.blackboard.records import ModelCard, Pages, Registration, Role, Room

WORKER = ProcessState(role="decode", name="decode-0", pid=7, num_restarts=2, last_exit="killed by SIGKILL", log="x")
CARD = ModelCard(
    model="m", max_model_len=64, page_size=16, vocab_size=9, eos_token_ids=(1,), compatibility_hash="h", model_path="/m"
)


def _registration(pid: int, draining: bool = False) -> Registration:
    pages = Pages(free=3, cached=1, total=4)
    return Registration(
        role=Role.DECODE, name="decode-0", epoch=5, pid=pid, address="a:1", card=CARD, pages=pages, draining=draining
    )


def _run(pid: int, started: int = 1) -> RunState:
    return RunState(supervisor_pid=pid, started_unix_ms=started, redis_url="redis://r:1/0", processes=[WORKER])


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_running_cluster_is_found_by_its_state(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path).write(_run(os.getpid()))
    assert state.find(tmp_path) == _run(os.getpid())


def test_a_cluster_whose_supervisor_is_gone_is_not_found_and_its_directory_goes(tmp_path: Path) -> None:
    pid = _dead_pid()
    (tmp_path / "run" / str(pid)).mkdir(parents=True)
    RunDirectory(tmp_path / "run" / str(pid)).write(_run(pid))
    assert state.find(tmp_path) is None
    RunDirectory.create(tmp_path)
    assert not (tmp_path / "run" / str(pid)).exists()


def test_a_stopped_cluster_leaves_no_file(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path)
    directory.write(_run(os.getpid()))
    directory.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_ranks_of_a_worker_are_shown_with_it() -> None:
    (row,) = join(_run(1), [_registration(pid=7).model_copy(update={"rank_pids": (8, 9)})])
    assert (row["pid"], row["rank_pids"]) == (7, [8, 9])


def test_a_process_is_shown_as_it_registered_itself() -> None:
    (row,) = join(_run(1), [_registration(pid=7)])
    assert (row["state"], row["epoch"], row["address"], row["num_restarts"]) == ("serving", 5, "a:1", 2)
    assert row["pages"] == {"free": 3, "cached": 1, "leased": 0, "held": 0, "total": 4}


def test_the_registration_of_an_earlier_incarnation_says_nothing_about_the_current_one() -> None:
    (row,) = join(_run(1), [_registration(pid=6)])
    assert (row["state"], row["pid"], row["epoch"], row["pages"]) == ("starting", 7, None, None)


def test_a_draining_process_is_shown_as_draining() -> None:
    (row,) = join(_run(1), [_registration(pid=7, draining=True)])
    assert row["state"] == "draining"


def test_processes_of_other_machines_are_shown_without_supervisor_facts() -> None:
    (row,) = join(None, [_registration(pid=7)])
    assert (row["state"], row["pid"], row["num_restarts"]) == ("serving", 7, None)


def test_the_age_of_a_report_is_shown_for_the_current_incarnation_alone() -> None:
    (row,) = join(_run(1), [_registration(pid=7)], {"decode-0": 300.0})
    assert row["report_age_ms"] == 300.0
    (row,) = join(_run(1), [_registration(pid=6)], {"decode-0": 300.0})
    assert row["report_age_ms"] is None


def test_what_is_promised_to_a_worker_is_shown_with_it() -> None:
    account = Account(
        limits=Room(sequences=8), used=Room(sequences=1), promised=Room(sequences=2, tokens=640, pages=40)
    )
    (row,) = join(_run(1), [_registration(pid=7)], rooms={"decode-0": account})
    assert row["room"]["promised"] == {"sequences": 2, "tokens": 640, "pages": 40}
    (row,) = join(_run(1), [_registration(pid=6)], rooms={"decode-0": account})
    assert row["room"] is None
