"""Quantizing a checkpoint into a new directory, shard by shard.

    DST/.forebay-quantize.json     while it runs: of what source, with which options, with which scales of activations
    DST/.model-….PID.partial       a shard that is being written
    DST/model-00001-of-….          a shard that is whole
    DST/config.json                comes last: before it the directory is no model

Killed anywhere, the next run of the same command takes the whole shards over and ends with the same bytes.
"""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

from shared.engine.models import tensor_list
from shared.engine.models.config import read_json
from shared.engine.models.inventory import Inventory, revision
from shared.engine.models.tensor_list import ModelTensors
from shared.engine.quantizer import choice, description, plan
from shared.engine.quantizer.choice import Modules
from shared.engine.quantizer.crew import Progress, write_all
from shared.engine.quantizer.plan import Shard
from shared.engine.quantizer.shard import PARTIAL
from shared.errors import InvalidRequest, Unsupported

NOTES = ".forebay-quantize.json"
LOCK = ".forebay-quantize.lock"
INDEX = "model.safetensors.index.json"
# Written anew, or weights in another form.
NOT_COPIED = {"config.json", "hf_quant_config.json", INDEX}
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
SPARE_BYTES = 64 << 20  # headers, the index, what is copied

# By the names of the weights to quantize, the scales of their inputs; whoever calibrates may take long.
Calibrate = Callable[[list[str]], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes. `prompts` names the prompts of calibration by their hash. With `keep_fp8` layers of the
    source in FP8 that are not chosen stay as they are; else they become bfloat16."""

    modules: Modules | None = None
    shard_bytes: int = 5 * 10**9
    prompts: str | None = None
    keep_fp8: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What was done; `num_kept` shards were there from an earlier run."""

    num_quantized: int
    num_shards: int
    num_kept: int
    num_bytes: int
    source_bytes: int


def run(
    source: Path,
    directory: Path,
    options: Options,
    *,
    progress: Progress,
    num_processes: int = 1,
    calibrate: Calibrate | None = None,
) -> Result:
    """Quantize `source` into `directory`, which is made.

    Raises Unsupported for what cannot be quantized, InvalidRequest for a directory that holds something else, is being
    written or has no room, and for options that do not fit the model.
    """
    model = tensor_list.read(source)
    if not model.from_headers:
        raise Unsupported(f"{source} holds no weights")
    modules = options.modules or choice.default(model)
    options, names = replace(options, modules=modules), choice.chosen(model, modules)
    if options.keep_fp8:
        choice.kept(model, set(names))  # that there are any, before anything is written
    lock = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=0):
            try:
                scales = _take_up(source, directory, options, lambda: dict(calibrate(names)) if calibrate else {})
                return _fill(source, directory, options, model, names, scales, progress, num_processes)
            finally:
                lock.unlink(missing_ok=True)
    except filelock.Timeout:
        raise InvalidRequest(f"another process is quantizing into {directory}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InvalidRequest(f"the disk of {directory} is full; with room, the same command goes on") from None
        raise InvalidRequest(f"{error.filename or directory}: {error.strerror}") from None


def _take_up(
    source: Path, directory: Path, options: Options, calibrate: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """The scales of activations: an earlier run's if this goes on with it, else new ones, noted for the next run."""
    notes, about = directory / NOTES, _about(source, options)
    if notes.exists():
        found = read_json(notes)
        if found.get("about") != about:
            differing = [key for key in about if found.get("about", {}).get(key) != about[key]]
            raise InvalidRequest(f"{directory} holds an unfinished run of another {' and '.join(differing)}")
        return dict(found["input_scales"])
    others = [path.name for path in directory.iterdir() if path.name != LOCK and path.suffix != PARTIAL]
    if others:
        raise InvalidRequest(f"{directory} is not empty: it holds {', '.join(sorted(others)[:3])}")
    scales = calibrate()
    _write_json(notes, {"about": about, "input_scales": scales})
    return scales


def _about(source: Path, options: Options) -> dict[str, Any]:
    return {
        "source": revision(source),
        "modules": str(options.modules),
        "shard size": options.shard_bytes,
        "calibration": options.prompts,
        "choice to keep FP8": options.keep_fp8,
    }


def _fill(
    source: Path,
    directory: Path,
    options: Options,
    model: ModelTensors,
    names: list[str],
    scales: Mapping[str, float],
    progress: Progress,
    num_processes: int,
) -> Result:
    for leftover in directory.glob(f".*{PARTIAL}"):  # of a process that was killed
        leftover.unlink()
    kept = choice.kept(model, set(names)) if options.keep_fp8 else []
    shards = plan.make(Inventory(source), choice.joined(names), scales, options.shard_bytes, set(kept))
    missing = [shard for shard in shards if not (directory / shard.file).exists()]
    _require_room(directory, missing)
    write_all(missing, source, directory, num_processes, progress)
    ignored = choice.left_alone(model, {*names, *kept})
    _write_json(directory / INDEX, _index(shards))
    _copy_others(source, directory)
    told = description.Description(tuple(ignored), bool(scales), version("forebay"), tuple(names), tuple(kept))
    _write_json(directory / "hf_quant_config.json", told.hf_quant_config())
    _write_json(directory / "config.json", told.config(read_json(source / "config.json")))
    (directory / NOTES).unlink()
    num_bytes, source_bytes = (sum(each) for each in zip(*((s.num_bytes, s.source_bytes) for s in shards), strict=True))
    return Result(len(names), len(shards), len(shards) - len(missing), num_bytes, source_bytes)


def _require_room(directory: Path, shards: list[Shard]) -> None:
    needed, free = sum(shard.num_bytes for shard in shards) + SPARE_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise InvalidRequest(f"{directory} needs {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free there")


def _index(shards: tuple[Shard, ...]) -> dict[str, Any]:
    places = {output.name: shard.file for shard in shards for task in shard.tasks for output in task.outputs}
    total = sum(shard.num_bytes for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _copy_others(source: Path, directory: Path) -> None:
    """Tokenizer, chat template, generation configuration: whatever lies beside the weights."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in NOT_COPIED and not path.name.startswith("."):
            shutil.copyfile(path, directory / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
