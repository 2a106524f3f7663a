"""A model's chat template: its own jinja program, in a sandbox, with what Hugging Face's templates may rely on."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2

from services.gateway.sandbox import Sandbox
from shared.errors import InvalidRequest, Unsupported


class ChatTemplate:
    """Renders conversations. Raises ValueError if the template is not a program.

    `templates` by name: "default", and perhaps "tool_use" for requests with tools. `special_tokens` are variables such
    as bos_token.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = Sandbox()
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._environment, self._special_tokens = environment, dict(special_tokens)
        self.sources = tuple(templates.values())
        try:
            self._templates = {name: environment.from_string(source) for name, source in templates.items()}
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is malformed: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises InvalidRequest if the template refuses the conversation."""
        variables = {"add_generation_prompt": True} | self._special_tokens | dict(arguments or {})
        template = self._choose(bool(tools))
        try:
            conversation = {"messages": messages, "tools": tools, "documents": None}
            return self._environment.render(template, variables | conversation)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the model's chat template refuses: {error.message}", param="messages") from None
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise InvalidRequest(f"the model's chat template fails: {problem}", param="messages") from None

    def _choose(self, with_tools: bool) -> jinja2.Template:
        names = (["tool_use"] if with_tools else []) + ["default"]
        for name in names:
            if name in self._templates:
                return self._templates[name]
        raise Unsupported(f"the model has no chat template named {' or '.join(names)}", param="messages")


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike jinja's own, without HTML escapes and with characters as they are."""
    allowed: dict[str, Any] = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now() -> datetime:
    return datetime.now().astimezone()


def _strftime_now(format_: str, now: Callable[[], datetime] = _now) -> str:
    return now().strftime(format_)
