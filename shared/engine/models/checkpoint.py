"""Reading the weights of a Hugging Face directory: whole tensors or parts, dequantized where they are quantized.

A file is mapped only while tensors are read from it, and a part is copied: a process holds what it asked for, and while
it loads at most one file besides.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.engine.kernels import w8a16
from shared.engine.models.inventory import Inventory
from shared.engine.parallel.partition import Part
from shared.engine.quantization import fp8_block, nvfp4
from shared.engine.quantization.formats import PACKED, Format
from shared.engine.quantization.w4a4 import Calibrated
from shared.errors import Unsupported

# A scale stands for so many rows and columns of weights.
SPANS = {
    Format.FP8_BLOCK: (fp8_block.BLOCK, fp8_block.BLOCK),
    Format.NVFP4: (1, nvfp4.GROUP),
    Format.NVFP4_RECIPROCAL: (1, nvfp4.GROUP),
}
# Of a matrix' inputs; the latter is the reciprocal.
INPUT_SCALES = {Format.NVFP4: "input_scale", Format.NVFP4_RECIPROCAL: "input_global_scale"}


class Checkpoint:
    """The tensors of a model directory, read on demand onto a device (the CPU)."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self.dtype, self._device = dtype, device
        self.inventory = Inventory(model_dir)
        self._open: tuple[Path, safe_open] | None = None

    def has(self, prefix: str) -> bool:
        """Whether the name of any tensor begins so."""
        return any(name.startswith(prefix) for name in self.inventory.stored)

    def read(self, name: str, dtype: torch.dtype | None = None, part: Part | None = None) -> torch.Tensor:
        """A tensor, or a part of it, on the device and in the dtype of this checkpoint, or in another.

        A part may begin anywhere: what is read of quantized weights begins and ends with a scale, and is cut after it
        has been dequantized. Raises Unsupported for scales that do not fit.
        """
        stored, wanted = self.inventory.format(name), dtype or self.dtype
        if stored is Format.PLAIN:
            found = self._tensor(name, part)
            return found.to(self._device, wanted, copy=True, memory_format=torch.contiguous_format)
        try:
            return self._quantized(stored, name, part, wanted).to(self._device)
        except (ValueError, RuntimeError) as error:
            linear = name.removesuffix(".weight")
            raise Unsupported(f"the scales of {linear} do not fit its weights: {error}") from None

    def as_stored(self, name: str) -> torch.Tensor:
        """A tensor of the files as it is there, a view of its file: until another file is read from."""
        return self._tensor(name, None)

    def nvfp4(self, name: str, part: Part | None = None) -> nvfp4.Nvfp4Tensor | None:
        """A matrix on the device of this checkpoint as it is stored; None if that is in another format, or if a part
        cuts a group."""
        stored = self.inventory.format(name)
        if stored not in PACKED:
            return None
        if part is not None and part != _widened(part, SPANS[stored][part.dim], self.inventory.shape(name)[part.dim]):
            return None
        weight, scale, factor = self.inventory.parts(name)
        spans = (2, nvfp4.GROUP) if part is not None and part.dim == 1 else (1, 1)
        codes, scales = (
            self._tensor(each, _scaled(part, span)) for each, span in zip((weight, scale), spans, strict=True)
        )
        found = nvfp4.from_stored(stored, codes, scales, self._tensor(factor, None))
        codes, scales, scale_2 = (x.to(self._device, copy=True) for x in (found.codes, found.scale, found.scale_2))
        return nvfp4.Nvfp4Tensor(codes, scales, scale_2)

    def fp8(self, name: str, part: Part | None = None) -> w8a16.Weight | None:
        """A matrix on the device of this checkpoint as it is stored, in e4m3 with scales of blocks; None if that is in
        another format, or if a part cuts what has one scale. Raises Unsupported for scales that do not fit."""
        if self.inventory.format(name) is not Format.FP8_BLOCK:
            return None
        shape = list(self.inventory.shape(name))
        starts, outer = [0, 0], None
        if part is not None:
            starts[part.dim], shape[part.dim] = part.start, part.length
            outer = _widened(part, fp8_block.BLOCK, self.inventory.shape(name)[part.dim])
        if not w8a16.fits(*shape, *starts):
            return None
        weight, scale = self.inventory.parts(name)
        codes = self._tensor(weight, part).to(self._device, copy=True, memory_format=torch.contiguous_format)
        scales = self._tensor(scale, _scaled(outer, fp8_block.BLOCK)).to(self._device)
        try:
            return w8a16.of_blocks(codes, scales, starts[0])
        except ValueError as error:
            raise Unsupported(f"the scales of {name.removesuffix('.weight')} do not fit its weights: {error}") from None

    def has_input_scales(self) -> bool:
        """Whether any matrix in NVFP4 has a scale for what it is multiplied with."""
        return any(self._input_scale(f"{name.rpartition('.')[0]}.weight") == name for name in self.inventory.stored)

    def input_scale(self, name: str) -> torch.Tensor | None:
        """The scale of what a matrix in NVFP4 is multiplied with, float32 [] on the device; None where there is none:
        such a checkpoint is for activations that are not quantized."""
        scale = self._input_scale(name)
        if scale is None:
            return None
        found = self._tensor(scale, None).float().reshape(()).to(self._device, copy=True)
        return 1 / found if self.inventory.format(name) is Format.NVFP4_RECIPROCAL else found

    def _input_scale(self, name: str) -> str | None:
        suffix = INPUT_SCALES.get(self.inventory.format(name))
        scale = f"{name.removesuffix('.weight')}.{suffix}"
        return scale if scale in self.inventory.stored else None

    def calibrated(self, name: str, part: Part | None = None) -> Calibrated | None:
        """As `nvfp4`, with the scale of its inputs; None without."""
        weight, scale = self.nvfp4(name, part), self.input_scale(name)
        return None if weight is None or scale is None else Calibrated(weight, scale)

    def _quantized(self, stored: Format, name: str, part: Part | None, dtype: torch.dtype) -> torch.Tensor:
        weight, scale, *factor = self.inventory.parts(name)
        dim, span = 0 if part is None else part.dim, 1
        outer = None
        if part is not None:
            span = SPANS[stored][dim]
            outer = _widened(part, span, self.inventory.shape(name)[dim])
        per_byte = 2 if dim == 1 and stored is not Format.FP8_BLOCK else 1
        weights = self._tensor(weight, _scaled(outer, per_byte))
        scales = self._tensor(scale, _scaled(outer, span))
        if stored is Format.FP8_BLOCK:
            whole = fp8_block.dequantize(weights, scales, dtype)
        else:
            whole = nvfp4.dequantize(nvfp4.from_stored(stored, weights, scales, self._tensor(factor[0], None)), dtype)
        if part is None or outer is None or outer == part:
            return whole
        return whole.narrow(dim, part.start - outer.start, part.length).clone(memory_format=torch.contiguous_format)

    def _tensor(self, name: str, part: Part | None) -> torch.Tensor:
        """A stored tensor or a part of it, a view of its file."""
        opened = self._file(self.inventory.stored[name].file)
        if part is None:
            whole: torch.Tensor = opened.get_tensor(name)
            return whole
        indices = (slice(None),) * part.dim + (slice(part.start, part.start + part.length),)
        found: torch.Tensor = opened.get_slice(name)[indices]
        return found

    def _file(self, path: Path) -> safe_open:
        if self._open is None or self._open[0] != path:
            self._open = None  # unmapped before the next is mapped
            try:
                self._open = (path, safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise Unsupported(f"{path} cannot be read as safetensors: {error}") from None
        return self._open[1]


def _widened(part: Part, span: int, size: int) -> Part:
    """The smallest part around `part` of a dimension of `size` that begins and ends with a span."""
    start = part.start // span * span
    return Part(part.dim, start, min(size, -(-(part.start + part.length) // span) * span) - start)


def _scaled(part: Part | None, span: int) -> Part | None:
    """The same part, counted in spans, the last of which may be ragged."""
    if part is None:
        return None
    start = part.start // span
    return Part(part.dim, start, -(-(part.start + part.length) // span) - start)
