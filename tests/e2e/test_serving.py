"""The default model through four services, as users meet it: OpenAI's client, plain HTTP, gRPC by reflection."""

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any

import grpc
import httpx
import openai
import pydantic
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION

from cli.up import welcome
from tests.e2e.cluster import RunningCluster, as_curl_does

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
# Some 190 tokens: enough for a prefill worker, which computes them in three steps.
LONG = "Count the rivers of every continent, and say where each of them begins and where it ends. " * 10


class Capital(pydantic.BaseModel):
    city: Annotated[str, pydantic.Field(max_length=20)]
    country: Annotated[str, pydantic.Field(max_length=20)]
    is_large: bool


@pytest.fixture
def client(model_cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{model_cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(cluster: RunningCluster, **fields: Any) -> dict[str, Any]:
    body = {"model": cluster.model, "temperature": 0, "max_tokens": 16, "return_token_ids": True} | fields
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_model_answers_a_question(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    answer = client.chat.completions.create(model=model_cluster.model, messages=QUESTION, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_what_forebay_up_says_when_ready_gets_the_answer(model_cluster: RunningCluster) -> None:
    said = welcome(model_cluster.url, model_cluster.model)
    answer = as_curl_does(next(line for line in said.splitlines() if line.lstrip().startswith("curl ")))
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]


def test_a_streamed_answer_is_the_whole_answer_in_pieces(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    asked: Any = {"model": model_cluster.model, "messages": QUESTION, "temperature": 0.8, "seed": 7, "max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert len([text for text in texts if text]) > 1
    assert "".join(texts) == whole.choices[0].message.content
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_models_are_listed(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    assert [model.id for model in client.models.list()] == [model_cluster.model]


def test_equal_tokens_whether_a_prompt_is_prefilled_here_or_there_or_cached(model_cluster: RunningCluster) -> None:
    """Short prompts are prefilled on the decode worker, long ones on the prefill worker: the same request is sent in
    both ways by way of what is cached."""
    prompts = LONG[:60], "Asked by nobody else. " + LONG
    short, long = (complete(model_cluster, prompt=prompt) for prompt in prompts)
    again_short, again_long = (complete(model_cluster, prompt=prompt) for prompt in prompts)
    for first, second in ((short, again_short), (long, again_long)):
        assert first["choices"][0]["token_ids"] == second["choices"][0]["token_ids"]
    assert long["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again_long["usage"]["prompt_tokens_details"]["cached_tokens"] >= long["usage"]["prompt_tokens"] - 17


async def test_a_long_prompt_is_computed_by_the_prefill_worker(model_cluster: RunningCluster) -> None:
    before = await model_cluster.measured("prefill-0", "forebay_requests_total")
    await asyncio.to_thread(complete, model_cluster, prompt="A fresh beginning. " + LONG)
    await model_cluster.until_measured("prefill-0", "forebay_requests_total", lambda num: num == before + 1)
    await model_cluster.until_pages_are_free()


def test_n_outputs_of_one_prompt_are_numbered_and_differ(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    answer = client.completions.create(
        model=model_cluster.model,
        prompt=["Once upon a time", "In the end"],
        n=2,
        temperature=1.0,
        seed=3,
        max_tokens=12,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 4


def test_a_seed_makes_sampling_repeatable_alone_and_in_company(model_cluster: RunningCluster) -> None:
    asked: dict[str, Any] = {"prompt": "My favourite animal is", "temperature": 1.2, "seed": 11, "max_tokens": 20}
    alone = complete(model_cluster, **asked)["choices"][0]["token_ids"]
    with httpx.Client(base_url=model_cluster.url, timeout=60) as http:
        company = {"model": model_cluster.model, "prompt": ["Cats"] * 4, "max_tokens": 20, "seed": 1}
        assert http.post("/v1/completions", json=company).status_code == 200
    assert complete(model_cluster, **asked)["choices"][0]["token_ids"] == alone


def test_a_stop_text_ends_an_answer_before_it(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    answer = client.chat.completions.create(
        model=model_cluster.model, messages=QUESTION, temperature=0, stop=["France"]
    )
    assert answer.choices[0].message.content == "The capital of "
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs_name_the_chosen_token_first_when_greedy(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    answer = client.chat.completions.create(
        model=model_cluster.model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)


async def test_a_client_that_goes_away_frees_its_pages_everywhere(model_cluster: RunningCluster) -> None:
    body = {"model": model_cluster.model, "prompt": LONG * 2, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(base_url=model_cluster.url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json=body) as response,
    ):
        await anext(response.aiter_lines())
        await model_cluster.until(lambda rows: rows["decode-0"]["pages"]["held"] > 0)
    await model_cluster.until_pages_are_free()
    await model_cluster.until(lambda rows: rows["decode-0"]["load"]["num_running"] == 0)


async def test_the_grpc_face_is_usable_by_reflection_alone(model_cluster: RunningCluster) -> None:
    address = await model_cluster.address("gateway-0")
    answer = await asyncio.to_thread(_chat_by_reflection, address, model_cluster.model)
    assert "Paris" in answer


def _chat_by_reflection(address: str, model: str) -> str:
    """What grpcurl does: no generated code, only what the server tells of itself."""
    with grpc.insecure_channel(address) as channel:
        told = ProtoReflectionDescriptorDatabase(channel)
        assert set(told.get_services()) == {"forebay.v1.GatewayService", HEALTH, REFLECTION}
        pool = DescriptorPool(told)
        method = pool.FindServiceByName("forebay.v1.GatewayService").FindMethodByName("Chat")
        request: Any = GetMessageClass(method.input_type)()
        request.options.model, request.options.temperature = model, 0.0
        request.messages.add(role="user", content=QUESTION[0]["content"])
        chat = channel.unary_stream(
            "/forebay.v1.GatewayService/Chat",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        responses: list[Any] = list(chat(request, timeout=60))
    assert responses[-1].WhichOneof("event") == "finished"
    return "".join(response.delta.text for response in responses)


async def test_every_process_answers_prometheus(model_cluster: RunningCluster) -> None:
    async with httpx.AsyncClient(timeout=10) as http:
        gateway = await http.get(f"{model_cluster.url}/metrics")
        assert gateway.status_code == 200
        for name, metric in (
            ("prefill-0", 'forebay_pages{state="cached"}'),
            ("decode-0", "forebay_transfer_bytes_total"),
        ):
            address = (await model_cluster.status())[name]["metrics_address"]
            text = (await http.get(f"http://{address}/metrics")).text
            assert metric in text


def test_an_answer_is_of_the_schema_that_openais_client_sends(
    client: openai.OpenAI, model_cluster: RunningCluster
) -> None:
    """The second prompt is long: its first token, too, comes from the prefill worker."""
    for question in ("Name a capital of Europe.", LONG + "Name a capital of Europe."):
        answer = client.chat.completions.parse(
            model=model_cluster.model,
            messages=[{"role": "user", "content": question}],
            response_format=Capital,
            temperature=1.0,
            seed=5,
            max_tokens=60,
        )
        assert isinstance(answer.choices[0].message.parsed, Capital)
        assert answer.choices[0].finish_reason == "stop"
