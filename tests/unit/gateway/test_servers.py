"""Real servers on loopback: the official client, clients that go away, the gRPC face."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from google.protobuf import struct_pb2
from grpc import StatusCode, aio

from protos.forebay.v1 import decode_pb2, gateway_pb2, gateway_pb2_grpc, generation_pb2
from services.gateway.process import listen, text_paths
from shared import rpc
from shared.errors import InvalidRequest, ModelNotFound, Unsupported, WorkerLost
from tests.unit.gateway.world import MODEL, Response, World, finished, served, tokens


@pytest.fixture
async def url(world: World) -> AsyncIterator[str]:
    async with served(world) as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def forever(request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
    yield tokens(40)
    await asyncio.sleep(30)


async def test_the_official_client_streams_a_chat(world: World, client: openai.AsyncOpenAI) -> None:
    await world.says("hello \U0001f600 world!")
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "hello \U0001f600 world!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None


async def test_the_official_client_reads_whole_answers_and_models(world: World, client: openai.AsyncOpenAI) -> None:
    await world.says("hello", logprobs=True)
    chat = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].message.content == "hello"
    assert chat.choices[0].logprobs is not None
    completion = await client.completions.create(model=MODEL, prompt=["hello", "hello"], n=2)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert [model.id for model in (await client.models.list()).data] == [MODEL]


async def test_the_official_client_raises_its_own_errors(world: World, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model=MODEL, prompt="x", temperature=9)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_request")


async def test_the_official_client_raises_a_fault_amid_a_stream(world: World, client: openai.AsyncOpenAI) -> None:
    world.steps = [tokens(40)]
    world.dispatcher._recovery_wait_s = 0.0
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="was lost after 1 tokens"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
async def test_a_client_that_leaves_a_stream_cancels_the_worker(world: World, url: str, path: str) -> None:
    world.decode.script = forever
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    body = {"stream": True} | {"completions": {"prompt": "hello"}, "responses": {"input": "hello"}}.get(path, chat)
    async with httpx.AsyncClient() as http, http.stream("POST", f"{url}/v1/{path}", json=body) as response:
        async for _ in response.aiter_bytes():
            break
    await asyncio.wait_for(world.decode.idle.wait(), 5)


async def test_a_client_that_leaves_while_waiting_cancels_the_worker(world: World, url: str) -> None:
    world.decode.script = forever
    async with httpx.AsyncClient() as http:
        waiting = asyncio.create_task(http.post(f"{url}/v1/completions", json={"prompt": "hello"}))
        await asyncio.wait_for(world.decode.busy.wait(), 5)
        waiting.cancel()
    await asyncio.wait_for(world.decode.idle.wait(), 5)
    await asyncio.wait_for(world.core.idle(), 5)


async def test_an_api_key_tells_the_tenant(world: World) -> None:
    async with served(world, "--api-key", "k1=ada", "--api-key", "k2=bob") as base, httpx.AsyncClient() as http:
        url = f"{base}/v1/completions"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "k1"}):
            response = await http.post(url, json={"prompt": "x"}, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        headers = {"Authorization": "Bearer k2", "X-Forebay-Tenant": "ada"}
        assert (await http.post(url, json={"prompt": "x"}, headers=headers)).status_code == 200
    assert [request.tenant for request in world.router.requests] == ["bob"]


async def test_an_api_key_may_be_nobodys_in_particular(world: World) -> None:
    async with served(world, "--api-key", "k1") as base, httpx.AsyncClient() as http:
        url, body = f"{base}/v1/completions", {"prompt": "x"}
        assert (await http.post(url, json=body, headers={"X-Forebay-Tenant": "ada"})).status_code == 401
        headers = {"Authorization": "Bearer k1", "X-Forebay-Tenant": "ada"}
        assert (await http.post(url, json=body, headers=headers)).status_code == 200
    assert [request.tenant for request in world.router.requests] == ["ada"]


async def test_grpc_asks_for_the_same_keys(world: World) -> None:
    address = await world.start_grpc("k1=ada")
    request = gateway_pb2.CompleteRequest(text="hello", options=gateway_pb2.GenerationOptions(tenant="bob"))
    async with aio.insecure_channel(address) as channel:
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)
        for metadata in (None, [("authorization", "Bearer wrong")]):
            with pytest.raises(aio.AioRpcError, match="send a valid API key") as refused:
                await stub.ListModels(gateway_pb2.ListModelsRequest(), metadata=metadata)
            assert refused.value.code() is StatusCode.UNAUTHENTICATED
            with pytest.raises(aio.AioRpcError, match="send a valid API key"):
                [answer async for answer in stub.Complete(request, metadata=metadata)]
        assert [answer async for answer in stub.Complete(request, metadata=[("authorization", "Bearer k1")])]
    assert [routed.tenant for routed in world.router.requests] == ["ada"]


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


async def test_a_page_may_call_from_a_browser(world: World) -> None:
    origin = {"Origin": "https://app.example"}
    async with served(world) as base, httpx.AsyncClient(base_url=base) as http:
        asked = await http.options("/v1/chat/completions", headers=origin | PREFLIGHT)
        answered = await http.post("/v1/completions", json={"prompt": "x"}, headers=origin)
        plain = await http.post("/v1/completions", json={"prompt": "x"})
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "*")
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert (answered.status_code, answered.headers["access-control-allow-origin"]) == (200, "*")
    assert answered.headers["access-control-expose-headers"] == "x-request-id"
    assert not {"access-control-allow-origin", "vary"} & plain.headers.keys()


async def test_pages_of_other_sites_may_be_kept_out(world: World) -> None:
    async with (
        served(world, "--allow-origin", "https://ours.example") as base,
        httpx.AsyncClient(base_url=base) as http,
    ):
        ours = await http.options("/v1/completions", headers={"Origin": "https://ours.example"} | PREFLIGHT)
        theirs = await http.options("/v1/completions", headers={"Origin": "https://theirs.example"} | PREFLIGHT)
    assert (ours.status_code, ours.headers["access-control-allow-origin"]) == (200, "https://ours.example")
    assert (theirs.status_code, "access-control-allow-origin" in theirs.headers) == (400, False)
    async with served(world, "--allow-origin", "") as base, httpx.AsyncClient(base_url=base) as http:
        nobodys = await http.options("/v1/completions", headers={"Origin": "https://ours.example"} | PREFLIGHT)
    assert (nobodys.status_code, "access-control-allow-origin" in nobodys.headers) == (405, False)


async def test_connections_send_without_delay() -> None:
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    accepted.close()
    listener.close()
    writer.close()
    await writer.wait_closed()


async def test_a_taken_port_is_told() -> None:
    listener = listen("127.0.0.1", 0)
    with pytest.raises(OSError, match="cannot listen"):
        listen("127.0.0.1", listener.getsockname()[1])
    listener.close()


def test_a_model_path_that_is_no_directory_is_told() -> None:
    with pytest.raises(InvalidRequest, match="is not a directory"):
        text_paths(["tiny=/nowhere"])


class Grpc:
    """A client of the gRPC face."""

    def __init__(self, world: World, address: str) -> None:
        self.stub: Any = gateway_pb2_grpc.GatewayServiceStub(world.channels.to(address))

    async def chat(self, request: gateway_pb2.ChatRequest) -> list[gateway_pb2.ChatResponse]:
        return [response async for response in rpc.stream(self.stub.Chat, request)]

    async def complete(self, **options: Any) -> list[gateway_pb2.CompleteResponse]:
        request = gateway_pb2.CompleteRequest(
            options=gateway_pb2.GenerationOptions(**options), token_ids=gateway_pb2.TokenIds(ids=[40, 41])
        )
        return [response async for response in rpc.stream(self.stub.Complete, request)]


@pytest.fixture
async def grpc(world: World) -> Grpc:
    return Grpc(world, await world.start_grpc())


async def test_grpc_chats_as_rest_does(world: World, grpc: Grpc) -> None:
    await world.says("hello world", num_cached=2)
    arguments = struct_pb2.Struct()
    arguments.update({"thinking": True})
    message = gateway_pb2.ChatMessage(role="user", content="hello")
    options = gateway_pb2.GenerationOptions(seed=1 << 63, temperature=0, tenant="ada")
    request = gateway_pb2.ChatRequest(options=options, messages=[message], chat_template_kwargs=arguments)
    *deltas, last = await grpc.chat(request)
    assert "".join(response.delta.text for response in deltas) == "hello world"
    assert deltas[-1].delta.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert last.finished.usage.num_output_tokens == 2
    assert last.finished.usage.num_cached_local == 2
    sampling = world.decode.requests[0].sampling
    assert (sampling.seed, sampling.temperature) == (1 << 63, 0)
    assert world.router.requests[0].tenant == "ada"


async def test_grpc_completes_token_ids_and_returns_them(world: World, grpc: Grpc) -> None:
    world.steps = [tokens(50, 51, logprobs=True), finished()]
    first, _, last = await grpc.complete(model=MODEL, return_token_ids=True, num_logprobs=1, n=1)
    assert list(first.delta.token_ids) == [50, 51]
    assert len(first.delta.logprobs) == 2
    assert last.finished.usage.num_prompt_tokens == 2


async def test_grpc_tells_how_drafts_fared_by_position_over_all_outputs(world: World, grpc: Grpc) -> None:
    fared = iter([([4, 3], [3, 1]), ([2, 2, 1], [2, 1, 1])])

    async def script(_request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield tokens(50)
        last = finished()
        verified, accepted = next(fared)
        usage = last.finished.usage
        usage.num_drafts_by_position.extend(verified)
        usage.num_accepted_by_position.extend(accepted)
        usage.num_draft_tokens, usage.num_accepted_tokens = sum(verified), sum(accepted)
        yield last

    world.decode.script = script
    *_, last = await grpc.complete(model=MODEL, n=2)
    usage = last.finished.usage
    assert (list(usage.num_drafts_by_position), list(usage.num_accepted_by_position)) == ([6, 5, 1], [5, 2, 1])
    assert (usage.num_draft_tokens, usage.num_accepted_tokens) == (12, 8)


async def test_grpc_counts_the_drafts_of_every_worker_that_a_request_was_on(world: World, grpc: Grpc) -> None:
    def used(response: Response, verified: list[int]) -> Response:
        usage = response.finished.usage if response.HasField("finished") else response.tokens.usage
        usage.num_drafts_by_position.extend(verified)
        usage.num_draft_tokens = usage.num_accepted_tokens = sum(verified)
        return response

    async def lost(_request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield used(tokens(50), [1, 1])
        yield tokens(51)
        yield used(tokens(52), [2, 1])
        raise WorkerLost("gone")

    async def other(_request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        yield used(tokens(53), [1])
        yield used(finished(), [4, 4, 4])

    await world.start_decode("decode-1")
    world.decode.script, world.decodes["decode-1"].script = lost, other
    *_, last = await grpc.complete(model=MODEL, n=1)
    usage = last.finished.usage
    assert list(usage.num_drafts_by_position) == [6, 5, 4]
    assert (usage.num_draft_tokens, usage.num_accepted_tokens) == (15, 15)


async def test_grpc_faults_have_reasons(world: World, grpc: Grpc) -> None:
    with pytest.raises(ModelNotFound):
        await grpc.complete(model="other")
    with pytest.raises(InvalidRequest) as caught:
        await grpc.complete(top_p=0)
    assert caught.value.param == "top_p"
    with pytest.raises(InvalidRequest, match="at least one message"):
        await grpc.chat(gateway_pb2.ChatRequest())


async def test_grpc_lists_models(world: World, grpc: Grpc) -> None:
    listed = await rpc.call(grpc.stub.ListModels, gateway_pb2.ListModelsRequest())
    assert [(model.id, model.max_model_len) for model in listed.models] == [(MODEL, 200)]


async def test_leaving_a_grpc_stream_cancels_the_worker(world: World, grpc: Grpc) -> None:
    world.decode.script = forever
    request = gateway_pb2.CompleteRequest(text="hello")
    responses = rpc.stream(grpc.stub.Complete, request)
    await anext(responses)
    await responses.aclose()
    await asyncio.wait_for(world.decode.idle.wait(), 5)


async def test_a_model_without_a_template_cannot_chat(world: World) -> None:
    model = world.directory.models[0]
    text = type(model.text)(model.text.tokenizer, None, {})
    with pytest.raises(Unsupported, match="no chat template"):
        type(model)(model.card, text, 0).chat_template()
