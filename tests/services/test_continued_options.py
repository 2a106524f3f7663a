"""A decode worker lost at any position of an output: the next one goes on without a seam, whatever was asked for.

A whole gateway before workers that compute a small model with real sampling. A lost worker's stream breaks off as it
does with a broken connection.
"""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from protos.forebay.v1 import decode_pb2
from services.gateway.request import Caller
from shared.engine.api import PromptLogprobs, TokensSampled
from shared.errors import WorkerLost
from shared.worker import wire
from tests.law.conftest import MakeExecutor, tiny_model
from tests.law.worker import Worker
from tests.unit.gateway.tiny_tokenizers import byte_level
from tests.unit.gateway.world import Response, World, finished

NUM_TOKENS = 12
PROMPT = [70, 80, 90, 100, 110, 140, 141]
PENALTIES = {"presence_penalty": 0.6, "frequency_penalty": 0.5, "repetition_penalty": 1.3}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 60, "min_p": 0.001},
    "penalties": {"temperature": 0.8, **PENALTIES},
    "greedy with penalties": {"temperature": 0, **PENALTIES},
    "logprobs": {"temperature": 0.9, "logprobs": 3},
    "n": {"temperature": 1.0, "n": 3},
    "least length and bias": {"temperature": 1.0, "min_tokens": 5, "logit_bias": {"70": 3, "120": -100}},
    "an echo": {"temperature": 0, "echo": True, "logprobs": 2},
    "a prompt alone": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "log-probabilities of the prompt": {"temperature": 0.9, "prompt_logprobs": 3, "n": 2},
    "stop token": {"temperature": 0, "stop_token_ids": list(range(0, 211, 7)), "min_tokens": 3},
}


@dataclass
class Workers:
    """Equal requests get equal answers from all of them; the first one of each output is lost after some tokens."""

    make_executor: MakeExecutor
    lost_after: int | None = None
    lost: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._engine = Worker(self.make_executor(64), max_step_tokens=3).engine

    async def generate(self, request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        """What a decode worker sends."""
        responses = list(self._compute(request))
        if self.lost_after is not None and request.request_id not in self.lost:
            self.lost.add(request.request_id)
            for response in responses[: self.lost_after]:
                yield response
            raise WorkerLost("gone")
        for response in responses:
            yield response

    def _compute(self, request: decode_pb2.GenerateRequest) -> Iterator[Response]:
        self._engine.submit(wire.engine_request(request, page_hashes=()))
        while self._engine.has_work():
            for event in self._engine.step():
                if isinstance(event, PromptLogprobs):
                    yield Response(prompt_logprobs=wire.prompt_logprobs(event))
                    continue
                assert isinstance(event, TokensSampled)
                if event.tokens:
                    yield Response(tokens=wire.token_chunk(event.tokens))
                if event.finish_reason is not None:
                    yield finished(event.finish_reason.name, event.stop_token_id)


@dataclass
class Output:
    """What a client gets of one choice."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    told: list[tuple[float, int]] = field(default_factory=list)
    end: tuple[str | None, str | int | None] = (None, None)
    num_output_tokens: int = 0


async def answer(world: World, workers: Workers, **options: Any) -> list[Output]:
    """The outputs of a request."""
    for decode in world.decodes.values():
        decode.script = workers.generate
    raw = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "seed": 11, "return_token_ids": True, **options}
    job = await world.core.complete(raw, Caller("r", "", 30.0))
    outputs = [Output() for _ in job.choices]
    async for delta in world.core.run(job):
        output = outputs[delta.index]
        output.token_ids += delta.token_ids
        output.text += delta.text
        output.logprobs += [(round(entry.logprob, 4), tuple(entry.top_token_ids)) for entry in delta.logprobs]
        output.told += [(round(entry.logprob, 4), entry.rank) for entry in delta.prompt_logprobs]
        output.num_output_tokens = delta.num_output_tokens
        if delta.finish_reason:
            output.end = (delta.finish_reason, delta.stop_reason)
    return outputs


@pytest.fixture(scope="module")
def make_executor(tmp_path_factory: pytest.TempPathFactory) -> MakeExecutor:
    return tiny_model("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Two workers, so that one is left."""
    made = World(tmp_path / "text", tokenizer=byte_level())
    await made.start()
    await made.start_decode("decode-1")
    yield made
    await made.close()


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
async def test_a_worker_lost_anywhere_leaves_no_seam(
    options: dict[str, Any], world: World, make_executor: MakeExecutor
) -> None:
    expected = await answer(world, Workers(make_executor), **options)
    assert all(output.end[0] and (output.token_ids or options.get("max_tokens") == 0) for output in expected)
    assert len(expected[0].told) == (len(PROMPT) - 1 if "echo" in options or "prompt_logprobs" in options else 0)
    for position in range(NUM_TOKENS + 1):
        workers = Workers(make_executor, lost_after=position)
        assert await answer(world, workers, **options) == expected, f"lost after {position} messages"
        assert len(workers.lost) == len(expected)


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_is_found_across_the_seam(include: bool, world: World, make_executor: MakeExecutor) -> None:
    whole = (await answer(world, Workers(make_executor), temperature=0.9))[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    options = {"temperature": 0.9, "stop": [stop, "never"], "include_stop_str_in_output": include}
    expected = await answer(world, Workers(make_executor), **options)
    assert expected[0].end == ("stop", stop)
    for position in range(expected[0].num_output_tokens):
        workers = Workers(make_executor, lost_after=position)
        assert await answer(world, workers, **options) == expected, f"lost after {position} messages"
