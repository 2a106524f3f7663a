"""Names of KV pages: 128-bit hashes, chained so that equal hashes mean equal prefixes, keyed per tenant.

    hash[i] = BLAKE2b-128(key, hash[i-1] || tokens of page i as little-endian int32)

The key keeps tenants apart: without it nobody can compute, probe for or collide with a tenant's hashes (RFC 7693,
section 2.9, keyed mode).
"""

import array
import sys
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def tenant_key(tenant: str, salt: str = "") -> bytes:
    """The 32-byte hash key of a tenant, and of one of its own cache partitions if a salt is given."""
    return blake2b(salt.encode(), digest_size=32, key=blake2b(tenant.encode(), digest_size=32).digest()).digest()


def chain(key: bytes, token_ids: Sequence[int], page_size: int, parent: bytes = b"") -> list[bytes]:
    """Hashes of the full pages of a sequence; `parent` is the hash of the page before its first token."""
    data = array.array("i", token_ids)
    if sys.byteorder == "big":
        data.byteswap()
    raw, step, hashes = data.tobytes(), page_size * data.itemsize, []
    for end in range(step, len(raw) + 1, step):
        parent = blake2b(parent + raw[end - step : end], digest_size=HASH_BYTES, key=key).digest()
        hashes.append(parent)
    return hashes


def join(hashes: Sequence[bytes]) -> bytes:
    """The wire form: hashes concatenated."""
    return b"".join(hashes)


def split(joined: bytes) -> list[bytes]:
    """The hashes in a wire form. Raises ValueError if it has a broken one."""
    if len(joined) % HASH_BYTES:
        raise ValueError(f"{len(joined)} bytes are not a whole number of {HASH_BYTES}-byte page hashes")
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]
