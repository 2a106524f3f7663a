"""A checksum of a page's bytes: 64 bits that tell whether they arrived as they left."""

import asyncio
from collections.abc import Sequence

import xxhash

from shared.engine.kv.memory import PoolMemory
from shared.errors import CorruptPages


def page_checksums(memory: PoolMemory, page_ids: Sequence[int]) -> list[int]:
    """XXH3 (64 bits) over all bytes of each page, every state class and the gaps between them. It guards against
    accidents, not against malice: whoever can write pages can make any checksum come out."""
    return [xxhash.xxh3_64_intdigest(memory.page(page_id)) for page_id in page_ids]


async def verify(memory: PoolMemory, page_ids: Sequence[int], expected: Sequence[int]) -> None:
    """Compare pages that arrived with the checksums that their owner gave; without any, all pass. Raises CorruptPages,
    which says of how many pages (`num_corrupt`)."""
    if not expected:
        return
    found = await asyncio.to_thread(page_checksums, memory, page_ids)
    num_corrupt = sum(ours != theirs for ours, theirs in zip(found, expected, strict=True))
    if num_corrupt:
        raise CorruptPages(f"{num_corrupt} of {len(found)} pages", metadata={"num_corrupt": str(num_corrupt)})
