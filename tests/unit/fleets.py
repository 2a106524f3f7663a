"""Hand-made workers for tests of the router."""

from typing import Any

from services.router import policy
from services.router.candidate import Candidate, Query, Weights, Worker
from services.router.fleet import Fleet
from services.router.table import Table
from shared.blackboard.records import Load, ModelCard, Pages, Registration, Role

PAGE_SIZE = 16


def card(**changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "model": "m",
        "max_model_len": 8192,
        "page_size": PAGE_SIZE,
        "vocab_size": 100,
        "eos_token_ids": (2,),
        "compatibility_hash": "c",
        "kv_bytes_per_token": 1_000,
    }
    return ModelCard(**fields | changes)


def registration(name: str, epoch: int = 1, **changes: Any) -> Registration:
    """A worker whose role is the first letter of its name: p or d."""
    fields: dict[str, Any] = {
        "role": Role.PREFILL if name.startswith("p") else Role.DECODE,
        "name": name,
        "epoch": epoch,
        "pid": 1,
        "address": f"127.0.0.1:{sum(name.encode())}",
        "card": card(),
        "load": Load(prefill_ms_per_token=0.5, decode_step_ms=20.0),
        "pages": Pages(free=1_000, total=1_000),
    }
    return Registration(**fields | changes)


def place(asked: Query, workers: list[Worker], weights: Weights) -> Candidate:
    """The placement of a request on these workers."""
    return policy.place(asked, Table.of(workers, weights), weights)


def record(fleet: Fleet, placed: Candidate) -> None:
    """Tell a fleet of a placement."""
    assert placed.computing is not None
    assert placed.decode is not None
    computing, decode = placed.computing.registration, placed.decode.registration
    fleet.note((computing.name, computing.epoch), (decode.name, decode.epoch), dict(placed.terms)["prefill"])


def worker(
    name: str,
    *,
    cached: int = 0,
    queue_ms: float = 0.0,
    decoding: int = 0,
    model: ModelCard | None = None,
    **changes: Any,
) -> Worker:
    """A worker with `cached` leading pages of the prompt."""
    there = registration(name, card=model or card(), **changes)
    assert there.card is not None
    return Worker(there, there.card, cached, queue_ms, decoding)


def query(num_prompt_tokens: int = 1_000, *, affinity: bytes = b"a", excluded: tuple[str, ...] = ()) -> Query:
    return Query("r", "m", num_prompt_tokens, affinity, frozenset(excluded))
