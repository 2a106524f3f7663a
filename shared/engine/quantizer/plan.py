"""What a quantized checkpoint will hold, tensor by tensor and file by file, before any weight is read.

The plan follows from the source's headers and the options alone, so a run that goes on where another was killed writes
the same bytes.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from shared.engine.models.inventory import Inventory
from shared.engine.quantization.formats import Format
from shared.engine.quantization.nvfp4 import GROUP
from shared.errors import Unsupported

# safetensors' names for dtypes, and bytes an element.
WIDTHS: Mapping[str, int] = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1}
DEQUANTIZED = "BF16"  # of a source in FP8, what is not quantized again


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return prod(self.shape) * WIDTHS[self.dtype]


@dataclass(frozen=True, slots=True)
class Task:
    """One weight of the source: copied, in as many tensors as it is stored in or in one, or quantized with the scale
    that it shares with `group` (itself included).

    `input_scale` is that of its activations, if it is known. `source_bytes` is what reading it once takes.
    """

    name: str
    shape: tuple[int, ...]
    source_bytes: int
    outputs: tuple[Output, ...]
    group: tuple[str, ...] = ()
    input_scale: float | None = None

    @property
    def num_bytes(self) -> int:
        """In the files to write."""
        return sum(output.num_bytes for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to write."""

    file: str
    tasks: tuple[Task, ...]

    @property
    def source_bytes(self) -> int:
        """What reading its weights once takes."""
        return sum(task.source_bytes for task in self.tasks)

    @property
    def num_bytes(self) -> int:
        """Of its tensors, the header apart."""
        return sum(task.num_bytes for task in self.tasks)


def make(
    source: Inventory,
    groups: Mapping[str, tuple[str, ...]],
    input_scales: Mapping[str, float],
    shard_bytes: int,
    kept: Collection[str] = (),
) -> tuple[Shard, ...]:
    """The files of at most `shard_bytes` (more only for one group of weights that is larger), in order.

    `groups` has the weights to quantize, `input_scales` is by the same names and may be empty; `kept` are weights in
    FP8 that stay so. Raises Unsupported for a tensor of a dtype that is not known here.
    """
    bundles: list[list[Task]] = [[]]
    room = shard_bytes
    for members in _in_order(source, groups):
        tasks = [
            _copied(source, name) if name in kept else _task(source, name, groups.get(name, ()), input_scales.get(name))
            for name in members
        ]
        size = sum(task.num_bytes for task in tasks)
        if size > room and bundles[-1]:
            bundles.append([])
            room = shard_bytes
        bundles[-1] += tasks
        room -= size
    count = len(bundles)
    return tuple(
        Shard(f"model-{number:05}-of-{count:05}.safetensors", tuple(tasks)) for number, tasks in enumerate(bundles, 1)
    )


def _in_order(source: Inventory, groups: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """All weights in the order of the source's files; those of a group together, where the first of them stands."""
    seen: set[str] = set()
    for name in sorted(source.names(), key=lambda name: (source.stored[source.parts(name)[0]].file, name)):
        if name not in seen:
            members = groups.get(name, (name,))
            seen.update(members)
            yield members


def _task(source: Inventory, name: str, group: tuple[str, ...], input_scale: float | None) -> Task:
    shape, stored = source.shape(name), source.stored[source.parts(name)[0]]
    if group:
        outputs = _quantized(name.removesuffix(".weight"), shape, with_input=input_scale is not None)
    else:
        dtype = stored.dtype if source.format(name) is Format.PLAIN else DEQUANTIZED
        if dtype not in WIDTHS:
            raise Unsupported(f"{name} is stored as {dtype}; known are {', '.join(WIDTHS)}")
        outputs = (Output(name, dtype, shape),)
    return Task(name, shape, source.num_bytes(name), outputs, group, input_scale)


def _copied(source: Inventory, name: str) -> Task:
    """Weights and scales as they are."""
    parts = {part: source.stored[part] for part in source.parts(name)}
    unknown = [stored.dtype for stored in parts.values() if stored.dtype not in WIDTHS]
    if unknown:
        raise Unsupported(f"{name} has parts stored as {', '.join(unknown)}; known are {', '.join(WIDTHS)}")
    outputs = tuple(Output(part, stored.dtype, stored.shape) for part, stored in parts.items())
    return Task(name, source.shape(name), source.num_bytes(name), outputs)


def _quantized(linear: str, shape: tuple[int, ...], *, with_input: bool) -> tuple[Output, ...]:
    rows, columns = shape
    outputs = (
        Output(f"{linear}.weight", "U8", (rows, columns // 2)),
        Output(f"{linear}.weight_scale", "F8_E4M3", (rows, columns // GROUP)),
        Output(f"{linear}.weight_scale_2", "F32", ()),
    )
    return (*outputs, Output(f"{linear}.input_scale", "F32", ())) if with_input else outputs
