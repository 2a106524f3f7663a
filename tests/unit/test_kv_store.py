from collections.abc import Iterator

import pytest

from shared.engine.kv.store import KvStore, PageTable
from shared.errors import Internal
from tests.unit.clock import Clock

PAGE_SIZE = 4
TTL_S = 10.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kv(clock: Clock) -> Iterator[KvStore]:
    store = KvStore(8, PAGE_SIZE, int(TTL_S * 1000), clock)
    yield store
    assert store.check() == []


def hashes(num_pages: int, name: str = "a") -> list[bytes]:
    return [f"{name}{index:15}".encode() for index in range(num_pages)]


def hold(kv: KvStore, num_pages: int, name: str = "") -> PageTable:
    """Pages held, and published under a chain of hashes if that has a name."""
    table = kv.reserve(hashes(num_pages, name) if name else [], num_pages)
    assert table is not None
    kv.publish(table, 0, hashes(num_pages, name) if name else [])
    return table


def cache(kv: KvStore, num_pages: int, name: str) -> list[int]:
    table = hold(kv, num_pages, name)
    page_ids = list(table.page_ids)
    kv.drop(table)
    return page_ids


def states(kv: KvStore) -> tuple[int, int, int, int]:
    counts = kv.counts()
    return counts.free, counts.cached, counts.leased, counts.held


# Holding --------------------------------------------------------------------------------------------------------------


def test_a_dropped_page_without_a_hash_is_free(kv: KvStore) -> None:
    table = hold(kv, 3)
    assert states(kv) == (5, 0, 0, 3)
    kv.drop(table)
    assert states(kv) == (8, 0, 0, 0)


def test_a_table_is_dropped_once_however_often_it_is_tried(kv: KvStore) -> None:
    table = hold(kv, 3)
    kv.drop(table)
    kv.drop(table)
    assert table == PageTable()
    assert states(kv) == (8, 0, 0, 0)


def test_a_published_page_is_found_while_held_and_after(kv: KvStore) -> None:
    table = hold(kv, 3, "a")
    assert kv.match(hashes(5)) == 3
    kv.drop(table)
    assert kv.match(hashes(5)) == 3
    assert states(kv) == (5, 3, 0, 0)


def test_a_reservation_begins_with_what_is_cached(kv: KvStore) -> None:
    page_ids = cache(kv, 3, "a")
    table = kv.reserve(hashes(5), 4)
    assert table is not None
    assert table.page_ids[:3] == page_ids
    assert (len(table.page_ids), table.num_tokens) == (4, 3 * PAGE_SIZE)


def test_a_page_is_free_only_when_its_last_holder_drops_it(kv: KvStore) -> None:
    first = hold(kv, 2, "a")
    second = kv.reserve(hashes(2), 2)
    assert second is not None
    assert second.page_ids == first.page_ids
    kv.drop(first)
    assert states(kv) == (6, 0, 0, 2)
    kv.drop(second)
    assert states(kv) == (6, 2, 0, 0)


def test_nothing_changes_when_there_is_no_room(kv: KvStore) -> None:
    cache(kv, 3, "a")
    table = hold(kv, 4)
    before = states(kv)
    assert kv.reserve(hashes(3), 5) is None
    assert not kv.extend(table, 5)
    assert (states(kv), len(table.page_ids)) == (before, 4)


def test_cached_pages_that_a_reservation_reuses_do_not_count_as_room_for_the_rest_of_it(kv: KvStore) -> None:
    cache(kv, 3, "a")
    hold(kv, 4)
    assert kv.reserve(hashes(3), 4) is not None
    assert states(kv) == (0, 0, 0, 8)


def test_a_reservation_leaves_the_spare_pages_that_were_asked_for(kv: KvStore) -> None:
    assert kv.reserve([], 6, num_spare=3) is None
    assert kv.reserve([], 5, num_spare=3) is not None


def test_a_shrunk_table_keeps_the_pages_of_its_first_tokens(kv: KvStore) -> None:
    table = hold(kv, 4)
    table.num_tokens = 14
    kept = table.page_ids[:2]
    kv.shrink(table, 7)
    assert table == PageTable(kept, 7)
    assert states(kv) == (6, 0, 0, 2)


# Caching --------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_prefix_is_evicted_first(kv: KvStore) -> None:
    cache(kv, 3, "old")
    cache(kv, 3, "young")
    cache(kv, 3, "old")
    hold(kv, 4)
    assert (kv.match(hashes(3, "old")), kv.match(hashes(3, "young"))) == (3, 1)


def test_a_prefix_outlives_what_continues_it(kv: KvStore) -> None:
    cache(kv, 6, "a")
    for num_left in range(5, -1, -1):
        hold(kv, 2 if num_left == 5 else 0)
        hold(kv, 1)
        assert kv.match(hashes(6)) == num_left


def test_a_prefix_outlives_a_continuation_that_was_leased_without_it(kv: KvStore) -> None:
    table = hold(kv, 4, "a")
    lease_id = kv.grant(table.page_ids[2:])
    kv.drop(table)
    kv.release(lease_id)
    hold(kv, 6)
    assert kv.match(hashes(4)) == 2


def test_a_prefix_outlives_a_continuation_that_was_published_later(kv: KvStore) -> None:
    table = hold(kv, 4)
    kv.publish(table, 0, hashes(2))
    kv.publish(table, 2, hashes(4)[2:])
    lease_id = kv.grant(table.page_ids[2:])
    kv.drop(table)
    kv.release(lease_id)
    hold(kv, 6)
    assert kv.match(hashes(4)) == 2


def test_a_hash_that_is_known_keeps_its_page(kv: KvStore) -> None:
    first = hold(kv, 2, "a")
    twin = hold(kv, 2)
    kv.publish(twin, 0, hashes(2))
    kv.drop(twin)
    assert kv.acquire(hashes(2)) == (1, first.page_ids)


def test_a_twin_takes_over_when_the_findable_page_was_evicted(kv: KvStore) -> None:
    twin = hold(kv, 2)
    cache(kv, 2, "a")
    kv.publish(twin, 0, hashes(2))
    kv.drop(hold(kv, 6))
    assert kv.match(hashes(2)) == 0
    page_ids = list(twin.page_ids)
    kv.drop(twin)
    assert kv.acquire(hashes(2)) == (1, page_ids)


def test_events_tell_what_became_findable_and_what_ceased_to_be(kv: KvStore) -> None:
    cache(kv, 2, "a")
    assert [(event.page_hash, event.stored) for event in kv.drain_events()] == [(each, True) for each in hashes(2)]
    hold(kv, 8)
    assert {(event.page_hash, event.stored) for event in kv.drain_events()} == {(each, False) for each in hashes(2)}
    assert kv.hashes() == []


def test_events_that_cancel_out_are_left_out(kv: KvStore) -> None:
    cache(kv, 2, "a")
    hold(kv, 8)
    assert kv.drain_events() == []


# Leasing --------------------------------------------------------------------------------------------------------------


def test_a_page_under_a_live_lease_is_never_reused(kv: KvStore) -> None:
    page_ids = cache(kv, 3, "a")
    lease = kv.acquire(hashes(3))
    assert lease is not None
    rest = hold(kv, 5)
    assert kv.reserve([], 1) is None
    assert not set(rest.page_ids) & set(page_ids)
    assert states(kv) == (0, 0, 3, 5)


def test_a_lease_outlives_the_sequence_that_held_its_pages(kv: KvStore) -> None:
    table = hold(kv, 3)
    lease_id = kv.grant(table.page_ids)
    kv.drop(table)
    assert states(kv) == (5, 0, 3, 0)
    assert kv.release(lease_id)
    assert states(kv) == (8, 0, 0, 0)


def test_a_lease_covers_what_it_was_widened_by_once(kv: KvStore) -> None:
    table = hold(kv, 3)
    lease_id = kv.grant(table.page_ids[:2])
    assert kv.widen(lease_id, table.page_ids)
    kv.drop(table)
    kv.release(lease_id)
    assert states(kv) == (8, 0, 0, 0)


def test_pages_under_two_leases_stay_until_both_ended(kv: KvStore) -> None:
    cache(kv, 2, "a")
    first, second = kv.acquire(hashes(2)), kv.acquire(hashes(2))
    assert first is not None
    assert second is not None
    kv.release(first[0])
    assert states(kv) == (6, 0, 2, 0)
    kv.release(second[0])
    assert states(kv) == (6, 2, 0, 0)


def test_a_lease_ends_when_its_time_is_up(kv: KvStore, clock: Clock) -> None:
    cache(kv, 2, "a")
    lease = kv.acquire(hashes(2))
    assert lease is not None
    clock.now = TTL_S
    assert states(kv) == (6, 2, 0, 0)
    assert not kv.renew(lease[0])
    assert not kv.widen(lease[0], [])
    assert not kv.release(lease[0])


def test_a_renewed_lease_has_its_full_time_again(kv: KvStore, clock: Clock) -> None:
    table = hold(kv, 1)
    first, second = kv.grant(table.page_ids), kv.grant(table.page_ids)
    clock.now = 6.0
    assert kv.renew(first)
    assert kv.next_lease_end_s() == TTL_S - 6.0
    clock.now = TTL_S
    assert kv.expire() == 1
    assert kv.release(first)
    assert not kv.release(second)


def test_a_lease_is_released_once(kv: KvStore) -> None:
    lease_id = kv.grant()
    assert kv.release(lease_id)
    assert not kv.release(lease_id)


def test_nothing_is_leased_where_nothing_is_cached(kv: KvStore) -> None:
    assert kv.acquire(hashes(2)) is None
    assert kv.next_lease_end_s() is None


@pytest.mark.parametrize("page_id", [0, -1, 8])
def test_a_page_that_nobody_holds_cannot_be_leased(page_id: int, kv: KvStore) -> None:
    with pytest.raises(Internal, match="nobody holds"):
        kv.grant([page_id])
    assert kv.next_lease_end_s() is None


# Word of freed pages --------------------------------------------------------------------------------------------------


def test_whoever_waits_for_room_is_told_of_freed_pages_and_may_use_the_store_at_once(kv: KvStore) -> None:
    seen: list[int] = []
    table = hold(kv, 8)
    kv.on_capacity = lambda: seen.append(kv.counts().free)
    kv.shrink(table, 6 * PAGE_SIZE)
    kv.drop(table)
    kv.drop(table)
    assert seen == [2, 8]


def test_pages_of_a_lapsed_lease_are_news_even_if_the_call_that_noticed_takes_them(kv: KvStore, clock: Clock) -> None:
    table = hold(kv, 8)
    kv.grant(table.page_ids)
    kv.drop(table)
    seen: list[bool] = []
    kv.on_capacity = lambda: seen.append(True)
    clock.now = TTL_S
    assert kv.reserve([], 8) is not None
    assert seen == [True]


# Pages that others computed meanwhile ---------------------------------------------------------------------------------


def test_pages_that_somebody_computed_meanwhile_take_the_place_of_ones_own(kv: KvStore) -> None:
    mine = kv.reserve(hashes(3), 3)
    assert mine is not None
    theirs = hold(kv, 4, "a")
    kv.adopt(mine, hashes(2))
    assert (mine.page_ids[:2], mine.num_tokens) == (theirs.page_ids[:2], 2 * PAGE_SIZE)
    assert mine.page_ids[2] not in theirs.page_ids
    assert states(kv) == (3, 0, 0, 5)


def test_what_is_computed_already_is_not_given_up_for_pages_of_others(kv: KvStore) -> None:
    mine = kv.reserve([], 3)
    assert mine is not None
    mine.num_tokens = 2 * PAGE_SIZE
    own = list(mine.page_ids)
    hold(kv, 2, "a")
    kv.adopt(mine, hashes(2))
    assert (mine.page_ids, mine.num_tokens) == (own, 2 * PAGE_SIZE)


def test_a_table_without_pages_adopts_none(kv: KvStore) -> None:
    cache(kv, 2, "a")
    mine = PageTable()
    kv.adopt(mine, hashes(2))
    assert mine == PageTable()
