"""What a process takes, as Linux tells it."""

from pathlib import Path

import pytest

MIB = 1 << 20
only_where_it_is_told = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


class Memory:
    """What a process ("self" or its id) takes from now on."""

    def __init__(self, process: int | str) -> None:
        self._folder = Path(f"/proc/{process}")
        (self._folder / "clear_refs").write_text("5")  # the peak begins here
        self._begin = self._status("VmRSS")

    def grown(self) -> int:
        """Bytes between the begin and the peak."""
        return self._status("VmHWM") - self._begin

    def _status(self, field: str) -> int:
        line = next(each for each in (self._folder / "status").read_text().splitlines() if each.startswith(field))
        return int(line.split()[1]) << 10
