"""Which tags a model writes, and the parser of one of its outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from services.gateway.parsers import glm_calls
from services.gateway.parsers.api import CallParser, Tools
from services.gateway.parsers.glm_calls import GlmCall
from services.gateway.parsers.json_calls import JsonCall
from services.gateway.parsers.message import MessageParser

ReasoningFormat = Literal["auto", "think", "none"]
ToolFormat = Literal["auto", "glm", "hermes", "none"]

THINK_TAGS = ("<think>", "</think>")
CALL_TAGS = ("<tool_call>", "</tool_call>")
_CALLS: Mapping[str, Callable[[Tools], CallParser]] = {"glm": GlmCall, "hermes": JsonCall}


@dataclass(frozen=True, slots=True)
class Formats:
    """How a model writes reasoning and tool calls."""

    reasoning: ReasoningFormat = "none"
    tools: ToolFormat = "none"


AUTO = Formats("auto", "auto")


def detect(templates: Sequence[str], wanted: Formats) -> Formats:
    """Replace "auto" by a look at the chat templates, which write past turns just as the model writes the next one."""
    text, reasoning, tools = "\n".join(templates), wanted.reasoning, wanted.tools
    if reasoning == "auto":
        reasoning = "think" if "</think>" in text else "none"
    if tools == "auto":
        tools = _detect_tools(text)
    return Formats(reasoning, tools)


def _detect_tools(template: str) -> ToolFormat:
    if "<tool_call>" not in template or "<function=" in template:  # Qwen3-Coder's XML has no parser here
        return "none"
    return "glm" if "<arg_key>" in template else "hermes"


@dataclass(frozen=True, slots=True)
class Parsing:
    """How to read the outputs of one request. `tools` is None where calls are not asked for."""

    formats: Formats = field(default_factory=Formats)
    thinks: bool = False
    tools: Tools | None = None
    single_call: bool = False

    @property
    def has_thoughts(self) -> bool:
        """Whether reasoning is told apart."""
        return self.formats.reasoning != "none"

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that mean something in this request."""
        tags: tuple[str, ...] = THINK_TAGS if self.has_thoughts else ()
        if self.tools is not None:
            tags += CALL_TAGS + (glm_calls.TAGS if self.formats.tools == "glm" else ())
        return tags

    def parser(self) -> MessageParser:
        """A parser of one output."""
        tools, new_call = self.tools, _CALLS.get(self.formats.tools)
        begin = None if tools is None or new_call is None else lambda: new_call(tools)
        return MessageParser(
            has_thoughts=self.has_thoughts, thinks=self.thinks, new_call=begin, single_call=self.single_call
        )


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt leaves the model within its reasoning."""
    return prompt.rstrip().endswith(THINK_TAGS[0])
