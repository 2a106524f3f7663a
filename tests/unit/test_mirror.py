"""The mirror against what workers really have, whatever happens to the changes on their way."""

import random
from dataclasses import dataclass, field

import pytest

from services.router.mirror import Incarnation, Mirror
from shared.blackboard.index import IndexEvent, IndexPart

PART = 7  # hashes


def hashes(count: int, seed: int = 0) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(16) for _ in range(count)]


@dataclass
class Shelf:
    """A worker's index in Redis. A part of it is whatever SSCAN may return: all that is there throughout, at least."""

    worker: Incarnation
    pages: set[bytes] = field(default_factory=set)
    number: int = 0
    complete: bool = True

    def change(self, stored: list[bytes], removed: list[bytes]) -> IndexEvent:
        self.pages = (self.pages | set(stored)) - set(removed)
        self.number += 1
        return IndexEvent(*self.worker, self.number, b"".join(stored), b"".join(removed))

    def replace(self, pages: list[bytes]) -> IndexEvent:
        self.pages, self.complete = set(pages), True
        self.number += 1
        return IndexEvent(*self.worker, self.number, replaced=True)

    def part(self, cursor: int) -> IndexPart:
        """Parts are cut by value, so that a page has its place whatever comes and goes."""
        width = 256 // 4
        there = sorted(page for page in self.pages if cursor * width <= page[0] < (cursor + 1) * width)
        return IndexPart(self.complete, self.number, (cursor + 1) % 4, b"".join(there))


def read_all(mirror: Mirror, shelves: dict[Incarnation, Shelf]) -> None:
    """Serve every part that the mirror wants, with nothing happening in between."""
    for _ in range(1_000):
        wanted = mirror.wanted()
        if wanted is None:
            return
        name, epoch, cursor = wanted
        mirror.take((name, epoch), cursor, shelves[name, epoch].part(cursor))
    raise AssertionError("the mirror is never content")


def seen(mirror: Mirror, shelf: Shelf, pages: list[bytes]) -> set[bytes]:
    """Pages that the mirror says a worker has."""
    return {page for page in pages if mirror.runs(page, [shelf.worker])[0]}


@pytest.fixture
def mirror() -> Mirror:
    return Mirror(max_pages=10_000)


def tracked(mirror: Mirror, *shelves: Shelf) -> None:
    mirror.track([shelf.worker for shelf in shelves])
    read_all(mirror, {shelf.worker: shelf for shelf in shelves})


def test_a_worker_that_joins_is_read_whole(mirror: Mirror) -> None:
    pages = hashes(50)
    shelf = Shelf(("d1", 1), set(pages))
    mirror.track([shelf.worker])
    assert not mirror.is_complete
    read_all(mirror, {shelf.worker: shelf})
    assert mirror.is_complete
    assert seen(mirror, shelf, pages) == set(pages)


def test_changes_are_applied_in_order(mirror: Mirror) -> None:
    pages, shelf = hashes(3), Shelf(("d1", 1))
    tracked(mirror, shelf)
    mirror.apply([shelf.change(pages, []), shelf.change([], pages[:1])])
    assert mirror.wanted() is None
    assert seen(mirror, shelf, pages) == set(pages[1:])


def test_a_change_that_comes_twice_counts_once(mirror: Mirror) -> None:
    pages, shelf = hashes(1), Shelf(("d1", 1))
    tracked(mirror, shelf)
    stored = shelf.change(pages, [])
    mirror.apply([stored, shelf.change([], pages), stored])
    assert seen(mirror, shelf, pages) == set()
    assert mirror.wanted() is None


def test_a_missing_number_has_the_worker_read_again_and_only_this_one(mirror: Mirror) -> None:
    pages, shelf, other = hashes(3), Shelf(("d1", 1)), Shelf(("d2", 1))
    tracked(mirror, shelf, other)
    shelf.change(pages[:2], [])
    mirror.apply([shelf.change(pages[2:], []), other.change(pages, [])])
    assert mirror.wanted() == ("d1", 1, 0)
    read_all(mirror, {shelf.worker: shelf})
    assert seen(mirror, shelf, pages) == set(pages)


def test_what_was_known_answers_until_the_new_snapshot_is_complete(mirror: Mirror) -> None:
    pages = hashes(40)
    shelf = Shelf(("d1", 1), set(pages))
    tracked(mirror, shelf)
    mirror.doubt()
    mirror.take(shelf.worker, 0, shelf.part(0))
    assert seen(mirror, shelf, pages) == set(pages)


def test_an_index_that_redis_lost_is_kept_until_its_worker_has_written_it_again(mirror: Mirror) -> None:
    pages = hashes(5)
    shelf = Shelf(("d1", 1), set(pages))
    tracked(mirror, shelf)
    lost = Shelf(("d1", 1), complete=False)
    mirror.doubt()
    read_all(mirror, {lost.worker: lost})
    assert seen(mirror, shelf, pages) == set(pages)
    mirror.apply([lost.replace(pages[:2])])
    read_all(mirror, {lost.worker: lost})
    assert seen(mirror, shelf, pages) == set(pages[:2])


def test_a_worker_that_left_is_forgotten_and_its_next_epoch_begins_empty(mirror: Mirror) -> None:
    pages = hashes(5)
    first, second = Shelf(("d1", 1), set(pages)), Shelf(("d1", 2))
    tracked(mirror, first)
    tracked(mirror, second)
    mirror.apply([first.change(pages, [])])
    assert seen(mirror, first, pages) == seen(mirror, second, pages) == set()


def test_pages_of_workers_that_left_are_cleared_and_their_slots_used_again(mirror: Mirror) -> None:
    pages = hashes(20)
    for epoch in range(1, 300):
        shelf = Shelf(("d1", epoch), set(pages))
        tracked(mirror, shelf)
        for _ in range(3):
            mirror.tidy()
    mirror.track([])
    for _ in range(10):
        mirror.tidy()
    assert mirror.num_pages == 0
    assert mirror.num_bytes < 500_000


def test_more_workers_than_a_word_has_bits(mirror: Mirror) -> None:
    pages = hashes(200)
    shelves = [Shelf((f"w{number:03}", 1), set(pages[:number])) for number in range(150)]
    tracked(mirror, *shelves)
    found = mirror.runs(b"".join(pages), [shelf.worker for shelf in shelves])
    assert found.tolist() == list(range(150))


def test_an_audit_finds_changes_that_never_came(mirror: Mirror) -> None:
    pages, shelf = hashes(1), Shelf(("d1", 1))
    tracked(mirror, shelf)
    shelf.change(pages, [])
    mirror.audit({shelf.worker: shelf.number})
    assert mirror.wanted() is None  # it may be on its way
    mirror.audit({shelf.worker: shelf.number})
    assert mirror.wanted() == ("d1", 1, 0)


def test_an_audit_finds_a_count_that_was_started_over(mirror: Mirror) -> None:
    shelf = Shelf(("d1", 1), number=9)
    tracked(mirror, shelf)
    mirror.audit({shelf.worker: 9})
    mirror.audit({shelf.worker: 2})
    assert mirror.wanted() == ("d1", 1, 0)


def test_an_unknown_worker_has_nothing(mirror: Mirror) -> None:
    assert mirror.runs(b"h" * 16, [("nobody", 1)]).tolist() == [0]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_mirror_ends_up_with_what_workers_have(seed: int) -> None:
    """Random changes, parts read at random moments, changes lost, repeated, and whole indexes lost and replaced."""
    chance, pages, mirror = random.Random(seed), hashes(60, seed), Mirror(max_pages=10_000)
    shelves = {name: Shelf((name, 1)) for name in ("p1", "d1", "d2")}
    for _ in range(400):
        shelf = chance.choice(list(shelves.values()))
        action = chance.random()
        if action < 0.6:
            stored = chance.sample(pages, chance.randrange(6))
            removed = [page for page in chance.sample(pages, chance.randrange(6)) if page not in stored]
            event = shelf.change(stored, removed)
            if chance.random() < 0.9:
                mirror.apply([event] * chance.choice([1, 1, 1, 2]))
        elif action < 0.64:
            mirror.apply([shelf.replace(chance.sample(pages, 20))])
        elif action < 0.66:  # Redis loses it, and the worker writes it again
            shelf.number, shelf.complete, there = 0, False, list(shelf.pages)
            mirror.doubt()
            read_all(mirror, {each.worker: each for each in shelves.values()})
            mirror.apply([shelf.replace(there)])
        elif action < 0.68:
            shelves[shelf.worker[0]] = Shelf((shelf.worker[0], shelf.worker[1] + 1))
        elif wanted := mirror.wanted():
            name, epoch, cursor = wanted
            mirror.take((name, epoch), cursor, shelves[name].part(cursor))
        mirror.track([each.worker for each in shelves.values()])
        mirror.tidy()
    mirror.audit({each.worker: each.number for each in shelves.values()})
    read_all(mirror, {each.worker: each for each in shelves.values()})
    mirror.audit({each.worker: each.number for each in shelves.values()})
    read_all(mirror, {each.worker: each for each in shelves.values()})
    for shelf in shelves.values():
        assert seen(mirror, shelf, pages) == shelf.pages
