"""What `deploy/install` installs, and which build of torch: the script as it is, with package indexes of this test's
own."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path
from threading import Thread

import pytest

from tests.architecture import linked
from tests.architecture.tree import ROOT

PINNED = re.search(r'^ *"torch==([0-9.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
assert PINNED, "deploy/install finds torch's version on a line of its own"
VERSION = PINNED.group(1)
# A project that builds itself, of which only the worker needs something: torch. Nothing else has to be on an index.
PROJECT = f"""\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project.optional-dependencies]
router = []
worker = [
  "torch=={VERSION}",
]
"""
BACKEND = f"""\
import zipfile

METADATA = '''Metadata-Version: 2.1
Name: forebay
Version: 1
Provides-Extra: router
Provides-Extra: worker
Provides-Extra: cuda
Requires-Dist: torch=={VERSION}; extra == "worker"
'''
WHEEL = "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "forebay-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{{directory}}/{{name}}", "w") as wheel:
        wheel.writestr("forebay-1.dist-info/METADATA", METADATA)
        wheel.writestr("forebay-1.dist-info/WHEEL", WHEEL)
        wheel.writestr("forebay-1.dist-info/RECORD", "")
    return name

build_wheel = build_editable
"""


class Machine:
    """A tree with `deploy/install`, and two package indexes: where pip looks by itself, and PyTorch's for CPUs."""

    def __init__(self, root: Path, venv: Path) -> None:
        self.tree, self.indexes, self.bin = root / "tree", root / "indexes", root / "bin"
        self.venv = venv
        self.asked: list[str] = []
        (self.tree / "deploy").mkdir(parents=True)
        shutil.copy(ROOT / "deploy" / "install", self.tree / "deploy")
        (self.tree / "pyproject.toml").write_text(PROJECT)
        (self.tree / "backend.py").write_text(BACKEND)
        self.bin.mkdir()
        self.has_gpu(False)
        for index in ("pip", "cpu"):
            (self.indexes / index / "torch").mkdir(parents=True)
        handler = partial(_Handler, self.asked, directory=str(self.indexes))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def has_gpu(self, there: bool) -> None:
        program = self.bin / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nexit {0 if there else 9}\n")
        program.chmod(0o755)

    def offers(self, index: str, version: str) -> None:
        """Put a torch that is nothing but its version on an index."""
        about = f"torch-{version}.dist-info"
        path = self.indexes / index / "torch" / f"torch-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("torch/__init__.py", f"__version__ = {version!r}\n")
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
            tag = "Tag: py3-none-any"
            wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n{tag}\n")
            wheel.writestr(f"{about}/RECORD", "")

    def install(self, extra: str = "worker") -> str:
        """The version of torch that this brings, or nothing."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        environment |= {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{self.url}/pip",
            "TORCH_CPU_INDEX": f"{self.url}/cpu",
        }
        command = [str(self.tree / "deploy" / "install"), sys.executable, str(self.venv), extra]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = {each.name: each.version for each in self.installed()}
        assert "forebay" in found
        return found.get("torch", "")

    def installed(self) -> list[Distribution]:
        packages = [str(path) for path in self.venv.glob("lib/python*/site-packages")]
        return [each for each in distributions(path=packages) if each.name in ("forebay", "torch")]

    def leave(self) -> None:
        """The environment is the next one's."""
        self.server.shutdown()
        self.server.server_close()
        for each in self.installed():
            for folder in {file.parts[0] for file in each.files or ()}:
                shutil.rmtree(str(each.locate_file(folder)))

    def was_asked(self, index: str) -> bool:
        return any(path.startswith(f"/{index}/") for path in self.asked)


class _Handler(SimpleHTTPRequestHandler):
    """A listing of wheels is an index as PEP 503 wants it."""

    def __init__(self, asked: list[str], *args: object, **more: object) -> None:
        self._asked = asked
        super().__init__(*args, **more)  # type: ignore[arg-type]

    def log_message(self, format: str, *args: object) -> None:
        self._asked.append(self.path)


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the script finds it when it runs again, with the pip of this one: to make one with its own, as
    test_environments has the script do, takes longer than all else here."""
    path = tmp_path_factory.mktemp("install") / ".venv"
    linked.make(path, [distribution("pip")])
    (path / "bin" / "pip").touch(mode=0o755)  # by which the script knows
    return path


@pytest.fixture
def machine(tmp_path: Path, venv: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path, venv)
    yield machine
    machine.leave()


def test_without_a_gpu_torch_comes_from_pytorchs_index_for_cpus(machine: Machine) -> None:
    machine.offers("pip", VERSION)
    machine.offers("cpu", f"{VERSION}+cpu")
    assert machine.install() == f"{VERSION}+cpu"


def test_a_cpu_build_where_pip_looks_by_itself_is_taken_and_nobody_else_asked(machine: Machine) -> None:
    machine.offers("pip", VERSION)
    machine.offers("pip", f"{VERSION}+cpu")
    machine.offers("cpu", f"{VERSION}+cpu.other")
    assert machine.install() == f"{VERSION}+cpu"
    assert machine.was_asked("pip")
    assert not machine.was_asked("cpu")


def test_with_a_gpu_torch_is_the_build_for_it(machine: Machine) -> None:
    machine.has_gpu(True)
    machine.offers("pip", VERSION)
    machine.offers("cpu", f"{VERSION}+cpu")
    assert machine.install() == VERSION
    assert not machine.was_asked("cpu")


def test_nobody_but_a_worker_gets_torch(machine: Machine) -> None:
    machine.offers("pip", f"{VERSION}+cpu")
    assert machine.install("router") == ""
    assert machine.asked == []


def test_the_index_for_cpus_is_pytorchs_own_unless_another_is_named() -> None:
    assert "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" in (ROOT / "deploy" / "install").read_text()
