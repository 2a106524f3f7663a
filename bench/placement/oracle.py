"""The most that any placement could find cached: one cache as large as all together, run by who knows the future."""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from bench.placement.workloads import Conversation
from shared.page_hash import chain, tenant_key


def hit_rate(sent: Sequence[tuple[str, Sequence[int], Sequence[int]]], page_size: int, num_pages: int) -> float:
    """Cached share of all prompt tokens, at most, for requests (tenant, prompt, answer) in the order they were sent.

    An upper bound that placement among several workers does not reach: every page is there once, for all workers, from
    the moment its request is sent, and what to keep is decided knowing every later request.
    """
    reads, writes = [], []
    for tenant, prompt, answer in sent:
        pages = chain(tenant_key(tenant), (*prompt, *answer), page_size)
        reads.append(pages[: (len(prompt) - 1) // page_size])  # the last token of a prompt is always computed
        writes.append(pages)
    total = sum(len(prompt) for _, prompt, _ in sent)
    return page_size * sum(best_hits(reads, writes, num_pages)) / total if total else 0.0


def relieved(singles: Sequence[Conversation], page_size: int, num_pages: int) -> list[Conversation]:
    """Conversations of one turn without what the oracle finds cached of their prompts: what is left to compute,
    whatever places them. Nothing of the rest is shared: each has a tenant of its own."""
    prompts = [one.turns[0].token_ids for one in singles]
    writes = [chain(tenant_key(one.tenant), prompt, page_size) for one, prompt in zip(singles, prompts, strict=True)]
    reads = [pages[: (len(prompt) - 1) // page_size] for pages, prompt in zip(writes, prompts, strict=True)]
    hits = best_hits(reads, writes, num_pages)
    return [
        replace(one, turns=(replace(one.turns[0], token_ids=prompt[found * page_size :]),), tenant=f"alone-{number}")
        for number, (one, prompt, found) in enumerate(zip(singles, prompts, hits, strict=True))
    ]


def best_hits(reads: Sequence[Sequence[bytes]], writes: Sequence[Sequence[bytes]], num_pages: int) -> list[int]:
    """Pages that each request finds if the cache always drops what is wanted last (Belady, 1966), and takes in nothing
    that is never wanted again. `writes[i]` holds `reads[i]`."""
    wanted: dict[bytes, list[int]] = defaultdict(list)  # when, the soonest last
    for number in reversed(range(len(reads))):
        for page in reads[number]:
            wanted[page].append(number)
    cached: dict[bytes, int] = {}  # page -> when it is wanted next
    latest: list[tuple[int, bytes]] = []  # (minus when, page), with entries that are no longer true
    hits = []
    for read, written in zip(reads, writes, strict=True):
        hits.append(sum(page in cached for page in read))
        for page in read:
            wanted[page].pop()
            cached.pop(page, None)
        for page in written:
            if times := wanted.get(page):
                cached[page] = times[-1]
                heapq.heappush(latest, (-times[-1], page))
        _shrink(cached, latest, num_pages)
    return hits


def _shrink(cached: dict[bytes, int], latest: list[tuple[int, bytes]], num_pages: int) -> None:
    while len(cached) > num_pages:
        minus_when, page = heapq.heappop(latest)
        if cached.get(page) == -minus_when:
            del cached[page]
