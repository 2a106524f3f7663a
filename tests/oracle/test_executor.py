import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.engine.executor import TorchExecutor, load_executor
from shared.engine.kernels import build
from shared.errors import Unsupported
from tests.oracle import driver, tiny_models

SETTINGS: dict[str, Any] = {
    "model_name": "tiny",
    "dtype": "float32",
    "page_size": 16,
    "num_threads": 1,
    "num_pages": 8,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_models.write("llama", path)
    return path


def load(model_dir: Path, **changes: Any) -> TorchExecutor:
    return load_executor(model_dir, **(SETTINGS | changes))


def test_the_spec_tells_what_is_served(model_dir: Path) -> None:
    spec = load(model_dir, max_model_len=100).spec
    assert (spec.model, spec.vocab_size, spec.max_model_len, spec.eos_token_ids) == ("tiny", 211, 100, (2,))
    (state,) = spec.layout.state_classes
    assert (state.name, state.num_layers, state.dtype) == ("kv", 3, "float32")
    assert state.size_bytes == 3 * 2 * 2 * 16 * 32 * 4


def test_a_pool_may_be_given_in_bytes(model_dir: Path) -> None:
    page_bytes = load(model_dir).spec.layout.page_bytes
    assert load(model_dir, num_pages=0, pool_bytes=5 * page_bytes + 1).spec.num_pages == 5


def test_the_context_is_never_longer_than_the_model_allows(model_dir: Path) -> None:
    assert load(model_dir, max_model_len=100_000).spec.max_model_len == 512


LOADING = """
import pathlib, sys
from tests.oracle import driver
driver.load(pathlib.Path(sys.argv[1]), kernels=sys.argv[2])
"""


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_loading_shows_a_bar_on_a_terminal(kernels: str, model_dir: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command, root = [sys.executable, "-c", LOADING, str(model_dir), kernels], Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stderr=theirs)
    os.close(theirs)
    said = b""
    with suppress(OSError):  # how a terminal says that nobody holds its other end
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    assert process.wait(60) == 0
    assert b"loading: 100%" in said
    assert b"3/3" in said


def test_only_pages_of_one_dtype_and_page_size_are_compatible(model_dir: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"page_size": 32}]
    hashes = [load(model_dir, **change).spec.compatibility_hash for change in changes]
    assert len(set(hashes)) == 3
    assert load(model_dir, num_pages=3).spec.compatibility_hash == hashes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"num_pages": 0, "pool_bytes": 100}, "holds no page"),
        ({"kernels": "magic"}, "no kernels 'magic'"),
    ],
)
def test_what_cannot_be_set_up_is_refused(change: dict[str, Any], message: str, model_dir: Path) -> None:
    with pytest.raises(Unsupported, match=message):
        load(model_dir, **change)


def test_an_architecture_nobody_builds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(Unsupported, match="'MambaForCausalLM' is not supported"):
        load(tmp_path)


def test_a_part_that_is_not_the_last_chooses_no_token(model_dir: Path) -> None:
    executor = load(model_dir)
    run = driver.Run([5, 6, 7], iter(range(8)), chunk=2)
    assert executor.forward([run.item()]) == [None]


def test_forward_computes_with_its_own_number_of_threads(model_dir: Path) -> None:
    driver.generate(load(model_dir, num_threads=2, kernels="torch"), [5, 6, 7], 1)
    assert torch.get_num_threads() == 2
    driver.generate(load(model_dir, num_threads=1, kernels="torch"), [5, 6, 7], 1)
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(build.compiler() is None, reason="needs g++")
def test_torch_has_one_thread_beside_kernels_with_their_own(model_dir: Path) -> None:
    driver.generate(load(model_dir, num_threads=2, kernels="native"), [5, 6, 7], 1)
    assert torch.get_num_threads() == 1
