"""Runs of a script on a connection of their own: those wanted at the same moment in one round trip, none with more ado
than it takes.

A client of redis-py has a connection given for each command and takes it back, and a task for each write, to end it in
time: 80 us of the 150 that a reservation takes of a router's processor, and 0.3 ms of 0.8 where the last one was a
while ago. Here redis-py opens the connection, writes and reads; what waits for an answer ends by itself.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Generator, Sequence
from contextvars import Context
from dataclasses import dataclass
from hashlib import sha1
from types import coroutine
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
    until: float
    """When it is given up, by the loop's clock."""


class Together:
    """Runs go out in the order in which they are asked for, and are answered in it: the first of a turn of the event
    loop at once, all others of that turn together behind it."""

    def __init__(self, redis: Redis, script: str, timeout_s: float) -> None:
        self._redis, self._script, self._timeout_s = redis, script, timeout_s
        self._sha = sha1(script.encode(), usedforsecurity=False).hexdigest()
        self._wanted: list[_Run] = []
        self._opening: asyncio.Task[None] | None = None
        self._is_next_due = False
        """Whether what is wanted goes out in the next turn."""
        self._conversation: _Conversation | None = None
        self._is_closed = False

    def run(self, keys: Sequence[str], args: Sequence[str | int]) -> Coroutine[Any, Any, Any]:
        """Ask for a run now; to be awaited is what the script answers. For somebody who is cancelled meanwhile it may
        run, too, but not behind what that one asks for afterwards.

        Raises RedisError, or TimeoutError if there is no answer in time. A run whose connection was lost is sent once
        more, on the next one, which knows the script: the server may have been started again. Scripts of ours may be
        repeated.
        """
        command = hiredis.pack_command(("EVALSHA", self._sha, len(keys), *keys, *args))  # type: ignore[arg-type]
        return self._answered(self._ask(command))

    async def close(self) -> None:
        """End the connection; whoever waits is told that it was lost, and so is whoever asks again."""
        self._is_closed = True
        if self._opening is not None:
            self._opening.cancel()
        if self._conversation is not None:
            await self._conversation.end(LostConnection("closed"))

    async def _answered(self, run: _Run) -> Any:
        try:
            return await run.answer
        except (LostConnection, NoScriptError):
            return await self._ask(run.command).answer

    def _ask(self, command: bytes) -> _Run:
        loop = asyncio.get_running_loop()
        run = _Run(command, loop.create_future(), loop.time() + self._timeout_s)
        self._wanted.append(run)
        if not self._is_next_due:
            self._say()
            self._is_next_due = True
            loop.call_soon(self._say)
        return run

    def _say(self) -> None:
        """Send what is wanted, on a new connection once there is one."""
        self._is_next_due = False
        if not self._wanted or self._opening is not None:
            return
        if self._is_closed:
            self._fail(LostConnection("closed"))
        elif self._conversation is None or self._conversation.is_over:
            loop = asyncio.get_running_loop()
            self._opening = loop.create_task(self._open(), context=Context())  # of no request: without its deadline
        else:
            wanted, self._wanted = self._wanted, []
            self._conversation.say([run for run in wanted if not run.answer.done()])

    async def _open(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                self._conversation = await self._opened()
        except (RedisError, OSError, RuntimeError) as error:
            self._fail(error)
        except asyncio.CancelledError:
            self._fail(LostConnection("closed"))
            raise
        finally:
            self._opening = None
        self._say()

    def _fail(self, error: Exception) -> None:
        for run in self._wanted:
            _settle(run.answer, error)
        self._wanted = []

    async def _opened(self) -> "_Conversation":
        connection = self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()
            await connection.send_command("SCRIPT LOAD", self._script)
            await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return _Conversation(connection)


class _Conversation:
    """One connection: what is said in order is answered in order."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._connection = connection
        connection.socket_timeout = None  # `_look` sees to it for all
        self._runs: deque[_Run] = deque()
        self._loop = asyncio.get_running_loop()
        self._hearing = self._loop.create_task(self._hear(), context=Context())
        self._ending: asyncio.Task[None] | None = None
        self._is_watched = False
        self.is_over = False

    def say(self, runs: Sequence[_Run]) -> None:
        """Send these. Who waits for them is told if that fails."""
        if not runs:
            return
        self._runs.extend(runs)
        if not self._is_watched:
            self._is_watched = True
            self._loop.call_at(runs[0].until, self._look)
        writing = self._connection.send_packed_command([run.command for run in runs], check_health=False)
        try:
            awaited = writing.send(None)
        except StopIteration:
            return  # as mostly: a task, to write what need not wait, would cost more than the writing
        except (RedisError, OSError, RuntimeError) as error:
            self._end_soon(LostConnection(str(error)))
        else:
            self._loop.create_task(_rest(writing, awaited), context=Context())

    def _look(self) -> None:
        """End the connection if a run has waited for too long; else come again when the oldest one will have."""
        self._is_watched = bool(self._runs) and not self.is_over
        if not self._is_watched:
            return
        if self._runs[0].until <= self._loop.time():
            self._end_soon(LostConnection("no answer in time"))  # this one may never answer again
        else:
            self._loop.call_at(self._runs[0].until, self._look)

    def _end_soon(self, reason: RedisError) -> None:
        self.is_over = True  # whoever comes next is to find another
        self._ending = self._loop.create_task(self.end(reason), context=Context())

    async def end(self, reason: RedisError) -> None:
        """Close the connection, and tell those who wait why."""
        self.is_over = True
        if self._hearing is not asyncio.current_task():
            self._hearing.cancel()
        now = self._loop.time()
        while self._runs:
            run = self._runs.popleft()
            _settle(run.answer, reason if run.until > now else TimeoutError())
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
            _settle(self._runs.popleft().answer, answer)


@coroutine
def _rest(work: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """What is left of work that was begun outside of any task, and waits for this."""
    try:
        yield awaited
        yield from work
    except OSError:
        return  # the connection was lost, which `_hear` notices


def _settle(answer: Answer, found: Any) -> None:
    """Whoever waited for it may have left."""
    if not answer.done():
        (answer.set_exception if isinstance(found, Exception) else answer.set_result)(found)
