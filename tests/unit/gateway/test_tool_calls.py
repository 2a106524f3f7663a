"""Reasoning and tool calls on both faces, from a worker's tokens to what a client reads."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from google.protobuf import json_format

from protos.forebay.v1 import decode_pb2, gateway_pb2, gateway_pb2_grpc, generation_pb2
from shared import rpc
from shared.errors import WorkerLost
from tests.unit.gateway import glm
from tests.unit.gateway.world import Response, World, finished, served, tokens

WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
USER: list[Any] = [{"role": "user", "content": "hello"}]
CALL = (
    "<tool_call>weather<arg_key>city</arg_key><arg_value>Köln</arg_value>"
    "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>"
)
ARGUMENTS = {"city": "Köln", "days": 2}
# Its reasoning is three tokens.
OUTPUT = f"the world</think>hello{CALL}\n{CALL}"


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": USER, "tools": TOOLS, **fields}


async def post(world: World, **fields: Any) -> dict[str, Any]:
    response = await world.http.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(world: World, **fields: Any) -> list[dict[str, Any]]:
    response = await world.http.post("/v1/chat/completions", json=chat(stream=True, **fields))
    assert response.status_code == 200, response.text
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return [json.loads(event) for event in events[:-2]]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A choice of a stream, in the form of a whole one."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    reason = None
    for choice in [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]:
        delta = choice["delta"]
        message["content"] += delta.get("content", "")
        if "reasoning_content" in delta:
            message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
        for part in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in part:
                assert part["index"] == len(calls)
                calls.append({"id": part["id"], "type": part["type"], "function": {**part["function"]}})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    if message.get("tool_calls") and not message["content"]:
        message["content"] = None
    return {"message": message, "finish_reason": reason}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """Ids of calls differ from request to request."""
    calls = choice["message"].get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    message = choice["message"] | {"tool_calls": [call["function"] for call in calls]}
    return {"message": message, "finish_reason": choice["finish_reason"]}


async def test_a_whole_answer_has_reasoning_content_and_calls(glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    answer = await post(glm_world)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("the world", "hello")
    for call in message["tool_calls"]:
        assert (call["type"], call["function"]["name"]) == ("function", "weather")
        assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


async def test_calls_alone_leave_no_content(glm_world: World) -> None:
    await glm_world.says(f"</think>{CALL}")
    [choice] = (await post(glm_world))["choices"]
    assert choice["message"]["content"] is None
    assert "reasoning_content" not in choice["message"]


async def test_any_chunks_of_tokens_give_the_same_message_streamed_or_whole(glm_world: World) -> None:
    ids = await glm_world.says(OUTPUT)
    expected = without_ids((await post(glm_world))["choices"][0])
    chance = random.Random(0)
    for _ in range(20):
        cuts = sorted(chance.sample(range(1, len(ids)), k=chance.randrange(len(ids))))
        steps = [tokens(*ids[i:j]) for i, j in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
        glm_world.steps = [*steps, finished()]
        assert without_ids(joined(await stream(glm_world))) == expected
        assert without_ids((await post(glm_world))["choices"][0]) == expected


async def test_a_stream_has_the_name_first_and_then_fragments(glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    deltas = [chunk["choices"][0]["delta"] for chunk in await stream(glm_world)]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    first = next(part for part in parts if part["index"] == 0)
    assert set(first) == {"index", "id", "type", "function"}
    assert first["function"] == {"name": "weather", "arguments": ""}
    assert [part["index"] for part in parts] == sorted(part["index"] for part in parts)
    assert len(parts) > 10
    assert not any("<" in json.dumps(delta) for delta in deltas)


async def test_text_that_spells_a_tag_is_content(glm_world: World) -> None:
    spelled = [*await glm_world.tokenizer.encode("<tool_", special=False)]
    spelled += await glm_world.tokenizer.encode("call>weather</tool_", special=False)
    spelled += await glm_world.tokenizer.encode("call>", special=False)
    closing = glm_world.tokenizer.added_tokens["</think>"]
    glm_world.steps = [tokens(closing, *spelled), finished()]
    [choice] = (await post(glm_world))["choices"]
    assert choice["message"]["content"] == "<tool_call>weather</tool_call>"
    assert choice["finish_reason"] == "stop"


async def test_outputs_of_one_request_are_parsed_each_on_its_own(glm_world: World) -> None:
    await glm_world.says(OUTPUT, logprobs=True)
    answer = await post(glm_world, n=2, logprobs=True, return_token_ids=True)
    ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 4
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 6}
    chunks = await stream(glm_world, n=2, logprobs=True, return_token_ids=True)
    for index, choice in enumerate(answer["choices"]):
        assert without_ids(joined(chunks, index)) == without_ids(choice)
        streamed = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [t for c in streamed for t in c.get("token_ids", ())] == choice["token_ids"]
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])


async def test_a_limit_amid_a_call_leaves_it_unfinished(glm_world: World) -> None:
    ids = await glm_world.says(f"</think>{CALL}")
    glm_world.steps = [tokens(*ids[:-8]), finished("LENGTH")]
    [choice] = (await post(glm_world))["choices"]
    assert choice["finish_reason"] == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def test_one_call_is_enough_where_the_client_wants_no_more(glm_world: World) -> None:
    ids = await glm_world.tokenizer.encode(OUTPUT, special=False)

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(*ids)
        await asyncio.sleep(30)

    glm_world.decode.script = script
    answer = await post(glm_world, parallel_tool_calls=False)
    [choice] = answer["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens"] < len(ids)
    await asyncio.wait_for(glm_world.decode.idle.wait(), 5)


@pytest.mark.parametrize(
    ("stop", "content", "reason"),
    [("hello", "", "stop"), ("o<tool_call>wea", "hell", "stop"), ("</tool_call>", "hello", "stop")],
)
async def test_stop_strings_see_tags_as_text(glm_world: World, stop: str, content: str, reason: str) -> None:
    await glm_world.says(OUTPUT)
    [choice] = (await post(glm_world, stop=stop))["choices"]
    assert (choice["message"]["content"] or "", choice["finish_reason"]) == (content, reason)
    assert choice["stop_reason"] == stop
    assert without_ids(joined(await stream(glm_world, stop=stop))) == without_ids(choice)


async def test_a_stop_string_that_never_comes_changes_nothing(glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    expected = without_ids((await post(glm_world))["choices"][0])
    for stop in ("hello<tool_call>wet", "</tool_call>\n\n", "<think>"):
        assert without_ids((await post(glm_world, stop=stop))["choices"][0]) == expected


async def test_a_call_goes_on_where_a_lost_worker_left_it(glm_world: World) -> None:
    ids = await glm_world.says(OUTPUT)
    expected = without_ids((await post(glm_world))["choices"][0])

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        done = len(request.output_token_ids)
        yield tokens(*ids[done : done + 7])
        if done + 7 < len(ids):
            raise WorkerLost("gone")
        yield finished()

    for i in range(1, len(ids) // 7 + 1):
        await glm_world.start_decode(f"decode-{i}")
    for decode in glm_world.decodes.values():
        decode.script = script
    assert without_ids(joined(await stream(glm_world))) == expected


async def test_tools_that_may_not_be_called_are_text(glm_world: World) -> None:
    await glm_world.says(f"</think>{CALL}")
    [choice] = (await post(glm_world, tool_choice="none"))["choices"]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"


async def test_a_conversation_with_an_answered_call_can_be_continued(glm_world: World) -> None:
    await glm_world.says(f"</think>{CALL}")
    message = (await post(glm_world))["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    await post(glm_world, messages=[*USER, message, result])
    sent = glm_world.tokenizer.decode(list(glm_world.decode.requests[-1].prompt_token_ids))
    assert sent.endswith(f"<think></think>{CALL}<|observation|><tool_response>rain</tool_response><|assistant|><think>")


async def test_the_official_client_streams_calls(glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    async with (
        served(glm_world) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        async with client.chat.completions.stream(model="tiny", messages=USER, tools=TOOLS) as events:
            kinds = {event.type async for event in events}
            final = (await events.get_final_completion()).choices[0]
        whole = (await client.chat.completions.create(model="tiny", messages=USER, tools=TOOLS)).choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    for choice in (final, whole):
        assert choice.finish_reason == "tool_calls"
        calls = choice.message.tool_calls or []
        assert [call.type == "function" and json.loads(call.function.arguments) for call in calls] == [ARGUMENTS] * 2


async def test_grpc_has_reasoning_and_calls_in_fields_of_their_own(glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    stub: Any = gateway_pb2_grpc.GatewayServiceStub(glm_world.channels.to(await glm_world.start_grpc()))
    request = gateway_pb2.ChatRequest(
        messages=[gateway_pb2.ChatMessage(role="user", content="hello")], reasoning_effort="high"
    )
    json_format.ParseDict(TOOLS[0], request.tools.add())
    *deltas, last = [response async for response in rpc.stream(stub.Chat, request)]
    assert "".join(response.delta.reasoning for response in deltas) == "the world"
    assert "".join(response.delta.text for response in deltas) == "hello"
    parts = [part for response in deltas for part in response.delta.tool_calls]
    assert [part.name for part in parts if part.id] == ["weather", "weather"]
    for index in (0, 1):
        written = "".join(part.arguments for part in parts if part.index == index)
        assert json.loads(written) == ARGUMENTS
    assert deltas[-1].delta.finish_reason == generation_pb2.FINISH_REASON_TOOL_CALLS
    assert last.finished.num_reasoning_tokens == 3
    sent = glm_world.tokenizer.decode(list(glm_world.decode.requests[0].prompt_token_ids))
    assert "Reasoning Effort: High" in sent


async def test_grpc_s_numbers_and_keys_make_one_prompt(glm_world: World) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"x": 1.5, "days": 2}}}
    tool = {"type": "function", "function": {"parameters": {"b": 3, "a": 1.5}, "name": "f"}}
    stub: Any = gateway_pb2_grpc.GatewayServiceStub(glm_world.channels.to(await glm_world.start_grpc()))
    request = gateway_pb2.ChatRequest(messages=[gateway_pb2.ChatMessage(role="user", content="hello")])
    assistant = request.messages.add(role="assistant")
    json_format.ParseDict({"tool_calls": [call]}, assistant.extra)
    json_format.ParseDict(tool, request.tools.add())
    assert [response async for response in rpc.stream(stub.Chat, request)]
    sent = glm_world.tokenizer.decode(list(glm_world.decode.requests[0].prompt_token_ids))
    assert '{"name": "f", "parameters": {"a": 1.5, "b": 3}}' in sent
    assert "<arg_key>days</arg_key><arg_value>2</arg_value><arg_key>x</arg_key><arg_value>1.5</arg_value>" in sent


async def test_tags_that_are_hidden_tokens_are_found_all_the_same(tmp_path: Path) -> None:
    tokenizer = glm.small_tokenizer()
    tokenizer.add_special_tokens(glm.TAGS)
    world = World(tmp_path / "glm", tokenizer=tokenizer, template=glm.TEMPLATE, max_model_len=2_000)
    await world.start()
    await world.says(OUTPUT)
    [choice] = (await post(world))["choices"]
    assert choice["message"]["reasoning_content"] == "the world"
    assert [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]] == [ARGUMENTS] * 2
    await world.close()
