"""The fault-free twin of a request on the sim engine: the same engine in this process, where nothing fails."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, decoders, models

from services.gateway.logprobs import LOWEST
from services.gateway.request import derive_seed
from services.gateway.stops import StopStrings
from shared.engine.api import EngineRequest, PromptLogprobs, SamplingParams, TokenLogprobs, TokensSampled
from shared.engine.engine import Engine
from shared.engine.kv.store import KvStore
from shared.engine.sim import SimExecutor, SimModel
from tests.chaos.answers import COMPLETE, Answer, Output
from tests.chaos.requests import Ask

# Requests at once, and pages that are enough for all of them.
BATCH = 32
NUM_PAGES = 4_096


def word(token_id: int) -> str:
    """The text of a token of the sim's vocabulary."""
    return f" {token_id}"


def write_tokenizer(directory: Path) -> Path:
    """A model directory that gives the sim engine a text: each token is its number."""
    vocabulary = {word(token_id): token_id for token_id in range(SimModel().vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=word(0)))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


class Twin(Protocol):
    """Knows what clients get without faults."""

    def answers(self, asks: Sequence[Ask]) -> list[list[Output]]:
        """Each choice of each request."""


def wrong(answers: Sequence[Answer], twin: Twin) -> list[str]:
    """Every answer that is not what its twin got, as far as it goes."""
    spoken = [answer for answer in answers if answer.outputs]
    problems: list[str] = []
    for begin in range(0, len(spoken), BATCH):
        batch = spoken[begin : begin + BATCH]
        for answer, right in zip(batch, twin.answers([answer.ask for answer in batch]), strict=True):
            if problem := answer.difference(right):
                problems.append(f"{answer.ask.name}, {answer.end}: {problem}")
    return problems


class SimTwin:
    """Knows every answer, by computing it once more."""

    def __init__(self) -> None:
        executor = SimExecutor(SimModel(), NUM_PAGES, sleep=lambda seconds: None)
        kv = KvStore(NUM_PAGES, executor.spec.layout.page_size, lease_ttl_ms=10_000, clock=lambda: 0.0)
        self._engine = Engine(executor, kv, max_step_tokens=2_048, max_num_sequences=BATCH)

    def answers(self, asks: Sequence[Ask]) -> list[list[Output]]:
        """What clients get without faults."""
        tokens, told = dict[str, list[int]](), dict[str, list[float | None]]()
        for number, ask in enumerate(asks):
            for choice in range(ask.body.get("n", 1)):
                name = f"{number}-{choice}"
                tokens[name], told[f"{number}"] = [], [None]
                self._engine.submit(EngineRequest(name, tuple(ask.body["prompt"]), _params(ask, choice)))
        while self._engine.has_work():
            for event in self._engine.step():
                if isinstance(event, PromptLogprobs):
                    told[event.request_id.partition("-")[0]] += map(_shown, event.logprobs)
                    continue
                assert isinstance(event, TokensSampled), event
                tokens[event.request_id] += [token.token_id for token in event.tokens]
        return [
            [_spoken(ask, tokens[f"{number}-{choice}"], told[f"{number}"]) for choice in range(ask.body.get("n", 1))]
            for number, ask in enumerate(asks)
        ]


class RecordedTwin:
    """Knows what the same cluster answered before anything was done to it."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        assert all(answer.end == COMPLETE for answer in answers), "the twin was not free of faults"
        self._outputs = {_wish(answer.ask): answer.outputs for answer in answers}

    def answers(self, asks: Sequence[Ask]) -> list[list[Output]]:
        """What they were then."""
        return [[outputs[i] for i in sorted(outputs)] for outputs in (self._outputs[_wish(ask)] for ask in asks)]


def _wish(ask: Ask) -> str:
    """What is asked for, whoever asks."""
    return json.dumps(ask.body, sort_keys=True)


def _params(ask: Ask, choice: int) -> SamplingParams:
    """Only what matters to the sim engine, which shapes no probabilities."""
    return SamplingParams(
        temperature=ask.body["temperature"],
        ignore_eos=True,
        max_tokens=ask.body["max_tokens"],
        seed=derive_seed(ask.body["seed"], choice),
        num_prompt_logprobs=1 if "echo" in ask.body and choice == 0 else None,
    )


def _shown(told: TokenLogprobs) -> float:
    """A log-probability as a client gets it."""
    (single,) = struct.unpack("f", struct.pack("f", told.logprob))
    return max(LOWEST, float(single))


def _spoken(ask: Ask, token_ids: Sequence[int], told: list[float | None]) -> Output:
    """The text of an output, up to a stop string, behind that of a prompt that is repeated."""
    output, stops = Output(finish_reason="length"), StopStrings(ask.body.get("stop", ()))
    for token_id in token_ids:
        output.token_ids.append(token_id)
        text, stop = stops.feed(word(token_id))
        output.text += text
        if stop is not None:
            output.finish_reason = "stop"
            break
    else:
        output.text += stops.flush()
    output.num_logprobs = len(output.token_ids) if "logprobs" in ask.body else 0
    if "echo" in ask.body:
        output.text, output.told = "".join(map(word, ask.body["prompt"])) + output.text, told
    return output
