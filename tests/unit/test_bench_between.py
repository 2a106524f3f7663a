"""What lies between a graph's replays, read from a trace."""

from typing import Any

from bench.between import gaps, pieces


def launch(call: int, at: float) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "name": "a launch", "ts": at, "dur": 1.0, "args": {"correlation": call}}


def kernel(call: int, at: float, lasts: float, name: str = "kernel") -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": at, "dur": lasts, "args": {"correlation": call}}


def replay(call: int, at: float, num_kernels: int) -> list[dict[str, Any]]:
    return [launch(call, at - 50), *(kernel(call, at + 10 * number, 9.0) for number in range(num_kernels))]


def test_what_runs_and_what_is_idle_between_two_replays_of_the_largest_graph() -> None:
    alone = [launch(2, 60.0), kernel(2, 105.0, 4.0, "join"), launch(3, 61.0), kernel(3, 107.0, 5.0, "choose")]
    trace = [*replay(1, 0.0, 10), *alone, *replay(4, 120.0, 2), *replay(5, 145.0, 9), {"name": "of no call"}]
    (found,) = gaps(pieces(trace))
    assert [piece.name for piece in found.pieces] == ["join", "choose", "a graph of 2"]
    assert found.length == 145 - 99
    assert found.idle == (105 - 99) + (120 - 112) + (145 - 139)  # what overlaps counts once
    assert found.replay.start - found.replay.launched == 50
