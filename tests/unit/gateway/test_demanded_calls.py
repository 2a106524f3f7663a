"""Calls that a client demands: the grammar allows what the model's format is, and what this server reads as calls."""

from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from services.gateway.parsers import demanded
from services.gateway.parsers.api import Tools
from shared.grammar import Grammar, Kind, source
from tests.unit.gateway import glm
from tests.unit.gateway.test_tool_calls import OUTPUT, TOOLS, WEATHER, chat
from tests.unit.gateway.tiny_tokenizers import byte_level
from tests.unit.gateway.world import World

KNOWN: Tools = {
    "weather": {
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
        }
    },
    "stop": {},
}
CITY = "<arg_key>city</arg_key><arg_value>Köln < <b>\n</arg_value>"
DAYS, NO_DAYS = (f"<arg_key>days</arg_key><arg_value>{days}</arg_value>" for days in ("2", "two"))
UNIT, NO_UNIT = (f"<arg_key>unit</arg_key><arg_value>{unit}</arg_value>" for unit in ("F", "K"))
GLM = {
    f"weather{CITY}": True,
    f"weather{CITY}{DAYS}{UNIT}": True,
    f"weather{CITY}{UNIT}": True,
    "stop": True,
    f"weather{DAYS}": False,
    f"weather{CITY}{NO_DAYS}": False,
    f"weather{CITY}{NO_UNIT}": False,
    f"stop{CITY}": False,
    "go": False,
}
HERMES = {
    '{"name": "weather", "arguments": {"city": "Köln", "days": 2}}': True,
    '{"name": "stop", "arguments": {}}': True,
    '{"name": "weather", "arguments": {}}': False,
    '{"name": "go", "arguments": {}}': False,
    '{"arguments": {}, "name": "stop"}': False,
}
CASES = [("glm", call, fits) for call, fits in GLM.items()]
CASES += [("hermes", f"\n{call}\n", fits) for call, fits in HERMES.items()]


def allows(grammar: str, text: str, tokenizer: Tokenizer, path: Path) -> bool:
    """Whether a text, as the tokenizer has it, is all of what the grammar describes."""
    tokenizer.save(str(path / "tokenizer.json"))
    matcher = LLMatcher(LLTokenizer(str(path / "tokenizer.json")), source(Grammar(Kind.LARK, grammar)))
    assert not matcher.get_error()
    token_ids = tokenizer.encode(text).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.mark.parametrize("tokenizer", [glm.small_tokenizer, byte_level], ids=["tags are tokens", "tags are text"])
@pytest.mark.parametrize(("style", "call", "fits"), CASES, ids=[call.strip() for _, call, _ in CASES])
def test_a_call_is_allowed_if_a_tool_can_be_called_so(
    style: str, call: str, fits: bool, tokenizer: Any, tmp_path: Path
) -> None:
    made = tokenizer()
    added = {token.content: token_id for token_id, token in made.get_added_tokens_decoder().items()}
    grammar = demanded.grammar(style, KNOWN, added, single=False)
    text = f"<tool_call>{call}</tool_call>"
    assert allows(grammar, text, made, tmp_path) is fits
    assert allows(grammar, text * 2, made, tmp_path) is fits
    assert not allows(grammar, f"Well. {text}", made, tmp_path)
    single = demanded.grammar(style, KNOWN, added, single=True)
    assert not allows(single, text * 2, made, tmp_path)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
async def test_demanded_calls_are_a_grammar_behind_the_thoughts(choice: Any, glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    response = await glm_world.http.post("/v1/chat/completions", json=chat(tool_choice=choice))
    assert response.status_code == 200, response.text
    grammar = glm_world.decode.requests[-1].sampling.grammar
    tags = glm_world.tokenizer.added_tokens
    assert grammar.behind_token_id == tags["</think>"]
    assert grammar.lark == demanded.grammar("glm", {"weather": WEATHER}, tags, single=False)


async def test_one_call_if_one_is_wanted(glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    body = chat(tool_choice="required", parallel_tool_calls=False)
    assert (await glm_world.http.post("/v1/chat/completions", json=body)).status_code == 200
    assert glm_world.decode.requests[-1].sampling.grammar.lark.startswith("start: call\n")


async def test_a_tool_whose_schema_cannot_be_held_to(glm_world: World) -> None:
    broken = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "tons"}}}}
    body = chat(tools=[*TOOLS, {"type": "function", "function": broken}], tool_choice="required")
    response = await glm_world.http.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
