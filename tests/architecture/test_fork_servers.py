"""What a fork server has imported: what it is for, and nothing that a fork would break."""

import json
import os
import subprocess
import sys

import pytest

from cli import plan
from cli.plan import ClusterOptions
from tests.architecture.tree import ROOT

SAYS = """
import json, os, sys
from cli import fork_server
is_ready = fork_server.prepare(json.loads(sys.argv[1]))
torch = sys.modules.get("torch")
found = {
    "is_ready": is_ready,
    "num_threads": len(os.listdir("/proc/self/task")),
    "num_files": len(os.listdir("/proc/self/fd")) - 1,
    "cuda": torch is not None and torch.cuda.is_initialized(),
    "modules": sorted(sys.modules),
}
print(json.dumps(found))
"""
# UCX would take two processes for one; to import the others looks for a GPU, after which no fork may use it.
NEVER = {"nixl_cu13", "torch.utils.cpp_extension", "flashinfer"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all processes are executed")
@pytest.mark.parametrize(
    ("engine", "name"), [("sim", plan.LIGHT), ("torch", plan.LIGHT), ("torch", plan.TORCH)], ids="-".join
)
def test_a_fork_server_has_one_thread_and_what_its_services_need(engine: str, name: str) -> None:
    preload = plan.preloads(ClusterOptions(model="m", engine=engine))[name]
    command = [sys.executable, "-c", SAYS, json.dumps(preload.modules)]
    environment = os.environ | preload.environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["is_ready"]
    assert found["num_threads"] == 1
    assert found["num_files"] == 3
    assert not found["cuda"]
    assert ("torch" in found["modules"]) == (name == plan.TORCH)
    assert not NEVER & set(found["modules"])
