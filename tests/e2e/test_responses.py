"""The Responses API of the default model through four services, by OpenAI's client."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.cluster import RunningCluster
from tests.e2e.test_serving import LONG, Capital

QUESTION = "What is the capital of France?"


@pytest.fixture
def client(model_cluster: RunningCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{model_cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_response_is_what_a_chat_says(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    instructions = "You answer in one sentence."
    response = client.responses.create(
        model=model_cluster.model, instructions=instructions, input=QUESTION, temperature=0
    )
    chat = client.chat.completions.create(
        model=model_cluster.model,
        messages=[{"role": "system", "content": instructions}, {"role": "user", "content": QUESTION}],
        temperature=0,
    )
    assert "Paris" in response.output_text
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "completed"
    assert response.usage is not None
    assert chat.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )


def test_a_stream_adds_up_to_the_whole_response(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    asked: Any = {"model": model_cluster.model, "input": QUESTION, "temperature": 0.8, "max_output_tokens": 200}
    asked |= {"extra_body": {"seed": 7}}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert len(deltas) > 1
    assert "".join(deltas) == final.output_text == whole.output_text
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_conversation_goes_on_and_finds_its_prefix_cached(
    client: openai.OpenAI, model_cluster: RunningCluster
) -> None:
    conversation: list[Any] = [{"role": "user", "content": "Asked by a response. " + (2 * LONG)[:1200]}]
    asked: Any = {"model": model_cluster.model, "temperature": 0, "max_output_tokens": 8}
    first = client.responses.create(input=conversation, **asked)
    assert first.incomplete_details is not None
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    second = client.responses.create(input=[*conversation, *first.output, {"role": "user", "content": "Yes?"}], **asked)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 17


def test_an_answer_is_parsed(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    answer = client.responses.parse(
        model=model_cluster.model,
        input="Name a capital of Europe.",
        text_format=Capital,
        temperature=1.0,
        max_output_tokens=60,
        extra_body={"seed": 5},
    )
    assert isinstance(answer.output_parsed, Capital)


def test_what_would_have_to_be_kept_is_refused(client: openai.OpenAI, model_cluster: RunningCluster) -> None:
    first = client.responses.create(model=model_cluster.model, input=QUESTION, max_output_tokens=4)
    with pytest.raises(openai.BadRequestError, match="send the earlier items") as caught:
        client.responses.create(model=model_cluster.model, input="And of Spain?", previous_response_id=first.id)
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError, match="nothing is kept"):
        client.responses.retrieve(first.id)
