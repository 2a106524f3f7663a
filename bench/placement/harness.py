"""Holds conversations with a cluster, and looks meanwhile at what each worker has to do."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from bench.placement.client import Client, Reply
from bench.placement.workloads import Conversation
from bench.serve.client import Answer
from cli.background import cluster
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Role
from shared.errors import BlackboardLost

Ask = Callable[[Sequence[int], int, str], Awaitable[Reply]]
"""Has a prompt answered with so many tokens, for a tenant."""
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
    client, samples = Client(url, model), list[Sample]()
    await client.ask([1, 2, 3], 2)  # what is done once, at the first request
    watching = asyncio.create_task(_watch(redis_url, samples))
    sent = await hold_all(client.ask, conversations, time.perf_counter)
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    return Run(tuple(sent), tuple(samples))


async def hold_all(ask: Ask, conversations: Sequence[Conversation], clock: Callable[[], float]) -> list[Sent]:
    """Every conversation from its start on; what was sent, in this order."""
    start, sent = clock(), list[Sent]()

    async def begin(conversation: Conversation) -> None:
        await asyncio.sleep(start + conversation.starts_s - clock())
        await _hold(ask, conversation, sent)

    await asyncio.gather(*map(begin, conversations))
    return sorted(sent, key=lambda one: one.answer.sent_s)


async def _hold(ask: Ask, conversation: Conversation, sent: list[Sent]) -> None:
    """One conversation to its end, or to its first fault."""
    said: tuple[int, ...] = ()
    for turn in conversation.turns:
        await asyncio.sleep(turn.pause_s)
        said += turn.token_ids
        reply = await ask(said, turn.output_tokens, conversation.tenant)
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
