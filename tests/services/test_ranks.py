"""Workers of several ranks, as they are deployed: a process for each rank, pages read by NIXL into each rank's pool."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from protos.forebay.v1.decode_pb2 import GenerateRequest as Request
from shared.engine.models import registry, tiny
from shared.engine.parallel.partition import Shard
from shared.errors import Unsupported, WorkerLost
from shared.worker import rank_process
from shared.worker.assembly import assemble
from shared.worker.config import WorkerConfig
from tests import standstill
from tests.oracle import driver, tiny_models
from tests.services.worker_pair import PATIENCE_S, Pair
from tests.valkey import ValkeyProcess

NUM_TOKENS = 8
MAX_CONVERSATIONS = 30
ON_GPUS = ("--device", "cuda", "--kernels", "torch")  # in float32, so that tokens are those of a CPU
TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
# Who is executed imports torch.
START_S = 150.0


def glm(path: Path) -> None:
    tiny.write("glm-5.2", path)


def llama(path: Path) -> None:
    tiny_models.write("llama-8-heads", path)


@asynccontextmanager
async def started(
    path: Path, valkey: ValkeyProcess, ranks: Mapping[str, int], *more: str, executed: bool = False
) -> AsyncGenerator[Pair, None]:
    """Workers, or one of them, of so many ranks each, which they fork."""
    flags = ["--model", str(path), "--served-model-name", "tiny", "--dtype", "float32", "--num-pages", "64"]
    made = Pair(valkey, [*flags, "--num-threads", "1", "--max-step-tokens", "64", *more], "tiny")
    try:
        for name, num_ranks in ranks.items():
            made.launch(name, "--tensor-parallel", str(num_ranks), executed=executed)
        await made.registered(START_S)
        assert not any(is_executed(rank) for each in made.found.values() for rank in each.rank_pids)
        yield made
    finally:
        await made.close()


def is_executed(rank: int) -> bool:
    """Whether a rank was executed. One that was forked has the command of its worker."""
    return b"shared.worker.rank" in Path(f"/proc/{rank}/cmdline").read_bytes()


async def status_with_rank(workers: Pair, name: str, rank: int) -> int:
    """With which a worker ends, and that process of another rank with it."""
    status = await asyncio.to_thread(workers.processes[name].wait, PATIENCE_S)
    with pytest.raises(ProcessLookupError):
        os.kill(rank, 0)
    return status


# Ranks of a busy machine may be later than they will be here, so they do not meet before; on GPUs they must have met.
STANDS_STILL = [
    pytest.param(("--device", "cpu", "--rank-timeout-ms", "2000", "--warm-up-s", "0"), id="cpu"),
    pytest.param((*ON_GPUS, "--rank-timeout-ms", "8000", "--step-timeout-ms", "12000"), marks=TWO_GPUS, id="gpus"),
]


@pytest.mark.parametrize("flags", STANDS_STILL)
async def test_a_rank_that_stands_still_ends_its_worker_within_its_time(
    flags: Sequence[str], tmp_path: Path, valkey: ValkeyProcess
) -> None:
    llama(tmp_path)
    async with started(tmp_path, valkey, {"decode": 2}, *flags, executed=True) as workers:
        (rank,) = workers.found["decode"].rank_pids
        standstill.stop(rank)
        with pytest.raises(WorkerLost):
            await workers.aggregated(workers.request(20, NUM_TOKENS))
        assert await status_with_rank(workers, "decode", rank) == 1


def test_a_model_that_so_many_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    llama(tmp_path)
    command = [sys.executable, "-m", "services.decode", "--model", str(tmp_path), "--tensor-parallel", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode != 0
    message = "8 attention heads cannot be shared out evenly to 3 ranks"
    assert message in done.stderr
    with pytest.raises(Unsupported, match=message):  # which is said before any of them is told what to load
        registry.require_shares(tmp_path, Shard(0, 3))


def test_where_there_are_threads_ranks_are_executed(tmp_path: Path) -> None:
    llama(tmp_path)
    fields = {"model": str(tmp_path), "dtype": "float32", "num_pages": 64, "num_threads": 2, "tensor_parallel": 2}
    config = WorkerConfig.model_validate(fields)
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait)
    thread.start()
    try:
        assert not rank_process.forked(config)
    finally:
        may_end.set()
        thread.join()
    made = assemble(config)
    try:
        (rank,) = made.ranks
        assert is_executed(rank.pid)
        assert made.engine.kv.counts().free == 64
    finally:
        for rank in made.ranks:
            rank.close()


async def conversation(workers: Pair, num_tokens: int) -> tuple[Request, list[int], Request, list[int]]:
    """A request and its answer, and the turn that follows on it, whose prefix is best read from the decode worker."""
    message = workers.request(num_tokens, 24)
    first = await workers.generate(message)
    turn = workers.request(0, NUM_TOKENS)
    turn.prompt_token_ids.extend([*message.prompt_token_ids, *first, 7, 8, 9])
    turn.placement.kv_source.CopyFrom(turn.placement.decode)
    return message, first, turn, await workers.generate(turn)


async def rank_is_lost(workers: Pair, name: str, rank: int) -> None:
    """Its worker ends with it."""
    os.kill(rank, signal.SIGKILL)
    assert await asyncio.to_thread(workers.processes[name].wait, PATIENCE_S) == 1


async def told_to_end(workers: Pair, name: str, rank: int) -> None:
    """A worker ends with its other rank. NCCL's good-bye would wait for graphs, and for a rank that has ended."""
    workers.processes[name].send_signal(signal.SIGTERM)
    assert await status_with_rank(workers, name, rank) == 0


@pytest.mark.parametrize(
    ("write", "num_ranks", "end", "flags"),
    [
        (llama, {"prefill": 1, "decode": 2}, told_to_end, ()),
        (llama, {"prefill": 1, "decode": 2}, rank_is_lost, ("--checksums",)),
        (glm, {"prefill": 2, "decode": 1}, rank_is_lost, ("--checksums",)),
        pytest.param(llama, {"prefill": 1, "decode": 2}, told_to_end, ON_GPUS, marks=TWO_GPUS),
        pytest.param(llama, {"prefill": 2, "decode": 1}, rank_is_lost, ON_GPUS, marks=TWO_GPUS),
    ],
    ids=["llama", "llama-checksums", "glm-checksums", "llama-gpus-1-2", "llama-gpus-2-1"],
)
async def test_pages_go_back_and_forth_between_workers_of_one_and_of_two_ranks_which_end_together(
    write: Callable[[Path], None],
    num_ranks: Mapping[str, int],
    end: Callable[[Pair, str, int], Awaitable[None]],
    flags: Sequence[str],
    tmp_path: Path,
    valkey: ValkeyProcess,
) -> None:
    write(tmp_path)
    async with started(tmp_path, valkey, num_ranks, *flags) as workers:
        for worker in workers.found.values():  # warmed up, with no trace in the books
            assert worker.load.prefill_ms_per_token > 0
            assert worker.load.num_steps == 0
            assert worker.pages.free == worker.pages.total
        ranks = {name: found.rank_pids for name, found in workers.found.items()}
        assert {name: len(pids) + 1 for name, pids in ranks.items()} == num_ranks
        # There and back: what the decode worker computed behind the first prompt, the prefill worker pulls, once it is
        # connected: before, such a short prefix is sooner computed.
        for num_tokens in range(90, 90 + MAX_CONVERSATIONS):
            message, first, turn, second = await conversation(workers, num_tokens)
            if workers.measure("prefill", "forebay_transfer_bytes_total") > 0:
                break
        for measure in ("forebay_prefill_fallbacks_total", "forebay_stale_releases_total"):
            assert workers.measure("decode", measure) == 0
        assert all(workers.measure(name, "forebay_transfer_bytes_total") > 0 for name in ranks)
        right = 'forebay_checked_pages_total{outcome="right"}'
        assert all((workers.measure(name, right) > 0) is ("--checksums" in flags) for name in ranks)
        ((name, rank),) = ((name, rank) for name, others in ranks.items() for rank in others)
        await end(workers, name, rank)
    executor = driver.load(tmp_path)
    assert first == driver.generate(executor, list(message.prompt_token_ids), 24)
    assert second == driver.generate(executor, list(turn.prompt_token_ids), NUM_TOKENS)
