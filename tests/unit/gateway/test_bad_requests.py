"""A table of malformed requests: each with the status, the field and the words of the answer."""

import json
from typing import Any

import httpx
import pytest

from tests.unit.gateway.world import MAX_MODEL_LEN, MODEL, World

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": MODEL, "messages": HELLO, **fields}


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": MODEL, "prompt": "hello", **fields}


def message(**fields: Any) -> tuple[str, dict[str, Any]]:
    return chat(messages=[{"role": "user", "content": "hello"} | fields])


CALLED_ARGUMENTS = "messages[0].tool_calls[0].function.arguments"


def called(function: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return message(role="assistant", tool_calls=[{"id": "call_1", "type": "function", "function": function}])


def schema(schema: Any) -> tuple[str, dict[str, Any]]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


# (request, status, param, part of the message)
TABLE: list[tuple[tuple[str, dict[str, Any]], int, str | None, str]] = [
    (chat(model="other"), 404, "model", "The model 'other' does not exist here; served are: 'tiny'"),
    (chat(model=3), 400, "model", "'model' must be a string, not an integer"),
    (chat(messages=None), 400, "messages", "'messages' is missing"),
    (chat(messages=[]), 400, "messages", "at least one message"),
    (chat(messages="hello"), 400, "messages", "'messages' must be an array, not a string"),
    (chat(messages=["hello"]), 400, "messages[0]", "'messages[0]' must be an object, not a string"),
    (message(role=None), 400, "messages[0].role", "'messages[0].role' must be a string, not null"),
    (message(role="robot"), 400, "messages[0].role", "must be one of system, developer, user"),
    (message(content=None), 400, "messages[0].content", "must be a string or an array of parts, not null"),
    (message(content=5), 400, "messages[0].content", "must be a string or an array of parts, not an integer"),
    (message(content=[{"text": "x"}]), 400, "messages[0].content[0]", "must be an object with a 'type'"),
    (message(content=[{"type": "text"}]), 400, "messages[0].content[0]", "must have its text as a string"),
    (message(content=[{"type": "image_url"}]), 400, "messages[0].content[0]", "type 'image_url' are not supported"),
    (message(content="a\ud800"), 400, None, "not valid JSON"),
    (text(prompt=None), 400, "prompt", "'prompt' is missing"),
    (text(prompt=""), 400, "prompt", "the prompt is empty"),
    (text(prompt=[]), 400, "prompt", "must not be an empty array"),
    (text(prompt=[[]]), 400, "prompt", "the prompt is empty"),
    (text(prompt={}), 400, "prompt", "'prompt' must be a string, an array of strings"),
    (text(prompt=["a", 1]), 400, "prompt", "not a mixture"),
    (text(prompt=[1, 2.5]), 400, "prompt[1]", "'prompt[1]' must be an integer, not a number"),
    (text(prompt=[1, True]), 400, "prompt[1]", "'prompt[1]' must be an integer, not a boolean"),
    (text(prompt=[-1]), 400, "prompt[0]", "at least 0"),
    (text(prompt=[300]), 400, "prompt", "token id 300; the vocabulary is 0 to 299"),
    (text(prompt=[1 << 40]), 400, "prompt[0]", "at most 2147483647"),
    (text(prompt=[[1]] * 17), 400, "prompt", "at most 16 entries"),
    (text(prompt=[[1]] * 9, n=2), 400, "n", "9 prompts times n=2 exceed 16 outputs"),
    (text(prompt=[1] * MAX_MODEL_LEN), 400, "prompt", "maximum context length is 200 tokens"),
    (text(max_tokens=MAX_MODEL_LEN), 400, "prompt", "(1 in the prompt, 200 in the completion)"),
    (chat(max_tokens=MAX_MODEL_LEN), 400, "messages", "maximum context length is 200 tokens"),
    (text(max_tokens=0), 400, "max_tokens", "'max_tokens' must be at least 1"),
    (chat(max_completion_tokens=-1), 400, "max_completion_tokens", "at least 1"),
    (text(max_tokens="9"), 400, "max_tokens", "'max_tokens' must be an integer, not a string"),
    (text(max_tokens=1.5), 400, "max_tokens", "'max_tokens' must be an integer, not a number"),
    (text(max_tokens=True), 400, "max_tokens", "not a boolean"),
    (text(min_tokens=9, max_tokens=3), 400, "min_tokens", "'min_tokens' (9) exceeds 'max_tokens' (3)"),
    (text(temperature=-0.1), 400, "temperature", "'temperature' must be at least 0 and at most 2, not -0.1"),
    (text(temperature=2.1), 400, "temperature", "at most 2"),
    (text(temperature="hot"), 400, "temperature", "'temperature' must be a number, not a string"),
    (text(top_p=0), 400, "top_p", "'top_p' must be greater than 0 and at most 1, not 0"),
    (text(top_p=1.01), 400, "top_p", "at most 1"),
    (text(top_k=-2), 400, "top_k", "at least -1"),
    (text(min_p=1.5), 400, "min_p", "at most 1"),
    (text(presence_penalty=2.5), 400, "presence_penalty", "at most 2"),
    (text(frequency_penalty=-3), 400, "frequency_penalty", "at least -2"),
    (text(repetition_penalty=0), 400, "repetition_penalty", "greater than 0"),
    (text(n=0), 400, "n", "'n' must be at least 1"),
    (text(n=129), 400, "n", "at most 128"),
    (text(seed=1.5), 400, "seed", "'seed' must be an integer"),
    (text(seed=1 << 63), 400, "seed", "'seed' must be at least"),
    (text(stop=[1]), 400, "stop", "a string or an array of strings"),
    (text(stop=[""]), 400, "stop", "1 to 1024 characters"),
    (text(stop=["x"] * 17), 400, "stop", "at most 16 entries"),
    (text(stop_token_ids=["x"]), 400, "stop_token_ids", "must be an integer, not a string"),
    (text(stop_token_ids=[300]), 400, "stop_token_ids", "token id 300; the last one is 299"),
    (text(logit_bias=[1]), 400, "logit_bias", "must be an object, not an array"),
    (text(logit_bias={"x": 1}), 400, "logit_bias", "must be a token id, not 'x'"),
    (text(logit_bias={"1": 101}), 400, "logit_bias", "at most 100"),
    (text(logit_bias={"1": "2"}), 400, "logit_bias", "an object of numbers"),
    (text(logit_bias={"300": 1}), 400, "logit_bias", "token id 300; the last one is 299"),
    (text(logprobs=True), 400, "logprobs", "'logprobs' must be an integer, not a boolean"),
    (text(logprobs=21), 400, "logprobs", "at most 20"),
    (chat(logprobs=3), 400, "logprobs", "'logprobs' must be a boolean, not an integer"),
    (chat(top_logprobs=3), 400, "top_logprobs", "'top_logprobs' needs 'logprobs' to be true"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "at most 20"),
    (text(stream="yes"), 400, "stream", "'stream' must be a boolean, not a string"),
    (text(stream_options={}), 400, "stream_options", "only allowed when 'stream' is true"),
    (text(stream=True, stream_options={"include_usage": 1}), 400, "include_usage", "must be a boolean"),
    (text(echo=1), 400, "echo", "'echo' must be a boolean, not an integer"),
    (text(echo=True, logprobs=-1), 400, "logprobs", "at least 0"),
    (text(echo=True, logprobs=1, max_tokens=-1), 400, "max_tokens", "at least 0"),
    (text(echo=True, logprobs=1, best_of=2), 400, "best_of", "'best_of' is not supported"),
    (text(echo=True, logprobs=1, max_tokens=0, min_tokens=1), 400, "min_tokens", "exceeds 'max_tokens' (0)"),
    (text(logprobs=1, max_tokens=0), 400, "max_tokens", "'max_tokens' must be at least 1"),
    (chat(echo=True), 400, "echo", "'echo' is not supported"),
    (text(best_of=2), 400, "best_of", "'best_of' is not supported"),
    (text(suffix="x"), 400, "suffix", "'suffix' is not supported"),
    (text(cache_salt=""), 400, "cache_salt", "must not be empty"),
    (text(prompt_logprobs=-1), 400, "prompt_logprobs", "'prompt_logprobs' must be at least 0"),
    (text(prompt_logprobs=21), 400, "prompt_logprobs", "at most 20"),
    (text(prompt_logprobs=True), 400, "prompt_logprobs", "must be an integer, not a boolean"),
    (text(prompt_logprobs=1.5), 400, "prompt_logprobs", "must be an integer, not a number"),
    (text(prompt_logprobs=1, stream=True), 400, "prompt_logprobs", "not available when 'stream' is true"),
    (text(prompt_logprobs=1, max_tokens=MAX_MODEL_LEN), 400, "prompt", "(1 in the prompt, 200 in the completion)"),
    (text(prompt_logprobs=1, max_tokens=0, prompt=[1] * 201), 400, "prompt", "201 in the prompt, 0 in the completion"),
    (chat(prompt_logprobs="1"), 400, "prompt_logprobs", "must be an integer, not a string"),
    (chat(prompt_logprobs=0, stream=True), 400, "prompt_logprobs", "not available when 'stream' is true"),
    (chat(prompt_logprobs=1, max_tokens=0), 400, "max_tokens", "'max_tokens' must be at least 1"),
    (text(use_beam_search=True), 400, "use_beam_search", "'use_beam_search' is not supported"),
    (chat(response_format={"type": "xml"}), 400, "response_format", 'must be "text", "json_object"'),
    (chat(response_format="json"), 400, "response_format", "must be an object, not a string"),
    (chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema", "must be an object, not null"),
    (schema(None), 400, "response_format.json_schema.schema", "must be a JSON schema, not null"),
    (schema({"type": "number of tons"}), 400, "response_format", "cannot be used: Invalid type: number of tons"),
    (schema({"$ref": "http://example.com/x"}), 400, "response_format", "cannot be used: Resource"),
    (text(guided_json="{"), 400, "guided_json", "cannot be read"),
    (text(guided_regex="((("), 400, "guided_regex", "cannot be used"),
    (text(guided_regex=""), 400, "guided_regex", "must be a string that is not empty"),
    (text(guided_grammar="start: nobody"), 400, "guided_grammar", "unknown name"),
    (text(guided_choice=[]), 400, "guided_choice", "an array of strings that are not empty"),
    (text(guided_choice=["a", 1]), 400, "guided_choice", "an array of strings that are not empty"),
    (text(guided_choice=["x" * 70_000]), 400, "guided_choice", "at most 65536 are read"),
    (text(guided_json={}, guided_regex="a"), 400, "guided_regex", "cannot both say what the answer is"),
    (text(structured_outputs={}), 400, "structured_outputs", "must have one of json, regex, choice"),
    (text(structured_outputs={"json": {}, "regex": "a"}), 400, "structured_outputs", "must have one of"),
    (chat(guided_regex="(((", response_format={"type": "text"}), 400, "guided_regex", "cannot be used"),
    (chat(guided_regex="(((", structured_outputs={"json_object": False}), 400, "guided_regex", "cannot be used"),
    (text(guided_regex="a", min_tokens=2), 400, "min_tokens", "cannot be had with 'guided_regex'"),
    (text(guided_regex="a", ignore_eos=True), 400, "ignore_eos", "cannot be had with 'guided_regex'"),
    (chat(tools="x"), 400, "tools", "'tools' must be an array"),
    (chat(tools=[{}]), 400, "tools", "an object with a 'function'"),
    (chat(tools=[{"type": "function", "function": {}}]), 400, "tools", "'tools[0].function.name' must be a string"),
    (chat(tools=[{"function": {"name": "f", "parameters": []}}]), 400, "tools", "must be a JSON schema"),
    (chat(tools=[{"function": {"name": "f"}}]), 400, "tools", "how the model 'tiny' calls tools is not known"),
    (chat(tool_choice="required"), 400, "tool_choice", "demands a tool that is not among 'tools'"),
    (chat(tool_choice={"type": "function"}), 400, "tool_choice", "an object that names a function"),
    (chat(tool_choice={"type": "function", "function": {"name": "f"}}), 400, "tool_choice", "demands a tool"),
    (chat(tool_choice={"type": "allowed_tools"}), 400, "tool_choice", "of the type 'allowed_tools' is not supported"),
    (chat(reasoning_effort="much"), 400, "reasoning_effort", "must be one of none, minimal"),
    (chat(thinking={"type": "maybe"}), 400, "thinking", "'thinking.type' must be"),
    (chat(thinking="on"), 400, "thinking", "'thinking' must be an object, not a string"),
    (message(role="assistant", reasoning_content=1), 400, "messages[0].reasoning_content", "must be a string"),
    (message(role="tool", tool_call_id=1), 400, "messages[0].tool_call_id", "must be a string"),
    (message(role="assistant", tool_calls={}), 400, "messages[0].tool_calls", "must be an array, not an object"),
    (message(role="assistant", tool_calls=[1]), 400, "messages[0].tool_calls[0]", "must be an object"),
    (message(role="assistant", tool_calls=[{}]), 400, "messages[0].tool_calls[0].function", "must be an object"),
    (called({"arguments": "{}"}), 400, "messages[0].tool_calls[0].function.name", "is missing"),
    (called({"name": "f", "arguments": "{"}), 400, CALLED_ARGUMENTS, "must be a JSON object in a string"),
    (called({"name": "f", "arguments": "[1]"}), 400, CALLED_ARGUMENTS, "not an array"),
    (chat(tool_choice=7), 400, "tool_choice", 'must be "none"'),
    (chat(functions=[{}]), 400, "functions", "'functions' is not supported"),
    (chat(modalities=["audio"]), 400, "modalities", "'modalities' is not supported"),
    (chat(chat_template="x"), 400, "chat_template", "'chat_template' is not supported"),
    (chat(chat_template_kwargs=[]), 400, "chat_template_kwargs", "must be an object, not an array"),
]


def label(case: object) -> str:
    return json.dumps(case)[:60]


@pytest.mark.parametrize(("request_", "status", "param", "words"), TABLE, ids=lambda case: label(case)[:60])
async def test_a_malformed_request_is_told_what_is_wrong(
    world: World, request_: tuple[str, dict[str, Any]], status: int, param: str | None, words: str
) -> None:
    path, body = request_
    response = await world.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert_error(response, status, param, words)
    assert not world.decode.requests


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"", {}, 400, "the body is empty"),
        (b"{", {}, 400, "not valid JSON"),
        (b"[1]", {}, 400, "must be a JSON object, not an array"),
        (b'{"prompt": NaN}', {}, 400, "not valid JSON"),
        (b'{"prompt": "\xff"}', {}, 400, "not valid JSON: byte 12 is not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "x"}', {}, 400, "begins with a byte order mark"),
        (b"\x1f\x8b", {"Content-Encoding": "gzip"}, 415, "not with Content-Encoding 'gzip'"),
        (b"[" * 5_000, {}, 400, "not valid JSON"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "must be application/json, not 'text/plain'"),
        (b" " * 100_001, {}, 413, "at most 100000 bytes"),
        (b'{"prompt": "x"}', {"X-Forebay-Timeout-Ms": "soon"}, 400, "must be a whole number above 0"),
        (b'{"prompt": "x"}', {"X-Forebay-Timeout-Ms": "0"}, 400, "must be a whole number above 0"),
        (b'{"prompt": "x"}', {"X-Forebay-Tenant": "t" * 257}, 400, "at most 256 characters"),
    ],
)
async def test_a_malformed_body_or_header_is_told_what_is_wrong(
    world: World, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    response = await world.http.post(TEXT, content=content, headers={"Content-Type": "application/json"} | headers)
    assert_error(response, status, None, words, any_param=True)


async def test_a_body_without_a_length_is_limited_too(world: World) -> None:
    async def parts() -> Any:
        for _ in range(200):
            yield b" " * 1_000

    response = await world.http.post(TEXT, content=parts(), headers={"Content-Type": "application/json"})
    assert_error(response, 413, None, "at most 100000 bytes")


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", CHAT, 405, "GET is not allowed on /v1/chat/completions"),
        ("DELETE", "/v1/models", 405, "DELETE is not allowed"),
        ("POST", "/v1/embeddings", 404, "there is no /v1/embeddings"),
        ("POST", "/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("POST", "//v1/completions", 404, "there is no"),
        ("GET", "/v1/models/other", 404, "The model 'other' does not exist"),
    ],
)
async def test_a_wrong_route_or_method_is_an_error_of_the_same_shape(
    world: World, method: str, path: str, status: int, words: str
) -> None:
    assert_error(await world.http.request(method, path), status, None, words, any_param=True)


async def test_the_template_of_the_model_may_refuse_a_conversation(world: World) -> None:
    body = chat(messages=[{"role": "user", "content": "hello"}], chat_template_kwargs={"messages": 1})[1]
    assert (await world.http.post(CHAT, json=body)).status_code == 200  # arguments do not replace the conversation


async def test_unknown_fields_are_ignored(world: World) -> None:
    path, body = chat(user="me", metadata={}, store=False, nonsense=[1], parallel_tool_calls=True)
    assert (await world.http.post(path, json=body)).status_code == 200


async def test_null_is_the_same_as_absent(world: World) -> None:
    path, body = text(**dict.fromkeys(["temperature", "stop", "n", "seed", "stream", "logit_bias", "best_of"]))
    assert (await world.http.post(path, json=body)).status_code == 200


def assert_error(
    response: httpx.Response, status: int, param: str | None, words: str, *, any_param: bool = False
) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert any_param or error["param"] == param
    assert error["code"]
    assert response.headers["x-request-id"]
