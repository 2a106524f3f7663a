"""Reading the weights of a Hugging Face directory: `model.safetensors`, or shards with their index."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import Unsupported

# Facts of old exporters that are computed from the configuration instead.
COMPUTED_SUFFIXES = ("rotary_emb.inv_freq",)
SAMPLE_BYTES = 4096
NUM_SAMPLES = 16


class Checkpoint:
    """The tensors of a model directory, read on demand."""

    def __init__(self, model_dir: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.files = weight_files(model_dir)
        self._at = {name: opened for opened in map(_open, self.files) for name in opened.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Compare names and shapes with what the model needs; one Unsupported names every difference."""
        faults = [f"missing {name}" for name in shapes if name not in self._at]
        for name in self._at:
            if name not in shapes and name not in ignored and not name.endswith(COMPUTED_SUFFIXES):
                faults.append(f"unexpected {name}")
        for name in shapes.keys() & self._at.keys():
            found = tuple(self._at[name].get_slice(name).get_shape())  # type: ignore[no-untyped-call]
            if found != shapes[name]:
                faults.append(f"{name} is {list(found)}, not {list(shapes[name])}")
        if faults:
            raise Unsupported(f"the weights do not fit the configuration: {'; '.join(sorted(faults))}")

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor in the dtype of this checkpoint, or in another."""
        tensor: torch.Tensor = self._at[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor.to(dtype or self.dtype)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise Unsupported(f"{path} cannot be read as safetensors: {error}") from None


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model directory, in the order of their names. Raises Unsupported."""
    index = model_dir / "model.safetensors.index.json"
    if not index.exists():
        names = {"model.safetensors"}
    else:
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise Unsupported(f"{index} is not an index of weights: {error}") from None
    files = [model_dir / name for name in sorted(names)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise Unsupported(f"{model_dir} lacks weight files: {', '.join(missing)}")
    return files


def revision(model_dir: Path) -> str:
    """A hash that tells checkpoints apart without reading them whole: the configuration, and of each weight file its
    size and evenly spaced samples (the first holds the header with every name, dtype and shape)."""
    digest = blake2b(digest_size=16)
    digest.update((model_dir / "config.json").read_bytes())
    for path in weight_files(model_dir):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for sample in range(NUM_SAMPLES):
                file.seek(size * sample // NUM_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
