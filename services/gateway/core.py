"""What both faces do with a request, once it is read."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from services.gateway import chat, completion, output, responses, siblings, tokens
from services.gateway.directory import Directory
from services.gateway.dispatch import Dispatcher
from services.gateway.fields import Fields
from services.gateway.merge import merge
from services.gateway.meters import Meters
from services.gateway.output import Delta
from services.gateway.request import Caller, Job
from services.gateway.tokens import Tokens
from shared.errors import Draining


class Core:
    """Requests of one gateway, from JSON-like fields to deltas."""

    def __init__(self, directory: Directory, dispatcher: Dispatcher, meters: Meters, max_choices: int) -> None:
        self.directory = directory
        self.meters = meters
        self._dispatcher, self._max_choices = dispatcher, max_choices
        self._num_running, self._draining = 0, False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    async def chat(self, raw: Mapping[str, Any], caller: Caller) -> Job:
        """A conversation to continue. Raises faults of the request."""
        return await chat.job(raw, caller, self.directory.model(_model(raw)), self._max_choices)

    async def complete(self, raw: Mapping[str, Any], caller: Caller) -> Job:
        """Prompts to continue. Raises faults of the request."""
        return await completion.job(raw, caller, self.directory.model(_model(raw)), self._max_choices)

    async def respond(self, raw: Mapping[str, Any], caller: Caller) -> Job:
        """A response of OpenAI's API of that name. Raises faults of the request."""
        return await responses.job(raw, caller, self.directory.model(_model(raw)), self._max_choices)

    async def count_input(self, raw: Mapping[str, Any]) -> int:
        """The tokens of what a response would answer. Raises faults of the request."""
        return await responses.count(raw, self.directory.model(_model(raw)))

    async def tokenize(self, raw: Mapping[str, Any]) -> Tokens:
        """What a prompt or a conversation is to the model. Raises faults of the request."""
        return await tokens.tokenize(raw, self.directory.model(_model(raw)))

    async def detokenize(self, raw: Mapping[str, Any]) -> str:
        """The text of tokens. Raises faults of the request."""
        return await tokens.detokenize(raw, self.directory.model(_model(raw)))

    def run(self, job: Job) -> AsyncGenerator[Delta, None]:
        """The outputs of a job. Raises any Fault. Leaving the iterator early cancels the job everywhere."""
        starts = siblings.starts(job.choices, job.options.n, self._dispatcher.generate)
        streams = [output.deltas(job, choice, start) for choice, start in zip(job.choices, starts, strict=True)]
        return self.meters.measure(job, streams[0] if len(streams) == 1 else merge(streams))

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request as running while inside. Raises Draining."""
        if self._draining:
            raise Draining("this gateway is shutting down")
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    def drain(self) -> None:
        """Refuse requests from now on."""
        self._draining = True

    async def idle(self) -> None:
        """Wait until no request is running."""
        await self._idle.wait()


def _model(raw: Mapping[str, Any]) -> str:
    return Fields(raw).text("model") or ""
