"""What an output may say: a JSON schema, a regular expression or a grammar, compiled by llguidance.

A gateway says whether one can be used, a worker holds the output to it (`shared.engine.grammars`).
"""

from dataclasses import dataclass
from enum import StrEnum

from llguidance import LLMatcher, grammar_from

from shared.errors import InvalidRequest

MAX_CHARS = 1 << 16
# Between the parts of JSON. Any amount would be JSON too, and a small model may write nothing else until its end.
WHITESPACE = r"[ \t\n\r]{1,40}"


class Kind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """`text` describes the whole output; or what follows the first `behind_token_id` in it, where thoughts end."""

    kind: Kind
    text: str
    behind_token_id: int | None = None


def source(grammar: Grammar) -> str:
    """The grammar as llguidance has it. Raises InvalidRequest for what is not even of its kind."""
    try:
        if grammar.kind is Kind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": WHITESPACE})
        return grammar_from("regex" if grammar.kind is Kind.REGEX else "grammar", grammar.text)
    except ValueError as error:
        raise InvalidRequest(f"the {grammar.kind} cannot be read: {error}") from error


def require_valid(grammar: Grammar) -> None:
    """Raises InvalidRequest for one that cannot be compiled; may take a second for one that is very long."""
    if len(grammar.text) > MAX_CHARS:
        raise InvalidRequest(f"the {grammar.kind} has {len(grammar.text)} characters; at most {MAX_CHARS} are read")
    is_error, found = LLMatcher.validate_grammar_with_warnings(source(grammar))
    if is_error:
        raise InvalidRequest(f"the {grammar.kind} cannot be used: {found[0]}")
