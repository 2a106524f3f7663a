"""A random walk over everything that the page store allows."""

import random

import pytest

from shared.engine.kv.store import KvStore, PageTable
from tests.unit.clock import Clock

PAGE_SIZE = 4
TTL_S = 10.0


def hashes(num_pages: int, name: str) -> list[bytes]:
    return [f"{name}{index:15}".encode() for index in range(num_pages)]


class Actor:
    """Does anything that the store allows, in random order, and keeps what it got."""

    def __init__(self, kv: KvStore, clock: Clock, seed: int) -> None:
        self.kv, self.clock, self.random = kv, clock, random.Random(seed)
        self.tables = [PageTable()]
        self.leases: list[int] = []

    def act(self) -> None:
        actions = [
            self.reserve,
            self.extend,
            self.adopt,
            self.publish,
            self.shrink,
            self.drop,
            self.drop,
            self.grant,
            self.widen,
        ]
        self.random.choice([*actions, self.acquire, self.renew, self.release, self.wait])()

    def chain(self) -> list[bytes]:
        return hashes(self.random.randint(0, 12), self.random.choice("abc"))

    def reserve(self) -> None:
        table = self.kv.reserve(self.chain(), self.random.randint(0, 10), self.random.randint(0, 2))
        self.tables += [table] if table else []

    def table(self) -> PageTable:
        return self.random.choice(self.tables)

    def extend(self) -> None:
        self.kv.extend(self.table(), self.random.randint(0, 3))

    def adopt(self) -> None:
        if fresh := self.kv.reserve(self.chain(), self.random.randint(0, 10)):
            self.publish()
            self.kv.adopt(fresh, self.chain())
            self.tables.append(fresh)

    def publish(self) -> None:
        self.kv.publish(self.table(), 0, self.chain())

    def shrink(self) -> None:
        self.kv.shrink(self.table(), self.random.randint(0, 10 * PAGE_SIZE))

    def drop(self) -> None:
        self.kv.drop(self.table())

    def grant(self) -> None:
        self.leases.append(self.kv.grant(self.table().page_ids[self.random.randint(0, 2) :]))

    def lease(self) -> int:
        return self.random.choice([*self.leases, 0])

    def widen(self) -> None:
        self.kv.widen(self.lease(), self.table().page_ids)

    def acquire(self) -> None:
        if lease := self.kv.acquire(self.chain()):
            self.leases.append(lease[0])

    def renew(self) -> None:
        self.kv.renew(self.lease())

    def release(self) -> None:
        self.kv.release(self.lease())

    def wait(self) -> None:
        self.clock.now += self.random.random() * TTL_S


@pytest.mark.parametrize("seed", range(20))
def test_the_books_are_right_whatever_happens(seed: int) -> None:
    clock = Clock()
    kv = KvStore(32, PAGE_SIZE, int(TTL_S * 1000), clock)
    actor, known = Actor(kv, clock, seed), set[bytes]()
    for _ in range(400):
        actor.act()
        assert kv.check() == []
        counts = kv.counts()
        assert counts.free + counts.cached + counts.leased + counts.held == counts.total
        for event in kv.drain_events():
            assert event.stored != (event.page_hash in known)
            known ^= {event.page_hash}
        assert known == set(kv.hashes())
    for table in actor.tables:
        kv.drop(table)
    clock.now += TTL_S
    assert kv.counts().free + kv.counts().cached == 32
