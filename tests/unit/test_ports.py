"""A port is kept for its server, and for nobody else."""

import socket
import sys
from collections.abc import Iterator

import pytest

from cli.ports import Reserved, is_free

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


def test_an_address_of_another_machine_is_refused_by_its_name() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1"):
        Reserved("192.0.2.1")
