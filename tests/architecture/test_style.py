"""The parts of the house style that a machine can see."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from shared.config import ServiceConfig
from tests.architecture.tree import ROOT, functions, name, parsed, sources

VAGUE = re.compile(r"^(utils?|common|helpers?|misc)$")


def test_no_module_or_folder_has_a_name_that_means_anything() -> None:
    parts = {
        part
        for path in sources("services", "shared", "cli", "bench")
        for part in Path(name(path)).with_suffix("").parts
    }
    assert {part for part in parts if VAGUE.match(part)} == set()


def test_no_class_manages() -> None:
    classes = {
        f"{name(path)}: {node.name}"
        for path in sources("services", "shared", "cli", "bench")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and re.search(r"(Manager|Helper|Utils?)$", node.name)
    }
    assert classes == set()


def test_packages_re_export_nothing() -> None:
    packages = [path for path in sources("services", "shared", "cli", "bench", "protos") if path.name == "__init__.py"]
    exporting = {name(path) for path in packages if any(not isinstance(node, ast.Expr) for node in parsed(path).body)}
    assert exporting == set()


def test_no_wait_swallows_a_cancellation() -> None:
    """Python 3.11's `asyncio.wait_for` does if what it waits for comes in the same turn; `asyncio.timeout` does not."""
    waiting = {name(path) for path in sources("services", "shared", "cli") if "wait_for(" in path.read_text()}
    assert waiting == set()


def _configs() -> list[type[ServiceConfig]]:
    """Every configuration of a process, wherever it is."""
    found: dict[str, type[ServiceConfig]] = {}
    for path in sources("services", "shared"):
        if re.search(r"^class \w+\(\w+Config\):|^class ServiceConfig", path.read_text(), re.MULTILINE):
            module = importlib.import_module(name(path).removesuffix(".py").replace("/", "."))
            values = [value for value in vars(module).values() if isinstance(value, type)]
            found |= {value.__name__: value for value in values if issubclass(value, ServiceConfig)}
    return list(found.values())


@pytest.mark.parametrize("config", _configs(), ids=lambda config: config.__name__)
def test_every_setting_of_a_process_is_explained(config: type[ServiceConfig]) -> None:
    assert [field for field, info in config.model_fields.items() if not (info.description or "").endswith(".")] == []


def test_the_statistics_of_functions_are_of_many() -> None:
    assert len(list(functions())) > 100


def test_the_repository_names_no_path_of_the_machine_it_was_written_on() -> None:
    """Set-up uses what the user configured for pip, and nothing else."""
    text = re.compile(r"/root/|/home/\w+/|/opt/")
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", *(ROOT / "deploy").glob("*"), *sources()]
    assert {name(path) for path in files if path.is_file() and text.search(path.read_text())} == set()
