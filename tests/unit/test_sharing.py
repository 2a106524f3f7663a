"""How the suite is shared out to several processes."""

from pathlib import Path

import pytest

from tests import sharing

TESTS = Path(sharing.__file__).parent


def test_every_room_has_its_place_in_the_order() -> None:
    assert {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")} == set(sharing.ROOMS)


def test_what_is_named_is_there() -> None:
    named = sharing.COMPUTING + sharing.DEFAULT_MODEL + sharing.PARSED
    assert [file for file in named if not (TESTS / file).is_file()] == []


def test_clusters_are_the_work_of_two_processes_and_any_other_file_is_its_own() -> None:
    clusters = {sharing.work(f"tests/{file}::test_x[a::b]") for file in ("chaos/test_chaos.py", "e2e/test_faults.py")}
    computing = {sharing.work(f"tests/{file}::test_x") for file in sharing.COMPUTING}
    others = {sharing.work(f"tests/{file}::test_x") for file in ("law/a.py", "unit/a.py", "unit/gateway/a.py")}
    assert (len(clusters), len(computing), len(others)) == (1, 1, 3)
    assert len(clusters | computing | others) == 5


@pytest.mark.parametrize("files", [sharing.DEFAULT_MODEL, sharing.PARSED])
def test_files_that_need_the_same_are_the_work_of_one_process(files: tuple[str, ...]) -> None:
    assert len({sharing.work(f"tests/{file}::test_x") for file in files}) == 1


def test_long_computations_begin_first() -> None:
    files = ["unit/test_a.py", "law/test_a.py", "e2e/test_faults.py", sharing.COMPUTING[0], "chaos/test_chaos.py"]
    found = sorted((f"tests/{file}::test_x" for file in files), key=sharing.place)
    assert [file.split("/")[1] for file in found] == ["chaos", "e2e", "e2e", "law", "unit"]
    assert "test_long_context" in found[1]
