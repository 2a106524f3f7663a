"""`forebay up`: what it promises to start, to say and to leave behind."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import httpx
import pytest

from cli import background
from cli.process import ROOT, bound_to_me
from cli.state import RunState
from shared.models.store import default_cache
from tests.e2e.cluster import Row, RunningCluster, as_curl_does, begin
from tests.valkey import ValkeyProcess

DEADLINE_S = 60.0
SIM = ("--engine", "sim", "--grace", "20")
SLOW_SIM = (*SIM, "--worker-flags=--sim-decode-ms 100")


def _refused(*flags: str) -> str:
    """What `forebay up` says that is expected to fail."""
    with tempfile.TemporaryFile() as output:
        up = begin(SIM)([sys.executable, "-m", "cli.main", "up", "--port", "0", *flags], ROOT, output)
        assert up.wait(DEADLINE_S) == 1
        output.seek(0)
        return output.read().decode()


def _pids(run: RunState) -> list[int]:
    return [process.pid for process in run.processes if process.pid is not None]


def _lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


async def _until_gone(pids: list[int]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while any(map(_lives, pids)):  # noqa: ASYNC110 - they are not our children
            await asyncio.sleep(0.05)


def _listens(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _body(max_tokens: int) -> dict[str, object]:
    """A stream of token ids: the sim engine has no text."""
    options = {"ignore_eos": True, "stream": True, "return_token_ids": True}
    return {"model": "sim", "prompt": [5, 6, 7], "max_tokens": max_tokens, **options}


async def test_status_names_every_process_with_its_facts(sim_cluster: RunningCluster) -> None:
    command = [sys.executable, "-m", "cli.main", "status", "--json"]
    rows: dict[str, Row] = {}
    async with asyncio.timeout(DEADLINE_S):
        while not rows or any(row["state"] != "serving" for row in rows.values()):
            done = await asyncio.to_thread(
                subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=True
            )
            status = json.loads(done.stdout)
            rows = {row["name"]: row for row in status["processes"]}
    assert set(rows) == {"blackboard", "gateway-0", "router-0", "decode-0", "prefill-0"}
    assert all(row["pid"] and row["address"] for row in rows.values())
    assert all(row["epoch"] for name, row in rows.items() if name != "blackboard")
    pages = rows["decode-0"]["pages"]
    assert pages["total"] == pages["free"] + pages["cached"] + pages["leased"] + pages["held"] > 0
    assert status["url"].endswith(rows["gateway-0"]["http_address"])


def test_what_it_says_when_ready_can_be_done_as_it_stands() -> None:
    command = [sys.executable, "-m", "cli.main", "up", "--port", "0", *SIM]
    with subprocess.Popen(bound_to_me(command), cwd=ROOT, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        said = list(takewhile(lambda line: "Ctrl-C" not in line, up.stdout))
        answer = as_curl_does(next(line for line in said if line.lstrip().startswith("curl ")))
        assert answer.json()["usage"]["completion_tokens"] > 0
        up.send_signal(signal.SIGINT)
        assert up.wait(DEADLINE_S) == 0


def _num_connected(directory: Path) -> dict[str, int]:
    """How many connections there are to each Unix socket in a directory, by its name (proc(5), net/unix)."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    connected = [Path(fields[7]) for fields in lines[1:] if len(fields) == 8 and fields[5] == "03"]
    return Counter(path.name for path in connected if path.parent == directory)


async def _answers_over_sockets(cluster: RunningCluster) -> set[bool]:
    """Whether those who call the blackboard, the router and the decode worker of an answer do it over their sockets."""
    sockets = default_cache() / "run" / str(cluster.supervisor.pid) / "sockets"
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{cluster.url}/v1/completions", json=_body(3) | {"stream": False})
    assert answer.json()["usage"]["completion_tokens"] == 3
    rows = await cluster.status()
    called = [rows[name]["address"] + ".sock" for name in ("router-0", "decode-0")]
    connected = _num_connected(sockets)
    return {connected[name] > 0 for name in ("blackboard.sock", *called)}


async def test_processes_of_one_host_talk_over_its_sockets(sim_cluster: RunningCluster) -> None:
    assert await _answers_over_sockets(sim_cluster) == {True}


def _children(pid: int) -> list[int]:
    """Processes that are a process's children, blackboard, services and fork servers in its case."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def _kill_the_supervisor(killed: list[int], forking: list[int]) -> None:
    with background.cluster(*SIM) as started:
        killed += _pids(started.run)
        forking += set(_children(started.supervisor.pid)) - set(killed)
        started.supervisor.kill()
        await asyncio.to_thread(started.supervisor.wait, DEADLINE_S)


async def test_nothing_outlives_a_supervisor_that_is_killed() -> None:
    pids: list[int] = []
    forking: list[int] = []
    with pytest.raises(RuntimeError, match="ended with -9"):
        await _kill_the_supervisor(pids, forking)
    assert len(pids) == 5
    assert len(forking) == 1
    await _until_gone(pids + forking)


async def test_ctrl_c_finishes_what_runs_and_leaves_no_process_no_port_and_no_file() -> None:
    with background.cluster(*SLOW_SIM) as started:
        directory = default_cache() / "run" / str(started.supervisor.pid)
        rows = (await RunningCluster(started.supervisor, started.run).status()).values()
        addresses = [row[kind] for row in rows for kind in ("address", "http_address", "metrics_address") if row[kind]]
        children = _children(started.supervisor.pid)
        assert set(_pids(started.run)) < set(children)
        assert directory.is_dir()
        assert all(map(_listens, addresses))
        async with (
            httpx.AsyncClient(base_url=started.run.url, timeout=DEADLINE_S) as client,
            client.stream("POST", "/v1/completions", json=_body(max_tokens=20)) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            started.supervisor.send_signal(signal.SIGINT)
            rest = [line async for line in lines]
        assert rest[-2:] == ["data: [DONE]", ""]
        assert await asyncio.to_thread(started.supervisor.wait, DEADLINE_S) == 0
    assert not any(map(_lives, children))
    assert not any(map(_listens, addresses))
    assert not directory.exists()


async def test_a_second_ctrl_c_ends_everything_at_once() -> None:
    flags = ("--engine", "sim", "--grace", "1000", "--worker-flags=--sim-decode-ms 1000")
    with background.cluster(*flags, begin=begin(flags)) as started:
        cluster = RunningCluster(started.supervisor, started.run)
        async with (
            httpx.AsyncClient(base_url=started.run.url, timeout=DEADLINE_S) as client,
            client.stream("POST", "/v1/completions", json=_body(max_tokens=10_000)) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            started.supervisor.send_signal(signal.SIGINT)
            await cluster.until(lambda rows: rows["gateway-0"]["state"] == "draining")
            started.supervisor.send_signal(signal.SIGINT)
            with pytest.raises(httpx.HTTPError):
                [line async for line in lines]
        assert await asyncio.to_thread(started.supervisor.wait, DEADLINE_S) == 0
    assert not any(map(_lives, _pids(started.run)))


def test_a_port_that_is_taken_is_refused_by_its_number() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is taken" in _refused("--engine", "sim", "--port", str(port))


def test_a_process_that_cannot_start_is_named_with_its_last_words() -> None:
    said = _refused("--engine", "sim", "--worker-flags=--page-size 0")
    assert "-0 ended at once: exit status 2" in said
    assert "--page-size: must be greater than or equal to 1" in said


def test_a_model_that_is_not_there_is_refused_before_anything_starts() -> None:
    assert "no model 'no/such/model'" in _refused("--model", "no/such/model")


def test_a_redis_that_does_not_answer_is_refused_by_its_url() -> None:
    assert "no Redis at redis://127.0.0.1:9/0" in _refused("--engine", "sim", "--redis", "redis://127.0.0.1:9/0")


async def test_a_redis_of_the_users_is_used_and_left_running_and_sockets_are_not_if_so_told(
    valkey: ValkeyProcess,
) -> None:
    with background.cluster(*SIM, "--redis", valkey.url, "--no-local-sockets", begin=begin(SIM)) as started:
        cluster = RunningCluster(started.supervisor, started.run)
        rows = await cluster.status()
        assert "blackboard" not in rows
        assert rows["decode-0"]["state"] == "serving"
        assert all(row["num_restarts"] == 0 for row in rows.values())
        assert await _answers_over_sockets(cluster) == {False}
    assert _listens(valkey.url.removeprefix("redis://").split("/")[0])


async def test_a_process_that_dies_is_started_again_and_counted(sim_cluster: RunningCluster) -> None:
    pid = sim_cluster.kill("router-0")
    await sim_cluster.until_restarted("router-0", pid)
    row = (await sim_cluster.status())["router-0"]
    assert row["num_restarts"] >= 1
    assert row["last_exit"] == "killed by SIGKILL"
