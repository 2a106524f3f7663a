"""A response as a stream: its events, in their order, and that they add up to what a whole one says."""

import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from protos.forebay.v1 import decode_pb2
from shared.errors import Overloaded, WorkerLost
from tests.unit.gateway.test_responses import FUNCTIONS, LOGPROBS, PATH, asked, respond, said
from tests.unit.gateway.test_tool_calls import ARGUMENTS, CALL, OUTPUT
from tests.unit.gateway.world import Response, World, finished, tokens

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
Event = dict[str, Any]


async def stream(world: World, **fields: Any) -> list[Event]:
    """The events, each of OpenAI's own form, named and numbered."""
    response = await world.http.post(PATH, json=asked(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, end = response.text.split("\n\n")
    assert end == ""
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        EVENT.validate_python(event)
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", number)
        events.append(event)
    return events


def types(events: Sequence[Event]) -> list[str]:
    """Those of events, without what all begin with; of equal ones behind each other one."""
    found: list[str] = []
    for event in events:
        name = event["type"].removeprefix("response.")
        if found[-1:] != [name]:
            found.append(name)
    return found


def added_up(events: Sequence[Event]) -> list[Any]:
    """The items that the deltas of a stream make, as `said` has them."""
    items: list[Event] = []
    for event in events:
        match event["type"]:
            case "response.output_item.added":
                assert event["output_index"] == len(items)
                items.append(event["item"] | {"text": ""})
            case "response.output_text.delta" | "response.reasoning_text.delta":
                assert event["item_id"] == items[-1]["id"]
                items[-1]["text"] += event["delta"]
            case "response.function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
    return [said(item if "arguments" in item else item | {"content": [{"text": item["text"]}]}) for item in items]


def logprobs_of(items: Sequence[Event]) -> list[Any]:
    return [part["logprobs"] for item in items if item["type"] == "message" for part in item["content"]]


async def test_a_text(world: World) -> None:
    events = await stream(world)
    assert types(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["delta"] for event in events if "delta" in event] == ["hello", " world"]
    first, last = events[0]["response"], events[-1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert (last["status"], last["id"], last["usage"]["output_tokens"]) == ("completed", first["id"], 2)
    assert events[-2]["item"] == last["output"][0]


async def test_thoughts_text_and_calls(glm_world: World) -> None:
    await glm_world.says(OUTPUT)
    events = await stream(glm_world, tools=FUNCTIONS)
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert types(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        *call,
        *call,
        "completed",
    ]
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [(event["name"], json.loads(event["arguments"])) for event in done] == [("weather", ARGUMENTS)] * 2


@pytest.mark.parametrize("output", [OUTPUT, f"hm</think>{CALL}\nhello <think>\nhm\n</think>{CALL}world"])
async def test_any_chunks_of_tokens_give_the_same_items_streamed_or_whole(glm_world: World, output: str) -> None:
    ids = await glm_world.says(output, logprobs=True)
    asked: dict[str, Any] = {"tools": FUNCTIONS, "include": LOGPROBS}
    whole = (await respond(glm_world, **asked))["output"]
    chance = random.Random(0)
    for _ in range(20):
        cuts = sorted(chance.sample(range(1, len(ids)), k=chance.randrange(len(ids))))
        steps = [tokens(*ids[i:j], logprobs=True) for i, j in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
        glm_world.steps = [*steps, finished()]
        events = await stream(glm_world, **asked)
        items = events[-1]["response"]["output"]
        assert added_up(events) == [said(item) for item in items] == [said(item) for item in whole]
        assert logprobs_of(items) == logprobs_of(whole)
        assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == items


async def test_log_probabilities_come_with_their_text(world: World) -> None:
    await world.says("hello\u00e9 STOP", logprobs=True)
    events = await stream(world, include=LOGPROBS, stop=["STOP"])
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == "hello\u00e9 "
    one_by_one = [entry for event in deltas for entry in event["logprobs"]]
    assert b"".join(bytes(entry["bytes"]) for entry in one_by_one) == "hello\u00e9 STOP".encode()
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == one_by_one == events[-1]["response"]["output"][0]["content"][0]["logprobs"]


async def test_a_text_that_a_stop_string_cuts_off_whole_is_none(world: World) -> None:
    await world.says("STOP", logprobs=True)
    events = await stream(world, include=LOGPROBS, stop=["STOP"])
    assert [said(item) for item in events[-1]["response"]["output"]] == [("message", "")]


async def test_a_limit_ends_it_incomplete(world: World) -> None:
    await world.says("hello world", reason="LENGTH")
    *_, item, last = await stream(world)
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["usage"]["output_tokens"] == 2
    assert (item["type"], item["item"]["status"]) == ("response.output_item.done", "incomplete")


@pytest.mark.parametrize(
    ("then", "told", "known"),
    [(None, "worker_lost", "server_error"), (Overloaded("full"), "overloaded", "rate_limit_exceeded")],
    ids=["nobody goes on", "all others are full"],
)
async def test_a_fault_amid_it_is_an_error_and_ends_it_failed(
    world: World, then: Overloaded | None, told: str, known: str
) -> None:
    async def script(_request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(40)
        world.router.fault = then
        raise WorkerLost("gone")

    world.decode.script = script
    world.dispatcher._recovery_wait_s = 0.0
    *_, error, last = await stream(world)
    assert (error["type"], error["code"]) == ("error", told)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": known, "message": error["message"]}
    [item] = last["response"]["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", world.tokenizer.decode([40]))


async def test_a_worker_that_is_lost_amid_it_leaves_no_seam(glm_world: World) -> None:
    ids = await glm_world.says(OUTPUT)
    expected = [said(item) for item in (await respond(glm_world, tools=FUNCTIONS))["output"]]

    async def lost(_request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(*ids[:9])
        raise WorkerLost("gone")

    async def other(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(*ids[len(request.output_token_ids) :])
        yield finished()

    await glm_world.start_decode("decode-1")
    glm_world.decode.script, glm_world.decodes["decode-1"].script = lost, other
    assert added_up(await stream(glm_world, tools=FUNCTIONS)) == expected
