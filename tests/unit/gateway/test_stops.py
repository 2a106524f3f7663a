"""Stop strings: found wherever they are cut, never shown, and nothing else is held back for long."""

import itertools

import pytest

from services.gateway.stops import StopStrings


def run(stops: StopStrings, pieces: list[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        text, stop = stops.feed(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + stops.flush(), None


def cuts(text: str) -> list[list[str]]:
    """All ways to cut a text in three."""
    return [
        [text[:i], text[i:j], text[j:]] for i, j in itertools.combinations_with_replacement(range(len(text) + 1), 2)
    ]


@pytest.mark.parametrize("pieces", cuts("one STOP two"))
def test_a_stop_string_is_found_wherever_it_is_cut(pieces: list[str]) -> None:
    assert run(StopStrings(["STOP"]), pieces) == ("one ", "STOP")


@pytest.mark.parametrize("pieces", cuts("one STO two"))
def test_what_only_begins_like_one_is_shown(pieces: list[str]) -> None:
    assert run(StopStrings(["STOP"]), pieces) == ("one STO two", None)


@pytest.mark.parametrize("pieces", cuts("aaab"))
def test_a_stop_string_that_overlaps_itself_is_found(pieces: list[str]) -> None:
    assert run(StopStrings(["aab"]), pieces) == ("a", "aab")


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nQ:"])
    assert stops.feed("answer\n") == ("answer", None)
    assert stops.feed("more") == ("\nmore", None)


def test_the_stop_string_is_shown_on_demand() -> None:
    assert run(StopStrings(["STOP"], include=True), ["a ST", "OP b"]) == ("a STOP", "STOP")


@pytest.mark.parametrize("pieces", cuts("x abcd"))
def test_of_several_the_one_that_is_complete_first_counts(pieces: list[str]) -> None:
    assert run(StopStrings(["abcd", "bc"]), pieces) == ("x a", "bc")
