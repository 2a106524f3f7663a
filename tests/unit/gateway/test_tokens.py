"""Text to tokens and back over REST, an answer that goes on with what the assistant began, and small facts."""

from importlib import metadata
from typing import Any

import pytest

from tests.unit.gateway.world import MAX_MODEL_LEN, MODEL, World

HELLO = {"role": "user", "content": "hello"}


async def test_tokenize_says_what_a_completion_would_begin_with(world: World) -> None:
    answer = (await world.http.post("/tokenize", json={"model": MODEL, "prompt": "hello world"})).json()
    await world.http.post("/v1/completions", json={"prompt": "hello world"})
    assert answer["tokens"] == list(world.decode.requests[0].prompt_token_ids)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), MAX_MODEL_LEN)
    assert answer["token_strs"] is None


async def test_tokenize_says_what_a_chat_would_begin_with(world: World) -> None:
    answer = (await world.http.post("/tokenize", json={"messages": [HELLO], "return_token_strs": True})).json()
    await world.http.post("/v1/chat/completions", json={"messages": [HELLO]})
    assert answer["tokens"] == list(world.decode.requests[0].prompt_token_ids)
    assert "".join(answer["token_strs"]) == "<|user|>hello<|assistant|>"


async def test_detokenize_undoes_tokenize(world: World) -> None:
    ids = (await world.http.post("/tokenize", json={"prompt": "hello \U0001f600"})).json()["tokens"]
    assert (await world.http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": "hello \U0001f600"}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "give either 'prompt', a string, or 'messages'"),
        ("/tokenize", {"prompt": "x", "messages": [HELLO]}, "give either 'prompt', a string, or 'messages'"),
        ("/tokenize", {"prompt": ["x"]}, "'prompt' must be a string, not an array"),
        ("/tokenize", {"model": "other", "prompt": "x"}, "The model 'other' does not exist"),
        ("/detokenize", {}, "'tokens' is missing"),
        ("/detokenize", {"tokens": [-1]}, "'tokens' must be at least 0"),
        ("/detokenize", {"tokens": [10**6]}, "and at most"),
        ("/detokenize", {"tokens": ["x"]}, "'tokens' must be an integer, not a string"),
    ],
)
async def test_what_cannot_be_converted_is_told(world: World, path: str, body: dict[str, Any], words: str) -> None:
    response = await world.http.post(path, json=body)
    assert response.status_code in {400, 404}
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("begun", ["hello wor", "hello ", "t", " "])
async def test_an_answer_goes_on_with_what_the_assistant_began(world: World, begun: str) -> None:
    messages = [HELLO, {"role": "assistant", "content": begun}]
    response = await world.http.post(
        "/v1/chat/completions", json={"messages": messages, "continue_final_message": True}
    )
    assert response.status_code == 200, response.text
    ids = list(world.decode.requests[0].prompt_token_ids)
    assert world.tokenizer.decode(ids) == f"<|user|>hello<|user|>{begun}"  # so this template calls everybody


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [HELLO]}, "needs a last message of the assistant's"),
        ({"messages": [HELLO, {"role": "assistant", "content": ""}]}, "needs a last message of the assistant's"),
        ({"messages": [HELLO, {"role": "assistant", "content": "x"}], "add_generation_prompt": True}, "either begins"),
    ],
)
async def test_an_answer_without_a_beginning_cannot_go_on(world: World, fields: dict[str, Any], words: str) -> None:
    response = await world.http.post("/v1/chat/completions", json=fields | {"continue_final_message": True})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


async def test_the_version_is_told_and_a_slash_at_the_end_is_forgiven(world: World) -> None:
    assert (await world.http.get("/version/")).json() == {"version": metadata.version("forebay")}
    assert (await world.http.get("/v1/models/")).json()["object"] == "list"
    assert (await world.http.get(f"/v1/models/{MODEL}/")).json()["id"] == MODEL
