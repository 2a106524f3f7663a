"""What goes out together over HTTP."""

import asyncio
from typing import Any

from services.gateway.connection import Joining

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Recording(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.written.append(b"closed")


async def test_the_head_of_an_answer_goes_out_with_what_follows_it() -> None:
    transport = Recording()
    joining = Joining(transport)
    for data in (HEAD, b"5\r\nfirst\r\n", b"6\r\nsecond\r\n", b"0\r\n\r\n", HEAD, b"4\r\nnext\r\n"):
        joining.write(data)
    await asyncio.sleep(0)
    assert transport.written == [
        HEAD + b"5\r\nfirst\r\n",
        b"6\r\nsecond\r\n",
        b"0\r\n\r\n",
        HEAD + b"4\r\nnext\r\n",
    ]


async def test_a_head_that_nothing_follows_goes_out_alone() -> None:
    transport = Recording()
    joining = Joining(transport)
    joining.write(HEAD)
    assert not transport.written
    await asyncio.sleep(0)
    joining.write(b"4\r\nlate\r\n")
    assert transport.written == [HEAD, b"4\r\nlate\r\n"]


async def test_a_head_goes_out_before_the_connection_is_closed() -> None:
    transport = Recording()
    joining = Joining(transport)
    joining.write(HEAD)
    joining.close()
    await asyncio.sleep(0)
    assert transport.written == [HEAD, b"closed"]
