"""Tests that several processes share out are reported as by one, whatever becomes of the processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# By file: what comes of its tests in order, which a process runs in this order.
SUITE = {
    "test_plain": """
        import os, pytest, sys, time

        @pytest.fixture(scope="session", autouse=True)
        def made_once():
            yield
            print("unmade in", os.getpid(), file=sys.__stderr__)

        def test_passes(tmp_path):
            (tmp_path / "mine").write_text("x")

        def test_fails():
            print("said before it failed")
            assert 1 == 2

        @pytest.mark.skip(reason="for a reason")
        def test_is_skipped(): ...

        @pytest.mark.xfail
        def test_is_known_to_fail():
            assert False
    """,
    "test_dies": """
        import os, signal

        def test_before(): ...
        def test_kills():
            os.kill(os.getpid(), signal.SIGKILL)
        def test_behind(): ...
    """,
    "test_broken": """
        import pytest

        @pytest.fixture
        def broken():
            raise RuntimeError("it cannot be made")

        def test_has_no_fixture(broken): ...
    """,
}


def run(folder: Path, *arguments: str, **files: str) -> subprocess.CompletedProcess[str]:
    """Of a suite of these files, by several processes."""
    room = folder / "tests" / "unit"
    room.mkdir(parents=True)
    for name, text in files.items():
        lines = text.splitlines()
        (room / f"{name}.py").write_text("\n".join(line.removeprefix(" " * 8) for line in lines))
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.processes", "--processes", "3", "-ra", *arguments]
    return subprocess.run(
        [*command, "--rootdir", str(folder), "-c", str(folder / "pytest.ini"), str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_what_happens_in_processes_is_reported_as_if_it_had_in_one(tmp_path: Path) -> None:
    done = run(tmp_path, **SUITE)
    said = done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, said + done.stderr
    assert re.search(r"2 failed, 3 passed, 1 skipped, 1 xfailed, 1 error in ", said), said
    assert "said before it failed" in said
    assert "assert 1 == 2" in said
    assert "RuntimeError: it cannot be made" in said
    assert "for a reason" in said
    assert "its process ended with -9" in said
    assert re.search(r"FAILED .*test_dies.py::test_kills", said)
    assert "unmade in" in done.stderr


def test_who_wants_to_stop_at_the_first_failure_does(tmp_path: Path) -> None:
    slow = "import time\n" + "".join(f"def test_{number}(): time.sleep(0.1)\n" for number in range(600))
    done = run(tmp_path, "-x", test_bad="def test_fails(): assert 0", test_long=slow)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "stopping after 1 failures" in done.stdout


def test_one_process_runs_all_if_importing_them_began_a_thread(tmp_path: Path) -> None:
    """A fork of a process with threads may wait for ever."""
    begins = "import threading, time\nthreading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n"
    done = run(tmp_path, test_threads=begins + "def test(): ...")
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert "one process runs all: to import tests began 1 threads" in done.stdout
