"""What placements take of their workers, as the blackboard is asked for it."""

from collections.abc import Iterable, Iterator

from services.router.candidate import Query
from services.router.policy import Ranked
from shared.blackboard.admission import ASSUMED_OUTPUT_TOKENS, Need, Pair


def offer(query: Query, ranked: Ranked, count: int) -> tuple[list[Need], list[Pair]]:
    """The first `count` placements in order, and what they take of the workers that they name."""
    facts = ranked.scored.table.facts
    decode_rows, prefill_rows, nobody = facts.decodes.tolist(), facts.prefill_of.tolist(), len(facts.workers)
    numbers = [divmod(number, len(decode_rows)) for number in ranked.numbers(count).tolist()]
    decodes = [decode_rows[decode] for _, decode in numbers]
    prefills = [prefill_rows[prefill] for prefill, _ in numbers]
    rows = [row for row in dict.fromkeys((*decodes, *prefills)) if row != nobody]
    place_of: dict[int, int | None] = {nobody: None}
    place_of |= {row: place for place, row in enumerate(rows)}
    pairs = [Pair(place_of[d] or 0, place_of[p]) for d, p in zip(decodes, prefills, strict=True)]
    return list(_needs(query, ranked, rows, set(decodes))), pairs


def _needs(query: Query, ranked: Ranked, rows: Iterable[int], decodes: set[int]) -> Iterator[Need]:
    """A worker that decodes keeps pages for an output too, of the length that may be assumed."""
    table, num_computed = ranked.scored.table, ranked.scored.computing.num_computed
    output = min(query.max_tokens, ASSUMED_OUTPUT_TOKENS)
    for row in rows:
        worker = table.facts.workers[row]
        num_tokens = query.num_prompt_tokens + (output if row in decodes else 0)
        num_pages = -(-num_tokens // worker.card.page_size) - int(table.num_cached_pages[row])
        yield Need(worker.registration.name, worker.registration.epoch, int(num_computed[row]), max(0, num_pages))
