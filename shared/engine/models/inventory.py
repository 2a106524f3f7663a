"""What tensors a Hugging Face directory holds, read from the headers of its safetensors files alone.

A file begins with the length of its header, 8 bytes little-endian, and the header: JSON that maps a tensor's name to
its dtype, shape and place (https://github.com/huggingface/safetensors, "Format").

A linear layer may be stored in a quantized format, told by the tensors that are there. Here it looks as if it were
plain: it has one tensor, NAME.weight, of its true shape.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from shared.engine.quantization.formats import KNOWN, PACKED, Format, detect
from shared.errors import Unsupported

# Scales of activations and of cached keys and values: of no use to kernels that compute in the weights' full dtype.
RUN_TIME_SUFFIXES = ("input_scale", "input_global_scale", "k_scale", "v_scale")
# Facts of old exporters that are computed from the configuration instead.
COMPUTED_SUFFIXES = ("rotary_emb.inv_freq",)
HEADER_MAX_BYTES = 100_000_000  # what safetensors itself allows
SAMPLE_BYTES = 4096
NUM_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file. `dtype` is safetensors' name for it ("BF16")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class Inventory:
    """The tensors of a model directory by name."""

    def __init__(self, model_dir: Path) -> None:
        self.files = weight_files(model_dir)
        self.stored = {name: stored for file in self.files for name, stored in header(file).items()}
        self._quantized = _quantized(self.stored)

    def format(self, name: str) -> Format:
        """How the weights called `name` are stored."""
        return self._quantized.get(name.removesuffix(".weight"), Format.PLAIN)

    def parts(self, name: str) -> list[str]:
        """The names of the stored tensors that `name` is made of, in the order of its format's suffixes."""
        stored, linear = self.format(name), name.removesuffix(".weight")
        return [name] if stored is Format.PLAIN else [f"{linear}.{suffix}" for suffix in stored.value]

    def names(self) -> set[str]:
        """Names as if nothing were quantized."""
        parts = {f"{linear}.{suffix}" for linear in self._quantized for suffix in (*KNOWN, *RUN_TIME_SUFFIXES)}
        return {name for name in self.stored if name not in parts} | {f"{linear}.weight" for linear in self._quantized}

    def shape(self, name: str) -> tuple[int, ...]:
        """The true shape of a tensor."""
        shape = self.stored[self.parts(name)[0]].shape
        return (*shape[:-1], shape[-1] * 2) if self.format(name) in PACKED else shape

    def num_bytes(self, name: str) -> int:
        """Bytes that a tensor takes in its files, with its scales."""
        return sum(self.stored[part].num_bytes for part in self.parts(name))

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Compare names and shapes with what the model needs; one Unsupported names every difference."""
        names, unneeded = self.names(), {*shapes, *ignored}
        faults = [f"missing {name}" for name in shapes if name not in names]
        faults += [
            f"unexpected {name}" for name in names if name not in unneeded and not name.endswith(COMPUTED_SUFFIXES)
        ]
        for name in shapes.keys() & names:
            if (found := self.shape(name)) != shapes[name]:
                faults.append(f"{name} is {list(found)}, not {list(shapes[name])}")
        if faults:
            raise Unsupported(f"the weights do not fit the configuration: {'; '.join(sorted(faults))}")


def header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises Unsupported for a file that is broken or cut short."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_MAX_BYTES, path.stat().st_size - 8):
                raise ValueError("its header does not fit in it")
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        room = path.stat().st_size - 8 - length
        return {name: _stored(path, entry, room) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unsupported(f"{path} cannot be read as safetensors: {error}") from None


def _stored(path: Path, entry: Mapping[str, Any], room: int) -> Stored:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= room:
        raise ValueError("a tensor is not all in it; was it cut short?")
    return Stored(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), end - start)


def _quantized(names: Collection[str]) -> dict[str, Format]:
    """The linear layers that are not plain. Raises Unsupported for one whose tensors make up no format."""
    suffixes = KNOWN - {"weight"}
    linears = {linear for name in names for linear, _, suffix in [name.rpartition(".")] if suffix in suffixes}
    return {linear: detect(linear, names) for linear in linears}


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
