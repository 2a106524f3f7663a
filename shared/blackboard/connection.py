"""The connection to Redis: short timeouts, reconnecting by itself, and one fault for everything that can go wrong."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import RedisError

from shared.errors import BlackboardLost

# Commands beyond this many at once wait for a connection.
MAX_CONNECTIONS = 32


def connect(url: str, timeout_ms: int) -> Redis:
    """A client whose every wait ends after `timeout_ms`. It connects when first used, and again after a loss.

    A command on a connection that Redis has closed meanwhile is sent once more: all commands of ours may be repeated.
    Raises ValueError if the url is malformed.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=timeout_ms / 1000,
        socket_timeout=timeout_ms / 1000,
        socket_connect_timeout=timeout_ms / 1000,
        retry=Retry(NoBackoff(), 1, supported_errors=(LostConnection,)),
        decode_responses=False,
        protocol=2,
    )
    return Redis.from_pool(pool)


@contextmanager
def faults() -> Iterator[None]:
    """Turn every failure of Redis inside into BlackboardLost.

    A cancellation that comes meanwhile always gets through: redis-py can swallow one while it tears a lost connection
    down, and a loop around it would then never end. A RuntimeError is how uvloop refuses to write to a connection that
    the other side has closed a moment before; redis-py lets it through.
    """
    task = asyncio.current_task()
    earlier = task.cancelling() if task else 0
    try:
        yield
    except (RedisError, OSError, TimeoutError, RuntimeError) as error:
        if task and task.cancelling() > earlier:
            raise asyncio.CancelledError from error
        raise BlackboardLost(f"Redis: {error or type(error).__name__}") from error
    if task and task.cancelling() > earlier:
        raise asyncio.CancelledError
