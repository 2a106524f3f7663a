"""The chat client: what it makes of a stream."""

import json
from typing import Any

import httpx
import pytest

from cli.chat import stream_answer


def _client(body: str, status: int = 200) -> httpx.Client:
    return httpx.Client(
        base_url="http://gateway", transport=httpx.MockTransport(lambda request: httpx.Response(status, text=body))
    )


def _events(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events)


def _delta(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta}]}


def test_an_answer_is_the_content_of_its_deltas_in_order() -> None:
    stream = _events(_delta(role="assistant"), _delta(content="Par"), _delta(content="is"), {"choices": []})
    assert "".join(stream_answer(_client(stream + "data: [DONE]\n\n"), {})) == "Paris"


def test_a_refused_request_fails_with_the_servers_message() -> None:
    body = json.dumps({"error": {"message": "no such model"}})
    with pytest.raises(httpx.HTTPStatusError, match="no such model"):
        list(stream_answer(_client(body, 404), {}))


def test_a_fault_in_the_middle_of_a_stream_fails_with_its_message() -> None:
    stream = _events(_delta(content="Par"), {"error": {"message": "a worker was lost"}})
    with pytest.raises(httpx.HTTPStatusError, match="a worker was lost"):
        list(stream_answer(_client(stream), {}))


def test_an_error_without_a_json_body_is_shown_as_it_is() -> None:
    with pytest.raises(httpx.HTTPStatusError, match="bad gateway"):
        list(stream_answer(_client("bad gateway", 502), {}))
