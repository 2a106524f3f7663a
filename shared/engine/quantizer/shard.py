"""Writing one file of a quantized checkpoint, a few rows of one weight at a time."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from shared.engine.models.checkpoint import Checkpoint
from shared.engine.parallel.partition import Part
from shared.engine.quantization import nvfp4
from shared.engine.quantizer.plan import WIDTHS, Output, Shard, Task
from shared.errors import Unsupported

PARTIAL = ".partial"
# Rows read at a time: about so many bytes, in whole blocks of FP8.
PART_BYTES, BLOCK_ROWS = 64 << 20, 128
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Told how many bytes of the source were read and used; raises to end the work.
Note = Callable[[int], None]


def write(shard: Shard, source: Checkpoint, directory: Path, note: Note) -> None:
    """Write `shard` into `directory`: under another name until it is whole and on disk, so that a file of its own name
    is always complete. Raises Unsupported for weights that are not finite, OSError from the file system."""
    partial = directory / f".{shard.file}.{os.getpid()}{PARTIAL}"
    try:
        with partial.open("wb") as file:
            header, offsets = layout([output for task in shard.tasks for output in task.outputs])
            file.write(header)
            writer = _Writer(source, file, {name: len(header) + offset for name, offset in offsets.items()}, note)
            for task in shard.tasks:
                writer.write(task)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(directory / shard.file)
    finally:
        partial.unlink(missing_ok=True)


def layout(outputs: list[Output]) -> tuple[bytes, dict[str, int]]:
    """The header of a file and the place of each tensor behind it. Wide elements come first, so that each tensor is
    aligned to its own (readers view the bytes in place); the header is padded to 8 bytes for the same reason."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for output in sorted(outputs, key=lambda output: -WIDTHS[output.dtype]):
        offsets[output.name] = end
        end += output.num_bytes
        place = [offsets[output.name], end]
        fields[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": place}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


class _Writer:
    """Puts each task's tensors where the header says. The scale of a group is computed once for all its members."""

    def __init__(self, source: Checkpoint, file: BinaryIO, places: dict[str, int], note: Note) -> None:
        self._source, self._file, self._places, self._note = source, file, places, note
        self._scale: tuple[tuple[str, ...], torch.Tensor] | None = None

    def write(self, task: Task) -> None:
        """Copy or quantize one weight."""
        if not task.group and len(task.outputs) > 1:
            for output in task.outputs:
                self._append(output, self._source.as_stored(output.name))
        elif not task.group:
            for part in self._parts(task.name, task.shape):
                self._append(task.outputs[0], part)
        else:
            weight, scale, scale_2, *rest = task.outputs
            shared = self._shared_scale(task)
            for part in self._parts(task.name, task.shape):
                made = nvfp4.quantize(part, shared)
                self._append(weight, made.codes)
                self._append(scale, made.scale)
            self._append(scale_2, shared)
            for output in rest:
                self._append(output, torch.tensor(task.input_scale, dtype=torch.float32))
        self._note(task.source_bytes)

    def _shared_scale(self, task: Task) -> torch.Tensor:
        if self._scale is None or self._scale[0] != task.group:
            amax = [self._amax(name) for name in task.group]
            self._scale = task.group, nvfp4.scale_of(torch.stack(amax).amax())
        return self._scale[1]

    def _amax(self, name: str) -> torch.Tensor:
        """The largest magnitude of a weight, [] float32; NaN and infinity come through."""
        parts = self._parts(name, self._source.inventory.shape(name))
        found = torch.stack([nvfp4.amax(part) for part in parts]).amax()
        if not found.isfinite():
            raise Unsupported(f"{name} has an element that is {'NaN' if found.isnan() else 'infinite'}")
        return found

    def _parts(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """A weight as it is stored, or in bfloat16 if that is FP8, a few rows at a time."""
        stored = self._source.inventory.stored[self._source.inventory.parts(name)[0]].dtype
        for part in _rows(shape):
            yield self._source.read(name, DTYPES.get(stored, torch.bfloat16), part)

    def _append(self, output: Output, tensor: torch.Tensor) -> None:
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(self._places[output.name])
        self._file.write(data)
        self._places[output.name] += data.nbytes


def _rows(shape: tuple[int, ...]) -> Iterator[Part | None]:
    """The parts that a tensor is read in; None is all of it."""
    if len(shape) != 2:
        yield None
        return
    num_rows, num_columns = shape
    step = max(1, PART_BYTES // (2 * num_columns * BLOCK_ROWS)) * BLOCK_ROWS
    for start in range(0, num_rows, step):
        yield Part(0, start, min(step, num_rows - start))
