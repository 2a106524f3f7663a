"""Ranks on several GPUs: sums over them, and one model on two that says what it says on one. Needs two NVIDIA GPUs.

Parts of a sum are rounded to bfloat16 before they are added, so two ranks are not equal to one to the bit. Tokens are
compared up to where one rank found two of them about equally likely, and what each takes them to be all the way there.
"""

import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from shared.engine.api import BatchItem, EngineRequest, Executor, SampledToken, SamplingParams, TokensSampled
from shared.engine.engine import Engine
from shared.engine.executor import load_executor
from shared.engine.kv.store import KvStore
from shared.engine.parallel.distributed import DistributedGroup, host_store, join_store
from shared.engine.parallel.executor import ParallelExecutor
from shared.engine.parallel.group import added, ordered_sum
from shared.worker.ranks import Ranks
from tests.oracle import quantized, random_glm, test_cuda_overlap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

PATIENCE_S = 60.0
LATE_S = 120.0
ABOUT_EQUAL = 0.1  # between two log probabilities
# Kernels are compiled for every number of rows that a graph has, in every process anew, which takes most of the time of
# these tests. So there are three kinds of steps: prompts, beside which others generate, and one and two that generate.
NUM_PROMPTS, NUM_TOKENS, NUM_AT_ONCE, STEP_TOKENS = 12, 8, 2, 64
NUM_DRAFTS, NUM_DRAFTED, ALIKE = 3, 24, 0.7  # steps that draft; of the drafts of two ranks


def on_each(num_ranks: int, work: Any, logs: Path) -> None:
    """Run work(rank, port of a store) in a process for each rank. The others would wait for one that fails, so they end
    with it; one that takes too long says where it is."""
    store, context = host_store(PATIENCE_S), multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=ended, args=(work, rank, num_ranks, store.port, logs / str(rank)))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    running = list(ranks)
    while running and all(rank.exitcode in (None, 0) for rank in ranks):
        wait([rank.sentinel for rank in running])
        running = [rank for rank in running if rank.exitcode is None]
    for rank in running:
        rank.kill()
    said = "\n".join(f"rank {log.name}:\n{log.read_text()}" for log in sorted(logs.iterdir()))
    assert [rank.exitcode for rank in ranks] == [0] * num_ranks, said


def ended(work: Any, rank: int, num_ranks: int, port: int, log: Path) -> None:
    """Work, and end at once with what that leaves: a group of NCCL says good-bye, and waits for a rank that may have
    failed, and for graphs that are still there. One that is done waits for the others, who may read its memory yet."""
    with log.open("w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=said)
        try:
            _kept = work(rank, port)
            torch.cuda.synchronize()
            meeting = PrefixStore("ended", join_store(port, PATIENCE_S))
            meeting.set(str(rank), "")
            meeting.wait([str(each) for each in range(num_ranks)])
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os._exit(0)


def random_parts(num_rows: int, seed: int) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randn(num_rows, 1536, generator=chance).to("cuda", torch.bfloat16) for _ in range(4)]


def sums(rank: int, port: int) -> DistributedGroup:
    """Few rows go through peers' memory, many by NCCL; in the same order and captured, again and again."""
    torch.cuda.set_device(rank)
    group = DistributedGroup(PrefixStore("group", join_store(port, PATIENCE_S)), rank, 2, PATIENCE_S)
    for num_rows in (1, 3, 64, 600):
        parts = [torch.zeros(num_rows, 1536, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        own, (stream, gain) = parts[rank], parts[2:]
        group.sum(own), group.join(own), group.add(own, stream, gain[0])  # nothing may be compiled during a capture
        assert group.by_peers
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            total, joined = group.sum(own), group.join(own)
            begun, squares = group.add(own, stream, gain[0])
        for seed in range(20):
            for part, values in zip(parts, random_parts(num_rows, seed), strict=True):
                part.copy_(values)
            summed = ordered_sum(parts[:2])
            twin_stream = stream.clone()
            twin_begun, twin_squares = added(summed, twin_stream, gain[0])
            graph.replay()
            assert torch.equal(total, summed)
            assert torch.equal(joined, torch.cat(parts[:2], dim=1))
            assert torch.equal(stream, twin_stream)
            assert torch.equal(begun, twin_begun)
            torch.testing.assert_close(squares.sum(1), twin_squares.sum(1))
    return group


def test_sums_over_gpus_equal_their_twins_in_whatever_order_they_are_replayed(tmp_path: Path) -> None:
    on_each(2, sums, tmp_path)


def settings(path: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"model_dir": path, "model_name": "tiny", "dtype": "bfloat16", "page_size": 16, "num_threads": 1}
    return fixed | {"device": "cuda", "kernels": "cuda", "attention": "fa2", "num_pages": 96} | changes


@contextmanager
def two_ranks(path: Path, **changes: Any) -> Iterator[ParallelExecutor]:
    """The other one says where it is, and ends, if all takes too long."""
    ranks = Ranks(settings(path, **changes), 2, "matrices", PATIENCE_S, ("test", "WARNING"))
    late = threading.Timer(LATE_S, os.kill, (ranks.others[0].pid, signal.SIGABRT))
    late.start()
    try:
        yield ParallelExecutor(ranks.executor, ranks.others, PATIENCE_S)
    finally:
        late.cancel()
        ranks.close()


def requests() -> list[EngineRequest]:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, num_logprobs=2)
    prompts = [random.Random(number).choices(range(3, 500), k=10 + 3 * number) for number in range(NUM_PROMPTS)]
    return [EngineRequest(str(len(prompt)), tuple(prompt), sampling) for prompt in prompts]


def said(executor: Any) -> dict[str, list[SampledToken]]:
    """All requests, a few at once, so that steps are computed that mix prompts with those that generate."""
    kv = KvStore(executor.spec.num_pages, 16, 10_000)
    engine = Engine(executor, kv, max_step_tokens=STEP_TOKENS, max_num_sequences=NUM_AT_ONCE)
    found: dict[str, list[SampledToken]] = {}
    for request in requests():
        found[request.request_id] = []
        engine.submit(request)
    while engine.has_work():
        for event in engine.step():
            assert isinstance(event, TokensSampled), event
            found[event.request_id] += event.tokens
    return found


@dataclass
class Agreement:
    num_compared: int = 0

    def compare(self, ours: list[SampledToken], twin: list[SampledToken]) -> None:
        """Up to the first token that was in doubt; the worst that log probabilities differ by must be small."""
        assert len(ours) == len(twin) == NUM_TOKENS
        for own, other in zip(ours, twin, strict=True):
            if own.token_id != other.token_id:
                (_, first), (second_id, second) = other.top
                assert own.token_id == second_id
                assert first - second < ABOUT_EQUAL
                return
            assert own.logprob is not None
            assert own.logprob == pytest.approx(other.logprob, abs=ABOUT_EQUAL)
            self.num_compared += 1


def write_dense(path: Path) -> None:
    test_cuda_overlap.write(path)


def write_glm(path: Path) -> None:
    """Whatever is chosen by rank (experts, tokens to attend to) may turn out otherwise in another rounding, so there is
    nothing to choose."""
    random_glm.write(path, index_topk=4096, n_routed_experts=4, moe_intermediate_size=512)


@pytest.mark.timeout(LATE_S + 60, method="thread")  # which prints where we are even from within a driver
@pytest.mark.parametrize("write", [write_dense, write_glm])
def test_a_model_on_two_gpus_says_what_it_says_on_one(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    write(tmp_path)
    twin = said(load_executor(**settings(tmp_path)))
    with two_ranks(tmp_path) as executor:
        assert executor.runs_behind
        ours = said(executor)
        assert said(executor) == ours  # and again, by graphs that are there
    agreement = Agreement()
    for name, tokens in ours.items():
        agreement.compare(tokens, twin[name])
    assert agreement.num_compared > NUM_PROMPTS * NUM_TOKENS / 4


def write_glm_in_e4m3(path: Path) -> None:
    (path / "plain").mkdir()
    write_glm(path / "plain")
    quantized.write(path / "plain", "fp8", path / "e4m3", path / "meant")
    for file in (path / "e4m3").iterdir():
        file.rename(path / file.name)


def drafts(executor: Executor) -> list[int]:
    """Behind a prompt, and behind tokens that come one by one, whatever was chosen."""
    tokens, found = random.Random(1).choices(range(3, 500), k=40 + NUM_DRAFTED), list[int]()
    for end in range(40, len(tokens)):
        start = 0 if end == 40 else end - 1
        item = BatchItem("r", tokens[start:end], start, range(16), True, SamplingParams(), 40, (), 0, NUM_DRAFTS)
        (chosen,) = executor.launch([item]).chosen()
        assert chosen is not None
        assert len(chosen.drafts) == NUM_DRAFTS
        found += chosen.drafts
    return found


@pytest.mark.timeout(LATE_S + 60, method="thread")
@pytest.mark.parametrize("write", [write_glm, write_glm_in_e4m3])
def test_a_layer_on_two_gpus_drafts_what_it_drafts_on_one(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for drafts in doubt, behind which all differ."""
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    write(tmp_path)
    twin = drafts(load_executor(**settings(tmp_path, mtp=True)))
    with two_ranks(tmp_path, mtp=True) as executor:
        ours = drafts(executor)
    assert sum(own == other for own, other in zip(ours, twin, strict=True)) > ALIKE * len(twin)
