"""What a gateway reads from a model's directory: tokenizer, chat template, default sampling parameters."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.gateway.chat_template import ChatTemplate
from services.gateway.parsers.formats import AUTO, Formats, detect
from services.gateway.tokenizer import Tokenizer

# Sampling parameters that generation_config.json may set, as vLLM reads it.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextModel:
    """`tokenizer` and `chat_template` are None where the directory has none: the model is served by token ids then."""

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    defaults: Mapping[str, float]
    formats: Formats = field(default_factory=Formats)


def load(directory: Path | None, formats: Formats = AUTO) -> TextModel:
    """Read a model directory; None or an absent one gives a model without text. Raises ValueError if it is broken.

    `formats` says how the model writes reasoning and tool calls, or to find it out.
    """
    if directory is None or not directory.is_dir():
        return TextModel(None, None, {})
    tokenizer_json, config = directory / "tokenizer.json", _read(directory / "tokenizer_config.json")
    template = _chat_template(directory, config)
    return TextModel(
        Tokenizer(tokenizer_json) if tokenizer_json.is_file() else None,
        template,
        _defaults(_read(directory / "generation_config.json")),
        detect(template.sources if template else (), formats),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found if isinstance(found, dict) else {}


def _defaults(config: Mapping[str, Any]) -> dict[str, float]:
    found = {name: config.get(name) for name in _DEFAULTS}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _chat_template(directory: Path, config: dict[str, Any]) -> ChatTemplate | None:
    path = directory / "chat_template.jinja"
    template: Any = path.read_text(encoding="utf-8") if path.is_file() else None
    template = template or config.get("chat_template") or _read(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # named templates
        templates = {str(entry["name"]): str(entry["template"]) for entry in template}
    elif isinstance(template, str):
        templates = {"default": template}
    else:
        return None
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates.setdefault(extra.stem, extra.read_text(encoding="utf-8"))
    return ChatTemplate(templates, _special_tokens(_read(directory / "special_tokens_map.json") | config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens are strings, or objects that describe an added token."""
    raw = {name: config.get(name) for name in _SPECIAL_TOKENS}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in raw.items()}
    return {name: value for name, value in contents.items() if isinstance(value, str)}
