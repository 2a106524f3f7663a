"""What processes write on the blackboard about themselves. Fields of newer versions are ignored: upgrades roll."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict


class Role(StrEnum):
    """What a process is."""

    GATEWAY = "gateway"
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"


class Record(BaseModel):
    """Frozen JSON."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ModelCard(Record):
    """The model that a worker serves. `compatibility_hash` is equal exactly where pages can be exchanged."""

    model: str
    max_model_len: int
    page_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    compatibility_hash: str
    kv_bytes_per_token: int = 0
    model_path: str = ""
    """Directory with tokenizer and chat template, where the worker found it."""


class Load(Record):
    """Measured by the worker: most fields are those of `shared.engine.api.EngineLoad`.

    A prompt's tokens start … end take (end - start) x `prefill_ms_per_token` + (end² - start²) / 2 x
    `prefill_ms_per_pair`. 0 is a rate that was not measured yet; `prefill_doubt`, from 0 to 1, says how little these
    two are to be relied on: measured by few tokens, or long ago. `prompt_ratio` is the time that prompts took here over
    what the router had expected by these rates. `num_inside` counts requests, also those whose prompt is computed
    elsewhere as yet, and `num_requests` all that ever came.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_queued_tokens: int = 0
    prefill_ms_per_token: float = 0.0
    prefill_ms_per_pair: float = 0.0
    prefill_doubt: float = 0.0
    decode_step_ms: float = 0.0
    decode_ms_per_sequence: float = 0.0
    transfer_bytes_per_ms: float = 0.0
    output_tokens: float = 0.0
    prompt_ratio: float = 0.0
    num_inside: int = 0
    num_requests: int = 0
    num_steps: int = 0
    num_preemptions: int = 0


class Pages(Record):
    """Pages of a worker by state; fields of `shared.engine.kv.store.PageCounts`."""

    free: int = 0
    cached: int = 0
    leased: int = 0
    held: int = 0
    total: int = 0


class Room(Record):
    """Sequences, prompt tokens yet to compute, and pages: of a worker, what it can have at once or has."""

    sequences: int = 0
    tokens: int = 0
    pages: int = 0


class Registration(Record):
    """One incarnation of a process. Addresses are host:port; `card` is present for workers."""

    role: Role
    name: str
    epoch: int
    pid: int
    address: str
    metrics_address: str = ""
    http_address: str = ""
    draining: bool = False
    num_beats: int = 0
    """Counts the registrations of this incarnation: a higher one is a newer report."""
    card: ModelCard | None = None
    rank_pids: tuple[int, ...] = ()
    """Processes that compute with this one, by tensor-parallel rank from 1."""
    load: Load = Load()
    pages: Pages = Pages()
    limits: Room = Room()
    """What routers may send a worker at once; zeros from one that does not say."""
    used: Room = Room()
    """What it has of that."""
