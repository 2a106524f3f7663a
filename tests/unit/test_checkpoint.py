import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.inventory import Inventory, revision, weight_files
from shared.errors import Unsupported

SHAPES = {"a": (2, 3), "b": (4,)}


def save(model_dir: Path, **tensors: torch.Tensor) -> None:
    (model_dir / "config.json").write_text("{}")
    save_file(tensors, model_dir / "model.safetensors")


def test_every_difference_is_named_in_one_fault(tmp_path: Path) -> None:
    save(tmp_path, a=torch.zeros(3, 2), c=torch.zeros(1))
    with pytest.raises(Unsupported) as caught:
        Inventory(tmp_path).check(SHAPES)
    for difference in ("missing b", "unexpected c", r"a is [3, 2], not [2, 3]"):
        assert difference in caught.value.message


def test_tensors_that_are_computed_anyway_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, a=torch.zeros(2, 3), b=torch.zeros(4), **{"layers.0.rotary_emb.inv_freq": torch.zeros(2)})
    Inventory(tmp_path).check(SHAPES)


def test_tensors_are_read_in_the_wanted_dtype(tmp_path: Path) -> None:
    save(tmp_path, a=torch.tensor([0.1]))
    assert Checkpoint(tmp_path, torch.bfloat16).read("a").dtype == torch.bfloat16


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(Unsupported, match=r"lacks weight files: model-2\.safetensors"):
        weight_files(tmp_path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(Unsupported, match="cannot be read as safetensors"):
        Checkpoint(tmp_path, torch.float32)


def test_copies_share_a_revision_and_other_weights_do_not(tmp_path: Path) -> None:
    revisions = []
    for name, value in (("one", 0.0), ("copy", 0.0), ("other", 1.0)):
        (tmp_path / name).mkdir()
        save(tmp_path / name, a=torch.full((200, 200), value))
        revisions.append(revision(tmp_path / name))
    assert revisions[0] == revisions[1] != revisions[2]
