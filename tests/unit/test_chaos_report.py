"""A chaos run finds what it looks for: wrong answers, late ends, stalls and whom to blame for them."""

from dataclasses import replace
from itertools import islice

import pytest

from tests.chaos.answers import COMPLETE, GATEWAY_LOST, LEFT, Answer, Output
from tests.chaos.faults import KILL, STOP, Done
from tests.chaos.phases import phases
from tests.chaos.report import Report
from tests.chaos.requests import Ask, repeated
from tests.chaos.sayings import Placed, Sayings, Served, Suspected, TookOver, WentOn
from tests.chaos.stalls import percentile, stalls
from tests.chaos.twin import RecordedTwin, wrong

ASK = Ask("r", {"prompt": [1, 2, 3], "stream": True}, deadline_s=30.0)
TWIN = Output([5, 6, 7], " 5 6 7", 0, "length")
KILLED = Done(KILL, "decode-0", at=10.0, until=10.0)
STOPPED = Done(STOP, "decode-0", at=10.0, until=13.0)
# How it goes on: noticed after 20 ms, routed after 100, there for 250 ms until its first token.
SAID = Sayings(
    placed=[Placed("r", 0, "decode-0", 9.0), Placed("r", 0, "decode-1", 10.1)],
    suspected=[Suspected("r", 0, "decode-0", "WORKER_LOST", 10.02)],
    took_over=[TookOver("r", 0, "decode-1", 10.37, pages_s=0.05, first_s=0.25, num_tokens=10, num_cached=4)],
    went_on=[WentOn("r", 0, "decode-1", 10.38)],
)


def answer(output: Output, end: str = COMPLETE, ended: float = 20.0) -> Answer:
    return Answer(ASK, 0, started=9.0, give_up=39.0, begun=True, end=end, ended=ended, outputs={0: output})


def report(*answers: Answer, **fields: object) -> Report:
    empty: dict[str, object] = dict.fromkeys(("faults", "stalls", "wrong", "defects", "bystanders"), ())
    empty["said"] = Sayings()
    return Report(**{"answers": answers, "num_bytes": 0, "num_leaked_pages": 0, **empty, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "output",
    [
        replace(TWIN, token_ids=[5, 6, 8]),
        replace(TWIN, token_ids=[5, 6]),
        replace(TWIN, text=" 5 6 8"),
        replace(TWIN, finish_reason=None),
        replace(TWIN, num_logprobs=3),
        replace(TWIN, told=[None, -0.5]),
    ],
)
def test_an_answer_that_is_not_its_twin_is_found(output: Output) -> None:
    assert answer(output).difference([TWIN]) is not None
    assert answer(TWIN).difference([TWIN]) is None


def test_an_answer_that_was_cut_short_may_only_be_a_beginning() -> None:
    assert answer(Output([5, 6], " 5 6"), LEFT).difference([TWIN]) is None
    assert answer(Output([5, 7], " 5 7"), LEFT).difference([TWIN]) is not None


def test_a_missing_choice_is_found() -> None:
    assert answer(TWIN).difference([TWIN, TWIN]) is not None


def test_what_is_asked_again_is_compared_with_the_answer_to_it_before_the_faults() -> None:
    twin, asked = RecordedTwin([answer(TWIN)]), list(islice(repeated([ASK]), 2))
    assert [ask.name for ask in asked] == ["r-0", "r-1"]
    assert wrong([replace(answer(TWIN), ask=ask) for ask in asked], twin) == []
    assert wrong([replace(answer(replace(TWIN, text=" 5 6 8")), ask=asked[1])], twin) != []


def test_a_request_that_ends_more_than_a_second_late_is_told() -> None:
    assert report(answer(TWIN, ended=40.0)).violations({}) == []
    assert report(answer(TWIN, ended=40.1)).violations({}) != []


def test_a_connection_may_break_only_with_a_killed_gateway() -> None:
    broken = answer(TWIN, GATEWAY_LOST)
    assert report(broken).violations({}) != []
    assert report(broken, faults=[Done(KILL, "gateway-0", 15.0, 15.0)]).violations({}) == []
    assert report(broken, faults=[Done(KILL, "gateway-1", 15.0, 15.0)]).violations({}) != []


def test_a_stall_is_the_gap_around_the_failover() -> None:
    output = replace(TWIN, arrivals=[9.5, 9.99, 10.4, 12.0])
    (stall,) = stalls([answer(output)], [KILLED], SAID, prefill_s_per_token=0.01)
    assert (round(stall.gap_s, 3), round(stall.beyond_s, 3), stall.alone) == (0.41, 0.35, True)
    assert stall.elsewhere
    found = report(answer(output), stalls=[stall])
    assert found.violations({KILL: 0.34}) != []
    assert found.violations({KILL: 0.36}) == []


def test_a_stall_counts_as_double_when_something_else_was_hit_meanwhile() -> None:
    output = replace(TWIN, arrivals=[9.5, 9.99, 10.4])
    faults = [KILLED, Done(STOP, "router-0", 9.8, 12.0)]
    assert [stall.alone for stall in stalls([answer(output)], faults, SAID, 0.0)] == [False]


def test_a_stopped_worker_stalls_its_streams_whether_or_not_they_move() -> None:
    waited = replace(TWIN, arrivals=[9.5, 9.99, 13.05])
    (stall,) = stalls([answer(waited)], [STOPPED], Sayings(SAID.placed[:1]), 0.0)
    assert round(stall.gap_s, 2) == 3.06
    moved = replace(TWIN, arrivals=[9.5, 9.99, 11.5, 11.6])
    late = Sayings([SAID.placed[0], Placed("r", 0, "decode-1", 11.4)])
    assert [round(s.gap_s, 2) for s in stalls([answer(moved)], [STOPPED], late, 0.0)] == [1.51]


@pytest.mark.parametrize("arrivals", [[10.2, 10.4], [9.5, 9.6]])
def test_streams_that_had_not_begun_or_had_all_they_needed_did_not_stall(arrivals: list[float]) -> None:
    said = Sayings(SAID.placed if arrivals[0] > 10 else SAID.placed[:1])
    assert list(stalls([answer(replace(TWIN, arrivals=arrivals))], [KILLED], said, 0.0)) == []


def test_a_stream_that_never_went_on_stalled_to_its_end() -> None:
    output = replace(TWIN, arrivals=[9.5, 9.99], finish_reason=None)
    (stall,) = stalls([answer(output, "refused: deadline", 15.0)], [KILLED], Sayings(SAID.placed[:1]), 0.0)
    assert round(stall.gap_s, 2) == 5.01


def test_what_nobody_says_was_computed_is_not_taken_off() -> None:
    output = replace(TWIN, arrivals=[9.5, 9.99, 10.4])
    (stall,) = stalls([answer(output)], [KILLED], Sayings(SAID.placed), prefill_s_per_token=0.01)
    assert stall.beyond_s == stall.gap_s


@pytest.mark.parametrize(
    ("fault", "served", "elsewhere"),
    [
        (Done(KILL, "decode-1", 5.0, 5.0), [], False),
        (Done(KILL, "decode-1", 5.0, 5.0), [Served("decode-1", 10.2)], False),
        (Done(KILL, "decode-1", 5.0, 5.0), [Served("decode-1", 8.0)], True),
        (Done(STOP, "decode-1", 5.0, 9.98), [], True),
        (Done(STOP, "decode-1", 5.0, 10.2), [], False),
    ],
)
def test_a_stall_for_which_no_other_decode_worker_was_there_is_counted_apart(
    fault: Done, served: list[Served], elsewhere: bool
) -> None:
    output = replace(TWIN, arrivals=[9.5, 9.99, 10.4])
    (stall,) = list(stalls([answer(output)], [fault, KILLED], replace(SAID, served=served), 0.0))
    assert stall.elsewhere is elsewhere
    found = report(answer(output), stalls=[stall])
    assert [s for alone in (True, False) for s in found.stalls_after(KILL, alone=alone)] == [stall] * elsewhere


def test_what_other_streams_of_the_lost_worker_took_is_told_apart_and_not_taken_off() -> None:
    output = replace(TWIN, arrivals=[9.5, 9.99, 10.4, 10.47])
    took = SAID.took_over[0]
    others = [
        (Placed("before", 0, "decode-1", 10.1), replace(took, request="before", at=10.3)),
        (Placed("behind", 0, "decode-1", 10.1), replace(took, request="behind", at=10.39)),
        (Placed("there", 0, "decode-1", 10.1, "prefill-0"), replace(took, request="there", at=10.3)),
        (Placed("over", 0, "decode-1", 10.0), replace(took, request="over", at=10.11)),
    ]
    said = replace(SAID, placed=[*SAID.placed, *(o[0] for o in others)], took_over=[took, *(o[1] for o in others)])
    (stall,) = stalls([answer(output)], [KILLED], said, prefill_s_per_token=0.01)
    assert [round(s, 3) for s in (stall.gap_s, stall.beyond_s, stall.beyond_all_s)] == [0.41, 0.35, 0.29]
    assert round(stall.next_s, 3) == 0.07


def test_the_phases_of_a_stall_add_up_to_it() -> None:
    output = replace(TWIN, arrivals=[9.5, 9.99, 10.4])
    (stall,) = stalls([answer(output)], [KILLED], SAID, 0.0)
    parts = phases(stall, SAID)
    assert parts is not None
    rounded = {name: round(seconds * 1000) for name, seconds in parts.items()}
    assert list(rounded.values()) == [10, 20, 80, 20, 50, 200, 10, 20]
    assert sum(rounded.values()) == round(stall.gap_s * 1000)
    assert phases(stall, replace(SAID, took_over=[])) is None
    assert "compute" in report(answer(output), stalls=[stall], said=SAID).phases(KILL)


def test_a_worker_that_goes_on_taking_requests_after_it_was_told_to_end_is_told() -> None:
    ended = Done("end", "decode-1", at=9.0, until=9.0)
    taken = report(answer(TWIN), faults=[ended], said=SAID)
    assert ["1.10 s after it was told to end" in problem for problem in taken.violations({})] == [True]
    refused = replace(SAID, suspected=[Suspected("r", 0, "decode-1", "DRAINING", 10.11)])
    assert report(answer(TWIN), faults=[ended], said=refused).violations({}) == []
    assert (
        report(answer(TWIN), faults=[ended], said=replace(SAID, served=[Served("decode-1", 9.5)])).violations({}) == []
    )
    assert report(answer(TWIN, LEFT), faults=[ended], said=SAID).violations({}) == []


def test_a_worker_given_up_without_a_fault_is_told() -> None:
    blamed = [Suspected("r", 0, name, "WORKER_LOST", 10.2) for name in ("decode-0", "decode-1")]
    found = report(faults=[KILLED], said=Sayings(suspected=blamed)).failovers_without_a_fault()
    assert [suspected.decode for suspected in found] == ["decode-1"]


def test_the_percentile_is_a_value_that_the_share_does_not_exceed() -> None:
    assert percentile([], 0.99) == 0
    assert percentile([float(i) for i in range(1, 101)], 0.99) == 99
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2
    assert percentile([3.0, 1.0, 2.0], 1.0) == 3
