"""The one thread of a process that calls NIXL: it posts, polls and gives up READs, and serves those of peers.

It sleeps while nothing is in flight and nobody is served; it never spins.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from shared.engine.transfer.lookout import Lookout
from shared.engine.transfer.nixl_link import Link, Read
from shared.engine.wake import Wake
from shared.errors import DeadlineExceeded, Fault, TransferFailed

T = TypeVar("T")

log = logging.getLogger(__name__)

FIRST_DELAY_S, LAST_DELAY_S = 50e-6, 1e-3
# An owner that answers again has heard of one connection, not yet of all that waited for it.
HEARS_ALL_S = 1.0
# A NIC that writes without the help of a CPU.
NICS = Path("/sys/class/infiniband")


class NixlThread(threading.Thread):
    """`server` is the agent that peers read from; `lookout` says when to look for them."""

    def __init__(self) -> None:
        super().__init__(name="nixl", daemon=True)
        self.server: Any = None
        self.lookout = Lookout()
        self._inbox: deque[Callable[[], None] | None] = deque()
        self._wake = Wake()
        self._reads: list[Read] = []
        self._parked: list[Link] = []
        self._nic_writes = any(NICS.glob("*"))
        self._delay = FIRST_DELAY_S

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do something on this thread; what NIXL raises becomes TransferFailed."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(_fault(error))

        self.post(run)
        return future

    def post(self, work: Callable[[], None]) -> None:
        """As `call`, of something that cannot fail and that nobody waits for."""
        self._put(work)

    def close(self) -> None:
        """Destroy all agents and end the thread."""
        self._put(None)
        self.join()

    def _put(self, work: Callable[[], None] | None) -> None:
        self._inbox.append(work)
        self._wake.set()

    def run(self) -> None:
        """Poll what is in flight or served; sleep otherwise."""
        going_on = True
        while going_on:
            try:
                going_on = self._turn()
            except Exception as error:  # a fault of ours; whoever waits has to be told, and the thread is still needed
                log.exception("READs in flight are given up")
                self._lose_all(_fault(error))
        self._lose_all(TransferFailed("the transport was closed"))
        self._unpark(self._parked)
        self.server = None

    def _turn(self) -> bool:
        """Do the first thing that was asked for, if anything, and look once; False at the end."""
        self._wake.clear()
        if not self._inbox:
            self._wake.wait(self._pause())
        if self._inbox:
            work = self._inbox.popleft()
            if work is None:
                return False
            work()
            self._delay = FIRST_DELAY_S
        self._poll()
        return True

    def begin(self, read: Read) -> None:
        """Post a READ. A path through shared memory has done it all when this returns."""
        try:
            read.request = read.make()
        except Exception as error:
            read.done.set_exception(_fault(error))
        else:
            self._reads.append(read)
            self._settle(read, *_state(read, post=True))

    def abandon(self, link: Link, fault: Fault) -> None:
        """Make sure that a link writes nothing more, and fail its READs. Their owner may still be alive."""
        if any(read.link is link for read in self._reads) and not self._nic_writes:
            self._parked.append(link)
            link.park([read.request for read in self._reads if read.link is link])
        elif not link.parked:
            link.close()
        self._lose(link, fault)

    def _lose(self, link: Link, fault: Fault) -> None:
        lost = [read for read in self._reads if read.link is link]
        self._reads = [read for read in self._reads if read.link is not link]
        for read in lost:
            read.request = None
            read.done.set_exception(fault)

    def _lose_all(self, fault: Fault) -> None:
        for link in {read.link for read in self._reads}:
            self._lose(link, fault)
            link.close()

    def _unpark(self, links: list[Link]) -> None:
        self._parked = [link for link in self._parked if link not in links]
        for link in links:
            link.close()

    def _pause(self) -> float | None:
        if self._reads:
            self._delay = min(self._delay * 1.5, LAST_DELAY_S)
            return self._delay
        return self.lookout.pause_s()

    def _poll(self) -> None:
        if self.server is not None and self.lookout.pause_s() is not None:
            started_s = time.thread_time()
            try:
                self.server.get_new_notifs()
            except Exception as error:
                log.debug("a reader went away: %s", error)
            self.lookout.looked(time.thread_time() - started_s)
        for read in list(self._reads):
            if not read.done.done():
                self._settle(read, *_state(read))

    def _settle(self, read: Read, state: str, fault: Fault | None) -> None:
        name = read.link.pool.agent_name
        if state == "DONE":
            self._finish(read)
        elif state == "ERR":
            self._lose(read.link, fault or TransferFailed(f"reading from {name} failed"))
            read.link.close()
        elif time.monotonic() > read.ends_at:
            self.abandon(read.link, DeadlineExceeded(f"{name} did not answer a read within {read.timeout_s:.3f} s"))

    def _finish(self, read: Read) -> None:
        read.request.release()
        self._unpark([link for link in self._parked if self._is_heard(link, read.link.pool.agent_name)])
        self._reads.remove(read)
        read.request = None
        read.done.set_result(None)

    def _is_heard(self, parked: Link, answering: str) -> bool:
        """Whether the owner of a parked link is that one, and has answered long enough to have heard this one."""
        if parked.pool.agent_name != answering:
            return False
        now = time.monotonic()
        parked.answered_s = parked.answered_s or now
        return now - parked.answered_s > HEARS_ALL_S


def _state(read: Read, post: bool = False) -> tuple[str, Fault | None]:
    """DONE, PROC or ERR. A function of its own, so that no traceback keeps alive the agent that we may then destroy."""
    try:
        agent = read.link.agent
        return (agent.transfer(read.request) if post else agent.check_xfer_state(read.request)), None
    except Exception as error:
        return "ERR", _fault(error)


def _fault(error: Exception) -> Fault:
    return error if isinstance(error, Fault) else TransferFailed(f"{type(error).__name__}: {error}")
