"""A port is kept for its server, and for nobody else."""

import socket
import sys
from collections.abc import Iterator

import pytest

from cli.ports import Reserved, in_a_row, is_free

HOST = "127.0.0.1"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a port is not kept")


@pytest.fixture
def port() -> Iterator[Reserved]:
    reserved = Reserved(HOST)
    yield reserved
    reserved.close()


@pytest.mark.parametrize("num_starts", [1, 2])
def test_its_server_listens_on_it_whenever_it_starts(num_starts: int, port: Reserved) -> None:
    for _ in range(num_starts):
        with socket.create_server((HOST, port.number)) as server, socket.create_connection((HOST, port.number), 5):
            server.accept()[0].close()


def test_whoever_wants_it_without_knowing_is_refused(port: Reserved) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((HOST, port.number))
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1"):
        Reserved(HOST, port.number)


def test_a_server_that_sets_so_reuseaddr_finds_it_free(port: Reserved) -> None:
    assert is_free(HOST, port.number)


def test_it_is_left_to_whoever_comes(port: Reserved) -> None:
    port.close()
    Reserved(HOST, port.number).close()


def test_neighbours_are_kept_like_one() -> None:
    ports = in_a_row(HOST, 3)
    assert [port.number - ports[0].number for port in ports] == [0, 1, 2]
    for port in ports:
        with pytest.raises(OSError, match="cannot listen"):
            Reserved(HOST, port.number)
    for port in ports:
        port.close()


def test_neighbours_are_looked_for_elsewhere_when_the_next_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    class Crowded(Reserved):
        def __init__(self, host: str, number: int = 0) -> None:
            tried.append(number)
            if len(tried) == 2:
                raise OSError("taken")
            super().__init__(host, number)

    monkeypatch.setattr("cli.ports.Reserved", Crowded)
    first, second = in_a_row(HOST, 2)
    assert second.number == first.number + 1
    assert (tried[0], tried[2], *tried[-2:]) == (0, 0, 0, second.number)  # others may take some, too
    for port in (first, second):
        port.close()


def test_an_address_of_another_machine_is_refused_by_its_name() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1"):
        Reserved("192.0.2.1")
