"""The blackboard: who is there. Every process writes its own registration, again and again; one that stops is gone."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from shared.blackboard import keys
from shared.blackboard.admission import AdmissionBoard
from shared.blackboard.connection import connect, faults
from shared.blackboard.index import MAX_LATE_MS, MAX_WAIT_MS, PrefixIndex
from shared.blackboard.placements import PlacementBoard
from shared.blackboard.records import Registration, Role
from shared.blackboard.together import Together
from shared.errors import BlackboardLost, StaleEpoch

log = logging.getLogger(__name__)

TIMEOUT_MS = 1_000
# Names that have not registered for this long are dropped from the list of members.
FORGET_MS = 3_600_000

# What every process asks for twice a second, in one script: its keys and answers cost less than commands of their own.
#   KEYS: members, process, index, count. ARGV: 'register', name, registration, lifetime, now, channel or nothing.
#   KEYS: members of each role. ARGV: 'list', the pattern of each role's processes.
_SCRIPT = f"""
if ARGV[1] == 'list' then
  local found = {{}}
  for role, members in ipairs(KEYS) do
    for _, registration in ipairs(redis.call('SORT', members, 'ALPHA', 'GET', ARGV[role + 1])) do
      if registration then found[#found + 1] = registration end
    end
  end
  return found
end
local members, process, index, count = unpack(KEYS)
local _, name, registration, ttl_ms, now_ms, channel = unpack(ARGV)
local previous = redis.call('SET', process, registration, 'PX', ttl_ms, 'GET')
redis.call('ZADD', members, now_ms, name)
redis.call('ZREMRANGEBYSCORE', members, '-inf', now_ms - {FORGET_MS})
local is_complete = redis.call('SISMEMBER', index, '{keys.COMPLETE}')
redis.call('PEXPIRE', index, ttl_ms)
redis.call('PEXPIRE', count, ttl_ms)
if channel ~= '' then redis.call('PUBLISH', channel, name) end
return {{previous, is_complete}}
"""


class Blackboard:
    """One process's view of Redis. All methods raise BlackboardLost when Redis does not answer in time.

    Safe for concurrent use within one event loop.
    """

    def __init__(self, url: str, timeout_ms: int = TIMEOUT_MS) -> None:
        self._redis: Redis = connect(url, timeout_ms)
        self._waiting: Redis = connect(url, timeout_ms + MAX_WAIT_MS + MAX_LATE_MS)
        self.index = PrefixIndex(self._redis, self._waiting)
        self.admission = AdmissionBoard(self._redis, timeout_ms / 1000)
        self.placements = PlacementBoard(self._redis)
        self._runs = Together(self._redis, _SCRIPT, timeout_ms / 1000)

    async def close(self) -> None:
        """Close the connections."""
        await self.admission.close()
        await self._runs.close()
        await self._waiting.aclose()
        await self._redis.aclose()

    async def next_epoch(self, name: str) -> int:
        """A generation number higher than all that `name` had, also after Redis lost its data."""
        pipeline = self._redis.pipeline()
        pipeline.set(keys.epoch(name), time.time_ns() // 1_000_000, nx=True)
        pipeline.incr(keys.epoch(name))
        with faults():
            return int((await pipeline.execute())[1])

    async def register(self, registration: Registration, ttl_ms: int, *, announce: bool = False) -> bool:
        """Write a registration, which lasts `ttl_ms`, and renew the worker's index for as long; one round trip.

        Announce the first one and each that changes what others must know at once (draining). Returns False if Redis
        has no complete index of this incarnation (at first, and after Redis lost its data): a worker then writes its
        whole index. Raises StaleEpoch if a newer incarnation of the same name has registered: end this one.
        """
        role, name, epoch = registration.role, registration.name, registration.epoch
        where = keys.members(role), keys.process(role, name), keys.index(name, epoch), keys.index_count(name, epoch)
        about = registration.model_dump_json(), ttl_ms, time.time_ns() // 1_000_000, keys.CHANGES if announce else ""
        with faults():
            previous, complete = await self._runs.run(where, ("register", name, *about))
        if (other := _parse(previous)) is not None and other.epoch > epoch:
            raise StaleEpoch(f"{name} was started again as epoch {other.epoch}; this is epoch {epoch}")
        return bool(complete)

    async def deregister(self, registration: Registration) -> None:
        """Remove a process and its index, and announce it. A newer incarnation of the same name stays."""
        role, name = registration.role, registration.name
        pipeline = self._redis.pipeline()
        pipeline.unlink(keys.index(name, registration.epoch), keys.index_count(name, registration.epoch))
        with faults():
            current = _parse(await self._redis.get(keys.process(role, name)))
            if current is None or current.epoch <= registration.epoch:
                pipeline.delete(keys.process(role, name))
                pipeline.zrem(keys.members(role), name)
                pipeline.publish(keys.CHANGES, name)
            await pipeline.execute()

    async def processes(self, *roles: Role) -> list[Registration]:
        """Every living process of these roles, by role and name, in one round trip."""
        members = [keys.members(role) for role in roles]
        with faults():
            answers = await self._runs.run(members, ("list", *(keys.process(role, "*") for role in roles)))
        found = (_parse(raw) for raw in answers)
        return [registration for registration in found if registration is not None]

    async def ages_ms(self, *roles: Role) -> dict[str, float]:
        """How long ago each process of these roles registered last, by their clocks and ours."""
        pipeline = self._redis.pipeline(transaction=False)
        for role in roles:
            pipeline.zrange(keys.members(role), 0, -1, withscores=True)
        with faults():
            answers = await pipeline.execute()
        now_ms = time.time_ns() / 1e6
        return {name.decode(): max(0.0, now_ms - at_ms) for answer in answers for name, at_ms in answer}

    @asynccontextmanager
    async def changes(self) -> AsyncIterator["Changes"]:
        """Listen to announcements while inside."""
        pubsub = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            with faults():
                await pubsub.subscribe(keys.CHANGES)
            yield Changes(pubsub)
        finally:
            # A fault here would take the place of a cancellation, and the task that was cancelled would go on.
            with suppress(BlackboardLost), faults():
                await pubsub.aclose()  # type: ignore[no-untyped-call]


class Changes:
    """Announcements of processes that came, went or began to drain. Some may be lost: read the board now and then."""

    def __init__(self, pubsub: PubSub) -> None:
        self._pubsub = pubsub

    async def wait(self, timeout_s: float) -> bool:
        """Wait for a change; False if there was none in time. Raises BlackboardLost."""
        end = time.monotonic() + timeout_s
        with faults():
            while (left := end - time.monotonic()) > 0:
                if await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=left):
                    return True
        return False


def _parse(raw: bytes | str | None) -> Registration | None:
    if raw is None:
        return None
    try:
        return Registration.model_validate_json(raw)
    except ValidationError as error:
        log.warning("a registration on the blackboard is malformed: %s", error)
        return None
