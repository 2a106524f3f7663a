"""The prefix index: which worker has which pages cached, as one set of page hashes per worker and epoch.

Each worker writes its own set. Every change of a set also goes on one bounded stream, numbered per worker and epoch in
the same atomic step. A reader follows the stream; one that finds a number missing reads that worker's whole set again,
in parts: changes that it meets on the stream meanwhile, applied on top in order, make the result exact, because SSCAN
returns what is in the set throughout, and the last change decides about everything else.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, TypeVar

from redis.asyncio import Redis

from shared.blackboard import keys
from shared.blackboard.connection import faults

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# A change on the stream adds and removes at most this many hashes each, and this many changes go in one round trip.
HASHES_PER_CHANGE = 1_000
CHANGES_PER_TRIP = 16
# A reader that falls further behind reads whole sets again. Bounds the stream to 128 MB if every change is a large one.
MAX_EVENTS = 4_096
EVENTS_TTL_MS = 60_000
EVENTS_PER_READ = 512
# A reader waits for changes for so long at most. A server looks at who has waited for long enough from time to time,
# by default ten times a second.
MAX_WAIT_MS = 2_000
MAX_LATE_MS = 1_000
# An SSCAN of so many hashes holds Redis up for less than a millisecond.
HASHES_PER_PART = 2_000

# KEYS: set, count, stream. ARGV: name, epoch, lifetime, hashes to add, hashes to remove (concatenated).
_CHANGE = f"""
local function each(command, hashes)
  local batch = {{}}
  for first = 1, #hashes, 16 do
    batch[#batch + 1] = string.sub(hashes, first, first + 15)
  end
  if #batch > 0 then redis.call(command, KEYS[1], unpack(batch)) end
end
each('SADD', ARGV[4])
each('SREM', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local number = redis.call('INCR', KEYS[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', {MAX_EVENTS}, '*',
  'w', ARGV[1], 'e', ARGV[2], 'n', number, '+', ARGV[4], '-', ARGV[5])
redis.call('PEXPIRE', KEYS[3], {EVENTS_TTL_MS})
return redis.call('SISMEMBER', KEYS[1], '{keys.COMPLETE}')
"""
# KEYS: set, count, stream, new set. ARGV: name, epoch, lifetime.
_REPLACE = f"""
redis.call('RENAME', KEYS[4], KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
local number = redis.call('INCR', KEYS[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', {MAX_EVENTS}, '*', 'w', ARGV[1], 'e', ARGV[2], 'n', number)
redis.call('PEXPIRE', KEYS[3], {EVENTS_TTL_MS})
"""
# KEYS: set, count. ARGV: cursor. One string for all hashes, because a client takes a microsecond for each value.
_SCAN = f"""
local part = redis.call('SSCAN', KEYS[1], ARGV[1], 'COUNT', {HASHES_PER_PART})
local complete = redis.call('SISMEMBER', KEYS[1], '{keys.COMPLETE}')
return {{complete, redis.call('GET', KEYS[2]) or '0', part[1], table.concat(part[2])}}
"""


@dataclass(frozen=True, slots=True)
class IndexEvent:
    """The `number`-th change of one worker's index: hashes concatenated. If `replaced`, all of it is new."""

    name: str
    epoch: int
    number: int
    stored: bytes = b""
    removed: bytes = b""
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class IndexPart:
    """Some hashes of a worker's index, concatenated; the next part is at `cursor`, none if that is 0. Events up to
    `number` need not be applied on top."""

    complete: bool
    number: int
    cursor: int
    hashes: bytes


class PrefixIndex:
    """Written by each worker for itself, read by routers. All methods raise BlackboardLost."""

    def __init__(self, redis: Redis, waiting: Redis) -> None:
        """A command on `waiting` may take longer than others by `MAX_WAIT_MS` and `MAX_LATE_MS`."""
        self._redis, self._waiting = redis, waiting

    # Written by workers -----------------------------------------------------------------------------------------------

    async def update(
        self, name: str, epoch: int, stored: Iterable[bytes], removed: Iterable[bytes], ttl_ms: int
    ) -> bool:
        """Add and remove page hashes of a worker, in one round trip if they are few; no hash may be in both.

        False if Redis has no complete index of this worker and epoch: `replace` it then.
        """
        where = (keys.index(name, epoch), keys.index_count(name, epoch), keys.EVENTS)
        complete = True
        with faults():
            for trip in _batches(zip_longest(_joined(stored), _joined(removed), fillvalue=b""), CHANGES_PER_TRIP):
                changes = [("EVAL", _CHANGE, 3, *where, name, epoch, ttl_ms, *change) for change in trip]
                complete = all(await self._send(changes))
        return complete

    async def replace(self, name: str, epoch: int, hashes: Iterable[bytes], ttl_ms: int) -> None:
        """Make `hashes` a worker's whole index. Readers see the old one or the new one, never a part."""
        new = keys.index_snapshot(name, epoch)
        where = (keys.index(name, epoch), keys.index_count(name, epoch), keys.EVENTS, new)
        with faults():
            await self._redis.delete(new)
            await self._send([("SADD", new, keys.COMPLETE)])
            for trip in _batches(_batches(hashes, HASHES_PER_CHANGE), CHANGES_PER_TRIP):
                await self._send([*(("SADD", new, *batch) for batch in trip), ("PEXPIRE", new, ttl_ms)])
            await self._send([("EVAL", _REPLACE, 4, *where, name, epoch, ttl_ms)])

    async def _send(self, commands: Iterable[tuple[object, ...]]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return list(await pipeline.execute())

    # Read by routers --------------------------------------------------------------------------------------------------

    async def position(self) -> bytes:
        """Where the stream ends at this moment."""
        with faults():
            last: Any = await self._redis.xrevrange(keys.EVENTS, count=1)
        return last[0][0] if last else b"0-0"

    async def events(self, position: bytes, wait_ms: int = 0) -> tuple[list[IndexEvent], bytes]:
        """Changes behind a position of the stream, and the position behind them; waits so long for the first, at most
        `MAX_WAIT_MS`."""
        block_ms = wait_ms or None
        with faults():
            answer: Any = await self._waiting.xread({keys.EVENTS: position}, count=EVENTS_PER_READ, block=block_ms)
        if not answer:
            return [], position
        ((_, entries),) = answer
        return [event for _, fields in entries if (event := _event(fields))], entries[-1][0]

    async def part(self, name: str, epoch: int, cursor: int) -> IndexPart:
        """Part of a worker's index; the first one is at cursor 0."""
        command = ("EVAL", _SCAN, 2, keys.index(name, epoch), keys.index_count(name, epoch), cursor)
        with faults():
            ((complete, number, after, hashes),) = await self._send([command])
        return IndexPart(bool(complete), int(number), int(after), hashes)

    async def hashes(self, name: str, epoch: int) -> set[bytes] | None:
        """All page hashes of a worker; None if Redis has no complete index of it."""
        with faults():
            members: Any = await self._redis.smembers(keys.index(name, epoch))
        complete = keys.COMPLETE.encode()
        return members - {complete} if complete in members else None

    async def numbers(self, workers: Sequence[tuple[str, int]]) -> list[int]:
        """How many changes each worker (name, epoch) has put on the stream."""
        if not workers:
            return []
        with faults():
            counts = await self._redis.mget([keys.index_count(name, epoch) for name, epoch in workers])
        return [int(count or 0) for count in counts]


def _event(fields: dict[bytes, bytes]) -> IndexEvent | None:
    try:
        name, epoch, number = fields[b"w"].decode(), int(fields[b"e"]), int(fields[b"n"])
    except (KeyError, ValueError) as error:  # its reader will find a number missing
        log.warning("a change of the prefix index is malformed: %r", error)
        return None
    return IndexEvent(name, epoch, number, fields.get(b"+", b""), fields.get(b"-", b""), replaced=b"+" not in fields)


def _joined(hashes: Iterable[bytes]) -> Iterator[bytes]:
    for batch in _batches(hashes, HASHES_PER_CHANGE):
        yield b"".join(batch)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
