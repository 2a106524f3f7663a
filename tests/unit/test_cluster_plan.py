"""What `forebay up` decides to start."""

import pytest

from cli import plan
from cli.plan import ClusterOptions

URL = "redis://127.0.0.1:1/0"


def _flag(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def test_those_who_take_requests_are_stopped_before_those_who_serve_them() -> None:
    names = [spec.name for spec in plan.services(ClusterOptions(model="m"), URL)]
    assert names == ["gateway-0", "router-0", "decode-0", "prefill-0"]


def test_each_process_has_a_name_of_its_own() -> None:
    options = ClusterOptions(model="m", num_gateways=2, num_routers=2, num_prefill=3, num_decode=2)
    specs = plan.services(options, URL)
    assert len({spec.name for spec in specs}) == len(specs) == 9
    assert all(_flag(spec.command, "--name") == spec.name for spec in specs)


def test_every_process_is_told_the_same_blackboard() -> None:
    assert {_flag(spec.command, "--redis-url") for spec in plan.services(ClusterOptions(model="m"), URL)} == {URL}


def test_every_process_finds_the_others_sockets_in_one_directory() -> None:
    specs = plan.services(ClusterOptions(model="m"), URL, "/run/sockets")
    assert {_flag(spec.command, "--local-sockets") for spec in specs} == {"/run/sockets"}


def test_gateways_listen_on_consecutive_ports() -> None:
    specs = plan.services(ClusterOptions(model="m", port=8000, num_gateways=2), URL)
    assert [_flag(spec.command, "--http-port") for spec in specs if spec.role == "gateway"] == ["8000", "8001"]


@pytest.mark.parametrize(
    ("num_cores", "num_workers", "expected"), [(2, 2, 2), (2, 1, 2), (8, 2, 8), (8, 4, 4), (2, 8, 1), (1, 2, 1)]
)
def test_workers_share_the_cores(num_cores: int, num_workers: int, expected: int) -> None:
    assert plan.threads_per_worker(num_cores, num_workers) == expected


def test_every_worker_has_as_many_ranks_as_were_asked_for() -> None:
    workers = plan.services(ClusterOptions(model="m", tensor_parallel=2), URL)[2:]
    assert [_flag(spec.command, "--tensor-parallel") for spec in workers] == ["2", "2"]


@pytest.mark.parametrize(
    ("num_gpus", "ranks", "expected"),
    [
        (4, 1, ["cuda:0", "cuda:1", "cuda:2"]),
        (2, 1, ["cuda:0", "cuda:1", "cuda:0"]),
        (5, 2, ["cuda:0", "cuda:2", "cuda:0"]),
    ],
)
def test_gpus_are_shared_out_in_turn(num_gpus: int, ranks: int, expected: list[str]) -> None:
    options = ClusterOptions(model="m", tensor_parallel=ranks, num_gpus=num_gpus, num_decode=2)
    assert [_flag(spec.command, "--device") for spec in plan.services(options, URL)[2:]] == expected


def test_workers_find_their_gpus_themselves_if_nobody_says_how_many_there_are() -> None:
    assert not any("--device" in spec.command for spec in plan.services(ClusterOptions(model="m"), URL))


def test_extra_flags_go_to_the_role_they_are_meant_for() -> None:
    options = ClusterOptions(model="m", worker_flags=["--page-size", "32"], router_flags=["--r"], gateway_flags=["--g"])
    for spec in plan.services(options, URL):
        assert ("--page-size" in spec.command) == (spec.role in plan.WORKERS)
        assert ("--r" in spec.command) == (spec.role == "router")
        assert ("--g" in spec.command) == (spec.role == "gateway")


@pytest.mark.parametrize("engine", ["sim", "torch"])
def test_every_service_is_forked_of_what_has_imported_it(engine: str) -> None:
    options = ClusterOptions(model="m", engine=engine)
    preloads = plan.preloads(options)
    for spec in plan.services(options, URL):
        preload = preloads[spec.fork_server]
        assert spec.command[1:3] == ("-m", f"services.{spec.role}")
        assert f"services.{spec.role}.__main__" in preload.modules
        assert preload.environment.items() <= spec.environment.items()
        assert ("OMP_WAIT_POLICY" in spec.environment) == (spec.role in plan.WORKERS)
