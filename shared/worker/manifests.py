"""Manifests: what a lease hands over, and what a reader insists on before it reads."""

from collections.abc import Sequence

from protos.forebay.v1 import kv_pb2
from shared.engine.kv.layout import KvLayout
from shared.errors import BadManifest


def manifest(layout: KvLayout, first_page: int, page_ids: Sequence[int], num_tokens: int) -> kv_pb2.Manifest:
    """Pages `page_ids`, which start at page `first_page` of a sequence and hold `num_tokens` tokens."""
    made = kv_pb2.Manifest(first_page=first_page, page_ids=page_ids, num_tokens=num_tokens)
    for state in layout.state_classes:
        made.state_classes.add(name=state.name, num_bytes=state.size_bytes * len(page_ids))
    return made


def check(found: kv_pb2.Manifest, layout: KvLayout, expected_first_page: int) -> None:
    """Raise BadManifest unless every state class is there in full and the pages follow the ones before.

    Page ids are checked against the pools by the transport.
    """
    if found.first_page != expected_first_page:
        raise BadManifest(f"the manifest begins at page {found.first_page}, not {expected_first_page}")
    num_pages = len(found.page_ids)
    if not (num_pages - 1) * layout.page_size < found.num_tokens <= num_pages * layout.page_size:
        raise BadManifest(f"{found.num_tokens} tokens cannot be in {num_pages} pages of {layout.page_size}")
    handed = {state.name: state.num_bytes for state in found.state_classes}
    needed = {state.name: state.size_bytes * num_pages for state in layout.state_classes}
    if handed != needed or len(found.state_classes) != len(needed):
        raise BadManifest(f"the manifest hands over {handed}, but {num_pages} pages hold {needed}")


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
        )
    return message
