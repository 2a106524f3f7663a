"""From a choice's tokens to what a client reads: text, reasoning, tool calls, token ids, log-probabilities, counts."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from protos.forebay.v1 import decode_pb2, generation_pb2
from services.gateway.parsers.api import CallPart, Piece
from services.gateway.parts import Part, Parts
from services.gateway.reader import Reader
from services.gateway.request import Choice, Job

Generate = Callable[[Choice], AsyncGenerator[decode_pb2.GenerateResponse, None]]

_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


@dataclass(slots=True)
class Delta:
    """What is new since the last one. `finish_reason` is set on the last; `stop_reason` is what stopped it, as vLLM
    has it: the stop string or the id of the stop token that the client asked for. Reasoning tokens are those chosen
    between <think> and </think>. `prompt_logprobs`, of which the first belong to the prompt's second token, come before
    all else, and with nothing else. Of a job that wants what is said in its order, it is in `parts`, and not in text,
    reasoning and calls."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[generation_pb2.TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0
    usage: generation_pb2.Usage | None = None

    @property
    def is_text_alone(self) -> bool:
        """Whether a client that asked for nothing else sees more text, and that is all."""
        return bool(self.text) and not (self.reasoning or self.calls or self.finish_reason)

    @property
    def says_something(self) -> bool:
        """Whether there is something to read, or nothing more to come."""
        return bool(self.text or self.reasoning or self.calls or self.parts or self.finish_reason)


async def deltas(job: Job, choice: Choice, generate: Generate) -> AsyncGenerator[Delta, None]:
    """The output of one choice, at most one delta for each message of the worker. Raises any Fault."""
    output = _Output(job, choice)
    async with aclosing(generate(choice)) as responses:
        async for response in responses:
            if response.HasField("prompt_logprobs"):
                yield Delta(choice.index, prompt_logprobs=list(response.prompt_logprobs.logprobs))
                continue
            delta = output.finish(response.finished) if response.HasField("finished") else output.feed(response.tokens)
            if delta.says_something or output.speaks_tokens:
                yield delta
            if delta.finish_reason:
                return


class _Output:
    """State of one output."""

    def __init__(self, job: Job, choice: Choice) -> None:
        options = job.options
        self._index, self._sampling, self._is_chat = choice.index, choice.generate.sampling, job.is_chat
        self._include_stop = options.include_stop
        self._reader = Reader(job.model.text.tokenizer, choice.prompt, options, job.parsing.tags)
        self._parser = job.parsing.parser()
        self._parts = Parts() if job.in_parts else None
        wants_tokens = options.return_token_ids or self._sampling.HasField("num_logprobs")
        self.speaks_tokens = wants_tokens and not job.in_parts
        self._num_tokens = self._num_reasoning = 0
        self._usage: generation_pb2.Usage | None = None

    def feed(self, chunk: generation_pb2.TokenChunk) -> Delta:
        """Take the tokens of one step, up to the one that completes a stop string or the message."""
        if chunk.HasField("usage"):
            self._usage = chunk.usage
        delta, logprobs = Delta(self._index, usage=self._usage), chunk.logprobs
        for i, token_id in enumerate(chunk.token_ids):
            delta.token_ids.append(token_id)
            if logprobs:
                delta.logprobs.append(logprobs[i])
                if self._parts is not None and self._parser.speaks:
                    self._parts.token(token_id, logprobs[i])
            if stop := self._take(token_id):
                delta.finish_reason, delta.stop_reason = "stop", stop
            if self._parser.ended:
                delta.finish_reason, delta.stop_reason = "stop", None
            if delta.finish_reason:
                self._end(delta)
                break
        return self._fill(delta)

    def finish(self, finished: decode_pb2.GenerateFinished) -> Delta:
        """The end of the output: what was held back, and why it ended."""
        delta = Delta(self._index, finish_reason=_REASONS.get(finished.reason, "stop"), usage=finished.usage)
        if finished.HasField("stop_token_id"):
            self._end_with(finished.stop_token_id, delta)
            if finished.HasField("stop_logprobs") and not self._is_chat:
                delta.logprobs.append(finished.stop_logprobs)
        pieces, stop = self._reader.flush()
        self._parse(pieces)
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
        self._end(delta)
        return self._fill(delta)

    def _end_with(self, token_id: int, delta: Delta) -> None:
        """A stop token is counted and reported as vLLM does; its text is shown only on demand."""
        delta.token_ids.append(token_id)
        if token_id in self._sampling.stop_token_ids:
            delta.stop_reason = token_id
            if self._include_stop:
                self._take(token_id)
                return
        self._num_tokens += 1

    def _take(self, token_id: int) -> str | None:
        """Read a token. Returns the stop string that it completes."""
        self._num_tokens += 1
        pieces, stop = self._reader.feed(token_id, stops=self._num_tokens >= self._sampling.min_tokens)
        self._parse(pieces)
        self._num_reasoning += self._parser.thinks
        return stop

    def _parse(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._parser.feed(piece)
            if self._parts is not None:
                self._parts.add(self._parser.take())

    def _end(self, delta: Delta) -> None:
        by_model = delta.finish_reason == "stop" and not isinstance(delta.stop_reason, str)
        self._parser.finish(by_model=by_model)
        if self._parts is not None:
            self._parts.add(self._parser.take())
            self._parts.end()
        if delta.finish_reason == "stop" and self._parser.calls_tools:
            delta.finish_reason = "tool_calls"

    def _fill(self, delta: Delta) -> Delta:
        if self._parts is not None:
            delta.parts = self._parts.take()
        else:
            new = self._parser.take()
            delta.text, delta.reasoning, delta.calls = new.content, new.reasoning, new.calls
        delta.num_output_tokens, delta.num_reasoning_tokens = self._num_tokens, self._num_reasoning
        return delta
