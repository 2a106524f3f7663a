"""How a page is laid out, and the hash that says who can exchange pages with whom."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True, slots=True)
class StateClass:
    """One kind of state per token: attention KV, MLA latents, indexer keys … `dtype` is a float, or the name of a form
    that packs floats and their scales (`kv.formats`).

    `offset_bytes` and `size_bytes` are within a page, all layers of the class together. A class that ranks share out
    by heads is `num_heads` spans, of which that of `first_head` is the first; each has `num_layers` x 2 parts (keys,
    values). Of one with no heads every rank has the whole.
    """

    name: str
    num_layers: int
    dtype: str
    offset_bytes: int
    size_bytes: int
    first_head: int = 0
    num_heads: int = 0


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A page: `page_size` tokens, every layer, every state class, one contiguous span of `page_bytes`."""

    page_size: int
    page_bytes: int
    state_classes: tuple[StateClass, ...]

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    @property
    def bytes_per_token(self) -> float:
        """What a token takes, its part of the padding between state classes included."""
        return self.page_bytes / self.page_size


@dataclass(frozen=True, slots=True)
class Span:
    """`num_bytes` bytes of a page: where they are in the peer's page, and where in ours."""

    remote: int
    local: int
    num_bytes: int


def pack(
    page_size: int,
    classes: dict[str, tuple[int, str, int]],
    align_bytes: int = 64,
    heads: Mapping[str, range] | None = None,
) -> KvLayout:
    """Lay state classes out one after another. `classes` maps a name to (layers, dtype, bytes per page), `heads` the
    names of those with heads to the heads in them."""
    offset, packed = 0, []
    for name, (num_layers, dtype, size_bytes) in classes.items():
        own = (heads or {}).get(name, range(0))
        packed.append(StateClass(name, num_layers, dtype, offset, size_bytes, own.start, len(own)))
        offset += -(-size_bytes // align_bytes) * align_bytes
    return KvLayout(page_size, offset, tuple(packed))


def compatibility_hash(model: str, revision: str, arithmetic: str, layout: KvLayout) -> str:
    """32 hex digits over everything that must agree before pages are exchanged; `arithmetic` is what computes them: the
    dtype, and what activations are rounded to beyond it (docs/decisions/0038)."""
    classes = [
        [c.name, c.num_layers, c.dtype, c.offset_bytes, c.size_bytes, *(["head by head"] if c.num_heads else [])]
        for c in layout.state_classes
    ]
    facts = json.dumps(
        [model, revision, arithmetic, layout.page_size, layout.page_bytes, classes], separators=(",", ":")
    )
    return blake2b(facts.encode(), digest_size=16).hexdigest()
