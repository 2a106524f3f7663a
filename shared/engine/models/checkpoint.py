"""Reading the weights of a Hugging Face directory: `model.safetensors`, or shards with their index.

A linear layer may be stored in a quantized format, told by the tensors that are there. Here it looks as if it were
plain: it has one tensor, NAME.weight, of its true shape, and reading that dequantizes it.
"""

import json
from collections.abc import Collection, Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.engine.parallel.partition import Part
from shared.engine.quantization import fp8_block, nvfp4
from shared.engine.quantization.formats import KNOWN, Format, detect, nvfp4_tensor
from shared.errors import Unsupported

# Scales of activations and of cached keys and values: of no use to kernels that compute in the weights' full dtype.
RUN_TIME_SUFFIXES = ("input_scale", "input_global_scale", "k_scale", "v_scale")
# Facts of old exporters that are computed from the configuration instead.
COMPUTED_SUFFIXES = ("rotary_emb.inv_freq",)
SAMPLE_BYTES = 4096
NUM_SAMPLES = 16


class Checkpoint:
    """The tensors of a model directory, read on demand onto a device (the CPU)."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.dtype, self._device = dtype, device
        self.files = weight_files(model_dir)
        self._at = {name: opened for opened in map(_open, self.files) for name in opened.keys()}  # noqa: SIM118
        self._quantized = _quantized(self._at)

    def _names(self) -> set[str]:
        """Names as if nothing were quantized."""
        parts = {f"{linear}.{suffix}" for linear in self._quantized for suffix in (*KNOWN, *RUN_TIME_SUFFIXES)}
        return {name for name in self._at if name not in parts} | {f"{linear}.weight" for linear in self._quantized}

    def _shape(self, name: str) -> tuple[int, ...]:
        linear = name.removesuffix(".weight")
        stored = self._quantized.get(linear, Format.PLAIN)
        first = name if stored is Format.PLAIN else f"{linear}.{stored.value[0]}"
        shape = tuple(self._at[first].get_slice(first).get_shape())
        packed = stored in (Format.NVFP4, Format.NVFP4_RECIPROCAL)
        return (*shape[:-1], shape[-1] * 2) if packed else shape

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()) -> None:
        """Compare names and shapes with what the model needs; one Unsupported names every difference."""
        names = self._names()
        faults = [f"missing {name}" for name in shapes if name not in names]
        for name in names:
            if name not in shapes and name not in ignored and not name.endswith(COMPUTED_SUFFIXES):
                faults.append(f"unexpected {name}")
        for name in shapes.keys() & names:
            if (found := self._shape(name)) != shapes[name]:
                faults.append(f"{name} is {list(found)}, not {list(shapes[name])}")
        if faults:
            raise Unsupported(f"the weights do not fit the configuration: {'; '.join(sorted(faults))}")

    def read(self, name: str, dtype: torch.dtype | None = None, part: Part | None = None) -> torch.Tensor:
        """A tensor, or a part of it, on the device and in the dtype of this checkpoint, or in another."""
        whole = self._read(name, dtype)
        read = whole if part is None else whole.narrow(part.dim, part.start, part.length).contiguous()
        return read.to(self._device)

    def _read(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        linear, wanted = name.removesuffix(".weight"), dtype or self.dtype
        stored = self._quantized.get(linear, Format.PLAIN)
        if stored is Format.PLAIN:
            return self._tensor(name).to(wanted)
        parts = [self._tensor(f"{linear}.{suffix}") for suffix in stored.value]
        try:
            if stored is Format.FP8_BLOCK:
                return fp8_block.dequantize(parts[0], parts[1], wanted)
            return nvfp4.dequantize(nvfp4_tensor(stored, parts[0], parts[1], parts[2]), wanted)
        except (ValueError, RuntimeError) as error:
            raise Unsupported(f"the scales of {linear} do not fit its weights: {error}") from None

    def _tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._at[name].get_tensor(name)
        return tensor


def _quantized(names: Collection[str]) -> dict[str, Format]:
    """The linear layers that are not plain. Raises Unsupported for one whose tensors make up no format."""
    suffixes = KNOWN - {"weight"}
    linears = {linear for name in names for linear, _, suffix in [name.rpartition(".")] if suffix in suffixes}
    return {linear: detect(linear, names) for linear in linears}


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
