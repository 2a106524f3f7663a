"""Who computes what in which step, and who gets the pages."""

from dataclasses import replace
from itertools import permutations

import pytest

from shared.engine.api import PagesComputed
from shared.page_hash import chain
from tests.unit.engine_rig import Rig, last, order_of_ends, output, request


@pytest.fixture
def rig() -> Rig:
    return Rig()


# Steps ----------------------------------------------------------------------------------------------------------------


def test_a_step_serves_those_that_generate_first_and_then_prompts_in_order_of_arrival(rig: Rig) -> None:
    rig.submit("a", 10)
    rig.engine.step()
    rig.submit("b", 100)
    rig.submit("c", 30)
    rig.engine.step()
    rig.engine.step()
    assert rig.batches[1:] == [{"a": 1, "b": 63}, {"a": 1, "b": 37, "c": 26}]


def test_where_nobody_generates_a_prompt_that_ends_is_not_held_up_by_part_of_another(rig: Rig) -> None:
    for name, num_tokens in (("a", 74), ("whole", 40), ("partly", 60)):
        rig.submit(name, num_tokens, prefill_only=True)
    rig.finish()
    assert rig.batches == [{"a": 64}, {"a": 10, "whole": 40}, {"partly": 60}]


def test_but_it_is_where_that_part_is_not_worth_a_step_of_its_own(rig: Rig) -> None:
    for name, num_tokens in (("a", 74), ("whole", 51), ("partly", 60)):
        rig.submit(name, num_tokens, prefill_only=True)
    rig.finish()
    assert rig.batches == [{"a": 64}, {"a": 10, "whole": 51, "partly": 3}, {"partly": 57}]


def test_no_step_exceeds_its_budget(rig: Rig) -> None:
    for index in range(12):
        rig.submit(f"r{index}", 5 + 13 * index)
    rig.finish()
    assert max(sum(batch.values()) for batch in rig.batches) <= 64


def test_no_more_sequences_run_than_are_allowed() -> None:
    rig = Rig(max_num_sequences=2)
    for name in "abcde":
        rig.submit(name, 5)
    events = rig.finish()
    assert max(map(len, rig.batches)) == 2
    assert order_of_ends(events) == list("abcde")


def test_a_higher_priority_goes_first() -> None:
    rig = Rig(max_num_sequences=1)
    rig.submit("running")
    rig.engine.step()
    rig.submit("low", priority=-1)
    rig.submit("usual")
    rig.submit("high", priority=1)
    assert order_of_ends(rig.finish()) == ["running", "high", "usual", "low"]


def test_a_resumed_prompt_goes_before_those_that_have_begun_and_its_step_is_not_filled_up(rig: Rig) -> None:
    rig.submit("begun", 100)
    rig.engine.step()
    rig.submit("fresh", 30)
    rig.submit("resumed", 20, resumed=True)
    rig.submit("another", 5, resumed=True)
    for _ in range(2):
        rig.engine.step()
    assert rig.batches[1:] == [
        {"resumed": 20, "another": 5},
        {"resumed": 1, "another": 1, "begun": 36, "fresh": 26},
    ]


def test_of_resumed_prompts_that_have_pages_the_shortest_go_first_and_long_ones_are_left_out_once() -> None:
    rig = Rig(num_pages=64, max_step_tokens=512)

    def resume(name: str, num_tokens: int) -> None:
        rig.submit(name, num_tokens, resumed=True, pages=rig.kv.reserve([], -(-num_tokens // 16) + 1))

    for name, num_tokens in (("long", 190), ("short", 20), ("longish", 150), ("few", 30)):
        resume(name, num_tokens)
    rig.engine.step()
    resume("late", 10)
    rig.submit("fresh", 10)
    rig.engine.step()
    assert rig.batches == [
        {"short": 20, "few": 30},
        {"short": 1, "few": 1, "longish": 150, "long": 190, "late": 10},
    ]


def test_a_long_resumed_prompt_takes_whole_steps_and_others_follow(rig: Rig) -> None:
    rig.submit("fresh", 30)
    rig.submit("resumed", 100, resumed=True)
    rig.finish()
    assert rig.batches[:3] == [{"resumed": 64}, {"resumed": 36}, {"resumed": 1, "fresh": 30}]


def test_a_low_priority_is_not_starved_by_those_that_come_much_later() -> None:
    rig = Rig(max_num_sequences=1)
    rig.submit("low", priority=-1)
    rig.now += 11.0
    rig.submit("late")
    assert order_of_ends(rig.finish()) == ["low", "late"]


def test_a_long_prompt_is_not_overtaken_by_short_ones_while_it_waits_for_pages() -> None:
    rig = Rig(num_pages=8)
    rig.submit("running", 60, max_tokens=20)
    rig.engine.step()
    rig.submit("long", 90)
    rig.submit("short", 5)
    assert order_of_ends(rig.finish())[:2] == ["running", "long"]


# Pages ----------------------------------------------------------------------------------------------------------------


def test_a_sequence_grows_page_by_page(rig: Rig) -> None:
    held = []
    rig.submit("r", 15, max_tokens=20)
    while rig.engine.has_work():
        rig.engine.step()
        held.append(rig.kv.counts().held)
    assert held == [1] * 2 + [2] * 16 + [3] + [0]


def test_the_youngest_gives_its_pages_to_the_oldest() -> None:
    rig = Rig(num_pages=6)
    rig.submit("old", 30, max_tokens=40)
    rig.submit("young", 30, max_tokens=40)
    events = rig.finish()
    assert rig.engine.load().num_preemptions > 0
    assert order_of_ends(events) == ["old", "young"]
    assert [len(output(events, name)) for name in ("old", "young")] == [40, 40]


def test_a_prefill_only_sequence_is_never_preempted() -> None:
    rig = Rig(num_pages=9, max_step_tokens=3, max_num_sequences=2)
    rig.submit("growing", 62, max_tokens=60)
    rig.submit("prefill", 60, prefill_only=True)
    events = rig.finish()
    computed = [event.num_tokens for event in events if isinstance(event, PagesComputed)]
    assert computed[-1] == 60
    assert rig.kv.counts().free + rig.kv.counts().cached == 0
    rig.engine.cancel("prefill")
    events += rig.finish()
    assert len(output(events, "growing")) == 60
    assert rig.engine.load().num_preemptions == 0


def test_a_newcomer_leaves_room_for_those_that_run_to_grow() -> None:
    rig = Rig(num_pages=5)
    rig.submit("growing", 47, max_tokens=10)
    rig.engine.step()
    rig.submit("newcomer", 30)
    rig.finish()
    assert rig.engine.load().num_preemptions == 0


def test_a_sequence_is_in_a_step_once_even_if_room_comes_the_moment_it_was_preempted() -> None:
    rig = Rig(num_pages=12)
    others = rig.kv.reserve([], 6)
    assert others is not None
    rig.submit("old", 30, max_tokens=40)
    rig.submit("young", 30, max_tokens=40)
    while rig.engine.load().num_preemptions == 0:
        rig.kv.on_capacity = lambda: rig.kv.drop(others)
        rig.engine.step()
    assert sorted(order_of_ends(rig.finish())) == ["old", "young"]


def test_pages_computed_again_after_a_preemption_are_findable_again() -> None:
    rig = Rig(num_pages=6)
    rig.submit("old", 30, max_tokens=40)
    rig.submit("young", 30, max_tokens=40)
    tokens = [*request("young", 30).prompt_token_ids, *output(rig.finish(), "young")]
    assert rig.engine.load().num_preemptions > 0
    assert rig.kv.match(chain(b"", tokens, 16)) == 4


def test_one_that_has_all_its_pages_need_not_wait_for_one_that_lacks_some(rig: Rig) -> None:
    others = rig.kv.reserve([], 20)
    rig.submit("running", 20, max_tokens=50)
    rig.engine.step()
    rig.submit("large", 180)
    rig.submit("ready", 20, pages=rig.kv.reserve([], 2))
    rig.engine.step()
    assert rig.batches[-1] == {"running": 1, "ready": 20}
    assert others is not None


def handed_over(rig: Rig, name: str) -> None:
    """A sequence all but the last token of which was computed elsewhere."""
    pages = rig.kv.reserve(chain(b"", request("known", 33).prompt_token_ids, 16)[:2], 3)
    assert pages is not None
    assert pages.num_tokens == 32
    rig.engine.submit(replace(request("known", 33), request_id=name), pages)


def test_who_was_computed_elsewhere_generates_beside_a_prompt_that_runs_here(rig: Rig) -> None:
    rig.submit("known", 33)
    rig.finish()
    rig.submit("long", 150)
    rig.engine.step()
    handed_over(rig, "newcomer")
    rig.engine.step()
    assert rig.batches[-1] == {"newcomer": 1, "long": 63}


def test_who_was_computed_elsewhere_takes_no_place_from_one_that_waits_longer() -> None:
    rig = Rig(max_num_sequences=2)
    rig.submit("known", 33)
    rig.finish()
    rig.submit("long", 100)
    rig.submit("early", 20)
    rig.engine.step()
    handed_over(rig, "late")
    assert order_of_ends(rig.finish()) == ["long", "early", "late"]


def test_a_sequence_without_room_sleeps_until_pages_are_freed(rig: Rig) -> None:
    others = rig.kv.reserve([], 31)
    assert others is not None
    rig.submit("r", 40)
    rig.engine.step()
    assert not rig.engine.has_work()
    assert rig.engine.is_short()
    rig.kv.drop(others)
    assert rig.engine.has_work()
    assert order_of_ends(rig.finish()) == ["r"]
    assert not rig.engine.is_short()


def test_a_sequence_without_room_gets_the_pages_of_a_lease_that_lapsed(rig: Rig) -> None:
    others = rig.kv.reserve([], 31)
    assert others is not None
    rig.kv.grant(others.page_ids)
    rig.kv.drop(others)
    rig.submit("r", 40)
    assert rig.finish() == []
    rig.now += 10.0
    assert order_of_ends(rig.finish()) == ["r"]


def test_sequences_that_wait_with_pages_never_lock_each_other_out() -> None:
    rig = Rig(num_pages=8)
    rig.submit("first", 70)
    for name in ("b", "c"):
        pages = rig.kv.reserve([], 3)
        assert pages is not None
        rig.submit(name, 60, pages=pages)
    assert sorted(order_of_ends(rig.finish())) == ["b", "c", "first"]


def test_a_handed_over_table_is_empty_for_the_one_who_handed_it_over(rig: Rig) -> None:
    pages = rig.kv.reserve([], 2)
    assert pages is not None
    rig.submit("r", pages=pages)
    rig.kv.drop(pages)
    assert rig.kv.counts().held == 2
    assert order_of_ends(rig.finish()) == ["r"]


def test_a_budget_that_is_too_small_for_its_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot share"):
        Rig(max_step_tokens=4, max_num_sequences=8)


# Prompts that begin alike ---------------------------------------------------------------------------------------------


def test_a_prompt_that_waited_takes_over_what_another_one_computed_meanwhile(rig: Rig) -> None:
    """Both found nothing when they came, as in a burst."""
    alone = Rig()
    alone.submit("a", 100)
    expected = output(alone.finish(), "a")
    asked = request("a", 100)
    for name in ("first", "second"):
        pages = rig.kv.reserve(chain(asked.hash_key, asked.prompt_token_ids, 16), 7)
        rig.engine.submit(replace(asked, request_id=name), pages)
    events = rig.finish()
    assert output(events, "first") == output(events, "second") == expected
    assert (last(events, "first").num_cached_tokens, last(events, "second").num_cached_tokens) == (0, 64)
    assert sum(batch.get("second", 0) for batch in rig.batches) == 100 - 64 + 3  # and three of its output


def test_a_prompt_that_begins_as_another_one_of_its_step_is_computed_once() -> None:
    rig = Rig(max_step_tokens=400)
    rig.submit("ab", 150)
    rig.submit("c", 20)
    rig.submit("ba", 150)  # the same prompt as the first
    events = rig.finish()
    assert rig.batches[:2] == [{"ab": 150, "c": 20}, {"ab": 1, "c": 1, "ba": 6}]
    assert output(events, "ba") == output(events, "ab")
    assert last(events, "ba").num_cached_tokens == 144


def test_so_is_one_that_comes_while_a_step_with_the_same_prompt_is_in_flight() -> None:
    rig = Rig(max_step_tokens=400, behind=True)
    rig.submit("ab", 150)
    rig.engine.step()
    rig.submit("ba", 150)
    rig.finish()
    assert sum(batch["ba"] for batch in rig.batches if "ba" in batch) < 144


def test_a_short_beginning_in_common_is_not_worth_a_step() -> None:
    rig = Rig(max_step_tokens=400)
    rig.submit("ab", 100)
    rig.submit("ba", 100)
    rig.engine.step()
    assert rig.batches == [{"ab": 100, "ba": 100}]


def test_one_that_waits_for_the_same_prompt_keeps_its_turn_for_pages() -> None:
    rig = Rig(num_pages=20, max_step_tokens=400)
    rig.submit("ab", 150)
    rig.submit("ba", 150)
    rig.submit("c", 100)
    rig.engine.step()
    rig.engine.step()
    assert rig.batches == [{"ab": 150}, {"ab": 1, "ba": 6, "c": 100}]


def test_a_crowd_with_the_same_prompt_computes_it_once() -> None:
    rig = Rig(num_pages=400, max_step_tokens=400, max_num_sequences=40)
    for name in permutations("abcd"):  # 24 names of the same sum, hence the same prompt
        rig.submit("".join(name), 150)
    rig.finish()
    assert rig.batches[0] == {"abcd": 150}
    assert sum(tokens for batch in rig.batches for tokens in batch.values()) == 150 + 23 * 6 + 24 * 3
