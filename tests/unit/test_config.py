"""Configuration from flags and variables, and how a process ends that cannot start."""

import os
import socket

import pytest

from services.gateway.config import GatewayConfig
from services.router.config import RouterConfig
from shared import entry
from shared.config import ServiceConfig
from shared.errors import ModelNotFound
from shared.worker.config import WorkerConfig
from tests import nursery

SERVICES = ("gateway", "router", "prefill", "decode")


def test_a_flag_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_HEARTBEAT_MS", "700")
    assert RouterConfig.load([]).heartbeat_ms == 700
    assert RouterConfig.load(["--heartbeat-ms", "800"]).heartbeat_ms == 800


def test_a_variable_holds_the_entries_of_a_repeated_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GatewayConfig.load(["--api-key", "a", "--api-key", "b=team"]).api_key == ["a", "b=team"]
    monkeypatch.setenv("FOREBAY_API_KEY", "a, b=team,")
    assert GatewayConfig.load([]).api_key == ["a", "b=team"]


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        (RouterConfig, ["--redis-url", "foo"], "--redis-url: must be like redis://HOST:PORT/0 (or rediss://, unix://)"),
        (RouterConfig, ["--port", "x", "--metrics-port", "-1"], "--metrics-port: must be greater than or equal to 0"),
        (
            RouterConfig,
            ["--log-level", "loud"],
            "--log-level: must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR', not 'LOUD'",
        ),
        (WorkerConfig, ["--dtype", "float8"], "--dtype: must be 'bfloat16' or 'float32', not 'float8'"),
        (GatewayConfig, ["--api-key", "=team"], "--api-key: each entry must be KEY or KEY=TENANT"),
        (WorkerConfig, ["--page-siz", "3"], "--page-siz"),
    ],
)
def test_a_wrong_flag_is_told_in_a_line(
    config: type[ServiceConfig], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        config.load(flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert said.endswith("--help lists all flags\n")
    assert len(said.splitlines()) <= 3


@pytest.mark.parametrize("service", SERVICES)
def test_help_says_how_to_start_the_service_and_what_each_flag_is(service: str) -> None:
    status, said = nursery.run("sim", f"services.{service}", "--help")
    assert status == 0
    assert said.startswith(f"usage: python -m services.{service} [--FLAG VALUE ...]")
    assert "FOREBAY_HEARTBEAT_MS" in said
    assert "(default: )" not in said


# A prefill worker listens as a decode worker does: both are shared/worker/process.py.
@pytest.mark.parametrize("service", ["gateway", "router", "decode"])
@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_taken_port_is_told_in_a_sentence(service: str, flag: str, valkey_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        own = {"gateway": ["--http-port", "0"], "router": []}.get(service, ["--engine", "sim"])
        flags = [flag, str(port), "--redis-url", valkey_url, *own]
        status, said = nursery.run("sim", f"services.{service}", *flags)
    assert status == 1
    assert said.splitlines()[-1].startswith(f"cannot listen on 127.0.0.1:{port}")
    assert "Traceback" not in said


def test_a_fault_ends_a_process_in_a_sentence() -> None:
    async def main() -> None:
        raise ModelNotFound("no model 'x'")

    with pytest.raises(SystemExit, match=r"^no model 'x'$"):
        entry.run(main())


def test_the_status_of_a_process_is_its_result() -> None:
    async def main() -> int:
        return os.EX_TEMPFAIL

    with pytest.raises(SystemExit) as ended:
        entry.run(main())
    assert ended.value.code == os.EX_TEMPFAIL


def test_a_defect_shows_where_it_is() -> None:
    async def main() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        entry.run(main())
