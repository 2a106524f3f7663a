"""Who may import whom, and what the protocol and its generated code must be."""

import re
import subprocess
import sys
from pathlib import Path

from tests.architecture.tree import ROOT

BIN = Path(sys.executable).parent


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rooms_import_each_other_only_as_the_design_says() -> None:
    _run(str(BIN / "lint-imports"), "--no-cache")


def test_the_committed_protocol_code_is_what_the_protocol_generates() -> None:
    _run(sys.executable, "-m", "protos.generate", "--check")


def test_the_protocol_keeps_to_bufs_standard_and_comments_everything() -> None:
    _run(str(BIN / "buf"), "lint")


def test_every_rpc_of_the_protocol_has_a_caller() -> None:
    rpcs = {
        (service, rpc)
        for path in (ROOT / "protos" / "forebay" / "v1").glob("*.proto")
        for service, body in re.findall(r"^service (\w+) \{(.*?)^\}", path.read_text(), re.DOTALL | re.MULTILINE)
        for rpc in re.findall(r"^  rpc (\w+)", body, re.MULTILINE)
        if service != "GatewayService"  # called by clients
    }
    sources = "\n".join(
        path.read_text() for room in ("services", "shared", "cli") for path in (ROOT / room).rglob("*.py")
    )
    assert {f"{service}.{rpc}" for service, rpc in rpcs if not re.search(rf'[."]{rpc}\b', sources)} == set()
