"""What a router believes while a load runs: the terms of its choice for one prompt more, and the rates behind them."""

import asyncio
import random
from collections.abc import Sequence

from bench.placement.workloads import token_ids
from cli.explain import Asked, ask
from protos.forebay.v1 import router_pb2
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from shared.errors import Fault

LOOK_AGAIN_S = 2.0


async def watch(redis_url: str, model: str, num_tokens: int, max_tokens: int) -> None:
    """Print them again and again, until cancelled."""
    board, chance, started = Blackboard(redis_url), random.Random("beliefs"), asyncio.get_running_loop().time()
    try:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            asked = Asked("", model, "", max_tokens, list(token_ids(chance, num_tokens)))
            at_s = asyncio.get_running_loop().time() - started
            try:
                candidates, workers = (await ask(redis_url, asked)).candidates, await board.processes(*Role)
            except Fault as fault:
                print(f"at {at_s:.0f} s nobody said: {fault.message}", flush=True)
                continue
            print(f"at {at_s:.0f} s: {'; '.join(map(_rates, _with_card(workers)))}", flush=True)
            for candidate in candidates:
                print(f"    {_terms(candidate)}", flush=True)
    finally:
        await board.close()


def _with_card(workers: Sequence[Registration]) -> list[Registration]:
    return [worker for worker in workers if worker.card is not None]


def _rates(worker: Registration) -> str:
    load = worker.load
    return (
        f"{worker.name} ran {load.num_requests}, has {load.num_inside}, {load.num_queued_tokens} tokens queued, "
        f"{load.prefill_ms_per_token:.4f} ms a token + {1e6 * load.prefill_ms_per_pair:.2f} a million pairs, doubt "
        f"{load.prefill_doubt:.2f}, ratio {load.prompt_ratio:.2f}, step {load.decode_step_ms:.1f} + "
        f"{load.decode_ms_per_sequence:.2f} a sequence"
    )


def _terms(candidate: router_pb2.Candidate) -> str:
    placement = candidate.placement
    where = placement.prefill.worker_id if placement.HasField("prefill") else "local"
    terms = " + ".join(f"{term.name} {term.cost_ms:.0f}" for term in candidate.terms if round(term.cost_ms))
    return f"{where} at {placement.decode.worker_id}: {candidate.cost_ms:.0f} ms = {terms} {candidate.rejection}"
