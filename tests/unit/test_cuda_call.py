"""Libraries of CUDA kernels, whichever of them it is, say why a launch was refused."""

import subprocess
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

from shared.engine.kernels import build, cuda_choice, cuda_experts, cuda_fp8, cuda_latent, cuda_products
from shared.engine.kernels.cuda_call import call

REFUSING = """extern "C" {
int forebay_refuse(void*) { return 701; }
const char* forebay_error(int error) { return error == 701 ? "too many resources requested" : "no error"; }
}"""
LOADERS = [each.load for each in (cuda_choice, cuda_experts, cuda_fp8, cuda_latent, cuda_products)]


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__module__.rpartition(".")[2])
def test_a_refused_launch_has_a_reason(load: Callable[[Path], CDLL], tmp_path: Path) -> None:
    gxx, source, path = build.compiler(), tmp_path / "refusing.cpp", tmp_path / "refusing.so"
    if gxx is None:
        pytest.skip("no g++ found")
    source.write_text(REFUSING)
    subprocess.run([gxx, "-shared", "-fPIC", source, "-o", path], check=True, timeout=60)
    with pytest.raises(RuntimeError, match="forebay_refuse: too many resources requested"):
        call(load(path), "forebay_refuse", torch.device("cpu"))
