"""How ranks come to each other's memory, or all of them find that they do not."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from shared.engine.parallel.peer_memory import share
from shared.errors import Unsupported

NUM_RANKS = 3


class Fake:
    """A GPU's memory at 1,000 times its number, which others see 7 bytes further on."""

    def __init__(self, device: int, *, full: bool = False, unreachable: int | None = None) -> None:
        self.device, self._full, self._unreachable = device, full, unreachable

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        if self._full:
            raise Unsupported("out of memory")
        return 1000 * self.device, bytes([self.device, num_bytes])

    def open(self, handle: bytes, owner: int) -> int:
        assert handle == bytes([owner, 50])
        if owner == self._unreachable:
            raise Unsupported(f"no way from {self.device} to {owner}")
        return 1000 * owner + 7


def shared(*memories: Fake) -> list[list[int] | str]:
    """What comes of it on each rank."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=10))

    def of(rank: int) -> list[int] | str:
        try:
            return share(50, memories[rank], store, rank, NUM_RANKS)
        except Unsupported as reason:
            return reason.message

    with ThreadPoolExecutor(NUM_RANKS) as threads:
        return list(threads.map(of, range(NUM_RANKS)))


def test_each_rank_has_its_own_memory_and_opens_that_of_the_others_on_whatever_device_it_is() -> None:
    assert shared(Fake(4), Fake(5), Fake(6)) == [[4000, 5007, 6007], [4007, 5000, 6007], [4007, 5007, 6000]]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(Fake(5, full=True), "rank 1 has no memory to share"), (Fake(5, unreachable=6), "no way from 5 to 6")],
    ids=["no memory", "no way"],
)
def test_where_one_rank_cannot_none_goes_that_way(broken: Fake, reason: str) -> None:
    assert shared(Fake(4), broken, Fake(6)) == [reason] * NUM_RANKS
