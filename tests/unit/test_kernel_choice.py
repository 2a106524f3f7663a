from pathlib import Path

import pytest

from shared.engine.kernels import build
from shared.engine.kernels.registry import Candidate, choose
from shared.errors import Unsupported

FAST, SLOW = Candidate("fast", None, 1), Candidate("slow", None, 2)
BROKEN = Candidate("broken", "the moon is full", 3)


def test_the_first_candidate_without_an_obstacle_serves() -> None:
    assert choose([BROKEN, FAST, SLOW], "auto") is FAST


def test_a_candidate_can_be_asked_for_by_name() -> None:
    assert choose([BROKEN, FAST, SLOW], "slow") is SLOW


def test_a_candidate_with_an_obstacle_is_refused_with_it() -> None:
    with pytest.raises(Unsupported, match="broken: the moon is full"):
        choose([BROKEN, FAST], "broken")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Unsupported, match="known are auto, fast, slow"):
        choose([FAST, SLOW], "magic")


def fake_compiler(directory: Path, script: str) -> str:
    """A compiler that answers --version and otherwise runs `script`."""
    path = directory / "g++"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake; exit; fi\n{script}\n')
    path.chmod(0o755)
    return str(path)


WRITES_OUTPUT = 'while [ "$1" != -o ]; do shift; done; echo built > "$2"; echo >> "$(dirname "$0")/runs"'


def test_kernels_are_compiled_once(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, WRITES_OUTPUT)
    first = build.library(tmp_path / "cache", compiler)
    assert build.library(tmp_path / "cache", compiler) == first
    assert first.read_text() == "built\n"
    assert (tmp_path / "runs").read_text() == "\n"
    assert list((tmp_path / "cache").iterdir()) == [first]


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, "echo 'cannot find -march=native' >&2; exit 1")
    with pytest.raises(build.BuildError, match="cannot find -march=native"):
        build.library(tmp_path / "cache", compiler)
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_compiler_is_an_obstacle_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match=r"no g\+\+"):
        build.library(tmp_path, None)
