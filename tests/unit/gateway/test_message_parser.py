"""From pieces to messages: what models write, what they should not write, and any way to cut it."""

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from services.gateway.parsers.api import Piece, Tag
from services.gateway.parsers.formats import Formats, Parsing, ToolFormat
from services.gateway.parsers.tags import TagScanner

TOOLS: dict[str, Any] = {
    "weather": {
        "name": "weather",
        "parameters": {
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "where": {"type": ["object", "null"]},
                "tag": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "level": {"enum": [1, 2]},
                "any": {},
            }
        },
    }
}
GLM: ToolFormat = "glm"
HERMES: ToolFormat = "hermes"
FORMATS = (GLM, HERMES)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "K\\u00f6ln {\\"}", "days": 2}}\n</tool_call>'
GLM_CALL = '<tool_call>weather<arg_key>city</arg_key><arg_value>Köln "x"\n</arg_value></tool_call>'
Message = dict[str, Any]


def pieces_of(text: str, parsing: Parsing) -> list[Piece]:
    """Tags as tokens, other text character by character."""
    parts = re.split("(" + "|".join(map(re.escape, parsing.tags)) + ")", text) if parsing.tags else [text]
    found: list[Piece] = []
    for part in parts:
        found.extend([Tag(part)] if part in parsing.tags else part)
    return found


def parse(
    pieces: Sequence[Piece], parsing: Parsing, *, by_model: bool = True, takes: random.Random | None = None
) -> Message:
    """The whole message, taken part by part as a stream is."""
    parser, scanner = parsing.parser(), TagScanner([] if any(isinstance(p, Tag) for p in pieces) else parsing.tags)
    message: Message = {"content": "", "reasoning": "", "calls": []}

    def take() -> None:
        new = parser.take()
        message["content"] += new.content
        message["reasoning"] += new.reasoning
        for part in new.calls:
            if part.name is not None:
                message["calls"].append([part.name, ""])
            assert part.index == len(message["calls"]) - 1
            message["calls"][part.index][1] += part.arguments

    for piece in pieces:
        for found in scanner.feed(piece):
            parser.feed(found)
        if takes is None or takes.random() < 0.3:
            take()
    for found in scanner.flush():
        parser.feed(found)
    parser.finish(by_model=by_model)
    take()
    message["calls_tools"] = parser.calls_tools
    return message


def read(text: str, tools: ToolFormat = GLM, *, thinks: bool = False, by_model: bool = True) -> Message:
    parsing = Parsing(Formats("think", tools), thinks=thinks, tools=TOOLS)
    return parse(pieces_of(text, parsing), parsing, by_model=by_model)


def arguments(message: Message) -> list[Any]:
    return [json.loads(text) for _, text in message["calls"]]


def test_reasoning_that_the_prompt_opened_ends_at_its_tag() -> None:
    message = read("I think\n</think>\n\nHello\n", thinks=True)
    assert (message["reasoning"], message["content"]) == ("I think", "Hello\n")


def test_reasoning_that_the_model_opens_is_reasoning_too() -> None:
    for thinks in (False, True):
        message = read("<think>\nI think\n</think>\n\nHello", thinks=thinks)
        assert (message["reasoning"], message["content"]) == ("I think", "Hello")


def test_an_answer_without_tags_is_passed_on_as_it_is() -> None:
    assert read(" \n Hello <b> \n")["content"] == " \n Hello <b> \n"


def test_a_call_amid_reasoning_ends_it() -> None:
    message = read("I need it " + GLM_CALL, thinks=True)
    assert message["reasoning"] == "I need it"
    assert arguments(message) == [{"city": 'Köln "x"\n'}]
    assert message["calls_tools"]


def test_calls_come_after_content_without_the_space_between() -> None:
    message = read(f"I look.\n{GLM_CALL}\n{GLM_CALL}\n")
    assert message["content"] == "I look."
    assert [name for name, _ in message["calls"]] == ["weather", "weather"]


def test_a_call_without_arguments_has_an_empty_object() -> None:
    assert read("<tool_call> now\n</tool_call>")["calls"] == [["now", "{}"]]
    assert read('<tool_call>{"name": "now"}</tool_call>', HERMES)["calls"] == [["now", "{}"]]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("city", "5", "5"),
        ("city", '"quoted" <arg_key></tool_call>', '"quoted" <arg_key></tool_call>'),
        ("days", " 5 ", 5),
        ("days", "many", "many"),
        ("days", "NaN", "NaN"),
        ("where", '{"a": [1, null]}', {"a": [1, None]}),
        ("where", "null", None),
        ("tag", "null", None),
        ("tag", "5", "5"),
        ("tag", '"x"', '"x"'),
        ("level", "2", 2),
        ("any", "[1]", [1]),
        ("any", "text", "text"),
        ("unknown", "5", "5"),
        ("days", "[" * 5_000, "[" * 5_000),
    ],
)
def test_the_schema_tells_text_from_json(key: str, value: str, expected: Any) -> None:
    call = f"<tool_call>weather<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>"
    assert arguments(read(call)) == [{key: expected}]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (CALL, {"city": 'Köln {"}', "days": 2}),
        ('<tool_call>{"arguments": {"days": 1}, "name": "weather"}</tool_call>', {"days": 1}),
        ('<tool_call>{"name": "weather", "parameters": {"days": 1}}</tool_call>', {"days": 1}),
        ('<tool_call>{"name": "weather", "arguments": "{\\"days\\": 1}"}</tool_call>', {"days": 1}),
        ('<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>', {"city": "</tool_call>"}),
    ],
)
def test_calls_in_json_are_read_in_any_order(call: str, expected: Any) -> None:
    message = read(call, HERMES)
    assert message["calls"][0][0] == "weather"
    assert arguments(message) == [expected]
    assert message["calls_tools"]


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (GLM, "<tool_call></tool_call>"),
        (GLM, "<tool_call>two words</tool_call> more"),
        (GLM, "<tool_call>weather"),
        (GLM, "<tool_call><tool_call>weather</tool_call>"),
        (GLM, "a </think> b </tool_call> <arg_key>"),
        (HERMES, "<tool_call>weather</tool_call>"),
        (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        (HERMES, '<tool_call>{"name": "weather", '),
    ],
)
def test_what_is_no_call_is_content(tools: ToolFormat, text: str) -> None:
    message = read(text, tools)
    assert (message["content"], message["calls"]) == (text, [])
    assert not message["calls_tools"]


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (GLM, "<tool_call>weather<arg_key>city</arg_key><arg_value>Kö"),
        (GLM, "<tool_call>weather<arg_key>city</arg_key></tool_call>"),
        (GLM, "<tool_call>weather<arg_key>a</arg_key><arg_key>b</arg_key><arg_value>1</arg_value></tool_call>"),
        (GLM, "<tool_call>weather<arg_key>a</arg_key>b<arg_value>1</arg_value></tool_call>"),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": "Kö'),
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"city": }}</tool_call>'),
    ],
)
def test_a_call_that_breaks_off_is_never_one_that_could_be_executed(tools: ToolFormat, text: str) -> None:
    message = read(text, tools)
    [[name, written]] = message["calls"]
    assert name == "weather"
    with pytest.raises(json.JSONDecodeError):
        json.loads(written)
    assert not message["calls_tools"]


def test_a_forgotten_closing_tag_is_forgiven_when_the_model_ended_the_turn() -> None:
    for tools, call in zip(FORMATS, [GLM_CALL, CALL], strict=True):
        text = call.removesuffix("</tool_call>")
        assert read(text, tools)["calls_tools"]
        assert not read(text, tools, by_model=False)["calls_tools"]


def test_without_tools_a_call_is_content() -> None:
    parsing = Parsing(Formats("think", "glm"), thinks=True)
    message = parse(pieces_of(f"x</think>{GLM_CALL}", parsing), parsing)
    assert (message["reasoning"], message["content"], message["calls"]) == ("x", GLM_CALL, [])


def test_text_that_looks_like_a_tag_is_no_tag_where_tags_are_tokens() -> None:
    parsing = Parsing(Formats("think", "glm"), thinks=True, tools=TOOLS)
    message = parse([Tag("</think>"), "a <tool_call>", "b </think>"], parsing)
    assert message["content"] == "a <tool_call>b </think>"


SAMPLES = [
    (GLM, "I think\n</think>\n" + f"Let me look.\n{GLM_CALL}\n{GLM_CALL}"),
    (HERMES, f"I think\n</think>\n{CALL}\n{CALL}\n"),
    (GLM, "only thoughts <th"),
    (GLM, "x</think>a < b <tool> </tool_cal"),
    (HERMES, "x</think>" + CALL[:-20]),
]


@pytest.mark.parametrize(("tools", "text"), SAMPLES)
def test_tags_in_plain_text_are_found_however_it_is_cut(tools: ToolFormat, text: str) -> None:
    parsing = Parsing(Formats("think", tools), thinks=True, tools=TOOLS)
    expected = parse(pieces_of(text, parsing), parsing)
    chance = random.Random(0)
    for _ in range(200):
        cuts = sorted(chance.sample(range(len(text) + 1), k=chance.randrange(min(12, len(text)))))
        parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(parts, parsing, takes=chance) == expected


def test_a_stream_never_shows_a_part_of_a_tag_that_was_one() -> None:
    parsing = Parsing(Formats("think", "glm"), thinks=True, tools=TOOLS)
    scanner, parser = TagScanner(parsing.tags), parsing.parser()
    for character in "x</think>y" + GLM_CALL:
        for piece in scanner.feed(character):
            parser.feed(piece)
        new = parser.take()
        assert "<" not in new.content + new.reasoning + "".join(part.arguments for part in new.calls)


def test_whatever_a_model_says_is_a_message_and_the_same_one_however_it_streams() -> None:
    chance = random.Random(1)
    words = ["weather", "city", "days", " ", "\n", "5", "{", "}", '"name": ', '"arguments": ', "\\", '"', "é", "<", ","]
    for tools in FORMATS:
        for single_call in (False, True):
            parsing = Parsing(Formats("think", tools), True, TOOLS, single_call)
            tags: list[Piece] = [Tag(tag) for tag in parsing.tags]
            for _ in range(1_000):
                pieces = [chance.choice(tags if chance.random() < 0.5 else words) for _ in range(chance.randrange(25))]
                by_model = chance.random() < 0.5
                whole = parse(pieces, parsing, by_model=by_model)
                assert parse(pieces, parsing, by_model=by_model, takes=chance) == whole
                if whole["calls_tools"]:
                    assert all(isinstance(found, dict) for found in arguments(whole))
