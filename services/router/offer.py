"""What placements take of their workers, as the blackboard is asked for it."""

from services.router.candidate import Query
from services.router.policy import Ranked
from shared.blackboard.admission import ASSUMED_OUTPUT_TOKENS, Need, Pair
from shared.blackboard.records import Role


def offer(query: Query, ranked: Ranked, count: int | None = None) -> tuple[list[Need], list[Pair]]:
    """All placements in order, or the first `count`, and what they take of the workers that they name."""
    facts = ranked.scored.table.facts
    decodes, prefills, num_decodes = facts.decodes, facts.prefills, len(facts.decodes)
    place_of: dict[int, int] = {}  # of a worker's row in the list of needs
    place, pairs = place_of.setdefault, []
    for number in ranked.numbers(count):
        prefill, decode = divmod(number, num_decodes)
        first = place(decodes[decode], len(place_of))
        pairs.append(Pair(first, place(prefills[prefill - 1], len(place_of)) if prefill else None))
    return _needs(query, ranked, list(place_of)), pairs


def _needs(query: Query, ranked: Ranked, rows: list[int]) -> list[Need]:
    """What each worker has to give. One that decodes keeps pages for an output too, of the length that may be
    assumed."""
    table, num_prefilled = ranked.scored.table, query.num_prompt_tokens
    num_decoded = num_prefilled + min(query.max_tokens, ASSUMED_OUTPUT_TOKENS)
    num_computed = ranked.scored.computing.num_computed.take(rows).tolist()
    num_cached_pages = table.num_cached_pages.take(rows).tolist()
    needs = []
    for row, computed, cached in zip(rows, num_computed, num_cached_pages, strict=True):
        worker = table.facts.workers[row]
        registration = worker.registration
        num_tokens = num_decoded if registration.role is Role.DECODE else num_prefilled
        num_pages = -(-num_tokens // worker.card.page_size) - cached
        needs.append(Need(registration.name, registration.epoch, int(computed), num_pages if num_pages > 0 else 0))
    return needs
