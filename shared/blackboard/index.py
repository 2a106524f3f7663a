"""The prefix index: which worker has which pages cached, as one set of page hashes per worker and epoch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from redis.asyncio import Redis

from shared.blackboard import keys
from shared.blackboard.connection import faults
from shared.page_hash import HASH_BYTES

Item = TypeVar("Item")

# SADD and SREM take this many hashes at once, and this many such commands go in one round trip.
HASHES_PER_COMMAND = 1_000
COMMANDS_PER_TRIP = 16
# A lookup asks for at most this many leading pages, so that it cannot hold Redis up.
MAX_LOOKUP_HASHES = 4_096

# For each key the length of the longest leading run of the hashes concatenated in ARGV[1] that the set has. Counted in
# Redis, because decoding one integer per worker and page costs the router 50 ms for 16 workers and 1,000 pages, against
# 0.5 ms this way. Chunks grow, so that a worker without the first page costs next to nothing.
_LEADING_RUNS = f"""
local size, runs, hashes = {HASH_BYTES}, {{}}, {{}}
local total = math.floor(#ARGV[1] / size)
for worker, key in ipairs(KEYS) do
  local run, width = 0, 8
  while run < total do
    local last, hits = math.min(run + width, total), 0
    for page = #hashes, last - 1 do
      hashes[page + 1] = string.sub(ARGV[1], page * size + 1, (page + 1) * size)
    end
    for _, found in ipairs(redis.call('SMISMEMBER', key, unpack(hashes, run + 1, last))) do
      if found == 0 then break end
      hits = hits + 1
    end
    local whole = run + hits == last
    run, width = run + hits, math.min(width * 2, 256)
    if not whole then break end
  end
  runs[worker] = run
end
return runs
"""


class PrefixIndex:
    """Written by each worker for itself, read by routers. All methods raise BlackboardLost."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._leading_runs = redis.register_script(_LEADING_RUNS)

    async def update(
        self, name: str, epoch: int, stored: Iterable[bytes], removed: Iterable[bytes], ttl_ms: int
    ) -> bool:
        """Add and remove page hashes of a worker, in one round trip if they are few; no hash may be in both.

        False if Redis has no complete index of this worker and epoch: `replace` it then.
        """
        key = keys.index(name, epoch)
        with faults():
            for trip in _batches(_commands(key, stored, removed), COMMANDS_PER_TRIP):
                await self._send(trip)
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.sismember(key, keys.COMPLETE)
            pipeline.pexpire(key, ttl_ms)
            complete, _ = await pipeline.execute()
        return bool(complete)

    async def replace(self, name: str, epoch: int, hashes: Iterable[bytes], ttl_ms: int) -> None:
        """Make `hashes` a worker's whole index. Readers see the old one or the new one, never a part."""
        new = keys.index_snapshot(name, epoch)
        with faults():
            await self._redis.delete(new)
            await self._send([("SADD", new, keys.COMPLETE)])
            for trip in _batches(_commands(new, hashes, ()), COMMANDS_PER_TRIP):
                await self._send([*trip, ("PEXPIRE", new, ttl_ms)])
            await self._send([("PEXPIRE", new, ttl_ms), ("RENAME", new, keys.index(name, epoch))])

    async def leading_runs(self, page_hashes: bytes, workers: Sequence[tuple[str, int]]) -> list[int]:
        """How many leading pages each worker (name, epoch) has, in one round trip.

        `page_hashes` are concatenated hashes of 16 bytes; pages beyond MAX_LOOKUP_HASHES are not asked for.
        """
        if not workers or not page_hashes:
            return [0] * len(workers)
        sets = [keys.index(name, epoch) for name, epoch in workers]
        with faults():
            return list(await self._leading_runs(keys=sets, args=[page_hashes[: MAX_LOOKUP_HASHES * HASH_BYTES]]))

    async def _send(self, commands: Iterable[tuple[object, ...]]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        await pipeline.execute()


def _commands(key: str, stored: Iterable[bytes], removed: Iterable[bytes]) -> Iterator[tuple[object, ...]]:
    for batch in _batches(stored, HASHES_PER_COMMAND):
        yield ("SADD", key, *batch)
    for batch in _batches(removed, HASHES_PER_COMMAND):
        yield ("SREM", key, *batch)


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
