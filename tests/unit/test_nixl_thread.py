"""What holds for NIXL's thread whatever goes wrong in it."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shared.engine.kv.memory import HostMemory
from shared.engine.transfer.api import RemotePool
from shared.engine.transfer.nixl import NixlTransport
from shared.engine.transfer.nixl_link import Link, Read
from shared.engine.transfer.nixl_thread import NixlThread
from shared.errors import DeadlineExceeded, TransferFailed

LONG_S = 60.0
POOL = RemotePool("owner", b"", 4096, 1, 64, "DRAM", 0)


class Request:
    """A READ that is done at once and cannot be released."""

    def release(self) -> None:
        raise RuntimeError("what nobody expects")


class Done(Link):
    @property
    def agent(self) -> Any:
        return self

    def transfer(self, request: Request) -> str:
        return "DONE"


@pytest.fixture
def thread() -> Iterator[NixlThread]:
    made = NixlThread()
    made.start()
    yield made
    made.close()


def test_an_error_that_nobody_expected_fails_the_read_and_the_thread_goes_on(thread: NixlThread) -> None:
    read = Read(Done(POOL, HostMemory(1, 64), "reader"), Request, LONG_S)
    thread.post(lambda: thread.begin(read))
    with pytest.raises(TransferFailed, match="what nobody expects"):
        read.done.result(LONG_S)
    assert thread.call(lambda: 7).result(LONG_S) == 7


class StuckMemory(HostMemory):
    """Whoever asks for its size gets no answer until it is let; first for the transport's own agent."""

    def __init__(self) -> None:
        self.let = threading.Event()
        self.let.set()
        super().__init__(1, 64)

    def another(self, num_pages: int, page_bytes: int) -> "StuckMemory":
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        assert self.let.wait(LONG_S)
        return super().num_bytes


async def test_a_connect_ends_in_its_time_although_the_thread_does_not_answer() -> None:
    memory = StuckMemory()
    transport = NixlTransport(memory, "reader")
    memory.let.clear()
    try:
        with pytest.raises(DeadlineExceeded):
            await transport.connect(POOL, 0.1)
        assert not memory.let.is_set()
    finally:
        memory.let.set()
        transport.close()
