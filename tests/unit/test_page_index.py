"""The table of page hashes, held against dictionaries of Python, and against its promise of memory."""

import random
import subprocess
import sys

import numpy as np
import pytest

from services.router.page_index import SLOTS_PER_WORD, PageIndex, keys_of
from tests.architecture.tree import ROOT

MANY = 100_000


def hashes(count: int, seed: int = 0) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(16) for _ in range(count)]


def add(index: PageIndex, pages: list[bytes], slot: int) -> None:
    index.add(keys_of(b"".join(pages)), np.full(len(pages), slot))


def discard(index: PageIndex, pages: list[bytes], slot: int) -> None:
    index.discard(keys_of(b"".join(pages)), np.full(len(pages), slot))


def runs(index: PageIndex, pages: list[bytes]) -> list[int]:
    return [int(length) for length in index.runs(keys_of(b"".join(pages)))]


def held(index: PageIndex, pages: list[bytes], slot: int) -> list[bool]:
    masks = index.masks(keys_of(b"".join(pages)))
    return [bool(int(mask[slot // SLOTS_PER_WORD]) >> slot % SLOTS_PER_WORD & 1) for mask in masks]


@pytest.mark.parametrize("seed", range(4))
def test_it_holds_what_a_dictionary_of_sets_would_hold(seed: int) -> None:
    chance, pages = random.Random(seed), hashes(3_000, seed)
    index, oracle = PageIndex(10_000, num_words=2), {slot: set[bytes]() for slot in (0, 63, 64, 127)}
    for _ in range(200):
        slot, some = chance.choice(list(oracle)), chance.choices(pages, k=chance.randrange(120))
        if chance.random() < 0.6:
            add(index, some, slot)
            oracle[slot] |= set(some)
        else:
            discard(index, some, slot)
            oracle[slot] -= set(some)
    for slot, there in oracle.items():
        assert held(index, pages, slot) == [page in there for page in pages]
    assert index.num_pages == len(set.union(*oracle.values()))


def test_it_grows_and_loses_nothing() -> None:
    pages = hashes(MANY)
    index = PageIndex(MANY)
    for first in range(0, MANY, 2_500):
        add(index, pages[first : first + 2_500], slot=first % 64)
    assert index.num_pages == MANY
    assert index.num_segments > 16
    for first in range(0, MANY, 2_500):
        assert all(held(index, pages[first : first + 2_500], slot=first % 64))


def test_removed_pages_make_room_for_others() -> None:
    index = PageIndex(MANY)
    for seed in range(12):
        pages = hashes(8_000, seed)
        add(index, pages, slot=1)
        discard(index, pages, slot=1)
    assert index.num_pages == 0
    assert index.num_segments <= 8


def test_runs_are_counted_to_the_page() -> None:
    chance = random.Random(3)
    for num_pages in (1, 2, 31, 32, 33, 64, 65, 500, 1_000, 1_999):
        pages, index = hashes(num_pages, num_pages), PageIndex(10_000)
        lengths = [chance.choice([0, 1, num_pages // 2, num_pages - 1, num_pages, chance.randrange(num_pages + 1)])
                   for _ in range(64)]  # fmt: skip
        for slot, length in enumerate(lengths):
            add(index, pages[:length], slot)
        assert runs(index, pages) == lengths


@pytest.mark.parametrize("num_slots", [2, 150])
@pytest.mark.parametrize("num_words", [1, 3])
def test_runs_of_few_and_of_many_are_counted_to_the_page(num_slots: int, num_words: int) -> None:
    """Few ends are bisected for; so many as 150 slots have are found another way."""
    chance, pages = random.Random(num_slots), hashes(1_000)
    index = PageIndex(2_000, num_words)
    slots = chance.sample(range(64 * num_words), min(num_slots, 64 * num_words))
    expected = [0] * (64 * num_words)
    for slot in slots:
        expected[slot] = chance.choice([1, 999, 1_000, *(chance.randrange(1, 1_000) for _ in range(20))])
        add(index, pages[: expected[slot]], slot)
    assert runs(index, pages) == expected


def test_runs_are_counted_to_the_page_wherever_they_ended_last_time() -> None:
    chance, pages, index = random.Random(0), hashes(400), PageIndex(1_000)
    lengths = [0] * 8
    for _ in range(300):
        slot = chance.randrange(8)
        length = chance.randrange(401)
        add(index, pages[lengths[slot] : length], slot)
        discard(index, pages[length : lengths[slot]], slot)
        lengths[slot] = length
        asked = chance.randrange(1, 401)
        assert runs(index, pages[:asked])[:8] == [min(length, asked) for length in lengths]


class Counted(PageIndex):
    """Counts the pages it looks at one by one."""

    num_probes = 0

    def _mask_of(self, low: int, high: int) -> int:
        self.num_probes += 1
        return super()._mask_of(low, high)


def test_a_prompt_that_goes_on_from_one_asked_for_before_takes_few_probes() -> None:
    pages, index = hashes(1_000), Counted(2_000)
    for slot, length in enumerate((1_000, 700, 300, 48)):
        add(index, pages[:length], slot)
    num_probes = []
    for asked in (pages[:900], pages[:900] + hashes(100, seed=1)):
        index.num_probes = 0
        assert runs(index, asked)[:4] == [900, 700, 300, 48]
        num_probes.append(index.num_probes)
    assert num_probes[0] > 20
    assert num_probes[1] <= 2 + 2 * 4


def test_runs_are_right_where_pages_share_half_of_their_hash_and_where_it_is_zero() -> None:
    pages = [bytes(8) + bytes([number]) * 8 for number in range(6)]
    index = PageIndex(100)
    add(index, pages[:5], slot=1)
    assert runs(index, pages) == [0, 5] + [0] * 62


def test_runs_are_right_after_the_table_grew_and_was_widened() -> None:
    pages = hashes(20_000)
    index = PageIndex(20_000)
    add(index, pages, slot=3)
    index.widen(2)
    add(index, pages[:700], slot=100)
    found = runs(index, pages[:900])
    assert (found[3], found[100], sum(found)) == (900, 700, 1_600)


def test_a_run_ends_where_a_page_between_two_probes_is_missing_next_to_an_end() -> None:
    pages, index = hashes(100), PageIndex(10_000)
    add(index, pages[:50], slot=0)
    discard(index, pages[49:50], slot=0)
    assert runs(index, pages)[0] == 49


def test_looking_up_nothing_finds_nothing() -> None:
    index = PageIndex(1_000, num_words=3)
    assert runs(index, []) == [0] * 3 * SLOTS_PER_WORD
    assert runs(index, hashes(5)) == [0] * 3 * SLOTS_PER_WORD


def test_a_cleared_slot_is_empty_and_the_others_are_not() -> None:
    pages, index = hashes(20_000), PageIndex(MANY)
    add(index, pages, slot=5)
    add(index, pages[:100], slot=6)
    segment = 0
    while segment < index.num_segments:
        index.clear(np.array([5]), segment)
        segment += 1
    assert index.num_pages == 100
    assert runs(index, pages[:200])[5:7] == [0, 100]


def test_a_wider_table_keeps_what_it_had() -> None:
    pages, index = hashes(5_000), PageIndex(MANY)
    add(index, pages, slot=63)
    index.widen(2)
    add(index, pages[:10], slot=64)
    assert runs(index, pages)[63:65] == [5_000, 10]


def test_a_full_table_takes_no_more_and_keeps_what_it_has() -> None:
    pages, index = hashes(60_000), PageIndex(1_000)
    for first in range(0, len(pages), 1_000):
        add(index, pages[first : first + 1_000], slot=0)
    assert 1_000 < index.num_pages < 20_000
    assert all(held(index, pages[:1_000], slot=0))


def test_hashes_that_are_none_end_neither_in_a_loop_nor_in_endless_memory() -> None:
    index = PageIndex(1_000_000)
    add(index, [number.to_bytes(8, "little") + bytes(8) for number in range(0, 20_000 * 2**18, 2**18)], slot=0)
    assert index.num_segments < 100


# What a process takes for a million pages: as the table says, and as the system sees it.
MILLION = r"""
import re, sys
import numpy as np
from services.router.page_index import PageIndex, keys_of

def resident(which):  # not getrusage, whose peak is inherited from the process that started this one
    return int(re.search(which + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024

chance = np.random.default_rng(1)
index = PageIndex(2_000_000, num_words=int(sys.argv[1]))
keys_of(chance.bytes(16_000))
before, worst = resident("VmRSS"), 0.0
for number in range(1, 1_001):
    index.add(keys_of(chance.bytes(16_000)), np.full(1_000, number % 64))
    if number >= 200 and number % 10 == 0:
        worst = max(worst, index.num_bytes / index.num_pages)
peak = resident("VmHWM")
print(index.num_pages, worst, (peak - before) / index.num_pages)
"""


@pytest.mark.parametrize("num_words", [1, 3], ids=["63 slots", "191 slots"])
def test_a_million_pages_take_less_than_a_hundred_bytes_each_at_every_moment(num_words: int) -> None:
    command = [sys.executable, "-c", MILLION, str(num_words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    num_pages, by_table, by_system = map(float, done.stdout.split())
    assert num_pages == 1_000_000
    assert by_table < 100
    assert by_system < 100
