"""Which of some numbered sets hold which pages: 128-bit page hashes in a hash table of numpy arrays.

A set is a *slot*, one bit of a page's mask; what a slot means is the mirror's business. A table of Python objects would
take several hundred bytes a page and a microsecond a lookup; here it is 32 bytes a row, and a thousand pages are found
at once.

    hash   = low word, high word (64 bits each)
    segment = directory[first bits of the high word]         extendible hashing (Fagin et al., 1979)
    bucket  = one of two, by bits of the low word            8 rows: their low words, their high words, their masks
    row     = low word (0: empty), high word, mask

All of a bucket lies together, for memory is what a look-up waits for: lines of it that follow each other (low words,
high words, masks) come sooner than three from anywhere.

A new page goes to the emptier of its two buckets. If both are full its segment splits in two: each row keeps its place
within the segment, half of them in the new one. So the table grows by one segment at a time, never pauses to be built
anew, and never exists twice. Address space is reserved for all it may ever hold; memory is used as rows are written.
"""

import struct
import sys
from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]  # [pages, 2], low and high words
Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

BUCKET_ROWS = 8  # `_find` takes positions apart by shifts of 3 and 4 bits
LOW, HIGH, MASK = 0, 1, 2  # lines of a bucket; more words of masks have more lines
WORD_BYTES = 8
SEGMENT_BUCKETS = 512
SEGMENT_ROWS = BUCKET_ROWS * SEGMENT_BUCKETS
SLOTS_PER_WORD = 64
# Segments are this full at least, but for the few smallest tables: they split when 83 % of their rows are taken.
MIN_LOAD = 0.4
# Hashes are random, so segments split at much the same time. A directory with more entries a segment than this is
# given hashes that are none; it takes no more of those.
MAX_DIRECTORY = 64
# The ends of prefixes are bisected for, a page at a time. If they are so many that this takes more probes, a search
# looks at some pages at once, and then at all between two that differ.
MAX_BISECTIONS = 64
FIRST_PROBES = 48
# First pages of so many prompts are remembered with the places where runs ended.
MAX_REMEMBERED = 4_096

SECOND_SHIFT = 9  # bits of the low word that place the first bucket; those behind it place the second
_BUCKET_BITS, _BUCKET_MASK = np.uint64(SECOND_SHIFT), np.uint64(SEGMENT_BUCKETS - 1)
_ONE = np.uint64(1)
_bucket_of = struct.Struct(f"{BUCKET_ROWS}Q").unpack_from


def keys_of(page_hashes: bytes) -> Keys:
    """Concatenated hashes of 16 bytes as keys [pages, 2]."""
    return np.frombuffer(page_hashes, "<u8").reshape(-1, 2)


class Found(NamedTuple):
    """Those keys that the table has: the low word of key number `places[i]` is word `rows[i]` of it; BUCKET_ROWS words
    further are the high word, and words of the mask."""

    places: Ints
    rows: Ints


class PageIndex:
    """Pages and the slots that hold them; pages beyond about `max_pages` are not taken. Not thread-safe."""

    def __init__(self, max_pages: int, num_words: int = 1) -> None:
        self.num_words = num_words
        self.num_pages = 0
        self._max_segments = 2 + int(max_pages / (MIN_LOAD * SEGMENT_ROWS))
        self._depths = [1, 1]
        self._directory: Ints = np.arange(2, dtype=np.int64)
        self._shift = np.uint64(63)
        self._table: Words = self._new_table()
        self._remembered: dict[int, list[int]] = {}
        self._look_anew()

    def _new_table(self) -> Words:
        """All buckets [buckets, lines, BUCKET_ROWS], empty."""
        return np.zeros((self._max_segments * SEGMENT_BUCKETS, MASK + self.num_words, BUCKET_ROWS), np.uint64)

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        return self._directory.nbytes + self.num_segments * SEGMENT_ROWS * WORD_BYTES * (MASK + self.num_words)

    @property
    def num_segments(self) -> int:
        """Parts that `clear` can be given."""
        return len(self._depths)

    def widen(self, num_words: int) -> None:
        """Make room for more slots."""
        old, num_buckets = self._table, self.num_segments * SEGMENT_BUCKETS
        self.num_words = num_words
        self._table = self._new_table()
        self._table[:num_buckets, : old.shape[1]] = old[:num_buckets]
        self._look_anew()

    def _look_anew(self) -> None:
        """Views of what was replaced."""
        self._lines, self._words = self._table.reshape(-1, BUCKET_ROWS), self._table.reshape(-1)
        self._bucket_words = self._table[0].size
        self._mask_words: Ints = BUCKET_ROWS * np.arange(MASK, MASK + self.num_words)
        self._words_view, self._directory_view = self._words.data, self._directory.data
        self._shift_bits = int(self._shift)

    def _segment(self, number: int) -> Words:
        return self._table[number * SEGMENT_BUCKETS : (number + 1) * SEGMENT_BUCKETS]

    # Changes ----------------------------------------------------------------------------------------------------------

    def add(self, keys: Keys, slots: Ints) -> None:
        """Each page [n] is in each of its slots [n] from now on. Pages may repeat."""
        while len(keys):
            found = self._find(keys)
            words, bits = _bits_of(slots[found.places])
            np.bitwise_or.at(self._words, found.rows + self._mask_words[words], bits)
            if len(found.places) == len(keys):
                return
            absent = np.ones(len(keys), np.bool_)
            absent[found.places] = False
            keys, slots = keys[absent], slots[absent]
            taken = self._insert(keys)
            keys, slots = keys[taken], slots[taken]

    def discard(self, keys: Keys, slots: Ints) -> None:
        """Each page [n] is in its slot [n] no more; a page in no slot is gone."""
        found = self._find(keys)
        words, bits = _bits_of(slots[found.places])
        np.bitwise_and.at(self._words, found.rows + self._mask_words[words], ~bits)
        self._drop_empty(np.unique(found.rows))

    def clear(self, slots: Ints, segment: int) -> None:
        """Empty these slots in one segment. Slots are empty when all segments were cleared and nothing was added."""
        kept = np.full(self.num_words, ~np.uint64(0))
        words, bits = _bits_of(slots)
        np.bitwise_and.at(kept, words, ~bits)
        part = self._segment(segment)
        part[:, MASK:] &= kept[:, None]
        buckets, rows = part[:, LOW].nonzero()
        self._drop_empty((segment * SEGMENT_BUCKETS + buckets) * self._bucket_words + rows)

    def _drop_empty(self, rows: Ints) -> None:
        gone = rows[~self._masks_at(rows).any(axis=1)]
        self._words[gone] = 0
        self.num_pages -= len(gone)

    def _masks_at(self, rows: Ints) -> Words:
        """Masks [n, num_words]."""
        return self._words.take(rows[:, None] + self._mask_words)

    def _insert(self, keys: Keys) -> NDArray[np.bool_]:
        """Give rows to keys that have none, to as many as do not get in each other's way; which are worth another try,
        that is all but those for which there is no room."""
        buckets = self._buckets(keys)
        free = self._lows_in(buckets) == 0  # [n, 2, BUCKET_ROWS]
        room = free.sum(axis=2)
        fits: NDArray[np.bool_] = room.any(axis=1)
        crowded = np.unique(buckets[~fits, 0] // SEGMENT_BUCKETS).tolist()
        if any([self._split(segment) for segment in crowded]):  # noqa: C419 - all of them
            return np.ones(len(keys), np.bool_)
        mine = np.flatnonzero(fits)
        emptier = room[mine].argmax(axis=1)
        rows = buckets[mine, emptier] * self._bucket_words + free[mine, emptier].argmax(axis=1)
        self._words[rows], self._words[rows + HIGH * BUCKET_ROWS] = _lows_of(keys[mine]), keys[mine, 1]
        self._words[rows[:, None] + self._mask_words] = 0
        self.num_pages += len(np.unique(rows))
        return fits

    def _split(self, segment: int) -> bool:
        """Halve a segment: rows whose next bit of the high word is set move to a new one, to the same place there."""
        depth, new = self._depths[segment], self.num_segments
        if new == self._max_segments or len(self._directory) > MAX_DIRECTORY * new:
            return False
        if len(self._directory) == 1 << depth:
            self._directory, self._shift = np.repeat(self._directory, 2), self._shift - _ONE
            self._look_anew()
        self._depths[segment] = depth + 1
        self._depths.append(depth + 1)
        entries = np.flatnonzero(self._directory == segment)
        self._directory[entries[len(entries) // 2 :]] = new
        old, added = self._segment(segment), self._segment(new)
        moved = (old[:, LOW] != 0) & ((old[:, HIGH] >> np.uint64(63 - depth)) & _ONE == _ONE)
        np.copyto(added, old, where=moved[:, None])
        old[:, LOW][moved] = 0
        return True

    # Lookups ----------------------------------------------------------------------------------------------------------

    def masks(self, keys: Keys) -> Words:
        """The slots [n, num_words] that have each page, as bits."""
        found = self._find(keys)
        masks: Words = np.zeros((len(keys), self.num_words), np.uint64)
        masks[found.places] = self._masks_at(found.rows)
        return masks

    def runs(self, keys: Keys) -> Ints:
        """How many leading pages each slot has: [SLOTS_PER_WORD * num_words].

        Hashes are chained and caches drop a prefix after what continues it, so a slot that has a page has all before
        it: only where some slot's run ends need pages be probed. A slot that lacks a page in the midst counts as having
        it if no probe hits it.
        """
        if not len(keys):
            return np.zeros(self.num_words * SLOTS_PER_WORD, np.int64)
        ends = self._few_ends(keys)
        return self._many_runs(keys) if ends is None else self._lengths_of(ends)

    def _few_ends(self, keys: Keys) -> list[tuple[int, int]] | None:
        """After how many pages runs end, and of which slots (bits); None if they are many.

        Plain integers, for most prefixes end in a few places: some 20 probes of 2 us, where one call of numpy on cold
        arrays takes several. Prompts that begin with one page are mostly continued alike, so pages are looked at first
        where runs ended last time: as long as nothing has changed these are two probes for each end, not ten. The
        last end comes first: what lies behind a page is searched before what lies before it.
        """
        words, last = keys.reshape(-1).data, len(keys) - 1
        likely = self._remembered.get(words[0], [])
        have = self._mask_of(words[0], words[1])
        kept = have & self._mask_of(words[2 * last], words[2 * last + 1]) if have else 0
        ends, num_left = [(len(keys), kept)], MAX_BISECTIONS
        spans = [(0, have, last, kept)] if have != kept else []
        while spans:
            near, have, far, kept = spans.pop()
            if far - near == 1:
                ends.append((far, have & ~kept))
                continue
            if not num_left:
                return None
            num_left -= 1
            place = bisect_right(likely, near)
            middle = likely[place] if place < len(likely) and likely[place] < far else (near + far) // 2
            between = have & self._mask_of(words[2 * middle], words[2 * middle + 1])
            if have != between:
                spans.append((near, have, middle, between))
            if between != (kept := kept & between):
                spans.append((middle, between, far, kept))
        self._remember(words[0], ends)
        return ends

    def _remember(self, first: int, ends: list[tuple[int, int]]) -> None:
        """The pages on both sides of each end, for prompts with this first page (its low word)."""
        if len(self._remembered) >= MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[first] = [page for length, _ in reversed(ends) for page in (length - 1, length)]

    def _mask_of(self, low: int, high: int) -> int:
        """The slots that have one page, as `masks`, in one number."""
        words, bucket_words = self._words_view, self._bucket_words
        first, wanted = self._directory_view[high >> self._shift_bits] * SEGMENT_BUCKETS, low or 1
        bucket = (first + low % SEGMENT_BUCKETS) * bucket_words
        held = _bucket_of(words, bucket * WORD_BYTES)
        if wanted not in held:
            bucket = (first + (low + (low >> SECOND_SHIFT | 1)) % SEGMENT_BUCKETS) * bucket_words
            held = _bucket_of(words, bucket * WORD_BYTES)
            if wanted not in held:
                return 0
        row = bucket + held.index(wanted)
        if words[row + HIGH * BUCKET_ROWS] != high:  # half of its hash is another page's
            return int.from_bytes(self.masks(np.array([[low, high]], np.uint64)).tobytes(), sys.byteorder)
        mask: int = words[row + MASK * BUCKET_ROWS]
        if self.num_words > 1:
            for number in range(1, self.num_words):
                mask |= words[row + (MASK + number) * BUCKET_ROWS] << number * SLOTS_PER_WORD
        return mask

    def _lengths_of(self, ends: list[tuple[int, int]]) -> Ints:
        """Runs [SLOTS_PER_WORD * num_words], of ends with the last one first. A slot of two ends lacks a page in the
        midst: the first one counts."""
        lengths: Ints = np.zeros(self.num_words * SLOTS_PER_WORD, np.int64)
        for length, slots in ends:
            left = slots
            while left:
                bit = left & -left
                lengths[bit.bit_length() - 1] = length
                left ^= bit
        return lengths

    def _many_runs(self, keys: Keys) -> Ints:
        num_pages = len(keys)
        step = -(-num_pages // FIRST_PROBES)
        places = np.arange(0, num_pages + step - 1, step)
        places[-1] = num_pages - 1
        have = np.bitwise_and.accumulate(self.masks(keys[places]), axis=0)
        lasts = np.ones(len(have), np.int64)  # how many pages behind each probe, itself included, are had by who has it
        lasts[:-1] = np.diff(places)
        ends = np.flatnonzero((have[1:] != have[:-1]).any(axis=1))
        if len(ends) and step > 1:
            lasts[ends] = 1
            have = np.concatenate((have, self._between(keys, places[ends], have[ends], step)))
        return _lengths(have, lasts)

    def _between(self, keys: Keys, places: Ints, have: Words, step: int) -> Words:
        """Who has all pages up to each of the step - 1 that follow each of these places, of those who `have`
        [places, num_words] all up to there: [places x (step - 1), num_words]."""
        within = places[:, None] + np.arange(1, step)
        masks = self.masks(keys.take(within.reshape(-1), axis=0, mode="clip")).reshape(*within.shape, self.num_words)
        if within[-1, -1] >= len(keys) - 1:  # that one was looked at
            masks[within >= len(keys) - 1] = 0
        masks[:, 0] &= have
        return np.bitwise_and.accumulate(masks, axis=1).reshape(-1, self.num_words)

    def _find(self, keys: Keys) -> Found:
        lows, buckets = _lows_of(keys), self._buckets(keys)
        candidates = self._lows_in(buckets.reshape(-1)).reshape(len(keys), 2 * BUCKET_ROWS)
        hits = np.flatnonzero(candidates == lows[:, None])
        places = hits >> 4
        rows = buckets.reshape(-1).take(hits >> 3) * self._bucket_words + (hits & 7)
        right = self._words.take(rows + HIGH * BUCKET_ROWS) == keys[:, 1].take(places)
        return Found(places, rows) if np.count_nonzero(right) == len(right) else Found(places[right], rows[right])

    def _lows_in(self, buckets: Ints) -> Words:
        """Low words [..., BUCKET_ROWS] of these buckets."""
        return self._lines.take(buckets * (MASK + self.num_words) + LOW, axis=0)

    def _buckets(self, keys: Keys) -> Ints:
        """The two buckets [n, 2] of each key."""
        lows = keys[:, 0]
        first = self._directory.take((keys[:, 1] >> self._shift).view(np.int64)) * SEGMENT_BUCKETS
        buckets: Ints = np.empty((len(keys), 2), np.int64)
        buckets[:, 0] = first + (lows & _BUCKET_MASK).view(np.int64)
        buckets[:, 1] = first + ((lows + ((lows >> _BUCKET_BITS) | _ONE)) & _BUCKET_MASK).view(np.int64)  # another one
        return buckets


def _lengths(have: Words, lasts: Ints) -> Ints:
    """How many pages each slot has, if rows of `have` [n, num_words] count for so many each, for one beyond `lasts`."""
    bits = np.unpackbits(have.astype("<u8", copy=False).view(np.uint8), axis=1, bitorder="little")
    weights = np.ones(len(have), np.float32)  # exact below 2^24 pages
    weights[: len(lasts)] = lasts
    return np.asarray(weights @ bits, np.int64)


def _lows_of(keys: Keys) -> Words:
    """Low words, none of which is the mark of an empty row."""
    return np.maximum(keys[:, 0], _ONE)


def _bits_of(slots: Ints) -> tuple[Ints, Words]:
    """Word and bit of each slot."""
    return slots // SLOTS_PER_WORD, _ONE << (slots % SLOTS_PER_WORD).astype(np.uint64)
