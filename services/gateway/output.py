"""From a choice's tokens to what a client reads: text, stop strings, token ids, log-probabilities, counts."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from protos.forebay.v1 import decode_pb2, generation_pb2
from services.gateway.request import Choice, Job
from services.gateway.stops import StopStrings

Generate = Callable[[Choice], AsyncGenerator[decode_pb2.GenerateResponse, None]]

_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


@dataclass(slots=True)
class Delta:
    """What is new since the last one. `finish_reason` is set on the last; `stop_reason` is what stopped it, as vLLM
    has it: the stop string or the id of the stop token that the client asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_output_tokens: int = 0
    usage: generation_pb2.Usage | None = None


async def deltas(job: Job, choice: Choice, generate: Generate) -> AsyncGenerator[Delta, None]:
    """The output of one choice, at most one delta for each message of the worker. Raises any Fault."""
    output = _Output(job, choice)
    if job.options.max_tokens == 0:
        yield Delta(choice.index, finish_reason="length")
        return
    async with aclosing(generate(choice)) as responses:
        async for response in responses:
            delta = output.finish(response.finished) if response.HasField("finished") else output.feed(response.tokens)
            if delta.text or delta.finish_reason or output.speaks_tokens:
                yield delta
            if delta.finish_reason:
                return


class _Output:
    """State of one output."""

    def __init__(self, job: Job, choice: Choice) -> None:
        options, tokenizer = job.options, job.model.text.tokenizer
        self._index, self._sampling = choice.index, choice.generate.sampling
        self._stops, self._include_stop = StopStrings(options.stop, options.include_stop), options.include_stop
        self._detokenizer = (
            None
            if tokenizer is None
            else tokenizer.detokenizer(choice.prompt.token_ids, skip_special=options.skip_special_tokens)
        )
        self.speaks_tokens = options.return_token_ids or self._sampling.HasField("num_logprobs")
        self._num_tokens = 0
        self._usage: generation_pb2.Usage | None = None

    def feed(self, chunk: generation_pb2.TokenChunk) -> Delta:
        """Take the tokens of one step, up to the one that completes a stop string."""
        if chunk.HasField("usage"):
            self._usage = chunk.usage
        delta = Delta(self._index, usage=self._usage)
        for i, token_id in enumerate(chunk.token_ids):
            self._num_tokens += 1
            delta.token_ids.append(token_id)
            if chunk.logprobs:
                delta.logprobs.append(chunk.logprobs[i])
            text, stop = self._text(token_id)
            delta.text += text
            if stop is not None:
                delta.finish_reason, delta.stop_reason = "stop", stop
                break
        delta.num_output_tokens = self._num_tokens
        return delta

    def finish(self, finished: decode_pb2.GenerateFinished) -> Delta:
        """The end of the output: what was held back, and why it ended."""
        delta = Delta(self._index, finish_reason=_REASONS.get(finished.reason, "stop"), usage=finished.usage)
        if finished.HasField("stop_token_id"):
            self._end_with(finished.stop_token_id, delta)
        if delta.stop_reason is None or not isinstance(delta.stop_reason, str):
            rest = self._detokenizer.flush() if self._detokenizer else ""
            text, stop = self._stops.feed(rest)
            delta.text += text
            if stop is not None:
                delta.finish_reason, delta.stop_reason = "stop", stop
            else:
                delta.text += self._stops.flush()
        delta.num_output_tokens = self._num_tokens
        return delta

    def _end_with(self, token_id: int, delta: Delta) -> None:
        """A stop token is counted and reported as vLLM does; its text is shown only on demand."""
        self._num_tokens += 1
        delta.token_ids.append(token_id)
        if token_id in self._sampling.stop_token_ids:
            delta.stop_reason = token_id
            if self._include_stop:
                delta.text += self._text(token_id)[0]

    def _text(self, token_id: int) -> tuple[str, str | None]:
        text = self._detokenizer.feed(token_id) if self._detokenizer else ""
        if self._num_tokens < self._sampling.min_tokens:
            return self._stops.pass_through(text), None
        return self._stops.feed(text)
