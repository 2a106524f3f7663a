"""What the policy weighs: a query, workers as the router sees them, and candidates with their costs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.blackboard.records import ModelCard, Registration, Role

Terms = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """What the policy is told by configuration; each field is described in `services/router/config.py`."""

    policy: str = "cost"
    local_prefill_max_tokens: int = 16
    remote_prefill_min_tokens: int = 0
    min_pull_tokens: int = 32
    chunk_tokens: int = 512
    transfer_gb_per_s: float = 1.0
    handoff_ms: float = 5.0
    missing_page_ms: float = 20.0
    default_prefill_ms_per_token: float = 0.5
    default_decode_step_ms: float = 20.0
    output_tokens: int = 128
    min_sequence_share: float = 0.02
    min_stalled: float = 1.0
    load_weight: float = 1.0
    stall_weight: float = 0.2
    eviction_weight: float = 0.1
    tie_ms: float = 1.0
    max_detour_ms: float = math.inf


class Query(NamedTuple):
    """A request to place. `affinity` is equal for prompts that begin alike; 0 `max_tokens` are as many as usual."""

    request_id: str
    model: str
    num_prompt_tokens: int
    affinity: bytes = b""
    excluded: frozenset[str] = frozenset()
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker at this moment: what it reported, and what was placed on it since."""

    registration: Registration
    card: ModelCard
    num_cached_pages: int = 0
    queue_ms: float = 0.0
    num_decoding: int = 0
    stale_ms: float = 0.0

    @property
    def name(self) -> str:
        """Its stable name."""
        return self.registration.name

    @property
    def role(self) -> Role:
        """Prefill or decode."""
        return self.registration.role

    @property
    def group(self) -> str:
        """Workers of one group can exchange pages."""
        return self.card.compatibility_hash


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement with its cost, or with the reason why it cannot be."""

    decode: Worker | None
    prefill: Worker | None
    source: Worker | None
    explained: Callable[[], Terms] = field(default=tuple, compare=False, repr=False)
    """Its terms are put together when somebody asks for them."""
    num_cached_tokens: int = 0
    prefill_ms: float = 0.0
    """What computing the prompt takes the worker that does."""
    rejection: str = ""
    second_prefill: Worker | None = None
    expected_ms: float = 0.0
    """Until the prompt is computed, by the rates as measured, without what calibrates them."""

    @staticmethod
    def rejected(worker: Worker, reason: str) -> "Candidate":
        """A worker that can take no part at all."""
        is_decode = worker.role is Role.DECODE
        return Candidate(worker if is_decode else None, None if is_decode else worker, None, rejection=reason)

    @property
    def terms(self) -> Terms:
        """The parts of its cost."""
        return self.explained()

    @property
    def cost_ms(self) -> float:
        """Sum of the terms."""
        return sum(cost for _, cost in self.terms)

    @property
    def names(self) -> tuple[str, str]:
        """Decode and prefill worker; an empty name where there is none."""
        return (self.decode.name if self.decode else "", self.prefill.name if self.prefill else "")

    @property
    def computing(self) -> Worker | None:
        """The worker that computes the prompt."""
        return self.prefill or self.decode
