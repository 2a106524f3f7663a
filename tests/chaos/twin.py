"""The fault-free twin of a request on the sim engine: the same engine in this process, one request after another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, decoders, models

from services.gateway.request import derive_seed
from services.gateway.stops import StopStrings
from shared.engine.api import EngineRequest, SamplingParams
from shared.engine.sim import SimExecutor, SimModel
from tests.chaos.answers import COMPLETE, Answer, Output
from tests.chaos.requests import Ask
from tests.law.worker import Worker


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
    """Knows what a client gets without faults."""

    def answer(self, ask: Ask) -> list[Output]:
        """Each choice."""


def wrong(answers: Sequence[Answer], twin: Twin) -> list[str]:
    """Every answer that is not what its twin got, as far as it goes."""
    spoken = [answer for answer in answers if answer.outputs]
    problems = ((answer, answer.difference(twin.answer(answer.ask))) for answer in spoken)
    return [f"{answer.ask.name}, {answer.end}: {problem}" for answer, problem in problems if problem]


class SimTwin:
    """Knows every answer, because nothing ever fails here."""

    def __init__(self) -> None:
        self._worker = Worker(SimExecutor(SimModel(), 256, sleep=lambda seconds: None))

    def answer(self, ask: Ask) -> list[Output]:
        """What a client gets without faults, for each choice."""
        seeds = [derive_seed(ask.body["seed"], i) for i in range(ask.body.get("n", 1))]
        names = [f"{ask.name}-{i}" for i in range(len(seeds))]
        for name, seed in zip(names, seeds, strict=True):
            self._worker.submit(EngineRequest(name, tuple(ask.body["prompt"]), _params(ask, seed)))
        self._worker.finish()
        return [_spoken(ask, self._worker.outputs.pop(name)) for name in names]


class RecordedTwin:
    """Knows what the same cluster answered before anything was done to it."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        assert all(answer.end == COMPLETE for answer in answers), "the twin was not free of faults"
        self._outputs = {answer.ask.name: answer.outputs for answer in answers}

    def answer(self, ask: Ask) -> list[Output]:
        """What it was then, for each choice."""
        outputs = self._outputs[ask.name]
        return [outputs[index] for index in sorted(outputs)]


def _params(ask: Ask, seed: int) -> SamplingParams:
    """Only what matters to the sim engine, which shapes no probabilities."""
    body = ask.body
    return SamplingParams(temperature=body["temperature"], ignore_eos=True, max_tokens=body["max_tokens"], seed=seed)


def _spoken(ask: Ask, token_ids: Sequence[int]) -> Output:
    """The text of an output, up to a stop string."""
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
    return output
