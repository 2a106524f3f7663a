"""A worker: an engine, its pages, and the ways to other workers."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared import page_hash, rpc
from shared.engine.api import Engine
from shared.engine.loop import EngineLoop
from shared.worker.admission import Admission
from shared.worker.identity import Identity
from shared.worker.kv_servicer import KvServicer
from shared.worker.measures import Measures
from shared.worker.puller import Puller


@dataclass(frozen=True, slots=True)
class Worker:
    """What the servicers of one process share."""

    identity: Identity
    admission: Admission
    engine: Engine
    loop: EngineLoop
    kv_servicer: KvServicer
    puller: Puller
    channels: rpc.Channels
    measures: Measures

    def pages_for(self, hash_key: bytes, token_ids: Sequence[int]) -> tuple[list[bytes], int]:
        """Hashes of a sequence's pages as far as they may come out of a cache, and how many pages it needs.

        The last token is always computed, since its logits choose the next one: a page that ends with it is no use.
        """
        layout = self.engine.spec.layout
        hashes = page_hash.chain(hash_key, token_ids[:-1], layout.page_size)
        return hashes, layout.num_pages(len(token_ids))
