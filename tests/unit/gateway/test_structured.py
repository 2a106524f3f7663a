"""What a request that wants structured output has workers hold the answer to."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher

from protos.forebay.v1 import gateway_pb2, gateway_pb2_grpc, generation_pb2
from shared.grammar import Grammar, Kind, source
from tests.unit.gateway.test_rest import chat, completion, post
from tests.unit.gateway.test_tool_calls import TOOLS
from tests.unit.gateway.world import World

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
AS_OPENAI = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}


def vllms(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


async def asked(world: World, path: str, body: dict[str, Any]) -> generation_pb2.Grammar:
    await post(world, path, body)
    return world.decode.requests[-1].sampling.grammar


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": AS_OPENAI},
        vllms(json=SCHEMA),
        vllms(json=json.dumps(SCHEMA), regex=None),
        {"guided_json": SCHEMA},
    ],
    ids=["OpenAI", "vLLM", "vLLM, a string", "vLLM, before"],
)
async def test_a_schema_by_any_name(fields: dict[str, Any], world: World) -> None:
    for path, body in (("chat/completions", chat(**fields)), ("completions", completion(**fields))):
        assert json.loads((await asked(world, path, body)).json_schema) == SCHEMA


@pytest.mark.parametrize("fields", [{"response_format": {"type": "json_object"}}, vllms(json_object=True)])
async def test_any_object(fields: dict[str, Any], world: World) -> None:
    assert json.loads((await asked(world, "completions", completion(**fields))).json_schema) == {"type": "object"}


async def test_choices_are_what_they_say(world: World) -> None:
    grammar = await asked(world, "completions", completion(guided_choice=['say "hi"', "a|b", "ü\n"]))
    compiled = source(Grammar(Kind.LARK, grammar.lark))
    assert not LLMatcher.validate_grammar(compiled)
    assert grammar.lark == r'start: "say \"hi\"" | "a|b" | "\u00fc\n"'


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, vllms(json_object=False)])
async def test_nothing(fields: dict[str, Any], world: World) -> None:
    await post(world, "chat/completions", chat(**fields))
    assert not world.decode.requests[-1].sampling.HasField("grammar")


async def test_a_model_that_thinks_is_free_until_it_has_thought(glm_world: World) -> None:
    end = glm_world.tokenizer.added_tokens["</think>"]
    thinking = await asked(glm_world, "chat/completions", chat(response_format=AS_OPENAI))
    assert thinking.behind_token_id == end
    at_once = await asked(glm_world, "chat/completions", chat(response_format=AS_OPENAI, reasoning_effort="none"))
    assert not at_once.HasField("behind_token_id")


async def test_not_beside_tools_that_may_be_called(glm_world: World) -> None:
    body = chat(response_format=AS_OPENAI, tools=TOOLS)
    guided = chat(response_format={"type": "text"}, guided_regex="a", tools=TOOLS)
    for param, asking in (("response_format", body), ("guided_regex", guided)):
        response = await glm_world.http.post("/v1/chat/completions", json=asking)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert f"'{param}' beside 'tools' is not supported" in response.json()["error"]["message"]
    assert (await asked(glm_world, "chat/completions", body | {"tool_choice": "none"})).json_schema


async def test_a_model_without_a_tokenizer(textless: World) -> None:
    body = completion(prompt=[1, 2, 3], response_format={"type": "json_object"})
    response = await textless.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert "tokenizer" in response.json()["error"]["message"]


async def test_by_grpc(world: World) -> None:
    stub: Any = gateway_pb2_grpc.GatewayServiceStub(world.channels.to(await world.start_grpc()))
    options = gateway_pb2.GenerationOptions(grammar=generation_pb2.Grammar(regex="[a-z]+"))
    async for _ in stub.Complete(gateway_pb2.CompleteRequest(options=options, text="hello")):
        pass
    assert world.decode.requests[-1].sampling.grammar.regex == "[a-z]+"
