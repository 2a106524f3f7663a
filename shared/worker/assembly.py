"""An engine from a worker's configuration. Torch is imported only if it is to compute."""

import os
from dataclasses import dataclass

from shared.engine.api import Executor
from shared.engine.engine import Engine
from shared.engine.kv.store import KvStore
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.speculator import Speculation
from shared.errors import Unsupported
from shared.models import store
from shared.worker.config import WorkerConfig


@dataclass(frozen=True, slots=True)
class Assembled:
    """An engine, and the directory that its model came from ("" for none)."""

    engine: Engine
    model_path: str


def assemble(config: WorkerConfig) -> Assembled:
    """Load the model and set the engine up. Raises a Fault if that is not possible."""
    executor, model_path = _sim(config) if config.engine == "sim" else _torch(config)
    spec = executor.spec
    kv = KvStore(spec.num_pages, spec.layout.page_size, config.lease_ttl_ms)
    engine = Engine(
        executor,
        kv,
        max_step_tokens=config.max_step_tokens,
        max_num_sequences=config.max_num_sequences,
        speculation=_speculation(config, executor),
    )
    return Assembled(engine, model_path)


def _speculation(config: WorkerConfig, executor: Executor) -> Speculation:
    kind = config.speculation
    if kind == "off":
        return Speculation()
    if kind == "mtp" and not executor.proposes:
        raise Unsupported(f"{executor.spec.model} has no layer that proposes drafts: speculation cannot be 'mtp'")
    proposed_here = kind == "ngram" or not executor.proposes
    return Speculation(config.num_draft_tokens, config.adaptive_drafts, NgramProposer if proposed_here else None)


def _torch(config: WorkerConfig) -> tuple[Executor, str]:
    from shared.engine.executor import load_executor

    path = store.resolve(config.model)
    executor = load_executor(
        path,
        model_name=config.served_model_name or store.served_name(config.model),
        dtype=config.dtype,
        page_size=config.page_size,
        num_threads=config.num_threads or len(os.sched_getaffinity(0)),
        num_pages=config.num_pages,
        pool_bytes=config.kv_cache_mb << 20,
        max_model_len=config.max_model_len or None,
        kernels=config.kernels,
        kv_dtype=config.kv_dtype,
    )
    return executor, str(path)


def _sim(config: WorkerConfig) -> tuple[Executor, str]:
    from shared.engine.sim import SimExecutor, SimModel

    model = SimModel(
        name=config.served_model_name or "sim",
        page_size=config.page_size,
        prefill_ms_per_token=config.sim_prefill_ms_per_token,
        decode_ms=config.sim_decode_ms,
        decode_ms_per_sequence=config.sim_decode_ms_per_sequence,
        max_model_len=config.max_model_len or 131_072,
        draft_acceptance=config.sim_draft_acceptance,
    )
    return SimExecutor(model, config.num_pages or (config.kv_cache_mb << 20) // model.layout.page_bytes), ""
