"""Parts of tensors: exactly what a cut of the whole gives, for no more memory than they need."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.engine.kernels import w8a16
from shared.engine.models import glm_config, glm_shapes, tiny
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.inventory import header
from shared.engine.parallel.partition import Part
from shared.errors import Unsupported
from tests.memory import MIB, only_where_it_is_told
from tests.oracle.quantized import METHODS

# As kv_a_proj: five blocks of rows, the last one half; columns in one block and a ragged one.
ROWS, COLUMNS = 576, 208
NUM_SHARDS, FILE_MIB = 6, 64
SLACK_MIB = 48  # what torch's first operations take, and the allocator keeps

# Prints the bytes that were kept, and those that were had at the peak.
LOAD_HALF = """
import sys
from pathlib import Path
import torch
from shared.engine.models import glm_config, glm_shapes, tiny
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.parallel.partition import Part
from tests.memory import Memory

checkpoint = Checkpoint(Path(sys.argv[1]), torch.float32)
memory = Memory("self")
names = sorted(checkpoint.inventory.stored)
kept = [checkpoint.read(name, part=Part(number % 2, 1024, 1024)) for number, name in enumerate(names)]
print(sum(part.nbytes for part in kept), memory.grown())
"""
# A rank's half of a model, and all that its layers keep.
LOAD_RANK = """
import gc, sys
from pathlib import Path
import torch
from shared.engine.models.api import Placement
from shared.engine.models.registry import load
from shared.engine.parallel.group import Alone
from shared.engine.parallel.partition import Shard
from tests.memory import Memory

placement = Placement(torch.float32, 1, shard=Shard(1, 2, "matrices"))
memory = Memory("self")
model = load(Path(sys.argv[1]), placement)
grown = memory.grown()
kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if torch.is_tensor(t)}
print(sum(kept.values()), grown)
"""
# One mixture layer of 192 MiB.
MIXTURE = {
    **tiny.GLM_52,
    **{"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "first_k_dense_replace": 0},
    **{"hidden_size": 256, "moe_intermediate_size": 512, "n_routed_experts": 128},
}


def measured(script: str, *arguments: str) -> tuple[int, int]:
    """What a process of its own printed: bytes kept, and at the peak."""
    command, root = [sys.executable, "-c", script, *arguments], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kept, peak = map(int, done.stdout.split())
    return kept, peak


def save(model_dir: Path, files: Sequence[dict[str, torch.Tensor]]) -> None:
    """Files and their index."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files):
        name = f"model-{number}.safetensors"
        save_file(tensors, model_dir / name)
        weight_map |= dict.fromkeys(tensors, name)
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize(
    "part",
    [Part(0, 0, 448), Part(0, 448, 128), Part(0, 100, 3), Part(1, 0, 208), Part(1, 112, 96), Part(1, 130, 14)],
    ids=str,
)
def test_a_part_is_a_cut_of_the_whole(method: str | None, part: Part, tmp_path: Path) -> None:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    stored = {"weight": weight} if method is None else METHODS[method](weight)[0]
    save_file({f"linear.{suffix}": tensor for suffix, tensor in stored.items()}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, torch.float32)
    found = checkpoint.read("linear.weight", part=part)
    assert torch.equal(found, checkpoint.read("linear.weight").narrow(part.dim, part.start, part.length))
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.nbytes


@only_where_it_is_told
@pytest.mark.parametrize(
    "part", [None, Part(0, 0, 448), Part(0, 144, 432), Part(0, 560, 16), Part(1, 128, 128), Part(1, 0, 256)], ids=str
)
def test_a_part_in_e4m3_is_what_dequantizing_it_gives(part: Part | None, tmp_path: Path) -> None:
    name = write_e4m3(tmp_path)
    kept = Checkpoint(tmp_path, torch.float32).fp8(name, part)
    assert kept is not None
    assert torch.equal(w8a16.unpack(kept), Checkpoint(tmp_path, torch.float32).read(name, part=part))


@pytest.mark.parametrize("part", [Part(0, 0, 100), Part(0, 8, 16), Part(1, 64, 128), Part(1, 0, 64)], ids=str)
def test_a_part_that_cuts_what_has_one_scale_is_not_kept_in_e4m3(part: Part, tmp_path: Path) -> None:
    name = write_e4m3(tmp_path)
    assert Checkpoint(tmp_path, torch.float32).fp8(name, part) is None


def test_blocks_whose_scales_do_not_fit_are_named(tmp_path: Path) -> None:
    name = write_e4m3(tmp_path, num_scales=4)
    with pytest.raises(Unsupported, match="the scales of linear do not fit"):
        Checkpoint(tmp_path, torch.float32).fp8(name)


def write_e4m3(model_dir: Path, num_scales: int = 5) -> str:
    """A matrix [576, 256] of which rows have so many scales; its name."""
    torch.manual_seed(0)
    parts, _ = METHODS["fp8"](torch.randn(ROWS, 256) * torch.exp2(torch.arange(ROWS) // 100)[:, None])
    parts["weight_scale_inv"] = parts["weight_scale_inv"][:num_scales].contiguous()
    save_file({f"linear.{suffix}": part for suffix, part in parts.items()}, model_dir / "model.safetensors")
    return "linear.weight"


def test_loading_half_of_every_tensor_takes_the_halves_and_less_than_one_file_besides(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    save(tmp_path, [{f"{n}.{name}": torch.full((2048, 2048), float(n)) for name in names} for n in range(NUM_SHARDS)])
    kept, peak = measured(LOAD_HALF, str(tmp_path))
    assert kept == NUM_SHARDS * FILE_MIB // 2 * MIB
    assert kept <= peak <= kept + (FILE_MIB + SLACK_MIB) * MIB


@only_where_it_is_told
def test_a_rank_of_a_mixture_takes_its_weights_and_less_than_one_file_besides(tmp_path: Path) -> None:
    """Its share of a layer's experts is more than a file holds: they are never there twice."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    shapes = sorted(glm_shapes.shapes(glm_config.parse(MIXTURE)).items())
    save(tmp_path, [{name: torch.ones(shape) for name, shape in shapes[n::8]} for n in range(8)])
    size = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    kept, peak = measured(LOAD_RANK, str(tmp_path))
    assert kept > 96 * MIB
    assert kept <= peak <= kept + size + SLACK_MIB // 2 * MIB


@pytest.mark.parametrize("num_bytes", [0, 7, 30, -5])
def test_a_file_that_was_cut_short_is_named(num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(Unsupported, match=r"model\.safetensors cannot be read"):
        header(path)
