"""Generate the Python code of the protocol into protos/forebay/v1, or check that what is committed is current.

    python -m protos.generate [--check]

The generator is older than the installed protobuf on purpose: generated code loads on any runtime at least as new as
its generator, so code from this one loads beside packages that pin an older protobuf. It is installed into a cache
folder of its own, because pip could not install it beside a current grpcio.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
GENERATOR = "grpcio-tools==1.71.2"
STUBS = ("mypy-protobuf==3.6.0", "protobuf==5.29.5", "types-protobuf==5.29.1.20250403")
PLUGINS = {"mypy": "main", "mypy_grpc": "grpc"}
"""And the functions of `mypy_protobuf.main` that run them."""
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "forebay" / "v1").glob("*.proto"))
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the committed code differs")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = _differences(Path(folder))
        if check:
            for name in stale:
                print(f"not current: protos/{name}; run `make protos`", file=sys.stderr)
            return 1 if stale else 0
        _install(Path(folder))
    return 0


def generate(target: Path) -> None:
    """Write the code of all of SOURCES below target, with imports that start at the repository's root."""
    toolbox = _toolbox()
    environment = os.environ | {"PYTHONPATH": str(toolbox)}
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"-I{toolbox / 'grpc_tools' / '_proto'}"]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{target}" for kind in PLUGINS]
    with tempfile.TemporaryDirectory() as folder:
        plugins = [f"--plugin=protoc-gen-{kind}={_plugin(Path(folder), kind)}" for kind in PLUGINS]
        subprocess.run([*command, *plugins, *outputs, *SOURCES], check=True, env=environment)
    for path in _generated(target):
        if path.stem.endswith("_pb2_grpc") and "Servicer_to_server" not in path.read_text():
            path.unlink()
            continue
        text = re.sub(r"^from forebay\.", "from protos.forebay.", path.read_text(), flags=re.MULTILINE)
        text = re.sub(r"^import forebay\.", "import protos.forebay.", text, flags=re.MULTILINE)
        text = re.sub(r"(?<![\w.\"'/])forebay\.v1\.(\w+_pb2)", r"protos.forebay.v1.\1", text)
        path.write_text(text)


def _plugin(folder: Path, kind: str) -> Path:
    """A program that runs a plugin with this interpreter. Those that pip puts into the toolbox name the interpreter of
    whoever filled it, which may be gone."""
    path = folder / kind
    run = f"from mypy_protobuf.main import {PLUGINS[kind]} as run; run()"
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{run}'\n")
    path.chmod(0o755)
    return path


def _generated(folder: Path) -> list[Path]:
    return sorted(path for pattern in GENERATED for path in folder.rglob(pattern))


def _differences(fresh: Path) -> list[str]:
    ours = {str(path.relative_to(ROOT)): path.read_bytes() for path in _generated(ROOT)}
    theirs = {str(path.relative_to(fresh)): path.read_bytes() for path in _generated(fresh)}
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _install(fresh: Path) -> None:
    for path in _generated(ROOT):
        path.unlink()
    for path in _generated(fresh):
        shutil.copyfile(path, ROOT / path.relative_to(fresh))


def _toolbox() -> Path:
    """The folder that holds the pinned generator, filled on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "forebay" / f"{GENERATOR}-py{sys.version_info.major}{sys.version_info.minor}"
    if not (folder / "complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([*pip, GENERATOR, "setuptools<81", *STUBS], check=True)
        (folder / "complete").touch()
    return folder


if __name__ == "__main__":
    sys.exit(main())
