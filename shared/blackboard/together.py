"""Runs of a script that are wanted at the same moment, in one round trip."""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError

# On one connection; a longer burst takes several, lest the first of it waits for the last.
MOST = 32


class _Run(NamedTuple):
    keys: Sequence[str]
    args: Sequence[str | int]
    answer: asyncio.Future[Any]


class Together:
    """All runs that are asked for in one turn of the event loop go out on one connection, in order.

    Requests that come in a burst, as the streams of a worker that died do, would otherwise take a connection each, most
    of which would have to be opened first.
    """

    def __init__(self, redis: Redis, script: AsyncScript) -> None:
        self._redis, self._script = redis, script
        self._wanted: list[_Run] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        """What the script answers. Raises as a call of the script does."""
        run = _Run(keys, args, asyncio.get_running_loop().create_future())
        self._wanted.append(run)
        if len(self._wanted) % MOST == 1:
            self._sending.add(task := asyncio.create_task(self._send()))
            task.add_done_callback(self._sending.discard)
        return await run.answer

    async def _send(self) -> None:
        """Begins in the next turn, behind whoever else is on the way."""
        wanted, self._wanted = self._wanted[:MOST], self._wanted[MOST:]
        try:
            answers = await self._answers(wanted)
        except Exception as error:
            answers = [error] * len(wanted)
        for run, answer in zip(wanted, answers, strict=True):
            if not run.answer.done():
                (run.answer.set_exception if isinstance(answer, Exception) else run.answer.set_result)(answer)

    async def _answers(self, wanted: Sequence[_Run]) -> Sequence[Any]:
        """An answer or an error for each. A server that does not know the script, because it was started again, learns
        it from the first run alone."""
        if len(wanted) == 1:
            return [await self._script(keys=wanted[0].keys, args=wanted[0].args)]
        pipeline = self._redis.pipeline(transaction=False)
        for run in wanted:
            pipeline.evalsha(self._script.sha, len(run.keys), *run.keys, *run.args)
        answers = await pipeline.execute(raise_on_error=False)
        if isinstance(answers[0], NoScriptError):
            first = await self._answers(wanted[:1])
            return [*first, *await self._answers(wanted[1:])]
        return list(answers)
