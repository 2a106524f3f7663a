"""Log-probabilities of prompts as those who evaluate models ask for them, of real processes; and when one is killed."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from protos.forebay.v1 import gateway_pb2, gateway_pb2_grpc
from shared import rpc
from tests.e2e.client import PROMPT
from tests.e2e.cluster import RunningCluster
from tests.e2e.test_failover import busy
from tests.e2e.test_second_prefill import at_work
from tests.e2e.test_serving import LONG, QUESTION, complete

Told = list[tuple[float, int]]


@pytest.fixture
def client(model_cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{model_cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_prompt_alone_in_a_batch_of_texts(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    """The first is computed where it decodes, the second, which begins with it, by the prefill worker."""
    texts = [LONG[:60], LONG]
    answer = client.completions.create(
        model=model_cluster.model, prompt=texts, echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    short, long = answer.choices
    for text, choice in zip(texts, answer.choices, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert "".join(choice.logprobs.tokens) == text
        offsets = choice.logprobs.text_offset
        assert offsets is not None
        pairs = zip(offsets, choice.logprobs.tokens, strict=True)
        assert all(text.startswith(token, offset) for offset, token in pairs)
    assert short.logprobs is not None
    assert long.logprobs is not None
    begun, whole = short.logprobs.token_logprobs, long.logprobs.token_logprobs
    assert begun is not None
    assert whole is not None
    assert begun[0] is None
    same = len(begun) - 1  # the short one may end amid a token of the long one
    assert begun[:same] == whole[:same]


def evaluated(cluster: RunningCluster, prompts: list[list[int]], lengths: list[int]) -> list[tuple[float, bool]]:
    """What lm-evaluation-harness' `local-completions` sends to measure what follows contexts of these `lengths`, and
    what it makes of the answer: how likely that is, and whether the model would have said so. The token that it has
    generated it leaves out."""
    body = {
        "model": cluster.model,
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    found = []
    for choice, length in zip(response.json()["choices"], lengths, strict=True):
        own = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        greedy = all(logprob == max(top.values()) for logprob, top in zip(own, tops, strict=True))
        found.append((sum(own), greedy))
    return found


def test_continuations_are_as_likely_as_when_they_were_generated(model_cluster: RunningCluster) -> None:
    """One is measured where it decodes, one by the prefill worker; the last one the model would end itself."""
    questions = ["The capital of France is", LONG, "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"]
    said = [complete(model_cluster, prompt=question, logprobs=0, max_tokens=24) for question in questions]
    contexts = [each["choices"][0]["prompt_token_ids"] for each in said]
    outputs = [each["choices"][0]["token_ids"] for each in said]
    assert said[2]["choices"][0]["finish_reason"] == "stop"
    prompts = [context + output for context, output in zip(contexts, outputs, strict=True)]
    found = evaluated(model_cluster, prompts, [len(context) for context in contexts])
    for (likely, greedy), each in zip(found, said, strict=True):
        assert greedy
        assert likely == pytest.approx(sum(each["choices"][0]["logprobs"]["token_logprobs"]), abs=1e-3)
    without_end = [prompts[2][:-1]]  # behind which the model ends
    [(likely, greedy)] = evaluated(model_cluster, without_end, [len(contexts[2])])
    assert greedy
    own = said[2]["choices"][0]["logprobs"]["token_logprobs"][:-1]
    assert likely == pytest.approx(sum(own), abs=1e-3)
    [(unlikely, greedy)] = evaluated(model_cluster, [contexts[0] + outputs[1][:5]], [len(contexts[0])])
    assert not greedy
    assert unlikely < sum(said[0]["choices"][0]["logprobs"]["token_logprobs"][:5])


def test_prompt_logprobs_of_a_chat_and_of_a_completion(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    extra: Any = {"prompt_logprobs": 2, "return_token_ids": True}
    chat: Any = client.chat.completions.create(
        model=model_cluster.model, messages=QUESTION, temperature=0, extra_body=extra
    )
    assert "Paris" in chat.choices[0].message.content
    text: Any = client.completions.create(
        model=model_cluster.model, prompt=chat.prompt_token_ids, max_tokens=1, temperature=0, extra_body=extra
    )
    assert text.choices[0].prompt_logprobs == chat.prompt_logprobs
    assert len(chat.prompt_logprobs) == len(chat.prompt_token_ids) == chat.usage.prompt_tokens
    assert chat.prompt_logprobs[0] is None
    for token_id, entries in zip(chat.prompt_token_ids[1:], chat.prompt_logprobs[1:], strict=True):
        assert {entry["rank"] for entry in entries.values()} == {1, 2, entries[str(token_id)]["rank"]}
        assert max(entry["logprob"] for entry in entries.values()) == next(
            entry["logprob"] for entry in entries.values() if entry["rank"] == 1
        )


def test_what_is_cached_is_of_no_use_and_said_not_to_be(model_cluster: RunningCluster) -> None:
    complete(model_cluster, prompt=LONG)
    first, again = (complete(model_cluster, prompt=LONG, prompt_logprobs=0) for _ in range(2))
    assert first["choices"][0]["prompt_logprobs"] == again["choices"][0]["prompt_logprobs"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert complete(model_cluster, prompt=LONG)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("victim", ["decode", "prefill"])
async def test_a_worker_killed_amid_a_prompt_tells_nothing_twice(victim: str, slow_cluster: RunningCluster) -> None:
    channels = rpc.Channels()
    try:
        stub: Any = gateway_pb2_grpc.GatewayServiceStub(channels.to(await slow_cluster.address("gateway-0")))
        expected, tokens = await told(stub, slow_cluster, "")
        assert len(expected) == len(PROMPT) - 1
        assert await told(stub, slow_cluster, victim) == (expected, tokens)
    finally:
        await channels.close()


async def told(stub: Any, cluster: RunningCluster, victim: str) -> tuple[Told, list[int]]:
    """What is told of a prompt, and the output; with a victim, that worker is killed when the first of it is known."""
    options = gateway_pb2.GenerationOptions(
        model=cluster.model, num_prompt_logprobs=0, max_tokens=3, temperature=0, ignore_eos=True, return_token_ids=True
    )
    request = gateway_pb2.CompleteRequest(options=options, token_ids=gateway_pb2.TokenIds(ids=PROMPT))
    found, token_ids = Told(), list[int]()
    working = busy if victim == "decode" else at_work
    async for response in rpc.stream(stub.Complete, request, 60):
        found += [(each.logprob, each.rank) for each in response.delta.prompt_logprobs]
        token_ids += response.delta.token_ids
        if victim and found:
            (name,) = working(await cluster.until(lambda rows: len(working(rows)) == 1))
            cluster.kill(name)
            assert len(found) < len(PROMPT) - 1
            victim = ""
    return found, token_ids
