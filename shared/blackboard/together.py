"""Runs of a script on a connection of their own: those wanted at the same moment in one round trip, none with more ado
than it takes.

A client of redis-py has a connection given for each command and takes it back, and a task for each write, to end it in
time: 80 us of the 150 that a reservation takes of a router's processor, and 0.3 ms of 0.8 where the last one was a
while ago. Here redis-py opens the connection, writes and reads; what waits for an answer ends by itself.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError

Answer = asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class _Run:
    command: bytes
    answer: Answer
    conversation: "_Conversation | None" = None
    """Where it was said."""


class Together:
    """All runs that are asked for in one turn of the event loop go out together, and are answered in this order."""

    def __init__(self, redis: Redis, script: str, timeout_s: float) -> None:
        self._redis, self._script, self._timeout_s = redis, script, timeout_s
        self._sha = sha1(script.encode(), usedforsecurity=False).hexdigest()
        self._wanted: list[_Run] = []
        self._saying: asyncio.Task[None] | None = None
        self._conversation: _Conversation | None = None

    async def run(self, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        """What the script answers. Raises RedisError, or TimeoutError if there is no answer in time.

        A run whose connection was lost is sent once more, on the next one, which knows the script: the server may have
        been started again. Scripts of ours may be repeated.
        """
        command = hiredis.pack_command(("EVALSHA", self._sha, len(keys), *keys, *args))  # type: ignore[arg-type]
        try:
            return await self._answer(command)
        except (LostConnection, NoScriptError):
            return await self._answer(command)

    async def close(self) -> None:
        """End the connection; whoever waits is told that it was lost."""
        if self._saying is not None:
            self._saying.cancel()
        if self._conversation is not None:
            await self._conversation.end(LostConnection("closed"))

    async def _answer(self, command: bytes) -> Any:
        loop = asyncio.get_running_loop()
        self._wanted.append(run := _Run(command, loop.create_future()))
        if self._saying is None:
            # In the next turn, behind whoever else is on the way; of no request, so without its deadline.
            self._saying = loop.create_task(self._say(), context=Context())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await run.answer
        except TimeoutError:
            if run.conversation is not None:  # whoever comes next is to find another: this one may never end by itself
                await run.conversation.end(LostConnection("no answer in time"))
            raise

    async def _say(self) -> None:
        """Send what is wanted, until nothing is."""
        try:
            while wanted := [run for run in self._wanted if not run.answer.done()]:
                self._wanted = []
                try:
                    await (await self._open()).say(wanted)
                except (RedisError, OSError, RuntimeError) as error:
                    for run in wanted:
                        _settle(run.answer, error)
        finally:
            self._wanted, self._saying = [], None

    async def _open(self) -> "_Conversation":
        if self._conversation is None or self._conversation.is_over:
            connection = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
            try:
                await connection.connect()
                await connection.send_command("SCRIPT LOAD", self._script)
                await connection.read_response()
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            self._conversation = _Conversation(connection)
        return self._conversation


class _Conversation:
    """One connection: what is said in order is answered in order."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        connection.socket_timeout = None  # whoever waits has a time of his own
        self._answers: deque[Answer] = deque()
        self._hearing = asyncio.get_running_loop().create_task(self._hear(), context=Context())
        self.is_over = False

    async def say(self, runs: Sequence[_Run]) -> None:
        """Send these. Raises as redis-py does."""
        for run in runs:
            run.conversation = self
            self._answers.append(run.answer)
        await self._connection.send_packed_command([run.command for run in runs], check_health=False)

    async def end(self, reason: RedisError) -> None:
        """Close the connection, and tell those who wait why."""
        self.is_over = True
        if self._hearing is not asyncio.current_task():
            self._hearing.cancel()
        while self._answers:
            _settle(self._answers.popleft(), reason)
        await self._connection.disconnect(nowait=True)

    async def _hear(self) -> None:
        """Pass answers on until the connection ends."""
        answer: Any
        while True:
            try:
                answer = await self._connection.read_response()
            except NoScriptError as error:  # somebody has made the server forget it
                return await self.end(error)
            except ResponseError as error:
                answer = error
            except (RedisError, OSError, RuntimeError) as error:
                return await self.end(LostConnection(str(error)))
            _settle(self._answers.popleft(), answer)


def _settle(answer: Answer, found: Any) -> None:
    """Whoever waited for it may have left."""
    if not answer.done():
        (answer.set_exception if isinstance(found, Exception) else answer.set_result)(found)
