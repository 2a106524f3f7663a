"""What is read after every cluster would show a leak."""

import pytest

from tests.e2e.integrity import STATES, faults

IDLE = {"free": 90.0, "cached": 10.0, "leased": 0.0, "held": 0.0}


def measured(num_leases: float = 0, num_faults: float = 0, **changes: float) -> dict[str, float]:
    pages = {f'forebay_pages{{state="{state}"}}': (IDLE | changes)[state] for state in STATES}
    return pages | {"forebay_page_faults": num_faults, "forebay_live_leases": num_leases}


def test_an_idle_worker_has_nothing_wrong() -> None:
    assert faults(measured(), 100) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (measured(free=89), "are not 100 pages"),
        (measured(free=89, held=1), "pages in use"),
        (measured(free=89, leased=1), "pages in use"),
        (measured(num_leases=1), "live leases"),
        (measured(num_faults=1), "in no state or in two"),
    ],
)
def test_a_leak_is_told(wrong: dict[str, float], told: str) -> None:
    (fault,) = faults(wrong, 100)
    assert told in fault
