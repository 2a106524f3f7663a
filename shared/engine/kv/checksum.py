"""A checksum of a page's bytes: 64 bits that tell whether they arrived as they left."""

from collections.abc import Sequence

import xxhash

from shared.engine.kv.memory import PoolMemory


def page_checksums(memory: PoolMemory, page_ids: Sequence[int]) -> list[int]:
    """XXH3 (64 bits) over all bytes of each page, every state class and the gaps between them. It guards against
    accidents, not against malice: whoever can write pages can make any checksum come out."""
    return [xxhash.xxh3_64_intdigest(memory.page(page_id)) for page_id in page_ids]
