"""Which page holds which prefix: the index of findable pages, and what changed in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IndexEvent:
    """A page became findable under a hash, or ceased to be."""

    page_hash: bytes
    stored: bool


class PrefixIndex:
    """Page hash → page. Not thread-safe: KvStore's lock guards it.

    Two sequences may compute the same prefix at the same time. The first page stays the findable one; the twin keeps
    its name, so that it can take over should the first one be evicted meanwhile.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, tuple[bytes, bytes]] = {}  # page → its hash, and that of the page before it
        self._changes: dict[bytes, bool] = {}

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def has_changed(self) -> bool:
        """Whether `drain` would return anything."""
        return bool(self._changes)

    def name(self, page_id: int) -> bytes:
        """The hash that a page was published under; empty if it never was."""
        return self._names.get(page_id, (b"", b""))[0]

    def add(self, page_id: int, page_hash: bytes, parent: bytes) -> None:
        """Name a page, and make it findable unless another page already is. A page that has a name keeps it."""
        if page_id in self._names:
            return
        self._names[page_id] = page_hash, parent
        self._claim(page_id, page_hash)

    def keeps(self, page_id: int) -> bool:
        """Whether a page that nobody holds any more is worth keeping: it is, or from now on is, the findable one."""
        page_hash = self.name(page_id)
        return bool(page_hash) and self._claim(page_id, page_hash)

    def forget(self, page_id: int) -> None:
        """The page is about to hold something else."""
        page_hash, _ = self._names.pop(page_id, (b"", b""))
        if self._pages.get(page_hash) == page_id:
            del self._pages[page_hash]
            self._note(page_hash, stored=False)

    def run(self, page_hashes: Sequence[bytes]) -> list[int]:
        """Pages of the longest findable leading run."""
        pages = []
        for page_hash in page_hashes:
            page_id = self._pages.get(page_hash)
            if page_id is None:
                break
            pages.append(page_id)
        return pages

    def lineage(self, page_id: int) -> Iterator[int]:
        """The findable page of this page's prefix, of the prefix one page shorter, and so on."""
        found: int | None = page_id
        while found is not None and found in self._names:
            page_hash, parent = self._names[found]
            if page_hash in self._pages:
                yield self._pages[page_hash]
            found = self._pages.get(parent)

    def hashes(self) -> list[bytes]:
        """Every findable hash."""
        return list(self._pages)

    def drain(self) -> list[IndexEvent]:
        """Net changes since the last call: what came and went in between is left out, so that the record stays
        bounded even if nobody asks for it."""
        changes, self._changes = self._changes, {}
        return [IndexEvent(page_hash, stored) for page_hash, stored in changes.items()]

    def _claim(self, page_id: int, page_hash: bytes) -> bool:
        if page_hash not in self._pages:
            self._pages[page_hash] = page_id
            self._note(page_hash, stored=True)
        return self._pages[page_hash] == page_id

    def _note(self, page_hash: bytes, *, stored: bool) -> None:
        if self._changes.pop(page_hash, stored) == stored:
            self._changes[page_hash] = stored
