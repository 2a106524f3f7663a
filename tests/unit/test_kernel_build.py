"""Kernels are compiled once and kept, by whoever comes first."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.engine.kernels import build

# Ends when another compiler has made its kernels, too.
COMPILER = """#!/bin/sh
for last; do :; done
case "$1" in --version) echo 1; exit;; esac
echo made > "$last"
echo $$ > {meeting}/$$
until [ $(ls {meeting} | wc -l) -ge 2 ]; do sleep 0.01; done
"""


@pytest.mark.timeout(30)
def test_two_with_one_pid_may_compile_the_same_at_once(tmp_path: Path) -> None:
    """As workers in containers do that share a cache: in each of them the worker is process 1."""
    meeting, cache, compiler = tmp_path / "meeting", tmp_path / "cache", tmp_path / "c++"
    meeting.mkdir()
    compiler.write_text(COMPILER.format(meeting=meeting))
    compiler.chmod(0o755)
    with ThreadPoolExecutor() as pool:
        paths = set(pool.map(lambda _: build.library(cache, str(compiler)), range(2)))
    (path,) = paths
    assert path.read_text() == "made\n"
    assert list(cache.iterdir()) == [path]
