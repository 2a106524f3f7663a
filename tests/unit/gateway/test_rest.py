"""The REST face: bodies, streams, usage, token ids, log-probabilities."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from protos.forebay.v1 import decode_pb2
from shared import page_hash
from shared.errors import Overloaded, WorkerLost
from tests.unit.gateway.world import MODEL, Response, World, finished, tokens


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello", **fields}


async def post(world: World, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = await world.http.post(f"/v1/{path}", json=body, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(world: World, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await world.http.post(f"/v1/{path}", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return [json.loads(event) for event in events[:-2]]


async def test_a_chat_is_answered(world: World) -> None:
    await world.says("hello world!", num_cached=4)
    answer = await post(world, "chat/completions", chat())
    [choice] = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "hello world!", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["system_fingerprint"] == "fp_0123456789abcdef"
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_the_prompt_of_a_chat_is_what_the_template_makes(world: World) -> None:
    await post(world, "chat/completions", chat())
    ids = list(world.decode.requests[0].prompt_token_ids)
    assert world.tokenizer.decode(ids) == "<|user|>hello<|assistant|>"


async def test_text_parts_are_joined(world: World) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": " world"}]
    await post(world, "chat/completions", chat(messages=[{"role": "user", "content": parts}]))
    ids = list(world.decode.requests[0].prompt_token_ids)
    assert world.tokenizer.decode(ids) == "<|user|>hello\n world<|assistant|>"


async def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(world: World) -> None:
    await world.says("hello world", reason="LENGTH")
    chunks = await stream(world, "chat/completions", chat())
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "hello"},
        {"content": " world"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_in_a_chunk_of_its_own_and_is_null_in_the_others(world: World) -> None:
    chunks = await stream(world, "chat/completions", chat(stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_a_completion_stream_says_what_the_whole_one_says(world: World) -> None:
    await world.says("hello \U0001f600 the world")
    whole = await post(world, "completions", completion())
    chunks = await stream(world, "completions", completion())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert whole["choices"][0]["text"] == "hello \U0001f600 the world"
    assert whole["object"] == chunks[0]["object"] == "text_completion"


@pytest.mark.parametrize("prompt", [[7, 8, 9], [[7, 8, 9]]])
async def test_a_prompt_of_token_ids_is_passed_on_as_it_is(world: World, prompt: object) -> None:
    answer = await post(world, "completions", completion(prompt=prompt))
    assert list(world.decode.requests[0].prompt_token_ids) == [7, 8, 9]
    assert answer["usage"]["prompt_tokens"] == 3


async def test_choices_of_a_batch_are_numbered_prompt_by_prompt(world: World) -> None:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(request.prompt_token_ids[0])
        yield finished()

    world.decode.script = script
    body = completion(prompt=[[40], [41]], n=2, return_token_ids=True)
    answer = await post(world, "completions", body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in answer["choices"]] == [[40], [40], [41], [41]]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[40], [40], [41], [41]]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 4


async def test_outputs_of_one_prompt_have_seeds_of_their_own(world: World) -> None:
    await post(world, "completions", completion(n=3, seed=7))
    seeds = {request.sampling.seed for request in world.decode.requests}
    assert len(seeds) == 3
    assert 7 in seeds


async def test_a_request_without_a_seed_gets_one(world: World) -> None:
    await post(world, "completions", completion())
    await post(world, "completions", completion())
    assert len({request.sampling.seed for request in world.decode.requests}) == 2


async def test_token_ids_of_a_chat_are_returned_where_vllm_has_them(world: World) -> None:
    ids = await world.says("hello world", stop_token_id=0)
    answer = await post(world, "chat/completions", chat(return_token_ids=True))
    assert answer["choices"][0]["token_ids"] == [*ids, 0]
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["prompt_token_ids"] == list(world.decode.requests[0].prompt_token_ids)
    chunks = await stream(world, "chat/completions", chat(return_token_ids=True))
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert [chunk["choices"][0].get("token_ids") for chunk in chunks] == [None, [ids[0]], [ids[1]], [0]]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])


async def test_token_ids_of_a_completion_stream_come_with_its_chunks(world: World) -> None:
    ids = await world.says("hello world")
    chunks = await stream(world, "completions", completion(return_token_ids=True))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["token_ids"] for choice in choices] == [[ids[0]], [ids[1]], []]
    assert choices[0]["prompt_token_ids"] == list(world.decode.requests[0].prompt_token_ids)
    assert "prompt_token_ids" not in choices[1]


async def test_chat_logprobs_have_tokens_bytes_and_alternatives(world: World) -> None:
    await world.says("hello\u00e9", logprobs=True)
    answer = await post(world, "chat/completions", chat(logprobs=True, top_logprobs=2))
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["hello", "\ufffd", "\ufffd"]
    assert [entry["bytes"] for entry in content] == [list(b"hello"), [0xC3], [0xA9]]
    assert content[0]["top_logprobs"][0] == {"token": "hello", "logprob": -0.5, "bytes": list(b"hello")}
    assert len(content[0]["top_logprobs"]) == 2
    assert world.decode.requests[0].sampling.num_logprobs == 2


async def test_completion_logprobs_have_the_older_form(world: World) -> None:
    await world.says("hello world", logprobs=True)
    answer = await post(world, "completions", completion(logprobs=1))
    found = answer["choices"][0]["logprobs"]
    assert found["tokens"] == ["hello", " world"]
    assert found["token_logprobs"] == [-0.5, -0.5]
    assert found["text_offset"] == [0, 5]
    assert found["top_logprobs"][0]["hello"] == -0.5
    chunks = await stream(world, "completions", completion(logprobs=1))
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [5], []]


async def test_an_echo_repeats_the_prompt(world: World) -> None:
    answer = await post(world, "completions", completion(echo=True))
    assert answer["choices"][0]["text"] == "hellohello world"
    chunks = await stream(world, "completions", completion(prompt=await world.says("hello"), echo=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hellohello"


async def test_an_echo_alone_needs_no_worker(world: World) -> None:
    answer = await post(world, "completions", completion(echo=True, max_tokens=0))
    assert answer["choices"][0]["text"] == "hello"
    assert answer["usage"]["completion_tokens"] == 0
    assert not world.decode.requests


async def test_a_stop_string_ends_the_output_before_it_and_cancels_the_worker(world: World) -> None:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        for token_id in await world.tokenizer.encode("hello world STOP more", special=False):
            step = tokens(token_id)
            step.tokens.usage.num_cached_remote = 2
            yield step
        await asyncio.sleep(30)

    world.decode.script = script
    answer = await post(world, "chat/completions", chat(stop=["STOP"]))
    [choice] = answer["choices"]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert choice["message"]["content"] == "hello world "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")
    await asyncio.wait_for(world.decode.idle.wait(), 5)


async def test_a_stop_string_is_never_shown_in_part(world: World) -> None:
    await world.says("hello ST")
    chunks = await stream(world, "completions", completion(stop="STOP"))
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "hello ST"
    assert "S" not in "".join(texts[:-1])


async def test_a_stop_token_that_was_asked_for_is_the_stop_reason(world: World) -> None:
    await world.says("hello", stop_token_id=5)
    answer = await post(world, "completions", completion(stop_token_ids=[5]))
    assert answer["choices"][0]["stop_reason"] == 5


async def test_stop_strings_do_not_count_before_min_tokens(world: World) -> None:
    await world.says("hello hello hello")
    answer = await post(world, "completions", completion(stop="hello", min_tokens=2, max_tokens=9))
    assert answer["choices"][0]["text"].startswith("hello")


async def test_limits_default_to_the_room_in_the_context(world: World) -> None:
    await post(world, "chat/completions", chat())
    await post(world, "completions", completion())
    assert [request.sampling.max_tokens for request in world.decode.requests] == [197, 16]


async def test_page_hashes_are_keyed_by_tenant_and_salt(world: World) -> None:
    prompt = list(range(40, 50))
    for salt, tenant in [(None, "a"), (None, "b"), ("s", "a")]:
        await post(world, "completions", completion(prompt=prompt, cache_salt=salt), **{"X-Forebay-Tenant": tenant})
    hashes = [request.page_hashes for request in world.router.requests]
    assert hashes[0] == page_hash.join(page_hash.chain(page_hash.tenant_key("a"), prompt, 4))
    assert len(hashes[0]) == 2 * page_hash.HASH_BYTES
    assert len(set(hashes)) == 3
    assert world.decode.requests[0].hash_key == page_hash.tenant_key("a")


async def test_the_request_id_of_the_client_is_kept(world: World) -> None:
    response = await world.http.post("/v1/completions", json=completion(), headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    assert world.decode.requests[0].request_id.startswith("mine-1-")
    assert len((await world.http.get("/health", headers={"X-Request-Id": "not ok"})).headers["x-request-id"]) == 32


async def test_a_request_id_that_clients_repeat_is_unique_for_workers(world: World) -> None:
    for _ in range(2):
        await post(world, "completions", completion(), **{"X-Request-Id": "same"})
    first, second = world.decode.requests
    assert first.request_id != second.request_id


async def test_a_model_without_a_tokenizer_is_served_by_token_ids(textless: World) -> None:
    textless.steps = [tokens(7, logprobs=True), finished()]
    answer = await post(textless, "completions", completion(prompt=[1, 2], return_token_ids=True, logprobs=0))
    [choice] = answer["choices"]
    assert (choice["text"], choice["token_ids"]) == ("", [7])
    assert choice["logprobs"]["tokens"] == ["token_id:7"]
    for path, body in [("completions", completion()), ("chat/completions", chat())]:
        response = await textless.http.post(f"/v1/{path}", json=body)
        assert response.status_code == 400
        assert "has no tokenizer" in response.json()["error"]["message"]


async def test_models_are_listed_and_described(world: World) -> None:
    listed = (await world.http.get("/v1/models")).json()
    assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [(MODEL, 200)]
    assert (await world.http.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL
    assert (await world.http.get("/v1/models/other")).status_code == 404


async def test_a_fault_before_the_first_token_has_its_status(world: World) -> None:
    world.router.fault = Overloaded("full", metadata={"retry_after_ms": "2500"})
    for streaming in (False, True):
        response = await world.http.post("/v1/completions", json=completion(stream=streaming))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"] == {
            "message": "full",
            "type": "rate_limit_error",
            "param": None,
            "code": "overloaded",
        }


async def test_a_fault_after_the_first_token_is_an_event(world: World) -> None:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(7)
        raise WorkerLost("gone")

    world.decode.script = script
    world.dispatcher._recovery_wait_s = 0.0
    chunks = await stream(world, "completions", completion())
    assert chunks[-1]["error"]["code"] == "worker_lost"
    assert "after 1 tokens" in chunks[-1]["error"]["message"]
    response = await world.http.post("/v1/completions", json=completion())
    assert response.status_code == 503


async def test_a_request_past_its_deadline_is_cancelled(world: World) -> None:
    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        await asyncio.sleep(30)
        yield tokens(7)

    world.decode.script = script
    headers = {"X-Forebay-Timeout-Ms": "100"}
    response = await world.http.post("/v1/completions", json=completion(), headers=headers)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline"
    await asyncio.wait_for(world.decode.idle.wait(), 5)


async def test_health_has_a_reason_when_nothing_can_be_served(world: World) -> None:
    assert (await world.http.get("/health")).json() == {"status": "ok", "models": [MODEL]}
    routers = [r for r in world.registrations if r.role == "router"]
    await world.directory.update(routers)
    response = await world.http.get("/health")
    assert (response.status_code, response.json()["reason"]) == (503, "no decode worker is registered")
    await world.directory.update([r for r in world.registrations if r.role == "decode"])
    assert (await world.http.get("/health")).json()["reason"] == "no router is registered"


async def test_a_draining_gateway_refuses_requests(world: World) -> None:
    world.core.drain()
    assert (await world.http.get("/health")).status_code == 503
    response = await world.http.post("/v1/completions", json=completion())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")


async def test_metrics_count_requests_by_outcome(world: World) -> None:
    await post(world, "completions", completion())
    text = (await world.http.get("/metrics")).text
    assert "forebay_gateway_requests_total{" in text
    assert 'outcome="OK"' in text


async def test_the_page_is_served(world: World) -> None:
    response = await world.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "://" not in response.text  # it needs nothing from elsewhere
