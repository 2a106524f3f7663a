"""What placements take of their workers, as the blackboard is asked for it."""

from services.router.candidate import Query
from services.router.policy import Ranked
from shared.blackboard.admission import ASSUMED_OUTPUT_TOKENS, Need, Pair
from shared.blackboard.records import Role


def offer(query: Query, ranked: Ranked, count: int | None = None) -> tuple[list[Need], list[Pair]]:
    """All placements in order, or the first `count`, and what they take of the workers that they name."""
    facts = ranked.scored.table.facts
    place_of: dict[int, int] = {}  # of a worker's row in the list of needs
    pairs = []
    for number in ranked.numbers(count):
        prefill, decode = divmod(number, len(facts.decodes))
        place = place_of.setdefault(facts.decodes[decode], len(place_of))
        other = place_of.setdefault(facts.prefills[prefill - 1], len(place_of)) if prefill else None
        pairs.append(Pair(place, other))
    return _needs(query, ranked, list(place_of)), pairs


def _needs(query: Query, ranked: Ranked, rows: list[int]) -> list[Need]:
    """What each worker has to give. One that decodes keeps pages for an output too, of the length that may be
    assumed."""
    table, output = ranked.scored.table, min(query.max_tokens, ASSUMED_OUTPUT_TOKENS)
    num_computed = ranked.scored.computing.num_computed.take(rows).tolist()
    num_cached_pages = table.num_cached_pages.take(rows).tolist()
    needs = []
    for row, computed, cached in zip(rows, num_computed, num_cached_pages, strict=True):
        worker = table.facts.workers[row]
        num_tokens = query.num_prompt_tokens + (output if worker.role is Role.DECODE else 0)
        num_pages = -(-num_tokens // worker.card.page_size) - cached
        needs.append(Need(worker.registration.name, worker.registration.epoch, int(computed), max(0, num_pages)))
    return needs
