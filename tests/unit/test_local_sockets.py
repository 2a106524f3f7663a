"""Processes of one host reach each other by Unix sockets where both have the directory, and by TCP wherever not."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.local_sockets import Listener, LocalSockets, checked_directory

ADDRESS = "127.0.0.1:1"
PATIENCE_S = 10.0


class Brief(asyncio.Protocol):
    """The end of a connection that is called; it ends it at once."""

    def connection_made(self, transport: Any) -> None:
        transport.close()


class Guest(asyncio.Protocol):
    """The end that calls."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    def connection_lost(self, _error: Exception | None) -> None:
        self.left.set()


@pytest.fixture
async def listener(tmp_path: Path) -> AsyncIterator[Listener]:
    listener = await LocalSockets(str(tmp_path)).listen(ADDRESS, Brief)
    assert listener is not None
    yield listener
    listener.close()


async def answers(directory: Path, address: str = ADDRESS) -> bool:
    guest = await LocalSockets(str(directory)).dial(address, Guest)
    if guest is not None:
        await asyncio.wait_for(guest.left.wait(), PATIENCE_S)
    return guest is not None


@pytest.mark.usefixtures("listener")
async def test_who_listens_at_an_address_is_found_under_it(tmp_path: Path) -> None:
    assert await answers(tmp_path)
    assert not await answers(tmp_path, "127.0.0.1:2")
    assert await LocalSockets().dial(ADDRESS, Guest) is None
    assert await LocalSockets().listen(ADDRESS, Brief) is None


async def test_what_a_killed_process_left_behind_is_nobody_and_is_taken_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / f"{ADDRESS}.sock"))
        killed.listen()
    assert (tmp_path / f"{ADDRESS}.sock").is_socket()
    assert not await answers(tmp_path)
    listener = await LocalSockets(str(tmp_path)).listen(ADDRESS, Brief)
    assert await answers(tmp_path)
    assert listener is not None
    listener.close()


async def test_who_stops_leaves_nothing_behind(tmp_path: Path, listener: Listener) -> None:
    listener.close()
    assert not (await asyncio.to_thread(os.listdir, tmp_path))


@pytest.mark.usefixtures("listener")
async def test_nobody_takes_the_socket_of_another_that_answers(tmp_path: Path) -> None:
    assert await LocalSockets(str(tmp_path)).listen(ADDRESS, Brief) is None
    assert await answers(tmp_path)


async def test_a_path_that_no_socket_can_have_is_nobodys(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    assert await LocalSockets(str(long)).listen(ADDRESS, Brief) is None
    assert not await answers(long)


async def test_a_directory_that_is_gone_is_no_reason_not_to_start(tmp_path: Path) -> None:
    assert await LocalSockets(str(tmp_path / "gone")).listen(ADDRESS, Brief) is None


def test_only_a_directory_closed_to_others_will_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(0o600)
    tmp_path.chmod(0o750)
    for wrong in (tmp_path, file, tmp_path / "missing"):
        with pytest.raises(ValueError, match="must be a directory"):
            checked_directory(str(wrong))
    tmp_path.chmod(0o700)
    assert checked_directory(str(tmp_path)) == str(tmp_path)
    assert not checked_directory("")
