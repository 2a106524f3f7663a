"""An engine from a worker's configuration. Torch is imported only if it is to compute."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shared.engine.api import EngineSpec, Executor
from shared.engine.engine import Engine
from shared.engine.grammars import Grammars
from shared.engine.kv.layout import KvLayout
from shared.engine.kv.store import KvStore
from shared.engine.meter import Meter
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.speculator import Speculation
from shared.engine.warm_up import Scope, warm_up
from shared.errors import Unsupported
from shared.models import store
from shared.worker.config import WorkerConfig
from shared.worker.rank_process import RankProcess

log = logging.getLogger(__name__)

# An executor, the same with more patience for kernels that are compiled, the directory of its model, the layout of its
# pages, and the other ranks.
Parts = tuple[Executor, Executor, str, KvLayout, Sequence[RankProcess]]


@dataclass(frozen=True, slots=True)
class Assembled:
    """An engine, and the directory that its model came from ("" for none). `layout` is that of the pages in this
    process, and `ranks` are the processes that compute with it."""

    engine: Engine
    model_path: str
    layout: KvLayout
    ranks: Sequence[RankProcess] = ()


def assemble(
    config: WorkerConfig,
    *,
    generates: bool = True,
    is_wanted: Callable[[], bool] = lambda: True,
    forked: Sequence[RankProcess] = (),
) -> Assembled:
    """Load the model, set the engine up and warm it up, as long as it `is_wanted`; one that does not generate computes
    prompts for others. Ranks that are not `forked` are executed. Raises a Fault if that is not possible."""
    if config.tensor_parallel > 1 and config.engine == "sim":
        raise Unsupported("the sim engine is for workers of one rank")
    executor, patient, model_path, layout, ranks = _sim(config) if config.engine == "sim" else _torch(config, forked)
    try:
        speculation, spec = _speculation(config, executor), executor.spec
        meter = Meter()
        if config.warm_up_s and config.engine != "sim":  # whose rates are what it is told, and which makes nothing
            sizes = (config.max_step_tokens, config.max_num_sequences, speculation.num_drafts)
            scope = Scope(spec, executor.recorded, *sizes, generates=generates)
            meter = warm_up(scope, partial(_engine, config, speculation, patient), config.warm_up_s, is_wanted)
        kv = KvStore(spec.num_pages, spec.layout.page_size, config.lease_ttl_ms)
        engine = _engine(config, speculation, executor, kv, meter, _grammars(spec, model_path))
        return Assembled(engine, model_path, layout, ranks)
    except BaseException:
        for rank in ranks:
            rank.close()
        raise


def _engine(
    config: WorkerConfig,
    speculation: Speculation,
    executor: Executor,
    kv: KvStore,
    meter: Meter,
    grammars: Grammars | None = None,
) -> Engine:
    return Engine(
        executor,
        kv,
        max_step_tokens=config.max_step_tokens,
        max_num_sequences=config.max_num_sequences,
        speculation=speculation,
        meter=meter,
        grammars=grammars,
    )


def _grammars(spec: EngineSpec, model_path: str) -> Grammars | None:
    """Of a model; the sim engine's has no text."""
    return Grammars(Path(model_path) / "tokenizer.json", spec.vocab_size, spec.eos_token_ids) if model_path else None


def _speculation(config: WorkerConfig, executor: Executor) -> Speculation:
    kind = config.speculation
    if config.verification == "rejection" and (config.engine == "sim" or not executor.proposes):
        log.info("no layer proposes drafts here: all are verified as if by --verification coupled")
    if kind == "off":
        return Speculation()
    if kind == "mtp" and not executor.proposes:
        raise Unsupported(f"{executor.spec.model} has no layer that proposes drafts: speculation cannot be 'mtp'")
    proposed_here = kind == "ngram" or not executor.proposes
    return Speculation(config.num_draft_tokens, config.adaptive_drafts, NgramProposer if proposed_here else None)


def _torch(config: WorkerConfig, forked: Sequence[RankProcess]) -> Parts:
    from shared.engine.executor import load_executor

    path = store.resolve(config.model)
    num_threads = config.num_threads or len(os.sched_getaffinity(0))
    settings: dict[str, Any] = {
        "model_dir": path,
        "model_name": config.served_model_name or store.served_name(config.model),
        "dtype": config.dtype,
        "device": config.device,
        "page_size": config.page_size,
        "num_threads": max(1, num_threads // config.tensor_parallel),
        "num_pages": config.num_pages,
        "pool_bytes": config.kv_cache_mb << 20,
        "max_model_len": config.max_model_len or None,
        "kernels": config.kernels,
        "attention": config.attention,
        "dequantized_bytes": config.dequantized_mb << 20,
        "kv_dtype": config.kv_dtype,
        "mtp": config.speculation in ("auto", "mtp"),
        "rejection": config.verification == "rejection",
    }
    if config.tensor_parallel == 1:
        executor = load_executor(**settings)
        return executor, executor, str(path), executor.layout, ()
    return _ranked(config, path, settings, forked)


def _ranked(config: WorkerConfig, path: Path, settings: dict[str, Any], forked: Sequence[RankProcess]) -> Parts:
    from shared.engine.parallel.executor import ParallelExecutor
    from shared.worker.ranks import Ranks

    log = (config.name, config.log_level)
    patience_s = config.rank_timeout_ms / 1000
    ranks = Ranks(settings, config.tensor_parallel, config.expert_split, patience_s, log, forked)
    own = ranks.executor
    patient = ParallelExecutor(own, ranks.others, max(patience_s, config.warm_up_s))
    return ParallelExecutor(own, ranks.others, patience_s), patient, str(path), own.layout, ranks.others


def _sim(config: WorkerConfig) -> Parts:
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
    executor = SimExecutor(model, config.num_pages or (config.kv_cache_mb << 20) // model.layout.page_bytes)
    return executor, executor, "", model.layout, ()
