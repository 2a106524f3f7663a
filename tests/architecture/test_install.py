"""What `deploy/install` installs, and which build of torch: the script as it is, with package indexes of this test's
own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture import linked, wheels
from tests.architecture.machine import TORCH, Machine
from tests.architecture.tree import ROOT

# Only the worker needs something, torch. Nothing else has to be on an index.
PROJECT = wheels.metadata("forebay", "1", [f'torch=={TORCH}; extra == "worker"'], ["router", "worker", "cuda"])


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the script finds it when it runs again; test_environments has it make one."""
    path = tmp_path_factory.mktemp("install") / ".venv"
    linked.make_with_pip(path)
    return path


@pytest.fixture
def machine(tmp_path: Path, venv: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, venv, PROJECT)
    yield machine
    machine.leave()


def torch_installed(machine: Machine, extra: str = "worker") -> str:
    """The version of torch that this brings, or nothing."""
    found = machine.install(extra)
    assert "forebay" in found
    return found.get("torch", "")


def test_without_a_gpu_torch_comes_from_pytorchs_index_for_cpus(machine: Machine) -> None:
    machine.offers("pip", "torch", TORCH)
    machine.offers("cpu", "torch", f"{TORCH}+cpu")
    assert torch_installed(machine) == f"{TORCH}+cpu"


def test_a_cpu_build_where_pip_looks_by_itself_is_taken_and_nobody_else_asked(machine: Machine) -> None:
    machine.offers("pip", "torch", TORCH)
    machine.offers("pip", "torch", f"{TORCH}+cpu")
    machine.offers("cpu", "torch", f"{TORCH}+cpu.other")
    assert torch_installed(machine) == f"{TORCH}+cpu"
    assert machine.was_asked("pip")
    assert not machine.was_asked("cpu")


def test_with_a_gpu_torch_is_the_build_for_it(machine: Machine) -> None:
    machine.has_gpu(True)
    machine.offers("pip", "torch", TORCH)
    machine.offers("cpu", "torch", f"{TORCH}+cpu")
    assert torch_installed(machine) == TORCH
    assert not machine.was_asked("cpu")


def test_nobody_but_a_worker_gets_torch(machine: Machine) -> None:
    machine.offers("pip", "torch", f"{TORCH}+cpu")
    assert torch_installed(machine, "router") == ""
    assert machine.asked == []


def test_the_index_for_cpus_is_pytorchs_own_unless_another_is_named() -> None:
    assert "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" in (ROOT / "deploy" / "install").read_text()
