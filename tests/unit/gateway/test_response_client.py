"""OpenAI's own client and the Responses API, over real HTTP."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from tests.unit.gateway.test_responses import FUNCTIONS, LOGPROBS, said
from tests.unit.gateway.test_tool_calls import ARGUMENTS, CALL, OUTPUT
from tests.unit.gateway.world import MODEL, World, finished, served, tokens


class Place(pydantic.BaseModel):
    city: str


@pytest.fixture
async def client(glm_world: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(glm_world) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_a_stream_ends_with_what_a_whole_response_has(glm_world: World, client: openai.AsyncOpenAI) -> None:
    await glm_world.says(OUTPUT, logprobs=True)
    asked: Any = {"model": MODEL, "input": "hello", "tools": FUNCTIONS, "include": LOGPROBS, "top_logprobs": 1}
    whole: Any = await client.responses.create(**asked)
    async with client.responses.stream(**asked) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final: Any = await stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text == "hello"
    assert [said(item.to_dict()) for item in final.output] == [said(item.to_dict()) for item in whole.output]
    streamed, said_whole = (response.output[1].content[0].logprobs for response in (final, whole))
    assert streamed == said_whole != []
    assert final.usage == whole.usage


async def test_a_function_is_called_and_its_output_is_answered(glm_world: World, client: openai.AsyncOpenAI) -> None:
    await glm_world.says(f"the world</think>hello{CALL}")
    conversation: list[Any] = [{"role": "user", "content": "hello"}]
    first = await client.responses.create(model=MODEL, input=conversation, tools=FUNCTIONS)  # type: ignore[arg-type]
    [call] = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments) == ARGUMENTS
    conversation += first.output
    conversation.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    await glm_world.says("</think>hello")
    second = await client.responses.create(model=MODEL, input=conversation, tools=FUNCTIONS)  # type: ignore[arg-type]
    assert second.output_text == "hello"
    asked = glm_world.tokenizer.decode(list(glm_world.decode.requests[-1].prompt_token_ids))
    assert "<tool_response>rain</tool_response>" in asked
    assert "the world" in asked


async def test_an_answer_is_parsed(glm_world: World, client: openai.AsyncOpenAI) -> None:
    await glm_world.says('</think>{"city": "Paris"}')
    answer = await client.responses.parse(model=MODEL, input="hello", text_format=Place)
    assert answer.output_parsed == Place(city="Paris")
    grammar = glm_world.decode.requests[-1].sampling.grammar
    assert json.loads(grammar.json_schema)["properties"]["city"]["type"] == "string"


async def test_faults_are_the_clients_own_errors(glm_world: World, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="send the earlier items") as caught:
        await client.responses.create(model=MODEL, input="hello", previous_response_id="resp_1")
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "unsupported")
    with pytest.raises(openai.NotFoundError, match="nothing is kept"):
        await client.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError, match="nothing is kept"):
        await client.responses.delete("resp_1")
    glm_world.steps = [tokens(40)]
    glm_world.dispatcher._recovery_wait_s = 0.0
    types = [event.type async for event in await client.responses.create(model=MODEL, input="hello", stream=True)]
    assert types[-2:] == ["error", "response.failed"]


async def test_input_is_counted(glm_world: World, client: openai.AsyncOpenAI) -> None:
    glm_world.steps = [tokens(40), finished()]
    answer = await client.responses.create(model=MODEL, input="hello")
    assert answer.usage is not None
    assert (await client.responses.input_tokens.count(model=MODEL, input="hello")).input_tokens == (
        answer.usage.input_tokens
    )


async def test_a_key_is_asked_for(glm_world: World) -> None:
    async with served(glm_world, "--api-key", "k1=ada") as url, httpx.AsyncClient(base_url=url) as http:
        assert (await http.post("/v1/responses", json={"input": "x"})).status_code == 401
        headers = {"Authorization": "Bearer k1"}
        assert (await http.post("/v1/responses", json={"input": "x"}, headers=headers)).status_code == 200
    assert [request.tenant for request in glm_world.router.requests] == ["ada"]
