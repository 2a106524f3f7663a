"""Parts of tensors: exactly what a cut of the whole gives, for no more memory than they need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.inventory import header
from shared.engine.parallel.partition import Part
from shared.errors import Unsupported
from tests.oracle.quantized import METHODS

# As kv_a_proj: five blocks of rows, the last one half; columns in one block and a ragged one.
ROWS, COLUMNS = 576, 208
NUM_SHARDS, MIB = 6, 1 << 20
SLACK_MIB = 48  # what torch's first operations take, and the allocator keeps

# Prints the bytes by which the peak and the end differ from the begin.
LOAD_HALF = """
import sys
from pathlib import Path
import torch
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.parallel.partition import Part

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) << 10

checkpoint = Checkpoint(Path(sys.argv[1]), torch.float32)
open("/proc/self/clear_refs", "w").write("5")
begin = status("VmRSS")
names = sorted(checkpoint.inventory.stored)
kept = [checkpoint.read(name, part=Part(number % 2, 1024, 1024)) for number, name in enumerate(names)]
print(sum(part.nbytes for part in kept), status("VmHWM") - begin)
"""


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


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_loading_half_of_every_tensor_takes_the_halves_and_less_than_one_file_besides(tmp_path: Path) -> None:
    weight_map: dict[str, str] = {}
    for shard in range(NUM_SHARDS):
        tensors = {f"{shard}.{name}": torch.full((2048, 2048), float(shard)) for name in ("a", "b", "c", "d")}
        file = f"model-{shard}.safetensors"
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", LOAD_HALF, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kept, peak = map(int, done.stdout.split())
    assert kept == NUM_SHARDS * 32 * MIB
    assert kept <= peak <= kept + 64 * MIB + SLACK_MIB * MIB


@pytest.mark.parametrize("num_bytes", [0, 7, 30, -5])
def test_a_file_that_was_cut_short_is_named(num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(Unsupported, match=r"model\.safetensors cannot be read"):
        header(path)
