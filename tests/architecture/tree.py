"""What the architecture tests look at: our own files, without generated code."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("services", "shared", "cli")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function and its length in lines, from `def` to its end, without the docstring."""

    where: str
    num_lines: int


def sources(*rooms: str) -> list[Path]:
    """Python files below these folders of the repository."""
    found = [path for room in rooms or ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted(path for path in found if "_pb2" not in path.name)


def name(path: Path) -> str:
    """As seen from the repository's root."""
    return str(path.relative_to(ROOT))


@cache
def parsed(path: Path) -> ast.Module:
    """Once for all tests."""
    return ast.parse(path.read_text())


def functions() -> Iterator[Function]:
    """Every function of every room."""
    for path in sources():
        yield from _functions(path)


@cache
def _functions(path: Path) -> tuple[Function, ...]:
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, FunctionNode)]
    return tuple(Function(f"{name(path)}:{node.lineno} {node.name}", _num_lines(node)) for node in nodes)


def _num_lines(node: FunctionNode) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return lines
    docstring = node.body[0]
    return lines - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)
