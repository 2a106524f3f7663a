"""The Responses API: what a request asks the model, and what it is answered."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from openai.types.responses import Response

from shared.errors import Overloaded
from tests.unit.gateway.test_structured import SCHEMA
from tests.unit.gateway.test_tool_calls import ARGUMENTS, CALL, OUTPUT, TOOLS, WEATHER
from tests.unit.gateway.world import MODEL, World

PATH = "/v1/responses"
FUNCTIONS = [{"type": "function", **WEATHER, "strict": True}]
LOGPROBS = ["message.output_text.logprobs"]


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "hello", **fields}


async def respond(world: World, **fields: Any) -> dict[str, Any]:
    response = await world.http.post(PATH, json=asked(**fields))
    assert response.status_code == 200, response.text
    Response.model_validate_json(response.content)
    answer: dict[str, Any] = response.json()
    return answer


def said(item: Mapping[str, Any]) -> Any:
    """An item without its ids."""
    match item:
        case {"type": "function_call"}:
            return item["name"], json.loads(item["arguments"])
        case {"type": kind, "content": [{"text": str(text)}]}:
            return kind, text


async def prompt(world: World, **fields: Any) -> str:
    await respond(world, **fields)
    return world.tokenizer.decode(list(world.decode.requests[-1].prompt_token_ids))


async def chat_prompt(world: World, *messages: dict[str, Any], **fields: Any) -> str:
    body = {"model": MODEL, "messages": list(messages), **fields}
    assert (await world.http.post("/v1/chat/completions", json=body)).status_code == 200
    return world.tokenizer.decode(list(world.decode.requests[-1].prompt_token_ids))


async def test_a_response(world: World) -> None:
    await world.says("hello world!", num_cached=2)
    answer = await respond(world, metadata={"a": "b"}, user="me", temperature=0.8)
    [item] = answer["output"]
    assert said(item) == ("message", "hello world!")
    assert (item["role"], item["status"]) == ("assistant", "completed")
    assert answer["usage"] == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 6,
    }
    expected: dict[str, Any] = {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": MODEL,
    }
    expected |= {"metadata": {"a": "b"}, "user": "me", "temperature": 0.8, "top_p": 1.0, "tools": []}
    assert answer | expected == answer


async def test_nothing_is_kept_whatever_is_asked_for(world: World) -> None:
    for fields in ({}, {"store": True}, {"store": False}, {"store": None}):
        assert (await respond(world, **fields))["store"] is False


async def test_a_request_id_names_the_response(world: World) -> None:
    response = await world.http.post(PATH, json=asked(), headers={"X-Request-Id": "mine"})
    assert response.json()["id"] == "resp_mine"


async def test_instructions_come_first(world: World) -> None:
    expected = await chat_prompt(world, {"role": "system", "content": "Be."}, {"role": "user", "content": "hello"})
    assert await prompt(world, instructions="Be.") == expected


async def test_items_are_the_messages_of_a_chat(world: World) -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    given: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be."},
        {"type": "message", "role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
        {"role": "user", "content": "d"},
    ]
    expected = [("developer", "Be."), ("user", "a\nb"), ("assistant", "c"), ("user", "d")]
    messages = [{"role": role, "content": content} for role, content in expected]
    assert await prompt(world, input=given) == await chat_prompt(world, *messages)


async def test_items_of_one_turn_are_one_message(glm_world: World) -> None:
    """What the model said comes back as it was answered."""
    await glm_world.says(OUTPUT)
    first = await respond(glm_world, tools=FUNCTIONS)
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    outputs = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"} for call in calls]
    again = [{"role": "user", "content": "hello"}, *first["output"], *outputs]
    arguments = json.dumps(ARGUMENTS)
    message = {
        "role": "assistant",
        "reasoning_content": "the world",
        "content": "hello",
        "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}] * 2,
    }
    expected = await chat_prompt(
        glm_world,
        {"role": "user", "content": "hello"},
        message,
        *[{"role": "tool", "content": "rain"}] * 2,
        tools=TOOLS,
    )
    assert await prompt(glm_world, input=again, tools=FUNCTIONS) == expected


async def test_what_comes_out_of_turn_is_a_message_of_its_own(glm_world: World) -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    message = {"role": "assistant", "content": "hello"}
    expected = await chat_prompt(
        glm_world,
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "hello"},
        {"role": "assistant", "content": "hello", "reasoning_content": "hm"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "reasoning_content": "hm"},
        {"role": "user", "content": "x"},
    )
    user = {"role": "user", "content": "x"}
    given = [user, message, thought, message, message, user, thought, user]
    assert await prompt(glm_world, input=given) == expected


async def test_a_tool_is_shown_as_a_chat_shows_it(glm_world: World) -> None:
    """But for `strict`, which is none of the model's business."""
    user = {"role": "user", "content": "hello"}
    assert await prompt(glm_world, tools=FUNCTIONS) == await chat_prompt(glm_world, user, tools=TOOLS)


async def test_reasoning_message_and_calls_are_items(glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    answer = await respond(glm_world, tools=FUNCTIONS)
    call = ("weather", ARGUMENTS)
    assert [said(item) for item in answer["output"]] == [("reasoning", "the world"), ("message", "hello"), call, call]
    assert len({item["id"] for item in answer["output"]}) == 4
    assert answer["output"][2]["call_id"] != answer["output"][3]["call_id"]
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}


async def test_items_are_in_the_order_in_which_the_model_speaks(glm_world: World) -> None:
    await glm_world.says(f"</think>{CALL}hello{CALL}world")
    answer = await respond(glm_world, tools=FUNCTIONS)
    call = ("weather", ARGUMENTS)
    assert [said(item) for item in answer["output"]] == [call, ("message", "hello"), call, ("message", "world")]


async def test_no_calls_where_none_are_wanted_in_parallel(glm_world: World) -> None:
    await glm_world.says(f"</think>{CALL}{CALL}")
    answer = await respond(glm_world, tools=FUNCTIONS, parallel_tool_calls=False)
    assert [said(item) for item in answer["output"]] == [("weather", ARGUMENTS)]
    assert answer["parallel_tool_calls"] is False


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
async def test_a_call_that_is_demanded_is_a_grammar(glm_world: World, choice: Any) -> None:
    answer = await respond(glm_world, tools=FUNCTIONS, tool_choice=choice)
    assert "weather" in glm_world.decode.requests[-1].sampling.grammar.lark
    assert (answer["tool_choice"], answer["tools"]) == (choice, FUNCTIONS)


async def test_a_call_that_broke_off_is_incomplete(glm_world: World) -> None:
    half = CALL[: CALL.index("</arg_value>")]
    for reason, status in (("LENGTH", "incomplete"), ("STOP", "completed")):
        await glm_world.says(f"</think>{CALL}{half}", reason=reason)
        answer = await respond(glm_world, tools=FUNCTIONS)
        assert answer["status"] == status
        assert [item["status"] for item in answer["output"]] == ["completed", "incomplete"]


async def test_a_limit_makes_it_incomplete(world: World) -> None:
    await world.says("hello world", reason="LENGTH")
    answer = await respond(world, max_output_tokens=2)
    assert world.decode.requests[0].sampling.max_tokens == 2
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (answer["output"][0]["status"], answer["max_output_tokens"]) == ("incomplete", 2)
    assert answer["completed_at"] is None


async def test_a_model_that_says_nothing_says_an_empty_message(world: World, glm_world: World) -> None:
    await world.says("")
    assert [said(item) for item in (await respond(world))["output"]] == [("message", "")]
    await glm_world.says("the world")
    assert [said(item) for item in (await respond(glm_world))["output"]] == [
        ("reasoning", "the world"),
        ("message", ""),
    ]
    await glm_world.says("the world", reason="LENGTH")
    assert [said(item) for item in (await respond(glm_world))["output"]] == [("reasoning", "the world")]


async def test_a_schema_holds_the_answer(world: World) -> None:
    text = {"format": {"type": "json_schema", "name": "place", "strict": True, "schema": SCHEMA}, "verbosity": "low"}
    answer = await respond(world, text=text)
    assert json.loads(world.decode.requests[-1].sampling.grammar.json_schema) == SCHEMA
    assert answer["text"] == text
    await respond(world, text={"format": {"type": "json_object"}})
    assert json.loads(world.decode.requests[-1].sampling.grammar.json_schema) == {"type": "object"}
    assert (await respond(world, text={"verbosity": "low"}))["text"]["format"] == {"type": "text"}
    assert not world.decode.requests[-1].sampling.HasField("grammar")


async def test_effort_is_the_templates(glm_world: World) -> None:
    for effort in ("none", "high"):
        answer = await respond(glm_world, reasoning={"effort": effort, "summary": "auto"})
        assert answer["reasoning"] == {"effort": effort, "summary": None}
        said_by_chat = await chat_prompt(glm_world, {"role": "user", "content": "hello"}, reasoning_effort=effort)
        assert await prompt(glm_world, reasoning={"effort": effort}) == said_by_chat


async def test_vllms_additions_are_passed_on(world: World) -> None:
    additions = {"top_k": 7, "min_p": 0.25, "seed": 5, "stop_token_ids": [9], "min_tokens": 1, "priority": 3}
    await respond(world, **additions, repetition_penalty=1.5, presence_penalty=0.5, ignore_eos=True)
    sampling = world.decode.requests[-1].sampling
    assert (sampling.top_k, sampling.min_p, sampling.seed, list(sampling.stop_token_ids)) == (7, 0.25, 5, [9])
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.ignore_eos) == (1.5, 0.5, True)
    assert world.router.requests[-1].priority == -3
    await world.says("hello STOP world")
    assert said((await respond(world, stop=["STOP"]))["output"][0]) == ("message", "hello ")


async def test_log_probabilities_are_those_of_the_message(world: World, glm_world: World) -> None:
    await world.says("hello world", logprobs=True)
    answer = await respond(world, include=LOGPROBS, top_logprobs=2)
    found = answer["output"][0]["content"][0]["logprobs"]
    assert [(entry["token"], entry["bytes"]) for entry in found] == [
        ("hello", list(b"hello")),
        (" world", list(b" world")),
    ]
    assert found[0]["top_logprobs"][0] == {"token": "hello", "logprob": -0.5, "bytes": list(b"hello")}
    assert world.decode.requests[0].sampling.num_logprobs == 2
    await glm_world.says(f"the world</think>hello{CALL}the", logprobs=True)
    _, first, _, second = (await respond(glm_world, tools=FUNCTIONS, include=LOGPROBS))["output"]
    for item, text in ((first, "hello"), (second, "the")):
        assert "".join(entry["token"] for entry in item["content"][0]["logprobs"]) == text


async def test_what_does_nothing_here_is_accepted(world: World) -> None:
    include = ["reasoning.encrypted_content", "file_search_call.results"]
    nothing = {"prompt_cache_key": "k", "safety_identifier": "s", "service_tier": "auto", "max_tool_calls": 3}
    answer = await respond(world, **nothing, include=include, truncation="disabled", background=False, nonsense=[1])
    assert answer["prompt_cache_key"] == "k"
    assert answer["truncation"] == "disabled"


async def test_null_is_the_same_as_absent(world: World) -> None:
    names = ["instructions", "tools", "tool_choice", "text", "reasoning", "include", "metadata", "previous_response_id"]
    names += ["parallel_tool_calls", "max_output_tokens", "temperature", "truncation", "stream", "background", "n"]
    answer = await respond(world, **dict.fromkeys(names))
    assert (answer["tool_choice"], answer["tools"], answer["parallel_tool_calls"]) == ("auto", [], True)


async def test_a_models_own_defaults_are_told(world: World) -> None:
    world.directory.models[0].text.defaults["temperature"] = 0.6  # type: ignore[index]
    assert (await respond(world))["temperature"] == 0.6


async def test_input_is_counted_as_it_would_be_asked(glm_world: World) -> None:
    fields = {"instructions": "Be.", "tools": FUNCTIONS, "reasoning": {"effort": "none"}}
    num_tokens = (await respond(glm_world, **fields))["usage"]["input_tokens"]
    counted = await glm_world.http.post(f"{PATH}/input_tokens", json=asked(**fields))
    assert counted.json() == {"object": "response.input_tokens", "input_tokens": num_tokens}


async def test_a_fault_before_the_first_token_has_its_status(world: World) -> None:
    world.router.fault = Overloaded("full", metadata={"retry_after_ms": "2500"})
    for streaming in (False, True):
        response = await world.http.post(PATH, json=asked(stream=streaming))
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        assert response.json()["error"]["code"] == "overloaded"


async def test_answers_are_counted_by_their_path(world: World) -> None:
    await respond(world)
    text = (await world.http.get("/metrics")).text
    assert 'path="/v1/responses",status="200"' in text
