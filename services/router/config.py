"""Configuration of the router."""

import math

from pydantic import Field

from services.router.admission import Limits
from services.router.candidate import Weights
from services.router.rivals import RIVALS
from shared.config import ServiceConfig


class RouterConfig(ServiceConfig):
    """The router: places each request on workers."""

    index_max_pages: int = Field(
        8_000_000, ge=1, description="Pages that the mirror of the prefix index holds at most, about 60 bytes each."
    )
    policy: str = Field(
        "cost",
        pattern=f"^(cost|{'|'.join(RIVALS)})$",
        description="How workers are chosen: by cost; the others are there to compare with.",
    )
    local_prefill_max_tokens: int = Field(
        16, ge=0, description="A prompt with at most this many uncached tokens is prefilled on its decode worker."
    )
    remote_prefill_min_tokens: int = Field(
        0,
        ge=0,
        description="A prompt with at least this many is not, where there is a prefill worker; 0: by cost alone.",
    )
    min_pull_tokens: int = Field(
        32, ge=1, description="A prefix is pulled from a peer only if it is longer than ours by this many tokens."
    )
    chunk_tokens: int = Field(512, ge=1, description="Tokens of a prefill chunk, whose transfer no computation hides.")
    transfer_gb_per_s: float = Field(1.0, gt=0, description="Assumed until a worker has measured it.")
    handoff_ms: float = Field(5.0, ge=0, description="Fixed cost of a handoff or a pull.")
    missing_page_ms: float = Field(20.0, ge=0, description="Cost of each page that must be waited for.")
    default_prefill_ms_per_token: float = Field(0.5, gt=0, description="Assumed until a worker has measured it.")
    default_decode_step_ms: float = Field(20.0, gt=0, description="Assumed until a worker has measured it.")
    output_tokens: int = Field(128, ge=1, description="Output assumed until a worker has measured it.")
    min_sequence_share: float = Field(
        0.02,
        gt=0,
        description="A sequence adds at least this part of a decode step to it: load never counts for nothing.",
    )
    min_stalled: float = Field(
        1.0, ge=0, description="A local prefill counts as stalling at least this many running sequences."
    )
    load_weight: float = Field(1.0, ge=0, description="Weight of the sequences that share a decode worker's steps.")
    stall_weight: float = Field(
        0.2, ge=0, description="Weight of the time for which a local prefill stalls running decodes."
    )
    eviction_weight: float = Field(
        0.1, ge=0, description="Weight of the time to recompute the pages that must be evicted."
    )
    tie_ms: float = Field(1.0, ge=0, description="Costs that differ by no more than this are equal.")
    max_detour_ms: float = Field(
        math.inf,
        ge=0,
        description="A placement that costs more than the cheapest by this is not taken where that has no room: the "
        "request waits. Low: smooth answers, late first tokens.",
    )

    max_queued: int = Field(
        1_024, ge=0, description="Requests of a model that may wait in its queue when all workers are full."
    )
    no_worker_wait_ms: int = Field(
        5_000, ge=0, description="Time that a request waits for a worker to come, while none is there."
    )

    def limits(self) -> Limits:
        """The part of admission."""
        return Limits(**{name: getattr(self, name) for name in Limits.__dataclass_fields__})

    def weights(self) -> Weights:
        """The policy's part."""
        return Weights(**{name: getattr(self, name) for name in Weights.__dataclass_fields__})
