"""The workloads of the placement benchmark, its oracle, and its figures."""

import json
from collections import Counter
from itertools import combinations, pairwise

import pytest

from bench.placement.figures import imbalance
from bench.placement.harness import Sample
from bench.placement.oracle import best_hits, hit_rate, relieved
from bench.placement.trace import load
from bench.placement.workloads import Agents, Conversation, Turn, agents, singles

PAGES = [bytes([number]) for number in range(8)]


def line(at_ms: int, length: int, *blocks: int) -> str:
    return json.dumps({"timestamp": at_ms, "input_length": length, "output_length": 80, "hash_ids": blocks})


def test_a_seed_makes_the_same_conversations_again_and_another_seed_makes_others() -> None:
    assert agents(Agents(seed=1)) == agents(Agents(seed=1))
    assert agents(Agents(seed=1)) != agents(Agents(seed=2))


def test_conversations_of_a_tenant_begin_with_its_system_prompt_and_no_other_tenants_do() -> None:
    shape = Agents(duration_s=120)
    openings = {(one.tenant, one.turns[0].token_ids[: shape.system_tokens]) for one in agents(shape)}
    tenants = {tenant for tenant, _ in openings}
    assert len(openings) == len(tenants) > 1


def test_tenants_are_as_popular_as_zipf_says() -> None:
    counts = Counter(one.tenant for one in agents(Agents(rate=50, duration_s=100, num_tenants=4, zipf=1.0)))
    assert counts["tenant-0"] / counts["tenant-3"] == pytest.approx(4, rel=0.25)


def test_conversations_begin_in_bursts_and_at_the_rate_asked_for() -> None:
    starts = [one.starts_s for one in agents(Agents(rate=50, duration_s=100, burst=3))]
    inside = sum(at % 20 < 5 for at in starts)
    assert len(starts) / 100 == pytest.approx(50, rel=0.1)
    assert inside / (len(starts) - inside) == pytest.approx(1.0, rel=0.15)


def test_single_requests_share_nothing() -> None:
    firsts = [one.turns[0].token_ids[:16] for one in singles(5, 20, 64, 8, seed=0)]
    assert len(set(firsts)) == len(firsts) > 1


def test_prompts_of_a_trace_share_exactly_the_blocks_that_have_equal_ids() -> None:
    a, b = (one.turns[0].token_ids for one in load([line(0, 1000, 7, 8), line(10, 1024, 7, 9)], 8, 1, 60))
    assert (len(a), len(b)) == (125, 128)
    assert a[:64] == b[:64]
    assert a[64:125] != b[64:125]


def test_a_trace_is_cut_where_the_time_ends_after_it_was_made_faster() -> None:
    made = load([line(0, 512, 1), line(9_000, 512, 2), line(11_000, 512, 3)], 8, 10, 1.0)
    assert [one.starts_s for one in made] == [0, 0.9]


def test_a_trace_whose_blocks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be divided by 3"):
        load([], 3, 1, 1)


def test_the_oracle_keeps_what_is_wanted_soonest() -> None:
    a, b, c = PAGES[:3]
    assert best_hits([[a], [b], [c], [a], [b], [a]], [[a], [b], [c], [a], [b], [a]], 1) == [0, 0, 0, 1, 0, 1]


def test_the_oracle_finds_as_much_as_the_best_of_all_ways_to_keep_pages() -> None:
    wanted = [PAGES[number] for number in (0, 1, 2, 0, 3, 1, 0, 2, 3, 1, 2, 0)]
    reads = [[page] for page in wanted]
    assert sum(best_hits(reads, reads, 2)) == most(wanted, 2)


def most(wanted: list[bytes], num_pages: int) -> int:
    """By trying everything: an interval between two reads of a page is a hit, if it has room all the time."""
    spans = [
        (begin, end)
        for page in set(wanted)
        for begin, end in pairwise([at for at, other in enumerate(wanted) if other == page])
    ]
    fits = (kept for size in range(len(spans) + 1) for kept in combinations(spans, size) if has_room(kept, num_pages))
    return max(map(len, fits))


def has_room(kept: tuple[tuple[int, int], ...], num_pages: int) -> bool:
    last = max((end for _, end in kept), default=0)
    return all(sum(begin <= at < end for begin, end in kept) <= num_pages for at in range(last))


def test_the_oracle_shares_nothing_between_tenants_and_always_computes_the_last_token() -> None:
    prompt = list(range(32))
    assert hit_rate([("a", prompt, []), ("b", prompt, [])], 16, 100) == 0
    assert hit_rate([("a", prompt, []), ("a", prompt, [])], 16, 100) == 16 / 64


def test_the_oracle_counts_answers_as_cached_for_the_next_turn() -> None:
    first, answer = list(range(16)), list(range(100, 116))
    assert hit_rate([("a", first, answer), ("a", [*first, *answer, 1], [])], 16, 100) == 32 / 49


def test_what_the_oracle_leaves_to_compute_is_each_prompt_without_its_hits() -> None:
    first, second = tuple(range(100, 132)), tuple(range(100, 164))
    asked = [Conversation(float(at), (Turn(prompt, 5),)) for at, prompt in enumerate((first, second, first))]
    rest = relieved(asked, 16, 100)
    assert [one.turns[0].token_ids for one in rest] == [first, second[32:], first[16:]]
    assert [one.starts_s for one in rest] == [0, 1, 2]
    assert len({one.tenant for one in rest}) == 3


def test_imbalance_is_that_of_the_worst_window_and_unknown_of_a_run_shorter_than_one() -> None:
    even, odd = {"a": 2, "b": 2}, {"a": 4, "b": 0}
    samples = [Sample(float(at), odd if 10 <= at <= 14 else even) for at in range(30)]
    assert imbalance(samples, window_s=4) == 2.0
    assert imbalance(samples[:20], window_s=30) is None
