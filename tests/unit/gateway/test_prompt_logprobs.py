"""Log-probabilities of prompts as clients get them: with an echo as OpenAI writes them, alone as vLLM does."""

from collections.abc import AsyncIterator, Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from protos.forebay.v1 import decode_pb2, gateway_pb2, gateway_pb2_grpc, generation_pb2
from services.gateway import logprobs
from services.gateway.logprobs import TokenNames
from services.gateway.tokenizer import Tokenizer
from shared import rpc
from tests.unit.gateway.test_rest import chat, completion, post, stream
from tests.unit.gateway.tiny_tokenizers import byte_fallback, byte_level
from tests.unit.gateway.world import Response, Script, World, finished, tokens

TEXT = "hello world!"  # three tokens


def told(token_id: int, rank: int = 3) -> generation_pb2.TokenLogprobs:
    """Of a token of a prompt: tokens 3 and 4 are the most likely ones."""
    return generation_pb2.TokenLogprobs(
        logprob=-float(token_id), rank=rank, top_token_ids=[3, 4], top_logprobs=[-0.25, -0.5]
    )


def says(token_id: int, stop_token_id: int | None = None) -> Script:
    """Of each prompt what is asked for, a message for each token, and then an output of one token, at most."""

    async def script(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        if request.sampling.HasField("num_prompt_logprobs"):
            for each in request.prompt_token_ids[max(1, request.num_prompt_logprobs_held) :]:
                yield Response(prompt_logprobs=generation_pb2.PromptLogprobs(logprobs=[told(each)]))
        if request.sampling.max_tokens:
            yield tokens(token_id, logprobs=request.sampling.HasField("num_logprobs"))
        last = finished("LENGTH" if stop_token_id is None else "STOP", stop_token_id)
        if stop_token_id is not None:
            last.finished.stop_logprobs.CopyFrom(told(stop_token_id, 0))
        yield last

    return script


@pytest.fixture
async def ids(world: World) -> list[int]:
    world.decode.script = says(65)
    found = await world.tokenizer.encode(TEXT, special=False)
    assert len(found) == 3
    return found


async def test_an_echo_has_the_prompts_log_probabilities_before_the_outputs(world: World, ids: list[int]) -> None:
    answer = await post(world, "completions", completion(prompt=TEXT, echo=True, logprobs=1, max_tokens=1))
    [choice] = answer["choices"]
    own, first = world.tokenizer.decode([65]), world.tokenizer.decode([3])
    assert choice["text"] == TEXT + own
    assert choice["logprobs"] == {
        "tokens": ["hello", " world", "!", own],
        "token_logprobs": [None, -ids[1], -ids[2], -0.5],
        "top_logprobs": [None, {first: -0.25, " world": -ids[1]}, {first: -0.25, "!": -ids[2]}, {own: -0.5}],
        "text_offset": [0, 5, 11, 12],
    }
    assert "prompt_logprobs" not in choice


async def test_a_prompt_alone_is_asked_of_a_worker_and_has_no_output(world: World, ids: list[int]) -> None:
    answer = await post(world, "completions", completion(prompt=ids, echo=True, logprobs=1, max_tokens=0))
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -ids[1], -ids[2]]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 0)
    [request] = world.decode.requests
    assert (request.sampling.num_prompt_logprobs, request.sampling.max_tokens) == (1, 0)


async def test_a_stream_begins_with_the_echo(world: World, ids: list[int]) -> None:
    body = completion(prompt=TEXT, echo=True, logprobs=1, max_tokens=1)
    [whole] = (await post(world, "completions", body))["choices"]
    pieces = [chunk["choices"][0] for chunk in await stream(world, "completions", body)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert len(pieces[0]["logprobs"]["tokens"]) == 4
    for name, values in whole["logprobs"].items():
        assert [*chain.from_iterable(piece["logprobs"][name] for piece in pieces)] == values


async def test_prompt_logprobs_are_by_token_id_with_ranks(world: World, ids: list[int]) -> None:
    answer = await post(world, "completions", completion(prompt=TEXT, prompt_logprobs=2, max_tokens=1))
    [choice] = answer["choices"]
    names = [world.tokenizer.decode([token_id]) for token_id in (3, 4)]
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        *(
            {
                str(token_id): {"logprob": -token_id, "rank": 3, "decoded_token": text},
                "3": {"logprob": -0.25, "rank": 1, "decoded_token": names[0]},
                "4": {"logprob": -0.5, "rank": 2, "decoded_token": names[1]},
            }
            for token_id, text in zip(ids[1:], (" world", "!"), strict=True)
        ),
    ]


async def test_a_chat_has_those_of_what_its_template_made(world: World, ids: list[int]) -> None:
    answer = await post(world, "chat/completions", chat(prompt_logprobs=0))
    prompt = list(world.decode.requests[0].prompt_token_ids)
    assert [*answer["prompt_logprobs"][1]] == [str(prompt[1])]
    assert len(answer["prompt_logprobs"]) == len(prompt)
    assert "prompt_logprobs" not in answer["choices"][0]


async def test_an_echo_and_prompt_logprobs_each_have_as_many_as_they_ask_for(world: World, ids: list[int]) -> None:
    body = completion(prompt=TEXT, echo=True, logprobs=0, prompt_logprobs=1, max_tokens=0)
    [choice] = (await post(world, "completions", body))["choices"]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1, 1]
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [2, 2]
    assert world.decode.requests[0].sampling.num_prompt_logprobs == 1


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("streams", [False, True])
async def test_every_output_of_a_prompt_repeats_it_and_one_computes_it(
    max_tokens: int, streams: bool, world: World, ids: list[int]
) -> None:
    body = completion(prompt=[ids, ids[:2]], n=2, echo=True, logprobs=1, max_tokens=max_tokens)
    if streams:
        chunks = await stream(world, "completions", body)
        firsts: dict[int, Any] = {}
        for chunk in chunks:
            firsts.setdefault(chunk["choices"][0]["index"], chunk["choices"][0])
        choices = [firsts[index] for index in sorted(firsts)]
    else:
        choices = (await post(world, "completions", body))["choices"]
    found = [choice["logprobs"]["token_logprobs"][: 3 if i < 2 else 2] for i, choice in enumerate(choices)]
    assert found == [[None, -ids[1], -ids[2]]] * 2 + [[None, -ids[1]]] * 2
    tells = [request.sampling.HasField("num_prompt_logprobs") for request in world.decode.requests]
    assert (sum(tells), len(tells)) == (2, 2 + 2 * max_tokens)


async def test_much_of_a_prompt_is_written_beside_other_requests(world: World, ids: list[int]) -> None:
    body = completion(prompt=[ids * 66] * 8, n=2, echo=True, logprobs=2, max_tokens=0)
    choices = (await post(world, "completions", body))["choices"]
    assert [len(choice["logprobs"]["token_logprobs"]) for choice in choices] == [198] * 16


async def test_a_prompt_of_one_token_has_nothing_to_tell(world: World, ids: list[int]) -> None:
    answer = await post(world, "completions", completion(prompt=ids[:1], echo=True, logprobs=3, max_tokens=0))
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None]


async def test_a_stop_token_counts_as_a_token_of_a_completion_but_not_of_a_message(
    world: World, ids: list[int]
) -> None:
    """Who measures a continuation leaves the last entry out, whatever the model went on with."""
    world.decode.script = says(65, stop_token_id=7)
    answer = await post(world, "completions", completion(prompt=TEXT, echo=True, logprobs=1, max_tokens=9))
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -ids[1], -ids[2], -0.5, -7]
    answer = await post(world, "chat/completions", chat(logprobs=True))
    assert len(answer["choices"][0]["logprobs"]["content"]) == 1


async def test_nothing_cached_is_asked_for_before_it_is_told(world: World, ids: list[int]) -> None:
    for fields in ({"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}, {"echo": True}):
        await post(world, "completions", completion(prompt=ids * 4, max_tokens=1, **fields))
    assert [bool(route.page_hashes) for route in world.router.requests] == [False, False, True]


async def test_a_worker_that_does_not_tell_is_not_believed(world: World, ids: list[int]) -> None:
    await world.says("hello")
    world.decode.script = world.script
    response = await world.http.post("/v1/completions", json=completion(prompt=TEXT, prompt_logprobs=1))
    assert response.status_code == 500
    assert "without log-probabilities of the prompt" in response.json()["error"]["message"]


async def test_token_ids_name_tokens_where_there_is_no_text(textless: World) -> None:
    textless.decode.script = says(65)
    answer = await post(textless, "completions", completion(prompt=[7, 8], echo=True, logprobs=1, max_tokens=0))
    assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:7", "token_id:8"]


async def test_grpc_tells_of_the_prompt_before_the_output(world: World, ids: list[int]) -> None:
    stub: Any = gateway_pb2_grpc.GatewayServiceStub(world.channels.to(await world.start_grpc()))
    options = gateway_pb2.GenerationOptions(num_prompt_logprobs=2, max_tokens=0)
    request = gateway_pb2.CompleteRequest(options=options, text=TEXT)
    *deltas, last = [response async for response in rpc.stream(stub.Complete, request, 10)]
    entries = [entry for response in deltas for entry in response.delta.prompt_logprobs]
    assert [(entry.logprob, entry.rank, list(entry.top_token_ids)) for entry in entries] == [
        (-ids[1], 3, [3, 4]),
        (-ids[2], 3, [3, 4]),
    ]
    assert deltas[-1].delta.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    assert last.finished.usage.num_output_tokens == 0
    chats = gateway_pb2.ChatRequest(options=gateway_pb2.GenerationOptions(num_prompt_logprobs=0))
    chats.messages.add(role="user", content="hello")
    told_of_chat = [response async for response in rpc.stream(stub.Chat, chats, 10)]
    assert sum(len(response.delta.prompt_logprobs) for response in told_of_chat) == 2


def test_of_two_tokens_that_are_written_alike_the_likelier_stays(tmp_path: Path) -> None:
    """Else one could look like the most likely without being it."""
    names = _names(tmp_path, byte_level)
    halves = [token_id for token_id in range(256) if names(token_id)[0] == "�"][:2]
    likelier = generation_pb2.TokenLogprobs(logprob=-3, rank=2, top_token_ids=halves[:1], top_logprobs=[-1])
    found = logprobs.for_completion(names, [halves[1]], [likelier], 0, 1)
    assert (found["token_logprobs"], found["top_logprobs"]) == ([-3], [{"�": -1}])


def test_what_opens_a_prompt_without_being_in_its_text_begins_where_it_begins(tmp_path: Path) -> None:
    names = _names(tmp_path, byte_fallback)
    with_space = logprobs.echoed(names, [259, 260], [told(260)], "hi you", 0)
    assert (with_space["tokens"], with_space["text_offset"]) == ([" hi", " you"], [0, 2])


def _names(folder: Path, tokenizer: Callable[[], Any]) -> TokenNames:
    path = folder / "tokenizer.json"
    tokenizer().save(str(path))
    return TokenNames(Tokenizer(path), as_ids=False)
