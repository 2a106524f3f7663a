"""Manifests: what a lease hands over, and what a reader insists on before it reads."""

from collections.abc import Sequence

from protos.forebay.v1 import kv_pb2
from shared.engine.kv.layout import KvLayout, StateClass
from shared.errors import BadManifest

# What a worker can be configured to, too; a reader would do nothing but renew a shorter one.
MIN_LEASE_TTL_MS = 100


def manifest(layout: KvLayout, first_page: int, page_ids: Sequence[int], num_tokens: int) -> kv_pb2.Manifest:
    """Pages `page_ids`, which start at page `first_page` of a sequence and hold `num_tokens` tokens."""
    made = kv_pb2.Manifest(first_page=first_page, page_ids=page_ids, num_tokens=num_tokens)
    for state in layout.state_classes:
        made.state_classes.add(name=state.name, num_bytes=state.size_bytes * len(page_ids))
    return made


def check(found: kv_pb2.Manifest, layout: KvLayout, expected_first_page: int) -> None:
    """Raise BadManifest unless every state class is there in full and the pages follow the ones before, each named
    once.

    Page ids are checked against the pools by the transport.
    """
    if found.first_page != expected_first_page:
        raise BadManifest(f"the manifest begins at page {found.first_page}, not {expected_first_page}")
    num_pages = len(found.page_ids)
    if not (num_pages - 1) * layout.page_size < found.num_tokens <= num_pages * layout.page_size:
        raise BadManifest(f"{found.num_tokens} tokens cannot be in {num_pages} pages of {layout.page_size}")
    if len(found.page_checksums) % max(1, num_pages):  # of how many ranks they are, the pools know
        raise BadManifest(f"the manifest has {len(found.page_checksums)} checksums for {num_pages} pages")
    if len(set(found.page_ids)) != num_pages:
        raise BadManifest("the manifest names a page twice")
    handed = {state.name: state.num_bytes for state in found.state_classes}
    needed = {state.name: state.size_bytes * num_pages for state in layout.state_classes}
    if handed != needed or len(found.state_classes) != len(needed):
        raise BadManifest(f"the manifest hands over {handed}, but {num_pages} pages hold {needed}")


def check_lease(found: kv_pb2.Lease, owner: kv_pb2.WorkerRef) -> None:
    """Raise BadManifest unless the lease is of this incarnation of its owner, and lasts."""
    if found.epoch != owner.epoch:
        raise BadManifest(f"the lease is of epoch {found.epoch}, not {owner.epoch}")
    if found.ttl_ms < MIN_LEASE_TTL_MS:
        raise BadManifest(f"a lease of {found.ttl_ms} ms cannot be kept alive")


def wire_layout(layout: KvLayout) -> kv_pb2.KvLayout:
    """The layout as a message."""
    message = kv_pb2.KvLayout(page_size=layout.page_size, page_bytes=layout.page_bytes)
    for state in layout.state_classes:
        message.state_classes.add(
            name=state.name,
            num_layers=state.num_layers,
            dtype=state.dtype,
            offset_bytes=state.offset_bytes,
            size_bytes=state.size_bytes,
            first_head=state.first_head,
            num_heads=state.num_heads,
        )
    return message


def layout(message: kv_pb2.KvLayout) -> KvLayout:
    """The layout in a message."""
    states = (
        StateClass(s.name, s.num_layers, s.dtype, s.offset_bytes, s.size_bytes, s.first_head, s.num_heads)
        for s in message.state_classes
    )
    return KvLayout(message.page_size, message.page_bytes, tuple(states))
