"""Prompts of GLM-5.2, down to its token ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.gateway import messages, text_model
from services.gateway.chat_template import ChatTemplate
from services.gateway.fields import Fields
from services.gateway.parsers.formats import AUTO, Formats, detect, opens_thought
from tests.unit.gateway import glm
from tests.unit.gateway.tiny_tokenizers import write_model
from tests.unit.gateway.world import World

HI = {"role": "user", "content": "Hi"}
WEATHER = {"name": "weather", "description": "é", "parameters": {"type": "object"}}


def prompt(*conversation: dict[str, Any], tools: list[Any] | None = None, **arguments: Any) -> str:
    read = messages.read(Fields({"messages": list(conversation)}))
    return ChatTemplate({"default": glm.TEMPLATE}, {}).render(read, tools, arguments)


async def test_the_ids_of_a_prompt_without_thinking_are_those_of_glm_5_2(tmp_path: Path) -> None:
    text = text_model.load(write_model(tmp_path, glm.tokenizer(), glm.TEMPLATE))
    assert text.tokenizer is not None
    ids = await text.tokenizer.encode(prompt(HI, enable_thinking=False), special=False)
    assert ids == [154822, 154824, 154827, 13041, 154828, 154841, 154842]
    tags = ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
    assert [text.tokenizer.added_tokens[tag] for tag in tags] == [154843, 154844, 154847, 154848, 154849, 154850]
    assert text.formats == Formats("think", "glm")


@pytest.mark.parametrize(
    ("fields", "line", "thinks"),
    [
        ({}, "Max", True),
        ({"reasoning_effort": "high"}, "High", True),
        ({"reasoning_effort": "low"}, "Max", True),
        ({"reasoning_effort": "none"}, None, False),
        ({"thinking": {"type": "disabled"}}, None, False),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "high"}, "High", True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None, False),
        ({"chat_template_kwargs": {"enable_thinking": True}, "thinking": {"type": "disabled"}}, "Max", True),
    ],
)
async def test_thinking_and_effort_reach_the_template(
    glm_world: World, fields: dict[str, Any], line: str | None, thinks: bool
) -> None:
    response = await glm_world.http.post("/v1/chat/completions", json={"messages": [HI], **fields})
    assert response.status_code == 200, response.text
    sent = glm_world.tokenizer.decode(list(glm_world.decode.requests[0].prompt_token_ids))
    effort = f"<|system|>Reasoning Effort: {line}" if line else ""
    assert sent == f"[gMASK]<sop>{effort}<|user|>Hi<|assistant|><think>{'' if thinks else '</think>'}"
    assert opens_thought(sent) is thinks


def test_a_turn_with_tools_is_written_as_the_model_writes_it() -> None:
    arguments = {"city": "Köln", "days": 2, "units": ["C"]}
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    assistant = {"role": "assistant", "content": None, "reasoning_content": "I ask.", "tool_calls": [call]}
    tool = {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "rain"}]}
    text = prompt(HI, assistant, tool, tool, enable_thinking=False)
    assert text == (
        "[gMASK]<sop><|user|>Hi<|assistant|><think>I ask.</think><tool_call>weather"
        "<arg_key>city</arg_key><arg_value>Köln</arg_value><arg_key>days</arg_key><arg_value>2</arg_value>"
        '<arg_key>units</arg_key><arg_value>["C"]</arg_value></tool_call>'
        "<|observation|><tool_response>rain</tool_response><tool_response>rain</tool_response>"
        "<|assistant|><think></think>"
    )


def test_tools_are_declared_as_json() -> None:
    text = prompt(HI, tools=[{"type": "function", "function": WEATHER}], enable_thinking=False)
    assert '<tools>\n{"name": "weather", "description": "é", "parameters": {"type": "object"}}\n</tools>\n\nFor' in text
    assert text.endswith("...</tool_call><|user|>Hi<|assistant|><think></think>")


def test_the_reasoning_of_earlier_turns_is_dropped_unless_it_is_to_be_kept() -> None:
    past = {"role": "assistant", "content": "Hello", "reasoning": "greet"}
    assert "<think></think>Hello" in prompt(HI, past, HI)
    assert "<think>greet</think>Hello" in prompt(HI, past, HI, clear_thinking=False)


def test_arguments_are_an_object_for_the_template_however_they_came() -> None:
    for arguments, expected in [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {})]:
        call = {"function": {"name": "f", "arguments": arguments}}
        [read] = messages.read(Fields({"messages": [{"role": "assistant", "tool_calls": [call]}]}))
        assert read["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ messages }}", Formats("none", "none")),
        ("<think></think>", Formats("think", "none")),
        ("<think></think><tool_call>{{ '<arg_key>' }}", Formats("think", "glm")),
        ('<think></think><tool_call>\n{"name": ', Formats("think", "hermes")),
        ("<tool_call><function=f>", Formats("none", "none")),
    ],
)
def test_a_template_shows_how_its_model_writes(template: str, found: Formats) -> None:
    assert detect([template], AUTO) == found
    assert detect([template], Formats("none", "hermes")) == Formats("none", "hermes")
