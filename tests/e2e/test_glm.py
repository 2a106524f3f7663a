"""A tiny GLM-5.2 through four services, in float32: by token ids, where it has no tokenizer, and in a conversation."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall

from shared.engine.executor import TorchExecutor
from tests.e2e import scripted_glm
from tests.e2e.client import client_of
from tests.e2e.cluster import HAND_OVER, Row, RunningCluster, running
from tests.e2e.test_failover import kill_the_busy_worker
from tests.oracle import driver

PROMPT = [token * 37 % 499 for token in range(700)]
NUM_TOKENS = 150  # of an output that is interrupted at its tenth


@pytest.fixture(scope="module", params=["auto", "fp8"])
def kv_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bare(glm: Path, kv_dtype: str) -> TorchExecutor:
    return driver.load(glm, kv_dtype=kv_dtype)


@pytest.fixture(scope="module")
def cluster(glm: Path, kv_dtype: str) -> Iterator[RunningCluster]:
    """With a decode worker to spare where one is killed."""
    flags = ["--model", str(glm), "--dtype", "float32", "--kv-dtype", kv_dtype]
    with running(*flags, "--decode", "2" if kv_dtype == "auto" else "1", HAND_OVER) as cluster:
        yield cluster


@pytest.mark.parametrize(("length", "role"), [(20, "decode"), (700, "prefill")], ids=["computed here", "handed over"])
async def test_a_cluster_gives_the_tokens_of_the_bare_model(
    length: int, role: str, cluster: RunningCluster, bare: TorchExecutor
) -> None:
    prompt = PROMPT[-length:]
    body = {"model": cluster.model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
        asked = body | {"return_token_ids": True}
        answers = [(await http.post("/v1/completions", json=asked)).json() for _ in range(2)]
        text = await http.post("/v1/completions", json=body | {"prompt": "text"})
    expected = driver.generate(bare, prompt, 12)
    assert [answer["choices"][0]["token_ids"] for answer in answers] == [expected, expected]
    assert text.status_code == 400
    assert "token ids" in text.json()["error"]["message"]

    def num_cached(rows: dict[str, Row]) -> int:
        return max(int(row["pages"]["cached"]) for name, row in rows.items() if name.startswith(role))

    await cluster.until(lambda rows: num_cached(rows) >= length // 16)
    await cluster.until_pages_are_free()


@pytest.mark.parametrize("kv_dtype", ["auto"], indirect=True)
async def test_a_decode_worker_killed_amid_an_output_costs_no_token(
    cluster: RunningCluster, bare: TorchExecutor
) -> None:
    """Drafted, and behind a prompt that was handed over."""
    token_ids: list[int] = []
    async with client_of(cluster) as client:
        async for chunk in client.stream(PROMPT[:300], max_tokens=NUM_TOKENS, temperature=0):
            assert "error" not in chunk, chunk
            if len(token_ids) < 10 <= len(token_ids) + len(chunk["choices"][0]["token_ids"]):
                await kill_the_busy_worker(cluster)
            token_ids += chunk["choices"][0]["token_ids"]
    assert token_ids == driver.generate(bare, PROMPT[:300], NUM_TOKENS)


CALL = ["<tool_call>", "w", "<arg_key>", "c", "</arg_key>", "<arg_value>", "y", "</arg_value>", "</tool_call>"]
SCRIPT = ["<think>", "n", "o", "</think>", "d", "u", *CALL, "<|observation|>"]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "w", "parameters": {"properties": {"c": {"type": "string"}}}},
}


async def chat(cluster: RunningCluster, *conversation: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], Any]:
    """The message and all of the answer."""
    body = {"model": cluster.model, "messages": list(conversation), "temperature": 0, "max_tokens": 64} | fields
    async with httpx.AsyncClient(base_url=cluster.url, timeout=60) as http:
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["message"] | {"finish_reason": choice["finish_reason"]}, answer.json()


async def test_thoughts_content_and_tool_calls_come_apart_and_drafts_of_them_are_right(tmp_path: Path) -> None:
    scripted_glm.write(tmp_path / "glm", SCRIPT)
    asked = {"role": "user", "content": "weather? " * 90}  # handed over
    with running("--model", str(tmp_path / "glm"), "--dtype", "float32", HAND_OVER) as cluster:
        message, whole = await chat(cluster, asked, tools=[TOOL])
        quiet, _ = await chat(cluster, asked, tools=[TOOL], chat_template_kwargs={"enable_thinking": False})
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
        again, twice = await chat(cluster, asked, {**message, "finish_reason": None}, result, tools=[TOOL])
        responses = await asyncio.to_thread(respond_twice, cluster, asked["content"])
        await cluster.until(lambda rows: rows["prefill-0"]["pages"]["cached"])  # it was handed over
        await cluster.until_measured("decode-0", "forebay_drafts_accepted_total", lambda num: num >= len(SCRIPT) - 4)
    for found in (message, again):
        assert (found["reasoning_content"], found["content"], found["finish_reason"]) == ("no", "du", "tool_calls")
    assert (quiet.get("reasoning_content"), quiet["content"]) == (None, "du")
    calls = [each["tool_calls"][0]["function"] for each in (message, quiet, again)]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [("w", {"c": "y"})] * 3
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    for response, by_chat in zip(responses, (whole, twice), strict=True):
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        assert (response.status, response.output_text) == ("completed", "du")
        assert [(call.name, json.loads(call.arguments)) for call in calls_of(response)] == [("w", {"c": "y"})]
        assert response.usage is not None
        assert response.usage.input_tokens == by_chat["usage"]["prompt_tokens"]


def calls_of(response: Response) -> list[ResponseFunctionToolCall]:
    return [item for item in response.output if item.type == "function_call"]


def respond_twice(cluster: RunningCluster, question: str) -> tuple[Response, Response]:
    """A response, and the one to the output of the function that it calls, by OpenAI's client."""
    tool: Any = {"type": "function", "strict": False, **TOOL["function"]}
    asked: Any = {"model": cluster.model, "temperature": 0, "max_output_tokens": 64, "tools": [tool]}
    conversation: list[Any] = [{"role": "user", "content": question}]
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        with client.responses.stream(input=conversation, **asked) as stream:
            first = stream.get_final_response()
        conversation += first.output
        conversation.append({"type": "function_call_output", "call_id": calls_of(first)[0].call_id, "output": "rain"})
        return first, client.responses.create(input=conversation, **asked)
