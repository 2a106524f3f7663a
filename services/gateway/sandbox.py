"""Jinja for programs that come with a model: nothing can be reached or changed, and every rendering ends in time.

Loops and calls look at the clock, so no conversation can keep a template busy for ever. A single expression can still
use much memory: a checkpoint's template is the operator's choice, its conversations are not.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 10.0
MAX_CHARS = 64 << 20
MAX_REPEATED_CHARS = 10_000
# Variable of a rendering: when it must have ended. Conversations cannot name it.
DEADLINE = "deadline of this rendering"


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (the attribute of the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment as Hugging Face's templates expect it."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters[_in_time.__name__] = _in_time

    def render(self, template: jinja2.Template, variables: dict[str, Any], max_seconds: float = MAX_SECONDS) -> str:
        """The text. Raises jinja2.TemplateError, also if it takes or gets too long, and what expressions raise."""
        pieces, num_chars = [], 0
        for piece in template.generate(variables | {DEADLINE: time.monotonic() + max_seconds}):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_CHARS:
                raise SecurityError(f"the prompt would exceed {MAX_CHARS} characters")
        return "".join(pieces)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or macro, in time."""
        _check(context)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply, but build nothing huge."""
        numbers = [operand for operand in (left, right) if isinstance(operand, int | float)]
        if operator == "**" or not numbers:
            raise SecurityError(f"{operator} is not available here")
        if len(numbers) == 1:
            repeated = right if left is numbers[0] else left
            if len(repeated) * numbers[0] > MAX_REPEATED_CHARS:
                raise SecurityError("the repeated text is too long")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _in_time.__name__, [], [], None, None, lineno=loop.lineno)
        return template.set_environment(self)  # type: ignore[return-value]


@pass_context
def _in_time(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check(context)
        yield item


def _check(context: Context) -> None:
    deadline = context.get(DEADLINE)
    if deadline is not None and time.monotonic() > deadline:
        raise SecurityError("rendering takes too long")
