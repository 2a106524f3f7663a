"""OpenTelemetry's instruments, whose measurements are taken in a moment later, when nobody waits for them.

Recording takes 5 us in a loop, but 80 us where it comes once a request and finds the caches cold; between a prompt and
its first token there are ten of them. Here a measurement is put on a list, which is emptied a second afterwards, when
mostly no prompt of then is computed any more, or as soon as it is long, and before anybody reads the metrics: what is
read is exact.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Observation

Labels = Mapping[str, str]
Observe = Callable[[CallbackOptions], Iterable[Observation]]
Record = Callable[[float, Labels], None]
DELAY_S = 1.0
# So many are recorded in 2 ms or so: for no longer is an event loop held up.
MANY = 256
# Bounds of the buckets of what takes time, from a route to a long answer. OpenTelemetry's own are for milliseconds.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_NONE: Labels = {}


class Counter:
    """A sum; `add` may be called in any thread."""

    def __init__(self, meter: "Meter", add: Record) -> None:
        self._note, self._add = meter.note, add

    def add(self, amount: float, labels: Labels = _NONE) -> None:
        """Note an amount."""
        self._note(self._add, amount, labels, is_sum=True)


class Histogram:
    """A distribution; `record` may be called in any thread."""

    def __init__(self, meter: "Meter", record: Record) -> None:
        self._note, self._record = meter.note, record

    def record(self, value: float, labels: Labels = _NONE) -> None:
        """Note a value."""
        self._note(self._record, value, labels, is_sum=False)


class Meter:
    """Makes instruments, under the names that OpenTelemetry has for it, and takes in what they note."""

    def __init__(self, meter: metrics.Meter) -> None:
        self._meter = meter
        self._notes: deque[tuple[Record, float, Labels, bool]] = deque()
        self._is_due = self._is_soon = False

    def create_counter(self, name: str, *, description: str) -> Counter:
        """A sum that grows."""
        return Counter(self, self._meter.create_counter(name, description=description).add)

    def create_up_down_counter(self, name: str, *, description: str) -> Counter:
        """A sum that grows and shrinks."""
        return Counter(self, self._meter.create_up_down_counter(name, description=description).add)

    def create_histogram(self, name: str, *, description: str) -> Histogram:
        """A distribution of times, in seconds."""
        made = self._meter.create_histogram(
            name, unit="s", description=description, explicit_bucket_boundaries_advisory=SECONDS
        )
        return Histogram(self, made.record)

    def create_observable_gauge(self, name: str, callbacks: Sequence[Observe], *, description: str) -> None:
        """A fact, asked for when the metrics are read."""
        self._meter.create_observable_gauge(name, callbacks, description=description)

    def create_observable_counter(self, name: str, callbacks: Sequence[Observe], *, description: str) -> None:
        """A sum, asked for when the metrics are read."""
        self._meter.create_observable_counter(name, callbacks, description=description)

    def note(self, record: Record, value: float, labels: Labels, *, is_sum: bool) -> None:
        """Keep a measurement for `take_in`, which follows in a moment."""
        self._notes.append((record, value, labels, is_sum))
        if self._is_due and len(self._notes) < MANY:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.take_in()
            return
        if not self._is_due:
            self._is_due = True
            loop.call_later(DELAY_S, self._due)
        elif not self._is_soon:
            self._is_soon = True
            loop.call_soon(self.take_in)

    def _due(self) -> None:
        self._is_due = False
        self.take_in()

    def take_in(self) -> None:
        """Record all measurements so far, those of one sum at once; in any thread."""
        self._is_soon = False
        sums: dict[tuple[Record, tuple[tuple[str, str], ...]], float] = {}
        for record, value, labels, is_sum in self._taken():
            if is_sum:
                key = record, tuple(labels.items())
                sums[key] = sums.get(key, 0) + value
            else:
                record(value, labels)
        for (add, items), amount in sums.items():
            add(amount, dict(items))

    def _taken(self) -> Iterable[tuple[Record, float, Labels, bool]]:
        while True:
            try:
                yield self._notes.popleft()
            except IndexError:  # empty; another thread may have been faster
                return
