"""Holds conversations with a cluster, and looks meanwhile at what each worker has to do."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from bench.placement.client import Client
from bench.placement.workloads import Conversation
from bench.serve.client import Answer
from cli.background import cluster
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Role
from shared.errors import BlackboardLost

SAMPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as it was, and how it went."""

    tenant: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    answer: Answer


@dataclass(frozen=True, slots=True)
class Sample:
    """Sequences that each worker had, running or waiting, at a time in s."""

    at_s: float
    num_sequences: dict[str, int]


@dataclass(frozen=True, slots=True)
class Run:
    """Requests in the order they were sent."""

    sent: tuple[Sent, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Fleet:
    """What to start. Flags are those of `forebay up` and of routers and workers; times are the sim engine's."""

    num_prefill: int = 0
    num_decode: int = 4
    num_routers: int = 1
    num_pages: int = 4096
    router_flags: str = ""
    worker_flags: str = "--sim-prefill-ms-per-token 0.3 --sim-decode-ms 15 --sim-decode-ms-per-sequence 0.5"

    def flags(self) -> list[str]:
        """For `forebay up`."""
        counts = {"prefill": self.num_prefill, "decode": self.num_decode, "routers": self.num_routers}
        return [
            *("--engine", "sim"),
            *(text for name, count in counts.items() for text in (f"--{name}", str(count))),
            *("--router-flags", self.router_flags),
            *("--worker-flags", f"--num-pages {self.num_pages} {self.worker_flags}"),
        ]

    @property
    def total_pages(self) -> int:
        """Of all workers together."""
        return self.num_pages * (self.num_prefill + self.num_decode)


def run(fleet: Fleet, conversations: Sequence[Conversation]) -> Run:
    """Start a cluster, hold the conversations, and stop it."""
    with cluster(*fleet.flags()) as running:
        return asyncio.run(_hold_all(running.run.url, running.run.model, running.run.redis_url, conversations))


async def _hold_all(url: str, model: str, redis_url: str, conversations: Sequence[Conversation]) -> Run:
    client, sent, samples = Client(url, model), list[Sent](), list[Sample]()
    await client.ask([1, 2, 3], 2)  # what is done once, at the first request
    watching = asyncio.create_task(_watch(redis_url, samples))
    start = time.perf_counter()
    await asyncio.gather(*(_hold(client, conversation, start, sent) for conversation in conversations))
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    return Run(tuple(sorted(sent, key=lambda one: one.answer.sent_s)), tuple(samples))


async def _hold(client: Client, conversation: Conversation, start: float, sent: list[Sent]) -> None:
    """One conversation to its end, or to its first fault."""
    await asyncio.sleep(start + conversation.starts_s - time.perf_counter())
    said: tuple[int, ...] = ()
    for turn in conversation.turns:
        await asyncio.sleep(turn.pause_s)
        said += turn.token_ids
        reply = await client.ask(said, turn.output_tokens, conversation.tenant)
        sent.append(Sent(conversation.tenant, said, reply.token_ids, reply.answer))
        if reply.answer.fault:
            return
        said += reply.token_ids


async def _watch(redis_url: str, samples: list[Sample]) -> None:
    board = Blackboard(redis_url)
    try:
        while True:
            with suppress(BlackboardLost):
                workers = await board.processes(Role.PREFILL, Role.DECODE)
                loads = {worker.name: worker.load.num_running + worker.load.num_waiting for worker in workers}
                samples.append(Sample(time.perf_counter(), loads))
            await asyncio.sleep(SAMPLE_S)
    finally:
        await board.close()
