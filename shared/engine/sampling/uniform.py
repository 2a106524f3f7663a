"""Random numbers without a state: one is a function of the seed, the position it is for, and a stream.

So a sequence can be continued by another worker, in another batch or after a preemption, and draws what it would have
drawn. The generator is BLAKE2b (RFC 7693) as a keyless hash of the counter; any of its bits is as good as another.
"""

import struct
from hashlib import blake2b

# What a number is for, so that no two uses share one.
CHOICE = 0


def uniform(seed: int, position: int, stream: int) -> float:
    """A number in [0, 1), a multiple of 2**-53. `seed` is taken modulo 2**64; `position` counts tokens from the
    sequence's start, prompt included."""
    counter = struct.pack("<QQQ", seed % 2**64, position, stream)
    digest = blake2b(counter, digest_size=8, person=b"forebay uniform").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
