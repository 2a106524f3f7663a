"""Prompts of GLM-4.7, 5, 5.1 and 5.2, those of 5.2 down to their token ids."""

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


def prompt(
    *conversation: dict[str, Any], tools: list[Any] | None = None, release: str = "5.2", **arguments: Any
) -> str:
    read = messages.read(Fields({"messages": list(conversation)}))
    return ChatTemplate({"default": glm.template(release)}, {}).render(read, tools, arguments)


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


def test_reasoning_within_the_content_of_an_earlier_turn_is_told_apart() -> None:
    past = {"role": "assistant", "content": "<think>greet</think>\n\nHello "}
    assert prompt(HI, past, HI).count("<think></think>Hello<|user|>") == 1
    assert "<think>greet</think>Hello<|user|>" in prompt(HI, past, HI, clear_thinking=False)


def test_the_reasoning_of_this_turn_is_kept_between_its_tool_calls() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    past = {"role": "assistant", "content": "", "reasoning_content": "first", "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "a", "content": "1"}
    text = prompt(HI, past, answer, past, answer)
    assert text.count("<|assistant|><think>first</think><tool_call>f</tool_call><|observation|>") == 2
    assert text.endswith("<tool_response>1</tool_response><|assistant|><think>")


@pytest.mark.parametrize(
    ("release", "off", "older", "of_this_turn"),
    [
        ("5", "</think>", "</think>", "</think>"),
        ("5.1", "</think>", "</think>", "<think></think>"),
        ("5.2", "<think></think>", "<think></think>", "<think></think>"),
    ],
)
def test_each_release_marks_the_absence_of_thoughts_in_its_way(
    release: str, off: str, older: str, of_this_turn: str
) -> None:
    past, call = {"role": "assistant", "content": "Hello"}, {"id": "a", "function": {"name": "f", "arguments": "{}"}}
    asks, answer = {**past, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "1"}
    effort = "<|system|>Reasoning Effort: Max" if release == "5.2" else ""
    assert prompt(HI, release=release) == f"[gMASK]<sop>{effort}<|user|>Hi<|assistant|><think>"
    rest = "Hello<tool_call>f</tool_call><|observation|><tool_response>1</tool_response><|assistant|>"
    turn = f"<|user|>Hi<|assistant|>{older}Hello<|user|>Hi<|assistant|>"
    text = prompt(HI, past, HI, asks, answer, release=release)
    assert text == f"[gMASK]<sop>{effort}{turn}{of_this_turn}{rest}<think>"
    quiet = prompt(HI, past, HI, asks, answer, release=release, enable_thinking=False)
    assert quiet == f"[gMASK]<sop>{turn}{older}{rest}{off}"
    assert (opens_thought(prompt(HI, release=release)), opens_thought(quiet)) == (True, False)


@pytest.mark.parametrize("release", glm.RELEASES)
def test_reasoning_of_earlier_turns_is_dropped_by_every_release(release: str) -> None:
    past = {"role": "assistant", "content": "Hello", "reasoning_content": "greet"}
    assert "greet" not in prompt(HI, past, HI, release=release)
    assert "<think>greet</think>Hello" in prompt(HI, past, HI, release=release, clear_thinking=False)
    assert detect([glm.template(release)], AUTO) == Formats("think", "glm")


def test_tools_are_declared_whole_until_5_and_without_their_wrapping_since() -> None:
    tool = {"type": "function", "function": WEATHER | {"strict": True, "defer_loading": False}}
    hidden = {"type": "function", "function": {"name": "hidden", "defer_loading": True}}
    bare = '<tools>\n{"name": "weather", "description": "é", "parameters": {"type": "object"}}\n</tools>'
    for release in ("5.1", "5.2"):
        assert bare in prompt(HI, tools=[tool, hidden], release=release)
    assert f"<tools>\n{json.dumps(tool, ensure_ascii=False)}\n</tools>" in prompt(HI, tools=[tool], release="5")


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
