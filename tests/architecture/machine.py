"""A machine on which `deploy/install` runs as it is, with a project and package indexes of a test's own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import Distribution, distributions
from pathlib import Path
from threading import Thread

from packaging.utils import canonicalize_name

from tests.architecture import wheels
from tests.architecture.tree import ROOT

PINNED = re.search(r'^ *"torch==([0-9.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
assert PINNED, "deploy/install finds torch's version on a line of its own"
TORCH = PINNED.group(1)
# A project that builds itself. What it requires is in its METADATA; `deploy/install` looks for torch's version here.
PROJECT = f"""\
[build-system]
requires = []
build-backend = "wheels"
backend-path = ["."]

[project.optional-dependencies]
worker = [
  "torch=={TORCH}",
]
"""


# As Python does all but one thing: an environment it makes of links, where Python would unpack and compile pip anew,
# which takes longer than everything else here.
PYTHON = f"""\
#!/bin/sh
if [ "$1 $2" != "-m venv" ]; then exec {sys.executable} "$@"; fi
cd {ROOT} && exec {sys.executable} -m tests.architecture.linked "$3"
"""


class Machine:
    """A tree with `deploy/install` and a project of this METADATA, and two package indexes: where pip looks by itself,
    and PyTorch's for CPUs."""

    def __init__(self, root: Path, venv: Path, project: str) -> None:
        self.tree, self.indexes, self.bin = root / "tree", root / "indexes", root / "bin"
        self.venv = venv
        self.asked: list[str] = []
        (self.tree / "deploy").mkdir(parents=True)
        shutil.copy(ROOT / "deploy" / "install", self.tree / "deploy")
        (self.tree / "pyproject.toml").write_text(PROJECT)
        (self.tree / "METADATA").write_text(project)
        shutil.copy(wheels.__file__, self.tree)
        self.bin.mkdir()
        self.has_gpu(False)
        self._program("python", PYTHON)
        for index in ("pip", "cpu"):
            (self.indexes / index / "torch").mkdir(parents=True)
        handler = partial(_Handler, self.asked, directory=str(self.indexes))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def has_gpu(self, there: bool) -> None:
        self._program("nvidia-smi", f"#!/bin/sh\nexit {0 if there else 9}\n")

    def _program(self, name: str, script: str) -> None:
        program = self.bin / name
        program.write_text(script)
        program.chmod(0o755)

    def offers(
        self, index: str, name: str, version: str, *requires: str, files: Mapping[str, Path] | None = None
    ) -> None:
        """Put a distribution on an index: its name, its version, what it requires, and files by their places."""
        folder = self.indexes / index / canonicalize_name(name)
        folder.mkdir(exist_ok=True)
        extras = re.findall(r"""extra == ["']([^"']*)""", " ".join(requires))
        wheels.write(folder, wheels.metadata(name, version, requires, dict.fromkeys(extras)), files)

    def install(self, extras: str) -> dict[str, str]:
        """The versions of what there is afterwards, by name, but for what comes with every environment."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        environment |= {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{self.url}/pip",
            "PIP_NO_COMPILE": "1",  # whoever imports a file does
            "TORCH_CPU_INDEX": f"{self.url}/cpu",
        }
        command = [str(self.tree / "deploy" / "install"), str(self.bin / "python"), str(self.venv), extras]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {canonicalize_name(each.name): each.version for each in self.installed()}

    def installed(self) -> list[Distribution]:
        packages = [str(path) for path in self.venv.glob("lib/python*/site-packages")]
        return [each for each in distributions(path=packages) if each.name not in ("pip", "setuptools")]

    def close(self) -> None:
        """No more is installed."""
        self.server.shutdown()
        self.server.server_close()

    def leave(self) -> None:
        """The environment is the next one's."""
        self.close()
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
