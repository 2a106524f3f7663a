"""A table of responses that cannot be had: each with the status, the field and the words of the answer."""

import json
from typing import Any

import pytest

from tests.unit.gateway.test_bad_requests import assert_error, label
from tests.unit.gateway.world import MAX_MODEL_LEN, MODEL, World

PATH = "/v1/responses"
FUNCTION = {"type": "function", "name": "f"}
SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "number of tons"}}


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "hello", **fields}


def items(*given: Any) -> dict[str, Any]:
    return asked(input=list(given))


def content(part: Any) -> dict[str, Any]:
    return items({"role": "user", "content": [part]})


def call(**fields: Any) -> dict[str, Any]:
    return items({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"} | fields)


def output(**fields: Any) -> dict[str, Any]:
    return items({"type": "function_call_output", "call_id": "c", "output": "x"} | fields)


# (request, param, part of the message)
TABLE: list[tuple[dict[str, Any], str | None, str]] = [
    (asked(input=None), "input", "'input' is missing"),
    (asked(input=5), "input", "'input' must be a string or an array of items, not an integer"),
    (asked(input=[]), "input", "at least one item"),
    (items("hello"), "input[0]", "'input[0]' must be an object, not a string"),
    (items({}), "input[0]", "'input[0]' must have a 'type' or a 'role'"),
    (items({"type": 1}), "input[0]", "must have a 'type' or a 'role'"),
    (items({"type": "item_reference", "id": "x"}), "input[0]", "send the item itself"),
    (items({"type": "web_search_call"}), "input[0]", "items of type 'web_search_call' are not supported, only message"),
    (items({"type": "message"}), "input[0].role", "'input[0].role' must be a string, not null"),
    (items({"role": "tool", "content": "x"}), "input[0].role", "must be one of system, developer, user, assistant"),
    (items({"role": "user"}), "input[0].content", "must be a string or an array of parts, not null"),
    (content({"type": "input_image"}), "input[0].content[0]", "parts of type 'input_image' are not supported"),
    (content({"type": "input_file"}), "input[0].content[0]", "parts of type 'input_file' are not supported, only text"),
    (content({"type": "input_text"}), "input[0].content[0]", "must have its text as a string"),
    (items({"type": "reasoning", "content": "x"}), "input[0].content", "must be an array, not a string"),
    (items({"type": "reasoning", "summary": [{}]}), "input[0].summary[0]", "must be an object with a 'text'"),
    (
        items({"type": "reasoning", "summary": [], "encrypted_content": "x"}),
        "input[0].encrypted_content",
        "cannot be read here: send the reasoning's 'content'",
    ),
    (call(call_id=None), "input[0].call_id", "'input[0].call_id' must be a string that is not empty"),
    (call(name=""), "input[0].name", "must be a string that is not empty"),
    (call(arguments="{"), "input[0].arguments", "must be a JSON object in a string"),
    (call(arguments="[]"), "input[0].arguments", "not an array"),
    (output(call_id=1), "input[0].call_id", "must be a string"),
    (output(output=None), "input[0].output", "must be a string or an array of parts, not null"),
    (output(), "input[0].call_id", "is of no function_call before it: send the earlier items, too, as 'input'"),
    (asked(instructions=["x"]), "instructions", "'instructions' must be a string, not an array"),
    (asked(previous_response_id="resp_1"), "previous_response_id", "send the earlier items, too, as 'input'"),
    (asked(conversation="conv_1"), "conversation", "send the earlier items, too, as 'input'"),
    (asked(background=True), "background", "wait for the answer, or have it streamed"),
    (asked(prompt={"id": "x"}), "prompt", "send its text as 'instructions' and 'input'"),
    (asked(context_management=[{"type": "compaction"}]), "context_management", "what the model is to see"),
    (asked(moderation={"model": "x"}), "moderation", "'moderation' is not supported"),
    (asked(truncation="auto"), "truncation", "leave earlier items out of 'input'"),
    (asked(n=2), "n", "a response is one output"),
    (asked(return_token_ids=True), "return_token_ids", "/v1/chat/completions tells them"),
    (asked(prompt_logprobs=1), "prompt_logprobs", "/v1/chat/completions tells them"),
    (asked(messages=[]), "messages", "'messages' is of chat completions: say 'input'"),
    (asked(max_tokens=5), "max_tokens", "'max_tokens' is of chat completions: say 'max_output_tokens'"),
    (asked(response_format={"type": "text"}), "response_format", "say 'text.format'"),
    (asked(reasoning_effort="low"), "reasoning_effort", "say 'reasoning.effort'"),
    (asked(logprobs=True), "logprobs", "say 'include' with 'message.output_text.logprobs'"),
    (asked(max_output_tokens=0), "max_output_tokens", "'max_output_tokens' must be at least 1"),
    (asked(max_output_tokens="9"), "max_output_tokens", "must be an integer, not a string"),
    (asked(max_output_tokens=3, min_tokens=9), "min_tokens", "'min_tokens' (9) exceeds 'max_output_tokens' (3)"),
    (asked(max_output_tokens=MAX_MODEL_LEN), "input", "maximum context length is 200 tokens"),
    (asked(temperature=3), "temperature", "'temperature' must be at least 0 and at most 2"),
    (asked(top_p=0), "top_p", "greater than 0"),
    (asked(top_k=-2), "top_k", "at least -1"),
    (asked(seed=1.5), "seed", "must be an integer"),
    (asked(use_beam_search=True), "use_beam_search", "'use_beam_search' is not supported"),
    (asked(stream="yes"), "stream", "must be a boolean, not a string"),
    (asked(include="x"), "include", "must be an array, not a string"),
    (asked(include=["x"]), "include", "'include' may have message.output_text.logprobs"),
    (asked(top_logprobs=2), "top_logprobs", "needs 'message.output_text.logprobs' among what is to 'include'"),
    (asked(include=["message.output_text.logprobs"], top_logprobs=21), "top_logprobs", "at most 20"),
    (asked(text="x"), "text", "'text' must be an object, not a string"),
    (asked(text={"format": "x"}), "text.format", "'text.format' must be an object"),
    (asked(text={"format": {"type": "xml"}}), "text.format", "'text.format.type' must be"),
    (
        asked(text={"format": {"type": "json_schema"}}),
        "text.format.schema",
        "'text.format.schema' must be a JSON schema",
    ),
    (asked(text={"format": SCHEMA}), "text.format", "cannot be used: Invalid type: number of tons"),
    (asked(text={"format": SCHEMA}, ignore_eos=True), "ignore_eos", "cannot be had with 'text.format'"),
    (asked(reasoning="high"), "reasoning", "must be an object, not a string"),
    (asked(reasoning={"effort": "much"}), "reasoning.effort", "'reasoning.effort' must be one of none, minimal"),
    (asked(reasoning={"effort": 1}), "reasoning.effort", "'reasoning.effort' must be a string, not an integer"),
    (asked(tools={}), "tools", "must be an array, not an object"),
    (asked(tools=["f"]), "tools[0]", "must be an object, not a string"),
    (asked(tools=[{"name": "f"}]), "tools[0].type", "'tools[0].type' must be a string, not null"),
    (asked(tools=[{"type": "web_search"}]), "tools[0]", "offer a function, and run it yourself"),
    (asked(tools=[{"type": "mcp"}]), "tools[0]", "tools of type 'mcp' are not supported"),
    (asked(tools=[{"type": "function"}]), "tools[0].name", "must be a string that is not empty"),
    (asked(tools=[FUNCTION | {"parameters": []}]), "tools[0].parameters", "must be a JSON schema, an object"),
    (asked(tools=[FUNCTION]), "tools", "how the model 'tiny' calls tools is not known"),
    (asked(tool_choice="required"), "tool_choice", "demands a tool that is not among 'tools'"),
    (asked(tool_choice={"type": "function", "name": "f"}), "tool_choice", "demands a tool"),
    (asked(tool_choice={"type": "file_search"}), "tool_choice", "of the type 'file_search' is not supported"),
    (asked(parallel_tool_calls="no"), "parallel_tool_calls", "must be a boolean"),
    (asked(metadata=[]), "metadata", "must be an object, not an array"),
    (asked(metadata={str(i): "x" for i in range(17)}), "metadata", "at most 16 pairs"),
    (asked(metadata={"x": 1}), "metadata", "values are strings of at most 512"),
    (asked(metadata={"x" * 65: "x"}), "metadata", "at most 64 characters"),
    (asked(user=1), "user", "must be a string"),
    (asked(store="no"), "store", "must be a boolean"),
]


@pytest.mark.parametrize(("body", "param", "words"), TABLE, ids=lambda case: label(case)[:60])
async def test_what_cannot_be_had_is_told(world: World, body: dict[str, Any], param: str | None, words: str) -> None:
    response = await world.http.post(PATH, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert_error(response, 400, param, words)
    assert not world.decode.requests


async def test_a_model_that_is_not_served(world: World) -> None:
    response = await world.http.post(PATH, json=asked(model="other"))
    assert_error(response, 404, "model", "The model 'other' does not exist here")


async def test_a_model_without_a_tokenizer(textless: World) -> None:
    response = await textless.http.post(PATH, json=asked())
    assert_error(response, 400, "input", "no 'input' as text")


async def test_a_schema_beside_tools_that_may_be_called(glm_world: World) -> None:
    response = await glm_world.http.post(PATH, json=asked(tools=[FUNCTION], text={"format": {"type": "json_object"}}))
    assert_error(response, 400, "text.format", "'text.format' beside 'tools' is not supported")


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", PATH, 405, "GET is not allowed on /v1/responses"),
        ("GET", f"{PATH}/resp_1", 404, "nothing is kept of a response once it is answered"),
        ("DELETE", f"{PATH}/resp_1", 404, "nothing is kept of a response"),
        ("POST", f"{PATH}/resp_1/cancel", 404, "nothing is kept of a response"),
        ("GET", f"{PATH}/resp_1/input_items", 404, "nothing is kept of a response"),
        ("POST", "/responses", 404, "did you mean /v1/responses?"),
        ("POST", "/v1/embeddings", 404, "/v1/responses,"),
    ],
)
async def test_what_there_is_not(world: World, method: str, path: str, status: int, words: str) -> None:
    assert_error(await world.http.request(method, path), status, None, words)
